"""The step that LARS and LAMB share: measure, skip what is not finite, update layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from conjugo._space import ParamSpace, is_dtensor, to_local
from conjugo._tensors import Array, namespace
from conjugo.errors import check
from conjugo.optim._base import Group, Optimizer, as_real, check_lr, evaluate, state_dtype

__all__ = ["LayerwiseOptimizer", "Piece", "adapts", "choose", "masked", "norms", "trust_ratio"]


class Piece(NamedTuple):
    """What this rank holds of one parameter; complex tensors as real views [..., 2]."""

    w: Tensor
    g: Tensor
    state: dict[str, Tensor]
    dimensions: int
    """Of the parameter itself."""


class LayerwiseOptimizer(Optimizer):
    """Base of the optimizers that scale each parameter's update by a trust ratio.

    A subclass offers two versions of the same update: ``_update`` for one parameter after the other, with scalars that
    are numbers: the specification, and the faster one on a CPU, where reading a scalar costs nothing; and ``_propose`` with
    ``_apply`` for lists, with scalars that stay on the device and no host synchronisation. DTensors take the latter, because
    in between the norms of all of them are added up over the ranks at once.
    """

    _pickled: ClassVar[tuple[str, ...]] = ("process_group",)
    _space: ParamSpace | None = None  # only where there are DTensors

    def __init__(self, params: ParamsT, defaults: dict[str, Any], process_group: Any) -> None:
        self.process_group = process_group
        super().__init__(params, defaults)

    def _check_group(self, group: Group) -> None:
        name = self._name
        check_lr(name, group["lr"])
        decay, bounds = group["weight_decay"], group["trust_bounds"]
        check(0 <= decay < math.inf, name, "weight_decay", decay, "in [0, inf)")
        ordered = len(bounds) == 2 and 0 <= bounds[0] <= bounds[1]
        check(ordered, name, "trust_bounds", bounds, "a pair (low, high) with 0 <= low <= high")

    def _init_state(self, p: Tensor, group: Group) -> dict[str, Tensor]:
        # One counter for each parameter: per-parameter state is all that every checkpoint format keeps.
        return {"skipped_steps": torch.zeros((), dtype=torch.int64, device=p.device)}

    def _state_replaced(self) -> None:
        self._space = None

    def _update(self, group: Group, pieces: list[Piece], weight_norms: Array, grad_norms: Array) -> None:
        """Update *pieces*, in a step that is finite."""
        raise NotImplementedError

    def _propose(self, group: Group, pieces: list[Piece], ok: Tensor) -> list[Tensor]:
        """New tensors of which ``_apply`` makes the update; no state changes unless *ok* (0-d bool)."""
        raise NotImplementedError

    def _apply(self, group: Group, pieces: list[Piece], proposed: list[Tensor], scales: Tensor, ok: Tensor) -> None:
        """Finish the update with *scales*, learning rate times trust ratio of each parameter, [n]; 0 unless *ok*."""
        raise NotImplementedError

    def _compared(self, proposed: list[Tensor]) -> list[Tensor] | None:
        """The tensors whose norms are set against those of the weights; None: the gradients."""
        return None

    def _trust_ratio(self, group: Group, weight_norms: Array, others: Array) -> Array:
        raise NotImplementedError

    @property
    def skipped_steps(self) -> Tensor:
        """Steps left out because a gradient was not finite: 0-d int64, on the device of the parameters."""
        return torch.stack(self._counters()).max()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update all parameters that have a gradient; returns the value of *closure* if one is given.

        If any gradient holds NaN or infinity (or is too large for its norm to be represented), no parameter and no
        state changes; the step is counted in :attr:`skipped_steps`. Raises ``RuntimeError`` for sparse gradients.
        Collective where parameters are DTensors: all ranks decide alike.
        """
        loss = evaluate(closure)
        work = self._with_gradient()
        if not work:
            return loss
        self._look_at([p for _, params in work for p in params])
        groups = [(group, self._pieces(params)) for group, params in work]
        pieces = [piece for _, of_group in groups for piece in of_group]
        grad_norms, weight_norms = self._norms([piece.g for piece in pieces], [piece.w for piece in pieces])
        ok = torch.isfinite(grad_norms).all()
        as_lists = [self._space is not None or use_foreach(group, of_group) for group, of_group in groups]
        if not all(as_lists) and not ok:
            self._count_skipped(ok)
            return loss
        spans = [slice(end - len(x), end) for end, (_, x) in zip(accumulate(len(x) for _, x in groups), groups)]
        for (group, of_group), span, lists in zip(groups, spans, as_lists):
            if not lists:
                self._update(group, of_group, *(x[span].numpy(force=True) for x in (weight_norms, grad_norms)))
        if any(as_lists):
            listed = [(*g, span) for g, span, lists in zip(groups, spans, as_lists) if lists]
            self._update_lists(listed, weight_norms, grad_norms, ok)
        if all(as_lists):
            self._count_skipped(ok)
        return loss

    def _update_lists(
        self, groups: list[tuple[Group, list[Piece], slice]], weight_norms: Tensor, grad_norms: Tensor, ok: Tensor
    ) -> None:
        proposals = [self._propose(group, pieces, ok) for group, pieces, _ in groups]
        compared = [self._compared(proposed) for proposed in proposals]
        others = [grad_norms[span] for _, _, span in groups]
        if compared[0] is not None:
            (found,) = self._norms([x for xs in compared if xs is not None for x in xs])
            others = list(torch.split(found, [len(proposed) for proposed in proposals]))
        for (group, pieces, span), proposed, other in zip(groups, proposals, others):
            # A ratio may be NaN in a step that is skipped, and NaN times zero is NaN.
            ratios = torch.where(ok, self._ratios(group, pieces, weight_norms[span], other), 0.0)
            self._apply(group, pieces, proposed, ratios * group["lr"], ok)

    # Ranks -----------------------------------------------------------------------------------------------------------

    def _look_at(self, active: list[Tensor]) -> None:
        """See to the layout of the parameters that take part in this step."""
        if not any(is_dtensor(p) for p in active):
            self._space = None
            return
        known = self._space.params if self._space is not None else []
        if len(known) != len(active) or any(a is not b for a, b in zip(known, active)):
            self._space = ParamSpace(active, group=self.process_group, owner=self._name)
        assert self._space is not None
        self._space.canonical_grads()

    def _pieces(self, params: list[Tensor]) -> list[Piece]:
        if self._space is None:
            return [Piece(as_real(p), as_real(p.grad), self.state[p], p.ndim) for p in params if p.grad is not None]
        return [
            Piece(
                as_real(to_local(p)),
                as_real(to_local(p.grad)),
                {name: to_local(tensor) for name, tensor in self.state[p].items()},
                p.ndim,
            )
            for p in params
            if p.grad is not None
        ]

    def _norms(self, *lists: list[Tensor]) -> list[Tensor]:
        """The Euclidean norms of all parameters' tensors, [n] for each list; one collective if they are sharded."""
        found = [norms(tensors) for tensors in lists]
        if self._space is None:
            return found
        squares = torch.stack(found).to(torch.float64).square()
        return list(self._space.reduce(squares).sqrt().to(found[0].dtype))

    def _count_skipped(self, ok: Tensor) -> None:
        counters = self._counters()
        torch._foreach_add_(counters, [torch.logical_not(ok).to(torch.int64)] * len(counters))

    def _counters(self) -> list[Tensor]:
        return [self.state[p]["skipped_steps"] for group in self.param_groups for p in group["params"]]

    def _ratios(self, group: Group, pieces: list[Piece], weight_norms: Array, others: Array) -> Array:
        """The trust ratio of each parameter, [n]: of its norm with *others*, or 1 for a vector that is not to adapt."""
        ratios = self._trust_ratio(group, weight_norms, others)
        for i in (i for i, piece in enumerate(pieces) if not adapts(group, piece)):
            ratios[i] = 1.0
        return ratios


