"""Names, places, what is said about data that is absent, info and verify."""

import os

import numpy as np
import pytest
import torch
from tests.training.data.sources import flip_a_bit, pixels

from conjugo.errors import DataUnavailable, UnknownName
from conjugo.training import data
from conjugo.training.data import Dataset, Split


def npz(folder, *, value=0):
    folder.mkdir(parents=True, exist_ok=True)
    images = np.full((6, 4, 4), value, np.uint8)
    np.savez(folder / "data.npz", x_train=images, y_train=np.arange(6) % 2, x_test=images[:3], y_test=np.arange(3) % 2)


def test_names():
    assert data.names() == (
        "digits",
        "breast_cancer",
        "wine",
        "iris",
        "cifar10",
        "cifar100",
        "mnist",
        "folder",
        "imagefolder",
    )


@pytest.mark.parametrize("call", [data.load, data.fetch, data.verify, data.info])
def test_an_unknown_name_gets_the_nearest(call):
    with pytest.raises(UnknownName, match=r"unknown data set 'cifar-10'; did you mean 'cifar10'"):
        call("cifar-10")


@pytest.mark.parametrize("call", [data.load, data.verify, data.info])
def test_a_folder_must_be_named(call):
    for name in ("folder", "imagefolder"):
        with pytest.raises(ValueError, match=rf"load: root must be a folder for data set '{name}', got None"):
            call(name)


def test_image_size_is_checked(tmp_path):
    with pytest.raises(ValueError, match="image_size must be >= 1 or None, got 0"):
        data.load("cifar10", root=tmp_path, image_size=0)
    npz(tmp_path)
    assert data.load("folder", root=tmp_path, image_size=4).input_shape == (1, 4, 4)
    for name, shape in [("folder", r"\(1, 4, 4\)"), ("digits", r"\(1, 8, 8\)"), ("iris", r"\(4,\)")]:
        with pytest.raises(ValueError, match=rf"load: image_size must be None for '{name}'.*shape {shape};.* got 5"):
            data.load(name, root=tmp_path, image_size=5)


def test_absent_data_says_where_it_was_looked_for_and_how_to_get_it(tmp_path, user_cache, monkeypatch):
    with pytest.raises(DataUnavailable) as caught:
        data.load("cifar10")
    message = str(caught.value)
    for part in (
        str(user_cache / "data" / "cifar10"),
        "conjugo data fetch cifar10",
        "cifar-10-python.tar.gz",
        "train*.parquet",
        "CONJUGO_DATA may name a folder that holds cifar10/",
    ):
        assert part in message
    monkeypatch.setenv("CONJUGO_DATA", str(tmp_path))
    with pytest.raises(DataUnavailable, match=f"{tmp_path}/cifar10, {tmp_path}/cifar10-jpeg, "):
        data.load("cifar10")
    with pytest.raises(DataUnavailable, match=f"no data for 'mnist' in {tmp_path}, {tmp_path}/mnist,.*npz file"):
        data.load("mnist", root=tmp_path)
    with pytest.raises(DataUnavailable, match=r"no data for 'folder' in .*nowhere"):
        data.load("folder", root=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mnist", r"'mnist' cannot be downloaded; .*x_train"),
        ("imagefolder", r"'imagefolder' cannot be downloaded; .*train/<class>/"),
        ("digits", r"'digits' comes with scikit-learn; there is nothing to fetch"),
    ],
)
def test_what_cannot_be_fetched_says_so(tmp_path, name, message):
    with pytest.raises(DataUnavailable, match=message):
        data.fetch(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_where_data_is_looked_for_in_this_order(tmp_path, monkeypatch, user_cache):
    def found(**options) -> int:
        return int(data.load("mnist", **options).train.inputs[0, 0, 0, 0])

    npz(user_cache / "data" / "mnist", value=1)
    assert found() == 1
    monkeypatch.setenv("CONJUGO_DATA", str(tmp_path / "room"))
    assert found() == 1
    npz(tmp_path / "room" / "mnist", value=2)
    assert found() == 2
    npz(tmp_path / "root" / "mnist", value=3)
    assert found(root=tmp_path / "root") == 3
    npz(tmp_path / "root", value=4)
    assert found(root=str(tmp_path / "root")) == 4
    monkeypatch.setenv("HOME", str(tmp_path))
    assert found(root="~/root") == 4


def test_info_about_bundled_data():
    info = data.info("digits")
    assert (info.available, info.location, info.kind, info.train, info.test) == (True, None, "image", 1437, 360)
    assert (info.input_shape, info.classes) == ((1, 8, 8), tuple("0123456789"))
    assert sum(info.class_counts) == 1437
    assert info.bytes == 1797 * (64 + 8)


def test_info_about_files(tmp_path):
    npz(tmp_path)
    info = data.info("folder", tmp_path)
    assert (info.available, info.location, info.train, info.test) == (True, tmp_path, 6, 3)
    assert (info.input_shape, info.classes, info.class_counts) == ((1, 4, 4), ("0", "1"), (3, 3))
    assert info.bytes == 9 * (16 + 8)


def test_info_about_absent_data(tmp_path):
    info = data.info("cifar100", tmp_path)
    assert not info.available
    assert "conjugo data fetch cifar100" in info.how_to_get
    assert (info.location, info.kind, info.train, info.bytes, info.classes) == (None, None, None, None, ())


def test_verify_reads_past_the_cache(tmp_path):
    assert data.verify("digits").ok
    with pytest.raises(DataUnavailable):
        data.verify("folder", tmp_path)
    npz(tmp_path)
    path = tmp_path / "data.npz"
    data.load("folder", root=tmp_path)
    assert data.verify("folder", tmp_path) == data.Verification("folder", (path,), ())
    times = path.stat().st_mtime_ns
    flip_a_bit(path, path.read_bytes().index(b"NUMPY"))
    os.utime(path, ns=(times, times))  # the cache is none the wiser
    data.load("folder", root=tmp_path)
    found = data.verify("folder", tmp_path)
    assert not found.ok
    assert found.files == (path,)
    assert str(path) in found.problems[0]


def split(n=4, shape=(3, 4, 4), classes=2) -> Split:
    return Split(torch.from_numpy(pixels(n, 4))[:, : shape[0], :, : shape[2]], torch.arange(n) % classes)


def test_a_split_checks_itself():
    with pytest.raises(ValueError, match=r"Split: inputs must be uint8 \[N, C, H, W\] or float32 \[N, F\]"):
        Split(torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"Split: targets must be int64 \[2\], got 'torch.int64 \[3\]'"):
        Split(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"Split: targets must be int64 \[2\], got 'torch.int32 \[2\]'"):
        Split(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int32))


def test_a_data_set_checks_itself():
    assert len(Dataset("made up", "image", split(), split(0), ("a", "b")).test) == 0
    with pytest.raises(ValueError, match=r"Dataset: test must be of input shape \(3, 4, 4\), got \(3, 4, 3\)"):
        Dataset("made up", "image", split(), split(shape=(3, 4, 3)), ("a", "b"))
    with pytest.raises(ValueError, match=r"Dataset: train.targets must be class indices in 0..1, got \(0, 2\)"):
        Dataset("made up", "image", split(classes=3), split(), ("a", "b"))
    with pytest.raises(ValueError, match=r"Dataset: test.targets must be class indices in 0..0, got \(0, 1\)"):
        Dataset("made up", "image", split(classes=1), split(), ("a",))
