"""A batch that grows with the measured noise of the gradient.

It lives here and not beside :class:`~conjugo.optim.schedules.BatchSizeSchedule`, which knows all sizes beforehand: this one
needs a monitor of the gradient noise scale.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist

from conjugo.errors import check, unknown
from conjugo.optim.schedules import scale_lr
from conjugo.scaling.noise_monitor import NoiseScaleMonitor

__all__ = ["BatchLR", "MeasuredBatchSize"]

BatchLR = Literal["constant", "linear", "sqrt", "noise"]
"""How a learning rate follows the batch; noise: by the law 1 / (1 + B_simple / B), with the noise scale at that time."""


class MeasuredBatchSize:
    """A batch that doubles when an epoch begins and the gradient noise scale allows it.

    The next size is taken once the lower end of the 95 % interval of B_simple, times *fraction*, has reached it; it is twice
    the last one, so that a size is at most doubled in an epoch. With *shrink* it is halved where the upper end, times
    *fraction*, has fallen below a half of it. What lies between changes nothing.

    It is a ``global_batch`` of :class:`~conjugo.distributed.GlobalBatchSampler`. The number of steps is not known
    beforehand: let a learning-rate schedule count examples, in steps of the first batch (:meth:`steps`), and go on by
    ``batch_at(epoch) // batch_min`` of them in each step (:meth:`~conjugo.optim.schedules.ScheduleLR.advance`).

    Args:
        monitor: is read when an epoch begins, and may be set later.
        batch_min: the first batch, and the smallest one, >= 1.
        batch_max: no batch is larger; >= *batch_min*.
        fraction: of the noise scale that the batch may reach, > 0. At 1 a batch takes about twice the examples of a small one
            (McCandlish et al. 2018, arXiv:1812.06162).
        lr: how the learning rate follows (:meth:`lr_factor_at`).
        shrink: whether the batch may also become smaller.
        least: finite updates of the monitor before the first decision, >= 1.
        process_group: of the ranks that share the batches; all do what its first one decides. By default all ranks.

    Raises ValueError for an argument out of its range, UnknownName for a rule that does not exist.

    >>> monitor = NoiseScaleMonitor()
    >>> sizes = MeasuredBatchSize(monitor, batch_min=32, batch_max=256)
    >>> for step in range(20):  # tr Sigma = 300, |G|^2 = 1
    ...     monitor.update(1 + 300 / 16, 1 + 300 / 32, b_small=16, b_big=32)
    >>> sizes.batch_at(0), sizes.batch_at(1)
    (32, 64)
    """

    def __init__(
        self,
        monitor: NoiseScaleMonitor | None,
        batch_min: int,
        batch_max: int,
        *,
        fraction: float = 1.0,
        lr: BatchLR = "constant",
        shrink: bool = False,
        least: int = 8,
        process_group: Any = None,
    ) -> None:
        owner = "MeasuredBatchSize"
        check(batch_min >= 1, owner, "batch_min", batch_min, ">= 1")
        check(batch_max >= batch_min, owner, "batch_max", batch_max, f">= {batch_min}, the first batch")
        check(0 < fraction < math.inf, owner, "fraction", fraction, "in (0, inf)")
        check(least >= 1, owner, "least", least, ">= 1")
        if lr not in get_args(BatchLR):
            unknown("scaling rule", lr, get_args(BatchLR))
        self.monitor = monitor
        self.batch_min = batch_min
        self.batch_max = batch_max
        self.fraction = fraction
        self.lr = lr
        self.shrink = shrink
        self.least = least
        self._group = process_group
        self._asked = 0  # the last epoch that was decided about
        self._changes: list[tuple[int, int, float]] = [(0, batch_min, 1.0)]  # epoch, batch, factor of the learning rate

    @property
    def milestones(self) -> tuple[tuple[int, int], ...]:
        """Pairs (epoch, batch) so far: from the epoch on a batch had so many examples."""
        return tuple((epoch, batch) for epoch, batch, _ in self._changes)

    def batch_at(self, epoch: int) -> int:
        """Examples in each batch of epoch *epoch* = 0, 1, ...

        Collective where the epoch is later than all that were asked for: then it is decided.
        """
        check(epoch >= 0, "MeasuredBatchSize", "epoch", epoch, ">= 0")
        if epoch > self._asked:
            self._asked = epoch
            _, batch, factor = self._changes[-1]
            decided, b_simple = self._decide(batch)
            if decided != batch:
                self._changes.append((epoch, decided, self._factor(factor, batch, decided, b_simple)))
        return self._at(epoch)[1]

    def lr_factor_at(self, epoch: int) -> float:
        """What the learning rate of the first batch is multiplied with in epoch *epoch*."""
        return self._at(epoch)[2]

    def _at(self, epoch: int) -> tuple[int, int, float]:
        return self._changes[bisect_right([first for first, *_ in self._changes], epoch) - 1]

    def _decide(self, batch: int) -> tuple[int, float]:
        """The next batch, and the noise scale that it is for; the same on all ranks."""
        b_simple, (low, high) = math.nan, (0.0, math.inf)
        if self.monitor is not None and self.monitor.updates - self.monitor.skipped >= self.least:
            b_simple, (low, high) = self.monitor.b_simple, self.monitor.ci95
        if 2 * batch <= min(self.batch_max, self.fraction * low):
            decided = 2 * batch
        elif self.shrink and batch > self.batch_min and 2 * self.fraction * high < batch:
            decided = batch // 2
        else:
            decided = batch
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(self._group) > 1:
            device = "cuda" if "nccl" in str(dist.get_backend(self._group)) else "cpu"
            told = torch.tensor([decided, b_simple], dtype=torch.float64, device=device)
            dist.broadcast(told, group=self._group, group_src=0)
            decided, b_simple = int(told[0]), float(told[1])
        return decided, b_simple

    def _factor(self, before: float, batch: int, decided: int, b_simple: float) -> float:
        if self.lr == "constant":
            return before
        if self.lr == "noise":
            return before * (1 + b_simple / batch) / (1 + b_simple / decided)
        return scale_lr(1.0, decided, self.batch_min, self.lr)

    def steps(self, n: int, epochs: float) -> int:
        """Steps of the first batch in *epochs* > 0 passes through *n* examples: the clock of a learning-rate schedule."""
        check(0 < epochs < math.inf, "MeasuredBatchSize.steps", "epochs", epochs, "in (0, inf)")
        check(n >= self.batch_max, "MeasuredBatchSize.steps", "n", n, f">= {self.batch_max}, the largest batch")
        return max(1, round(epochs * n / self.batch_min))

    def state_dict(self) -> dict[str, Any]:
        """What was decided, as plain values; the monitor has a state of its own."""
        return {"asked": self._asked, "changes": [list(change) for change in self._changes]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave. Raises ValueError for another first batch."""
        changes = [(int(epoch), int(batch), float(factor)) for epoch, batch, factor in state["changes"]]
        first = changes[0][1]
        check(first == self.batch_min, "MeasuredBatchSize", "the saved batch_min", first, f"{self.batch_min} as here")
        self._asked, self._changes = int(state["asked"]), changes
