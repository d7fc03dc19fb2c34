"""The figures of the reproduction of batch norm on gradient descent."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from conjugo.scaling.bngd import ConvergenceMap
from conjugo.studies import drawing
from conjugo.studies.reproduce.bngd import STARTS, WIDTHS
from conjugo.studies.reproduce.bngd_networks import VARIANTS
from conjugo.studies.reproduce.grid_figures import panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from conjugo.studies.reproduce.bngd import BngdImages, BngdResult

__all__ = ["drawn", "drawn_images"]

LOWEST = 1e-14
"""Of an excess over S that is shown."""


def drawn(result: BngdResult) -> dict[str, Figure]:
    """All figures, by the names of their files."""
    return {
        "map": over_both(result),
        "rates": rates(result),
        "effective": effective(result),
        "widths": widths(result),
        "data": data(result),
        "digits": digits(result),
    }


def over_both(result: BngdResult) -> Figure:
    """The excess over both learning rates, of the first condition number, from both starts."""
    starts = next(iter(result.parts["maps"].values()))["starts"]
    with panels(len(starts)) as (figure, axeses):
        for axes, (name, case) in zip(axeses, starts.items()):
            relative = torch.tensor([[math.nan if x is None else x for x in row] for row in case["relative"]])
            lrs, lr_as = result.plan.learning_rates(), torch.logspace(-10, 0, result.plan.lr_as, dtype=torch.float64)
            grid = ConvergenceMap(lrs, lr_as, result.plan.steps, relative, relative, relative, relative, [])
            grid.plot(axes)
            axes.set_title(STARTS[name], fontsize=10)
        return figure


def rates(result: BngdResult) -> Figure:
    """Excess after all steps, and factor of the excess per step, against the learning rate of w."""
    kappa, case = next(iter(result.parts["maps"].items()))
    lrs = result.plan.learning_rates().tolist()
    lines = {"gradient descent": case["gd"], **{f"BNGD, {n}": run for n, run in _named(case["starts"])}}
    with panels(2, shared=False) as (figure, axeses):
        for (label, run), style in zip(lines.items(), drawing.styles(list(lines)).values()):
            _line(axeses[0], lrs, [_clipped(x, LOWEST, 1e3) for x in run["excess"]], label, style)
            gained = [None if rate is None or rate >= 1 else 1 - rate for rate in run["rate"]]
            _line(axeses[1], lrs, gained, label, style)
        axeses[0].set_yscale("log")
        axeses[0].set_ylim(LOWEST / 3, 3e3)
        axeses[0].set_title(f"excess loss / S after {result.plan.steps:,} steps", fontsize=10)
        axeses[1].set_yscale("log")
        dashes = {f"best for κ = {kappa}": ("gd", "--"), "best for κ*": ("bn", ":")}
        for label, (kind, dash) in dashes.items():
            best = 1 - case[f"{kind}_rate_opt"]
            axeses[1].axhline(best, color=drawing.INK, linewidth=0.8, linestyle=dash, label=label)
        axeses[1].set_title("1 − factor of the excess per step", fontsize=10)
        _finish(figure, axeses, 1)
        return figure


def effective(result: BngdResult) -> Figure:
    """The last effective learning rate over its bound, with the asymptotes, for each condition number."""
    found = result.parts["maps"]
    lrs = result.plan.learning_rates().tolist()
    with panels(len(found)) as (figure, axeses):
        for axes, (kappa, case) in zip(axeses, found.items()):
            _, *looks = drawing.styles(["gradient descent", *case["starts"]]).values()
            for (name, run), style in zip(_named(case["starts"]), looks):
                _line(axes, lrs, [abs(edge) if edge else None for edge in run["edge"]], name, style)
                ends, bound = run["asymptotes"], case["eff_lr_max"]
                for factor, power in ((ends["C1"], 1), (ends["C2"], -ends["power"])):
                    shown = [(x, y) for x in lrs if 1e-22 < (y := factor * x**power / bound) < 3]
                    axes.plot(*zip(*shown), color=style.color, linewidth=0.8, linestyle="--")
            axes.axhline(1, color=drawing.INK, linewidth=0.8)
            axes.set_yscale("log")
            axes.set_ylim(1e-16, 30)
            axes.set_title(f"κ = {kappa}", fontsize=10)
        axeses[0].set_ylabel("effective learning rate / its bound")
        _finish(figure, axeses, 0)
        return figure


def widths(result: BngdResult) -> Figure:
    """Upper over lower end of the good learning rates against the dimension: medians, and all problems."""
    found = result.parts["widths"]
    with drawing.new_axes(drawing.WIDE) as axes:
        ds = [float(d) for d in found]
        for (name, label), style in zip(WIDTHS.items(), drawing.styles(list(WIDTHS)).values()):
            middles = [statistics.median(case[name]) for case in found.values()]
            axes.plot(ds, middles, color=style.color, marker=style.marker, label=label)
            for d, case in zip(ds, found.values()):
                axes.plot([d] * len(case[name]), case[name], ".", color=style.color, alpha=0.35, markersize=4)
        axes.plot(ds, [0.5 * d for d in ds], color=drawing.INK, linewidth=0.8, linestyle="--", label="d / 2")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(1, 1e5)
        axes.set_xlabel("dimension d")
        axes.set_ylabel("largest / smallest good lr")
        axes.legend(frameon=False)
        return drawing.figure_of(axes)


def data(result: BngdResult) -> Figure:
    """Steps to an excess of 1e-6 S against the learning rate, for each data set."""
    found = result.parts["data"]
    with panels(len(found)) as (figure, axeses):
        style, other = drawing.styles(["BNGD", "gradient descent"]).values()
        for axes, (name, case) in zip(axeses, found.items()):
            for i, steps in enumerate(case["bngd"]):
                axes.plot(case["lrs"], [math.nan if n is None else n for n in steps], color=style.color, alpha=0.8,
                          label="BNGD, one line a start" if i == 0 else None)  # fmt: skip
            top = case["gd_lr_max"]
            points = [(float(share) * top, steps) for share, steps in sorted(case["gd"].items()) if steps is not None]
            if points:
                axes.plot(*zip(*points), color=other.color, marker=other.marker, label="gradient descent")
            axes.axvline(top, color=drawing.INK, linewidth=0.8, linestyle="--", label="2 / λmax")
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_title(f"{name}, to {result.plan.data[name]:g} S", fontsize=10)
            axes.set_xlabel("learning rate of w")
        axeses[0].set_ylabel("steps")
        figure.legend(*axeses[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
        return figure


def digits(result: BngdResult) -> Figure:
    """Final training loss on digits against the learning rate."""
    with drawing.new_axes(drawing.WIDE) as axes:
        for (variant, label), style in zip(VARIANTS.items(), drawing.styles(list(VARIANTS)).values()):
            _line(axes, result.plan.networks.lrs, result.losses(variant), label, style)
        axes.set_yscale("log")
        axes.set_ylabel(f"training loss after {result.plan.networks.steps} steps")
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        axes.legend(frameon=False)
        return drawing.figure_of(axes)


def drawn_images(result: BngdImages) -> dict[str, Figure]:
    """Loss against the learning rate with and without batch norm."""
    with drawing.new_axes(drawing.WIDE) as axes:
        for variant, style in drawing.styles(["bn", "plain"]).items():
            losses = [run["loss"] for run in result.of(variant)]
            _line(axes, result.plan.lrs, losses, VARIANTS[variant], style)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("learning rate")
        axes.set_ylabel("training loss, last tenth of the epoch")
        axes.legend(frameon=False)
        return {"images": drawing.figure_of(axes)}


def _named(starts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(STARTS[name], run) for name, run in starts.items()]


def _clipped(value: float | None, low: float, high: float) -> float | None:
    return None if value is None else min(max(value, low), high)


def _line(axes: Axes, xs: Sequence[float], ys: Sequence[float | None], label: str, style: drawing.Style) -> None:
    """A line with gaps where there is no value."""
    heights = [math.nan if y is None else y for y in ys]
    axes.plot(xs, heights, color=style.color, marker=style.marker, markersize=3.5, linewidth=1.2, label=label)


def _finish(figure: Figure, axeses: Sequence[Axes], legend: int) -> None:
    for axes in axeses:
        axes.set_xscale("log")
        axes.set_xlabel("learning rate of w")
    figure.legend(*axeses[legend].get_legend_handles_labels(), loc="outside right center", frameon=False)
