"""Preconditioners that treat a weight as a matrix: orthogonalised gradients, and Adam in an eigenbasis.

A weight [out, in, ...] is the matrix [out, in * ...]: a kernel of a convolution has a row for each channel that it makes.
What is no matrix (vectors, complex parameters, and what the option *matrices* leaves out) gets Adam's scaling. The matrices
must be whole on each rank: one process or DDP, without ``shard_state``.
"""

from __future__ import annotations

import functools
import logging
import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from conjugo._space import is_dtensor
from conjugo.errors import check
from conjugo.optim._base import state_dtype
from conjugo.optim.adaptive_preconditioner import AdamDiagonal, State, counter, one_of
from conjugo.optim.preconditioners import Block, Secant

__all__ = ["Kronecker", "MatrixPreconditioner", "Orthogonal", "orthogonalized"]

T = TypeVar("T")

_log = logging.getLogger(__name__)

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""x <- a x + b x^3 + c x^5 on all singular values at once (Jordan et al. 2024): steep at 0, and then near 1, not at 1."""

_TYPES = (torch.bfloat16, torch.float32, torch.float64)

_BATCH = 2**22
"""Most values of matrices of one shape that are worked on at once; it bounds temporary memory."""


_BLOCK = 256
"""Least side of a block of a symmetric product that is worth a call of its own."""


@dataclass(frozen=True, kw_only=True)
class MatrixPreconditioner(AdamDiagonal):
    """Base class: matrices in the way of the subclass, all else as :class:`AdamDiagonal`.

    Which is which is settled when the optimizer is made, and then seen from the names of the state.

    matrices: says of a parameter with two dimensions or more whether it is one of the matrices; None: by its shape, as the
    subclass says. Pickling the optimizer wants a function of a module, or None.
    """

    beta2: float = 0.95
    matrices: Callable[[Tensor], bool] | None = None

    @abstractmethod
    def suits(self, rows: int, columns: int) -> bool:
        """Whether a matrix of this shape is one to begin with, unless *matrices* decides."""

    @abstractmethod
    def matrix_state(self, p: Tensor) -> dict[str, Tensor]:
        """The state of a matrix."""

    @abstractmethod
    def treats(self, state: State) -> bool:
        """Whether *state* is that of a matrix."""

    def is_matrix(self, p: Tensor) -> bool:
        """Whether *p* is one of the matrices; complex and empty parameters and vectors never are."""
        if p.is_complex() or p.ndim < 2 or p.numel() == 0:
            return False
        return self.suits(*shape_of(p)) if self.matrices is None else bool(self.matrices(p))

    def init_state(self, p: Tensor) -> dict[str, Tensor]:
        """By :meth:`matrix_state` or as Adam's; raises ValueError for a matrix that is cut over ranks."""
        if not self.is_matrix(p):
            return super().init_state(p)
        given = f"one of shape {list(p.shape)} that is cut over ranks"
        accepted = (
            "whole on every rank: take DDP without shard_state instead of FSDP, tensor parallelism or shard_state; "
            "precond='adam' or 'bfgs'; or matrices=..., a function that is false for it"
        )
        check(_is_whole(p), self._name, "the matrices", given, accepted)
        return self.matrix_state(p)

    def diagonal(self, state: Mapping[str, Tensor]) -> Tensor | None:
        """None: P as a whole is not diagonal."""
        return None

    def parts(self, block: Block) -> tuple[list[int], list[int]]:
        """Numbers of the matrices of *block*, and of all else."""
        if "parts" not in block.memo:
            found: tuple[list[int], list[int]] = [], []
            for i, state in enumerate(block.states):
                found[not self.treats(state)].append(i)
            block.memo["parts"] = found
        parts: tuple[list[int], list[int]] = block.memo["parts"]
        return parts


