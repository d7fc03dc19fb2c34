"""Pictures of spectra: one of them in two views, several over training side by side, and as an animation.

Two views of the same density: on an even axis, where distances between outliers can be compared, and on a symmetric-logarithmic
one, where the many eigenvalues near zero come apart. Heights are logarithmic in both: one eigenvalue in a million can be seen.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from conjugo.studies.drawing import COLORS, INK, Values, new_figure, png
from conjugo.studies.spectrum_summary import name_of, number, where

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from conjugo.training.spectrum import Spectrum

__all__ = ["animation", "density", "numbers_over_training", "over_training"]

POSITIVE, NEGATIVE = COLORS[1], COLORS[0]
"""Colours of the two signs of eigenvalues."""

LABELS = 5
"""Eigenvalues that are written beside their peaks, at most."""

DECADES = 5
"""How many orders of magnitude below the largest eigenvalue the logarithmic axis becomes linear."""


class Frame(NamedTuple):
    """What several pictures have in common, so that they can be compared."""

    low: float
    high: float
    bottom: float
    top: float
    threshold: float
    log_bottom: float


def density(spectrum: Spectrum) -> Figure:
    """Both views of one spectrum, outliers marked with their values; shaded lighter: two standard errors."""
    return _both_views(spectrum, _frame([spectrum]))


def over_training(spectra: Sequence[Spectrum]) -> Figure:
    """A small panel for each of *spectra*, all with the same logarithmic axes, in the order given."""
    frame = _frame(spectra)
    columns = min(4, len(spectra))
    rows = math.ceil(len(spectra) / columns)
    with new_figure((2.35 * columns + 0.5, 1.9 * rows + 0.4)) as figure:
        all_axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, spectrum in zip(all_axes.flat, spectra):
            _log_view(axes, spectrum, frame)
            axes.set_title(where(spectrum), fontsize=9, loc="left")
            axes.tick_params(labelsize=8)
        for axes in list(all_axes.flat)[len(spectra) :]:
            axes.set_visible(False)
            above = all_axes[-2 if rows > 1 else -1]
            for other in above:
                other.tick_params(labelbottom=True)
        figure.supxlabel("eigenvalue", fontsize=10)
        figure.supylabel("mass per decade", fontsize=10)
        return figure


def numbers_over_training(spectra: Sequence[Spectrum]) -> Figure:
    """The extreme eigenvalues against the step, on a logarithmic axis: both in size."""
    with new_figure((4.7, 3.2)) as figure:
        axes = figure.add_subplot()
        steps = [spectrum.about["step"] for spectrum in spectra]
        lines = (("largest", "lambda_max", 1, POSITIVE, "o"), ("smallest, negative", "lambda_min", -1, NEGATIVE, "s"))
        for label, name, sign, color, marker in lines:
            sizes = [sign * (spectrum.numbers()[name] or 0.0) for spectrum in spectra]
            shown = [size if size > 0 else math.nan for size in sizes]
            axes.plot(steps, shown, color=color, marker=marker, label=label)
        axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel("size of the eigenvalue")
        axes.legend(frameon=False, fontsize=9)
        return figure


def animation(spectra: Sequence[Spectrum], suffix: str) -> bytes:
    """Both views of each spectrum, in turn, as an animated ``.gif`` or ``.png``. Raises ImportError without Pillow."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("animations need Pillow: pip install 'conjugo[vision]'") from error
    frame = _frame(spectra)
    pictures = [Image.open(io.BytesIO(png(_both_views(spectrum, frame)))).convert("RGB") for spectrum in spectra]
    pictures = [picture.resize((picture.width // 2, picture.height // 2)) for picture in pictures]
    buffer = io.BytesIO()
    durations = [700] * (len(pictures) - 1) + [2000]
    kind = {".gif": "GIF", ".png": "PNG"}[suffix]
    pictures[0].save(buffer, kind, save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    return buffer.getvalue()


# ---- parts ----


def _both_views(spectrum: Spectrum, frame: Frame) -> Figure:
    with new_figure((8.6, 3.5)) as figure:
        even, logarithmic = figure.subplots(1, 2, width_ratios=(1.15, 1))
        _even_view(even, spectrum, frame)
        _log_view(logarithmic, spectrum, frame)
        even.set_xlabel("eigenvalue")
        even.set_ylabel("density")
        logarithmic.set_xlabel("eigenvalue, logarithmic")
        logarithmic.set_ylabel("mass per decade")
        figure.suptitle(name_of(spectrum), fontsize=11)
        return figure


def _frame(spectra: Sequence[Spectrum]) -> Frame:
    low = min(spectrum.density.lmin for spectrum in spectra)
    high = max(spectrum.density.lmax for spectrum in spectra)
    extent = (high - low) or abs(high) or 1.0
    width = extent / max(spectrum.density.steps for spectrum in spectra)
    single = 1 / max(spectrum.density.size for spectrum in spectra)
    peaks = [float(spectrum.density.density(sigma=_width(spectrum))[1].max()) for spectrum in spectra]
    return Frame(
        low=low - 0.04 * extent - 4 * width,
        high=high + 0.04 * extent + 4 * width,
        bottom=0.15 * single / (width * math.sqrt(2 * math.pi)),
        top=3 * max(peaks),
        threshold=max(high, -low, 1e-30) * 10.0**-DECADES,
        log_bottom=0.3 * single,
    )


def _width(spectrum: Spectrum) -> float:
    d = spectrum.density
    return ((d.lmax - d.lmin) or abs(d.lmax) or 1.0) / d.steps


def _even_view(axes: Axes, spectrum: Spectrum, frame: Frame) -> None:
    d = spectrum.density
    grid = torch.linspace(frame.low, frame.high, 3000, dtype=torch.float64)
    sigma = _width(spectrum)
    t, phi = (_array(x) for x in d.density(grid, sigma=sigma))
    error = np.nan_to_num(_array(d.density_stderr(grid, sigma=sigma)[1]))
    for sign, color in ((t >= 0, POSITIVE), (t <= 0, NEGATIVE)):
        if not sign.any():
            continue
        high, low = phi + 2 * error, np.maximum(phi - 2 * error, frame.bottom)
        axes.fill_between(t, frame.bottom, phi, where=sign, color=color, alpha=0.25, linewidth=0)
        axes.fill_between(t, low, high, where=sign, color=color, alpha=0.35, linewidth=0)
        axes.plot(np.where(sign, t, np.nan), phi, color=color, linewidth=1.2)
    axes.set_yscale("log")
    axes.set_xlim(frame.low, frame.high)
    axes.set_ylim(frame.bottom, frame.top)
    _mark_outliers(axes, spectrum, frame, t, phi)


def _mark_outliers(axes: Axes, spectrum: Spectrum, frame: Frame, t: Values, phi: Values) -> None:
    """A tick for each eigenvalue that is known, and the values of those whose names find a place."""
    known = [float(value) for value in spectrum.eigenvalues] or spectrum.density.eigenvalues.tolist()
    axes.plot(known, [frame.bottom] * len(known), "|", color=INK, markersize=9, markeredgewidth=0.9, clip_on=False)
    lowest = spectrum.density.lmin
    candidates = known + ([lowest] if lowest < 0 else [])
    taken: list[float] = []
    for value in candidates:
        if len(taken) == LABELS or any(abs(value - other) < 0.085 * (frame.high - frame.low) for other in taken):
            continue
        height = max(float(np.interp(value, t, phi)), frame.bottom)
        if height > 18 * frame.bottom:  # that of several eigenvalues: on the slope of the bulk
            continue
        axes.annotate(
            number(value),
            (value, height),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=8,
        )
        taken.append(value)


def _log_view(axes: Axes, spectrum: Spectrum, frame: Frame) -> None:
    d = spectrum.density
    t, mass = (_array(x) for x in d.log_density(2000, threshold=frame.threshold))
    x = _coordinate(t, frame.threshold)
    for sign, color in ((t >= 0, POSITIVE), (t <= 0, NEGATIVE)):
        axes.fill_between(x, frame.log_bottom, mass, where=sign, color=color, alpha=0.25, linewidth=0)
        axes.plot(np.where(sign, x, np.nan), mass, color=color, linewidth=1.2)
    axes.set_yscale("log")
    axes.set_ylim(frame.log_bottom, 12)
    low, high = (_coordinate(np.array([limit]), frame.threshold)[0] for limit in (frame.low, frame.high))
    axes.set_xlim(min(low, -0.5), max(high, 0.5) + 0.2)
    _decades(axes, frame.threshold)


def _decades(axes: Axes, threshold: float) -> None:
    """Ticks at zero and at every second power of ten on either side."""
    low, high = axes.get_xlim()
    first = math.ceil(math.log10(threshold)) + 1
    powers = range(first, first + DECADES + 2)
    marks: list[tuple[float, str]] = [(0.0, "0")]
    for sign, text in ((1, ""), (-1, "−")):
        for power in powers:
            place = float(_coordinate(np.array([sign * 10.0**power]), threshold)[0])
            if low <= place <= high and (power - first) % 2 == 0:
                marks.append((place, f"${text}10^{{{power}}}$"))
    axes.set_xticks([place for place, _ in marks], [text for _, text in marks])


def _coordinate(t: Values, threshold: float) -> Values:
    return np.asarray(np.arcsinh(t / (2 * threshold)) / math.log(10))


def _array(x: torch.Tensor) -> Values:
    found: Any = x.numpy()
    return np.asarray(found, dtype=np.float64)
