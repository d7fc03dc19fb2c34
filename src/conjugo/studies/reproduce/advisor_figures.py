"""The figures of the advisor's test: steps against batch size, measured and predicted."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from conjugo.studies import drawing
from conjugo.studies.reproduce.advisor_result import LABELS
from conjugo.studies.reproduce.grid_figures import panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from conjugo.studies.reproduce.advisor_problems import Problem
    from conjugo.studies.reproduce.advisor_result import AdvisorResult

__all__ = ["figures", "steps"]


def figures(result: AdvisorResult) -> dict[str, Figure]:
    """By name, one for each problem."""
    return {f"steps-{problem.name}": steps(result, problem) for problem in result.problems}


def steps(result: AdvisorResult, problem: Problem) -> Figure:
    """A panel for each optimizer: measured steps with their spread, each prediction with its interval."""
    names = result.plan.optimizers
    with panels(len(names)) as (figure, axeses):
        for axes, name in zip(axeses, names):
            _panel(result, problem, name, axes)
        figure.supylabel("steps to the target", fontsize=10)
        figure.suptitle(problem.label, fontsize=11)
        handles, labels = axeses[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False)
        return figure


def _panel(result: AdvisorResult, problem: Problem, name: str, axes: Axes) -> None:
    from matplotlib.ticker import LogLocator

    ours, theirs = drawing.COLORS[1], drawing.COLORS[0]
    for i, prediction in enumerate(result.predicted(problem.name, name)):
        known = [(batch, *interval) for batch, interval in prediction.steps.items() if math.isfinite(interval.value)]
        if not known:
            continue
        batches, values, lows, highs = zip(*known)
        top = 10 * max(values)  # of an interval without end
        axes.plot(batches, values, color=ours, linewidth=1.2, label=None if i else "predicted")
        band = None if i else "95 % interval"
        axes.fill_between(
            batches, lows, [min(high, top) for high in highs], color=ours, alpha=0.13, linewidth=0, label=band
        )
    cells = [cell for cell in result.of(problem.name, name) if cell.mean is not None]
    axes.errorbar(
        [cell.sweep.batch_size for cell in cells],
        [cell.mean or math.nan for cell in cells],
        yerr=[0.0 if math.isnan(cell.sd) else cell.sd for cell in cells],
        color=theirs,
        marker="o",
        linestyle="none",
        capsize=2,
        elinewidth=1,
        label="measured",
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(problem.batches, [str(batch) for batch in problem.batches])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_title(LABELS[name], fontsize=10)
    axes.set_xlabel("batch")
