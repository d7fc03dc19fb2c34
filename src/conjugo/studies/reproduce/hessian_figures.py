"""The figures of the reproduction of Hessian eigenvalue densities."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from conjugo.studies import drawing
from conjugo.studies.reproduce.grid_figures import panels
from conjugo.studies.reproduce.hessian_accuracy import METHODS
from conjugo.studies.reproduce.hessian_networks import MOMENTS, VIEWS, Place, numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from conjugo.studies.reproduce.hessian_accuracy import AccuracyResult
    from conjugo.studies.reproduce.hessian_networks import NetworksResult
    from conjugo.training.spectrum import Spectrum

__all__ = ["accuracy", "densities", "drop", "gradients"]


def accuracy(result: AccuracyResult) -> Figure:
    """The smoothed density of all eigenvalues, and those estimated, all with the same width."""
    values = torch.tensor(result.exact, dtype=torch.float64)
    width = float(values[0] - values[-1]) / 300
    grid = torch.linspace(float(values[-1]) - 4 * width, float(values[0]) + 4 * width, 4000, dtype=torch.float64)
    kernels = torch.exp(-0.5 * ((grid[:, None] - values) / width) ** 2)
    exact = kernels.mean(1) / (width * (2 * torch.pi) ** 0.5)
    with panels(len(METHODS)) as (figure, axeses):
        for axes, (name, label) in zip(axeses, METHODS.items()):
            axes.fill_between(
                grid.numpy(), 1e-6, exact.numpy(), color="#808080", alpha=0.35, linewidth=0, label="all eigenvalues"
            )
            _, phi = result.first[name].density(grid, sigma=width)
            axes.plot(grid.numpy(), phi.numpy(), color=drawing.COLORS[1], linewidth=1.1, label="estimate")
            axes.set_yscale("log")
            axes.set_ylim(0.1 * float(exact.clamp(min=1 / len(values)).min()), 3 * float(exact.max()))
            axes.set_title(label, fontsize=10)
            axes.set_xlabel("eigenvalue")
        axeses[0].set_ylabel("density")
        figure.legend(*axeses[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
        return figure


def densities(result: NetworksResult) -> Figure:
    """The densities of the first seed at the beginning and when trained: a row for each moment, a column for each view."""
    moments = ["init", *result.plan.trained]
    return _grid(result, [m for m in moments if any(p.moment == m for p in result.spectra)])


def drop(result: NetworksResult) -> Figure:
    """The densities of the first seed before and after the drop, one panel for each view, on a logarithmic axis."""
    looks = {"before": drawing.COLORS[0], "after": drawing.COLORS[1], "undropped": drawing.COLORS[6]}
    with panels(len(VIEWS)) as (figure, axeses):
        for axes, (view, label) in zip(axeses, VIEWS.items()):
            places = {moment: Place(view, moment, 0) for moment in looks}
            there = {moment: result.spectra[place] for moment, place in places.items() if place in result.spectra}
            threshold = 1e-3 * max((s.density.lmax for s in there.values()), default=1.0)
            for moment, spectrum in there.items():
                t, mass = (x.numpy() for x in spectrum.density.log_density(2000, sigma=0.1, threshold=threshold))
                label_ = f"epoch {spectrum.about['epoch']}, {MOMENTS[moment]}"
                axes.plot(t, mass, color=looks[moment], linewidth=1.2, label=label_)
                axes.set_ylim(0.3 / spectrum.density.size, 12)
            axes.set_xscale("asinh", linear_width=2 * threshold)
            axes.set_yscale("log")
            axes.set_title(label, fontsize=10)
            axes.set_xlabel("eigenvalue, logarithmic")
            _decades(axes, threshold)
        axeses[0].set_ylabel("mass per decade")
        figure.legend(*axeses[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
        return figure


def gradients(result: NetworksResult) -> Figure:
    """The part of the gradient in the top eigenspace, and lambda_1 / lambda_10: a point for each seed."""
    from matplotlib.ticker import LogLocator, NullFormatter

    moments = [m for m in MOMENTS if any(p.moment == m for p in result.spectra)]
    names = {"fraction": "squared gradient in the top 10", "ratio": "λ1 / λ10"}
    with panels(len(names), shared=False) as (figure, axeses):
        for axes, (name, label) in zip(axeses, names.items()):
            for i, (view, style) in enumerate(drawing.styles(tuple(VIEWS)).items()):
                shift = 0.12 * (i - 1)
                points = [
                    (k + shift, numbers(spectrum)[name])
                    for k, moment in enumerate(moments)
                    for place, spectrum in result.spectra.items()
                    if (place.view, place.moment) == (view, moment)
                ]
                xs, ys = zip(*[(x, y) for x, y in points if y is not None]) if points else ((), ())
                axes.plot(
                    xs, ys, color=style.color, marker=style.marker, linestyle="none", label=VIEWS[view], alpha=0.8
                )
            axes.set_xticks(range(len(moments)), [MOMENTS[m] for m in moments], rotation=25, ha="right", fontsize=8)
            axes.set_title(label, fontsize=10)
        axeses[0].set_ylim(0, 1.02)
        axeses[1].set_yscale("log")
        axeses[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axeses[1].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axeses[1].yaxis.set_minor_formatter(NullFormatter())
        figure.legend(*axeses[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
        return figure


def _grid(result: NetworksResult, moments: list[str]) -> Figure:
    with drawing.new_figure((9.0, 2.0 * len(moments) + 0.5)) as figure:
        rows = figure.subplots(len(moments), len(VIEWS), squeeze=False)
        for row, moment in zip(rows, moments):
            for axes, (view, label) in zip(row, VIEWS.items()):
                spectrum = result.spectra.get(Place(view, moment, 0))
                if spectrum is None:
                    axes.set_visible(False)
                    continue
                _curve(axes, spectrum)
                axes.set_title(f"{label}, epoch {spectrum.about['epoch']}", fontsize=9)
                axes.tick_params(labelsize=8)
        figure.supxlabel("eigenvalue", fontsize=10)
        figure.supylabel("density", fontsize=10)
        return figure


def _decades(axes: Axes, threshold: float) -> None:
    """Ticks at zero and at the powers of ten on either side, where the axis is logarithmic."""
    from matplotlib.ticker import NullLocator

    low, high = axes.get_xlim()
    powers = range(math.ceil(math.log10(5 * threshold)), math.ceil(math.log10(max(high, -low))))
    marks = [(0.0, "0")] + [(s * 10.0**p, f"${'-' if s < 0 else ''}10^{{{p}}}$") for p in powers for s in (-1, 1)]
    marks = [mark for mark in marks if low <= mark[0] <= high]
    axes.set_xticks([place for place, _ in marks], [text for _, text in marks], fontsize=8)
    axes.xaxis.set_minor_locator(NullLocator())


def _curve(axes: Axes, spectrum: Spectrum) -> None:
    """A density on an even axis, with a tick below each of the largest eigenvalues."""
    d, color = spectrum.density, drawing.COLORS[1]
    high = max([d.lmax, *spectrum.eigenvalues])
    width = (high - d.lmin) / 150
    grid = torch.linspace(d.lmin - 5 * width, high + 5 * width, 3000, dtype=torch.float64)
    t, phi = (x.numpy() for x in d.density(grid, sigma=width))
    single = 1 / (d.size * width * (2 * torch.pi) ** 0.5)
    axes.fill_between(t, 1e-9, phi, color=color, alpha=0.25, linewidth=0)
    axes.plot(t, phi, color=color, linewidth=1.2)
    axes.set_yscale("log")
    axes.set_ylim(0.2 * single, 3 * float(phi.max()))
    ticks = spectrum.eigenvalues
    axes.plot(ticks, [0.2 * single] * len(ticks), "|", color=color, markersize=8, markeredgewidth=0.9, clip_on=False)
