"""Predictions held against measurements: errors, coverage, what the advised learning rates lose, and the naive rules beside."""

from __future__ import annotations

import math
import statistics as stats
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from conjugo.scaling import Interval
from conjugo.studies.reproduce.advisor_predictions import Prediction, plain
from conjugo.studies.reproduce.advisor_problems import Problem
from conjugo.studies.reproduce.paper import Claim, listed, new_table, sentences
from conjugo.studies.reproduce.steps_to_target import Law, Measured, fitted_law

if TYPE_CHECKING:
    from rich.console import RenderableType

    from conjugo.studies.reproduce.advisor import AdvisorPlan

__all__ = ["LABELS", "RIVALS", "AdvisorResult", "Case", "Summary"]

LABELS = {"sgd": "SGD", "momentum": "momentum 0.9", "adam": "Adam", "nlcg": "NLCG"}

GROUPS = {False: "development", True: "held-out"}

MEDIAN, WORST, COVERED, LOST = 0.15, 0.30, 0.90, 0.10
"""What is claimed, as fractions: median error of steps and the worst one (SGD and Adam), cases inside the interval, steps that
the advised learning rate loses."""

_EXACT = ("sgd", "adam")
"""Optimizers whose worst error is claimed to be small too."""


@dataclass(frozen=True)
class Case:
    """A problem, an optimizer, a batch size and an advise seed.

    steps: measured mean at the best learning rate; infinite: no learning rate reaches the target; None: some of the fresh
    seeds are censored, and nothing can be judged. lr: best, None without one. lost: by the advised learning rate, as a
    fraction of the steps.
    """

    problem: str
    optimizer: str
    batch: int
    seed: int
    steps: float | None
    predicted: Interval
    lr: float | None
    advised_lr: float
    lost: float | None

    @property
    def error(self) -> float | None:
        """|log(predicted / measured)|; infinite if only one of them is. None: cannot be judged."""
        if self.steps is None:
            return None
        ours, theirs = self.predicted.value, self.steps
        if math.inf in (ours, theirs):
            return 0.0 if ours == theirs else math.inf
        return abs(math.log(ours / theirs))

    @property
    def inside(self) -> bool | None:
        """Whether the interval holds the measured steps."""
        return None if self.steps is None else self.predicted.low <= self.steps <= self.predicted.high


@dataclass(frozen=True)
class Summary:
    """Over the cases of an optimizer in a group of problems; fractions.

    cases: also those without advice. judged: those with an error. error, worst: median and largest factor by which predicted
    and measured steps differ, less 1. covered: part of the judged cases inside the interval. lost, lost_worst: steps lost
    by the advised learning rate, median and largest; infinite where censored. None: there is no case.
    """

    optimizer: str
    group: str
    cases: int
    judged: int
    error: float | None
    worst: float | None
    covered: float | None
    lost: float | None
    lost_worst: float | None


def _percent(log_ratio: float | None) -> float | None:
    return None if log_ratio is None else math.exp(log_ratio) - 1


def _median(values: Sequence[float]) -> float | None:
    return stats.median(values) if values else None


# The naive rules: factors of learning rate and steps at a batch, over those at the anchor. Steps fall as the learning rate
# grows, as whoever scales it hopes; by the noise scale Adam's learning rate grows as the square root of what steps fall by.


def _linear(prediction: Prediction, batch: int) -> tuple[float, float]:
    ratio = batch / prediction.anchor
    return ratio, 1 / ratio


def _square_root(prediction: Prediction, batch: int) -> tuple[float, float]:
    ratio = math.sqrt(batch / prediction.anchor)
    return ratio, 1 / ratio


def _initial(prediction: Prediction, batch: int) -> tuple[float, float]:
    ratio = (1 + prediction.initial / prediction.anchor) / (1 + prediction.initial / batch)
    return math.sqrt(ratio) if prediction.optimizer == "adam" else ratio, 1 / ratio


RIVALS: Mapping[str, Callable[[Prediction, int], tuple[float, float]]] = {
    "linear rule": _linear,
    "square-root rule": _square_root,
    "B_simple at the beginning": _initial,
}


