"""Steps to a target at batches that were not tried, from steps at batches that were, with intervals.

The logarithm of the steps at batch B is taken to be

    log S(B) = log S_min + log(1 + B_crit / B) + f(B),

the hyperbola of McCandlish et al. 2018 (arXiv:1812.06162, equation 2.11) and a smooth departure f from it, a Gaussian process
in log B: training is no quadratic, and its knee can be sharper than the hyperbola's. What is measured has noise besides. B_crit
has a prior, such as a mean of gradient noise scales; S_min has none. So one measured batch and a noise scale give a
forecast with a wide interval, and every further batch makes it narrower where it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from conjugo.errors import check
from conjugo.scaling.laws import Interval

__all__ = ["StepsForecast", "krige"]

Values = np.ndarray[Any, np.dtype[np.float64]]

_GRID = np.linspace(-20, 20, 2001)  # of log B_crit, in units of its standard deviation
_Z = 1.959964


class StepsForecast:
    """Steps S(B) and the critical batch, given steps at some batches.

    batches, steps: what was measured, at least one; a batch may occur several times (seeds). b_prior: where B_crit is expected,
    examples > 0; prior_factor: the factor > 1 within which it is with a chance of 95 %. noise: standard deviation of log steps
    over seeds, > 0. departure: that of f. width: ratio of batches over which f changes, > 1.

    Raises ValueError for values out of range.

    >>> forecast = StepsForecast([16, 256], [700, 125], b_prior=100, prior_factor=4)
    >>> [round(x) for x in forecast.steps(64)], round(forecast.b_crit.value)
    ([240, 216, 267], 112)
    """

    def __init__(
        self,
        batches: Sequence[float],
        steps: Sequence[float],
        *,
        b_prior: float,
        prior_factor: float = 3.0,
        noise: float = 0.06,
        departure: float = 0.1,
        width: float = 8.0,
        common: float = 0.0,
    ) -> None:
        owner = "StepsForecast"
        check(len(batches) >= 1, owner, "the number of batches", len(batches), ">= 1")
        check(len(batches) == len(steps), owner, "the number of steps", len(steps), f"{len(batches)}, one per batch")
        for name, values in (("batches", batches), ("steps", steps)):
            good = all(0 < value < math.inf for value in values)
            check(good, owner, name, list(values), "finite numbers > 0")
        check(0 < b_prior < math.inf, owner, "b_prior", b_prior, "in (0, inf)")
        check(1 < prior_factor < math.inf, owner, "prior_factor", prior_factor, "in (1, inf)")
        check(noise > 0, owner, "noise", noise, "> 0")
        check(departure >= 0, owner, "departure", departure, ">= 0")
        check(width > 1, owner, "width", width, "> 1")
        check(common >= 0, owner, "common", common, ">= 0")
        self._x = np.log(np.array(batches, dtype=float))
        y = np.log(np.array(steps, dtype=float))
        self._departure, self._width, self._common = departure, math.log(width), common
        deviation = math.log(prior_factor) / _Z
        self._log_b = math.log(b_prior) + deviation * _GRID
        self._inverse = np.linalg.inv(self._covariance(self._x, self._x) + noise**2 * np.eye(len(y)))
        ones = np.ones(len(y))
        self._total = float(ones @ self._inverse @ ones)
        away = y[None] - np.logaddexp(0, self._log_b[:, None] - self._x[None])  # [grid, n]: log S_min + f + noise
        self._means = away @ self._inverse @ ones / self._total  # of log S_min, given B_crit
        self._rest = away - self._means[:, None]
        misfit = np.einsum("gi,ij,gj->g", self._rest, self._inverse, self._rest)
        # Student's t with four degrees of freedom, and the same interval of 95 % as a normal distribution: its tails let
        # measurements overrule an expectation that was wrong.
        log_weights = -misfit / 2 - 2.5 * np.log1p(_GRID**2 / 1.993)
        weights = np.exp(log_weights - log_weights.max())
        self._weights: Values = weights / weights.sum()

    def _covariance(self, a: Values, b: Values) -> Values:
        apart = (a[:, None] - b[None]) / self._width
        return np.asarray(self._departure**2 * np.exp(-(apart**2) / 2))

    @property
    def b_crit(self) -> Interval:
        """The critical batch, in examples."""
        cumulative = np.cumsum(self._weights)
        mean = float(self._weights @ self._log_b)
        low, high = (float(np.interp(p, cumulative, self._log_b)) for p in (0.025, 0.975))
        return Interval(math.exp(mean), math.exp(low), math.exp(high))

    def steps(self, batch: float) -> Interval:
        """Steps with batches of *batch* > 0 examples: the median, and the interval of 95 %, seeds included in neither."""
        check(0 < batch < math.inf, "StepsForecast.steps", "batch", batch, "in (0, inf)")
        return _interval(*self._logs(math.log(batch)))

    def _logs(self, x: float) -> tuple[float, float]:
        """Mean and standard deviation of log S at log B = *x*."""
        at = np.array([x])
        k = self._covariance(at, self._x)[0]
        means = np.logaddexp(0, self._log_b - x) + self._means + self._rest @ self._inverse @ k
        unknown = 1 - float(k @ self._inverse @ np.ones(len(k)))
        variance = self._common**2 + self._departure**2 - float(k @ self._inverse @ k) + unknown**2 / self._total
        mean = float(self._weights @ means)
        return mean, math.sqrt(max(0.0, variance) + float(self._weights @ (means - mean) ** 2))


def krige(x: float, xs: Sequence[float], ys: Sequence[float], *, deviation: float, noise: float, width: float) -> float:
    """The smooth curve through noisy points (*xs*, *ys*) at *x*: a Gaussian process of unknown mean.

    deviation: of the curve from its mean; noise: of the points; width: in x, over which the curve changes. All > 0.

    >>> round(krige(1.0, [0.0, 2.0], [0.0, 1.0], deviation=0.3, noise=0.01, width=1.0), 3)
    0.5
    """
    places, values = np.array(xs, dtype=float), np.array(ys, dtype=float)
    covariance = deviation**2 * np.exp(-(((places[:, None] - places[None]) / width) ** 2) / 2)
    inverse = np.linalg.inv(covariance + noise**2 * np.eye(len(places)))
    mean = float((inverse @ values).sum() / inverse.sum())
    common = deviation**2 * np.exp(-(((places - x) / width) ** 2) / 2)
    return mean + float(common @ inverse @ (values - mean))


def _interval(mean: float, deviation: float) -> Interval:
    return Interval(*(math.exp(mean + z * deviation) for z in (0.0, -_Z, _Z)))
