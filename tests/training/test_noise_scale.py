"""Recording the gradient noise scale, and batches that grow with it: right numbers, and a training that does not notice."""

import os
import signal
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tests.distributed.ranks import run
from tests.training.small_data import images, table
from tests.training.test_resume import assert_same, interrupt_after, numbers
from torch.nn import functional as F

from conjugo.scaling import MeasuredBatchSize, NoiseScaleMonitor
from conjugo.training import TrainConfig, Trainer, train
from conjugo.training.metrics import read_metrics

PLAIN = TrainConfig(
    optimizer="momentum", lr=0.02, batch_size=16, steps=18, evaluations=3, checkpoints=3, threads=1, schedule="constant"
)
RECORDED = replace(PLAIN, noise_scale=2)
NAMES = ("noise_scale", "noise_scale_low", "noise_scale_high")
GROWING = replace(
    PLAIN, steps=None, epochs=10.0, batch_size=4, noise_scale=1, batch_growth=2.0, batch_max=40, warmup=0.1
)


def without(record):
    return {name: value for name, value in record.items() if not name.startswith("noise_scale")}


def gradient(trainer, rows):
    loss = F.cross_entropy(trainer.model(trainer.train_data._inputs[rows]), trainer.train_data._targets[rows])
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, trainer.model.parameters())])


@pytest.mark.parametrize("micro_batch", [None, 4, 5])
def test_numbers_are_those_of_gradients_one_by_one(micro_batch):
    """Where batches are cut anyway and where they are not; parts of 5 examples are uneven."""
    trainer = Trainer(replace(RECORDED, micro_batch=micro_batch, clip_norm=0.1, weight_decay=0.5), table())
    expected = NoiseScaleMonitor()
    for step in range(6):
        place = trainer.sampler.state_dict()
        rows = next(trainer.sampler)
        trainer.sampler.load_state_dict(place)
        if step % 2 == 0:
            parts = rows.tensor_split(4)
            g = torch.stack([gradient(trainer, part) for part in parts]).double()
            expected.update(g.square().sum(1).mean(), g.mean(0).square().sum(), 4, 16, population=96)
        trainer.train_step()
    found = trainer.noise.monitors["noise_scale"]
    assert found.updates == 3
    assert found.noise_scale().trace == pytest.approx(expected.noise_scale().trace, rel=1e-3)
    assert found.noise_scale().grad_norm2 == pytest.approx(expected.noise_scale().grad_norm2, rel=1e-3)
    assert found.noise_scale().examples == 48


def test_the_metric_of_the_optimizer_is_recorded_besides():
    for optimizer, has in (("adamw", True), ("nlcg", True), ("momentum", False)):
        trainer = Trainer(replace(RECORDED, optimizer=optimizer, lr=0.001, evaluations=1), table())
        trainer.fit(progress=False)
        (record,) = trainer.history
        assert set(NAMES) < set(record)
        assert ("noise_scale_optimizer" in record) is has
        if has:
            assert record["noise_scale_optimizer"] != record["noise_scale"]
        leading = trainer.noise.leading
        assert leading.metric == (optimizer if has else "euclidean")


@pytest.mark.parametrize("optimizer", ["momentum", "nlcg", "adamw"])
@pytest.mark.parametrize(("model", "micro_batch"), [("mlp", None), ("mlp", 4), ("cnn", None), ("cnn", 8)])
@pytest.mark.filterwarnings("ignore:batch norm sees 8 examples")
def test_training_does_not_notice(optimizer, model, micro_batch, tmp_path):
    """The same bits with and without, with batch norm, augmentation, clipping and averages too."""
    data = images() if model == "cnn" else table()
    config = replace(PLAIN, optimizer=optimizer, model=model, micro_batch=micro_batch, steps=6, ema=0.9, clip_norm=1.0)
    expected = train(config, data=data, out=tmp_path / "plain")
    seen = torch.random.get_rng_state()
    assert_same(train(replace(config, noise_scale=2), data=data, out=tmp_path / "recorded"), expected)
    assert torch.equal(torch.random.get_rng_state(), seen)
    plain, more = (numbers(read_metrics(tmp_path / name / "metrics.jsonl")) for name in ("plain", "recorded"))
    assert [without(record) for record in more] == plain
    assert all(set(NAMES) <= set(record) for record in more)


