"""conjugo advise as a user meets it: built-in data, scripts, files, the command that follows, messages."""

import json
import re
import shlex

import pytest

from conjugo.cli import main

QUICK = ["--max-examples", "40000", "--seconds", "600", "--device", "cpu"]
SCRIPT = """
import torch
def build():
    x = torch.randn(300, 5)
    model = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    return model, torch.nn.functional.cross_entropy, (x, x[:, :3].argmax(1))
def bare():
    return torch.nn.Linear(5, 6)
"""


def call(capsys, *argv):
    code = main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_that_is_advised_reaches_the_target(capsys, tmp_path):
    numbers, picture = tmp_path / "a" / "advice.json", tmp_path / "b" / "advice.png"
    target = 0.3
    code, out, _ = call(
        capsys,
        *("advise", "--data", "digits", "--model", "mlp", "--optimizer", "nlcg", "--target-loss", target),
        *("--out", numbers, "--plot", picture, "--workers", "1", *QUICK),
    )
    assert code == 0
    assert "Critical batch" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    saved = json.loads(numbers.read_text())
    command = shlex.split(out.strip().splitlines()[-1])
    assert command[:2] == ["conjugo", "train"]
    assert command[command.index("--batch-size") + 1] == str(saved["recommended_batch"])
    train = [*command[1:], "--evaluations", "1", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert main(train) == 0
    capsys.readouterr()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines if "accuracy" in line]
    assert records[-1]["accuracy"] > 0.8
    assert records[-1]["loss"] < 2 * target  # on test examples


def test_a_script_gives_model_loss_and_data(capsys, tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT)
    code, out, _ = call(capsys, "advise", f"{script}:build", "--optimizer", "sgd", "--mode", "fast", *QUICK)
    assert code == 0
    assert re.search(r"Take batches of \d+ with lr", out)
    assert "conjugo train" not in out
    again = call(capsys, "advise", script, "--optimizer", "sgd", "--mode", "fast", *QUICK)[1]
    assert re.findall(r"Critical batch.*", again) == re.findall(r"Critical batch.*", out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plot", "a.pdf"], "a name that ends in .png or .svg"),
        (["--out", "a.txt"], "a name that ends in .json"),
        (["--max-examples", "0"], "--max-examples must be >= 1"),
        (["--optimizer", "sdg"], "did you mean 'sgd'"),
        (["--data", "digist"], "did you mean 'digits'"),
        (["--model", "mpl"], "did you mean 'mlp'"),
        (["--efficiency", "2"], "efficiency must be in (0, 1)"),
        (["nothing.py:build"], "there is no script nothing.py"),
        (["nothing"], "script.py:function"),
    ],
)
def test_bad_calls_are_told(capsys, words, message):
    code, _, err = call(capsys, "advise", *words)
    assert code in (1, 2)
    assert message in " ".join(err.split())


def test_a_script_that_gives_something_else_is_told(capsys, tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT)
    code, _, err = call(capsys, "advise", f"{script}:bare")
    assert code == 2
    assert "(model, loss_fn, data)" in err
    code, _, err = call(capsys, "advise", f"{script}:build", "--data", "digits")
    assert code == 2
    assert "left out" in err
