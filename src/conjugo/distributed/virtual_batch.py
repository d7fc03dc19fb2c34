"""Virtual batches: gradients of batches that are larger than the memory, on one worker or many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from conjugo.errors import check

__all__ = ["VirtualBatch", "gradient_sync"]

Loss = Callable[[nn.Module, Any], Tensor]
"""loss_fn(model, part): the mean loss over a micro-batch, 0-d."""


class VirtualBatch:
    """Makes closures that compute loss and gradients of one global batch: (workers) x (micro-batches) x (examples).

    The gradient is that of the mean over all examples of all ranks, each counting the same, also where ranks or micro-batches
    have different numbers of them. Gradients are reduced once for each evaluation, with the last micro-batch; this is worth
    the memory of one more gradient under FSDP2.

    model: plain, DDP, or with ``fully_shard`` (FSDP2, HSDP); wrap it first. loss_fn: ``loss_fn(model, part)`` gives the mean
    loss over the micro-batch *part*, 0-d; it must call *model*, not a module inside. process_group: the ranks that see
    different data; None: those of DDP, else all, if torch.distributed is initialised.

    With a :class:`torch.amp.GradScaler`, scale inside *loss_fn* and unscale what the closure gives.

    >>> model = torch.nn.Linear(3, 1)
    >>> virtual = VirtualBatch(model, lambda model, part: model(part).square().mean())
    >>> data = torch.arange(15.0).view(5, 3)
    >>> closure = virtual.closure(data.split(2), weights=[2, 2, 1])
    >>> bool(torch.isclose(closure(), model(data).square().mean()))
    True
    """

    def __init__(self, model: nn.Module, loss_fn: Loss, *, process_group: Any = None) -> None:
        group = group_of(model, process_group)
        self.model = model
        self.loss_fn = loss_fn
        self.world_size = 1 if group is None else dist.get_world_size(group)
        self.group = group if self.world_size > 1 else None
        self.params = parameters_of(model)

    def closure(
        self, parts: Sequence[Any], weights: Sequence[float] | None = None, *, total: float | None = None
    ) -> Closure:
        """A closure over this rank's *parts* of the batch; all ranks need equally many, at least 1.

        weights: how many examples each part counts, >= 0; a part may count 0, to make up the number. None: all count the same.
        total: the sum of the weights over all ranks; None: it is added up here, which is collective.
        """
        counts = [1.0] * len(parts) if weights is None else [float(w) for w in weights]
        check(len(parts) >= 1, "VirtualBatch", "parts", len(parts), "at least one micro-batch")
        check(len(counts) == len(parts), "VirtualBatch", "weights", len(counts), f"{len(parts)}, one for each part")
        check(all(w >= 0 for w in counts), "VirtualBatch", "weights", counts, "all >= 0")
        if total is None:
            total = sum(counts) if self.group is None else self._total(counts)
        check(total > 0, "VirtualBatch", "the sum of the weights", total, "> 0")
        return Closure(self, list(parts), [w / total for w in counts])

    def _total(self, counts: list[float]) -> float:
        """Collective: the sum of the *counts* of all ranks, which must be equally many."""
        device = self.params[0].device if "nccl" in str(dist.get_backend(self.group)) else "cpu"
        summed = torch.tensor([sum(counts), len(counts), len(counts) ** 2], dtype=torch.float64, device=device)
        dist.all_reduce(summed, group=self.group)
        total, parts, squares = summed.tolist()
        alike = self.world_size * squares == parts**2  # all the same: Cauchy-Schwarz holds with equality
        check(alike, "VirtualBatch", "the number of parts", len(counts), "the same on all ranks")
        return float(total)


class Closure:
    """Zeroes the gradients, computes those of the whole batch, and gives its mean loss over all ranks: 0-d, detached.

    Collective. Each call computes the same function of the weights, so that line searches may rely on it: random numbers, such
    as those of dropout, are the same as in the first, and buffers, such as the running statistics of batch norm, change in the
    first only. The loss may be NaN or infinite; then all ranks get it.
    """

    def __init__(self, batch: VirtualBatch, parts: list[Any], shares: list[float]) -> None:
        self._batch = batch
        self._parts = parts
        self._shares = shares
        self._random: list[Tensor] | None = None
        self.calls = 0
        """How often it was called: forward and backward passes over the whole batch."""

    def __call__(self) -> Tensor:
        """Compute loss and gradients."""
        self.calls += 1
        if self._random is None:
            self._random = self._random_state()
            return self._evaluate()
        afterwards, buffers = self._random_state(), list(self._batch.model.buffers())
        kept = [b.clone() for b in buffers]
        self._set_random_state(self._random)
        try:
            return self._evaluate()
        finally:
            self._set_random_state(afterwards)
            with torch.no_grad():
                for buffer, old in zip(buffers, kept, strict=True):
                    buffer.copy_(old)

    def _evaluate(self) -> Tensor:
        batch = self._batch
        for p in batch.params:
            p.grad = None
        losses: list[Tensor] = []
        for part, share in zip(self._parts, self._shares, strict=True):
            last = len(losses) == len(self._parts) - 1 or batch.group is None
            with gradient_sync(batch.model, last=last), torch.enable_grad():
                # DDP and FSDP2 take the mean over the ranks.
                loss = batch.loss_fn(batch.model, part) * (share * batch.world_size)
                loss.backward()  # type: ignore[no-untyped-call]
            # A loss that does not count must not let its NaN through.
            losses.append(loss.detach() if share else torch.zeros_like(loss))
        value = torch.stack(losses).sum()
        if batch.group is not None:
            dist.all_reduce(value, group=batch.group)
            value /= batch.world_size
        return value

    def _random_state(self) -> list[Tensor]:
        on_gpu = self._batch.params[0].device.type == "cuda"
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if on_gpu else [])]

    def _set_random_state(self, state: list[Tensor]) -> None:
        torch.set_rng_state(state[0])
        if len(state) > 1:
            torch.cuda.set_rng_state(state[1])


@contextmanager
def gradient_sync(model: nn.Module, *, last: bool) -> Iterator[None]:
    """Around forward and backward pass of a micro-batch: gradients are reduced over the ranks in the *last* one only.

    model: DDP, with ``fully_shard``, or any other, for which nothing happens.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    if last:
        yield
    elif isinstance(model, nn.parallel.DistributedDataParallel):
        with model.no_sync():
            yield
    else:
        modules = sharded_modules(model)
        for module in modules:
            module.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for module in modules:
                module.set_requires_gradient_sync(True, recurse=False)


def group_of(model: nn.Module, process_group: Any) -> Any:
    """*process_group*, or by default the ranks that share *model*; None where torch.distributed is not initialised."""
    if process_group is not None or not (dist.is_available() and dist.is_initialized()):
        return process_group
    model = getattr(model, "_orig_mod", model)
    return model.process_group if isinstance(model, nn.parallel.DistributedDataParallel) else dist.group.WORLD


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that an optimizer has.

    Between a forward pass without backward pass and the next one, a module with ``fully_shard`` shows whole ones instead,
    whose gradients and values do not count.
    """
    for module in sharded_modules(model):
        module.reshard()
    return list(model.parameters())


def sharded_modules(model: nn.Module) -> list[Any]:
    """The modules inside *model* to which ``fully_shard`` was applied."""
    # Looked up on the class: a module is slow to say that it lacks something.
    return [module for module in model.modules() if hasattr(type(module), "set_requires_gradient_sync")]
