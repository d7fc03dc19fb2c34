"""The loop: what it computes (against a loop written out), what it refuses, what it leaves alone."""

import json
import math
from dataclasses import replace

import pytest
import torch
from tests.training.small_data import images, table
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from conjugo.distributed import GlobalBatchSampler
from conjugo.errors import TrainingDiverged, UnknownName
from conjugo.optim._observed_batch import ObservedBatch
from conjugo.optim.probed_steps import Parabola
from conjugo.training import TrainConfig, Trainer, models, train
from conjugo.training.batch_norm import RunningStatistics
from conjugo.training.data import Dataset, Split
from conjugo.training.guard import Guard
from conjugo.training.machine import choose_device
from conjugo.training.optimizers import build

PLAIN = TrainConfig(
    optimizer="momentum", lr=0.1, batch_size=32, steps=12, schedule="constant", warmup=0.0, evaluations=3, threads=1
)


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_it_does_what_a_plain_loop_does():
    data = table()
    result = train(PLAIN, data=data)

    torch.manual_seed(0)
    model = models.build("mlp", input_shape=(6,), num_classes=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    sampler = GlobalBatchSampler(96, 32, seed=0)
    for _ in range(12):
        indices = next(sampler)
        optimizer.zero_grad()
        F.cross_entropy(model(data.train.inputs[indices]), data.train.targets[indices]).backward()
        optimizer.step()
    assert equal(weights(result.model), weights(model))
    logits = model(data.test.inputs)
    assert result.accuracy == (logits.argmax(1) == data.test.targets).double().mean().item()
    assert result.loss == pytest.approx(F.cross_entropy(logits, data.test.targets).item(), rel=1e-6)


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    data = table()
    whole = Trainer(replace(PLAIN, optimizer="sgd", batch_size=50), data)
    parts = Trainer(replace(PLAIN, optimizer="sgd", batch_size=50, micro_batch=15), data)  # 15 + 15 + 15 + 5
    for trainer in (whole, parts):
        for _ in range(3):
            trainer.train_step()
    for a, b in zip(whole.model.parameters(), parts.model.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7)
    assert parts.loss_sum.item() == pytest.approx(whole.loss_sum.item(), rel=1e-6)


def test_steps_samples_and_curve():
    data = table(100)
    result = train(replace(PLAIN, steps=None, epochs=2.5, batch_size=32), data=data)
    assert (result.steps, result.samples) == (8, 256)  # 250 / 32 = 7.8
    assert [step for step, _ in result.curve] == [3, 5, 8]
    assert result.curve[-1][1] == result.accuracy
    assert result.parameters == 6 * 128 + 128 + 128 * 128 + 128 + 128 * 3 + 3
    assert result.seconds > 0
    assert result.images_per_second == pytest.approx(256 / result.seconds)
    full = train(replace(PLAIN, batch_size="full", steps=2, evaluations=50), data=data)
    assert (full.samples, [step for step, _ in full.curve]) == (200, [1, 2])


def test_equal_configurations_give_equal_runs():
    config = replace(PLAIN, data="images", model="cnn", optimizer="nlcg", batch_size=20, steps=5)
    first, second = (train(config, data=images()) for _ in range(2))
    assert equal(weights(first.model), weights(second.model))
    assert first.curve == second.curve
    other = train(replace(config, seed=1), data=images())
    assert not equal(weights(first.model), weights(other.model))


def test_settings_of_torch_stay_as_they_were():
    torch.manual_seed(5)
    before = torch.get_rng_state(), torch.get_num_threads(), torch.backends.cudnn.deterministic
    train(replace(PLAIN, threads=torch.get_num_threads() + 1), data=table())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (torch.get_num_threads(), torch.backends.cudnn.deterministic) == before[1:]


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train(PLAIN, data=table())
    assert list(tmp_path.iterdir()) == []
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.0, 1 - math.sqrt(0.5)] + [1.0] * 14),
        ("polynomial", [0.0, 1 - math.sqrt(0.5)] + [1.0] * 7 + [0.1] * 4 + [0.01] * 3),
        ("cosine", [0.0, 0.5] + [(1 + math.cos(math.pi * k / 14)) / 2 for k in range(14)]),
    ],
)
def test_schedules(schedule, expected):
    trainer = Trainer(replace(PLAIN, lr=2.0, steps=16, schedule=schedule, warmup=0.125, evaluations=16), table())
    trainer.fit()
    assert [record["lr"] for record in trainer.history] == pytest.approx([2 * factor for factor in expected])


