"""The driver of one problem: its vectors, in place, and one transfer of numbers to the host per evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from conjugo._tensors import CHUNK, wide_dtype
from conjugo.optim.classical.methods import Options
from conjugo.optim.classical.protocol import Algorithm, Memory, Point, Request, Status, Turn

__all__ = ["Driver", "Evaluate", "table_products"]

Evaluate: TypeAlias = Callable[[Tensor, Tensor], "Tensor | float"]
"""Takes a point x [n], writes the gradient there into the second argument [n], returns the value, 0-d."""


class Rows(NamedTuple):
    """Which row of the table holds what; the last two exist for Beale's method only.

    p is minus the direction: then p <- P g + beta p is one pass over memory.
    """

    new: int = 0  # gradient at the trial point
    p: int = 1
    g: int = 2  # gradient at the base x
    p_kept: int = 3
    y_kept: int = 4


class Driver:
    """The vectors of one problem and what is done to them.

    x [n]: the base point, real; table [k, n]: gradients and directions. All inner products of an evaluation are one product of
    the table with the new gradient, and vectors change their role by exchange of rows, not by copying.
    """

    def __init__(
        self,
        options: Options,
        x: Tensor,
        evaluate: Evaluate,
        *,
        precondition: Callable[[Tensor], Tensor] | None = None,
        curvature: Callable[[Tensor, Tensor], Tensor] | None = None,
        table: Tensor | None = None,
    ) -> None:
        self.options, self.evaluate = options, evaluate
        self.precondition, self.curvature = precondition, curvature
        self.x, self.trial = x, torch.empty_like(x)
        self.table = x.new_zeros(options.vectors, x.numel()) if table is None else table
        self.rows, self.f = Rows(), float("nan")
        self.gradient = self.table[self.rows.g]  # at x
        self._z = self.gradient  # P times the gradient at the trial point
        self._f_trial = self.f

    def run(self, memory: Memory, after_iteration: Callable[[], object] = lambda: None) -> Status:
        """Run the algorithm to its end; then x, f and gradient are those of the best point seen.

        after_iteration is called when they are those of a new iteration; ``StopIteration`` from it ends the run. The direction
        of the last step stays as it is: the next run goes on from it.
        """
        algorithm = self.options.algorithm(memory, self.x.numel(), torch.finfo(self.x.dtype).eps)
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
            point = self._measure(request)
            try:
                request = algorithm.send(point)
            except StopIteration as end:
                if end.value.accept:
                    self._accept(self.table[self.rows.new])
                if memory.iterations > seen:
                    after_iteration()
                return Status(end.value.status)
            if request.turn is not None:
                self._turn(request.turn)
            if memory.iterations > seen:
                seen = memory.iterations
                after_iteration()

    def _measure(self, request: Request) -> Point:
        """Evaluate where the algorithm asked for it; waits once for the device."""
        table, rows = self.table, self.rows
        if request.curvature:
            assert self.curvature is not None
            p = table[rows.p]
            return Point(self.f, table_products(p[None], self.curvature(self.x, p)).item(), 0.0, 0.0, 0.0)
        torch.sub(self.x, table[rows.p], alpha=request.step, out=self.trial)
        g = table[rows.new]
        f = self.evaluate(self.trial, g)
        found = [table_products(table, g), torch.linalg.vector_norm(g, torch.inf).reshape(1)]
        if self.options.norms:
            found.append(table_products(table[rows.p][None], table[rows.p]))
        if self.precondition is not None:
            self._z = self.precondition(g)
            found.append(table_products(table, self._z))
        if isinstance(f, Tensor):
            found.append(f.detach().reshape(1))
        numbers = torch.cat(found).tolist()
        self._f_trial = numbers.pop() if isinstance(f, Tensor) else f
        k = len(table)
        by_g, size, dd = numbers[:k], numbers[k], numbers[k + 1] if self.options.norms else 0.0
        by_z = by_g if self.precondition is None else numbers[-k:]
        kept = (-by_g[rows.p_kept], by_z[rows.y_kept]) if self.options.beale else ()
        return Point(self._f_trial, -by_g[rows.p], by_z[rows.new], by_z[rows.g], size, dd, *kept)

    def _accept(self, gradient: Tensor) -> None:
        self.x, self.trial, self.f, self.gradient = self.trial, self.x, self._f_trial, gradient

    def _turn(self, turn: Turn) -> None:
        table, rows = self.table, self.rows
        if turn.accept:
            self._accept(table[rows.new])
        z = self.gradient
        if self.precondition is not None:
            z = self._z if turn.accept else self.precondition(z)
        p = target = table[rows.p]
        if turn.keep:
            torch.sub(table[rows.new], table[rows.g], out=table[rows.y_kept])
            target = table[rows.p_kept]
            rows = rows._replace(p=rows.p_kept, p_kept=rows.p)
        torch.add(z, p, alpha=turn.beta, out=target)
        if turn.gamma:
            target.add_(table[rows.p_kept], alpha=turn.gamma)
        self.rows = rows._replace(new=rows.g, g=rows.new) if turn.accept else rows


def table_products(table: Tensor, v: Tensor) -> Tensor:
    """table @ v for a table [k, n] and a vector [n], as :func:`conjugo._tensors.dot` sums: [k], in ``wide_dtype``."""
    wide = wide_dtype(v.device)
    if v.dtype == torch.float64 or v.numel() <= CHUNK:
        return torch.mv(table, v).to(wide)
    parts = zip(torch.split(table, CHUNK, dim=1), torch.split(v, CHUNK), strict=True)
    return torch.stack([torch.mv(a, b) for a, b in parts]).sum(0, dtype=wide)
