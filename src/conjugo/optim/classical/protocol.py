"""What an algorithm and its driver say to each other.

An algorithm is a generator that knows numbers only. It yields a :class:`Request` (what becomes of the point evaluated last,
and where on the line to evaluate next), receives a :class:`Point`, and returns an :class:`Ending`. A driver owns the vectors.
So the same algorithm serves one problem of any size on any device and many problems in lockstep.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import astuple, dataclass
from enum import IntEnum
from typing import NamedTuple, TypeAlias

__all__ = ["MESSAGES", "Algorithm", "Ending", "Limits", "Memory", "Point", "Request", "Status", "Turn"]


class Status(IntEnum):
    """Why a run ended. The first four are the numbers that SciPy's ``fmin_cg`` and ``minimize(method="CG")`` use."""

    CONVERGED = 0
    MAX_ITER = 1
    NO_PROGRESS = 2
    NOT_FINITE = 3
    MAX_EVAL = 4
    STOPPED = 99
    INTERRUPTED = 100


MESSAGES = {
    Status.CONVERGED: "Converged: the gradient or the change of the function is within its tolerance.",
    Status.MAX_ITER: "The maximum number of iterations was reached; raise max_iter for a smaller gradient.",
    Status.NO_PROGRESS: "No lower point was found along the steepest descent: this is as low as rounding allows, or the "
    "gradient does not belong to the function, or the function is not smooth here.",
    Status.NOT_FINITE: "The function or its gradient is not finite at the starting point.",
    Status.MAX_EVAL: "The maximum number of evaluations was reached; raise max_eval for a smaller gradient.",
    Status.STOPPED: "The callback asked to stop.",
    Status.INTERRUPTED: "Interrupted from the keyboard; this is the best point so far.",
}


class Point(NamedTuple):
    """What the driver measured at a trial point x + step d, with g its gradient and g' the gradient at the base x."""

    f: float
    slope: float  # <g, d>
    rho: float  # <g, P g>
    cross: float  # <g, P g'>
    size: float  # max |g|, over the components
    dd: float = 0.0  # <d, d>, if the method asked for it
    restart_slope: float = 0.0  # <g, d_r>, of the direction kept at the last restart
    restart_curvature: float = 0.0  # <g, y_r>, of the gradient difference kept at the last restart

    @property
    def finite(self) -> bool:
        """Whether the value, the gradient and its inner products are."""
        return math.isfinite(self.f + self.size + self.rho + self.slope)


@dataclass(frozen=True, slots=True)
class Turn:
    """The next base point, and the next direction from it: d <- -P g + beta d + gamma d_r.

    accept: the base moves by *part* times the last step, and its gradient is g' + part (g - g'): for part 1 that is the point
    evaluated last, otherwise an interpolation. Without *accept* base and gradient stay.
    keep: first keep d_r = d and y_r = the change of the gradient (a restart of Beale's method).
    """

    beta: float = 0.0
    gamma: float = 0.0
    keep: bool = False
    accept: bool = True
    part: float = 1.0


@dataclass(frozen=True, slots=True)
class Request:
    """Turn first, if *turn* is there; then evaluate at x + step d."""

    step: float
    turn: Turn | None = None
    curvature: bool = False  # measure <d, H d> at x instead, as the slope of the Point (f and the others do not count)


class Ending(NamedTuple):
    """The run is over; the result is the point evaluated last, or else the lowest one that was evaluated."""

    status: Status
    last: bool


Algorithm: TypeAlias = Generator[Request, Point, Ending]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When to stop, and what a line search accepts.

    gtol: stop at max |g| <= gtol. f_tol: stop when an iteration lowers f by at most f_tol max(1, |f|). c1, c2: the Wolfe
    conditions. noise: relative rounding error of f. size: number of variables; conjugacy is given up after as many steps.
    """

    gtol: float
    f_tol: float
    max_iter: int
    max_eval: int
    c1: float
    c2: float
    noise: float
    size: int


@dataclass
class Memory:
    """What goes from one iteration to the next, besides vectors: numbers only, so that it can be stored.

    step, slope, rho: of the last line search; <g, d> and <g, P g> where it started.
    """

    iterations: int = 0
    evaluations: int = 0
    since_restart: int = 0
    step: float = 0.0
    slope: float = 0.0
    rho: float = 0.0  # 0: there is no last direction, or it is of no use any more
    restart_dy: float = 0.0  # <d_r, y_r>; 0: nothing is kept
    dd: float = 0.0  # <d, d>, for the scaled method
    damping: float = 0.0  # lambda of the scaled method

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Memory:
        """The inverse of :meth:`numbers`."""
        kinds = [type(number) for number in astuple(cls())]
        return cls(*(kind(number) for kind, number in zip(kinds, numbers, strict=True)))

    def numbers(self) -> list[float]:
        """All fields, in order."""
        return [float(number) for number in astuple(self)]
