"""What a study asks for (`Task`), what comes back (`Outcome`), both together (`Run`), and the journal that keeps them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

from conjugo.errors import CorruptFile

__all__ = ["Crash", "Journal", "Outcome", "Phase", "Run", "Task", "read_journal"]

Phase = Literal["tune", "final"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One training run that a study wants: which contender, where, with which setting and seed.

    *study* names the cell's row (for example the number of steps) where one study has several tables; *index* counts the
    trials or the seeds of a phase; *second* is the value of the contender's second tuned hyperparameter, if it has one;
    *limit* is the number of steps after which the run is given up, where it ends at a target otherwise.
    """

    contender: str
    batch_size: int
    phase: Phase
    index: int
    seed: int
    lr: float
    second: float | None = None
    study: str = ""
    limit: int | None = None

    @property
    def cell(self) -> tuple[str, str, int]:
        """The (study, contender, batch size) that this run belongs to."""
        return self.study, self.contender, self.batch_size

    @property
    def setting(self) -> tuple[float, ...]:
        """The learning rate and, if there is one, the second tuned hyperparameter."""
        return (self.lr,) if self.second is None else (self.lr, self.second)

    def __str__(self) -> str:
        return (
            f"{self.contender}, batch {self.batch_size}, {self.phase} {self.index}, seed {self.seed}, lr {self.lr:.4g}"
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a training run gave.

    accuracy (fraction), loss (None if not finite) and curve (steps, accuracy) are on the validation split in phase "tune"
    and on the test split in phase "final". *samples* counts examples sent forward and backward. *seconds* of training do
    not count when outcomes are compared. *reached* is the number of steps to a target, interpolated between two evaluations;
    None if the run ended before it, or had none.
    """

    steps: int
    samples: int
    accuracy: float
    loss: float | None
    diverged: bool
    seconds: float = field(compare=False)
    curve: tuple[tuple[int, float], ...] = ()
    reached: float | None = None


@dataclass(frozen=True)
class Run:
    """A finished run: a line of the journal."""

    task: Task
    outcome: Outcome

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries and lists, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`."""
        outcome = dict(data["outcome"])
        outcome["curve"] = tuple((int(steps), float(accuracy)) for steps, accuracy in outcome["curve"])
        return cls(Task(**data["task"]), Outcome(**outcome))


@dataclass(frozen=True)
class Crash:
    """A run that ended in an exception or took its process with it (diverging is a result, not a crash)."""

    task: Task
    error: str


class Journal:
    """Append-only file of finished runs, one JSON line each, on the disk before :meth:`append` returns.

    Opening reads what is there. A torn last line (the process was killed while writing) is cut off; damage elsewhere
    raises :class:`conjugo.errors.CorruptFile`, and a journal that another process has open ValueError. With *path* None
    nothing is kept.
    """

    def __init__(self, path: Path | None) -> None:
        self.runs: list[Run] = []
        self._file = None
        if path is None:
            return
        file = open(path, "ab")  # noqa: SIM115 - open until close()
        try:
            _lock(file)
            self.runs = read_journal(path)
            file.truncate(len(_whole_lines(path)))
        except BaseException:
            file.close()
            raise
        self._file = file

    def append(self, run: Run) -> None:
        """Keep *run* for good."""
        if self._file is not None:
            self._file.write(json.dumps(run.to_dict(), allow_nan=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        self.runs.append(run)

    def close(self) -> None:
        """Close the file; further runs are not accepted."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_journal(path: Path) -> list[Run]:
    """The runs in a journal, without a torn last line. Raises CorruptFile if there is damage elsewhere."""
    return list(_parse(_whole_lines(path).splitlines(), path))


def _whole_lines(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]


def _lock(file: IO[bytes]) -> None:
    """Keep other processes off *file* until it is closed (also by a kill), where the system can."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{file.name} is in use: another process is working on this comparison") from None


def _parse(lines: Iterable[bytes], path: Path) -> Iterable[Run]:
    for number, line in enumerate(lines, start=1):
        try:
            yield Run.from_dict(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptFile(f"{path}, line {number}: not a finished run ({error})") from error
