"""The command line as a user meets it: exit codes, messages, help."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from conjugo import __version__
from conjugo.cli import COMMANDS, main
from conjugo.training import models, optimizers

QUICK = ["--data", "iris", "--model", "mlp", "--steps", "6", "--batch-size", "16"]


def call(capsys, *argv: str) -> tuple[int, str, str]:
    code = main(argv)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_without_a_command_it_says_which_there_are(capsys):
    code, out, _ = call(capsys)
    assert code == 0
    assert all(command in out for command in COMMANDS)


def test_version(capsys):
    assert call(capsys, "--version") == (0, f"conjugo {__version__}\n", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capsys, command):
    code, out, _ = call(capsys, command, "--help")
    assert code == 0
    assert f"usage: conjugo {command}" in out
    assert "(required)" not in out or command in ("report", "reproduce", "data", "ckpt", "spectrum", "bngd")


def test_the_help_of_train_names_every_optimizer_and_model(capsys):
    _, out, _ = call(capsys, "train", "--help")
    missing = {*optimizers.names(), *models.names()} - {word.strip("(),.:;") for word in out.split()}
    assert missing == {"resnet20v1", "resnet32v1"}  # in "resnet8v1, ..., resnet56v1"


def test_a_misspelt_command_or_option_suggests_the_nearest(capsys):
    code, _, err = call(capsys, "trian")
    assert (code, "did you mean 'train'?" in err) == (2, True)
    code, out, err = call(capsys, "train", "--epoch", "3")
    assert (code, "--epochs" in out + err) == (2, True)


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["train", "--optimizer", "nlgc"], 2, "did you mean 'nlcg'"),
        (["train", "--lr", "-1"], 2, "lr must be in [0, inf)"),
        (["train", "--batch-size", "2000"], 2, "at most 1437"),
        (["train", "--data", "mnist", "--data-root", "nowhere"], 1, "no data for 'mnist'"),
        (["train", "--config", "nowhere.yaml"], 1, "nowhere.yaml"),
        (["compare", "--preset", "demoo"], 2, "did you mean 'demo'"),
        (["compare", "--jobs", "0"], 2, "--jobs must be >= 1"),
        (["compare", "--resume"], 2, "--out"),
        (["compare", "--train.seed", "3"], 2, "train.seed must be 0: the comparison sets it"),
        (
            ["compare", "--train.batch-schedule", "2", "64"],
            2,
            "train.batch_schedule must be (): the comparison sets it",
        ),
        (["report", "nowhere"], 2, "nowhere"),
        (["report"], 2, "at least one"),
        (["data", "info", "cifar11"], 2, "did you mean 'cifar10'"),
        (["data", "fetch"], 2, "needs the name"),
        (["reproduce", "nlgc"], 2, "did you mean 'nlcg'"),
    ],
)
def test_what_goes_wrong_is_said_in_one_line(capsys, tmp_path, monkeypatch, argv, code, message):
    monkeypatch.chdir(tmp_path)
    actual, out, err = call(capsys, *argv)
    assert actual == code
    assert message in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1
    assert out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lr", "fast"], "--lr: it must be a number or null, got 'fast'"),
        (["--batch-size", "1.5"], "--batch-size: it must be an integer or 'full', got 1.5"),
        (["--steps", "["], "--steps: it must be an integer or null, got '['"),
        (["--batch-schedule", "8"], "--batch-schedule"),
        (["--batch-schedule", "8", "many"], "--batch-schedule"),
        (
            ["--batch-schedule", "8", "512", "4", "64"],
            "batch_schedule must be pairs of integers (epoch >= 1, batch >= 1)",
        ),
        (["--batch-schedule", "1", "2000"], "batch_schedule must be at most 1437"),
        (["--discard-small-loss", "1"], "discard_small_loss must be in [0, 1), got 1"),
        (["--schedule", "cosin"], "'cosine'"),
        (["--optimizer-options", "momentum"], "pairs of name and value"),
        (["--config"], "--config"),
    ],
)
def test_a_bad_value_is_named_with_its_option(capsys, argv, message):
    code, out, err = call(capsys, "train", *argv)
    assert code == 2
    assert message in " ".join(word for word in (out + err).split() if word != "│")


def test_running_out_of_memory_gives_advice(capsys, monkeypatch, tmp_path):
    def exhausted(*args, **kwargs):
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    monkeypatch.setattr("conjugo.cli.train.train", exhausted)
    code, _, err = call(capsys, "train", "--out", str(tmp_path))
    assert (code, "1 TiB" in err, "--micro-batch" in err) == (1, True, True)


def test_a_missing_extra_is_said_before_the_work(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = call(capsys, "compare", "--out", str(tmp_path / "cmp"))
    assert (code, "pip install 'conjugo[study]'" in err) == (1, True)
    assert not (tmp_path / "cmp").exists()


def test_a_reader_that_leaves_early_is_no_error():
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "conjugo", "data", "list"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 1
    process.stderr.close()


def test_debug_shows_the_traceback(monkeypatch):
    with pytest.raises(ValueError, match="nlcg"):
        main(["train", "--optimizer", "nlgc", "--debug"])
    monkeypatch.setenv("CONJUGO_DEBUG", "1")
    with pytest.raises(ValueError, match="nlcg"):
        main(["train", "--optimizer", "nlgc"])


# ---- train ----


def test_train_leaves_a_run_directory_and_resumes(capsys, tmp_path):
    out = str(tmp_path / "run")
    code, said, _ = call(capsys, "train", *QUICK, "--out", out)
    assert code == 0
    assert "test accuracy" in said
    assert out in said
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 6
    code, _, err = call(capsys, "train", *QUICK, "--out", out)
    assert (code, "holds a run already" in err) == (2, True)
    code, again, _ = call(capsys, "train", *QUICK, "--out", out, "--resume")
    assert (code, again.splitlines()[0]) == (0, said.splitlines()[0])


def test_train_makes_its_own_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(capsys, "train", *QUICK)[0] == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("iris-nlcg-")


def test_a_run_that_diverges_fails_with_a_message(capsys, tmp_path):
    argv = ["train", *QUICK, "--steps", "60", "--optimizer", "sgd", "--lr", "1e30", "--out", str(tmp_path / "run")]
    code, _, err = call(capsys, *argv)
    assert code == 1
    assert "not finite" in err or "finite" in err


def test_interrupted_training_tells_how_to_go_on_and_does(capsys, monkeypatch, tmp_path):
    words = "train --data digits --epochs 120 --evaluations 60 --checkpoints 0 --threads 1"
    command = [sys.executable, "-m", "conjugo", *words.split(), "--out", "run"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    recorded, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not (recorded.exists() and recorded.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"conjugo {words} --out run --resume" in err
    assert "Traceback" not in err
    monkeypatch.chdir(tmp_path)
    assert call(capsys, *words.split(), "--out", "run", "--resume")[0] == 0
    assert call(capsys, *words.split(), "--out", "whole")[0] == 0
    resumed, whole = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("run", "whole"))
    assert [resumed[name] for name in ("steps", "loss", "curve")] == [
        whole[name] for name in ("steps", "loss", "curve")
    ]


# ---- configuration files ----


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.yaml", "optimizer: momentum\nlr: 1e-1\nbatch_size: full\noptimizer_options: {momentum: 0.95}\n"),
        (
            "run.json",
            '{"optimizer": "momentum", "lr": 0.1, "batch_size": "full", "optimizer_options": {"momentum": 0.95}}',
        ),
        ("run.toml", 'optimizer = "momentum"\nlr = 0.1\nbatch_size = "full"\n[optimizer_options]\nmomentum = 0.95\n'),
    ],
)
def test_files_give_defaults_that_arguments_override(capsys, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    argv = ["train", "--config", str(tmp_path / name), "--print-config"]
    shown = yaml.safe_load(call(capsys, *argv)[1])
    assert (shown["optimizer"], shown["lr"], shown["batch_size"]) == ("momentum", 0.1, "full")
    assert shown["optimizer_options"] == {"momentum": 0.95}
    shown = yaml.safe_load(call(capsys, *argv, "--lr", "0.2", "--optimizer-options", "momentum", "0.5")[1])
    assert (shown["lr"], shown["optimizer_options"]) == (0.2, {"momentum": 0.5})


def test_numbers_among_optimizer_options(capsys, tmp_path):
    """YAML itself takes 1e-3 for a text."""
    (tmp_path / "run.yaml").write_text("optimizer: adamw\noptimizer_options: {eps: 1e-3, betas: [9e-1, 0.99]}")
    argv = ["train", "--config", str(tmp_path / "run.yaml"), "--print-config"]
    expected = {"eps": 0.001, "betas": [0.9, 0.99]}
    assert yaml.safe_load(call(capsys, *argv)[1])["optimizer_options"] == expected
    words = ["--optimizer-options", "eps", "1e-3", "betas", "[9e-1, 0.99]", "amsgrad", "true"]
    assert yaml.safe_load(call(capsys, *argv, *words)[1])["optimizer_options"] == {**expected, "amsgrad": True}


def test_a_batch_schedule_in_pairs(capsys, tmp_path):
    (tmp_path / "run.yaml").write_text("batch_size: 64\nbatch_schedule: [[8, 512]]")
    argv = ["train", "--config", str(tmp_path / "run.yaml"), "--print-config"]
    assert yaml.safe_load(call(capsys, *argv)[1])["batch_schedule"] == [[8, 512]]
    shown = yaml.safe_load(call(capsys, *argv, "--batch-schedule", "2", "128", "4", "256")[1])
    assert (shown["batch_size"], shown["batch_schedule"]) == (64, [[2, 128], [4, 256]])
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(shown))
    assert yaml.safe_load(call(capsys, "train", "--config", str(tmp_path / "all.yaml"), "--print-config")[1]) == shown


@pytest.mark.parametrize("value", ["None", "null"])
def test_no_value_can_be_asked_for(capsys, tmp_path, value):
    (tmp_path / "run.yaml").write_text("lr: 0.5\nmodel: cnn\nimage_size: 8")
    argv = ["train", "--config", str(tmp_path / "run.yaml"), "--print-config"]
    argv += [word for name in ("--lr", "--model", "--image-size") for word in (name, value)]
    shown = yaml.safe_load(call(capsys, *argv)[1])
    assert (shown["lr"], shown["model"], shown["image_size"]) == (None, None, None)


@pytest.mark.parametrize("command", ["train", "compare"])
def test_the_printed_configuration_can_be_fed_back(capsys, tmp_path, command):
    changed = ["--train.epochs", "3.5"] if command == "compare" else ["--epochs", "3.5"]
    _, text, _ = call(capsys, command, *changed, "--print-config")
    (tmp_path / "all.yaml").write_text(text)
    assert call(capsys, command, "--config", str(tmp_path / "all.yaml"), "--print-config") == (0, text, "")


@pytest.mark.parametrize(
    ("command", "text", "message"),
    [
        ("train", "optimzer: sgd", "unknown setting 'optimzer'; did you mean 'optimizer'"),
        ("train", "lr: fast", "lr must be a number or null, got 'fast'"),
        ("train", "steps: 1.5", "steps must be an integer or null, got 1.5"),
        ("train", "augment: 3", "augment must be true or false, got 3"),
        ("train", "lr: -1", "lr must be in [0, inf)"),
        ("train", "batch_schedule: [8, 512]", "batch_schedule[0] must be a list"),
        ("train", "batch_schedule: [[8, 512, 1]]", "batch_schedule must be pairs of integers"),
        ("train", "- 1", "settings expected"),
        ("train", "a: [", "cannot be understood"),
        ("train", "data: \xe9", "cannot be understood"),
        ("compare", "train: {epoch: 3}", "unknown setting 'train.epoch'; did you mean 'train.epochs'"),
        ("compare", "train: 3", "train must hold settings"),
        ("compare", "batch_sizes: [all]", "batch_sizes[0] must be an integer or 'full', got 'all'"),
    ],
)
def test_a_bad_file_is_named_with_the_setting(capsys, tmp_path, command, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="latin-1")
    code, _, err = call(capsys, command, "--config", str(path), "--print-config")
    assert code == 2
    assert str(path) in err
    assert message in err


def test_presets_can_be_overridden(capsys):
    argv = ["compare", "--preset", "demo", "--trials", "3", "--optimizers", "nlcg", "momentum", "--print-config"]
    shown = yaml.safe_load(call(capsys, *argv)[1])
    assert (shown["trials"], shown["optimizers"]) == (3, ["nlcg", "momentum"])
    assert shown["batch_sizes"] == [32, 128, 512, "full"]
    assert shown["train"]["data"] == "digits"


# ---- the other commands ----


def test_compare_and_report(capsys, tmp_path):
    out = str(tmp_path / "cmp")
    argv = ["compare", "--optimizers", "nlcg", "momentum", "--batch-sizes", "30", "full", "--train.data", "iris"]
    argv += ["--train.model", "mlp", "--train.epochs", "2", "--trials", "2", "--seeds", "2", "--out", out]
    code, said, err = call(capsys, *argv)
    assert (code, err) == (0, "")
    assert "report.html" in said
    assert "momentum" in said
    (tmp_path / "cmp" / "report.html").unlink()
    code, again, _ = call(capsys, "report", out)
    assert (code, again) == (0, said)
    assert (tmp_path / "cmp" / "report.html").exists()
    code, _, err = call(capsys, *argv)
    assert (code, "--resume" in err) == (2, True)
    assert call(capsys, *argv, "--resume")[:2] == (0, said)
    journal = tmp_path / "cmp" / "journal.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:-1]))
    code, unfinished, _ = call(capsys, "report", out)
    assert (code, unfinished == said) == (0, False)
    assert "report.html" in unfinished


def test_data(capsys, tmp_path):
    code, out, _ = call(capsys, "data", "info", "digits")
    assert code == 0
    assert "1,437 training and 360 test images of shape 1 x 8 x 8" in out
    assert call(capsys, "data", "verify", "iris")[0] == 0
    assert "cifar10" in call(capsys, "data", "list")[1]
    code, out, _ = call(capsys, "data", "info", "cifar10", "--root", str(tmp_path))
    assert (code, "conjugo data fetch cifar10" in out) == (1, True)


def test_doctor(capsys):
    code, out, _ = call(capsys, "doctor")
    assert code == 0
    assert "memory bandwidth" in out
    found = json.loads(call(capsys, "doctor", "--json")[1])
    assert found["findings"]["conjugo"] == __version__


def test_the_installed_command_and_the_module_are_the_same():
    script = os.path.join(os.path.dirname(sys.executable), "conjugo")
    for command in ([script], [sys.executable, "-m", "conjugo"]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout == f"conjugo {__version__}\n"


def test_importing_the_package_loads_nothing_heavy_but_torch():
    heavy = ("optuna", "matplotlib", "scipy", "sklearn", "pandas", "pyarrow", "tyro", "rich", "yaml", "PIL")
    code = (
        "import torch, sys; before = set(sys.modules); import conjugo\n"
        f"print([m for m in {heavy} if m in set(sys.modules) - before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
