"""Gao & Zhong 2020: small losses that are discarded, and batches that grow, at the scale of a CPU.

Protocol. A 64-128-128-10 perceptron with batch norm learns digits with momentum 0.9. The learning rate warms up in 10 % of
the steps. With discarding it then drops at 51 % and 76.5 % of the steps; as a control it stays. With growing batches it stays.
Nothing is tuned: what is compared has the same learning rates and seeds. Discarding is done at three learning rates, because
large losses have large gradients: a gain that a larger rate gives too is none of the method. A constant batch that takes as
many steps is the control of a growing one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from conjugo.optim.schedules import BatchSizeSchedule
from conjugo.studies import statistics
from conjugo.studies.records import Outcome, Task
from conjugo.studies.reproduce.grids import Grid, GridResult, run_grids, save
from conjugo.studies.reproduce.paper import (
    Claim,
    Judge,
    Paper,
    Request,
    above,
    compared,
    near,
    new_table,
    sentences,
)
from conjugo.studies.runs import Contender, load_data, train_once, versions
from conjugo.studies.summary import percent
from conjugo.training import TrainConfig

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["DISCARDING", "GROWING", "PAPER", "BatchSizePlan", "BatchSizeResult", "experiment", "run_task"]

TRAIN = TrainConfig(data="digits", model="mlp-bn", schedule="polynomial", warmup=0.1)

DISCARDING: Mapping[int, Mapping[float, float]] = {
    512: {0.0: 0.971, 0.2: 0.981, 0.4: 0.982, 0.6: 0.986},
    64: {0.0: 0.986, 0.2: 0.988, 0.4: 0.987, 0.6: 0.986},
}
"""Test accuracy by batch and discarded fraction of a first, throw-away implementation: learning rate 0.1, four seeds."""

GROWING: Mapping[str, float] = {"64": 0.986, "64 → 512": 0.988, "32 → 128 → 512": 0.985}
"""The same of batches that grow."""

_HALF_A_POINT = 0.005


def _schedules() -> dict[str, tuple[tuple[int, int], ...]]:
    return {
        "64": ((0, 64),),
        "64 → 512": ((0, 64), (8, 512)),
        "32 → 128 → 512": ((0, 32), (6, 128), (11, 512)),
        "110": ((0, 110),),  # as many steps as 64 → 512
    }


_SUFFIX = {"once": "", "twice": " · twice", "constant": " · lr stays"}
"""How discarding is done, in the first column of its table."""


@dataclass(frozen=True, kw_only=True)
class BatchSizePlan:
    """All that the runs depend on.

    epochs: of discarding, by batch size; at the first one it is also done in two forward passes, and at a learning rate that
    stays. fractions: that are discarded, the first is 0. lrs: of discarding, ascending; the first is that of everything else.
    schedules: by name, the milestones of batches that grow, between a constant batch with more steps and one with as many;
    schedule_epochs: their length.
    """

    epochs: Mapping[int, int] = field(default_factory=lambda: {512: 30, 64: 15})
    fractions: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6)
    lrs: tuple[float, ...] = (0.1, 0.2, 0.4)
    schedules: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=_schedules)
    schedule_epochs: int = 15
    seeds: int = 16

    def cells(self) -> list[Grid]:
        """The plan of every condition."""
        discarding = [
            (way, f"{q:g}", batch, self.lrs if way == "once" else self.lrs[:1]) for way, batch, q in self.rows()
        ]
        growing = [("growing", name, pairs[0][1], self.lrs[:1]) for name, pairs in self.schedules.items()]
        return [
            Grid(study=study, contender=name, batch_size=batch, lrs=lrs, seeds=self.seeds, choose=False)
            for study, name, batch, lrs in [*discarding, *growing]
        ]

    def rows(self) -> list[tuple[str, int, float]]:
        """How, at which batch size, and which fraction is discarded."""
        large = next(iter(self.epochs))
        return [
            *(("once", batch, q) for batch in self.epochs for q in self.fractions),
            *(("twice", large, q) for q in self.fractions[1:]),
            *(("constant", large, q) for q in self.fractions),
        ]


def run_task(plan: BatchSizePlan, task: Task) -> Outcome:
    """Do one run."""
    dataset = load_data(TRAIN, None, None)
    if task.study == "growing":
        milestones, epochs = plan.schedules[task.contender], plan.schedule_epochs
        base = replace(TRAIN, batch_schedule=tuple(milestones[1:]), schedule="constant")
    else:
        milestones, epochs = ((0, task.batch_size),), plan.epochs[task.batch_size]
        base = replace(TRAIN, discard_small_loss=float(task.contender))
        base = replace(base, discard_forward="twice") if task.study == "twice" else base
        base = replace(base, schedule="constant") if task.study == "constant" else base
    steps = BatchSizeSchedule(milestones).steps(len(dataset.train), epochs)
    return train_once(base, Contender.from_catalogue("momentum"), task, dataset, steps=steps, evaluations=1)


def experiment(
    request: Request,
    *,
    plan: BatchSizePlan | None = None,
    run: Callable[[BatchSizePlan, Task], Outcome] = run_task,
) -> BatchSizeResult:
    """Do the experiment. plan: None is the whole of it; run: does one run (a stand-in for tests)."""
    from conjugo.studies.reproduce import figures

    plan = BatchSizePlan() if plan is None else plan
    description = {"paper": "batch-size", "scale": "cpu", "train": TRAIN.to_dict(), **asdict(plan)}
    results, crashes = run_grids(plan.cells(), partial(run, plan), description, request)
    result = BatchSizeResult(plan, results, crashes, {**versions(TRAIN), "workers": str(request.workers)})
    if request.out is not None:
        save(result.to_dict(), {"discarding": figures.discarding(result)}, request.out)
    return result


@dataclass(frozen=True)
class BatchSizeResult:
    """The finished cells, and messages about those that crashed."""

    plan: BatchSizePlan
    cells: tuple[GridResult, ...]
    crashes: tuple[str, ...]
    versions: Mapping[str, str]

    def cell(self, study: str, name: str, batch_size: int) -> GridResult | None:
        """The cell of a condition, None if it is not there."""
        return next((cell for cell in self.cells if cell.grid.cell == (study, name, batch_size)), None)

    def discarded(self, batch_size: int, q: float, *, way: str = "once") -> GridResult | None:
        """The cell in which the fraction *q* was discarded."""
        return self.cell(way, f"{q:g}", batch_size)

    def grown(self, name: str) -> GridResult | None:
        """The cell of a batch-size schedule."""
        return self.cell("growing", name, self.plan.schedules[name][0][1])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "paper": "batch-size",
            "scale": "cpu",
            "plan": asdict(self.plan),
            "versions": dict(self.versions),
            "expected": {
                "discarding": {batch: dict(row) for batch, row in DISCARDING.items()},
                "growing": dict(GROWING),
            },
            "cells": [cell.to_dict() for cell in self.cells],
            "crashes": list(self.crashes),
            "claims": [claim.to_dict() for claim in self.claims()],
        }

    # ---- tables ----

    def tables(self) -> list[RenderableType]:
        """Accuracy, expected and ours, and test losses."""
        return [self._discarding_table(), self._growing_table()]

    def _discarding_table(self) -> RenderableType:
        table = new_table(
            "Discarding small losses: test accuracy (%) by batch size and discarded fraction",
            f"Mean ± sd of {self.plan.seeds} seeds. Expected: a first implementation at lr {self.plan.lrs[0]:g}. Loss: mean "
            "test loss there. Twice: in two forward passes.",
        )
        for title in ("expected", *(f"lr {lr:g}" for lr in self.plan.lrs), "loss"):
            table.add_column(title, justify="right", no_wrap=True)
        for way, batch, q in self.plan.rows():
            cell = self.discarded(batch, q, way=way)
            expected = DISCARDING.get(batch, {}).get(q) if way == "once" else None
            accuracies = [_shown(cell, lr) for lr in (self.plan.lrs if way == "once" else self.plan.lrs[:1])]
            accuracies += [""] * (len(self.plan.lrs) - len(accuracies))
            name = f"{batch} · {q:g}{_SUFFIX[way]}"
            table.add_row(
                name, "" if expected is None else percent(expected), *accuracies, _loss(cell, self.plan.lrs[0])
            )
        return table

    def _growing_table(self) -> RenderableType:
        table = new_table(
            "Growing batches: test accuracy (%)",
            f"Mean ± sd of {self.plan.seeds} seeds, {self.plan.schedule_epochs} epochs, lr {self.plan.lrs[0]:g}.",
        )
        for title in ("steps", "expected", "accuracy", "loss"):
            table.add_column(title, justify="right", no_wrap=True)
        for name in self.plan.schedules:
            cell, expected = self.grown(name), GROWING.get(name)
            lr, shown = self.plan.lrs[0], "" if expected is None else percent(expected)
            table.add_row(name, str(_steps(cell) or "–"), shown, _shown(cell, lr), _loss(cell, lr))
        return table

    # ---- sentences ----

    def text(self) -> str:
        """What reproduced and what did not."""
        notes = [
            "To be above or below counts only where it is significant (Welch's test, p < 0.05, not corrected for the number of "
            "comparisons).",
            *(f"Given up: {crash}" for crash in self.crashes),
        ]
        return sentences(self.claims(), notes)

    def claims(self) -> list[Claim]:
        """What was expected, judged by the runs."""
        large, small = max(self.plan.epochs), min(self.plan.epochs)
        gain, level = above(_HALF_A_POINT), near(_HALF_A_POINT)
        constant, *growing, control = self.plan.schedules
        return [
            self._discarding_claim(
                f"with batch {large} discarding small losses gains at least half a point", large, gain
            ),
            self._discarding_claim(f"with batch {small} discarding changes less than half a point", small, level),
            self._best_claim(large),
            self._discarding_claim(
                f"so it does with batch {large} at a learning rate that stays", large, gain, "constant"
            ),
            Claim(
                "two forward passes, where batch norm sees the kept examples only, are within half a point of one",
                {
                    f"q = {q:g}": self._compared(self.discarded(large, q, way="twice"), self.discarded(large, q), level)
                    for q in self.plan.fractions[1:]
                },
            ),
            Claim(
                f"batches that grow at a constant learning rate are within half a point of constant {constant}",
                {name: self._compared(self.grown(name), self.grown(constant), level) for name in growing},
            ),
            Claim(
                "batches that grow eightfold half way take at least 40 % fewer steps",
                {name: self._fewer(name, constant) for name in growing[:1]},
            ),
            Claim(
                f"they are above a constant batch of {control}, which takes as many steps",
                {name: self._compared(self.grown(name), self.grown(control), above(0.0)) for name in growing[:1]},
            ),
        ]

    def _discarding_claim(self, statement: str, batch: int, judge: Judge, way: str = "once") -> Claim:
        kept = self.discarded(batch, 0.0, way=way)
        cells = {q: self.discarded(batch, q, way=way) for q in self.plan.fractions[1:]}
        return Claim(statement, {f"q = {q:g}": self._compared(cell, kept, judge) for q, cell in cells.items()})

    def _best_claim(self, batch: int) -> Claim:
        """Each with the best of the learning rates, by the test data."""
        cases = {}
        for q in self.plan.fractions[1:]:
            ours, theirs = (self.discarded(batch, fraction) for fraction in (q, 0.0))
            found = [None if cell is None else cell.accuracies for cell in (ours, theirs)]
            holds, said = compared(found[0], found[1], above(_HALF_A_POINT))
            where = "" if ours is None or theirs is None else f" at {ours.best:g} against {theirs.best:g}"
            cases[f"q = {q:g}"] = (holds, f"{said}{where}")
        return Claim(f"so it does with batch {batch} where each has the better learning rate for it", cases)

    def _compared(self, ours: GridResult | None, theirs: GridResult | None, judge: Judge) -> tuple[bool | None, str]:
        cells = (ours, theirs)
        found = [None if cell is None else cell.at(self.plan.lrs[0]) for cell in cells]
        return compared(found[0], found[1], judge)

    def _fewer(self, name: str, constant: str) -> tuple[bool | None, str]:
        ours, theirs = _steps(self.grown(name)), _steps(self.grown(constant))
        if ours is None or theirs is None:
            return None, "not run"
        return ours <= 0.6 * theirs, f"{ours} against {theirs} steps"


def _shown(cell: GridResult | None, lr: float) -> str:
    return "–" if cell is None else percent(*statistics.mean_sd(cell.at(lr)))


def _loss(cell: GridResult | None, lr: float) -> str:
    if cell is None:
        return "–"
    losses = [run.outcome.loss for run in cell.searched if run.task.lr == lr]
    return f"{statistics.mean_sd([math.inf if loss is None else loss for loss in losses])[0]:.3f}"


def _steps(cell: GridResult | None) -> int | None:
    return None if cell is None else cell.runs[0].outcome.steps


PAPER = Paper(
    title="Study on the Large Batch Size Training of Neural Networks Based on the Second Order Gradient",
    source="F. Gao, H. Zhong, arXiv:2012.08795 (2020)",
    scales={"cpu": experiment},
)
