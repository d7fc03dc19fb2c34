"""Training from several starts at once, with early stopping."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from conjugo.optim.classical import METHODS, minimize_batch
from conjugo.optim.classical.protocol import Status
from conjugo.tabular.activations import FloatArray

if TYPE_CHECKING:
    from scipy.optimize import OptimizeResult

__all__ = ["METHODS", "EarlyStopping", "Trained", "train"]


@dataclass(frozen=True)
class Trained:
    """What came out of one start.

    parameters: [n]. loss, gradient: the objective and the largest component of its gradient in size, there. iterations,
    evaluations: how many it took. converged: it came to a gradient within the tolerance. stopped_early: the held-out loss did
    not improve any more. validation: lowest held-out loss, that of *parameters*; None if nothing is held out. message: why it
    ended.
    """

    parameters: FloatArray
    loss: float
    gradient: float
    iterations: int
    evaluations: int
    converged: bool
    stopped_early: bool
    validation: float | None
    message: str


class EarlyStopping:
    """Keeps, for each start, the iterate with the lowest held-out loss; ends one that has not improved for *patience* ones.

    validation: held-out loss of parameters [n]. starts: [S, n].
    """

    def __init__(self, validation: Callable[[FloatArray], float], patience: int, starts: FloatArray) -> None:
        self.validation, self.patience = validation, patience
        self.parameters = starts.copy()
        self.losses = np.array([validation(start) for start in starts])
        self.since = np.zeros(len(starts), dtype=np.intp)

    @property
    def stopped(self) -> list[bool]:
        """Which starts were ended."""
        return [bool(since >= self.patience) for since in self.since]

    def __call__(self, state: OptimizeResult) -> list[bool]:
        """Look at the new iterates *state.x* of the starts *state.rows*; which of them are to end."""
        for row, parameters in zip(state.rows, state.x):
            loss = self.validation(parameters)
            if loss < self.losses[row]:
                self.losses[row], self.parameters[row], self.since[row] = loss, parameters, 0
            else:
                self.since[row] += 1
        stopped = self.stopped
        return [stopped[row] for row in state.rows]


def train(
    objective: Callable[[FloatArray], tuple[FloatArray, FloatArray]],
    starts: FloatArray,
    *,
    method: str,
    max_iter: int,
    tol: float,
    validation: Callable[[FloatArray], float] | None = None,
    patience: int = 20,
) -> list[Trained]:
    """Minimise from each of *starts* [S, n] and say what came out, in their order.

    objective: from parameters [S', n] to values [S'] and gradients [S', n], row by row. method: one of METHODS. tol: a start
    is done when no component of the gradient is larger in size. validation: held-out loss of parameters [n], for early
    stopping.

    Raises KeyboardInterrupt if it was interrupted.
    """
    stopping = None if validation is None else EarlyStopping(validation, patience, starts)
    with np.errstate(over="ignore", invalid="ignore"):  # of steps that are too long, which the search then shortens
        result = minimize_batch(objective, starts, method=method, gtol=tol, max_iter=max_iter, callback=stopping)
    if (result.status == Status.INTERRUPTED).any():
        raise KeyboardInterrupt  # a model that is not trained must not look like one, nor a search over models go on
    parameters, losses, gradients = result.x, result.fun, result.jac
    if stopping is not None:
        parameters = stopping.parameters
        losses, gradients = objective(parameters)
    return [
        Trained(
            parameters=parameters[i],
            loss=float(losses[i]),
            gradient=float(np.abs(gradients[i]).max()),
            iterations=int(result.nit[i]),
            evaluations=int(result.nfev[i]),
            converged=bool(result.success[i]),
            stopped_early=stopping is not None and stopping.stopped[i],
            validation=None if stopping is None else float(stopping.losses[i]),
            message=result.message[i],
        )
        for i in range(len(starts))
    ]
