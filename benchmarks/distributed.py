"""NLCG under DDP with two processes: the whole step beside SGD's, bytes between the processes, memory of the state."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from benchmarks._processes import run
from benchmarks._timing import interleave, ratio, show
from conjugo._space import to_local
from conjugo.optim import NLCG

WORLD = 2
BATCH = 64
ROUNDS = 12

CASES: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD momentum, fused": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, fused=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "NLCG": lambda p: NLCG(p, lr=1e-3, precond="bfgs"),
    "NLCG, online line search": lambda p: NLCG(p, lr=1e-3, line_search="online", precond="bfgs"),
    "NLCG without preconditioner": lambda p: NLCG(p, lr=1e-3, precond="none"),
    "NLCG, shard_state": lambda p: NLCG(p, lr=1e-3, shard_state=True, precond="bfgs"),
}


def network() -> nn.Module:
    """11 M parameters for images [B, 3, 32, 32]; most of them, as in most networks, where the images are small."""
    layers: list[nn.Module] = []
    for before, width, stride in (
        (3, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2), (512, 512, 1), (512, 512, 1), (512, 512, 1), (512, 512, 1)
    ):  # fmt: skip
        layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 100))


def main() -> None:
    """Print the table; the bytes are those of the loopback interface, so nothing else should use it."""
    seconds, alone, sent, state, n = run(WORLD, _measure)
    rows = []
    for name in CASES:
        middle, low, high = ratio(seconds[name], seconds["SGD momentum, fused"])
        ms = [f"{1e3 * statistics.median(times[name]):.0f}" for times in (seconds, alone)]
        wire = f"{statistics.median(sent[name]) / n:.2f}"
        rows.append([name, *ms, f"{middle:.3f}", f"{low:.3f} - {high:.3f}", wire, f"{state[name] / n:.1f}"])
    columns = ("optimizer", "ms a step", "of it optimizer", "to SGD", "quartiles", "bytes sent", "state")
    caption = "bytes sent to the other process in a step, and bytes of state on one, both per parameter"
    show(f"{n / 1e6:.1f} M parameters, {WORLD} processes under DDP, {BATCH} images on each", columns, rows, caption)


def _measure() -> tuple[Any, ...]:
    inputs, targets = torch.randn(BATCH, 3, 32, 32), torch.randint(100, (BATCH,))
    # All share one model: what differs is the optimizer, and that its gradients are equal for all.
    model = DistributedDataParallel(network())
    optimizers = {name: make(list(model.parameters())) for name, make in CASES.items()}
    alone: dict[str, list[float]] = {name: [] for name in CASES}
    sent: dict[str, list[int]] = {name: [] for name in CASES}

    def step(name: str) -> None:
        loss: Tensor = F.cross_entropy(model(inputs), targets)
        optimizers[name].zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        start = time.perf_counter()
        optimizer = optimizers[name]
        if isinstance(optimizer, NLCG):
            optimizer.step(loss=loss.detach())
        else:
            optimizer.step()
        alone[name].append(time.perf_counter() - start)

    def counted(name: str) -> None:
        dist.barrier()
        before = _loopback()
        step(name)
        dist.barrier()
        sent[name].append((_loopback() - before) // WORLD)

    for name in CASES:  # a round apart for the bytes: the barriers would be in the times
        for _ in range(5):
            counted(name)
    for times in alone.values():
        times.clear()
    seconds = interleave({name: partial(step, name) for name in CASES}, rounds=ROUNDS)
    sizes = {
        name: sum(to_local(t).nbytes for state in o.state.values() for t in state.values() if isinstance(t, Tensor))
        for name, o in optimizers.items()
    }
    return seconds, alone, sent, sizes, sum(p.numel() for p in model.parameters())


def _loopback() -> int:
    """Bytes that went over the loopback interface so far."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[0])
    return 0
