"""What a paper to be reproduced is, what is asked of it, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from conjugo.studies.summary import p_text

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = ["Claim", "Paper", "Request", "Result", "listed", "new_table", "p_equals", "sentences"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of :func:`conjugo.studies.reproduce.reproduce` that every scale gets."""

    out: Path | None = None
    jobs: int = 1
    resume: bool = False
    progress: bool | None = None
    force: bool = False


class Result(Protocol):
    """What came out."""

    def tables(self) -> list[RenderableType]:
        """For the terminal: published or expected figures beside ours."""

    def text(self) -> str:
        """Plain sentences: what reproduced and what did not, and how it was measured."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""


@dataclass(frozen=True, kw_only=True)
class Paper:
    """A paper. scales: by name, what does the experiment at that scale."""

    title: str
    source: str
    scales: Mapping[str, Callable[[Request], Result]]


@dataclass(frozen=True)
class Claim:
    """Something that should come out, and for each case (a number of steps, say) whether it did, with the evidence.

    A case of None could not be judged: its runs are not there.
    """

    statement: str
    cases: Mapping[str, tuple[bool | None, str]]

    @property
    def verdict(self) -> str:
        """``reproduced``, ``not reproduced``, ``reproduced in part``, or ``not judged`` without any case to judge by."""
        held = [holds for holds, _ in self.cases.values() if holds is not None]
        if not held:
            return "not judged"
        return "reproduced" if all(held) else "reproduced in part" if any(held) else "not reproduced"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        cases = {case: {"holds": holds, "evidence": said} for case, (holds, said) in self.cases.items()}
        return {"statement": self.statement, "verdict": self.verdict, "cases": cases}

    def __str__(self) -> str:
        evidence = "; ".join(f"{case}: {said}" for case, (_, said) in self.cases.items())
        return f"{self.verdict.capitalize()}: {self.statement}. {evidence}."


def sentences(claims: Sequence[Claim], notes: Sequence[str]) -> str:
    """*claims*, then *notes*, one a line."""
    return "\n".join([*map(str, claims), *notes])


def listed(items: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def p_equals(p: float | None) -> str:
    """``p = 0.012``, ``p < 0.001``, or ``no test``."""
    text = p_text(p)
    return "no test" if p is None else f"p {text}" if text.startswith("<") else f"p = {text}"


def new_table(title: str, caption: str) -> Table:
    """An empty table whose first column is for names."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=title,
        caption=caption,
        box=box.SIMPLE_HEAD,
        title_style="bold",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("", no_wrap=True)
    return table
