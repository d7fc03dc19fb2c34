"""Sums over many tensors: the one place where dot products are taken and added up.

Conjugate-gradient scalars are differences of nearly equal numbers, so a plain float32 dot over millions of values (relative
error about 1e-4) will not do. Products are summed in float32 over at most ``CHUNK`` values and in float64 from there on.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

__all__ = ["CHUNK", "Array", "dot", "flat", "namespace", "wide_dtype"]

Array: TypeAlias = Any
"""A tensor, or a numpy array where scalars are worked out on the host: numpy's overhead per operation is a fraction of
PyTorch's, and formulas written with :func:`namespace` serve both."""

CHUNK = 65536
"""Values whose products are summed in the tensors' own precision before float64 takes over."""


def wide_dtype(device: torch.device) -> torch.dtype:
    """The type in which sums are kept: float64, or float32 where the device (Apple's MPS) has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def flat(x: Tensor) -> Tensor:
    """A 1-D view of the dense tensor *x* in the order of its memory; two tensors of equal strides stay aligned.

    Copies only when *x* is not dense (a strided slice, an expanded tensor).
    """
    if x.is_contiguous():
        return x.view(-1)
    order = sorted(range(x.ndim), key=lambda i: (x.stride(i), x.size(i)), reverse=True)
    return x.permute(order).reshape(-1)


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner product of two real tensors of one shape, as a 0-d tensor in :func:`wide_dtype`.

    On a CPU: float32 within chunks, float64 between them. Elsewhere the reduction accumulates in float64.
    """
    wide = wide_dtype(x.device)
    if x.dtype == torch.float64:
        return torch.sum(x * y) if x.stride() != y.stride() else torch.dot(flat(x), flat(y))
    if x.device.type != "cpu" or x.stride() != y.stride():
        return torch.sum(x * y, dtype=wide)
    if x.numel() <= CHUNK:
        return torch.dot(flat(x), flat(y)).to(wide)
    xs, ys = (torch.split(flat(t), CHUNK) for t in (x, y))
    return torch.stack([torch.dot(a, b) for a, b in zip(xs, ys, strict=True)]).sum(dtype=wide)


def namespace(x: Array) -> Any:
    """The module whose functions (``where``, ``sqrt``, ...) take *x*: torch for a tensor, numpy for an array."""
    return torch if isinstance(x, Tensor) else np
