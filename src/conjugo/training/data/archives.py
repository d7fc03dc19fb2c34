"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from the official archives in Python's format, without executing pickles."""

from __future__ import annotations

import io
import pickle
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from conjugo.errors import CorruptFile
from conjugo.training.data.dataset import Dataset
from conjugo.training.data.download import md5
from conjugo.training.data.source import Source, image_dataset

__all__ = ["ARCHIVES", "Archive", "find"]


@dataclass(frozen=True)
class Archive:
    """Where an archive comes from and how it is laid out. checksum: MD5 as published by the authors."""

    file: str
    checksum: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    label_key: bytes
    classes_key: bytes

    @property
    def url(self) -> str:
        """The official address."""
        return f"https://www.cs.toronto.edu/~kriz/{self.file}"


ARCHIVES = {
    "cifar10": Archive(
        file="cifar-10-python.tar.gz",
        checksum="c58f30108f718f92721af3b95e74349a",
        train=tuple(f"cifar-10-batches-py/data_batch_{i}" for i in range(1, 6)),
        test=("cifar-10-batches-py/test_batch",),
        meta="cifar-10-batches-py/batches.meta",
        label_key=b"labels",
        classes_key=b"label_names",
    ),
    "cifar100": Archive(
        file="cifar-100-python.tar.gz",
        checksum="eb9058c3a382ffc7106e4002c42a8d85",
        train=("cifar-100-python/train",),
        test=("cifar-100-python/test",),
        meta="cifar-100-python/meta",
        label_key=b"fine_labels",
        classes_key=b"fine_label_names",
    ),
}

_IMAGE = (3, 32, 32)


class _Array:
    """Stands in for a numpy array of bytes while it is unpickled, and keeps its *values*."""

    values: npt.NDArray[np.uint8]

    def __setstate__(self, state: tuple[int, tuple[int, ...], _Dtype, bool, bytes]) -> None:
        _, shape, dtype, columns_first, content = state
        if dtype.code not in (b"u1", "u1"):
            raise pickle.UnpicklingError(f"an array of {dtype.code!r} has no place in a CIFAR archive")
        order: Literal["F", "C"] = "F" if columns_first else "C"
        self.values = np.frombuffer(content, np.uint8).reshape(shape, order=order)


class _Dtype:
    """Stands in for the type of an array's elements."""

    def __init__(self, code: bytes | str, *_: object) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        """Byte order and the like mean nothing for single bytes."""


# What the pickle of a numpy array calls, under the names that old and new versions of numpy write. The real functions
# would make arrays of pointers from any bytes.
_ALLOWED: dict[tuple[str, str], object] = {
    ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
    ("numpy._core.multiarray", "_reconstruct"): lambda *_: _Array(),
    ("numpy", "ndarray"): None,
    ("numpy", "dtype"): _Dtype,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Builds containers, numbers, bytes and arrays of bytes; refuses any other class or function."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a CIFAR archive") from None


def find(name: str, folder: Path) -> Source | None:
    """The official archive of the data set *name* in *folder*, if it is there."""
    if name not in ARCHIVES:
        return None
    path = folder / ARCHIVES[name].file
    if not path.is_file():
        return None
    return Source(name, folder, (path,), "", lambda: _read(name, path))


def _read(name: str, path: Path) -> Dataset:
    archive = ARCHIVES[name]
    actual = md5(path)
    if actual != archive.checksum:
        raise CorruptFile(
            f"{path}: MD5 should be {archive.checksum}, is {actual}; `conjugo data fetch {name}` replaces it"
        )
    try:
        content = _unpack(path, (*archive.train, *archive.test, archive.meta))
        classes = tuple(label.decode("ascii") for label in content[archive.meta][archive.classes_key])
        train = _join([content[member] for member in archive.train], archive.label_key)
        test = _join([content[member] for member in archive.test], archive.label_key)
    except Exception as error:  # whatever tarfile, zlib, pickle and numpy raise on bytes that mean something else
        raise CorruptFile(f"{path}: not a CIFAR archive in Python's format ({error})") from error
    return image_dataset(name, path.parent, classes, train, test)


def _unpack(path: Path, members: tuple[str, ...]) -> dict[str, dict[bytes, Any]]:
    content = {}
    with tarfile.open(path, "r:gz") as tar:
        for member in tar:
            if member.name in members and (file := tar.extractfile(member)) is not None:
                content[member.name] = _ArrayUnpickler(io.BytesIO(file.read()), encoding="bytes").load()
    return content


def _join(batches: list[dict[bytes, Any]], label_key: bytes) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    images = np.concatenate([batch[b"data"].values.reshape(-1, *_IMAGE) for batch in batches])
    labels = np.concatenate([np.asarray(batch[label_key], dtype=np.int64) for batch in batches])
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images, but {len(labels)} labels")
    return images, labels
