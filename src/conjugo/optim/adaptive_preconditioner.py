"""Adam's scaling as a preconditioner: each value by the root of the running mean of its squared gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from conjugo._tensors import Array, namespace, wide_dtype
from conjugo.errors import check
from conjugo.optim._base import zeros_for
from conjugo.optim.preconditioners import Block, Preconditioner, Secant

__all__ = ["AdamDiagonal", "counter", "one_of"]

State = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class AdamDiagonal(Preconditioner):
    r"""P = 1 / (sqrt(v / (1 - beta2^n)) + eps), where v is a running mean of the squared gradient, n its number of steps.

    So P has the units of 1 / gradient: :math:`\langle g, P g \rangle` is near a sum of absolute values, grows with the loss
    and not with its square, and the step does not change with the scale of the loss. Its size hardly falls along a run, so
    that the Fletcher-Reeves beta is near 1: set *beta_max* below 1. With ``beta_max=0`` the method is Adam without
    momentum.

    beta2: part of the old mean in a new one, in [0, 1). eps: above 0, in the units of the gradient. Complex parameters have
    a mean for real and imaginary part each. Acts on each value by itself, so parameters may be spread over ranks.

    State: ``square``, one vector, v; ``updates``, 0-d in float64, n.

    Source: D. P. Kingma, J. Ba, "Adam: A Method for Stochastic Optimization", arXiv:1412.6980.

    >>> from conjugo.optim import NLCG
    >>> w = torch.nn.Parameter(torch.tensor([1.0, -4.0]))
    >>> optimizer = NLCG([w], lr=0.125, precond=AdamDiagonal(beta2=0.9))
    >>> w.grad = torch.tensor([2.0, -0.5])
    >>> optimizer.step()
    >>> w.detach()
    tensor([ 0.8750, -3.8750])
    """

    beta2: float = 0.99
    eps: float = 1e-8

    def __post_init__(self) -> None:
        """Check the options; raises ``ValueError``."""
        check(0 <= self.beta2 < 1, self._name, "beta2", self.beta2, "in [0, 1)")
        check(0 < self.eps < math.inf, self._name, "eps", self.eps, "in (0, inf)")

    @property
    def _name(self) -> str:
        return type(self).__name__

    def init_state(self, p: Tensor) -> dict[str, Tensor]:
        """``square`` and ``updates``, zeros."""
        return {"square": zeros_for(p), "updates": counter(p)}

    def update(self, block: Block, secant: Secant) -> None:
        """Take the squares of the gradients into the means."""
        self.learn_squares(block.states, block.gradients, secant.finite, block.foreach)

    def apply(self, block: Block, vectors: list[Tensor], fresh: Tensor) -> list[Tensor]:
        """x / (sqrt(v / (1 - beta2^n)) + eps)."""
        return self.divided(block.states, vectors, block.foreach)

    def diagonal(self, state: Mapping[str, Tensor]) -> Tensor | None:
        """What :meth:`apply` multiplies with; 1 before the first gradient."""
        (root,) = self._roots([state], foreach=False)
        return torch.where(state["updates"] > 0, 1 / root, 1.0)

    # On lists, for those who treat some of the parameters so -----------------------------------------------------------

    def learn_squares(
        self, states: Sequence[State], gradients: Sequence[Tensor], finite: Tensor, foreach: bool
    ) -> None:
        """v <- beta2 v + (1 - beta2) g^2, in place; nothing changes where not *finite*, 0-d bool: all g are 0 then."""
        if not states:
            return
        squares = [state["square"] for state in states]
        keep = one_of(finite, self.beta2, 1.0, squares[0].dtype)
        if foreach:
            torch._foreach_mul_(squares, keep)
            torch._foreach_addcmul_(squares, list(gradients), list(gradients), value=1 - self.beta2)
        else:
            for v, g in zip(squares, gradients, strict=True):
                v.mul_(keep).addcmul_(g, g, value=1 - self.beta2)
        for state in states:
            state["updates"].add_(finite)

    def divided(self, states: Sequence[State], vectors: Sequence[Tensor], foreach: bool) -> list[Tensor]:
        """P v of each of *vectors*, new tensors."""
        if not states:
            return []
        roots = self._roots(states, foreach)
        return (
            list(torch._foreach_div(list(vectors), roots))
            if foreach
            else [x / root for x, root in zip(vectors, roots, strict=True)]
        )

    def _roots(self, states: Sequence[State], foreach: bool) -> list[Tensor]:
        squares = [state["square"] for state in states]
        corrections = self.correction(torch.stack([state["updates"] for state in states]))
        parts = corrections.to(squares[0].dtype).unbind()
        if not foreach:
            return [v.sqrt().div_(c).add_(self.eps) for v, c in zip(squares, parts, strict=True)]
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, parts)
        torch._foreach_add_(roots, self.eps)
        return list(roots)

    def correction(self, count: Array) -> Array:
        """The root of what a mean over *count* values lacks: sqrt(1 - beta2^count); 1 for 0 values."""
        xp = namespace(count)
        return xp.sqrt(xp.where(count > 0, 1 - self.beta2**count, 1.0))

    def divisor(self, count: Array) -> tuple[Array, Array]:
        """Factor of sqrt(v), and what is then added, after *count* gradients: a vector is divided by the sum."""
        return 1 / self.correction(count), self.eps + 0 * count


def counter(p: Tensor) -> Tensor:
    """A count for one parameter: 0-d, 0, in float64 where the device has it."""
    return torch.zeros((), dtype=wide_dtype(p.device), device=p.device)


def one_of(condition: Tensor, value: float, other: float, dtype: torch.dtype) -> Tensor:
    """*value* where the 0-d bool *condition* holds, else *other*, rounded to *dtype* only."""
    return torch.where(condition, torch.full((), value, dtype=dtype, device=condition.device), other)