def test_weight_decay_spares_vectors_on_demand():
    spared = Trainer(replace(PLAIN, weight_decay=0.1, decay_norm_and_bias=False), table()).optimizer.param_groups
    assert [group["weight_decay"] for group in spared] == [0.1, 0.0]
    assert {p.ndim for p in spared[0]["params"]} == {2}
    assert {p.ndim for p in spared[1]["params"]} == {1}
    (group,) = Trainer(replace(PLAIN, weight_decay=0.1), table()).optimizer.param_groups
    assert group["weight_decay"] == 0.1


def test_the_gradient_is_clipped_as_a_whole():
    data = table()
    config = replace(PLAIN, optimizer="sgd", lr=1.0, steps=1, clip_norm=0.01)
    torch.manual_seed(0)
    before = weights(models.build("mlp", input_shape=(6,), num_classes=3))
    after = weights(train(config, data=data).model)
    moved = math.sqrt(sum((a - b).square().sum().item() for a, b in zip(after, before)))
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_evaluation_uses_the_average_and_training_does_not():
    data = table()
    config = replace(PLAIN, lr=0.5, evaluations=1)
    plain, averaged = train(config, data=data), train(replace(config, ema=0.9), data=data)
    assert equal(weights(plain.model), weights(averaged.model))
    assert plain.loss != averaged.loss
    now = train(replace(config, ema=0.0), data=data)  # decay 0: the average is the last weight
    assert now.loss == plain.loss


@pytest.mark.parametrize("micro_batch", [None, 16])
def test_running_statistics_forget_their_initial_values(micro_batch):
    config = replace(
        PLAIN, model="resnet8", lr=0.0, steps=8, micro_batch=micro_batch, augment=False, precision="float32"
    )
    trainer = Trainer(config, images(side=8))
    moments: list[torch.Tensor] = []
    stem = trainer.model.blocks[0].bn1
    stem.register_forward_hook(lambda m, args, out: moments.append(args[0].detach().mean((0, 2, 3))))
    expected = torch.zeros(16)
    for t in range(8):
        moments.clear()
        trainer.train_step()
        expected.lerp_(torch.stack(moments).mean(0), 9 / (10 + t))
    # The modules weigh the parts of one batch by their own momentum of 0.01, that is nearly alike.
    torch.testing.assert_close(stem.running_mean, expected, rtol=1e-4, atol=1e-4 if micro_batch is None else 1e-2)
    assert stem.momentum == 0.01


def test_in_long_runs_running_statistics_are_those_of_torch():
    model = nn.BatchNorm1d(3, momentum=0.1)
    plain = nn.BatchNorm1d(3, momentum=0.1)
    statistics = RunningStatistics(model)
    for t in range(81, 90):
        inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(t))
        with statistics.following(t, updates=1):
            model(inputs)
        plain(inputs)
    assert torch.equal(model.running_var, plain.running_var)


def test_label_smoothing_is_for_training_only():
    data = table()
    config = replace(PLAIN, lr=0.0, steps=1, batch_size="full")
    plain, smooth = train(config, data=data), train(replace(config, label_smoothing=0.2), data=data)
    assert plain.loss == smooth.loss
    assert plain.train_loss != smooth.train_loss


def test_augmentation_can_be_switched_off():
    config = replace(PLAIN, model="cnn", batch_size="full", steps=1, lr=0.0)
    plain, same = (train(replace(config, augment=False, seed=0), data=images()) for _ in range(2))
    augmented = train(config, data=images())
    assert plain.train_loss == same.train_loss != augmented.train_loss


# Where numbers are not finite ----------------------------------------------------------------------------------------


def with_nan(data: Dataset, rows: slice) -> Dataset:
    inputs = data.train.inputs.clone()
    inputs[rows] = math.nan
    return replace(data, train=Split(inputs, data.train.targets))


ALL = ["nlcg", "nlcg-step", "sgd", "momentum", "adamw", "rmsprop", "lars", "lamb"]


