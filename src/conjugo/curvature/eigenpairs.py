"""Some eigenvalues and eigenvectors of a symmetric operator, from its ends: Lanczos with thick restarts, in blocks.

An orthonormal basis V (rows) of a Krylov space grows by one block of products at a time; T = V A V' is kept as a whole, and
A V' = V' T + F' C, with F the block of vectors to multiply next. The eigenpairs (theta, y) of T give approximate ones of A
(Ritz pairs), V' y with residual |C y|. When the memory for V is full, the best Ritz vectors and F stay and all else is dropped,
which leaves that equation as it is (Stewart 2001, "A Krylov-Schur algorithm for large eigenproblems", SIAM J. Matrix Anal.
Appl. 23:601-614; for symmetric matrices Wu & Simon 2000, "Thick-restart Lanczos", ibid. 22:602-616).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from conjugo.curvature._blocks import ROWS, Random, combine, combine_, inner, norms, products, remove
from conjugo.curvature._ranks import agree, same
from conjugo.curvature.operator import Operator
from conjugo.errors import check, unknown

__all__ = ["Eigenpairs", "Krylov", "Ritz", "Which", "eigsh"]

Which: TypeAlias = Literal["LA", "SA", "LM", "BE"]

OVERLOOKED = 1e-3
"""Chance of overlooking a copy of an eigenvalue at which the search for more ends."""

BREAKDOWN = 10.0
"""A vector shorter than this many eps times the largest product is rounding noise."""


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues of an operator (P, P), the eigenvectors that go with them, and how well they are known."""

    values: Tensor
    """[k], descending; float64 on the CPU."""
    vectors: Tensor
    """[k, P]: unit eigenvectors as rows, orthogonal to each other; type and device of the operator."""
    residuals: Tensor
    """[k]: |A v - value v|, as the method knows it; the rounding of the products comes on top. float64 on the CPU. Each value
    is no farther than its residual from an eigenvalue."""
    converged: bool
    """All residuals are within the tolerance."""
    verified: bool
    """Whether a search from a fresh random vector came to the end that no eigenvalue is missing among those asked for (it is
    mistaken with a chance of 0.1 %), or all eigenvalues were computed."""
    n_matvec: int
    """Products that it took."""

    @property
    def matvecs(self) -> int:
        """The same as ``n_matvec``."""
        return self.n_matvec


class Ritz(NamedTuple):
    """Eigenpairs of T, which make approximate eigenpairs of the operator. The same on all ranks."""

    values: Tensor
    """[n], ascending, float64."""
    weights: Tensor
    """[basis vectors, n]: column i makes Ritz vector i of the basis."""
    residuals: Tensor
    """[n]"""


