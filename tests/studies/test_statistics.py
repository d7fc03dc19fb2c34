import math

import pytest
from scipy import stats

from conjugo.studies.statistics import first_reached, holm, mean_sd, median_reached, paired, usable_octaves, welch


def test_mean_and_standard_deviation():
    assert mean_sd([1.0, 2.0, 6.0]) == (3.0, math.sqrt(7))
    mean, sd = mean_sd([0.5])
    assert mean == 0.5
    assert math.isnan(sd)


def test_welch_follows_the_textbook():
    a, b = [0.91, 0.93, 0.95, 0.92], [0.90, 0.90, 0.91]
    mean_a, sd_a = mean_sd(a)
    mean_b, sd_b = mean_sd(b)
    va, vb = sd_a**2 / len(a), sd_b**2 / len(b)
    t = (mean_a - mean_b) / math.sqrt(va + vb)
    freedom = (va + vb) ** 2 / (va**2 / 3 + vb**2 / 2)
    assert welch(a, b) == pytest.approx(2 * stats.t.sf(abs(t), freedom), rel=1e-10)


@pytest.mark.parametrize(("a", "b"), [([0.9], [0.8, 0.7]), ([0.9, 0.9], [0.8, 0.8]), ([], [0.1, 0.2])])
def test_welch_says_nothing_without_spread(a, b):
    assert welch(a, b) is None


def test_the_paired_test_is_that_of_scipy():
    a, b = [0.91, 0.93, 0.95, 0.92], [0.90, 0.90, 0.91, 0.93]
    assert paired(a, b) == pytest.approx(float(stats.ttest_rel(a, b).pvalue), rel=1e-10)
    assert paired([0.9], [0.8]) is None
    assert paired([0.75, 0.5], [0.5, 0.25]) is None  # the same difference twice
    lower = [k / 360 for k in (350, 347, 351, 355, 344)]
    assert paired([k / 360 for k in (355, 352, 356, 360, 349)], lower) is None  # but for rounding
    assert paired([k / 360 for k in (355, 352, 356, 360, 350)], lower) < 1e-3


def test_holm_corrects_for_the_number_of_tests():
    # The textbook's way: the smallest times 4, the next times 3, never below the one before, at most 1.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_first_step_at_the_target():
    curve = [(10, 0.5), (20, 0.8), (30, 0.7), (40, 0.9)]
    assert first_reached(curve, 0.7) == 20
    assert first_reached(curve, 0.9) == 40
    assert first_reached(curve, 0.91) is None


def test_median_counts_runs_that_do_not_arrive():
    assert median_reached([10, None, 20]) == 20
    assert median_reached([10, None, None]) is None
    assert median_reached([10, 30]) == 20


def test_usable_learning_rates():
    points = [(0.1, 0.5), (0.2, 0.90), (0.4, 0.91), (0.8, 0.895), (1.6, 0.2), (3.2, 0.91)]
    width = usable_octaves(points)
    assert width is not None
    assert width.width == pytest.approx(2)  # 0.2 to 0.8: the lucky outlier at 3.2 does not count
    assert not width.at_least
    assert str(usable_octaves(points[1:])) == "≥ 2.0"
    assert usable_octaves(points[:3]) is None  # two points within tolerance do not make a width
    assert usable_octaves([]) is None
