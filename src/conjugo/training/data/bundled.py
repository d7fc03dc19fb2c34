"""The data sets that come with scikit-learn: no download, no files.

Each is split once and for all into 80 % training and 20 % test examples, stratified by class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from conjugo.training.data.dataset import Dataset, Split

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["NAMES", "load"]

NAMES = ("digits", "breast_cancer", "wine", "iris")

_TEST_FRACTION = 0.2


def load(name: str) -> Dataset:
    """One of NAMES.

    ``digits``: images uint8 [N, 1, 8, 8], 1437 for training and 360 for testing. scikit-learn's grey values 0..16 are
    stretched to 0..255 (v -> round(255 v / 16), which loses nothing), so that uint8 images mean the same everywhere.
    The others: tables float32 [N, F], every column shifted and scaled to mean 0 and standard deviation 1 over the
    *training* rows.
    """
    # Takes most of a second; only needed here.
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    bunch = getattr(datasets, f"load_{name}")()
    classes = tuple(str(c) for c in bunch.target_names)
    train, test = train_test_split(
        np.arange(len(bunch.target)), test_size=_TEST_FRACTION, stratify=bunch.target, random_state=0
    )
    targets = bunch.target.astype(np.int64)
    if name == "digits":
        inputs = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
        return Dataset(name, "image", _split(inputs, targets, train), _split(inputs, targets, test), classes)
    mean, std = bunch.data[train].mean(axis=0), bunch.data[train].std(axis=0)
    inputs = ((bunch.data - mean) / np.where(std > 0, std, 1.0)).astype(np.float32)
    return Dataset(name, "table", _split(inputs, targets, train), _split(inputs, targets, test), classes)


def _split(inputs: npt.NDArray[Any], targets: npt.NDArray[np.int64], rows: npt.NDArray[np.intp]) -> Split:
    return Split(torch.from_numpy(inputs[rows]), torch.from_numpy(targets[rows]))
