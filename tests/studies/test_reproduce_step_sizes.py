"""FRSGD and AdaGrad-Norm on grids: what is planned, judged and kept; small true runs."""

import io
import json
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from conjugo.studies.records import Outcome
from conjugo.studies.reproduce import adagrad_norm, frsgd, grid_study, grids, paper, reproduce
from conjugo.studies.reproduce.adagrad_norm import SweepPlan
from conjugo.studies.reproduce.grid_study import Entrant, GridStudy, run_study, run_task
from conjugo.studies.reproduce.paper import Request, near, not_below
from conjugo.training import TrainConfig


def outcome(accuracy):
    return Outcome(steps=1, samples=1, accuracy=accuracy, loss=1.0, diverged=False, seconds=0.0)


def shown(result):
    console = Console(width=220, file=io.StringIO())
    for table in result.tables():
        console.print(table)
    return console.file.getvalue()


def peak(best, width=2.0, height=0.95):
    """An accuracy that falls by a point for every *width* / 2 octaves away from the value *best*."""

    def run(study, task):
        accuracy = height - 0.02 * abs(math.log2(task.lr / best(task))) / width
        return outcome(accuracy - 1e-4 * (task.seed % 3))

    return run


# ---- grid studies ----

STUDY = GridStudy(
    settings={
        "a": TrainConfig(data="wine", batch_size=16, epochs=2.0),
        "all": TrainConfig(data="wine", batch_size="full", steps=3),
    },
    entrants={
        "momentum": Entrant(label="momentum", optimizer="momentum", values=(0.01, 0.02, 0.04, 0.08)),
        "step": Entrant(
            label="first step",
            optimizer="adagrad-norm",
            values=(0.1, 0.2, 0.4),
            axis="first_step",
            options={"momentum": 0.5},
            lr=7.0,
        ),
    },
    seeds=2,
)


def test_an_entrant_says_what_its_values_are():
    assert STUDY.entrants["momentum"].at(0.02) == (0.02, {})
    assert STUDY.entrants["step"].at(0.2) == (7.0, {"momentum": 0.5, "first_step": 0.2})


def test_cells_are_all_pairs():
    cells = [(cell.study, cell.contender, cell.batch_size, cell.lrs) for cell in STUDY.cells()]
    assert [cell[:2] for cell in cells] == [("a", "momentum"), ("a", "step"), ("all", "momentum"), ("all", "step")]
    assert [cell[2] for cell in cells] == [16, 16, 142, 142]


def test_the_best_value_is_chosen_on_held_out_data_and_judged_with_fresh_seeds():
    result = run_study(
        STUDY, Request(progress=False), paper="p", expected={"momentum": {"a": 0.9}}, run=peak(lambda _: 0.04)
    )
    for setting in STUDY.settings:
        cell = result.cell("momentum", setting)
        assert cell.best == 0.04
        assert len(cell.finals) == 2
        assert {run.task.seed for run in cell.finals} == {0, 1}
    assert result.cell("step", "a").best == 0.1
    text = shown(type("R", (), {"tables": lambda self: [result.accuracy_table("T", "s"), result.values_table("V")]})())
    assert "95.0 ± 0.0 (90.0)" in text
    assert "0.1*" in text  # at the edge
    assert any("at the edge of the grid for first step (a) and first step (all)" in note for note in result.notes())
    claim = result.claim("they are near", "momentum", "step", near(0.05))
    assert claim.verdict == "reproduced"
    assert result.claim("x", "momentum", "nobody", not_below, ["a"]).verdict == "not judged"
    json.dumps(result.to_dict(), allow_nan=False)


def test_runs_train_what_they_say(monkeypatch):
    seen = []
    true = grid_study.train_once

    def spying(base, contender, task, dataset, *, steps, evaluations):
        seen.append((contender.optimizer, contender.options, task.lr, len(dataset.train), steps))
        return true(base, contender, task, dataset, steps=steps, evaluations=evaluations)

    monkeypatch.setattr(grid_study, "train_once", spying)
    small = replace(STUDY, entrants={"step": replace(STUDY.entrants["step"], values=(0.1, 0.2))}, seeds=1)
    result = run_study(small, Request(progress=False), paper="p", expected={})
    assert not result.crashes
    assert all(0 <= run.outcome.accuracy <= 1 for cell in result.cells for run in cell.runs)
    tuning = [run for run in seen if run[3] == 142 - 28]
    assert [run[1]["first_step"] for run in tuning] == [0.1, 0.2, 0.1, 0.2]
    assert {run[2] for run in seen} == {7.0}
    assert {run[4] for run in seen} == {round(2 * 114 / 16), round(2 * 142 / 16), 3}


