"""Comparisons that are ready to run: ``conjugo compare --preset NAME``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conjugo.studies.results import CompareConfig

__all__ = ["presets"]


def presets() -> dict[str, CompareConfig]:
    """The comparisons by name.

    ``demo``: digits (1,437 training examples), a 64-128-128-10 perceptron, from batch 32 to the full batch, in equal
    epochs: there are 1,347 steps at batch 32 and 30 at the full batch. About five minutes on two cores with two jobs.

    ``cifar10``: CIFAR-10 (any of the forms that ``conjugo data`` knows), ResNet-8 on 16,384 images, from batch 256 (160
    steps) to 8,192 (5 steps). Batches are sent through the model 256 images at a time, so that batch normalisation does
    the same at all batch sizes, and its running averages see as many batches. About an hour on two cores with two jobs.
    """
    from conjugo.studies.results import CompareConfig
    from conjugo.training import TrainConfig

    return {
        "demo": CompareConfig(
            train=TrainConfig(data="digits", model="mlp", epochs=30.0, schedule="cosine"),
            batch_sizes=(32, 128, 512, "full"),
            trials=20,
            seeds=5,
            target=0.9,
            evaluations=45,
        ),
        "cifar10": CompareConfig(
            train=TrainConfig(
                data="cifar10", model="resnet8", epochs=2.5, schedule="cosine", weight_decay=2e-4, micro_batch=256
            ),
            optimizers=("nlcg", "momentum", "nesterov", "adamw", "lars", "lamb"),
            batch_sizes=(256, 2048, 8192),
            trials=5,
            seeds=2,
            evaluations=2,
            train_limit=16384,
            test_limit=2000,
        ),
    }
