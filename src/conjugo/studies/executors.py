"""Who does the runs: this process, or teams of processes of which one may crash and the others go on.

A team is one process, or several workers that share each run: they are the ranks of one process group.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import threading
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import NamedTuple, Protocol, Self

import torch

from conjugo.distributed import init
from conjugo.errors import check
from conjugo.studies.records import Crash, Outcome, Task

__all__ = ["Executor", "InProcess", "Job", "Teams", "check_devices", "executor"]

Job = Callable[[Task], Outcome]
"""Does one run. For other processes it has to be picklable: a module's function or a `functools.partial` of one. All workers
of a team call it with the same task."""

_GRACE = 0.5
"""Seconds that a process may take to be gone after another one has noticed its death."""


class Executor(Protocol):
    """Takes tasks while it has room and hands back what became of them, in the order in which they end."""

    @property
    def room(self) -> int:
        """How many more tasks may be submitted now."""

    def submit(self, task: Task) -> None:
        """Start *task*; only when there is room."""

    def next(self) -> tuple[Task, Outcome | Crash]:
        """Wait for the next task to end."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None:
        """Abandon what is still running."""


def executor(job: Job, *, jobs: int, threads: int, workers: int = 1, device: str | None = None) -> Executor:
    """Does *jobs* runs at a time, each by *workers* processes with *threads* threads for PyTorch; here, if both are 1.

    device: ``"cpu"`` keeps workers from the GPUs, of which each takes one otherwise.
    """
    return InProcess(job, threads) if jobs == workers == 1 else Teams(job, jobs, threads, workers, device)


def check_devices(owner: str, *, jobs: int, workers: int, device: str | None = None) -> None:
    """Raise ValueError, in the name of *owner*, where :func:`executor` would need more GPUs than there are."""
    gpus = torch.cuda.device_count() if workers > 1 and device != "cpu" else 0
    accepted = f"at most {gpus}, the GPUs: workers that share a run have one each"
    check(not gpus or jobs * workers <= gpus, owner, "jobs x workers", jobs * workers, accepted)


def _attempt(job: Job, task: Task) -> Outcome | Crash:
    try:
        return job(task)
    except Exception:
        return Crash(task, traceback.format_exc())


class InProcess:
    """One task at a time, here."""

    def __init__(self, job: Job, threads: int) -> None:
        self._job = job
        self._threads = threads
        self._task: Task | None = None

    @property
    def room(self) -> int:
        """1, or 0 while a task waits to be done."""
        return int(self._task is None)

    def submit(self, task: Task) -> None:
        """Keep *task* for :meth:`next`."""
        self._task = task

    def next(self) -> tuple[Task, Outcome | Crash]:
        """Do the submitted task."""
        assert self._task is not None
        task, self._task = self._task, None
        return task, _attempt(self._job, task)

    def __enter__(self) -> Self:
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        return self

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._threads_before)


class _Team:
    """Spawned processes, one pipe each, and what they have answered to the present task."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.task: Task | None = None
        self.members: list[tuple[BaseProcess, Connection]] = []
        self.answers: dict[Connection, Outcome | Crash] = {}

    def take(self, pipe: Connection) -> Outcome | Crash | None:
        """Receive from *pipe*; the result of the task, if that is known now. A team that cannot go on is ended."""
        assert self.task is not None
        rank = next(rank for rank, (_, other) in enumerate(self.members) if other is pipe)
        try:
            answer: Outcome | Crash = pipe.recv()
        except (EOFError, OSError):
            self.members[rank][0].join()
            return self._broken("")
        if isinstance(answer, Crash) and len(self.members) > 1:
            wait([process.sentinel for process, _ in self.members], timeout=_GRACE)
            return self._broken(f"worker {rank} of {len(self.members)}: {answer.error}")
        self.answers[pipe] = answer
        return self.answers[self.members[0][1]] if len(self.answers) == len(self.members) else None

    def _broken(self, said: str) -> Crash:
        """End the team because of what a member *said*, or of deaths: then lost connections are all that others can tell."""
        assert self.task is not None
        one = len(self.members) == 1
        deaths = [
            f"{'the worker process' if one else f'worker {rank} of {len(self.members)}'} died (exit code {code})"
            for rank, code in enumerate(process.exitcode for process, _ in self.members)
            if code is not None
        ]
        self.end()
        return Crash(self.task, "; ".join(deaths) or said)

    def end(self) -> None:
        """Kill the processes, in the middle of whatever they do."""
        for process, _ in self.members:
            process.kill()
        for process, pipe in self.members:
            process.join()
            pipe.close()
        self.members = []


class Teams:
    """*jobs* teams of *workers* processes. A team with a member that dies (out of memory, say) is replaced by a new one.

    So is a team of several in which one raised an exception: the others wait for it in a collective.
    """

    def __init__(self, job: Job, jobs: int, threads: int, workers: int = 1, device: str | None = None) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._job, self._threads, self._workers, self._device = job, threads, workers, device
        self._total = jobs * workers
        self._idle = [_Team(number) for number in range(jobs)]
        self._busy: list[_Team] = []

    def _start(self, team: _Team) -> None:
        port = _free_port() if self._workers > 1 else 0
        for rank in range(self._workers):
            place = _Place(rank, self._workers, team.number * self._workers + rank, self._total, port, self._device)
            ours, theirs = self._context.Pipe()
            arguments = (theirs, self._job, self._threads, place)
            process = self._context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()  # so that the death of the process is the end of the pipe
            team.members.append((process, ours))

    @property
    def room(self) -> int:
        """Number of teams that are idle or not started yet."""
        return len(self._idle)

    def submit(self, task: Task) -> None:
        """Hand *task* to an idle team, if possible one that is there already."""
        team = next((team for team in self._idle if team.members), self._idle[0])
        self._idle.remove(team)
        if not team.members:
            self._start(team)
        team.task, team.answers = task, {}
        self._busy.append(team)
        for _, pipe in team.members:
            with contextlib.suppress(BrokenPipeError):  # it died while idle: next() will see that
                pipe.send(task)

    def next(self) -> tuple[Task, Outcome | Crash]:
        """The next task that ends, or whose team does."""
        while True:
            awaited = {pipe: team for team in self._busy for _, pipe in team.members if pipe not in team.answers}
            for pipe in wait(list(awaited)):
                assert isinstance(pipe, Connection)
                team = awaited[pipe]
                assert team.task is not None
                if (result := team.take(pipe)) is not None:
                    self._busy.remove(team)
                    self._idle.append(team)
                    return team.task, result

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for team in [*self._idle, *self._busy]:
            team.end()


class _Place(NamedTuple):
    """Of one process in its team, as the variables of torchrun say it."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    port: int
    device: str | None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _serve(pipe: Connection, job: Job, threads: int, place: _Place) -> None:
    """The life of a process: task after task, until the pipe or the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    if place.world_size > 1:
        os.environ |= {
            "RANK": str(place.rank),
            "WORLD_SIZE": str(place.world_size),
            "LOCAL_RANK": str(place.local_rank),
            "LOCAL_WORLD_SIZE": str(place.local_world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(place.port),
        }
        job = partial(_joined, job, place.device)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            pipe.send(_attempt(job, pipe.recv()))


def _joined(job: Job, device: str | None, task: Task) -> Outcome:
    """Do *task* as a member of the process group; here, so that a failure to join it is a failure of the task."""
    init(device=device)
    return job(task)


def _die_with_parent() -> None:
    """End this process, in the middle of a task too, when the parent is gone: nobody would take the result."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
