"""Starting workers, on one host or several, and starting them anew when one fails: torchrun's elastic agent, well set up."""

from __future__ import annotations

import inspect
import logging
import os
import signal
import socket
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch

from conjugo.errors import check

__all__ = ["launch"]

_FINAL = (2, 128 + signal.SIGINT, 128 + signal.SIGTERM)
"""Exit codes after which workers are not started anew: a wrong call would be wrong again, an interruption was meant."""

_ALWAYS = {
    # Otherwise workers that start anew may read addresses of the dead ones from the store of the agent, and fail, too
    # (PyTorch issue 135712).
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


def launch(
    command: Sequence[str],
    *,
    workers: int | Literal["auto"] = "auto",
    nodes: str = "1",
    rendezvous: str | None = None,
    local_address: str | None = None,
    max_restarts: int = 3,
    timeout: float = 600.0,
    grace: float = 60.0,
    env: Mapping[str, str] | None = None,
) -> int:
    """Run ``python *command`` as several workers on this host until all have ended; gives the exit code for this process.

    When a worker fails, all are stopped and started anew; they are expected to go on from their last checkpoint. Not so after
    exit code 2 (a wrong call) and after an interruption. SIGINT and SIGTERM are passed on to the workers. Must be called in the
    main thread. The workers find their places by :func:`conjugo.distributed.init`.

    Args:
        command: arguments for the Python interpreter: ``["script.py", ...]`` or ``["-m", "module", ...]``.
        workers: workers on this host, at least 1; ``"auto"``: as many as it has GPUs, or CPU cores where there is none.
        nodes: hosts, a number; or ``"MIN:MAX"``: the job begins with and goes on with so many as there are.
        rendezvous: ``"host:port"`` where the hosts meet, one of them; None for one host. The job does not survive that host.
        local_address: how other hosts reach this one, where its name does not resolve.
        max_restarts: how often the workers are started anew after a failure, at least 0. A host that comes or goes does not
            count.
        timeout: seconds to wait for the other hosts.
        grace: seconds that workers have after a signal, to write a checkpoint.
        env: more environment variables for the workers. OMP_NUM_THREADS, if it is not set, becomes the number of cores for
            each.

    Raises:
        ValueError: an argument is out of its range.
        ConnectionError: too few hosts came together within *timeout*, or the meeting point was lost.
    """
    local = _local_workers(workers)
    least, most = _nodes(nodes)
    check(max_restarts >= 0, "launch", "max_restarts", max_restarts, ">= 0")
    check(timeout > 0, "launch", "timeout", timeout, "> 0 seconds")
    check(grace > 0, "launch", "grace", grace, "> 0 seconds")
    check(len(command) > 0, "launch", "command", list(command), "a script, or -m and a module")
    if rendezvous is None:
        check(most == 1, "launch", "rendezvous", None, "'host:port' for several nodes")
    else:
        _, colon, port = rendezvous.rpartition(":")
        check(bool(colon) and port.isdecimal(), "launch", "rendezvous", rendezvous, "'host:port'")
    threads = max(1, _cores() // local)
    with _environment({"OMP_NUM_THREADS": str(threads), **os.environ, **_ALWAYS, **(env or {})}):
        meeting = _meeting(rendezvous, local_address, least, most, timeout)
        return _run_agent(command, local, meeting, max_restarts, grace)


def _meeting(rendezvous: str | None, local_address: str | None, least: int, most: int, timeout: float) -> Any:
    """What the rendezvous of torch's elastic agent needs to know."""
    from torch.distributed.elastic.rendezvous import RendezvousParameters

    settings: dict[str, Any] = {"join_timeout": timeout, "last_call_timeout": 5}
    if rendezvous is None:
        settings["is_host"] = True
    elif local_address is not None:
        host, _, port = rendezvous.rpartition(":")
        settings["is_host"] = host == local_address and _free(host, int(port))
    return RendezvousParameters(
        backend="c10d",
        endpoint=rendezvous or "127.0.0.1:0",
        run_id="conjugo" if rendezvous else uuid.uuid4().hex,
        min_nodes=least,
        max_nodes=most,
        local_addr=local_address if rendezvous else "127.0.0.1",
        **settings,
    )


def _run_agent(command: Sequence[str], local: int, meeting: Any, max_restarts: int, grace: float) -> int:
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousTimeoutError
    from torch.distributed.elastic.rendezvous import registry as rendezvous_registry

    agent_class = _agent_class()
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what it says is said better here
    here = f"host {socket.gethostname()}"
    try:
        handler = rendezvous_registry.get_rendezvous_handler(meeting)
    except Exception as error:
        raise ConnectionError(f"no meeting point at {meeting.endpoint}: {error} ({here})") from error
    spec = WorkerSpec(
        role="default",
        local_world_size=local,
        entrypoint=sys.executable,
        args=("-u", *command),
        rdzv_handler=handler,
        max_restarts=max_restarts,
        monitor_interval=0.1,
        local_addr=meeting.local_addr,
    )
    # Older versions always wait 30 seconds.
    waits = "shutdown_timeout" in inspect.signature(agent_class.__init__).parameters
    agent = agent_class(spec, DefaultLogsSpecs(), **({"shutdown_timeout": int(grace)} if waits else {}))
    try:
        result = agent.run()
    except SignalException as error:
        return int(128 + error.sigval)
    except RendezvousTimeoutError as error:
        raise ConnectionError(
            f"fewer than {meeting.min_nodes} hosts came together at {meeting.endpoint} in time ({here})"
        ) from error
    except RendezvousError as error:
        raise ConnectionError(f"the meeting point at {meeting.endpoint} is lost: {error} ({here})") from error
    finally:
        handler.shutdown()
    if not result.is_failed():
        return 0
    code: int = _first(result).exitcode
    return code if code > 0 else 128 - code


def _agent_class() -> Any:
    """Torchrun's agent, which says in plain words what happened, and does not repeat what would fail again."""
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    class Agent(LocalElasticAgent):
        def _monitor_workers(self, worker_group: Any) -> Any:
            result = super()._monitor_workers(worker_group)
            if not result.is_failed():
                return result
            failure = _first(result)
            if failure.exitcode in _FINAL:
                self._remaining_restarts = 0
                return result
            rank = next(rank for rank, other in result.failures.items() if other is failure)
            limit = worker_group.spec.max_restarts
            attempt = limit - self._remaining_restarts + 1
            next_step = f"starting all workers anew ({attempt} of {limit})" if self._remaining_restarts else "giving up"
            print(f"conjugo launch: {_described(rank, failure)}; {next_step}", file=sys.stderr, flush=True)
            return result

    return Agent


def _first(result: Any) -> Any:
    """The failure that came first: what others say, whose connections broke, is noise."""
    return min(result.failures.values(), key=lambda failure: failure.timestamp)


def _described(rank: int, failure: Any) -> str:
    where = f"rank {rank} on host {socket.gethostname()}"
    if failure.exitcode < 0:
        hint = " (out of memory?)" if -failure.exitcode == signal.SIGKILL else ""
        return f"{where} was killed by {failure.signal_name()}{hint}"
    message = failure.message if isinstance(failure.message, str) else failure.message.get("message", "")
    said = next((line for line in reversed(message.splitlines()) if line.strip()), "")
    return f"{where} ended with exit code {failure.exitcode}" + (f": {said}" if failure.error_file_data else "")


def _local_workers(workers: int | str) -> int:
    if workers == "auto":
        return torch.cuda.device_count() or _cores()
    check(isinstance(workers, int) and workers >= 1, "launch", "workers", workers, ">= 1 or 'auto'")
    return int(workers)


def _nodes(nodes: str) -> tuple[int, int]:
    parts = str(nodes).split(":")
    good = len(parts) in (1, 2) and all(part.isdecimal() for part in parts)
    least, most = (int(parts[0]), int(parts[-1])) if good else (0, 0)
    check(1 <= least <= most, "launch", "nodes", nodes, "a number >= 1, or 'MIN:MAX' with 1 <= MIN <= MAX")
    return least, most


def _free(host: str, port: int) -> bool:
    """Whether nobody listens there: no other agent on this host."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """For the time of the block *variables* are the environment."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
