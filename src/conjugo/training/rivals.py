"""Rivals from elsewhere that treat weights as matrices, made comparable: Muon with AdamW for the rest, and SOAP.

Each takes the same parameters for matrices as its counterpart here: Muon those of :class:`conjugo.optim.Orthogonal`, SOAP those
of :class:`conjugo.optim.Kronecker`. Both are one optimizer object: schedules, ``state_dict`` and ``zero_grad`` work as usual.
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from conjugo.errors import check
from conjugo.optim import Orthogonal, roles

__all__ = ["MuonAdamW", "muon_groups", "soap"]


def _is_matrix(p: Tensor) -> bool:
    return p.ndim > 1 and not p.is_complex() and Orthogonal().suits(p.shape[0], p.numel() // max(1, p.shape[0]))


class MuonAdamW(Optimizer):
    r"""``torch.optim.Muon`` for matrices, ``torch.optim.AdamW`` for all else, with one learning rate.

    A convolution kernel [out, in, h, w] is the matrix [out, in h w]. The updates of Muon are scaled to the size of those of
    AdamW (``match_rms_adamw``), so that one rate suits both.

    Args:
        params: tensors or parameter groups.
        lr: :math:`\geq 0`.
        weight_decay: :math:`\geq 0`, decoupled.
        momentum: of Muon (Nesterov's), in [0, 1).
        betas: of AdamW.
        eps: of AdamW.
        matrices: says of a parameter with two dimensions or more whether Muon takes it; None: as
            :class:`conjugo.optim.Orthogonal`, at least 16 rows and columns and the one not more than 8 times the other. A
            group may have ``"matrices": True`` or ``False`` for all that is in it.

    Raises ValueError for values out of their range.

    Sources: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; J. Liu et al., "Muon is Scalable
    for LLM Training", arXiv:2502.16982.

    >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 2))
    >>> optimizer = MuonAdamW(model.parameters(), lr=0.01)
    >>> model(torch.ones(1, 32)).sum().backward()
    >>> optimizer.step()
    >>> sorted(optimizer.state[model[0].weight]), sorted(optimizer.state[model[1].weight])
    (['momentum_buffer'], ['exp_avg', 'exp_avg_sq', 'step'])
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.01,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        matrices: Callable[[Tensor], bool] | None = None,
    ) -> None:
        check(0 <= lr < math.inf, "MuonAdamW", "lr", lr, "in [0, inf)")
        check(0 <= weight_decay < math.inf, "MuonAdamW", "weight_decay", weight_decay, "in [0, inf)")
        check(0 <= momentum < 1, "MuonAdamW", "momentum", momentum, "in [0, 1)")
        check(all(0 <= beta < 1 for beta in betas), "MuonAdamW", "betas", betas, "two numbers in [0, 1)")
        check(0 <= eps < math.inf, "MuonAdamW", "eps", eps, "in [0, inf)")
        self._matrices = _is_matrix if matrices is None else matrices
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas, "eps": eps}
        super().__init__(params, {**defaults, "matrices": None})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; *closure* is evaluated first, if there is one, and its value handed back."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            taken = [p.ndim > 1 and self._takes(group, p) for p in params]
            self._muon([p for p, is_matrix in zip(params, taken) if is_matrix], group)
            self._adamw([p for p, is_matrix in zip(params, taken) if not is_matrix], group)
        return loss

    def _takes(self, group: dict[str, Any], p: Tensor) -> bool:
        return bool(self._matrices(p) if group["matrices"] is None else group["matrices"])

    def _muon(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Muon on *params* as matrices, which share state with them, and memory where their layout allows it."""
        if not params:
            return
        views = [_as_matrix(p.detach(), p) for p in params]
        for p, view in zip(params, views):
            assert p.grad is not None
            view.grad = _as_matrix(p.grad, p)
        inner = Muon(
            views,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            adjust_lr_fn="match_rms_adamw",
        )
        self._step_with(inner, params, views)
        for p, view in zip(params, views):
            if not _may_be_viewed(p):  # then that was a copy
                rows = _in_memory_order(p.detach(), p)
                rows.copy_(view.reshape(rows.shape))

    def _adamw(self, params: list[Tensor], group: dict[str, Any]) -> None:
        if not params:
            return
        fused = all(p.device.type in ("cpu", "cuda") and p.dtype in (torch.float32, torch.float64) for p in params)
        options = {name: group[name] for name in ("lr", "weight_decay", "betas", "eps")}
        self._step_with(AdamW(params, fused=fused, **options), params, params)

    def _step_with(self, inner: Optimizer, params: list[Tensor], stand_ins: list[Tensor]) -> None:
        """A step of *inner*, made for this step only: the state is kept here, where state_dict finds it."""
        for p, stand_in in zip(params, stand_ins):
            state = self.state[p]
            if inner.defaults.get("fused") and "step" in state:
                # A checkpoint that was read onto the CPU leaves it there; fused steps want it beside p.
                state["step"] = state["step"].to(p.device)
            inner.state[stand_in] = state
        inner.step()


def muon_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Groups for :class:`MuonAdamW`: what may be a matrix by its role in *model*, and what may not."""
    of = roles(model)
    params = [p for p in of if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in params if of[p] == "matrix"]},
        {"params": [p for p in params if of[p] != "matrix"], "matrices": False},
    ]
    return [group for group in groups if group["params"]]


