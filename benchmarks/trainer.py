"""What the trainer costs beyond a bare PyTorch loop that does the same work, and how much of a step is its input."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch.nn import functional as F

from benchmarks._timing import interleave, ratio, show
from conjugo.training import TrainConfig, Trainer, data
from conjugo.training.data import Dataset, Split
from conjugo.training.machine import isolated

BASE = TrainConfig(optimizer="momentum", lr=0.01, steps=1_000_000, schedule="constant", evaluations=1)

ROUNDS = 30

# Name, model, batch size, steps per round.
CASES = (
    ("ResNet-8, CIFAR-10 shapes, batch 128", "resnet8", 128, 1),
    ("ResNet-8, CIFAR-10 shapes, batch 512", "resnet8", 512, 1),
    ("128-128 perceptron, digits, batch 128", "mlp", 128, 50),
    ("128-128 perceptron, digits, full batch", "mlp", 1437, 20),
)


def cifar_shaped(n: int = 20_000) -> Dataset:
    """Noise in the shape of CIFAR-10."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
    targets = torch.randint(0, 10, (n,), generator=generator)
    classes = tuple("0123456789")
    return Dataset("noise", "image", Split(inputs, targets), Split(inputs[:100], targets[:100]), classes)


def bare_loop(config: TrainConfig) -> Callable[[], None]:
    """A step as one would write it by hand, with the same model, data, augmentation, precision and optimizer."""
    twin = Trainer(config, trainer_data(config))
    model, optimizer, schedule, feed = twin.model, twin.optimizer, twin.schedule, twin.train_data
    n, batch = len(feed), twin.batch_size
    order, place = torch.randperm(n), 0

    def step() -> None:
        nonlocal order, place
        if place + batch > n:
            order, place = torch.randperm(n), 0
        inputs, targets = feed.take(feed.draw(order[place : place + batch]))
        place += batch
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=twin.bfloat16):
            logits = model(inputs)
        F.cross_entropy(logits.float(), targets).backward()
        optimizer.step()
        schedule.step()

    return step


_DATA = {"mlp": lambda: data.load("digits"), "resnet8": cifar_shaped}


def trainer_data(config: TrainConfig) -> Dataset:
    """What the model of *config* is measured on."""
    assert config.model is not None
    return _DATA[config.model]()


def measure(config: TrainConfig, steps: int) -> dict[str, list[float]]:
    """Seconds of *steps* steps of the trainer, of the bare loop, and of the input alone."""
    trainer = Trainer(config, trainer_data(config))
    cases = {
        "trainer": trainer.train_step,
        "bare": bare_loop(config),
        "input": lambda: trainer.train_data.take(trainer.train_data.draw(next(trainer.sampler))),
    }
    return interleave({name: partial(repeat, case, steps) for name, case in cases.items()}, rounds=ROUNDS)


def main() -> None:
    """Print the table."""
    rows = []
    for name, model, batch, steps in CASES:
        config = replace(BASE, model=model, batch_size=batch)
        with isolated(config):
            seconds = measure(config, steps)
        middle, low, high = (100 * (value - 1) for value in ratio(seconds["trainer"], seconds["bare"]))
        share = 100 * ratio(seconds["input"], seconds["trainer"])[0]
        milliseconds = 1e3 * statistics.median(seconds["trainer"]) / steps
        rows.append([name, f"{milliseconds:.2f}", f"{middle:+.1f}", f"{low:+.1f} .. {high:+.1f}", f"{share:.1f}"])
    columns = ("", "ms a step", "% beyond a bare loop", "quartiles", "% of it input")
    show("Trainer", columns, rows, "Input: drawing the batch, gathering and augmenting it.")


def repeat(step: Callable[[], object], times: int) -> None:
    """*times* steps."""
    for _ in range(times):
        step()


if __name__ == "__main__":
    main()
