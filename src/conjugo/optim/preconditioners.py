"""Preconditioners P for the direction d = -P g + beta d'.

A new one subclasses :class:`Preconditioner`; :class:`conjugo.optim.NLCG` takes an instance as ``precond=`` and needs no change.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from conjugo._space import ParamSpace
from conjugo._tensors import Array, namespace
from conjugo.errors import check
from conjugo.optim._base import zeros_for

__all__ = ["Block", "Coefficients", "DiagonalBFGS", "Identity", "Preconditioner", "Secant"]


@dataclass
class Block:
    """Parameters that share all scalars of a step: those of one group and type, or a single one.

    The lists run over the parameters of the block. Complex parameters and gradients appear as real views [..., 2]. Of
    parameters that are spread over ranks, states and gradients hold this rank's pieces; some of them may be empty.
    """

    group: dict[str, Any]
    params: list[Tensor]
    states: list[dict[str, Tensor]]
    foreach: bool
    local: Callable[[Tensor], Tensor]
    """This rank's piece of a parameter or of its gradient."""
    precond: Preconditioner = field(default_factory=lambda: Identity())
    """P."""
    gradients: list[Tensor] = field(default_factory=list)
    """As the method sees them (scaled, with weight decay), in the type of the state; all 0 in a step that is skipped."""
    curvature: list[Tensor] = field(default_factory=list)
    """Estimates of the diagonal of the Hessian, as the method sees it, where the preconditioner learns from such."""
    memo: dict[str, Any] = field(default_factory=dict)
    """What the preconditioner wants to remember on the host until parameters or state are exchanged; nothing of it is saved."""
    space: ParamSpace | None = None
    """Which rank holds which part of which parameter."""
    common: dict[str, Any] = field(default_factory=dict)
    """As ``memo``, of all blocks together. ``common["settle"]``: functions to call before state is looked at."""

    def pieces(self) -> list[Tensor]:
        """This rank's pieces of the parameters, on their memory."""
        return [self.local(p) for p in self.params]

    def raw_gradients(self) -> list[Tensor]:
        """This rank's pieces of the gradients as they were computed."""
        return [self.local(p.grad) for p in self.params if p.grad is not None]

    def state(self, name: str) -> list[Tensor]:
        """The state tensors called *name*, in the order of ``params``."""
        return [s[name] for s in self.states]


class Secant(NamedTuple):
    """What the last step s = tau d' taught: inner products over the whole scope.

    For :meth:`Preconditioner.update` 0-d tensors in float64. The sums are 0 if the preconditioner learns nothing from steps.
    """

    tau: Array
    ys: Array  # <y, s>, y = g - g'
    shs: Array  # <s, H s>, H = the preconditioner's model of the Hessian
    yy: Array  # <y, y>, or an upper bound that decides alike
    ss: Array  # <s, s>
    usable: Array  # bool: there is a last step, and it was tau d' and nothing else
    finite: Array  # bool: false in a step that is skipped; then nothing may change


class Preconditioner(ABC):
    """A symmetric positive definite linear map P = H^-1, updated in every step before it is applied.

    ``apply`` before ``update`` gives the P of the previous step, which the Polak-Ribiere rule needs.
    """

    learns_from_steps: ClassVar[bool] = False
    """Whether ``update`` wants the sums in :class:`Secant`; they cost memory for the previous gradient, and ``multiply``."""

    @abstractmethod
    def init_state(self, p: Tensor) -> dict[str, Tensor]:
        """State of one parameter, complete before the first step: tensors by name (not direction, grad_prev, scalars)."""

    def state_of(self, p: Tensor, home: Tensor) -> dict[str, Tensor]:
        """State of the parameter *p*, laid out like *home*, which is *p* itself unless ``shard_state`` cuts state only."""
        return self.init_state(home)

    def update(self, block: Block, secant: Secant) -> None:
        """Learn from ``block.gradients`` and *secant*; in place, without reading tensor values on the host."""
        return

    @abstractmethod
    def apply(self, block: Block, vectors: list[Tensor], fresh: Tensor) -> list[Tensor]:
        """P v for each of *vectors* (new tensors, or *vectors* itself). fresh: 0-d bool, true before the first update."""

    def diagonal(self, state: Mapping[str, Tensor]) -> Tensor | None:
        """P for one parameter, of the shape of its state, where P is diagonal; None: it is 1, or is not diagonal."""
        return None

    def multiply(self, block: Block, vectors: list[Tensor]) -> list[Tensor]:
        """H v for each of *vectors*; only where ``learns_from_steps``."""
        raise NotImplementedError(f"{type(self).__name__} has no model of the Hessian to multiply with")


@dataclass(frozen=True)
class Identity(Preconditioner):
    """P = 1."""

    def init_state(self, p: Tensor) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def apply(self, block: Block, vectors: list[Tensor], fresh: Tensor) -> list[Tensor]:
        """The vectors themselves."""
        return vectors


class Coefficients(NamedTuple):
    """h <- bounded(h - (root_b h d)^2 + (root_a y)^2 + shift); all of one shape."""

    root_a: Array
    root_b: Array
    shift: Array


