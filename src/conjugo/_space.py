"""Which rank holds which part of which parameter: the one place where optimizers add up over ranks.

Parameters may be whole on every rank (one process, DDP), DTensors (FSDP2, HSDP, tensor parallelism, any mixture of meshes), or
whole while the optimizer's state is cut into slices. In each case a global inner product is

    all_reduce_SUM( sum over parameters of own * <x(local), y(local)> )

where ``own`` is 1 on exactly one of the ranks that hold the same elements. Nothing else in the package may reduce over
DTensors: ``float(dtensor.sum())`` is silently the local part only, and every DTensor reduction costs a collective of its own.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any, Self, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from conjugo._tensors import Array, dot
from conjugo.errors import check

__all__ = ["ParamSpace", "Slices", "chunk", "from_local", "gathered", "is_dtensor", "to_local"]


def is_dtensor(tensor: object) -> TypeGuard[Any]:
    """Whether *tensor* is a DTensor; importing those costs half a second, which nobody pays who has none."""
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def to_local(tensor: Tensor) -> Tensor:
    """This rank's piece of a DTensor, on the same memory; any other tensor itself."""
    if not is_dtensor(tensor):
        return tensor
    local = tensor.detach().to_local()
    return local.wait() if hasattr(local, "wait") else local  # type: ignore[no-any-return]  # a collective may be under way


def from_local(local: Tensor, like: Tensor) -> Tensor:
    """*local* as this rank's piece of a tensor laid out as *like*; itself where that is no DTensor.

    *local* may have more dimensions at its end than the pieces of *like*.
    """
    if not is_dtensor(like):
        return local
    from torch.distributed.tensor import DTensor

    shape = torch.Size([*like.shape, *local.shape[like.ndim :]])
    # The strides of the whole are in the order of those of the piece.
    stride, step = [0] * len(shape), 1
    for i in sorted(range(len(shape)), key=lambda i: (local.stride(i), local.size(i))):
        stride[i], step = step, step * max(shape[i], 1)
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=shape, stride=tuple(stride)
    )


