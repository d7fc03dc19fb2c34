"""Measured: how many steps a network needs to a training loss, by batch size, at the best constant learning rate.

A cell is a problem, an optimizer and a batch size. Its learning rates are powers of the square root of 2. From a first guess
the search goes up and down by octaves until the best one, by the mean over the tuning seeds, has two worse neighbours on
either side, half an octave and an octave away. Fresh seeds at the best rate are what counts; the first of them also run at
rates that are advised.
A run that has not reached the loss within its limit is censored: a rate with a censored run is worse than all without, and
no mean is taken over it.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from conjugo.distributed import GlobalBatchSampler
from conjugo.scaling import Interval, fit_critical_batch
from conjugo.studies import statistics
from conjugo.studies.plans import FIRST_TUNING_SEED
from conjugo.studies.records import Outcome, Run, Task
from conjugo.studies.reproduce.advisor_problems import Problem
from conjugo.training import optimizers

__all__ = [
    "CATALOGUE",
    "Law",
    "Measured",
    "Sweep",
    "fitted_law",
    "mean_or_none",
    "run_task",
    "train_to_target",
]

CATALOGUE = {"sgd": "sgd", "momentum": "momentum", "adam": "adamw", "nlcg": "nlcg"}
"""What :func:`conjugo.training.optimizers.build` calls the optimizers of the advisor."""

_GUESSES: Mapping[str, Callable[[int], float]] = {
    "sgd": lambda batch: 0.5 / (1 + 64 / batch),
    "momentum": lambda batch: 0.1 / (1 + 64 / batch),
    "adam": lambda batch: 0.02 * min(1.0, math.sqrt(batch / 64)),
    "nlcg": lambda batch: 0.4 / (1 + 16 / batch),
}
"""Where the search for the learning rate at a batch size begins: the result does not depend on it, only its length."""

RESOLUTION = 0.02
"""The loss over all examples is looked at whenever the steps have grown by this fraction (and at each of the first fifty)."""

_NEAR = 2.0
"""As long as the loss of the last batches is above this many times the target, the whole data is not looked at."""

_HOPELESS = 1e3
"""A loss of so many times that at the beginning counts as diverged."""

_AT_ONCE = 4096
"""Examples in one pass when the loss over all of them is taken."""

_WORSE = 2.0
"""A learning rate with which a run needs so many times the steps of the best one so far, in the mean, is given up."""

_FARTHEST = 20
"""Half octaves from the first guess at which the search for a learning rate that reaches the target is given up."""


def train_to_target(problem: Problem, optimizer: str, *, batch: int, lr: float, seed: int, limit: int) -> Outcome:
    """Train from the weights of *seed*, on batches drawn by *seed*, until the loss over all examples is the target.

    optimizer: a name in :data:`CATALOGUE`. limit: most steps. In the outcome, *reached* is interpolated in the logarithm of
    the loss; it is None for a run that diverged or met its limit. accuracy and loss are on the training data at the end.
    """
    started = time.perf_counter()
    inputs, targets = problem.examples()
    model = problem.model(seed)
    method = optimizers.build(CATALOGUE[optimizer], model.parameters(), lr=lr)
    batches = GlobalBatchSampler(len(inputs), batch, seed=seed)

    parts = -(-len(inputs) // _AT_ONCE)

    @torch.no_grad()
    def whole() -> tuple[float, float]:
        loss = right = 0.0
        for some, known in zip(inputs.tensor_split(parts), targets.tensor_split(parts)):
            outputs = model(some)
            loss += problem.loss(outputs, known).item() * len(some)
            right += int((outputs.argmax(1) == known).sum())
        return loss / len(inputs), right / len(inputs)

    before, (loss, accuracy) = 0, whole()
    most = _HOPELESS * loss
    recent: deque[float] = deque()
    step, due, diverged, reached = 0, 1, False, None
    while step < limit and reached is None and not diverged:
        index = next(batches).to(inputs.device)
        value = problem.loss(model(inputs.index_select(0, index)), targets.index_select(0, index))
        method.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        method.step()
        step += 1
        recent.append(value.item())
        diverged = not recent[-1] <= most
        if step < min(due, limit):
            continue
        due = step + max(1, round(RESOLUTION * step))
        # Not more than 5 % of the steps: a longer mean lags behind where the loss falls fast, and the crossing is seen late.
        while len(recent) > max(0.05 * step, 1):
            recent.popleft()
        if math.fsum(recent) / len(recent) > _NEAR * problem.target and step < limit:
            continue
        last, (loss, accuracy) = loss, whole()
        diverged = not loss <= most
        if loss <= problem.target:
            part = math.log(last / problem.target) / math.log(last / loss) if last > problem.target else 0.0
            reached = before + part * (step - before)
        before = step
    return Outcome(
        steps=step,
        samples=step * batch,
        accuracy=accuracy,
        loss=loss if math.isfinite(loss) else None,
        diverged=diverged,
        seconds=time.perf_counter() - started,
        reached=reached,
    )


def run_task(problems: Sequence[Problem], task: Task) -> Outcome:
    """Do one run; *task.study* names the problem."""
    problem = next(problem for problem in problems if problem.name == task.study)
    assert task.limit is not None
    return train_to_target(problem, task.contender, batch=task.batch_size, lr=task.lr, seed=task.seed, limit=task.limit)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The plan of a cell.

    limit: most steps of a run as long as none has reached the target. tuning_seeds: runs at each learning rate. seeds: fresh
    ones at the best. advised: learning rates that also get the first *paired* of the fresh seeds. start: where the search
    for the learning rate begins, None: at a guess.
    """

    problem: str
    optimizer: str
    batch_size: int
    limit: int
    tuning_seeds: int = 3
    seeds: int = 6
    advised: tuple[float, ...] = ()
    paired: int = 3
    start: float | None = None

    @property
    def cell(self) -> tuple[str, str, int]:
        """Problem, optimizer and batch size."""
        return self.problem, self.optimizer, self.batch_size

    @property
    def size(self) -> int:
        """About how many runs it has: how far the search goes is not known beforehand."""
        return 7 * self.tuning_seeds + self.seeds + len(self.advised) * self.paired

    def ready(self, finished: Sequence[Run]) -> list[Task]:
        """The next run of the search, or all fresh ones, or all at advised rates."""
        found = self._search(finished)
        if isinstance(found, Task):
            return [found]
        measured = Measured(self, tuple(finished))
        if measured.best is None:
            return []
        best, score = measured.best
        # A fresh seed may be unlucky, but not without end.
        finals = [self._task("final", seed, seed, best, math.ceil(4 * score)) for seed in range(self.seeds)]
        if len(measured.steps) < self.seeds:
            return finals
        limit = math.ceil(4 * max(score, *(4 * score if steps is None else steps for steps in measured.steps)))
        return [
            self._task("final", self.seeds + i * self.paired + seed, seed, lr, limit)
            for i, lr in enumerate(self.advised)
            for seed in range(self.paired)
        ]

    def _search(self, finished: Sequence[Run]) -> Task | dict[int, float]:
        """Replays the search: the run it wants next, or, when it is at its end, score by half octaves from the first guess."""
        outcomes = {(run.task.lr, run.task.seed): run.outcome for run in finished if run.task.phase == "tune"}
        scores: dict[int, float] = {}
        while (place := _next_place(scores)) is not None:
            best = min(scores.values(), default=math.inf)
            limit = self.limit if best == math.inf else min(self.limit, math.ceil(_WORSE * best))
            steps = []
            for i in range(self.tuning_seeds):
                task = self._task("tune", place, FIRST_TUNING_SEED + i, self.rate(place), limit)
                if (outcome := outcomes.get((task.lr, task.seed))) is None:
                    return task
                steps.append(math.inf if outcome.reached is None else outcome.reached)
                if steps[-1] == math.inf:
                    break
            scores[place] = math.fsum(steps) / len(steps)
        return scores

    def rate(self, place: int) -> float:
        """The learning rate *place* half octaves above the first guess, which is rounded to the common grid."""
        start = _GUESSES[self.optimizer](self.batch_size) if self.start is None else self.start
        return float(2.0 ** ((round(2 * math.log2(start)) + place) / 2))

    def _task(self, phase: Any, index: int, seed: int, lr: float, limit: int) -> Task:
        return Task(
            study=self.problem,
            contender=self.optimizer,
            batch_size=self.batch_size,
            phase=phase,
            index=index,
            seed=seed,
            lr=lr,
            limit=limit,
        )

    def scores(self, finished: Sequence[Run]) -> dict[float, float] | None:
        """Mean steps by learning rate, inf where a run is censored; None as long as the search is not at its end."""
        found = self._search(finished)
        return None if isinstance(found, Task) else {self.rate(place): found[place] for place in sorted(found)}


