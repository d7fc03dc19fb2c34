"""NLCG at the scale of one accelerator: ResNet-32 on CIFAR-100 at batch 16,384, and at 1,024 as a control.

The recipe is that of the paper's program: 200 epochs (610 steps at the large batch), a warm-up over 12.5 % of the steps
with power 1/2, drops at 51 % and 76.5 %, padded crops and flips, standardisation per image, evaluation with averaged
weights, weight decay 2e-4 inside the gradient, batch normalisation over micro-batches of 2,048. Different here: no
one-dimensional parameter is decayed (there the bias of the last layer is), and the loss that the line search sees is
without the decay term. AdamW has its usual decoupled decay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from conjugo.studies import statistics
from conjugo.studies.records import Outcome, Task
from conjugo.studies.reproduce.grids import Grid, GridResult, run_grids, save
from conjugo.studies.reproduce.paper import Claim, Judge, Request, above, compared, near, new_table, sentences
from conjugo.studies.runs import Contender, load_data, train_once, versions
from conjugo.studies.summary import percent
from conjugo.training import TrainConfig

if TYPE_CHECKING:
    from rich.console import RenderableType

    from conjugo.training.data import Dataset

__all__ = ["LABELS", "PUBLISHED", "CifarPlan", "CifarResult", "cifar100", "experiment", "run_on", "run_task"]

TRAIN = TrainConfig(
    data="cifar100",
    model="resnet32",
    micro_batch=2048,
    epochs=200.0,
    schedule="polynomial",
    warmup=0.125,
    weight_decay=2e-4,
    decay_norm_and_bias=False,
    ema=0.9999,
)

LABELS = {
    "nlcg-step": "NLCG FR + BFGS, line search",
    "nlcg": "NLCG FR + BFGS",
    "momentum": "momentum 0.9",
    "sgd": "SGD",
    "adamw": "AdamW",
}

LARGE, CONTROL = 16384, 1024

PUBLISHED: Mapping[int, Mapping[str, float]] = {
    LARGE: {"nlcg-step": 0.560, "momentum": 0.370, "sgd": 0.350},
    CONTROL: {"nlcg-step": 0.654, "momentum": 0.650, "sgd": 0.635},
}
"""Test accuracy by batch and optimizer in the header of the authors' program, one seed."""

_ADAMW_DECAY = 0.1  # decoupled: the 2e-4 of the others would be next to nothing


def _grids() -> dict[int, dict[str, tuple[float, ...]]]:
    # The linear rule 0.1 B / 256 of the published commands gives 6.4 at the large batch, which may be too much.
    large, control = (1.6, 3.2, 6.4), (0.4,)
    others = [name for name in LABELS if name != "adamw"]
    return {
        LARGE: {**dict.fromkeys(others, large), "adamw": (0.001, 0.003, 0.01)},
        CONTROL: {**dict.fromkeys(others, control), "adamw": (0.001,)},
    }


@dataclass(frozen=True, kw_only=True)
class CifarPlan:
    """All that the runs depend on. grids: learning rates, ascending, by batch size and optimizer."""

    train: TrainConfig = TRAIN
    grids: Mapping[int, Mapping[str, tuple[float, ...]]] = field(default_factory=_grids)
    seeds: int = 2
    evaluations: int = 20

    def cells(self) -> list[Grid]:
        """The plan of every (batch, optimizer) pair."""
        return [
            Grid(study="", contender=name, batch_size=batch, lrs=lrs, seeds=self.seeds, choose=False)
            for batch, grids in self.grids.items()
            for name, lrs in grids.items()
        ]


def run_task(plan: CifarPlan, task: Task) -> Outcome:
    """Do one run."""
    return run_on(plan, task, load_data(plan.train, None, None))


def run_on(plan: CifarPlan, task: Task, dataset: Dataset) -> Outcome:
    """Do one run on *dataset*."""
    adamw = task.contender == "adamw"
    base = replace(plan.train, weight_decay=_ADAMW_DECAY) if adamw else plan.train
    steps = max(1, int(plan.train.epochs * len(dataset.train) / task.batch_size))
    contender = Contender.from_catalogue(task.contender)
    return train_once(base, contender, task, dataset, steps=steps, evaluations=plan.evaluations)


def cifar100(request: Request) -> CifarResult:
    """Do the whole experiment.

    Raises ValueError without an accelerator, unless forced, and DataUnavailable without the data.
    """
    plan = CifarPlan()
    _check_device(plan, force=request.force)
    load_data(plan.train, None, None)
    return experiment(request, plan)


def _check_device(plan: CifarPlan, *, force: bool) -> None:
    from conjugo.training.machine import choose_device

    if choose_device(plan.train.device).type == "cpu" and not force:
        runs = sum(cell.size for cell in plan.cells())
        raise ValueError(
            f"reproduce: scale 'gpu' is {runs} runs of {plan.train.epochs:g} epochs with ResNet-32, 4e15 floating-point "
            "operations each; torch finds no accelerator here, and a CPU would take weeks. Use "
            "scale 'cpu', or --force (force=True)"
        )


