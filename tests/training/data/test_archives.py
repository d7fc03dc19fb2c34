"""Official archives: read as they are, nothing in them executed, damage named, good data never overwritten."""

import os
import pickle

import numpy as np
import pytest
from tests.training.data.sources import cifar_members, flip_a_bit, pixels, python2_pickle, tar, truncate, trust

from conjugo.errors import CorruptFile
from conjugo.training import data
from conjugo.training.data import archives

CLASSES = ("apple", "bear", "cup")
NAMES = ["cifar10", "cifar100"]


def modern_pickle(value):
    return pickle.dumps(value, protocol=4)


def write(monkeypatch, folder, name, members, to_bytes=python2_pickle):
    path = folder / archives.ARCHIVES[name].file
    tar(path, {key: value if isinstance(value, bytes) else to_bytes(value) for key, value in members.items()})
    trust(monkeypatch, name, path)
    return path


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def members(name):
    return cifar_members(name, pixels(12), np.arange(12) % 3, CLASSES)


@pytest.mark.parametrize("to_bytes", [python2_pickle, modern_pickle])
def test_images_labels_and_classes(monkeypatch, tmp_path, name, members, to_bytes):
    path = write(monkeypatch, tmp_path, name, members, to_bytes)
    dataset = data.load(name, root=tmp_path)
    boundary = 10 if name == "cifar10" else 6
    assert np.array_equal(dataset.train.inputs, pixels(12)[:boundary])
    assert np.array_equal(dataset.test.inputs, pixels(12)[boundary:])
    assert dataset.train.targets.tolist() == [i % 3 for i in range(boundary)]
    assert dataset.test.targets.tolist() == [i % 3 for i in range(boundary, 12)]
    assert (dataset.name, dataset.kind, dataset.classes, dataset.input_shape) == (name, "image", CLASSES, (3, 32, 32))
    assert data.verify(name, tmp_path) == data.Verification(name, (path,), ())


def test_a_row_is_red_green_blue_each_line_by_line(monkeypatch, tmp_path):
    row = np.arange(3072, dtype=np.int64).astype(np.uint8)
    members = cifar_members("cifar100", np.stack([row, row]).reshape(2, 3, 32, 32), np.zeros(2, int), ("a",))
    write(monkeypatch, tmp_path, "cifar100", members)
    image = data.load("cifar100", root=tmp_path).train.inputs[0]
    for channel, y, x in [(0, 0, 0), (0, 0, 31), (0, 5, 7), (1, 0, 0), (2, 31, 30)]:
        assert image[channel, y, x] == (1024 * channel + 32 * y + x) % 256


def test_arrays_stored_column_by_column(monkeypatch, tmp_path, name, members):
    archive = archives.ARCHIVES[name]
    for file in (*archive.train, *archive.test):
        members[file][b"data"] = np.asfortranarray(members[file][b"data"])
    write(monkeypatch, tmp_path, name, members)
    assert np.array_equal(data.load(name, root=tmp_path).train.inputs[0], pixels(12)[0])


class Calls:
    """Pickles as a call of *function* with *arguments*."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("evil", "message"),
    [
        (Calls(os.mkdir, "executed"), r"mkdir has no place"),
        (Calls(eval, "__import__('os').mkdir('executed')"), r"eval has no place"),
        (Calls(np.load, "x.npy"), r"load has no place"),
        # numpy itself would make an array of pointers of these bytes.
        (Calls(np.ndarray, (1,), "O", b"12345678"), r"not callable"),
        (np.array([None]), r"'O8' has no place"),
        (np.zeros(3), r"'f8' has no place"),
    ],
)
def test_nothing_is_executed(monkeypatch, tmp_path, evil, message):
    monkeypatch.chdir(tmp_path)
    members = cifar_members("cifar100", pixels(4), np.arange(4) % 3, CLASSES)
    members["cifar-100-python/train"][b"data"] = evil
    path = write(monkeypatch, tmp_path, "cifar100", members, modern_pickle)
    with pytest.raises(CorruptFile, match=message) as caught:
        data.load("cifar100", root=tmp_path)
    assert str(path) in str(caught.value)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, lambda path: path.write_bytes(b"")])
def test_a_wrong_checksum_is_an_error_and_the_file_stays(monkeypatch, tmp_path, name, members, damage):
    path = write(monkeypatch, tmp_path, name, members)
    damage(path)
    damaged = path.read_bytes()
    with pytest.raises(CorruptFile, match=rf"MD5 should be .*is .*conjugo data fetch {name}") as caught:
        data.load(name, root=tmp_path)
    assert str(path) in str(caught.value)
    found = data.verify(name, tmp_path)
    assert not found.ok
    assert "MD5" in found.problems[0]
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == {path: damaged}


@pytest.mark.parametrize(
    "damage", [truncate, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"x" * 99)]
)
def test_a_broken_archive_with_the_right_checksum(monkeypatch, tmp_path, name, members, damage):
    path = write(monkeypatch, tmp_path, name, members)
    damage(path)
    trust(monkeypatch, name, path)
    with pytest.raises(CorruptFile, match="not a CIFAR archive") as caught:
        data.load(name, root=tmp_path)
    assert str(path) in str(caught.value)


def spoil(members, archive, how):
    first, meta = members[archive.train[0]], members[archive.meta]
    match how:
        case "member missing":
            del members[archive.train[-1]]
        case "meta missing":
            del members[archive.meta]
        case "not a pickle":
            members[archive.train[0]] = b"no pickle"
        case "empty member":
            members[archive.train[0]] = b""
        case "list for a dictionary":
            members[archive.train[0]] = python2_pickle([1])
        case "no images":
            del first[b"data"]
        case "images are bytes":
            first[b"data"] = b"123"
        case "no labels":
            del first[archive.label_key]
        case "label missing":
            first[archive.label_key] = first[archive.label_key][1:]
        case "label outside range":
            first[archive.label_key][0] = 3
        case "label is text":
            first[archive.label_key][0] = b"cup"
        case "other size":
            first[b"data"] = first[b"data"][:, :1000]
        case "classes are numbers":
            meta[archive.classes_key] = [1, 2, 3]


@pytest.mark.parametrize(
    "how",
    [
        "member missing",
        "meta missing",
        "not a pickle",
        "empty member",
        "list for a dictionary",
        "no images",
        "images are bytes",
        "no labels",
        "label missing",
        "label outside range",
        "label is text",
        "other size",
        "classes are numbers",
    ],
)
def test_wrong_content(monkeypatch, tmp_path, name, members, how):
    spoil(members, archives.ARCHIVES[name], how)
    path = write(monkeypatch, tmp_path, name, members)
    with pytest.raises(CorruptFile) as caught:
        data.load(name, root=tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert os.listdir(tmp_path) == [path.name]


def test_a_damaged_archive_leaves_the_cache_of_the_good_one(monkeypatch, tmp_path, name, members):
    path = write(monkeypatch, tmp_path, name, members)
    before = data.load(name, root=tmp_path)
    (cache,) = tmp_path.glob("*.cache")
    content = cache.read_bytes()
    truncate(path)
    with pytest.raises(CorruptFile):
        data.load(name, root=tmp_path)
    assert cache.read_bytes() == content
    assert np.array_equal(before.train.inputs[:2], pixels(12)[:2])


def test_published_checksums_and_addresses():
    """As printed on the authors' page."""
    published = {
        "cifar10": ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
        "cifar100": ("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
    }
    assert {name: (a.url, a.checksum) for name, a in archives.ARCHIVES.items()} == published
    assert archives.ARCHIVES["cifar10"].train[4] == "cifar-10-batches-py/data_batch_5"
