"""The Lanczos recurrence: a symmetric operator as a small tridiagonal matrix, seen from one vector (C. Lanczos 1950).

From a unit vector v, m products give an orthonormal basis Q (rows) of the Krylov space of v and T = Q A Q', tridiagonal. With
T = S diag(theta) S', the values theta_l and the masses S_1l^2 are the Gauss quadrature of the spectral measure of v: sum_l
S_1l^2 f(theta_l) = v' f(A) v for all polynomials f of degree up to 2m - 1 (Golub & Welsch 1969).

In floating-point numbers the basis loses its orthogonality as soon as an eigenvalue is found, which then appears again and
again. Each new vector is therefore made orthogonal to all before it, as a block (two matrix-vector products), and once more if
much of it was taken away: "twice is enough" (Kahan; in Parlett 1980, section 6-9).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from conjugo._tensors import dot, wide_dtype
from conjugo.curvature._blocks import exact_products, norms, pieces
from conjugo.curvature._ranks import agree, same
from conjugo.curvature.operator import Operator
from conjugo.errors import check, unknown

__all__ = ["Basis", "LanczosResult", "Quadrature", "Recurrence", "lanczos"]

Reorthogonalisation: TypeAlias = Literal["full", "none"]

BREAKDOWN = 10.0
"""A vector shorter than this many eps of the operator's type, times the largest coefficient, is rounding noise."""

PASSES = 4
"""Of Gram-Schmidt for one vector, at most."""


class Quadrature(NamedTuple):
    """The eigenvalues of T and what they tell of the operator; float64 on the CPU."""

    values: Tensor
    """[m], ascending: the nodes (Ritz values)."""
    weights: Tensor
    """[m]: their masses, which add up to 1."""
    residuals: Tensor
    """[m]: |A u - value u| of their unit Ritz vectors u. Each value is no farther than this from an eigenvalue."""


