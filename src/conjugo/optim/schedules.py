"""Learning-rate schedules as standard torch schedulers, batch-size schedules, and rules that scale the one with the other.

Every schedule is a closed form: the learning rate of step t is the group's initial learning rate times ``factor(t)``, and
times a constant where the batch has changed (:meth:`ScheduleLR.rescale`). So it resumes from its ``state_dict``, takes its
place in a ``SequentialLR``, keeps the ratio of the groups' learning rates, and updates learning rates that are 0-d tensors in
place. Call ``scheduler.step()`` after every optimizer step.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from conjugo.errors import check, unknown

__all__ = [
    "BatchSizeSchedule",
    "LRScaling",
    "ScheduleLR",
    "WarmupCosine",
    "WarmupPolynomial",
    "scale_lr",
    "warmup_factor",
]

LRScaling = Literal["constant", "linear", "sqrt"]
"""How a learning rate follows the batch size: not at all, in proportion, or with its square root."""


class ScheduleLR(LRScheduler):
    """Base of closed-form schedules: subclasses define :meth:`factor`.

    Their attributes must be set before ``super().__init__``, which applies the factor of the first step.
    """

    scale: float = 1.0
    """What all learning rates are multiplied with besides; :meth:`rescale` sets it."""

    def factor(self, t: int) -> float:
        """What the initial learning rates are multiplied with in step *t* (0, 1, 2, ...)."""
        raise NotImplementedError

    def get_lr(self) -> list[float | Tensor]:
        """The learning rates of the current step, one for each parameter group."""
        factor = self.factor(self.last_epoch) * self.scale
        return [lr * factor for lr in self.base_lrs]

    def advance(self, steps: int) -> None:
        """Go on by *steps* >= 1 steps at once: where a step has as many examples as that many of those that are counted in."""
        check(steps >= 1, type(self).__name__, "steps", steps, ">= 1")
        self.last_epoch += steps - 1
        self.step()

    def rescale(self, scale: float) -> None:
        """From now on, also in the current step, multiply the scheduled learning rates by *scale*, > 0.

        For a batch whose size changes; *scale* is relative to the initial learning rates, not to an earlier scale. It is in
        the ``state_dict``. Raises ValueError for a scale out of range.
        """
        check(0 < scale < math.inf, type(self).__name__, "scale", scale, "in (0, inf)")
        self.scale = scale
        for group, lr in zip(self.optimizer.param_groups, self.get_lr()):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


class WarmupPolynomial(ScheduleLR):
    r"""Polynomial warm-up, then a piecewise constant rate.

    .. math::
        \frac{\gamma_t}{\gamma_{max}} = \begin{cases}
        1 - (1 - f_0) (1 - t / W)^p & t < W \\
        \text{the multiplier of the last drop } (s, c) \text{ with } t > \lfloor s T \rfloor, \text{ or } 1 & t \geq W
        \end{cases}

    With power 1/2 the rise is slow at first and steep at the end: half way it is 29 % complete. The defaults are from
    the CIFAR experiments of Adya, Palakkode & Tuzel 2018 (arXiv:1812.02886), where 200 epochs had a warm-up of 25.

    Args:
        optimizer: its groups' learning rates are the maxima :math:`\gamma_{max}`.
        warmup_steps: :math:`W`, in [0, total_steps].
        total_steps: :math:`T \geq 1`.
        power: :math:`p > 0`.
        init_factor: :math:`f_0`, the first learning rate as a fraction of the maximum, in [0, 1].
        drops: pairs (fraction :math:`s` of all steps, multiplier :math:`c` of the maximum) in the order of growing
            fractions. A fraction above 1 takes effect when training is continued beyond *total_steps*.
        last_epoch: the index of the last step when resuming without a ``state_dict``; -1 starts afresh.

    Raises:
        ValueError: an argument is out of its range.

    >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=6.4)
    >>> schedule = WarmupPolynomial(optimizer, warmup_steps=76, total_steps=610)  # batch 16,384 of 50,000, 200 epochs
    >>> [round(6.4 * schedule.factor(t), 4) for t in (0, 38, 76, 311, 312, 466, 467)]
    [0.0, 1.8745, 6.4, 6.4, 0.64, 0.64, 0.064]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int,
        total_steps: int,
        *,
        power: float = 0.5,
        init_factor: float = 0.0,
        drops: tuple[tuple[float, float], ...] = ((0.51, 0.1), (0.765, 0.01), (1.02, 0.001)),
        last_epoch: int = -1,
    ) -> None:
        _check_warmup("WarmupPolynomial", warmup_steps, total_steps, power, init_factor)
        ordered = all(early < late for (early, _), (late, _) in pairwise(drops))
        check(
            ordered and all(fraction > 0 and multiplier >= 0 for fraction, multiplier in drops),
            "WarmupPolynomial",
            "drops",
            drops,
            "pairs (fraction > 0, multiplier >= 0) with growing fractions",
        )
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.power = power
        self.init_factor = init_factor
        self.drops = drops
        super().__init__(optimizer, last_epoch)

    def factor(self, t: int) -> float:
        """The learning rate of step *t* as a fraction of the maximum."""
        if t < self.warmup_steps:
            return warmup_factor(t, self.warmup_steps, power=self.power, init_factor=self.init_factor)
        passed = [multiplier for fraction, multiplier in self.drops if t > int(fraction * self.total_steps)]
        return passed[-1] if passed else 1.0


