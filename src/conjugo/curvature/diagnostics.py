"""Two questions about a loss near a point: how badly is it scaled, and does its gradient lie along the steepest directions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conjugo.curvature._blocks import ROWS, Random, inner, norms, require_finite
from conjugo.curvature._ranks import agree
from conjugo.curvature.eigenpairs import Eigenpairs, Krylov, eigsh
from conjugo.curvature.operator import Operator
from conjugo.errors import check

__all__ = ["Alignment", "ConditionNumber", "condition_number", "gradient_alignment"]

DENSE = 5000
"""P up to which a condition number is exact."""


@dataclass(frozen=True)
class ConditionNumber:
    """largest / smallest, of the sizes of an operator's eigenvalues above ``rtol * largest``."""

    value: float
    """NaN for a matrix of zeros."""
    exact: bool
    """False: the true number is at least ``value``."""
    largest: float
    """Largest size of an eigenvalue; at least this, where not exact."""
    smallest: float
    """Smallest size of an eigenvalue above ``rtol * largest``; at most this, where not exact; infinite if none is known."""
    rtol: float
    n_matvec: int
    """Products that it took."""

    def __str__(self) -> str:
        return f"{'' if self.exact else 'at least '}{self.value:.4g}"


@dataclass(frozen=True)
class Alignment:
    """Which part of a gradient lies in the space of some eigenvectors, of its squared length."""

    fractions: Tensor
    """[k]: (u_i' g)^2 / |g|^2 of the unit eigenvectors u_i, the one with the largest eigenvalue first; float64 on the CPU. NaN
    for a gradient of zeros."""
    pairs: Eigenpairs
    """The eigenvectors and their eigenvalues."""
    n_matvec: int
    """Products that it took."""

    @property
    def total(self) -> float:
        """|P_k g|^2 / |g|^2 with P_k the projector on the k eigenvectors: in [0, 1], and 1 for k = P."""
        return float(self.fractions.sum())


def condition_number(
    op: Operator, rtol: float | None = None, *, dense_up_to: int = DENSE, matvecs: int = 100, seed: int = 0
) -> ConditionNumber:
    """How many times larger the largest eigenvalue of *op* (P, P) is than the smallest, in size, of those that are not zero.

    rtol: eigenvalues up to rtol times the largest size count as zero, in [0, 1); None: 4 sqrt(P) eps of the operator's type,
    which is about what rounding makes of a zero.
    dense_up_to: for P up to this, all eigenvalues are computed from the whole matrix, by P products and about 10 P^3
    operations. For a larger P the result is a lower bound, from *matvecs* products (at least 1) with one Krylov space: a Ritz
    value theta with the residual r vouches for an eigenvalue in [|theta| - r, |theta| + r], which counts if all of the interval
    is above the limit. *seed* is that of its random vector.

    With a process group all ranks call this together and get the same. Raises ValueError for values out of range,
    FloatingPointError if a product is not finite.

    >>> from conjugo.curvature import from_dense
    >>> condition_number(from_dense(torch.diag(torch.tensor([8.0, -2.0, 4.0, 0.0])))).value
    4.0
    """
    check(
        op.dtype in (torch.float32, torch.float64),
        "condition_number",
        "the dtype of op",
        op.dtype,
        "float32 or float64",
    )
    eps = torch.finfo(op.dtype).eps
    rtol = 4 * math.sqrt(op.size) * eps if rtol is None else rtol
    check(0 <= rtol < 1, "condition_number", "rtol", rtol, "in [0, 1), or None")
    check(dense_up_to >= 0, "condition_number", "dense_up_to", dense_up_to, ">= 0")
    check(matvecs >= 1, "condition_number", "matvecs", matvecs, ">= 1")
    before = op.n_matvec
    exact = op.size <= max(dense_up_to, 3)
    if exact:
        dense = op.to_dense(rows_at_once=ROWS)
        require_finite(dense, op, "condition_number")
        values = agree(torch.linalg.eigvalsh(dense.cpu().to(torch.float64)), op.group)
        sizes, doubts = values.abs(), torch.zeros_like(values)
    else:
        # Two vectors more are as much as a basis must leave free.
        krylov = Krylov(op, min(matvecs, op.size - 2), 1, Random(op, seed), "condition_number")
        krylov.start()
        while krylov.n < krylov.room:
            krylov.grow()
        ritz = krylov.ritz()
        # A residual cannot be better known than the products.
        sizes, doubts = ritz.values.abs(), ritz.residuals.clamp(min=4 * eps * krylov.scale)
    largest = float(sizes.max())
    counted = sizes - doubts > rtol * float((sizes + doubts).max())
    smallest = float((sizes + doubts)[counted].min()) if bool(counted.any()) else math.inf
    value = max(1.0, largest / smallest) if largest > 0 else math.nan
    return ConditionNumber(value, exact, largest, smallest, rtol, op.n_matvec - before)


def gradient_alignment(
    op: Operator, k: int = 10, gradient: Tensor | None = None, *, pairs: Eigenpairs | None = None, **options: Any
) -> Alignment:
    """The part of a gradient that lies along the *k* eigenvectors of *op* (P, P) with the largest eigenvalues.

    gradient: g, [P]; None: that of the loss of *op*, ``op.gradient()``. pairs: eigenpairs that are known already, whatever k
    says; None: those from :func:`eigsh`, which gets the *options*. Where an eigenvalue occurs several times only the sum of
    the fractions over its eigenvectors means anything.

    Ghorbani, Krishnan & Xiao 2019, arXiv:1901.10159: without batch normalisation most of the gradient lies along a few
    outliers. With a process group all ranks call this together and get the same. Raises ValueError for a gradient that is
    missing, not finite, or of another shape, type or device, and what :func:`eigsh` raises.

    >>> from conjugo.curvature import from_dense
    >>> found = gradient_alignment(from_dense(torch.diag(torch.tensor([5.0, 3.0, 1.0]))), 2, torch.tensor([2.0, 1.0, 2.0]))
    >>> [round(fraction, 4) for fraction in found.fractions.tolist()], round(found.total, 4)
    ([0.4444, 0.1111], 0.5556)
    """
    owner = "gradient_alignment"
    if gradient is None:
        own: Any = getattr(op, "gradient", None)
        check(own is not None, owner, "gradient", None, f"given, as {type(op).__name__} has none of its own")
        gradient = own()
    check(tuple(gradient.shape) == (op.size,), owner, "the shape of gradient", tuple(gradient.shape), f"({op.size},)")
    check(gradient.dtype == op.dtype, owner, "the dtype of gradient", gradient.dtype, str(op.dtype))
    check(gradient.device == op.device, owner, "the device of gradient", str(gradient.device), str(op.device))
    gradient = gradient.detach()[None]
    length = agree(float(norms(gradient)), op.group)
    check(math.isfinite(length), owner, "the length of gradient", length, "finite")
    before = op.n_matvec
    if pairs is None:
        pairs = eigsh(op, k, **options)
    shape = tuple(pairs.vectors.shape)
    check(len(shape) == 2 and shape[1] == op.size, owner, "the shape of the eigenvectors", shape, f"(k, {op.size})")
    along = inner(pairs.vectors, gradient)[:, 0]
    fractions = agree((along / length).square(), op.group)
    return Alignment(fractions, pairs, op.n_matvec - before)
