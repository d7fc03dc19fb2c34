"""The two small models: a multilayer perceptron for anything, a three-layer convolutional network for images."""

from __future__ import annotations

import itertools
import math

from torch import Tensor, nn

from conjugo.errors import check

__all__ = ["CNN", "MLP"]


class MLP(nn.Sequential):
    """Flatten, then linear layers with ReLU between them.

    input_shape: shape of one example, any number of dimensions. hidden: widths of the hidden layers; the default
    128-128 makes 64-128-128-10 of the 8x8 digits. batch_norm: normalise before each ReLU, in the place of a bias.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_classes: int,
        *,
        hidden: tuple[int, ...] = (128, 128),
        batch_norm: bool = False,
    ) -> None:
        check(all(width >= 1 for width in hidden), "MLP", "hidden", hidden, "a tuple of widths >= 1")
        widths = [math.prod(input_shape), *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in, fan_out in itertools.pairwise(widths):
            norm = [nn.BatchNorm1d(fan_out)] if batch_norm else []
            layers += [nn.Linear(fan_in, fan_out, bias=not batch_norm), *norm, nn.ReLU(inplace=True)]
        super().__init__(*layers, nn.Linear(widths[-1], num_classes))


class CNN(nn.Module):
    """Three 3x3 convolutions (strides 1, 2, 2) with batch norm and ReLU, global mean, linear.

    input_shape: (channels, height, width). widths: output channels of the three convolutions.
    """

    def __init__(
        self, input_shape: tuple[int, ...], num_classes: int, *, widths: tuple[int, int, int] = (16, 32, 64)
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = input_shape[0]
        for width, stride in zip(widths, (1, 2, 2), strict=True):
            layers += [
                nn.Conv2d(channels, width, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, C, H, W]."""
        logits: Tensor = self.classifier(self.features(images).mean(dim=(2, 3)))
        return logits