def test_batch_norm_sees_whole_batches():
    """Another batch, of other examples, beside that of the step; with too few examples nothing is said."""
    trainer = Trainer(replace(RECORDED, model="cnn", batch_size=32, steps=4), images())
    for _ in range(4):
        trainer.train_step()
    found = trainer.noise.monitors["noise_scale"].noise_scale()
    assert (found.micro_batch, found.examples) == (32, 2 * 64)
    everything = Trainer(replace(RECORDED, model="cnn", batch_size="full", steps=2, evaluations=1), images())
    everything.fit(progress=False)
    assert everything.noise.monitors["noise_scale"].updates == 0
    assert everything.history[0]["noise_scale"] is None


@pytest.mark.parametrize("optimizer", ["momentum", "nlcg"])
@pytest.mark.parametrize("micro_batch", [None, 4])
def test_a_resumed_run_goes_on_recording(optimizer, micro_batch, tmp_path, monkeypatch):
    config = replace(RECORDED, optimizer=optimizer, micro_batch=micro_batch)
    train(config, data=table(), out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 14)
        with pytest.raises(KeyboardInterrupt):
            train(config, data=table(), out=tmp_path / "run")
    train(config, data=table(), out=tmp_path / "run", resume=True)
    whole, resumed = (numbers(read_metrics(tmp_path / name / "metrics.jsonl")) for name in ("whole", "run"))
    assert resumed == whole
    assert whole[-1]["noise_scale_low"] is not None


def test_a_run_may_begin_to_record_when_it_is_resumed(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 8)
        with pytest.raises(KeyboardInterrupt):
            train(PLAIN, data=table(), out=tmp_path)
    train(RECORDED, data=table(), out=tmp_path, resume=True)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert ["noise_scale" in record for record in records] == [False, True, True]


def of_rank(parallel):
    config = replace(RECORDED, micro_batch=4, parallel=parallel, optimizer="adamw", lr=0.001)
    trainer = Trainer(config, table())
    trainer.fit(progress=False)
    return {name: value for name, value in trainer.history[-1].items() if name.startswith("noise_scale")}


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_workers_find_what_one_finds(parallel):
    alone = of_rank("ddp")
    first, second = run(2, of_rank, parallel)
    assert first == second
    expected = alone if parallel == "ddp" else {name: alone[name] for name in NAMES}
    assert first == pytest.approx(expected, rel=1e-3)


def test_a_loss_that_is_not_finite_is_skipped():
    data = table()
    inputs = data.train.inputs.clone()
    inputs[::20] = float("nan")
    broken = replace(data, train=replace(data.train, inputs=inputs))
    trainer = Trainer(replace(RECORDED, noise_scale=1), broken)
    for _ in range(6):
        trainer.train_step()
    monitor = trainer.noise.monitors["noise_scale"]
    assert 0 < monitor.skipped < monitor.updates == 6


# ---- batches that grow ----


def test_batches_double_when_the_noise_scale_allows_it():
    trainer = Trainer(replace(GROWING, evaluations=10), table())
    trainer.fit(progress=False)
    milestones = trainer.batches.milestones
    assert milestones[0] == (0, 4)
    assert len(milestones) >= 3, milestones
    for (_, before), (_, after) in pairwise(milestones):
        assert after == 2 * before
    assert max(batch for _, batch in milestones) <= 32  # 64 would be more than batch_max
    assert trainer.samples == pytest.approx(10 * 96, abs=32)
    assert trainer.step < 10 * 96 / 4
    assert len(trainer.history) == 10
    assert trainer.history[-1]["batch_size"] == milestones[-1][1]


