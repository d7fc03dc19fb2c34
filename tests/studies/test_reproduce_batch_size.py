"""The study of batch sizes: what it runs, what it makes of the numbers, and that it resumes."""

import json
from dataclasses import replace

import pytest
from tests.studies.test_reproduce import outcome, shown

from conjugo.studies.records import Outcome
from conjugo.studies.reproduce import batch_size, paper
from conjugo.studies.reproduce.batch_size import BatchSizePlan, experiment
from conjugo.studies.reproduce.paper import Request

SMALL = BatchSizePlan(fractions=(0.0, 0.4), seeds=3)
STEPS = {"64": 330, "64 → 512": 190, "32 → 128 → 512": 327, "110": 195}


def pretend(plan: BatchSizePlan, task) -> Outcome:
    """Discarding gains a point with large batches, unless the learning rate is larger or stays; growing costs nothing."""
    noise = 0.0005 * task.seed
    if task.study == "growing":
        lost = 0.02 if task.contender == "110" else 0.0
        return replace(outcome(0.98 - lost + noise), steps=STEPS[task.contender])
    gains = task.batch_size == 512 and float(task.contender) > 0 and task.lr == 0.1 and task.study != "constant"
    return outcome(0.97 + 0.01 * gains + 0.02 * (task.lr == 0.2) + noise)


def verdicts(result) -> list[str]:
    return [claim.verdict for claim in result.claims()]


def test_claims_are_judged():
    result = experiment(Request(), plan=SMALL, run=pretend)
    no = "not reproduced"
    assert verdicts(result) == [
        "reproduced",
        "reproduced",
        no,
        no,
        "reproduced",
        "reproduced",
        "reproduced",
        "reproduced",
    ]
    text = result.text()
    assert "q = 0.4: +1.0 points (p" in text
    assert "q = 0.4: +0.0 points (p = 1.00) at 0.2 against 0.2" in text
    assert "64 → 512: 190 against 330 steps" in text
    tables = shown(result)
    assert "512 · 0.4 · twice" in tables
    assert "98.2" in tables  # expected of a discarded fraction of 0.4


def test_worse_is_not_reproduced():
    def worse(plan, task):
        if task.study == "growing":
            return replace(outcome(0.98 - 0.02 * (task.contender != "64") + 0.0001 * task.seed), steps=330)
        lost = 0.02 if task.study == "twice" else 0.01 if task.contender != "0" else 0.0
        return outcome(0.97 - lost + 0.0001 * task.seed, loss=None)

    result = experiment(Request(), plan=SMALL, run=worse)
    assert set(verdicts(result)) == {"not reproduced"}
    assert "inf" in shown(result)


def test_it_resumes_and_is_drawn(tmp_path):
    whole = experiment(Request(), plan=SMALL, run=pretend)
    left = iter(range(20))

    def interrupted(plan, task):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return pretend(plan, task)

    with pytest.raises(KeyboardInterrupt):
        experiment(Request(out=tmp_path), plan=SMALL, run=interrupted)
    assert experiment(Request(out=tmp_path, resume=True), plan=SMALL, run=pretend) == whole
    assert {path.name for path in tmp_path.iterdir()} >= {"results.json", "discarding.png", "discarding.svg"}
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["expected"]["discarding"]["512"]["0.6"] == 0.986
    assert len(saved["claims"]) == 8


def test_crashes_are_told_and_left_out():
    def crashing(plan, task):
        if task.study == "growing" or task.contender == "0":
            raise RuntimeError("out of memory")
        return pretend(plan, task)

    result = experiment(Request(), plan=SMALL, run=crashing)
    assert "out of memory" in result.text()
    assert "not run" in result.text()
    assert "–" in shown(result)


def test_what_it_really_runs():
    """Each condition once, with few epochs: steps and examples."""
    plan = BatchSizePlan(epochs={512: 2, 64: 1}, fractions=(0.0, 0.5), lrs=(0.1,), schedule_epochs=12, seeds=1)
    result = experiment(Request(), plan=plan)
    assert not result.crashes
    found = {cell.grid.cell: cell.runs[0].outcome for cell in result.cells}
    assert found["once", "0.5", 512].steps == found["twice", "0.5", 512].steps == 4
    assert found["constant", "0", 512].samples == 4 * 512
    assert found["once", "0", 64].samples == 22 * 64
    assert found["growing", "32 → 128 → 512", 32].steps == 6 * 44 + 5 * 11 + 1 * 2
    assert found["growing", "64 → 512", 64].samples == 8 * 22 * 64 + 4 * 2 * 512
    assert found["once", "0", 512].accuracy != found["once", "0.5", 512].accuracy


def test_the_plan():
    assert set(paper("batch-size").scales) == {"cpu"}
    assert "2012.08795" in paper("batch-size").source
    plan = BatchSizePlan()
    assert all(cell.lrs == plan.lrs for cell in plan.cells() if cell.study == "once")
    assert batch_size.GROWING.keys() == plan.schedules.keys() - {"110"}
    assert all(batch_size.DISCARDING[batch].keys() == set(plan.fractions) for batch in plan.epochs)
