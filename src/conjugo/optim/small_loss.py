"""Gradients from the examples that are not learnt yet: the small losses of a batch are left out."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from conjugo.errors import check, unknown

__all__ = ["DiscardSmallLoss", "kept_count", "largest", "not_below"]

Denominator = Literal["kept", "batch"]
Selection = Literal["local", "global"]
NonFinite = Literal["raise", "keep"]


class DiscardSmallLoss:
    r"""The mean loss of a batch over its largest losses only.

    Of the B losses of a batch the :math:`\lceil (1 - q) B \rceil` largest are kept; the gradient is that of their mean. Late in
    training most examples of a large batch are learnt, and their gradients next to nothing: without them the others count more.
    A means against the generalization gap of large batches (Gao & Zhong 2020, arXiv:2012.08795; the formulas are ours). With
    small batches it changes little. With imbalanced classes or wrong labels it looks at just the hard or wrong examples: see
    *drop_top*, and measure calibration.

    There are two ways to use it. Losses of one forward pass, all of which went through the model:

    >>> losses = torch.tensor([3.0, 1.0, 2.0, 0.0])  # cross_entropy(model(x), y, reduction="none")
    >>> discard = DiscardSmallLoss(0.5)
    >>> discard(losses)
    tensor(2.5000)

    Or a forward pass without gradients, then one with gradients for the kept examples only. In units of a forward pass (a
    backward pass is about two) that takes 1 + 3 (1 - q) instead of 3: less where q > 1/3. Batch norm then sees the kept only.

    >>> keep = discard.keep_mask(losses)
    >>> keep.tolist()
    [True, False, True, False]
    >>> discard.mean(losses[keep], keep)  # losses of model(x[keep])
    tensor(2.5000)

    Args:
        q: fraction that is discarded, in [0, 1).
        threshold: discard losses below this instead; *q* then does not count. None: go by *q*.
        warmup_steps: nothing is discarded in so many first steps, at least 0. Call :meth:`step` after each step.
        total_steps: if given, nothing is discarded in the last *tail* of so many steps.
        tail: fraction of *total_steps*, in [0, 1].
        denominator: ``"kept"``: the mean over the kept examples. ``"batch"``: their sum divided by B, by which each gradient
            counts as it does in the whole batch.
        selection: among several workers. ``"local"``: each selects among its own losses; nothing is communicated. ``"global"``:
            among the losses of all; collective. The means of the workers are then scaled so that their average, which DDP and
            FSDP take, is the mean over the kept examples of all: what one worker would get. Each keeps at least its largest
            loss, since it must take part in the backward pass.
        drop_top: fraction with the largest losses that is discarded too, against wrong labels, in [0, 1 - q).
        nonfinite: ``"raise"``: losses that are NaN or infinite are an error. ``"keep"``: they are kept, for a caller that looks
            at the result; then nothing waits for an accelerator.
        process_group: the workers of ``"global"``; None: all.

    Attribute ``steps``: steps done, 0 at first. Among equal losses those with lower indices are kept first.

    Raises:
        ValueError: an argument is out of its range; losses are not [B] with B >= 1, or not finite.
        UnknownName: a choice that does not exist.
    """

    def __init__(
        self,
        q: float = 0.3,
        *,
        threshold: float | None = None,
        warmup_steps: int = 0,
        total_steps: int | None = None,
        tail: float = 0.1,
        denominator: Denominator = "kept",
        selection: Selection = "local",
        drop_top: float = 0.0,
        nonfinite: NonFinite = "raise",
        process_group: Any = None,
    ) -> None:
        owner = "DiscardSmallLoss"
        check(0 <= q < 1, owner, "q", q, "in [0, 1)")
        finite = threshold is None or math.isfinite(threshold)
        check(finite, owner, "threshold", threshold, "a finite number or None")
        check(warmup_steps >= 0, owner, "warmup_steps", warmup_steps, ">= 0")
        check(total_steps is None or total_steps >= 1, owner, "total_steps", total_steps, ">= 1 or None")
        check(0 <= tail <= 1, owner, "tail", tail, "in [0, 1]")
        room = 1.0 if threshold is not None else 1 - q
        check(0 <= drop_top < room, owner, "drop_top", drop_top, f"in [0, {room:g}): not all may be discarded")
        for argument, value, choice in (
            ("denominator", denominator, Denominator),
            ("selection", selection, Selection),
            ("nonfinite", nonfinite, NonFinite),
        ):
            if value not in get_args(choice):
                unknown(argument, value, get_args(choice))
        self.q = q
        self.threshold = threshold
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.tail = tail
        self.denominator = denominator
        self.selection = selection
        self.drop_top = drop_top
        self.nonfinite = nonfinite
        self.process_group = process_group
        self.steps = 0

    def __call__(self, losses: Tensor) -> Tensor:
        """The mean (0-d) of the losses [B] that are kept; backward goes through these. Collective if *selection* is global."""
        keep = self.keep_mask(losses)
        return self.mean(torch.where(keep, losses, 0.0), keep)

    @torch.no_grad()
    def keep_mask(self, losses: Tensor) -> Tensor:
        """Which of the losses [B] of this worker are kept: bool [B]. Collective if *selection* is global."""
        check(losses.ndim == 1 and len(losses) > 0, "DiscardSmallLoss", "losses", tuple(losses.shape), "of shape [B]")
        workers = self._workers()
        sizes = [len(losses)]
        if workers > 1:
            losses, sizes = self._gathered(losses, workers)
        rank = dist.get_rank(self.process_group) if workers > 1 else 0
        if self.nonfinite == "raise":
            bad = losses.isfinite().logical_not_().sum().item()
            check(bad == 0, "DiscardSmallLoss", "losses", f"{bad} of {len(losses)} that are not", "finite")
        mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        if not self.active:
            return torch.ones_like(losses[mine], dtype=torch.bool)
        if self.threshold is None:
            keep = largest(losses, q=self.q, drop_top=self.drop_top)
        else:
            keep = not_below(losses, self.threshold, drop_top=self.drop_top)
        keep |= losses.isfinite().logical_not_()
        keep = keep[mine]
        # Also a worker whose losses are all small keeps one. On the device: nobody waits.
        one = torch.zeros_like(keep).index_fill_(0, losses[mine].argmax(), True)
        return torch.where(keep.any(), keep, one)

    def mean(self, kept: Tensor, keep: Tensor) -> Tensor:
        """The mean (0-d) over the *kept* losses, [number kept], by the *denominator*; *keep*: from :meth:`keep_mask`.

        Collective if *selection* is global.
        """
        workers = self._workers()
        count = keep.sum() if self.denominator == "kept" else torch.tensor(len(keep), device=keep.device)
        if workers > 1:
            dist.all_reduce(count, group=self.process_group)
        return kept.sum() * workers / count

    def step(self) -> None:
        """A step of the optimizer is done."""
        self.steps += 1

    @property
    def active(self) -> bool:
        """Whether anything is discarded in the present step."""
        begun = self.steps >= self.warmup_steps
        return begun and (self.total_steps is None or self.steps < (1 - self.tail) * self.total_steps)

    def state_dict(self) -> dict[str, int]:
        """The number of steps done."""
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from there."""
        self.steps = state_dict["steps"]

    def _workers(self) -> int:
        """How many select together."""
        if self.selection == "local" or not (dist.is_available() and dist.is_initialized()):
            return 1
        return dist.get_world_size(self.process_group)

    def _gathered(self, losses: Tensor, workers: int) -> tuple[Tensor, list[int]]:
        """Collective: the losses of all workers, one after the other, and how many each has."""
        own = torch.tensor([len(losses)], device=losses.device)
        counts = [torch.empty_like(own) for _ in range(workers)]
        dist.all_gather(counts, own, group=self.process_group)
        sizes = [int(count) for count in counts]
        padded = torch.nn.functional.pad(losses, (0, max(sizes) - len(losses)))
        found = [torch.empty_like(padded) for _ in range(workers)]
        dist.all_gather(found, padded, group=self.process_group)
        return torch.cat([part[:size] for part, size in zip(found, sizes)]), sizes


