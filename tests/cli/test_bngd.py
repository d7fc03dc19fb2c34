"""``conjugo bngd``: maps, data, layers; what it writes, and what it says when the call is wrong."""

import json

import numpy as np
import pytest
import torch

from conjugo.cli import main
from conjugo.scaling import bngd
from conjugo.studies import bngd as studies

SCRIPT = """
import torch
from torch import nn
def build():
    x = torch.randn(60, 4)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    return model, nn.functional.cross_entropy, (x, x[:, :3].argmax(1))
def model():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 10))
def without():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "mine.py").write_text(SCRIPT)


def call(capsys, *argv):
    code = main(["bngd", *argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_map(capsys, tmp_path):
    argv = ["--spectrum", "1,2,4", "--lr", "1e-3", "1e9", "--points", "5", "3", "--lr-a", "0.1", "1", "--steps", "300"]
    code, out, _ = call(capsys, "map", *argv, "--out", "a/m.npz", "--plot", "m.svg")
    assert code == 0
    assert "d = 3, condition number 4, effective" in out
    assert "15 pairs after 300 steps" in out
    assert "picture: m.svg" in out
    problem, start = studies.random_problem("1,2,4")
    expected = bngd.convergence_map(problem, np.logspace(-3, 9, 5), np.logspace(-1, 0, 3), 300, start)
    with np.load(tmp_path / "a" / "m.npz") as found:
        np.testing.assert_allclose(found["excess"], expected.excess)
        assert found["status"].tolist() == expected.status
        assert int(found["steps"]) == 300
    assert (tmp_path / "m.svg").read_text().startswith("<?xml")


def test_a_map_from_g_and_beyond_the_theorem(capsys):
    code, out, err = call(capsys, "map", "--spectrum", "linspace:1:3:4", "--start", "g", "--points", "3", "2", "--lr-a",
                          "1", "1.5", "--steps", "50")  # fmt: skip
    assert (code, err) == (0, "")
    assert "w0 parallel g" in out


def test_data(capsys, tmp_path):
    code, out, _ = call(capsys, "data", "diabetes", "--steps", "2000", "--out", "d.json")
    assert code == 0
    assert "condition number 470.1, effective 105.8" in out
    assert "972 at 0.99, 1,926 at 0.5 of that" in out
    content = json.loads((tmp_path / "d.json").read_text())
    assert content["gd"] == {"0.99": 972, "0.5": 1926, "0.1": None, "0.01": None}
    assert len(content["lrs"]) == len(content["bngd"]) == 61
    found = studies.summary(studies.least_squares("diabetes"), steps=2000)
    assert found.bngd == content["bngd"]
    lr, steps = found.best
    assert found.bngd[found.lrs.tolist().index(lr)] == steps == min(n for n in found.bngd if n is not None)
    low, high = found.range()
    near = found.range(2.0)
    assert low < near[0] < lr < near[1] < high


def test_a_table_of_ones_own(capsys, tmp_path):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((30, 3))
    text = "\n".join(",".join(f"{x:.6f}" for x in row) for row in rows)
    (tmp_path / "t.csv").write_text("a,b,y\n" + text + "\n")
    code, out, _ = call(capsys, "data", "t.csv", "--steps", "500")
    assert code == 0
    assert "d = 2, standardised" in out
    (tmp_path / "u.csv").write_text(text)
    assert pytest.approx(studies.least_squares("u.csv").S) == studies.least_squares("t.csv").S
    problem = studies.least_squares("t.csv")
    assert problem.c == pytest.approx(1.0)
    assert 0 < problem.S < 1


def test_nothing_converges(capsys):
    code, out, _ = call(capsys, "data", "breast_cancer", "--steps", "3")
    assert code == 0
    assert "steps to 1e-06 S: more than 3" in out
    assert "BNGD: more than 3 steps at all 61 learning rates" in out


def test_layers(capsys, tmp_path):
    argv = ["layers", "--model", "mine.py:build", "--lr", "0.1", "--dtype", "float64", "--out", "l.json"]
    code, out, _ = call(capsys, *argv)
    assert code == 0
    assert "0.weight" in out
    assert "3.weight" not in out
    content = json.loads((tmp_path / "l.json").read_text())
    (layer,) = content["layers"]
    assert layer["parameters"] == 20
    assert layer["edge"] == pytest.approx(0.05 * layer["lam_max"])
    assert layer["eff_lr"] == pytest.approx([0.1 / norm**2 for norm in layer["norms"]])
    assert layer["kappa_eff"] == pytest.approx(layer["lam_max"] / layer["lam_min_pos"])
    code, out, _ = call(capsys, "layers", "--model", "mine.py:model", "--data", "digits", "--examples", "100", "--matrix",
                        "ggn", "--layer", "1")  # fmt: skip
    assert code == 0
    assert "ggn of the layers before batch norm" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["data"], "needs the name of a data set"),
        (["data", "diabetis"], "did you mean 'diabetes'"),
        (["data", "nowhere.csv"], "nowhere.csv"),
        (["map", "diabetes"], "NAME must be left out for map"),
        (["layers"], "needs a --model"),
        (["map", "--model", "mine.py:build"], "--model must be left out for map"),
        (["map", "--lr", "1"], "--lr must be two numbers"),
        (["map", "--lr", "-1", "2"], "--lr must be > 0"),
        (["map", "--lr-a", "1", "0.1"], "--lr-a must be two numbers"),
        (["map", "--points", "0", "3"], "--points must be >= 1"),
        (["map", "--steps", "0"], "--steps must be >= 1"),
        (["map", "--out", "m.json"], "ends in .npz"),
        (["data", "diabetes", "--out", "m.npz"], "ends in .json"),
        (["data", "diabetes", "--plot", "m.png"], "--plot must be left out for data"),
        (["map", "--plot", "m.jpg"], "ends in .png or .svg"),
        (["map", "--spectrum", "geomspace:1:2:3"], "--spectrum must be logspace:LOW:HIGH:D"),
        (["map", "--spectrum", "logspace:1:2"], "--spectrum must be logspace:LOW:HIGH:D"),
        (["map", "--spectrum", "a,b"], "--spectrum must be logspace:LOW:HIGH:D"),
        (["map", "--spectrum", "1,-2"], "smallest eigenvalue of H"),
        (["layers", "--model", "mine.py:model"], "name a data set"),
        (["layers", "--model", "mine.py:without", "--data", "digits"], "layers before batch norm"),
        (["layers", "--model", "mine.py:build", "--layer", "7"], "unknown layer '7'"),
        (["layers", "--model", "other.py:build"], "no script other.py"),
    ],
)
def test_wrong_calls(capsys, tmp_path, argv, message):
    code, out, err = call(capsys, *argv)
    assert code in (1, 2)
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert out == ""
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["mine.py"]


@pytest.mark.parametrize("text", ["1,2\n", "1,2\n3\n4,5\n", "1\n2\n3\n", "a,b\n1,2\nx,3\n", ""])
def test_files_that_are_no_tables(tmp_path, text):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=r"t\.csv"):
        studies.least_squares("t.csv")


def test_equal_targets(tmp_path):
    (tmp_path / "t.csv").write_text("1,2\n2,2\n3,2\n")
    with pytest.raises(ValueError, match="at least two values"):
        studies.least_squares("t.csv")


def test_the_problem_of_a_spectrum():
    problem, start = studies.random_problem("linspace:2:8:4", seed=3)
    assert problem.spectrum().lam.tolist() == [2, 4, 6, 8]
    assert float(problem.u.norm()) == pytest.approx(1)
    assert float(start.norm()) == pytest.approx(1)
    assert abs(float(start @ problem.u)) < 0.999
    other, along = studies.random_problem("linspace:2:8:4", seed=3, start="g")
    torch.testing.assert_close(along, other.g / other.g.norm())
