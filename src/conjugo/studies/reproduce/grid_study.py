"""Studies over grids of one hyperparameter: optimizers x settings, the best value chosen on held-out training data.

Every optimizer gets a grid of values, of its learning rate or of another option, with as many seeds. A tuning run is trained
on a part of the training data and judged on the rest, which part that is depends on the seed; the value with the best mean is
run with as many fresh seeds on all training data, and only these runs see the test data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from conjugo.studies import statistics
from conjugo.studies.records import Outcome, Task
from conjugo.studies.reproduce.grids import Grid, GridResult, run_grids
from conjugo.studies.reproduce.paper import Claim, Judge, Request, compared, listed, new_table
from conjugo.studies.runs import Contender, load_data, num_steps, train_once, tuning_data, versions
from conjugo.studies.summary import percent
from conjugo.training import TrainConfig

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Entrant", "GridStudy", "GridStudyResult", "run_study", "run_task"]


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """An optimizer as it takes part.

    label: as readers know it. optimizer: its name in the catalogue. values: the grid, ascending. axis: what the values are
    of, the learning rate (``lr``) or an option. options: those that do not change. lr: where the axis is another option.
    """

    label: str
    optimizer: str
    values: tuple[float, ...]
    axis: str = "lr"
    options: Mapping[str, Any] = field(default_factory=dict)
    lr: float | None = None

    def at(self, value: float) -> tuple[float, dict[str, Any]]:
        """Learning rate and options for a *value* of the grid."""
        if self.axis == "lr":
            return value, dict(self.options)
        assert self.lr is not None
        return self.lr, {**self.options, self.axis: value}


@dataclass(frozen=True, kw_only=True)
class GridStudy:
    """All that the runs depend on. settings: what is trained, by name; validation: fraction to tune on."""

    settings: Mapping[str, TrainConfig]
    entrants: Mapping[str, Entrant]
    seeds: int = 4
    validation: float = 0.2

    def cells(self) -> list[Grid]:
        """The plan of every (setting, entrant) pair."""
        return [
            Grid(
                study=setting,
                contender=name,
                batch_size=_batch_size(train),
                lrs=entrant.values,
                seeds=self.seeds,
                choose=True,
            )
            for setting, train in self.settings.items()
            for name, entrant in self.entrants.items()
        ]

    def describe(self) -> dict[str, Any]:
        """Plain values; of the settings those that are not the defaults."""
        usual = TrainConfig()
        return {
            "settings": {
                name: {
                    f.name: value for f in fields(train) if (value := getattr(train, f.name)) != getattr(usual, f.name)
                }
                for name, train in self.settings.items()
            },
            "entrants": {name: asdict(entrant) for name, entrant in self.entrants.items()},
            "seeds": self.seeds,
            "validation": self.validation,
        }


def _batch_size(train: TrainConfig) -> int:
    return len(_data(train).train) if train.batch_size == "full" else train.batch_size


def _data(train: TrainConfig) -> Any:
    where = TrainConfig(data=train.data, data_root=train.data_root, image_size=train.image_size)
    return load_data(where, None, None)


def run_task(study: GridStudy, task: Task) -> Outcome:
    """Do one run."""
    train, entrant = study.settings[task.study], study.entrants[task.contender]
    dataset = _data(train)
    if task.phase == "tune":
        dataset = tuning_data(dataset, study.validation, task.seed)
    lr, options = entrant.at(task.lr)
    batch = min(task.batch_size, len(dataset.train))
    steps = train.steps or num_steps(train.epochs, len(dataset.train), batch)
    contender = Contender(task.contender, entrant.optimizer, (), options)
    return train_once(train, contender, replace(task, lr=lr), dataset, steps=steps, evaluations=1)


def run_study(
    study: GridStudy,
    request: Request,
    *,
    paper: str,
    expected: Mapping[str, Mapping[str, float]],
    run: Callable[[GridStudy, Task], Outcome] = run_task,
) -> GridStudyResult:
    """Do all runs that are not in the run directory yet. run: does one run (a stand-in for tests)."""
    description = {"paper": paper, "scale": "cpu", **study.describe()}
    cells, crashes = run_grids(study.cells(), partial(run, study), description, request)
    first = next(iter(study.settings.values()))
    return GridStudyResult(paper, study, cells, crashes, {**versions(first), "workers": str(request.workers)}, expected)


@dataclass(frozen=True)
class GridStudyResult:
    """The finished cells, and messages about those that crashed. expected: accuracies by entrant and setting."""

    paper: str
    study: GridStudy
    cells: tuple[GridResult, ...]
    crashes: tuple[str, ...]
    versions: Mapping[str, str]
    expected: Mapping[str, Mapping[str, float]]

    def cell(self, name: str, setting: str) -> GridResult | None:
        """The cell of an entrant, None if it is not there."""
        wanted = (setting, name)
        return next((cell for cell in self.cells if (cell.grid.study, cell.grid.contender) == wanted), None)

    def accuracies(self, name: str, setting: str) -> list[float] | None:
        """Those of the fresh seeds; None: the runs are not there."""
        cell = self.cell(name, setting)
        return None if cell is None else cell.accuracies

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "paper": self.paper,
            "scale": "cpu",
            "plan": self.study.describe(),
            "versions": dict(self.versions),
            "expected": {name: dict(row) for name, row in self.expected.items()},
            "cells": [cell.to_dict() for cell in self.cells],
            "crashes": list(self.crashes),
        }

    # ---- tables ----

    def accuracy_table(self, title: str, source: str) -> Table:
        """Accuracy of the fresh seeds and, in brackets, what was expected by *source*."""
        table = new_table(
            title,
            f"Mean ± sd of {self.study.seeds} fresh seeds, the setting chosen on held-out training data. In brackets: {source}",
        )
        for setting in self.study.settings:
            table.add_column(setting, justify="right", no_wrap=True)
        for name, entrant in self.study.entrants.items():
            row = []
            for setting in self.study.settings:
                accuracies, expected = self.accuracies(name, setting), self.expected.get(name, {}).get(setting)
                text = "–" if accuracies is None else percent(*statistics.mean_sd(accuracies))
                row.append(f"{text} [dim]{f'({percent(expected)})' if expected else '  (–) '}[/]")
            table.add_row(entrant.label, *row)
        return table

    def values_table(self, title: str) -> Table:
        """What was chosen, and how wide the usable values are."""
        table = new_table(
            title,
            "Usable: mean validation accuracy within 2 points of the best. ≥: as far as the grid goes; –: fewer than three "
            "values of the grid. * the best one is at the edge of the grid.",
        )
        for setting in self.study.settings:
            table.add_column(setting, justify="right", no_wrap=True)
        for name, entrant in self.study.entrants.items():
            cells = [self.cell(name, setting) for setting in self.study.settings]
            table.add_row(
                entrant.label,
                *(
                    "–"
                    if cell is None
                    else f"{cell.best:.2g}{'*' if cell.at_edge else ''} · {cell.octaves or '–'!s:>5}"
                    for cell in cells
                ),
            )
        return table

    # ---- sentences ----

    def claim(
        self, statement: str, name: str, other: str, holds: Judge, settings: Sequence[str] | None = None
    ) -> Claim:
        """That the accuracies of *name* compare with those of *other* as *holds* says, in each of *settings* (None: all)."""
        return Claim(
            statement,
            {
                setting: compared(self.accuracies(name, setting), self.accuracies(other, setting), holds)
                for setting in settings or self.study.settings
            },
        )

    def wider(self, name: str, other: str, setting: str, least: float) -> tuple[bool | None, str]:
        """Whether the usable values of *name* span at least *least* octaves more than those of *other*."""
        cells = self.cell(name, setting), self.cell(other, setting)
        if cells[0] is None or cells[1] is None:
            return None, "not run"
        ours, theirs = (cell.octaves for cell in cells if cell is not None)
        if ours is None or theirs is None or theirs.at_least:
            return None, f"{ours or 'too narrow for the grid'} against {theirs or 'too narrow for the grid'} octaves"
        wider = ours.width - theirs.width >= least
        return None if ours.at_least and not wider else wider, f"{ours} against {theirs} octaves"

    def notes(self) -> list[str]:
        """How to read the claims, and what was at an edge or went wrong."""
        notes = [
            "To be above or below counts only where it is significant (Welch's test, p < 0.05, not corrected for the "
            "number of comparisons)."
        ]
        edges = [
            f"{self.study.entrants[cell.grid.contender].label} ({cell.grid.study})"
            for cell in self.cells
            if cell.at_edge
        ]
        if edges:
            notes.append(f"The best value is at the edge of the grid for {listed(edges)}: there may be better.")
        return [*notes, *(f"Given up: {crash}" for crash in self.crashes)]
