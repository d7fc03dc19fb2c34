"""What a comparison says: one `Row` per cell, the sentences on top, and the tables for the terminal and for spreadsheets."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from conjugo.studies import statistics
from conjugo.studies.tuning import at_edge

if TYPE_CHECKING:
    from rich.console import RenderableType

    from conjugo.studies.results import CellResult, CompareResult

__all__ = [
    "LOSS_ALLOWED",
    "MARKS",
    "SIGNIFICANT",
    "Row",
    "batch_name",
    "batches",
    "csv_text",
    "headline",
    "largest_batches",
    "p_text",
    "percent",
    "plural",
    "rows",
    "scaling",
    "tables",
]

LOSS_ALLOWED = 0.01
"""How much accuracy (one point) may be lost against the best at the smallest batch for a batch to count as reachable."""

SIGNIFICANT = 0.05
"""p-values below this are called significant."""

MARKS = {"better": "▲", "worse": "▼", "": ""}
"""For the verdicts of rows, in tables."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One (optimizer, batch size) cell in numbers. Accuracies are fractions on the test split, from fresh seeds only.

    sd: sample standard deviation over *seeds*. gain, p_baseline: difference to the baseline at the same batch and its
    Welch p-value; p_rival: p-value against *rival*, the best other optimizer there. steps_to_target, samples_to_target:
    medians, None if the median run does not reach the target; *reached* runs did. diverged_trials, diverged_runs: counts
    while tuning and with fresh seeds. lr, second: the setting chosen by tuning; *edges* names those at the edge of their
    range. lr_octaves: width of the usable learning rates (see :func:`statistics.usable_octaves`), a lower bound if
    lr_octaves_open. steps, samples: per run (those that diverge stop early). seconds: median wall time of a run.
    """

    optimizer: str
    batch_size: int
    seeds: int
    accuracy: float
    sd: float
    gain: float | None
    p_baseline: float | None
    rival: str | None
    p_rival: float | None
    steps_to_target: float | None
    samples_to_target: float | None
    reached: int
    diverged_trials: int
    diverged_runs: int
    lr: float
    second_name: str | None
    second: float | None
    edges: str
    lr_octaves: float | None
    lr_octaves_open: bool
    steps: int
    samples: int
    seconds: float

    @property
    def verdict(self) -> str:
        """``better`` or ``worse`` than the baseline where the difference is significant, else empty."""
        if self.gain is None or self.p_baseline is None or self.p_baseline >= SIGNIFICANT:
            return ""
        return "better" if self.gain > 0 else "worse"


def rows(result: CompareResult) -> list[Row]:
    """The rows of all finished cells, by batch size, then in the order of the optimizers of the configuration."""
    cells = [cell for cell in result.cells if cell.complete]
    scores = {(cell.contender.name, cell.batch_size): cell.accuracies for cell in cells}
    return [_row(cell, scores, result) for cell in cells]


def _row(cell: CellResult, scores: dict[tuple[str, int], list[float]], result: CompareResult) -> Row:
    name, batch_size = cell.contender.name, cell.batch_size
    mine = scores[name, batch_size]
    mean, sd = statistics.mean_sd(mine)
    others = {other: values for (other, batch), values in scores.items() if batch == batch_size and other != name}
    rival = max(others, key=lambda other: float(np.mean(others[other])), default=None)
    baseline = others.get(result.config.baseline)
    to_target = [statistics.first_reached(run.outcome.curve, result.target) for run in cell.finals]
    steps_to_target = statistics.median_reached(to_target)
    best = cell.best
    octaves = statistics.usable_octaves([(run.task.lr, run.outcome.accuracy) for run in cell.trials])
    return Row(
        optimizer=name,
        batch_size=batch_size,
        seeds=len(mine),
        accuracy=mean,
        sd=sd,
        gain=None if baseline is None else mean - statistics.mean_sd(baseline)[0],
        p_baseline=None if baseline is None else statistics.welch(mine, baseline),
        rival=rival,
        p_rival=None if rival is None else statistics.welch(mine, others[rival]),
        steps_to_target=steps_to_target,
        samples_to_target=None if steps_to_target is None else steps_to_target * batch_size,
        reached=sum(steps is not None for steps in to_target),
        diverged_trials=sum(run.outcome.diverged for run in cell.trials),
        diverged_runs=sum(run.outcome.diverged for run in cell.finals),
        lr=best.lr,
        second_name=cell.contender.axes[1].name if best.second is not None else None,
        second=best.second,
        edges=" ".join(axis.name for axis, value in zip(cell.contender.axes, best.setting) if at_edge(axis, value)),
        lr_octaves=None if octaves is None else octaves.width,
        lr_octaves_open=octaves is not None and octaves.at_least,
        steps=max(run.outcome.steps for run in cell.finals),
        samples=max(run.outcome.samples for run in cell.finals),
        seconds=float(np.median([run.outcome.seconds for run in cell.finals])),
    )


# ---- sentences ----


def percent(accuracy: float, sd: float | None = None, *, digits: int = 1) -> str:
    """``97.2`` or ``97.2 ± 0.3`` from fractions."""
    text = f"{100 * accuracy:.{digits}f}"
    return text if sd is None or math.isnan(sd) else f"{text} ± {100 * sd:.{digits}f}"


def p_text(p: float | None) -> str:
    """``0.012``, ``< 0.001``, or a dash where there is no test."""
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def batch_name(result: CompareResult, batch_size: int, *, short: bool = False) -> str:
    """``batch 64`` or ``the full batch of 1,437``; *short*: ``64`` or ``1,437 (full)``."""
    full = batch_size == result.num_train
    if short:
        return f"{batch_size:,}{' (full)' if full else ''}"
    return f"the full batch of {batch_size:,}" if full else f"batch {batch_size:,}"


def headline(result: CompareResult) -> str:
    """One sentence: who wins at the largest batch, by how much over the baseline, and how sure that is."""
    finished = rows(result)
    if not finished:
        return "No cell of this comparison is finished yet."
    largest = max(row.batch_size for row in finished)
    ranking = sorted((row for row in finished if row.batch_size == largest), key=lambda row: -row.accuracy)
    best, baseline = ranking[0], result.config.baseline
    text = f"At {batch_name(result, largest)} ({plural(best.steps, 'step')}) {best.optimizer} is best"
    text += f" with {percent(best.accuracy, best.sd)} % test accuracy"
    if best.gain is not None:
        text += f", {percent(best.gain)} points above tuned {baseline} ({_sureness(best.p_baseline)})"
    elif len(ranking) > 1:
        text += f", {percent(best.accuracy - ranking[1].accuracy)} points above {ranking[1].optimizer}"
        text += f" ({_sureness(best.p_rival)})"
    return text + "."


def largest_batches(result: CompareResult) -> dict[str, int | None]:
    """For each optimizer the largest batch up to which every batch tried loses at most :data:`LOSS_ALLOWED`.

    Measured against the best mean accuracy of all optimizers at the smallest batch; None if even the smallest batch loses
    more. Optimizers without a finished cell are left out.
    """
    finished = rows(result)
    reachable: dict[str, int | None] = {}
    for name in dict.fromkeys(row.optimizer for row in finished):
        mine = [row for row in finished if row.optimizer == name]
        good = itertools.takewhile(lambda row: row.accuracy >= _reference(finished) - LOSS_ALLOWED, mine)
        reachable[name] = max((row.batch_size for row in good), default=None)
    return reachable


def scaling(result: CompareResult) -> str:
    """One sentence: how far each optimizer's batch can grow at a loss of at most one point."""
    finished = rows(result)
    groups: dict[int | None, list[str]] = {}
    for name, batch in largest_batches(result).items():
        groups.setdefault(batch, []).append(name)
    if not groups:
        return ""
    smallest = min(row.batch_size for row in finished)
    text = f"Losing at most one point against the best at batch {smallest:,} ({percent(_reference(finished))} %), "
    parts = [
        f"to {batch_name(result, batch, short=True)} with {_listed(groups[batch])}"
        for batch in sorted((batch for batch in groups if batch is not None), reverse=True)
    ]
    text += f"the batch can grow {'; '.join(parts)}" if parts else "no batch can grow"
    return text + (f"; {_listed(groups[None])} did not reach that at any batch." if None in groups else ".")


