"""Tensors that are cut over the ranks of a group, or equal on all of them; one rank each, the owner, has the whole.

A rank works on what it owns as one process would. Before that the pieces travel to the owners, after it the results to where
the pieces lie; all tensors together in one collective.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from conjugo._space import Slices, chunk, from_local, gathered, is_dtensor, to_local

__all__ = [
    "Cut",
    "Exchange",
    "Keeper",
    "assigned",
    "cut_of",
    "is_tangled",
    "piece_of",
    "spreading_pays",
    "whole_of",
]

_SPEEDS = {"cpu": (2e10, 1e9, 1e-3)}
_SPEED = (1e14, 5e10, 1e-4)
"""By type of device, and of all others: operations per second of a rank, bytes per second and seconds of a collective."""


@dataclass(frozen=True)
class Cut:
    """How a tensor is cut: along dimension *dim* over the ranks of *group*, in chunks as DTensor's Shard(dim) makes them."""

    group: Any
    dim: int


def cut_of(p: Tensor, slices: Slices | None = None) -> Cut | None:
    """How the parameter *p*, with one dimension or more, is cut.

    None: it is whole on each rank, or a DTensor cut in another way, see :func:`is_tangled`. slices: how whole ones are cut.
    """
    if not is_dtensor(p):
        return None if slices is None else Cut(slices.group, 0)
    from torch.distributed.tensor import Shard

    cuts = _cuts(p)
    if len(cuts) != 1 or type(p.placements[cuts[0]]) is not Shard:
        return None
    return Cut(p.device_mesh.get_group(cuts[0]), p.placements[cuts[0]].dim % p.ndim)


def is_tangled(p: Tensor) -> bool:
    """Whether *p* is a DTensor that is cut over more than one dimension of its mesh (FSDP2 and tensor parallelism at once)."""
    return is_dtensor(p) and bool(_cuts(p)) and cut_of(p) is None


def whole_of(piece: Tensor, p: Tensor) -> Tensor:
    """Collective, if *p* is tangled: the whole tensor, on all ranks, of which *piece* lies as that of *p* does."""
    return from_local(piece, p).full_tensor() if is_tangled(p) else piece  # type: ignore[attr-defined, no-any-return]


def piece_of(whole: Tensor, p: Tensor) -> Tensor:
    """This rank's piece of a tensor, of which all ranks have the *whole*, where *p* is tangled; else *whole* itself."""
    if not (is_dtensor(p) and is_tangled(p)):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return to_local(distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None))


def _cuts(p: Any) -> list[int]:
    """The dimensions of the mesh over which *p* is cut."""
    return [i for i, q in enumerate(p.placements) if not q.is_replicate() and p.device_mesh.size(i) > 1]


def assigned(costs: Sequence[float], loads: list[float]) -> list[int]:
    """An owner among the ranks for each of some tasks: the dearest task first, to the rank with the least to do.

    costs: of each task. loads: what each rank has to do already; what it gets is added. The same on all ranks.

    >>> assigned([1.0, 5.0, 2.0, 2.0], loads := [0.0, 0.0]), loads
    ([1, 0, 1, 1], [5.0, 5.0])
    """
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[i] = min(range(len(loads)), key=lambda rank: (loads[rank], rank))
        loads[owners[i]] += costs[i]
    return owners


def spreading_pays(costs: Sequence[float], sizes: Sequence[int], world_size: int, device: str) -> bool:
    """Whether *world_size* ranks that all could do some tasks should share them and exchange the results.

    costs: of each task, in floating-point operations; sizes: values of its result. An estimate by the type of the *device*.
    """
    loads = [0.0] * world_size
    assigned(costs, loads)
    speed, bandwidth, latency = _SPEEDS.get(device, _SPEED)
    return (sum(costs) - max(loads)) / speed > latency + 4 * sum(sizes) / bandwidth


