"""Several ranks of a process group for one test, started within a fraction of a second.

``run(world, function, *arguments)`` calls *function* (of a module, so that other processes find it) in *world* new processes
that are the ranks of a gloo process group, and gives the list of what the ranks returned. The processes are forks of a
server that has imported torch already.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

__all__ = ["RankFailed", "free_port", "run"]

TIMEOUT = 60.0
"""Seconds after which a collective gives up; a test that hangs ends somewhat later."""

_context = multiprocessing.get_context("forkserver")
# What the tests import, and what torch imports when it is first used: half a second, for each rank of each test.
_context.set_forkserver_preload(
    [
        "torch._dynamo",
        "torch.distributed.checkpoint.staging",
        "torch.distributed.device_mesh",
        "torch.distributed.fsdp",
        "conjugo.training",
        "tests.distributed.test_checkpoint",
        "tests.distributed.test_nlcg",
        "tests.distributed.test_virtual_batch",
    ]
)


class RankFailed(AssertionError):
    """A rank raised an exception (its traceback is in the message) or died; ``kinds``: names of the exceptions by rank."""

    def __init__(self, message: str, kinds: dict[int, str]) -> None:
        super().__init__(message)
        self.kinds = kinds


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def run(
    world: int, function: Callable[..., Any], *arguments: Any, timeout: float = TIMEOUT, initialize: bool = True
) -> list[Any]:
    """What *function(\\*arguments)* returns on each rank of a gloo group of *world* processes.

    timeout: of each collective, and of the whole call plus some seconds. initialize: False leaves the process group to
    *function*; MASTER_ADDR, MASTER_PORT, RANK, WORLD_SIZE and LOCAL_RANK are set in any case. Raises RankFailed, after all
    ranks have ended, if one of them failed.
    """
    port = free_port()
    work = pickle.dumps((function, arguments))  # otherwise all ranks would share the memory of tensors
    pipes: dict[Connection, int] = {}
    processes = []
    for rank in range(world):
        ours, theirs = _context.Pipe(duplex=False)
        process = _context.Process(
            target=_rank, args=(theirs, rank, world, port, timeout, initialize, work), daemon=True
        )
        process.start()
        theirs.close()
        pipes[ours] = rank
        processes.append(process)
    results: dict[int, Any] = {}
    failures: dict[int, tuple[str, str]] = {}
    until = time.monotonic() + timeout + 30
    waiting = dict(pipes)
    while waiting and time.monotonic() < until:
        for pipe in wait(list(waiting), timeout=1.0):
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            try:
                good, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                processes[rank].join()
                good, value = False, ("died", f"exit code {processes[rank].exitcode}")
            (results if good else failures)[rank] = value
    for rank in waiting.values():
        failures[rank] = ("hung", f"nothing heard for {timeout + 30:.0f} s")
    for process in processes:
        process.join(timeout=0 if waiting else 10)
        if process.is_alive():
            process.kill()
            process.join()
    if failures:
        text = "\n".join(f"rank {rank}: {kind}\n{trace}" for rank, (kind, trace) in sorted(failures.items()))
        raise RankFailed(text, {rank: kind for rank, (kind, _) in failures.items()})
    return [results[rank] for rank in range(world)]


def _rank(
    pipe: Connection,
    rank: int,
    world: int,
    port: int,
    timeout: float,
    initialize: bool,
    work: bytes,
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.manual_seed(0)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in place.items()})
    try:
        if initialize:
            dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=timeout))
        function, arguments = pickle.loads(work)
        value = function(*arguments)
        if initialize:
            dist.barrier()  # without it gloo may abort at exit
            dist.destroy_process_group()
        # Not send(): tensors would be shared memory of a process that ends.
        pipe.send_bytes(pickle.dumps((True, value)))
    except BaseException as error:
        pipe.send_bytes(pickle.dumps((False, (type(error).__name__, traceback.format_exc()))))
        os._exit(1)  # others may wait in a collective: a broken connection tells them