def _reference(finished: Sequence[Row]) -> float:
    smallest = min(row.batch_size for row in finished)
    return max(row.accuracy for row in finished if row.batch_size == smallest)


def plural(number: int, noun: str) -> str:
    """``1 step``, ``1,347 steps``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _sureness(p: float | None) -> str:
    if p is None:
        return "too few seeds to say how surely"
    text = p_text(p)
    return f"p {text if text.startswith('<') else f'= {text}'}{'' if p < SIGNIFICANT else ', not significant'}"


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


# ---- tables ----


def csv_text(result: CompareResult) -> str:
    """All rows as comma-separated values, fractions and full precision, an empty field where there is no value."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows(result))
    return buffer.getvalue()


def tables(result: CompareResult) -> list[RenderableType]:
    """For the terminal: accuracy, steps to the target and the tuned settings, by optimizer and batch."""
    finished = rows(result)
    best = {batch: max(row.accuracy for row in finished if row.batch_size == batch) for batch in batches(finished)}

    def accuracy(row: Row) -> str:
        text = percent(row.accuracy) + (f" ±{100 * row.sd:.1f}" if row.seeds > 1 else "")
        text = f"[bold green]{text}[/]" if row.accuracy == best[row.batch_size] else text
        return f"{text} {MARKS[row.verdict] or ' '}"

    def steps(row: Row) -> str:
        return f"{row.steps_to_target:,.0f}" if row.steps_to_target is not None else "[dim]not reached[/]"

    def setting(row: Row) -> str:
        second = "" if row.second is None else f", {row.second:.3g}"
        return f"{row.lr:.2g}{second}{'*' if row.edges else ''}"

    seconds = {row.optimizer: row.second_name for row in finished if row.second_name is not None}
    tuned = {
        name: f"{name} (lr, {seconds[name]})" if name in seconds else f"{name} (lr)"
        for name in result.config.optimizers
    }
    baseline = result.config.baseline
    return [
        _matrix(
            "Test accuracy (%) by batch size",
            f"Mean ± sd of {plural(result.config.seeds, 'fresh seed')}, best of each batch in green. "
            f"{MARKS['better']} {MARKS['worse']} significantly above or below {baseline} (Welch's test, p < {SIGNIFICANT}).",
            result,
            accuracy,
        ),
        _matrix(f"Steps to {percent(result.target)} % test accuracy", "Median of the seeds.", result, steps),
        _matrix("Tuned settings", "* at the edge of the range that was searched.", result, setting, tuned),
    ]


def _matrix(
    title: str,
    caption: str,
    result: CompareResult,
    cell: Callable[[Row], str],
    names: Mapping[str, str] | None = None,
) -> RenderableType:
    from rich import box
    from rich.table import Table

    by_cell = {(row.optimizer, row.batch_size): row for row in rows(result)}
    table = Table(
        title=title,
        caption=caption,
        box=box.SIMPLE_HEAD,
        title_style="bold",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("")
    for batch in result.batch_sizes:
        table.add_column(batch_name(result, batch, short=True), justify="right", no_wrap=True)
    for name in result.config.optimizers:
        mine = [by_cell.get((name, batch)) for batch in result.batch_sizes]
        table.add_row(names[name] if names else name, *("–" if row is None else cell(row) for row in mine))
    return table


def batches(finished: Sequence[Row]) -> list[int]:
    """The batch sizes of *finished*, ascending."""
    return sorted({row.batch_size for row in finished})
