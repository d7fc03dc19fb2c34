"""Schedules: the numbers of the published recipe, closed forms, resuming, chaining; scaling rules; batches that grow."""

import json
import math
from itertools import islice, pairwise

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import SequentialLR

from conjugo.distributed import GlobalBatchSampler
from conjugo.errors import UnknownName
from conjugo.optim.schedules import BatchSizeSchedule, WarmupCosine, WarmupPolynomial, scale_lr, warmup_factor


def optimizer(*lrs: float | torch.Tensor) -> SGD:
    return SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs], lr=1.0)


def trace(optimizer: SGD, schedule, steps: int) -> list[float]:
    """The learning rate of the first group in steps 0, 1, ..., steps - 1."""
    seen = []
    for _ in range(steps):
        seen.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
    return seen


# ---- the published recipe: batch 16,384 of 50,000 images, 200 epochs ----


def test_numbers_of_the_published_recipe():
    steps_per_epoch = 50_000 / 16_384
    warmup, total = int(25 * steps_per_epoch), int(200 * steps_per_epoch)
    assert (warmup, total) == (76, 610)
    o = optimizer(6.4)
    lrs = trace(o, WarmupPolynomial(o, warmup, total), total + 20)
    assert lrs[0] == 0
    assert all(a < b for a, b in pairwise(lrs[:77]))
    assert lrs[38] / 6.4 == pytest.approx(0.2929, abs=1e-4)  # half way: 29 %
    assert lrs[76 : 311 + 1] == [6.4] * 236
    assert lrs[312 : 466 + 1] == pytest.approx([0.64] * 155)
    assert lrs[467:610] == pytest.approx([0.064] * 143)
    last = int(204 * steps_per_epoch)  # beyond the end: only if training is continued
    assert lrs[last] == pytest.approx(0.064)
    assert lrs[last + 1] == pytest.approx(0.0064)


def test_the_published_warm_up_term_by_term():
    """(lr_init - lr_max) (1 - t/W)^0.5 + lr_max, the form in the authors' program."""
    o = optimizer(0.8)
    lrs = trace(o, WarmupPolynomial(o, 40, 100, init_factor=0.001 / 0.8), 40)
    expected = [(0.001 - 0.8) * (1 - t / 40) ** 0.5 + 0.8 for t in range(40)]
    assert lrs == pytest.approx(expected, rel=1e-12)


def test_drops_may_be_none_or_others():
    o = optimizer(1.0)
    assert trace(o, WarmupPolynomial(o, 0, 10, drops=()), 20) == [1.0] * 20
    o = optimizer(1.0)
    lrs = trace(o, WarmupPolynomial(o, 0, 10, drops=((0.3, 0.5), (0.8, 0.0))), 11)
    assert lrs == [1.0] * 4 + [0.5] * 5 + [0.0] * 2


def test_a_warm_up_over_the_whole_training():
    o = optimizer(1.0)
    assert trace(o, WarmupPolynomial(o, 4, 4, power=1.0, drops=()), 6) == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


# ---- cosine ----


def test_cosine_values():
    o = optimizer(2.0)
    lrs = trace(o, WarmupCosine(o, 10, 110, final_factor=0.1), 130)
    assert lrs[:10] == pytest.approx([0.2 * t for t in range(10)])
    for t in range(10, 111):
        assert lrs[t] == pytest.approx(2 * (0.1 + 0.45 * (1 + math.cos(math.pi * (t - 10) / 100))))
    assert lrs[110:] == pytest.approx([0.2] * 20)


def test_cosine_without_warm_up_is_torch_s():
    ours, theirs = optimizer(0.3), optimizer(0.3)
    a = trace(ours, WarmupCosine(ours, 0, 50), 50)
    b = trace(theirs, torch.optim.lr_scheduler.CosineAnnealingLR(theirs, 50), 50)
    assert a == pytest.approx(b, rel=1e-9)


def test_cosine_that_is_all_warm_up():
    o = optimizer(1.0)
    assert trace(o, WarmupCosine(o, 2, 2, final_factor=0.25), 4) == [0.0, 0.5, 0.25, 0.25]


# ---- as torch schedulers ----


