"""reproduce tabular-cg: tables, solvers on one objective, resuming, verdicts."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from conjugo.errors import CorruptFile, DataUnavailable, UnknownName
from conjugo.studies.reproduce import reproduce, tabular_cg, tabular_problems, tabular_tables
from conjugo.studies.reproduce.paper import Request
from conjugo.studies.reproduce.tabular_cg import EXPECTED, Fold, TabularPlan, TabularResult, experiment, judged
from conjugo.studies.reproduce.tabular_solvers import SOLVERS, Problem, Settings, evaluations_to

RNG = np.random.default_rng(8)
INPUTS = RNG.normal(size=(60, 4))
PROBLEM = Problem(INPUTS, (INPUTS @ [1.0, -1.0, 0.5, 0.0] + RNG.normal(size=60) > 0).astype(np.intp), 3, 0.05)
FEW = TabularPlan(problems=("logistic",), tables=("breast_cancer",), alphas=(0.01,), folds=2, starts=2)


def shown(result):
    console = Console(width=220, file=io.StringIO())
    for table in result.tables():
        console.print(table)
    return console.file.getvalue()


# ---- tables ----


def write_german(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def test_german_credit_is_read_with_a_column_for_each_category(tmp_path, monkeypatch):
    write_german(tmp_path / "tabular" / "german.csv", "A11,6,A34,1169,1\nA12,48,A32,5951,2\nA14,12,A34,2096,1\n")
    monkeypatch.setenv("CONJUGO_DATA", str(tmp_path))
    table = tabular_tables.load("german")
    assert table.inputs.tolist() == [
        [1, 0, 0, 6, 0, 1, 1169],
        [0, 1, 0, 48, 1, 0, 5951],
        [0, 0, 1, 12, 0, 1, 2096],
    ]
    assert table.bad.tolist() == [0, 1, 0]


@pytest.mark.parametrize("text", ["", "A11,6,1\nA12,7\n", "A11,six,1\n", "A11,6,3\n", "A11,6,1\n"])
def test_a_table_that_is_not_german_credit_is_refused(text, tmp_path):
    write_german(tmp_path / "tabular" / "german.csv", text)
    with pytest.raises(CorruptFile, match=r"german\.csv: not the German credit table"):
        tabular_tables.read_german(tmp_path / "tabular" / "german.csv")


def test_absent_data_and_unknown_tables(tmp_path, monkeypatch):
    monkeypatch.delenv("CONJUGO_DATA", raising=False)
    with pytest.raises(DataUnavailable, match="CONJUGO_DATA is not set"):
        tabular_tables.load("german")
    monkeypatch.setenv("CONJUGO_DATA", str(tmp_path))
    with pytest.raises(DataUnavailable, match=r"german\.csv is not there"):
        tabular_tables.load("german")
    with pytest.raises(UnknownName, match="did you mean 'german'"):
        tabular_tables.load("germany")


def test_bundled_tables():
    assert tabular_tables.load("breast_cancer").bad.sum() == 212  # malignant
    made = tabular_tables.load("made")
    assert made.inputs.shape == (1000, 20)
    assert 0.25 < made.bad.mean() < 0.35


# ---- solvers ----


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_minimises_the_same_objective(name):
    starts = PROBLEM.starts(3)
    solution = SOLVERS[name](Settings(tol=1e-6))(PROBLEM, starts)
    values, gradients = PROBLEM.objective()(solution.parameters)
    np.testing.assert_array_equal(solution.losses, values)
    np.testing.assert_allclose(solution.gradients, np.abs(gradients).max(1), rtol=1e-12)
    assert (solution.gradients < (1e-2 if name == "adam" else 1e-4)).all()
    # With this penalty all starts come to one minimum, up to the order and the signs of units.
    best = SOLVERS["lbfgs"](Settings(tol=1e-8))(PROBLEM, starts).losses.min()
    assert solution.losses.min() == pytest.approx(best, rel=1e-3 if name == "adam" else 1e-6)
    assert np.isnan(solution.evaluations).all() if name == "mlp" else (solution.evaluations > 5).all()


def test_the_race_to_a_loss():
    (start,) = PROBLEM.starts(1)
    first = PROBLEM.objective()(start[None])[0][0]
    assert evaluations_to(PROBLEM, start, first, Settings()) == 1
    solution = SOLVERS["powell-beale"](Settings())(PROBLEM, start[None])
    assert 5 < evaluations_to(PROBLEM, start, solution.losses[0] + 1e-6, Settings()) <= solution.evaluations[0]
    assert np.isnan(evaluations_to(PROBLEM, start, 0.0, Settings()))


def test_rosenbrock():
    point = RNG.normal(size=(2, 5))
    values, gradients = tabular_problems.rosenbrock(point)
    from scipy.optimize import rosen, rosen_der

    np.testing.assert_allclose(values, [rosen(x) for x in point], rtol=1e-13)
    np.testing.assert_allclose(gradients, [rosen_der(x) for x in point], rtol=1e-12)


def test_counts_are_at_most_those_expected():
    counts = tabular_problems.count("logistic", Settings())
    for method, expected in EXPECTED["logistic"].items():
        if method in tabular_cg.CONJUGATE:
            assert 10 < counts[method] < 1.25 * expected, method
        else:
            assert counts[method] == pytest.approx(expected, rel=0.1), method


def test_figures_of_decisions():
    bad = np.array([1, 1, 0, 0, 0])
    figures = judged(np.array([2.0, -1.0, -3.0, 1.0, -3.0]), bad)
    assert figures["auc"] == pytest.approx(5 / 6)
    assert figures["accuracy"] == pytest.approx(3 / 5)
    assert figures["recall"] == pytest.approx(1 / 2)
    assert figures["cost"] == pytest.approx(1 / 5)  # above -log 5 are both bad ones, and one good one
    assert judged(np.array([-9.0, -9.0, -9.0, -9.0, -9.0]), bad)["cost"] == pytest.approx(2 * 5 / 5)


# ---- the experiment ----


def test_really(tmp_path):
    plan = replace(FEW, settings=Settings(adam_steps=60))
    result = experiment(Request(out=tmp_path), plan)
    assert set(result.folds) == {("breast_cancer", 0.01, solver) for solver in SOLVERS}
    assert min(result.values("breast_cancer", 0.01, "powell-beale", "auc")) > 0.97
    assert max(result.values("breast_cancer", 0.01, "powell-beale", "gradient")) <= 1e-5
    text = shown(result)
    assert "MLPClassifier" in text
    assert "(178)" in text
    assert {path.name for path in tmp_path.iterdir()} == {
        *("config.json", "cells.json", "results.json"),
        *(f"{name}.{kind}" for name in ("evaluations", "training") for kind in ("png", "svg")),
    }
    assert json.loads((tmp_path / "results.json").read_text())["claims"][2]["verdict"] == "reproduced"


def pretend(plan, table, alpha, solver):
    evaluations = {"mlp": None, "adam": 500.0}.get(solver, 100.0)
    return [
        Fold(
            auc=0.9 + 0.001 * i + (0.005 if solver == "scg" else 0.0),
            accuracy=0.75,
            recall=0.5,
            cost=0.6,
            loss=0.1,
            gradient=1e-3 if solver == "adam" else 1e-6,
            evaluations=evaluations,
            seconds=0.1,
            speedup=3.0 if solver == "adam" else None,
        )
        for i in range(plan.folds)
    ]


@pytest.fixture
def quick(monkeypatch):
    """Spares the counting and the drawing."""
    monkeypatch.setattr(tabular_cg, "count", lambda name, settings: dict(EXPECTED[name]))
    monkeypatch.setattr(tabular_cg, "trace", lambda hidden, settings: {"fr": [(1, 0.5), (3, 0.2)]})
    save = tabular_cg.save
    monkeypatch.setattr(tabular_cg, "save", lambda content, figures, out: save(content, {}, out))


PLAN = replace(FEW, tables=("breast_cancer", "german"), alphas=(0.01, 0.1), problems=tuple(EXPECTED))


@pytest.mark.usefixtures("quick")
def test_an_interrupted_experiment_resumes_to_the_same_result(tmp_path, monkeypatch):
    monkeypatch.delenv("CONJUGO_DATA", raising=False)
    whole = experiment(Request(), PLAN, run=pretend)
    left = iter(range(5))

    def interrupted(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return pretend(*arguments)

    with pytest.raises(KeyboardInterrupt):
        experiment(Request(out=tmp_path), PLAN, run=interrupted)
    asked = []

    def counted(plan, table, alpha, solver):
        asked.append((table.name, alpha, solver))
        return pretend(plan, table, alpha, solver)

    resumed = experiment(Request(out=tmp_path, resume=True), PLAN, run=counted)
    assert resumed == whole
    assert len(asked) == len(whole.folds) - 5
    with pytest.raises(ValueError, match=r"holds another experiment: .*starts"):
        experiment(Request(out=tmp_path, resume=True), replace(PLAN, starts=3), run=pretend)
    (tmp_path / "cells.json").write_text('{"counts"')
    with pytest.raises(CorruptFile, match=r"cells\.json: damaged"):
        experiment(Request(out=tmp_path, resume=True), PLAN, run=pretend)


@pytest.mark.usefixtures("quick")
def test_verdicts(monkeypatch):
    monkeypatch.delenv("CONJUGO_DATA", raising=False)
    result = experiment(Request(), PLAN, run=pretend)
    counts, saved, close, faster, german = result.claims()
    assert [claim.verdict for claim in (counts, saved, close, faster)] == ["reproduced"] * 4
    assert german.verdict == "not judged"
    assert close.cases["breast_cancer, α 0.01"] == (True, "0.5 points between 6 solvers")  # Adam did not converge
    assert "Left out: German credit is not bundled" in result.text()
    assert "Adam, 500 steps" in shown(result)


@pytest.mark.usefixtures("quick")
def test_worse_is_not_reproduced():
    result = experiment(Request(), replace(PLAN, tables=("breast_cancer",)), run=pretend)
    slow = {
        name: {method: 2 * n if method != "scipy-cg" else n for method, n in row.items()}
        for name, row in EXPECTED.items()
    }
    folds = {
        cell: [replace(fold, auc=fold.auc + (0.05 if cell[2] == "fr" else 0), speedup=1.5) for fold in done]
        for cell, done in result.folds.items()
    }
    worse = replace(result, counts=slow, folds=folds)
    assert {claim.verdict for claim in worse.claims()} == {"not reproduced", "not judged"}
    none = replace(result, counts={"digits": {**EXPECTED["digits"], "scg": None}})
    assert none.claims()[0].verdict == "not reproduced"
    assert "–" in shown(none)


def test_accuracy_on_german_credit_is_judged():
    folds = {("german", 0.01, solver): pretend(FEW, None, 0.01, solver) for solver in SOLVERS}
    result = TabularResult(replace(FEW, tables=("german",)), {}, {}, folds, ())
    assert result.claims()[-1].cases == {"α 0.01": (True, "75.0 %")}


def test_other_scales_say_why_they_are_pointless(tmp_path):
    for scale in ("gpu", "full"):
        result = reproduce("tabular-cg", scale=scale, out=tmp_path / scale)
        assert "pointless" in result.text()
        assert not result.tables()
        assert json.loads((tmp_path / scale / "results.json").read_text())["scale"] == scale
    with pytest.raises(ValueError, match="jobs must be 1 for 'tabular-cg'"):
        reproduce("tabular-cg", jobs=2)
