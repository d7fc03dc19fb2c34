"""Learning-rate schedules as standard torch schedulers, and the rules that scale a learning rate with the batch.

Every schedule is a closed form: the learning rate of step t is the group's initial learning rate times ``factor(t)``.
So it resumes from its ``state_dict``, takes its place in a ``SequentialLR``, keeps the ratio of the groups' learning
rates, and updates learning rates that are 0-d tensors in place. Call ``scheduler.step()`` after every optimizer step.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from conjugo.errors import check, unknown

__all__ = ["ScheduleLR", "WarmupCosine", "WarmupPolynomial", "scale_lr", "warmup_factor"]


class ScheduleLR(LRScheduler):
    """Base of closed-form schedules: subclasses define :meth:`factor`.

    Their attributes must be set before ``super().__init__``, which applies the factor of the first step.
    """

    def factor(self, t: int) -> float:
        """What the initial learning rates are multiplied with in step *t* (0, 1, 2, ...)."""
        raise NotImplementedError

    def get_lr(self) -> list[float | Tensor]:
        """The learning rates of the current step, one for each parameter group."""
        factor = self.factor(self.last_epoch)
        return [lr * factor for lr in self.base_lrs]


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


def warmup_factor(t: int, warmup_steps: int, *, power: float, init_factor: float) -> float:
    """1 - (1 - init_factor) (1 - t / warmup_steps)^power for 0 <= t < warmup_steps: from init_factor up to 1.

    Power 1 is linear; below 1 the rise starts slowly and ends steeply. Source: the training recipe of Adya, Palakkode &
    Tuzel 2018 (arXiv:1812.02886), with power 1/2.
    """
    remaining: float = (1 - t / warmup_steps) ** power
    return 1 - (1 - init_factor) * remaining


def scale_lr(lr: float, batch: int, base_batch: int, rule: Literal["linear", "sqrt"] = "linear") -> float:
    """The learning rate for *batch* examples, given a good one for *base_batch*.

    ``linear``: lr * batch / base_batch, for SGD and its relatives (Goyal et al. 2017, arXiv:1706.02677).
    ``sqrt``: lr * sqrt(batch / base_batch), for adaptive methods (Krizhevsky 2014, arXiv:1404.5997; You et al. 2020,
    arXiv:1904.00962). Raises ``ValueError`` for a batch below 1, a negative lr or an unknown rule.

    >>> scale_lr(0.1, batch=16384, base_batch=256)
    6.4
    """
    check(0 <= lr < math.inf, "scale_lr", "lr", lr, "in [0, inf)")
    check(batch >= 1, "scale_lr", "batch", batch, ">= 1")
    check(base_batch >= 1, "scale_lr", "base_batch", base_batch, ">= 1")
    if rule not in ("linear", "sqrt"):
        unknown("scaling rule", rule, ("linear", "sqrt"))
    ratio = batch / base_batch
    return lr * (ratio if rule == "linear" else math.sqrt(ratio))


def _check_warmup(owner: str, warmup_steps: int, total_steps: int, power: float, init_factor: float) -> None:
    check(total_steps >= 1, owner, "total_steps", total_steps, ">= 1")
    check(0 <= warmup_steps <= total_steps, owner, "warmup_steps", warmup_steps, f"in [0, {total_steps}] (total_steps)")
    check(0 < power < math.inf, owner, "power", power, "in (0, inf)")
    check(0 <= init_factor <= 1, owner, "init_factor", init_factor, "in [0, 1]")
