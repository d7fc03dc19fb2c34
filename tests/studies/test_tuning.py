import math

import optuna
import pytest

from conjugo.studies.tuning import Axis, StudyFile, at_edge, suggest

LR = Axis("lr", 1e-3, 10.0, log=True)
MOMENTUM = Axis("momentum", 0.5, 0.99, complement=True)
LIMIT = Axis("beta_max", 0.8, 1.0, closed=True)


@pytest.mark.parametrize("axis", [LR, MOMENTUM, LIMIT], ids=lambda axis: axis.name)
def test_fraction_is_the_inverse_of_at(axis):
    for fraction in (0.0, 0.1, 0.5, 0.93, 1.0):
        assert axis.fraction(axis.at(fraction)) == pytest.approx(fraction, abs=1e-12)
    assert axis.at(0.0) == pytest.approx(axis.low)
    assert axis.at(1.0) == pytest.approx(axis.high)


def test_scales():
    assert LR.at(0.5) == pytest.approx(0.1)
    assert 1 - MOMENTUM.at(0.5) == pytest.approx(math.sqrt(0.5 * 0.01))
    assert LIMIT.at(0.5) == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low": 1.0, "high": 1.0}, "low must be finite and below high"),
        ({"low": 0.0, "high": 1.0, "log": True}, "low must be positive"),
        ({"low": 0.0, "high": 1.0, "complement": True}, "high must be below 1"),
        ({"low": -math.inf, "high": 1.0}, "low must be finite"),
    ],
)
def test_bad_ranges(arguments, message):
    with pytest.raises(ValueError, match=f"Axis: {message}"):
        Axis("x", **arguments)


def test_edges():
    assert at_edge(LR, LR.at(0.03))
    assert at_edge(LR, LR.at(0.97))
    assert not at_edge(LR, LR.at(0.5))
    assert at_edge(MOMENTUM, 0.989)
    assert not at_edge(LIMIT, 1.0)  # there is nothing beyond
    assert at_edge(LIMIT, 0.8)


def walk(axes, score, trials, seed=0):
    tried = []
    while len(tried) < trials:
        setting = suggest(axes, tried, trials=trials, seed=seed)
        tried.append((setting, score(*setting)))
    return tried


def test_suggestions_depend_on_what_was_tried_and_the_seed_only():
    tried = walk([LR, MOMENTUM], lambda lr, m: -(math.log10(lr) ** 2), 6)
    for k in range(len(tried)):
        assert suggest([LR, MOMENTUM], tried[:k], trials=6, seed=0) == tried[k][0]
    assert suggest([LR, MOMENTUM], [], trials=6, seed=1) != tried[0][0]


def test_suggestions_lie_in_the_ranges_and_cover_them():
    tried = walk([LR, MOMENTUM], lambda lr, m: 0.5, 12)
    for axis, values in zip((LR, MOMENTUM), zip(*(setting for setting, _ in tried))):
        assert all(axis.low <= value <= axis.high for value in values)
        fractions = sorted(axis.fraction(value) for value in values[:6])
        assert max(b - a for a, b in zip([0.0, *fractions], [*fractions, 1.0])) < 0.4


def test_tuning_comes_close_to_the_optimum():
    def score(lr, momentum):
        return 1 - 0.1 * math.log10(lr / 0.2) ** 2 - 0.1 * math.log10((1 - momentum) / 0.06) ** 2

    best = max(walk([LR, MOMENTUM], score, 12), key=lambda pair: pair[1])
    assert best[1] > 0.995
    assert best[1] > max(walk([LR, MOMENTUM], score, 6), key=lambda pair: pair[1])[1] - 1e-12


def test_study_file_is_for_optuna_and_takes_each_trial_once(tmp_path):
    tried = walk([LR, MOMENTUM], lambda lr, m: 0.9 - abs(m - 0.9), 4)
    path = tmp_path / "tuning.sqlite3"
    StudyFile(path).record("momentum, batch 16", [LR, MOMENTUM], tried[:3])
    StudyFile(path).record("momentum, batch 16", [LR, MOMENTUM], tried)
    study = optuna.load_study(study_name="momentum, batch 16", storage=f"sqlite:///{path}")
    assert [trial.value for trial in study.trials] == [score for _, score in tried]
    assert [trial.params["lr"] for trial in study.trials] == [setting[0] for setting, _ in tried]
    assert 1 - study.best_trial.params["1 - momentum"] == pytest.approx(max(tried, key=lambda t: t[1])[0][1])


def test_no_file_keeps_nothing():
    StudyFile(None).record("momentum, batch 16", [LR], [((0.1,), 0.5)])
