"""Experiments over grids of learning rates: the plan of a cell, what came out of it, and the run directory."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conjugo._files import write_aside
from conjugo.errors import CorruptFile, check
from conjugo.studies import statistics
from conjugo.studies.compare import differences
from conjugo.studies.engine import execute
from conjugo.studies.executors import Job, check_devices
from conjugo.studies.plans import FIRST_TUNING_SEED, of_phase
from conjugo.studies.records import Journal, Phase, Run, Task
from conjugo.studies.reproduce.paper import Request
from conjugo.studies.statistics import Octaves
from conjugo.training import TrainConfig

__all__ = ["Grid", "GridResult", "open_folder", "run_grids", "save"]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A cell of an experiment: every learning rate of *lrs* (ascending) with *seeds* seeds.

    choose: these are tuning runs, and the best learning rate, by the mean over the seeds, is then run with as many fresh
    seeds. Otherwise there is no choice to be made and they are the final runs.
    """

    study: str
    contender: str
    batch_size: int
    lrs: tuple[float, ...]
    seeds: int
    choose: bool

    @property
    def cell(self) -> tuple[str, str, int]:
        """Study, contender and batch size."""
        return self.study, self.contender, self.batch_size

    @property
    def size(self) -> int:
        """Number of runs."""
        return (len(self.lrs) + self.choose) * self.seeds

    def ready(self, finished: Sequence[Run]) -> list[Task]:
        """The grid; once it is done and if there is a choice, the best learning rate with fresh seeds."""
        result = GridResult(self, tuple(finished))
        if self.choose and len(result.searched) == len(self.lrs) * self.seeds:
            return self._tasks("final", [result.best], seed=0)
        return self._tasks("tune", self.lrs, seed=FIRST_TUNING_SEED) if self.choose else self._tasks("final", self.lrs)

    def _tasks(self, phase: Phase, lrs: Sequence[float], seed: int = 0) -> list[Task]:
        return [
            Task(
                study=self.study,
                contender=self.contender,
                batch_size=self.batch_size,
                phase=phase,
                index=i * self.seeds + j,
                seed=seed + j,
                lr=lr,
            )
            for i, lr in enumerate(lrs)
            for j in range(self.seeds)
        ]


