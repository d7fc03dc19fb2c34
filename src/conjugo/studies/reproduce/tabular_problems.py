"""The problems on which evaluations are counted, and the losses along one training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from conjugo.studies.reproduce import tabular_tables
from conjugo.studies.reproduce.tabular_solvers import (
    FloatArray,
    Function,
    Problem,
    Settings,
    Solution,
    adam_path,
    by_scipy,
    minimized,
)
from conjugo.tabular.losses import Softmax
from conjugo.tabular.network import Network, Objective
from conjugo.tabular.table import Standardizer

__all__ = ["COUNTED", "PROBLEMS", "Counted", "count", "rosenbrock", "trace"]


@dataclass(frozen=True)
class Counted:
    """A problem. make: gives the function and where to start, [1, n]. tol: largest component of the gradient at the end."""

    title: str
    make: Callable[[], tuple[Function, FloatArray]]
    tol: float


def rosenbrock(x: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Sum of 100 (x_i+1 - x_i^2)^2 + (1 - x_i)^2, values [S] and gradients [S, n] at [S, n]."""
    bend, off = x[:, 1:] - x[:, :-1] ** 2, 1 - x[:, :-1]
    gradient = np.zeros_like(x)
    gradient[:, :-1] = -400 * x[:, :-1] * bend - 2 * off
    gradient[:, 1:] += 200 * bend
    return (100 * bend**2 + off**2).sum(1), gradient


def _rosenbrock() -> tuple[Function, FloatArray]:
    return rosenbrock, np.tile([-1.2, 1.0], 50)[None]


def _logistic() -> tuple[Function, FloatArray]:
    problem = _problem(tabular_tables.load("breast_cancer"), hidden=0, alpha=1e-3)
    return problem.objective(), np.zeros((1, problem.network.size))


def _digits() -> tuple[Function, FloatArray]:
    from sklearn.datasets import load_digits

    pixels, digits = load_digits(return_X_y=True)
    network = Network((64, 16, 10), "tanh")
    loss = Softmax(digits, np.full(len(digits), 1 / len(digits)), 10)
    return Objective(network, loss, pixels / 16, 1e-4), network.initial(np.random.default_rng(0))[None]


PROBLEMS = {
    "logistic": Counted("logistic regression, breast_cancer", _logistic, 1e-6),
    "digits": Counted("digits, 64-16-10", _digits, 1e-4),
    "rosenbrock": Counted("Rosenbrock, n = 100", _rosenbrock, 1e-6),
}

COUNTED = ("fr", "pr+", "powell-beale", "scg", "scipy-cg", "lbfgs")


def _problem(table: tabular_tables.Table, hidden: int, alpha: float) -> Problem:
    weights = np.full(len(table.bad), 1 / len(table.bad))
    return Problem(Standardizer.of(table.inputs, weights)(table.inputs), table.bad, hidden, alpha)


def _solve(method: str, function: Function, starts: FloatArray, settings: Settings) -> Solution:
    by = {"scipy-cg": "CG", "lbfgs": "L-BFGS-B"}
    if method in by:
        return by_scipy(function, starts, method=by[method], settings=settings)
    return minimized(function, starts, method=method, settings=settings)


def count(name: str, settings: Settings) -> dict[str, int | None]:
    """Evaluations of every method on a problem, None where it did not come to the tolerance."""
    problem = PROBLEMS[name]
    settings = replace(settings, tol=problem.tol, max_iter=max(settings.max_iter, 5000))
    counts: dict[str, int | None] = {}
    for method in COUNTED:
        solution = _solve(method, *problem.make(), settings)
        counts[method] = int(solution.evaluations[0]) if solution.gradients[0] <= problem.tol else None
    return counts


def trace(hidden: int, settings: Settings) -> dict[str, list[tuple[int, float]]]:
    """(evaluations, lowest loss so far) of solvers from one start, on the made table with alpha 1e-3.

    Points at which nothing was gained are left out.
    """
    problem = _problem(tabular_tables.load("made"), hidden, 1e-3)
    start = problem.starts(1)
    curves = {}
    for method in ("fr", "pr+", "powell-beale", "scg", "lbfgs"):
        recorder = _Recorder(problem.objective())
        _solve(method, recorder, start, settings)
        curves[method] = recorder.curve
    recorders = [_Recorder(problem.objective()) for _ in settings.adam_lrs]
    for recorder, lr in zip(recorders, settings.adam_lrs):
        adam_path(recorder, start, lr, settings.adam_steps)
    curves["adam"] = min(recorders, key=lambda recorder: recorder.curve[-1][1]).curve
    return curves


class _Recorder:
    """A function that remembers how low it has been."""

    def __init__(self, function: Function) -> None:
        self.function, self.seen = function, 0
        self.curve: list[tuple[int, float]] = []

    def __call__(self, parameters: FloatArray) -> tuple[FloatArray, FloatArray]:
        values, gradients = self.function(parameters)
        self.seen += 1
        if not self.curve or values[0] < self.curve[-1][1]:
            self.curve.append((self.seen, float(values[0])))
        return values, gradients