SCHEDULES = pytest.mark.parametrize(
    "make", [lambda o, **k: WarmupPolynomial(o, 3, 10, **k), lambda o, **k: WarmupCosine(o, 3, 10, **k)]
)


@SCHEDULES
def test_groups_keep_their_ratio(make):
    o = optimizer(1.0, 0.1, torch.tensor(0.25))
    schedule = make(o)
    for _ in range(12):
        first, second, third = (float(group["lr"]) for group in o.param_groups)
        assert second == pytest.approx(0.1 * first)
        assert third == pytest.approx(0.25 * first)
        o.step()
        schedule.step()


@SCHEDULES
def test_learning_rates_in_tensors_stay_the_same_tensor(make):
    lr = torch.tensor(0.5, dtype=torch.float64)
    o, number = optimizer(lr), optimizer(0.5)
    tensors, numbers = trace(o, make(o), 12), trace(number, make(number), 12)
    assert tensors == pytest.approx(numbers)
    assert o.param_groups[0]["lr"] is lr


@SCHEDULES
def test_resuming_from_a_state_dict(make):
    o = optimizer(1.0)
    expected = trace(o, make(o), 12)
    first = optimizer(1.0)
    schedule = make(first)
    assert trace(first, schedule, 5) == expected[:5]
    fresh = optimizer(1.0)
    resumed = make(fresh)
    fresh.load_state_dict(first.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    assert trace(fresh, resumed, 7) == expected[5:]


@SCHEDULES
def test_resuming_at_a_step_number(make):
    o = optimizer(1.0)
    expected = trace(o, make(o), 12)
    fresh = optimizer(0.0)
    fresh.param_groups[0]["initial_lr"] = 1.0
    resumed = make(fresh, last_epoch=4)
    assert trace(fresh, resumed, 7) == expected[5:]


@SCHEDULES
def test_in_sequence(make):
    o, alone = optimizer(1.0), optimizer(1.0)
    expected = trace(alone, make(alone), 8)
    both = SequentialLR(o, [make(o), make(o)], milestones=[8])
    assert trace(o, both, 16) == pytest.approx(expected * 2)


@SCHEDULES
def test_states_hold_plain_values_only(make, tmp_path):
    schedule = make(optimizer(1.0))
    torch.save(schedule.state_dict(), tmp_path / "state")
    assert torch.load(tmp_path / "state", weights_only=True) == schedule.state_dict()


def test_several_steps_at_once():
    one, other = (WarmupPolynomial(optimizer(6.4), 4, 20) for _ in range(2))
    for schedule in (one, other):
        schedule.optimizer.step()
    for count in (1, 2, 4, 5):
        one.advance(count)
        for _ in range(count):
            other.step()
        assert one.get_last_lr() == other.get_last_lr()
        assert one.last_epoch == other.last_epoch
    with pytest.raises(ValueError, match="WarmupPolynomial: steps must be >= 1, got 0"):
        one.advance(0)


@SCHEDULES
def test_a_scale_acts_at_once_on_all_that_follows_and_is_resumed(make):
    alone = optimizer(1.0)
    expected = trace(alone, make(alone), 12)
    tensor = torch.tensor(1.0, dtype=torch.float64)
    for o in (optimizer(1.0, 0.1), optimizer(tensor, 0.1)):
        schedule = make(o)
        assert trace(o, schedule, 5) == pytest.approx(expected[:5])
        schedule.rescale(4.0)
        assert schedule.get_last_lr() == pytest.approx([4 * expected[5], 0.4 * expected[5]])
        assert trace(o, schedule, 3) == pytest.approx([4 * lr for lr in expected[5:8]])
        schedule.rescale(2.0)  # relative to the beginning
        fresh = optimizer(1.0, 0.1)
        resumed = make(fresh)
        fresh.load_state_dict(o.state_dict())
        resumed.load_state_dict(schedule.state_dict())
        assert trace(fresh, resumed, 4) == pytest.approx([2 * lr for lr in expected[8:]])
    assert o.param_groups[0]["lr"] is tensor
    for scale in (0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"scale must be in \(0, inf\)"):
            schedule.rescale(scale)


# ---- bad input ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_steps": 0, "warmup_steps": 0}, "total_steps must be >= 1, got 0"),
        ({"warmup_steps": -1}, r"warmup_steps must be in \[0, 10\] \(total_steps\), got -1"),
        ({"warmup_steps": 11}, r"warmup_steps must be in \[0, 10\] \(total_steps\), got 11"),
        ({"power": 0.0}, r"power must be in \(0, inf\), got 0.0"),
        ({"power": math.nan}, "power must be"),
        ({"init_factor": 1.5}, r"init_factor must be in \[0, 1\], got 1.5"),
    ],
)
@pytest.mark.parametrize("kind", [WarmupPolynomial, WarmupCosine])
def test_bad_arguments_are_named(kind, arguments, message):
    o = optimizer(1.0)
    with pytest.raises(ValueError, match=f"{kind.__name__}: {message}"):
        kind(o, **({"warmup_steps": 3, "total_steps": 10} | arguments))
    assert o.param_groups[0]["lr"] == 1.0