def kept_count(batch: int, q: float, drop_top: float = 0.0) -> int:
    """How many of *batch* >= 1 examples :func:`largest` keeps: batch - floor(q batch) - floor(drop_top batch), >= 1.

    >>> kept_count(10, 0.7)
    3
    """
    return batch - _floor(q * batch) - _floor(drop_top * batch)


def largest(losses: Tensor, *, q: float, drop_top: float = 0.0) -> Tensor:
    """bool [B]: without the fraction *q* of smallest *losses* [B] and the fraction *drop_top* of largest ones.

    Both are rounded down to whole examples. Among equal losses lower indices count as larger.
    """
    first = _floor(drop_top * len(losses))
    order = losses.argsort(descending=True, stable=True)
    return _mask(order[first : first + kept_count(len(losses), q, drop_top)], len(losses))


def not_below(losses: Tensor, threshold: float, *, drop_top: float = 0.0) -> Tensor:
    """bool [B]: the *losses* [B] that are >= *threshold*, without the fraction *drop_top* of largest ones of the batch."""
    order = losses.argsort(descending=True, stable=True)
    return _mask(order[_floor(drop_top * len(losses)) :], len(losses)) & (losses >= threshold)


def _mask(indices: Tensor, n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.bool, device=indices.device).index_fill_(0, indices, True)


def _floor(product: float) -> int:
    """Rounded down, where 0.29 * 100 = 28.999999999999996 counts as 29."""
    return math.floor(product * (1 + 1e-12))
