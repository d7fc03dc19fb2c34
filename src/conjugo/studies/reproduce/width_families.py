"""The part of ``width`` for an accelerator: how the best normalised noise scale grows with the width of a network.

Perceptrons with two hidden layers of 64 to 1,024 units in NTK parameterisation learn CIFAR-10, or digits (400 images, a fifth
of their labels random) where CIFAR-10 is not there. The largest stable learning rate is found at the widest; a quarter of it is
that of all runs. Every width is trained with batch sizes that are powers of two, all for as many steps and with the same seeds,
in stacks; the best gbar of each comes from a parabola, and the exponent from a regression over widths
(:mod:`conjugo.scaling.width`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from conjugo._files import write_aside
from conjugo.errors import CorruptFile, DataUnavailable, check
from conjugo.scaling.width import OptimalNoiseScale, WidthLaw, critical_width, optimal_noise_scale, width_law
from conjugo.studies.reproduce.grids import open_folder, save
from conjugo.studies.reproduce.paper import Claim, Request, compared, new_table, sentences
from conjugo.studies.reproduce.width_training import Condition, Outcome, Problem, Train, done, one_after_another, train
from conjugo.studies.runs import load_data, versions
from conjugo.studies.summary import SIGNIFICANT
from conjugo.training import TrainConfig
from conjugo.training.machine import choose_device

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import RenderableType

__all__ = ["CIFAR", "DIGITS", "FamilyPlan", "FamilyResult", "experiment", "proportionality", "stable_lr"]

NEAR = 0.3
"""So far from 1 the exponent may be."""

WORSE = 0.9
"""A learning rate is unstable if training accuracy falls below this part of the best at smaller ones."""


@dataclass(frozen=True, kw_only=True)
class FamilyPlan:
    """All that the runs depend on.

    widths, batches: ascending. lr: of all runs; None: *part* of the largest stable one at the largest width, which is looked
    for among *probed* with the largest batch, *probe_steps* steps. together: so many batch sizes share a stack, which costs
    as much as if all were the largest, but fewer launches.
    """

    problem: Problem
    widths: tuple[int, ...]
    batches: tuple[int, ...]
    steps: int
    lr: float | None = None
    part: float = 0.25
    probed: tuple[float, ...] = tuple(2.0**k for k in range(-4, 8))
    probe_steps: int = 300
    together: int = 4

    def stacks(self, lr: float) -> list[list[Condition]]:
        """What is trained at the same time."""
        return [
            [
                Condition(width=width, lr=lr, batch=batch, steps=self.steps)
                for batch in self.batches[i : i + self.together]
            ]
            for width in self.widths
            for i in range(0, len(self.batches), self.together)
        ]


CIFAR = FamilyPlan(
    problem=Problem(data="cifar10", examples=50_000, resample=False, label_noise=0.0, seeds=8),
    widths=(64, 128, 256, 512, 1024),
    batches=tuple(2**k for k in range(1, 11)),
    steps=20_000,
)

DIGITS = FamilyPlan(
    problem=Problem(seeds=24),
    widths=(64, 128, 256, 512, 1024),
    batches=tuple(2**k for k in range(8)),
    steps=6_000,
)


def proportionality(request: Request) -> FamilyResult:
    """Do the whole experiment, on CIFAR-10 if it is there. Raises ValueError without an accelerator, unless forced."""
    device = choose_device("auto")
    if device.type == "cpu" and not request.force:
        raise ValueError(
            "reproduce: scale 'gpu' trains perceptrons up to 1,024 wide, 8 or more seeds of 8 or more batch sizes each; torch "
            "finds no accelerator here, and a CPU would take hours. Use scale 'cpu', or --force (force=True)"
        )
    try:
        load_data(TrainConfig(data="cifar10"), None, None)
        plan = CIFAR
    except DataUnavailable:
        plan = DIGITS
    if device.type == "cpu":
        plan = replace(plan, together=1)  # launches cost nothing there
    return experiment(request, plan, train=partial(train, device=device))


def experiment(request: Request, plan: FamilyPlan, *, train: Train = train) -> FamilyResult:
    """Do the experiment of *plan*; train: trains (a stand-in for tests)."""
    from conjugo.studies.reproduce import width_figures

    one_after_another(request)
    if request.out is not None:
        description = {"paper": "width", "scale": "gpu", "workers": 1, **asdict(plan)}
        open_folder(request.out, json.loads(json.dumps(description)), resume=request.resume)
    lr = plan.lr if plan.lr is not None else _chosen_lr(plan, train, request.out)
    outcomes = done(plan.problem, plan.stacks(lr), train, request)
    result = FamilyResult(plan, lr, outcomes, versions(TrainConfig(data=plan.problem.data)))
    if request.out is not None:
        save(result.to_dict(), {"families": width_figures.families(result)}, request.out)
    return result


def stable_lr(plan: FamilyPlan, train: Train) -> float:
    """The largest of the *probed* learning rates below the first one at which the widest network does not learn any more.

    Raises ValueError if not even the smallest does, or if none is too large.
    """
    problem = replace(plan.problem, seeds=2, evaluations=2)
    widest = Condition(width=plan.widths[-1], lr=1.0, batch=plan.batches[-1], steps=plan.probe_steps)
    best, stable = 0.0, None
    for lr in plan.probed:
        (outcome,) = train(problem, [replace(widest, lr=lr)])
        reached = min(0.0 if accuracy is None else accuracy for accuracy in outcome.train)
        if outcome.diverged or reached < WORSE * best:
            break
        best, stable = max(best, reached), lr
    found = stable is not None and stable != plan.probed[-1]
    accepted = "rates of which the smallest are stable and the largest are not"
    check(found, "reproduce", "probed", plan.probed, accepted)
    assert stable is not None
    return stable


def _chosen_lr(plan: FamilyPlan, train: Train, out: Path | None) -> float:
    """A part of the largest stable learning rate; kept in the run directory, for what is resumed."""
    path = None if out is None else out / "lr.json"
    if path is not None and path.exists():
        try:
            return float(json.loads(path.read_bytes())["lr"])
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptFile(f"{path}: no learning rate ({error})") from error
    limit = stable_lr(plan, train)
    if path is not None:
        write_aside(path, json.dumps({"stable": limit, "lr": plan.part * limit}))
    return plan.part * limit


@dataclass(frozen=True)
class FamilyResult:
    """What came out of each width and batch size."""

    plan: FamilyPlan
    lr: float
    outcomes: Mapping[Condition, Outcome]
    versions: Mapping[str, str]

    def scan(self, width: int) -> list[tuple[Condition, Outcome]]:
        """The outcomes of a width, by batch size."""
        return [(condition, outcome) for condition, outcome in self.outcomes.items() if condition.width == width]

    def optimum(self, width: int) -> OptimalNoiseScale | None:
        """The best noise scale; None if too many runs diverged."""
        problem, scan = self.plan.problem, self.scan(width)
        table = np.array([outcome.test for _, outcome in scan], dtype=np.float64)  # None becomes NaN
        usable = int((np.isfinite(table).sum(1) >= 2).sum())
        if usable < 3:
            return None
        return optimal_noise_scale(
            table,
            [condition.batch for condition, _ in scan],
            lr=self.lr,
            n_train=problem.examples,
            init_var=problem.weight_var,
            points=min(5, usable),
        )

    @property
    def optima(self) -> dict[int, OptimalNoiseScale]:
        """The best noise scale of each width that has one."""
        found = {width: self.optimum(width) for width in self.plan.widths}
        return {width: optimum for width, optimum in found.items() if optimum is not None}

    @property
    def law(self) -> WidthLaw | None:
        """The regression over widths; None with fewer than three optima inside their scans."""
        optima = self.optima
        inside = [width for width, optimum in optima.items() if not optimum.at_edge]
        return width_law(list(optima), list(optima.values())) if len(inside) >= 3 else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        law = self.law
        gbar = self.plan.problem.gbar
        rows = [{"gbar": gbar(c), **asdict(c), **asdict(outcome)} for c, outcome in self.outcomes.items()]
        return {
            "paper": "width",
            "scale": "gpu",
            "plan": asdict(self.plan),
            "versions": dict(self.versions),
            "lr": self.lr,
            "conditions": rows,
            "optima": {str(width): asdict(optimum) for width, optimum in self.optima.items()},
            "law": None if law is None else asdict(law),
            "claims": [claim.to_dict() for claim in self.claims()],
        }

    def tables(self) -> list[RenderableType]:
        """The best noise scale of each width."""
        problem = self.plan.problem
        table = new_table(
            f"{problem.data}: the noise scale with the best test accuracy, by width",
            f"{problem.seeds} seeds, learning rate {self.lr:g}. In brackets: 95 % interval. Accuracy: of the best batch.",
        )
        for title in ("gbar", "batch", "accuracy", "edge"):
            table.add_column(title, justify="right", no_wrap=True)
        optima = self.optima
        for width in self.plan.widths:
            if (optimum := optima.get(width)) is None:
                table.add_row(f"width {width}", "diverged", "", "", "")
                continue
            low, high = optimum.interval
            gbar = f"{optimum.gbar:.3g} ({low:.3g} to {high:.3g})"
            edge = "yes" if optimum.at_edge else f"{100 * optimum.edge_share:.0f} %" if optimum.edge_share else ""
            table.add_row(f"width {width}", gbar, f"{optimum.batch:.3g}", f"{100 * optimum.accuracy:.2f}", edge)
        return [table]

    def text(self) -> str:
        """What reproduced and what did not."""
        notes = [
            "Edge: whether the optimum lies at the end of its scan, or in which part of the bootstrap samples it does; the "
            "former are left out of the regression.",
        ]
        law, problem = self.law, self.plan.problem
        if law is not None and self._proportional()[0] is not False:
            # The learning rate of the runs is a part of the largest stable one, if that was looked for.
            largest = self.lr / self.plan.part if self.plan.lr is None else self.lr
            width = critical_width(law.kappa, problem.examples, largest, problem.weight_var)
            notes.append(
                f"If gbar = kappa w with kappa = {law.kappa:.3g} held at all widths, the best batch at learning rate "
                f"{largest:g} would be 1 at width {width:,.0f} (the critical width)."
            )
        diverged = sum(outcome.diverged for outcome in self.outcomes.values())
        return sentences(
            self.claims(), [*notes, *([f"{diverged} runs diverged and were left out."] if diverged else [])]
        )

    def claims(self) -> list[Claim]:
        """What was published, judged by the runs."""
        name = self.plan.problem.data
        return [
            Claim("the best gbar is proportional to the width", {name: self._proportional()}),
            Claim("wider networks, each with its best gbar, have the better test accuracy", {name: self._better()}),
        ]

    def _proportional(self) -> tuple[bool | None, str]:
        law = self.law
        if law is None:
            return None, "fewer than three widths have an optimum inside their scan"
        low, high = law.interval
        said = f"exponent {law.exponent:.2f} (95 % interval {low:.2f} to {high:.2f}), over {len(law.widths)} widths"
        if abs(law.exponent - 1) <= NEAR and low > 0:
            return True, said
        # An interval that has both 0 and 1 says nothing.
        return (None, f"{said}: undecided") if low <= 0 and high >= 1 else (False, said)

    def _better(self) -> tuple[bool | None, str]:
        """The widest network against the narrowest, at the batch sizes whose mean is best."""
        best = [self._best(width) for width in (self.plan.widths[0], self.plan.widths[-1])]
        return compared(best[1], best[0], lambda gain, p: None if p is None else gain > 0 and p < SIGNIFICANT)

    def _best(self, width: int) -> Sequence[float] | None:
        alive = [[a for a in outcome.test if a is not None] for _, outcome in self.scan(width)]
        return max((a for a in alive if len(a) >= 2), key=lambda a: math.fsum(a) / len(a), default=None)
