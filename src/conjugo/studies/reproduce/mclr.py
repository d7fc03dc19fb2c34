"""Gao & Zhong 2020: learning rates by layer from curvature, MCLR and CBLR beside LARS, at the scale of a CPU.

Protocol. A 64-128-128-10 perceptron without batch norm learns digits: 60 full-batch steps, or 100 steps of batch 256. The
learning rate warms up in 10 % of the steps (power 1/2) and drops at 51 % and 76.5 %; momentum is 0.9. Every optimizer gets six
learning rates, an octave apart, and four seeds. A tuning run is trained on 80 % of the training data and judged on the rest,
which part that is depends on the seed; the learning rate with the best mean is run with four fresh seeds on all training data,
and only these runs see the test data. Two more full-batch runs, of MCLR and CBLR, record the curvature of each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

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
    listed,
    near,
    new_table,
    sentences,
)
from conjugo.studies.runs import Contender, load_data, train_once, tuning_data, versions
from conjugo.studies.summary import percent
from conjugo.training import TrainConfig, Trainer

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["EXPECTED", "LABELS", "PAPER", "MclrPlan", "MclrResult", "experiment", "run_task", "watch"]

TRAIN = TrainConfig(data="digits", model="mlp", schedule="polynomial", warmup=0.1)

LABELS = {
    "momentum": "momentum 0.9",
    "lars": "LARS",
    "cblr": "CBLR, norms",
    "mclr": "MCLR",
    "cblr-secant": "CBLR, secant",
}

FULL, SMALL = "full batch", "batch 256"

EXPECTED: Mapping[str, Mapping[str, float]] = {
    "momentum": {FULL: 0.890, SMALL: 0.972},
    "lars": {},
    "cblr": {FULL: 0.974, SMALL: 0.977},
    "mclr": {FULL: 0.962, SMALL: 0.975},
    "cblr-secant": {FULL: 0.951, SMALL: 0.958},
}
"""Test accuracy by optimizer and setting of a first, throw-away implementation: the best of five learning rates, chosen on the
test data, three seeds. Its LARS gave biases the trust coefficient as their rate, as CBLR does here; LARS gives them rate 1."""

Curvature = Mapping[str, list[list[float]]]
"""By optimizer, of each step: the curvature of each layer."""


def _grids() -> dict[str, tuple[float, ...]]:
    def octaves(lowest: float) -> tuple[float, ...]:
        return tuple(lowest * 2**k for k in range(6))

    return {
        "momentum": octaves(0.025),
        "lars": octaves(0.625),
        "cblr": octaves(0.125),
        "mclr": octaves(0.25),
        "cblr-secant": octaves(1.0),
    }


@dataclass(frozen=True, kw_only=True)
class MclrPlan:
    """All that the runs depend on.

    settings: batch size (None: all training data) and steps by name; grids: learning rates by optimizer, ascending;
    validation: fraction to tune on.
    """

    settings: Mapping[str, tuple[int | None, int]] = field(
        default_factory=lambda: {FULL: (None, 60), SMALL: (256, 100)}
    )
    grids: Mapping[str, tuple[float, ...]] = field(default_factory=_grids)
    seeds: int = 4
    validation: float = 0.2

    def cells(self, examples: int) -> list[Grid]:
        """The plan of every (setting, optimizer) pair; *examples*: for training."""
        return [
            Grid(study=setting, contender=name, batch_size=batch or examples, lrs=lrs, seeds=self.seeds, choose=True)
            for setting, (batch, _) in self.settings.items()
            for name, lrs in self.grids.items()
        ]


def run_task(plan: MclrPlan, task: Task) -> Outcome:
    """Do one run."""
    dataset = load_data(TRAIN, None, None)
    if task.phase == "tune":
        dataset = tuning_data(dataset, plan.validation, task.seed)
    contender = Contender.from_catalogue(task.contender)
    return train_once(TRAIN, contender, task, dataset, steps=plan.settings[task.study][1], evaluations=1)


def watch(plan: MclrPlan, name: str, lr: float) -> list[list[float]]:
    """Train with optimizer *name* on the full batch; the curvature of each layer in each step."""
    batch, steps = plan.settings[FULL]
    config = replace(TRAIN, optimizer=name, lr=lr, steps=steps, batch_size=batch or "full", threads=1)
    trainer = Trainer(config, load_data(TRAIN, None, None))
    seen: list[list[float]] = []

    def note(optimizer: Any, *_: Any) -> None:
        curvature = optimizer.last["curvature"]
        seen.append(curvature[~curvature.isnan()].tolist())

    trainer.optimizer.register_step_post_hook(note)
    trainer.fit(progress=False)
    return seen


def experiment(
    request: Request,
    *,
    plan: MclrPlan | None = None,
    run: Callable[[MclrPlan, Task], Outcome] = run_task,
    watched: Callable[[MclrPlan, str, float], list[list[float]]] = watch,
) -> MclrResult:
    """Do the experiment. plan: None is the whole of it; run, watched: do one run (stand-ins for tests)."""
    from conjugo.studies.reproduce import mclr_figures

    plan = MclrPlan() if plan is None else plan
    description = {"paper": "mclr", "scale": "cpu", "train": TRAIN.to_dict(), **asdict(plan)}
    cells = plan.cells(len(load_data(TRAIN, None, None).train))
    results, crashes = run_grids(cells, partial(run, plan), description, request)
    result = MclrResult(plan, results, crashes, {**versions(TRAIN), "workers": str(request.workers)}, {})
    best = {name: cell.best for name in ("mclr", "cblr") if (cell := result.cell(name, FULL)) is not None}
    result = replace(result, curvature={name: watched(plan, name, lr) for name, lr in best.items()})
    if request.out is not None:
        drawn = {
            "learning_rates": mclr_figures.learning_rates(result),
            "curvature": mclr_figures.curvature(result),
        }
        save(result.to_dict(), drawn, request.out)
    return result


@dataclass(frozen=True)
class MclrResult:
    """The finished cells, messages about those that crashed, and the curvatures that were seen."""

    plan: MclrPlan
    cells: tuple[GridResult, ...]
    crashes: tuple[str, ...]
    versions: Mapping[str, str]
    curvature: Curvature

    def cell(self, name: str, setting: str) -> GridResult | None:
        """The cell of an optimizer, None if it is not there."""
        wanted = (setting, name)
        return next((cell for cell in self.cells if (cell.grid.study, cell.grid.contender) == wanted), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "paper": "mclr",
            "scale": "cpu",
            "plan": asdict(self.plan),
            "versions": dict(self.versions),
            "expected": {name: dict(row) for name, row in EXPECTED.items()},
            "cells": [cell.to_dict() for cell in self.cells],
            "crashes": list(self.crashes),
            "claims": [claim.to_dict() for claim in self.claims()],
            "curvature": dict(self.curvature),
        }

    # ---- tables ----

    def tables(self) -> list[RenderableType]:
        """Accuracy, expected and ours; the chosen learning rates and how wide the usable ones are."""
        accuracy = new_table(
            "Digits: test accuracy (%), and what was expected",
            f"Mean ± sd of {self.plan.seeds} fresh seeds, learning rate chosen on held-out training data. In brackets: a first "
            "implementation, learning rate chosen on the test data.",
        )
        rates = new_table(
            "Chosen learning rate · width of the usable ones in octaves",
            "Usable: mean validation accuracy within 2 points of the best. ≥: as far as the grid goes; –: fewer than three "
            "learning rates of the grid. * the best one is at the edge of the grid.",
        )
        for setting, (_, steps) in self.plan.settings.items():
            for table in (accuracy, rates):
                table.add_column(f"{setting}, {steps} steps", justify="right", no_wrap=True)
        for name in self.plan.grids:
            cells = [(self.cell(name, setting), EXPECTED[name].get(setting)) for setting in self.plan.settings]
            accuracy.add_row(LABELS[name], *(_accuracy(cell, expected) for cell, expected in cells))
            rates.add_row(LABELS[name], *(_rate(cell) for cell, _ in cells))
        return [accuracy, rates]

    # ---- sentences ----

    def text(self) -> str:
        """What reproduced and what did not."""
        return sentences(self.claims(), self._notes())

    def claims(self) -> list[Claim]:
        """What was expected, judged by the runs."""
        rule = "the rule of LARS (CBLR, norms)"
        both = tuple(self.plan.settings)
        return [
            self._claim(f"MCLR is within 1.5 points of {rule}", "mclr", "cblr", near(0.015), both),
            self._claim("MCLR is within 1.5 points of LARS", "mclr", "lars", near(0.015), both),
            self._claim("MCLR is at least 5 points above momentum", "mclr", "momentum", above(0.05), (FULL,)),
            self._claim(f"{rule} is at least 5 points above momentum", "cblr", "momentum", above(0.05), (FULL,)),
            self._claim("CBLR with secant curvature is above momentum", "cblr-secant", "momentum", above(0.0), (FULL,)),
            Claim(
                f"the usable learning rates of {rule} span more octaves than those of MCLR",
                {setting: self._wider("cblr", "mclr", setting) for setting in both},
            ),
        ]

    def _claim(self, statement: str, name: str, other: str, holds: Judge, settings: tuple[str, ...]) -> Claim:
        cases = {}
        for setting in settings:
            ours, theirs = (
                None if cell is None else cell.accuracies
                for cell in (self.cell(name, setting), self.cell(other, setting))
            )
            cases[setting] = compared(ours, theirs, holds)
        return Claim(statement, cases)

    def _wider(self, name: str, other: str, setting: str) -> tuple[bool | None, str]:
        cells = self.cell(name, setting), self.cell(other, setting)
        if cells[0] is None or cells[1] is None:
            return None, "not run"
        ours, theirs = (cell.octaves for cell in cells if cell is not None)
        if ours is None or theirs is None or theirs.at_least:
            return None, f"{ours or 'too narrow for the grid'} against {theirs or 'too narrow for the grid'}"
        wider = ours.width > theirs.width
        return None if ours.at_least and not wider else wider, f"{ours} against {theirs} octaves"

    def _notes(self) -> list[str]:
        notes = [
            "To be above counts only where it is significant (Welch's test, p < 0.05, not corrected for the number of "
            "comparisons)."
        ]
        edges = [f"{LABELS[cell.grid.contender]}, {cell.grid.study}" for cell in self.cells if cell.at_edge]
        if edges:
            notes.append(f"The best learning rate is at the edge of the grid for {listed(edges)}: there may be better.")
        return [*notes, *(f"Given up: {crash}" for crash in self.crashes)]


def _accuracy(cell: GridResult | None, expected: float | None) -> str:
    text = "–" if cell is None else percent(*statistics.mean_sd(cell.accuracies))
    return f"{text} [dim]{f'({percent(expected)})' if expected else '  (–) '}[/]"


def _rate(cell: GridResult | None) -> str:
    return "–" if cell is None else f"{cell.best:.2g}{'*' if cell.at_edge else ''} · {cell.octaves or '–'!s:>5}"


# ---- larger scales ----

_LARGER = {
    "gpu": "CIFAR-10 with ResNet-20 and VGG-11 without batch norm, batches from 512 to 16,384, 30 epochs, five learning rates "
    "and three seeds for each of momentum, LARS, MCLR and CBLR with secant curvature: 720 runs. Expected: MCLR within one "
    "point of LARS, and momentum behind both from batch 4,096 on.",
    "full": "ResNet-50 on ImageNet at batches from 8,192 to 32,768, 90 epochs, against LARS at 75 % top-1 accuracy: 2.8e18 "
    "floating-point operations for each run. The paper's own figures are not known here: only its abstract was to be had.",
}


@dataclass(frozen=True)
class NotRun:
    """A scale of which only the plan is there."""

    scale: str

    def tables(self) -> list[RenderableType]:
        """None."""
        return []

    def text(self) -> str:
        """What would be run."""
        return f"Nothing was run. This would be {_LARGER[self.scale]}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {"paper": "mclr", "scale": self.scale, "text": self.text()}


def not_run(scale: str, request: Request) -> NotRun:
    """Say what *scale* would take."""
    result = NotRun(scale)
    if request.out is not None:
        request.out.mkdir(parents=True, exist_ok=True)
        save(result.to_dict(), {}, request.out)
    return result


PAPER = Paper(
    title="Study on the Large Batch Size Training of Neural Networks Based on the Second Order Gradient",
    source="F. Gao, H. Zhong, arXiv:2012.08795 (2020)",
    scales={"cpu": experiment, "gpu": partial(not_run, "gpu"), "full": partial(not_run, "full")},
)
