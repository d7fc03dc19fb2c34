"""Batches that grow, and batches whose small losses are left out: against loops written out, and what is refused."""

import math
import os
import signal
from dataclasses import replace

import pytest
import torch
from tests.training.small_data import images, table
from tests.training.test_resume import assert_same, numbers
from tests.training.test_trainer import equal, weights
from torch.nn import functional as F

from conjugo.distributed import Checkpointer, GlobalBatchSampler
from conjugo.errors import UnknownName
from conjugo.training import TrainConfig, Trainer, models, train
from conjugo.training.metrics import read_metrics

PLAIN = TrainConfig(
    optimizer="momentum", lr=0.1, batch_size=20, schedule="constant", warmup=0.0, evaluations=1, threads=1
)
GROWING = replace(PLAIN, batch_schedule=((1, 30), (3, 96), (5, 48)), batch_schedule_lr="sqrt", epochs=6)
SIZES = [20] * 4 + [30] * 3 * 2 + [96] * 2 + [48] * 2
"""Of 96 examples: what is left over of an epoch fills no batch."""
DISCARDING = replace(PLAIN, discard_small_loss=0.4, steps=9, warmup=0.34)  # 3 steps of warm-up


def plain_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return models.build("mlp", input_shape=(6,), num_classes=3)


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)


# ---- batches that grow ----


