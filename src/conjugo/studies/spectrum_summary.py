"""What spectra say, in words and tables: for the terminal, for pictures and for reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

    from conjugo.training.spectrum import Spectrum

__all__ = ["columns", "cost", "heading", "matrix_of", "name_of", "number", "table", "where"]

MATRICES = {
    "hessian": "Hessian",
    "ggn": "Gauss-Newton matrix",
    "fisher": "Fisher matrix",
    "empirical-fisher": "empirical Fisher matrix",
    "gradient-covariance": "gradient covariance",
}


_LEFT_OUT = ("2 / λ max", "effective rank")
"""Of a table with several spectra, so that it fits a terminal of 80 columns."""


def number(value: float | None) -> str:
    """Three digits; – where there is no number.

    >>> number(0.012345), number(-3.0), number(None)
    ('0.0123', '−3', '–')
    >>> number(2244.3)
    '2,244'
    """
    if value is None:
        return "–"
    return (f"{value:,.0f}" if 1e3 <= abs(value) < 1e7 else f"{value:.3g}").replace("-", "−")


def where(spectrum: Spectrum) -> str:
    """The point in training, such as ``step 40 (epoch 2)``; empty outside of training."""
    step, epoch = spectrum.about.get("step"), spectrum.about.get("epoch")
    if step is None:
        return ""
    return f"step {step:,}" + ("" if epoch is None else f" (epoch {epoch:.3g})")


def matrix_of(spectrum: Spectrum) -> str:
    """The name of the matrix, such as ``Hessian``."""
    return MATRICES.get(str(spectrum.about.get("matrix")), "matrix")


def name_of(spectrum: Spectrum) -> str:
    """What was measured, in a line."""
    about = spectrum.about
    words = [matrix_of(spectrum)]
    words += [f"of {about['model']}"] if about.get("model") else []
    words += [f"on {about['data']}"] if about.get("data") else []
    place = where(spectrum)
    return " ".join(words) + (f", {place}" if place else "")


def heading(spectra: Sequence[Spectrum]) -> str:
    """What was measured, and on what: one or two lines."""
    first = spectra[0]
    about = first.about
    name = name_of(first) if len(spectra) == 1 else name_of(first).split(", step")[0]
    split = {"train": "training ", "test": "test "}.get(str(about.get("split")), "")
    parts = [f"{first.density.size:,} parameters", f"{about.get('examples') or 0:,} {split}examples"]
    if about.get("params"):
        parts[0] += f" (those named {about['params']})"
    if about.get("bn_mode"):
        batch = f", batches of {about['batch']}" if about.get("batch") and about["bn_mode"] != "eval" else ""
        parts.append(f"batch norm in {about['bn_mode'].replace('_', '-')} mode{batch}")
    return f"{name}\n{'; '.join(parts)}"


def columns(spectrum: Spectrum) -> list[tuple[str, str]]:
    """The numbers that matter, with their names."""
    values = spectrum.numbers()
    count = len(spectrum.eigenvalues)
    largest = values["lambda_max"]
    error = values["trace_stderr"]
    fraction, negative = spectrum.gradient_fraction, values["negative_mass"]
    found = [
        ("λ max", number(largest)),
        ("λ min", number(values["lambda_min"])),
        ("2 / λ max", number(2 / largest if largest is not None and largest > 0 else None)),
        ("trace", number(values["trace"]) + (f" ± {number(error)}" if error else "")),
        ("negative mass", "–" if negative is None else f"{100 * negative:.1f} %"),
        ("effective rank", number(values["effective_rank"])),
    ]
    if count > 1:
        found.insert(2, (f"λ1 / λ{count}", number(values["ratio"])))
    if count:
        found.append((f"gradient in top {count}", "–" if fraction is None else f"{100 * fraction:.1f} %"))
    if spectrum.loss is not None:
        found.append(("loss", number(spectrum.loss)))
    return found


def table(spectra: Sequence[Spectrum]) -> RenderableType:
    """One spectrum as lines, several as rows."""
    from rich.table import Table

    if len(spectra) == 1:
        shown = Table(box=None, show_header=False, pad_edge=False)
        shown.add_column(style="dim")
        shown.add_column()
        for name, value in columns(spectra[0]):
            shown.add_row(name, value)
        if len(spectra[0].eigenvalues) > 1:
            shown.add_row("largest ones", "  ".join(map(number, spectra[0].eigenvalues)))
        shown.add_row("cost", cost(spectra[0]))
        return shown
    rows = [[pair for pair in columns(spectrum) if pair[0] not in _LEFT_OUT] for spectrum in spectra]
    shown = Table("step", *(name for name, _ in rows[0]), box=None, pad_edge=False)
    for spectrum, row in zip(spectra, rows, strict=True):
        shown.add_row(f"{spectrum.about['step']:,}", *(value for _, value in row))
    return shown


def cost(spectrum: Spectrum) -> str:
    """Products, time, and how they were made."""
    about, d = spectrum.about, spectrum.density
    kind = f"{d.probes} probes of {d.steps} steps" if d.probes else "all eigenvalues"
    workers = f", {about['workers']} workers" if about.get("workers", 1) > 1 else ""
    return (
        f"{about['products']:,} products in {about['seconds']:.1f} s ({kind}, {len(d.eigenvalues)} deflated; "
        f"{about['dtype']}, {about['device']}{workers})"
    )
