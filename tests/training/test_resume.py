"""A run that was interrupted, killed or damaged ends like the one that was not: the same bits."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tests.training.small_data import images, table
from tests.training.test_trainer import equal, weights, with_nan

from conjugo.distributed import Checkpointer, export_step
from conjugo.errors import CorruptFile, TrainingDiverged
from conjugo.training import TrainConfig, Trainer, train
from conjugo.training.metrics import read_metrics
from conjugo.training.run import RunDirectory

TABLE = TrainConfig(optimizer="nlcg", lr=0.2, batch_size=20, steps=30, evaluations=6, checkpoints=5, threads=1)
IMAGES = replace(TABLE, model="cnn", steps=12, evaluations=3, checkpoints=3)

RUNS = {
    "nlcg": TABLE,
    "nlcg-step": replace(TABLE, optimizer="nlcg-step"),
    "nlcg with micro-batches and decay groups": replace(
        TABLE, micro_batch=7, weight_decay=0.01, decay_norm_and_bias=False, optimizer_options={"lars": 0.001}
    ),
    "momentum with average": replace(TABLE, optimizer="momentum", ema=0.9),
    "adamw with clipping": replace(TABLE, optimizer="adamw", clip_norm=1.0, schedule="cosine"),
    "rmsprop": replace(TABLE, optimizer="rmsprop", schedule="constant"),
    "lars": replace(TABLE, optimizer="lars", lr=10.0),
    "lamb": replace(TABLE, optimizer="lamb"),
    "nlcg-hutchinson": replace(TABLE, optimizer="nlcg-hutchinson"),
    "nlcg-gauss-newton with micro-batches": replace(TABLE, optimizer="nlcg-gauss-newton", micro_batch=7),
    "images, nlcg-gauss-newton": replace(IMAGES, optimizer="nlcg-gauss-newton"),
    "nlcg-kron with micro-batches": replace(TABLE, optimizer="nlcg-kron", micro_batch=7),
    "images, nlcg-orthogonal": replace(IMAGES, optimizer="nlcg-orthogonal"),
    "parabola with micro-batches": replace(
        TABLE, optimizer="nlcg-orthogonal", lr=1.0, optimizer_options={"line_search": "parabola"}, micro_batch=7
    ),
    "images, subspace": replace(
        IMAGES, optimizer="nlcg-orthogonal", lr=1.0, optimizer_options={"line_search": "subspace"}
    ),
    "images in bfloat16": replace(IMAGES, precision="bfloat16", ema=0.9),
    "images, momentum": replace(IMAGES, optimizer="momentum", micro_batch=8),
}


def interrupt_after(monkeypatch, step: int) -> None:
    """Ctrl-C while *step* is being done."""
    train_step = Trainer.train_step

    def interrupted(self):
        train_step(self)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "train_step", interrupted)


def numbers(records: list[dict]) -> list[dict]:
    """Without what depends on the clock."""
    return [{k: v for k, v in record.items() if k not in ("seconds", "images_per_second")} for record in records]


def assert_same(result, expected) -> None:
    assert equal(result.model.state_dict().values(), expected.model.state_dict().values())
    for name in ("steps", "samples", "train_loss", "loss", "accuracy", "curve", "skipped_steps"):
        assert getattr(result, name) == getattr(expected, name)


@pytest.mark.filterwarnings("ignore:batch norm sees 6 examples")
@pytest.mark.parametrize("name", RUNS)
def test_after_ctrl_c_the_run_goes_on_bit_for_bit(name, tmp_path, monkeypatch):
    config = RUNS[name]
    data = images() if config.model == "cnn" else table()
    expected = train(config, data=data, out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, config.steps // 2 + 2)  # between two checkpoints and two evaluations
        with pytest.raises(KeyboardInterrupt):
            train(config, data=data, out=tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()
    torch.manual_seed(99)  # whatever the new process has done
    assert_same(train(config, data=data, out=tmp_path / "run", resume=True), expected)
    whole, resumed = (read_metrics(tmp_path / folder / "metrics.jsonl") for folder in ("whole", "run"))
    assert numbers(resumed) == numbers(whole)
    assert (tmp_path / "run" / "result.json").exists()


def test_dropout_goes_on_where_it_was(tmp_path):
    first = Trainer(TABLE, table())
    first.train_step()
    assert Checkpointer(tmp_path).save(1, **first.stateful())
    expected = torch.rand(5)
    second = Trainer(TABLE, table())
    assert Checkpointer(tmp_path).load_latest(**second.stateful()) == 1
    assert torch.equal(torch.rand(5), expected)


def test_ctrl_c_writes_a_checkpoint_of_that_step_and_is_handed_on(tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    interrupt_after(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        train(replace(TABLE, checkpoints=0), data=table(), out=tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000007"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_interrupts_at_once(tmp_path, monkeypatch):
    train_step = Trainer.train_step

    def impatient(self):
        train_step(self)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    monkeypatch.setattr(Trainer, "train_step", impatient)
    with pytest.raises(KeyboardInterrupt):
        train(TABLE, data=table(), out=tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


KILLED = """
import sys, pathlib, time
from conjugo.training import Trainer, TrainConfig, train
step = Trainer.train_step
Trainer.train_step = lambda self: (step(self), time.sleep(0.01))  # leave time to be killed in
train(TrainConfig.from_dict({config}), out=pathlib.Path(sys.argv[1]))
"""


def test_after_kill_9_the_run_goes_on_bit_for_bit(tmp_path):
    config = TrainConfig(optimizer="nlcg", batch_size=300, steps=200, checkpoints=50, ema=0.9, threads=1)
    expected = train(config)
    out = tmp_path / "run"
    code = KILLED.format(config=config.to_dict())
    with subprocess.Popen([sys.executable, "-c", code, str(out)], stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while len(list(out.glob("checkpoints/step-*"))) < 2 and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.01)
        process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (out / "result.json").exists()
    assert_same(train(config, out=out, resume=True), expected)
    steps = [record["step"] for record in read_metrics(out / "metrics.jsonl")]
    assert steps == [step for step, _ in expected.curve]
    assert not list(out.rglob("*.tmp"))


def test_a_damaged_newest_checkpoint_costs_only_time(tmp_path, monkeypatch):
    data, out = table(), tmp_path / "run"
    expected = train(TABLE, data=data)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 20)
        with pytest.raises(KeyboardInterrupt):
            train(TABLE, data=data, out=out)
    newest = max((out / "checkpoints").iterdir()) / "__0_0.distcp"
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="damaged.*going back to step 18"):
        assert_same(train(TABLE, data=data, out=out, resume=True), expected)
    records = read_metrics(out / "metrics.jsonl")
    assert [record["step"] for record in records] == [5, 10, 15, 20, 25, 30]


def test_no_readable_checkpoint_is_an_error(tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 20)
        with pytest.raises(KeyboardInterrupt):
            train(TABLE, data=table(), out=out)
    for path in (out / "checkpoints").glob("*/.metadata"):
        path.write_bytes(b"junk")
    with pytest.raises(CorruptFile, match="no checkpoint can be read"):
        train(TABLE, data=table(), out=out, resume=True)


def test_another_configuration_is_refused_by_name(tmp_path):
    out = tmp_path / "run"
    train(TABLE, data=table(), out=out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    other = replace(TABLE, lr=0.3, batch_size=10)
    with pytest.raises(ValueError, match=r"another configuration: lr was 0.2, now 0.3; batch_size was 20, now 10$"):
        train(other, data=table(), out=out, resume=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    train(replace(TABLE, keep=5, data_root="elsewhere"), data=table(), out=out, resume=True)  # changes no number
    with pytest.raises(ValueError, match="saved n must be 97"):
        train(TABLE, data=table(97), out=out, resume=True)


def test_a_finished_run_is_neither_repeated_nor_overwritten(tmp_path, monkeypatch):
    out = tmp_path / "run"
    first = train(TABLE, data=table(), out=out)
    with pytest.raises(FileExistsError, match="holds a run already: resume it, or choose another folder"):
        train(TABLE, data=table(), out=out)
    monkeypatch.setattr(Trainer, "train_step", None)
    again = train(TABLE, data=table(), out=out, resume=True)
    assert_same(again, first)
    assert again == first


def test_resuming_what_never_began_begins(tmp_path):
    assert train(TABLE, data=table(), out=tmp_path / "run", resume=True).steps == 30


def test_a_damaged_configuration_is_an_error(tmp_path):
    out = tmp_path / "run"
    train(TABLE, data=table(), out=out)
    (out / "config.json").write_text('{"data": ')
    with pytest.raises(CorruptFile, match=r"config.json cannot be read"):
        train(TABLE, data=table(), out=out, resume=True)


def test_what_the_run_directory_holds(tmp_path):
    out = tmp_path / "run"
    result = train(TABLE, data=table(), out=out)
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoints",
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "result.json",
    ]
    assert TrainConfig.from_dict(json.loads((out / "config.json").read_text())) == replace(TABLE, data="table")
    environment = json.loads((out / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert set(environment) >= {"conjugo", "python", "processor", "device", "threads", "command", "git"}
    saved = json.loads((out / "result.json").read_text())
    assert saved["accuracy"] == result.accuracy
    assert "model" not in saved
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["step-00000024", "step-00000030"]
    export_step(out / "checkpoints", tmp_path / "weights.safetensors")
    saved = load_file(tmp_path / "weights.safetensors")
    assert equal((saved[name] for name, _ in result.model.named_parameters()), weights(result.model))


def test_a_full_disk_stops_no_training(tmp_path, monkeypatch):
    out = tmp_path / "run"
    fsync, train_step, step = os.fsync, Trainer.train_step, 0

    def full_for_a_while(descriptor):
        if 11 < step < 21:  # two checkpoints and two evaluations
            raise OSError("No space left on device")
        fsync(descriptor)

    def counting(self):
        nonlocal step
        step += 1
        train_step(self)

    monkeypatch.setattr(os, "fsync", full_for_a_while)
    monkeypatch.setattr(Trainer, "train_step", counting)
    with pytest.warns(UserWarning, match="could (not )?be written") as caught:
        result = train(TABLE, data=table(), out=out)
    monkeypatch.undo()
    messages = [str(warning.message) for warning in caught]
    assert [message.split("(")[0] for message in messages if "checkpoint of" in message] == [
        "no checkpoint of step 12 could be written ",
        "no checkpoint of step 18 could be written ",
    ]
    assert len(messages) == 4
    assert all("No space left" in message for message in messages)
    assert result.steps == 30
    assert len(read_metrics(out / "metrics.jsonl")) == 6
    assert_same(train(TABLE, data=table(), out=out, resume=True), train(TABLE, data=table()))


def test_divergence_keeps_the_last_good_checkpoint(tmp_path):
    data, out = table(), tmp_path / "run"
    config = replace(TABLE, batch_size="full", max_skipped=3)
    broken = with_nan(data, slice(None))

    class BreaksLater(Trainer):
        def train_step(self):
            if self.step == 20:
                self.train_data._inputs = broken.train.inputs
            super().train_step()

    trainer = BreaksLater(config, data)
    with pytest.raises(TrainingDiverged, match=r"step 23: 3 steps in a row .*; the last checkpoint is .*step-00000018"):
        trainer.fit(RunDirectory(out, config, resume=False))
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    # With good data the run goes on from there to the end.
    assert_same(
        train(replace(config, data="digits"), data=replace(data, name="digits"), out=out, resume=True),
        train(config, data=data),
    )


def test_weights_that_are_not_finite_push_out_no_good_checkpoint(tmp_path):
    class Explodes(Trainer):
        def train_step(self):
            super().train_step()
            if self.step == 20:
                with torch.no_grad():
                    next(self.model.parameters()).fill_(torch.inf)

    config = replace(TABLE, checkpoints=30, max_skipped=6)
    with pytest.raises(TrainingDiverged, match=r"step 26: 6 steps in a row .*; the last checkpoint is .*step-00000019"):
        Explodes(config, table()).fit(RunDirectory(tmp_path / "run", config, resume=False))