@dataclass(frozen=True, kw_only=True)
class AdvisorResult:
    """Predictions, the finished cells, and what is missing. sha256: of the predictions' file before anything was measured."""

    scale: str
    plan: AdvisorPlan
    problems: tuple[Problem, ...]
    missing: tuple[str, ...]
    predictions: tuple[Prediction, ...]
    sha256: str
    cells: tuple[Measured, ...]
    crashes: tuple[str, ...]
    versions: Mapping[str, str]

    def of(self, problem: str, optimizer: str) -> list[Measured]:
        """The finished cells, by ascending batch size."""
        return [cell for cell in self.cells if (cell.sweep.problem, cell.sweep.optimizer) == (problem, optimizer)]

    def predicted(self, problem: str, optimizer: str) -> list[Prediction]:
        """By advise seed, without those for which there was no advice."""
        found = [p for p in self.predictions if (p.problem, p.optimizer) == (problem, optimizer)]
        return [p for p in found if not p.error]

    def law(self, problem: str, optimizer: str) -> Law | None:
        """The hyperbola through the measured steps; None with less than three points."""
        points = [(cell.sweep.batch_size, cell.mean) for cell in self.of(problem, optimizer)]
        known = [(batch, mean) for batch, mean in points if mean is not None]
        return fitted_law(*zip(*known)) if len(known) >= 3 else None

    def cases(self, optimizer: str | None = None, *, held_out: bool | None = None) -> list[Case]:
        """Those of an optimizer (None: all) on the problems of a group (None: both)."""
        return [
            case
            for problem in self.problems
            if held_out in (None, problem.held_out)
            for name in self.plan.optimizers
            if optimizer in (None, name)
            for cell in self.of(problem.name, name)
            for case in self._cases(cell)
        ]

    def _cases(self, cell: Measured) -> list[Case]:
        sweep, best = cell.sweep, cell.best
        return [
            Case(
                problem=sweep.problem,
                optimizer=sweep.optimizer,
                batch=sweep.batch_size,
                seed=prediction.seed,
                steps=math.inf if best is None else cell.mean,
                predicted=prediction.steps[sweep.batch_size],
                lr=None if best is None else best[0],
                advised_lr=prediction.lr[sweep.batch_size],
                lost=cell.lost(i),
            )
            for i, prediction in enumerate(self.predicted(sweep.problem, sweep.optimizer))
        ]

    def summary(self, optimizer: str, *, held_out: bool) -> Summary:
        """How good the predictions are."""
        cases = self.cases(optimizer, held_out=held_out)
        errors = [case.error for case in cases if case.error is not None]
        inside = [case.inside for case in cases if case.inside is not None]
        lost = [case.lost for case in cases if case.lost is not None]
        return Summary(
            optimizer=optimizer,
            group=GROUPS[held_out],
            cases=sum(
                self.plan.advise_seeds * len(self.of(problem.name, optimizer))
                for problem in self.problems
                if problem.held_out == held_out
            ),
            judged=len(errors),
            error=_percent(_median(errors)),
            worst=_percent(max(errors, default=None)),
            covered=sum(inside) / len(inside) if inside else None,
            lost=_median(lost),
            lost_worst=max(lost, default=None),
        )

    def summaries(self) -> list[Summary]:
        """Of each group and optimizer that has cases."""
        both = (self.summary(name, held_out=group) for group in GROUPS for name in self.plan.optimizers)
        return [summary for summary in both if summary.cases]

    def rival(self, rule: str, optimizer: str, *, held_out: bool) -> tuple[float | None, float | None]:
        """Median error of steps and median loss of steps at its learning rate, of a naive rule; fractions.

        Batch sizes other than that from which it starts count. The loss is read off the tuning runs, infinite outside them.
        """
        errors, lost = [], []
        for problem in self.problems:
            for prediction in self.predicted(problem.name, optimizer) if problem.held_out == held_out else []:
                anchor = prediction.anchor
                for cell in self.of(problem.name, optimizer):
                    batch = cell.sweep.batch_size
                    if batch == anchor or cell.best is None:
                        continue
                    lr, steps = RIVALS[rule](prediction, batch)
                    lost.append(cell.steps_at(prediction.lr[anchor] * lr) / cell.best[1] - 1)
                    if cell.mean is not None:
                        errors.append(abs(math.log(prediction.steps[anchor].value * steps / cell.mean)))
        return _percent(_median(errors)), _median(lost)

    def largest(self, optimizer: str, *, held_out: bool) -> list[tuple[float, float]]:
        """All examples as the batch, against the predicted critical batch: factors of steps and of examples, by prediction.

        Both by the hyperbola through the measured steps.
        """
        factors = []
        for problem in self.problems:
            law = self.law(problem.name, optimizer)
            if problem.held_out != held_out or law is None:
                continue
            most = problem.batches[-1]
            for prediction in self.predicted(problem.name, optimizer):
                critical = min(max(prediction.critical.value, 1.0), most)
                fewer = (1 + law.b_crit.value / most) / (1 + law.b_crit.value / critical)
                factors.append((fewer, fewer * most / critical))
        return factors

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; None stands for what is not finite or not known."""
        laws = {
            problem.name: {
                name: law._asdict()
                for name in self.plan.optimizers
                if (law := self.law(problem.name, name)) is not None
            }
            for problem in self.problems
        }
        rivals = [
            {"rule": rule, "optimizer": name, "group": GROUPS[group], "error": found[0], "lost": found[1]}
            for rule in RIVALS
            for group in GROUPS
            for name in self.plan.optimizers
            if (found := self.rival(rule, name, held_out=group))[0] is not None
        ]
        content = plain(
            {
                "paper": "advisor",
                "scale": self.scale,
                "plan": asdict(self.plan),
                "versions": dict(self.versions),
                "problems": {problem.name: problem.describe() for problem in self.problems},
                "missing": list(self.missing),
                "predictions_sha256": self.sha256,
                "cells": [cell.to_dict() for cell in self.cells],
                "laws": laws,
                "cases": [{**asdict(case), "inside": case.inside} for case in self.cases()],
                "summaries": [asdict(summary) for summary in self.summaries()],
                "rivals": rivals,
                "crashes": list(self.crashes),
                "claims": [claim.to_dict() for claim in self.claims()],
            }
        )
        assert isinstance(content, dict)
        return content

    # ---- tables ----

    def tables(self) -> list[RenderableType]:
        """One for each problem, then the summary, then the naive rules."""
        return [*map(self._problem_table, self.problems), self._summary_table(), self._rivals_table()]

    def _problem_table(self, problem: Problem) -> RenderableType:
        plan = self.plan
        table = new_table(
            f"{problem.label} ({GROUPS[problem.held_out]}): steps, measured and predicted",
            f"Measured: mean ± sd of {plan.seeds} seeds at the best learning rate. Predicted: geometric mean of "
            f"{plan.advise_seeds} predictions, and of the ends of their 95 % intervals; how many intervals hold the measured "
            "steps. Lost: steps at the advised learning rate over those at the best, less 1, median.",
        )
        for title in ("batch", "best lr", "measured", "predicted", "95 %", "ratio", "inside", "lr ratio", "lost"):
            table.add_column(title, justify="right", no_wrap=True)
        for name in plan.optimizers:
            for cell in self.of(problem.name, name):
                table.add_row(LABELS[name], *self.row(cell))
        return table

    def row(self, cell: Measured) -> list[str]:
        """A row of a problem's table, as text, from the batch size on."""
        cases = self._cases(cell)
        value, low, high = (_geometric([case.predicted[i] for case in cases]) for i in range(3))
        steps, best = cell.mean, cell.best
        never = "never" if best is None else f"censored {sum(x is None for x in cell.steps)} of {len(cell.steps)}"
        inside = [case.inside for case in cases]
        lost = _median([case.lost for case in cases if case.lost is not None])
        return [
            f"{cell.sweep.batch_size}",
            "–" if best is None else f"{best[0]:.2g}",
            never if steps is None else f"{number(steps)} ± {number(cell.sd)}",
            number(value),
            f"{number(low)} … {number(high)}",
            "–" if steps is None else f"{value / steps:.2f}",
            "–" if None in inside else f"{sum(map(bool, inside))} of {len(inside)}",
            "–" if best is None else number(_geometric([case.advised_lr for case in cases]) / best[0]),
            percent_text(lost),
        ]

    def _summary_table(self) -> RenderableType:
        table = new_table(
            "How good the advice is",
            "Error: factor between predicted and measured steps, less 1. Inside: 95 % intervals that hold the measured steps. "
            "Lost: steps at the advised learning rate over those at the best, less 1.",
        )
        for title in ("cases", "error, median", "worst", "inside", "lost, median", "worst"):
            table.add_column(title, justify="right", no_wrap=True)
        for s in self.summaries():
            judged = f"{s.cases}" if s.judged == s.cases else f"{s.judged} of {s.cases}"
            values = (s.error, s.worst, s.covered, s.lost, s.lost_worst)
            table.add_row(f"{s.group}, {LABELS[s.optimizer]}", judged, *map(percent_text, values))
        return table

    def _rivals_table(self) -> RenderableType:
        table = new_table(
            "Naive rules from the same place: median error of steps · median loss of steps at their learning rate",
            "Largest: all examples as the batch, against the predicted critical batch: factors of steps · of examples "
            "(median). The rules are judged at batch sizes other than that from which they start.",
        )
        for title in ("advice", *RIVALS, "largest"):
            table.add_column(title, justify="right", no_wrap=True)
        for s in self.summaries():
            held_out = s.group == GROUPS[True]
            row = [(s.error, s.lost), *(self.rival(rule, s.optimizer, held_out=held_out) for rule in RIVALS)]
            largest = self.largest(s.optimizer, held_out=held_out)
            text = " · ".join(f"{stats.median(column):.2g}" for column in zip(*largest)) if largest else "–"
            cells = [f"{percent_text(error)} · {percent_text(lost)}" for error, lost in row]
            table.add_row(f"{s.group}, {LABELS[s.optimizer]}", *cells, text)
        return table

    # ---- sentences ----

    def claims(self) -> list[Claim]:
        """What was promised, judged by the runs."""
        found = self.summaries()

        def judged(value: float | None, most: float) -> tuple[bool | None, str]:
            return (None, "no case") if value is None else (value <= most, percent_text(value))

        def case(s: Summary) -> str:
            return f"{LABELS[s.optimizer]}, {s.group}"

        exact = [s for s in found if s.optimizer in _EXACT]
        return [
            Claim(
                f"the median error of predicted steps is at most {percent_text(MEDIAN)}",
                {case(s): judged(s.error, MEDIAN) for s in exact},
            ),
            Claim(
                f"the worst error is at most {percent_text(WORST)}", {case(s): judged(s.worst, WORST) for s in exact}
            ),
            Claim(
                f"at least {percent_text(COVERED)} of the 95 % intervals hold the measured steps",
                {
                    case(s): (None, "no case")
                    if s.covered is None
                    else (s.covered >= COVERED, f"{percent_text(s.covered)} of {s.judged}")
                    for s in found
                },
            ),
            Claim(
                f"the advised learning rate loses at most {percent_text(LOST)} of the steps (median)",
                {case(s): judged(s.lost, LOST) for s in found},
            ),
            Claim(
                "its median error is below that of every naive rule",
                {case(s): self._against_rivals(s) for s in found},
            ),
        ]

    def _against_rivals(self, s: Summary) -> tuple[bool | None, str]:
        errors = {rule: self.rival(rule, s.optimizer, held_out=s.group == GROUPS[True])[0] for rule in RIVALS}
        known = {rule: error for rule, error in errors.items() if error is not None}
        if s.error is None or not known:
            return None, "no case"
        best = min(known, key=lambda rule: known[rule])
        return s.error < known[best], f"{percent_text(s.error)} against {percent_text(known[best])} ({best})"

    def text(self) -> str:
        """What came out as promised and what did not."""
        never = [cell for cell in self.cells if cell.best is None]
        censored = [cell for cell in self.cells if cell.best is not None and cell.mean is None]
        dates = sorted(prediction.written for prediction in self.predictions)
        notes = (
            [f"Predictions were complete at {dates[-1]}, SHA-256 {self.sha256}; measured was after that."]
            if dates
            else []
        )
        if never:
            notes.append(
                "No learning rate reaches the target in time with "
                f"{listed([_where(cell) for cell in never])}: a finite prediction counts as an infinite error there."
            )
        if censored:
            notes.append(
                f"Not judged, some seeds did not reach the target: {listed([_where(cell) for cell in censored])}."
            )
        late = [p for p in self.predictions if p.advice.get("reached") is False]
        if late:
            names = listed([f"{LABELS[p.optimizer]} on {p.problem}, advise seed {p.seed}" for p in late])
            notes.append(
                f"The advisor had too little time, and says so: its advice is about a higher loss for {names}."
            )
        notes += [
            f"No advice for {LABELS[p.optimizer]} on {p.problem}: {p.error}." for p in self.predictions if p.error
        ]
        return sentences(self.claims(), [*notes, *self.missing, *(f"Given up: {crash}" for crash in self.crashes)])


def _where(cell: Measured) -> str:
    return f"{LABELS[cell.sweep.optimizer]} on {cell.sweep.problem} at batch {cell.sweep.batch_size}"


def _geometric(values: Sequence[float]) -> float:
    if not values or math.inf in values:
        return math.inf if values else math.nan
    return math.exp(math.fsum(math.log(max(value, 1e-300)) for value in values) / len(values))


def number(value: float) -> str:
    """Three significant digits, without an exponent; ∞ and – for what is none."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percent_text(value: float | None) -> str:
    """A fraction as percent; ∞, and – for None."""
    if value is None or not math.isfinite(value):
        return "–" if value is None else "∞"
    return "> 1000 %" if value > 10 else f"{100 * value:.{0 if abs(value) >= 0.1 else 1}f} %"