@pytest.mark.parametrize("optimizer", ALL)
def test_nan_never_reaches_the_weights_and_training_stops(optimizer):
    torch.manual_seed(0)
    before = weights(models.build("mlp", input_shape=(6,), num_classes=3))
    data = with_nan(table(), slice(None))
    config = replace(PLAIN, optimizer=optimizer, weight_decay=0.1, max_skipped=4)
    trainer = Trainer(config, data)
    with pytest.raises(TrainingDiverged, match=r"step 4: 4 steps in a row .* not finite.*smaller lr"):
        trainer.fit()
    assert equal(weights(trainer.model), before)
    result = train(config, data=data, stop_on_divergence=False)
    assert result.diverged
    assert (result.steps, result.samples, result.skipped_steps) == (4, 128, 4)
    assert result.train_loss is None
    assert result.loss is not None  # of the weights before, on good data


@pytest.mark.parametrize("optimizer", ALL)
def test_single_bad_batches_are_skipped_and_counted(optimizer):
    data = with_nan(table(), slice(0, 1))
    torch.manual_seed(0)
    initial = weights(models.build("mlp", input_shape=(6,), num_classes=3))
    result = train(replace(PLAIN, optimizer=optimizer, max_skipped=3), data=data)
    assert not result.diverged
    assert result.skipped_steps == 4  # 12 steps are 4 epochs; the row is in one batch of each
    assert all(p.isfinite().all() for p in result.model.parameters())
    assert not equal(weights(result.model), initial)


def guarded(optimizer: str, *, on_gpu: bool = False, **options) -> tuple[nn.Module, Guard]:
    """A model with batch norm and its guard; *on_gpu*: as it would behave there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    built = build(optimizer, model.parameters(), lr=0.1)
    guard = Guard(built, model, needs_loss=False, **{"max_skipped": 5, "clip_norm": None, **options})
    if on_gpu:
        guard.window = 5
        guard._takes_found_inf = all(group.get("fused") for group in built.param_groups)
    return model, guard


def guarded_step(model: nn.Module, guard: Guard, inputs: torch.Tensor) -> None:
    model.zero_grad()
    loss = model(inputs).square().mean()
    loss.backward()
    guard.step(loss.detach())


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("optimizer", ["momentum", "adamw", "rmsprop", "lars", "lamb"])
def test_skipped_steps_leave_no_trace(optimizer, on_gpu):
    good = [torch.randn(16, 4, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    bad = torch.full((16, 4), math.inf)
    model, guard = guarded(optimizer, on_gpu=on_gpu)
    for inputs in (bad, bad, good[0], good[1], bad, good[2], good[3], bad):
        guarded_step(model, guard, inputs)
        guard.check()
    assert guard.skipped == 4
    other, guard = guarded(optimizer)
    for inputs in good:
        guarded_step(other, guard, inputs)
    for name, value in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["momentum", "rmsprop", "lars", "nlcg"])
def test_a_loss_that_is_not_finite_is_enough(optimizer):
    model, guard = guarded(optimizer)
    before = weights(model)
    model(torch.randn(16, 4)).square().mean().backward()
    guard.step(torch.tensor(math.inf))
    assert guard.skipped == 1
    assert equal(weights(model), before)


def test_on_a_gpu_what_was_skipped_is_seen_at_the_next_check():
    model, guard = guarded("momentum", on_gpu=True)
    bad, good = torch.full((16, 4), math.inf), torch.randn(16, 4)
    for inputs in (good, bad, good, bad):
        guarded_step(model, guard, inputs)
    assert guard.skipped == 0
    guarded_step(model, guard, bad)
    assert guard.skipped == 3
    assert all(buffer.isfinite().all() for buffer in model.buffers())
    for _ in range(4):
        guarded_step(model, guard, bad)
    with pytest.raises(TrainingDiverged, match="5 steps in a row"):
        guarded_step(model, guard, bad)


class CountReads(TorchDispatchMode):
    """Counts what would make the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "momentum", "micro_batch": 16},
        {"optimizer": "adamw", "micro_batch": 16},
        {"discard_small_loss": 0.4},
        {"discard_small_loss": 0.4, "discard_forward": "twice", "micro_batch": 16},
    ],
)
def test_on_a_gpu_no_step_waits_for_the_device(settings):
    trainer = Trainer(replace(PLAIN, ema=0.9, **settings), table())
    trainer.guard.window = 10
    trainer.guard._takes_found_inf = True
    trainer.train_step()
    with CountReads() as counter:
        for _ in range(5):
            trainer.train_step()
    assert counter.reads == 0
    with CountReads() as counter:
        trainer.evaluate()
    assert counter.reads > 0


