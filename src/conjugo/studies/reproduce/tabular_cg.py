"""Conjugate gradients for small networks on tables, the size of loan decisions.

Protocol. First, evaluations of function and gradient to a tolerance on three problems, by rule, beside SciPy's conjugate
gradients and L-BFGS-B. Then networks d-10-1 with tanh units for each table and penalty, in stratified five-fold
cross-validation: every solver gets the same five starts (scikit-learn's draws its own) and the same objective, the start with
the lowest training loss is kept, and the held-out fold is seen by that one only. Columns are standardised by the training
folds. Adam takes 500 full-batch steps at each of three learning rates, of which the one with the lowest loss counts.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from conjugo._files import write_aside
from conjugo.errors import CorruptFile, DataUnavailable, check
from conjugo.studies import statistics
from conjugo.studies.reproduce import tabular_tables
from conjugo.studies.reproduce.grids import open_folder, save
from conjugo.studies.reproduce.paper import Claim, NotRun, Paper, Request, listed, new_table, sentences
from conjugo.studies.reproduce.tabular_problems import COUNTED, PROBLEMS, count, trace
from conjugo.studies.reproduce.tabular_solvers import SOLVERS, FloatArray, Problem, Settings, evaluations_to
from conjugo.studies.reproduce.tabular_tables import Table
from conjugo.studies.summary import percent
from conjugo.tabular.table import Standardizer

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["EXPECTED", "LABELS", "PAPER", "Fold", "TabularPlan", "TabularResult", "experiment", "run_cell"]

LABELS = {
    "fr": "Fletcher-Reeves",
    "pr+": "Polak-Ribière+",
    "powell-beale": "Powell-Beale",
    "scg": "scaled CG",
    "scipy-cg": "SciPy CG",
    "lbfgs": "SciPy L-BFGS-B",
    "adam": "Adam, 500 steps",
    "mlp": "MLPClassifier",
}

CONJUGATE = ("fr", "pr+", "powell-beale", "scg")

EXPECTED: Mapping[str, Mapping[str, int]] = {
    "logistic": {"fr": 88, "pr+": 90, "powell-beale": 79, "scg": 93, "scipy-cg": 178, "lbfgs": 45},
    "digits": {"fr": 299, "pr+": 207, "powell-beale": 365, "scg": 425, "scipy-cg": 299, "lbfgs": 167},
    "rosenbrock": {"fr": 1691, "pr+": 1766, "powell-beale": 925, "scg": 1781, "scipy-cg": 2044, "lbfgs": 621},
}
"""Evaluations by problem and method of a first, throw-away implementation; those of digits vary by a fifth."""

COST = 5.0
"""What it costs to take a bad loan for a good one, where the other mistake costs 1 (the German credit table's own matrix)."""


@dataclass(frozen=True, kw_only=True)
class TabularPlan:
    """All that the runs depend on. hidden: tanh units. problems: of the counts; the others are of the cross-validation."""

    problems: tuple[str, ...] = tuple(PROBLEMS)
    tables: tuple[str, ...] = tabular_tables.NAMES
    alphas: tuple[float, ...] = (1e-4, 1e-3, 1e-2)
    solvers: tuple[str, ...] = tuple(SOLVERS)
    hidden: int = 10
    folds: int = 5
    starts: int = 5
    settings: Settings = field(default_factory=Settings)


@dataclass(frozen=True, kw_only=True)
class Fold:
    """What a solver gave in one fold.

    auc, accuracy, recall (of the bad class), cost (a row, at the threshold that suits the costs): on the held-out fold.
    loss, gradient: of the start that was kept. evaluations: of all starts, None where they are not counted. seconds: of the
    processor for training, all starts. speedup: evaluations of Adam for each one that Powell-Beale takes to Adam's loss,
    median of the starts that come there; None for other solvers.
    """

    auc: float
    accuracy: float
    recall: float
    cost: float
    loss: float
    gradient: float
    evaluations: float | None
    seconds: float = field(compare=False)
    speedup: float | None = None


Cell = tuple[str, float, str]
"""Table, alpha, solver."""


def folds(table: Table, number: int) -> list[tuple[Any, Any]]:
    """Indices of training and held-out rows."""
    from sklearn.model_selection import StratifiedKFold

    return list(StratifiedKFold(number, shuffle=True, random_state=0).split(table.inputs, table.bad))


def run_cell(plan: TabularPlan, table: Table, alpha: float, solver: str) -> list[Fold]:
    """Train and judge in every fold."""
    solve = SOLVERS[solver](plan.settings)
    done = []
    for kept, held_out in folds(table, plan.folds):
        standardizer = Standardizer.of(table.inputs[kept], np.full(len(kept), 1 / len(kept)))
        problem = Problem(standardizer(table.inputs[kept]), table.bad[kept], plan.hidden, alpha)
        starts = problem.starts(plan.starts)
        begin = time.process_time()  # what others do on this machine matters less than to a clock
        solution = solve(problem, starts)
        seconds = time.process_time() - begin
        best = int(solution.losses.argmin())
        logits = problem.network.scores(solution.parameters[best], standardizer(table.inputs[held_out]))[:, 0]
        ratios = (
            [
                steps / evaluations_to(problem, start, loss, plan.settings)
                for start, loss, steps in zip(starts, solution.losses, solution.evaluations)
            ]
            if solver == "adam"
            else []
        )
        reached = [ratio for ratio in ratios if not math.isnan(ratio)]
        evaluations = float(solution.evaluations.sum())
        done.append(
            Fold(
                **judged(logits, table.bad[held_out]),
                loss=float(solution.losses[best]),
                gradient=float(solution.gradients[best]),
                evaluations=None if math.isnan(evaluations) else evaluations,
                seconds=seconds,
                speedup=float(np.median(reached)) if reached else None,
            )
        )
    return done


def judged(logits: FloatArray, bad: npt.NDArray[np.intp]) -> dict[str, float]:
    """auc, accuracy, recall and cost of *logits* of the bad class [N] against *bad*, 0 or 1 [N].

    The cost is that of the decisions which are right for calibrated probabilities: bad from 1 / (1 + COST) on.
    """
    from sklearn.metrics import roc_auc_score

    called, feared = logits > 0, logits > -math.log(COST)
    return {
        "auc": float(roc_auc_score(bad, logits)),
        "accuracy": float((called == bad).mean()),
        "recall": float(called[bad == 1].mean()),
        "cost": float(np.where(bad == 1, COST * ~feared, feared).mean()),
    }


# ---- the experiment ----


def experiment(
    request: Request,
    plan: TabularPlan | None = None,
    *,
    run: Callable[[TabularPlan, Table, float, str], list[Fold]] = run_cell,
) -> TabularResult:
    """Do it. plan: None is the whole of it; run: does one cell (a stand-in for tests)."""
    plan = TabularPlan() if plan is None else plan
    for name in ("jobs", "workers"):
        check(
            getattr(request, name) == 1,
            "reproduce",
            name,
            getattr(request, name),
            "1 for 'tabular-cg': it takes the time",
        )
    kept = _Kept(request, plan)
    tables, absent = [], []
    for name in plan.tables:
        try:
            tables.append(tabular_tables.load(name))
        except DataUnavailable as error:
            absent.append(str(error))
    cells: list[tuple[Table, float, str]] = [(t, a, s) for t in tables for a in plan.alphas for s in plan.solvers]
    with _progress(request.progress) as bar:
        task = bar.add_task("", total=len(plan.problems) + len(cells))
        for name in plan.problems:
            bar.update(task, description=name)
            if name not in kept.counts:
                kept.counts[name] = count(name, plan.settings)
            bar.advance(task)
        if not kept.curves:
            kept.curves.update(trace(plan.hidden, plan.settings))
        kept.write()
        for table, alpha, solver in cells:
            bar.update(task, description=f"{table.name}, alpha {alpha:g}, {solver}")
            if (table.name, alpha, solver) not in kept.folds:
                kept.folds[table.name, alpha, solver] = run(plan, table, alpha, solver)
                kept.write()
            bar.advance(task)
    result = TabularResult(plan, kept.counts, kept.curves, kept.folds, tuple(absent))
    if request.out is not None:
        from conjugo.studies.reproduce import tabular_figures

        drawn = {"evaluations": tabular_figures.evaluations(result), "training": tabular_figures.training(result)}
        save(result.to_dict(), drawn, request.out)
    return result


def _progress(show: bool | None) -> Any:
    from rich.console import Console
    from rich.progress import Progress

    hidden = not (sys.stderr.isatty() if show is None else show)
    return Progress(console=Console(stderr=True), disable=hidden, transient=True)


class _Kept:
    """What is done, in ``cells.json`` of the run directory, which is written aside after each cell."""

    def __init__(self, request: Request, plan: TabularPlan) -> None:
        self.counts: dict[str, dict[str, int | None]] = {}
        self.curves: dict[str, list[tuple[int, float]]] = {}
        self.folds: dict[Cell, list[Fold]] = {}
        self.path: Path | None = None
        if request.out is None:
            return
        description = {"paper": "tabular-cg", "scale": "cpu", "workers": request.workers, **asdict(plan)}
        open_folder(request.out, json.loads(json.dumps(description)), resume=request.resume)
        self.path = request.out / "cells.json"
        if self.path.exists():
            self._read(self.path)

    def _read(self, path: Path) -> None:
        try:
            data = json.loads(path.read_bytes())
            self.counts = data["counts"]
            self.curves = {name: [(int(n), float(f)) for n, f in curve] for name, curve in data["curves"].items()}
            self.folds = {
                (cell["table"], cell["alpha"], cell["solver"]): [Fold(**fold) for fold in cell["folds"]]
                for cell in data["cells"]
            }
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptFile(f"{path}: damaged ({error})") from error

    def write(self) -> None:
        if self.path is not None:
            content = {"counts": self.counts, "curves": self.curves, "cells": _plain(self.folds)}
            write_aside(self.path, json.dumps(content, allow_nan=False))


def _plain(folds: Mapping[Cell, Sequence[Fold]]) -> list[dict[str, Any]]:
    return [
        {"table": table, "alpha": alpha, "solver": solver, "folds": [asdict(fold) for fold in done]}
        for (table, alpha, solver), done in folds.items()
    ]


# ---- the result ----


@dataclass(frozen=True)
class TabularResult:
    """counts: evaluations by problem and method, None if it did not converge. curves: (evaluations, loss) by solver.

    folds: by table, alpha and solver. absent: why a table was left out.
    """

    plan: TabularPlan
    counts: Mapping[str, Mapping[str, int | None]]
    curves: Mapping[str, Sequence[tuple[int, float]]]
    folds: Mapping[Cell, Sequence[Fold]]
    absent: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "paper": "tabular-cg",
            "scale": "cpu",
            "plan": asdict(self.plan),
            "expected": {name: dict(row) for name, row in EXPECTED.items()},
            "counts": {name: dict(row) for name, row in self.counts.items()},
            "curves": {name: list(curve) for name, curve in self.curves.items()},
            "cells": _plain(self.folds),
            "absent": list(self.absent),
            "claims": [claim.to_dict() for claim in self.claims()],
        }

    def values(self, table: str, alpha: float, solver: str, name: str) -> list[float]:
        """One figure of every fold, as far as it is there."""
        found = [getattr(fold, name) for fold in self.folds.get((table, alpha, solver), ())]
        return [float(value) for value in found if value is not None]

    def mean(self, table: str, alpha: float, solver: str, name: str) -> float:
        """The mean of :meth:`values`; NaN without any."""
        values = self.values(table, alpha, solver, name)
        return statistics.mean_sd(values)[0] if values else math.nan

    @property
    def tables_done(self) -> list[str]:
        """The tables that were there."""
        return [name for name in self.plan.tables if any(cell[0] == name for cell in self.folds)]

    def best_alpha(self, table: str) -> float:
        """The penalty with the highest AUC, averaged over all solvers: none of them is favoured."""
        return max(self.plan.alphas, key=lambda a: sum(self.mean(table, a, s, "auc") for s in self.plan.solvers))

    # ---- tables ----

    def tables(self) -> list[RenderableType]:
        """Evaluations, expected and ours; AUC by table and penalty; all figures of each table at its best penalty."""
        names = self.tables_done
        return [self._counts_table(), *map(self._auc_table, names), *map(self._detail_table, names)]

    def _counts_table(self) -> RenderableType:
        table = new_table(
            "Evaluations of function and gradient to the tolerance",
            "In brackets: a first implementation. –: not converged.",
        )
        for name in self.counts:
            table.add_column(PROBLEMS[name].title, justify="right")
        for method in COUNTED:
            cells = []
            for name, row in self.counts.items():
                ours = "–" if row[method] is None else f"{row[method]:,}"
                cells.append(f"{ours} [dim]({EXPECTED[name][method]:,})[/]")
            table.add_row(LABELS[method], *cells)
        return table

    def _auc_table(self, name: str) -> RenderableType:
        table = new_table(
            f"{name}: AUC (%), {self.plan.folds}-fold cross-validation",
            f"Mean ± sd of the folds. Best of {self.plan.starts} starts.",
        )
        for alpha in self.plan.alphas:
            table.add_column(f"α = {alpha:g}", justify="right", no_wrap=True)
        for solver in self.plan.solvers:
            aucs = [self.values(name, alpha, solver, "auc") for alpha in self.plan.alphas]
            table.add_row(LABELS[solver], *(percent(*statistics.mean_sd(values)) for values in aucs))
        return table

    def _detail_table(self, name: str) -> RenderableType:
        alpha = self.best_alpha(name)
        table = new_table(
            f"{name}, α = {alpha:g} (the best mean AUC of all solvers)",
            "Means of the folds. AUC, accuracy and recall of the bad class in %. Cost: of a row; a missed bad one costs "
            f"{COST:g}, a refused good one 1. Evaluations and processor seconds: all starts together. |g|: largest component, "
            "worst fold.",
        )
        for column in ("AUC", "acc.", "rec.", "cost", "loss", "evals", "s", "|g|"):
            table.add_column(column, justify="right", no_wrap=True)
        for solver in self.plan.solvers:
            mean = {f.name: self.mean(name, alpha, solver, f.name) for f in fields(Fold)}
            table.add_row(
                LABELS[solver],
                *(f"{100 * mean[column]:.1f}" for column in ("auc", "accuracy", "recall")),
                f"{mean['cost']:.3f}",
                f"{mean['loss']:.3f}",
                "–" if math.isnan(mean["evaluations"]) else f"{mean['evaluations']:,.0f}",
                f"{mean['seconds']:.2f}",
                f"{max(self.values(name, alpha, solver, 'gradient')):.0e}",
            )
        return table

    # ---- sentences ----

    def text(self) -> str:
        """What reproduced and what did not."""
        return sentences(self.claims(), self._notes())

    def claims(self) -> list[Claim]:
        """What was expected, judged by the runs."""
        return [
            Claim(
                "every rule takes at most 1.2 times the evaluations of the first implementation",
                {PROBLEMS[name].title: self._as_expected(name) for name in self.counts},
            ),
            Claim(
                "against SciPy's CG Powell-Beale saves as many evaluations as in the first implementation",
                {"geometric mean": self._saved()},
            ),
            Claim(
                "the AUC of all solvers that converged lies within 2 points",
                {
                    f"{name}, α {alpha:g}": self._close(name, alpha)
                    for name in self.tables_done
                    for alpha in self.plan.alphas
                },
            ),
            Claim(
                "to the loss of 500 Adam steps Powell-Beale takes at most half the evaluations",
                {
                    f"{name}, α {alpha:g}": self._faster(name, alpha)
                    for name in self.tables_done
                    for alpha in self.plan.alphas
                },
            ),
            Claim("the accuracy of small networks on German credit is 72 to 77 %", self._german()),
        ]

    def _as_expected(self, name: str) -> tuple[bool | None, str]:
        row = self.counts[name]
        ratios = {m: math.inf if (n := row[m]) is None else n / EXPECTED[name][m] for m in CONJUGATE}
        worst = max(ratios, key=lambda method: ratios[method])
        return ratios[worst] <= 1.2, f"at most {ratios[worst]:.2f} times ({LABELS[worst]})"

    def _saved(self) -> tuple[bool | None, str]:
        pairs = [(row["powell-beale"], row["scipy-cg"]) for row in self.counts.values()]
        ratios = [ours / theirs for ours, theirs in pairs if ours is not None and theirs is not None]
        if not ratios or len(ratios) < len(pairs):
            return None, "not all converged"
        expected = [EXPECTED[name]["powell-beale"] / EXPECTED[name]["scipy-cg"] for name in self.counts]
        ours, theirs = (math.exp(statistics.mean_sd([math.log(r) for r in rs])[0]) for rs in (ratios, expected))
        return ours <= theirs, f"{ours:.2f} times its evaluations, expected {theirs:.2f}"

    def _close(self, name: str, alpha: float) -> tuple[bool | None, str]:
        done = [
            solver
            for solver in self.plan.solvers
            if max(self.values(name, alpha, solver, "gradient"), default=math.inf) <= self.plan.settings.tol
        ]
        if len(done) < 2:
            return None, "fewer than two converged in every fold"
        aucs = [self.mean(name, alpha, solver, "auc") for solver in done]
        spread = max(aucs) - min(aucs)
        return spread <= 0.02, f"{100 * spread:.1f} points between {len(done)} solvers"

    def _faster(self, name: str, alpha: float) -> tuple[bool | None, str]:
        ratios = self.values(name, alpha, "adam", "speedup")
        if not ratios:
            return None, "Adam's loss was not reached"
        median = float(np.median(ratios))
        return median >= 2, f"Adam takes {median:.1f} times as many"

    def _german(self) -> dict[str, tuple[bool | None, str]]:
        if "german" not in self.tables_done:
            return {"German credit": (None, "not run")}
        cases: dict[str, tuple[bool | None, str]] = {}
        for alpha in self.plan.alphas:
            accuracy = self.mean("german", alpha, "powell-beale", "accuracy")
            cases[f"α {alpha:g}"] = (0.72 <= accuracy <= 0.77, f"{100 * accuracy:.1f} %")
        return cases

    def _notes(self) -> list[str]:
        notes = ["The paper's own data and figures are not known; what is expected comes from a first implementation."]
        notes += [f"Left out: {reason}." for reason in self.absent]
        short = [
            f"{LABELS[solver]} on {name} at α {alpha:g}"
            for (name, alpha, solver) in self.folds
            if solver in CONJUGATE and max(self.values(name, alpha, solver, "gradient")) > self.plan.settings.tol
        ]
        if short:
            notes.append(f"Not converged in every fold: {listed(short)}.")
        return notes


# ---- larger scales ----


def pointless(scale: str) -> NotRun:
    """There is nothing to do at *scale*."""
    return NotRun(
        "tabular-cg",
        scale,
        f"Scale {scale!r} is pointless here. A table of 1,000 rows and a network of some hundred weights take a tenth of a "
        "millisecond for an evaluation on one core; an accelerator would wait for its own launches. Scale cpu is the full "
        "experiment.",
    )


PAPER = Paper(
    title="Managing Bank Loans By Using Neural Networks",
    source="al-Brahimi, Al-Fakhry (2022); the rules of Fletcher & Reeves 1964, Polak & Ribière 1969, Powell 1977, Møller 1993",
    scales={"cpu": experiment, "gpu": pointless("gpu"), "full": pointless("full")},
)
