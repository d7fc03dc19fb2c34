"""How products of matrices are taken at least cost: which at once, in which type, and with the own transpose."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from conjugo.optim.matrix_preconditioners import shape_of

__all__ = ["TYPES", "on_host", "product", "product_type", "stacked", "symmetric_product", "together"]

TYPES = (torch.bfloat16, torch.float32, torch.float64)
"""In which products may be taken."""
BLOCK = 256
"""Least side of a block that is worth a call of its own."""
LEAST = 2**22
"""Least rows * columns * smaller one of these for products in bfloat16: on a CPU, with half of it they take no less time."""
BATCH = 2**22
"""Most values of matrices of one shape that are worked on at once; it bounds temporary memory."""
BATCH_ON_CPU = 2**18
"""The same on a CPU, where only small matrices gain, and those that stay in its cache."""


def together(vectors: Sequence[Tensor], *, square: bool = False) -> list[list[int]]:
    """Numbers of those *vectors*, taken for matrices, that are of one shape and to be worked on at once.

    square: what is worked on are matrices with two rows or two columns of each.
    """
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, vector in enumerate(vectors):
        alike[shape_of(vector)].append(i)
    batches = []
    for (rows, columns), indices in alike.items():
        most = BATCH_ON_CPU if on_host(vectors[indices[0]]) else BATCH
        size = max(rows, columns) ** 2 if square else rows * columns
        at_once = max(1, most // size)
        batches += [indices[start : start + at_once] for start in range(0, len(indices), at_once)]
    return batches


def stacked(vectors: Sequence[Tensor]) -> Tensor:
    """*vectors* of one shape as matrices [n, rows, columns]; a single one as [rows, columns], a view if it is contiguous."""
    matrices = [v if v.ndim == 2 else v.reshape(v.shape[0], -1) for v in vectors]
    return torch.stack(matrices) if len(matrices) > 1 else matrices[0].contiguous()


def product_type(matrices: Tensor) -> torch.dtype:
    """In which type products of *matrices* [..., rows, columns] are taken by default, see :class:`Orthogonal`."""
    if matrices.dtype == torch.float64:
        return torch.float64
    rows, columns = matrices.shape[-2:]
    large = rows * columns * min(rows, columns) >= LEAST
    return torch.bfloat16 if large and (not on_host(matrices) or _multiplies_bfloat16()) else matrices.dtype


def on_host(tensor: Tensor) -> bool:
    """Whether *tensor* is where to look at values costs nothing and calls are made one after the other."""
    return tensor.device.type == "cpu"


@functools.cache
def _multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for products in bfloat16 that PyTorch uses."""
    known: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get("avx512_bf16", False) or known.get("amx_bf16", False))


def product(x: Tensor, y: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """x y for matrices or stacks of such, in *dtype*, None: in their own; the result is of the type of *x*."""
    multiply = torch.mm if x.ndim == 2 else torch.bmm
    return multiply(x, y) if dtype is None else multiply(x.to(dtype), y.to(dtype)).to(x.dtype)


def symmetric_product(
    x: Tensor, *, out: Tensor, base: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """out <- beta base + alpha x x^T, for x [n, m] and out, base [n, n]; base None: 0; it is symmetric and may be *out*.

    Of blocks that lie across the diagonal only one is worked out, the other is its transpose: half of the work is saved in
    the limit of large n. Not so on an accelerator, where it would be several calls that wait for each other.
    """
    half = x.shape[0] // 2
    if half < BLOCK or not on_host(x):
        _product(x, x, out, base, beta, alpha)
        return out
    upper, lower = slice(None, half), slice(half, None)
    for part in (upper, lower):
        inner = None if base is None else base[part, part]
        symmetric_product(x[part], out=out[part, part], base=inner, beta=beta, alpha=alpha)
    cross = out[upper, lower]
    _product(x[upper], x[lower], cross, None if base is None else base[upper, lower], beta, alpha)
    # Between contiguous tensors a transpose is copied ten times as fast.
    out[lower, upper] = cross.contiguous().mT.contiguous()
    return out


def _product(x: Tensor, y: Tensor, out: Tensor, base: Tensor | None, beta: float, alpha: float) -> None:
    if base is not None:
        torch.addmm(base, x, y.mT, beta=beta, alpha=alpha, out=out)
    elif alpha == 1.0:
        torch.mm(x, y.mT, out=out)
    else:
        torch.mm(x, y.mT, out=out).mul_(alpha)
