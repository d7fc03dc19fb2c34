"""Ward, Wu & Bottou 2019: AdaGrad-Norm, at the scale of a CPU, in three parts.

Least squares (the paper's synthetic example): the gradient norm after 5,000 steps of batch 20, and after 200 full-batch steps,
over nine decades of b_0, beside SGD with the step sizes that AdaGrad-Norm begins with and beside AdaGrad by coordinates.

Networks: digits with softmax regression and with a 64-100-100-10 perceptron, batch 256, 30 epochs, learning rate 1, no
momentum, over ten decades of b_0, three seeds; beside SGD with step size 1 / b_0.

Tasks: what a user does. Four tasks, six methods, seven values of the one hyperparameter that each method leaves to the
user, three seeds, a cosine schedule for all; see :mod:`conjugo.studies.reproduce.grid_study`. Judged are the tuned
accuracy, and what one value for all four tasks costs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from conjugo._files import write_aside
from conjugo.optim import AdaGradNorm
from conjugo.studies.records import Outcome, Task
from conjugo.studies.reproduce.grid_study import Entrant, GridStudy, GridStudyResult, run_study, run_task
from conjugo.studies.reproduce.grids import save
from conjugo.studies.reproduce.paper import Claim, NotRun, Paper, Request, above, new_table, not_below, sentences
from conjugo.studies.runs import load_data
from conjugo.training import TrainConfig

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["PAPER", "AdaGradNormResult", "SweepPlan", "experiment", "plan", "sweep"]

ETA = 650.0
"""The paper's learning rate on least squares: about the loss that there is to be gained."""

EXPECTED_NORMS: Mapping[str, Mapping[float, float]] = {
    "AdaGrad-Norm": {1e-2: 0.048, 1.0: 0.048, 1e2: 0.044, 1e4: 1.5e-4, 1e5: 0.040, 1e6: 2.9},
    "SGD, constant": {1e-2: math.inf, 1.0: math.inf, 1e2: math.inf, 1e4: math.inf, 1e5: 0.040, 1e6: 2.9},
    "AdaGrad": {1e-2: 3.6, 1.0: 2.8, 1e2: 1.3, 1e4: 3e-3, 1e5: 0.040, 1e6: 2.9},
}
"""Gradient norm after 5,000 stochastic steps by b_0 of a first, throw-away implementation; the paper has figures only."""

Make = Callable[[list[nn.Parameter], float, float], torch.optim.Optimizer]
"""An optimizer for parameters, eta and b_0."""

METHODS: Mapping[str, Make] = {
    "AdaGrad-Norm": lambda params, eta, b0: AdaGradNorm(params, lr=eta, b0=b0),
    "AdaGrad": lambda params, eta, b0: torch.optim.Adagrad(params, lr=eta, initial_accumulator_value=b0**2),
    "SGD, constant": lambda params, eta, b0: torch.optim.SGD(params, lr=eta / b0),
    "SGD, decaying": lambda params, eta, b0: torch.optim.SGD(params, lr=eta / b0),
    "AdaGrad-Norm by rows": lambda params, eta, b0: AdaGradNorm(params, lr=eta, b0=b0, scope="row"),
}


NETWORK_METHODS = ("AdaGrad-Norm", "AdaGrad-Norm by rows", "SGD, constant")


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """The parts over b_0. size: rows and columns of the least squares; steps: stochastic and full-batch ones."""

    size: tuple[int, int] = (2000, 1000)
    steps: tuple[int, int] = (5000, 200)
    b0: tuple[float, ...] = tuple(10.0**k for k in range(-2, 7))
    network_b0: tuple[float, ...] = tuple(10.0**k for k in range(-6, 4))
    epochs: int = 30
    seeds: int = 3


Sweep = Mapping[str, Mapping[str, list[Any]]]
"""By part and method: a figure for each b_0; for networks final training losses, one for each seed. None: not finite."""


def sweep(plan: SweepPlan) -> Sweep:
    """Do the runs over b_0 of both parts."""
    found: dict[str, dict[str, list[Any]]] = {}
    for part, stochastic in (("batch 20", True), ("full batch", False)):
        found[part] = {
            name: [_least_squares(plan, name, b0, stochastic) for b0 in plan.b0]
            for name in METHODS
            if "rows" not in name
        }
    for model in ("regression", "perceptron"):
        found[model] = {
            name: [[_network(plan, model, name, b0, seed) for seed in range(plan.seeds)] for b0 in plan.network_b0]
            for name in NETWORK_METHODS
        }
    return found


