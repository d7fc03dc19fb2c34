"""What a paper to be reproduced is, what is asked of it, and what it gives."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from conjugo._files import write_aside
from conjugo.studies import statistics
from conjugo.studies.summary import SIGNIFICANT, p_text

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = [
    "Claim",
    "Judge",
    "NotRun",
    "Paper",
    "Request",
    "Result",
    "above",
    "compared",
    "listed",
    "near",
    "new_table",
    "not_below",
    "sentences",
]


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of :func:`conjugo.studies.reproduce.reproduce` that every scale gets."""

    out: Path | None = None
    jobs: int = 1
    workers: int = 1
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
class NotRun:
    """A scale at which nothing is run. text: what would be, or why not."""

    paper: str
    scale: str
    why: str

    def tables(self) -> list[RenderableType]:
        """None."""
        return []

    def text(self) -> str:
        """One sentence or two."""
        return f"Nothing was run. {self.why}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {"paper": self.paper, "scale": self.scale, "text": self.text()}

    def __call__(self, request: Request) -> NotRun:
        """Write the words to the run directory; this is the experiment."""
        if request.out is not None:
            request.out.mkdir(parents=True, exist_ok=True)
            write_aside(request.out / "results.json", json.dumps(self.to_dict(), indent=1))
        return self


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


Judge = Callable[[float, float | None], bool | None]
"""Says of a difference of means, and of the p-value of Welch's test that there is none, whether a claim holds."""


def above(least: float) -> Judge:
    """Better by at least *least*, and significantly better; cannot be judged where there is no test."""
    return lambda gain, p: None if p is None else gain >= least and gain > 0 and p < SIGNIFICANT


def not_below(gain: float, p: float | None) -> bool:
    """Not significantly worse."""
    return gain >= 0 or (p is not None and p >= SIGNIFICANT)


def near(most: float) -> Judge:
    """Means at most *most* apart."""
    return lambda gain, p: abs(gain) <= most


def compared(ours: Sequence[float] | None, theirs: Sequence[float] | None, holds: Judge) -> tuple[bool | None, str]:
    """A case of a claim about the accuracies *ours* compared to *theirs*; None: these runs are not there."""
    if ours is None or theirs is None:
        return None, "not run"
    gain = statistics.mean_sd(ours)[0] - statistics.mean_sd(theirs)[0]
    p = statistics.welch(ours, theirs)
    text = p_text(p)
    test = "no test" if p is None else f"p {text}" if text.startswith("<") else f"p = {text}"
    return holds(gain, p), f"{100 * gain:+.1f} points ({test})"


def new_table(title: str, caption: str) -> Table:
    """An empty table whose first column is for names."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=title,
        caption=caption,
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title_style="bold",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("", no_wrap=True)
    return table
