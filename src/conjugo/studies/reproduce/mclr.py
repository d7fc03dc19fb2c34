"""Gao & Zhong 2020: learning rates by layer from curvature, MCLR and CBLR beside LARS, at the scale of a CPU.

A 64-128-128-10 perceptron without batch norm learns digits: 60 full-batch steps, or 100 steps of batch 256. The learning
rate warms up in 10 % of the steps (power 1/2) and drops at 51 % and 76.5 %; momentum is 0.9. Every optimizer gets six
learning rates, an octave apart, and four seeds; see :mod:`conjugo.studies.reproduce.grid_study`. Two more full-batch runs,
of MCLR and CBLR, record the curvature of each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from conjugo.studies.records import Outcome, Task
from conjugo.studies.reproduce.grid_study import Entrant, GridStudy, GridStudyResult, run_study, run_task
from conjugo.studies.reproduce.grids import save
from conjugo.studies.reproduce.paper import Claim, NotRun, Paper, Request, above, near, sentences
from conjugo.studies.runs import load_data
from conjugo.training import TrainConfig, Trainer

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["EXPECTED", "FULL", "PAPER", "SMALL", "MclrResult", "experiment", "plan", "watch"]

FULL, SMALL = "full batch, 60 steps", "batch 256, 100 steps"

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


def plan() -> GridStudy:
    """The whole experiment."""

    def octaves(lowest: float) -> tuple[float, ...]:
        return tuple(lowest * 2**k for k in range(6))

    train = TrainConfig(data="digits", model="mlp", schedule="polynomial", warmup=0.1)
    return GridStudy(
        settings={
            FULL: replace(train, batch_size="full", steps=60),
            SMALL: replace(train, batch_size=256, steps=100),
        },
        entrants={
            name: Entrant(label=label, optimizer=name, values=octaves(lowest))
            for name, label, lowest in (
                ("momentum", "momentum 0.9", 0.025),
                ("lars", "LARS", 0.625),
                ("cblr", "CBLR, norms", 0.125),
                ("mclr", "MCLR", 0.25),
                ("cblr-secant", "CBLR, secant", 1.0),
            )
        },
    )


def watch(study: GridStudy, name: str, lr: float) -> list[list[float]]:
    """Train with optimizer *name* on the full batch; the curvature of each layer in each step."""
    config = replace(study.settings[FULL], optimizer=name, lr=lr, threads=1)
    trainer = Trainer(config, load_data(config, None, None))
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
    study: GridStudy | None = None,
    run: Callable[[GridStudy, Task], Outcome] = run_task,
    watched: Callable[[GridStudy, str, float], list[list[float]]] = watch,
) -> MclrResult:
    """Do the experiment. study: None is the whole of it; run, watched: do one run (stand-ins for tests)."""
    from conjugo.studies.reproduce import grid_figures, mclr_figures

    study = plan() if study is None else study
    grids = run_study(study, request, paper="mclr", expected=EXPECTED, run=run)
    best = {name: cell.best for name in ("mclr", "cblr") if (cell := grids.cell(name, FULL)) is not None}
    result = MclrResult(grids, {name: watched(study, name, lr) for name, lr in best.items()})
    if request.out is not None:
        drawn = {
            "learning_rates": grid_figures.curves(grids, "learning rate"),
            "curvature": mclr_figures.curvature(result),
        }
        save(result.to_dict(), drawn, request.out)
    return result


@dataclass(frozen=True)
class MclrResult:
    """The grids, and the curvatures that were seen."""

    grids: GridStudyResult
    curvature: Curvature

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        claims = [claim.to_dict() for claim in self.claims()]
        return {**self.grids.to_dict(), "claims": claims, "curvature": dict(self.curvature)}

    def tables(self) -> list[RenderableType]:
        """Accuracy, expected and ours; the chosen learning rates and how wide the usable ones are."""
        source = "a first implementation, learning rate chosen on the test data."
        return [
            self.grids.accuracy_table("Digits: test accuracy (%), and what was expected", source),
            self.grids.values_table("Chosen learning rate · width of the usable ones in octaves"),
        ]

    def text(self) -> str:
        """What reproduced and what did not."""
        return sentences(self.claims(), self.grids.notes())

    def claims(self) -> list[Claim]:
        """What was expected, judged by the runs."""
        rule, claim = "the rule of LARS (CBLR, norms)", self.grids.claim
        return [
            claim(f"MCLR is within 1.5 points of {rule}", "mclr", "cblr", near(0.015)),
            claim("MCLR is within 1.5 points of LARS", "mclr", "lars", near(0.015)),
            claim("MCLR is at least 5 points above momentum", "mclr", "momentum", above(0.05), [FULL]),
            claim(f"{rule} is at least 5 points above momentum", "cblr", "momentum", above(0.05), [FULL]),
            claim("CBLR with secant curvature is above momentum", "cblr-secant", "momentum", above(0.0), [FULL]),
            Claim(
                f"the usable rates of {rule} span at least an octave more than those of MCLR",
                {setting: self.grids.wider("cblr", "mclr", setting, 1.0) for setting in self.grids.study.settings},
            ),
        ]


PAPER = Paper(
    title="Study on the Large Batch Size Training of Neural Networks Based on the Second Order Gradient",
    source="F. Gao, H. Zhong, arXiv:2012.08795 (2020)",
    scales={
        "cpu": experiment,
        "gpu": NotRun(
            "mclr",
            "gpu",
            "This would be CIFAR-10 with ResNet-20 and VGG-11 without batch norm, batches from 512 to 16,384, 30 epochs, five "
            "learning rates and three seeds for each of momentum, LARS, MCLR and CBLR with secant curvature: 720 runs. "
            "Expected: MCLR within one point of LARS, and momentum behind both from batch 4,096 on.",
        ),
        "full": NotRun(
            "mclr",
            "full",
            "This would be ResNet-50 on ImageNet at batches from 8,192 to 32,768, 90 epochs, against LARS at 75 % top-1 "
            "accuracy: 2.8e18 floating-point operations for each run. The paper's own figures are not known here: only its "
            "abstract was to be had.",
        ),
    },
)