def test_schedules_count_examples():
    """The learning rate at each share of the examples is that of a run with the first batch."""
    config = replace(GROWING, schedule="cosine", warmup=0.25, evaluations=10)
    growing, fixed = Trainer(config, table()), Trainer(replace(config, batch_growth=0.0, batch_max=None), table())
    growing.fit(progress=False)
    assert growing.batches.milestones[-1][1] > 4
    rates = {}
    for _ in range(fixed.steps):
        fixed.train_step()
        rates[fixed.samples] = fixed.schedule.get_last_lr()[0]
    assert growing.schedule.last_epoch == growing.progress == growing.samples // 4
    again = Trainer(config, table())
    for _ in range(growing.step - 1):
        again.train_step()
        if again.samples in rates:
            assert again.schedule.get_last_lr()[0] == pytest.approx(rates[again.samples], rel=1e-9)


@pytest.mark.parametrize(("rule", "factor"), [("constant", 1), ("linear", 2), ("sqrt", 2**0.5)])
def test_the_learning_rate_follows_the_batch(rule, factor):
    trainer = Trainer(replace(GROWING, batch_schedule_lr=rule), table())
    trainer.fit(progress=False)
    doublings = len(trainer.batches.milestones) - 1
    assert doublings > 0
    assert trainer.schedule.scale == pytest.approx(factor**doublings)


def stop_after(monkeypatch, step):
    train_step = Trainer.train_step

    def stopped(self):
        train_step(self)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "train_step", stopped)


@pytest.mark.parametrize("optimizer", ["momentum", "nlcg"])
@pytest.mark.parametrize("step", [3, 24, 70])
def test_growing_batches_go_on_bit_for_bit(optimizer, step, tmp_path, monkeypatch):
    lr = 0.02 if optimizer == "momentum" else 0.1
    config = replace(GROWING, optimizer=optimizer, lr=lr, evaluations=5, checkpoints=0, batch_schedule_lr="noise")
    expected = train(config, data=table(), out=tmp_path / "whole")
    assert read_metrics(tmp_path / "whole" / "metrics.jsonl")[-1]["batch_size"] > 4
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(KeyboardInterrupt):
            train(config, data=table(), out=tmp_path / "run")
    assert_same(train(config, data=table(), out=tmp_path / "run", resume=True), expected)
    whole, resumed = (numbers(read_metrics(tmp_path / folder / "metrics.jsonl")) for folder in ("whole", "run"))
    assert resumed == whole
    with pytest.raises(ValueError, match="noise_scale was 1, now 2"):
        train(replace(config, noise_scale=2), data=table(), out=tmp_path / "run", resume=True)


def growing_rank():
    trainer = Trainer(replace(GROWING, micro_batch=2), table())
    trainer.fit(progress=False)
    return trainer.batches.milestones, trainer.samples


def test_all_workers_decide_alike():
    first, second = run(2, growing_rank)
    assert first == second
    assert len(first[0]) > 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise_scale": -1}, "noise_scale must be an integer >= 0"),
        ({"batch_growth": 1.0}, "noise_scale must be >= 1 with batch_growth"),
        ({"batch_growth": -1.0}, r"batch_growth must be in \[0, inf\)"),
        ({"batch_max": 100}, "batch_max must be None without batch_growth"),
        ({"batch_schedule_lr": "noise"}, "batch_schedule_lr must be another without batch_growth"),
        ({"batch_growth": 1.0, "noise_scale": 1, "batch_schedule": ((1, 9),)}, "batch_schedule must be empty"),
        ({"batch_growth": 1.0, "noise_scale": 1, "batch_size": "full"}, "batch_size must be a number"),
        ({"batch_growth": 1.0, "noise_scale": 1, "steps": 9}, "steps must be None with batch_growth"),
        ({"discard_small_loss": 0.5, "noise_scale": 1}, "noise_scale must be 0 with discard_small_loss"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=f"TrainConfig: {message}"):
        TrainConfig(**settings)


def test_the_largest_batch_has_to_fit():
    for most, message in ((97, "batch_max must be at most 96"), (3, "batch_max must be at least 4, the batch_size")):
        with pytest.raises(ValueError, match=message):
            Trainer(replace(GROWING, batch_max=most), table())
    assert Trainer(replace(GROWING, batch_max=None), table()).batches.batch_max == 96


def test_settings_survive_a_file():
    assert TrainConfig.from_dict(GROWING.to_dict()) == GROWING
    assert isinstance(Trainer(GROWING, table()).batches, MeasuredBatchSize)