def test_growing_batches_do_what_a_plain_loop_does():
    data = table()
    result = train(GROWING, data=data)
    model = plain_model()
    optimizer = sgd(model)
    epochs = [(0, 20), (1, 30), (2, 30), (3, 96), (4, 96), (5, 48)]
    for epoch, size in epochs:
        sampler = GlobalBatchSampler(96, size)
        sampler.load_state_dict(sampler.state_dict() | {"epoch": epoch})
        optimizer.param_groups[0]["lr"] = 0.1 * math.sqrt(size / 20)
        for _ in range(96 // size):
            indices = next(sampler)
            optimizer.zero_grad()
            F.cross_entropy(model(data.train.inputs[indices]), data.train.targets[indices]).backward()
            optimizer.step()
    assert equal(weights(result.model), weights(model))
    assert (result.steps, result.samples) == (len(SIZES), sum(SIZES))


def test_what_records_say_of_growing_batches():
    trainer = Trainer(replace(GROWING, evaluations=len(SIZES)), table())
    trainer.fit()
    assert [record["batch_size"] for record in trainer.history] == SIZES
    seen = [sum(SIZES[: step + 1]) for step in range(len(SIZES))]
    assert [record["samples"] for record in trainer.history] == seen
    assert [record["epoch"] for record in trainer.history] == [samples / 96 for samples in seen]
    expected = [0.1 * math.sqrt(size / 20) for size in SIZES]
    assert [record["lr"] for record in trainer.history] == pytest.approx(expected)


def test_learning_rate_schedules_know_the_number_of_steps():
    trainer = Trainer(replace(GROWING, schedule="cosine", warmup=0.25, batch_schedule_lr="constant"), table())
    assert (trainer.steps, trainer.schedule.total_steps, trainer.schedule.warmup_steps) == (14, 14, 3)
    assert Trainer(replace(GROWING, steps=11), table()).steps == 11
    assert Trainer(replace(GROWING, epochs=0.01), table()).steps == 1


def test_micro_batches_are_cut_anew():
    trainer = Trainer(replace(GROWING, micro_batch=24), table())
    whole = Trainer(GROWING, table())
    for size in SIZES:
        trainer.train_step()
        whole.train_step()
        assert len(trainer.parts) == -(-size // 24)
        assert sum(count for _, count in trainer.parts) == trainer.batch_size == size
    for a, b in zip(whole.model.parameters(), trainer.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_an_optimizer_that_can_restart_is_told_when_the_batch_changes():
    trainer = Trainer(GROWING, table())
    told = []
    trainer.optimizer.restart = lambda: told.append((trainer.step, trainer.batch_size))
    trainer.fit()
    assert told == [(4, 30), (10, 96), (12, 48)]


def test_conjugate_gradients_restart_where_the_batch_changes():
    trainer = Trainer(replace(GROWING, optimizer="frsgd"), table())
    betas = []
    for _ in SIZES:
        trainer.train_step()
        betas.append(float(trainer.optimizer.last["beta"]))
    assert [step for step, beta in enumerate(betas) if beta == 0] == [0, 4, 10, 12]


def stop_after(monkeypatch, step: int) -> None:
    train_step = Trainer.train_step

    def stopped(self):
        train_step(self)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "train_step", stopped)


@pytest.mark.parametrize("optimizer", ["momentum", "nlcg", "frsgd"])
@pytest.mark.parametrize("step", [2, 4, 7, 10, 11, 13])  # inside of every segment, and where one ends
def test_growing_batches_go_on_bit_for_bit(step, optimizer, tmp_path, monkeypatch):
    config = replace(GROWING, optimizer=optimizer, micro_batch=24, evaluations=5, checkpoints=0)
    expected = train(config, data=table(), out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(KeyboardInterrupt):
            train(config, data=table(), out=tmp_path / "run")
    assert_same(train(config, data=table(), out=tmp_path / "run", resume=True), expected)
    whole, resumed = (read_metrics(tmp_path / folder / "metrics.jsonl") for folder in ("whole", "run"))
    assert numbers(resumed) == numbers(whole)


def test_resuming_is_no_change_of_the_batch(tmp_path):
    first = Trainer(GROWING, table())
    for _ in range(6):
        first.train_step()
    Checkpointer(tmp_path).save(6, **first.stateful())
    second = Trainer(GROWING, table())
    told = []
    second.optimizer.restart = lambda: told.append(second.step)
    Checkpointer(tmp_path).load_latest(**second.stateful())
    assert (second.batch_size, second.samples) == (30, 4 * 20 + 2 * 30)
    second.fit()
    assert told == [10, 12]


def test_checkpoints_of_the_time_before_growing_batches_are_read():
    trainer = Trainer(replace(PLAIN, steps=6), table())
    trainer.train_step()
    old = trainer.state_dict()
    for name in ("samples", "batch_size", "batches", "loss_sum_all"):
        del old[name]
    fresh = Trainer(replace(PLAIN, steps=6), table())
    fresh.load_state_dict(old)
    assert (fresh.step, fresh.samples) == (1, 20)


# ---- small losses are left out ----


@pytest.mark.parametrize("way", ["once", "twice"])
def test_discarding_does_what_a_plain_loop_does(way):
    data = table()
    trainer = Trainer(replace(DISCARDING, discard_forward=way), data)
    assert trainer.schedule.warmup_steps == 3
    model = plain_model()
    optimizer = sgd(model)
    sampler = GlobalBatchSampler(96, 20)
    for step in range(9):
        indices = next(sampler)
        optimizer.param_groups[0]["lr"] = 0.1 * trainer.schedule.factor(step)
        optimizer.zero_grad()
        losses = F.cross_entropy(model(data.train.inputs[indices]), data.train.targets[indices], reduction="none")
        kept = losses if step < 3 else losses.topk(12).values
        kept.mean().backward()
        optimizer.step()
        before = trainer.loss_sum.item(), trainer.loss_sum_all.item()
        trainer.train_step()
        assert trainer.loss_sum.item() - before[0] == pytest.approx(kept.mean().item(), rel=1e-4)
        assert trainer.loss_sum_all.item() - before[1] == pytest.approx(losses.mean().item(), rel=1e-4)
    for a, b in zip(trainer.model.parameters(), model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_records_hold_both_losses():
    trainer = Trainer(replace(DISCARDING, evaluations=3), table())
    trainer.fit()
    assert trainer.history[0]["train_loss_all"] == trainer.history[0]["train_loss"]  # warm-up
    assert all(record["train_loss_all"] < record["train_loss"] for record in trainer.history[1:])
    assert trainer.result(diverged=False).samples == 9 * 20
    plain = Trainer(replace(PLAIN, steps=2), table())
    plain.fit()
    assert "train_loss_all" not in plain.history[0]


def test_with_micro_batches_the_same_examples_are_kept():
    config = replace(DISCARDING, discard_forward="twice", batch_schedule=((1, 37),), optimizer="nlcg")
    whole, parts = Trainer(config, table()), Trainer(replace(config, micro_batch=7), table())
    for _ in range(9):
        whole.train_step()
        parts.train_step()
    assert parts.loss_sum.item() == pytest.approx(whole.loss_sum.item(), rel=1e-4)
    assert parts.loss_sum_all.item() == pytest.approx(whole.loss_sum_all.item(), rel=1e-4)


def test_looking_for_small_losses_leaves_no_trace_in_batch_norm():
    trainer = Trainer(replace(DISCARDING, model="cnn", discard_forward="twice", batch_size=32), images())
    before = [buffer.clone() for buffer in trainer.model.buffers()]
    batch = trainer.train_data.draw(next(trainer.sampler))
    losses = trainer._score(batch)
    assert equal(before, trainer.model.buffers())
    with torch.no_grad():
        torch.testing.assert_close(losses, trainer.losses(*trainer.train_data.take(batch)))
    assert not equal(before, trainer.model.buffers())


@pytest.mark.parametrize("way", ["once", "twice"])
def test_a_loss_that_is_not_finite_is_not_trained_on(way):
    data = table()
    inputs = data.train.inputs.clone()
    inputs[::20] = math.nan
    broken = replace(data, train=replace(data.train, inputs=inputs))
    config = replace(DISCARDING, discard_forward=way, warmup=0.0)
    trainer = Trainer(config, broken)
    before = weights(trainer.model)
    for _ in range(9):
        trainer.train_step()
    assert 0 < trainer.guard.skipped < 9
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert not equal(before, weights(trainer.model))


@pytest.mark.parametrize("way", ["once", "twice"])
def test_discarding_goes_on_bit_for_bit(way, tmp_path, monkeypatch):
    config = replace(DISCARDING, discard_forward=way, model="cnn", steps=8, checkpoints=0, evaluations=2, ema=0.9)
    expected = train(config, data=images())
    with monkeypatch.context() as patch:
        stop_after(patch, 6)  # between two evaluations
        with pytest.raises(KeyboardInterrupt):
            train(config, data=images(), out=tmp_path)
    assert_same(train(config, data=images(), out=tmp_path, resume=True), expected)
    whole = Trainer(config, images())
    whole.fit()
    assert numbers(read_metrics(tmp_path / "metrics.jsonl")) == numbers(whole.history)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("setting", "value", "accepted"),
    [
        ("batch_schedule", ((0, 10),), r"pairs of integers \(epoch >= 1, batch >= 1\), with growing epochs"),
        ("batch_schedule", ((2, 10), (2, 20)), "growing epochs"),
        ("batch_schedule", ((2, 10), (1, 20)), "growing epochs"),
        ("batch_schedule", ((2, 0),), "batch >= 1"),
        ("batch_schedule", ((2, 1.5),), "pairs of integers"),
        ("batch_schedule", ((2, 10, 3),), "pairs of integers"),
        ("discard_small_loss", 1.0, r"in \[0, 1\)"),
        ("discard_small_loss", -0.1, r"in \[0, 1\)"),
    ],
)
def test_values_out_of_range(setting, value, accepted):
    with pytest.raises(ValueError, match=f"TrainConfig: {setting} must be .*{accepted}.*, got"):
        TrainConfig(**{setting: value})


@pytest.mark.parametrize(("setting", "value"), [("batch_schedule_lr", "liner"), ("discard_forward", "onc")])
def test_unknown_names(setting, value):
    with pytest.raises(UnknownName, match=f"unknown {setting} '{value}'; did you mean"):
        TrainConfig(**{setting: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_schedule": ((1, 97),)}, "batch_schedule must be at most 96, .* of 'table', got 97"),
        (
            {"discard_small_loss": 0.5, "micro_batch": 24, "batch_schedule": ((1, 25),)},
            "micro_batch must be at least 25, .* unless discard_forward is 'twice', got 24",
        ),
    ],
)
def test_what_does_not_fit_the_data_is_named_before_training(settings, message, tmp_path):
    with pytest.raises(ValueError, match=f"TrainConfig: {message}"):
        train(replace(PLAIN, **settings), data=table(), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_configuration_in_lists_is_the_same():
    config = TrainConfig.from_dict(GROWING.to_dict() | {"batch_schedule": [[1, 30], [3, 96], [5, 48]]})
    assert config == GROWING


def test_small_micro_batches_of_later_batches_are_warned_of_at_the_beginning():
    norm = replace(PLAIN, model="cnn", batch_size=8)
    Trainer(replace(norm, batch_schedule=((1, 64),), micro_batch=32), images())
    with pytest.warns(UserWarning, match="batch norm sees 10 examples"):
        Trainer(replace(norm, batch_schedule=((1, 64),), micro_batch=12), images())
