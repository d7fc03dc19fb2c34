"""The Hessian of a network's loss over a data set, as an operator.

Products differentiate twice, exactly, one batch after the other; the model is never changed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from conjugo.curvature.operator import Operator
from conjugo.errors import check

__all__ = ["BatchNormMode", "Hessian", "hessian"]

BatchNormMode = Literal["as_is", "train", "eval"]
Data = tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]]


class Hessian(Operator):
    """The Hessian of the mean loss; made by :func:`hessian`."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Tensor], Tensor],
        data: Data,
        *,
        params: str | None,
        weight_decay: float,
        bn_mode: BatchNormMode,
        seed: int,
        process_group: Any,
    ) -> None:
        model = getattr(model, "_orig_mod", model)  # what torch.compile makes has first derivatives only
        if isinstance(model, nn.parallel.DistributedDataParallel):
            process_group = model.process_group if process_group is None else process_group
            model = model.module
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        check(len(trainable) > 0, "hessian", "the number of trainable parameters", 0, "at least 1")
        chosen = [name for name in trainable if params is None or re.search(params, name)]
        check(len(chosen) > 0, "hessian", "params", params, f"a pattern that one of {list(trainable)} contains")
        check(bn_mode in ("as_is", "train", "eval"), "hessian", "bn_mode", bn_mode, "as_is, train or eval")
        check(weight_decay >= 0, "hessian", "weight_decay", weight_decay, ">= 0")
        kinds = {(trainable[name].dtype, trainable[name].device) for name in chosen}
        check(len(kinds) == 1, "hessian", "the types and devices of the parameters", kinds, "one of each")
        ((dtype, device),) = kinds
        check(
            dtype in (torch.float32, torch.float64),
            "hessian",
            "the type of the parameters",
            dtype,
            "float32 or float64",
        )
        super().__init__(sum(trainable[name].numel() for name in chosen), dtype, device)
        self.names = tuple(chosen)
        """The parameters, in the order of their places in a vector."""
        self.bn_mode = bn_mode
        self._model = model
        self._loss_fn = loss_fn
        self._data = data
        self._weight_decay = weight_decay
        self._seed = seed
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size(process_group) > 1
        self.group = (process_group or dist.group.WORLD) if several else None
        self._count()

    def _count(self) -> None:
        """How many examples there are, here and on all ranks; that data can be read twice."""
        own = sum(len(inputs) for inputs, _ in self._batches())
        again = isinstance(self._data, tuple) or iter(self._data) is not self._data
        check(
            again, "hessian", "data", type(self._data).__name__, "a tuple, list or loader that can be read many times"
        )
        total = self._summed(torch.tensor([own], dtype=torch.float64, device=self.device))
        self.n_examples = int(total.item())
        """Examples of all ranks."""
        check(self.n_examples > 0, "hessian", "the number of examples", self.n_examples, "at least 1")

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        data: Any = self._data
        whole = isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor)
        for inputs, targets in [data] if whole else data:
            yield inputs.to(self.device), targets.to(self.device)

    def _summed(self, x: Tensor) -> Tensor:
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def _losses(self) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Of each batch, its part of the mean loss (with a graph) and the parameters that it depends on."""
        model = self._model
        fixed = {name: p.detach() for name, p in model.named_parameters()}
        for i, (inputs, targets) in enumerate(self._batches()):
            leaves = [fixed[name].clone().requires_grad_() for name in self.names]
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
            values = {**fixed, **dict(zip(self.names, leaves, strict=True)), **buffers}
            with self._as_asked(i), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                loss = self._loss_fn(functional_call(model, values, (inputs,)), targets)
            check(loss.ndim == 0, "hessian", "the shape of the loss", tuple(loss.shape), "(), one number")
            if not torch.isfinite(loss):
                raise FloatingPointError(f"hessian: the loss of batch {i} is {loss.item()}")
            yield loss * (len(inputs) / self.n_examples), leaves

    @contextmanager
    def _as_asked(self, batch: int) -> Iterator[None]:
        """Batch norm in the mode asked for, and the same random numbers in each pass over a batch, for a while."""
        norms = [m for m in self._model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        modes = [m.training for m in norms]
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            if self.bn_mode != "as_is":
                for m in norms:
                    m.training = self.bn_mode == "train"
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(self._seed + batch)
                yield
        finally:
            for m, mode in zip(norms, modes, strict=True):
                m.training = mode

    def loss(self) -> float:
        """The mean loss over all data, without weight decay. Collective."""
        losses = [loss.detach().double() for loss, _ in self._losses()]
        own = torch.stack(losses).sum() if losses else torch.zeros((), dtype=torch.float64, device=self.device)
        return float(self._summed(own))

    def gradient(self) -> Tensor:
        """The gradient [P] of the mean loss, with weight decay. Collective."""
        total = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        for loss, leaves in self._losses():
            grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
            total += torch.cat([g.reshape(-1) for g in grads])
        self._summed(total)
        if self._weight_decay:
            named = dict(self._model.named_parameters())
            total += self._weight_decay * torch.cat([named[name].detach().reshape(-1) for name in self.names])
        return total

    def _products(self, vectors: Tensor) -> Tensor:
        total = torch.zeros_like(vectors)
        for loss, leaves in self._losses():
            grads = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
            sizes = [leaf.numel() for leaf in leaves]
            for row, vector in zip(total, vectors, strict=True):
                pieces = [v.view_as(leaf) for v, leaf in zip(vector.split(sizes), leaves, strict=True)]
                curved = [(g, v) for g, v in zip(grads, pieces, strict=True) if g is not None and g.requires_grad]
                if not curved:
                    continue
                found = torch.autograd.grad(
                    [g for g, _ in curved],
                    leaves,
                    [v for _, v in curved],
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
                row += torch.cat([f.reshape(-1) for f in found])
        self._summed(total)
        return total.add_(vectors, alpha=self._weight_decay) if self._weight_decay else total


def hessian(
    model: nn.Module,
    loss_fn: Callable[[Any, Tensor], Tensor],
    data: Data,
    params: str | None = None,
    *,
    weight_decay: float = 0.0,
    bn_mode: BatchNormMode = "as_is",
    seed: int = 0,
    process_group: Any = None,
) -> Hessian:
    """H = sum_b (n_b / N) H_b (+ weight_decay I): the Hessian of the mean loss over all N examples, n_b of them in batch b.

    Args:
        model: plain or DDP, with whole parameters. Neither its parameters, gradients, buffers and modes nor the random numbers
            of the process change.
        loss_fn: ``loss_fn(model(inputs), targets)``, the mean loss of a batch, 0-d.
        data: ``(inputs, targets)``, or batches of these that can be read many times, such as a list or a DataLoader. Of several
            ranks, each its own.
        params: a regular expression; the block of those trainable parameters whose names contain it. None: all.
        weight_decay: >= 0; what it adds to the loss is weight_decay |w|^2 / 2.
        bn_mode: batch norm with the statistics of the batch (``"train"``, through which derivatives are taken), with running
            ones (``"eval"``), or as each module is set now. These are two functions, with two Hessians; in ``"train"`` the
            Hessian depends on how the data is cut into batches.
        seed: of the random numbers that layers such as dropout draw: the same in each product, so that H is one matrix.
        process_group: the ranks that see different data; None: those of DDP, else all, if torch.distributed is initialised.

    Raises:
        ValueError: no trainable parameter, none that *params* names, no data, data that can be read only once, a loss that is
            not one number.
        FloatingPointError: in a product, the loss of a batch is not finite.

    Source: B. Pearlmutter, "Fast exact multiplication by the Hessian", 1994.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> H = hessian(model, torch.nn.functional.mse_loss, (torch.eye(2), torch.zeros(2, 1)))
    >>> H @ torch.tensor([1.0, 3.0])
    tensor([1., 3.])
    """
    return Hessian(
        model,
        loss_fn,
        data,
        params=params,
        weight_decay=weight_decay,
        bn_mode=bn_mode,
        seed=seed,
        process_group=process_group,
    )
