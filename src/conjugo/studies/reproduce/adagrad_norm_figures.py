"""The figure of the reproduction of AdaGrad-Norm: what becomes of a run over the decades of b_0."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from conjugo.studies import drawing
from conjugo.studies.reproduce.grid_figures import panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from conjugo.studies.reproduce.adagrad_norm import AdaGradNormResult

__all__ = ["over_b0"]


def over_b0(result: AdaGradNormResult) -> Figure:
    """Gradient norm on least squares, and training loss on digits; a run that diverged has no point."""
    names = dict.fromkeys(name for methods in result.over_b0.values() for name in methods)
    looks = drawing.styles(tuple(names))
    with panels(4, shared=False) as (figure, axeses):
        for axes, (part, methods) in zip(axeses, result.over_b0.items()):
            network = part in ("regression", "perceptron")
            for name, found in methods.items():
                style = looks[name]
                heights = result.losses(part, name) if network else found
                b0 = result.sweeps.network_b0 if network else result.sweeps.b0
                drawn = [(x, y) for x, y in zip(b0, heights) if y is not None and math.isfinite(y)]
                axes.plot(*zip(*drawn), color=style.color, marker=style.marker, label=name) if drawn else None
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_title(f"digits, {part}" if network else f"least squares, {part}", fontsize=10)
            axes.set_xlabel("$b_0$")
            axes.set_ylabel("training loss" if network else "gradient norm")
        labels = {label: line for axes in axeses for line, label in zip(*axes.get_legend_handles_labels())}
        figure.legend(list(labels.values()), list(labels), loc="outside right center", frameon=False)
        return figure