def _next_place(scores: dict[int, float]) -> int | None:
    """Where to go on, in half octaves from the first guess; None at the end of the search."""
    best = min(scores, key=lambda place: (scores[place], place), default=None)
    if best is None:
        return 0
    if scores[best] == math.inf:  # too large, most likely; but it may be so small that the limit is met first
        return next((place for k in range(4, _FARTHEST + 1, 4) for place in (-k, k) if place not in scores), None)
    return next((place for place in (best + 2, best - 2, best + 1, best - 1) if place not in scores), None)


@dataclass(frozen=True)
class Measured:
    """The finished runs of a cell."""

    sweep: Sweep
    runs: tuple[Run, ...]

    @property
    def scores(self) -> dict[float, float] | None:
        """Mean steps of the tuning seeds by learning rate, ascending; inf where one is censored. None: search not finished."""
        return self.sweep.scores(self.runs)

    @property
    def best(self) -> tuple[float, float] | None:
        """The best learning rate and its mean steps over the tuning seeds; None if no rate has reached the target."""
        scores = self.scores
        if scores is None or min(scores.values()) == math.inf:
            return None
        return min(scores.items(), key=lambda item: (item[1], item[0]))

    def _at(self, indices: Iterable[int]) -> list[float | None]:
        finals = {run.task.index: run.outcome.reached for run in self.runs if run.task.phase == "final"}
        return [finals[i] for i in indices if i in finals]

    @property
    def steps(self) -> list[float | None]:
        """Steps of the fresh seeds at the best learning rate; None is censored."""
        return self._at(range(self.sweep.seeds))

    def advised_steps(self, i: int) -> list[float | None]:
        """Steps at the *i*-th of the advised rates, of the same seeds as the first of :attr:`steps`."""
        first = self.sweep.seeds + i * self.sweep.paired
        return self._at(range(first, first + self.sweep.paired))

    @property
    def complete(self) -> bool:
        """Whether nothing is left to be done."""
        done = {run.task for run in self.runs}
        return all(task in done for task in self.sweep.ready(self.runs))

    @property
    def mean(self) -> float | None:
        """Mean steps of the fresh seeds; None if one is censored or there are none."""
        return mean_or_none(self.steps)

    @property
    def sd(self) -> float:
        """Their standard deviation; NaN where there is no mean, or a single seed."""
        steps = [value for value in self.steps if value is not None]
        return statistics.mean_sd(steps)[1] if len(steps) == len(self.steps) > 0 else math.nan

    def lost(self, i: int) -> float | None:
        """Steps at the *i*-th advised rate over those of the same seeds at the best one, less 1; inf if one is censored.

        None if it cannot be said.
        """
        theirs = self.advised_steps(i)
        ours = mean_or_none(self.steps[: len(theirs)])
        if ours is None or not theirs:
            return None
        mean = mean_or_none(theirs)
        return math.inf if mean is None else mean / ours - 1

    def steps_at(self, lr: float) -> float:
        """Tuning steps at any *lr*, interpolated between the rates tried (logarithmically); inf outside or where censored."""
        scores = self.scores
        assert scores is not None
        points = list(scores.items())
        if not points[0][0] <= lr <= points[-1][0]:
            return math.inf
        for (low, before), (high, after) in pairwise(points):
            if low <= lr <= high:
                part = math.log(lr / low) / math.log(high / low)
                if math.inf in (before, after):
                    return before if part == 0 else after if part == 1 else math.inf
                return math.exp((1 - part) * math.log(before) + part * math.log(after))
        return points[-1][1]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; None stands for censored, and for what is not there."""
        scores, best = self.scores, self.best
        return {
            "problem": self.sweep.problem,
            "optimizer": self.sweep.optimizer,
            "batch": self.sweep.batch_size,
            "grid": [{"lr": lr, "steps": _finite(steps)} for lr, steps in (scores or {}).items()],
            "lr": None if best is None else best[0],
            "steps": self.steps,
            "mean": self.mean,
            "sd": _finite(self.sd),
            "advised": [
                {"lr": lr, "steps": self.advised_steps(i), "lost": _finite(self.lost(i))}
                for i, lr in enumerate(self.sweep.advised)
            ],
        }


def mean_or_none(values: Sequence[float | None]) -> float | None:
    """Mean; None if there is a None among *values*, or nothing."""
    known = [value for value in values if value is not None]
    return statistics.mean_sd(known)[0] if known and len(known) == len(values) else None


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


# ---- the law ----


class Law(NamedTuple):
    """The hyperbola S = s_min (1 + b_crit / B) through measured steps, and the rms of log steps about it."""

    s_min: float
    b_crit: Interval
    rms: float


def fitted_law(batches: Sequence[float], measured: Sequence[float]) -> Law:
    """:func:`conjugo.scaling.fit_critical_batch` with the 95 % interval of the critical batch.

    It comes from the curvature of the sum of squares and Student's t with n - 2 degrees of freedom. An interval of (0, inf)
    says nothing: with two points, or where the best critical batch is 0 or infinite. Raises ValueError as that function does.
    """
    fit = fit_critical_batch(batches, measured)
    sizes = np.asarray(batches, float)
    freedom = len(sizes) - 2
    if freedom < 1 or not 0 < fit.b_crit < math.inf:
        return Law(fit.s_min, Interval(fit.b_crit, 0.0, math.inf), fit.rms)
    from scipy import stats

    slope = fit.b_crit / (sizes + fit.b_crit)  # of log S in log B_crit; S_min takes its mean
    information = float(np.square(slope - slope.mean()).sum())
    half = float(stats.t.ppf(0.975, freedom)) * fit.rms * math.sqrt(len(sizes) / freedom / information)
    factor = math.exp(min(half, 300.0))
    return Law(fit.s_min, Interval(fit.b_crit, fit.b_crit / factor, fit.b_crit * factor), fit.rms)
