"""Forecasts of steps: exact where it can be known, and with intervals that hold what they promise."""

import math

import numpy as np
import pytest

from conjugo.scaling.forecast import StepsForecast, krige
from conjugo.scaling.laws import steps

BATCHES = [16, 128, 1024]


def exact(b_crit, s_min=40.0, batches=BATCHES):
    return [steps(b, s_min, b_crit) for b in batches]


def test_three_batches_without_noise_give_the_hyperbola_back_whatever_was_expected():
    for expected in (20.0, 100.0, 500.0):
        found = StepsForecast(BATCHES, exact(100.0), b_prior=expected, prior_factor=20, noise=1e-3, departure=1e-3)
        assert found.b_crit.value == pytest.approx(100, rel=0.02)
        for batch in (4, 16, 50, 400, 5000):
            assert found.steps(batch).value == pytest.approx(steps(batch, 40.0, 100.0), rel=0.02)


def test_one_batch_goes_on_by_the_law_with_the_critical_batch_that_was_expected():
    found = StepsForecast([64], [200.0], b_prior=100.0, prior_factor=1.001)
    for batch in (8, 64, 1024):
        assert found.steps(batch).value == pytest.approx(200 * steps(batch, 1, 100) / steps(64, 1, 100), rel=1e-3)


def test_one_batch_says_no_more_about_the_critical_one_than_was_expected():
    found = StepsForecast([128], [300.0], b_prior=100.0, prior_factor=3)
    assert tuple(found.b_crit) == pytest.approx((100, 100 / 3, 300), rel=0.03)


def test_the_interval_is_the_wider_the_farther_from_what_was_measured_and_the_less_is_known():
    def width(interval):
        return math.log(interval.high / interval.low)

    one = StepsForecast([128], exact(100.0, batches=[128]), b_prior=100.0, prior_factor=3)
    three = StepsForecast(BATCHES, exact(100.0), b_prior=100.0, prior_factor=3)
    assert width(one.steps(128)) < width(one.steps(512)) < width(one.steps(4096))
    assert width(one.steps(128)) < width(one.steps(32)) < width(one.steps(4))
    assert width(three.b_crit) < width(one.b_crit)
    for batch in (4, 40, 400, 4000):
        assert width(three.steps(batch)) < width(one.steps(batch))
    many = StepsForecast(BATCHES * 4, exact(100.0) * 4, b_prior=100.0, prior_factor=3)
    assert width(many.steps(128)) < width(three.steps(128))
    apart = StepsForecast(BATCHES, exact(100.0), b_prior=100.0, prior_factor=3, common=0.2)
    assert width(apart.steps(128)) > 4 * 0.19


def test_intervals_cover_as_often_as_they_say():
    """Steps drawn as the forecast takes them to be: hyperbola, smooth departure, noise, and a B_crit within its prior."""
    rng = np.random.default_rng(1)
    asked = np.array([4.0, 45.0, 360.0, 4000.0])
    sizes = np.array([*BATCHES, *asked])
    apart = (np.log(sizes)[:, None] - np.log(sizes)[None]) / math.log(8)
    root = np.linalg.cholesky(0.1**2 * np.exp(-(apart**2) / 2) + 1e-10 * np.eye(len(sizes)))
    inside = inside_b = 0
    runs = 400
    for _ in range(runs):
        b_crit = 100 * math.exp(math.log(3) / 1.96 * rng.standard_normal())
        logs = np.log(40 * (1 + b_crit / sizes)) + root @ rng.standard_normal(len(sizes))
        measured = logs[:3] + 0.06 * rng.standard_normal(3)
        found = StepsForecast(BATCHES, np.exp(measured), b_prior=100, prior_factor=3, noise=0.06, departure=0.1)
        for batch, truth in zip(asked, np.exp(logs[3:]), strict=True):
            low, high = found.steps(batch)[1:]
            inside += low <= truth <= high
        inside_b += found.b_crit.low <= b_crit <= found.b_crit.high
    assert 0.93 <= inside / (runs * len(asked)) <= 0.97
    assert 0.92 <= inside_b / runs <= 0.98


@pytest.mark.parametrize("expected", [5.0, 800.0, 10000.0])
def test_what_is_measured_overrules_an_expectation_that_was_wrong(expected):
    found = StepsForecast(BATCHES * 3, exact(100.0) * 3, b_prior=expected, prior_factor=2.5)
    assert found.b_crit.low < 100 < found.b_crit.high
    for batch in (4, 4096):
        assert found.steps(batch).value == pytest.approx(steps(batch, 40.0, 100.0), rel=0.15)


def test_a_batch_that_was_tried_more_often_counts_more():
    twice = StepsForecast([64, 64, 64], [100.0, 100.0, 130.0], b_prior=50, prior_factor=1.01)
    assert 100 < twice.steps(64).value < 115


def test_the_curve_through_points():
    xs, ys = [0.0, 1.0, 2.0, 3.0], [0.0, 0.3, 0.5, 0.4]
    for x, y in zip(xs, ys):
        assert krige(x, xs, ys, deviation=0.5, noise=1e-4, width=1.0) == pytest.approx(y, abs=1e-3)
    far = krige(100.0, xs, ys, deviation=0.5, noise=0.1, width=1.0)
    assert 0.0 < far < 0.5  # far away it is the mean


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": []}, "number of batches"),
        ({"steps": [1.0]}, "number of steps"),
        ({"steps": [1.0, 2.0, 0.0]}, "steps must be finite"),
        ({"steps": [1.0, 2.0, math.inf]}, "steps must be finite"),
        ({"batches": [1.0, -2.0, 3.0]}, "batches must be finite"),
        ({"b_prior": 0.0}, "b_prior"),
        ({"prior_factor": 1.0}, "prior_factor"),
        ({"noise": 0.0}, "noise"),
        ({"departure": -1.0}, "departure"),
        ({"width": 1.0}, "width"),
        ({"common": -0.1}, "common"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {"batches": BATCHES, "steps": exact(100.0), "b_prior": 100.0}
    with pytest.raises(ValueError, match=f"StepsForecast: .*{message}"):
        StepsForecast(**{**good, **change})


def test_a_forecast_for_no_batch_is_refused():
    found = StepsForecast(BATCHES, exact(100.0), b_prior=100.0)
    with pytest.raises(ValueError, match="batch must be in"):
        found.steps(0)