class Exchange:
    """Brings tensors to their owners and back.

    group: the ranks. shapes: of the whole tensors, all of one type. dims: along which each is cut; None: all are equal on
    all ranks, and an owner's result goes to everybody. owners: the rank of each in the group.
    """

    def __init__(
        self, group: Any, shapes: Sequence[Sequence[int]], dims: Sequence[int] | None, owners: Sequence[int]
    ) -> None:
        self.group = group
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.owners = list(owners)
        self._shapes = [tuple(shape) for shape in shapes]
        self._dims = None if dims is None else list(dims)
        self._order = [[i for i, owner in enumerate(owners) if owner == rank] for rank in range(self.world_size)]
        self.own = self._order[self.rank]
        """Numbers of the tensors that this rank owns."""

    def gather(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """Collective, if they are cut: the whole of the tensors that this rank owns, from every rank's *pieces* of all."""
        if self._dims is None:
            return [pieces[i] for i in self.own]
        dims = self._dims
        outgoing = [pieces[i].reshape(-1) for numbers in self._order for i in numbers]
        sent = [sum(pieces[i].numel() for i in numbers) for numbers in self._order]
        received = [sum(math.prod(self._piece(i, rank)) for i in self.own) for rank in range(self.world_size)]
        arrived = torch.split(self._all_to_all(outgoing, sent, received, pieces[0]), received)
        parts: list[list[Tensor]] = [[] for _ in self.own]
        for rank, values in enumerate(arrived):
            shapes = [self._piece(i, rank) for i in self.own]
            flat = torch.split(values, [math.prod(shape) for shape in shapes])
            for part, piece, shape in zip(parts, flat, shapes, strict=True):
                part.append(piece.view(shape))
        return [torch.cat(part, dims[i]) for i, part in zip(self.own, parts, strict=True)]

    def scatter(self, results: Sequence[Tensor], pieces: Sequence[Tensor]) -> list[Tensor]:
        """Collective: this rank's pieces of all tensors, from every rank's *results* for those it owns.

        pieces: what :meth:`gather` was given, for type and device.
        """
        if self._dims is None:
            return self._to_all(results, pieces)
        dims = self._dims
        outgoing, sent = [], []
        for rank in range(self.world_size):
            cut = [
                result.narrow(dims[i], *chunk(self._shapes[i][dims[i]], self.world_size, rank)).reshape(-1)
                for i, result in zip(self.own, results, strict=True)
            ]
            outgoing += cut
            sent.append(sum(part.numel() for part in cut))
        sizes = [[math.prod(self._piece(i, self.rank)) for i in numbers] for numbers in self._order]
        arrived = self._all_to_all(outgoing, sent, [sum(of_rank) for of_rank in sizes], pieces[0])
        return self._sorted(torch.split(arrived, [size for of_rank in sizes for size in of_rank]), self.rank)

    def _to_all(self, results: Sequence[Tensor], pieces: Sequence[Tensor]) -> list[Tensor]:
        sizes = [[math.prod(self._shapes[i]) for i in numbers] for numbers in self._order]
        most = max(sum(of_rank) for of_rank in sizes)
        own = pieces[0].new_empty(most)
        if results:
            torch.cat([result.reshape(-1) for result in results], out=own[: sum(sizes[self.rank])])
        everything = torch.split(gathered(own, self.group), most)
        parts = [
            part
            for values, of_rank in zip(everything, sizes, strict=True)
            for part in torch.split(values[: sum(of_rank)], of_rank)
        ]
        return self._sorted(parts, None)

    def _sorted(self, parts: Sequence[Tensor], rank: int | None) -> list[Tensor]:
        """*parts*, which come owner by owner, as the pieces of *rank* (None: whole) in the order of the tensors."""
        found: dict[int, Tensor] = {}
        for i, part in zip((i for numbers in self._order for i in numbers), parts, strict=True):
            found[i] = part.view(self._shapes[i] if rank is None else self._piece(i, rank))
        return [found[i] for i in range(len(self._shapes))]

    def _piece(self, i: int, rank: int) -> tuple[int, ...]:
        """The shape of the piece of tensor *i* that *rank* has."""
        assert self._dims is not None
        shape, dim = self._shapes[i], self._dims[i]
        return (*shape[:dim], chunk(shape[dim], self.world_size, rank)[1], *shape[dim + 1 :])

    def _all_to_all(self, outgoing: Sequence[Tensor], sent: list[int], received: list[int], like: Tensor) -> Tensor:
        packed = torch.cat(list(outgoing)) if outgoing else like.new_empty(0)
        arrived = like.new_empty(sum(received))
        exchange: Callable[..., Any] = dist.all_to_all_single
        exchange(arrived, packed, received, sent, group=self.group)
        return arrived


class Keeper:
    """State of matrices that is whole and up to date with the owners only; elsewhere as it was when last settled.

    states: of all matrices, this rank's pieces; counts in them (0-d) are the same on all ranks. shapes: of their whole
    tensors, by name. dims: along which those are cut, by name; None: not at all. Making one is collective if they are cut.
    """

    def __init__(
        self,
        group: Any,
        states: Sequence[Mapping[str, Tensor]],
        shapes: Sequence[Mapping[str, Sequence[int]]],
        dims: Sequence[Mapping[str, int]] | None,
        owners: Sequence[int],
    ) -> None:
        self._group, rank = group, dist.get_rank(group)
        items = [(i, name) for i, of_one in enumerate(shapes) for name, shape in of_one.items() if len(shape)]
        self._pieces = [states[i][name] for i, name in items]
        self._exchange = Exchange(
            group,
            [shapes[i][name] for i, name in items],
            None if dims is None else [dims[i][name] for i, name in items],
            [owners[i] for i, _ in items],
        )
        kept: dict[int, dict[str, Tensor]] = {i: {} for i, owner in enumerate(owners) if owner == rank}
        self._whole = self._exchange.gather(self._pieces) if items else []
        for at, whole in zip(self._exchange.own, self._whole, strict=True):
            i, name = items[at]
            kept[i][name] = whole
        self._counts: list[tuple[Tensor, Tensor | None]] = []
        """Those in the state, and the owner's own."""
        for i, of_one in enumerate(shapes):
            for name, shape in of_one.items():
                if not len(shape):
                    mine = states[i][name].clone() if i in kept else None
                    self._counts.append((states[i][name], mine))
                    if mine is not None:
                        kept[i][name] = mine
        self.states = list(kept.values())
        """Of the matrices that this rank owns, in their order."""
        self.changed = False

    def settle(self) -> None:
        """Collective, if something has changed: write what the owners have into the state of all ranks."""
        if not self.changed:
            return
        if self._pieces:
            for own, new in zip(self._pieces, self._exchange.scatter(self._whole, self._pieces), strict=True):
                own.copy_(new)
        if self._counts:
            counts = torch.stack([torch.zeros_like(old) if mine is None else mine for old, mine in self._counts])
            dist.all_reduce(counts, group=self._group)  # one rank has them, and all others 0
            for (old, _), count in zip(self._counts, counts, strict=True):
                old.copy_(count)
        self.changed = False
