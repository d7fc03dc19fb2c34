"""A line search for the strong Wolfe conditions, as a generator of step lengths.

Nocedal & Wright 2006, algorithms 3.5 and 3.6, with cubic steps, and with what they leave open: regions where the function is
not finite, and the end of the digits of f (Hager & Zhang 2005).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from typing import NamedTuple

from conjugo.optim.classical.protocol import Point

__all__ = ["MOST_TRIALS", "Outcome", "Sample", "cubic_minimum", "line_search", "secant"]

MOST_TRIALS = 30
GROWTH = (1.1, 10.0)
"""Bounds of a step outwards, relative to the step before."""
MARGIN = 0.1
"""Part of a bracket, at either end, where no trial is made."""


class Sample(NamedTuple):
    """A point on the line: step length, value, slope."""

    step: float
    f: float
    slope: float


class Outcome(NamedTuple):
    """found: the last trial satisfies the conditions. step: the lowest point seen (0: none is below the start)."""

    found: bool
    step: float
    point: Point | None


def cubic_minimum(a: Sample, b: Sample) -> float:
    """The step at which the cubic through two samples (values and slopes) has its minimum; NaN if it has none.

    Nocedal & Wright 2006, equation 3.59. Where the values are equal to the last digits the slopes alone decide.
    """
    width = b.step - a.step
    mean = 3 * (b.f - a.f) / width
    d1 = a.slope + b.slope - mean
    discriminant = d1 * d1 - a.slope * b.slope
    if not discriminant >= 0:
        return math.nan
    d2 = math.copysign(math.sqrt(discriminant), width)
    denominator = b.slope - a.slope + 2 * d2
    return b.step - width * (b.slope + d2 - d1) / denominator if denominator else math.nan


def secant(a: Sample, b: Sample) -> float:
    """The step at which the slope, linear between two samples, is zero; NaN for equal slopes."""
    bend = b.slope - a.slope
    return a.step - a.slope * (b.step - a.step) / bend if bend else math.nan


def line_search(
    f: float,
    slope: float,
    first: float,
    *,
    c1: float,
    c2: float,
    noise: float,
    lowest: float,
    trials: int = MOST_TRIALS,
    enough: Callable[[float, Point], bool] = lambda step, point: False,
) -> Generator[float, Point, Outcome]:
    """Yield step lengths, receive the points there, return the outcome.

    Accepted is a step with phi(step) <= f + c1 step slope and abs(phi'(step)) <= c2 abs(slope), or one that is *enough* by
    itself. f, slope < 0: value and slope at step 0. lowest: the lowest value measured so far; it is f, unless that is an
    estimate. first > 0: the first trial. noise: absolute rounding error of f; a rise within it does not count, then slopes
    decide (the approximate Wolfe conditions). trials: at most so many.
    """
    low = Sample(0.0, f, slope)
    high = None
    best: tuple[float, Point | None] = (0.0, None)
    least = lowest
    ceiling, step, widths = math.inf, first, (math.inf, math.inf)
    for _ in range(trials):
        point = yield step
        if not point.finite:
            ceiling, step = step, low.step + 0.5 * (step - low.step)
            if step in (low.step, ceiling):
                break
            continue
        here = Sample(step, point.f, point.slope)
        lower = point.f <= max(f, lowest) + c1 * step * slope + noise
        if (lower and abs(point.slope) <= -c2 * slope) or enough(step, point):
            return Outcome(True, step, point)
        if point.f < least:
            best, least = (step, point), point.f
        if not lower or point.f > low.f + noise:
            high = here
        elif high is None:
            if point.slope >= 0:
                low, high = here, low
            else:
                step, low = _outwards(low, here, ceiling), here
                if step == low.step:
                    break
                continue
        else:
            if point.slope * (high.step - low.step) >= 0:
                high = low
            low = here
        step = _inwards(low, high, noise, halve=abs(high.step - low.step) > 0.66 * widths[0])
        widths = (widths[1], abs(high.step - low.step))
        if step in (low.step, high.step):
            break
    return Outcome(False, *best)


def _outwards(before: Sample, here: Sample, ceiling: float) -> float:
    """The next step behind *here*, from where the function still falls; halfway to *ceiling*, where it is not finite."""
    step = cubic_minimum(before, here)
    # A cubic without a minimum in front of us: the slope hardly grows, go as far as allowed.
    step = min(max(step, GROWTH[0] * here.step), GROWTH[1] * here.step) if step > here.step else GROWTH[1] * here.step
    return min(step, 0.5 * (here.step + ceiling))


def _inwards(low: Sample, high: Sample, noise: float, *, halve: bool) -> float:
    """The next step between two samples."""
    left, right = sorted((low.step, high.step))
    step = math.nan
    if not halve:
        flat = abs(high.f - low.f) <= noise and low.slope * high.slope < 0
        step = secant(low, high) if flat else cubic_minimum(low, high)
    if not left <= step <= right:
        step = 0.5 * (left + right)
    margin = MARGIN * (right - left)
    return min(max(step, left + margin), right - margin)
