"""The vector work of an NLCG step whose step size looks at the loss again, and what it is asked for on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from conjugo._space import ParamSpace, to_local
from conjugo.optim._base import as_real
from conjugo.optim._observed_batch import ObservedBatch
from conjugo.optim._passes import TensorPasses
from conjugo.optim._vectors import add, dots, scale, subtract
from conjugo.optim.probed_steps import Found, Parabola, Plane, Subspace

__all__ = ["Objective", "ProbedPasses"]

Vectors = Sequence[list[Tensor]]
"""One list for each block, like its parameters."""


class Objective:
    """What is minimised: sign times the loss, and half of each decay times the squared norm of its parameter.

    decays: of each parameter that takes part.
    """

    def __init__(self, sign: float, decays: Sequence[float]) -> None:
        self.sign = sign
        self.decays = decays


class ProbedPasses(TensorPasses):
    """:class:`TensorPasses` whose last pass has two parts, :meth:`turn` and :meth:`go`, with a look at the loss between."""

    def turn(self, beta: Tensor) -> Tensor:
        """d <- -z + beta d; <x, d>, <d, d>: [n, 2], zeros if sharded."""
        rows = []
        for (start, block), z in zip(self._blocks, self._z, strict=True):
            ds = block.state("direction")
            scale(ds, beta[start].to(ds[0].dtype), block.foreach)
            subtract(ds, z, block.foreach)
            if not self._sharded:
                rows.append(torch.stack([dots(v, ds, block.foreach) for v in (block.gradients, ds)], 1))
            block.gradients = []
        self._z = []
        return torch.cat(rows) if rows else torch.zeros(len(beta), 2, dtype=beta.dtype, device=beta.device)

    def go(self, tau: Tensor, keep: Tensor | None) -> None:
        """p <- keep p + tau d."""
        for start, block in self._blocks:
            ds, ps = block.state("direction"), [as_real(p) for p in block.pieces()]
            if keep is not None:
                scale(ps, keep[start].to(ps[0].dtype), block.foreach)
            add(ps, ds, tau[start].to(ds[0].dtype), block.foreach)

    def parabola(
        self,
        rule: Parabola,
        alpha: float,
        batch: ObservedBatch,
        objective: Objective,
        space: ParamSpace,
        *,
        loss: float,
        spread: Callable[[], None],
    ) -> Found:
        """Search along d; *loss*: where the parameters are. *spread*: gives all ranks what each has moved."""
        ds = self._directions()
        loss *= objective.sign
        slope, bend = self._slope(ds, objective, space), 0.0
        if any(objective.decays):
            bend = float(space.reduce(self._decayed(ds, ds, objective)[None]).sum())
            start = float(space.reduce(self._decayed(self._parameters(), ds, objective)[None]).sum())

        def trial(t: float) -> float:
            with self._moved(t, spread):
                value = objective.sign * batch.loss()
            return value if not bend else value + t * start + t * t * bend / 2

        return rule.search(alpha, loss=loss, slope=slope, trial=trial, eps=lambda: batch.eps)

    def subspace(
        self,
        rule: Subspace,
        alpha: float,
        batch: ObservedBatch,
        objective: Objective,
        space: ParamSpace,
        *,
        loss: float,
        tau: Tensor,
    ) -> tuple[float, float]:
        """The coefficients of -z and of the last update *tau* d."""
        loss *= objective.sign
        if any(objective.decays):
            ps = self._parameters()
            loss += float(space.reduce(self._decayed(ps, ps, objective)[None]).sum()) / 2
        us = []
        for start, block in self._blocks:
            ds = [d.clone() for d in block.state("direction")]
            scale(ds, tau[start].to(ds[0].dtype), block.foreach)
            us.append(ds)
        zs = self._z
        rows = [
            self._slopes(zs, objective),
            *(self._decayed(v, w, objective) for v, w in ((zs, zs), (zs, us), (us, us))),
        ]
        sizes = [
            torch.cat([dots(v, v, block.foreach) for (_, block), v in zip(self._blocks, vs, strict=True)])
            for vs in (zs, us)
        ]
        rows += [self._slopes(us, objective), *sizes]
        gz, zz, zu, uu, gu, size_z, size_u = space.reduce(torch.stack(rows)).sum(-1).tolist()
        if not size_z > 0:  # nothing to go along, as in a first step that only learns
            return alpha or rule.initial, 0.0
        vectors = [self._of_parameters(vs) for vs in ([zs, us] if size_u > 0 else [zs])]
        found = batch.products(vectors, rule.fraction)
        zz += objective.sign * found[0][0]
        if size_u > 0:
            zu, uu = zu + objective.sign * found[0][1], uu + objective.sign * found[1][1]
        return rule.solve(Plane(gz, gu, zz, zu, uu), last=alpha, loss=loss)

    # Inside ----------------------------------------------------------------------------------------------------------

    def _directions(self) -> Vectors:
        return [block.state("direction") for _, block in self._blocks]

    def _parameters(self) -> Vectors:
        dtypes = [block.state("direction")[0].dtype for _, block in self._blocks]
        return [
            [as_real(p).to(dtype) for p in block.pieces()]
            for (_, block), dtype in zip(self._blocks, dtypes, strict=True)
        ]

    def _slope(self, vectors: Vectors, objective: Objective, space: ParamSpace) -> float:
        return float(space.reduce(self._slopes(vectors, objective)[None]).sum())

    def _slopes(self, vectors: Vectors, objective: Objective) -> Tensor:
        """Parts of the derivative of the objective along *vectors*, [n]: of the loss itself, not as the method scales it."""
        rows = []
        for (_, block), vs in zip(self._blocks, vectors, strict=True):
            gs = [as_real(g).to(vs[0].dtype) for g in block.raw_gradients()]
            rows.append(objective.sign * dots(gs, vs, block.foreach))
        slopes = torch.cat(rows)
        return slopes + self._decayed(self._parameters(), vectors, objective) if any(objective.decays) else slopes

    def _decayed(self, vectors: Vectors, others: Vectors, objective: Objective) -> Tensor:
        """Parts of the inner products of *vectors* and *others* with the decays, [n]."""
        parts = []
        for (start, block), vs, ws in zip(self._blocks, vectors, others, strict=True):
            decay = objective.decays[start]  # a block belongs to one group
            parts.append(decay * dots(vs, ws, block.foreach) if decay else torch.zeros(len(vs)).to(_wide(vs[0])))
        return torch.cat(parts)

    def _of_parameters(self, vectors: Vectors) -> dict[Tensor, Tensor]:
        found = {}
        for (_, block), vs in zip(self._blocks, vectors, strict=True):
            for p, v in zip(block.params, vs, strict=True):
                found[p] = (torch.view_as_complex(v.contiguous()) if p.is_complex() else v).to(p.dtype)
        return found

    @contextmanager
    def _moved(self, t: float, spread: Callable[[], None]) -> Iterator[None]:
        """Inside, the parameters are t d further; afterwards they have their bits again."""
        pieces = [to_local(p.detach()) for _, block in self._blocks for p in block.params]
        before = [p.clone() for p in pieces]
        try:
            for _, block in self._blocks:
                ds, ps = block.state("direction"), [as_real(p) for p in block.pieces()]
                add(ps, ds, torch.tensor(t, dtype=ds[0].dtype, device=ds[0].device), block.foreach)
            spread()
            yield
        finally:
            torch._foreach_copy_(pieces, before)


def _wide(like: Tensor) -> Tensor:
    from conjugo._tensors import wide_dtype

    return torch.zeros((), dtype=wide_dtype(like.device), device=like.device)
