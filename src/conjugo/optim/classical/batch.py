"""Many independent problems at once: one call of the function per round, a step length and an end for each problem."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from conjugo._tensors import Array, namespace
from conjugo.errors import check
from conjugo.optim.classical.methods import Options
from conjugo.optim.classical.protocol import MESSAGES, Algorithm, Ending, Memory, Point, Request, Status, Turn

if TYPE_CHECKING:
    from scipy.optimize import OptimizeResult

__all__ = ["minimize_batch"]

# Rows of a problem's table of vectors; the last two belong to Beale's method. p is MINUS the direction: then
# p <- P g + beta p is one operation in place.
NEW, P, G, P_KEPT, Y_KEPT = range(5)


def minimize_batch(
    fun: Callable[..., tuple[Any, Any]],
    x0: Array,
    *,
    method: str = "powell-beale",
    gtol: float = 1e-5,
    f_tol: float = 0.0,
    max_iter: int | None = None,
    max_eval: int | None = None,
    c1: float = 1e-4,
    c2: float = 0.1,
    callback: Callable[[OptimizeResult], Any] | None = None,
    pass_rows: bool = False,
) -> OptimizeResult:
    """Minimise B independent functions of n variables, each as :func:`conjugo.optim.minimize` would, in lockstep.

    In each round *fun* is called once, for all problems that are still running: the cost of calling it is shared, for
    example by several starts of a small network. A problem does what it would do alone: its own directions, step lengths,
    and end.

    Args:
        fun: takes X [S, n] and returns f [S] and its gradients G [S, n], row by row; S <= B falls as problems end. It must
            not write into X nor keep it, and G must be its own. NumPy arrays or tensors, as *x0*.
        x0: starting points [B, n], float32 or float64; not changed.
        method: as in :func:`conjugo.optim.minimize`; all of them.
        gtol, f_tol, max_iter, max_eval, c1, c2: as in :func:`conjugo.optim.minimize`; limits are for each problem.
        callback: called after each round in which problems finished an iteration, with an ``OptimizeResult`` that holds
            ``rows`` [k] (which problems, as an int64 array), ``x`` [k, n], ``fun`` [k], ``jac`` [k, n], ``nit`` [k] and
            ``nfev`` [k]. It may return k booleans: True ends that problem. ``StopIteration`` ends all. Points are those
            the search accepted: f falls from one to the next (to rounding).
        pass_rows: call ``fun(X, rows)``, where rows [S] (int64 array) are the problems the rows of X belong to.

    Returns:
        ``OptimizeResult`` with ``x`` [B, n], ``fun`` [B], ``jac`` [B, n] (of the kind of *x0*) and NumPy arrays ``nit``,
        ``nfev``, ``status``, ``success`` [B], and ``message``, a list of B sentences; ``rounds``: calls of *fun*.

    Raises:
        ValueError: an option is out of range; *x0* is no [B, n] array with B, n >= 1; *fun* returns other shapes.
        TypeError: *x0* is not of a real floating-point type.

    >>> def fun(X):  # (x - 1)^4, twice
    ...     return ((X - 1) ** 4).sum(1), 4 * (X - 1) ** 3
    >>> result = minimize_batch(fun, np.array([[3.0], [0.0]]))
    >>> result.success.all(), bool((abs(result.x - 1) < 0.05).all())
    (np.True_, True)
    """
    options = Options(
        owner="minimize_batch",
        method=method,
        gtol=gtol,
        f_tol=f_tol,
        max_iter=max_iter,
        max_eval=max_eval,
        c1=c1,
        c2=c2,
    )
    _check_start(x0)
    evaluate = fun if pass_rows else lambda x, rows: fun(x)
    return _Lockstep(options, evaluate, x0, callback).run()


def _check_start(x0: Array) -> None:
    if not isinstance(x0, (np.ndarray, Tensor)):
        raise TypeError(f"minimize_batch: x0 must be a NumPy array or a tensor, got {type(x0).__name__}")
    if str(x0.dtype).removeprefix("torch.") not in ("float32", "float64"):
        raise TypeError(f"minimize_batch: x0 must be float32 or float64, got {x0.dtype}")
    check(
        x0.ndim == 2 and min(x0.shape) >= 1, "minimize_batch", "x0", tuple(x0.shape), "of shape [B, n] with B, n >= 1"
    )


@dataclass
class _Problem:
    """One of the problems, and what is known at its base x."""

    row: int
    memory: Memory
    algorithm: Algorithm
    request: Request
    f: float = math.nan
    iterations: int = 0  # that the callback has seen
    ending: Status | None = None


class _Lockstep:
    """Row i of the vectors (x, trial, table) belongs to ``problems[i]``; those that have ended are taken out."""

    def __init__(self, options: Options, evaluate: Callable[..., tuple[Any, Any]], x0: Array, callback: Any):
        self.xp, self.options, self.evaluate, self.callback = namespace(x0), options, evaluate, callback
        count, n = x0.shape
        self.x = self.trial = x0.detach().clone() if isinstance(x0, Tensor) else x0.copy()
        self.table = self.xp.zeros_like(self.xp.stack([self.x] * options.vectors, 1))
        self.problems = []
        for row in range(count):
            memory = Memory()
            algorithm = options.algorithm(memory, n, float(self.xp.finfo(x0.dtype).eps))
            self.problems.append(_Problem(row, memory, algorithm, next(algorithm)))
        self.rounds = 0
        zeros = np.zeros(count, dtype=np.int64)
        self.result = {
            "x": self.xp.zeros_like(self.x),
            "fun": self.xp.zeros_like(self.x[:, 0]),
            "jac": self.xp.zeros_like(self.x),
            **{name: zeros.copy() for name in ("nit", "nfev", "status")},
        }

    def run(self) -> OptimizeResult:
        from scipy.optimize import OptimizeResult

        while self.problems:
            try:
                self._advance(self._measure())
                if self.callback is not None:
                    self._call_back(OptimizeResult)
            except StopIteration:
                self._end_all(Status.STOPPED)
            except KeyboardInterrupt:
                self._end_all(Status.INTERRUPTED)
            self._take_out_ended()
        status = self.result["status"]
        return OptimizeResult(
            **self.result,
            success=status == Status.CONVERGED,
            message=[MESSAGES[Status(s)] for s in status],
            rounds=self.rounds,
        )

    def _numbers(self, values: list[float]) -> Array:
        """A column [S, 1] beside the vectors."""
        if isinstance(self.x, Tensor):
            return torch.tensor(values, dtype=self.x.dtype, device=self.x.device)[:, None]
        return np.array(values, dtype=self.x.dtype)[:, None]

    def _measure(self) -> list[Point]:
        """Evaluate all problems where they asked for it."""
        xp, table = self.xp, self.table
        self.trial = self.x - self._numbers([p.request.step for p in self.problems]) * table[:, P]
        f, g = self.evaluate(self.trial, np.array([p.row for p in self.problems]))
        self.rounds += 1
        shapes, wanted = (tuple(f.shape), tuple(g.shape)), ((len(self.problems),), tuple(self.x.shape))
        check(shapes == wanted, "minimize_batch", "fun", shapes, f"a function that returns the shapes {wanted}")
        table[:, NEW] = g
        products = (table @ table[:, NEW, :, None])[:, :, 0]
        columns = [f[:, None], xp.amax(xp.abs(g), axis=-1, keepdims=True), products]
        if self.options.norms:
            columns.append((table[:, P] ** 2).sum(-1)[:, None])
        points = []
        for value, size, rho, down, cross, *rest in xp.concatenate(columns, axis=1).tolist():
            dd = rest.pop() if self.options.norms else 0.0
            kept_down, kept_y = rest or (0.0, 0.0)
            points.append(Point(value, -down, rho, cross, size, dd, -kept_down, kept_y))
        return points

    def _advance(self, points: list[Point]) -> None:
        """Let every algorithm say what comes next, and do it to the vectors."""
        accepted: list[int] = []
        turns: list[tuple[int, Turn]] = []
        for i, (problem, point) in enumerate(zip(self.problems, points, strict=True)):
            try:
                problem.request = problem.algorithm.send(point)
                turn = problem.request.turn
                accept = turn is not None and turn.accept
            except StopIteration as end:
                ending: Ending = end.value
                turn, accept, problem.ending = None, ending.accept, ending.status
            if turn is not None:
                turns.append((i, turn))
            if accept:
                accepted.append(i)
                problem.f = point.f
        x, table = self.x, self.table
        kept = [i for i, turn in turns if turn.keep]
        if kept:
            table[kept, P_KEPT] = table[kept, P]
            table[kept, Y_KEPT] = table[kept, NEW] - table[kept, G]
        if accepted:
            x[accepted] = self.trial[accepted]
            table[accepted, G] = table[accepted, NEW]
        if turns:
            rows = [i for i, _ in turns]
            p = table[rows, G] + self._numbers([turn.beta for _, turn in turns]) * table[rows, P]
            if any(turn.gamma for _, turn in turns):
                p += self._numbers([turn.gamma for _, turn in turns]) * table[rows, P_KEPT]
            table[rows, P] = p

    def _call_back(self, result: Any) -> None:
        """Show the problems that finished an iteration to the callback."""
        ready = [i for i, p in enumerate(self.problems) if p.memory.iterations > p.iterations]
        if not ready:
            return
        problems = [self.problems[i] for i in ready]
        for problem in problems:
            problem.iterations = problem.memory.iterations
        answer = self.callback(
            result(
                rows=np.array([p.row for p in problems]),
                x=self.x[ready],
                fun=self._numbers([p.f for p in problems])[:, 0],
                jac=self.table[ready, G],
                nit=np.array([p.iterations for p in problems]),
                nfev=np.array([p.memory.evaluations for p in problems]),
            )
        )
        if answer is None:
            return
        check(
            len(answer) == len(ready), "minimize_batch", "callback", answer, f"one that returns {len(ready)} booleans"
        )
        for problem, stop in zip(problems, answer, strict=True):
            if stop and problem.ending is None:
                problem.ending = Status.STOPPED

    def _end_all(self, status: Status) -> None:
        for problem in self.problems:
            problem.ending = status if problem.ending is None else problem.ending

    def _take_out_ended(self) -> None:
        """Write down the results of problems that have ended, and go on with the others."""
        ended = [i for i, p in enumerate(self.problems) if p.ending is not None]
        if not ended:
            return
        rows = [self.problems[i].row for i in ended]
        self.result["x"][rows] = self.x[ended]
        self.result["jac"][rows] = self.table[ended, G]
        self.result["fun"][rows] = self._numbers([self.problems[i].f for i in ended])[:, 0]
        for i in ended:
            problem = self.problems[i]
            problem.algorithm.close()
            self.result["nit"][problem.row] = problem.memory.iterations
            self.result["nfev"][problem.row] = problem.memory.evaluations
            self.result["status"][problem.row] = problem.ending
        going = [i for i, p in enumerate(self.problems) if p.ending is None]
        self.x, self.trial, self.table = self.x[going], self.trial[going], self.table[going]
        self.problems = [self.problems[i] for i in going]