def _least_squares(plan: SweepPlan, name: str, b0: float, stochastic: bool) -> float | None:
    """Norm of the full gradient of |A x - y|^2 / 2m after all steps; None: not finite."""
    rows, columns = plan.size
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(rows, columns, generator=generator)
    y = a @ torch.randn(columns, generator=generator)
    x = nn.Parameter(torch.rand(columns, generator=generator))
    optimizer = METHODS[name]([x], ETA, b0)
    lr = optimizer.param_groups[0]["lr"]
    with torch.no_grad():
        for t in range(plan.steps[0 if stochastic else 1]):
            if stochastic:
                chosen = torch.randint(rows, (20,), generator=generator)
                part, wanted = a[chosen], y[chosen]
            else:
                part, wanted = a, y
            x.grad = part.T @ (part @ x - wanted) / len(part)
            if name == "SGD, decaying":
                optimizer.param_groups[0]["lr"] = lr / math.sqrt(t + 1)
            optimizer.step()
            if not math.isfinite(x[0].item()):
                return None
        norm = (a.T @ (a @ x - y) / rows).norm().item()
    return norm if math.isfinite(norm) else None


def _network(plan: SweepPlan, model: str, name: str, b0: float, seed: int) -> float | None:
    """Mean training loss on digits after all epochs; None: not finite."""
    data = load_data(TrainConfig(data="digits"), None, None)
    torch.manual_seed(seed)
    net = nn.Linear(64, 10) if model == "regression" else _perceptron()
    optimizer = METHODS[name](list(net.parameters()), 1.0, b0)
    inputs, targets = data.train.inputs.flatten(1).float() / 255, data.train.targets
    for _ in range(plan.epochs):
        for rows in torch.split(torch.randperm(len(inputs)), 256):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs[rows]), targets[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    with torch.no_grad():
        loss = nn.functional.cross_entropy(net(inputs), targets).item()
    return loss if math.isfinite(loss) else None


def _perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))


def plan() -> GridStudy:
    """The part with four tasks."""

    def values(low: float) -> tuple[float, ...]:
        return tuple(float(f"{low * 10 ** (k / 2):.3g}") for k in range(7))

    train = TrainConfig(schedule="cosine", warmup=0.0, weight_decay=0.0)
    momentum = {"momentum": 0.9}
    return GridStudy(
        settings={
            "digits, MLP": replace(train, data="digits", model="mlp", batch_size=64, epochs=10),
            "digits, MLP, batch 512": replace(train, data="digits", model="mlp-bn", batch_size=512, epochs=20),
            "digits, CNN": replace(train, data="digits", model="cnn", batch_size=128, epochs=5),
            "breast cancer, MLP": replace(train, data="breast_cancer", model="mlp", batch_size=32, epochs=10),
        },
        entrants={
            "momentum": Entrant(label="SGD, momentum 0.9 (lr)", optimizer="momentum", values=values(0.003)),
            "adamw": Entrant(label="AdamW (lr)", optimizer="adamw", values=values(0.0001)),
            "first-step": Entrant(
                label="AdaGrad-Norm (first step)",
                optimizer="adagrad-norm",
                values=values(0.001),
                axis="first_step",
                options=momentum,
                lr=30.0,
            ),
            "b0": Entrant(
                label="AdaGrad-Norm, lr 1 (b0)",
                optimizer="adagrad-norm",
                values=tuple(10.0**k for k in range(-4, 3)),
                axis="b0",
                options=momentum,
                lr=1.0,
            ),
            "eta": Entrant(
                label="AdaGrad-Norm, b0 0.01 (lr)",
                optimizer="adagrad-norm",
                values=values(0.1),
                options={**momentum, "b0": 0.01},
            ),
            "distance": Entrant(
                label="AdaGrad-Norm by distance (lr)",
                optimizer="adagrad-norm",
                values=tuple(float(f"{0.1 * 10 ** (k / 3):.3g}") for k in range(7)),
                options={"momentum": 0.0, "distance": True, "initial_distance": 1e-4},
            ),
        },
        seeds=3,
    )


