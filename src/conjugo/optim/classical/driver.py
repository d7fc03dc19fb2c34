"""The driver of one problem: its vectors, in place, and one transfer of numbers to the host per evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from conjugo._tensors import CHUNK, dot, wide_dtype
from conjugo.optim.classical import fused
from conjugo.optim.classical.methods import Options
from conjugo.optim.classical.protocol import Algorithm, Memory, Point, Request, Status, Turn

__all__ = ["Driver", "Evaluate", "table_products"]

Evaluate: TypeAlias = Callable[[Tensor, Tensor], "Tensor | float"]
"""Takes a point x [n], writes the gradient there into the second argument [n], returns the value, 0-d."""


class Rows(NamedTuple):
    """Which row of the table holds what, behind the gradients at three points; the last two exist for Beale's method only.

    p is minus the direction: then p <- P g + beta p is one pass over memory.
    """

    p: int = 3
    p_kept: int = 4
    y_kept: int = 5


class Driver:
    """The vectors of one problem and what is done to them.

    There are three slots for points, of which row i of *points* [3, n] and row i of *table* [k, n] hold x and its gradient. The
    other rows of the table are directions. All inner products of an evaluation are one product of the table with the new
    gradient, and points and directions change their role by exchange of rows, not by copying.
    """

    def __init__(
        self,
        options: Options,
        points: Tensor,
        evaluate: Evaluate,
        *,
        precondition: Callable[[Tensor], Tensor] | None = None,
        curvature: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.options, self.evaluate = options, evaluate
        self.precondition, self.curvature = precondition, curvature
        self.points, self.rows = points, Rows()
        self.table = points.new_zeros(options.vectors, points.shape[1])
        self.fused = fused.suits(self.table)
        self._trial_ready = False  # whether the next trial point is in its slot already
        self.base = self.last = self.best = 0  # slots: where the line starts, evaluated last, lowest
        self.f = self._f_last = math.nan  # at best, at last

    @property
    def x(self) -> Tensor:
        """The result."""
        return self.points[self.best]

    @property
    def gradient(self) -> Tensor:
        """The gradient at x."""
        return self.table[self.best]

    def run(self, memory: Memory, after_iteration: Callable[[], object] = lambda: None) -> Status:
        """Run the algorithm from the base to its end; then x, f and gradient are the result.

        after_iteration is called when they are those of the best point so far; ``StopIteration`` from it ends the run. The last
        direction and the gradient at the base stay as they are: the next run goes on from them.
        """
        algorithm = self.options.algorithm(memory, self.points.shape[1], torch.finfo(self.points.dtype).eps)
        self.f, self.best = math.nan, self.base
        self._trial_ready = False  # of an interrupted run
        try:
            return self._drive(algorithm, memory, after_iteration)
        except StopIteration:
            status = Status.STOPPED
        except KeyboardInterrupt:
            status = Status.INTERRUPTED
        memory.rho = 0.0  # the direction belongs to a step that was not taken
        return status

    def _drive(self, algorithm: Algorithm, memory: Memory, after_iteration: Callable[[], object]) -> Status:
        request, seen = next(algorithm), memory.iterations
        while True:
            point, step = self._measure(request), request.step
            try:
                request = algorithm.send(point)
            except StopIteration as end:
                if end.value.last:
                    self.best, self.f = self.last, self._f_last
                if memory.iterations > seen:
                    after_iteration()
                return Status(end.value.status)
            if request.turn is not None and self.fused and self.precondition is None:
                self._turn_fused(request.turn, step, request.step, ready=not request.curvature)
            elif request.turn is not None:
                self._turn(request.turn, step)
            if memory.iterations > seen:
                seen = memory.iterations
                after_iteration()

    def _measure(self, request: Request) -> Point:
        """Evaluate where the algorithm asked for it; waits once for the device."""
        table, rows = self.table, self.rows
        p = table[rows.p]
        if request.curvature:
            assert self.curvature is not None
            product = self.curvature(self.points[self.base], p)
            return Point(math.nan, dot(p, product).item(), 0.0, 0.0, 0.0)
        last = self._free(self.base, self.best)
        x, g = self.points[last], table[last]
        if not self._trial_ready:
            torch.sub(self.points[self.base], p, alpha=request.step, out=x)
        self._trial_ready = False
        f = self.evaluate(x, g)
        wanted = [last, self.base, *rows] if self.options.beale else [last, self.base, rows.p]
        if self.fused and self.precondition is None and not self.options.norms:
            *numbers, size = fused.products(g, [table[row] for row in wanted])
            return self._point(f if isinstance(f, float) else f.item(), dict(zip(wanted, numbers, strict=True)), size)
        if x.numel() <= CHUNK:  # calls count then, not passes over memory
            wanted = list(range(len(table)))
        low, high = torch.aminmax(g)  # several times faster than a norm
        found = [table_products(table, wanted, g), torch.stack((low.neg(), high))]
        if self.options.norms:
            found.append(dot(p, p).reshape(1))
        if self.precondition is not None:
            found.append(table_products(table, wanted, self.precondition(g)))
        if isinstance(f, Tensor):
            found.append(f.detach().reshape(1))
        numbers = torch.cat(found).tolist()
        f = numbers.pop() if isinstance(f, Tensor) else f
        k = len(wanted)
        by_g, by_z = (dict(zip(wanted, part, strict=True)) for part in (numbers[:k], numbers[-k:]))
        by_z = by_g if self.precondition is None else by_z
        dd = numbers[k + 2] if self.options.norms else 0.0
        return self._point(f, by_g, max(numbers[k : k + 2]), by_z, dd)

    def _point(
        self, f: float, by_g: dict[int, float], size: float, by_z: dict[int, float] | None = None, dd: float = 0.0
    ) -> Point:
        """Note where the last evaluation is; what the algorithm is told of it.

        by_g, by_z: inner products of the gradient, and of the preconditioned one, with rows of the table.
        """
        rows, last = self.rows, self._free(self.base, self.best)
        by_z = by_g if by_z is None else by_z
        kept = (-by_g[rows.p_kept], by_z[rows.y_kept]) if self.options.beale else ()
        point = Point(f, -by_g[rows.p], by_z[last], by_z[self.base], size, dd, *kept)
        self.last, self._f_last = last, f
        if f <= self.f or self.f != self.f:
            self.best, self.f = last, f
        return point

    def settle(self) -> None:
        """Move everything to the rows where it was in the beginning; x becomes the base, the gradient at the old base stays.

        Rounding of a product with the table depends on the order of its rows, so that only then two drivers that hold the same
        go on alike.
        """
        self.points[0].copy_(self.x)
        rows = self.rows[: 1 + self.options.beale]  # the third one never moves
        self.table[list(range(3, 3 + len(rows)))] = self.table[list(rows)]
        self.table[0].copy_(self.table[self.base])
        self.base = self.last = self.best = 0
        self.rows = Rows()

    @staticmethod
    def _free(*used: int) -> int:
        """A slot that is not in use."""
        return next(slot for slot in range(3) if slot not in used)

    def _turn(self, turn: Turn, step: float) -> None:
        """step: how far the last evaluation is from the base."""
        table, rows, base = self.table, self.rows, self.base
        p = target = table[rows.p]
        if turn.accept:
            base = self.last
            if turn.part != 1.0:
                base = self._free(self.base, self.best)
                torch.sub(self.points[self.base], p, alpha=turn.part * step, out=self.points[base])
                torch.lerp(table[self.base], table[self.last], turn.part, out=table[base])
        z = table[base]
        if self.precondition is not None:
            z = self.precondition(z)
        if turn.keep:
            torch.sub(table[base], table[self.base], out=table[rows.y_kept])
            target = table[rows.p_kept]
            self.rows = rows._replace(p=rows.p_kept, p_kept=rows.p)
        torch.add(z, p, alpha=turn.beta, out=target)
        if turn.gamma:
            target.add_(table[rows.p_kept], alpha=turn.gamma)
        self.base = base

    def _turn_fused(self, turn: Turn, step: float, next_step: float, *, ready: bool) -> None:
        """:meth:`_turn` in one pass, which also makes the point at *next_step*; *ready*: that is the next trial point."""
        table, rows, points = self.table, self.rows, self.points
        base, part = self.base, turn.part if turn.accept else 1.0
        if turn.accept:
            base = self.last if part == 1.0 else self._free(self.base, self.best)
        fused.turn(
            (
                points[self.base],
                points[base],
                table[self.base],
                table[self.last],
                table[base],
                table[rows.p],
                table[rows.p_kept if turn.keep else rows.p],
                table[rows.p_kept] if turn.gamma else None,
                table[rows.y_kept] if turn.keep else None,
                points[self._free(base, self.best)],
            ),
            part=part,
            step=step,
            beta=turn.beta,
            gamma=turn.gamma,
            next_step=next_step,
        )
        if turn.keep:
            self.rows = rows._replace(p=rows.p_kept, p_kept=rows.p)
        self.base = base
        self._trial_ready = ready


def table_products(table: Tensor, rows: list[int], v: Tensor) -> Tensor:
    """<row, v> for each of the *rows* of a table [k, n], as :func:`conjugo._tensors.dot` sums: [len(rows)]."""
    if v.numel() <= CHUNK and len(rows) == len(table):
        return torch.mv(table, v).to(wide_dtype(v.device))
    return torch.stack([dot(table[row], v) for row in rows])
