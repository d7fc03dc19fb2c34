"""Files that are always whole: written beside their place, synced to disk, then renamed; one process at a time."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

__all__ = ["alone_in", "sync_folder", "write_aside"]


def write_aside(path: Path, content: str | bytes | Callable[[IO[bytes]], object]) -> None:
    """Give *path* a new content, all or nothing; whoever reads it meanwhile, or after a crash, finds the old or the new.

    content: text (written as UTF-8), bytes, or a function that writes to the open file it is given. Raises what the system
    and *content* raise (no space left, no permission, ...); the old content stays then and nothing is left beside it.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


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
