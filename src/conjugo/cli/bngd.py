"""``conjugo bngd``."""

from __future__ import annotations

import json
import math
import statistics
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import tyro

from conjugo._files import write_aside
from conjugo.cli._arguments import parse
from conjugo.errors import check
from conjugo.scaling import bngd
from conjugo.studies import bngd as studies
from conjugo.studies import spectrum as spectra

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

__all__ = ["run"]

LEARNING_RATES = (1e-5, 1e16), (1e-10, 1.0)


@dataclass(frozen=True)
class Arguments:
    """Gradient descent with batch norm, where it is known exactly, and what of it holds in a network.

    Args:
        action: map runs BNGD on least squares for all pairs of learning rates; data says of a data set what batch norm would do
            to gradient descent on it; layers measures the layers before batch norm of a model.
        name: For data: diabetes, breast_cancer, wine, or a .csv file of numbers whose last column is the target.
        spectrum: For map: the eigenvalues of H, as logspace:LOW:HIGH:D, linspace:LOW:HIGH:D or 1,2,4.
        start: For map: w0 random on the sphere, or g / abs(g).
        lr: For map: smallest and largest learning rate of w; 1e-5 and 1e16 by default. For layers: one, to tell effective rates
            and edges.
        lr_a: For map: smallest and largest learning rate of a.
        points: For map: how many of both learning rates.
        steps: Of a run, at most: 2,000 for map, 20,000 for data by default.
        tol: For data: the part of u'Hu up to which the excess is to fall.
        model: For layers: script.py:function for a function that gives a model or (model, loss_fn, data).
        data: For layers, where the script gives only a model: the data set. The loss is the cross-entropy.
        data_root: Folder of the data sets.
        layer: For layers: these only, by the names of their modules. By default all that are scale-invariant.
        matrix: For layers: hessian, or ggn, the Gauss-Newton matrix.
        examples: For layers: so many of the examples, chosen by --seed; by default all.
        batch: For layers: examples in a batch, which batch norm sees; by default all at once, at most 1,000.
        dtype: For layers: float64 shows eigenvalues down to 1e-12 of the largest, float32 down to 1e-6.
        device: For layers: auto: a GPU if there is one; or cpu, cuda, cuda:1, ...
        seed: Of all random numbers.
        out: A file for the numbers: .npz for map, .json for the others.
        plot: A picture of the map, .png or .svg.
    """

    action: Annotated[Literal["map", "data", "layers"], tyro.conf.Positional]
    name: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[NAME]")] = None
    spectrum: str = "logspace:1:80:100"
    start: studies.Start = "random"
    lr: tuple[float, ...] = ()
    lr_a: tuple[float, float] = LEARNING_RATES[1]
    points: tuple[int, int] = (43, 41)
    steps: int | None = None
    tol: float = 1e-6
    model: str | None = None
    data: str | None = None
    data_root: str | None = None
    layer: tuple[str, ...] = ()
    matrix: Literal["hessian", "ggn"] = "hessian"
    examples: int | None = None
    batch: int | None = None
    dtype: Literal["float32", "float64"] = "float32"
    device: str = "auto"
    seed: int = 0
    out: Path | None = None
    plot: Path | None = None


def run(argv: Sequence[str]) -> int:
    """Run the command; gives the exit code."""
    from rich.console import Console

    arguments = parse(Arguments, argv, command="bngd")
    _check(arguments)
    console = Console()
    {"map": _map, "data": _data, "layers": _layers}[arguments.action](arguments, console)
    for name, path in (("numbers", arguments.out), ("picture", arguments.plot)):
        if path is not None:
            console.print(f"{name}: {path}", highlight=False, soft_wrap=True)
    return 0


