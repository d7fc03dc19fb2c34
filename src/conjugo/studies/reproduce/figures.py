"""The figures of a reproduction, in the style of the comparisons' drawing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from conjugo.studies import drawing, statistics
from conjugo.studies.reproduce import batch_size, nlcg_cifar
from conjugo.studies.reproduce.nlcg_digits import EXPECTED, LABELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from conjugo.studies.reproduce.batch_size import BatchSizeResult
    from conjugo.studies.reproduce.nlcg_cifar import CifarResult
    from conjugo.studies.reproduce.nlcg_digits import DigitsResult

__all__ = ["accuracy", "curves", "discarding", "learning_rates"]


def accuracy(result: DigitsResult) -> Figure:
    """Test accuracy against the number of steps, mean and sd of the fresh seeds; hollow: what was expected."""
    with drawing.new_axes(drawing.WIDE) as axes:
        ends = []
        for name, style in drawing.styles(tuple(result.plan.grids)).items():
            cells = [(steps, result.cell(name, steps)) for steps in result.plan.steps]
            points = [(steps, *statistics.mean_sd(cell.accuracies)) for steps, cell in cells if cell is not None]
            expected: dict[float, float] = {
                steps: value for steps, value in EXPECTED[name].items() if steps in result.plan.steps
            }
            _ours_and_expected(axes, points, expected, style)
            ends += [drawing.End(LABELS[name], points[-1][0], 100 * points[-1][1], style.color)] if points else []
        axes.set_xscale("log", base=2)
        axes.set_xticks(result.plan.steps, [str(steps) for steps in result.plan.steps])
        axes.minorticks_off()
        axes.set_xlabel("steps (one full batch each); hollow: expected")
        drawing.accuracy_axis(axes, "test accuracy (%)")
        drawing.label_ends(axes, ends)
        return drawing.figure_of(axes)


def learning_rates(result: DigitsResult) -> Figure:
    """Validation accuracy against learning rate, one panel for each number of steps; AdamW's own grid is left out."""
    from matplotlib.ticker import NullFormatter

    names = [name for name in result.plan.grids if name != "adamw"]
    looks = drawing.styles(tuple(result.plan.grids))
    width, height = drawing.SMALL
    with drawing.new_axes((width * len(result.plan.steps) * 0.8 + 0.8, height)) as first:
        figure = drawing.figure_of(first)
        first.remove()
        panels = figure.subplots(1, len(result.plan.steps), sharey=True, squeeze=False)[0]
        for axes, steps in zip(panels, result.plan.steps):
            for name in names:
                cell = result.cell(name, steps)
                if cell is None:
                    continue
                rates, means = zip(*cell.points)
                axes.plot(
                    rates,
                    [100 * mean for mean in means],
                    color=looks[name].color,
                    marker=looks[name].marker,
                    label=LABELS[name],
                )
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_title(f"{steps} steps", fontsize=10)
            axes.set_xlabel("learning rate")
        panels[0].set_ylabel("validation accuracy (%)")
        panels[0].set_ylim(0, 100)
        figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside right center", frameon=False)
        return figure


def curves(result: CifarResult, batch_size: int) -> Figure:
    """Test accuracy against steps, mean of the seeds, each optimizer at its best learning rate."""
    with drawing.new_axes(drawing.WIDE) as axes:
        ends = []
        for name, style in drawing.styles(tuple(nlcg_cifar.LABELS)).items():
            cell = result.cell(name, batch_size)
            if cell is None:
                continue
            runs = [dict(run.outcome.curve) for run in cell.finals]
            steps = sorted(set.intersection(*map(set, runs)))  # a run that diverged stops early
            means = [100 * statistics.mean_sd([run[step] for run in runs])[0] for step in steps]
            axes.plot(steps, means, color=style.color)
            label = f"{nlcg_cifar.LABELS[name]}, lr {cell.best:g}"
            ends += [drawing.End(label, steps[-1], means[-1], style.color)] if steps else []
        axes.set_xlim(left=0)
        axes.set_xlabel("steps")
        drawing.accuracy_axis(axes, "test accuracy (%)")
        drawing.label_ends(axes, ends)
        return drawing.figure_of(axes)


def discarding(result: BatchSizeResult) -> Figure:
    """Test accuracy against the discarded fraction, mean and standard error of the seeds; hollow: what was expected."""
    plan = result.plan
    first = next(iter(plan.epochs))
    conditions = {f"batch {batch}": ("once", batch) for batch in plan.epochs} | {
        f"{first}, lr stays": ("constant", first)
    }
    with drawing.new_axes(drawing.WIDE) as axes:
        ends = []
        for name, style in drawing.styles(tuple(conditions)).items():
            way, batch = conditions[name]
            cells = [(q, result.discarded(batch, q, way=way)) for q in plan.fractions]
            points = [(q, *statistics.mean_sd(cell.at(plan.lrs[0]))) for q, cell in cells if cell is not None]
            known = batch_size.DISCARDING.get(batch, {}) if way == "once" else {}
            expected = {q: value for q, value in known.items() if q in plan.fractions}
            _ours_and_expected(axes, [(q, mean, sd / plan.seeds**0.5) for q, mean, sd in points], expected, style)
            ends += [drawing.End(name, points[-1][0], 100 * points[-1][1], style.color)] if points else []
        axes.set_xlabel("discarded fraction of each batch; hollow: expected")
        drawing.accuracy_axis(axes, "test accuracy (%)")
        drawing.label_ends(axes, ends)
        return drawing.figure_of(axes)


def _ours_and_expected(
    axes: Axes, points: Sequence[tuple[float, float, float]], expected: Mapping[float, float], style: drawing.Style
) -> None:
    """A line through *points* (place, mean, error; accuracies as fractions), and hollow markers."""
    axes.errorbar(
        [x for x, _, _ in points],
        [100 * mean for _, mean, _ in points],
        yerr=[100 * error if error == error else 0 for _, _, error in points],
        color=style.color,
        marker=style.marker,
        capsize=2,
        elinewidth=1,
    )
    axes.plot(
        list(expected),
        [100 * value for value in expected.values()],
        color=style.color,
        marker=style.marker,
        markerfacecolor="none",
        linestyle="none",
        alpha=0.7,
    )
