"""Time of a step with matrices on two ranks: each does all, the ranks share the work, or hold pieces and share the work.

CPU time of the first rank, in which waiting for the other does not count, so that other processes disturb little.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks._processes import run
from benchmarks._timing import interleave, ratio, show
from conjugo.optim import NLCG, Kronecker, Orthogonal

WORLD = 2
ROUNDS, STEPS = 5, 10  # from one basis to the next

SHAPES: dict[str, Sequence[tuple[int, int]]] = {
    "24 small matrices": [(64, 64)] * 12 + [(128, 64)] * 12,
    "two blocks of a transformer": ([(512, 512)] * 4 + [(1024, 512), (512, 1024)]) * 2,
}


def _all(p: torch.Tensor) -> bool:
    return True


CASES: dict[str, Callable[..., Any]] = {
    "orthogonal": lambda spread: Orthogonal(matrices=_all, spread=spread),
    "kron": lambda spread: Kronecker(spread=spread),
}
WAYS: dict[str, tuple[bool | None, bool]] = {
    "each does all": (False, False),
    "shared out": (True, False),
    "default": (None, False),
    "shard_state": (None, True),
}


def main() -> None:
    """Print a table for each set of shapes."""
    for title, shapes in SHAPES.items():
        seconds = run(WORLD, _measure, shapes)
        rows = []
        for name in seconds:
            middle, low, high = ratio(seconds[name], seconds[f"{name.partition(',')[0]}, each does all"])
            ms = 1e3 * statistics.median(seconds[name])
            rows.append([name, f"{ms:.1f}", f"{middle:.2f}", f"{low:.2f} - {high:.2f}"])
        columns = ("preconditioner", "CPU ms a step", "to each does all", "quartiles")
        show(f"{title}, {WORLD} processes of one thread", columns, rows)


def _measure(shapes: Sequence[tuple[int, int]]) -> dict[str, list[float]]:
    optimizers = {}
    for name, make in CASES.items():
        for way, (spread, cut) in WAYS.items():
            torch.manual_seed(0)
            params = [nn.Parameter(torch.randn(shape) * 0.02) for shape in shapes]
            optimizers[f"{name}, {way}"] = NLCG(params, lr=1e-3, beta_max=0.9, precond=make(spread), shard_state=cut)
    torch.manual_seed(1)
    noise = [torch.randn(shape) for shape in shapes]

    def go(name: str) -> None:
        for _ in range(STEPS):
            for p, g in zip(optimizers[name].param_groups[0]["params"], noise, strict=True):
                p.grad = g
            optimizers[name].step()

    def prepare(name: str) -> None:
        dist.barrier()

    cases = {name: lambda name=name: go(name) for name in optimizers}
    seconds = interleave(cases, rounds=ROUNDS, warmup=1, prepare=prepare, clock=time.process_time)
    return {name: [s / STEPS for s in times] for name, times in seconds.items()}
