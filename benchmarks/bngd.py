"""Batch norm on least squares: a map of both learning rates, beside a NumPy loop over its pairs; and what the tracker costs."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks._timing import interleave, ratio, show
from conjugo.scaling import EffectiveLRTracker, bngd
from conjugo.training import models

STEPS = 2000
SAMPLE = 40
"""Pairs of learning rates that the loop does in a round, evenly from all; its time is extrapolated."""


def problem(d: int = 100, kappa: float = 80.0) -> tuple[bngd.OLS, torch.Tensor]:
    u, w = torch.randn(2, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lam = torch.logspace(0, math.log10(kappa), d, dtype=torch.float64)
    return bngd.OLS(lam, u=u / u.norm()), w / w.norm()


def single(lam: np.ndarray, g: np.ndarray, w: np.ndarray, lr: float, lr_a: float) -> float:
    """The iteration as a user writes it, in the eigenbasis: a run, and the excess at its end."""
    hw = lam * w
    s, p = math.sqrt(w @ hw), w @ g
    a = p / s
    for _ in range(STEPS):
        push = lr * a / s
        a += lr_a * (p / s - a)
        w = w + push * (g - (p / s**2) * hw)
        hw = lam * w
        s, p = math.sqrt(w @ hw), w @ g
    e = g / lam - (p / s**2) * w
    return (a - p / s) ** 2 / 2 + e @ (lam * e) / 2


def _map() -> None:
    found, start = problem()
    lrs, lr_as = torch.logspace(-5, 16, 43, dtype=torch.float64), torch.logspace(-10, 0, 41, dtype=torch.float64)
    grid = torch.cartesian_prod(lrs, lr_as)
    pairs = grid[:: len(grid) // SAMPLE].tolist()
    lam, g, w = found.H.diagonal().numpy(), found.g.numpy(), start.numpy()
    ours: list[bngd.ConvergenceMap] = []
    theirs: list[list[float]] = []
    cases: dict[str, Callable[[], object]] = {
        "map": lambda: ours.append(bngd.convergence_map(found, lrs, lr_as, STEPS, start)),
        "every step": lambda: bngd.run(found, grid[:, 0], grid[:, 1], start, steps=STEPS, record=None),
        "loop": lambda: theirs.append([single(lam, g, w, lr, lr_a) for lr, lr_a in pairs]),
    }
    seconds = interleave(cases, rounds=7, warmup=1, clock=time.process_time)
    loop = [s * len(grid) / len(pairs) for s in seconds["loop"]]
    rows = [["NumPy, a run after the other", f"{statistics.median(loop):.1f}", "1", ""]]
    for name, label in (("every step", "conjugo, all steps of all runs"), ("map", "conjugo, convergence_map")):
        middle, low, high = ratio(loop, seconds[name])
        rows.append([label, f"{statistics.median(seconds[name]):.2f}", f"{middle:.1f}", f"{low:.1f} to {high:.1f}"])
    mine = ours[-1].excess.flatten()[:: len(grid) // SAMPLE]
    high = [i for i, excess in enumerate(theirs[-1]) if excess > 1e-8]
    off = max(abs(float(mine[i]) / theirs[-1][i] - 1) for i in high)
    caption = (
        f"d = 100; the loop is measured on {len(pairs)} pairs; largest difference of an excess above 1e-8: {off:.1g}"
    )
    title = f"{len(grid):,} pairs of learning rates, {STEPS:,} steps"
    show(title, ("", "processor s", "times as fast", "quartiles"), rows, caption)


def _tracker() -> None:
    rows = []
    for name, batch in (("resnet20v1", 128), ("cnn", 128)):
        torch.manual_seed(0)
        model = models.build(name, input_shape=(3, 32, 32), num_classes=10)
        inputs, targets = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        tracker = EffectiveLRTracker(model, optimizer)

        def step(
            model: nn.Module = model,
            inputs: torch.Tensor = inputs,
            targets: torch.Tensor = targets,
            optimizer: torch.optim.Optimizer = optimizer,
        ) -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()

        step()
        tracker.step()
        seconds = interleave({"step": step, "tracker": tracker.step}, rounds=7, warmup=1, clock=time.process_time)
        middle, low, high = ratio(seconds["tracker"], seconds["step"])
        times = [f"{1e3 * statistics.median(seconds[case]):.2f}" for case in ("step", "tracker")]
        rows.append([f"{name}, batch {batch}", *times, f"{100 * middle:.2f} %", f"{100 * low:.2f} to {100 * high:.2f}"])
    show("EffectiveLRTracker", ("", "training step, ms", "tracker.step, ms", "ratio", "quartiles"), rows)


def main() -> None:
    """Print the tables."""
    _map()
    _tracker()


if __name__ == "__main__":
    main()
