"""The exceptions that users catch, and the two ways in which bad input is reported.

Every message names the owner (class or function), the argument, the value that was given and what would have been
accepted.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import NoReturn

__all__ = ["CorruptFile", "DataUnavailable", "ReplicasDiffer", "TrainingDiverged", "UnknownName", "check", "unknown"]


class UnknownName(ValueError):
    """A name (of an optimizer, a model, a data set, ...) that does not exist; the message suggests the nearest ones."""


class CorruptFile(RuntimeError):
    """An archive, cache, configuration or checkpoint that is truncated, damaged or not what it claims to be."""


class DataUnavailable(RuntimeError):
    """Data that is neither on this machine nor may be downloaded; the message says how to get it."""


class ReplicasDiffer(RuntimeError):
    """Workers that should hold the same parameters do not: memory, a chip or a program has failed on one of them."""


class TrainingDiverged(RuntimeError):
    """Too many steps in a row had a non-finite loss or gradient; the last good checkpoint was kept."""


def check(condition: bool, owner: str, argument: str, value: object, accepted: str) -> None:
    """Raise ``ValueError("owner: argument must be accepted, got value")`` unless *condition* holds."""
    if not condition:
        raise ValueError(f"{owner}: {argument} must be {accepted}, got {value!r}")


def unknown(kind: str, name: object, known: Iterable[str]) -> NoReturn:
    """Raise :class:`UnknownName` for *name*, with the nearest of the *known* names first."""
    choices = sorted(known)
    near = difflib.get_close_matches(str(name), choices, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else "."
    raise UnknownName(f"unknown {kind} {name!r}{hint} Known: {', '.join(choices)}")
