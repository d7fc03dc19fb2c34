"""ResNet-50 for ImageNet: He, Zhang, Ren & Sun 2016, with the stride in the 3x3 convolution of a block.

That placement, and the options of the initialisation, are those of Goyal et al. 2017 (arXiv:1706.02677), the common
reference of large-batch training.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ResNet50"]

_STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))  # (width inside the blocks, number of blocks)
_EXPANSION = 4


class _Bottleneck(nn.Module):
    """1x1 reduce, 3x3, 1x1 expand, each with batch norm; add the shortcut (projected where the shape changes); ReLU."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = width * _EXPANSION
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x), inplace=True)


class ResNet50(nn.Module):
    """ResNet-50: 25,557,032 parameters with 3 channels and 1000 classes; 4.1 G multiply-adds per 224x224 image.

    input_shape: (channels, height, width). zero_init_last_gamma: begin with every block as the identity (gamma of its
    last batch norm 0), which large batches like. Convolutions: normal with variance 2/fan_out; last layer: normal with
    standard deviation 0.01, bias 0.
    """

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, *, zero_init_last_gamma: bool = False) -> None:
        super().__init__()
        channels = 64
        self.stem = nn.Conv2d(input_shape[0], channels, 7, stride=2, padding=3, bias=False)
        self.stem_bn = nn.BatchNorm2d(channels)
        blocks: list[nn.Module] = []
        for stage, (width, count) in enumerate(_STAGES):
            for i in range(count):
                blocks.append(_Bottleneck(channels, width, stride=2 if i == 0 and stage > 0 else 1))
                channels = width * _EXPANSION
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(channels, num_classes)
        self._initialise(zero_init_last_gamma)

    def _initialise(self, zero_init_last_gamma: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, _Bottleneck) and zero_init_last_gamma:
                nn.init.zeros_(module.bn3.weight)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, C, H, W]."""
        x = F.relu(self.stem_bn(self.stem(images)), inplace=True)
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        logits: Tensor = self.classifier(self.blocks(x).mean(dim=(2, 3)))
        return logits
