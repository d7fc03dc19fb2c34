"""The report of a training run: one HTML page that needs nothing else, with its spectra if there are any."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from conjugo._files import write_aside
from conjugo.errors import CorruptFile
from conjugo.studies import elements, spectrum, spectrum_plots, spectrum_summary
from conjugo.studies.drawing import COLORS, SMALL, accuracy_axis, figure_of, new_axes
from conjugo.training import TrainConfig
from conjugo.training.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from conjugo.training.metrics import Record
    from conjugo.training.spectrum import Spectrum

__all__ = ["is_run", "noise_scale", "page", "write"]


def is_run(folder: Path) -> bool:
    """Whether *folder* is the run directory of a training run, not of a comparison or anything else."""
    try:
        TrainConfig.from_dict(json.loads((folder / "config.json").read_bytes()))
    except (OSError, ValueError, TypeError, AttributeError):
        return False
    return True


def write(folder: Path) -> Path:
    """Write report.html into the run directory *folder*; gives its path. Raises what :func:`page` raises."""
    path = folder / "report.html"
    write_aside(path, page(folder))
    return path


def page(folder: Path) -> str:
    """The whole page, also of an unfinished run.

    Raises OSError if the run cannot be read, CorruptFile for damaged metrics. Damaged spectra are left out.
    """
    config = json.loads((folder / "config.json").read_bytes())
    try:
        history = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []
    except ValueError as error:
        raise CorruptFile(f"{folder / 'metrics.jsonl'} is damaged: {error}") from error
    title = f"{config['optimizer']} on {config['data']}"
    main = [_training(history)]
    main += [_spectra(series, i) for i, series in enumerate(spectrum.recorded(folder))]
    main.append(elements.section("Configuration", elements.definitions(config)))
    header = f"<header>\n<h1>{escape(title)}</h1>\n{elements.paragraph(_headline(history), 'headline')}</header>"
    return elements.page(title, header, "\n".join(main), f"<footer>{escape(str(folder))}</footer>")


def _headline(history: Sequence[Record]) -> str:
    if not history:
        return "Nothing is evaluated yet."
    last = history[-1]
    return f"Test accuracy {100 * last['accuracy']:.2f} % after {last['step']:,} steps."


def _training(history: Sequence[Record]) -> str:
    if not history:
        return ""
    figures = [
        elements.figure(
            _accuracy(history), "accuracy", "Test accuracy.", "", label="Test accuracy in percent against steps"
        ),
        elements.figure(
            _losses(history), "loss", "Loss.", "", label="Losses on training and test examples against steps"
        ),
    ]
    if any(record.get("noise_scale_low") is not None for record in history):
        title, note = (
            "Gradient noise scale.",
            "Band: 95 % interval; below the lower end of it a larger batch pays well.",
        )
        label = "The gradient noise scale, with its interval, and the batch size against steps"
        figures.append(elements.figure(noise_scale(history), "noise-scale", title, note, label=label))
    return elements.section("Training", elements.grid(figures))


def _accuracy(history: Sequence[Record]) -> Figure:
    with new_axes(SMALL) as axes:
        axes.plot([r["step"] for r in history], [100 * r["accuracy"] for r in history], color=COLORS[1], marker="o")
        axes.set_xlabel("steps")
        accuracy_axis(axes, "test accuracy (%)")
        return figure_of(axes)


def _losses(history: Sequence[Record]) -> Figure:
    with new_axes(SMALL) as axes:
        for name, label, color, marker in (("train_loss", "training", 0, "s"), ("loss", "test", 1, "o")):
            values = [math.nan if record[name] is None else record[name] for record in history]
            axes.plot([r["step"] for r in history], values, color=COLORS[color], marker=marker, label=label)
        axes.set_xlabel("steps")
        axes.set_ylabel("mean loss")
        axes.legend(frameon=False, fontsize=9)
        return figure_of(axes)


def noise_scale(history: Sequence[Record]) -> Figure:
    """B_simple with its interval, in the metric of the optimizer too where that was measured, and the batch, against steps."""
    steps = [record["step"] for record in history]

    def values(name: str, absent: float = math.nan) -> list[float]:
        return [absent if record.get(name) is None else record[name] for record in history]

    with new_axes(SMALL) as axes:
        series = [
            ("noise_scale", "noise scale", 1, "o"),
            ("noise_scale_optimizer", "in the optimizer's metric", 2, "^"),
        ]
        for name, label, color, marker in series:
            if all(math.isnan(low) for low in values(f"{name}_low")):
                continue
            axes.plot(steps, values(name), color=COLORS[color], marker=marker, label=label)
            known = [(s, low, high) for s, low, high in zip(steps, values(f"{name}_low"), values(f"{name}_high"))]
            known = [(s, low, high) for s, low, high in known if not math.isnan(low + high)]
            if known and name == "noise_scale":
                at, low, high = zip(*known)
                axes.fill_between(at, low, high, color=COLORS[color], alpha=0.2, linewidth=0)
            # Where only the lower end is known.
            bounds = [b if math.isnan(v) else math.nan for v, b in zip(values(name), values(f"{name}_low"))]
            axes.plot(steps, bounds, color=COLORS[color], linestyle="none", marker=r"$\uparrow$")
        axes.step(steps, values("batch_size"), where="pre", color=COLORS[0], linestyle="--", label="batch")
        axes.set_yscale("log", base=2)
        shown = [v for name in ("noise_scale", "noise_scale_low", "batch_size") for v in values(name) if v > 0]
        axes.set_ylim(min(values("batch_size")) / 8, 16 * max(shown))  # intervals may be very wide
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
        axes.set_xlabel("steps")
        axes.set_ylabel("examples")
        axes.legend(frameon=False, fontsize=9)
        return figure_of(axes)


def _spectra(series: Sequence[Spectrum], index: int) -> str:
    """A section about spectra that were measured alike, at several steps."""
    first = series[0]
    matrix = spectrum_summary.matrix_of(first)
    heading = f"Spectrum of the {matrix}" + (f" ({index + 1})" if index else "")
    text = spectrum_summary.heading(series).splitlines()[1]
    note = (
        "Mass per decade on a symmetric-logarithmic axis; zero is in the middle of the linear part, negative eigenvalues are "
        "to its left. The panels share their axes."
    )
    columns = [name for name, _ in spectrum_summary.columns(first)]
    body = []
    for each in series:
        cells = "".join(elements.cell(value) for _, value in spectrum_summary.columns(each))
        body.append(f'<tr><th scope="row">{each.about["step"]:,}</th>{cells}</tr>')
    small = spectrum_plots.over_training(series)
    return elements.section(
        heading,
        elements.paragraph(f"{text[0].upper()}{text[1:]}."),
        elements.figure(
            small, f"spectra-{index}", "Over training.", note, label=f"Densities of the eigenvalues of the {matrix}"
        ),
        elements.grid(
            [
                elements.figure(
                    spectrum_plots.numbers_over_training(series),
                    f"extremes-{index}",
                    "Extreme eigenvalues.",
                    "",
                    label="The largest and the smallest eigenvalue against steps",
                ),
                elements.figure(
                    spectrum_plots.density(series[-1]),
                    f"last-{index}",
                    f"At {spectrum_summary.where(series[-1])}.",
                    "",
                    label="Density of the eigenvalues, on an even and on a logarithmic axis",
                ),
            ]
            if len(series) > 1
            else []
        ),
        elements.table(f"The {matrix} over training", ["step", *map(escape, columns)], body),
    )
