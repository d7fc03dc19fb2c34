"""Small statistics of repeated runs: spread, significance, time to a target, width of the usable learning rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = [
    "USABLE",
    "Octaves",
    "first_reached",
    "holm",
    "largest_usable",
    "mean_sd",
    "median_reached",
    "paired",
    "usable_octaves",
    "welch",
]


USABLE = 0.02
"""So much worse than with the best hyperparameter a run may be (a fraction) for its hyperparameter to count as usable."""


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1 in the denominator; NaN for a single value)."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def welch(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Two-sided p-value of Welch's t-test that *a* and *b* have equal means; their variances may differ.

    None where the test says nothing: fewer than two values on a side, or no spread on either.
    """
    if min(len(a), len(b)) < 2 or (_alike(a, a) and _alike(b, b)):
        return None
    from scipy import stats

    sides = (*mean_sd(a), len(a), *mean_sd(b), len(b))
    return float(stats.ttest_ind_from_stats(*sides, equal_var=False).pvalue)


def paired(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Two-sided p-value of the paired t-test that the differences between *a* and *b*, of equal length, have mean 0.

    None where the test says nothing: fewer than two pairs, or differences that are all the same.
    """
    differences = [x - y for x, y in zip(a, b, strict=True)]
    if len(differences) < 2 or _alike(differences, [*a, *b]):
        return None
    from scipy import stats

    mean, sd = mean_sd(differences)
    t = abs(mean) / (sd / math.sqrt(len(differences)))
    return float(2 * stats.t.sf(t, len(differences) - 1))


def _alike(values: Sequence[float], of: Sequence[float]) -> bool:
    """Whether *values* differ by no more than the rounding of the numbers *of* which they were made."""
    return bool(np.ptp(values) <= 1e-12 * np.abs(of).max())


def holm(p_values: Sequence[float]) -> list[float]:
    """*p_values* corrected for their number (Holm 1979): they hold the chance of one false alarm or more below a level."""
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def first_reached(curve: Sequence[tuple[int, float]], target: float) -> int | None:
    """Steps of the first point (steps, accuracy) of *curve* that is at least *target*; None if there is none."""
    return next((steps for steps, accuracy in curve if accuracy >= target), None)


def median_reached(values: Sequence[int | None]) -> float | None:
    """Median in which None (not reached) counts as infinity; None if the median itself is not reached."""
    median = float(np.median([math.inf if v is None else v for v in values]))
    return median if math.isfinite(median) else None


class Octaves(NamedTuple):
    """Width of a range of learning rates in doublings; *at_least* if it may go on beyond what was tried."""

    width: float
    at_least: bool

    def __str__(self) -> str:
        return f"{'≥ ' if self.at_least else ''}{self.width:.1f}"


def usable_octaves(
    points: Sequence[tuple[float, float]], *, tolerance: float = USABLE, minimum: int = 3
) -> Octaves | None:
    """How far apart (in octaves) the learning rates lie whose accuracy is within *tolerance* of the best.

    *points* are (learning rate, accuracy). The range is grown from the best point to both sides until the first
    learning rate that is worse, so that a lucky outlier far away does not count. *at_least* says that it touches the
    smallest or the largest learning rate tried. None if fewer than *minimum* points are in it: too few to speak of a width.
    """
    ordered = sorted(points)
    if not ordered:
        return None
    best = max(range(len(ordered)), key=lambda i: ordered[i][1])
    floor = ordered[best][1] - tolerance
    low = high = best
    while low > 0 and ordered[low - 1][1] >= floor:
        low -= 1
    while high + 1 < len(ordered) and ordered[high + 1][1] >= floor:
        high += 1
    if high - low + 1 < minimum:
        return None
    return Octaves(math.log2(ordered[high][0] / ordered[low][0]), low == 0 or high == len(ordered) - 1)


def largest_usable(points: Sequence[tuple[float, float]], *, tolerance: float = USABLE) -> float:
    """The largest learning rate from the best one upwards whose accuracy stays within *tolerance* of the best."""
    ordered = sorted(points)
    best = max(range(len(ordered)), key=lambda i: ordered[i][1])
    high = best
    while high + 1 < len(ordered) and ordered[high + 1][1] >= ordered[best][1] - tolerance:
        high += 1
    return ordered[high][0]
