"""How fast batches are drawn and augmented, against a loop over images and against what a model does with them."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks._timing import interleave, ratio, show
from benchmarks.trainer import cifar_shaped
from conjugo.distributed import GlobalBatchSampler
from conjugo.training import models
from conjugo.training.batches import Feed
from conjugo.training.data import Augment

ROUNDS = 15
BATCHES = (128, 1024, 8192)
AUGMENTS = (("crop, flip", Augment()), ("crop, flip, 8x8 hole", Augment(cutout=8)))
# Larger batches go through model and loop in parts, which costs them nothing.
PART = 256


def source(batch: int, augment: Augment) -> Callable[[], object]:
    """Draws a batch of data in the shape of CIFAR-10, gathers and augments it."""
    data = cifar_shaped().train
    feed = Feed(data, augment, random=True, device=torch.device("cpu"), channels_last=True)
    sampler = GlobalBatchSampler(len(data), batch, drop_last=True)
    return lambda: feed.take(feed.draw(next(sampler)))


def loop(images: Tensor, augment: Augment) -> Tensor:
    """What *augment* does, one image after the other."""
    height, width = images.shape[2:]
    out = torch.empty(images.shape)
    for i, image in enumerate(images):
        top, left = torch.randint(2 * augment.pad + 1, (2,)).tolist()
        crop = F.pad(image, (augment.pad,) * 4)[:, top : top + height, left : left + width]
        if torch.rand(()) < 0.5:
            crop = crop.flip(2)
        x = crop.float()
        out[i] = (x - x.mean()) / x.std(correction=0).clamp(min=x.numel() ** -0.5)
        if augment.cutout:
            row, column = (int(torch.randint(size, ())) - augment.cutout // 2 for size in (height, width))
            out[i, :, max(row, 0) : row + augment.cutout, max(column, 0) : column + augment.cutout] = 0
    return out


def network(bfloat16: bool) -> Callable[[], object]:
    """Forward and backward pass of ResNet-8 over PART images, in the memory format that is faster on a CPU."""
    torch.manual_seed(0)
    model = models.build("resnet8", input_shape=(3, 32, 32), num_classes=10).to(memory_format=torch.channels_last)
    images = torch.randn(PART, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    targets = torch.randint(10, (PART,))

    def step() -> None:
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            logits = model(images)
        F.cross_entropy(logits.float(), targets).backward()

    return step


def measure(batch: int, augment: Augment) -> dict[str, list[float]]:
    """Seconds per image: of the input, of the loop, and of the network in both precisions."""
    images = cifar_shaped(PART).train.inputs
    cases = {
        "input": source(batch, augment),
        "loop": lambda: loop(images, augment),
        "float32": network(bfloat16=False),
        "bfloat16": network(bfloat16=True),
    }
    sizes = {name: batch if name == "input" else PART for name in cases}
    seconds = interleave(cases, rounds=ROUNDS)
    return {name: [s / sizes[name] for s in values] for name, values in seconds.items()}


def main() -> None:
    """Print the table, measured with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [_row(name, batch, measure(batch, augment)) for name, augment in AUGMENTS for batch in BATCHES]
    finally:
        torch.set_num_threads(threads)
    columns = ("", "images/s", "x a loop over images", "x ResNet-8", "quartiles", "x ResNet-8, bf16", "quartiles")
    caption = (
        "Drawing, gathering and augmenting a batch in channels_last; ResNet-8: forward and backward pass. One thread."
    )
    show("Input", columns, rows, caption)


def _row(name: str, batch: int, seconds: dict[str, list[float]]) -> list[str]:
    row = [f"{name}, batch {batch}", f"{1 / statistics.median(seconds['input']):,.0f}"]
    row.append(f"{ratio(seconds['loop'], seconds['input'])[0]:.1f}")
    for precision in ("float32", "bfloat16"):
        middle, low, high = ratio(seconds[precision], seconds["input"])
        row += [f"{middle:.0f}", f"{low:.0f} .. {high:.0f}"]
    return row


if __name__ == "__main__":
    main()
