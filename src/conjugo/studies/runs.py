"""One run of a study: which optimizer takes part, on which data, for how many steps, and what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from importlib import metadata
from typing import TYPE_CHECKING, Any, Self

import torch

from conjugo.errors import check
from conjugo.studies.records import Outcome, Task
from conjugo.studies.tuning import Axis

if TYPE_CHECKING:
    from conjugo.training.data import Dataset, Split
    from conjugo.training.trainer import TrainConfig

__all__ = ["Contender", "load_data", "num_steps", "train_once", "tuning_data", "versions"]


@dataclass(frozen=True)
class Contender:
    """An optimizer as it takes part in a study: its catalogue name, fixed options, and the axes that are tuned (lr first)."""

    name: str
    optimizer: str
    axes: tuple[Axis, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_catalogue(cls, name: str) -> Self:
        """The contender that the catalogue of optimizers proposes for *name*."""
        from conjugo.training import optimizers

        entry = optimizers.entry(name)
        axes = [Axis("lr", *entry.lr_range, log=True)]
        if entry.second is not None:
            axes.append(Axis(**asdict(entry.second)))
        return cls(name, name, tuple(axes))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of :func:`dataclasses.asdict`."""
        return cls(**{**data, "axes": tuple(Axis(**axis) for axis in data["axes"])})

    def chosen(self, task: Task) -> dict[str, Any]:
        """The options of the optimizer, without lr, for *task*."""
        return {**self.options, **({} if task.second is None else {self.axes[1].name: task.second})}


def num_steps(epochs: float, num_train: int, batch_size: int) -> int:
    """Optimizer steps that process *epochs* times the training data (rounded), at least 1."""
    return max(1, round(epochs * num_train / batch_size))


@lru_cache(maxsize=1)
def load_data(train: TrainConfig, train_limit: int | None, test_limit: int | None) -> Dataset:
    """The data set of *train*, cut to the first examples if there are limits."""
    from conjugo.training import data

    dataset = data.load(train.data, root=train.data_root, download=train.download, image_size=train.image_size)
    return replace(dataset, train=_first(dataset.train, train_limit), test=_first(dataset.test, test_limit))


def _first(split: Split, limit: int | None) -> Split:
    return split if limit is None else replace(split, inputs=split.inputs[:limit], targets=split.targets[:limit])


def tuning_data(dataset: Dataset, validation: float, seed: int) -> Dataset:
    """*dataset* as tuning sees it: a random *validation* part of the training data takes the place of the test split."""
    order = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(seed))
    held_out = round(validation * len(order))
    check(
        0 < held_out < len(order), "compare", "validation", validation, "a fraction that leaves examples on both sides"
    )
    parts = [
        replace(dataset.train, inputs=dataset.train.inputs[part], targets=dataset.train.targets[part])
        for part in (order[held_out:], order[:held_out])
    ]
    return replace(dataset, train=parts[0], test=parts[1])


def train_once(
    base: TrainConfig, contender: Contender, task: Task, dataset: Dataset, *, steps: int, evaluations: int
) -> Outcome:
    """Train *base* with the optimizer, setting, batch size and seed of *task* on *dataset* for *steps* steps.

    The batch is cut to the training data; the accuracy is measured *evaluations* times, evenly spaced, on the test split.
    """
    from conjugo.training import train

    config = replace(
        base,
        optimizer=contender.optimizer,
        optimizer_options=contender.chosen(task),
        lr=task.lr,
        batch_size=min(task.batch_size, len(dataset.train)),
        steps=steps,
        evaluations=evaluations,
        checkpoints=0,
        seed=task.seed,
    )
    result = train(config, data=dataset, progress=False, stop_on_divergence=False)
    return Outcome(
        steps=result.steps,
        samples=result.samples,
        accuracy=result.accuracy,
        loss=result.loss,
        diverged=result.diverged,
        seconds=result.seconds,
        curve=result.curve,
    )


def versions(train: TrainConfig) -> dict[str, str]:
    """Versions of what the numbers depend on, and the machine on which *train* runs."""
    from conjugo.training import machine

    here = machine.environment(machine.choose_device(train.device))
    names = ("conjugo", "torch", "numpy", "python", "platform", "processor", "device")
    return {**{name: str(here[name]) for name in names}, "optuna": metadata.version("optuna")}