class Krylov:
    """A basis that grows by blocks of products, and the operator as seen in it.

    room: rows of T at most; P must be at least room + 2 block_size. Growing raises FloatingPointError if a product is not
    finite.
    """

    def __init__(self, op: Operator, room: int, block_size: int, random: Random, owner: str) -> None:
        self.op = op
        self.room = room
        self.block_size = block_size
        self.n = 0
        """Rows of T: basis vectors whose products are known."""
        self.n_matvec = 0
        self.lowest, self.highest = math.inf, -math.inf
        """Extreme Ritz values so far."""
        self._random = random
        self._owner = owner
        self._basis = torch.empty(room + block_size, op.size, dtype=op.dtype, device=op.device)
        self._t = torch.zeros(room, room, dtype=torch.float64)
        self._coupling = torch.zeros(block_size, 0, dtype=torch.float64)  # C
        self._dropped: list[Tensor] = []  # the C of each F that was given up
        self._largest = 0.0

    @property
    def scale(self) -> float:
        """The largest size of a Ritz value so far, a lower bound of the norm of the operator."""
        return max(self.highest, -self.lowest, 0.0)

    def start(self, first: Tensor | None = None) -> None:
        """Multiply random vectors next; *first* [P] instead of the first of them. All are made orthogonal to the basis."""
        for i in range(self.block_size):
            self._put(self.n + i, first if i == 0 else None)

    def grow(self) -> None:
        """Multiply the next block."""
        b, n = self.block_size, self.n
        known = n + b
        found = products(self.op, self._basis[n:known], self._owner)
        self.n_matvec += b
        sizes = agree(norms(found), self.op.group)
        if not bool(torch.isfinite(sizes).all()):
            raise FloatingPointError(f"{self._owner}: a product is too large for {self.op.dtype}")
        self._largest = max(self._largest, float(sizes.max()))
        along = remove(self._basis[:known], found)
        along += remove(self._basis[:known], found)  # twice is enough (Kahan; in Parlett 1980, section 6-9)
        made = self._next(found, known)
        self._basis[known : known + b] = same(self._basis[known : known + b], along, self.op.group)
        along, made = agree(along, self.op.group), agree(made, self.op.group)
        along[n:] = (along[n:] + along[n:].T) / 2
        self._t[:known, n:known] = along
        self._t[n:known, :known] = along.T
        self._coupling = torch.cat([torch.zeros(b, n, dtype=torch.float64), made], dim=1)
        self._dropped = [torch.cat([c, torch.zeros(len(c), b, dtype=torch.float64)], dim=1) for c in self._dropped]
        self.n = known

    def ritz(self, locked: int = 0) -> Ritz:
        """The Ritz pairs: without the first *locked* basis vectors, of the operator on what is orthogonal to them."""
        values, inside = torch.linalg.eigh(self._t[locked : self.n, locked : self.n])
        weights = torch.cat([torch.zeros(locked, len(values), dtype=torch.float64), inside])
        residuals = (self._coupling @ weights).norm(dim=0)
        for coupling in self._dropped if not locked else []:
            residuals = residuals + (coupling @ weights).norm(dim=0)
        packed = agree(torch.cat([values[None], residuals[None], weights]), self.op.group)
        ritz = Ritz(packed[0], packed[2:], packed[1])
        self.lowest = min(self.lowest, float(ritz.values[0]))
        self.highest = max(self.highest, float(ritz.values[-1]))
        return ritz

    def restart(self, weights: Tensor, *, fresh: bool = False) -> None:
        """Keep the combinations of the basis vectors with the orthonormal columns of *weights* [n, kept]; Ritz vectors, say.

        fresh: go on with one random vector at a time instead of what would come next, which is remembered as a part of the
        residuals that further products do not make smaller.
        """
        n, b, kept = self.n, self.block_size, weights.shape[1]
        combine_(weights.T, self._basis[:n])
        t = weights.T @ self._t[:n, :n] @ weights
        self._t[:kept, :kept] = (t + t.T) / 2
        self._dropped = [coupling @ weights for coupling in self._dropped]
        self.n = kept
        if fresh:
            self._dropped.append(self._coupling @ weights)
            self.block_size = 1
            self.start()
        else:
            self._basis[kept : kept + b] = self._basis[n : n + b].clone()

    def vectors(self, ritz: Ritz, indices: Tensor) -> Tensor:
        """Ritz vectors, [k, P], orthonormal to the rounding of their type."""
        x = combine(ritz.weights[:, indices].T, self._basis[: self.n])
        eye = torch.eye(len(x), dtype=torch.float64)
        x = combine(eye - (inner(x, x) - eye) / 2, x)
        return same(x, inner(x, self._basis[: self.n]), self.op.group)

    def trail(self, at: float, locked: int) -> Tensor:
        """x' v for the basis vectors v after the first *locked*, in multiples of x' F, F being the vector to multiply next.

        x: any eigenvector, with eigenvalue *at*, of the operator on what is orthogonal to the first *locked* vectors. The
        block size must be 1.
        """
        t = self._t[locked : self.n, locked : self.n]
        values, vectors = torch.linalg.eigh(t)
        shares: Tensor = -vectors @ ((vectors.T @ self._coupling[0, locked:]) / (values - at))
        return shares

    def _next(self, found: Tensor, place: int) -> Tensor:
        """Make the rows of *found* orthonormal, at *place* of the basis; gives them as combinations of those, [b, b].

        Random rows take the place of those that depend on others.
        """
        made = torch.zeros(len(found), len(found), dtype=torch.float64)
        noise = BREAKDOWN * torch.finfo(self.op.dtype).eps * self._largest
        for i, row in enumerate(found):
            end = place + i
            for _ in range(2):
                made[:i, i] += remove(self._basis[place:end], row[None])[:, 0]
            length = agree(float(norms(row[None])), self.op.group)
            if length > noise:
                made[i, i] = length
                self._put(end, row)
            else:
                self._put(end, None)
        return made

    def _put(self, place: int, vector: Tensor | None) -> None:
        """Make *vector*, or a random one, orthogonal to the basis vectors before *place*, and the unit vector at *place*."""
        row = self._basis[place : place + 1]
        row.copy_(self._random.normal(1) if vector is None else vector[None])
        row /= float(norms(row))
        while True:
            remove(self._basis[:place], row)
            length = agree(float(norms(row)), self.op.group)
            if length < 1e-3:  # nearly nothing of it is new
                row.copy_(self._random.normal(1))
                length = float(norms(row))
            row /= length
            if 0.7071 < length < 1.0001:
                return


