"""Tuning of one cell: which setting to try next, and the Optuna study that keeps what was tried.

The first half of the search is a scrambled Sobol sequence (even coverage, no luck needed), the second half is proposed by
Optuna's Gaussian-process sampler. `suggest` is a pure function of the finished trials and the seed: whoever continues an
interrupted study gets the settings that the uninterrupted one would have got.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from conjugo.errors import check

if TYPE_CHECKING:
    from types import ModuleType

    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

__all__ = ["Axis", "Setting", "StudyFile", "at_edge", "suggest"]


@dataclass(frozen=True)
class Axis:
    """A tuned hyperparameter: its name, its range, and the scale on which it is searched.

    log: logarithmic; complement: logarithmic in 1 - value, as suits a momentum; else linear. closed: *high* is the largest
    value that there is.
    """

    name: str
    low: float
    high: float
    log: bool = False
    complement: bool = False
    closed: bool = False

    def __post_init__(self) -> None:
        good = math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high
        check(good, "Axis", "low", self.low, f"finite and below high = {self.high}")
        check(self.low > 0 or not self.log, "Axis", "low", self.low, "positive on a logarithmic scale")
        check(self.high < 1 or not self.complement, "Axis", "high", self.high, "below 1 on the scale of 1 - value")

    def at(self, fraction: float) -> float:
        """The value at *fraction* (0 to 1) of the range."""
        if self.complement:
            return float(1 - (1 - self.low) * ((1 - self.high) / (1 - self.low)) ** fraction)
        if self.log:
            return float(self.low * (self.high / self.low) ** fraction)
        return self.low + fraction * (self.high - self.low)

    def fraction(self, value: float) -> float:
        """Where *value* lies in the range: 0 at *low*, 1 at *high*."""
        if self.complement:
            return math.log((1 - value) / (1 - self.low)) / math.log((1 - self.high) / (1 - self.low))
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


Setting = tuple[float, ...]
"""One value for each axis."""


def at_edge(axis: Axis, value: float, *, margin: float = 0.05) -> bool:
    """Whether *value* lies in the outer *margin* (fraction) of its range: then a better one may lie outside."""
    fraction = axis.fraction(value)
    return fraction < margin or (fraction > 1 - margin and not axis.closed)


def suggest(axes: Sequence[Axis], tried: Sequence[tuple[Setting, float]], *, trials: int, seed: int) -> Setting:
    """The setting to try next, after *tried* (setting, score to be maximised), out of *trials* in all."""
    number, initial = len(tried), (trials + 1) // 2
    if number < initial:
        from scipy.stats import qmc

        with warnings.catch_warnings():  # any number of points is fine for coverage
            warnings.filterwarnings("ignore", message="The balance properties of Sobol", category=UserWarning)
            point = qmc.Sobol(len(axes), rng=seed).random(initial)[number]
        return tuple(axis.at(float(fraction)) for axis, fraction in zip(axes, point))

    optuna = _optuna()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # optuna calls the sampler experimental in some versions
        sampler = optuna.samplers.GPSampler(seed=seed + number, n_startup_trials=0)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.add_trials([_trial(axes, setting, score) for setting, score in tried])
    proposed = study.ask(_space(axes)).params
    return tuple(_exchanged(axis, float(proposed[_label(axis)])) for axis in axes)


class StudyFile:
    """The trials as Optuna studies in an SQLite file, one study per cell, for Optuna's own tools (dashboard, plots)."""

    def __init__(self, path: Path | None) -> None:
        optuna = _optuna()
        self._storage = None if path is None else optuna.storages.RDBStorage(f"sqlite:///{path.resolve()}")

    def record(self, name: str, axes: Sequence[Axis], tried: Sequence[tuple[Setting, float]]) -> None:
        """Bring study *name* up to date with all trials of its cell so far; what is already there stays."""
        if self._storage is None:
            return
        study = _optuna().create_study(
            study_name=name, storage=self._storage, direction="maximize", load_if_exists=True
        )
        for setting, score in tried[len(study.trials) :]:
            study.add_trial(_trial(axes, setting, score))


def _label(axis: Axis) -> str:
    """Optuna knows logarithmic and linear scales: for the third one it gets 1 - value."""
    return f"1 - {axis.name}" if axis.complement else axis.name


def _exchanged(axis: Axis, value: float) -> float:
    """From our value to Optuna's, or back."""
    return 1 - value if axis.complement else value


def _space(axes: Sequence[Axis]) -> dict[str, BaseDistribution]:
    from optuna.distributions import FloatDistribution

    space: dict[str, BaseDistribution] = {}
    for axis in axes:
        low, high = sorted(_exchanged(axis, end) for end in (axis.low, axis.high))
        space[_label(axis)] = FloatDistribution(low, high, log=axis.log or axis.complement)
    return space


def _trial(axes: Sequence[Axis], setting: Setting, score: float) -> FrozenTrial:
    from optuna.trial import create_trial

    params = {_label(axis): _exchanged(axis, value) for axis, value in zip(axes, setting)}
    return create_trial(params=params, distributions=_space(axes), value=score)


def _optuna() -> ModuleType:
    try:
        import optuna
    except ImportError as error:
        raise ImportError("tuning needs Optuna: pip install 'conjugo[study]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna
