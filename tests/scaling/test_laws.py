"""The laws of batch, steps, learning rate and time, against what they say of themselves and against each other."""

import math

import numpy as np
import pytest

from conjugo.scaling import (
    adascale_gain,
    critical_batch,
    efficient_batch,
    fastest_batch,
    fit_critical_batch,
    optimal_lr,
    scale_adam,
    scale_lr,
)
from conjugo.scaling.laws import steps


def test_at_the_critical_batch_steps_and_examples_are_twice_their_least():
    s_min, b_crit = 130.0, 70.0
    e_min = s_min * b_crit
    assert steps(b_crit, s_min, b_crit) == 2 * s_min
    assert b_crit * steps(b_crit, s_min, b_crit) == 2 * e_min
    for batch in (1, 10, 1000):
        s = steps(batch, s_min, b_crit)
        assert (s / s_min - 1) * (batch * s / e_min - 1) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("b_crit", [3.0, 100.0, 4000.0])
def test_two_points_give_the_critical_batch_back(b_crit):
    small, large = (steps(b, 17.0, b_crit) for b in (8, 512))
    assert critical_batch(8, small, 512, large) == pytest.approx(b_crit, rel=1e-10)


def test_steps_that_do_not_fall_have_no_critical_batch_and_those_that_fall_in_proportion_an_infinite_one():
    assert critical_batch(8, 100, 64, 100) == 0
    assert critical_batch(8, 800, 64, 100) == math.inf
    assert critical_batch(8, 900, 64, 100) == math.inf


@pytest.mark.parametrize("b_crit", [0.5, 60.0, 9000.0])
def test_the_fit_gives_exact_hyperbolas_back(b_crit):
    batches = [4, 16, 64, 256, 1024]
    found = fit_critical_batch(batches, [steps(b, 33.0, b_crit) for b in batches])
    assert found.b_crit == pytest.approx(b_crit, rel=1e-5)
    assert found.s_min == pytest.approx(33, rel=1e-5)
    assert found.rms < 1e-6


def test_the_fit_minimises_errors_of_logarithms():
    rng = np.random.default_rng(0)
    batches = [4, 16, 64, 256, 1024]
    measured = [steps(b, 33.0, 100) * math.exp(0.1 * rng.standard_normal()) for b in batches]
    found = fit_critical_batch(batches, measured)

    def rms(s_min, b_crit):
        return math.sqrt(np.mean([math.log(s / steps(b, s_min, b_crit)) ** 2 for b, s in zip(batches, measured)]))

    assert found.rms == pytest.approx(rms(found.s_min, found.b_crit), rel=1e-9)
    for nearby in (0.95, 1.05):
        assert rms(found.s_min * nearby, found.b_crit) > found.rms
        assert rms(found.s_min, found.b_crit * nearby) > found.rms


def test_the_fit_of_steps_in_proportion_is_infinite_and_of_constant_ones_zero():
    batches = [4, 64, 1024]
    assert fit_critical_batch(batches, [1000, 62.5, 3.90625]).b_crit == math.inf
    assert fit_critical_batch(batches, [10, 10, 10]).b_crit == 0


def test_the_fastest_batch_takes_the_least_time():
    fixed, per_example, b_crit, workers = 0.03, 2e-4, 500.0, 4
    best = fastest_batch(fixed, per_example, b_crit, workers=workers)

    def time(batch):
        return steps(batch, 1.0, b_crit) * (fixed + per_example * batch / workers)

    grid = np.geomspace(1, 1e6, 20001)
    assert best == pytest.approx(grid[np.argmin([time(b) for b in grid])], rel=1e-3)


def test_efficiency_is_what_it_says():
    for efficiency in (0.2, 0.5, 0.9):
        batch = efficient_batch(300, efficiency)
        assert 300 * 1.0 / (batch * steps(batch, 1.0, 300)) == pytest.approx(efficiency, rel=1e-12)


def test_the_gain_of_adascale_is_the_ratio_of_the_best_learning_rates():
    variance, norm2, small = 3.0, 0.7, 32
    for scale in (1, 2, 7.5, 1000):
        gain = adascale_gain(scale, variance, norm2)
        b_noise = variance / norm2 * small
        ratio = optimal_lr(scale * small, 1.0, b_noise) / optimal_lr(small, 1.0, b_noise)
        assert gain == pytest.approx(ratio, rel=1e-12)
        assert 1 <= gain <= scale


def test_the_noise_rule_lies_between_the_linear_one_and_a_constant():
    assert scale_lr(0.1, 512, 32, "noise", noise_scale=1e12) == pytest.approx(scale_lr(0.1, 512, 32), rel=1e-6)
    assert scale_lr(0.1, 512, 32, "noise", noise_scale=0.0) == 0.1
    assert scale_lr(0.1, 512, 32, "noise", noise_scale=100.0) == pytest.approx(
        0.1 * optimal_lr(512, 1, 100) / optimal_lr(32, 1, 100), rel=1e-12
    )


def test_adam_by_the_square_root():
    lr, betas, eps = scale_adam(1e-3, (0.9, 0.999), 1e-8, k=4)
    assert (lr, eps) == pytest.approx((2e-3, 5e-9), rel=1e-12)
    assert betas == pytest.approx((0.6, 0.996), rel=1e-12)
    with pytest.raises(ValueError, match=r"scale_adam: k must be in \(0, 10\]"):
        scale_adam(1e-3, (0.9, 0.999), 1e-8, k=16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: steps(0, 1, 1), "steps: batch"),
        (lambda: critical_batch(64, 1, 8, 2), "critical_batch: the batches"),
        (lambda: critical_batch(8, 0, 64, 2), "critical_batch: the steps"),
        (lambda: fit_critical_batch([8, 8], [1, 2]), "different batches"),
        (lambda: fit_critical_batch([8, 9], [1]), "number of measurements"),
        (lambda: fit_critical_batch([8, 9], [1, 0]), "the steps"),
        (lambda: fit_critical_batch([0, 9], [1, 2]), "the batches"),
        (lambda: efficient_batch(8, 1), "efficiency"),
        (lambda: fastest_batch(-1, 1, 1), "fixed"),
        (lambda: fastest_batch(1, 0, 1), "per_example"),
        (lambda: fastest_batch(1, 1, 1, workers=0), "workers"),
        (lambda: optimal_lr(0, 1, 1), "optimal_lr: batch"),
        (lambda: optimal_lr(1, 1, -1), "b_noise"),
        (lambda: adascale_gain(0.5, 1, 1), "scale"),
        (lambda: adascale_gain(2, 0, 0), "not both 0"),
        (lambda: scale_lr(0.1, 8, 4, "noise"), "noise_scale"),
        (lambda: scale_lr(0.1, 8, 4, "linear", noise_scale=3.0), "noise_scale"),
        (lambda: scale_lr(0.1, 8, 4, "linaer"), "did you mean 'linear'"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
