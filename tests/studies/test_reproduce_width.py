"""The reproduction of noise scale and width: training in stacks, its verdicts, and the real thing, tiny."""

import hashlib
import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.nn import functional as F

from conjugo.errors import CorruptFile, DataUnavailable
from conjugo.scaling.width import mlp
from conjugo.studies.reproduce import paper, reproduce, width, width_families, width_training
from conjugo.studies.reproduce.paper import Request
from conjugo.studies.reproduce.width import CollapsePlan, difference, equality, experiment
from conjugo.studies.reproduce.width_families import CIFAR, DIGITS, FamilyPlan, stable_lr
from conjugo.studies.reproduce.width_training import Condition, Outcome, Problem, train

PLAN = CollapsePlan(problem=Problem(seeds=8))


def noise(*key):
    """Between -1 and 1, the same for the same key."""
    return int(hashlib.sha256(repr(key).encode()).hexdigest(), 16) % 2001 / 1000 - 1


def pretend(problem, conditions, *, near_limit=0.3, momentum=0.0, spread=0.001, slope=0.05):
    """The law: accuracy depends on gbar alone, best at 100; at learning rate 16 it is lower."""
    outcomes = []
    for c in conditions:
        octaves = math.log2(problem.gbar(c) / 100)
        lost = near_limit * (c.lr >= 16) + momentum * bool(c.momentum)
        test = [0.8 - 0.01 * octaves**2 - lost + 0.01 * noise(s) + spread * noise(s, c) for s in range(problem.seeds)]
        learnt = [0.7 - slope * octaves - lost + spread * noise(s, c, 1) for s in range(problem.seeds)]
        outcomes.append(Outcome(test=tuple(test), train=tuple(learnt), seconds=0.0))
    return outcomes


def shown(result):
    console = Console(width=100, file=io.StringIO())
    for table in result.tables():
        console.print(table)
    return console.file.getvalue()


def verdicts(result):
    return [claim.verdict for claim in result.claims()]


@pytest.fixture(scope="module")
def result():
    return experiment(Request(), plan=PLAN, train=pretend)


# ---- the collapse: plan and verdicts ----


def test_the_plan():
    plan = CollapsePlan()
    for gbar in plan.gbars:
        for c in plan.conditions(gbar):
            assert plan.problem.gbar(c) == pytest.approx(gbar)
            assert c.lr * c.steps / (1 - c.momentum) == pytest.approx(12_000)  # the same physical time
    assert [(c.lr, c.batch, c.steps) for c in plan.inner(100)] == [(0.5, 2, 24_000), (1, 4, 12_000), (2, 8, 6_000)]
    assert [(c.lr, c.batch) for c in plan.inner(400)] == [(1, 1), (2, 2)]  # half an example there is none
    assert plan.condition(300, 1) is None
    assert len({c.file for gbar in plan.gbars for c in plan.conditions(gbar)}) == 27
    with pytest.raises(ValueError, match="CollapsePlan: inside"):
        CollapsePlan(inside=1)


def test_the_law_is_found(result):
    assert verdicts(result) == ["reproduced"] * 7
    text = shown(result)
    assert "gbar 200" in text
    assert "–" in text  # gbar 400 at 0.5
    assert "81.9" not in text  # expected figures belong to the whole plan only
    assert "best noise scale changes with the width is not shown here" in result.text()


def test_expected_figures_stand_beside_the_whole_plan():
    assert "81.9" in shown(experiment(Request(), train=pretend))


def test_what_does_not_reproduce_is_said():
    def batch_matters(problem, conditions):
        (outcome,) = pretend(problem, conditions, near_limit=0.0, momentum=0.02, slope=0.0)
        gain = 0.01 * math.log2(conditions[0].batch)
        return [replace(outcome, test=tuple(a + gain for a in outcome.test))]

    broken = experiment(Request(), plan=PLAN, train=batch_matters)
    found = verdicts(broken)
    assert found[0] == "not reproduced"  # test accuracy at one gbar
    assert found[1] == "reproduced"  # training accuracy still obeys
    assert found[2] == found[3] == "not reproduced"  # momentum
    assert found[5] == found[6] == "not reproduced"  # training: one gbar like another, no end near the limit
    assert "+2.0" in broken.text()


def test_nothing_is_concluded_from_noise():
    noisy = experiment(Request(), plan=PLAN, train=lambda p, cs: pretend(p, cs, spread=0.05, near_limit=0.0))
    cases = [case for claim in noisy.claims()[:2] for case in claim.cases.values()]
    assert {holds for holds, _ in cases} <= {None, False}
    assert None in {holds for holds, _ in cases}


