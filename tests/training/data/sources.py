"""Small data sets on disk, in every form that the data room reads."""

import io
import struct
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from conjugo.training.data import archives
from conjugo.training.data.download import md5


def pixels(n: int, side: int = 32, channels: int = 3, *, seed: int = 0) -> np.ndarray:
    """Random uint8 [n, channels, side, side]."""
    return np.random.default_rng(seed).integers(0, 256, (n, channels, side, side), dtype=np.uint8)


def python2_pickle(value: object) -> bytes:
    """What Python 2 and the numpy of its days wrote with protocol 2: strings of bytes, arrays through _reconstruct."""
    return b"\x80\x02" + _operations(value) + b"."


def _operations(value: object) -> bytes:
    match value:
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return b"K" + bytes([value]) if 0 <= value < 256 else b"J" + struct.pack("<i", value)
        case bytes():
            return (b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + struct.pack("<i", len(value))) + value
        case tuple():
            return b"(" + b"".join(map(_operations, value)) + b"t"
        case list():
            return b"](" + b"".join(map(_operations, value)) + b"e"
        case dict():
            return b"}(" + b"".join(_operations(k) + _operations(v) for k, v in value.items()) + b"u"
        case np.ndarray():
            return _array_operations(value)
    raise TypeError(type(value))


def _array_operations(array: np.ndarray) -> bytes:
    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + _operations((0,)) + _operations(b"b") + b"tR"
    code = array.dtype.str.lstrip("<|").encode()
    order = b"|" if array.itemsize == 1 else b"<"
    dtype = b"cnumpy\ndtype\n" + _operations((code, 0, 1)) + b"R" + _operations((3, order, None, None, None, -1, -1, 0))
    fortran = array.flags.f_contiguous and not array.flags.c_contiguous
    content = _operations(array.tobytes("F" if fortran else "C"))
    state = b"(" + _operations(1) + _operations(array.shape) + dtype + b"b" + _operations(fortran) + content + b"t"
    return empty + state + b"b"


def tar(path: Path, members: Mapping[str, bytes]) -> Path:
    """A .tar.gz file with these members, behind their folder as in the official ones."""
    with tarfile.open(path, "w:gz") as file:
        folder = tarfile.TarInfo(next(iter(members)).split("/")[0])
        folder.type = tarfile.DIRTYPE
        file.addfile(folder)
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    return path


def cifar_members(name: str, images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> dict[str, dict]:
    """Members of an official archive, not yet pickled. The images are dealt to its files, the last of them for testing."""
    archive = archives.ARCHIVES[name]
    files = (*archive.train, *archive.test)
    members = {}
    for file, part, targets in zip(files, np.array_split(images, len(files)), np.array_split(labels, len(files))):
        members[file] = {b"data": part.reshape(len(part), -1), archive.label_key: targets.tolist(), b"batch_label": b""}
    members[archive.meta] = {archive.classes_key: [label.encode() for label in classes], b"num_vis": 3072}
    return members


def trust(monkeypatch, name: str, path: Path) -> None:
    """Take the checksum of *path* for the published one."""
    monkeypatch.setitem(archives.ARCHIVES, name, replace(archives.ARCHIVES[name], checksum=md5(path)))


def encode(image: np.ndarray, form: str, **options: object) -> bytes:
    """An image [C, H, W] in the file format *form*."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(buffer, form, **options)
    return buffer.getvalue()


def parquet(path: Path, blobs: list[bytes | None], labels: list[int | None], *, column: str = "png") -> Path:
    """A parquet file of encoded images and labels."""
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.table({"label": pyarrow.array(labels, pyarrow.int8()), column: blobs}), path)
    return path


def flip_a_bit(path: Path, place: int = -1) -> None:
    """Damage one byte; its size stays. -1: in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place < 0 else place] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    """Cut off the last third."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