def _check(arguments: Arguments) -> None:
    """Complain before anything takes time."""
    action, out, plot = arguments.action, arguments.out, arguments.plot
    if action == "data" and arguments.name is None:
        raise ValueError(f"conjugo bngd data needs the name of a data set: {', '.join(studies.DATA)}, or a .csv file")
    check(action == "data" or arguments.name is None, "bngd", "NAME", arguments.name, f"left out for {action}")
    if action == "layers" and arguments.model is None:
        raise ValueError("conjugo bngd layers needs a --model: script.py:function")
    check(action == "layers" or arguments.model is None, "bngd", "--model", arguments.model, f"left out for {action}")
    numbers = len(arguments.lr)
    accepted = {"map": "two numbers, the smallest and the largest", "data": "left out for data", "layers": "one number"}
    fits = numbers in {"map": (0, 2), "data": (0,), "layers": (0, 1)}[action]
    check(fits, "bngd", "--lr", " ".join(f"{lr:g}" for lr in arguments.lr), accepted[action])
    check(all(lr > 0 for lr in arguments.lr), "bngd", "--lr", " ".join(f"{lr:g}" for lr in arguments.lr), "> 0")
    low, high = arguments.lr_a
    check(0 < low <= high, "bngd", "--lr-a", f"{low:g} {high:g}", "two numbers > 0, the smallest and the largest")
    check(min(arguments.points) >= 1, "bngd", "--points", arguments.points, ">= 1")
    check(arguments.steps is None or arguments.steps >= 1, "bngd", "--steps", arguments.steps, ">= 1")
    ending = ".npz" if action == "map" else ".json"
    check(out is None or out.suffix == ending, "bngd", "--out", str(out), f"a name that ends in {ending} for {action}")
    check(action == "map" or plot is None, "bngd", "--plot", str(plot), f"left out for {action}")
    drawn = plot is None or plot.suffix in (".png", ".svg")
    check(drawn, "bngd", "--plot", str(plot), "a name that ends in .png or .svg")


