"""Data on its way into the model: on the training device once, then gathered and augmented there."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

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

    def __len__(self) -> int:
        return len(self._targets)

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs float32 [B, ...] and targets int64 [B] of the examples *indices* (int64 [B], on any device)."""
        indices = indices.to(self._targets.device, non_blocking=True)
        return self._finish(self._inputs.index_select(0, indices)), self._targets.index_select(0, indices)

    def in_order(self, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All examples, *batch* at a time."""
        for inputs, targets in zip(torch.split(self._inputs, batch), torch.split(self._targets, batch)):
            yield self._finish(inputs), targets

    def _finish(self, inputs: Tensor) -> Tensor:
        if self._augment is not None:
            inputs = self._augment(inputs, train=self._random, generator=self.generator)
        return inputs.contiguous(memory_format=self._layout)
