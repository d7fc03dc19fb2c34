"""The line search alone: plain numbers in, step lengths out."""

import math

import pytest

from conjugo.optim.classical.protocol import Point
from conjugo.optim.classical.search import Sample, cubic_minimum, line_search, secant


def run(phi, derivative, first, *, trials=30, c1=1e-4, c2=0.1, noise=0.0, enough=lambda step, point: False):
    """The outcome on the function phi of the step, and the steps tried."""
    f, slope = phi(0.0), derivative(0.0)
    search = line_search(f, slope, first, c1=c1, c2=c2, noise=noise, lowest=f, trials=trials, enough=enough)
    tried = [next(search)]
    while True:
        value, down = phi(tried[-1]), derivative(tried[-1])
        try:
            tried.append(search.send(Point(value, down, 1.0, 0.0, 1.0)))
        except StopIteration as end:
            return end.value, tried


QUARTIC = (lambda a: (a - 1) ** 4 + 0.1 * (a - 1) ** 2, lambda a: 4 * (a - 1) ** 3 + 0.2 * (a - 1))
WAVY = (lambda a: -a + 0.3 * math.sin(7 * a) + 0.02 * a * a, lambda a: -1 + 2.1 * math.cos(7 * a) + 0.04 * a)


@pytest.mark.parametrize("first", [1e-6, 1e-2, 0.5, 1.0, 3.0, 1e3, 1e6])
@pytest.mark.parametrize("function", [QUARTIC, WAVY], ids=["quartic", "wavy"])
def test_the_strong_wolfe_conditions_hold_in_the_end(function, first):
    phi, derivative = function
    if derivative(0) >= 0:
        phi, derivative = (lambda a: function[0](a + 0.3)), (lambda a: function[1](a + 0.3))
    outcome, tried = run(phi, derivative, first)
    assert outcome.found
    assert outcome.step == tried[-1]
    assert phi(outcome.step) <= phi(0) + 1e-4 * outcome.step * derivative(0)
    assert abs(derivative(outcome.step)) <= 0.1 * abs(derivative(0))
    assert len(tried) <= 20


def test_a_parabola_takes_two_trials():
    outcome, tried = run(lambda a: (a - 0.37) ** 2, lambda a: 2 * (a - 0.37), 1.0)
    assert outcome.found
    assert tried == [1.0, pytest.approx(0.37)]


def test_a_region_without_values_is_left_by_halving():
    phi = lambda a: -math.log(1 - a) - 3 * a if a < 1 else math.nan  # noqa: E731
    derivative = lambda a: 1 / (1 - a) - 3 if a < 1 else math.inf  # noqa: E731
    outcome, tried = run(phi, derivative, 8.0)
    assert tried[:4] == [8.0, 4.0, 2.0, 1.0]
    assert outcome.found
    assert outcome.step == pytest.approx(2 / 3, rel=0.1)


def test_the_outward_search_stops_short_of_where_it_was_not_finite():
    phi = lambda a: -a if a < 1 else math.inf  # noqa: E731
    outcome, tried = run(phi, lambda a: -1.0, 4.0, trials=12)
    assert not outcome.found
    assert 0.99 < outcome.step < 1
    assert outcome.step == max(step for step in tried if step < 1)


def test_the_lowest_point_is_returned_when_trials_run_out():
    outcome, tried = run(*QUARTIC, 1e3, trials=3)
    assert not outcome.found
    assert len(tried) == 3
    assert outcome.step in (0.0, *tried)
    assert outcome.point is None  # so far out, all are higher than the start
    outcome, _ = run(lambda a: -a, lambda a: -1.0, 1.0, trials=4)
    assert (outcome.step, outcome.point.f) == (1000.0, -1000.0)


def test_slopes_decide_where_values_have_no_more_digits():
    """1 + 1e-20 (a - 1)^2 is 1 in float64."""
    outcome, _ = run(lambda a: 1.0, lambda a: 2e-20 * (a - 1), 5.0, noise=2e-15)
    assert outcome.found
    assert outcome.step == pytest.approx(1.0, abs=0.1)


def test_enough_ends_the_search():
    outcome, tried = run(*QUARTIC, 50.0, enough=lambda step, point: True)
    assert (outcome.found, outcome.step, tried) == (True, 50.0, [50.0])


def test_the_cubic_and_the_secant():
    def sample(a):  # a^3 - 3a, minimum at 1, maximum at -1
        return Sample(a, a**3 - 3 * a, 3 * a * a - 3)

    assert cubic_minimum(sample(0.0), sample(3.0)) == pytest.approx(1.0)
    assert cubic_minimum(sample(3.0), sample(-0.5)) == pytest.approx(1.0)
    assert math.isnan(cubic_minimum(Sample(0, 0, -1), Sample(1, -1, -1)))
    assert secant(Sample(0, 0, -2), Sample(1, 0, 2)) == 0.5
    assert math.isnan(secant(Sample(0, 0, -1), Sample(1, 0, -1)))