def experiment(
    request: Request,
    *,
    study: GridStudy | None = None,
    run: Callable[[GridStudy, Task], Outcome] = run_task,
    sweeps: SweepPlan | None = None,
    swept: Callable[[SweepPlan], Sweep] = sweep,
) -> AdaGradNormResult:
    """Do the experiment. study, sweeps: None is the whole of it; run, swept: do the runs (stand-ins for tests)."""
    from conjugo.studies.reproduce import adagrad_norm_figures, grid_figures

    study, sweeps = plan() if study is None else study, SweepPlan() if sweeps is None else sweeps
    grids = run_study(study, request, paper="adagrad-norm", expected={}, run=run)
    over_b0 = _kept(None if request.out is None else request.out / "sweeps.json", lambda: swept(sweeps))
    result = AdaGradNormResult(grids, sweeps, over_b0)
    if request.out is not None:
        drawn = {"b0": adagrad_norm_figures.over_b0(result), "tasks": grid_figures.curves(grids, "hyperparameter")}
        save(result.to_dict(), drawn, request.out)
    return result


def _kept(path: Path | None, compute: Callable[[], Sweep]) -> Sweep:
    """What *compute* gives, from the file if an earlier run has left it there."""
    if path is not None and path.exists():
        kept: Sweep = json.loads(path.read_bytes())
        return kept
    found = compute()
    if path is not None:
        write_aside(path, json.dumps(found))
    return found


