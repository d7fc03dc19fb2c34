"""The step that SGD's relatives share: measure the gradient, decide on a few scalars, move."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from conjugo._space import is_dtensor
from conjugo._tensors import Array, namespace
from conjugo.errors import check
from conjugo.optim._base import Group, check_lr, evaluate
from conjugo.optim._scoped import ScopedOptimizer
from conjugo.optim._updates import FusedUpdates, Momentum, TensorUpdates
from conjugo.optim._vectors import Scale
from conjugo.optim.preconditioners import Block

__all__ = ["Decision", "MomentumOptimizer"]


class Decision(NamedTuple):
    """What a method makes of the squared norms of a step; all arrays [n]."""

    move: Momentum
    shown: dict[str, Array]
    """Numbers for the caller."""
    method: tuple[Array, ...]
    """The method's new scalars."""
    rule: tuple[Array, ...] = ()
    """Those of the rule for the step size."""


class MomentumOptimizer(ScopedOptimizer):
    """Base class: one pass over the gradients for their norms, one that moves momentum buffers and parameters.

    A subclass implements :meth:`_decide_move`. Groups have ``lr``, ``weight_decay``, ``decoupled`` and ``maximize``.
    """

    def _check_group(self, group: Group) -> None:
        check_lr(self._name, group["lr"])
        decay = group["weight_decay"]
        check(0 <= decay < math.inf, self._name, "weight_decay", decay, "in [0, inf)")

    @abstractmethod
    def _decide_move(self, columns: list[Array], squares: Array) -> Decision:
        """What to do, given the scalars of the parameters that take part and their squared norms <x, x>, each [n].

        Where the squares are not finite, what is decided has no effect.
        """

    @property
    def last(self) -> dict[str, Tensor]:
        """Numbers of the last step, for logging; tensors on the device, so reading one waits for the step.

        0-d with scope ``"global"``, else one value for each parameter. Empty before the first step.
        """
        return self._shown(self._last)

    def _state_replaced(self) -> None:
        self._last: dict[str, Array] = {}
        super()._state_replaced()

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_norm: Tensor | float | None = None,
    ) -> Any:
        """Update all parameters that have a gradient; returns the value of *closure* if one is given.

        grad_norm: the Euclidean norm of all gradients (on all ranks), where it is known already:
        ``torch.nn.utils.clip_grad_norm_`` returns it, from before it clipped. It saves a pass over the gradients; only with
        scope "global".

        If a gradient holds NaN or infinity (or is too large for its squared norm to be represented), nothing changes but the
        count in :attr:`skipped_steps`. Raises ``RuntimeError`` for sparse gradients.
        """
        alone = grad_norm is None or self.scope == "global"
        check(alone, self._name, "grad_norm", grad_norm, f"None with scope={self.scope!r}")
        value = evaluate(closure)
        if self._prepare():
            self._step(grad_norm)
        return value

    def _step(self, grad_norm: Tensor | float | None) -> None:
        self._updates.begin()
        scales, columns = self._scales(), self._columns()
        if grad_norm is None:
            squares = self._space.reduce(self._updates.squares(scales))
        else:
            squares = 0 * columns[0]
            squares[0] = self._number(grad_norm) ** 2
        finite = namespace(squares).isfinite(squares.sum())
        if self._on_host and not finite:
            self._count_skipped()
            self._last = self._last | {"skipped": ~finite}
            return
        decision = self._decide_move(columns, squares)
        self._updates.move(scales, decision.move, finite)
        self._keep_scalars(decision.method, decision.rule, finite)
        self._last = {**decision.shown, "skipped": ~finite}

    def _lay_out(self, blocks: list[Block]) -> bool:
        self._updates: FusedUpdates | TensorUpdates
        if self._use_kernels(blocks):
            self._updates = FusedUpdates(blocks, owner=self._name)
        else:
            self._updates = TensorUpdates(blocks, shared=self.scope != "tensor")
        return self._updates.on_host

    def _scales(self) -> list[Scale]:
        """For each parameter the factors of the gradient and of the parameter in what the method sees."""
        scales: list[Scale] = []
        for group, span in zip(self._active_groups, self._spans, strict=True):
            sign = -1.0 if group["maximize"] else 1.0
            decay = 0.0 if group["decoupled"] else float(group["weight_decay"])
            scales += [(sign, decay)] * (span.stop - span.start)
        return scales

    def _number(self, value: Tensor | float) -> Array:
        """A number or a tensor with one element, on all ranks, beside the scalars, without dimension."""
        if is_dtensor(value):
            value = value.full_tensor()
        if self._on_host:
            return float(value)
        if isinstance(value, Tensor):
            return value.detach().to(self._table, non_blocking=True).reshape(())
        return torch.full((), value, dtype=self._table.dtype, device=self._table.device)