class Basis:
    """Orthonormal rows [n, P] that grow by one, in a type and at a place of their own, whole or a slice of each row per rank.

    room: rows at most. Vectors come and go as slices of the coordinates that this rank keeps (all, unless *shard*), at the
    place of the basis, in the type :attr:`work`. The work is done where the basis is: only single vectors travel.
    """

    def __init__(
        self,
        op: Operator,
        room: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        shard: bool = False,
    ) -> None:
        self._op = op
        self._group = op.group if shard else None
        world, rank = (1, 0) if self._group is None else (dist.get_world_size(self._group), dist.get_rank(self._group))
        self._share = -(-op.size // world)
        self._own = slice(min(rank * self._share, op.size), min((rank + 1) * self._share, op.size))
        self.work = torch.promote_types(op.dtype, dtype or op.dtype)
        self.n = 0
        self.rows = torch.empty(
            room,
            self._own.stop - self._own.start,
            dtype=dtype or op.dtype,
            device=op.device if device is None else device,
        )

    @property
    def sharded(self) -> bool:
        """Whether each rank has a slice of the coordinates only."""
        return self._group is not None

    def slice(self, vector: Tensor) -> Tensor:
        """What this rank keeps of *vector* [P]."""
        return vector[self._own].to(device=self.rows.device, dtype=self.work)

    def whole(self, part: Tensor) -> Tensor:
        """The vector [P], in the operator's type and place, of which the ranks have the slices *part*."""
        return self.gathered(part.to(self._op.dtype))

    def gathered(self, part: Tensor) -> Tensor:
        """The same in the type of *part*."""
        part = part.to(self._op.device)
        if self._group is None:
            return part
        mine = part.new_zeros(self._share)
        mine[: len(part)] = part
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(parts, mine, group=self._group)
        return torch.cat(parts)[: self._op.size]

    def saved(self) -> Tensor:
        """The rows [n, P] on the CPU; of a sharded basis on rank 0 only, else []."""
        if self._group is None:
            return self.rows[: self.n].cpu()
        first = dist.get_rank(self._group) == 0
        rows = [self.gathered(row).cpu() if first else self.gathered(row)[:0].cpu() for row in self.rows[: self.n]]
        return torch.stack(rows) if rows else torch.empty(0, self._op.size, dtype=self.rows.dtype)

    def restore(self, rows: Tensor) -> None:
        """Become what :meth:`saved` gave on rank 0."""
        self.rows[: len(rows)] = rows[:, self._own]
        self.n = len(rows)

    def append(self, part: Tensor) -> Tensor:
        """Take a unit vector in, which must be orthogonal to all others; gives it back, from the basis if that is as exact."""
        row = self.rows[self.n]
        row.copy_(part)
        self.n += 1
        return row if row.dtype == self.work else part

    def remove(self, part: Tensor) -> None:
        """Take the components along the rows out of a vector, in place."""
        rows = self.rows[: self.n]
        found = torch.zeros(self.n, dtype=wide_dtype(part.device), device=part.device)
        with exact_products():
            for piece in pieces(len(part), part.device):
                found += rows[:, piece].to(part.dtype) @ part[piece]
            found = self._summed(found)
            weights = found.to(part)
            for piece in pieces(len(part), part.device):
                part[piece].addmv_(rows[:, piece].to(part.dtype).T, weights, alpha=-1)

    def dot(self, x: Tensor, y: Tensor) -> float:
        """Inner product of two vectors."""
        return float(self._summed(dot(x, y)))

    def length(self, x: Tensor) -> float:
        """Length of a vector; squares neither overflow nor vanish."""
        square = self.dot(x, x)
        if torch.finfo(x.dtype).tiny ** 0.5 < square < torch.finfo(x.dtype).max ** 0.5:
            return math.sqrt(square)
        own = norms(x[None]) if len(x) else torch.zeros(1, dtype=torch.float64)
        return float(own) if self._group is None else math.sqrt(float(self._summed(own.square())))

    def combine(self, weights: Tensor) -> Tensor:
        """Sums of the rows with *weights* [k, n]: slices [k, ...]."""
        weights = weights.to(device=self.rows.device, dtype=self.work)
        x = torch.empty(len(weights), self.rows.shape[1], dtype=self.work, device=self.rows.device)
        with exact_products():
            for piece in pieces(x.shape[1], x.device):
                x[:, piece] = weights @ self.rows[: self.n, piece].to(self.work)
        return x

    def grown(self, vector: Tensor) -> Basis:
        """A basis with *vector* [P] as one more row."""
        grown = copy.copy(self)
        part = self.slice(vector)
        grown.rows = torch.cat([self.rows[: self.n], part[None].to(self.rows.dtype)])
        grown.n = self.n + 1
        return grown

    def project(self, vector: Tensor) -> Tensor:
        """*vector* [P] without its components along the rows, as a new vector."""
        part = self.slice(vector).clone()
        for _ in range(2):
            self.remove(part)
        return self.whole(part)

    def _summed(self, own: Tensor) -> Tensor:
        if self._group is None:
            return own
        total = own.to(self._op.device)
        dist.all_reduce(total, group=self._group)
        return agree(total, self._group).to(own.device)


@dataclass(frozen=True, eq=False)
class LanczosResult:
    """What m Lanczos steps tell of an operator (P, P): A Q' = Q' T + residual q e_m', with q a unit vector orthogonal to Q."""

    alpha: Tensor
    """[m]: the diagonal of T; float64 on the CPU."""
    beta: Tensor
    """[m - 1]: beside the diagonal, positive."""
    residual: float
    """The next beta, of a step that was not made; 0 after a breakdown."""
    breakdown: int | None
    """Steps after which the Krylov space was invariant, so that all values are eigenvalues; None: it never was."""
    basis: Tensor | None
    """Q [m, P], or the coordinates of it that this rank keeps; None with ``reorth="none"``."""
    store: Basis | None
    group: Any = None

    def ritz(self) -> Quadrature:
        """The nodes and masses of the Gauss quadrature, and residuals. The same on all ranks."""
        t = torch.diag(self.alpha) + torch.diag(self.beta, 1) + torch.diag(self.beta, -1)
        values, vectors = torch.linalg.eigh(t)
        weights = vectors[0].square()
        found = torch.stack([values, weights / weights.sum(), self.residual * vectors[-1].abs()])
        return Quadrature(*agree(found, self.group))

    def ritz_vectors(self, indices: Iterable[int] | Tensor) -> Tensor:
        """Unit vectors [k, P] of the values of :meth:`ritz` with these *indices*; the type and device of the operator.

        Collective with a sharded basis. Raises ValueError with ``reorth="none"``.
        """
        parts = self.ritz_parts(indices)
        assert self.store is not None
        return torch.stack([self.store.whole(part) for part in parts]) if len(parts) else self.store.whole(parts)

    def ritz_parts(self, indices: Iterable[int] | Tensor) -> Tensor:
        """The same, as slices like those of the basis."""
        check(self.store is not None, "LanczosResult.ritz_vectors", "reorth", "none", "'full', which keeps the basis")
        assert self.store is not None
        t = torch.diag(self.alpha) + torch.diag(self.beta, 1) + torch.diag(self.beta, -1)
        vectors = agree(torch.linalg.eigh(t)[1], self.group)
        chosen = torch.as_tensor(indices if isinstance(indices, Tensor) else list(indices), dtype=torch.long)
        return self.store.combine(vectors[:, chosen].T)


class Recurrence:
    """Lanczos steps, one by one: multiply :attr:`vector`, hand the product to :meth:`take`, until :attr:`done`.

    basis: room for *steps* rows, and empty; reorth: whether vectors are made orthogonal to it and kept. locked: another basis,
    to which all vectors stay orthogonal: the recurrence is that of the operator between projections.
    """

    def __init__(
        self,
        op: Operator,
        start: Tensor,
        steps: int,
        basis: Basis,
        *,
        breakdown_tol: float | None = None,
        locked: Basis | None = None,
        reorth: Reorthogonalisation = "full",
        owner: str = "lanczos",
    ) -> None:
        self.alpha: list[float] = []
        self.beta: list[float] = []
        self.breakdown: int | None = None
        self._op, self._steps, self._basis, self._owner = op, steps, basis, owner
        self._tol = BREAKDOWN * torch.finfo(op.dtype).eps if breakdown_tol is None else breakdown_tol
        self._spaces = ([] if locked is None else [locked]) + ([basis] if reorth == "full" else [])
        self._keeps = reorth == "full"
        self._previous: Tensor | None = None
        part = basis.slice(start).clone()
        part /= basis.length(part)
        self._put(part, torch.zeros(1))

    @property
    def done(self) -> bool:
        """All steps are made, or the Krylov space is invariant."""
        return len(self.alpha) == self._steps or self.breakdown is not None

    def take(self, product: Tensor) -> None:
        """Make the step with the *product* [P] of the vector. Raises FloatingPointError if it is not finite."""
        basis = self._basis
        w = basis.slice(product)
        # Not in place: the product may be the operator's own memory, or the vector itself.
        w = w.clone() if self._previous is None else torch.sub(w, self._previous, alpha=self.beta[-1])
        alpha = basis.dot(w, self._current)
        w.sub_(self._current, alpha=alpha)
        length = basis.length(w)
        for _ in range(PASSES):
            before = length
            for space in self._spaces:
                space.remove(w)
            length = basis.length(w) if self._spaces else length
            if length > 0.7071 * before:
                break
        packed = torch.tensor([alpha, length], dtype=torch.float64)
        alpha, beta = agree(packed, self._op.group).tolist()
        if not math.isfinite(alpha + beta):
            name = type(self._op).__name__
            raise FloatingPointError(
                f"{self._owner}: product {len(self.alpha) + 1} of {name} is not finite, or too large for {self._op.dtype}"
            )
        self.alpha.append(alpha)
        scale = max(abs(x) for x in (*self.alpha, *self.beta, beta))
        if beta <= self._tol * scale or len(self.alpha) == self._op.size:
            self.beta.append(0.0)
            self.breakdown = len(self.alpha)
            return
        self.beta.append(beta)
        if not self.done:
            self._previous = self._current
            self._put(w.div_(beta), packed)

    def result(self) -> LanczosResult:
        """What the steps so far tell."""
        m = len(self.alpha)
        alpha, beta = (torch.tensor(x, dtype=torch.float64) for x in (self.alpha, self.beta[: m - 1]))
        store = self._basis if self._keeps else None
        rows = None if store is None else store.rows[:m]
        return LanczosResult(alpha, beta, self.beta[-1], self.breakdown, rows, store, self._op.group)

    def state(self) -> dict[str, Any]:
        """All of it, as plain values and tensors on the CPU; vectors of a sharded basis on rank 0 only. Collective."""
        ends = [x for x in (self._current, self._previous) if x is not None]
        return {
            "alpha": self.alpha,
            "beta": self.beta,
            "breakdown": self.breakdown,
            "rows": self._basis.saved(),
            "ends": [self._basis.gathered(x).cpu() for x in ends],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where *state*, that of rank 0, was taken, to the same bits."""
        basis = self._basis
        self.alpha, self.beta, self.breakdown = list(state["alpha"]), list(state["beta"]), state["breakdown"]
        basis.restore(state["rows"])
        ends = [basis.slice(x) for x in state["ends"]]
        self._current, self._previous = ends[0], ends[1] if len(ends) > 1 else None
        self.vector = basis.whole(self._current)

    def _put(self, part: Tensor, witness: Tensor) -> None:
        if not self._basis.sharded:
            part = same(part, witness, self._op.group)
        self._current = self._basis.append(part) if self._keeps else part
        self.vector = self._basis.whole(self._current)
        """[P]: what to multiply next."""


def lanczos(
    op: Operator,
    v0: Tensor,
    steps: int,
    *,
    reorth: Reorthogonalisation = "full",
    breakdown_tol: float | None = None,
    basis_dtype: torch.dtype | None = None,
    basis_device: torch.device | str | None = None,
    shard_basis: bool = False,
    callback: Callable[[int], None] | None = None,
) -> LanczosResult:
    """Up to *steps* Lanczos steps from the vector *v0* [P]: T = Q A Q', tridiagonal, by one product of *op* (P, P) each.

    steps: from 1 to P. It may end earlier, when the Krylov space is invariant: with as many steps as *v0* has eigenvectors (of
    different eigenvalues) in it. Then all values are eigenvalues.
    breakdown_tol: that is so when the next beta is at most this times the largest coefficient; None: 10 eps of the operator's
    type. Products that are less exact (those of deep networks in float32) hide it, which adds values of negligible mass.
    reorth: ``"full"``; or ``"none"``, which needs memory for two vectors instead of steps + 2. Then eigenvalues that are found
    appear again, in copies, so that values cannot be counted and there are no Ritz vectors; masses near an eigenvalue still add
    up to what they should be.

    The basis takes steps * P numbers, and can be kept in less room or elsewhere. basis_dtype: float64, float32 or bfloat16;
    None: that of the operator. With float64 a float32 operator's vectors are worked on in float64; with bfloat16 memory is
    halved, and eigenvalues are good to about 1e-4 of the largest. basis_device: where it is, such as ``"cpu"`` for the host's
    memory, where orthogonalisation is done then; None: that of the operator. shard_basis: each rank of ``op.group`` keeps some
    coordinates of all vectors, at the price of one more all-gather of P numbers per step.
    callback: is called with the number of steps after each.

    With a process group all ranks call this together and get the same. Raises ValueError for values out of range, UnknownName
    for another *reorth*, FloatingPointError if a product is not finite.

    >>> from conjugo.curvature import from_dense
    >>> A = from_dense(torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64))
    >>> found = lanczos(A, torch.tensor([1.0, 0.0], dtype=torch.float64), 2)
    >>> found.alpha.tolist(), found.beta.tolist(), found.breakdown
    ([2.0, 2.0], [1.0], 2)
    >>> values, weights, _ = found.ritz()
    >>> [round(x, 12) for x in values.tolist()], [round(x, 12) for x in weights.tolist()]
    ([1.0, 3.0], [0.5, 0.5])
    """
    check_basis(op, "lanczos", basis_dtype, shard_basis)
    check(1 <= steps <= op.size, "lanczos", "steps", steps, f"from 1 to P = {op.size}")
    if reorth not in ("full", "none"):
        unknown("lanczos reorth", reorth, ("full", "none"))
    accepted = breakdown_tol is None or 0 <= breakdown_tol < 1
    check(accepted, "lanczos", "breakdown_tol", breakdown_tol, "in [0, 1) or None")
    check(tuple(v0.shape) == (op.size,), "lanczos", "the shape of v0", tuple(v0.shape), f"({op.size},)")
    check(v0.dtype == op.dtype, "lanczos", "the dtype of v0", v0.dtype, str(op.dtype))
    check(v0.device == op.device, "lanczos", "the device of v0", str(v0.device), str(op.device))
    v0 = v0.detach()
    length = agree(float(norms(v0[None])), op.group)
    check(0 < length < math.inf, "lanczos", "the length of v0", length, "positive and finite")
    basis = Basis(op, steps if reorth == "full" else 0, basis_dtype, basis_device, shard_basis)
    recurrence = Recurrence(op, v0, steps, basis, breakdown_tol=breakdown_tol, reorth=reorth)
    while not recurrence.done:
        recurrence.take(op.matvec(recurrence.vector))
        if callback is not None:
            callback(len(recurrence.alpha))
    return recurrence.result()


def check_basis(op: Operator, owner: str, dtype: torch.dtype | None, shard: bool) -> None:
    """Raise ValueError for an operator or a basis of an unknown type, or for a basis that no ranks can share."""
    check(op.dtype in (torch.float32, torch.float64), owner, "the dtype of op", op.dtype, "float32 or float64")
    types = (None, torch.float64, torch.float32, torch.bfloat16)
    check(dtype in types, owner, "basis_dtype", dtype, "float64, float32, bfloat16 or None")
    check(not shard or op.group is not None, owner, "shard_basis", shard, "False for an operator without process group")
