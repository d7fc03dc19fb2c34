"""Orthogonalised gradients of matrices."""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from conjugo.errors import check
from conjugo.optim._matrix_products import TYPES, on_host, product_type, stacked, symmetric_product, together
from conjugo.optim.adaptive_preconditioner import State
from conjugo.optim.matrix_preconditioners import Matrices, MatrixPreconditioner, is_count, shape_of

__all__ = ["Orthogonal", "orthogonalized"]

_log = logging.getLogger(__name__)

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""x <- a x + b x^3 + c x^5 on all singular values at once (Jordan et al. 2024): steep at 0, and then near 1, not at 1."""


@dataclass(frozen=True, kw_only=True)
class Orthogonal(MatrixPreconditioner):
    r"""P g = scale sqrt(max(rows, columns)) times the orthogonal factor of the gradient, about U V^T for g = U S V^T.

    The factor comes from *steps* Newton-Schulz steps, which are matrix products only. After five of them the singular values
    of g that are at least 1/700 of its norm have become numbers in [0.65, 1.25]; smaller ones are still smaller. With the
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
    scaling for all else. max_dim: a matrix with more rows or columns gets Adam's scaling too; >= 1. A process logs such a
    shape once.

    dtype: of the matrix products; None: float64 for float64 parameters; else bfloat16, but float32 for matrices smaller than
    about 128 x 256 or 160 x 160, where it saves no time, and on CPUs without instructions for it. bfloat16 is right to about
    1 %, and takes half the time for large ones. Where processes on different CPUs share the work, name a type. Matrices of one
    shape in a group run at once. State of a matrix: none; of all else as :class:`AdamDiagonal`.

    Sources: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; the scale: J. Liu et al.,
    "Muon is Scalable for LLM Training", arXiv:2502.16982.
    """

    steps: int = 5
    scale: float = 0.2
    dtype: torch.dtype | None = None
    max_dim: int = 16384

    SMALLEST: ClassVar[int] = 16
    """Least rows and columns of a matrix, by default."""
    LONGEST: ClassVar[int] = 8
    """Largest ratio of the two, by default."""

    def __post_init__(self) -> None:
        """Check the options; raises ``ValueError``."""
        super().__post_init__()
        check(is_count(self.steps), self._name, "steps", self.steps, "an integer >= 1")
        check(0 < self.scale < math.inf, self._name, "scale", self.scale, "in (0, inf)")
        check(self.dtype in (None, *TYPES), self._name, "dtype", self.dtype, f"None or one of {TYPES}")
        check(is_count(self.max_dim), self._name, "max_dim", self.max_dim, "an integer >= 1")

    def suits(self, rows: int, columns: int) -> bool:
        """At least 16 rows and columns, and nearly square."""
        low, high = sorted((rows, columns))
        return low >= self.SMALLEST and high <= self.LONGEST * low

    def is_matrix(self, p: Tensor) -> bool:
        """Whether *p* is one of the matrices, and not too large."""
        return super().is_matrix(p) and max(shape_of(p)) <= self.max_dim

    def state_of(self, p: Tensor, home: Tensor) -> dict[str, Tensor]:
        """As the base class; a matrix that is too large is logged."""
        if super().is_matrix(p):
            _log_too_large(shape_of(p), self.max_dim)
        return super().state_of(p, home)

    def matrix_state(self, p: Tensor) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def cost(self, rows: int, columns: int) -> float:
        """The products of the Newton-Schulz steps."""
        low, high = sorted((rows, columns))
        return self.steps * (4.0 * low**2 * high + 2.0 * low**3)

    def treats(self, state: State) -> bool:
        """A matrix has no mean of squares."""
        return "square" not in state

    def treat(self, matrices: Matrices, vectors: list[Tensor]) -> list[Tensor]:
        """The scaled orthogonal factor of each; matrices of one shape at once."""
        results = list(vectors)
        for indices in together(vectors):
            given = stacked([vectors[i] for i in indices])
            scale = self.scale * math.sqrt(max(given.shape[-2:]))
            found = orthogonalized(given, self.steps, scale=scale, dtype=self.dtype)
            for i, factor in zip(indices, found.unbind() if found.ndim == 3 else [found], strict=True):
                results[i] = factor.view(vectors[i].shape)
        return results


def orthogonalized(matrices: Tensor, steps: int = 5, *, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
    """*scale* times about U V^T for each of *matrices* = U S V^T, [..., rows, columns], by *steps* Newton-Schulz steps.

    One matrix or one list of such. The result does not depend on the size of a matrix, however small or large; 0 becomes 0,
    and what is not finite too. It has the type of *matrices*, float32 or float64. dtype: in which products are taken, see
    :class:`Orthogonal`.

    >>> orthogonalized(torch.tensor([[3.0, 0.0], [0.0, -2.0]])).diagonal().sign()
    tensor([ 1., -1.])
    """
    x = _normalized(matrices).to(product_type(matrices) if dtype is None else dtype)
    if x.ndim == 3 and x.shape[0] == 1:
        return _iterated(x[0], steps, scale)[None].to(matrices.dtype)
    return (_iterated(x, steps, scale) if x.ndim == 2 else _iterated_at_once(x, steps, scale)).to(matrices.dtype)


def _normalized(matrices: Tensor) -> Tensor:
    """New matrices, each divided by its Frobenius norm; 0 where it is 0 or not finite."""
    if matrices.ndim == 2 and on_host(matrices):
        norm = float(torch.linalg.vector_norm(matrices))
        if 1e-12 < norm < 1e12:  # no square is too large or too small
            return matrices * (1 / norm)
    tiny = torch.finfo(matrices.dtype).tiny
    peak = matrices.abs().amax((-2, -1), keepdim=True)  # several times as fast as the norm of that name
    x = (matrices / peak.clamp_(min=tiny)).nan_to_num_(0.0)
    return x.div_(torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_(min=tiny))


def _iterated(x: Tensor, steps: int, scale: float) -> Tensor:
    """Newton-Schulz steps on one matrix [rows, columns], which is lost; the result times *scale*."""
    a, b, c = _COEFFICIENTS
    rows, columns = x.shape
    wide, side = rows <= columns, min(rows, columns)
    gram, polynomial, new = x.new_empty(side, side), x.new_empty(side, side), torch.empty_like(x)
    for step in range(steps):
        factor = scale if step == steps - 1 else 1.0
        symmetric_product(x if wide else x.mT, out=gram)
        symmetric_product(gram, out=polynomial, base=gram, beta=b, alpha=c)
        if wide:
            torch.addmm(x, polynomial, x, beta=factor * a, alpha=factor, out=new)
        else:
            torch.addmm(x, x, polynomial, beta=factor * a, alpha=factor, out=new)
        x, new = new, x
    return x


def _iterated_at_once(x: Tensor, steps: int, scale: float) -> Tensor:
    """Newton-Schulz steps on each of several matrices [n, rows, columns]; the results times *scale*."""
    a, b, c = _COEFFICIENTS
    wide = x.shape[1] <= x.shape[2]
    for step in range(steps):
        factor = scale if step == steps - 1 else 1.0
        gram = torch.bmm(x, x.mT) if wide else torch.bmm(x.mT, x)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, *((polynomial, x) if wide else (x, polynomial)), beta=factor * a, alpha=factor)
    return x


@functools.cache
def _log_too_large(shape: tuple[int, int], limit: int) -> None:
    if max(shape) > limit:
        _log.info("Orthogonal: a matrix of shape %s has a side above max_dim=%d: Adam's scaling instead", shape, limit)
