"""The figures of the reproduction of noise scale and width."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from conjugo.studies import drawing
from conjugo.studies.reproduce.grid_figures import panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from conjugo.studies.reproduce.width import CollapseResult, Kind
    from conjugo.studies.reproduce.width_families import FamilyResult

__all__ = ["collapse", "families", "stability"]

_HEIGHTS: dict[Kind, str] = {"test": "test accuracy (%)", "train": "training accuracy (%)"}


def collapse(result: CollapseResult) -> Figure:
    """Training and test accuracy against the batch size, and against gbar, a line for each learning rate."""
    plan = result.plan
    looks = drawing.styles([f"{lr:g}" for lr in plan.lrs])
    with panels(4, shared=False) as (figure, axeses):
        for axes, (kind, by_gbar) in zip(axeses, [(k, by) for k in _HEIGHTS for by in (False, True)]):
            for lr, style in zip(plan.lrs, looks.values()):
                found = [(gbar, plan.condition(gbar, lr)) for gbar in plan.gbars]
                there = [(gbar, c, *result.mean(c, kind)) for gbar, c in found if c is not None]
                if not there:
                    continue
                xs = [gbar if by_gbar else c.batch for gbar, c, _, _ in there]
                heights, errors = [100 * mean for *_, mean, _ in there], [100 * error for *_, error in there]
                label = f"learning rate {lr:g}"
                axes.errorbar(
                    xs,
                    heights,
                    errors,
                    color=style.color,
                    marker=style.marker,
                    markersize=4.5,
                    linewidth=1.1,
                    label=label,
                )
            _octaves(axes, plan.gbars if by_gbar else None)
            axes.set_xlabel("gbar = ε N / (B v)" if by_gbar else "batch size B")
            axes.set_ylabel(_HEIGHTS[kind])
        for one, other in (axeses[:2], axeses[2:]):
            _zoom(one, other)
        figure.legend(*axeses[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
        return figure


def stability(result: CollapseResult) -> Figure:
    """Accuracy against the learning rate, a line for each gbar: level where the law holds."""
    plan = result.plan
    looks = drawing.styles([f"{gbar:g}" for gbar in plan.gbars])
    with panels(2, shared=False) as (figure, axeses):
        for axes, (kind, name) in zip(axeses, _HEIGHTS.items()):
            for gbar, style in zip(plan.gbars, looks.values()):
                there = [(c, *result.mean(c, kind)) for c in plan.conditions(gbar)]
                for momentum in (False, True):
                    rows = [row for row in there if bool(row[0].momentum) == momentum]
                    # Momentum stands beside the plain learning rate with which a step takes as much physical time.
                    xs = [c.lr / (1 - c.momentum) * (1.15 if momentum else 1) for c, _, _ in rows]
                    heights, errors = [100 * mean for _, mean, _ in rows], [100 * error for *_, error in rows]
                    axes.errorbar(
                        xs,
                        heights,
                        errors,
                        color=style.color,
                        marker=style.marker,
                        markerfacecolor="none" if momentum else style.color,
                        linestyle="none" if momentum else "-",
                        markersize=4.5,
                        linewidth=1.1,
                        label=f"with momentum {plan.momentum:g}" if momentum else f"gbar {gbar:g}",
                    )
            _octaves(axes, plan.lrs)
            axes.set_xlabel("learning rate")
            axes.set_ylabel(name)
            _zoom(axes)
        figure.legend(*axeses[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
        return figure


def families(result: FamilyResult) -> Figure:
    """Test accuracy against gbar for each width, with the optimum; and the optima against the width."""
    from matplotlib.ticker import LogLocator, NullFormatter

    looks = drawing.styles([str(width) for width in result.plan.widths])
    optima, law = result.optima, result.law
    with panels(2, shared=False) as (figure, axeses):
        left, right = axeses
        for width, style in zip(result.plan.widths, looks.values()):
            points = []
            for condition, outcome in result.scan(width):
                alive = [100 * a for a in outcome.test if a is not None]
                if len(alive) >= 2:
                    error = float(np.std(alive, ddof=1)) / math.sqrt(len(alive))
                    points.append((result.plan.problem.gbar(condition), float(np.mean(alive)), error))
            if points:
                gbars, heights, errors = zip(*points)
                left.errorbar(
                    gbars,
                    heights,
                    errors,
                    color=style.color,
                    marker=style.marker,
                    markersize=4,
                    linewidth=1.1,
                    label=f"width {width}",
                )
            if (found := optima.get(width)) is None:
                continue
            left.plot(found.gbar, 100 * found.accuracy, "|", color=style.color, markersize=14, markeredgewidth=2)
            reach = [[found.gbar - found.interval[0]], [found.interval[1] - found.gbar]]
            face = "none" if found.at_edge else style.color
            right.errorbar(width, found.gbar, reach, color=style.color, marker=style.marker, markerfacecolor=face)
        left.set_xlabel("gbar = ε N / (B v)")
        left.set_ylabel("test accuracy (%)")
        left.set_xscale("log", base=2)
        left.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        _zoom(left)
        _octaves(right, result.plan.widths)
        right.set_yscale("log")
        right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        right.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        right.yaxis.set_minor_formatter(NullFormatter())
        right.set_xlabel("width")
        right.set_ylabel("best gbar")
        if law is not None:
            ends = np.array([law.widths[0], law.widths[-1]])
            fitted = [law.gbar(width) for width in ends]
            right.plot(ends, law.kappa * ends, ":", color="#808080", linewidth=1.2, label="proportional")
            right.plot(ends, fitted, "-", color="#808080", linewidth=1.2, label=f"exponent {law.exponent:.2f}")
        handles = [axes.get_legend_handles_labels() for axes in axeses]
        figure.legend(
            [*handles[0][0], *handles[1][0]],
            [*handles[0][1], *handles[1][1]],
            loc="outside right center",
            frameon=False,
        )
        return figure


def _octaves(axes: Axes, ticks: tuple[float, ...] | tuple[int, ...] | None) -> None:
    """A logarithmic axis with plain numbers."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    if ticks is None:
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])


def _zoom(*axeses: Axes) -> None:
    """The same heights for all: those of the points that have learnt something, within 25 points of the best."""
    lines = [np.asarray(line.get_ydata(), dtype=np.float64) for axes in axeses for line in axes.get_lines()]
    heights = np.concatenate([line for line in lines if len(line)])
    heights = heights[np.isfinite(heights)]
    if not len(heights):
        return
    high = heights.max()
    low = heights[heights >= high - 25].min()
    margin = 0.08 * (high - low) + 0.1
    for axes in axeses:
        axes.set_ylim(low - margin, high + margin)
