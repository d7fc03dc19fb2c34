"""conjugo spectrum as a user meets it: runs, scripts, files, messages, resuming, several workers."""

import json
import os
import subprocess
import sys

import pytest
import torch

from conjugo.cli import main
from conjugo.studies import spectrum
from conjugo.training.spectrum import Spectrum

QUICK = ["--probes", "2", "--steps", "12", "--device", "cpu"]
SCRIPT = """
import torch
def build():
    x = torch.randn(40, 5)
    model = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    return model, torch.nn.functional.cross_entropy, (x, x[:, :3].argmax(1))
def batches():
    model, loss, (x, y) = build()
    return model, loss, [(x[:30], y[:30]), (x[30:], y[30:])]
def bare():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
def wrong():
    return 3, 4
"""


def call(capsys, *argv):
    code = main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with two checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / "iris"
    argv = ["train", "--data", "iris", "--model", "mlp", "--optimizer", "momentum", "--lr", "0.1", "--device", "cpu"]
    more = ["--steps", "10", "--batch-size", "16", "--checkpoints", "2", "--keep", "2", "--evaluations", "2"]
    assert main([*argv, *more, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SCRIPT)
    return path


def numbers(path):
    """Everything but the time it took."""
    content = json.loads(path.read_text())
    del content["about"]["seconds"]
    return content


def test_of_a_run_there_are_numbers_a_picture_and_a_summary(capsys, tmp_path, trained):
    out = tmp_path / "deep" / "s.json"
    code, said, err = call(capsys, "spectrum", trained, *QUICK, "--out", out)
    assert (code, err) == (0, "")
    for words in (
        "Hessian of mlp on iris, step 10",
        "training examples",
        "λ1 / λ3",
        "negative mass",
        "deflated",
        str(out),
    ):
        assert words in said
    found = Spectrum.load(out)
    assert found.about["step"] == 10
    assert len(found.eigenvalues) == 3  # as many as classes
    assert len(found.density.nodes) == 2
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.parent.glob("*.partial"))


def test_the_weights_are_those_of_the_step(capsys, tmp_path, trained):
    losses = []
    for step in (0, 5, 10):
        assert call(capsys, "spectrum", trained, *QUICK, "--step", step, "--out", tmp_path / f"{step}.json")[0] == 0
        losses.append(Spectrum.load(tmp_path / f"{step}.json").loss)
    assert losses[0] == pytest.approx(1.1, abs=0.25)  # three classes, nothing learnt
    assert losses[0] > losses[1] > losses[2]


def test_all_checkpoints_have_one_picture_and_an_animation(capsys, tmp_path, trained):
    from PIL import Image

    out = tmp_path / "all"
    argv = ["spectrum", trained, *QUICK, "--all", "--out", out, "--plot", tmp_path / "all.svg"]
    code, said, _ = call(capsys, *argv, "--animation", tmp_path / "all.gif")
    assert code == 0
    assert sorted(path.name for path in out.iterdir()) == [f"hessian-step-{step}.json" for step in (0, 10, 5)]
    assert all(f"\n{step}" in said for step in (0, 5, 10))
    assert (tmp_path / "all.svg").read_text().count("epoch") >= 3
    with Image.open(tmp_path / "all.gif") as picture:
        assert picture.n_frames == 3


@pytest.mark.parametrize("matrix", ["hessian", "ggn", "fisher", "empirical-fisher", "gradient-covariance"])
def test_every_matrix(capsys, tmp_path, script, matrix):
    out = tmp_path / "s.json"
    argv = [
        "spectrum",
        f"{script}:build",
        "--matrix",
        matrix,
        "--batch",
        "8",
        "--dtype",
        "float64",
        *QUICK,
        "--out",
        out,
    ]
    assert call(capsys, *argv)[0] == 0
    found = Spectrum.load(out)
    assert found.about["matrix"] == matrix
    assert found.about["dtype"] == "float64"
    assert (found.density.lmin < -1e-4) == (matrix == "hessian")  # the others are positive semidefinite


def test_a_script_is_measured_exactly(capsys, tmp_path, script, monkeypatch):
    """With as many steps as parameters all eigenvalues come out, those of the dense Hessian."""
    monkeypatch.chdir(tmp_path)
    assert call(capsys, "spectrum", f"{script}:build", "--steps", "57", "--dtype", "float64", "--device", "cpu")[0] == 0
    found = Spectrum.load(tmp_path / "spectrum.json")
    namespace = {}
    exec(SCRIPT, namespace)
    torch.manual_seed(0)
    model, loss, (x, y) = namespace["build"]()
    values = dict(model.double().named_parameters())
    flat = torch.cat([p.detach().reshape(-1) for p in values.values()])

    def of(vector):
        parts = vector.split([p.numel() for p in values.values()])
        named = {name: part.view_as(p) for (name, p), part in zip(values.items(), parts)}
        return loss(torch.func.functional_call(model, named, (x.double(),)), y)

    exact = torch.linalg.eigvalsh(torch.autograd.functional.hessian(of, flat))
    assert torch.allclose(found.density.eigenvalues.flip(0), exact, atol=1e-10)
    assert found.loss == pytest.approx(float(of(flat)), rel=1e-12)


def test_batches_of_a_script_give_the_same_as_tensors(capsys, tmp_path, script):
    for name in ("build", "batches"):
        argv = ["spectrum", f"{script}:{name}", "--dtype", "float64", *QUICK, "--out", tmp_path / f"{name}.json"]
        assert call(capsys, *argv)[0] == 0
    whole, cut = (Spectrum.load(tmp_path / f"{name}.json") for name in ("build", "batches"))
    assert cut.eigenvalues == pytest.approx(whole.eigenvalues, rel=1e-9)
    assert cut.about["examples"] == whole.about["examples"] == 40