def eigsh(
    op: Operator,
    k: int = 10,
    which: Which = "LA",
    *,
    tol: float = 1e-6,
    max_matvec: int = 1000,
    block_size: int = 1,
    seed: int = 0,
    v0: Tensor | None = None,
    basis_size: int | None = None,
    verify: bool | None = None,
) -> Eigenpairs:
    """*k* eigenvalues from an end of the spectrum of *op* (P, P), and their eigenvectors.

    which: ``"LA"`` the largest, ``"SA"`` the smallest, ``"LM"`` those of the largest size, ``"BE"`` half of them from either
    end (one more from the upper end if k is odd).
    k: from 1 to P. tol: an eigenpair is good when its residual is at most tol * max|Ritz value|; at least eps of the
    operator's type. The error of the value is then about residual^2 / gap.
    max_matvec: products at most; at least k + block_size - 1. Where they do not suffice, the result says ``converged=False``
    and there is a warning.
    block_size: products at a time. A block of b finds eigenvalues that occur up to b times, at the price of more products; for
    operators to which a product with b vectors is hardly more work than one with a single vector.
    seed: of all random vectors. v0: [P], the first vector; None: a random one.
    basis_size: vectors that are kept in memory, besides a block; None: max(2k + 10, 24, k + 3 block_size).
    verify: search, from a fresh random vector orthogonal to the eigenvectors, for copies of eigenvalues that one Krylov space
    cannot show, until there are none or the chance that one was overlooked is below 0.1 %. None: with block_size=1 only.

    A matrix with P not above basis_size + 2 block_size is computed as a whole, by P products.
    With a process group all ranks call this together and get the same.
    Raises ValueError for values out of range, FloatingPointError if a product is not finite.

    >>> from conjugo.curvature import from_matvec
    >>> sizes = torch.arange(1.0, 1001.0, dtype=torch.float64)
    >>> found = eigsh(from_matvec(lambda v: sizes * v, 1000, dtype=torch.float64), 3)
    >>> [round(value, 6) for value in found.values.tolist()], found.converged, tuple(found.vectors.shape)
    ([1000.0, 999.0, 998.0], True, (3, 1000))
    """
    _check(op, k, which, tol, max_matvec, block_size, v0)
    room = max(2 * k + 10, 24, k + 3 * block_size) if basis_size is None else basis_size
    fewest = k + 2 * block_size
    check(room >= fewest, "eigsh", "basis_size", room, f">= k + 2 block_size = {fewest}, or None")
    if op.size <= room + 2 * block_size:
        check(max_matvec >= op.size, "eigsh", "max_matvec", max_matvec, f">= {op.size} for so small a matrix")
        return _all_of_it(op, k, which)
    verify = block_size == 1 if verify is None else verify
    krylov = Krylov(op, room, block_size, Random(op, seed), "eigsh")
    krylov.start(v0)
    # What is given up when the search for copies begins must not use up all of the tolerance.
    target = tol / 2 if verify else tol
    ritz, chosen = _solve(krylov, k, which, target, max_matvec)
    verified = False
    while verify and not verified and krylov.n_matvec < max_matvec and _within(krylov, ritz, chosen, target):
        krylov.restart(ritz.weights[:, chosen], fresh=True)
        verified = _no_copies(krylov, ritz.values[chosen], which, tol, max_matvec)
        ritz = krylov.ritz()
        chosen = select(ritz.values, k, which)
        if krylov.n_matvec < max_matvec and not (verified and _within(krylov, ritz, chosen, tol)):
            ritz, chosen = _solve(krylov, k, which, target, max_matvec)
    converged = _within(krylov, ritz, chosen, tol)
    residuals = ritz.residuals[chosen]
    if not converged:
        limit = tol * krylov.scale
        warnings.warn(
            f"eigsh: after {krylov.n_matvec} products {int((residuals > limit).sum())} of {k} residuals are above "
            f"tol * max|theta| = {limit:.3g} (the largest: {float(residuals.max()):.3g}); raise max_matvec or tol",
            stacklevel=2,
        )
    return Eigenpairs(
        ritz.values[chosen], krylov.vectors(ritz, chosen), residuals, converged, verified, krylov.n_matvec
    )


