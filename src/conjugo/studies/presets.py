"""Comparisons that are ready to run: ``conjugo compare --preset NAME``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conjugo.studies.results import CompareConfig

__all__ = ["presets"]


def presets() -> dict[str, CompareConfig]:
    """The comparisons by name.

    ``demo``: digits (1,437 training examples), a 64-128-128-10 perceptron, from batch 32 to the full batch, in equal
    epochs: there are 1,347 steps at batch 32 and 30 at the full batch. A few minutes on two cores with two jobs.

    ``cifar10``: CIFAR-10 (JPEG or original), ResNet-8, from batch 256 to 8,192.
    """
    from conjugo.studies.results import CompareConfig
    from conjugo.training import TrainConfig

    return {
        "demo": CompareConfig(
            train=TrainConfig(data="digits", model="mlp", epochs=30.0),
            batch_sizes=(32, 128, 512, "full"),
            trials=16,
            seeds=5,
            target=0.9,
            evaluations=45,
        ),
        "cifar10": CompareConfig(
            train=TrainConfig(data="cifar10", model="resnet8", epochs=4.0, weight_decay=2e-4),
            batch_sizes=(256, 1024, 2048, 4096, 8192),
            trials=5,
            seeds=2,
            evaluations=8,
            train_limit=16384,
            test_limit=4000,
        ),
    }
