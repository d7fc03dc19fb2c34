"""NLCG on a CPU with convolutions and batch norm: part of CIFAR-10, made smaller, the full batch, 60 steps.

The first 4,096 training and 2,000 test images, pooled to 16 x 16 pixels, standardised each; three convolutions of 16, 32
and 64 channels with batch norm, the mean, a linear layer; 60 full-batch steps with the warm-up, the drops and the weight
decay of the paper's CIFAR runs, no augmentation. The question is what happens at three times the best learning rate, so
that has most of the seeds. Nothing is tuned: every run is a final one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.nn import functional as F

from conjugo.errors import DataUnavailable
from conjugo.studies import statistics
from conjugo.studies.records import Outcome, Task
from conjugo.studies.reproduce.grids import Grid, GridResult, run_grids, save
from conjugo.studies.reproduce.paper import Claim, Judge, Request, above, compared, near, new_table, sentences
from conjugo.studies.runs import Contender, load_data, train_once, versions
from conjugo.studies.summary import percent
from conjugo.training import TrainConfig

if TYPE_CHECKING:
    from rich.console import RenderableType

    from conjugo.training.data import Dataset, Split

__all__ = ["EXPECTED", "LABELS", "SmallPlan", "SmallResult", "experiment", "pooled", "run_task", "why_not"]

TRAIN = TrainConfig(
    data="cifar10",
    model="cnn",
    batch_size="full",
    schedule="polynomial",
    warmup=0.125,
    weight_decay=2e-4,
    decay_norm_and_bias=False,
    augment=False,
    precision="float32",
    threads=1,
)

LABELS = {"momentum": "momentum 0.9", "nlcg": "NLCG FR + BFGS"}

EXPECTED: Mapping[str, Mapping[float, float]] = {
    "momentum": {1.0: 0.428, 3.0: 0.351},
    "nlcg": {1.0: 0.434, 3.0: 0.418},
}
"""Test accuracy by optimizer and learning rate of a first, throw-away implementation of the method, one seed."""

_LONGEST = 600.0  # seconds that this part may take without being asked for twice


@dataclass(frozen=True, kw_only=True)
class SmallPlan:
    """All that the runs depend on. seeds: their number by learning rate; train_limit, test_limit: images."""

    train: TrainConfig = TRAIN
    steps: int = 60
    seeds: Mapping[float, int] = field(default_factory=lambda: {1.0: 1, 3.0: 3})
    train_limit: int = 4096
    test_limit: int = 2000

    def cells(self) -> list[Grid]:
        """The plan of every (learning rate, optimizer) pair."""
        return [
            Grid(study=f"lr {lr:g}", contender=name, batch_size=self.train_limit, lrs=(lr,), seeds=seeds, choose=False)
            for lr, seeds in self.seeds.items()
            for name in LABELS
        ]

    @property
    def runs(self) -> int:
        """Their number."""
        return sum(cell.size for cell in self.cells())


def pooled(dataset: Dataset) -> Dataset:
    """*dataset* with images of half the side: means of 2 x 2 pixels, rounded."""

    def smaller(split: Split) -> Split:
        return replace(split, inputs=F.avg_pool2d(split.inputs.float(), 2).round().byte())

    return replace(dataset, train=smaller(dataset.train), test=smaller(dataset.test))


def _data(plan: SmallPlan) -> Dataset:
    return pooled(load_data(plan.train, plan.train_limit, plan.test_limit))


def run_task(plan: SmallPlan, task: Task) -> Outcome:
    """Do one run."""
    contender = Contender.from_catalogue(task.contender)
    return train_once(plan.train, contender, task, _data(plan), steps=plan.steps, evaluations=1)


def seconds_per_step(plan: SmallPlan) -> float:
    """Measured here, in one process, over two steps; the first is slower than the rest."""
    cell = replace(plan.cells()[0], seeds=1)
    contender = Contender.from_catalogue(cell.contender)
    probe = train_once(plan.train, contender, cell.ready([])[0], _data(plan), steps=2, evaluations=1)
    return probe.seconds / probe.steps


def why_not(
    request: Request, plan: SmallPlan | None = None, *, measure: Callable[[SmallPlan], float] = seconds_per_step
) -> str | None:
    """Why this part should be left out: no data, or too slow a machine; None if there is nothing against it.

    What has been begun is always continued, and force leaves nothing out for its time.
    """
    plan = SmallPlan() if plan is None else plan
    try:
        load_data(plan.train, plan.train_limit, plan.test_limit)
    except DataUnavailable as error:
        return f"CIFAR-10, small, was left out: {error}"
    if request.force or _begun(request):
        return None
    at_once = min(request.jobs * request.workers, os.cpu_count() or 1)
    expected = measure(plan) * plan.steps * plan.runs / at_once
    if expected <= _LONGEST:
        return None
    return (
        f"CIFAR-10, small, was left out: {plan.runs} runs would take about {expected / 60:.0f} minutes here, more than "
        f"{_LONGEST / 60:.0f}. --force (force=True), with --resume to keep what is done, does them all the same"
    )


def _begun(request: Request) -> bool:
    return request.resume and request.out is not None and (request.out / "config.json").exists()


def experiment(
    request: Request,
    plan: SmallPlan | None = None,
    *,
    run: Callable[[SmallPlan, Task], Outcome] = run_task,
) -> SmallResult:
    """Do the experiment; plan: None is the whole of it; run: does one run (a stand-in for tests).

    Resumed before it has begun it begins: it is a part of something that was interrupted earlier, or left it out.
    """
    plan = SmallPlan() if plan is None else plan
    request = replace(request, resume=_begun(request))
    description = {"paper": "nlcg", "part": "cifar10", **asdict(plan), "train": plan.train.to_dict()}
    results, crashes = run_grids(plan.cells(), partial(run, plan), description, request)
    result = SmallResult(plan, results, crashes, {**versions(plan.train), "workers": str(request.workers)})
    if request.out is not None:
        save(result.to_dict(), {}, request.out)
    return result


@dataclass(frozen=True)
class SmallResult:
    """The finished cells, and messages about those that crashed."""

    plan: SmallPlan
    cells: tuple[GridResult, ...]
    crashes: tuple[str, ...]
    versions: Mapping[str, str]

    def accuracies(self, name: str, lr: float) -> list[float] | None:
        """Of an optimizer at a learning rate, None if these runs are not there."""
        wanted = (name, (lr,))
        cells = (cell for cell in self.cells if (cell.grid.contender, cell.grid.lrs) == wanted)
        return next((cell.accuracies for cell in cells), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "paper": "nlcg",
            "part": "cifar10",
            "plan": {**asdict(self.plan), "train": self.plan.train.to_dict()},
            "versions": dict(self.versions),
            "expected": {name: dict(row) for name, row in EXPECTED.items()},
            "cells": [cell.to_dict() for cell in self.cells],
            "crashes": list(self.crashes),
            "claims": [claim.to_dict() for claim in self.claims()],
        }

    def tables(self) -> list[RenderableType]:
        """Accuracy, expected and ours."""
        table = new_table(
            "CIFAR-10, small, full batch: test accuracy (%), and what was expected",
            "Mean ± sd of the seeds, nothing tuned. In brackets: a first implementation, one seed.",
        )
        for lr, seeds in self.plan.seeds.items():
            table.add_column(f"lr {lr:g} ({seeds} {'seed' if seeds == 1 else 'seeds'})", justify="right", no_wrap=True)
        for name, label in LABELS.items():
            table.add_row(label, *(self._ours_and_expected(name, lr) for lr in self.plan.seeds))
        return [table]

    def _ours_and_expected(self, name: str, lr: float) -> str:
        ours, expected = self.accuracies(name, lr), EXPECTED[name].get(lr)
        text = "–" if ours is None else percent(*statistics.mean_sd(ours))
        return f"{text} [dim]({'–' if expected is None else percent(expected)})[/]"

    def text(self) -> str:
        """What reproduced and what did not."""
        return sentences(self.claims(), [f"Given up: {crash}" for crash in self.crashes])

    def claims(self) -> list[Claim]:
        """What was expected, judged by the runs."""
        best, large = min(self.plan.seeds), max(self.plan.seeds)
        where = "on small CIFAR-10"
        return [
            self._claim(
                f"{where} NLCG is at least 3 points above momentum at a rate three times too large", large, 0.03
            ),
            self._claim(f"{where} NLCG and momentum are within 2 points of each other at the best rate", best, None),
        ]

    def _claim(self, statement: str, lr: float, least: float | None) -> Claim:
        judge: Judge = near(0.02) if least is None else above(least)
        case = compared(self.accuracies("nlcg", lr), self.accuracies("momentum", lr), judge)
        return Claim(statement, {f"lr {lr:g}": case})
