"""The same numbers on all ranks, so that all take the same branches and multiply the same vectors."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["agree", "same"]

Value = TypeVar("Value", float, int, bool, Tensor)


def agree(value: Value, group: Any) -> Value:
    """What rank 0 of *group* has for *value*, as a value of the same type (a tensor: also shape, dtype and device).

    All ranks of *group* call it together. group: None gives *value* back. A number travels as float64.
    """
    if group is None:
        return value
    copy = value.detach().clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else _number(value)
    sent = _movable(copy, group)
    dist.broadcast(sent, src=dist.get_global_rank(group, 0), group=group)
    return sent.to(value.device) if isinstance(value, Tensor) else type(value)(sent.item())


def same(vectors: Tensor, witness: Tensor, group: Any) -> Tensor:
    """*vectors*, or those of rank 0 of *group* if the ranks differ in *witness*, numbers that they computed with the vectors.

    Ranks on different kinds of machines may round differently; what an operator multiplies must be one vector all the same,
    and an iteration lets differences grow. Where nothing differs this costs two messages as small as *witness*.
    """
    if group is None:
        return vectors
    apart = _movable(_number(not torch.equal(witness, agree(witness, group))), group)
    dist.all_reduce(apart, op=dist.ReduceOp.MAX, group=group)
    return agree(vectors, group) if apart.item() else vectors


def _number(value: float) -> Tensor:
    return torch.tensor(float(value), dtype=torch.float64)


def _movable(tensor: Tensor, group: Any) -> Tensor:
    """*tensor* on a device whose memory *group* moves: NCCL knows none of the host."""
    if tensor.device.type == "cpu" and "gloo" not in str(dist.get_backend_config(group)):
        return tensor.to(torch.device("cuda", torch.cuda.current_device()))
    return tensor