def chunk(n: int, world_size: int, rank: int) -> tuple[int, int]:
    """First of *n* rows that *rank* has of a tensor with placement Shard(0), and their number."""
    size = -(-n // world_size)
    first = min(rank * size, n)
    return first, min(size, n - first)


def gathered(piece: Tensor, group: Any) -> Tensor:
    """Collective: the tensors of all ranks, 1-d and of one size, in one."""
    everything = piece.new_empty(dist.get_world_size(group) * len(piece))
    # Newer versions have a new name for it and warn about the old one.
    gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(everything, piece, group=group)
    return everything


class Slices:
    """Rows of whole tensors, shared out over the ranks of a group like a DTensor with placement Shard(0) (as FSDP2 does).

    An optimizer that keeps its state for its own rows only stores 1/W of it on each of W ranks. Since that is how FSDP2 lays
    out parameters, checkpoints fit both. A tensor with fewer rows than ranks lies on the first ranks; one without dimensions
    is on all.
    """

    def __init__(self, group: Any, device_type: str) -> None:
        from torch.distributed.device_mesh import DeviceMesh

        self.mesh = DeviceMesh.from_group(group, device_type)
        self.group = group
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)

    @classmethod
    def over(cls, group: Any, device_type: str) -> Self | None:
        """Slices over *group* (None: all ranks); None where there is one rank only."""
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        return None if group is None or dist.get_world_size(group) == 1 else cls(group, device_type)

    def rows(self, n: int, rank: int | None = None) -> slice:
        """Those of the *n* rows of a tensor that *rank* (default: this one) has."""
        first, size = chunk(n, self.world_size, self.rank if rank is None else rank)
        return slice(first, first + size)

    def piece(self, tensor: Tensor) -> Tensor:
        """This rank's rows of *tensor*: a view."""
        return tensor[self.rows(len(tensor))] if tensor.ndim else tensor

    def home(self, tensor: Tensor) -> Tensor:
        """*tensor*, whole on every rank, as a DTensor on the memory of this rank's rows."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        return DTensor.from_local(
            self.piece(tensor.detach()),
            self.mesh,
            [Shard(0) if tensor.ndim else Replicate()],
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )

    @torch.no_grad()
    def gather(self, tensors: Iterable[Tensor], *, bucket: int = 2**23) -> None:
        """Copy every rank's rows of *tensors*, whole but changed in this rank's rows only, to all ranks.

        bucket: about so many values travel in one collective.
        """
        for _, same in groupby((t for t in tensors if t.ndim), key=lambda t: (t.dtype, t.device)):
            waiting: list[Tensor] = []
            for t in same:
                waiting.append(t)
                if sum(w.numel() for w in waiting) >= bucket:
                    self._gather(waiting)
                    waiting = []
            if waiting:
                self._gather(waiting)

    def _gather(self, tensors: list[Tensor]) -> None:
        sizes = [
            sum(t[self.rows(len(t), rank)].numel() for t in tensors)
            for rank in (0, self.rank)  # nobody has more than the first rank
        ]
        own = torch.empty(sizes[0], dtype=tensors[0].dtype, device=tensors[0].device)
        torch.cat([self.piece(t).reshape(-1) for t in tensors], out=own[: sizes[1]])
        for rank, values in enumerate(torch.split(gathered(own, self.group), sizes[0])):
            if rank == self.rank:
                continue
            start = 0
            for t in tensors:
                rows = t[self.rows(len(t), rank)]
                rows.copy_(values[start : start + rows.numel()].view(rows.shape))
                start += rows.numel()


class ParamSpace:
    """The space that the parameters of a model span, on however many ranks they lie, and sums over all of it.

    Where torch.distributed is not initialised, or the group has one rank, nothing is communicated. Otherwise the constructor,
    and every method that says so, is a collective operation: all ranks of the group must call it.

    Args:
        params: the parameters, the same list on all ranks (DTensors: of their own pieces).
        group: the ranks that hold them; None: all ranks, if torch.distributed is initialised. Independent models on the
            ranks of a job need groups of their own, of one rank each.
        sync: whether sums go through a collective even where every rank could know them (whole parameters under DDP): then
            all ranks get the sums of rank 0, also where different hardware rounds differently. None: only where needed.
        slices: how whole parameters are cut, if they are: each rank then sums over its rows only.
        labels: what sets the parameters apart between ranks, beside shape, type and layout.
        owner: whose name error messages bear.

    Raises:
        ValueError: no or duplicate parameters; a parameter with placement Partial; a mesh that reaches beyond *group*;
            parameters that differ between ranks (on all ranks; the message names rank and parameter).

    >>> w, b = torch.ones(2, 3), torch.ones(3)
    >>> space = ParamSpace([w, b])
    >>> space.dots([([w, b], [w, 2 * b])]).tolist()
    [12.0]
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        group: Any = None,
        sync: bool | None = None,
        slices: Slices | None = None,
        labels: Sequence[object] | None = None,
        owner: str = "ParamSpace",
    ) -> None:
        self.params = list(params)
        check(len(self.params) > 0, owner, "params", [], "at least one parameter")
        check(len({id(p) for p in self.params}) == len(self.params), owner, "params", "a duplicate", "all different")
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        self.world_size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.group = group if self.world_size > 1 else None
        self.slices = slices
        self._owner = owner
        self.has_dtensors = any(is_dtensor(p) for p in self.params)
        self._check_layout()
        if self.group is not None:
            self._check_alike(labels)
        cut = slices is not None or any(
            is_dtensor(p) and not all(q.is_replicate() for q in p.placements) for p in self.params
        )
        self.sharded = self.group is not None and (cut or bool(sync))
        """Whether sums go through a collective."""
        self.owned = self._owned() if self.sharded else [True] * len(self.params)
        """For each parameter whether this rank's piece of it counts here; on other ranks there may be copies."""
        self._own: dict[torch.device, Tensor] = {}

    # Layout ----------------------------------------------------------------------------------------------------------

    def local(self, tensor: Tensor) -> Tensor:
        """This rank's piece of a parameter or gradient, on the same memory."""
        if self.slices is not None and not is_dtensor(tensor):
            return self.slices.piece(tensor)
        return to_local(tensor)

    def zeros(self) -> list[Tensor]:
        """Zeros laid out like the parameters."""
        return [torch.zeros_like(p) for p in self.params]

    def canonical_grads(self) -> list[Tensor]:
        """The gradients, each laid out like its parameter; with sequence parallelism some arrive as partial sums.

        Collective where such a gradient is; it takes the place of ``p.grad``. Raises ValueError for a parameter without
        gradient and for a gradient that is a DTensor where the parameter is none, or the other way round.
        """
        for i, p in enumerate(self.params):
            grad = p.grad
            check(grad is not None, self._owner, f"the gradient of parameter {i}", None, "a tensor")
            assert grad is not None
            given = type(grad).__name__
            check(is_dtensor(grad) == is_dtensor(p), self._owner, f"the gradient of parameter {i}", given, "like it")
            if is_dtensor(grad) and grad.placements != p.placements:  # type: ignore[attr-defined]
                p.grad = grad.redistribute(placements=p.placements)  # type: ignore[attr-defined]
        return [p.grad for p in self.params if p.grad is not None]

    def _check_layout(self) -> None:
        ranks = set() if self.group is None else set(dist.get_process_group_ranks(self.group))
        for i, p in enumerate(self.params):
            if not is_dtensor(p):
                continue
            partial = any(q.is_partial() for q in p.placements)
            check(not partial, self._owner, f"parameter {i}", p.placements, "sharded or replicated, not a partial sum")
            beyond = set(p.device_mesh.mesh.flatten().tolist()) - ranks if self.group is not None else set()
            check(not beyond, self._owner, "process_group", sorted(ranks), f"all ranks of the mesh of parameter {i}")

    def _check_alike(self, labels: Sequence[object] | None) -> None:
        """Collective: every rank must have the same parameters; else sums would be garbage, or the job would hang."""
        names = [f"{i}" for i in range(len(self.params))] if labels is None else [str(label) for label in labels]
        mine = [f"{name}: {_described(p)}" for name, p in zip(names, self.params, strict=True)]
        digest = hashlib.sha256("\n".join(mine).encode()).hexdigest()
        digests = self._from_all(digest)
        if len(set(digests)) == 1:
            return
        everyone = self._from_all((socket.gethostname(), mine))
        here = everyone[0][1]
        for rank, (host, theirs) in enumerate(everyone):
            if theirs == here:
                continue
            at = next((i for i, (a, b) in enumerate(zip(here, theirs)) if a != b), min(len(here), len(theirs)))
            first, other = (
                f"parameter {items[at]}" if at < len(items) else f"{len(items)} parameters" for items in (here, theirs)
            )
            raise ValueError(
                f"{self._owner}: all ranks must have the same parameters, got on rank {rank} (host {host}) {other}, "
                f"on rank 0 {first}"
            )

    def _owned(self) -> list[bool]:
        replicas = self._first_replicas()
        owned = []
        for i, p in enumerate(self.params):
            if is_dtensor(p):
                coordinate = p.device_mesh.get_coordinate()
                copies = [c for c, q in zip(coordinate or (1,), p.placements) if q.is_replicate()]
                owned.append(coordinate is not None and not any(copies) and replicas[i])
            elif self.slices is not None and p.ndim:
                owned.append(True)
            else:
                owned.append(self.rank == 0)
        return owned

    def _first_replicas(self) -> list[bool]:
        """Collective if a mesh does not span the group: whether this rank's mesh is the first of those that hold a parameter.

        In data and tensor parallelism together, a parameter that is not split by the latter lies on one mesh per rank of it.
        """
        meshes = [tuple(p.device_mesh.mesh.flatten().tolist()) if is_dtensor(p) else () for p in self.params]
        if all(len(mesh) in (0, self.world_size) for mesh in meshes):
            return [True] * len(self.params)
        distinct = sorted(set(meshes))
        everyone = self._from_all((distinct, [distinct.index(mesh) for mesh in meshes]))
        return [mesh == min(known[of[i]] for known, of in everyone) for i, mesh in enumerate(meshes)]

    def _from_all(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value, group=self.group)
        return found

    # Sums ------------------------------------------------------------------------------------------------------------

    def reduce(self, parts: Array) -> Array:
        """Collective if :attr:`sharded`: sums over all ranks of what each has summed over its pieces.

        parts: [..., n], one column for each parameter; tensor, or numpy array on the host. All ranks get the same bits.
        Where nothing is sharded, *parts* comes back as it is.
        """
        return self.reduce_with_mean(parts, None)[0]

    def reduce_with_mean(self, parts: Array, value: Array | None) -> tuple[Array, Array | None]:
        """:meth:`reduce`, and in the same collective the mean over the ranks of *value*, 0-d or a number (or None).

        Where nothing is sharded, both come back as they are.
        """
        if not self.sharded:
            return parts, value
        on_host = not isinstance(parts, Tensor)
        sums = torch.from_numpy(parts) if on_host else parts
        # Not a product with 0: that would let a NaN through.
        packed = torch.where(self._mask(sums.device), sums, 0.0).reshape(-1)
        if value is not None:
            share = torch.as_tensor(value, dtype=packed.dtype, device=packed.device).reshape(1) / self.world_size
            packed = torch.cat([packed, share])
        dist.all_reduce(packed, group=self.group)
        sums = packed[: sums.numel()].view(sums.shape)
        mean = None if value is None else packed[-1]
        if on_host:
            return sums.numpy(), None if mean is None else mean.item()
        return sums, mean

    def mean(self, value: Array) -> Array:
        """Collective, if there are several ranks: the mean of a 0-d tensor or a number over all ranks."""
        if self.group is None:
            return value
        packed = (
            torch.as_tensor(value, dtype=torch.float64).reshape(1) if not isinstance(value, Tensor) else value.clone()
        )
        dist.all_reduce(packed, group=self.group)
        packed /= self.world_size
        return packed if isinstance(value, Tensor) else packed.item()

    def dots(self, pairs: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> Tensor:
        """Collective if :attr:`sharded`: the inner products <x, y> over the whole space, [k], in float64.

        pairs: k pairs of lists of tensors (real, of one type) laid out like the parameters.
        """
        rows = [
            torch.stack([dot(self.local(x.detach()), self.local(y.detach())) for x, y in zip(xs, ys, strict=True)])
            for xs, ys in pairs
        ]
        sums: Tensor = self.reduce(torch.stack(rows)).sum(-1)
        return sums

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """Collective if :attr:`sharded`: the Euclidean norm over the whole space, 0-d, in float64."""
        return self.dots([(tensors, tensors)])[0].sqrt()

    def isfinite(self, tensors: Sequence[Tensor], extra: Sequence[Tensor] = ()) -> bool:
        """Collective, if there are several ranks: whether all values of *tensors* and *extra*, on all ranks, are finite."""
        checked = [self.local(t.detach()).isfinite().all() for t in tensors]
        checked += [to_local(t.detach()).isfinite().all() for t in extra]
        good = torch.stack(checked).all().to(torch.int32)
        if self.group is not None:
            dist.all_reduce(good, op=dist.ReduceOp.MIN, group=self.group)
        return bool(good)

    def _mask(self, device: torch.device) -> Tensor:
        if device not in self._own:
            self._own[device] = torch.tensor(self.owned, device=device)
        return self._own[device]


def _described(p: Tensor) -> str:
    layout = ""
    if is_dtensor(p):
        layout = f", {list(p.placements)} on a mesh of {list(p.device_mesh.mesh.shape)}"
    return f"shape {list(p.shape)}, {p.dtype}{layout}"
