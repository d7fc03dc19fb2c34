"""Operations on lists of real tensors, all at once (``foreach``) or one after the other: what the steps are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from conjugo._tensors import dot, wide_dtype
from conjugo.optim._base import as_real, state_dtype
from conjugo.optim.preconditioners import Block

__all__ = ["Factor", "Scale", "add", "dots", "effective_gradients", "minus", "plus", "scale", "subtract"]

Scale = tuple[float | Tensor, float | Tensor]
"""x = first * gradient + second * parameter; numbers or 0-d tensors."""

Factor = Tensor | Sequence[Tensor]
"""0-d: one for all tensors of a list; or one for each."""


def effective_gradients(block: Block, scales: Sequence[Scale]) -> list[Tensor]:
    """x of each parameter in the type of its state; the gradient itself where that is the same."""
    dtype = state_dtype(block.params[0])
    gs = [as_real(g).to(dtype) for g in block.raw_gradients()]
    ps = [as_real(p).to(dtype) for p in block.pieces()]
    factor, decay = scales[0]
    if block.foreach and isinstance(factor, float) and isinstance(decay, float) and set(scales) == {scales[0]}:
        if factor == 1 and decay == 0:
            return gs
        xs = torch._foreach_mul(gs, factor)
        torch._foreach_add_(xs, ps, alpha=decay)
        return list(xs)
    return [
        g if isinstance(a, float) and (a, b) == (1.0, 0.0) else (g * a + p * b).to(dtype)
        for g, p, (a, b) in zip(gs, ps, scales, strict=True)
    ]


def dots(xs: list[Tensor], ys: list[Tensor], foreach: bool) -> Tensor:
    """Parts of the sum of <x, y>, one for each pair, in float64.

    Each is <x, y> of its pair without *foreach*, and where both lists are the same object; else only their sum is exact.
    """
    if not foreach:
        return torch.stack([dot(x, y) for x, y in zip(xs, ys, strict=True)])
    wide = wide_dtype(xs[0].device)
    if xs is ys:
        return torch.stack(torch._foreach_norm(xs, dtype=wide)).square_()
    # One reduction over everything instead of one for each pair: on a GPU launches cost more than the copy.
    products = torch.cat([z.flatten() for z in torch._foreach_mul(xs, ys)])
    parts = torch.zeros(len(xs), dtype=wide, device=xs[0].device)
    parts[0] = products.sum(dtype=wide)
    return parts


def minus(xs: list[Tensor], ys: list[Tensor], foreach: bool) -> list[Tensor]:
    """x - y."""
    return list(torch._foreach_sub(xs, ys)) if foreach else [x - y for x, y in zip(xs, ys, strict=True)]


def scale(xs: list[Tensor], factor: Factor, foreach: bool) -> None:
    """x <- factor x."""
    if foreach:
        torch._foreach_mul_(xs, _of_list(factor))
        return
    for x, c in zip(xs, _one_each(factor, len(xs)), strict=True):
        x.mul_(c)


def plus(xs: list[Tensor], ys: list[Tensor], foreach: bool) -> None:
    """x <- x + y."""
    if foreach:
        torch._foreach_add_(xs, ys)
        return
    for x, y in zip(xs, ys, strict=True):
        x.add_(y)


def subtract(xs: list[Tensor], ys: list[Tensor], foreach: bool) -> None:
    """x <- x - y."""
    if foreach:
        torch._foreach_sub_(xs, ys)
        return
    for x, y in zip(xs, ys, strict=True):
        x.sub_(y)


def add(xs: list[Tensor], ys: list[Tensor], factor: Factor, foreach: bool) -> None:
    """x <- x + factor y."""
    if foreach:
        torch._foreach_add_(xs, list(torch._foreach_mul(ys, _of_list(factor))))
        return
    for x, y, c in zip(xs, ys, _one_each(factor, len(xs)), strict=True):
        x.add_(y * c)


def _one_each(factor: Factor, n: int) -> Sequence[Tensor]:
    return [factor] * n if isinstance(factor, Tensor) else factor


def _of_list(factor: Factor) -> Any:
    return factor if isinstance(factor, Tensor) else list(factor)
