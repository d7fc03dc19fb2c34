"""Time of an optimizer step and memory of its state, on parameters in the shapes of real models."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks._timing import interleave, ratio, show
from conjugo.optim import CBLR, FRSGD, LAMB, LARS, MCLR, NLCG, AdaGradNorm
from conjugo.training import models

Factory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

OURS: dict[str, tuple[Factory, str]] = {
    "NLCG, FR + BFGS": (lambda p: NLCG(p, lr=1e-3, precond="bfgs"), "AdamW, fused"),
    "NLCG, FR": (lambda p: NLCG(p, lr=1e-3, precond="none"), "SGD momentum, fused"),
    "NLCG, PR + BFGS": (lambda p: NLCG(p, lr=1e-3, rule="pr", precond="bfgs"), "AdamW, fused"),
    "NLCG, FR + BFGS, PyTorch path": (lambda p: NLCG(p, lr=1e-3, fused=False, precond="bfgs"), "AdamW, foreach"),
    "FRSGD": (lambda p: FRSGD(p, lr=1e-3), "SGD momentum, fused"),
    "AdaGradNorm": (lambda p: AdaGradNorm(p), "SGD, foreach"),
    "AdaGradNorm, momentum": (lambda p: AdaGradNorm(p, momentum=0.9), "SGD momentum, fused"),
    "AdaGradNorm, distance": (lambda p: AdaGradNorm(p, distance=True), "SGD, foreach"),
    "LARS": (lambda p: LARS(p, lr=1e-3), "LARS of pytorch_optimizer"),
    "LAMB": (lambda p: LAMB(p, lr=1e-3), "LAMB of pytorch_optimizer"),
    "MCLR": (lambda p: MCLR(p, lr=1e-3), "SGD momentum, fused"),
    "CBLR": (lambda p: CBLR(p, lr=1e-3), "SGD momentum, fused"),
    "CBLR, secant": (lambda p: CBLR(p, lr=1e-3, estimator="secant"), "SGD momentum, fused"),
}
PEERS: dict[str, Factory] = {
    "SGD, foreach": lambda p: torch.optim.SGD(p, lr=1e-3, foreach=True),
    "SGD momentum, fused": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, fused=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "LARS of pytorch_optimizer": lambda p: importlib.import_module("pytorch_optimizer").LARS(p, lr=1e-3),
    "LAMB of pytorch_optimizer": lambda p: importlib.import_module("pytorch_optimizer").Lamb(p, lr=1e-3),
}


def resnet50() -> list[nn.Parameter]:
    """25.6 M parameters in 161 tensors."""
    return list(models.build("resnet50", input_shape=(3, 224, 224), num_classes=1000).parameters())


def transformer() -> list[nn.Parameter]:
    """A small language model: 16.8 M parameters in 37 tensors, a third of them in the embedding."""
    block = [(512, 512)] * 4 + [(2048, 512), (512, 2048), (512,), (512,), (2048,)]
    return [nn.Parameter(torch.randn(shape) * 0.02) for shape in [(8192, 512), *block * 4]]


def ten_million() -> list[nn.Parameter]:
    """10.5 M parameters in 20 tensors."""
    return [nn.Parameter(torch.randn(shape) * 0.02) for shape in [(1024, 1024), (1024,)] * 10]


def main() -> None:
    """Print the tables."""
    torch.manual_seed(0)
    for title, make in (("ten layers", ten_million), ("ResNet-50", resnet50), ("transformer", transformer)):
        _measure(title, make)
    _small()


def _optimizers(make: Callable[[], list[nn.Parameter]]) -> dict[str, torch.optim.Optimizer]:
    built = {}
    for name, factory in {**PEERS, **{name: ours for name, (ours, _) in OURS.items()}}.items():
        params = make()
        for p in params:
            p.grad = torch.randn_like(p) * 0.01
        try:
            built[name] = factory(params)
        except ImportError:
            print(f"{name}: not installed, left out")
    return built


def _refresh(optimizer: torch.optim.Optimizer) -> None:
    """New gradients, as a backward pass would leave them: written just before, mostly out of the cache."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad.mul_(0.99)


def _measure(title: str, make: Callable[[], list[nn.Parameter]], rounds: int = 15) -> None:
    optimizers = _optimizers(make)
    steps = {name: optimizer.step for name, optimizer in optimizers.items()}
    seconds = interleave(steps, rounds=rounds, prepare=lambda name: _refresh(optimizers[name]))
    n = sum(p.numel() for p in make())
    rows = []
    for name, (_, peer) in OURS.items():
        if peer in optimizers:
            middle, low, high = ratio(seconds[name], seconds[peer])
            time = f"{1e3 * statistics.median(seconds[name]):.1f}"
            rows.append([name, time, peer, f"{middle:.2f}", f"{low:.2f} - {high:.2f}", _state(optimizers[name], n)])
    columns = ("optimizer", "ms a step", "peer", "ratio", "quartiles", "state")
    show(f"{title}: {n / 1e6:.1f} M float32 parameters", columns, rows, "state: bytes per parameter")


def _state(optimizer: torch.optim.Optimizer, n: int) -> str:
    tensors: list[Any] = [
        t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)
    ]
    return f"{sum(t.numel() * t.element_size() for t in tensors) / n:.2f}"


def _small() -> None:
    """Where parameters are few, what counts is the time outside the arithmetic."""
    optimizers = _optimizers(lambda: list(models.build("mlp", input_shape=(64,), num_classes=10).parameters()))
    seconds = interleave({name: optimizer.step for name, optimizer in optimizers.items()}, rounds=300)
    rows = [[name, f"{1e6 * statistics.median(values):.0f}"] for name, values in seconds.items()]
    show("MLP 64-128-128-10: 26 k parameters in 6 tensors", ("optimizer", "µs a step"), rows)


if __name__ == "__main__":
    main()
