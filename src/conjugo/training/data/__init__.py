"""Data: small tables and images bundled with scikit-learn, CIFAR, MNIST, and folders of encoded images.

``load(name)`` gives a whole data set as tensors in memory (images uint8, decoded once and then mapped from a cache
file), ``Augment`` makes float32 batches of the images on whatever device they lie. ``fetch``, ``verify`` and ``info``
are behind ``conjugo data``. Optimizers are compared on accuracy after so many samples: reading data must cost next to
nothing.
"""

from conjugo.training.data.augment import Augment, default_augment
from conjugo.training.data.dataset import Dataset, Split
from conjugo.training.data.registry import Info, Verification, fetch, info, load, names, verify

__all__ = [
    "Augment",
    "Dataset",
    "Info",
    "Split",
    "Verification",
    "default_augment",
    "fetch",
    "info",
    "load",
    "names",
    "verify",
]
