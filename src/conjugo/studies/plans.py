"""The plan of a tuned cell: trials one after the other, then the best setting with fresh seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from conjugo.studies.records import Phase, Run, Task
from conjugo.studies.runs import Contender
from conjugo.studies.tuning import Setting, suggest

__all__ = ["FIRST_TUNING_SEED", "TunedCell", "best_trial", "of_phase", "scores"]

FIRST_TUNING_SEED = 100_000
"""Tuning trial k has seed (seed + this + k), fresh run i has seed (seed + i): they never meet."""


@dataclass(frozen=True)
class TunedCell:
    """*trials* runs of *contender* at *batch_size*, each proposal knowing the results so far, then *seeds* fresh runs."""

    contender: Contender
    batch_size: int
    trials: int
    seeds: int
    seed: int

    @property
    def cell(self) -> tuple[str, str, int]:
        """Study (none), contender and batch size."""
        return "", self.contender.name, self.batch_size

    @property
    def size(self) -> int:
        """Number of runs."""
        return self.trials + self.seeds

    def ready(self, finished: Sequence[Run]) -> list[Task]:
        """The next trial, or all fresh seeds once the trials are done."""
        tried = of_phase("tune", finished)
        if len(tried) == self.trials:
            best = best_trial(tried)
            return [self._task("final", i, self.seed + i, best.setting) for i in range(self.seeds)]
        setting = suggest(self.contender.axes, scores(tried), trials=self.trials, seed=self.seed)
        return [self._task("tune", len(tried), self.seed + FIRST_TUNING_SEED + len(tried), setting)]

    def _task(self, phase: Phase, index: int, seed: int, setting: Setting) -> Task:
        return Task(
            contender=self.contender.name,
            batch_size=self.batch_size,
            phase=phase,
            index=index,
            seed=seed,
            lr=setting[0],
            second=setting[1] if len(setting) > 1 else None,
        )


def best_trial(trials: Sequence[Run]) -> Task:
    """The task of the trial with the highest accuracy; among equals the lowest loss, then the earliest."""

    def score(run: Run) -> tuple[float, float]:
        loss = run.outcome.loss
        return run.outcome.accuracy, -math.inf if loss is None else -loss

    return max(trials, key=score).task


def of_phase(phase: Phase, runs: Sequence[Run]) -> tuple[Run, ...]:
    """The *runs* of *phase*, in order of their index, however they ended."""
    return tuple(sorted((run for run in runs if run.task.phase == phase), key=lambda run: run.task.index))


def scores(trials: Sequence[Run]) -> list[tuple[Setting, float]]:
    """What tuning sees of *trials*: the setting and the validation accuracy."""
    return [(run.task.setting, run.outcome.accuracy) for run in trials]