# Precision, layout, memory -------------------------------------------------------------------------------------------


def test_bfloat16_is_only_for_the_forward_pass():
    trainer = Trainer(replace(PLAIN, model="cnn", precision="bfloat16"), images())
    inputs, _ = trainer.train_data.take(trainer.train_data.draw(torch.arange(8)))
    with torch.no_grad():
        rounded = trainer.logits(inputs)
        trainer.bfloat16 = False
        exact = trainer.logits(inputs)
    assert rounded.dtype == exact.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.05 * exact.abs().max()
    trainer.bfloat16 = True
    trainer.train_step()
    assert (
        {p.dtype for p in trainer.model.parameters()}
        == {p.grad.dtype for p in trainer.model.parameters()}
        == {torch.float32}
    )


@pytest.mark.parametrize("units", [True, False])
def test_auto_takes_bfloat16_and_channels_last_where_they_pay(monkeypatch, units):
    monkeypatch.setattr("conjugo.training.trainer.pays_bfloat16", lambda device: units)
    convolutional, perceptron = Trainer(replace(PLAIN, model="cnn"), images()), Trainer(PLAIN, table())
    assert (convolutional.bfloat16, perceptron.bfloat16) == (units, False)
    assert (convolutional.channels_last, perceptron.channels_last) == (True, False)
    inputs, _ = convolutional.train_data.take(convolutional.train_data.draw(torch.arange(4)))
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    kernel = convolutional.model.features[3].weight
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    forced = Trainer(replace(PLAIN, model="cnn", precision="float32", channels_last=False), images())
    assert (forced.bfloat16, forced.channels_last) == (False, False)


def test_channels_last_changes_no_result_of_a_perceptron():
    digits = images(side=8)
    config = replace(PLAIN, model="mlp", augment=False)
    first, second = (train(replace(config, channels_last=flag), data=digits) for flag in (False, True))
    assert equal(weights(first.model), weights(second.model))
    train(replace(config, channels_last=True), data=table())  # has no channels


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.parametrize("optimizer", ["nlcg", "adamw"])
def test_memory_stays_flat_over_epochs(optimizer):
    import gc

    config = replace(PLAIN, model="cnn", optimizer=optimizer, steps=10_000, ema=0.9, micro_batch=16)
    trainer = Trainer(config, images())

    def epochs(count: int) -> tuple[int, int]:
        for _ in range(2 * count):
            trainer.train_step()
        trainer.history.append(trainer.evaluate())
        gc.collect()
        return len(gc.get_objects()), resident_bytes()

    epochs(5)
    objects, size = epochs(1)
    later_objects, later_size = epochs(60)
    assert later_objects - objects < 200
    assert later_size - size < 16 * 2**20


@pytest.mark.slow
def test_a_compiled_model_trains():
    data = images()
    config = replace(PLAIN, model="cnn", augment=False, precision="float32", steps=4)
    plain, compiled = train(config, data=data), train(replace(config, compile=True), data=data)
    assert compiled.loss == pytest.approx(plain.loss, rel=1e-3)
    assert list(compiled.model.state_dict()) == list(plain.model.state_dict())


# Configuration -------------------------------------------------------------------------------------------------------


def test_round_trip_through_json():
    config = TrainConfig(optimizer="adamw", optimizer_options={"beta1": 0.95}, batch_size="full", ema=0.99, lr=0.01)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(replace(config))
    assert TrainConfig.from_dict({"seed": 3}) == TrainConfig(seed=3)
    with pytest.raises(UnknownName, match="unknown training setting 'batchsize'; did you mean 'batch_size'"):
        TrainConfig.from_dict({"batchsize": 3})


