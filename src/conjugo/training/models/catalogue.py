"""Which names there are, and what each stands for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from conjugo.errors import check, unknown
from conjugo.training.models.imagenet import ResNet50
from conjugo.training.models.resnet import ResNet
from conjugo.training.models.small import CNN, MLP

if TYPE_CHECKING:
    from conjugo.training.data import Dataset

__all__ = ["build", "default_for", "names"]

_DEPTHS = (8, 20, 32, 56)
_IMAGE_MODELS: dict[str, Callable[..., nn.Module]] = {
    "cnn": CNN,
    **{f"resnet{depth}": partial(ResNet, depth=depth, version=2) for depth in _DEPTHS},
    **{f"resnet{depth}v1": partial(ResNet, depth=depth, version=1) for depth in _DEPTHS},
    "resnet50": ResNet50,
}
_MODELS: dict[str, Callable[..., nn.Module]] = {"mlp": MLP, "mlp-bn": partial(MLP, batch_norm=True), **_IMAGE_MODELS}


def names() -> tuple[str, ...]:
    """The names that :func:`build` knows."""
    return tuple(_MODELS)


def build(name: str, *, input_shape: tuple[int, ...], num_classes: int, **options: Any) -> nn.Module:
    """A freshly initialised model in float32 on the CPU, weights drawn from torch's global generator.

    name: one of :func:`names`. ``resnet8|20|32|56`` are pre-activation networks for small images, with ``v1`` behind
    the name the original ones; ``resnet50`` is the ImageNet network. input_shape: shape of one example, (C, H, W) for
    all but ``mlp`` and ``mlp-bn``. num_classes: number of logits, >= 2. options: handed to the class (``hidden`` of MLP,
    ``widths`` of CNN, ``zero_init_last_gamma`` of ResNet50).

    Raises UnknownName for a name that does not exist (with the nearest ones) and ValueError for impossible shapes.
    """
    if name not in _MODELS:
        unknown("model", name, names())
    check(
        len(input_shape) > 0 and all(size >= 1 for size in input_shape),
        "build",
        "input_shape",
        input_shape,
        "a tuple of sizes >= 1",
    )
    check(num_classes >= 2, "build", "num_classes", num_classes, ">= 2")
    if name in _IMAGE_MODELS:
        check(
            len(input_shape) == 3, "build", "input_shape", input_shape, f"(channels, height, width) for model {name!r}"
        )
    return _MODELS[name](input_shape, num_classes, **options)


def default_for(dataset: Dataset) -> str:
    """The model to begin with: the smallest that does justice to the data.

    Tables and images below 16 pixels: ``mlp``; grey images: ``cnn``; colour images up to 64 pixels: ``resnet8``; larger
    ones: ``resnet50``.
    """
    if dataset.kind == "table" or min(dataset.input_shape[1:]) < 16:
        return "mlp"
    if dataset.input_shape[0] == 1:
        return "cnn"
    return "resnet8" if max(dataset.input_shape[1:]) <= 64 else "resnet50"
