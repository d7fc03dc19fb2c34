"""The training problems on which the advisor is put to the test, each with a loss that training has to reach.

Development problems are those by which the constants of the method were found. Nobody has looked at the held-out ones for
that: what comes out there is the honest figure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conjugo.errors import check
from conjugo.training import TrainConfig

__all__ = ["GPU_PROBLEMS", "PROBLEMS", "Problem"]

Examples = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A network, the whole training set, and the training loss to be reached.

    label: for tables. held_out: not among the problems by which the method was made. data: gives what :meth:`examples` gives.
    build: makes the network with random weights. target: mean cross-entropy over all N examples. batches: sizes to be
    measured, ascending, in [1, N].
    """

    name: str
    label: str
    held_out: bool
    data: Callable[[], Examples]
    build: Callable[[], nn.Module]
    target: float
    batches: tuple[int, ...]
    device: str = "cpu"

    def examples(self) -> Examples:
        """Inputs [N, ...] and targets [N], on the device. Raises DataUnavailable."""
        inputs, targets = self.data()
        return inputs.to(self.device), targets.to(self.device)

    def model(self, seed: int) -> nn.Module:
        """The network with the weights of *seed*; torch's global generator is as before."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build().to(self.device)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of a batch, 0-dimensional."""
        return F.cross_entropy(outputs, targets)

    def describe(self) -> dict[str, Any]:
        """All that the runs depend on and that is a plain value."""
        model = self.model(0)
        return {
            "label": self.label,
            "held_out": self.held_out,
            "target": self.target,
            "batches": list(self.batches),
            "model": str(model),
            "parameters": sum(p.numel() for p in model.parameters()),
        }

    def check(self) -> None:
        """Raise ValueError if the batch sizes do not fit the data, DataUnavailable without them."""
        n = len(self.data()[0])
        accepted = f"ascending sizes in [1, {n}]"
        sizes = self.batches
        check(
            list(sizes) == sorted(set(sizes)) and sizes[0] >= 1 and sizes[-1] <= n,
            self.name,
            "batches",
            sizes,
            accepted,
        )


@lru_cache(maxsize=4)
def _standardised(data: str, count: int | None, pool: int) -> Examples:
    """The first *count* training examples; images as means of *pool* x *pool* pixels; each feature with mean 0, variance 1."""
    from conjugo.studies.runs import load_data

    split = load_data(TrainConfig(data=data), count, None).train
    inputs = split.inputs.float()
    if split.inputs.dtype == torch.uint8:
        inputs = F.avg_pool2d(inputs / 255, pool)
    # Pixels that are always black stay near 0 instead of being blown up; colours of a place are not told apart.
    over = (0, 2, 3) if inputs.ndim == 4 and inputs.shape[1] == 3 else (0,)
    spread = inputs.std(over, keepdim=True).clamp_min(0.05)
    return (inputs - inputs.mean(over, keepdim=True)) / spread, split.targets


def _perceptron(*widths: int, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for i, (before, after) in enumerate(pairwise(widths)):
        layers += [activation()] if i else []
        layers.append(nn.Linear(before, after))
    return nn.Sequential(*layers)


def _convolutional() -> nn.Module:
    """Two convolutions that halve the side, for images of 16 x 16: 6,802 parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 24, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(384, 10),
    )


def _residual() -> nn.Module:
    from conjugo.training import models

    return models.build("resnet8", input_shape=(3, 32, 32), num_classes=10)


def _problems() -> tuple[Problem, ...]:
    digits = partial(_standardised, "digits", None, 1)
    perceptron = partial(_perceptron, 64, 64, 10)
    sizes = (4, 16, 64, 256, 1437)
    return (
        Problem(
            name="digits-0.5",
            label="digits, MLP 64-64-10, loss 0.5",
            held_out=False,
            data=digits,
            build=perceptron,
            target=0.5,
            batches=sizes,
        ),
        Problem(
            name="digits-0.15",
            label="digits, MLP 64-64-10, loss 0.15",
            held_out=False,
            data=digits,
            build=perceptron,
            target=0.15,
            batches=sizes,
        ),
        Problem(
            name="cifar10-mlp",
            label="CIFAR-10 8 × 8, 2,048 images, MLP 192-128-10, loss 1.5",
            held_out=False,
            data=partial(_standardised, "cifar10", 2048, 4),
            build=partial(_perceptron, 192, 128, 10),
            target=1.5,
            batches=(4, 16, 64, 256, 2048),
        ),
        Problem(
            name="cifar10-cnn",
            label="CIFAR-10 16 × 16, 1,024 images, CNN 12-24, loss 1.4",
            held_out=True,
            data=partial(_standardised, "cifar10", 1024, 2),
            build=_convolutional,
            target=1.4,
            batches=(8, 32, 128, 1024),
        ),
        Problem(
            name="mnist-tanh",
            label="MNIST 14 × 14, 2,048 images, tanh MLP 196-64-32-10, loss 0.2",
            held_out=True,
            data=partial(_standardised, "mnist", 2048, 2),
            build=partial(_perceptron, 196, 64, 32, 10, activation=nn.Tanh),
            target=0.2,
            batches=(8, 32, 128, 512, 2048),
        ),
        Problem(
            name="breast-cancer",
            label="breast cancer (table), MLP 30-32-2, loss 0.03",
            held_out=True,
            data=partial(_standardised, "breast_cancer", None, 1),
            build=partial(_perceptron, 30, 32, 2),
            target=0.03,
            batches=(4, 16, 64, 455),
        ),
    )


PROBLEMS: tuple[Problem, ...] = _problems()
"""Development problems first."""

GPU_PROBLEMS: tuple[Problem, ...] = (
    Problem(
        name="cifar10-resnet8",
        label="CIFAR-10, ResNet-8, loss 0.6",
        held_out=True,
        data=partial(_standardised, "cifar10", None, 1),
        build=_residual,
        target=0.6,
        batches=(64, 256, 1024, 4096, 8192),
        device="cuda",
    ),
)
"""For one GPU: real images, and a network with batch norm."""
