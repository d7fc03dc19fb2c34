"""A search for a learning rate that ends inside its grid: the plan of a contender on a task, and what came out of it.

Rates are powers of two. The first grid has five, around a guess, and as long as the best one has fewer than two neighbours on a
side the grid grows there; then also where its end is not yet worse than the best by more than a point, so that the width of the
usable rates is known. Both variants of a contender are searched alike; the better one by validation runs with fresh seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from conjugo.studies import statistics
from conjugo.studies.plans import FIRST_TUNING_SEED, of_phase
from conjugo.studies.records import Run, Task
from conjugo.studies.statistics import Octaves

__all__ = ["MOST", "WIDTH", "Search", "Searched"]

MOST = 10
"""Learning rates that a variant may try."""

FIRST = 2
"""So many octaves to both sides the first grid goes, and so many worse neighbours the best rate has on each in the end."""

WIDTH = 0.01
"""So much worse than the best validation accuracy (a fraction) a rate may be to count as usable."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """A cell: *contender* on task *study*. start: exponent, to base 2, of the rate in the middle of the first grid.

    variants: values of the second hyperparameter. tuning_seeds: runs at each rate. seeds: fresh ones with the best of all.
    """

    study: str
    contender: str
    batch_size: int
    start: int
    variants: tuple[float, ...]
    tuning_seeds: int
    seeds: int

    @property
    def cell(self) -> tuple[str, str, int]:
        """Study, contender and batch size."""
        return self.study, self.contender, self.batch_size

    @property
    def size(self) -> int:
        """Number of runs, if every grid grows by two."""
        return len(self.variants) * (2 * FIRST + 3) * self.tuning_seeds + self.seeds

    def ready(self, finished: Sequence[Run]) -> list[Task]:
        """The rates that the searches want next; when all are at their end, the best setting with fresh seeds."""
        found = Searched(self, tuple(finished))
        wanted = [self._task("tune", e, variant, j) for variant in self.variants for e, j in self._open(found, variant)]
        if wanted:
            return wanted
        return [self._task("final", found.best[1], found.best[0], j) for j in range(self.seeds)]

    def _open(self, found: Searched, variant: float) -> list[tuple[int, int]]:
        exponents = found.searched(variant)
        done = {(run.task.lr, run.task.seed) for run in found.tuning(variant)}
        pairs = [(e, j) for e in exponents for j in range(self.tuning_seeds)]
        return [(e, j) for e, j in pairs if (2.0**e, FIRST_TUNING_SEED + j) not in done]

    def _task(self, phase: Any, exponent: int, variant: float, index: int) -> Task:
        return Task(
            study=self.study,
            contender=self.contender,
            batch_size=self.batch_size,
            phase=phase,
            index=index,
            seed=index + (FIRST_TUNING_SEED if phase == "tune" else 0),
            lr=2.0**exponent,
            second=variant,
        )


@dataclass(frozen=True)
class Searched:
    """The finished runs of a search."""

    search: Search
    runs: tuple[Run, ...]

    def tuning(self, variant: float) -> list[Run]:
        """The tuning runs of a variant."""
        return [run for run in self.runs if run.task.phase == "tune" and run.task.second == variant]

    def scores(self, variant: float) -> dict[int, tuple[float, float]]:
        """Mean validation accuracy and minus mean loss by exponent, ascending, of the rates with all their runs."""
        by_rate: dict[int, list[Run]] = {}
        for run in self.tuning(variant):
            by_rate.setdefault(round(math.log2(run.task.lr)), []).append(run)
        return {e: _score(runs) for e, runs in sorted(by_rate.items()) if len(runs) == self.search.tuning_seeds}

    def searched(self, variant: float) -> list[int]:
        """Replays the search: the exponents it has come to so far, some of them perhaps not run yet, ascending."""
        scores = self.scores(variant)
        low, high = self.search.start - FIRST, self.search.start + FIRST
        while all(e in scores for e in range(low, high + 1)) and (room := MOST - (high + 1 - low)) > 0:
            down, up = self._grow(scores, low, high)
            up = min(up, room - min(down, room))
            low, high = low - min(down, room), high + up
            if down == up == 0:
                break
        return list(range(low, high + 1))

    @staticmethod
    def _grow(scores: dict[int, tuple[float, float]], low: int, high: int) -> tuple[int, int]:
        """By how much the grid has to grow at its two ends, 0 or 1."""
        best = max(range(low, high + 1), key=lambda e: scores[e])
        inside = int(best - low < FIRST), int(high - best < FIRST)
        floor = scores[best][0] - WIDTH
        return inside if any(inside) else (int(scores[low][0] >= floor), int(scores[high][0] >= floor))

    @property
    def best(self) -> tuple[float, int]:
        """Variant and exponent with the best mean validation accuracy; among equals that with the lowest loss."""
        choices = [(score, variant, e) for variant in self.search.variants for e, score in self.scores(variant).items()]
        _, variant, exponent = max(choices)
        return variant, exponent

    @property
    def validation(self) -> tuple[float, float]:
        """Mean validation accuracy and minus loss of the best setting."""
        variant, exponent = self.best
        return self.scores(variant)[exponent]

    @property
    def interior(self) -> bool:
        """Whether the best rate has two worse neighbours on each side."""
        variant, exponent = self.best
        tried = self.scores(variant)
        return min(exponent - min(tried), max(tried) - exponent) >= FIRST

    @property
    def octaves(self) -> Octaves:
        """Width of the usable rates of the best variant, to an octave; at least so wide where an end of the grid is usable."""
        points = [(2.0**e, accuracy) for e, (accuracy, _) in self.scores(self.best[0]).items()]
        width = statistics.usable_octaves(points, tolerance=WIDTH, minimum=1)
        assert width is not None
        return width

    @property
    def finals(self) -> tuple[Run, ...]:
        """The runs that count, by seed."""
        return of_phase("final", self.runs)

    @property
    def accuracies(self) -> list[float]:
        """On the test data, as fractions, by seed."""
        return [run.outcome.accuracy for run in self.finals]

    @property
    def losses(self) -> list[float | None]:
        """On the test data, by seed; None where not finite."""
        return [run.outcome.loss for run in self.finals]

    @property
    def complete(self) -> bool:
        """Whether all runs have finished."""
        return len(self.finals) == self.search.seeds

    def steps_to(self, target: float) -> float | None:
        """Median steps, over the fresh seeds, to a test accuracy of *target*; None if the median run does not get there."""
        return statistics.median_reached([statistics.first_reached(run.outcome.curve, target) for run in self.finals])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        variant, exponent = self.best
        mean, sd = statistics.mean_sd(self.accuracies)
        return {
            "study": self.search.study,
            "contender": self.search.contender,
            "batch_size": self.search.batch_size,
            "grids": {
                str(v): [{"lr": 2.0**e, "accuracy": accuracy} for e, (accuracy, _) in self.scores(v).items()]
                for v in self.search.variants
            },
            "variant": variant,
            "lr": 2.0**exponent,
            "interior": self.interior,
            "validation": self.validation[0],
            "octaves": self.octaves._asdict(),
            "accuracies": self.accuracies,
            "losses": self.losses,
            "mean": mean,
            "sd": None if math.isnan(sd) else sd,
        }


def _score(runs: Sequence[Run]) -> tuple[float, float]:
    losses = [math.inf if run.outcome.loss is None else run.outcome.loss for run in runs]
    return math.fsum(run.outcome.accuracy for run in runs) / len(runs), -math.fsum(losses) / len(losses)
