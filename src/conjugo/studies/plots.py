"""The plots of a comparison, as matplotlib figures in the house style."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from conjugo.studies import summary
from conjugo.studies.drawing import (
    INK,
    SMALL,
    WIDE,
    End,
    Values,
    accuracy_axis,
    figure_of,
    label_ends,
    new_axes,
    styles,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from conjugo.studies.results import CellResult, CompareResult

__all__ = ["accuracy", "batch_colors", "learning_curves", "steps_to_target", "tuning"]


def accuracy(result: CompareResult) -> Figure:
    """Test accuracy against batch size, mean and standard deviation over the fresh seeds."""
    with new_axes(WIDE) as axes:
        ends = []
        for i, (name, style) in enumerate(styles(result.config.optimizers).items()):
            mine = [row for row in summary.rows(result) if row.optimizer == name]
            # A slight horizontal shift keeps the error bars of different optimizers apart.
            shift = 2 ** (0.04 * (i - (len(result.config.optimizers) - 1) / 2))
            axes.errorbar(
                [row.batch_size * shift for row in mine],
                [100 * row.accuracy for row in mine],
                yerr=[100 * row.sd if row.seeds > 1 else 0 for row in mine],
                color=style.color,
                marker=style.marker,
                capsize=2,
                elinewidth=1,
            )
            ends += [End(name, row.batch_size * shift, 100 * row.accuracy, style.color) for row in mine[-1:]]
        _batch_axis(axes, result)
        accuracy_axis(axes, "test accuracy (%)")
        label_ends(axes, ends)
        return figure_of(axes)


def steps_to_target(result: CompareResult) -> Figure:
    """Median steps to the target accuracy against batch size; where it is not reached there is no point."""
    with new_axes(WIDE) as axes:
        ends = []
        for name, style in styles(result.config.optimizers).items():
            points = [
                (row.batch_size, row.steps_to_target)
                for row in summary.rows(result)
                if row.optimizer == name and row.steps_to_target is not None
            ]
            axes.plot(*zip(*points), color=style.color, marker=style.marker) if points else None
            ends += [End(name, *points[-1], style.color)] if points else []
        _batch_axis(axes, result)
        axes.set_ylabel(f"steps to {summary.percent(result.target)} %")
        if ends:
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        else:
            axes.text(0.5, 0.5, "no optimizer reached the target", ha="center", transform=axes.transAxes)
        label_ends(axes, ends)
        return figure_of(axes)


def learning_curves(result: CompareResult, batch_size: int) -> Figure:
    """Test accuracy against steps at one batch size: median of the fresh seeds, their range shaded; dotted: the target."""
    with new_axes(SMALL) as axes:
        ends = []
        look = styles(result.config.optimizers)
        for cell in result.cells:
            if cell.batch_size != batch_size or not cell.complete:
                continue
            color = look[cell.contender.name].color
            steps, values = _common_points(cell)
            axes.plot(steps, np.median(values, axis=0), color=color, linewidth=1.4)
            axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=color, alpha=0.15, linewidth=0)
            ends += [End(cell.contender.name, steps[-1], float(np.median(values[:, -1])), color)] if steps else []
        axes.axhline(100 * result.target, color=INK, linewidth=0.8, linestyle=":")
        axes.set_xlim(left=0)
        axes.set_xlabel("steps")
        accuracy_axis(axes, "test accuracy (%)")
        label_ends(axes, ends)
        return figure_of(axes)


def _common_points(cell: CellResult) -> tuple[list[int], Values]:
    """Steps at which every fresh seed was evaluated (a run that diverged stops early), and percent [seeds, steps]."""
    curves = [dict(run.outcome.curve) for run in cell.finals]
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return steps, 100 * np.array([[curve[step] for step in steps] for curve in curves])


def tuning(result: CompareResult, name: str) -> Figure:
    """All trials of one optimizer: validation accuracy against learning rate, in the colour of their batch size.

    The chosen setting of each batch size is large.
    """
    with new_axes(SMALL) as axes:
        colors = batch_colors(result)
        for cell in result.cells:
            if cell.contender.name != name or not cell.trials:
                continue
            axes.scatter(
                [run.task.lr for run in cell.trials],
                [100 * run.outcome.accuracy for run in cell.trials],
                s=[70 if run.task.setting == cell.best.setting else 18 for run in cell.trials],
                color=colors[cell.batch_size],
                edgecolors=INK,
                linewidths=[0.9 if run.task.setting == cell.best.setting else 0 for run in cell.trials],
                alpha=0.9,
            )
            lr = cell.contender.axes[0]
            axes.set_xscale("log")
            axes.set_xlim(lr.low * 0.8, lr.high * 1.25)
        axes.set_xlabel("learning rate")
        accuracy_axis(axes, "validation accuracy (%)")
        return figure_of(axes)


def batch_colors(result: CompareResult) -> Mapping[int, str]:
    """The colour of each batch size in :func:`tuning`, as hexadecimal: the larger, the redder."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    ramp = LinearSegmentedColormap.from_list("batches", ["#2F7FD0", "#8C66C8", "#C8518E", "#D9622B"])
    sizes = result.batch_sizes
    return {size: to_hex(ramp(i / max(1, len(sizes) - 1))) for i, size in enumerate(sizes)}


def _batch_axis(axes: Axes, result: CompareResult) -> None:
    sizes = result.batch_sizes
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [summary.batch_name(result, size, short=True).replace(" ", "\n") for size in sizes])
    axes.set_xlim(sizes[0] / 1.25, sizes[-1] * 1.25)
    axes.minorticks_off()
    axes.set_xlabel("batch size")
