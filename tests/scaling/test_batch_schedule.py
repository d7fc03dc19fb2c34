"""Batches that grow with a measured noise scale: when they do, and when not."""

import math

import pytest

from conjugo.distributed import GlobalBatchSampler
from conjugo.errors import UnknownName
from conjugo.scaling import MeasuredBatchSize, NoiseScaleMonitor


def feed(monitor, b_simple, *, spread=0.02, steps=100):
    """Measurements of a noise scale, from batches of 64 in parts of 16."""
    for i in range(steps):
        trace, norm2 = b_simple * (1 + spread * (-1) ** (i // 5)), 1.0
        monitor.update(norm2 + trace / 16, norm2 + trace / 64, 16, 64)


def measured(b_simple, spread=0.02, **settings):
    monitor = NoiseScaleMonitor()
    if b_simple is not None:
        feed(monitor, b_simple, spread=spread)
    return MeasuredBatchSize(monitor, 32, 256, **settings)


def test_it_doubles_up_to_the_noise_scale():
    sizes = measured(150)
    assert [sizes.batch_at(epoch) for epoch in range(6)] == [32, 64, 128, 128, 128, 128]
    assert sizes.milestones == ((0, 32), (1, 64), (2, 128))
    assert [sizes.batch_at(epoch) for epoch in (0, 1, 2, 0)] == [32, 64, 128, 32]  # what was decided stays


def test_the_lower_end_counts_and_only_a_fraction_of_it():
    sizes = measured(66, spread=0.5)
    low, high = sizes.monitor.ci95
    assert low < 64 < high
    assert sizes.batch_at(1) == 32
    assert measured(150, fraction=0.4).batch_at(1) == 32
    assert measured(20, fraction=4.0).batch_at(1) == 64


def test_no_batch_is_larger_than_the_largest():
    sizes = measured(1e6)
    assert [sizes.batch_at(epoch) for epoch in range(6)] == [32, 64, 128, 256, 256, 256]


def test_nothing_happens_while_little_is_known():
    assert measured(None).batch_at(1) == 32
    sizes = MeasuredBatchSize(None, 32, 256)
    assert sizes.batch_at(1) == 32
    sizes.monitor = NoiseScaleMonitor()
    feed(sizes.monitor, 1000, steps=7)
    assert sizes.batch_at(2) == 32
    sizes.monitor.update(math.nan, 1.0, 16, 64)  # skipped: still seven
    assert sizes.batch_at(3) == 32
    feed(sizes.monitor, 1000, steps=1)
    assert sizes.batch_at(4) == 64


def test_it_shrinks_only_if_it_may_and_well_below():
    for shrink, later in ((False, [128, 128]), (True, [64, 32])):
        sizes = measured(150, shrink=shrink)
        assert [sizes.batch_at(epoch) for epoch in range(3)] == [32, 64, 128]
        feed(sizes.monitor, 70)
        assert sizes.batch_at(3) == 128  # 70 is not below a half of it
        feed(sizes.monitor, 10)
        assert [sizes.batch_at(epoch) for epoch in (4, 5)] == later
        assert sizes.batch_at(6) == later[-1]


def test_learning_rates():
    for rule, factors in (("constant", (1, 1)), ("linear", (2, 4)), ("sqrt", (2**0.5, 2))):
        sizes = measured(150, lr=rule)
        sizes.batch_at(1), sizes.batch_at(2)
        assert [sizes.lr_factor_at(epoch) for epoch in (0, 1, 2)] == pytest.approx([1, *factors])
    sizes = measured(150, lr="noise")
    sizes.batch_at(1)
    b = sizes.monitor.b_simple
    assert sizes.lr_factor_at(1) == pytest.approx((1 + b / 32) / (1 + b / 64))


def test_decisions_are_resumed():
    first, second = measured(150, lr="noise"), measured(None, lr="noise")
    first.batch_at(1), first.batch_at(2)
    second.load_state_dict(first.state_dict())
    assert second.milestones == first.milestones
    assert second.lr_factor_at(2) == first.lr_factor_at(2)
    assert second.batch_at(3) == 128  # its own monitor knows nothing
    with pytest.raises(ValueError, match="the saved batch_min must be 16 as here, got 32"):
        MeasuredBatchSize(None, 16, 32).load_state_dict(first.state_dict())


def test_the_sampler_follows():
    sampler = GlobalBatchSampler(300, measured(150))
    assert [len(next(sampler)) for _ in range(9 + 4 + 2)] == [32] * 9 + [64] * 4 + [128] * 2


def test_steps_of_the_first_batch():
    sizes = measured(150)
    assert sizes.steps(640, epochs=3) == 60
    with pytest.raises(ValueError, match="n must be >= 256"):
        sizes.steps(200, epochs=3)


def test_arguments_out_of_range():
    monitor = NoiseScaleMonitor()
    for arguments, message in (
        ((0, 1), "batch_min must be >= 1"),
        ((8, 4), "batch_max must be >= 8"),
    ):
        with pytest.raises(ValueError, match=f"MeasuredBatchSize: {message}"):
            MeasuredBatchSize(monitor, *arguments)
    for settings, message in (({"fraction": 0.0}, "fraction must be in"), ({"least": 0}, "least must be >= 1")):
        with pytest.raises(ValueError, match=message):
            MeasuredBatchSize(monitor, 1, 2, **settings)
    with pytest.raises(UnknownName, match="unknown scaling rule 'root'"):
        MeasuredBatchSize(monitor, 1, 2, lr="root")
    with pytest.raises(ValueError, match="epoch must be >= 0"):
        measured(1).batch_at(-1)
