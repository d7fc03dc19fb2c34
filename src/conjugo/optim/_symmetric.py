"""Products of a matrix with its own transpose, at less than the cost of a general product."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["symmetric_product"]

BLOCK = 256
"""Least side of a block that is worth a call of its own."""


def symmetric_product(
    x: Tensor, *, out: Tensor, base: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """out <- beta base + alpha x x^T, for x [n, m] and out, base [n, n]; base None: 0; it is symmetric and may be *out*.

    Of blocks that lie across the diagonal only one is worked out, the other is its transpose: half of the work is saved in
    the limit of large n. Not so on an accelerator, where it would be several calls that wait for each other.
    """
    half = x.shape[0] // 2
    if half < BLOCK or x.device.type != "cpu":
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
