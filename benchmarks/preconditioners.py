"""Preconditioners of NLCG from measured curvature: time of a step, what a training run reaches in equal time, and variants.

`python -m benchmarks.preconditioners cost time variants` does the parts that are named. All but the first tune each optimizer
as `conjugo compare` does: 20 runs, the learning rate and one more number, judged on a fifth of the training data.
"""

from __future__ import annotations

import copy
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks._timing import interleave, ratio, show
from conjugo.optim import NLCG
from conjugo.optim.curvature_preconditioners import GaussNewtonDiagonal, Hutchinson
from conjugo.studies.plans import TunedCell
from conjugo.studies.presets import presets
from conjugo.studies.records import Outcome, Run, Task
from conjugo.studies.runs import Contender, load_data, tuning_data
from conjugo.training import data, models, optimizers, train

NAMES = ("momentum", "adamw", "nlcg", "nlcg-hutchinson", "nlcg-gauss-newton")
PERIOD = 10
"""Steps between two measurements of the curvature, by default."""

OPTIONS: dict[str, dict[str, Any]] = {
    "default: damping 1, every 10": {},
    "damping 0.1": {"damping": 0.1},
    "damping 0.01": {"damping": 0.01},
    "every step": {"every": 1},
    "10 probes": {"probes": 10},
    "10 probes, damping 0.1": {"probes": 10, "damping": 0.1},
    "Newton": {"newton": True},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"precond": "none"},
    "bfgs": {"precond": "bfgs"},
    **{f"hutchinson, {text}": {"precond": Hutchinson(**options)} for text, options in OPTIONS.items()},
    **{f"gauss-newton, {text}": {"precond": GaussNewtonDiagonal(**options)} for text, options in OPTIONS.items()},
}


def main(parts: list[str] | None = None) -> None:
    """Print the tables."""
    for part in parts or ["cost", "time", "variants"]:
        {"cost": cost, "time": equal_time, "variants": variants}[part]()


# Cost --------------------------------------------------------------------------------------------------------------------


