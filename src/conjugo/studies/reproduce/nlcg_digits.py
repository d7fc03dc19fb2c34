"""NLCG at the scale of a CPU: digits, the full batch, 30, 60 or 120 steps.

Protocol. A 64-128-128-10 perceptron without batch norm takes so many full-batch steps, with the warm-up (12.5 % of the
steps, power 1/2) and the drops (at 51 % and 76.5 %) of the paper's CIFAR runs. Every optimizer gets a grid of eight
learning rates and four seeds. A tuning run is trained on 80 % of the training data and judged on the rest, which part
that is depends on the seed; the learning rate with the best mean is run with four fresh seeds on all training data, and
only these runs see the test data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from conjugo.studies import statistics
from conjugo.studies.records import Outcome, Task
from conjugo.studies.reproduce.grids import Grid, GridResult, run_grids, save
from conjugo.studies.reproduce.paper import (
    Claim,
    Judge,
    Request,
    above,
    compared,
    listed,
    near,
    new_table,
    not_below,
    sentences,
)
from conjugo.studies.runs import Contender, load_data, train_once, tuning_data, versions
from conjugo.studies.summary import percent
from conjugo.training import TrainConfig

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["EXPECTED", "LABELS", "DigitsPlan", "DigitsResult", "digits", "run_task"]

TRAIN = TrainConfig(data="digits", model="mlp", batch_size="full", schedule="polynomial", warmup=0.125)

LABELS = {
    "sgd": "SGD",
    "momentum": "momentum 0.9",
    "rmsprop": "RMSProp, ε = 1",
    "nlcg": "NLCG FR + BFGS",
    "nlcg-step": "NLCG, line search",
    "nlcg-fr": "NLCG FR",
    "nlcg-pr": "NLCG PR + BFGS",
    "adamw": "AdamW",
}

EXPECTED: Mapping[str, Mapping[int, float]] = {
    "sgd": {30: 0.747, 60: 0.758, 120: 0.938},
    "momentum": {30: 0.884, 60: 0.934, 120: 0.967},
    "rmsprop": {30: 0.884, 60: 0.934},
    "nlcg": {30: 0.893, 60: 0.952, 120: 0.974},
    "nlcg-step": {},
    "nlcg-fr": {30: 0.896, 60: 0.942},
    "nlcg-pr": {30: 0.759, 60: 0.760},
    "adamw": {30: 0.933, 60: 0.958, 120: 0.982},
}
"""Test accuracy by optimizer and steps of a first, throw-away implementation of the method: pixels divided by 16, the
learning rate chosen on the test data, four seeds."""


def _grids() -> dict[str, tuple[float, ...]]:
    # Two thirds of an octave apart, from too small to too large. Without momentum and with a line search "too large"
    # comes later.
    rates = tuple(0.025 * 2 ** (2 * k / 3) for k in range(9))
    late = ("sgd", "nlcg-step", "nlcg-pr")
    grids = {name: rates[1:] if name in late else rates[:-1] for name in LABELS}
    return grids | {"adamw": tuple(0.001 * 2**k for k in range(8))}


@dataclass(frozen=True, kw_only=True)
class DigitsPlan:
    """All that the runs depend on. grids: learning rates by optimizer, ascending; validation: fraction to tune on."""

    steps: tuple[int, ...] = (30, 60, 120)
    grids: Mapping[str, tuple[float, ...]] = field(default_factory=_grids)
    seeds: int = 4
    validation: float = 0.2

    def cells(self, batch_size: int) -> list[Grid]:
        """The plan of every (steps, optimizer) pair; *batch_size* is the number of training examples."""
        return [
            Grid(study=str(steps), contender=name, batch_size=batch_size, lrs=lrs, seeds=self.seeds, choose=True)
            for steps in self.steps
            for name, lrs in self.grids.items()
        ]


def run_task(plan: DigitsPlan, task: Task) -> Outcome:
    """Do one run."""
    dataset = load_data(TRAIN, None, None)
    if task.phase == "tune":
        dataset = tuning_data(dataset, plan.validation, task.seed)
    contender = Contender.from_catalogue(task.contender)
    return train_once(TRAIN, contender, task, dataset, steps=int(task.study), evaluations=1)


def digits(
    request: Request,
    *,
    plan: DigitsPlan | None = None,
    run: Callable[[DigitsPlan, Task], Outcome] = run_task,
) -> DigitsResult:
    """Do the experiment. plan: None is the whole of it; run: does one run (a stand-in for tests)."""
    from conjugo.studies.reproduce import figures

    plan = DigitsPlan() if plan is None else plan
    description = {"paper": "nlcg", "scale": "cpu", "train": TRAIN.to_dict(), **asdict(plan)}
    cells = plan.cells(len(load_data(TRAIN, None, None).train))
    results, crashes = run_grids(cells, partial(run, plan), description, request)
    result = DigitsResult(plan, results, crashes, {**versions(TRAIN), "workers": str(request.workers)})
    if request.out is not None:
        drawn = {"accuracy": figures.accuracy(result), "learning_rates": figures.learning_rates(result)}
        save(result.to_dict(), drawn, request.out)
    return result


@dataclass(frozen=True)
class DigitsResult:
    """The finished cells, and messages about those that crashed."""

    plan: DigitsPlan
    cells: tuple[GridResult, ...]
    crashes: tuple[str, ...]
    versions: Mapping[str, str]

    def cell(self, name: str, steps: int) -> GridResult | None:
        """The cell of an optimizer, None if it is not there."""
        wanted = (str(steps), name)
        return next((cell for cell in self.cells if (cell.grid.study, cell.grid.contender) == wanted), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "paper": "nlcg",
            "scale": "cpu",
            "plan": asdict(self.plan),
            "versions": dict(self.versions),
            "expected": {name: dict(row) for name, row in EXPECTED.items()},
            "cells": [cell.to_dict() for cell in self.cells],
            "crashes": list(self.crashes),
            "claims": [claim.to_dict() for claim in self.claims()],
        }

    # ---- tables ----

    def tables(self) -> list[RenderableType]:
        """Accuracy, expected and ours; the chosen learning rates and how wide the usable ones are."""
        return [self._accuracy_table(), self._rates_table()]

    def _accuracy_table(self) -> RenderableType:
        table = new_table(
            "Digits, full batch: test accuracy (%), and what was expected",
            f"Mean ± sd of {self.plan.seeds} fresh seeds, learning rate chosen on held-out training data; best of each in "
            "green. In brackets: a first implementation, learning rate chosen on the test data.",
        )
        best = {steps: max((_mean(cell) for cell in self._of(steps)), default=0.0) for steps in self.plan.steps}
        for steps in self.plan.steps:
            table.add_column(f"{steps} steps", justify="right", no_wrap=True)
        for name in self.plan.grids:
            row = []
            for steps in self.plan.steps:
                cell, expected = self.cell(name, steps), EXPECTED[name].get(steps)
                text = "–" if cell is None else percent(*statistics.mean_sd(cell.accuracies))
                text = f"[bold green]{text}[/]" if cell and _mean(cell) == best[steps] else text
                row.append(f"{text} [dim]{f'({percent(expected)})' if expected else '  (–) '}[/]")
            table.add_row(LABELS[name], *row)
        return table

    def _rates_table(self) -> RenderableType:
        table = new_table(
            "Chosen learning rate · width of the usable ones in octaves",
            "Usable: mean validation accuracy within 2 points of the best. ≥: as far as the grid goes; –: fewer than "
            "three learning rates of the grid. * the best one is at the edge of the grid.",
        )
        for steps in self.plan.steps:
            table.add_column(f"{steps} steps", justify="right", no_wrap=True)
        for name in self.plan.grids:
            row = []
            for steps in self.plan.steps:
                cell = self.cell(name, steps)
                if cell is None:
                    row.append("–")
                    continue
                row.append(f"{cell.best:.2g}{'*' if cell.at_edge else ''} · {cell.octaves or '–'!s:>5}")
            table.add_row(LABELS[name], *row)
        return table

    def _of(self, steps: int) -> list[GridResult]:
        return [cell for cell in self.cells if cell.grid.study == str(steps)]

    # ---- sentences ----

    def text(self) -> str:
        """What reproduced and what did not."""
        return sentences(self.claims(), self._notes())

    def claims(self) -> list[Claim]:
        """What was expected, judged by the runs."""
        variants = {"nlcg": "FR + BFGS", "nlcg-step": "FR + BFGS, line search"}
        return [
            self._claim(
                "NLCG (FR + BFGS) is at least half a point above tuned momentum", "nlcg", "momentum", above(0.005)
            ),
            self._claim("NLCG without preconditioner is not below tuned momentum", "nlcg-fr", "momentum", not_below),
            self._claim("NLCG (FR + BFGS) is at least two points above SGD", "nlcg", "sgd", above(0.02)),
            self._claim("with Polak-Ribière NLCG is within two points of SGD", "nlcg-pr", "sgd", near(0.02)),
            self._claim("RMSProp with ε = 1 is within one point of momentum", "rmsprop", "momentum", near(0.01)),
            self._claim("AdamW is not beaten by NLCG", "adamw", "nlcg", not_below),
            *(
                Claim(
                    f"the usable learning rates of NLCG ({variant}) span at least one octave more than momentum's",
                    {f"{steps} steps": self._wider(name, steps) for steps in self.plan.steps},
                )
                for name, variant in variants.items()
            ),
            *(
                Claim(
                    f"at three times momentum's best learning rate NLCG ({variant}) is at least 3 points above momentum "
                    "(validation accuracy, at the learning rate of the grid that is nearest to that)",
                    {f"{steps} steps": self._at_three_times(name, steps) for steps in self.plan.steps},
                )
                for name, variant in variants.items()
            ),
        ]

    def _claim(self, statement: str, name: str, other: str, holds: Judge) -> Claim:
        cases = {}
        for steps in self.plan.steps:
            ours, theirs = (
                None if cell is None else cell.accuracies for cell in (self.cell(name, steps), self.cell(other, steps))
            )
            cases[f"{steps} steps"] = compared(ours, theirs, holds)
        return Claim(statement, cases)

    def _wider(self, name: str, steps: int) -> tuple[bool | None, str]:
        cells = self.cell(name, steps), self.cell("momentum", steps)
        if cells[0] is None or cells[1] is None:
            return None, "not run"
        ours, theirs = (cell.octaves for cell in cells if cell is not None)
        if ours is None or theirs is None or theirs.at_least:
            return None, f"{ours or 'too narrow for the grid'} against {theirs or 'too narrow for the grid'}"
        wider = ours.width - theirs.width >= 1
        return None if ours.at_least and not wider else wider, f"{ours} against {theirs} octaves"

    def _at_three_times(self, name: str, steps: int) -> tuple[bool | None, str]:
        ours, momentum = self.cell(name, steps), self.cell("momentum", steps)
        if ours is None or momentum is None:
            return None, "not run"
        shared = [lr for lr in momentum.grid.lrs if lr in ours.grid.lrs]
        if not shared:
            return None, "no common learning rate"
        lr = min(shared, key=lambda lr: abs(math.log(lr / (3 * momentum.best))))
        holds, said = compared(ours.at(lr), momentum.at(lr), above(0.03))
        return holds, f"{said} at {lr:.2g}"

    def _notes(self) -> list[str]:
        notes = [
            "To be above or below counts only where it is significant (Welch's test, p < 0.05, not corrected for the "
            "number of comparisons)."
        ]
        edges = [f"{LABELS[c.grid.contender]} at {c.grid.study} steps" for c in self.cells if c.at_edge]
        if edges:
            notes.append(f"The best learning rate is at the edge of the grid for {listed(edges)}: there may be better.")
        far = []
        for cell in self.cells:
            name, steps = cell.grid.contender, int(cell.grid.study)
            expected = EXPECTED[name].get(steps)
            if expected is not None and abs(_mean(cell) - expected) > 0.02:
                far.append(f"{LABELS[name]} at {steps} steps ({100 * (_mean(cell) - expected):+.1f})")
        if far:
            notes.append(f"More than two points from the expected figure: {listed(far)}.")
        return [*notes, *(f"Given up: {crash}" for crash in self.crashes)]


def _mean(cell: GridResult) -> float:
    return statistics.mean_sd(cell.accuracies)[0]