def test_a_model_alone_on_a_data_set(capsys, tmp_path, script):
    argv = ["spectrum", f"{script}:bare", "--data", "digits", "--examples", "100", *QUICK, "--out", tmp_path / "s.json"]
    code, said, _ = call(capsys, *argv)
    assert code == 0
    assert "100 training examples" in said
    assert "650 parameters" in said


def test_a_part_of_the_parameters(capsys, tmp_path, script):
    argv = ["spectrum", f"{script}:build", "--params", r"^2\.", *QUICK, "--out", tmp_path / "s.json"]
    code, said, _ = call(capsys, *argv)
    assert (code, "21 parameters (those named ^2\\.)" in said) == (0, True)


class Killed(Exception):
    """Stands in for the end of the process."""


def test_a_killed_command_goes_on_and_ends_with_the_same_bits(capsys, tmp_path, script, monkeypatch):
    argv = ["spectrum", f"{script}:build", "--probes", "3", "--steps", "12", "--device", "cpu", "--out"]
    assert call(capsys, *argv, tmp_path / "whole.json")[0] == 0
    real = spectrum.measure
    done = []

    def dying(op, *, callback, **options):
        def count(products, planned):
            done.append(products)
            if products > 24:
                raise Killed

        return real(op, callback=count, **options)

    with monkeypatch.context() as patch:
        patch.setattr(spectrum, "measure", dying)
        with pytest.raises(Killed):
            main([*argv, str(tmp_path / "killed.json")])
    assert not (tmp_path / "killed.json").exists()
    assert list(tmp_path.glob("killed.json.*.partial"))
    resumed = []

    def counting(op, *, callback, **options):
        return real(op, callback=lambda products, planned: resumed.append(products), **options)

    monkeypatch.setattr(spectrum, "measure", counting)
    torch.manual_seed(99)
    assert call(capsys, *argv, tmp_path / "killed.json")[0] == 0
    assert numbers(tmp_path / "killed.json") == numbers(tmp_path / "whole.json")
    assert min(resumed) > 12  # the first probe was not done again
    assert not list(tmp_path.glob("*.partial"))


def test_what_is_measured_already_is_read_and_other_settings_are_measured(capsys, tmp_path, script, monkeypatch):
    argv = ["spectrum", f"{script}:build", *QUICK, "--out", str(tmp_path / "s.json")]
    assert call(capsys, *argv)[0] == 0
    before = (tmp_path / "s.json").read_bytes()
    real, calls = spectrum.measure, []
    monkeypatch.setattr(spectrum, "measure", lambda op, **options: calls.append(1) or real(op, **options))
    assert call(capsys, *argv)[0] == 0
    assert (calls, (tmp_path / "s.json").read_bytes()) == ([], before)
    assert call(capsys, *argv, "--seed", "1")[0] == 0
    assert calls == [1]


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["nowhere"], 1, "there is no run directory nowhere"),
        (["nowhere.py:build"], 1, "there is no script nowhere.py"),
        (["."], 1, "no run directory of conjugo train: it has no config.json"),
        (["mine.py:biuld"], 2, "did you mean 'build'"),
        (["mine.py:bare"], 2, "name a data set, such as --data digits"),
        (["mine.py:wrong"], 2, "must give a model, or (model, loss_fn, data), got (int, int)"),
        (["mine.py:build", "--data", "iris"], 2, "--data must be left out"),
        (["mine.py:build", "--split", "test"], 2, "--split must be left out"),
        (["mine.py:batches", "--examples", "3"], 2, "--examples must be left out"),
        (["mine.py:build", "--params", "nothing"], 2, "nothing"),
        (["mine.py:build", "--probes", "0"], 2, "probes must be an integer >= 1"),
        (["mine.py:build", "--examples", "0"], 2, "examples must be an integer >= 1"),
        (["mine.py:build", "--plot", "x.pdf"], 2, ".png or .svg"),
        (["mine.py:build", "--all"], 2, "used with a run directory"),
        (["mine.py:build", "--step", "3"], 2, "used with a run directory"),
    ],
)
def test_what_goes_wrong_is_said_in_one_line(capsys, tmp_path, script, monkeypatch, argv, code, message):
    monkeypatch.chdir(tmp_path)
    actual, out, err = call(capsys, "spectrum", *argv)
    assert message in err
    assert (actual, out, len(err.strip().splitlines())) == (code, "", 1)
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["mine.py"]


def test_an_unknown_checkpoint_and_a_run_of_something_else(capsys, tmp_path, trained):
    code, _, err = call(capsys, "spectrum", trained, "--step", "7")
    assert (code, "one of [0, 5, 10]" in err) == (2, True)
    (tmp_path / "config.json").write_text('{"optimizers": ["sgd"]}')
    code, _, err = call(capsys, "spectrum", tmp_path)
    assert (code, "is not that of a training run" in err) == (1, True)


def test_several_workers_share_the_data_and_find_the_same(capsys, tmp_path, script):
    argv = ["spectrum", f"{script}:build", "--dtype", "float64", *QUICK, "--out"]
    assert call(capsys, *argv, tmp_path / "one.json")[0] == 0
    launched = [sys.executable, "-m", "conjugo", "launch", "--nproc", "2", "--max-restarts", "0", "-m", "conjugo"]
    command = [*launched, *map(str, argv), str(tmp_path / "two.json")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("effective rank") == 1  # rank 0 alone speaks
    one, two = (Spectrum.load(tmp_path / f"{name}.json") for name in ("one", "two"))
    assert two.about["workers"] == 2
    assert two.loss == pytest.approx(one.loss, rel=1e-12)
    assert two.eigenvalues == pytest.approx(one.eigenvalues, rel=1e-9)
    assert two.density.wasserstein(one.density) < 1e-9