class WarmupCosine(ScheduleLR):
    """Polynomial warm-up (linear by default), half a cosine down to *final_factor* at *total_steps*, then constant.

    Args:
        optimizer: its groups' learning rates are the maxima.
        warmup_steps: in [0, total_steps].
        total_steps: at least 1.
        power: of the warm-up (see :func:`warmup_factor`), above 0.
        init_factor: the first learning rate as a fraction of the maximum, in [0, 1].
        final_factor: the last learning rate as a fraction of the maximum, in [0, 1].
        last_epoch: the index of the last step when resuming without a ``state_dict``; -1 starts afresh.

    Raises:
        ValueError: an argument is out of its range.

    Source of the cosine: Loshchilov & Hutter 2017 (arXiv:1608.03983), equation 5, without restarts.

    >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    >>> schedule = WarmupCosine(optimizer, warmup_steps=10, total_steps=110, final_factor=0.1)
    >>> [round(schedule.factor(t), 3) for t in (0, 5, 10, 60, 110)]
    [0.0, 0.5, 1.0, 0.55, 0.1]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int,
        total_steps: int,
        *,
        power: float = 1.0,
        init_factor: float = 0.0,
        final_factor: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        _check_warmup("WarmupCosine", warmup_steps, total_steps, power, init_factor)
        check(0 <= final_factor <= 1, "WarmupCosine", "final_factor", final_factor, "in [0, 1]")
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.power = power
        self.init_factor = init_factor
        self.final_factor = final_factor
        super().__init__(optimizer, last_epoch)

    def factor(self, t: int) -> float:
        """The learning rate of step *t* as a fraction of the maximum."""
        if t < self.warmup_steps:
            return warmup_factor(t, self.warmup_steps, power=self.power, init_factor=self.init_factor)
        done = 1.0 if t >= self.total_steps else (t - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return self.final_factor + (1 - self.final_factor) * (1 + math.cos(math.pi * done)) / 2


class BatchSizeSchedule:
    r"""The global batch as a step function of the epoch: small batches first, large ones later.

    The noise of SGD's steps goes with :math:`\eta / B`. So a batch that grows by a factor, at a constant learning rate, takes
    the place of a learning rate that drops by it, and takes fewer steps for the same examples (Smith, Kindermans, Ying & Le
    2018, arXiv:1711.00489). As a means against the generalization gap of large batches: Gao & Zhong 2020, arXiv:2012.08795.

    An epoch is one pass of :class:`~conjugo.distributed.GlobalBatchSampler`, which takes a schedule as its ``global_batch``:
    :math:`\lfloor N / B \rfloor` steps, the rest that fills no batch is left out.

    Args:
        milestones: pairs (epoch, batch): from the epoch on a batch has so many examples, over all workers and micro-batches.
            The first epoch is 0, epochs grow, batches are at least 1 and may also shrink.
        lr: how the learning rate follows the batch (:meth:`lr_factor_at`): ``"constant"``, ``"linear"`` or ``"sqrt"``
            (:func:`scale_lr`).
        world_size: workers that share a batch in equal parts, at least 1.
        micro_batch: most examples that a worker takes at once, at least 1; None: its whole part.

    Raises:
        ValueError: an argument is out of its range, or a batch cannot be cut into equal parts.
        UnknownName: a scaling that does not exist.

    >>> schedule = BatchSizeSchedule([(0, 100), (2, 200)], lr="linear", world_size=2, micro_batch=50)
    >>> [(schedule.batch_at(epoch), schedule.accumulation_at(epoch), schedule.lr_factor_at(epoch)) for epoch in (1, 2)]
    [(100, 1, 1.0), (200, 2, 2.0)]
    >>> schedule.steps(1000, epochs=4)  # 10 + 10 + 5 + 5
    30
    """

    def __init__(
        self,
        milestones: Sequence[tuple[int, int]],
        *,
        lr: LRScaling = "constant",
        world_size: int = 1,
        micro_batch: int | None = None,
    ) -> None:
        owner = "BatchSizeSchedule"
        _check_milestones(milestones)
        if lr not in get_args(LRScaling):
            unknown("scaling rule", lr, get_args(LRScaling))
        check(world_size >= 1, owner, "world_size", world_size, ">= 1")
        check(micro_batch is None or micro_batch >= 1, owner, "micro_batch", micro_batch, ">= 1 or None")
        for _, batch in milestones:
            check(batch % world_size == 0, owner, "the batch", batch, f"a multiple of world_size = {world_size}")
            part = batch // world_size
            even = micro_batch is None or part <= micro_batch or part % micro_batch == 0
            accepted = f"at most {micro_batch} (micro_batch) for each of {world_size} workers, or a multiple of that"
            check(even, owner, "the batch", batch, accepted)
        self.milestones = tuple((epoch, batch) for epoch, batch in milestones)
        self.lr = lr
        self.world_size = world_size
        self.micro_batch = micro_batch

    def batch_at(self, epoch: int) -> int:
        """Examples in each batch of epoch *epoch* = 0, 1, ..., over all workers."""
        check(epoch >= 0, "BatchSizeSchedule", "epoch", epoch, ">= 0")
        return self.milestones[bisect_right([first for first, _ in self.milestones], epoch) - 1][1]

    def accumulation_at(self, epoch: int) -> int:
        """Micro-batches whose gradients each worker adds up for one step of epoch *epoch*."""
        part = self.batch_at(epoch) // self.world_size
        return 1 if self.micro_batch is None else -(-part // self.micro_batch)

    def lr_factor_at(self, epoch: int) -> float:
        """What the learning rate of the first batch size is multiplied with in epoch *epoch*."""
        if self.lr == "constant":
            return 1.0
        return scale_lr(1.0, self.batch_at(epoch), self.milestones[0][1], self.lr)

    def steps(self, n: int, epochs: float) -> int:
        """Steps in the first *epochs* > 0 passes through *n* examples: what a learning-rate schedule is to be told.

        Of an unfinished epoch its steps are counted in proportion, and rounded. Raises ValueError for a batch larger than *n*.
        """
        owner = "BatchSizeSchedule.steps"
        check(0 < epochs < math.inf, owner, "epochs", epochs, "in (0, inf)")
        largest = max(batch for _, batch in self.milestones)
        check(n >= largest, owner, "n", n, f">= {largest}, the largest batch")
        count = 0.0
        ends = [*(epoch for epoch, _ in self.milestones[1:]), math.inf]
        for (first, batch), end in zip(self.milestones, ends):
            count += max(0.0, min(epochs, end) - first) * (n // batch)
        return round(count)

    def state_dict(self) -> dict[str, Any]:
        """The schedule as plain values; how far training is in it the sampler knows."""
        return {"milestones": [list(pair) for pair in self.milestones], "lr": self.lr}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with a saved schedule instead of this one, for these workers. Raises what the constructor raises."""
        saved = [(epoch, batch) for epoch, batch in state_dict["milestones"]]
        other = BatchSizeSchedule(saved, lr=state_dict["lr"], world_size=self.world_size, micro_batch=self.micro_batch)
        self.milestones, self.lr = other.milestones, other.lr


