"""What follows from the noise of gradients: steps, examples, learning rate and time against the batch.

For a fixed target, S steps and E = B S examples lie on a hyperbola, (S / S_min - 1) (E / E_min - 1) = 1, which is
S = S_min (1 + B_crit / B) with B_crit = E_min / S_min (McCandlish, Kaplan & Amodei 2018, arXiv:1812.06162, equations 2.10 to
2.12). At the critical batch both are twice what they are at least. All batches, steps and times may be floats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from conjugo.errors import check

__all__ = [
    "CriticalBatch",
    "Interval",
    "adascale_gain",
    "critical_batch",
    "efficient_batch",
    "fastest_batch",
    "fit_critical_batch",
    "optimal_lr",
    "scale_adam",
    "steps",
]


class Interval(NamedTuple):
    """A number, and a lower and an upper end that hold it with a chance of 95 %."""

    value: float
    low: float
    high: float


class CriticalBatch(NamedTuple):
    """The hyperbola through measured steps."""

    b_crit: float
    """Critical batch, examples; infinite where steps fall in proportion to the batch."""
    s_min: float
    """Steps with a batch that is infinitely large; 0 where b_crit is infinite."""
    rms: float
    """Root of the mean squared difference of log steps."""


def steps(batch: float, s_min: float, b_crit: float) -> float:
    """S_min (1 + B_crit / B).

    >>> steps(100, s_min=500, b_crit=100)
    1000.0
    """
    check(batch > 0, "steps", "batch", batch, "> 0")
    return s_min * (1 + b_crit / batch)


def critical_batch(b1: float, s1: float, b2: float, s2: float) -> float:
    """B_crit of the hyperbola through two points: *s1* steps with batches of *b1* < *b2*, *s2* with *b2*.

    0 where the steps do not fall, infinite where they fall as fast as the batch grows, or faster.

    >>> round(critical_batch(10, 1100, 1000, 110), 6)
    100.0
    """
    check(0 < b1 < b2, "critical_batch", "the batches", (b1, b2), "0 < b1 < b2")
    check(s1 > 0 and s2 > 0, "critical_batch", "the steps", (s1, s2), "> 0")
    if s1 <= s2:
        return 0.0
    ratio = s1 / s2
    below = 1 / b1 - ratio / b2
    return (ratio - 1) / below if below > 0 else math.inf


def fit_critical_batch(batches: Sequence[float], measured: Sequence[float]) -> CriticalBatch:
    """The hyperbola nearest to *measured* steps at *batches*, by least squares of log steps: at least two different batches.

    >>> fit = fit_critical_batch([4, 64, 1024], [steps(b, 50, 200) for b in (4, 64, 1024)])
    >>> round(fit.b_crit, 6), round(fit.s_min, 6)
    (200.0, 50.0)
    """
    owner = "fit_critical_batch"
    check(len(set(batches)) >= 2, owner, "the number of different batches", len(set(batches)), ">= 2")
    check(len(batches) == len(measured), owner, "the number of measurements", len(measured), f"{len(batches)}")
    check(min(batches) > 0, owner, "the batches", min(batches), "> 0")
    check(min(measured) > 0, owner, "the steps", min(measured), "> 0")
    sizes, logs = np.array(batches, dtype=float), np.log(np.array(measured, dtype=float))

    def misfit(log_b: float) -> float:
        away = logs - np.logaddexp(0, log_b - np.log(sizes))
        return float(((away - away.mean()) ** 2).sum())

    low, high = math.log(sizes.min()) - 14, math.log(sizes.max()) + 14
    grid = np.linspace(low, high, 400)
    at = int(np.argmin([misfit(x) for x in grid]))
    left, right = grid[max(0, at - 1)], grid[min(len(grid) - 1, at + 1)]
    for _ in range(100):  # golden section
        a, b = right - 0.6180339887498949 * (right - left), left + 0.6180339887498949 * (right - left)
        if misfit(a) <= misfit(b):
            right = b
        else:
            left = a
    best = (left + right) / 2
    away = logs - np.logaddexp(0, best - np.log(sizes))
    rms = math.sqrt(misfit(best) / len(sizes))
    if at == len(grid) - 1:
        return CriticalBatch(math.inf, 0.0, rms)
    return CriticalBatch(0.0 if at == 0 else math.exp(best), math.exp(away.mean()), rms)


def efficient_batch(b_crit: float, efficiency: float = 0.5) -> float:
    """The largest batch that uses examples with *efficiency* = E_min / E, in (0, 1): B_crit (1 / efficiency - 1).

    >>> efficient_batch(1000, 0.5), efficient_batch(1000, 0.8)
    (1000.0, 250.0)
    """
    check(0 < efficiency < 1, "efficient_batch", "efficiency", efficiency, "in (0, 1)")
    return b_crit * (1 / efficiency - 1)


def fastest_batch(fixed: float, per_example: float, b_crit: float, *, workers: int = 1) -> float:
    """The global batch with which the target is reached soonest: sqrt(a B_crit W / c).

    A step takes a + c B / W, a = *fixed* >= 0 and c = *per_example* > 0 in the same unit, on W = *workers*. It is 0, or as
    small as can be, where steps have no fixed cost.

    >>> fastest_batch(0.01, 0.0001, 100)
    100.0
    """
    check(fixed >= 0, "fastest_batch", "fixed", fixed, ">= 0")
    check(per_example > 0, "fastest_batch", "per_example", per_example, "> 0")
    check(workers >= 1, "fastest_batch", "workers", workers, ">= 1")
    return math.sqrt(fixed * b_crit * workers / per_example)


def optimal_lr(batch: float, lr_max: float, b_noise: float) -> float:
    """SGD's best learning rate, lr_max / (1 + B_noise / B) (equation 2.7 there): in proportion to small batches, then constant.

    >>> optimal_lr(100, lr_max=1.0, b_noise=100)
    0.5
    """
    check(batch > 0, "optimal_lr", "batch", batch, "> 0")
    check(b_noise >= 0, "optimal_lr", "b_noise", b_noise, ">= 0")
    return lr_max / (1 + b_noise / batch)


def adascale_gain(scale: float, variance: float, grad_norm2: float) -> float:
    """What a batch that is *scale* >= 1 times as large makes of the learning rate: (s + m) / (s / scale + m), in [1, scale].

    variance: s, of the gradient of the small batch (trace over all parameters); grad_norm2: m = |G|^2.
    Source: Johnson, Agrawal, Gu & Guestrin 2020 (arXiv:2007.05105), equation 4. It is the ratio of :func:`optimal_lr` at
    the two batches for B_noise = s / m times the small one.

    >>> adascale_gain(4, variance=1.0, grad_norm2=0.0), adascale_gain(4, variance=0.0, grad_norm2=1.0)
    (4.0, 1.0)
    """
    check(scale >= 1, "adascale_gain", "scale", scale, ">= 1")
    check(variance >= 0 and grad_norm2 >= 0, "adascale_gain", "variance and grad_norm2", (variance, grad_norm2), ">= 0")
    check(variance + grad_norm2 > 0, "adascale_gain", "variance and grad_norm2", (0, 0), "not both 0")
    return (variance + grad_norm2) / (variance / scale + grad_norm2)


def scale_adam(lr: float, betas: tuple[float, float], eps: float, k: float) -> tuple[float, tuple[float, float], float]:
    """Adam's lr, betas and eps for batches *k* > 0 times as large: sqrt(k) lr, 1 - k (1 - beta), eps / sqrt(k).

    Source: the square-root rule of Malladi, Lyu, Panigrahi & Arora 2022 (arXiv:2205.10287), from the limit of small steps.
    Raises ValueError where a beta would leave [0, 1): so much larger the batch cannot be by this rule.

    >>> lr, betas, eps = scale_adam(1e-3, (0.9, 0.999), 1e-8, 4)
    >>> lr, [round(beta, 6) for beta in betas], eps
    (0.002, [0.6, 0.996], 5e-09)
    """
    check(0 < k < math.inf, "scale_adam", "k", k, "in (0, inf)")
    first, second = (1 - k * (1 - beta) for beta in betas)
    most = 1 / (1 - min(betas))
    check(
        min(first, second) >= 0 and max(first, second) < 1, "scale_adam", "k", k, f"in (0, {most:g}] for betas {betas}"
    )
    return lr * math.sqrt(k), (first, second), eps / math.sqrt(k)
