"""What a set of files on disk is to the cache: a name, the files, and a way to read them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from conjugo.errors import CorruptFile, DataUnavailable
from conjugo.training.data.dataset import Dataset, Split

__all__ = ["Source", "image_dataset", "require"]


@dataclass(frozen=True)
class Source:
    """Files that hold a data set.

    name: the name asked for. folder: where the files lie and, if it can be written, the cache too. files: all that the
    content depends on. variant: what besides the files it depends on (the image size). read: decodes everything; raises
    CorruptFile naming the file that is damaged.
    """

    name: str
    folder: Path
    files: tuple[Path, ...]
    variant: str
    read: Callable[[], Dataset]


def require(module: str, extra: str, purpose: str) -> Any:
    """The imported *module*, or DataUnavailable that says which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataUnavailable(f"{purpose} needs {module.partition('.')[0]}: pip install 'conjugo[{extra}]'") from error


def image_dataset(
    name: str,
    folder: Path,
    classes: tuple[str, ...] | None,
    train: tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]],
    test: tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]],
) -> Dataset:
    """Dataset of (images [N, C, H, W], labels [N]) pairs; classes None: numbered.

    Raises CorruptFile naming *folder* when a split is empty, labels have no class or the shapes differ.
    """
    if not len(train[1]) or not len(test[1]):
        raise CorruptFile(f"{folder}: {len(train[1])} training and {len(test[1])} test images; both must be there")
    labels = np.concatenate([train[1], test[1]])
    if classes is None:
        classes = tuple(str(i) for i in range(int(labels.max()) + 1))
    if labels.min() < 0 or labels.max() >= len(classes):
        raise CorruptFile(
            f"{folder}: labels run from {labels.min()} to {labels.max()}, but there are {len(classes)} classes"
        )
    if train[0].shape[1:] != test[0].shape[1:]:
        shapes = f"{train[0].shape[1:]} and {test[0].shape[1:]}"
        raise CorruptFile(f"{folder}: training and test images differ in shape, {shapes} (channels, height, width)")
    splits = [Split(torch.from_numpy(images), torch.from_numpy(targets)) for images, targets in (train, test)]
    return Dataset(name, "image", splits[0], splits[1], classes)
