"""The vector work of :class:`conjugo.optim.classical.driver.Driver` by the optional C kernels: two passes per evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from conjugo._tensors import CHUNK, Array
from conjugo.optim._fused import SERIAL, kernels, share

__all__ = ["products", "products_of_each", "suits", "turn"]


def suits(table: Tensor) -> bool:
    """Whether the kernels can work on the rows of *table*, and of another one like it."""
    known = table.dtype in (torch.float32, torch.float64)
    return kernels is not None and table.device.type == "cpu" and known and table.is_contiguous() and table.numel() > 0


def products(v: Tensor, rows: Sequence[Tensor]) -> list[float]:
    """<row, v> for each of at most 8 rows, and max |v| (NaN if v has a value that is not finite); all [n]."""
    addresses = tuple(row.data_ptr() for row in rows)
    return _products(v.data_ptr(), addresses, v.numel(), double=v.dtype == torch.float64)


def products_of_each(table: Array, row: int) -> list[list[float]]:
    """:func:`products` for many problems: of row *row* of each table [vectors, n] with all rows of that table.

    table: [S, vectors, n], contiguous; a NumPy array or a tensor.
    """
    count, vectors, n = table.shape
    double = str(table.dtype).endswith("float64")
    first, width = _address(table), n * (8 if double else 4)
    found = []
    for i in range(count):
        begin = first + i * vectors * width
        rows = tuple(range(begin, begin + vectors * width, width))
        found.append(_products(rows[row], rows, n, double=double))
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
