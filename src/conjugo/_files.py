"""Files that are always whole: written beside their place, synced to disk, then renamed; one process at a time."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

__all__ = ["alone_in", "sync_folder", "write_aside"]


def write_aside(path: Path, content: str | bytes | Callable[[IO[bytes]], object], *, checksum_digits: int = 0) -> Path:
    """Give *path* a new content, all or nothing; whoever reads it meanwhile, or after a crash, finds the old or the new.

    content: text (written as UTF-8), bytes, or a function that writes to the open file it is given. checksum_digits: if
    not 0, the name becomes ``<stem>-<so many hexadecimal digits of the SHA-256><suffix>``; the checksum is taken of what
    is handed to the file, so that it also uncovers damage done while writing.

    Gives the path of the written file. Raises what the system and *content* raise (no space left, no permission, ...);
    the old content stays then and nothing is left beside it.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            target: IO[bytes] | _Hashed = _Hashed(file) if checksum_digits else file
            if callable(content):
                content(target)  # type: ignore[arg-type]
            else:
                target.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        if isinstance(target, _Hashed):
            path = path.with_stem(f"{path.stem}-{target.sha256.hexdigest()[:checksum_digits]}")
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)
    return path


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes and threads that ask for the same out of *folder*: they wait.

    Nothing is written; a killed process lets go. Where the system or the file system has no such locks, nobody waits.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class _Hashed:
    """A file that is only written to, and the SHA-256 of what was written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def sync_folder(folder: Path) -> None:
    """Make a rename in *folder* durable, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems refuse it; the file itself is whole and in its place.
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