def experiment(
    request: Request, plan: CifarPlan, *, run: Callable[[CifarPlan, Task], Outcome] = run_task
) -> CifarResult:
    """Do the experiment of *plan*; run: does one run (a stand-in for tests)."""
    from conjugo.studies.reproduce import figures

    train = plan.train.to_dict()
    description = {"paper": "nlcg", "scale": "gpu", **asdict(plan), "train": train, "adamw_decay": _ADAMW_DECAY}
    results, crashes = run_grids(plan.cells(), partial(run, plan), description, request)
    result = CifarResult(plan, results, crashes, {**versions(plan.train), "workers": str(request.workers)})
    if request.out is not None:
        drawn = {f"curves_{batch}": figures.curves(result, batch) for batch in plan.grids}
        save(result.to_dict(), drawn, request.out)
    return result


@dataclass(frozen=True)
class CifarResult:
    """The finished cells, and messages about those that crashed."""

    plan: CifarPlan
    cells: tuple[GridResult, ...]
    crashes: tuple[str, ...]
    versions: Mapping[str, str]

    def cell(self, name: str, batch_size: int) -> GridResult | None:
        """The cell of an optimizer, None if it is not there."""
        wanted = (name, batch_size)
        return next((cell for cell in self.cells if (cell.grid.contender, cell.grid.batch_size) == wanted), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "paper": "nlcg",
            "scale": "gpu",
            "plan": {**asdict(self.plan), "train": self.plan.train.to_dict()},
            "versions": dict(self.versions),
            "published": {batch: dict(row) for batch, row in PUBLISHED.items()},
            "cells": [cell.to_dict() for cell in self.cells],
            "crashes": list(self.crashes),
            "claims": [claim.to_dict() for claim in self.claims()],
        }

    def tables(self) -> list[RenderableType]:
        """For each batch size published accuracy beside ours at every learning rate."""
        return [self._table(batch) for batch in self.plan.grids]

    def _table(self, batch: int) -> RenderableType:
        grids = self.plan.grids[batch]
        table = new_table(
            f"ResNet-32, {self.plan.train.data}, batch {batch:,}: test accuracy (%)",
            f"Ours: mean ± sd of {self.plan.seeds} seeds at each learning rate, averaged weights.",
        )
        table.add_column("published", justify="right")
        for k in range(max(map(len, grids.values()))):
            table.add_column("ours" if k == 0 else "", justify="right", no_wrap=True)
        for name, lrs in grids.items():
            published, cell = PUBLISHED.get(batch, {}).get(name), self.cell(name, batch)
            ours = ["–"] if cell is None else [_at(cell, lr) for lr in lrs]
            table.add_row(LABELS[name], "–" if published is None else percent(published), *ours)
        return table

    def text(self) -> str:
        """What reproduced and what did not."""
        notes = [
            "To be above counts only where it is significant (Welch's test, p < 0.05).",
            "Where a best learning rate is compared, it is the best on the test data, for all optimizers alike.",
            *(f"Given up: {crash}" for crash in self.crashes),
        ]
        return sentences(self.claims(), notes)

    def claims(self) -> list[Claim]:
        """What was published, judged by the runs."""
        claims = []
        for batch in self.plan.grids:
            size = f"at batch {batch:,}"
            if batch == max(self.plan.grids):
                statement = f"{size} NLCG is above momentum, each at its best learning rate (published: 19 points)"
                claims.append(Claim(statement, self._against_momentum(batch, above(0.0))))
                statement = f"{size} NLCG is at least 3 points above momentum at the largest learning rate"
                claims.append(Claim(statement, self._at_the_largest(batch)))
            else:
                statement = f"{size}, the control, NLCG and momentum are within 2 points of each other"
                claims.append(Claim(statement, self._against_momentum(batch, near(0.02))))
        return claims

    def _against_momentum(self, batch: int, holds: Judge) -> dict[str, tuple[bool | None, str]]:
        return self._cases(batch, holds, lambda cell: cell.accuracies)

    def _at_the_largest(self, batch: int) -> dict[str, tuple[bool | None, str]]:
        return self._cases(batch, above(0.03), lambda cell: cell.at(cell.grid.lrs[-1]))

    def _cases(
        self, batch: int, holds: Judge, measured: Callable[[GridResult], list[float]]
    ) -> dict[str, tuple[bool | None, str]]:
        def of(name: str) -> list[float] | None:
            cell = self.cell(name, batch)
            return None if cell is None else measured(cell)

        return {LABELS[name]: compared(of(name), of("momentum"), holds) for name in ("nlcg-step", "nlcg")}


def _at(cell: GridResult, lr: float) -> str:
    text = percent(*statistics.mean_sd(cell.at(lr)))
    return f"lr {lr:g}: {f'[bold]{text}[/]' if lr == cell.best else text}"
