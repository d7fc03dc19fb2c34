"""Nonlinear conjugate gradients with a line search: all methods but the scaled one."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from conjugo.optim.betas import RULES, Products
from conjugo.optim.classical.protocol import Algorithm, Ending, Limits, Memory, Point, Request, Status, Turn
from conjugo.optim.classical.search import MOST_TRIALS, Outcome, line_search

__all__ = ["FAMILY", "Member", "conjugate_gradients", "direction", "first_step"]

RESTART = 0.2
"""Powell's test: successive gradients are far from orthogonal when |<g, P g'>| >= 0.2 <g, P g>."""
DESCENT = (0.8, 1.2)
"""Beale's direction is given up when -<g, d> leaves these bounds, in units of <g, P g> (Powell 1977)."""

PARABOLA = 0.1
"""How much a function may deviate from a parabola, relative to the descent to its minimum, to be taken for one."""
SMALLNESS = 3.0
"""If the gradient is more than so many times smaller at the minimum than at the trial, PARABOLA shrinks with the ratio."""
SMALLEST = 1e-4
"""Part of <g, P g> at the trial which that at the minimum must exceed: less may be rounding, or the end, and is evaluated."""
REACH = (0.05, 2.0)
"""Where the minimum of a parabola may lie, in units of the trial step."""
FEW_TRIALS = 3
"""Trials from an interpolated base, before it is evaluated itself."""
NEGLIGIBLE = 0.01
"""Part of a step by which an exact line search need not differ from it."""
DISTRUST, GIVE_UP = 3, 100
"""Iterations with neither a lower value nor a smaller gradient, after which a search does not trust parabolas, or all ends."""


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
    """The algorithm as a generator; *memory* is read and written, so that a later run goes on where this one ends.

    Where the function is nearly a parabola along the line, one evaluation makes an exact line search: its minimum and the
    gradient there are interpolated, and the next line starts from that point, which itself is never evaluated.
    """
    point = yield Request(0.0)
    memory.evaluations += 1
    if not point.finite:
        return Ending(Status.NOT_FINITE, last=True)
    until_iteration = memory.iterations + limits.max_iter
    until_evaluation = memory.evaluations - 1 + limits.max_eval
    lowest, smallest, part, stale = point.f, point.rho, 1.0, 0
    if point.size <= limits.gtol:
        return Ending(Status.CONVERGED, last=True)
    while memory.iterations < until_iteration:
        if memory.evaluations >= until_evaluation:
            return Ending(Status.MAX_EVAL, last=False)
        base = point
        turn, slope = direction(member, memory, base, limits.size)
        if turn.keep:
            base = base._replace(restart_slope=base.slope, restart_curvature=base.rho - base.cross)
        search = partial(_search, memory=memory, limits=limits, until=until_evaluation)
        trials = MOST_TRIALS if part == 1.0 else FEW_TRIALS
        outcome = yield from search(
            base,
            slope,
            turn if part == 1.0 else replace(turn, part=part),
            lowest=lowest,
            trials=trials,
            exact=stale < DISTRUST,
        )
        if outcome.point is None and part != 1.0 and memory.evaluations + 1 < until_evaluation:
            # The interpolated base has misled the search: see what is really there, and begin anew.
            base = yield Request(0.0)
            memory.evaluations += 1
            turn, slope = Turn(), -base.rho
            outcome = yield from search(base, slope, turn, lowest=base.f)
        if outcome.point is None and (turn.beta or turn.gamma) and memory.evaluations < until_evaluation:
            turn, slope = Turn(accept=False), -base.rho
            outcome = yield from search(base, slope, turn, lowest=base.f)
        if outcome.point is None or (memory.evaluations >= until_evaluation and not outcome.found):
            memory.rho = 0.0
            spent = memory.evaluations >= until_evaluation
            return Ending(Status.MAX_EVAL if spent else Status.NO_PROGRESS, last=False)
        point = outcome.point
        memory.iterations += 1
        if _converged(point, lowest, limits):
            return Ending(Status.CONVERGED, last=True)
        stale = 0 if point.f < lowest or point.rho < smallest else stale + 1
        if stale >= GIVE_UP:
            memory.rho = 0.0
            return Ending(Status.NO_PROGRESS, last=False)
        lowest, smallest = min(lowest, point.f), min(smallest, point.rho)
        # After a poor step the next direction is steepest descent.
        memory.rho = base.rho if outcome.found else 0.0
        memory.step, memory.slope, part = outcome.step, slope, 1.0
        if memory.iterations >= until_iteration:
            # A later run starts from the lowest point: the direction is of use there only if that is this one.
            memory.rho = memory.rho if point.f <= lowest else 0.0
            break
        exact = interpolate(base, slope, outcome.step, point, limits) if outcome.found else None
        if exact is not None and abs(exact.part - 1.0) > NEGLIGIBLE:
            part, point = exact
            memory.step = part * outcome.step
        if limits.f_tol > 0 and base.f - point.f <= limits.f_tol * max(1.0, abs(point.f)):
            return Ending(Status.CONVERGED, last=False)
    return Ending(Status.MAX_ITER, last=False)


