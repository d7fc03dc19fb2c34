"""What a batch that grows gains: fixed small and large batches, a preset schedule, one by the measured noise scale.

Each way has the learning rate tuned with the same runs, then fresh seeds. Time is processor time on one thread, with all that
measuring costs.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.functional import avg_pool2d

from benchmarks._timing import show
from conjugo.training import TrainConfig, Trainer, data
from conjugo.training.data import Dataset, Split
from conjugo.training.machine import isolated

SMALL, LARGE, SEEDS = 32, 512, 6
RATES = {
    "momentum": (0.02, 0.04, 0.08, 0.16, 0.32, 0.64),
    "nlcg": (0.1, 0.2, 0.4, 0.8, 1.6, 3.2),
}


def ways(base: TrainConfig) -> dict[str, TrainConfig]:
    """Name and configuration."""
    third = round(base.epochs / 3)
    growing = replace(base, batch_size=SMALL, batch_schedule_lr="sqrt")
    preset = ((third, 128), (2 * third, LARGE))
    return {
        f"fixed {SMALL}": replace(base, batch_size=SMALL),
        f"fixed {LARGE}": replace(base, batch_size=LARGE),
        "preset": replace(growing, batch_schedule=preset),
        "measured": replace(growing, noise_scale=4, batch_growth=1.0, batch_max=LARGE),
    }


def run(config: TrainConfig, dataset: Dataset) -> dict[str, float]:
    """Train once."""
    start = time.process_time()
    with isolated(config):
        trainer = Trainer(config, dataset)
        result = trainer.fit(progress=False, stop_on_divergence=False)
    accuracy = 0.0 if result.diverged else result.accuracy
    loss = float("inf") if result.loss is None or result.diverged else result.loss
    used = time.process_time() - start
    sizes = trainer.batches.milestones if config.batch_growth else ()
    return {
        "accuracy": 100 * accuracy,
        "loss": loss,
        "steps": result.steps,
        "examples": result.samples,
        "seconds": used,
        "last batch": trainer.batch_size,
        "sizes": sizes,  # type: ignore[dict-item]
    }


def compare(name: str, base: TrainConfig, dataset: Dataset, tuning: int) -> list[dict[str, object]]:
    """All ways and both optimizers; *tuning*: seeds for each learning rate."""
    rows = []
    for optimizer, rates in RATES.items():
        for way, config in ways(replace(base, optimizer=optimizer)).items():

            def with_rate(lr: float, seeds: range, config: TrainConfig = config) -> list[dict[str, float]]:
                return [run(replace(config, lr=lr, seed=seed), dataset) for seed in seeds]

            tuned = {lr: with_rate(lr, range(tuning)) for lr in rates}
            best = max(rates, key=lambda lr: statistics.mean(found["accuracy"] - found["loss"] for found in tuned[lr]))
            fresh = with_rate(best, range(100, 100 + SEEDS))
            rows.append({"data": name, "optimizer": optimizer, "way": way, "lr": best, "runs": fresh})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def digits() -> tuple[str, TrainConfig, Dataset, int]:
    """A perceptron on digits."""
    base = TrainConfig(model="mlp", epochs=18, schedule="cosine", warmup=0.1, evaluations=1, threads=1)
    return "digits", base, data.load("digits"), 2


def cifar10() -> tuple[str, TrainConfig, Dataset, int]:
    """A convolutional network on 4,000 images of CIFAR-10, at half their side; CIFAR10 names the folder."""
    whole = data.load("cifar10", root=Path(os.environ["CIFAR10"]))

    def part(split: Split, n: int) -> Split:
        small = avg_pool2d(split.inputs[:n].float(), 2).round().to(torch.uint8)
        return Split(small, split.targets[:n])

    dataset = replace(whole, train=part(whole.train, 4000), test=part(whole.test, 2000))
    base = TrainConfig(model="cnn", epochs=12, schedule="cosine", warmup=0.1, evaluations=1, threads=1)
    return "CIFAR-10, 4,000 images", base, dataset, 1


def table(rows: list[dict[str, object]]) -> None:
    """Print the rows of :func:`compare`."""
    lines = []
    for row in rows:
        runs: list[dict[str, float]] = row["runs"]  # type: ignore[assignment]

        def of(name: str, runs: list[dict[str, float]] = runs) -> list[float]:
            return [found[name] for found in runs]

        lines.append(
            [
                f"{row['data']}, {row['optimizer']}, {row['way']}",
                f"{row['lr']:g}",
                f"{statistics.mean(of('accuracy')):.2f} ± {statistics.stdev(of('accuracy')):.2f}",
                f"{statistics.mean(of('loss')):.3f}",
                f"{statistics.median(of('steps')):,.0f}",
                f"{statistics.median(of('examples')):,.0f}",
                f"{statistics.median(of('seconds')):.2f}",
                f"{statistics.median(of('last batch')):,.0f}",
            ]
        )
    columns = ("", "lr", "test accuracy (%)", "test loss", "steps", "examples", "s (CPU)", "last batch")
    show("Growing batches", columns, lines, f"Mean and standard deviation, or median, over {SEEDS} seeds.")


def main(problems: tuple[Callable[[], tuple[str, TrainConfig, Dataset, int]], ...] = (digits,)) -> None:
    """Print the table."""
    if "CIFAR10" in os.environ:
        problems = (*problems, cifar10)
    rows = [row for problem in problems for row in compare(*problem())]
    table(rows)


if __name__ == "__main__":
    main()
