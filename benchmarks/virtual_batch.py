"""Virtual batches beside an accumulation loop written by hand, and the ways to a Hessian-vector product, two processes."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from benchmarks._processes import run
from benchmarks._timing import interleave, ratio, show
from conjugo.distributed import VirtualBatch, hvp

ROUNDS = 40
BATCH = 8
COUNTS = (1, 4)

Part = tuple[Tensor, Tensor]


def network() -> nn.Sequential:
    """0.3 M parameters for images [B, 3, 32, 32], BATCH of which take some 10 ms or 20 ms."""
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    for _ in range(9):
        layers += [nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 400), nn.Linear(400, 100))


def loss_of(model: nn.Module, part: Part) -> Tensor:
    """Mean cross-entropy."""
    return F.cross_entropy(model(part[0]), part[1])


def main() -> None:
    """Print both tables."""
    rows = []
    for layout, world in (("plain", 1), ("DDP", 2)):
        seconds = run(world, _accumulate, layout)
        for count in COUNTS:
            theirs = seconds[f"by hand, {count}"]
            for name in (f"closure, {count}", f"closure again, {count}"):
                middle, low, high = ratio(seconds[name], theirs)
                ms = [f"{1e3 * statistics.median(times):.2f}" for times in (seconds[name], theirs)]
                what = f"{layout}, {name.partition(',')[0]}"
                rows.append([what, str(count), *ms, f"{middle:.3f}", f"{low:.3f} - {high:.3f}"])
    columns = ("", "micro-batches", "ms", "ms by hand", "ratio", "quartiles")
    caption = "again: a second evaluation, which restores random numbers and buffers"
    show(f"loss and gradients, micro-batches of {BATCH} images", columns, rows, caption)
    rows = []
    for layout, world in (("plain", 1), ("DDP", 2), ("FSDP2", 2)):
        seconds = run(world, _products, layout)
        for name in [name for name in seconds if name != "gradient"]:
            middle, low, high = ratio(seconds[name], seconds["gradient"])
            time = f"{1e3 * statistics.median(seconds[name]):.1f}"
            rows.append([f"{layout}, {name}", time, f"{middle:.2f}", f"{low:.2f} - {high:.2f}"])
    show("Hessian-vector products", ("", "ms", "ratio to a gradient", "quartiles"), rows)


def _wrapped(layout: str) -> nn.Module:
    model = network()
    if layout == "DDP":
        return DistributedDataParallel(model)
    if layout == "FSDP2":
        for part in (model[-2], model):
            fully_shard(part)
    return model


def _data(count: int) -> list[Part]:
    return [(torch.randn(BATCH, 3, 32, 32), torch.randint(100, (BATCH,))) for _ in range(count)]


def _accumulate(layout: str) -> dict[str, list[float]]:
    model = _wrapped(layout)
    params = list(model.parameters())
    virtual = VirtualBatch(model, loss_of)

    def by_hand(parts: list[Part]) -> Tensor:
        for p in params:
            p.grad = None
        total = torch.zeros(())
        for part in parts[:-1]:
            if isinstance(model, DistributedDataParallel):
                with model.no_sync():
                    loss = loss_of(model, part) / len(parts)
                    loss.backward()  # type: ignore[no-untyped-call]
            else:
                loss = loss_of(model, part) / len(parts)
                loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        loss = loss_of(model, parts[-1]) / len(parts)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
        if isinstance(model, DistributedDataParallel):
            dist.all_reduce(total)
            total /= dist.get_world_size()
        return total

    cases: dict[str, Callable[[], object]] = {}
    for count in COUNTS:
        parts = _data(count)
        total = float(count * dist.get_world_size())
        again = virtual.closure(parts, total=total)
        again()
        cases |= {
            f"by hand, {count}": partial(by_hand, parts),
            f"closure, {count}": partial(lambda parts, total: virtual.closure(parts, total=total)(), parts, total),
            f"closure again, {count}": again,
        }
    return interleave(cases, rounds=ROUNDS)


def _products(layout: str) -> dict[str, list[float]]:
    model = _wrapped(layout)
    (part,) = _data(1)
    vec = [torch.ones_like(p) for p in model.parameters()]
    closure = VirtualBatch(model, loss_of).closure([part])
    cases: dict[str, Callable[[], object]] = {"gradient": closure}
    cases["exact"] = partial(hvp, model, loss_of, part, vec)
    cases["fd"] = partial(hvp, model, loss_of, part, vec, "fd")
    return interleave(cases, rounds=ROUNDS // 2)