def test_runs_that_diverged_are_left_out_with_their_seed():
    def diverging(problem, conditions):
        (outcome,) = pretend(problem, conditions)
        if conditions[0].lr == 1:
            outcome = replace(outcome, test=(None, *outcome.test[1:]), train=(None, *outcome.train[1:]))
        if conditions[0].lr == 16:
            outcome = replace(outcome, test=(None,) * 8, train=(None,) * 8)
        return [outcome]

    result = experiment(Request(), plan=PLAN, train=diverging)
    inner = result.plan.inner(100)
    assert result.table(inner, "test").shape == (3, 7)
    assert result.table(inner[:1], "test").shape == (1, 8)
    assert f"{4 + 4 * 8} runs diverged" in result.text()
    assert "×8" in shown(result)
    assert verdicts(result)[-1] == "not judged"
    json.dumps(result.to_dict(), allow_nan=False)


def test_paired_differences():
    from scipy import stats

    rng = np.random.default_rng(0)
    shared = rng.normal(size=10)
    a, b = shared + 0.1 * rng.normal(size=10), shared + 0.1 * rng.normal(size=10) + 0.1
    mean, half, p = difference(a, b)
    reference = stats.ttest_rel(a, b)
    low, high = reference.confidence_interval(0.95)
    assert p == pytest.approx(reference.pvalue)
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert difference(a, a) == (0, 0, None)
    assert difference(a + 1, a)[2] == 0
    # For two conditions the F test is the paired t-test.
    assert equality(np.stack([a, b])) == pytest.approx(p)
    assert equality(np.stack([a, a])) is None


def test_the_test_of_equality_keeps_its_level():
    rng = np.random.default_rng(1)
    ps = [equality(3 * rng.normal(size=8) + rng.normal(size=(4, 8))) for _ in range(1000)]
    assert 0.03 < np.mean([p < 0.05 for p in ps]) < 0.075
    different = [equality(3 * rng.normal(size=8) + rng.normal(size=(4, 8)) + [[0], [0], [0], [2]]) for _ in range(100)]
    assert np.mean([p < 0.05 for p in different]) > 0.8


def test_resumes(tmp_path, result):
    left = iter(range(10))

    def interrupted(problem, conditions):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return pretend(problem, conditions)

    with pytest.raises(KeyboardInterrupt):
        experiment(Request(out=tmp_path), plan=PLAN, train=interrupted)
    kept = sorted((tmp_path / "runs").iterdir())
    assert len(kept) == 10
    kept[0].write_text(kept[0].read_text()[:-5])  # torn: done again
    again = []

    def counting(problem, conditions):
        again.extend(conditions)
        return pretend(problem, conditions)

    resumed = experiment(Request(out=tmp_path, resume=True), plan=PLAN, train=counting)
    assert len(again) == 27 - 9
    assert resumed == result
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(result.to_dict()))
    assert {path.name for path in tmp_path.iterdir()} >= {"collapse.png", "collapse.svg", "stability.png"}
    with pytest.raises(ValueError, match="holds another experiment"):
        experiment(Request(out=tmp_path, resume=True), plan=replace(PLAN, width=32), train=pretend)
    with pytest.raises(ValueError, match="a folder without an experiment"):
        experiment(Request(out=tmp_path), plan=PLAN, train=pretend)


def test_progress_is_shown(capsys):
    experiment(Request(progress=True), plan=PLAN, train=pretend)
    assert "2 of 27: width 64, learning rate 1, batch 8, 8 seeds" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["jobs", "workers"])