def _as_matrix(tensor: Tensor, p: Tensor) -> Tensor:
    """*tensor*, of the shape of *p*, as [out, rest], the rest in the order in which it lies in the memory of *p*: so that
    parameters in most other memory layouts are views, too (the order of columns means nothing to Muon)."""
    return _in_memory_order(tensor, p).reshape(p.shape[0], -1)


def _in_memory_order(tensor: Tensor, p: Tensor) -> Tensor:
    """A view of *tensor*, of the shape of *p*, with all dimensions but the first as they lie in the memory of *p*."""
    order = sorted(range(1, p.ndim), key=lambda i: p.stride(i), reverse=True)
    return tensor.permute(0, *order)


def _may_be_viewed(p: Tensor) -> bool:
    """Whether ``_as_matrix(p, p)`` shares memory with *p*: its columns lie in one even stride."""
    rows = _in_memory_order(p.detach(), p)
    dims = [(size, stride) for size, stride in zip(rows.shape[1:], rows.stride()[1:]) if size != 1]
    return all(outer == size * stride for (_, outer), (size, stride) in itertools.pairwise(dims))


def soap(
    params: Iterable[Tensor] | Iterable[dict[str, Any]],
    lr: float = 0.003,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.95, 0.95),
    eps: float = 1e-8,
    precondition_frequency: int = 10,
    matrices: Callable[[Tensor], bool] | None = None,
) -> Optimizer:
    """SOAP of the package pytorch_optimizer: Adam in the eigenbasis of Shampoo, renewed every *precondition_frequency* steps.

    A convolution kernel [out, in, h, w] has a basis for each of its four dimensions there. Vectors, and what *matrices* or
    ``"matrices": False`` of a group excepts, get Adam's steps; None: nothing else. Weight decay is decoupled. The first step
    only learns.

    Source: N. Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", arXiv:2409.11321. Raises ImportError without
    that package.
    """
    try:
        package = importlib.import_module("pytorch_optimizer")
    except ImportError as error:
        raise ImportError("optimizer 'soap' needs pytorch_optimizer: pip install 'conjugo[bench]'") from error
    groups: list[dict[str, Any]] = []
    for group in _groups(params):
        takes, rest = group.pop("matrices", None), group.pop("params")
        if takes is None:
            takes = matrices
        whole = [p for p in rest if p.ndim > 1 and (takes is None or bool(takes(p) if callable(takes) else takes))]
        kept = {id(p) for p in whole}
        # Dimensions above the limit have no basis: with 1, none has.
        plain = {"params": [p for p in rest if id(p) not in kept], **group, "max_precondition_dim": 1}
        groups += [some for some in ({"params": whole, **group}, plain) if some["params"]]
    result: Optimizer = package.SOAP(
        groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, precondition_frequency=precondition_frequency
    )
    return result


def _groups(params: Iterable[Tensor] | Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups of their own, each with a list of tensors."""
    items = list(params)
    if items and isinstance(items[0], Tensor):
        return [{"params": items}]
    groups: list[dict[str, Any]] = [dict(item) for item in items if isinstance(item, dict)]
    for group in groups:
        group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    return groups
