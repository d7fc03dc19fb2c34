"""Data sets in a folder: parquet files of encoded images, MNIST-style npz files, one folder of images per class."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from conjugo.errors import CorruptFile, DataUnavailable
from conjugo.training.data.dataset import Dataset
from conjugo.training.data.source import Source, image_dataset, require

__all__ = ["find_imagefolder", "find_npz", "find_parquet"]

_IMAGE_COLUMNS = (
    "webp",
    "jpeg",
    "png",
    "image",
    "image.bytes",
    "img.bytes",
)  # the last two as Hugging Face writes them
_LABEL_COLUMNS = ("label", "fine_label")
_COLUMNS = (_IMAGE_COLUMNS, _LABEL_COLUMNS)
_CLASSES_FILE = "classes.txt"
# What data of these names must be: channels and number of classes.
_KNOWN = {"cifar10": (3, 10), "cifar100": (3, 100), "mnist": (1, 10)}
# Where the folder has no classes.txt.
_CLASSES = {
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "mnist": tuple("0123456789"),
}
# Pillow knows many more; for one of them it starts Ghostscript, which then runs a program that lies in the file.
_FORMATS = ("WEBP", "JPEG", "PNG", "BMP", "PPM", "TIFF")
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
_GREY = ("1", "L", "LA")
_BLOCK = 256  # images per task of the thread pool: a task per image would cost more than decoding one
# Bytes of an encoded image from which on threads pay. With less (JPEG of 32x32 pixels) they wait for Python's lock most of
# the time, and two take half as long again as one.
_THREADS_PAY = 2048


_Pair = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]  # images [N, C, H, W], labels [N]


def find_parquet(name: str, folder: Path, image_size: int | None) -> Source | None:
    """``train*.parquet``, ``test*.parquet``: encoded images in a column webp, jpeg, png or image, classes in label.

    Files in the form of Hugging Face's data sets are read too: image or img with a field bytes, label or fine_label.
    """
    train, test = sorted(folder.glob("train*.parquet")), sorted(folder.glob("test*.parquet"))
    if not train or not test:
        return None

    def read() -> Dataset:
        blobs, labels = _read_parquet([*train, *test])
        boundary = sum(len(blobs[path]) for path in train)
        rows = [(path, row) for path in blobs for row in range(len(blobs[path]))]
        images = _decode(
            len(rows),
            lambda i: blobs[rows[i][0]][rows[i][1]].as_py(),
            lambda i: f"{rows[i][0]}, row {rows[i][1]}",
            image_size,
        )
        targets = np.concatenate([labels[path] for path in blobs])
        return _dataset(name, folder, (images[:boundary], targets[:boundary]), (images[boundary:], targets[boundary:]))

    return Source(name, folder, (*train, *test, *_classes_file(folder)), _variant(image_size), read)


def find_npz(name: str, folder: Path) -> Source | None:
    """An npz file with x_train, y_train, x_test, y_test: ``<name>.npz``, or the only npz file there is."""
    named, files = folder / f"{name}.npz", sorted(folder.glob("*.npz"))
    if not named.is_file() and len(files) != 1:
        return None
    path = named if named.is_file() else files[0]

    def read() -> Dataset:
        try:
            # No pickles: an npz file from anywhere cannot execute code.
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                train = _npz_pair(arrays["x_train"], arrays["y_train"])
                test = _npz_pair(arrays["x_test"], arrays["y_test"])
        except Exception as error:  # whatever zipfile, zlib and numpy raise on bytes that mean something else
            raise CorruptFile(f"{path}: not an MNIST-style npz file ({error})") from error
        return _dataset(name, folder, train, test)

    return Source(name, folder, (path, *_classes_file(folder)), "", read)


def find_imagefolder(name: str, folder: Path, image_size: int | None) -> Source | None:
    """``train/<class>/*`` and ``val/<class>/*`` (or ``test/``), as torchvision's ImageFolder reads them."""
    train = folder / "train"
    test = next((path for path in (folder / "val", folder / "test") if path.is_dir()), None)
    if not train.is_dir() or test is None:
        return None
    train_files, test_files = _by_class(train), _by_class(test)
    classes = tuple(train_files)
    if classes != tuple(test_files):
        different = ", ".join(sorted(set(train_files) ^ set(test_files)))
        raise CorruptFile(f"{folder}: {train.name} and {test.name} do not have the same classes ({different})")
    samples = [
        (path, label) for split in (train_files, test_files) for label, c in enumerate(classes) for path in split[c]
    ]
    paths = [path for path, _ in samples]
    boundary = sum(map(len, train_files.values()))

    def read() -> Dataset:
        images = _decode(len(paths), lambda i: paths[i].read_bytes(), lambda i: str(paths[i]), image_size)
        labels = np.array([label for _, label in samples], dtype=np.int64)
        return image_dataset(
            name, folder, classes, (images[:boundary], labels[:boundary]), (images[boundary:], labels[boundary:])
        )

    return Source(name, folder, tuple(paths), _variant(image_size), read)


def _by_class(split: Path) -> dict[str, list[Path]]:
    """The images at any depth below each sub-folder of *split*, classes and paths in alphabetical order."""
    names = sorted(entry.name for entry in os.scandir(split) if entry.is_dir())
    found = {name: sorted(p for p in (split / name).rglob("*") if p.suffix.lower() in _SUFFIXES) for name in names}
    if not found:
        raise DataUnavailable(f"{split}: no folders, and so no classes; images belong in {split}/<class>/")
    for name, paths in found.items():
        if not paths:
            raise DataUnavailable(f"{split / name}: no images ({', '.join(_SUFFIXES)})")
    return found


def _variant(image_size: int | None) -> str:
    return "" if image_size is None else str(image_size)


def _classes_file(folder: Path) -> tuple[Path, ...]:
    path = folder / _CLASSES_FILE
    return (path,) if path.is_file() else ()


def _classes(name: str, folder: Path) -> tuple[str, ...] | None:
    for path in _classes_file(folder):
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise CorruptFile(f"{path}: not a text file with one class per line ({error})") from error
        return tuple(line.strip() for line in lines if line.strip())
    return _CLASSES.get(name)


def _dataset(name: str, folder: Path, train: _Pair, test: _Pair) -> Dataset:
    """Data set with the class names of *folder*; CorruptFile for other data under a name that is known."""
    dataset = image_dataset(name, folder, _classes(name, folder), train, test)
    found = (dataset.input_shape[0], dataset.num_classes)
    expected = _KNOWN.get(name, found)
    if found != expected:
        raise CorruptFile(
            f"{folder}: images of {found[0]} channel(s) in {found[1]} classes are not {name}, which has {expected[0]} "
            f"in {expected[1]}; other data is loaded as 'folder'"
        )
    return dataset


def _npz_pair(images: npt.NDArray[np.generic], labels: npt.NDArray[np.generic]) -> _Pair:
    """Images to [N, C, H, W] (from [N, H, W] or [N, H, W, C]), labels to int64 [N]; ValueError for anything else."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"images {images.dtype} {images.shape} and labels {labels.dtype} "
            "instead of uint8 [N, H, W] or [N, H, W, C] and integers"
        )
    flat = labels.reshape(-1).astype(np.int64)
    if len(images) != len(flat):
        raise ValueError(f"{len(images)} images, but {len(flat)} labels")
    planes = images[:, None] if images.ndim == 3 else np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return planes.astype(np.uint8, copy=False), flat


def _read_parquet(paths: Sequence[Path]) -> tuple[dict[Path, Any], dict[Path, npt.NDArray[np.int64]]]:
    """Encoded images (arrow's column, which is half as large as a list of bytes) and labels of each file."""
    parquet = require("pyarrow.parquet", "data", "a parquet file")
    arrow = require("pyarrow", "data", "a parquet file")
    blobs, labels = {}, {}
    for path in paths:
        try:
            # Memory mapping would turn a file that is truncated meanwhile into a crash.
            table = parquet.read_table(path, memory_map=False).flatten()
            image, label = (next((c for c in names if c in table.column_names), None) for names in _COLUMNS)
            if image is None or label is None:
                wanted = " and ".join(f"one of {', '.join(names)}" for names in _COLUMNS)
                raise CorruptFile(f"{path}: columns {wanted} expected, found {', '.join(table.column_names)}")
            if table.column(label).null_count or not len(table):
                raise CorruptFile(f"{path}: {len(table)} rows, {table.column(label).null_count} of them without label")
            blobs[path] = table.column(image).cast(arrow.binary())
            labels[path] = table.column(label).cast(arrow.int64()).to_numpy()
        except (arrow.ArrowException, OSError) as error:
            raise CorruptFile(f"{path}: not a readable parquet file of images and labels ({error})") from error
    return blobs, labels


def _decode(
    count: int, encoded: Callable[[int], bytes], place: Callable[[int], str], image_size: int | None
) -> npt.NDArray[np.uint8]:
    """Decode images to uint8 [N, C, H, W]; C is 1 if the first image is grey (then all must be), else 3.

    encoded: bytes of the i-th of *count* images. place: where it lies, for messages. image_size: side in pixels to which
    each image is brought (shorter side resized, middle cut out); None: all must have the size of the first.
    """
    pillow = require("PIL.Image", "vision", "decoding images")
    ops = require("PIL.ImageOps", "vision", "decoding images")

    def pixels(i: int) -> npt.NDArray[np.uint8]:
        """[C, H, W]."""
        try:
            with pillow.open(io.BytesIO(encoded(i)), formats=_FORMATS) as image:
                picture = image.convert("L" if image.mode in _GREY else "RGB")
        except Exception as error:  # whatever Pillow's decoders raise
            raise CorruptFile(f"{place(i)}: not a readable image ({error})") from error
        if image_size is not None:
            picture = ops.fit(picture, (image_size, image_size), pillow.Resampling.BICUBIC)
        return np.atleast_3d(np.asarray(picture, dtype=np.uint8)).transpose(2, 0, 1)

    channels, height, width = pixels(0).shape
    images = np.empty((count, channels, height, width), dtype=np.uint8)

    def decode_block(start: int) -> None:
        for i in range(start, min(start + _BLOCK, count)):
            planes = pixels(i)
            if planes.shape[0] > channels:
                raise CorruptFile(f"{place(i)}: a colour image, but the first one is grey")
            if planes.shape[1:] != (height, width):
                size = f"{planes.shape[2]}x{planes.shape[1]} pixels, not {width}x{height} like the first"
                raise CorruptFile(f"{place(i)}: {size}; give image_size to bring all to one size")
            images[i] = planes  # grey ones get three equal channels where the first has colour

    workers = os.cpu_count() if len(encoded(0)) >= _THREADS_PAY else 1
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(decode_block, range(0, count, _BLOCK)):
            pass
    return images
