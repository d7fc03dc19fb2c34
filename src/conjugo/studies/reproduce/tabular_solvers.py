"""What trains the networks of the tabular experiment: one objective, one set of starts, several solvers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from conjugo.tabular.losses import Logistic
from conjugo.tabular.network import Network, Objective
from conjugo.tabular.training import train

__all__ = [
    "SOLVERS",
    "Problem",
    "Settings",
    "Solution",
    "Solver",
    "adam",
    "adam_path",
    "by_scipy",
    "conjugate",
    "evaluations_to",
    "lbfgs",
    "minimized",
    "mlp",
]

FloatArray = npt.NDArray[np.float64]
Function = Callable[[FloatArray], tuple[FloatArray, FloatArray]]


@dataclass(frozen=True)
class Solution:
    """What came out of S starts: parameters [S, n], losses [S], largest components of the gradients [S], evaluations [S].

    evaluations: NaN where the solver does not count them.
    """

    parameters: FloatArray
    losses: FloatArray
    gradients: FloatArray
    evaluations: FloatArray


@dataclass(frozen=True)
class Problem:
    """A network to be trained on standardised inputs [N, d] with labels 0 and 1 [N]."""

    inputs: FloatArray
    labels: npt.NDArray[np.intp]
    hidden: int
    alpha: float

    @property
    def network(self) -> Network:
        """d inputs, so many tanh units (none: logistic regression), one logistic output."""
        return Network((self.inputs.shape[1], *([self.hidden] if self.hidden else []), 1), "tanh")

    def objective(self) -> Objective:
        """Mean negative log likelihood plus alpha / 2 times the squared weights."""
        weights = np.full(len(self.labels), 1 / len(self.labels))
        return Objective(self.network, Logistic(self.labels, weights), self.inputs, self.alpha)

    def starts(self, seeds: int) -> FloatArray:
        """Random parameters [seeds, n]."""
        return np.stack([self.network.initial(np.random.default_rng(seed)) for seed in range(seeds)])


@dataclass(frozen=True, kw_only=True)
class Settings:
    """When solvers stop. tol: no component of the gradient is larger. adam_lrs: the best of these counts."""

    tol: float = 1e-5
    max_iter: int = 1000
    adam_steps: int = 500
    adam_lrs: tuple[float, ...] = (0.01, 0.03, 0.1)


Solver = Callable[[Problem, FloatArray], Solution]


def minimized(function: Function, starts: FloatArray, *, method: str, settings: Settings) -> Solution:
    """Our conjugate gradients from all *starts* [S, n]."""
    done = train(function, starts, method=method, max_iter=settings.max_iter, tol=settings.tol)
    return Solution(
        np.stack([one.parameters for one in done]),
        np.array([one.loss for one in done]),
        np.array([one.gradient for one in done]),
        np.array([float(one.evaluations) for one in done]),
    )


def by_scipy(function: Function, starts: FloatArray, *, method: str, settings: Settings) -> Solution:
    """SciPy's ``CG`` or ``L-BFGS-B`` from each of *starts* [S, n]; only the gradient ends a run."""
    from scipy.optimize import minimize

    def single(parameters: FloatArray) -> tuple[float, FloatArray]:
        values, gradients = function(parameters[None])
        return float(values[0]), gradients[0]

    options: dict[str, float] = {"gtol": settings.tol, "maxiter": settings.max_iter}
    options |= {"ftol": 0.0, "maxfun": 100 * settings.max_iter} if method == "L-BFGS-B" else {}
    done = [minimize(single, start, method=method, jac=True, options=options) for start in starts]
    parameters = np.stack([one.x for one in done])
    return Solution(parameters, *_measured(function, parameters), np.array([float(one.nfev) for one in done]))


def _measured(function: Function, parameters: FloatArray) -> tuple[FloatArray, FloatArray]:
    values, gradients = function(parameters)
    return values, np.abs(gradients).max(1)


def conjugate(method: str, settings: Settings) -> Solver:
    """Our conjugate gradients with the rule *method*."""
    return lambda problem, starts: minimized(problem.objective(), starts, method=method, settings=settings)


def lbfgs(settings: Settings) -> Solver:
    """SciPy's L-BFGS-B with ten pairs."""
    return lambda problem, starts: by_scipy(problem.objective(), starts, method="L-BFGS-B", settings=settings)


def adam(settings: Settings) -> Solver:
    """Full-batch Adam (Kingma & Ba 2015, betas 0.9 and 0.999), all starts at once; of the learning rates the one that gives
    the lowest loss. Evaluations are those of that one.
    """

    def solve(problem: Problem, starts: FloatArray) -> Solution:
        function = problem.objective()
        solutions = [adam_path(function, starts, lr, settings.adam_steps) for lr in settings.adam_lrs]
        return min(solutions, key=lambda solution: float(solution.losses.min()))

    return solve


def adam_path(function: Function, starts: FloatArray, lr: float, steps: int) -> Solution:
    """Adam with one learning rate."""
    x, mean, square = starts.copy(), np.zeros_like(starts), np.zeros_like(starts)
    for step in range(1, steps + 1):
        _, g = function(x)
        mean += 0.1 * (g - mean)
        square += 0.001 * (g * g - square)
        x -= lr * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
    return Solution(x, *_measured(function, x), np.full(len(starts), float(steps)))


def mlp(settings: Settings) -> Solver:
    """scikit-learn's ``MLPClassifier(solver="lbfgs")`` of the same shape and penalty, with starts of its own."""

    def solve(problem: Problem, starts: FloatArray) -> Solution:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.neural_network import MLPClassifier

        found = np.empty_like(starts)
        layers = problem.network.layers(found)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # its gradient is shown
            for seed in range(len(starts)):
                model = MLPClassifier(
                    (problem.hidden,),
                    activation="tanh",
                    solver="lbfgs",
                    alpha=problem.alpha * len(problem.labels),  # its penalty is for the sum of the losses
                    tol=settings.tol,
                    max_iter=settings.max_iter,
                    max_fun=100 * settings.max_iter,
                    random_state=seed,
                ).fit(problem.inputs, problem.labels)
                for layer, weights, biases in zip(layers, model.coefs_, model.intercepts_):
                    layer[seed] = np.column_stack([weights.T, biases])
        return Solution(found, *_measured(problem.objective(), found), np.full(len(starts), np.nan))

    return solve


SOLVERS: dict[str, Callable[[Settings], Solver]] = {
    **{name: partial(conjugate, name) for name in ("fr", "pr+", "powell-beale", "scg")},
    "lbfgs": lbfgs,
    "adam": adam,
    "mlp": mlp,
}
"""By name."""


def evaluations_to(problem: Problem, start: FloatArray, target: float, settings: Settings) -> float:
    """Evaluations that Powell-Beale takes from *start* [n] until a loss is at most *target*; NaN if it never is."""
    function, seen = problem.objective(), 0

    class Reached(Exception):
        pass

    def counted(parameters: FloatArray) -> tuple[FloatArray, FloatArray]:
        nonlocal seen
        values, gradients = function(parameters)
        seen += 1
        if values[0] <= target:
            raise Reached
        return values, gradients

    try:
        minimized(counted, start[None], method="powell-beale", settings=settings)
    except Reached:
        return float(seen)
    return math.nan
