"""The house style of plots, and figures as SVG (for dark and light pages) or PNG.

Lines carry their names at their ends. The colours are Okabe and Ito's for colour-blind readers, the light ones darkened
until they stand out from a white and from a black page; markers double them.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLORS",
    "INK",
    "SMALL",
    "WIDE",
    "End",
    "Style",
    "Values",
    "accuracy_axis",
    "figure_of",
    "inline_svg",
    "label_ends",
    "new_axes",
    "new_figure",
    "png",
    "spread",
    "styles",
    "svg",
]

Values = np.ndarray[Any, np.dtype[np.float64]]

INK = "#010203"
"""Colour of text and axes: replaced by the page's own text colour in :func:`inline_svg`, practically black elsewhere."""

COLORS = ("#D55E00", "#0072B2", "#009E73", "#B8699A", "#B07A00", "#2F8FC0", "#7A7A7A", "#7A5FC0")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
WIDE = (4.7, 3.4)
SMALL = (4.3, 3.0)


class Style(NamedTuple):
    """How an optimizer is drawn, everywhere."""

    color: str
    marker: str


def styles(names: Sequence[str]) -> dict[str, Style]:
    """A colour and a marker for each name; from the ninth on colours come again with other markers."""
    n = len(COLORS)
    return {name: Style(COLORS[i % n], MARKERS[(i + i // n) % n]) for i, name in enumerate(names)}


@contextmanager
def new_axes(size: tuple[float, float]) -> Iterator[Axes]:
    """Empty axes in the house style."""
    with new_figure(size) as figure:
        yield figure.add_subplot()


@contextmanager
def new_figure(size: tuple[float, float]) -> Iterator[Figure]:
    """An empty figure in the house style; axes are to be added inside."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'conjugo[study]'") from error
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "font.size": 10,
        "axes.facecolor": "none",
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "axes.linewidth": 0.7,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#808080",
        "grid.alpha": 0.25,
        "grid.linewidth": 0.6,
        "lines.linewidth": 1.6,
        "lines.markersize": 5.5,
    }
    with mpl.rc_context(settings):
        yield Figure(figsize=size, layout="constrained")


def figure_of(axes: Axes) -> Figure:
    """The figure that *axes* belong to."""
    from matplotlib.figure import Figure

    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    return figure


def accuracy_axis(axes: Axes, name: str) -> None:
    """Percent, stretched towards 100 in proportion to the logarithm of the error plus one point.

    From 98 to 99 is as far as from 50 to 66: where all are good, the remaining errors are what differs.
    """
    axes.set_ylabel(name)
    low, high = axes.dataLim.intervaly
    axes.set_yscale("function", functions=(_stretched, _unstretched))
    if np.isfinite([low, high]).all():
        bottom, top = _stretched(np.array([low, min(high, 100.0)]))
        margin = 0.06 * (top - bottom) + 1e-3
        axes.set_ylim(*np.clip(_unstretched(np.array([bottom - margin, top + margin])), 0, 100))
    bottom, top = axes.get_ylim()
    ticks = [tick for tick in _TICKS if bottom <= tick <= top]
    if len(ticks) >= 3:
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])


_TICKS = (0, 20, 40, 60, 70, 80, 90, 95, 97, 98, 99, 100)


def _stretched(percent: Values) -> Values:
    return np.asarray(-np.log(101 - np.minimum(percent, 100.5)))


def _unstretched(height: Values) -> Values:
    return np.asarray(101 - np.exp(-height))


class End(NamedTuple):
    """Where a line ends, in data coordinates, and what it is called."""

    name: str
    x: float
    y: float
    color: str


def label_ends(axes: Axes, ends: Sequence[End]) -> None:
    """Write the names to the right of the axes, at the height of the ends of their lines, as close as they can be read.

    Call it when the limits of the axes are final.
    """
    to_axes = axes.transScale + axes.transLimits
    ordered = sorted(ends, key=lambda end: end.y)
    figure_height = figure_of(axes).get_size_inches()[1]
    heights = spread([float(to_axes.transform((end.x, end.y))[1]) for end in ordered], gap=0.215 / figure_height)
    for end, height in zip(ordered, heights):
        axes.annotate(
            end.name,
            xy=(end.x, end.y),
            xytext=(1.06, height),
            textcoords="axes fraction",
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": end.color,
                "linewidth": 0.8,
                "shrinkA": 1,
                "shrinkB": 4,
                "relpos": (0, 0.5),
            },
        )


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Ascending *positions* moved as little as possible (least squares) until neighbours are at least *gap* apart.

    >>> spread([0.0, 0.0, 1.0], gap=0.25)
    [-0.125, 0.125, 1.0]
    """
    # Positions less i * gap have to ascend: isotonic regression, by pooling adjacent violators.
    pools: list[list[float]] = []
    for i, position in enumerate(positions):
        pools.append([position - i * gap])
        while len(pools) > 1 and _mean(pools[-2]) > _mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    return [level + i * gap for i, level in enumerate(_mean(pool) for pool in pools for _ in pool)]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


# ---- files and page elements ----


def inline_svg(figure: Figure, name: str, label: str) -> str:
    """*figure* as an SVG element for an HTML page: text in the page's colour and font, described by *label*.

    name: makes its ids unique on the page.
    """
    from html import escape

    text = svg(figure, name)
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # one rule for all elements of the page
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{name}-", text)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    # Without width and height: the width is the page's affair, the height follows from the viewBox.
    start = f'<svg {box.group()} role="img" aria-label="{escape(label)}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    return re.sub(r"^<svg[^>]*>", lambda _: start, text)


def svg(figure: Figure, name: str, *, background: str = "none") -> str:
    """*figure* as an SVG file; equal figures with equal names give equal files."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", facecolor=background, metadata=metadata)
    return buffer.getvalue()


def png(figure: Figure) -> bytes:
    """*figure* as PNG on white, 200 dots per inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, facecolor="white")
    return buffer.getvalue()
