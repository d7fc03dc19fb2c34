"""How long a step takes and how much memory it needs, against the batch, on this machine's device."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conjugo.curvature._linearized import available_memory
from conjugo.studies.probes import Clock, Problem, Run, mean_loss

__all__ = ["Memory", "StepTime", "measure_memory", "measure_step_time"]


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on one device: fixed + per_example * batch; the rest is what was measured."""

    fixed: float
    per_example: float
    measured: tuple[tuple[int, float], ...]
    """(batch, median seconds)."""

    def seconds(self, batch: float, *, workers: int = 1, all_reduce: float = 0.0) -> float:
        """Of a step with *batch* examples in all, shared by *workers* whose gradients take *all_reduce* seconds to add up."""
        return self.fixed + self.per_example * batch / workers + (all_reduce if workers > 1 else 0.0)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device: fixed (parameters, gradients, the optimizer's state) + per_example * micro_batch (activations).

    available: bytes that could be had.
    """

    fixed: int
    per_example: int
    available: int

    @property
    def largest(self) -> int | None:
        """The largest micro-batch with which nine tenths of the memory are enough; None: any."""
        if self.per_example <= 0:
            return None
        return max(0, int((0.9 * self.available - self.fixed) / self.per_example))


def measure_step_time(problem: Problem, sizes: Sequence[int], *, lr: float, clock: Clock) -> StepTime | None:
    """Time steps at *sizes*, ascending, and fit a line; stops at the first size for which there is no memory (None: the first).

    Medians of up to 7 steps on one batch, after a first one that does not count; loading is not part of it. At least two
    sizes are measured, others while there is time. Where micro-batches are accumulated, smaller batches do not lie on the
    line: leave them out of *sizes*.
    """
    measured: list[tuple[int, float]] = []
    for size in sizes:
        if len(measured) > 1 and 4 * measured[-1][1] * size / measured[-1][0] > clock.left:
            break
        try:
            run = Run(problem, lr, size)
            parts = run.draw()  # once: loading is not what is timed
            run.take_step(parts)
            times: list[float] = []
            for _ in range(7):
                _wait(problem.examples.device)
                begin = time.perf_counter()
                run.take_step(parts)
                _wait(problem.examples.device)
                times.append(time.perf_counter() - begin)
                if len(times) >= 3 and clock.over:
                    break
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        measured.append((size, median(times)))
    if not measured:
        return None
    return _line(measured)


def _line(measured: Sequence[tuple[int, float]]) -> StepTime:
    """The line with coefficients >= 0 that has the smallest relative errors."""
    sizes, times = (np.array(column, dtype=float) for column in zip(*measured, strict=True))
    if len(measured) == 1:  # fixed cost and that of examples cannot be told apart
        return StepTime(0.0, float(times[0] / sizes[0]), tuple(measured))
    best: tuple[float, float, float] | None = None
    for columns in ((0, 1), (0,), (1,)):
        design = np.stack([1 / times, sizes / times], 1)[:, columns]
        found, *_ = np.linalg.lstsq(design, np.ones(len(times)), rcond=None)
        if (found >= 0).all():
            coefficients = np.zeros(2)
            coefficients[list(columns)] = found
            misfit = float((((coefficients[0] + coefficients[1] * sizes) / times - 1) ** 2).sum())
            if best is None or misfit < best[0] - 1e-12:
                best = (misfit, float(coefficients[0]), float(coefficients[1]))
    assert best is not None
    return StepTime(best[1], best[2], tuple(measured))


def measure_memory(problem: Problem, *, lr: float) -> Memory:
    """What a step needs: the state is counted, and the tensors that autograd keeps, on two small batches."""
    available = available_memory(problem.examples.device)
    model, optimizer = problem.fresh(lr)
    params = [p for p in model.parameters() if p.requires_grad]
    small = max(1, min(8, problem.examples.n // 2, (problem.micro_batch or 16) // 2))
    kept = []
    for size in (small, 2 * small):
        optimizer.zero_grad()
        kept.append(_kept_by_autograd(problem, model, size))
    if not (getattr(optimizer, "needs_loss", False) or getattr(optimizer, "needs_curvature", False)):
        optimizer.step()  # Adam's state is not there before; that of ours is
    state = sum(_bytes(x) for s in optimizer.state.values() for x in s.values() if isinstance(x, Tensor))
    fixed = sum(_bytes(p) for p in model.parameters()) + sum(_bytes(b) for b in model.buffers())
    fixed += sum(_bytes(p) for p in params) + state
    return Memory(fixed, round((kept[1] - kept[0]) / small), available)


def _kept_by_autograd(problem: Problem, model: torch.nn.Module, size: int) -> int:
    """Bytes that the backward pass needs, and leaves gradients."""
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    inputs, targets = problem.examples.take(torch.arange(size))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = mean_loss(problem.loss_fn, model(inputs), targets)
    loss.backward()  # type: ignore[no-untyped-call]
    return sum(found.values())


def _bytes(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