@dataclass(frozen=True, kw_only=True)
class Orthogonal(MatrixPreconditioner):
    r"""P g = scale sqrt(max(rows, columns)) times the orthogonal factor of the gradient, about U V^T for g = U S V^T.

    The factor comes from *steps* Newton-Schulz steps, which are matrix products only. After five of them the singular values
    of g that are at least 1/1000 of its norm have become numbers in [0.65, 1.25]; smaller ones are still smaller. With the
    default *scale* the root mean square of P g is about 0.2, as large as an update of Adam.

    P depends on g. It is :math:`P_g u = q(g g^T) u` with a polynomial q > 0: for each g a symmetric positive definite map. So
    :math:`\langle g, P_g g \rangle > 0`, close to the sum of the singular values (the nuclear norm), and -P g descends. It
    grows with the loss, while P g does not depend on the scale of the loss at all. The Polak-Ribiere rule takes
    :math:`\langle g, P_{g'} g' \rangle`, what P made of the previous gradient; the factor is worked out once more for
    that, at twice the cost. What does not hold is what needs one map P for all vectors: conjugacy, and the end after n steps
    on a quadratic. The size of P g does not fall along a run, so that beta is near 1: set *beta_max* below 1.

    steps: Newton-Schulz steps, >= 1. scale: above 0. matrices: default: those with at least 16 rows and 16 columns, of which
    the one is not more than 8 times the other; others are taken for embeddings and heads. A head with many classes cannot be
    told from its shape: leave it out by ``matrices=lambda p: p.ndim > 1 and p is not model.head.weight``. beta2, eps: of Adam's
    scaling for all else.

    dtype: of the matrix products; None: float64 for float64 parameters, else float32 on a CPU and bfloat16 elsewhere. bfloat16
    is right to about 1 %, and twice as fast on CPUs that have instructions for it. Matrices of one shape in a group run at
    once. State of a matrix: none; of all else as :class:`AdamDiagonal`.

    Sources: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; the scale: J. Liu et al.,
    "Muon is Scalable for LLM Training", arXiv:2502.16982.
    """

    steps: int = 5
    scale: float = 0.2
    dtype: torch.dtype | None = None

    SMALLEST: ClassVar[int] = 16
    """Least rows and columns of a matrix, by default."""
    LONGEST: ClassVar[int] = 8
    """Largest ratio of the two, by default."""

    def __post_init__(self) -> None:
        """Check the options; raises ``ValueError``."""
        super().__post_init__()
        check(_is_count(self.steps), self._name, "steps", self.steps, "an integer >= 1")
        check(0 < self.scale < math.inf, self._name, "scale", self.scale, "in (0, inf)")
        check(self.dtype in (None, *_TYPES), self._name, "dtype", self.dtype, f"None or one of {_TYPES}")

    def suits(self, rows: int, columns: int) -> bool:
        """At least 16 rows and columns, and nearly square."""
        low, high = sorted((rows, columns))
        return low >= self.SMALLEST and high <= self.LONGEST * low

    def matrix_state(self, p: Tensor) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def treats(self, state: State) -> bool:
        """A matrix has no mean of squares."""
        return "square" not in state

    def update(self, block: Block, secant: Secant) -> None:
        """Adam's, for all that is no matrix."""
        _, others = self.parts(block)
        states, gradients = _picked(block.states, others), _picked(block.gradients, others)
        self.learn_squares(states, gradients, secant.finite, block.foreach)

    def apply(self, block: Block, vectors: list[Tensor], fresh: Tensor) -> list[Tensor]:
        """The scaled orthogonal factor of each matrix."""
        matrices, others = self.parts(block)
        results = list(vectors)
        divided = self.divided(_picked(block.states, others), _picked(vectors, others), block.foreach)
        for i, z in zip(others, divided, strict=True):
            results[i] = z
        alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i in matrices:
            alike[tuple(sorted(shape_of(vectors[i])))].append(i)
        for (low, high), indices in alike.items():
            at_once = max(1, _BATCH // (low * high))
            for start in range(0, len(indices), at_once):
                self._orthogonalize(vectors, results, indices[start : start + at_once], self.scale * math.sqrt(high))
        return results

    def _orthogonalize(self, vectors: list[Tensor], results: list[Tensor], indices: list[int], scale: float) -> None:
        """Put the factors of the matrices *indices*, of one shape or that transposed, times *scale* into *results*."""
        wide = [_wide(vectors[i]) for i in indices]
        batch = torch.stack(wide) if len(wide) > 1 else wide[0][None]
        factors = orthogonalized(batch, self.steps, scale=scale, dtype=self.dtype)
        for i, factor in zip(indices, factors.unbind(), strict=True):
            rows, columns = shape_of(vectors[i])
            z = (factor if rows <= columns else factor.mT).reshape(vectors[i].shape)
            same = z.stride() == vectors[i].stride()
            results[i] = z if same else torch.empty_like(vectors[i]).copy_(z)


def orthogonalized(matrices: Tensor, steps: int = 5, *, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
    """*scale* times about U V^T for each of *matrices* = U S V^T, [n, rows, columns], by *steps* Newton-Schulz steps.

    The result does not depend on the size of a matrix, however small or large; 0 becomes 0, and what is not finite too. It
    has the type of *matrices*, float32 or float64. dtype: in which products are taken, see :class:`Orthogonal`.

    >>> orthogonalized(torch.tensor([[[3.0, 0.0], [0.0, -2.0]]])).diagonal(dim1=1, dim2=2).sign()
    tensor([[ 1., -1.]])
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    peak = torch.linalg.vector_norm(x, math.inf, dim=(-2, -1), keepdim=True)
    usable = torch.isfinite(peak) & (peak > 0)
    x = x / torch.where(usable, peak, 1.0)
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x = (x / torch.where(usable, norm, 1.0)).masked_fill_(~usable, 0.0)
    if dtype is None:
        dtype = torch.bfloat16 if x.device.type != "cpu" and x.dtype == torch.float32 else x.dtype
    x = x.to(dtype)
    a, b, c = _COEFFICIENTS
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.to(matrices.dtype).mul_(scale)
    return x.mT if tall else x


@dataclass(frozen=True, kw_only=True)
class Kronecker(MatrixPreconditioner):
    r"""Adam's scaling in the eigenbasis of two running means, of g g^T and of g^T g.

    With Q and R the eigenvectors of these, :math:`P g = Q \frac{Q^T g R}{\sqrt{v} + \mathrm{damping}\,\mathrm{rms}(v)
    + \mathrm{eps}} R^T`, where v is the running mean of the squares of :math:`Q^T g R`, corrected for its start, and rms(v)
    the root of its mean over the matrix. P is linear and symmetric positive definite, and changes slowly. As with
    :class:`AdamDiagonal` the step does not change with the scale of the loss, and beta is near 1: set *beta_max* below 1.

    A step uses means and basis of the steps before, so that no gradient is seen in a basis that it made itself. Hence the
    first step of a parameter only learns: P g = 0, and nothing moves. The second one finds the eigenvectors, every *period*
    steps later one step of the power iteration with a QR decomposition follows them. Where no gradient has shown anything yet
    the basis is arbitrary.

    decay: part of the old means of g g^T and g^T g in new ones, in [0, 1). period: >= 1. damping: >= 0. max_dim: a side with
    more rows or columns than that keeps the identity as its basis, and so does one with a single row; where both sides do,
    the parameter gets Adam's scaling; >= 1. A process logs such a shape once. matrices: default: all parameters with two
    dimensions or more. beta2: of v and of Adam's scaling for all else. eps: as there.

    State of a matrix [m, n]: ``square`` [m, n]; ``left`` and ``left_basis`` [m, m]; ``right`` and ``right_basis`` [n, n],
    if those sides have a basis; 0-d in float64 ``updates``, gradients learned, ``renewed``, the number of those when the basis
    was last renewed, and ``bad_updates``, gradients whose squares overflow, which are left out, and bases that could not be
    found. The host looks at these counts twice in *period* steps, and waits for the device then.

    Source: N. Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", arXiv:2409.11321; the relative damping is
    ours.
    """

    decay: float = 0.95
    period: int = 10
    damping: float = 0.03
    max_dim: int = 2048

    def __post_init__(self) -> None:
        """Check the options; raises ``ValueError``."""
        super().__post_init__()
        check(0 <= self.decay < 1, self._name, "decay", self.decay, "in [0, 1)")
        check(_is_count(self.period), self._name, "period", self.period, "an integer >= 1")
        check(0 <= self.damping < math.inf, self._name, "damping", self.damping, "in [0, inf)")
        check(_is_count(self.max_dim), self._name, "max_dim", self.max_dim, "an integer >= 1")

    def suits(self, rows: int, columns: int) -> bool:
        """Always."""
        return True

    def is_matrix(self, p: Tensor) -> bool:
        """Whether *p* is one of the matrices, and a side of it has a basis."""
        return super().is_matrix(p) and any(self._has_basis(size) for size in shape_of(p))

    def _has_basis(self, size: int) -> bool:
        return 1 < size <= self.max_dim

    def init_state(self, p: Tensor) -> dict[str, Tensor]:
        """As the base class; a side that is too large for a basis is logged."""
        if super().is_matrix(p):
            _log_too_large(shape_of(p), self.max_dim)
        return super().init_state(p)

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

    def treats(self, state: State) -> bool:
        """A matrix has a basis."""
        return "left" in state or "right" in state

    def update(self, block: Block, secant: Secant) -> None:
        """Renew the bases that are due, learn the squares in them, then the means that make the next ones."""
        matrices, others = self.parts(block)
        states, gradients = _picked(block.states, others), _picked(block.gradients, others)
        self.learn_squares(states, gradients, secant.finite, block.foreach)
        states = _picked(block.states, matrices)
        self._renew_due(block, states, secant.finite)
        block.memo["learned"] = [
            self._learn(state, g, secant.finite)
            for state, g in zip(states, _picked(block.gradients, matrices), strict=True)
        ]

    def apply(self, block: Block, vectors: list[Tensor], fresh: Tensor) -> list[Tensor]:
        """Into the basis, divided, and back; 0 where nothing but a first gradient was learned."""
        matrices, others = self.parts(block)
        known = block.memo.pop("learned", None) if vectors is block.gradients else None
        results = list(vectors)
        divided = self.divided(_picked(block.states, others), _picked(vectors, others), block.foreach)
        for i, z in zip(others, divided, strict=True):
            results[i] = torch.where(block.states[i]["updates"] > 1, z, 0.0)
        for at, i in enumerate(matrices):
            state, vector = block.states[i], vectors[i]
            rotated, good = known[at] if known else (_into(state, _matrix(vector)), None)
            allowed = state["updates"] > 1
            root = self._root(state, allowed if good is None else allowed & good)
            z = _out_of(state, rotated / root).view(vector.shape)
            results[i] = z if z.stride() == vector.stride() else torch.empty_like(vector).copy_(z)
        return results

    def _root(self, state: State, allowed: Tensor) -> Tensor:
        """What the rotated gradient is divided by; infinity where not *allowed*, 0-d."""
        v = _matrix(state["square"])
        lacking = self.correction(state["updates"] - 1).to(v.dtype)
        least = one_of(allowed, self.eps, math.inf, v.dtype) + self.damping * v.mean().sqrt() / lacking
        return torch.addcmul(least, v.sqrt(), 1 / lacking)

    def _learn(self, state: State, gradient: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
        """Take a gradient, which is 0 where not *finite*, into the means, in place.

        What it is in the basis, and whether its squares are finite.
        """
        g = _matrix(gradient)
        good = torch.isfinite(torch.linalg.vector_norm(g).square())
        learned = finite & good
        rotated = _into(state, g)
        rate = one_of(learned & (state["updates"] > 0), 1 - self.beta2, 0.0, g.dtype)
        part = rotated * rate.sqrt()  # 0 where nothing is learned: no square may overflow
        _matrix(state["square"]).mul_(1 - rate).addcmul_(part, part)
        rate = one_of(learned, 1 - self.decay, 0.0, g.dtype)
        part = g * rate.sqrt()
        if "left" in state:
            _add_gram(state["left"].mul_(1 - rate), part)
        if "right" in state:
            _add_gram(state["right"].mul_(1 - rate), part.mT)
        state["updates"].add_(learned)
        state["bad_updates"].add_(finite & ~good)
        return rotated, good

    def _renew_due(self, block: Block, states: Sequence[State], finite: Tensor) -> None:
        """Renew the bases whose time has come. Reads counts from the device when it may have."""
        if not states:
            return
        wait = block.memo.get("wait", 0)
        if wait:
            block.memo["wait"] = wait - 1
            return
        counts = torch.stack([torch.stack([state["updates"], state["renewed"]]) for state in states]).tolist()
        waits = []
        for state, (updates, renewed) in zip(states, counts, strict=True):
            if updates >= 1 and (renewed == 0 or updates >= renewed + self.period):
                self._renew(state, first=renewed == 0, finite=finite)
                waits.append(0)  # the step may be one that is skipped
            else:
                waits.append(int(renewed + self.period - updates - 1) if renewed else 0)
        block.memo["wait"] = min(waits)

    def _renew(self, state: State, *, first: bool, finite: Tensor) -> None:
        """New bases from the means; nothing changes where not *finite*, where there is only 0, or where none is found."""
        found, some, changes = finite, finite, []
        v = _matrix(state["square"])
        for dim, side in enumerate(("left", "right")):
            if side not in state:
                continue
            mean, basis = state[side], state[f"{side}_basis"]
            peak = mean.diagonal().amax()  # the largest value of all
            mean = mean / torch.where(peak > 0, peak, 1.0)
            if first:
                new = _eigenvectors(mean)
            else:
                turned = mean @ basis
                order = (basis * turned).sum(0).argsort(descending=True, stable=True)
                new = _orthonormalized(turned[:, order])
                v = v.index_select(dim, order)
            some = some & (peak > 0)
            found = found & (peak > 0) & torch.isfinite(new).all()
            changes.append((basis, new))
        for old, new in [*changes, (_matrix(state["square"]), v)]:
            old.copy_(torch.where(found, new, old))
        state["renewed"].copy_(torch.where(found, state["updates"], state["renewed"]))
        state["bad_updates"].add_(some & ~found)


def _into(state: State, matrix: Tensor) -> Tensor:
    """Q^T M R."""
    if "left_basis" in state:
        matrix = state["left_basis"].mT @ matrix
    return matrix @ state["right_basis"] if "right_basis" in state else matrix


def _out_of(state: State, matrix: Tensor) -> Tensor:
    """Q M R^T."""
    if "left_basis" in state:
        matrix = state["left_basis"] @ matrix
    return matrix @ state["right_basis"].mT if "right_basis" in state else matrix


def _add_gram(total: Tensor, matrix: Tensor) -> None:
    """total <- total + M M^T, in place. What is above the diagonal is the same as below, and large blocks of it are copied."""
    half = len(total) // 2
    if half < _BLOCK:
        total.addmm_(matrix, matrix.mT)
        return
    upper, lower = matrix[:half], matrix[half:]
    _add_gram(total[:half, :half], upper)
    _add_gram(total[half:, half:], lower)
    cross = upper @ lower.mT
    total[:half, half:] += cross
    total[half:, :half] += cross.mT


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


def shape_of(p: Tensor) -> tuple[int, int]:
    """Rows and columns of the matrix that *p*, [out, ...], is."""
    return p.shape[0], math.prod(p.shape[1:])


def _matrix(tensor: Tensor) -> Tensor:
    """[rows, columns], contiguous; a view of contiguous tensors."""
    return tensor.reshape(shape_of(tensor)).contiguous()


def _wide(tensor: Tensor) -> Tensor:
    """The matrix, or its transpose, with no more rows than columns."""
    matrix = tensor.reshape(shape_of(tensor))
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def _is_whole(p: Tensor) -> bool:
    if not is_dtensor(p):
        return True
    return all(q.is_replicate() or p.device_mesh.size(i) == 1 for i, q in enumerate(p.placements))


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


def _picked(items: Sequence[T], indices: Sequence[int]) -> list[T]:
    return [items[i] for i in indices]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