@dataclass(frozen=True)
class GridResult:
    """The finished runs of a grid."""

    grid: Grid
    runs: tuple[Run, ...]

    @property
    def searched(self) -> tuple[Run, ...]:
        """The runs over all learning rates."""
        return of_phase("tune" if self.grid.choose else "final", self.runs)

    @property
    def finals(self) -> tuple[Run, ...]:
        """The runs that count: at the best learning rate, with fresh seeds if there were others to choose it by."""
        finals = of_phase("final", self.runs)
        return finals if self.grid.choose else tuple(run for run in finals if run.task.lr == self.best)

    @property
    def complete(self) -> bool:
        """Whether all runs have finished."""
        return len(self.runs) == self.grid.size

    @property
    def points(self) -> list[tuple[float, float]]:
        """(learning rate, mean accuracy) over the grid, as far as there are runs."""
        return [(lr, statistics.mean_sd(self.at(lr))[0]) for lr in self.grid.lrs if self.at(lr)]

    def at(self, lr: float) -> list[float]:
        """The accuracies of the grid's runs at *lr*."""
        return [run.outcome.accuracy for run in self.searched if run.task.lr == lr]

    @property
    def best(self) -> float:
        """The learning rate with the highest mean accuracy; among equals the one with the lowest mean loss."""

        def score(point: tuple[float, float]) -> tuple[float, float]:
            losses = [run.outcome.loss for run in self.searched if run.task.lr == point[0]]
            return point[1], -math.fsum(math.inf if loss is None else loss for loss in losses)

        return max(self.points, key=score)[0]

    @property
    def at_edge(self) -> bool:
        """Whether the best learning rate is the smallest or the largest of the grid."""
        return self.best in (self.grid.lrs[0], self.grid.lrs[-1])

    @property
    def accuracies(self) -> list[float]:
        """Of the runs that count, as fractions."""
        return [run.outcome.accuracy for run in self.finals]

    @property
    def octaves(self) -> Octaves | None:
        """How wide the usable learning rates are (:func:`conjugo.studies.statistics.usable_octaves`)."""
        return statistics.usable_octaves(self.points)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON: the summary, without the single runs, which are in the journal."""
        mean, sd = statistics.mean_sd(self.accuracies)
        octaves = self.octaves
        return {
            "study": self.grid.study,
            "contender": self.grid.contender,
            "batch_size": self.grid.batch_size,
            "grid": [{"lr": lr, "accuracies": self.at(lr)} for lr, _ in self.points],
            "lr": self.best,
            "at_edge": self.at_edge,
            "accuracies": self.accuracies,
            "mean": mean,
            "sd": None if math.isnan(sd) else sd,
            "octaves": None if octaves is None else octaves._asdict(),
        }


def run_grids(
    grids: Sequence[Grid], job: Job, description: Mapping[str, Any], request: Request
) -> tuple[tuple[GridResult, ...], tuple[str, ...]]:
    """Do all runs of *grids* that are not in the run directory yet; the results, and messages about cells given up.

    description: all that the runs depend on, as plain values; it goes into config.json, and only an experiment with an
    equal one is continued. A cell with a crashed run is left out; resuming tries it again.
    """
    check_devices("reproduce", jobs=request.jobs, workers=request.workers)
    if request.out is not None:
        whole = {**description, "workers": request.workers}
        open_folder(request.out, json.loads(json.dumps(whole)), resume=request.resume)
    with Journal(None if request.out is None else request.out / "journal.jsonl") as journal:
        crashes = execute(grids, job, journal, jobs=request.jobs, workers=request.workers, progress=request.progress)
        runs = tuple(journal.runs)
    results = [_result(grid, [run for run in runs if run.task.cell == grid.cell]) for grid in grids]
    messages = {crash.task.cell: f"{crash.task}: {crash.error.strip().splitlines()[-1]}" for crash in crashes}
    return tuple(result for result in results if result.complete), tuple(messages.values())


def _result(grid: Grid, runs: Sequence[Run]) -> GridResult:
    return GridResult(grid, (*of_phase("tune", runs), *of_phase("final", runs)))


def open_folder(out: Path, description: Any, *, resume: bool) -> None:
    """Make folder *out* with *description* as its config.json, or to *resume* see that it holds an equal one.

    Raises ValueError if it holds another experiment, or one at all without *resume*; CorruptFile.
    """
    path = out / "config.json"
    if not path.exists():
        check(not resume, "reproduce", "out", str(out), "a folder that holds an experiment, to resume it")
        out.mkdir(parents=True, exist_ok=True)
        write_aside(path, json.dumps(description, indent=1))
        return
    check(resume, "reproduce", "out", str(out), "a folder without an experiment, unless that is resumed")
    try:
        before = json.loads(path.read_bytes())
    except ValueError as error:
        raise CorruptFile(f"{path}: not valid JSON ({error})") from error
    if "train" in before:  # settings that older versions did not have get their defaults
        before["train"] = json.loads(json.dumps(TrainConfig.from_dict(before["train"]).to_dict()))
    if different := differences({"workers": 1, **before}, description):
        raise ValueError(f"reproduce: {out} holds another experiment: {'; '.join(different)}")


def save(content: Mapping[str, Any], figures: Mapping[str, Any], out: Path) -> None:
    """Write results.json, and each of *figures* as .png and .svg, into folder *out*."""
    from conjugo.studies import drawing

    write_aside(out / "results.json", json.dumps(content, allow_nan=False, indent=1))
    for name, figure in figures.items():
        write_aside(out / f"{name}.png", drawing.png(figure))
        write_aside(out / f"{name}.svg", drawing.svg(figure, name, background="white"))
