"""Ranks of a gloo group for a benchmark: one process each, on this machine."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["run"]


def run(world: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """What rank 0 of *world* gives back from *function*, of a module, called with *arguments* on all ranks."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = context.SimpleQueue()
    workers = [
        context.Process(target=_rank, args=(rank, world, port, results, function, arguments), daemon=True)
        for rank in range(world)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        if worker.exitcode:
            raise SystemExit(f"a worker ended with exit code {worker.exitcode}")
    return results.get()


def _rank(
    rank: int, world: int, port: int, results: Any, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=300))
    value = function(*arguments)
    if rank == 0:
        results.put(value)
    dist.barrier()
    dist.destroy_process_group()
