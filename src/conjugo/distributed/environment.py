"""Joining the process group: which worker this is, and of how many.

The group is described by environment variables that launchers set: those of ``torchrun`` and ``conjugo launch``, or those of
Slurm's ``srun``. Without them a process is alone, and nothing is initialised.
"""

from __future__ import annotations

import datetime
import gc
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
import torch.distributed as dist

from conjugo.errors import check

__all__ = ["Env", "init", "rank", "reported_errors", "shutdown", "where", "world_size"]

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Env:
    """The place of this process among the workers of a job."""

    rank: int
    """0 .. world_size - 1."""
    world_size: int
    local_rank: int
    """Among the workers on this host."""
    local_world_size: int
    restart_count: int
    """How often the launcher has started the workers anew, after a failure."""
    device: torch.device


def init(backend: str | None = None, *, timeout: float = 120.0, device: str | None = None) -> Env:
    """Join the process group that the launcher's environment variables describe; without any, this process is alone.

    Idempotent: where torch.distributed is initialised already, this only describes it.

    backend: as for :func:`torch.distributed.init_process_group`; None: NCCL for tensors on a GPU and gloo for those on the
    CPU, or gloo alone. timeout: seconds, > 0, that a collective may take before it is an error. device: ``"cpu"`` or
    ``"cuda"``; None: the GPU with the number of the local rank, or the CPU where there is none.

    Raises ValueError for variables that are missing or do not fit together, before anything connects, and for more workers
    than GPUs on a host; ConnectionError if the port is taken or peers do not appear within *timeout*.

    >>> init().world_size
    1
    """
    check(timeout > 0, "init", "timeout", timeout, "> 0 seconds")
    check(device in (None, "cpu", "cuda"), "init", "device", device, "'cpu', 'cuda' or None")
    place = _place(os.environ)
    local_rank, local_world_size = int(place.get("LOCAL_RANK", 0)), int(place.get("LOCAL_WORLD_SIZE", 1))
    chosen = _device(device, local_rank, local_world_size)
    if not (dist.is_available() and dist.is_initialized()) and place:
        _connect(place, backend or ("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"), timeout)
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    return Env(rank(), world_size(), local_rank, local_world_size, restarts, chosen)


def shutdown() -> None:
    """Leave the process group, when all workers are here; nothing happens where there is none.

    A worker that left while others still talk could take them down with it.
    """
    if dist.is_available() and dist.is_initialized():
        with suppress(RuntimeError):  # someone is gone already
            dist.barrier()
        dist.destroy_process_group()
        # Gloo's threads end with the last object that refers to the group; one in a cycle would outlive the interpreter, and
        # the process end in an abort.
        gc.collect()


def rank() -> int:
    """The number of this worker; 0 where torch.distributed is not initialised."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """The number of workers; 1 where torch.distributed is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def where() -> str:
    """This worker in messages, such as ``rank 1 of 4 on host a``.

    >>> where().startswith("rank 0 of 1 on host ")
    True
    """
    return f"rank {rank()} of {world_size()} on host {socket.gethostname()}"


@contextmanager
def reported_errors() -> Iterator[None]:
    """Around the work of one of several workers: exceptions name rank and host, and the launcher is told about them.

    With one worker they pass through unchanged.
    """
    try:
        yield
    except Exception as error:
        if world_size() > 1:
            error.add_note(f"({where()})")
            if os.environ.get("TORCHELASTIC_ERROR_FILE"):
                from torch.distributed.elastic.multiprocessing.errors import get_error_handler

                get_error_handler().record_exception(error)
        raise


def _place(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of ``torchrun``, made from Slurm's where only those are there; empty without a launcher."""
    place = {name: environment[name] for name in (*_NEEDED, "LOCAL_RANK", "LOCAL_WORLD_SIZE") if name in environment}
    if "RANK" not in place and int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        place = _slurm(environment) | place
    if "RANK" not in place and "WORLD_SIZE" not in place:
        return {}
    for name in _NEEDED:
        check(name in place, "init", f"the environment variable {name}", None, "set, as RANK or WORLD_SIZE is")
    for name in place.keys() - {"MASTER_ADDR"}:
        check(place[name].isdecimal(), "init", f"the environment variable {name}", place[name], "an integer >= 0")
    own, world = int(place["RANK"]), int(place["WORLD_SIZE"])
    check(own < world, "init", "the environment variable RANK", own, f"in [0, {world - 1}] (WORLD_SIZE = {world})")
    return place


def _slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """What ``srun`` tells each task; its first host is the meeting point, at a port that depends on the job."""
    nodes = environment["SLURM_STEP_NODELIST"]
    first = re.sub(r"\[(\w+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])
    job = int(environment["SLURM_JOB_ID"])
    # Such as "4(x2),3": four tasks on each of two nodes, three on the last.
    counts = [
        int(tasks)
        for tasks, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", environment["SLURM_STEP_TASKS_PER_NODE"])
        for _ in range(int(times or 1))
    ]
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(counts[int(environment["SLURM_NODEID"])]),
        "MASTER_ADDR": first,
        "MASTER_PORT": str(20000 + job % 10000),
    }


def _device(wanted: str | None, local_rank: int, local_world_size: int) -> torch.device:
    gpus = torch.cuda.device_count() if wanted != "cpu" else 0
    if not gpus:
        check(wanted != "cuda", "init", "device", wanted, "'cpu': no GPU is there")
        return torch.device("cpu")
    check(
        local_world_size <= gpus, "init", "the workers on this host", local_world_size, f"<= {gpus}, its GPUs, on a GPU"
    )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _connect(place: Mapping[str, str], backend: str, timeout: float) -> None:
    os.environ.update(place)
    address, world = f"{place['MASTER_ADDR']}:{place['MASTER_PORT']}", place["WORLD_SIZE"]
    try:
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))
    except dist.DistError as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error):
            raise ConnectionError(
                f"port {place['MASTER_PORT']} of this host is taken; choose another MASTER_PORT, or let the launcher "
                "find one (conjugo launch does; torchrun --standalone)"
            ) from error
        joined = re.search(r"(\d+)/(\d+) clients joined", str(error))
        found = f"{joined[1]} of {joined[2]} workers had joined" if joined else str(error).splitlines()[0]
        raise ConnectionError(
            f"rank {place['RANK']} of {world} on host {socket.gethostname()} waited {timeout:g} s for all workers at "
            f"{address}: {found}"
        ) from error
