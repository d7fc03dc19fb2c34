"""The vector work of an NLCG step in PyTorch operations: the specification of the method, for any device and type.

Four passes; each returns inner products per parameter, float64 [n, ...], for the parameters in the order of the blocks:

* ``gradient``: form the gradient x that the method sees; <x, x>, <x, d>, <x, P g'>;
* ``difference``: <y, y> with y = x - g';
* ``precondition``: update the preconditioner, keep x as g'; <x, P x>;
* ``move``: d <- -P x + beta d, p <- keep p + undo d_old + tau d; <x, d>, <d, H d>, <d, d>.

The sums of the last pass serve the next step, since <y, d> = <g, d> - <g', d>. Scalars are 0-d tensors on the device: nothing
here waits for it, so a step with a non-finite gradient runs through, with coefficients that leave everything as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from conjugo._tensors import Array, dot, wide_dtype
from conjugo.optim._base import as_real
from conjugo.optim.preconditioners import Block, Preconditioner, Secant

__all__ = ["Move", "Scale", "TensorPasses"]

Scale = tuple[float | Tensor, float | Tensor]
"""x = first * gradient + second * parameter; numbers or 0-d tensors."""


class Move(NamedTuple):
    """Coefficients of the last pass, [n] in float64; ``undo`` and ``keep`` are None where they are 0 and 1."""

    beta: Array
    tau: Array
    undo: Array | None
    keep: Array | None


class TensorPasses:
    """The passes over *blocks*; within a block, lists of tensors at once (``foreach``) or one tensor after the other."""

    on_host = False
    """Whether reading a scalar costs nothing, so that Python may branch on it."""

    def __init__(self, blocks: Sequence[Block], preconditioner: Preconditioner) -> None:
        self._precond = preconditioner
        starts = [sum(len(b.params) for b in blocks[:i]) for i in range(len(blocks))]
        self._blocks = list(zip(starts, blocks, strict=True))
        self._z: list[list[Tensor]] = []
        first = blocks[0].params[0]
        self._zero = torch.zeros((), dtype=wide_dtype(first.device), device=first.device)

    def gradient(self, scales: Sequence[Scale], *, direction: bool, cross: bool, fresh: Tensor) -> Tensor:
        """[n, 3]; <x, d> and <x, P g'> only if asked for, else 0. fresh: bool [n], P was never updated."""
        rows = []
        for start, block in self._blocks:
            states = zip(block.params, block.states, scales[start:])
            block.gradients = [_effective(p, scale, state["direction"].dtype) for p, state, scale in states]
            xs = block.gradients
            xd = _dots(xs, block.state("direction")) if direction else [self._zero] * len(xs)
            old = self._precond.apply(block, block.state("grad_prev"), fresh[start]) if cross else None
            xz = [self._zero] * len(xs) if old is None else _dots(xs, old)
            rows += [torch.stack(row) for row in zip(_dots(xs, xs), xd, xz, strict=True)]
        return torch.stack(rows)

    def difference(self) -> Tensor:
        """[n]."""
        rows = []
        for _, block in self._blocks:
            ys = _minus(block.gradients, block.state("grad_prev"), block.foreach)
            rows += _dots(ys, ys)
        return torch.stack(rows)

    def precondition(self, secant: Secant, *, fresh: Tensor) -> Tensor:
        """[n]. secant: fields [n], but ``finite`` 0-d; fresh: bool [n], no step was taken yet."""
        rows = []
        self._z = []
        for start, block in self._blocks:
            # NaN * 0 is NaN: only a selection rids a skipped step of its gradient.
            block.gradients = [torch.where(secant.finite, x, torch.zeros_like(x)) for x in block.gradients]
            self._precond.update(block, Secant(*(f[start] if f.ndim else f for f in secant)))
            z = self._precond.apply(block, block.gradients, fresh[start])
            self._z.append(z)
            rows += _dots(block.gradients, z)
            if "grad_prev" in block.states[0]:
                _replace(block.state("grad_prev"), block.gradients, secant.finite, block.foreach)
        return torch.stack(rows)

    def move(self, move: Move) -> Tensor:
        """[n, 3]; <d, H d> is 0 for a preconditioner that does not learn from steps."""
        rows = []
        for (start, block), z in zip(self._blocks, self._z, strict=True):
            ds = block.state("direction")
            beta, tau = (c[start].to(ds[0].dtype) for c in (move.beta, move.tau))
            ps = [as_real(p) for p in block.params]
            if move.keep is not None:
                _scale(ps, move.keep[start].to(ps[0].dtype), block.foreach)
            if move.undo is not None:
                _add(ps, ds, move.undo[start].to(ds[0].dtype), block.foreach)
            _scale(ds, beta, block.foreach)
            if block.foreach:
                torch._foreach_sub_(ds, z)
            else:
                for d, x in zip(ds, z, strict=True):
                    d.sub_(x)
            _add(ps, ds, tau, block.foreach)
            hd = self._precond.multiply(block, ds) if self._precond.learns_from_steps else None
            dhd = [self._zero] * len(ds) if hd is None else _dots(hd, ds)
            rows += [torch.stack(row) for row in zip(_dots(block.gradients, ds), dhd, _dots(ds, ds), strict=True)]
            block.gradients = []
        self._z = []
        return torch.stack(rows)


def _effective(p: Tensor, scale: Scale, dtype: torch.dtype) -> Tensor:
    """scale[0] * gradient + scale[1] * parameter in *dtype*; the gradient itself where that is the same."""
    assert p.grad is not None
    g, (factor, decay) = as_real(p.grad), scale
    if isinstance(factor, float) and factor == 1 and decay == 0:
        return g.to(dtype)
    x = g.to(dtype) * factor
    return x if isinstance(decay, float) and decay == 0 else x.add_(as_real(p).to(dtype) * decay)


def _dots(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> list[Tensor]:
    return [dot(x, y) for x, y in zip(xs, ys, strict=True)]


def _minus(xs: list[Tensor], ys: list[Tensor], foreach: bool) -> list[Tensor]:
    return list(torch._foreach_sub(xs, ys)) if foreach else [x - y for x, y in zip(xs, ys, strict=True)]


def _scale(xs: list[Tensor], factor: Tensor, foreach: bool) -> None:
    """x <- factor x."""
    if foreach:
        torch._foreach_mul_(xs, factor)
        return
    for x in xs:
        x.mul_(factor)


def _add(xs: list[Tensor], ys: list[Tensor], factor: Tensor, foreach: bool) -> None:
    """x <- x + factor y."""
    if foreach:
        torch._foreach_add_(xs, torch._foreach_mul(ys, factor))
        return
    for x, y in zip(xs, ys, strict=True):
        x.add_(y * factor)


def _replace(xs: list[Tensor], ys: list[Tensor], allowed: Tensor, foreach: bool) -> None:
    """x <- y where *allowed*, else x; y is 0 where it is not."""
    _scale(xs, torch.logical_not(allowed).to(xs[0].dtype), foreach)
    if foreach:
        torch._foreach_add_(xs, ys)
        return
    for x, y in zip(xs, ys, strict=True):
        x.add_(y)