def test_wider_needs_grids_that_are_wide_enough():
    result = run_study(STUDY, Request(progress=False), paper="p", expected={}, run=peak(lambda _: 0.04, width=20.0))
    assert result.wider("momentum", "step", "a", 0.0)[0] is None  # both go on to the edge
    assert result.wider("momentum", "nobody", "a", 0.0) == (None, "not run")


# ---- FRSGD ----


def frsgd_study():
    whole = frsgd.plan()
    return replace(whole, settings=dict(list(whole.settings.items())[:2]), seeds=2)


def test_frsgd_is_judged():
    def best(task):
        return {"momentum": 0.1, "sgd": 1.0}.get(task.contender, 0.3162)

    traced = lambda study, setting, lr: [0.5, 0.7]  # noqa: E731
    result = frsgd.experiment(Request(progress=False), study=frsgd_study(), run=peak(best, width=3.0), traced=traced)
    verdicts = [claim.verdict for claim in result.claims()]
    assert verdicts == ["reproduced"] * 3
    text = result.text()
    assert "Mean β at the best learning rate: batch 64, BN 0.60, batch 64 0.60." in text
    assert "CIFAR-10 5.25 / 4.64 %" in text
    assert "FRSGD per tensor" in shown(result)


def test_frsgd_is_not_reproduced_where_momentum_goes_as_far():
    traced = lambda study, setting, lr: []  # noqa: E731
    result = frsgd.experiment(
        Request(progress=False), study=frsgd_study(), run=peak(lambda _: 0.1, width=3.0), traced=traced
    )
    assert result.claims()[-1].verdict == "not reproduced"


def test_frsgd_trace_is_of_a_true_run():
    study = GridStudy(settings={"s": TrainConfig(data="wine", batch_size=64, steps=5)}, entrants={})
    betas = frsgd.trace(study, "s", 0.1)
    assert len(betas) == 5
    assert betas[0] == 0.0
    assert all(0 < beta <= 0.999 for beta in betas[1:])


def test_frsgd_writes_tables_and_figures_and_resumes(tmp_path):
    traced = lambda study, setting, lr: [0.5, 0.7]  # noqa: E731
    study = frsgd_study()
    study = replace(study, settings=dict(list(study.settings.items())[:1]))
    request = Request(out=tmp_path / "run", progress=False)
    first = frsgd.experiment(request, study=study, run=peak(lambda _: 0.1), traced=traced)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"results.json", "learning_rates.png", "learning_rates.svg", "beta.png", "beta.svg"} <= names

    def never(study, task):
        raise AssertionError("it was done already")

    again = frsgd.experiment(replace(request, resume=True), study=study, run=never, traced=traced)
    assert again.to_dict() == first.to_dict()


# ---- AdaGrad-Norm ----

SMALL = SweepPlan(
    size=(60, 20), steps=(200, 100), b0=(1e-2, 1.0, 1e2, 1e4), network_b0=(1e-4, 1e-2, 1.0), epochs=2, seeds=2
)


@pytest.fixture(scope="module")
def swept():
    return adagrad_norm.sweep(SMALL)


def test_sweeps_show_what_the_theory_says(swept):
    """In 20 dimensions smoothness is about 2, so that step sizes 650 / b_0 above 1 diverge."""
    for part in ("batch 20", "full batch"):
        assert all(norm is not None and norm < 0.1 for norm in swept[part]["AdaGrad-Norm"][:3])
        assert swept[part]["SGD, constant"][:2] == [None, None]
        assert swept[part]["SGD, constant"][3] is not None
    for model in ("regression", "perceptron"):
        assert set(swept[model]) == set(adagrad_norm.NETWORK_METHODS)
        losses = swept[model]["AdaGrad-Norm"]
        assert all(loss is not None and 0 < loss < 2.5 for seeds in losses for loss in seeds)
        assert losses[0][0] != losses[0][1]  # seeds differ


