"""Random crops, flips and holes, and standardisation, for whole batches of uint8 images on their own device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from conjugo.errors import check
from conjugo.training.data.dataset import Dataset

__all__ = ["Augment", "default_augment"]


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Make training or evaluation input of uint8 images.

    For training, with random numbers drawn per image: pad with *pad* zeros on each side and cut out the original size
    at a uniformly drawn offset; mirror left to right with probability 1/2 if *flip*; standardise; set a square hole of
    side *cutout* pixels around a uniformly drawn pixel, clipped at the border, to 0 (DeVries & Taylor 2017,
    arXiv:1708.04552; 0: no hole). For evaluation only standardise:

    - ``image``: (x - mean) / max(std, 1/sqrt(n)) over the n = C H W values of one image; x in 0..255, std with divisor
      n (the recipe of Adya, Palakkode & Tuzel 2018, arXiv:1812.02886, for CIFAR);
    - ``channel``: (x / 255 - mean[c]) / std[c] with given *mean* and *std*, one number or one per channel;
    - ``none``: x / 255.
    """

    pad: int = 4
    flip: bool = True
    cutout: int = 0
    standardize: Literal["image", "channel", "none"] = "image"
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        check(self.pad >= 0, "Augment", "pad", self.pad, ">= 0")
        check(self.cutout >= 0, "Augment", "cutout", self.cutout, ">= 0")
        kinds = ("image", "channel", "none")
        check(self.standardize in kinds, "Augment", "standardize", self.standardize, f"one of {', '.join(kinds)}")
        check(len(self.mean) == len(self.std), "Augment", "mean", self.mean, f"as long as std {self.std}")
        check(all(s > 0 for s in self.std), "Augment", "std", self.std, "> 0")

    def __call__(
        self,
        images: Tensor,
        *,
        train: bool,
        generator: torch.Generator | None = None,
        chances: Tensor | None = None,
    ) -> Tensor:
        """Float32 batch [B, C, H, W], contiguous, of images uint8 [B, C, H, W].

        chances: what :meth:`draw` gave for these images; None: drawn now, from *generator* (as for :meth:`draw`). Nothing
        random happens when *train* is False. Raises ValueError for anything but uint8 [B, C, H, W].
        """
        given = f"{images.dtype} {list(images.shape)}"
        check(images.dtype == torch.uint8 and images.ndim == 4, "Augment", "images", given, "uint8 [B, C, H, W]")
        fits = self.standardize != "channel" or len(self.mean) in (1, images.shape[1])
        check(fits, "Augment", "mean", self.mean, f"one number or one per channel of {given}")
        if not train:
            return self._standardise(images)
        if chances is None:
            chances = self.draw(len(images), images.shape[2:], device=images.device, generator=generator)
        columns = iter(chances.unbind(1))
        if self.pad or self.flip:
            images = self._crop_and_flip(images, columns)
        out = self._standardise(images)
        return self._cut_out(out, columns) if self.cutout else out

    def draw(
        self, n: int, size: Sequence[int], *, device: torch.device, generator: torch.Generator | None = None
    ) -> Tensor:
        """The random numbers for *n* images of *size* (height, width): int64 [n, k], k the same for every image.

        So those of a batch can be drawn at once, however it is shared out afterwards. generator: their source, on any
        device; None: torch's global one of *device*.
        """
        source = device if generator is None else generator.device
        limits = [2] * self.flip + [2 * self.pad + 1] * (2 * bool(self.pad)) + list(size) * bool(self.cutout)
        drawn = [torch.randint(limit, (n,), generator=generator, device=source) for limit in limits]
        chances = torch.stack(drawn, 1) if drawn else torch.empty(n, 0, dtype=torch.int64)
        return chances.to(device, non_blocking=True)

    def _crop_and_flip(self, images: Tensor, chances: Iterator[Tensor]) -> Tensor:
        """One gather: every output pixel knows the place it comes from in the padded image."""
        b, c, h, w = images.shape
        rows = torch.arange(h, device=images.device).expand(b, h)
        columns = torch.arange(w, device=images.device).expand(b, w)
        if self.flip:
            columns = torch.where(next(chances).bool()[:, None], columns.flip(1), columns)
        if self.pad:
            rows = rows + next(chances)[:, None]
            columns = columns + next(chances)[:, None]
            images = F.pad(images, (self.pad,) * 4)
        places = (rows[:, :, None] * images.shape[3] + columns[:, None, :]).flatten(1)
        return images.flatten(2).gather(2, places[:, None].expand(b, c, h * w)).view(b, c, h, w)

    def _standardise(self, images: Tensor) -> Tensor:
        x = images.to(torch.float32, memory_format=torch.contiguous_format)
        if self.standardize == "image":
            n = x.shape[1:].numel()
            flat = x.flatten(1)
            flat -= flat.mean(dim=1, keepdim=True)
            # std = |x - mean| / sqrt(n): several times faster than torch.std on a CPU.
            std = torch.linalg.vector_norm(flat, dim=1, keepdim=True) / n**0.5
            flat /= std.clamp_(min=n**-0.5)
            return x
        mean, std = (self.mean, self.std) if self.standardize == "channel" else ((0.0,), (1.0,))
        scale = torch.tensor([1 / (255 * s) for s in std], device=x.device)[:, None, None]
        shift = torch.tensor([m / s for m, s in zip(mean, std, strict=True)], device=x.device)[:, None, None]
        return x.mul_(scale).sub_(shift)

    def _cut_out(self, images: Tensor, chances: Iterator[Tensor]) -> Tensor:
        # The hole covers [centre - cutout // 2, centre - cutout // 2 + cutout) in both directions.
        inside = [_within(size, next(chances) - self.cutout // 2, self.cutout, images) for size in images.shape[2:]]
        hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]
        return images.mul_(~hole)  # masked_fill_ with a broadcast mask takes three times as long on a CPU


def default_augment(dataset: Dataset) -> Augment:
    """The usual augmentation for a data set of images.

    Colour images: pad-crop by an eighth of the side (4 for 32 pixels), flip, standardised per image. Grey ones (digits)
    have a left and a right: no flip, no crop; standardised by mean and standard deviation of all training pixels.

    Raises ValueError for tables.
    """
    check(dataset.kind == "image", "default_augment", "dataset", dataset.name, "a data set of images")
    channels, height, width = dataset.input_shape
    if channels == 3:
        return Augment(pad=min(height, width) // 8)
    pixels = dataset.train.inputs
    counts = torch.bincount(pixels.flatten(), minlength=256).double()
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = (counts @ values / counts.sum()).item()
    std = (counts @ (values - mean).square() / counts.sum()).sqrt().item()
    return Augment(pad=0, flip=False, standardize="channel", mean=(mean,), std=(std or 1.0,))


def _within(size: int, first: Tensor, length: int, like: Tensor) -> Tensor:
    """[B, size]: which positions lie in [first, first + length)."""
    offset = torch.arange(size, device=like.device) - first[:, None]
    return (offset >= 0) & (offset < length)
