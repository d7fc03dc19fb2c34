"""Runs the plans of a study's cells: in parallel, journaled, resumable, with progress."""

from __future__ import annotations

import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from conjugo.studies.executors import Job, executor
from conjugo.studies.records import Crash, Journal, Run, Task

__all__ = ["Plan", "execute"]


class Plan(Protocol):
    """What one cell of a study needs."""

    @property
    def cell(self) -> tuple[str, str, int]:
        """The (study, contender, batch size) of its tasks."""

    @property
    def size(self) -> int:
        """How many runs it has in all."""

    def ready(self, finished: Sequence[Run]) -> list[Task]:
        """The tasks that can start now that *finished* (runs of this cell, in order of their end) are there.

        A pure function of *finished*: that is what makes a study resumable. Tasks that are finished or already running
        may be among them.
        """


def execute(
    plans: Sequence[Plan],
    job: Job,
    journal: Journal,
    *,
    jobs: int = 1,
    threads: int = 1,
    workers: int = 1,
    device: str | None = None,
    progress: bool | None = None,
    on_finish: Callable[[Run], None] = lambda run: None,
) -> list[Crash]:
    """Do all runs of *plans* that *journal* does not hold yet, and append them to it as they finish.

    Cells are finished one after the other as far as possible, so an interrupted study has whole cells to show. A run that
    crashes ends its cell, not the study; the crashes are returned. jobs, threads, workers, device: see
    :func:`conjugo.studies.executors.executor`. progress: None shows a bar if standard error is a terminal.
    """
    finished: defaultdict[tuple[str, str, int], list[Run]] = defaultdict(list)
    for run in journal.runs:
        finished[run.task.cell].append(run)
    known = {run.task for run in journal.runs}
    by_cell = {plan.cell: plan for plan in plans}
    waiting: deque[Task] = deque()

    def new_tasks(plan: Plan) -> list[Task]:
        tasks = [task for task in plan.ready(finished[plan.cell]) if task not in known]
        known.update(tasks)
        return tasks

    for plan in plans:
        waiting.extend(new_tasks(plan))
    crashes: list[Crash] = []
    if not waiting:
        return crashes

    display = _Progress(plans, [run for run in journal.runs if run.task.cell in by_cell], jobs=jobs, show=progress)
    in_flight = 0
    given_up = set()
    with executor(job, jobs=jobs, threads=threads, workers=workers, device=device) as pool, display:
        while waiting or in_flight:
            while waiting and pool.room:
                display.started(waiting[0])
                pool.submit(waiting.popleft())
                in_flight += 1
            task, result = pool.next()
            in_flight -= 1
            if isinstance(result, Crash):
                crashes.append(result)
                given_up.add(task.cell)
                waiting = deque(other for other in waiting if other.cell != task.cell)
                continue
            run = Run(task, result)
            journal.append(run)
            finished[task.cell].append(run)
            on_finish(run)
            display.finished(run)
            if task.cell not in given_up:
                waiting.extendleft(reversed(new_tasks(by_cell[task.cell])))
    return crashes


class _Progress:
    """A rich progress bar in runs, with the time left.

    Runs differ in length mostly by their number of steps, so the time left is the number of runs to come at each batch
    size times the mean duration there (the mean of all where nothing has finished yet).
    """

    def __init__(self, plans: Iterable[Plan], runs: Sequence[Run], *, jobs: int, show: bool | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._jobs = jobs
        self._to_come: defaultdict[int, int] = defaultdict(int)
        for plan in plans:
            self._to_come[plan.cell[2]] += plan.size
        self._seconds: defaultdict[int, list[float]] = defaultdict(list)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("runs, {task.fields[left]} left"),
            console=Console(stderr=True),
            disable=not (sys.stderr.isatty() if show is None else show),
            transient=True,
        )
        self._id = self._bar.add_task("", total=sum(self._to_come.values()), left="?")
        for run in runs:
            self.finished(run)

    def started(self, task: Task) -> None:
        self._bar.update(self._id, description=f"{task.contender}, batch {task.batch_size}")

    def finished(self, run: Run) -> None:
        self._to_come[run.task.batch_size] -= 1
        self._seconds[run.task.batch_size].append(run.outcome.seconds)
        self._bar.update(self._id, advance=1, left=_duration(self._left()))

    def _left(self) -> float:
        everywhere = [second for seconds in self._seconds.values() for second in seconds]
        total = 0.0
        for batch_size, count in self._to_come.items():
            here = self._seconds[batch_size] or everywhere
            total += count * sum(here) / len(here)
        return total / self._jobs

    def __enter__(self) -> None:
        self._bar.start()

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