def _search(
    base: Point,
    slope: float,
    turn: Turn,
    *,
    lowest: float,
    memory: Memory,
    limits: Limits,
    until: int,
    trials: int = MOST_TRIALS,
    exact: bool = True,
) -> Generator[Request, Point, Outcome]:
    """Turn, then search along the new direction.

    In the end the last evaluation is the point of the outcome, unless there is none, or no evaluation left.
    """

    def enough(step: float, point: Point) -> bool:
        parabola = exact and interpolate(base, slope, step, point, limits) is not None
        return parabola or _converged(point, lowest, limits)

    search = line_search(
        base.f,
        slope,
        first_step(memory, slope),
        c1=limits.c1,
        c2=limits.c2,
        noise=limits.noise * abs(base.f),
        lowest=lowest,
        trials=min(trials, until - memory.evaluations),
        enough=enough,
    )
    request = Request(next(search), turn)
    while True:
        point = yield request
        memory.evaluations += 1
        try:
            request = Request(search.send(point))
        except StopIteration as end:
            outcome: Outcome = end.value
            break
    # The best point is not the last one: go back to it.
    if outcome.point is not None and outcome.step != request.step and memory.evaluations < until:
        yield Request(outcome.step)
        memory.evaluations += 1
    return outcome


def _converged(point: Point, lowest: float, limits: Limits) -> bool:
    """Whether the gradient is small enough, and not because this is a maximum or a saddle behind a minimum."""
    return point.size <= limits.gtol and point.f <= lowest + limits.noise * abs(lowest)


class Exact(NamedTuple):
    """The minimum along the line: at which part of the step, and what is there."""

    part: float
    point: Point


def interpolate(base: Point, slope: float, step: float, trial: Point, limits: Limits) -> Exact | None:
    """The minimum of the parabola through *base* and *trial*, or None where the function is not like one.

    Taken is a gradient that is linear along the line: then its inner products with fixed vectors are linear, and <g, P g> is
    quadratic. Value and slope of the trial, predicted from those of the base, may differ by :data:`PARABOLA` of the descent
    to the minimum, by less if the gradient at the minimum is small beside that at the trial, and by noise (relative to f).
    The minimum must lie within :data:`REACH`: beyond it, errors of the gradient would grow. slope: at the base.
    """
    if trial.slope == slope:
        return None
    b = slope / (slope - trial.slope)
    a = 1 - b
    if not REACH[0] < b < REACH[1]:
        return None
    rho = a * a * base.rho + 2 * a * b * trial.cross + b * b * trial.rho
    if not rho > max(SMALLEST * trial.rho, limits.gtol**2):
        return None
    tolerance = PARABOLA * min(1.0, SMALLNESS * math.sqrt(rho / trial.rho))
    descent = -0.5 * b * step * slope
    deviation = abs(trial.f - base.f - 0.5 * step * (slope + trial.slope))
    if deviation * max(1.0, b) ** 3 > tolerance * descent + limits.noise * abs(trial.f):
        return None
    return Exact(
        b,
        Point(
            f=trial.f - 0.5 * a * step * trial.slope,
            slope=a * slope + b * trial.slope,
            rho=rho,
            cross=a * base.rho + b * trial.cross,
            size=trial.size,
            dd=trial.dd,
            restart_slope=a * base.restart_slope + b * trial.restart_slope,
            restart_curvature=a * base.restart_curvature + b * trial.restart_curvature,
        ),
    )


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


def first_step(memory: Memory, slope: float) -> float:
    """The first trial of a line search along a direction of this slope.

    Expected is the first-order change of the last step again (Nocedal & Wright 2006, section 3.5), with a step between half
    and twice the last one: near a minimum the first-order change falls much faster than the steps do. The very first trial
    moves by at most 1.
    """
    if not memory.step:
        return min(1.0, 1.0 / math.sqrt(-slope))
    return min(max(memory.step * memory.slope / slope, 0.5 * memory.step), 2 * memory.step)
