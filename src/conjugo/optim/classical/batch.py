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
from conjugo.optim.classical import fused
from conjugo.optim.classical.methods import Options
from conjugo.optim.classical.protocol import MESSAGES, Algorithm, Memory, Point, Request, Status, Turn

if TYPE_CHECKING:
    from scipy.optimize import OptimizeResult

__all__ = ["minimize_batch"]

# Rows of a problem's table: gradients at the point evaluated last, at the base of the line and at the lowest point; then, as in
# driver.Rows, directions.
LAST, BASE, BEST, P, P_KEPT, Y_KEPT = range(6)


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
    """One of the problems; f: at its lowest point."""

    row: int
    memory: Memory
    algorithm: Algorithm
    request: Request
    f: float = math.nan
    iterations: int = 0  # that the callback has seen
    ending: Status | None = None


class _Lockstep:
    """Row i of the vectors (base, last, best, table) belongs to ``problems[i]``; those that have ended are taken out."""

    def __init__(self, options: Options, evaluate: Callable[..., tuple[Any, Any]], x0: Array, callback: Any) -> None:
        self.xp, self.options, self.evaluate, self.callback = namespace(x0), options, evaluate, callback
        self.norms = options.norms
        count, n = x0.shape
        # Contiguous, as the kernels want it, whatever the layout of x0.
        x0 = x0.detach().contiguous() if isinstance(x0, Tensor) else np.ascontiguousarray(x0)
        self.base, self.last, self.best = (x0 + 0.0 for _ in range(3))
        self.table = self.xp.zeros_like(self.xp.stack([self.base] * options.vectors, 1))
        self.fused = fused.suits(torch.as_tensor(self.table))
        self.problems = []
        for row in range(count):
            memory = Memory()
            algorithm = options.algorithm(memory, n, float(self.xp.finfo(x0.dtype).eps))
            self.problems.append(_Problem(row, memory, algorithm, next(algorithm)))
        self.rounds = 0
        zeros = np.zeros(count, dtype=np.int64)
        self.result = {
            "x": self.xp.zeros_like(self.base),
            "fun": self.xp.zeros_like(self.base[:, 0]),
            "jac": self.xp.zeros_like(self.base),
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

    def _rows(self, chosen: list[int]) -> list[int] | slice:
        """*chosen* as an index. A slice, where it is all of them, gives views; a list gives copies, which take longer."""
        return slice(None) if len(chosen) == len(self.problems) else chosen

    def _factor(self, values: list[float]) -> Array | float:
        """Factors of vectors, one for each row: a column, or the number itself if there is only one."""
        return values[0] if len(values) == 1 else self._column(values)

    def _column(self, values: list[float]) -> Array:
        """A column [S, 1] beside the vectors."""
        if isinstance(self.base, Tensor):
            return torch.tensor(values, dtype=self.base.dtype, device=self.base.device)[:, None]
        return np.array(values, dtype=self.base.dtype)[:, None]

    def _measure(self) -> list[Point]:
        """Evaluate all problems where they asked for it."""
        xp, table = self.xp, self.table
        self.last = self.base - self._factor([p.request.step for p in self.problems]) * table[:, P]
        f, g = self.evaluate(self.last, np.array([p.row for p in self.problems]))
        self.rounds += 1
        shapes, wanted = (tuple(f.shape), tuple(g.shape)), ((len(self.problems),), tuple(self.base.shape))
        check(shapes == wanted, "minimize_batch", "fun", shapes, f"a function that returns the shapes {wanted}")
        table[:, LAST] = g
        if self.fused:
            rows = [
                [value, *found] for value, found in zip(f.tolist(), fused.products_of_each(table, LAST), strict=True)
            ]
        else:
            columns = [f[:, None], (table @ g[:, :, None])[:, :, 0], xp.amax(xp.abs(g), axis=-1, keepdims=True)]
            rows = xp.concatenate(columns, axis=1).tolist()
        norms = (table[:, P] ** 2).sum(-1).tolist() if self.norms else [0.0] * len(rows)
        points = []
        for (value, rho, cross, _, down, *kept, size), dd in zip(rows, norms, strict=True):
            kept_down, kept_y = kept or (0.0, 0.0)
            points.append(Point(value, -down, rho, cross, size, dd, -kept_down, kept_y))
        return points

    def _advance(self, points: list[Point]) -> None:
        """Let every algorithm say what comes next, and do it to the vectors."""
        turns: list[tuple[int, Turn, float]] = []
        lowest = []
        for i, (problem, point) in enumerate(zip(self.problems, points, strict=True)):
            step, last = problem.request.step, False
            try:
                problem.request = problem.algorithm.send(point)
                if problem.request.turn is not None:
                    turns.append((i, problem.request.turn, step))
            except StopIteration as end:
                problem.ending, last = end.value
            if last or point.f <= problem.f or problem.f != problem.f:
                problem.f = point.f
                lowest.append(i)
        if lowest:
            rows = self._rows(lowest)
            self.best[rows] = self.last[rows]
            self.table[rows, BEST] = self.table[rows, LAST]
        if turns:
            self._turn(turns)

    def _turn(self, turns: list[tuple[int, Turn, float]]) -> None:
        """What :class:`conjugo.optim.classical.driver.Driver` does to one problem; the last step belongs to each turn."""
        table = self.table
        between = [(i, turn.part, turn.part * step) for i, turn, step in turns if turn.part != 1.0]
        if between:
            chosen, parts, steps = (list(column) for column in zip(*between, strict=True))
            rows = self._rows(chosen)
            self.last[rows] = self.base[rows] - self._factor(steps) * table[rows, P]
            table[rows, LAST] = table[rows, BASE] + self._factor(parts) * (table[rows, LAST] - table[rows, BASE])
        if chosen := [i for i, turn, _ in turns if turn.keep]:
            kept = self._rows(chosen)
            table[kept, P_KEPT] = table[kept, P]
            table[kept, Y_KEPT] = table[kept, LAST] - table[kept, BASE]
        accepted = self._rows([i for i, turn, _ in turns if turn.accept])
        self.base[accepted] = self.last[accepted]
        table[accepted, BASE] = table[accepted, LAST]
        rows = self._rows([i for i, _, _ in turns])
        p = table[rows, BASE] + self._factor([turn.beta for _, turn, _ in turns]) * table[rows, P]
        if any(turn.gamma for _, turn, _ in turns):
            p += self._factor([turn.gamma for _, turn, _ in turns]) * table[rows, P_KEPT]
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
                x=self.best[ready],
                fun=self._column([p.f for p in problems])[:, 0],
                jac=self.table[ready, BEST],
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
        self.result["x"][rows] = self.best[ended]
        self.result["jac"][rows] = self.table[ended, BEST]
        self.result["fun"][rows] = self._column([self.problems[i].f for i in ended])[:, 0]
        for i in ended:
            problem = self.problems[i]
            problem.algorithm.close()
            self.result["nit"][problem.row] = problem.memory.iterations
            self.result["nfev"][problem.row] = problem.memory.evaluations
            self.result["status"][problem.row] = problem.ending
        going = [i for i, p in enumerate(self.problems) if p.ending is None]
        self.base, self.last, self.best = self.base[going], self.last[going], self.best[going]
        self.table = self.table[going]
        self.problems = [self.problems[i] for i in going]