@pytest.mark.parametrize("drops", [((0.8, 0.1), (0.5, 0.01)), ((0.5, -0.1),), ((0.0, 0.1),), ((0.5, 0.1), (0.5, 0.2))])
def test_bad_drops_are_named(drops):
    with pytest.raises(ValueError, match="WarmupPolynomial: drops must be pairs"):
        WarmupPolynomial(optimizer(1.0), 3, 10, drops=drops)


def test_bad_final_factor_is_named():
    with pytest.raises(ValueError, match=r"WarmupCosine: final_factor must be in \[0, 1\], got 2.0"):
        WarmupCosine(optimizer(1.0), 3, 10, final_factor=2.0)


# ---- rules ----


def test_warmup_factor():
    assert warmup_factor(0, 10, power=0.5, init_factor=0.25) == 0.25
    assert warmup_factor(5, 10, power=1.0, init_factor=0.0) == 0.5
    assert warmup_factor(5, 10, power=2.0, init_factor=0.0) == 0.75
    assert warmup_factor(5, 10, power=0.5, init_factor=1.0) == 1.0


def test_scaling_learning_rates():
    assert scale_lr(0.1, 2048, 256) == pytest.approx(0.8)  # the two settings that the authors of NLCG give
    assert scale_lr(0.1, 4096, 256) == pytest.approx(1.6)
    assert scale_lr(0.4, 64, 256) == pytest.approx(0.1)
    assert scale_lr(0.1, 4096, 256, rule="sqrt") == pytest.approx(0.4)
    for rule in ("linear", "sqrt"):
        assert scale_lr(0.1, 256, 256, rule=rule) == 0.1
        assert scale_lr(scale_lr(0.1, 512, 32, rule=rule), 32, 512, rule=rule) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.1, 0, 256), "batch must be >= 1, got 0"),
        ((0.1, 256, 0), "base_batch must be >= 1, got 0"),
        ((-0.1, 256, 256), "lr must be"),
        ((math.nan, 256, 256), "lr must be"),
    ],
)
def test_bad_scaling_is_named(arguments, message):
    with pytest.raises(ValueError, match=f"scale_lr: {message}"):
        scale_lr(*arguments)
    with pytest.raises(UnknownName, match="unknown scaling rule 'lineer'; did you mean 'linear'"):
        scale_lr(0.1, 256, 256, rule="lineer")


# ---- batches that grow ----


def test_batches_by_epoch():
    schedule = BatchSizeSchedule([(0, 100), (2, 200), (5, 50)])
    assert [schedule.batch_at(epoch) for epoch in range(8)] == [100, 100, 200, 200, 200, 50, 50, 50]
    assert schedule.steps(1000, 4) == 10 + 10 + 5 + 5
    assert schedule.steps(1000, 7) == 10 + 10 + 5 + 5 + 5 + 20 + 20