def warmup_factor(t: int, warmup_steps: int, *, power: float, init_factor: float) -> float:
    """1 - (1 - init_factor) (1 - t / warmup_steps)^power for 0 <= t < warmup_steps: from init_factor up to 1.

    Power 1 is linear; below 1 the rise starts slowly and ends steeply. Source: the training recipe of Adya, Palakkode &
    Tuzel 2018 (arXiv:1812.02886), with power 1/2.
    """
    remaining: float = (1 - t / warmup_steps) ** power
    return 1 - (1 - init_factor) * remaining


def scale_lr(
    lr: float,
    batch: int,
    base_batch: int,
    rule: Literal["linear", "sqrt", "noise"] = "linear",
    *,
    noise_scale: float | None = None,
) -> float:
    """The learning rate for *batch* examples, given a good one for *base_batch*.

    ``linear``: lr * batch / base_batch, for SGD and its relatives (Goyal et al. 2017, arXiv:1706.02677).
    ``sqrt``: lr * sqrt(batch / base_batch), for adaptive methods (Krizhevsky 2014, arXiv:1404.5997; You et al. 2020,
    arXiv:1904.00962). ``noise``: lr * (1 + b / base_batch) / (1 + b / batch) with b = *noise_scale*, the gradient noise scale
    in examples: linear below it, constant beyond (McCandlish et al. 2018, arXiv:1812.06162, equation 2.7).
    Raises ``ValueError`` for a batch below 1, a negative lr, an unknown rule or one without its noise scale.

    >>> scale_lr(0.1, batch=16384, base_batch=256)
    6.4
    >>> round(scale_lr(0.1, batch=16384, base_batch=256, rule="noise", noise_scale=1024), 3)
    0.471
    """
    check(0 <= lr < math.inf, "scale_lr", "lr", lr, "in [0, inf)")
    check(batch >= 1, "scale_lr", "batch", batch, ">= 1")
    check(base_batch >= 1, "scale_lr", "base_batch", base_batch, ">= 1")
    if rule not in ("linear", "sqrt", "noise"):
        unknown("scaling rule", rule, ("linear", "sqrt", "noise"))
    good = noise_scale is None if rule != "noise" else noise_scale is not None and 0 <= noise_scale < math.inf
    accepted = "a number >= 0" if rule == "noise" else f"None with the rule {rule!r}"
    check(good, "scale_lr", "noise_scale", noise_scale, accepted)
    ratio = batch / base_batch
    if noise_scale is not None:
        return lr * (1 + noise_scale / base_batch) / (1 + noise_scale / batch)
    return lr * (ratio if rule == "linear" else math.sqrt(ratio))


def _check_milestones(milestones: Sequence[tuple[int, int]]) -> None:
    epochs = [epoch for epoch, _ in milestones]
    good = epochs[:1] == [0] and all(early < late for early, late in pairwise(epochs))
    good = good and all(isinstance(number, int) for pair in milestones for number in pair)
    accepted = "pairs of integers (epoch, batch) with growing epochs, the first 0"
    check(good, "BatchSizeSchedule", "milestones", milestones, accepted)
    check(all(batch >= 1 for _, batch in milestones), "BatchSizeSchedule", "milestones", milestones, "of batches >= 1")


def _check_warmup(owner: str, warmup_steps: int, total_steps: int, power: float, init_factor: float) -> None:
    check(total_steps >= 1, owner, "total_steps", total_steps, ">= 1")
    check(0 <= warmup_steps <= total_steps, owner, "warmup_steps", warmup_steps, f"in [0, {total_steps}] (total_steps)")
    check(0 < power < math.inf, owner, "power", power, "in (0, inf)")
    check(0 <= init_factor <= 1, owner, "init_factor", init_factor, "in [0, 1]")
