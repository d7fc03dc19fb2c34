"""Products of the Hessian with random signs, from gradients that have a graph: what Hutchinson's estimators are made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from conjugo._space import is_dtensor
from conjugo.optim._base import copy, state_dtype

__all__ = ["drop_graphs", "hessian_products", "signs"]


def signs(p: Tensor, step: int, index: int) -> Tensor:
    """Random signs laid out like *p*, for complex ones in both parts; they depend on nothing else than the numbers."""
    seed = (1_000_003 * step + index) % 2**32  # all bits that the generators of CPUs look at
    generator = torch.Generator(p.device).manual_seed(seed)
    shape = (*p.shape, 2) if p.is_complex() else p.shape
    bits = torch.randint(0, 2, shape, generator=generator, device=p.device, dtype=torch.int8)
    values = (2 * bits - 1).to(state_dtype(p) if p.is_complex() else p.dtype)
    whole = torch.view_as_complex(values) if p.is_complex() else values
    if not is_dtensor(p):
        return whole
    piece = torch.empty_like(p)
    copy(piece, whole)
    return piece


def hessian_products(
    params: Sequence[Tensor], grads: Sequence[Tensor], vectors: Sequence[Tensor], *, retain: bool = False
) -> list[Tensor]:
    """H v for each of *params*, from *grads* of which at least one has a graph; 0 where nothing depends on the parameter.

    retain: keep the graph for another product.
    """
    pairs = [(g, v) for g, v in zip(grads, vectors, strict=True) if g.requires_grad]
    outputs, wanted = zip(*pairs)
    found = torch.autograd.grad(outputs, params, wanted, allow_unused=True, retain_graph=retain or None)
    return [torch.zeros_like(p) if hv is None else hv for p, hv in zip(params, found, strict=True)]


def drop_graphs(params: Sequence[Tensor]) -> None:
    """Let go of the graphs of all gradients: graph and parameters hold each other otherwise."""
    for p in params:
        if p.grad is not None and p.grad.requires_grad:
            p.grad = p.grad.detach()
