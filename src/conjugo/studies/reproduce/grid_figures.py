"""The figures of studies over grids, in the style of the comparisons' drawing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from conjugo.studies import drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from conjugo.studies.reproduce.grid_study import GridStudyResult

__all__ = ["curves", "panels", "traces"]


def curves(result: GridStudyResult, axis: str) -> Figure:
    """Validation accuracy against the value of the grid, one panel for each setting."""
    looks = drawing.styles(tuple(result.study.entrants))
    with panels(len(result.study.settings)) as (figure, axeses):
        for axes, setting in zip(axeses, result.study.settings):
            for name, style in looks.items():
                cell = result.cell(name, setting)
                if cell is None:
                    continue
                values, means = zip(*cell.points)
                heights = [100 * mean for mean in means]
                label = result.study.entrants[name].label
                axes.plot(values, heights, color=style.color, marker=style.marker, label=label)
            axes.set_xscale("log")
            axes.set_title(setting, fontsize=10)
            axes.set_xlabel(axis)
        axeses[0].set_ylim(0, 100)
        figure.supylabel("validation accuracy (%)", fontsize=10)
        figure.legend(*axeses[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
        return figure


def traces(lines: Mapping[str, Sequence[float]], quantity: str) -> Figure:
    """A quantity over the steps of a run, one panel for each of *lines*."""
    with panels(max(len(lines), 1)) as (figure, axeses):
        color = next(iter(drawing.styles(("",)).values())).color
        for axes, (name, values) in zip(axeses, lines.items()):
            axes.plot(range(1, len(values) + 1), values, color=color, linewidth=0.8)
            axes.set_title(name, fontsize=10)
            axes.set_xlabel("step")
        figure.supylabel(quantity, fontsize=10)
        return figure


@contextmanager
def panels(n: int, *, shared: bool = True) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure with *n* axes, at most three side by side, with *shared* heights, in the house style."""
    columns = n if n <= 3 else math.ceil(n / math.ceil(n / 3))
    rows = math.ceil(n / columns)
    width, height = drawing.SMALL
    with drawing.new_axes((width * columns * 0.8 + 1.0, height * rows)) as first:
        figure = drawing.figure_of(first)
        first.remove()
        grid = figure.subplots(rows, columns, sharey=shared, squeeze=False).flatten()
        for axes in grid[n:]:
            axes.remove()
        yield figure, list(grid[:n])
