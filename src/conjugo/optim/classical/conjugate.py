"""Nonlinear conjugate gradients with a line search: all methods but the scaled one."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass

from conjugo.optim.betas import RULES, Products
from conjugo.optim.classical.protocol import Algorithm, Ending, Limits, Memory, Point, Request, Status, Turn
from conjugo.optim.classical.search import MOST_TRIALS, Outcome, strong_wolfe

__all__ = ["FAMILY", "Member", "conjugate_gradients", "direction", "first_step"]

RESTART = 0.2
"""Powell's test: successive gradients are far from orthogonal when |<g, P g'>| >= 0.2 <g, P g>."""
DESCENT = (0.8, 1.2)
"""Beale's direction is given up when -<g, d> leaves these bounds, in units of <g, P g> (Powell 1977)."""


@dataclass(frozen=True)
class Member:
    """A member of the family: which beta, and what is done beside it.

    rule: name in :data:`conjugo.optim.betas.RULES`. clip: a negative beta becomes 0. powell: restart by Powell's test.
    beale: Beale's third term. norms: the rule needs <d, d>.
    """

    rule: str
    clip: bool = False
    powell: bool = False
    beale: bool = False
    norms: bool = False


FAMILY = {
    "fr": Member("fr", powell=True),
    "pr+": Member("pr", clip=True, powell=True),
    "hs+": Member("hs", clip=True, powell=True),
    "dy": Member("dy"),
    "hs-dy": Member("hs-dy"),
    "fr-pr": Member("fr-pr"),
    "hz": Member("hz", norms=True),
    "dai-kou": Member("dai-kou", norms=True),
    "powell-beale": Member("hs", beale=True),
}


def conjugate_gradients(member: Member, memory: Memory, limits: Limits) -> Algorithm:
    """The algorithm as a generator; *memory* is read and written, so that a later run goes on where this one ends."""
    point = yield Request(0.0)
    memory.evaluations += 1
    if not point.finite:
        return Ending(Status.NOT_FINITE, accept=True)
    until_iteration = memory.iterations + limits.max_iter
    until_evaluation = memory.evaluations - 1 + limits.max_eval
    status = Status.CONVERGED if point.size <= limits.gtol else None
    while status is None:
        if memory.iterations >= until_iteration:
            status = Status.MAX_ITER
            break
        if memory.evaluations >= until_evaluation:
            status = Status.MAX_EVAL
            break
        turn, slope = direction(member, memory, point, limits.size)
        outcome = yield from _search(point, slope, turn, memory, limits, until_evaluation)
        if outcome.point is None and (turn.beta or turn.gamma) and memory.evaluations < until_evaluation:
            turn, slope = Turn(accept=False), -point.rho
            outcome = yield from _search(point, slope, turn, memory, limits, until_evaluation)
        if outcome.point is None:
            spent = memory.evaluations >= until_evaluation
            memory.rho = 0.0  # the direction belongs to a step that was not taken
            return Ending(Status.MAX_EVAL if spent else Status.NO_PROGRESS, accept=False)
        memory.iterations += 1
        memory.step, memory.slope, memory.f_drop = outcome.step, slope, point.f - outcome.point.f
        memory.rho = point.rho if outcome.found else 0.0  # after a poor step the next direction is steepest descent
        point = outcome.point
        if point.size <= limits.gtol or memory.f_drop <= limits.f_tol * max(1.0, abs(point.f)):
            status = Status.CONVERGED
    return Ending(status, accept=True)


def _search(
    base: Point, slope: float, turn: Turn, memory: Memory, limits: Limits, until: int
) -> Generator[Request, Point, Outcome]:
    """Turn, then search along the new direction; in the end the last evaluation is the point of the outcome, if any."""
    left = until - memory.evaluations
    search = strong_wolfe(
        base.f,
        slope,
        first_step(memory, base, slope),
        c1=limits.c1,
        c2=limits.c2,
        noise=limits.noise * abs(base.f),
        trials=max(1, min(MOST_TRIALS, left - 1)),
    )
    first: Turn | None = turn
    step = next(search)
    while True:
        point = yield Request(step, first)
        memory.evaluations += 1
        first = None
        try:
            step = search.send(point)
        except StopIteration as end:
            outcome: Outcome = end.value
            break
    if outcome.point is not None and outcome.step != step:  # the best point is not the last one: go back to it
        yield Request(outcome.step)
        memory.evaluations += 1
    return outcome


def direction(member: Member, memory: Memory, point: Point, size: int) -> tuple[Turn, float]:
    """How the next direction is made, and the slope <g, d> along it (always < 0).

    memory: of the step that led to *point*; its restart counter and <d_r, y_r> are brought up to date. size: the number
    of variables n; every n steps Beale's method restarts.
    """
    if not memory.rho:
        memory.since_restart, memory.restart_dy = 0, 0.0
        return Turn(), -point.rho
    dy = point.slope - memory.slope
    products = Products(
        rho=point.rho,
        rho_prev=memory.rho,
        cross=point.cross,
        yPy=max(point.rho - 2 * point.cross + memory.rho, 0.0),
        dy=dy,
        gd=point.slope,
        dd=point.dd,
    )
    beta = RULES[member.rule](products)
    far = abs(point.cross) >= RESTART * point.rho
    if (member.clip and beta < 0) or (member.powell and far):
        beta = 0.0
    slope = -point.rho + beta * point.slope
    memory.since_restart += 1
    if member.beale:
        if memory.restart_dy and not far and memory.since_restart < size:
            gamma = point.restart_curvature / memory.restart_dy
            three = slope + gamma * point.restart_slope
            if DESCENT[0] * point.rho <= -three <= DESCENT[1] * point.rho:
                return Turn(beta, gamma), three
        if slope < 0:
            memory.since_restart, memory.restart_dy = 0, dy
            return Turn(beta, keep=True), slope
    if slope < 0:
        return Turn(beta), slope
    memory.since_restart, memory.restart_dy = 0, 0.0
    return Turn(), -point.rho


def first_step(memory: Memory, point: Point, slope: float) -> float:
    """The first trial of a line search.

    Later ones expect the gain of the last iteration again (Nocedal & Wright 2006, equation 3.60), at most ten times what an
    equal first-order change would give. The very first moves by at most 1.
    """
    if not memory.step:
        return min(1.0, 1.0 / math.sqrt(-slope))
    equal = memory.step * memory.slope / slope
    step = -1.01 * 2 * memory.f_drop / slope
    return min(step, 10 * equal) if step > 0 else equal
