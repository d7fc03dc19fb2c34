"""The vector work of :class:`conjugo.optim.classical.driver.Driver` by the optional C kernels: two passes per evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor

from conjugo._tensors import CHUNK, Array
from conjugo.optim._fused import SERIAL, kernels, share

__all__ = ["RowProducts", "products", "suits", "turn"]


def suits(table: Tensor) -> bool:
    """Whether the kernels can work on the rows of *table*, and of another one like it."""
    known = table.dtype in (torch.float32, torch.float64)
    return kernels is not None and table.device.type == "cpu" and known and table.is_contiguous() and table.numel() > 0


def products(v: Tensor, rows: Sequence[Tensor]) -> list[float]:
    """<row, v> for each of at most 8 rows, and max |v| (NaN if v has a value that is not finite); all [n]."""
    addresses = tuple(row.data_ptr() for row in rows)
    return _products(v.data_ptr(), addresses, v.numel(), double=v.dtype == torch.float64)


class RowProducts:
    """The same for many problems, whose vectors are rows of arrays or tensors."""

    def __init__(self, *, size: int, vectors: int, double: bool) -> None:
        self._size, self._vectors, self._double = size, vectors, double

    @classmethod
    def of(cls, x0: Array, vectors: int) -> Self | None:
        """For problems with starts *x0* [S, n] and tables of so many vectors; None where the kernels do not suit."""
        if not suits(torch.as_tensor(x0).contiguous()):
            return None
        return cls(size=x0.shape[1], vectors=vectors, double=str(x0.dtype).endswith("float64"))

    def products(self, g: Array, table: Array) -> list[list[float]]:
        """:func:`products` of each row of *g* [S, n] with those of *table* [S, vectors, n]: S lists."""
        first, row = _address(table), self._size * (8 if self._double else 4)
        copied = g.contiguous() if isinstance(g, Tensor) else np.ascontiguousarray(g, dtype=table.dtype)
        start = _address(copied)
        found = []
        for i in range(len(copied)):
            begin = first + i * self._vectors * row
            rows = tuple(range(begin, begin + self._vectors * row, row))
            found.append(_products(start + i * row, rows, self._size, double=self._double))
        return found


def _address(array: Array) -> int:
    return array.data_ptr() if isinstance(array, Tensor) else array.__array_interface__["data"][0]


def _products(v: int, rows: tuple[int, ...], n: int, *, double: bool) -> list[float]:
    """:func:`products` by addresses. Sums run over pieces that do not depend on the number of threads."""
    edges = range(0, n, CHUNK)
    sums = np.empty((len(edges), len(rows) + 2))
    out, width = _address(sums), sums.strides[0]

    def part(begin: int, end: int) -> None:
        for i in range(begin, end):
            kernels.products(double, v, rows, out + i * width, edges[i], min(edges[i] + CHUNK, n))

    _run(part, len(edges), n)
    if len(sums) == 1:
        *found, low, high = sums[0].tolist()
    else:
        found, low, high = sums[:, :-2].sum(0).tolist(), sums[:, -2].min(), sums[:, -1].max()
    return [*found, float(max(-low, high))]


def turn(
    tensors: Sequence[Tensor | None], *, part: float, step: float, beta: float, gamma: float, next_step: float
) -> None:
    """A point between two, the next direction from it, and the next trial point: all [n], in place.

    tensors: base, x, g_base, g_last, g, p, p_new, p_kept, y_kept, trial. Unless *part* is 1: x <- base - part step p and
    g <- g_base + part (g_last - g_base). If y_kept is there: y_kept <- g - g_base. Then p_new <- g + beta p, plus gamma p_kept
    if that is there, and trial <- x - next_step p_new.
    """
    base = tensors[0]
    assert base is not None
    n, double = base.numel(), base.dtype == torch.float64
    addresses = tuple(0 if t is None else t.data_ptr() for t in tensors)
    numbers = (part, step, beta, gamma, next_step)
    pieces = -(-n // CHUNK)

    def work(begin: int, end: int) -> None:
        kernels.turn(double, addresses, numbers, begin * CHUNK, min(end * CHUNK, n))

    _run(work, pieces, n)


def _run(part: Callable[[int, int], None], pieces: int, n: int) -> None:
    threads = torch.get_num_threads() if n > SERIAL else 1
    if threads == 1:
        part(0, pieces)
    else:
        share(part, pieces, threads)
