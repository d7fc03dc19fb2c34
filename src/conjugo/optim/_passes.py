"""The vector work of an NLCG step in PyTorch operations: the specification of the method, for any device and type.

Four passes; each returns inner products per parameter, float64 [n, ...], for the parameters in the order of the blocks, over
the pieces that this rank has:

* ``gradient``: form the gradient x that the method sees; <x, x>, <x, d>, <x, P g'>, <d, d>;
* ``difference``: <y, y> with y = x - g';
* ``precondition``: update the preconditioner, keep x as g'; <x, P x>, <d, H d>, and where needed <P x, P x>, <P x, d>;
* ``move``: d <- -P x + beta d, p <- keep p + undo d_old + tau d; unless *sharded* <x, d>, <d, d>.

Sharded parameters get the inner products of the new direction from those of its parts (``NLCG._step``), because a sum over
ranks after the last pass would be one more collective. Scalars are 0-d tensors on the device: nothing here waits for it, so a
step with a non-finite gradient runs through, with coefficients that leave everything as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from conjugo._tensors import Array, wide_dtype
from conjugo.optim._base import as_real
from conjugo.optim._vectors import Scale, add, dots, effective_gradients, minus, plus, scale, subtract
from conjugo.optim.preconditioners import Block, DiagonalBFGS, Identity, Secant

__all__ = ["Move", "TensorPasses"]


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

    def __init__(self, blocks: Sequence[Block], *, sharded: bool) -> None:
        self._sharded = sharded
        preconds = [block.precond for block in blocks]
        self._wants_z = sharded or any(isinstance(p, DiagonalBFGS) and p.reference for p in preconds)
        self._plain = all(isinstance(p, Identity) for p in preconds)
        starts = [sum(len(b.params) for b in blocks[:i]) for i in range(len(blocks))]
        self._blocks = list(zip(starts, blocks, strict=True))
        self._z: list[list[Tensor]] = []

    def gradient(self, scales: Sequence[Scale], *, direction: bool, cross: bool, fresh: Tensor) -> Tensor:
        """[n, 4]; those with d and with P g' only if asked for, else 0. fresh: bool [n], P was never updated."""
        rows = []
        for start, block in self._blocks:
            xs = block.gradients = effective_gradients(block, scales[start : start + len(block.params)])
            xx = dots(xs, xs, block.foreach)
            ds = block.state("direction")
            xd, dd = (dots(v, ds, block.foreach) if direction else torch.zeros_like(xx) for v in (xs, ds))
            old = block.precond.apply(block, block.state("grad_prev"), fresh[start]) if cross else None
            xz = torch.zeros_like(xx) if old is None else dots(xs, old, block.foreach)
            rows.append(torch.stack([xx, xd, xz, dd], 1))
        return torch.cat(rows)

    def difference(self) -> Tensor:
        """[n]; 0 where nothing is learned from steps."""
        rows = []
        for _, block in self._blocks:
            if not block.precond.learns_from_steps:
                like = block.state("direction")[0]
                rows.append(torch.zeros(len(block.params), dtype=wide_dtype(like.device), device=like.device))
                continue
            ys = minus(block.gradients, block.state("grad_prev"), block.foreach)
            rows.append(dots(ys, ys, block.foreach))
        return torch.cat(rows)

    def precondition(self, secant: Secant, *, fresh: Tensor) -> Tensor:
        """[n, 4]; <d, H d> is 0 for a preconditioner that does not learn from steps, all are 0 where no block
        has one.

        secant: fields [n], but ``finite`` 0-d; fresh: bool [n], no step was taken yet.
        """
        rows = []
        self._z = []
        skip = torch.logical_not(secant.finite)
        for start, block in self._blocks:
            # NaN * 0 is NaN: only a selection rids a skipped step of its gradient.
            block.gradients = [x.masked_fill(skip, 0.0) for x in block.gradients]
            block.precond.update(block, Secant(*(f[start] if f.ndim else f for f in secant)))
            z = block.precond.apply(block, block.gradients, fresh[start])
            self._z.append(z)
            rows.append(torch.stack(self._products(block, z), 1))
            if "grad_prev" in block.states[0]:
                _replace(block.state("grad_prev"), block.gradients, secant.finite, block.foreach)
        return torch.cat(rows)

    def _products(self, block: Block, z: list[Tensor]) -> list[Tensor]:
        """<x, z>, <d, H d>, <z, z>, <z, d>, each [n]."""
        ds = block.state("direction")
        zero = torch.zeros(len(ds), dtype=wide_dtype(ds[0].device), device=ds[0].device)
        if self._plain:
            return [zero] * 4
        learns = block.precond.learns_from_steps
        return [
            dots(block.gradients, z, block.foreach),
            dots(block.precond.multiply(block, ds), ds, block.foreach) if learns else zero,
            *([dots(z, z, block.foreach), dots(z, ds, block.foreach)] if self._wants_z else [zero, zero]),
        ]

    def move(self, move: Move) -> Tensor:
        """[n, 2]."""
        rows = []
        for (start, block), z in zip(self._blocks, self._z, strict=True):
            ds = block.state("direction")
            beta, tau = (c[start].to(ds[0].dtype) for c in (move.beta, move.tau))
            ps = [as_real(p) for p in block.pieces()]
            if move.keep is not None:
                scale(ps, move.keep[start].to(ps[0].dtype), block.foreach)
            if move.undo is not None:
                add(ps, ds, move.undo[start].to(ds[0].dtype), block.foreach)
            scale(ds, beta, block.foreach)
            subtract(ds, z, block.foreach)
            add(ps, ds, tau, block.foreach)
            if not self._sharded:
                rows.append(torch.stack([dots(v, ds, block.foreach) for v in (block.gradients, ds)], 1))
            block.gradients = []
        self._z = []
        return (
            torch.cat(rows) if rows else torch.zeros(len(move.beta), 2, dtype=move.beta.dtype, device=move.beta.device)
        )


def _replace(xs: list[Tensor], ys: list[Tensor], allowed: Tensor, foreach: bool) -> None:
    """x <- y where *allowed*, else x; y is 0 where it is not."""
    scale(xs, torch.logical_not(allowed).to(xs[0].dtype), foreach)
    plus(xs, ys, foreach)
