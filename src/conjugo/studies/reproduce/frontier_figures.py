"""The figures of the comparison of preconditioners: accuracy against learning rate, and against passes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from conjugo.studies import drawing, statistics
from conjugo.studies.reproduce.frontier_plan import FAMILIES
from conjugo.studies.reproduce.grid_figures import panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from conjugo.studies.drawing import Style
    from conjugo.studies.reproduce.frontier import FrontierResult, Outcomes

__all__ = ["figures"]


def figures(result: FrontierResult) -> dict[str, Figure]:
    """For each task whose tests are counted and that has runs: a figure of both, the best rival and all of the frame.

    A control with a constant β has the colour of what it is the control of, and dashes.
    """
    return {name: _figure(task) for name, task in result.primary.items() if task.cells}


def _figure(task: Outcomes) -> Figure:
    names = [name for name in task.cells if FAMILIES[name].ours or name == task.rival]
    controls = [(FAMILIES[name].control, name) for name in reversed(names)]
    of = {control: name for control, name in controls if control is not None and control in names}
    looks = drawing.styles([name for name in names if name not in of])
    looks |= {control: looks[name] for control, name in of.items()}
    with panels(2, shared=False) as (figure, (left, right)):
        tops = [_lines(left, right, task, name, looks[name], "--" if name in of else "-") for name in names]
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


def _lines(left: Axes, right: Axes, task: Outcomes, name: str, style: Style, dashes: str) -> tuple[float, float]:
    """Draw a contender; its highest values."""
    cell, family = task.cells[name], FAMILIES[name]
    tried = cell.scores(cell.best[0])
    heights = [100 * accuracy for accuracy, _ in tried.values()]
    look: dict[str, Any] = {"color": style.color, "linestyle": dashes, "label": family.label}
    left.plot(
        [2.0**e for e in tried], heights, marker=style.marker, fillstyle="full" if dashes == "-" else "none", **look
    )
    curves = [run.outcome.curve for run in cell.finals]
    length = min(map(len, curves))  # those of runs that diverged end early
    means = [100 * statistics.mean_sd([curve[i][1] for curve in curves])[0] for i in range(length)]
    steps = [family.passes * curves[0][i][0] for i in range(length)]
    right.plot(steps, means, **look)
    return max(heights), max(means)