def _period(name: str, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> Callable[[], None]:
    """Ten training steps, one of them with a measurement of the curvature."""
    model = copy.deepcopy(model)
    optimizer = optimizers.build(name, model.parameters(), lr=1e-4)

    def run() -> None:
        for _ in range(PERIOD):
            optimizer.zero_grad()
            if getattr(optimizer, "needs_curvature", False):
                optimizer.measure(model, F.cross_entropy, inputs, targets)
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()

    return run


def _problems() -> dict[str, tuple[nn.Module, torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    digits = data.load("digits").train
    mlp = models.build("mlp", input_shape=(1, 8, 8), num_classes=10)
    images, labels = torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,))
    return {
        "digits, perceptron, batch 128": (mlp, *_first(digits, 128)),
        "digits, perceptron, batch 1,437": (mlp, *_first(digits, 1437)),
        "CIFAR-10's shapes, resnet8, batch 64": (
            models.build("resnet8", input_shape=(3, 32, 32), num_classes=10),
            images,
            labels,
        ),
    }


def _first(split: Any, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return split.inputs[:n].float(), split.targets[:n]


def _ratios(problem: tuple[nn.Module, torch.Tensor, torch.Tensor], rounds: int) -> dict[str, tuple[float, ...]]:
    """Of the time of a step to that of momentum: medians and quartiles."""
    seconds = interleave({name: _period(name, *problem) for name in NAMES}, rounds=rounds, warmup=1)
    return {name: ratio(seconds[name], seconds["momentum"]) for name in NAMES}


def cost() -> None:
    """Time of training steps, and of a measurement."""
    rows = []
    for title, (model, inputs, targets) in _problems().items():
        rounds = 10 if "resnet" in title else 40
        found = _ratios((model, inputs, targets), rounds)
        rows.append([title, *(f"{m:.2f} ({a:.2f} to {b:.2f})" for m, a, b in found.values())])
    show("Time of a step, beside momentum's: median (quartiles)", ["", *NAMES], rows)
    rows = []
    for title, (model, inputs, targets) in _problems().items():

        def gradient(model: nn.Module = model, x: torch.Tensor = inputs, y: torch.Tensor = targets) -> None:
            F.cross_entropy(model(x), y).backward()

        cases: dict[str, Callable[[], object]] = {"gradient": gradient}
        for kind, precond in (("hutchinson", Hutchinson()), ("gauss-newton", GaussNewtonDiagonal())):
            optimizer = NLCG(model.parameters(), precond=precond)
            cases[kind] = partial(optimizer.measure, model, F.cross_entropy, inputs, targets)
        seconds = interleave(cases, rounds=20, warmup=2)
        shares = [ratio(seconds[kind], seconds["gradient"]) for kind in ("hutchinson", "gauss-newton")]
        rows.append([title, *(f"{m:.2f} ({a:.2f} to {b:.2f})" for m, a, b in shares)])
    show("Time of a measurement, beside a gradient's", ["", "hutchinson", "gauss-newton"], rows)


# Tuned runs --------------------------------------------------------------------------------------------------------------


def _tuned(contender: Contender, steps: int, seeds: int = 10) -> list[tuple[float, Outcome, Task]]:
    """Full batches of digits: loss on all training data, outcome and task of the fresh runs."""
    base = replace(presets()["demo"].train, threads=1, device="cpu")
    whole = load_data(base, None, None)
    cell = TunedCell(contender, len(whole.train), trials=20, seeds=seeds, seed=0)
    finished: list[Run] = []
    losses = []
    while len(finished) < cell.size:
        for task in cell.ready(finished):
            dataset = tuning_data(whole, 0.2, 0) if task.phase == "tune" else whole
            config = replace(
                base,
                optimizer=contender.optimizer,
                optimizer_options=contender.chosen(task),
                lr=task.lr,
                batch_size="full",
                steps=steps,
                evaluations=1,
                checkpoints=0,
                seed=task.seed,
            )
            result = train(config, data=dataset, progress=False, stop_on_divergence=False)
            names = ("steps", "samples", "accuracy", "loss", "diverged", "seconds", "curve")
            outcome = Outcome(**{name: getattr(result, name) for name in names})
            finished.append(Run(task, outcome))
            if task.phase != "tune":
                x, y = data.default_augment(dataset)(dataset.train.inputs, train=False), dataset.train.targets
                with torch.no_grad():
                    losses.append((F.cross_entropy(result.model.eval()(x), y).item(), outcome, task))
    return losses


def _row(name: str, steps: int, found: list[tuple[float, Outcome, Task]]) -> list[str]:
    def shown(values: list[float], digits: int) -> str:
        good = [value for value in values if math.isfinite(value)]
        lost = f" ({len(values) - len(good)} not finite)" if len(good) < len(values) else ""
        return f"{statistics.mean(good):.{digits}f} ± {statistics.stdev(good):.{digits}f}{lost}"

    task = found[0][2]
    setting = f"{task.lr:.2g}" + ("" if task.second is None else f", {task.second:.3g}")
    accuracies = [100 * outcome.accuracy for _, outcome, _ in found]
    row = [name, str(steps), shown([loss for loss, _, _ in found], 3), shown(accuracies, 1), setting]
    print(*row, sep="; ", flush=True)
    return row


COLUMNS = ("", "steps", "loss on training data", "test accuracy (%)", "setting")


def equal_time() -> None:
    """Full batches of digits for the time of 30 steps of momentum, also where steps cost what they do with a larger model."""
    for title, problem in _problems().items():
        if title.endswith("batch 128"):
            continue
        found = _ratios(problem, 10)
        rows = []
        for name in NAMES:
            steps = min(30, round(30 / found[name][0]))  # a ratio below 1 is noise of the clock
            rows.append(_row(name, steps, _tuned(Contender.from_catalogue(name), steps)))
        show(f"Digits, full batch, equal time at the costs of: {title}", COLUMNS, rows)


def variants() -> None:
    """30 full batches of digits, NLCG with other options, whatever they cost."""
    axes = Contender.from_catalogue("nlcg").axes
    rows = []
    for name, options in VARIANTS.items():
        rows.append(_row(name, 30, _tuned(Contender(name, "nlcg", axes, options), 30)))
    show("Digits, full batch, equal steps", COLUMNS, rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
