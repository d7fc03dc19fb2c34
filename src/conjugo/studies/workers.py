"""Who does the runs: this process, or several worker processes that outlive a crash of one of them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Protocol, Self

import torch

from conjugo.studies.records import Crash, Outcome, Task

__all__ = ["Executor", "InProcess", "Job", "Workers", "executor"]

Job = Callable[[Task], Outcome]
"""Does one run. For worker processes it has to be picklable: a module's function or a `functools.partial` of one."""


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


def executor(job: Job, *, jobs: int, threads: int) -> Executor:
    """Runs *job* in this process (*jobs* = 1) or in *jobs* processes, each with *threads* threads for PyTorch."""
    return InProcess(job, threads) if jobs == 1 else Workers(job, jobs, threads)


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


class Workers:
    """Spawned processes, one pipe each: so a worker that dies (out of memory, say) is known by its task and replaced."""

    def __init__(self, job: Job, jobs: int, threads: int) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._arguments = (job, threads)
        self._room = jobs
        self._idle: list[tuple[BaseProcess, Connection]] = []
        self._busy: dict[Connection, tuple[BaseProcess, Task]] = {}

    def _spawn(self) -> tuple[BaseProcess, Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, *self._arguments), daemon=True)
        process.start()
        theirs.close()  # so that the death of the worker is the end of the pipe
        return process, ours

    @property
    def room(self) -> int:
        """Number of workers that are idle or not started yet."""
        return self._room - len(self._busy)

    def submit(self, task: Task) -> None:
        """Hand *task* to an idle worker, or to a new one."""
        process, pipe = self._idle.pop() if self._idle else self._spawn()
        self._busy[pipe] = (process, task)
        with contextlib.suppress(BrokenPipeError):  # it died while idle: next() will see that
            pipe.send(task)

    def next(self) -> tuple[Task, Outcome | Crash]:
        """The next task that ends, or whose worker does."""
        pipe = wait(list(self._busy))[0]
        assert isinstance(pipe, Connection)
        process, task = self._busy.pop(pipe)
        try:
            result = pipe.recv()
        except (EOFError, OSError):
            process.join()
            pipe.close()
            return task, Crash(task, f"the worker process died (exit code {process.exitcode})")
        self._idle.append((process, pipe))
        return task, result

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pairs = [*self._idle, *((process, pipe) for pipe, (process, _) in self._busy.items())]
        for process, _pipe in pairs:
            process.terminate()
        for process, pipe in pairs:
            process.join()
            pipe.close()


def _serve(pipe: Connection, job: Job, threads: int) -> None:
    """The life of a worker: task after task, until the pipe or the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            pipe.send(_attempt(job, pipe.recv()))


def _die_with_parent() -> None:
    """End this process, in the middle of a task too, when the parent is gone: nobody would take the result."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
