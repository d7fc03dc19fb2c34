"""Residual networks for small images (CIFAR): depth 6n + 2, three stages of n blocks, widths 16, 32, 64.

Version 1 is He, Zhang, Ren & Sun 2016, "Deep residual learning for image recognition", section 4.2 (identity shortcuts
everywhere). Version 2 is the pre-activation network of the same authors, "Identity mappings in deep residual networks"
(2016), in the variant with which Adya, Palakkode & Tuzel 2018 (arXiv:1812.02886) trained CIFAR: every stage, the first
one too, begins with a 1x1 projection taken after batch norm and ReLU.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from conjugo.errors import check

__all__ = ["ResNet"]

_WIDTHS = (16, 32, 64)
# Standard deviation of a unit normal distribution cut off at +-2.
_TRUNCATED_STD = 0.87962566103423978


def _conv3x3(channels: int, width: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)


class _BlockV1(nn.Module):
    """conv-BN-ReLU-conv-BN, add the shortcut, ReLU. The shortcut has no parameters: subsampled, new channels zero."""

    def __init__(self, channels: int, width: int, stride: int, momentum: float, project: bool) -> None:
        super().__init__()
        self.stride = stride
        self.new_channels = width - channels
        self.conv1 = _conv3x3(channels, width, stride)
        self.bn1 = nn.BatchNorm2d(width, momentum=momentum)
        self.conv2 = _conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width, momentum=momentum)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.new_channels))
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + shortcut, inplace=True)


class _BlockV2(nn.Module):
    """BN-ReLU-conv-BN-ReLU-conv, add the shortcut; where the stage begins the shortcut projects BN-ReLU(x)."""

    def __init__(self, channels: int, width: int, stride: int, momentum: float, project: bool) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels, momentum=momentum)
        self.projection = nn.Conv2d(channels, width, 1, stride, bias=False) if project else None
        self.conv1 = _conv3x3(channels, width, stride)
        self.bn2 = nn.BatchNorm2d(width, momentum=momentum)
        self.conv2 = _conv3x3(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.projection is None else self.projection(y)
        y = F.relu(self.bn2(self.conv1(y)), inplace=True)
        total: Tensor = self.conv2(y) + shortcut
        return total


class ResNet(nn.Module):
    """ResNet for images of about 32x32 pixels.

    input_shape: (channels, height, width). depth: 6n + 2 with n >= 1 blocks per stage (8, 20, 32, 56, ...).
    version: 2 (pre-activation) or 1 (original). Parameters with 3 channels: version 2, depth 32: 466,970 for 10 classes
    and 472,820 for 100; version 1, depth 20 and 10 classes: 269,722.

    Initial weights: convolutions of version 2 truncated normal with variance 1/fan_in (the published recipe), those of
    version 1 normal with variance 2/fan_in (He et al. 2015); the last layer Xavier uniform, its bias 0. Batch norm of
    version 2 follows the published recipe as well: eps 1e-5, running averages keep 0.99 (torch's momentum 0.01).
    """

    def __init__(
        self, input_shape: tuple[int, ...], num_classes: int, *, depth: int = 32, version: Literal[1, 2] = 2
    ) -> None:
        check(depth >= 8 and depth % 6 == 2, "ResNet", "depth", depth, "6n + 2 with n >= 1")
        check(version in (1, 2), "ResNet", "version", version, "1 or 2")
        super().__init__()
        block, momentum = (_BlockV1, 0.1) if version == 1 else (_BlockV2, 0.01)
        channels = _WIDTHS[0]
        self.stem = _conv3x3(input_shape[0], channels)
        # Version 1 normalises behind every convolution; version 2 before it, and once more at the end.
        self.stem_bn = nn.BatchNorm2d(channels, momentum=momentum) if version == 1 else None
        blocks: list[nn.Module] = []
        for width in _WIDTHS:
            for i in range(depth // 6):
                stride = 2 if i == 0 and width != _WIDTHS[0] else 1
                blocks.append(block(channels, width, stride, momentum, project=i == 0))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.final_bn = nn.BatchNorm2d(channels, momentum=momentum) if version == 2 else None
        self.classifier = nn.Linear(channels, num_classes)
        self._initialise(version)

    def _initialise(self, version: int) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and version == 1:
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            elif isinstance(module, nn.Conv2d):
                fan_in = module.weight[0].numel()
                std = math.sqrt(1 / fan_in) / _TRUNCATED_STD
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.xavier_uniform_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, C, H, W]."""
        x = self.stem(images)
        if self.stem_bn is not None:
            x = F.relu(self.stem_bn(x), inplace=True)
        x = self.blocks(x)
        if self.final_bn is not None:
            x = F.relu(self.final_bn(x), inplace=True)
        logits: Tensor = self.classifier(x.mean(dim=(2, 3)))
        return logits
