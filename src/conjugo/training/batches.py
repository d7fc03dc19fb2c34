"""Data on its way into the model: on the training device once, then gathered and augmented there."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from conjugo.distributed import micro_batches
from conjugo.training.data import Augment, Split

__all__ = ["Feed"]

_STANDARDISE_AT_ONCE = 256 * 2**20  # bytes of float32 images


class Feed:
    """A split on the training device, and batches of it as the model wants them.

    Args:
        split: images or a table.
        augment: what to do with images; None: the rows of a table go as they are.
        random: augment, not only standardise. Small data that nothing random happens to are standardised once for all.
        device: where the model is.
        channels_last: memory layout of images.
        seed: of the augmentation.
    """

    def __init__(
        self,
        split: Split,
        augment: Augment | None,
        *,
        random: bool,
        device: torch.device,
        channels_last: bool = False,
        seed: int = 0,
    ) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self._inputs = split.inputs.to(device)
        self._targets = split.targets.to(device)
        self._augment = augment
        self._random = random and augment is not None and bool(augment.pad or augment.flip or augment.cutout)
        images = split.inputs.ndim == 4
        self._layout = torch.channels_last if channels_last and images else torch.contiguous_format
        if augment is not None and not self._random and 4 * self._inputs.numel() <= _STANDARDISE_AT_ONCE:
            self._inputs = augment(self._inputs, train=False)
            self._augment = None

    @property
    def random(self) -> bool:
        """Whether augmentation makes an example another one each time."""
        return self._random

    def __len__(self) -> int:
        return len(self._targets)

    def draw(self, indices: Tensor) -> Tensor:
        """What is to be done to each of the examples *indices* (int64 [B], on any device), for :meth:`take`: [B, ...].

        The random numbers of the augmentation are drawn here, for a whole batch at once: each example gets the same ones
        whoever takes it, and with however many others.
        """
        indices = indices.to(self._targets.device, non_blocking=True)
        if self._augment is None or not self._random:
            return indices[:, None]
        size = self._inputs.shape[2:]
        chances = self._augment.draw(len(indices), size, device=indices.device, generator=self.generator)
        return torch.cat([indices[:, None], chances], 1)

    def take(self, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs float32 [b, ...] and targets int64 [b] of *drawn*: rows of what :meth:`draw` gave."""
        indices = drawn[:, 0]
        return self._finish(self._inputs.index_select(0, indices), drawn[:, 1:]), self._targets.index_select(0, indices)

    def in_order(self, batch: int, *, rank: int = 0, world: int = 1) -> Iterator[tuple[Tensor, Tensor, int]]:
        """The examples of one of *world* ranks, at most *batch* at a time: inputs, targets, and how many of them count.

        Together the ranks go through all examples. All ranks get equally many parts; see
        :func:`~conjugo.distributed.micro_batches`.
        """
        inputs, counts = micro_batches(self._inputs, rank, world, size=batch)
        targets, _ = micro_batches(self._targets, rank, world, size=batch)
        for part, wanted, count in zip(inputs, targets, counts):
            yield self._finish(part), wanted, count

    def _finish(self, inputs: Tensor, chances: Tensor | None = None) -> Tensor:
        if self._augment is not None:
            inputs = self._augment(inputs, train=self._random and chances is not None, chances=chances)
        return inputs.contiguous(memory_format=self._layout)
