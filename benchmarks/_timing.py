"""Side-by-side timing: cases take turns in one process, and what counts is the ratio within a round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.table import Table

__all__ = ["interleave", "ratio", "show"]


def interleave(
    cases: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 3,
    prepare: Callable[[str], object] = lambda name: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each case in each round, all cases once a round; *prepare(name)* runs before each, outside the clock.

    clock: ``time.process_time`` for work on one thread, on a machine that is not idle.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(warmup + rounds):
        for name, case in cases.items():
            prepare(name)
            start = clock()
            case()
            if turn >= warmup:
                seconds[name].append(clock() - start)
    return seconds


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Median and quartiles of the ratios of paired times."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, low, high


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> None:
    """Print a table; the first column holds names, the others numbers."""
    table = Table(title=title, title_style="bold", caption=caption or None, caption_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=i > 0)
    for row in rows:
        table.add_row(*row)
    Console(width=130).print(table)