def tasks():
    whole = adagrad_norm.plan()
    return replace(whole, settings=dict(list(whole.settings.items())[:2]), seeds=2)


def best_of_tasks(task):
    """A first step of 0.1 suits both tasks; learning rates differ between them."""
    if task.contender == "first-step":
        return 0.1
    other = {"momentum": 0.003, "adamw": 0.0001, "b0": 1e-4, "eta": 0.1, "distance": 0.1}[task.contender]
    return other * (1000 if task.study == "digits, MLP" else 1)


def test_adagrad_norm_is_judged(swept, tmp_path, monkeypatch):
    drawn = []

    def saving(content, figures, out):  # rendering takes seconds
        drawn.extend(figures)
        grids.save(content, {}, out)

    monkeypatch.setattr(adagrad_norm, "save", saving)
    request = Request(out=tmp_path / "run", progress=False)
    arguments = {"study": tasks(), "sweeps": SMALL, "run": peak(best_of_tasks)}
    result = adagrad_norm.experiment(request, swept=lambda plan: swept, **arguments)
    verdicts = {claim.statement[:30]: claim.verdict for claim in result.claims()}
    assert verdicts["one relative first step serves"] == "reproduced"
    assert verdicts["with its first step tuned AdaG"] == "reproduced"
    value, mean, _ = result.shared("first-step")
    assert (value, mean) == (0.1, pytest.approx(0.0, abs=2e-4))
    assert result.shared("momentum")[1] > 0.02
    assert result.shared("momentum")[2] >= result.shared("momentum")[1]
    assert "diverged" in shown(result)
    assert {"results.json", "sweeps.json"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert drawn == ["b0", "tasks"]

    def never(plan):
        raise AssertionError("it was done already")

    again = adagrad_norm.experiment(replace(request, resume=True), swept=never, **arguments)
    assert json.dumps(again.to_dict()) == json.dumps(result.to_dict())


def test_usable_decades_and_flat_norms(swept):
    result = adagrad_norm.experiment(
        Request(progress=False), study=tasks(), sweeps=SMALL, run=peak(best_of_tasks), swept=lambda plan: swept
    )
    made_up = {
        "batch 20": {"AdaGrad-Norm": [0.1, 0.1, 0.1, 0.1], "SGD, constant": [None, None, 1e6, 0.1]},
        "full batch": {"AdaGrad-Norm": [0.1, 3.0, 0.1, 0.1], "SGD, constant": [None, None, None, 0.1]},
        "regression": {"AdaGrad-Norm": [[0.1], [0.15], [0.1]], "SGD, constant": [[None], [9.0], [0.1]]},
        "perceptron": {"AdaGrad-Norm": [[0.1], [0.15], [0.1]], "SGD, constant": [[0.1], [0.1], [0.1]]},
    }
    result = replace(result, over_b0=made_up)
    flat, decades = result.claims()[:2]
    assert [holds for holds, _ in flat.cases.values()] == [True, False]
    assert [said.split(",")[0] for _, said in decades.cases.values()] == [
        "3 against 1 of 3 decades",
        "3 against 3 of 3 decades",
    ]


@pytest.mark.parametrize("name", ["frsgd", "adagrad-norm"])
@pytest.mark.parametrize("scale", ["gpu", "full"])
def test_larger_scales_say_what_they_would_take(name, scale, tmp_path):
    result = reproduce(name, scale=scale, out=tmp_path / "run")
    assert result.text().startswith("Nothing was run. This would be")
    assert json.loads((tmp_path / "run" / "results.json").read_text())["scale"] == scale
    assert set(paper(name).scales) == {"cpu", "gpu", "full"}


def test_a_true_run_of_every_entrant():
    """Every name and option exists."""
    torch.set_num_threads(1)
    for study in (frsgd.plan(), adagrad_norm.plan()):
        settings = {"wine": TrainConfig(data="wine", batch_size=64, steps=2)}
        small = replace(study, settings=settings, seeds=1)
        for cell in small.cells():
            for task in cell.ready([])[:2]:
                assert 0 <= run_task(small, task).accuracy <= 1
