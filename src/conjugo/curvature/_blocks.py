"""What the methods do with blocks of vectors, kept as rows [k, P]: inner products, combinations, random rows.

Inner products are summed in the vectors' own precision over at most ``CHUNK`` values and in float64 from there on. Matrix
products take no short cuts here (TF32 on a GPU, bfloat16 on a CPU), whatever the program has set for its own: vectors that are
orthogonal to three digits only are of no use.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from conjugo._tensors import CHUNK, wide_dtype
from conjugo.curvature._ranks import agree, same
from conjugo.curvature.operator import Operator

__all__ = [
    "Random",
    "combine",
    "combine_",
    "exact_products",
    "inner",
    "norms",
    "orthonormal",
    "pieces",
    "products",
    "remove",
    "require_finite",
]

ROWS = 16
"""Vectors that an operator gets at once."""


@contextmanager
def exact_products() -> Iterator[None]:
    """Matrix products in the full precision of their type, until the end of the block."""
    backends: Any = torch.backends
    settings = (backends.cuda.matmul, backends.mkldnn.matmul)
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


def pieces(size: int, device: torch.device) -> Iterator[slice]:
    """Spans of *size* coordinates that are worked on at once."""
    step = CHUNK if device.type == "cpu" else 16 * CHUNK
    return (slice(start, start + step) for start in range(0, size, step))


def inner(x: Tensor, y: Tensor) -> Tensor:
    """Inner products of the rows of *x* [j, P] with those of *y* [k, P]: float64 [j, k] on the CPU."""
    total = torch.zeros(x.shape[0], y.shape[0], dtype=wide_dtype(x.device), device=x.device)
    with exact_products():
        for piece in pieces(x.shape[1], x.device):
            total += x[:, piece] @ y[:, piece].T
    return total.cpu().to(torch.float64)


def norms(x: Tensor) -> Tensor:
    """Lengths of the rows of *x*: float64 [k] on the CPU. Squares neither overflow nor vanish."""
    largest = x.abs().amax(dim=1).clamp(min=torch.finfo(x.dtype).tiny)
    squares = [inner(scaled, scaled).reshape(()) for scaled in (row[None] / size for row, size in zip(x, largest))]
    return torch.stack(squares).sqrt() * largest.cpu().to(torch.float64)


def combine(weights: Tensor, x: Tensor) -> Tensor:
    """Sums of the rows of *x* [j, P] with *weights* [k, j]: [k, P]."""
    with exact_products():
        return weights.to(x) @ x


def combine_(weights: Tensor, x: Tensor) -> None:
    """Put the sums of the rows of *x* [j, P] with *weights* [k, j], k <= j, into its first k rows, without a copy of *x*."""
    weights = weights.to(x)
    with exact_products():
        for piece in pieces(x.shape[1], x.device):
            x[: len(weights), piece] = weights @ x[:, piece]


def remove(basis: Tensor, x: Tensor) -> Tensor:
    """Take the components along the orthonormal rows of *basis* [j, P] out of the rows of *x* [k, P], in place.

    Gives what was taken, float64 [j, k] on the CPU: x before = that.T @ basis + x after.
    """
    along = inner(basis, x)
    if len(basis):
        with exact_products():
            x.addmm_(along.T.to(x), basis, alpha=-1)
    return along


def orthonormal(x: Tensor, tolerance: float, group: Any) -> tuple[Tensor, Tensor]:
    """Orthonormal rows Q [r, P] and R [r, k] (float64, CPU) with x = R.T @ Q, up to parts shorter than *tolerance*.

    Gram-Schmidt in the order of the rows, each pass twice; a row that depends on those before it adds none to Q. All ranks of
    *group* get the same.
    """
    q = torch.empty_like(x)
    r = torch.zeros(len(x), len(x), dtype=torch.float64)
    rank = 0
    for i, row in enumerate(x):
        q[rank] = row
        for _ in range(2):
            r[:rank, i] += remove(q[:rank], q[rank : rank + 1])[:, 0]
        length = agree(float(norms(q[rank : rank + 1])), group)
        if length > tolerance:
            r[rank, i] = length
            q[rank] /= length
            # What is left of a row that nearly depends on others is not orthogonal to them any more.
            remove(q[:rank], q[rank : rank + 1])
            q[rank] /= float(norms(q[rank : rank + 1]))
            rank += 1
    return same(q[:rank], r[:rank], group), agree(r[:rank], group)


def products(op: Operator, rows: Tensor, owner: str) -> Tensor:
    """A v for each of *rows* [k, P], some at a time. Raises FloatingPointError if one is not finite."""
    found = torch.cat([op.matmat(part) for part in torch.split(rows, ROWS)]) if len(rows) > ROWS else op.matmat(rows)
    require_finite(found, op, owner)
    return found


def require_finite(found: Tensor, op: Operator, owner: str) -> None:
    """Raise FloatingPointError if a product of *op* has an entry that is not finite."""
    if not bool(torch.isfinite(found.sum(dtype=wide_dtype(found.device)))):
        raise FloatingPointError(f"{owner}: a product of {type(op).__name__} (of {op.n_matvec} so far) is not finite")


class Random:
    """Random rows for an operator, drawn on the CPU from a seed: the same on every rank and every device."""

    def __init__(self, op: Operator, seed: int) -> None:
        self._op = op
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, rows: int) -> Tensor:
        """Standard normal numbers, [rows, P]."""
        return self._rows([torch.randn(self._op.size, generator=self._generator) for _ in range(rows)])

    def signs(self, rows: int) -> Tensor:
        """+1 and -1 with equal chances, [rows, P]."""
        drawn = [torch.randint(2, (self._op.size,), generator=self._generator) for _ in range(rows)]
        return self._rows([2 * row - 1 for row in drawn])

    def _rows(self, drawn: list[Tensor]) -> Tensor:
        moved = [row.to(dtype=self._op.dtype).to(self._op.device) for row in drawn]
        return torch.stack(moved) if moved else torch.empty(0, self._op.size, dtype=self._op.dtype).to(self._op.device)
