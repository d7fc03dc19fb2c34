"""Checkpoints that survive a killed process, a full disk and flipped bits."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch

from conjugo._files import write_aside
from conjugo.errors import CorruptFile

__all__ = ["Checkpoints"]

_DIGITS = 16  # of the SHA-256 in a file's name


class Checkpoints:
    """The checkpoints of one run: files ``step-<step>-<checksum>.pt`` in *folder*, of which the newest *keep* stay.

    Each is written beside, synced and renamed, and only then an older one removed. The checksum in its name is the
    beginning of its SHA-256 (as ``sha256sum`` prints it). ``torch.load(path, weights_only=True)`` reads it.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder = folder
        self._keep = keep

    def paths(self) -> list[Path]:
        """All checkpoints, the oldest first."""
        return sorted(self.folder.glob("step-*-*.pt"), key=_step)

    def save(self, step: int, state: dict[str, Any]) -> bool:
        """Write *state* (plain values and tensors) as that of *step*.

        If that fails (no space left, no permission) there is a warning, what is there already stays, and False.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # torch reports failed writes of its archive as RuntimeError.
            path = self.folder / f"step-{step:08}.pt"
            write_aside(path, lambda file: torch.save(state, file), checksum_digits=_DIGITS)
        except (OSError, RuntimeError) as error:
            warnings.warn(f"no checkpoint of step {step} could be written ({error}); {self.describe()}", stacklevel=2)
            return False
        for path in self.paths()[: -self._keep]:
            path.unlink(missing_ok=True)
        return True

    def load(self) -> dict[str, Any] | None:
        """The newest checkpoint that is whole, on the CPU; None if there is none at all.

        Damaged newer ones are set aside (``.corrupt`` behind their names) with a warning. Raises CorruptFile if all are
        damaged.
        """
        damaged: list[str] = []
        for path in reversed(self.paths()):
            try:
                state = _read(path)
            except CorruptFile as error:
                damaged.append(str(error))
                continue
            for message, corrupt in zip(damaged, reversed(self.paths())):
                warnings.warn(f"{message}; going back to {path.name}", stacklevel=2)
                corrupt.rename(corrupt.with_name(corrupt.name + ".corrupt"))
            return state
        if damaged:
            raise CorruptFile(f"no checkpoint can be read: {'; '.join(damaged)}")
        return None

    def describe(self) -> str:
        """Which the newest one is, for messages."""
        kept = self.paths()
        return f"the last checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"

    def clean(self) -> None:
        """Remove what a killed process may have left half written."""
        for path in self.folder.glob("*.tmp"):
            path.unlink(missing_ok=True)


def _step(path: Path) -> int:
    return int(path.name.split("-")[1])


def _read(path: Path) -> dict[str, Any]:
    wanted = path.stem.rsplit("-", 1)[1]
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()[:_DIGITS]
        if found != wanted:
            raise CorruptFile(f"checkpoint {path} is damaged: its checksum is {found}")
        file.seek(0)
        try:
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # whole, but not ours: whatever torch and pickle raise
            raise CorruptFile(f"checkpoint {path} cannot be read: {error}") from error
    return state