@pytest.mark.parametrize(
    ("setting", "value", "accepted"),
    [
        ("batch_size", 0, "an integer >= 1 or 'full'"),
        ("batch_size", "all", "an integer >= 1 or 'full'"),
        ("batch_size", 32.0, "an integer >= 1 or 'full'"),
        ("micro_batch", 0, "an integer >= 1 or None"),
        ("steps", 0, "an integer >= 1 or None"),
        ("threads", 0, "an integer >= 1 or None"),
        ("evaluations", 0, "an integer >= 1"),
        ("keep", 0, "an integer >= 1"),
        ("max_skipped", 0, "an integer >= 1"),
        ("checkpoints", -1, "an integer >= 0"),
        ("seed", -1, "an integer >= 0"),
        ("epochs", 0.0, r"in \(0, inf\)"),
        ("epochs", math.nan, r"in \(0, inf\)"),
        ("lr", -0.1, r"in \[0, inf\) or None"),
        ("weight_decay", -0.1, r"in \[0, inf\)"),
        ("warmup", 1.5, r"a fraction of the steps, in \[0, 1\]"),
        ("ema", 1.0, r"in \[0, 1\) or None"),
        ("label_smoothing", 1.0, r"in \[0, 1\)"),
        ("clip_norm", 0.0, r"in \(0, inf\) or None"),
    ],
)
def test_values_out_of_range(setting, value, accepted):
    with pytest.raises(ValueError, match=f"TrainConfig: {setting} must be {accepted}, got {value!r}"):
        TrainConfig(**{setting: value})


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("optimizer", "nlgc", "unknown optimizer 'nlgc'; did you mean 'nlcg'"),
        ("model", "resnet9", "unknown model 'resnet9'; did you mean 'resnet"),
        ("schedule", "cosin", "unknown schedule 'cosin'; did you mean 'cosine'"),
        ("precision", "bf16", "unknown precision 'bf16'"),
    ],
)
def test_unknown_names(setting, value, message):
    with pytest.raises(UnknownName, match=message):
        TrainConfig(**{setting: value})


def test_bad_input_that_only_the_run_can_see(tmp_path):
    data, out = table(), tmp_path / "run"
    with pytest.raises(ValueError, match=r"batch_size must be at most 96, .* of 'table', or 'full', got 97"):
        train(replace(PLAIN, batch_size=97), data=data, out=out)
    with pytest.raises(UnknownName, match="unknown data set 'digit'; did you mean 'digits'"):
        train(TrainConfig(data="digit"), out=out)
    with pytest.raises(UnknownName, match="option of optimizer 'momentum' 'nestrov'; did you mean 'nesterov'"):
        train(replace(PLAIN, optimizer_options={"nestrov": True}), data=data, out=out)
    with pytest.raises(ValueError, match=r"input_shape must be .channels, height, width. for model 'cnn'"):
        train(replace(PLAIN, model="cnn"), data=data, out=out)
    assert not out.exists()


PROBED = replace(PLAIN, optimizer="nlcg-adam", lr=1.0, optimizer_options={"line_search": "parabola"})


def test_the_loss_that_a_step_size_looks_at_is_that_of_the_step():
    """No step and a trial that goes nowhere, by micro-batches, in bfloat16 and with smoothed labels."""
    trainer = Trainer(replace(PROBED, micro_batch=7, precision="bfloat16", label_smoothing=0.1), table())
    trainer.optimizer.line_search = Parabola(initial=1e-30, tries=1)
    found = []
    search = ObservedBatch.loss

    def noted(self):
        found.append(search(self))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ObservedBatch, "loss", noted)
        trainer.train_step()
    assert found == [pytest.approx(trainer.loss_sum.item(), rel=1e-6)] * 2


def test_passes_are_part_of_the_record():
    result = Trainer(replace(PROBED, steps=6), table())
    result.fit()
    assert result.history[-1]["passes"] == pytest.approx(result.optimizer.passes)
    assert 8 <= result.history[-1]["passes"] <= 6 + 17 / 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_norm": 1.0}, "clip_norm must be None with an optimizer that looks at the loss again, got 1.0"),
        ({"discard_small_loss": 0.5}, "discard_small_loss must be 0 with an optimizer that looks at"),
    ],
)
def test_what_does_not_go_with_a_step_size_that_looks_at_the_loss(settings, message):
    with pytest.raises(ValueError, match=message):
        train(replace(PROBED, **settings), data=table())


@pytest.mark.parametrize("name", ["tpu-9", "nonsense", "cuda:99"])
def test_devices_that_are_not_there(name):
    with pytest.raises(ValueError, match=f"TrainConfig: device must be 'auto', or a device .*, got '{name}'"):
        choose_device(name)


@pytest.mark.parametrize("optimizer", ["frsgd", "nlcg", "adagrad-norm"])
def test_a_number_for_each_tensor_is_shown_as_their_mean(optimizer):
    config = TrainConfig(
        data="wine", optimizer=optimizer, optimizer_options={"scope": "tensor"}, batch_size=64, steps=3
    )
    assert train(config, progress=False).steps == 3
