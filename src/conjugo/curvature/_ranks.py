"""The same numbers on all ranks, so that all take the same branches."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["agree"]

Value = TypeVar("Value", float, int, bool, Tensor)


def agree(value: Value, group: Any) -> Value:
    """What rank 0 of *group* has for *value*, as a value of the same type (a tensor: also shape, dtype and device).

    All ranks of *group* call it together. group: None gives *value* back. A number travels as float64.
    """
    if group is None:
        return value
    sent = (
        value.detach().clone(memory_format=torch.contiguous_format)
        if isinstance(value, Tensor)
        else torch.tensor(float(value), dtype=torch.float64)
    )
    if sent.device.type == "cpu" and "gloo" not in str(dist.get_backend_config(group)):  # NCCL moves device memory only
        sent = sent.to(torch.device("cuda", torch.cuda.current_device()))
    dist.broadcast(sent, src=dist.get_global_rank(group, 0), group=group)
    return sent.to(value.device) if isinstance(value, Tensor) else type(value)(sent.item())