@dataclass(frozen=True)
class AdaGradNormResult:
    """All three parts."""

    grids: GridStudyResult
    sweeps: SweepPlan
    over_b0: Sweep

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            **self.grids.to_dict(),
            "over_b0": self.over_b0,
            "shared": {name: self.shared(name) for name in self.grids.study.entrants},
            "claims": [claim.to_dict() for claim in self.claims()],
        }

    # ---- tables ----

    def tables(self) -> list[RenderableType]:
        """Least squares, networks, tasks."""
        first = "a first implementation."
        return [
            self._norms_table("batch 20"),
            self._norms_table("full batch"),
            self._networks_table(),
            self.grids.accuracy_table("Tasks: test accuracy (%)", first),
            self.grids.values_table("Tasks: chosen value · width of the usable ones in octaves"),
            self._shared_table(),
        ]

    def _norms_table(self, part: str) -> RenderableType:
        steps = self.sweeps.steps[part == "full batch"]
        table = new_table(
            f"Least squares, {part}: gradient norm after {steps:,} steps, by b_0",
            f"Learning rate {ETA:g}. inf: diverged." + (" In brackets: expected." if part == "batch 20" else ""),
        )
        for b0 in self.sweeps.b0:
            table.add_column(f"{b0:g}", justify="right", no_wrap=True)
        for name, norms in self.over_b0[part].items():
            expected = EXPECTED_NORMS.get(name, {}) if part == "batch 20" else {}
            row = []
            for b0, norm in zip(self.sweeps.b0, norms):
                wanted = f" [dim]({expected[b0]:.2g})[/]" if b0 in expected else ""
                row.append(f"{math.inf if norm is None else norm:.2g}{wanted}")
            table.add_row(name, *row)
        return table

    def _networks_table(self) -> RenderableType:
        table = new_table(
            "Digits: final training loss by b_0, learning rate 1",
            f"Means of {self.sweeps.seeds} seeds, {self.sweeps.epochs} epochs. inf: diverged.",
        )
        for b0 in self.sweeps.network_b0:
            table.add_column(f"{b0:g}", justify="right", no_wrap=True)
        for model, name in product(("regression", "perceptron"), NETWORK_METHODS):
            table.add_row(f"{model}: {name}", *(f"{loss:.2g}" for loss in self.losses(model, name)))
        return table

    def _shared_table(self) -> RenderableType:
        table = new_table(
            "One value for all tasks: what it costs (points of validation accuracy)",
            "The value with the best mean over the tasks, against the best that any method reaches on each task.",
        )
        for column in ("value", "mean loss", "worst loss"):
            table.add_column(column, justify="right")
        for name, entrant in self.grids.study.entrants.items():
            found = self.shared(name)
            row = ("–",) * 3 if found is None else (f"{found[0]:.3g}", f"{100 * found[1]:.1f}", f"{100 * found[2]:.1f}")
            table.add_row(entrant.label, *row)
        return table

    def shared(self, name: str) -> tuple[float, float, float] | None:
        """The value that is best over all tasks, and its mean and worst shortfall from the best of all methods."""
        settings, study = self.grids.study.settings, self.grids.study
        cells = {key: self.grids.cell(*key) for key in product(study.entrants, settings)}
        if any(cell is None for cell in cells.values()):
            return None
        points = {key: dict(cell.points) for key, cell in cells.items() if cell is not None}
        best = {s: max(max(points[other, s].values()) for other in study.entrants) for s in settings}
        losses = {value: [best[s] - points[name, s][value] for s in settings] for value in study.entrants[name].values}
        value = min(losses, key=lambda v: math.fsum(losses[v]))
        return value, math.fsum(losses[value]) / len(settings), max(losses[value])

    def losses(self, model: str, name: str) -> list[float]:
        """Final training loss on digits for each b_0: means over the seeds."""
        found = self.over_b0[model][name]
        return [math.fsum(math.inf if loss is None else loss for loss in seeds) / len(seeds) for seeds in found]

    # ---- sentences ----

    def text(self) -> str:
        """What reproduced and what did not."""
        return sentences(self.claims(), self.grids.notes())

    def claims(self) -> list[Claim]:
        """What was expected, judged by the runs."""
        study = self.grids.study
        return [
            Claim(
                "on least squares the gradient norm stays below 2 for all b_0 from 0.01 to 1,000, where SGD diverges",
                {part: self._flat(part) for part in ("batch 20", "full batch")},
            ),
            Claim(
                "on digits the usable b_0 of AdaGrad-Norm span at least three decades more than those of SGD with step size "
                "1 / b_0 (usable: final training loss at most twice the lowest of the method)",
                {model: self._decades(model) for model in ("regression", "perceptron")},
            ),
            self.grids.claim(
                "with its first step tuned AdaGrad-Norm is not below tuned momentum",
                "first-step",
                "momentum",
                not_below,
            ),
            self.grids.claim("it is above the paper's form with tuned b_0", "first-step", "b0", above(0.0)),
            Claim(
                "one relative first step serves all tasks better than one learning rate of momentum or of AdamW",
                {study.entrants[other].label: self._transfers(other) for other in ("momentum", "adamw")},
            ),
        ]

    def _flat(self, part: str) -> tuple[bool, str]:
        ours, theirs = (
            [norm for b0, norm in zip(self.sweeps.b0, self.over_b0[part][name]) if b0 <= 1e3]
            for name in ("AdaGrad-Norm", "SGD, constant")
        )
        worst = max(math.inf if norm is None else norm for norm in ours)
        diverged = sum(norm is None or norm > 1e5 for norm in theirs)
        return worst < 2 and diverged >= len(
            theirs
        ) - 1, f"at most {worst:.2g}; SGD fails at {diverged} of {len(theirs)}"

    def _decades(self, model: str) -> tuple[bool, str]:
        losses = {name: self.losses(model, name) for name in ("AdaGrad-Norm", "SGD, constant")}
        ours, theirs = (sum(loss <= 2 * min(row) for loss in row) for row in losses.values())
        lowest = " and ".join(f"{min(row):.2g}" for row in losses.values())
        return ours - theirs >= 3, f"{ours} against {theirs} of {len(self.sweeps.network_b0)} decades, lowest {lowest}"

    def _transfers(self, other: str) -> tuple[bool | None, str]:
        ours, theirs = self.shared("first-step"), self.shared(other)
        if ours is None or theirs is None:
            return None, "not run"
        return ours[1] < theirs[1], f"it costs {100 * ours[1]:.1f} against {100 * theirs[1]:.1f} points on average"


PAPER = Paper(
    title="AdaGrad Stepsizes: Sharp Convergence over Nonconvex Landscapes",
    source="R. Ward, X. Wu, L. Bottou, ICML 2019; JMLR 21 (2020)",
    scales={
        "cpu": experiment,
        "gpu": NotRun(
            "adagrad-norm",
            "gpu",
            "This would be ResNet-18 on CIFAR-10, batches of 256 and 4,096, 15 epochs, over b_0 from 1e-4 to 1e3: AdaGrad-Norm "
            "by rows, for all parameters and with a relative first step, and SGD with momentum; the width of b_0 within one "
            "point.",
        ),
        "full": NotRun(
            "adagrad-norm",
            "full",
            "This would be ResNet-50 on ImageNet, 90 epochs, b_0 squared from 1e-2 to 1e5, momentum 0 and 0.9. The paper "
            "reaches about 66 % top-1 accuracy, ten points below what SGD with momentum and drops reaches.",
        ),
    },
)
