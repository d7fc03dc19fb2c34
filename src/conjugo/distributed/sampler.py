"""Global batches: the sequence of examples that training sees, the same for any number of workers, and how they share it."""

from __future__ import annotations

from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from conjugo.errors import check

__all__ = ["BatchSizes", "GlobalBatchSampler", "micro_batches", "share"]


class BatchSizes(Protocol):
    """Batch sizes that may change from epoch to epoch, such as :class:`~conjugo.optim.schedules.BatchSizeSchedule`."""

    def batch_at(self, epoch: int) -> int:
        """Examples in each batch of epoch *epoch*; asked once, when the epoch begins."""


class GlobalBatchSampler:
    """Batches of indices into *n* examples, epoch after epoch without end.

    Each epoch is a new permutation that depends on nothing but (n, seed, epoch), so that the batches depend on nothing
    but (n, global_batch, seed): not on how many workers share a batch, nor on torch's global generator. A worker takes
    its part of each batch itself.

    Args:
        n: number of examples, at least 1.
        global_batch: examples per batch, over all workers and micro-batches, in [1, n]; or an object whose
            ``batch_at(epoch)`` says it at the beginning of each epoch.
        seed: at least 0.
        shuffle: False: every epoch is 0, 1, ..., n-1.
        drop_last: leave out the rest of an epoch that does not fill a batch; otherwise it is a smaller batch.

    Iterating gives int64 tensors [global_batch] on the CPU. The sampler is its own iterator: a second ``iter`` goes on
    where the first one stopped, and ``state_dict`` is that place. The attribute ``global_batch`` is the size of the batches in
    the present epoch.

    Raises:
        ValueError: an argument is out of its range, or a loaded state belongs to other data.

    >>> sampler = GlobalBatchSampler(5, 2, shuffle=False)
    >>> [next(sampler).tolist() for _ in range(3)]
    [[0, 1], [2, 3], [0, 1]]
    """

    def __init__(
        self,
        n: int,
        global_batch: int | BatchSizes,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
    ) -> None:
        owner = "GlobalBatchSampler"
        check(n >= 1, owner, "n", n, ">= 1")
        check(seed >= 0, owner, "seed", seed, ">= 0")
        self.n = n
        self._sizes = None if isinstance(global_batch, int) else global_batch
        self.global_batch = self._checked(global_batch if isinstance(global_batch, int) else global_batch.batch_at(0))
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.epoch = 0
        self.consumed = 0  # examples of this epoch that were handed out
        self._order = self._permutation()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Tensor:
        left = self.n - self.consumed
        if left < (self.global_batch if self.drop_last else 1):
            if self._sizes is not None:
                self.global_batch = self._checked(self._sizes.batch_at(self.epoch + 1))
            self.epoch += 1
            self.consumed = 0
            self._order = self._permutation()
        batch = self._order[self.consumed : self.consumed + self.global_batch]
        self.consumed += len(batch)
        return batch

    def _checked(self, batch: int) -> int:
        accepted = f"in [1, {self.n}] (n, the number of examples)"
        check(1 <= batch <= self.n, "GlobalBatchSampler", "global_batch", batch, accepted)
        return batch

    def _permutation(self) -> Tensor:
        if not self.shuffle:
            return torch.arange(self.n)
        # Seeds that are close together, and (seed, epoch) pairs with equal sums, must not give related sequences.
        mixed = int(np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)[0])
        return torch.randperm(self.n, generator=torch.Generator().manual_seed(mixed))

    def state_dict(self) -> dict[str, Any]:
        """The place in the sequence, the batch there, and what the sequence depends on besides: plain numbers."""
        return {
            "n": self.n,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "epoch": self.epoch,
            "consumed": self.consumed,
            "global_batch": self.global_batch,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved place.

        A batch size that is a number may have changed since; one that changes with the epochs is the saved one to the end of
        the epoch.

        Raises ValueError, before anything changes, when the place is in the sequence of another n, seed or shuffle.
        """
        for name in ("n", "seed", "shuffle"):
            own = getattr(self, name)
            check(state_dict[name] == own, "GlobalBatchSampler", f"saved {name}", state_dict[name], f"{own!r} as here")
        self.epoch = state_dict["epoch"]
        self.consumed = state_dict["consumed"]
        if self._sizes is not None:  # states of older versions do not know it: then it had not changed
            self.global_batch = state_dict.get("global_batch", self.global_batch)
        self._order = self._permutation()


def share(batch: Tensor, rank: int, world: int) -> Tensor:
    """The part of a global batch that rank *rank* of *world* works on: a view of consecutive entries.

    batch: [B, ...], indices or the examples themselves. The parts of all ranks, one after the other, are the batch; their
    sizes differ by at most one, and the first ranks have the larger ones. Raises ValueError for a rank outside
    [0, *world* - 1] and for a batch smaller than *world*.

    >>> [share(torch.arange(8), rank, 3).tolist() for rank in range(3)]
    [[0, 1, 2], [3, 4, 5], [6, 7]]
    """
    check(world >= 1, "share", "world", world, ">= 1")
    check(0 <= rank < world, "share", "rank", rank, f"in [0, {world - 1}] (world = {world})")
    check(len(batch) >= world, "share", "the size of the batch", len(batch), f">= {world}, the number of ranks")
    return torch.tensor_split(batch, world)[rank]


def micro_batches(batch: Tensor, rank: int, world: int, *, size: int | None = None) -> tuple[list[Tensor], list[int]]:
    """The share of rank *rank* of *world* in a global batch, cut into as many micro-batches as those of all other ranks.

    Ranks that run a model together have to run it equally often: K = ceil(largest share / size) times.

    batch: [B, ...]. size: most examples that a rank can take at once; None: its whole share. Gives K parts, views of *batch*
    whose sizes differ by at most one, and the number of examples by which each counts. That is its size, except where
    *size* = 1 leaves a smaller share without an example for the last part: this is then the last example again and counts 0.
    Raises ValueError as :func:`share` does, and for *size* < 1.

    >>> batch = torch.arange(10)
    >>> [[part.tolist() for part in micro_batches(batch, rank, 2, size=2)[0]] for rank in range(2)]
    [[[0, 1], [2, 3], [4]], [[5, 6], [7, 8], [9]]]
    >>> micro_batches(torch.arange(3), 1, 2, size=1)
    ([tensor([2]), tensor([2])], [1, 0])
    """
    own = share(batch, rank, world)
    check(size is None or size >= 1, "micro_batches", "size", size, ">= 1 or None")
    largest = -(-len(batch) // world)
    count = 1 if size is None else -(-largest // size)
    if len(own) < count:
        return [*torch.split(own, 1), own[-1:]], [1] * len(own) + [0]
    parts = list(torch.tensor_split(own, count))
    return parts, [len(part) for part in parts]
