"""The figures of the comparison of preconditioners: accuracy against learning rate, and against passes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from conjugo.studies import drawing, statistics
from conjugo.studies.reproduce.frontier_plan import FAMILIES
from conjugo.studies.reproduce.grid_figures import panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from conjugo.studies.reproduce.frontier import FrontierResult, Outcomes

__all__ = ["figures"]


def figures(result: FrontierResult) -> dict[str, Figure]:
    """For each task whose tests are counted and that has runs: a figure of both, the best rival and all of the frame."""
    return {name: _figure(task) for name, task in result.primary.items() if task.cells}


def _figure(task: Outcomes) -> Figure:
    names = [name for name in task.cells if FAMILIES[name].ours or name == task.rival]
    looks = drawing.styles(tuple(names))
    with panels(2, shared=False) as (figure, (left, right)):
        tops = [_lines(left, right, task, name, looks[name]) for name in names]
        left.set_xscale("log", base=2)
        left.set_xlabel("learning rate")
        left.set_ylabel("validation accuracy (%)")
        right.set_xlabel("passes")
        right.set_ylabel("test accuracy (%)")
        for axes, highest in zip((left, right), zip(*tops)):
            axes.set_ylim(max(highest) - 12, max(highest) + 1)
        figure.suptitle(task.setting.title, fontsize=10)
        figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False)
        return figure


def _lines(left: Axes, right: Axes, task: Outcomes, name: str, style: Any) -> tuple[float, float]:
    """Draw a contender; its highest values."""
    cell, family = task.cells[name], FAMILIES[name]
    tried = cell.scores(cell.best[0])
    heights = [100 * accuracy for accuracy, _ in tried.values()]
    left.plot([2.0**e for e in tried], heights, color=style.color, marker=style.marker, label=family.label)
    curves = [run.outcome.curve for run in cell.finals]
    length = min(map(len, curves))  # those of runs that diverged end early
    means = [100 * statistics.mean_sd([curve[i][1] for curve in curves])[0] for i in range(length)]
    steps = [family.passes * curves[0][i][0] for i in range(length)]
    right.plot(steps, means, color=style.color, label=family.label)
    return max(heights), max(means)
