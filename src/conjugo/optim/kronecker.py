"""Adam's scaling of matrices in the eigenbasis of two Kronecker factors."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from conjugo._tensors import Array, namespace
from conjugo.errors import check
from conjugo.optim._base import state_dtype
from conjugo.optim._matrix_products import TYPES, on_host, product, product_type, stacked, symmetric_product, together
from conjugo.optim.adaptive_preconditioner import State, counter, one_of
from conjugo.optim.matrix_preconditioners import Matrices, MatrixPreconditioner, is_count, picked, shape_of

__all__ = ["Kronecker"]

_log = logging.getLogger(__name__)


@dataclass
class _Known:
    """What was found out about gradients while they were learned."""

    rotated: Tensor
    """Q^T G R."""
    square: Tensor
    """The means of its squares."""
    good: Tensor | None = None
    """For each whether its squares are finite, bool [n]; None: all."""
    steps: int | None = None
    """How many gradients are in the means of squares, where the host knows, and all are good."""


@dataclass
class _Batch:
    """Matrices of one shape that are worked on at once: [n, rows, columns], or [rows, columns] if it is a single one."""

    indices: list[int]
    states: list[State]
    known: _Known | None = None
    _bases: tuple[Tensor | None, Tensor | None] | None = None

    def bases(self) -> tuple[Tensor | None, Tensor | None]:
        """Q and R; None where there are none."""
        if self._bases is None:
            self._bases = (self._basis("left_basis"), self._basis("right_basis"))
        return self._bases

    def _basis(self, name: str) -> Tensor | None:
        return stacked([state[name] for state in self.states]) if name in self.states[0] else None

    def forget(self) -> None:
        """The bases will change."""
        self._bases = None

    def spread(self, values: Tensor) -> Tensor:
        """*values* [n], so that they go with the matrices."""
        return values[:, None, None] if len(self.states) > 1 else values[0]


@dataclass(frozen=True, kw_only=True)
class Kronecker(MatrixPreconditioner):
    r"""Adam's scaling in the eigenbasis of two running means, of g g^T and of g^T g.

    With Q and R the eigenvectors of these, :math:`P g = Q \frac{Q^T g R}{\sqrt{v} + \mathrm{damping}\,\mathrm{rms}(v)
    + \mathrm{eps}} R^T`, where v is the running mean of the squares of :math:`Q^T g R`, corrected for its start, and rms(v)
    the root of its mean over the matrix. P is linear and symmetric positive definite, and changes slowly. As with
    :class:`AdamDiagonal` the step does not change with the scale of the loss, and beta is near 1: *beta_max* is 0.9 by default.

    A step uses means and basis of the steps before, so that no gradient is seen in a basis that it made itself. Hence the
    first step of a parameter only learns: P g = 0, and nothing moves. The second one finds the eigenvectors, every *period*
    steps later one step of the power iteration with a QR decomposition follows them. Where no gradient has shown anything yet
    the basis is arbitrary.

    decay: part of the old means of g g^T and g^T g in new ones, in [0, 1). period: >= 1. damping: >= 0. max_dim: a side with
    more rows or columns than that keeps the identity as its basis, and so does one with a single row; where both sides do,
    the parameter gets Adam's scaling; >= 1. A process logs such a shape once. matrices: default: all parameters with two
    dimensions or more. beta2: of v and of Adam's scaling for all else. eps: as there. dtype: of the products g g^T and g^T g
    and of those that turn the divided gradient back; None: as for :class:`Orthogonal`. All else is exact, in particular the
    way into the basis, where small values count as much as large ones.

    State of a matrix [m, n]: ``square`` [m, n]; ``left`` and ``left_basis`` [m, m]; ``right`` and ``right_basis`` [n, n],
    if those sides have a basis; 0-d in float64 ``updates``, gradients learned, ``renewed``, the number of those when the basis
    was last renewed, and ``bad_updates``. That counts gradients whose squares overflow, which are left out, and renewals where
    means or bases are not finite or no basis is found: all but this count then starts anew. The host looks at these counts
    twice in *period* steps, and as long as a matrix has seen only zeros in each, and waits for the device then. Small matrices
    of one shape are worked on at once, with a second copy of their bases, which is no state.

    Source: N. Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", arXiv:2409.11321; the relative damping is
    ours.
    """

    decay: float = 0.95
    period: int = 10
    damping: float = 0.03
    max_dim: int = 2048
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        """Check the options; raises ``ValueError``."""
        super().__post_init__()
        check(0 <= self.decay < 1, self._name, "decay", self.decay, "in [0, 1)")
        check(is_count(self.period), self._name, "period", self.period, "an integer >= 1")
        check(0 <= self.damping < math.inf, self._name, "damping", self.damping, "in [0, inf)")
        check(is_count(self.max_dim), self._name, "max_dim", self.max_dim, "an integer >= 1")
        check(self.dtype in (None, *TYPES), self._name, "dtype", self.dtype, f"None or one of {TYPES}")

    def suits(self, rows: int, columns: int) -> bool:
        """Always."""
        return True

    def is_matrix(self, p: Tensor) -> bool:
        """Whether *p* is one of the matrices, and a side of it has a basis."""
        return super().is_matrix(p) and any(self._has_basis(size) for size in shape_of(p))

    def _has_basis(self, size: int) -> bool:
        return 1 < size <= self.max_dim

    def state_of(self, p: Tensor, home: Tensor) -> dict[str, Tensor]:
        """As the base class; a side that is too large for a basis is logged."""
        if super().is_matrix(p):
            _log_too_large(shape_of(p), self.max_dim)
        return super().state_of(p, home)

    def matrix_state(self, p: Tensor) -> dict[str, Tensor]:
        """Zeros, and identities for the bases."""
        rows, columns = shape_of(p)
        dtype, device = state_dtype(p), p.device
        state = {"square": torch.zeros(p.shape, dtype=dtype, device=device)}
        for side, size in (("left", rows), ("right", columns)):
            if self._has_basis(size):
                state[side] = torch.zeros(size, size, dtype=dtype, device=device)
                state[f"{side}_basis"] = torch.eye(size, dtype=dtype, device=device)
        return state | {name: counter(p) for name in ("updates", "renewed", "bad_updates")}

    def cost(self, rows: int, columns: int) -> float:
        """Products with the bases and for the means, and a share of the renewal."""
        sides = [size for size in (rows, columns) if self._has_basis(size)]
        return sum(6.0 * rows * columns * size + 12.0 * size**3 / self.period for size in sides)

    def treats(self, state: State) -> bool:
        """A matrix has a basis."""
        return "left" in state or "right" in state

    def learn(self, matrices: Matrices, finite: Tensor) -> None:
        """Renew the bases that are due, learn the squares in them, then the means that make the next ones."""
        self._renew_due(matrices, finite)
        for batch in self._batches(matrices, matrices.gradients):
            self._learn(batch, stacked(picked(matrices.gradients, batch.indices)), finite)

    def treat(self, matrices: Matrices, vectors: list[Tensor]) -> list[Tensor]:
        """Into the basis, divided, and back; 0 where nothing but a first gradient was learned."""
        results = list(vectors)
        for batch in self._batches(matrices, vectors):
            known, batch.known = batch.known if vectors is matrices.gradients else None, None
            if known is None:
                rotated = _into(batch, stacked(picked(vectors, batch.indices)))
                known = _Known(rotated, stacked([state["square"] for state in batch.states]))
            z = self._out_of(batch, self._divided(batch, known))
            for i, own in zip(batch.indices, z.unbind() if z.ndim == 3 else [z], strict=True):
                results[i] = own.view(vectors[i].shape)
        return results

    def _batches(self, matrices: Matrices, vectors: Sequence[Tensor]) -> list[_Batch]:
        """Which of *matrices* are worked on at once."""
        if "batches" not in matrices.memo:
            alike = together(vectors, square=True)
            matrices.memo["batches"] = [_Batch(indices, picked(matrices.states, indices)) for indices in alike]
        batches: list[_Batch] = matrices.memo["batches"]
        return batches

    def divided(self, states: Sequence[State], vectors: Sequence[Tensor], foreach: bool) -> list[Tensor]:
        """As the base class; 0 where nothing but a first gradient was learned."""
        found = super().divided(states, vectors, foreach)
        return [torch.where(state["updates"] > 1, z, 0.0) for state, z in zip(states, found, strict=True)]

    def divisor(self, count: Array) -> tuple[Array, Array]:
        """As the base class; infinity where a first gradient was learned at most."""
        factor, eps = super().divisor(count)
        return factor, namespace(count).where(count > 1, eps, math.inf)

    def _divided(self, batch: _Batch, known: _Known) -> Tensor:
        """What is rotated into the basis, divided; 0 where nothing but a first gradient was learned or it was not good."""
        v, root = known.square, known.square.sqrt()
        mean = v.mean((-2, -1), keepdim=True)
        if known.steps is not None:  # numbers, which cost less than tensors
            gain = 1 / math.sqrt(1 - self.beta2**known.steps)
            root.mul_(gain).add_(mean.sqrt_().mul_(gain * self.damping).add_(self.eps))
            return torch.div(known.rotated, root, out=root)
        counts = torch.stack([state["updates"] for state in batch.states])
        lacking = batch.spread(self.correction(counts - 1).to(v.dtype))
        allowed = counts > 1 if known.good is None else (counts > 1) & known.good
        least = batch.spread(one_of(allowed, self.eps, math.inf, v.dtype)) + self.damping / lacking * mean.sqrt_()
        torch.addcmul(least, root, 1 / lacking, out=root)
        return torch.div(known.rotated, root, out=root)

    def _learn(self, batch: _Batch, g: Tensor, finite: Tensor) -> None:
        """Take gradients of one shape, which are 0 where not *finite*, into the means, in place."""
        states = batch.states
        good = torch.isfinite(torch.linalg.vector_norm(g, dim=(-2, -1)).square()).reshape(-1)
        v, counts = stacked([state["square"] for state in states]), [state["updates"] for state in states]
        plain = on_host(g) and bool(finite & good.all())
        if not plain:
            g = torch.where(batch.spread(good), g, 0.0)  # or products with the basis overflow
        rotated = _into(batch, g)
        known = batch.known = _Known(rotated, v, good)
        if plain and min(before := [int(n) for n in counts]) > 0:
            v.mul_(self.beta2).addcmul_(rotated, rotated, value=1 - self.beta2)
            self._learn_means(batch, g, self.decay, 1 - self.decay)
            torch._foreach_add_(counts, 1.0)
            known.steps = before[0] if len(set(before)) == 1 else None
        else:
            learned = finite & good
            seen = learned & (torch.stack(counts) > 0)
            rate = batch.spread(one_of(seen, 1 - self.beta2, 0.0, g.dtype))
            part = rotated * rate.sqrt()  # 0 where nothing is learned: no square may overflow
            v.mul_(1 - rate).addcmul_(part, part)
            rate = one_of(learned, 1 - self.decay, 0.0, g.dtype)
            self._learn_means(batch, g * batch.spread(rate.sqrt()), 1 - rate, 1.0)
            torch._foreach_add_(counts, list(learned.unbind()))
            torch._foreach_add_([state["bad_updates"] for state in states], list((finite & ~good).unbind()))
        if len(states) > 1:
            torch._foreach_copy_([_matrix(state["square"]) for state in states], list(v.unbind()))

    def _learn_means(self, batch: _Batch, g: Tensor, keep: float | Tensor, gain: float) -> None:
        """left <- keep left + gain g g^T, right <- keep right + gain g^T g; keep: a number, or one for each."""
        dtype = self._product_type(g)
        x = g if dtype is None else g.to(dtype)
        for name, y in (("left", x), ("right", x.mT)):
            if name not in batch.states[0]:
                continue
            means = [state[name] for state in batch.states]
            if y.ndim == 3 and not on_host(y):
                torch._foreach_mul_(means, keep if isinstance(keep, float) else list(keep.unbind()))
                torch._foreach_add_(means, list((torch.bmm(y, y.mT) * gain).to(g.dtype).unbind()))
                continue
            for i, (mean, own) in enumerate(zip(means, y.unbind() if y.ndim == 3 else [y], strict=True)):
                if not isinstance(keep, float):
                    mean.mul_(keep[i])
                beta = keep if isinstance(keep, float) else 1.0
                if dtype is None:
                    symmetric_product(own, out=mean, base=mean, beta=beta, alpha=gain)
                else:
                    mean.mul_(beta).add_(symmetric_product(own, out=own.new_empty(mean.shape)), alpha=gain)

    def _out_of(self, batch: _Batch, x: Tensor) -> Tensor:
        """Q X R^T for each of *x*."""
        dtype, (left, right) = self._product_type(x), batch.bases()
        if left is not None:
            x = product(left, x, dtype=dtype)
        return x if right is None else product(x, right.mT, dtype=dtype)

    def _product_type(self, matrices: Tensor) -> torch.dtype | None:
        """Of products that need not be exact; None: that of *matrices*."""
        dtype = product_type(matrices) if self.dtype is None else self.dtype
        return None if dtype == matrices.dtype else dtype

    def _renew_due(self, matrices: Matrices, finite: Tensor) -> None:
        """Renew the bases whose time has come. Reads counts from the device when it may have."""
        states, memo = matrices.states, matrices.memo
        wait = memo.get("wait", 0)
        if wait:
            memo["wait"] = wait - 1
            return
        counts = torch.stack([torch.stack([state["updates"], state["renewed"]]) for state in states]).tolist()
        waits = []
        for batch in memo.get("batches", ()):
            batch.forget()
        for state, (updates, renewed) in zip(states, counts, strict=True):
            if updates >= 1 and (renewed == 0 or updates >= renewed + self.period):
                self._renew(state, first=renewed == 0, finite=finite)
                waits.append(0)  # the step may be one that is skipped
            else:
                waits.append(int(renewed + self.period - updates - 1) if renewed else 0)
        memo["wait"] = min(waits)

    def _renew(self, state: State, *, first: bool, finite: Tensor) -> None:
        """New bases from the means; nothing changes where not *finite*, or where there is only 0.

        Where means or bases are not finite, or no basis is found, all starts anew.
        """
        some, sound, changes = finite, finite, []
        v = _matrix(state["square"])
        if on_host(v) and all(state[side].count_nonzero() == 0 for side in ("left", "right") if side in state):
            return
        for dim, side in enumerate(("left", "right")):
            if side not in state:
                continue
            mean, basis = state[side], state[f"{side}_basis"]
            peak = mean.diagonal().amax()  # the largest value of all
            scaled = mean / torch.where(peak > 0, peak, 1.0)
            if first:
                new = _eigenvectors(scaled)
            else:
                turned = scaled @ basis
                order = (basis * turned).sum(0).argsort(descending=True, stable=True)
                new = _orthonormalized(turned.index_select(1, order))
                v = v.index_select(dim, order)
            some = some & (peak > 0)
            # All are at most 1, so that the sum is finite where they are; to look at each takes longer than all else here.
            sound = sound & torch.isfinite(scaled.sum() + new.sum())
            changes += [(mean, mean, torch.zeros_like(peak)), (basis, new, torch.eye(len(new)).to(new))]
        sound = sound & torch.isfinite(v.amax())
        found, broken = some & sound, finite & ~sound
        zero = torch.zeros_like(state["updates"])
        changes += [
            (_matrix(state["square"]), v, zero.to(v.dtype)),
            (state["renewed"], state["updates"].clone(), zero),
            (state["updates"], state["updates"], zero),
        ]
        if not on_host(v):
            for old, new, start in changes:
                old.copy_(torch.where(found, new, torch.where(broken, start, old)))
        elif bool(found):
            for old, new, _ in changes:
                if new is not old:
                    old.copy_(new)
        elif bool(broken):
            for old, _, start in changes:
                old.copy_(start)
        state["bad_updates"].add_(broken)


def _into(batch: _Batch, x: Tensor) -> Tensor:
    """Q^T X R for each of *x*."""
    left, right = batch.bases()
    if left is not None:
        x = product(left.mT, x)
    return x if right is None else product(x, right)


def _eigenvectors(mean: Tensor) -> Tensor:
    """Of the largest eigenvalue first; NaN if they are not found, in float64 neither."""
    for dtype in dict.fromkeys((mean.dtype, torch.float64)):
        try:
            vectors: Tensor = torch.linalg.eigh(mean.to(dtype)).eigenvectors
            return vectors.flip(1).to(mean.dtype)
        except RuntimeError:  # LinAlgError: it did not converge
            continue
    return torch.full_like(mean, math.nan)


def _orthonormalized(matrix: Tensor) -> Tensor:
    """The factor Q of a QR decomposition."""
    basis: Tensor = torch.linalg.qr(matrix).Q
    return basis


def _matrix(tensor: Tensor) -> Tensor:
    """[rows, columns], contiguous; a view of contiguous tensors."""
    return tensor.reshape(shape_of(tensor)).contiguous()


@functools.cache
def _log_too_large(shape: tuple[int, int], limit: int) -> None:
    if max(shape) > limit:
        sides = [name for name, size in zip(("rows", "columns"), shape, strict=True) if size > limit]
        _log.info(
            "Kronecker: a matrix of shape %s has more than max_dim=%d %s: no basis there",
            shape,
            limit,
            " and ".join(sides),
        )
