"""The plan of a tuned cell: trials one after the other, the best ones once more, then the winner with fresh seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

from conjugo.studies.records import Phase, Run, Task
from conjugo.studies.runs import Contender
from conjugo.studies.tuning import Setting, suggest

__all__ = ["FIRST_TUNING_SEED", "TunedCell", "best_trial", "of_phase", "repetitions", "scores"]

FINALISTS = 3
"""Settings that are repeated before one is chosen."""

FIRST_TUNING_SEED = 100_000
"""Tuning trial k has seed (seed + this + k), fresh run i has seed (seed + i): they never meet."""


@dataclass(frozen=True)
class TunedCell:
    """*trials* runs of *contender* at *batch_size* to find a setting, then *seeds* fresh runs of it.

    The first trials search, each proposal knowing the results so far. The others, 9 of 20, repeat the three best of these
    settings with other seeds, in turns: the best result of many is partly luck, above all at the edge of stability, where a
    setting may fail with one seed in five. (Fewer than 8 trials all search: so few repetitions would decide nothing.)
    """

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
        """The next trial; all repetitions once the search is done; all fresh seeds once the trials are done."""
        tried = of_phase("tune", finished)
        searches = self.trials - repetitions(self.trials)
        if len(tried) < searches:
            setting = suggest(self.contender.axes, scores(tried), trials=searches, seed=self.seed)
            return [self._trial(len(tried), setting)]
        if len(tried) < self.trials:
            ranking = sorted(tried[:searches], key=lambda run: _score([run]), reverse=True)
            best_first = [run.task.setting for run in ranking[:FINALISTS]]
            repeated = zip(range(searches, self.trials), cycle(best_first), strict=False)
            return [self._trial(k, setting) for k, setting in repeated]
        best = best_trial(tried)
        return [self._task("final", i, self.seed + i, best.setting) for i in range(self.seeds)]

    def _trial(self, index: int, setting: Setting) -> Task:
        return self._task("tune", index, self.seed + FIRST_TUNING_SEED + index, setting)

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


def repetitions(trials: int) -> int:
    """How many of *trials* repeat the best settings: three of each of them in 20 trials."""
    return trials * 9 // 20 if trials >= 8 else 0


def best_trial(trials: Sequence[Run]) -> Task:
    """The first task of the best setting: highest mean accuracy, among equals lowest mean loss, then the earliest.

    Settings that were tried once only are out, if there are others.
    """
    by_setting: dict[Setting, list[Run]] = {}
    for run in trials:
        by_setting.setdefault(run.task.setting, []).append(run)
    repeated = [runs for runs in by_setting.values() if len(runs) > 1]
    return max(repeated or by_setting.values(), key=_score)[0].task


def _score(runs: Sequence[Run]) -> tuple[float, float]:
    """Mean accuracy and mean loss (negative) of *runs*: the larger the better."""
    losses = [math.inf if run.outcome.loss is None else run.outcome.loss for run in runs]
    return math.fsum(run.outcome.accuracy for run in runs) / len(runs), -math.fsum(losses) / len(runs)


def of_phase(phase: Phase, runs: Sequence[Run]) -> tuple[Run, ...]:
    """The *runs* of *phase*, in order of their index, however they ended."""
    return tuple(sorted((run for run in runs if run.task.phase == phase), key=lambda run: run.task.index))


def scores(trials: Sequence[Run]) -> list[tuple[Setting, float]]:
    """What tuning sees of *trials*: the setting and the validation accuracy."""
    return [(run.task.setting, run.outcome.accuracy) for run in trials]
