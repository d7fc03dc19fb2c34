"""The figures of the reproduction of MCLR, in the style of the comparisons' drawing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from conjugo.studies import drawing
from conjugo.studies.reproduce.mclr import LABELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from conjugo.studies.reproduce.mclr import MclrResult

__all__ = ["curvature", "learning_rates"]


def learning_rates(result: MclrResult) -> Figure:
    """Validation accuracy against learning rate, one panel for each setting."""
    looks = drawing.styles(tuple(result.plan.grids))
    with _panels(len(result.plan.settings)) as (figure, panels):
        for axes, (setting, (_, steps)) in zip(panels, result.plan.settings.items()):
            for name, style in looks.items():
                cell = result.cell(name, setting)
                if cell is None:
                    continue
                rates, means = zip(*cell.points)
                heights = [100 * mean for mean in means]
                axes.plot(rates, heights, color=style.color, marker=style.marker, label=LABELS[name])
            axes.set_xscale("log")
            axes.set_title(f"{setting}, {steps} steps", fontsize=10)
            axes.set_xlabel("learning rate")
        panels[0].set_ylabel("validation accuracy (%)")
        panels[0].set_ylim(0, 100)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
        return figure


def curvature(result: MclrResult) -> Figure:
    """The curvature of each layer over a full-batch run, as each optimizer saw it at its best learning rate."""
    with _panels(max(len(result.curvature), 1)) as (figure, panels):
        for axes, (name, seen) in zip(panels, result.curvature.items()):
            layers = [f"layer {i + 1}" for i in range(len(seen[0]))]
            for i, (layer, style) in enumerate(drawing.styles(layers).items()):
                axes.plot(range(1, len(seen) + 1), [row[i] for row in seen], color=style.color, label=layer)
            axes.set_yscale("log")
            axes.set_title(LABELS[name], fontsize=10)
            axes.set_xlabel("step")
        panels[0].set_ylabel("curvature")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
        return figure


@contextmanager
def _panels(n: int) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure with *n* axes side by side that share their heights, in the house style."""
    width, height = drawing.SMALL
    with drawing.new_axes((width * n * 0.8 + 1.0, height)) as first:
        figure = drawing.figure_of(first)
        first.remove()
        yield figure, list(figure.subplots(1, n, sharey=True, squeeze=False)[0])
