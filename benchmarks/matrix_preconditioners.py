"""Time of a step with the preconditioners for matrices, beside Muon of torch and SOAP of pytorch_optimizer."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from benchmarks._timing import interleave, ratio, show
from conjugo.optim import NLCG
from conjugo.optim.kronecker import Kronecker
from conjugo.optim.orthogonal import Orthogonal

Factory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

SHAPES: dict[str, Sequence[tuple[int, int]]] = {
    "perceptron on digits": [(128, 64), (128, 128)],
    "24 small matrices": [(64, 64)] * 12 + [(128, 64)] * 12,
    "a block of a transformer": [(512, 512)] * 4 + [(1024, 512), (512, 1024)],
}
CASES: dict[str, Factory] = {
    "Muon": lambda p: torch.optim.Muon(p, lr=1e-3),
    "orthogonal": lambda p: NLCG(p, lr=1e-3, beta_max=0.9, precond=Orthogonal(matrices=_all)),
    "orthogonal, float32": lambda p: NLCG(
        p, lr=1e-3, beta_max=0.9, precond=Orthogonal(matrices=_all, dtype=torch.float32)
    ),
    "SOAP": lambda p: importlib.import_module("pytorch_optimizer").SOAP(p, lr=1e-3, precondition_frequency=10),
    "kron": lambda p: NLCG(p, lr=1e-3, beta_max=0.9, precond=Kronecker(period=10)),
    "kron, float32": lambda p: NLCG(p, lr=1e-3, beta_max=0.9, precond=Kronecker(period=10, dtype=torch.float32)),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "adam": lambda p: NLCG(p, lr=1e-3, beta_max=0.9, precond="adam"),
}
PAIRS = [
    ("orthogonal", "Muon"),
    ("orthogonal, float32", "Muon"),
    ("kron", "SOAP"),
    ("kron, float32", "SOAP"),
    ("adam", "AdamW, foreach"),
    ("adam", "AdamW, fused"),
]


def main() -> None:
    """Print a table for each set of shapes."""
    torch.manual_seed(0)
    for title, shapes in SHAPES.items():
        _measure(title, shapes)


def _all(p: torch.Tensor) -> bool:
    return True


def _measure(title: str, shapes: Sequence[tuple[int, int]], rounds: int = 30, steps: int = 10) -> None:
    """Rounds of *steps* steps, as many as there are from one basis to the next."""
    optimizers = {}
    for name, factory in CASES.items():
        params = [nn.Parameter(torch.randn(shape) * 0.02) for shape in shapes]
        try:
            optimizers[name] = factory(params)
        except (AttributeError, ImportError):
            print(f"{name}: not installed, left out")

    noise = [[torch.randn(shape) for shape in shapes] for _ in range(steps)]

    def go(name: str) -> None:
        for grads in noise:
            for p, g in zip(optimizers[name].param_groups[0]["params"], grads, strict=True):
                p.grad = g
            optimizers[name].step()

    if sum(rows * columns for rows, columns in shapes) > 1e6:
        rounds = 9
    cases = {name: lambda name=name: go(name) for name in optimizers}
    seconds = interleave(
        cases, rounds=rounds, clock=time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    )
    rows = []
    for name, peer in PAIRS:
        if peer in optimizers:
            middle, low, high = ratio(seconds[name], seconds[peer])
            times = [f"{1e3 * statistics.median(seconds[n]) / steps:.2f}" for n in (name, peer)]
            rows.append([name, times[0], peer, times[1], f"{middle:.2f}", f"{low:.2f} - {high:.2f}"])
    columns = ("preconditioner", "ms a step", "peer", "its ms", "ratio", "quartiles")
    show(f"{title}: {len(shapes)} matrices, float32", columns, rows)


if __name__ == "__main__":
    main()
