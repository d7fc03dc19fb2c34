"""Decoded data sets as one memory-mapped file each.

Layout: magic, CRC-32 of all that follows the CRC field, length of the header (all little-endian), header (JSON:
fingerprint of the source, classes, dtype and shape of the arrays), arrays; header and arrays each padded to 64 bytes. A
cache whose fingerprint is not that of the source, or whose checksum is wrong, is not used and written anew.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import struct
import time
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from conjugo._files import alone_in, write_aside
from conjugo.training.data.dataset import Dataset, Split
from conjugo.training.data.source import Source

__all__ = ["cache_files", "cached", "user_cache"]

_MAGIC = b"conjugo2"  # the last digit counts the layouts
_PREFIX = struct.Struct("<8sII")  # magic, CRC-32, length of the header
_CHECKED_FROM = 12  # the CRC covers everything behind itself
_ALIGNMENT = 64
_ABANDONED = 3600.0  # seconds after which a half-written file is taken for that of a killed process


def user_cache() -> Path:
    """Folder for data that may be thrown away: ``$XDG_CACHE_HOME/conjugo`` or ``~/.cache/conjugo``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "conjugo"


def cache_files(source: Source) -> tuple[Path, Path]:
    """Where the cache of a source may lie: next to it, or in the user's cache folder."""
    file = "-".join(part for part in ("conjugo", source.name, source.variant) if part) + ".cache"
    place = hashlib.sha256(str(source.folder.resolve()).encode()).hexdigest()[:16]
    return source.folder / file, user_cache() / "decoded" / place / file


def cached(source: Source) -> Dataset:
    """The data set of a source, from its cache if that is good, otherwise read and then cached.

    The tensors are mapped privately: changing them changes no file. Raises CorruptFile when the source is damaged.
    """
    fingerprint = _fingerprint(source)
    places = cache_files(source)
    if (dataset := _read_first(places, fingerprint)) is not None:
        return dataset
    with alone_in(source.folder):
        # Of several processes one reads the source, the others find its cache.
        return _read_first(places, fingerprint) or _read_and_cache(source, places, fingerprint)


def _read_and_cache(source: Source, places: Sequence[Path], fingerprint: dict[str, Any]) -> Dataset:
    dataset = source.read()
    problems = []
    for path in places:
        try:
            _write(path, dataset, fingerprint)
        except OSError as error:
            problems.append(str(error))
        else:
            # The mapped one: other processes share its memory.
            return _read(path, fingerprint) or dataset
    warnings.warn(f"decoded {source.name} could not be cached: {'; '.join(problems)}", stacklevel=4)
    return dataset


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _fingerprint(source: Source) -> dict[str, Any]:
    """What changes when the source does, as JSON would give it back."""
    stats = [(str(path.relative_to(source.folder)), path.stat()) for path in source.files]
    files = json.dumps([[name, status.st_size, status.st_mtime_ns] for name, status in stats])
    # A digest, because there may be a million files.
    return {
        "name": source.name,
        "variant": source.variant,
        "files": hashlib.sha256(files.encode()).hexdigest(),
    }


def _read_first(places: Sequence[Path], fingerprint: dict[str, Any]) -> Dataset | None:
    """The first cached data set that can be trusted, if there is one."""
    return next((dataset for path in places if (dataset := _read(path, fingerprint)) is not None), None)


def _read(path: Path, fingerprint: dict[str, Any]) -> Dataset | None:
    """The cached data set, or None when there is none that can be trusted."""
    try:
        # Copy on write: torch wants writable memory, the file stays as it is.
        content = np.memmap(path, dtype=np.uint8, mode="c")
        magic, checksum, length = _PREFIX.unpack_from(content.data)
    except (OSError, ValueError, struct.error):
        return None
    # Checked on every load: 0.05 s for the 180 MB of CIFAR, against a training on damaged images.
    if magic != _MAGIC or zlib.crc32(content.data[_CHECKED_FROM:]) != checksum:
        return None
    header = json.loads(content[_PREFIX.size : _PREFIX.size + length].tobytes())
    if header["fingerprint"] != fingerprint:
        return None
    tensors = []
    start = _padded(_PREFIX.size + length)
    for dtype, shape in header["arrays"]:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        tensors.append(torch.from_numpy(content[start : start + size].view(dtype).reshape(shape)))
        start += _padded(size)
    return Dataset(
        header["name"],
        header["kind"],
        Split(tensors[0], tensors[1]),
        Split(tensors[2], tensors[3]),
        tuple(header["classes"]),
    )


def _write(path: Path, dataset: Dataset, fingerprint: dict[str, Any]) -> None:
    if path.parent.is_dir() and not path.parent.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH):
        # The superuser could write here all the same; a folder marked read-only shall stay as it is.
        raise PermissionError(f"{path.parent} is read-only")
    path.parent.mkdir(parents=True, exist_ok=True)
    splits = (dataset.train, dataset.test)
    arrays = [tensor.numpy() for split in splits for tensor in (split.inputs, split.targets)]
    header = {
        "name": dataset.name,
        "kind": dataset.kind,
        "classes": dataset.classes,
        "fingerprint": fingerprint,
        "arrays": [(array.dtype.str, array.shape) for array in arrays],
    }
    encoded = json.dumps(header).encode()
    head = _PREFIX.pack(_MAGIC, 0, len(encoded)) + encoded
    chunks: list[bytes | memoryview] = [head[_CHECKED_FROM:].ljust(_padded(len(head)) - _CHECKED_FROM, b"\0")]
    for array in arrays:
        chunks += [np.ascontiguousarray(array).data, b"\0" * (_padded(array.nbytes) - array.nbytes)]
    checksum = 0
    for chunk in chunks:
        checksum = zlib.crc32(chunk, checksum)
    chunks.insert(0, _PREFIX.pack(_MAGIC, checksum, len(encoded))[:_CHECKED_FROM])
    write_aside(path, lambda file: file.writelines(chunks))
    for leftover in path.parent.glob(f"{path.name}.*.tmp"):
        if time.time() - leftover.stat().st_mtime > _ABANDONED:
            leftover.unlink(missing_ok=True)
