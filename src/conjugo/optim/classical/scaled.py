"""Scaled conjugate gradients (Møller 1993): the step length from measured curvature, without a line search."""

from __future__ import annotations

import math
from collections.abc import Generator

from conjugo.optim.betas import ratio
from conjugo.optim.classical.protocol import Algorithm, Ending, Limits, Memory, Point, Request, Status, Turn

__all__ = ["scaled_conjugate_gradients"]

FIRST_DAMPING = 1e-9
"""Møller allows up to 1e-6; less keeps conjugacy, so that a quadratic in n variables takes n steps."""
LEAST_DAMPING, MOST_DAMPING = 1e-30, 1e40
MOST_TRIALS = 60
"""Steps in a row that do not lower f, before the method gives up."""


def scaled_conjugate_gradients(memory: Memory, limits: Limits, *, sigma: float, exact: bool) -> Algorithm:
    """The algorithm as a generator; *memory* is read and written, so that a later run goes on where this one ends.

    sigma: length of the difference with which curvature is measured; exact: the driver has Hessian-vector products.
    """
    point = yield Request(0.0)
    memory.evaluations += 1
    if not point.finite:
        return Ending(Status.NOT_FINITE, last=True)
    until_iteration = memory.iterations + limits.max_iter
    until_evaluation = memory.evaluations - 1 + limits.max_eval
    memory.damping = memory.damping or FIRST_DAMPING
    status = Status.CONVERGED if point.size <= limits.gtol else None
    while status is None:
        if memory.iterations >= until_iteration:
            status = Status.MAX_ITER
            break
        # A curvature without a step after it would be lost.
        if memory.evaluations + 2 > until_evaluation:
            status = Status.MAX_EVAL
            break
        turn, slope, dd = _direction(memory, point, limits.size)
        curvature = yield from _curvature(turn, slope, dd, memory, sigma=sigma, exact=exact)
        trial = yield from _step(point, slope, dd, curvature, memory, limits, until_evaluation)
        if trial is None:
            spent = memory.evaluations >= until_evaluation
            memory.rho = 0.0  # the direction belongs to a step that was not taken
            return Ending(Status.MAX_EVAL if spent else Status.NO_PROGRESS, last=False)
        memory.iterations += 1
        memory.slope, memory.rho, memory.dd, drop = slope, point.rho, dd, point.f - trial.f
        point = trial
        if point.size <= limits.gtol or (limits.f_tol > 0 and drop <= limits.f_tol * max(1.0, abs(point.f))):
            status = Status.CONVERGED
    return Ending(status, last=True)


def _direction(memory: Memory, point: Point, size: int) -> tuple[Turn, float, float]:
    """The turn at *point*, with <g, d> and <d, d> of the new direction; steepest descent every *size* steps."""
    memory.since_restart += 1
    if memory.rho and memory.since_restart < size:
        beta = ratio(point.rho - point.cross, -memory.slope)
        slope = -point.rho + beta * point.slope
        if slope < 0:
            return Turn(beta), slope, point.rho - 2 * beta * point.slope + beta * beta * memory.dd
    memory.since_restart = 0
    return Turn(), -point.rho, point.rho


def _curvature(
    turn: Turn, slope: float, dd: float, memory: Memory, *, sigma: float, exact: bool
) -> Generator[Request, Point, float]:
    """<d, H d>, exact or by a difference of gradients."""
    if exact:
        memory.evaluations += 1
        return (yield Request(0.0, turn, curvature=True)).slope
    probe = sigma / math.sqrt(dd)
    point = yield Request(probe, turn)
    memory.evaluations += 1
    return (point.slope - slope) / probe if point.finite else 0.0


def _step(
    base: Point, slope: float, dd: float, curvature: float, memory: Memory, limits: Limits, until: int
) -> Generator[Request, Point, Point | None]:
    """Try steps, each more damped than the one before, until one lowers f; None if none does.

    Møller's steps 3 to 7. damping: his lambda, counted: how much of it *curvature* already contains (his lambda bar).
    """
    damping, counted = memory.damping, 0.0
    for _ in range(MOST_TRIALS):
        if memory.evaluations >= until:
            break
        curvature += (damping - counted) * dd
        if curvature <= 0:
            counted = 2 * (damping - curvature / dd)
            curvature = -curvature + damping * dd
            damping = counted
        step = -slope / curvature
        point = yield Request(step)
        memory.evaluations += 1
        predicted, actual = -0.5 * slope * step, base.f - point.f
        if not point.finite:
            actual = -predicted
        elif max(predicted, abs(actual)) <= limits.noise * abs(base.f):
            actual = -0.5 * step * (slope + point.slope)  # f has no more digits, slopes do
        agreement = actual / predicted
        counted = damping
        if agreement >= 0.75:
            damping = max(0.25 * damping, LEAST_DAMPING)
        elif agreement < 0.25:
            damping = min(damping + curvature * (1 - agreement) / dd, MOST_DAMPING)
        if agreement >= 0:
            memory.damping = damping
            return point
    memory.damping = damping
    return None
