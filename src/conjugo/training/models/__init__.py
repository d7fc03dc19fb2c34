"""Models by name: multilayer perceptrons, a small convolutional network and residual networks.

``build(name, input_shape=..., num_classes=...)`` makes one, ``names()`` lists them, ``default_for(dataset)`` proposes
one. All take float32 batches of shape [N, *input_shape] and return logits of shape [N, num_classes]; the convolutional
ones also work in ``torch.channels_last``. Initial weights are drawn from torch's global random generator.
"""

from conjugo.training.models.catalogue import build, default_for, names
from conjugo.training.models.imagenet import ResNet50
from conjugo.training.models.resnet import ResNet
from conjugo.training.models.small import CNN, MLP

__all__ = ["CNN", "MLP", "ResNet", "ResNet50", "build", "default_for", "names"]