@np.errstate(over="ignore", invalid="ignore")  # weights beyond all bounds: inf and NaN, as in torch
def trust_ratio(numerator: Array, denominator: Array, defined: Array, bounds: tuple[float, float]) -> Array:
    """numerator / denominator where *defined*, else 1, clamped to *bounds*; all of one shape."""
    xp = namespace(denominator)
    return xp.where(defined, numerator / xp.where(defined, denominator, 1.0), 1.0).clip(*bounds)


def adapts(group: Group, piece: Piece) -> bool:
    """Whether the trust ratio of the parameter is anything but 1."""
    return piece.dimensions > 1 or bool(group["adapt_vectors"])


def use_foreach(group: Group, pieces: list[Piece]) -> bool:
    """The group's choice; without one, lists for accelerators and single parameters for CPUs."""
    return bool(pieces[0].w.device.type != "cpu" if group["foreach"] is None else group["foreach"])


def norms(tensors: list[Tensor]) -> Tensor:
    """The Euclidean norm of each real tensor, at least in float32; [n]."""
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return torch.stack(torch._foreach_norm(tensors, 2, wide))


def choose(ok: Tensor, value: float, otherwise: float, like: Tensor) -> Tensor:
    """*value* if *ok* (0-d bool), else *otherwise*: 0-d, in the type of *like* (foreach is slow with any other)."""
    return torch.where(ok, torch.full((), value, dtype=like.dtype, device=ok.device), otherwise)


def masked(pieces: list[Piece], *, ok: Tensor, maximize: bool) -> list[Tensor]:
    """Copies of the gradients in their state's type, negated if *maximize*; all zero unless *ok* (0-d bool).

    NaN times zero is NaN, but the bits of NaN, read as an integer, times zero are the bits of 0.0.
    """
    types = [state_dtype(piece.w) for piece in pieces]
    bits = [_bits(piece.g.to(dtype)) for piece, dtype in zip(pieces, types)]
    copies = torch._foreach_mul(bits, ok.to(torch.int32))
    grads = [copy.view(dtype) for copy, dtype in zip(copies, types)]
    if maximize:
        torch._foreach_neg_(grads)
    return grads


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int64 if tensor.dtype == torch.float64 else torch.int32)