def _map(arguments: Arguments, console: Console) -> None:
    problem, start = studies.random_problem(arguments.spectrum, seed=arguments.seed, start=arguments.start)
    lrs, lr_as = (
        torch.logspace(math.log10(low), math.log10(high), n, dtype=torch.float64)
        for (low, high), n in zip((arguments.lr or LEARNING_RATES[0], arguments.lr_a), arguments.points, strict=True)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of lr_a > 1, which is asked for here
        found = bngd.convergence_map(problem, lrs, lr_as, arguments.steps or 2000, start)
    spectrum, ends = problem.spectrum(), bngd.asymptotes(problem, start)
    total = sum(found.counts().values())
    counts = ", ".join(f"{count:,} {status}" for status, count in found.counts().items())
    _say(
        console,
        f"d = {problem.d}, condition number {spectrum.kappa:,.4g}, effective {spectrum.kappa_star:,.4g}",
        f"gradient descent: learning rates below {spectrum.gd_lr_max:.4g}, best {spectrum.gd_lr_opt:.4g}",
        f"BNGD: good learning rates of w from about {ends.plateau[0]:.2g} to {ends.plateau[1]:.2g} at once, "
        f"to {ends.C2_late / spectrum.eff_lr_opt:.2g} in the long run (a's at 1, {ends.case.replace('_', ' ')})",
        f"{total:,} pairs after {found.steps:,} steps: {counts}",
    )
    if arguments.out is not None:
        studies.save_map(found, arguments.out)
    if arguments.plot is not None:
        from conjugo.studies import drawing

        with drawing.new_axes(drawing.WIDE) as axes:
            found.plot(axes)
            _write(arguments.plot, drawing.figure_of(axes))


def _write(path: Path, figure: Figure) -> None:
    from conjugo.studies import drawing

    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(
        path, drawing.png(figure) if path.suffix == ".png" else drawing.svg(figure, path.stem, background="white")
    )


def _data(arguments: Arguments, console: Console) -> None:
    assert arguments.name is not None
    steps = arguments.steps or 20_000
    found = studies.summary(studies.least_squares(arguments.name), steps=steps, tol=arguments.tol, seed=arguments.seed)
    spectrum = found.spectrum
    descent = ", ".join(f"{n:,} at {part:g}" for part, n in found.gd.items() if n is not None)
    _say(
        console,
        f"{arguments.name}: d = {found.problem.d}, standardised; {found.problem.S:.3f} of the variance can be explained",
        f"condition number {spectrum.kappa:,.1f}, effective {spectrum.kappa_star:,.1f}",
        f"gradient descent: learning rates below {spectrum.gd_lr_max:.4g}; steps to {arguments.tol:g} S: "
        + (f"{descent} of that" if descent else f"more than {steps:,}"),
    )
    best, near, wide = found.best, found.range(2.0), found.range()
    if best is None or near is None or wide is None:
        _say(console, f"BNGD: more than {steps:,} steps at all {len(found.lrs)} learning rates")
    else:
        _say(
            console,
            f"BNGD, from a random start: {best[1]:,} steps at the best learning rate, {best[0]:.2g}; at most twice as many "
            f"from {near[0]:.2g} to {near[1]:.2g} ({near[1] / near[0]:,.0f}-fold), at most {steps:,} from {wide[0]:.2g} to "
            f"{wide[1]:.2g} ({wide[1] / wide[0]:,.0f}-fold)",
        )
    if arguments.out is not None:
        content = {
            "name": arguments.name,
            "d": found.problem.d,
            "S": found.problem.S,
            "kappa": spectrum.kappa,
            "kappa_star": spectrum.kappa_star,
            "gd_lr_max": spectrum.gd_lr_max,
            "gd": {f"{part:g}": n for part, n in found.gd.items()},
            "lrs": found.lrs.tolist(),
            "bngd": found.bngd,
        }
        _write_json(arguments.out, content)


def _layers(arguments: Arguments, console: Console) -> None:
    from conjugo.studies.reproduce.paper import new_table

    assert arguments.model is not None
    script, colon, function = arguments.model.rpartition(":")
    device = torch.device(
        arguments.device if arguments.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    )
    settings = spectra.Settings(
        examples=arguments.examples, batch=arguments.batch, seed=arguments.seed, dtype=arguments.dtype
    )
    subject = spectra.of_script(
        Path(script if colon else arguments.model),
        function if colon else "build",
        settings,
        device=device,
        data=arguments.data,
        data_root=arguments.data_root,
    )
    size = arguments.batch or min(1000, subject.examples or 1000)
    model = subject.model.to(getattr(torch, arguments.dtype))
    shown = sys.stderr.isatty()
    found = studies.layers(
        model,
        subject.loss_fn,
        subject.cut(size, True),
        names=arguments.layer,
        matrix=arguments.matrix,
        seed=arguments.seed,
        progress=lambda name: print(name, file=sys.stderr) if shown else None,
    )
    lr = arguments.lr[0] if arguments.lr else None
    table = new_table(
        f"{arguments.model}: {arguments.matrix} of the layers before batch norm",
        "Effective: without the directions of the rows. κ 50 %: largest eigenvalue over the median of the sizes; κ: over the "
        "smallest positive one, of layers up to 2,000 parameters. abs w: median of the rows' lengths.",
    )
    columns = ["parameters", "abs w", "λ max", "κ 50 %", "κ", "raw λ max", "raw κ"]
    for column in [*columns, *(() if lr is None else ("eff. lr", "edge"))]:
        table.add_column(column, justify="right")
    for layer in found:
        kappas = ["–" if x is None else f"{x:,.3g}" for x in (layer.kappa_eff, layer.kappa_raw)]
        cells = [
            f"{layer.parameters:,}",
            f"{statistics.median(layer.norms.tolist()):.3g}",
            f"{layer.lam_max:.3g}",
            f"{layer.kappa(0.5):,.3g}",
            kappas[0],
            f"{layer.raw_lam_max:.3g}",
            kappas[1],
        ]
        if lr is not None:
            cells += [f"{statistics.median(layer.eff_lr(lr).tolist()):.3g}", f"{layer.edge(lr):.3g}"]
        table.add_row(layer.name, *cells)
    console.print(table)
    if arguments.out is not None:
        _write_json(
            arguments.out, {"model": arguments.model, "lr": lr, "layers": [studies.plain(one, lr) for one in found]}
        )


def _say(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(line, highlight=False)


def _write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, json.dumps(content, allow_nan=False, indent=1))
