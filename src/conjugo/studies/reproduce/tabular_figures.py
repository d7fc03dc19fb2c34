"""The figures of the tabular experiment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from conjugo.studies import drawing
from conjugo.studies.reproduce.tabular_cg import EXPECTED, LABELS
from conjugo.studies.reproduce.tabular_problems import COUNTED, PROBLEMS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from conjugo.studies.reproduce.tabular_cg import TabularResult

__all__ = ["evaluations", "training"]


def evaluations(result: TabularResult) -> Figure:
    """Evaluations by problem and method; hollow: what was expected."""
    width, height = drawing.WIDE
    with drawing.new_axes((width + 1.2, height)) as axes:
        for i, name in enumerate(result.counts):
            style = list(drawing.styles(tuple(PROBLEMS)).values())[list(PROBLEMS).index(name)]
            shown = [(n, j) for j, method in enumerate(COUNTED) if (n := result.counts[name][method]) is not None]
            shift = 0.12 * (i - (len(result.counts) - 1) / 2)
            axes.plot(
                [n for n, _ in shown],
                [j + shift for _, j in shown],
                color=style.color,
                marker=style.marker,
                linestyle="none",
                label=PROBLEMS[name].title,
            )
            axes.plot(
                [EXPECTED[name][method] for method in COUNTED],
                [j + shift for j in range(len(COUNTED))],
                color=style.color,
                marker=style.marker,
                markerfacecolor="none",
                linestyle="none",
                alpha=0.7,
            )
        axes.set_yticks(range(len(COUNTED)), [LABELS[method] for method in COUNTED])
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlabel("evaluations to the tolerance; hollow: expected")
        figure = drawing.figure_of(axes)
        figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
        return figure


def training(result: TabularResult) -> Figure:
    """Lowest training loss so far against evaluations, from one start."""
    from matplotlib.ticker import LogLocator, NullFormatter

    with drawing.new_axes(drawing.WIDE) as axes:
        ends = []
        looks = drawing.styles(tuple(result.curves))
        for name, curve in result.curves.items():
            axes.plot([n for n, _ in curve], [f for _, f in curve], color=looks[name].color, drawstyle="steps-post")
            ends.append(drawing.End(LABELS[name], curve[-1][0], curve[-1][1], looks[name].color))
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("evaluations of function and gradient")
        axes.set_ylabel("training loss")
        drawing.label_ends(axes, ends)
        return drawing.figure_of(axes)