@dataclass(frozen=True)
class DiagonalBFGS(Preconditioner):
    """P = 1/h, where h is the diagonal of the BFGS update of the Hessian (Adya, Palakkode & Tuzel 2018).

    With s the last step and y the change of the gradient, sums over the scope: a = <y, s>, b = <s, h s>,
    h <- h - h^2 s^2 / b + y^2 / a, kept in *bounds*. ``reference=True`` follows the authors' code: 1e-8 is added in all
    numerators and denominators, the absolute value is taken instead of bounds, P = 1/(h + 1e-8) except in the first step.

    h0 > 0: the first h. bounds: (low, high) with 0 < low < high, in multiples of h0. State: ``h``, one vector.
    """

    h0: float = 1.0
    bounds: tuple[float, float] = (1e-6, 1e6)
    reference: bool = False
    learns_from_steps = True

    EPS: ClassVar[float] = 1e-8
    CURVATURE: ClassVar[float] = 1e-8
    """A pair is taken if <y, s> > CURVATURE |y| |s|: below that, float32 gradients hold nothing but rounding."""

    def __post_init__(self) -> None:
        """Check the options; raises ``ValueError``."""
        check(0 < self.h0 < float("inf"), "NLCG", "h0", self.h0, "a finite number > 0")
        good = len(self.bounds) == 2 and 0 < self.bounds[0] < self.bounds[1]
        check(good, "NLCG", "h_bounds", self.bounds, "(low, high) with 0 < low < high")

    def init_state(self, p: Tensor) -> dict[str, Tensor]:
        """``h``, filled with h0, in float32 (float64 for float64 parameters)."""
        return {"h": zeros_for(p).fill_(self.h0)}

    @property
    def limits(self) -> tuple[float, float]:
        """The interval in which h is kept."""
        return (0.0, float("inf")) if self.reference else (self.bounds[0] * self.h0, self.bounds[1] * self.h0)

    def eps(self, fresh: Array) -> Array:
        """What is added to h in P, of the shape of *fresh* (bool, true before the first update)."""
        return namespace(fresh).where(fresh, 0.0, self.EPS if self.reference else 0.0)

    def coefficients(self, secant: Secant) -> Coefficients:
        """How h changes; the fields of *secant* are of one shape.

        The pair is left out unless a > 1e-8 |y| |s| and b > 0 (reference: unless both are at least 1e-8).
        """
        xp = namespace(secant.ys)
        a, b, eps = secant.ys, secant.shs, self.EPS if self.reference else 0.0
        enough = (a >= eps) & (b >= eps) if self.reference else a > self.CURVATURE * xp.sqrt(secant.yy * secant.ss)
        accepted = secant.usable & secant.finite & enough & (a > 0) & (b > 0)
        over_a, over_b = (1 / (xp.where(accepted, x, 1.0) + eps) for x in (a, b))
        return Coefficients(
            xp.where(accepted, xp.sqrt(over_a), 0.0),
            xp.where(accepted, xp.sqrt(over_b) * secant.tau, 0.0),
            xp.where(accepted, eps * (over_a - over_b), 0.0),
        )

    def update(self, block: Block, secant: Secant) -> None:
        """The diagonal BFGS update of h, in place."""
        hs, ds, gs, olds = block.state("h"), block.state("direction"), block.gradients, block.state("grad_prev")
        root_a, root_b, shift = (c.to(hs[0].dtype) for c in self.coefficients(secant))
        low, high = self.limits
        if not block.foreach:
            for h, d, g, old in zip(hs, ds, gs, olds, strict=True):
                new = h - (root_b * h * d).square_() + (root_a * (g - old)).square_() + shift
                h.copy_((new.abs_() if self.reference else new).clamp_(low, high))
            return
        s = torch._foreach_mul(hs, ds)
        torch._foreach_mul_(s, root_b)
        y = torch._foreach_sub(gs, olds)
        torch._foreach_mul_(y, root_a)
        torch._foreach_addcmul_(hs, s, s, value=-1)
        torch._foreach_addcmul_(hs, y, y)
        if self.reference:
            torch._foreach_add_(hs, [shift] * len(hs))  # a bare scalar would be read on the host
            torch._foreach_abs_(hs)
        torch._foreach_clamp_min_(hs, low)
        torch._foreach_clamp_max_(hs, high)

    def apply(self, block: Block, vectors: list[Tensor], fresh: Tensor) -> list[Tensor]:
        """v / h."""
        hs = block.state("h")
        if self.reference:
            eps = self.eps(fresh).to(hs[0].dtype)
            return [v / (h + eps) for v, h in zip(vectors, hs, strict=True)]
        return (
            list(torch._foreach_div(vectors, hs))
            if block.foreach
            else [v / h for v, h in zip(vectors, hs, strict=True)]
        )

    def diagonal(self, state: Mapping[str, Tensor]) -> Tensor:
        """1 / h."""
        return 1 / (state["h"] + (self.EPS if self.reference else 0.0))

    def multiply(self, block: Block, vectors: list[Tensor]) -> list[Tensor]:
        """h v."""
        hs = block.state("h")
        return (
            list(torch._foreach_mul(vectors, hs))
            if block.foreach
            else [v * h for v, h in zip(vectors, hs, strict=True)]
        )