@pytest.mark.parametrize(
    ("milestones", "steps"),  # of 15 epochs of 1437 digits
    [([(0, 64)], 330), ([(0, 64), (8, 512)], 190), ([(0, 32), (6, 128), (11, 512)], 327), ([(0, 64), (20, 512)], 330)],
)
def test_the_steps_are_those_that_the_sampler_takes(milestones, steps):
    schedule = BatchSizeSchedule(milestones)
    assert schedule.steps(1437, 15) == steps
    sampler = GlobalBatchSampler(1437, schedule)
    sizes = [(sampler.epoch, len(batch)) for batch in islice(sampler, steps + 1)]
    assert [epoch for epoch, _ in sizes[-2:]] == [14, 15]
    assert all(size == schedule.batch_at(epoch) for epoch, size in sizes)


def test_part_of_an_epoch_is_rounded_to_whole_steps():
    schedule = BatchSizeSchedule([(0, 100), (2, 200)])
    assert [schedule.steps(1000, epochs) for epochs in (0.01, 0.5, 1.94, 2.5, 2.7)] == [0, 5, 19, 22, 24]


def test_accumulation_follows_the_batch():
    schedule = BatchSizeSchedule([(0, 48), (1, 96), (2, 384)], world_size=4, micro_batch=24)
    assert [schedule.accumulation_at(epoch) for epoch in range(3)] == [1, 1, 4]
    assert BatchSizeSchedule([(0, 96)], world_size=4).accumulation_at(0) == 1


@pytest.mark.parametrize(
    ("lr", "factors"), [("constant", [1, 1, 1]), ("linear", [1, 4, 0.5]), ("sqrt", [1, 2, 0.5**0.5])]
)
def test_learning_rates_follow_the_batch(lr, factors):
    schedule = BatchSizeSchedule([(0, 64), (1, 256), (2, 32)], lr=lr)
    assert [schedule.lr_factor_at(epoch) for epoch in range(3)] == pytest.approx(factors)


def test_a_saved_schedule_replaces_another():
    schedule = BatchSizeSchedule([(0, 64), (3, 128)], lr="sqrt")
    other = BatchSizeSchedule([(0, 32)], world_size=2)
    other.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
    assert (other.milestones, other.lr, other.world_size) == (((0, 64), (3, 128)), "sqrt", 2)
    with pytest.raises(ValueError, match="multiple of world_size = 2, got 5"):
        other.load_state_dict({"milestones": [[0, 5]], "lr": "constant"})
    assert other.batch_at(3) == 128


@pytest.mark.parametrize(
    ("milestones", "arguments", "message"),
    [
        ([], {}, r"milestones must be pairs .* the first 0, got \[\]"),
        ([(1, 10)], {}, "milestones must be pairs .* the first 0"),
        ([(0, 10), (3, 20), (3, 30)], {}, "milestones must be pairs .* growing epochs"),
        ([(0, 10), (3, 20), (2, 30)], {}, "milestones must be pairs .* growing epochs"),
        ([(0, 10), (2.5, 20)], {}, "milestones must be pairs of integers"),
        ([(0, 10), (3, 0)], {}, "milestones must be of batches >= 1"),
        ([(0, 10)], {"world_size": 0}, "world_size must be >= 1, got 0"),
        ([(0, 10)], {"micro_batch": 0}, "micro_batch must be >= 1 or None, got 0"),
        ([(0, 100)], {"world_size": 3}, "the batch must be a multiple of world_size = 3, got 100"),
        ([(0, 24), (1, 100)], {"micro_batch": 24}, "the batch must be at most 24 .* or a multiple of that, got 100"),
    ],
)
def test_bad_batch_schedules_are_named(milestones, arguments, message):
    with pytest.raises(ValueError, match=f"BatchSizeSchedule: {message}"):
        BatchSizeSchedule(milestones, **arguments)


def test_bad_questions_to_a_batch_schedule_are_named():
    schedule = BatchSizeSchedule([(0, 10), (1, 40)])
    with pytest.raises(UnknownName, match="unknown scaling rule 'liner'; did you mean 'linear'"):
        BatchSizeSchedule([(0, 10)], lr="liner")
    with pytest.raises(ValueError, match="epoch must be >= 0, got -1"):
        schedule.batch_at(-1)
    with pytest.raises(ValueError, match="steps: n must be >= 40, the largest batch, got 39"):
        schedule.steps(39, 4)
    with pytest.raises(ValueError, match=r"epochs must be in \(0, inf\), got 0"):
        schedule.steps(40, 0)
