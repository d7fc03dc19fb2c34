"""The workers that train one model together: what they tell each other, and how the model is spread over them."""

from __future__ import annotations

import inspect
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from conjugo.distributed import rank, world_size
from conjugo.errors import check
from conjugo.training.config import Parallel

__all__ = ["Workers", "spread"]

T = TypeVar("T")


class Workers:
    """All ranks of the process group; this process alone where there is none, and then nothing is communicated."""

    def __init__(self) -> None:
        self.rank = rank()
        self.size = world_size()

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone shows and writes things."""
        return self.rank == 0

    def on_first(self, work: Callable[[], T]) -> T:
        """Collective: what *work* gives on rank 0, which alone does it. Its exception is raised on all ranks."""
        if self.size == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = work()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        given: T = outcome[0]
        return given

    def launchers(self) -> list[str]:
        """Collective: the elastic agents that have started the workers, each called the same as long as it runs."""
        own = os.environ.get("TORCHELASTIC_RUN_ID")
        name = None if own is None else f"{own}, process {os.getppid()} on {socket.gethostname()}"
        names = [name]
        if self.size > 1:
            names = [None] * self.size
            dist.all_gather_object(names, name)
        return sorted({name for name in names if name is not None})

    def sum(self, values: Tensor) -> Tensor:
        """Collective: *values*, each added up over all ranks; the same bits on all."""
        if self.size > 1:
            dist.all_reduce(values)
        return values


def spread(
    model: nn.Module,
    parallel: Parallel,
    *,
    workers: Workers,
    device: torch.device,
    shard_workers: int | None,
    bfloat16: bool,
) -> nn.Module:
    """Collective: spread *model* over the workers; gives the module to call, *model* itself or a wrapper.

    With ``"ddp"`` each worker keeps the whole model. With ``"fsdp"`` and ``"hsdp"`` its parameters become shards (DTensors),
    gathered block by block when they are needed. Raises ValueError for *shard_workers* that is no divisor of the workers.
    """
    if workers.size == 1:
        return model
    if parallel == "ddp":
        return _replicate(model, device)
    from torch.distributed.device_mesh import init_device_mesh

    if parallel == "fsdp":
        return _shard(model, init_device_mesh(device.type, (workers.size,)), bfloat16=bfloat16)
    shard = shard_workers or int(os.environ.get("LOCAL_WORLD_SIZE", workers.size))
    accepted = f"a divisor of {workers.size}, the number of workers"
    check(workers.size % shard == 0, "TrainConfig", "shard_workers", shard, accepted)
    mesh = init_device_mesh(device.type, (workers.size // shard, shard), mesh_dim_names=("replicate", "shard"))
    return _shard(model, mesh, bfloat16=bfloat16)


def _replicate(model: nn.Module, device: torch.device) -> nn.Module:
    ddp: Any = nn.parallel.DistributedDataParallel
    # Buffers (running statistics of batch norm) are averaged where they are looked at, not copied from rank 0.
    new_name, old_name = "forward_sync_buffers", "broadcast_buffers"  # which is deprecated since PyTorch 2.13
    name = new_name if new_name in inspect.signature(ddp.__init__).parameters else old_name
    ids = [torch.cuda.current_device()] if device.type == "cuda" else None
    wrapper: nn.Module = ddp(model, device_ids=ids, **{name: False})
    return wrapper


def _shard(model: nn.Module, mesh: Any, *, bfloat16: bool) -> nn.Module:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy()
    if bfloat16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for unit in [*_blocks(model), model]:
        norms: list[nn.Module] = [m for m in unit.modules() if isinstance(m, _BatchNorm) and not hasattr(m, "unshard")]
        if bfloat16 and norms:  # batch norm wants parameters of the type of its statistics
            fully_shard(norms, mesh=mesh)
        # Also the outermost one gives its whole parameters back after a forward pass: they may be others in the next, when
        # averaged weights were evaluated.
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return model


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The parts of *model* whose parameters are gathered together: blocks of a residual network, layers of others."""
    for child in model.children():
        parts = list(child.children()) if isinstance(child, nn.Sequential) else []
        composite = any(next(part.children(), None) is not None for part in parts)
        for part in parts if composite else [child]:
            if any(p.ndim > 1 for p in part.parameters()):  # a norm layer alone stays with the model itself
                yield part