def select(values: Tensor, k: int, which: Which) -> Tensor:
    """Indices of the *k* wanted ones of ascending *values* [n], n >= k, the largest value first."""
    order = torch.arange(len(values)).flip(0)
    if which == "LA":
        return order[:k]
    if which == "SA":
        return order[len(order) - k :]
    if which == "BE":
        return torch.cat([order[: (k + 1) // 2], order[len(order) - k // 2 :]])
    return values.abs().argsort(descending=True, stable=True)[:k].sort(descending=True).values


def _check(op: Operator, k: int, which: Which, tol: float, max_matvec: int, block_size: int, v0: Tensor | None) -> None:
    check(op.dtype in (torch.float32, torch.float64), "eigsh", "the dtype of op", op.dtype, "float32 or float64")
    check(1 <= k <= op.size, "eigsh", "k", k, f"from 1 to P = {op.size}")
    if which not in get_args(Which):
        unknown("eigsh which", which, get_args(Which))
    eps = torch.finfo(op.dtype).eps
    check(eps <= tol < 1, "eigsh", "tol", tol, f"in [{eps:.2g}, 1), where {eps:.2g} is the rounding of {op.dtype}")
    check(block_size >= 1, "eigsh", "block_size", block_size, ">= 1")
    fewest = k + block_size - 1
    check(max_matvec >= fewest, "eigsh", "max_matvec", max_matvec, f">= k + block_size - 1 = {fewest}")
    if v0 is not None:
        check(tuple(v0.shape) == (op.size,), "eigsh", "the shape of v0", tuple(v0.shape), f"({op.size},)")
        check(v0.dtype == op.dtype, "eigsh", "the dtype of v0", v0.dtype, str(op.dtype))
        check(v0.device == op.device, "eigsh", "the device of v0", str(v0.device), str(op.device))
        length = float(norms(v0.detach()[None]))
        check(0 < length < math.inf, "eigsh", "the length of v0", length, "positive and finite")


def _all_of_it(op: Operator, k: int, which: Which) -> Eigenpairs:
    """From the whole matrix."""
    before = op.n_matvec
    dense = agree(op.to_dense(rows_at_once=ROWS).cpu().to(torch.float64), op.group)
    if not bool(torch.isfinite(dense).all()):
        raise FloatingPointError(f"eigsh: a product of {type(op).__name__} is not finite")
    values, vectors = torch.linalg.eigh(dense)
    packed = agree(torch.cat([values[None], vectors]), op.group)
    values, vectors = packed[0], packed[1:]
    chosen = select(values, k, which)
    rows = vectors.T[chosen]
    residuals = (rows @ dense - values[chosen, None] * rows).norm(dim=1)
    rows = rows.to(op.dtype).to(op.device)
    return Eigenpairs(values[chosen], rows, residuals, True, True, op.n_matvec - before)


def _solve(krylov: Krylov, k: int, which: Which, tol: float, max_matvec: int) -> tuple[Ritz, Tensor]:
    """Go on until *k* eigenpairs are good to *tol* or there are *max_matvec* products; all Ritz pairs, and which are wanted."""
    while True:
        if krylov.n + krylov.block_size > krylov.room:
            ritz = krylov.ritz()
            kept = min(k + (krylov.room - k) // 2, krylov.room - krylov.block_size)
            krylov.restart(ritz.weights[:, select(ritz.values, kept, which)])
        krylov.grow()
        last = krylov.n_matvec + krylov.block_size > max_matvec
        if krylov.n >= k and (last or krylov.n_matvec // krylov.block_size % max(1, krylov.n // 64) == 0):
            ritz = krylov.ritz()
            chosen = select(ritz.values, k, which)
            if last or _within(krylov, ritz, chosen, tol):
                return ritz, chosen


def _within(krylov: Krylov, ritz: Ritz, chosen: Tensor, tol: float) -> bool:
    return bool((ritz.residuals[chosen] <= tol * krylov.scale).all())


def _no_copies(krylov: Krylov, found: Tensor, which: Which, tol: float, max_matvec: int) -> bool:
    """Whether no wanted eigenvalue is missing among those *found* (descending; their vectors are the first of the basis).

    A unit vector r at random has with a unit eigenvector x, in P dimensions, |r' x| < t with a chance of about t sqrt(2P/pi).
    How much of an eigenvector with a given eigenvalue r can contain follows from the Lanczos matrix: Krylov.trail is to have
    at most unit length. (For one Krylov space that is the Christoffel function: the largest mass that a measure with these
    moments can have at a point.)

    False as soon as there is one, or after *max_matvec* products.
    """
    k = len(found)
    largest_overlap = OVERLOOKED * math.sqrt(math.pi / (2 * krylov.op.size))
    ends = _ends(found, which)
    shares = [1.0] * len(ends)
    """For an eigenvector x beyond either end: r' x divided by x' v, where v is the basis vector *start*."""
    start = k
    while True:
        if krylov.n == krylov.room:
            ritz = krylov.ritz(k)
            shares = [
                share * float(krylov.trail(limit + sign * tol * krylov.scale, k)[start - k])
                for share, (sign, limit) in zip(shares, ends, strict=True)
            ]
            kept = select(ritz.values, (krylov.room - k) // 2, "BE" if len(ends) == 2 else which)
            held = torch.eye(krylov.n, k, dtype=torch.float64)
            krylov.restart(torch.cat([held, ritz.weights[:, kept]], dim=1))
            start = krylov.n
        krylov.grow()
        ritz = krylov.ritz(k)
        small = tol * krylov.scale
        overlaps = []
        for share, (sign, limit) in zip(shares, ends, strict=True):
            outermost = -1 if sign > 0 else 0
            if sign * (float(ritz.values[outermost]) - limit) > small:
                return False
            if float(ritz.residuals[outermost]) > small:  # else the next eigenvalue is known: it is not a copy
                trail = krylov.trail(limit + sign * small, k)
                overlap = abs(share * float(trail[start - k] / trail.norm()))
                overlaps.append(overlap if math.isfinite(overlap) else 1.0)
        if agree(max(overlaps, default=0.0), krylov.op.group) <= largest_overlap:
            return True
        if krylov.n_matvec + 1 > max_matvec:
            return False


def _ends(found: Tensor, which: Which) -> list[tuple[float, float]]:
    """Where the eigenvalues *found* (descending) leave off: (1, limit) if none beyond it is missing, (-1, limit) below it."""
    k = len(found)
    if which == "LA":
        return [(1.0, float(found[-1]))]
    if which == "SA":
        return [(-1.0, float(found[0]))]
    if which == "LM":
        size = float(found.abs().min())
        return [(1.0, size), (-1.0, -size)]
    upper = (k + 1) // 2
    above = [(1.0, float(found[upper - 1]))]
    return above if upper == k else [*above, (-1.0, float(found[upper]))]
