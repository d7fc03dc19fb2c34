"""What a comparison is asked for (`CompareConfig`) and what it gives (`CompareResult`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal, Self

from conjugo.errors import check, unknown
from conjugo.studies.plans import FIRST_TUNING_SEED, best_trial
from conjugo.studies.records import Run, Task
from conjugo.studies.runs import Contender
from conjugo.training.config import TrainConfig

__all__ = ["CellResult", "CompareConfig", "CompareResult"]

_SET_BY_COMPARISON = (
    "optimizer",
    "lr",
    "optimizer_options",
    "batch_size",
    "batch_schedule",
    "batch_growth",
    "batch_max",
    "noise_scale",
    "steps",
    "evaluations",
    "checkpoints",
    "spectra",
    "spectrum_at",
    "seed",
)


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Everything that a comparison depends on; equal configurations give equal results on the same machine.

    Args:
        train: What all runs have in common (data, model, epochs, schedule, ...). Its optimizer, lr, optimizer_options,
            batch_size, batch_schedule, batch_growth, steps, evaluations, checkpoints and seed are set by the comparison.
        optimizers: Names of optimizers (see train.optimizer).
        batch_sizes: Examples per step; full for all of the training data.
        trials: Tuning runs per optimizer and batch size.
        seeds: Fresh runs per optimizer and batch size, with the best setting.
        seed: Everything random begins here.
        validation: Fraction of the training data that tuning is judged on.
        target: Accuracy (fraction) of the steps-to-target columns; None: the baseline's mean at the smallest batch less one
            point.
        baseline: The optimizer that the others are tested against.
        evaluations: Points of a learning curve.
        train_limit: Use only the first so many training examples.
        test_limit: Use only the first so many test examples.
        threads: CPU threads of torch per worker (they change rounding).
        workers: Worker processes that share each run, as in conjugo train; batches and schedules stay the same. (Runs at the
            same time are --jobs.)

    Raises UnknownName for a name that does not exist and ValueError for a value out of its range.
    """

    train: TrainConfig
    optimizers: tuple[str, ...] = ("nlcg-orthogonal", "nlcg", "sgd", "momentum", "adamw", "muon", "lars", "lamb")
    batch_sizes: tuple[int | Literal["full"], ...]
    trials: int = 10
    seeds: int = 3
    seed: int = 0
    validation: float = 0.2
    target: float | None = None
    baseline: str = "momentum"
    evaluations: int = 20
    train_limit: int | None = None
    test_limit: int | None = None
    threads: int = 1
    workers: int = 1

    def __post_init__(self) -> None:
        self._check_names()
        sizes = self.batch_sizes
        distinct = len(sizes) > 0 and len(set(sizes)) == len(sizes)
        whole = all(size == "full" or (isinstance(size, int) and size >= 1) for size in sizes)
        self._check("batch_sizes", distinct and whole, "different positive integers or 'full', at least one")
        self._check("trials", self.trials >= 1, ">= 1")
        self._check("seeds", 1 <= self.seeds < FIRST_TUNING_SEED, f"from 1 to {FIRST_TUNING_SEED - 1}")
        self._check("seed", self.seed >= 0, ">= 0")
        self._check("validation", 0 < self.validation < 1, "a fraction between 0 and 1")
        self._check("target", self.target is None or 0 < self.target <= 1, "None or in (0, 1]")
        self._check("evaluations", self.evaluations >= 1, ">= 1")
        self._check("threads", self.threads >= 1, ">= 1")
        self._check("workers", self.workers >= 1, ">= 1")
        device, accepted = self.train.device, "'auto', 'cpu' or 'cuda' where workers share a run"
        check(self.workers == 1 or ":" not in device, "CompareConfig", "train.device", device, accepted)
        for name in ("train_limit", "test_limit"):
            limit = getattr(self, name)
            self._check(name, limit is None or limit >= 2, "None or >= 2")
        usual = TrainConfig()
        for name in _SET_BY_COMPARISON:
            value, default = getattr(self.train, name), getattr(usual, name)
            check(value == default, "CompareConfig", f"train.{name}", value, f"{default!r}: the comparison sets it")
        for name in self.optimizers:
            replace(
                self.train, optimizer=name
            )  # settings that do not go with an optimizer are refused now, not in its runs

    def _check_names(self) -> None:
        from conjugo.training import optimizers

        for name in self.optimizers:
            optimizers.entry(name)
        distinct = len(self.optimizers) > 0 and len(set(self.optimizers)) == len(self.optimizers)
        self._check("optimizers", distinct, "at least one name, without repetition")
        if self.baseline not in self.optimizers:
            unknown("baseline (it has to be one of the compared optimizers)", self.baseline, self.optimizers)

    def _check(self, name: str, condition: bool, accepted: str) -> None:
        check(condition, "CompareConfig", name, getattr(self, name), accepted)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        own = {key: value for key, value in vars(self).items() if key != "train"}
        lists = {key: [*own[key]] for key in ("optimizers", "batch_sizes")}
        return {"train": self.train.to_dict(), **own, **lists}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`."""
        lists = {key: tuple(data[key]) for key in ("optimizers", "batch_sizes")}
        return cls(**{**data, **lists, "train": TrainConfig.from_dict(data["train"])})


@dataclass(frozen=True)
class CellResult:
    """All runs of one (optimizer, batch size) cell, in order of their index.

    trials, finals: as far as they have finished; complete: all of them have. crash: why the cell was given up, if it was.
    """

    contender: Contender
    batch_size: int
    trials: tuple[Run, ...]
    finals: tuple[Run, ...]
    complete: bool
    crash: str | None = None

    @property
    def best(self) -> Task:
        """The (first) trial of the setting that the fresh seeds use."""
        return best_trial(self.trials)

    @property
    def accuracies(self) -> list[float]:
        """Test accuracy (fraction) of each fresh seed."""
        return [run.outcome.accuracy for run in self.finals]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of :func:`dataclasses.asdict`."""
        runs = {phase: tuple(map(Run.from_dict, data[phase])) for phase in ("trials", "finals")}
        return cls(**{**data, **runs, "contender": Contender.from_dict(data["contender"])})


@dataclass(frozen=True, kw_only=True)
class CompareResult:
    """A comparison, finished or (cells not complete) on its way.

    num_train: examples in the training data, which is also the full batch. target: accuracy (fraction) of the
    steps-to-target columns. versions: of conjugo, torch, numpy, optuna and Python, and the machine.
    """

    config: CompareConfig
    cells: tuple[CellResult, ...]
    num_train: int
    target: float
    versions: Mapping[str, str]

    @property
    def runs(self) -> list[Run]:
        """All runs that have finished."""
        return [run for cell in self.cells for run in (*cell.trials, *cell.finals)]

    @property
    def complete(self) -> bool:
        """Whether nothing remains to be done."""
        return all(cell.complete for cell in self.cells)

    @property
    def crashes(self) -> list[str]:
        """What went wrong, one message for each cell that was given up."""
        return [cell.crash for cell in self.cells if cell.crash is not None]

    @cached_property
    def batch_sizes(self) -> tuple[int, ...]:
        """The batch sizes as numbers, ascending."""
        return tuple(sorted({cell.batch_size for cell in self.cells}))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "config": self.config.to_dict(),
            "num_train": self.num_train,
            "target": self.target,
            "versions": dict(self.versions),
            "cells": [asdict(cell) for cell in self.cells],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`."""
        cells = tuple(map(CellResult.from_dict, data["cells"]))
        return cls(**{**data, "config": CompareConfig.from_dict(data["config"]), "cells": cells})