def test_stacks_are_trained_one_after_another(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must be 1 for width"):
        experiment(Request(out=tmp_path, **{name: 2}), plan=PLAN, train=pretend)
    assert not list(tmp_path.iterdir())


# ---- training ----

TINY = Problem(examples=60, seeds=2, depth=1, evaluations=2)


def test_training_is_that_of_single_networks():
    """Own data, labels and weights of each seed; the accuracies are means over the last half."""
    condition = Condition(width=8, lr=0.5, batch=3, steps=40)
    (outcome,) = train(TINY, [condition])
    data = width_training._load(TINY)
    assert len(data.test_rows[0]) == 1797 - 60
    for seed in range(2):
        assert not set(data.train_rows[seed].tolist()) & set(data.test_rows[seed].tolist())
        wrong = (data.train_targets[seed] != data.targets[data.train_rows[seed]]).sum()
        assert 5 <= wrong <= 12  # of 12 random labels some are right
        model = mlp((64, 8, 10), seed=seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        order = torch.Generator().manual_seed(1_000_003 * (1 + seed) + 3)
        drawn = torch.randint(60, (width_training.CHUNK, 3), generator=order)
        found = []
        for step in range(40):
            rows = drawn[step]
            optimizer.zero_grad()
            inputs = data.inputs[data.train_rows[seed][rows]]
            F.cross_entropy(model(inputs), data.train_targets[seed][rows]).backward()
            optimizer.step()
            if step + 1 in (30, 40):
                test = data.test_rows[seed]
                right = (model(data.inputs[test]).argmax(1) == data.targets[test]).double().mean()
                learnt = model(data.inputs[data.train_rows[seed]]).argmax(1) == data.train_targets[seed]
                found.append((right.item(), learnt.double().mean().item()))
        assert outcome.test[seed] == pytest.approx(np.mean([a for a, _ in found]), abs=2e-3)
        assert outcome.train[seed] == pytest.approx(np.mean([b for _, b in found]), abs=0.02)


def test_which_batches_share_a_stack_does_not_matter():
    conditions = [Condition(width=8, lr=0.5, batch=batch, steps=30) for batch in (1, 4, 16)]
    together = train(TINY, conditions)
    alone = [train(TINY, [condition])[0] for condition in conditions]
    for one, other in zip(together, alone):
        assert one.test == pytest.approx(other.test, abs=3e-3)
    assert len({outcome.test for outcome in together}) == 3


def test_a_run_that_diverges_is_none():
    (outcome,) = train(TINY, [Condition(width=8, lr=1e30, batch=4, steps=20)])
    assert outcome.test == outcome.train == (None, None)
    assert outcome.diverged == 2


def test_the_own_split_of_the_data():
    data = width_training._load(replace(TINY, resample=False, label_noise=0.0))
    assert data.train_rows.tolist() == [list(range(60))] * 2
    assert data.test_rows.tolist() == [list(range(1437, 1797))] * 2
    assert torch.equal(data.train_targets[0], data.targets[:60])
    assert abs(float(data.inputs.mean())) < 1e-5
    assert float(data.inputs.std()) == pytest.approx(1, rel=1e-3)


def test_really(tmp_path):
    """Few steps, real training."""
    plan = CollapsePlan(problem=TINY, width=8, gbars=(30, 60), lrs=(0.5, 1), inside=2, time=20)
    result = experiment(Request(out=tmp_path), plan=plan)
    assert {(c.lr, c.batch, c.steps) for c in plan.inner(30)} == {(0.5, 1, 40), (1, 2, 20)}
    found = json.loads((tmp_path / "results.json").read_text())
    assert all(0.1 < row["mean_test"] < 1 for row in found["conditions"])
    assert all(outcome.diverged == 0 for outcome in result.outcomes.values())


# ---- families of widths ----

FAMILIES = FamilyPlan(
    problem=Problem(seeds=8),
    widths=(16, 32, 64, 128),
    batches=tuple(2**k for k in range(9)),
    steps=100,
)


def family(problem, conditions, *, exponent=1.0, limit=40.0, spread=0.001, gain=0.01):
    """The best gbar goes with the width to the *exponent*, and is 3 times the width at 2^5.5; wider is better."""
    outcomes, middle = [], 2**5.5
    for c in conditions:
        octaves = math.log2(problem.gbar(c) / (3 * middle * (c.width / middle) ** exponent))
        height = 0.7 + gain * math.log2(c.width) - 0.002 * octaves**2 - 0.6 * (c.lr > limit)
        test = tuple(height + spread * noise(s, c) for s in range(problem.seeds))
        outcomes.append(Outcome(test=test, train=test, seconds=0.0))
    return outcomes


def test_proportionality_is_found(tmp_path):
    result = width_families.experiment(Request(out=tmp_path), FAMILIES, train=family)
    assert result.lr == 8  # a quarter of 32, the largest of the powers of two below 40
    law = result.law
    assert law.exponent == pytest.approx(1, abs=0.1)
    assert law.kappa == pytest.approx(3, rel=0.1)
    for width_, optimum in result.optima.items():
        assert optimum.gbar == pytest.approx(3 * width_, rel=0.1)
    assert verdicts(result) == ["reproduced", "reproduced"]
    critical = 32 * 400 / law.kappa
    assert f"at width {critical:,.0f} (the critical width)" in result.text()
    assert "width 128" in shown(result)
    assert {path.name for path in tmp_path.iterdir()} >= {"families.png", "families.svg", "lr.json", "results.json"}
    assert width_families.experiment(Request(out=tmp_path, resume=True), FAMILIES, train=None) == result  # all is there
    written = (tmp_path / "results.json").read_text()
    for batch in (1, 2, 16):  # the first of a stack, so that the rest of it is read
        (tmp_path / "runs" / f"width-32-lr-8-batch-{batch}.json").unlink()
    width_families.experiment(Request(out=tmp_path, resume=True), FAMILIES, train=family)
    assert (tmp_path / "results.json").read_text() == written


@pytest.mark.parametrize(
    ("exponent", "spread", "verdict"),
    [(0.0, 0.001, "not reproduced"), (0.5, 0.001, "not reproduced"), (1.2, 0.001, "reproduced")],
)
def test_other_exponents_are_judged(exponent, spread, verdict):
    plan = replace(FAMILIES, lr=8.0)

    def trained(problem, conditions):
        return family(problem, conditions, exponent=exponent, spread=spread, gain=0.0)

    result = width_families.experiment(Request(), plan, train=trained)
    assert result.law.exponent == pytest.approx(exponent, abs=0.1)
    assert verdicts(result) == [verdict, "not reproduced"]
    assert ("critical width" in result.text()) == (verdict == "reproduced")


def test_an_exponent_that_may_be_0_or_1_is_undecided():
    plan = replace(FAMILIES, lr=8.0)
    result = width_families.experiment(Request(), plan, train=lambda p, cs: family(p, cs, exponent=0.5, spread=0.02))
    low, high = result.law.interval
    assert low <= 0
    assert high >= 1
    assert verdicts(result)[0] == "not judged"
    assert "undecided" in result.text()


def test_without_enough_optima_nothing_is_judged():
    def diverging(problem, conditions):
        return [replace(outcome, test=(None,) * 8) for outcome in family(problem, conditions)]

    result = width_families.experiment(Request(), replace(FAMILIES, lr=8.0), train=diverging)
    assert verdicts(result) == ["not judged", "not judged"]
    assert "diverged" in shown(result)
    edges = width_families.experiment(Request(), replace(FAMILIES, lr=800.0), train=family)
    assert edges.law is None
    assert "yes" in shown(edges)


def test_the_largest_stable_rate():
    assert stable_lr(FAMILIES, family) == 32
    with pytest.raises(ValueError, match="the smallest are stable and the largest are not"):
        stable_lr(FAMILIES, lambda p, cs: family(p, cs, limit=1e9))


def test_a_damaged_learning_rate_is_found(tmp_path):
    assert width_families._chosen_lr(FAMILIES, family, tmp_path) == 8
    assert width_families._chosen_lr(FAMILIES, lambda *_: pytest.fail("known already"), tmp_path) == 8
    (tmp_path / "lr.json").write_text("{}")
    with pytest.raises(CorruptFile, match=r"lr\.json: no learning rate"):
        width_families._chosen_lr(FAMILIES, family, tmp_path)


def test_families_really():
    plan = FamilyPlan(
        problem=TINY, widths=(4, 8, 16), batches=(1, 2, 4, 8), steps=30, probed=(1.0, 1e3), probe_steps=30, together=2
    )
    result = width_families.experiment(Request(), plan, train=train)
    assert result.lr == 0.25
    assert [len(stack) for stack in plan.stacks(1.0)] == [2] * 6
    assert len(result.outcomes) == 12
    assert all(outcome.diverged == 0 for outcome in result.outcomes.values())
    result.text()
    json.dumps(result.to_dict(), allow_nan=False)


@pytest.mark.parametrize("plan", [CIFAR, DIGITS])
def test_the_plans_of_families(plan):
    assert (plan.widths[0], plan.widths[-1]) == (64, 1024)
    assert plan.problem.seeds >= 8


def test_scale_gpu_wants_an_accelerator_and_takes_what_data_there_is(monkeypatch, tmp_path):
    monkeypatch.setattr(width_families, "choose_device", lambda name: torch.device("cpu"))
    with pytest.raises(ValueError, match="no accelerator here"):
        reproduce("width", scale="gpu", out=tmp_path)
    assert not list(tmp_path.iterdir())
    plans = []
    monkeypatch.setattr(width_families, "experiment", lambda request, plan, *, train: plans.append(plan))

    def load(found):
        def look(config, *_):
            if not found:
                raise DataUnavailable("none")

        monkeypatch.setattr(width_families, "load_data", look)

    load(True)
    reproduce("width", scale="gpu", force=True)
    load(False)
    reproduce("width", scale="gpu", force=True)
    assert plans == [replace(CIFAR, together=1), replace(DIGITS, together=1)]
    monkeypatch.setattr(width_families, "choose_device", lambda name: torch.device("cuda"))
    reproduce("width", scale="gpu")
    assert plans[-1] == DIGITS


def test_the_full_scale_is_a_plan(tmp_path):
    assert set(paper("width").scales) == {"cpu", "gpu", "full"}
    result = reproduce("width", scale="full", out=tmp_path)
    assert "Nothing was run" in result.text()
    assert result.tables() == []
    assert json.loads((tmp_path / "results.json").read_text())["scale"] == "full"


def test_the_paper_is_named():
    assert width.PAPER.source.endswith("arXiv:1905.03776")
