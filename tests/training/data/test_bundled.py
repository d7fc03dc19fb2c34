"""The data sets that come with scikit-learn: sizes, fixed stratified splits, standardised from training rows only."""

import hashlib

import numpy as np
import pytest
import torch
from sklearn import datasets

from conjugo.training import data

TABLES = {"breast_cancer": (569, 30, 2), "wine": (178, 13, 3), "iris": (150, 4, 3)}


@pytest.mark.parametrize("name", ["digits", *TABLES])
def test_splits_are_the_same_every_time_stratified_and_use_every_row_once(name):
    first, second = data.load(name), data.load(name)
    for split in ("train", "test"):
        assert torch.equal(getattr(first, split).inputs, getattr(second, split).inputs)
        assert torch.equal(getattr(first, split).targets, getattr(second, split).targets)
    targets = getattr(datasets, f"load_{name}")().target
    everything = torch.cat([first.train.targets, first.test.targets])
    assert torch.equal(everything.bincount(), torch.from_numpy(targets.astype(np.int64)).bincount())
    assert len(first.test) == pytest.approx(0.2 * len(targets), abs=1)
    wanted = first.train.targets.bincount() * 0.25
    assert (first.test.targets.bincount() - wanted).abs().max() <= 1.5


def test_the_split_of_digits_never_changes():
    """Recorded results depend on it."""
    digits = data.load("digits")
    content = digits.test.inputs.numpy().tobytes() + digits.test.targets.numpy().tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == "a2fc2790f951761e"


def test_digits():
    digits = data.load("digits")
    assert (digits.kind, digits.input_shape, digits.num_classes) == ("image", (1, 8, 8), 10)
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert digits.train.inputs.dtype == torch.uint8
    assert digits.train.inputs.max() == 255
    # Nothing was lost: the original grey values 0..16 come back, every image once.
    images = torch.cat([digits.train.inputs, digits.test.inputs]).flatten(1).double() * (16 / 255)
    assert (images - images.round()).abs().max() < 0.04
    assert sorted(images.round().tolist()) == sorted(datasets.load_digits().data.tolist())


@pytest.mark.parametrize(("name", "rows", "columns", "classes"), [(name, *sizes) for name, sizes in TABLES.items()])
def test_tables_are_standardised_from_training_rows_only(name, rows, columns, classes):
    table = data.load(name)
    assert (table.kind, table.input_shape, table.num_classes) == ("table", (columns,), classes)
    assert len(table.train) + len(table.test) == rows
    train, test = table.train.inputs.double(), table.test.inputs.double()
    torch.testing.assert_close(train.mean(0), torch.zeros(columns).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(train.std(0, correction=0), torch.ones(columns).double(), rtol=1e-5, atol=0)
    assert test.mean(0).abs().max() > 1e-3
    # One affine map per column takes all rows, also those for testing, back to the original.
    original = getattr(datasets, f"load_{name}")().data
    for column, values in enumerate(np.sort(original, axis=0).T):
        standardised = torch.cat([train, test])[:, column].sort().values.numpy()
        scale, shift = np.polyfit(standardised, values, 1)
        np.testing.assert_allclose(standardised * scale + shift, values, rtol=0, atol=1e-5 * np.ptp(values))
