"""Records: JSON lines that are whole at any moment, TensorBoard when it is there, a bar only for terminals."""

import json
import os
import sys
import types
from dataclasses import replace

import pytest

from conjugo.training import TrainConfig, Trainer, data, train
from conjugo.training.metrics import Display, JsonLines, TensorBoard, read_metrics

RECORD = {"step": 3, "loss": None, "train_loss": 0.5, "accuracy": 0.25, "images_per_second": 1234.5}


def test_json_lines(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.write([])
    assert read_metrics(lines.path) == []
    lines.write([RECORD, {**RECORD, "step": 4}])
    assert [record["step"] for record in read_metrics(lines.path)] == [3, 4]
    assert read_metrics(lines.path)[0] == RECORD


def test_json_lines_survive_a_full_disk(tmp_path, monkeypatch):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.write([RECORD])

    def full(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.warns(UserWarning, match="could not be written: No space left"):
            lines.write([RECORD, {**RECORD, "step": 4}])
    assert len(read_metrics(lines.path)) == 1
    lines.write([RECORD, {**RECORD, "step": 4}, {**RECORD, "step": 5}])
    assert len(read_metrics(lines.path)) == 3


def test_records_of_a_run(tmp_path):
    config = TrainConfig(optimizer="nlcg", lr=0.2, batch_size=256, steps=8, evaluations=4, threads=1)
    result = train(config, out=tmp_path / "run")
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records] == [2, 4, 6, 8]
    assert [record["samples"] for record in records] == [512, 1024, 1536, 2048]
    assert records[-1]["epoch"] == pytest.approx(2048 / 1437)
    assert tuple((record["step"], record["accuracy"]) for record in records) == result.curve
    assert records[-1]["lr"] == pytest.approx(0.2 * 0.01)
    assert all(0 <= record["beta"] <= 1 for record in records)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["loss"] == result.loss == records[-1]["loss"]


def test_the_training_loss_is_the_mean_since_the_last_evaluation():
    config = TrainConfig(optimizer="sgd", batch_size=300, steps=6, threads=1)
    losses = train_losses(config, evaluations=6)
    halves = train_losses(config, evaluations=2)
    assert halves == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 3], rel=1e-5)


def train_losses(config: TrainConfig, *, evaluations: int) -> list[float]:
    trainer = Trainer(replace(config, evaluations=evaluations), data.load("digits"))
    trainer.fit()
    return [record["train_loss"] for record in trainer.history]


def test_tensorboard_absent(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'conjugo\[tensorboard\]'"):
        TensorBoard(tmp_path, after=0)


def test_tensorboard_present(tmp_path, monkeypatch):
    calls = []

    class Writer:
        def __init__(self, folder, purge_step):
            calls.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        def flush(self):
            calls.append("flush")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    config = TrainConfig(optimizer="sgd", batch_size="full", steps=2, evaluations=2, tensorboard=True, threads=1)
    result = train(config, out=tmp_path / "run")
    assert calls[0] == (str(tmp_path / "run" / "tensorboard"), 1)
    assert ("accuracy", result.accuracy, 2) in calls
    assert {call[2] for call in calls if len(call) == 3} == {1, 2}
    assert calls[-1] == "flush"


def test_the_bar_is_silent_unless_standard_error_is_a_terminal(capsys):
    with Display(10) as display:
        display.at(3)
        display.evaluated(RECORD)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_the_bar_shows_steps_loss_accuracy_and_speed(capsys):
    with Display(10, done=1, show=True) as display:
        display.at(3)
        display.evaluated(RECORD)
    captured = capsys.readouterr()
    assert captured.out == ""
    for part in ("3/10", "loss 0.5000", "accuracy 25.00%", "1,234 images/s", "left"):
        assert part in captured.err
