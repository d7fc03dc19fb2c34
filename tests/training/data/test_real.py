"""The real image sets, where they are at hand: counts, known statistics, the second load from the cache."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest
import torch

from conjugo.training import data

ROOM = Path(os.environ.get("CONJUGO_DATA") or Path(__file__).parents[4] / "shared" / "data")


@pytest.fixture
def room(tmp_path):
    """Links to the files, so that the cache lies beside the links and not beside the user's files."""

    def link(folder: str) -> Path:
        if not (ROOM / folder).is_dir():
            pytest.skip(f"no {ROOM / folder}; CONJUGO_DATA may name the folder that holds {folder}/")
        (tmp_path / folder).mkdir()
        for path in (ROOM / folder).iterdir():
            if path.suffix != ".cache":
                (tmp_path / folder / path.name).symlink_to(path)
        return tmp_path

    yield link
    shutil.rmtree(tmp_path)


def mean_and_deviation(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per channel, of pixel values in 0..1."""
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(1)]).double()
    values = torch.arange(256).double() / 255
    mean = counts @ values / counts.sum(1)
    return mean, (counts @ values.square() / counts.sum(1) - mean.square()).sqrt()


def digest(dataset: data.Dataset) -> str:
    """SHA-256 of all pixels and labels."""
    content = hashlib.sha256()
    for split in (dataset.train, dataset.test):
        content.update(split.inputs.numpy())
        content.update(split.targets.numpy())
    return content.hexdigest()


def same(first: data.Dataset, second: data.Dataset) -> bool:
    return torch.equal(first.train.inputs, second.train.inputs) and torch.equal(first.test.targets, second.test.targets)


def test_mnist(room):
    root = room("mnist")
    mnist = data.load("mnist", root=root)
    assert mnist.train.inputs.shape == (60_000, 1, 28, 28)
    assert mnist.test.inputs.shape == (10_000, 1, 28, 28)
    assert mnist.train.targets.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert mnist.test.targets.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    augment = data.default_augment(mnist)
    assert augment.mean == pytest.approx((0.1307,), abs=5e-5)
    assert augment.std == pytest.approx((0.3081,), abs=5e-5)
    assert digest(mnist) == "1e35582d42a90940c55b956deb61875c020b567ed20e3c5b174f52bf7809ed9b"
    assert same(mnist, data.load("mnist", root=root))


def test_cifar10_as_jpeg(room):
    """Found in cifar10-jpeg; the pixels are nearly those of the official archive."""
    root = room("cifar10-jpeg")
    cifar = data.load("cifar10", root=root)
    assert cifar.train.inputs.shape == (50_000, 3, 32, 32)
    assert cifar.train.targets.bincount().tolist() == [5000] * 10
    assert cifar.test.targets.bincount().tolist() == [1000] * 10
    assert cifar.classes[3] == "cat"
    mean, deviation = mean_and_deviation(cifar.train.inputs)
    torch.testing.assert_close(mean, torch.tensor([0.4914, 0.4822, 0.4465]).double(), rtol=0, atol=5e-4)
    torch.testing.assert_close(deviation, torch.tensor([0.2470, 0.2435, 0.2616]).double(), rtol=0, atol=2.5e-3)
    assert same(cifar, data.load("cifar10", root=root))


def test_cifar100(room):
    """Lossless: mean and deviation to all published digits."""
    root = room("cifar100")
    cifar = data.load("cifar100", root=root)
    assert cifar.train.inputs.shape == (50_000, 3, 32, 32)
    assert cifar.train.targets.bincount().tolist() == [500] * 100
    assert cifar.test.targets.bincount().tolist() == [100] * 100
    assert digest(cifar) == "d16a0a03b5c46f00e438089527817f4ce51b2ddeabf08184d4431c965bff41c3"
    assert (cifar.num_classes, cifar.classes[0], cifar.classes[99]) == (100, "apple", "worm")
    mean, deviation = mean_and_deviation(cifar.train.inputs)
    torch.testing.assert_close(mean, torch.tensor([0.5071, 0.4865, 0.4409]).double(), rtol=0, atol=5e-5)
    torch.testing.assert_close(deviation, torch.tensor([0.2673, 0.2564, 0.2762]).double(), rtol=0, atol=5e-5)
    assert same(cifar, data.load("cifar100", root=root))
