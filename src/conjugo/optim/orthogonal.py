"""Orthogonalised gradients of matrices."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from conjugo.errors import check
from conjugo.optim.adaptive_preconditioner import State
from conjugo.optim.matrix_preconditioners import Matrices, MatrixPreconditioner, is_count, shape_of

__all__ = ["Orthogonal", "orthogonalized"]

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""x <- a x + b x^3 + c x^5 on all singular values at once (Jordan et al. 2024): steep at 0, and then near 1, not at 1."""

_TYPES = (torch.bfloat16, torch.float32, torch.float64)

_BATCH = 2**22
"""Most values of matrices of one shape that are worked on at once; it bounds temporary memory."""


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
        check(is_count(self.steps), self._name, "steps", self.steps, "an integer >= 1")
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

    def treat(self, matrices: Matrices, vectors: list[Tensor]) -> list[Tensor]:
        """The scaled orthogonal factor of each; matrices of one shape, or that transposed, at once."""
        results = list(vectors)
        alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, vector in enumerate(vectors):
            alike[tuple(sorted(shape_of(vector)))].append(i)
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
            results[i] = (factor if rows <= columns else factor.mT).reshape(vectors[i].shape)


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


def _wide(tensor: Tensor) -> Tensor:
    """The matrix, or its transpose, with no more rows than columns."""
    matrix = tensor.reshape(shape_of(tensor))
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
