"""The figure of curvatures in the reproduction of MCLR."""

from __future__ import annotations

from typing import TYPE_CHECKING

from conjugo.studies import drawing
from conjugo.studies.reproduce.grid_figures import panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from conjugo.studies.reproduce.mclr import MclrResult

__all__ = ["curvature"]


def curvature(result: MclrResult) -> Figure:
    """The curvature of each layer over a full-batch run, as each optimizer saw it at its best learning rate."""
    with panels(max(len(result.curvature), 1)) as (figure, axeses):
        for axes, (name, seen) in zip(axeses, result.curvature.items()):
            layers = [f"layer {i + 1}" for i in range(len(seen[0]))]
            for i, (layer, style) in enumerate(drawing.styles(layers).items()):
                axes.plot(range(1, len(seen) + 1), [row[i] for row in seen], color=style.color, label=layer)
            axes.set_yscale("log")
            axes.set_title(result.grids.study.entrants[name].label, fontsize=10)
            axes.set_xlabel("step")
        axeses[0].set_ylabel("curvature")
        figure.legend(*axeses[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
        return figure
