"""Folders that are published whole or not at all, with a checksum of every file; see :class:`Checkpointer`.

A step is written into a folder ``.tmp-...``, gets a manifest with the size and SHA-256 of each file, and is renamed to
``step-...``. So a folder of that name without a manifest, or with files that do not fit it, was damaged later.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from conjugo._files import sync_folder, write_aside
from conjugo._version import __version__
from conjugo.errors import CorruptFile

__all__ = ["NAME", "clean", "digest", "problems", "publish", "read", "remove", "step_folder", "steps", "verify"]

NAME = "manifest.json"
FORMAT = 1

Files = dict[str, list[Any]]
"""Name to [size in bytes, SHA-256]."""


def step_folder(root: Path, step: int) -> Path:
    """Where *step* is published."""
    return root / f"step-{step:08}"


def steps(root: Path) -> list[int]:
    """The published steps, the oldest first."""
    names = (path.name.removeprefix("step-") for path in root.glob("step-*"))
    return sorted(int(name) for name in names if name.isdecimal())


def digest(path: Path) -> list[Any]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
        return [file.tell(), checksum]


def publish(folder: Path, root: Path, step: int, world_size: int, files: Files, parts: list[str]) -> None:
    """Give *folder*, which holds *files*, its manifest and its place. Raises OSError."""
    for name, (size, _) in files.items():
        path = folder / name
        if not path.exists() or path.stat().st_size != size:
            raise OSError(
                f"host {socket.gethostname()} does not see {path} as the host that wrote it: checkpoints need a file "
                "system that all hosts share"
            )
    content = {
        "format": FORMAT,
        "step": step,
        "world_size": world_size,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {"conjugo": __version__, "torch": torch.__version__},
        "parts": parts,
        "files": files,
    }
    checksum = hashlib.sha256(_canonical(content)).hexdigest()
    write_aside(folder / NAME, json.dumps({"manifest": content, "sha256": checksum}, indent=1))
    os.rename(folder, step_folder(root, step))
    sync_folder(root)


def read(folder: Path) -> dict[str, Any]:
    """The manifest in *folder*. Raises CorruptFile if it is missing or damaged."""
    path = folder / NAME
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        content: dict[str, Any] = whole["manifest"]
        good = hashlib.sha256(_canonical(content)).hexdigest() == whole["sha256"]
    except FileNotFoundError:
        raise CorruptFile(f"{path} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFile(f"{path} is damaged: {error}") from error
    if not good:
        raise CorruptFile(f"{path} is damaged: its checksum does not fit")
    if content["format"] != FORMAT:
        raise CorruptFile(f"{path} has format {content['format']}; this version reads format {FORMAT}")
    if folder.name != step_folder(folder.parent, content["step"]).name:
        raise CorruptFile(f"{path} belongs to step {content['step']}")
    return content


def verify(folder: Path, files: Files) -> str:
    """What is wrong with the first of *files* that is not as it was written; empty if all are."""
    for name, expected in sorted(files.items()):
        path = folder / name
        try:
            found = digest(path)
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}"
        if found[0] != expected[0]:
            return f"{path} has {found[0]} bytes instead of {expected[0]}"
        if found[1] != expected[1]:
            return f"{path} is damaged: its checksum is {found[1][:16]}..., not {expected[1][:16]}..."
    return ""


def problems(folder: Path) -> str:
    """What is wrong with a published step, manifest and all files; empty if nothing is."""
    try:
        return verify(folder, read(folder)["files"])
    except CorruptFile as error:
        return str(error)


def remove(root: Path, step: int) -> None:
    """Unpublish *step*, then delete it; a process that is killed in between leaves nothing that looks whole."""
    condemned = root / f".tmp-remove-{step:08}"
    shutil.rmtree(condemned, ignore_errors=True)
    with suppress(FileNotFoundError):
        os.rename(step_folder(root, step), condemned)
    shutil.rmtree(condemned, ignore_errors=True)


def clean(root: Path) -> None:
    """Delete what killed processes have left half written or half removed."""
    for path in root.glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def _canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
