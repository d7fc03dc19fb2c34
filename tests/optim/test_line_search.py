"""The step-size control: the ladder and both rules, on arrays and on tensors."""

import math

import numpy as np
import pytest
import torch

from conjugo.optim.line_search import LineSearch, degradation
from conjugo.optim.step_sizes import Seen

KINDS = [pytest.param(np.asarray, id="numpy"), pytest.param(lambda v: torch.tensor(v, dtype=torch.float64), id="torch")]


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize(
    ("ratio", "shrink", "remove"),
    [
        (1.16, 0.5, 0.9),
        (1.14, 0.7, 0.7),
        (1.11, 0.8, 0.5),
        (1.08, 0.9, 0.3),
        (1.06, 0.95, 0.2),
        (1.03, 0.975, 0.1),
        (1.02, 1.0, 0.1),
        (1.01, 1.0, 0.0),
        (math.nan, 1.0, 0.0),
    ],
)
def test_ladder(make, ratio, shrink, remove):
    assert [float(v) for v in degradation(make(ratio), 1.0)] == [shrink, remove]


def test_threshold_scales_the_ladder():
    assert [float(v) for v in degradation(np.asarray(1.21), 2.0)] == [0.8, 0.5]
    assert [float(v) for v in degradation(np.asarray(1.019), 2.0)] == [1.0, 0.0]


def follow(search, losses, make):
    base, ema, ema_prev = make(1.0), make(0.0), make(0.0)
    rows = []
    for t, loss in enumerate(losses):
        seen = Seen(step=make(float(t)), lr=make(1.0), square=make(1.0), loss=make(loss))
        _, (base, ema, ema_prev), remove = search(seen, (base, ema, ema_prev))
        rows.append([float(base), float(remove), float(ema)])
    return rows


@pytest.mark.parametrize("kind", ["online", "step"])
def test_arrays_and_tensors_agree(kind):
    losses = [1.0, 0.9, 2.0, 1.9, 1.0, 0.8, 3.0, 0.7, 0.6, 0.5, 0.4, 5.0]
    on_host, on_device = (follow(LineSearch(kind=kind, period=3), losses, make.values[0]) for make in KINDS)
    np.testing.assert_allclose(on_host, on_device, rtol=1e-15)
    assert any(remove > 0 for _, remove, _ in on_host)


def test_base_recovers_and_stays_in_its_range():
    search = LineSearch(kind="online")
    rows = follow(search, [1.0, *[10.0**k for k in range(1, 60)]], np.asarray)
    assert rows[-1][0] == 1e-4
    rows = follow(search, [1.0, 10.0, *[0.9**k for k in range(60)]], np.asarray)
    assert rows[1][0] == 0.5
    assert rows[2][0] == pytest.approx(0.5 * 1.02)
    assert rows[-1][0] == 1.0


def test_step_rule_looks_every_period():
    rows = follow(LineSearch(kind="step", period=4), [2.0**k for k in range(12)], np.asarray)
    assert [t for t in range(1, 12) if rows[t][0] != rows[t - 1][0]] == [4, 8]
