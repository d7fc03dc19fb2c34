"""The reproduction of MCLR: its plan, its verdicts, and the real thing in few steps."""

import hashlib
import io
import json
import math
from dataclasses import replace

import pytest
from rich.console import Console

from conjugo.studies.records import Outcome
from conjugo.studies.reproduce import paper, reproduce
from conjugo.studies.reproduce.mclr import FULL, SMALL, experiment, plan
from conjugo.studies.reproduce.paper import Request

BEST = {
    "momentum": (0.89, 0.97),
    "lars": (0.97, 0.97),
    "cblr": (0.974, 0.975),
    "mclr": (0.962, 0.975),
    "cblr-secant": (0.95, 0.96),
}


def pretend(study, task):
    """Best at the third learning rate; further off the rule of LARS loses a point an octave, the others two and a half."""
    accuracy = BEST[task.contender][task.study == SMALL]
    distance = abs(math.log2(task.lr / study.entrants[task.contender].values[2]))
    noise = int(hashlib.sha256(f"{task}".encode()).hexdigest(), 16) % 100 / 1e5
    lost = (0.01 if task.contender == "cblr" else 0.0199) * distance
    return Outcome(steps=1, samples=1, accuracy=accuracy - lost - noise, loss=1.0, diverged=False, seconds=0.0)


def watched(study, name, lr):
    return [[1.0, 2.0, 3.0 * lr]] * 4


@pytest.fixture(scope="module")
def result():
    return experiment(Request(), run=pretend, watched=watched)


def shown(result):
    console = Console(width=160, file=io.StringIO())
    for table in result.tables():
        console.print(table)
    return console.file.getvalue()


def test_the_plan():
    study = plan()
    assert {len(entrant.values) for entrant in study.entrants.values()} == {6}
    cells = study.cells()
    assert {(cell.study, cell.batch_size) for cell in cells} == {(FULL, 1437), (SMALL, 256)}
    assert sum(cell.size for cell in cells) == 2 * 5 * (6 + 1) * 4


def test_tables_and_sentences(result):
    text = shown(result)
    assert "(97.4)" in text  # expected of the rule of LARS
    assert "CBLR, secant" in text
    verdicts = {claim.statement: claim.verdict for claim in result.claims()}
    assert verdicts == {
        "MCLR is within 1.5 points of the rule of LARS (CBLR, norms)": "reproduced",
        "MCLR is within 1.5 points of LARS": "reproduced",
        "MCLR is at least 5 points above momentum": "reproduced",
        "the rule of LARS (CBLR, norms) is at least 5 points above momentum": "reproduced",
        "CBLR with secant curvature is above momentum": "reproduced",
        "the usable rates of the rule of LARS (CBLR, norms) span at least an octave more than those of MCLR": "reproduced",
    }
    assert "edge" not in result.text()


def test_what_does_not_reproduce_is_said():
    def equal(study, task):
        return Outcome(steps=1, samples=1, accuracy=0.9 + task.seed % 3 / 1e4, loss=1.0, diverged=False, seconds=0.0)

    text = experiment(Request(), run=equal, watched=watched).text()
    assert "Not reproduced: MCLR is at least 5 points above momentum" in text
    assert "Not reproduced: CBLR with secant curvature is above momentum" in text
    assert "at the edge of the grid for momentum 0.9 (full batch, 60 steps)" in text


def test_a_crash_is_reported_and_its_cell_left_out():
    def crashing(study, task):
        if task.contender == "mclr" and task.study == FULL:
            raise RuntimeError("out of memory")
        return pretend(study, task)

    result = experiment(Request(), run=crashing, watched=watched)
    assert result.grids.cell("mclr", FULL) is None
    assert set(result.curvature) == {"cblr"}
    assert "out of memory" in result.text()
    assert "full batch, 60 steps: not run" in result.text()


def test_resumes(tmp_path, result):
    left = iter(range(100))

    def interrupted(study, task):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return pretend(study, task)

    with pytest.raises(KeyboardInterrupt):
        experiment(Request(out=tmp_path), run=interrupted, watched=watched)
    resumed = experiment(Request(out=tmp_path, resume=True), run=pretend, watched=watched)
    assert resumed == result
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(result.to_dict()))
    assert {path.name for path in tmp_path.iterdir()} >= {"learning_rates.svg", "curvature.png"}


def test_really():
    """Few steps, real training."""
    whole = plan()
    few = {name: replace(whole.entrants[name], values=(0.5, 1.0)) for name in ("mclr", "cblr")}
    settings = {name: replace(train, steps=steps) for (name, train), steps in zip(whole.settings.items(), (4, 3))}
    grids = (result := experiment(Request(), study=replace(whole, settings=settings, entrants=few, seeds=1))).grids
    assert not grids.crashes
    assert {run.outcome.samples for run in grids.cells[0].finals} == {4 * 1437}
    assert {run.outcome.samples for run in grids.cells[-1].finals} == {3 * 256}
    for name in ("mclr", "cblr"):
        seen = result.curvature[name]
        assert [len(row) for row in seen] == [3] * 4  # layers, steps
        assert all(value > 0 for row in seen for value in row)
    assert all(m < c for m, c in zip(result.curvature["mclr"][0], result.curvature["cblr"][0]))  # at the same weights


@pytest.mark.parametrize("scale", ["gpu", "full"])
def test_larger_scales_are_plans(tmp_path, scale):
    assert set(paper("mclr").scales) == {"cpu", "gpu", "full"}
    result = reproduce("mclr", scale=scale, out=tmp_path)
    assert "Nothing was run" in result.text()
    assert result.tables() == []
    assert json.loads((tmp_path / "results.json").read_text())["scale"] == scale
    assert ("2.8e18" in result.text()) == (scale == "full")
