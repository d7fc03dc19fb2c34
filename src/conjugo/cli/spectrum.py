"""``conjugo spectrum``."""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import tyro

from conjugo._files import write_aside
from conjugo.cli._arguments import Switch, parse
from conjugo.distributed import init, reported_errors, shutdown
from conjugo.errors import check
from conjugo.studies import spectrum as spectra
from conjugo.training.workers import Workers

if TYPE_CHECKING:
    from conjugo.training.spectrum import Spectrum

__all__ = ["run"]

_PLOTS = (".png", ".svg")


@dataclass(frozen=True)
class Arguments:
    """Measure how the eigenvalues of the Hessian of a loss are distributed: a picture, the numbers as JSON, a summary.

    A killed command goes on from where it was when it is called again. With several workers (conjugo launch, torchrun) each
    takes a share of the data.

    Args:
        target: A run directory of conjugo train, or script.py:function for a function that gives a model or
            (model, loss_fn, data).
        matrix: hessian of the mean loss; ggn, the generalised Gauss-Newton matrix; fisher, with labels drawn from the model,
            or empirical-fisher, with those of the data; gradient-covariance, the mean of g g' over batches.
        step: Of a run, the step to take; 0 is the beginning. By default the newest checkpoint.
        all: Of a run, the beginning and all checkpoints there are.
        probes: Random vectors.
        steps: Lanczos steps for each of them.
        no_deflate: The plain method, without taking outlying eigenvalues out of the average.
        top: How many of the largest eigenvalues to find one by one; by default one per class, at most 10.
        bn_mode: Batch norm by the statistics of each batch (train), by running ones (eval), or as the modules are set.
            By default train for a run, as-is for a script.
        data: For a script that gives only a model: the data set. The loss is the cross-entropy.
        data_root: Folder of the data sets; by default that of the run.
        split: Examples to take the loss over.
        examples: So many of them, chosen by --seed; by default all.
        batch: Examples in a batch, where it matters (batch norm in train mode, gradient covariance); by default as in training.
        params: A regular expression: only parameters whose names contain it.
        out: The JSON file, with --all a folder; by default in the run directory (spectra/), or spectrum.json.
        plot: The picture, .png or .svg; by default beside the JSON.
        animation: Of --all, also an animated picture: a file .gif or .png.
        seed: Of all random vectors.
        device: auto: a GPU if there is one; or cpu, cuda, cuda:1, ...
        dtype: float64 shows eigenvalues down to 1e-12 of the largest, float32 down to 1e-6.
    """

    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR|SCRIPT.PY:FUNCTION")]
    matrix: spectra.Matrix = "hessian"
    step: int | None = None
    all: Switch = False
    probes: int = 10
    steps: int = 80
    no_deflate: Switch = False
    top: int | None = None
    bn_mode: Literal["train", "eval", "as-is"] | None = None
    data: str | None = None
    data_root: str | None = None
    split: Literal["train", "test"] = "train"
    examples: int | None = None
    batch: int | None = None
    params: str | None = None
    out: Path | None = None
    plot: Path | None = None
    animation: Path | None = None
    seed: int = 0
    device: str = "auto"
    dtype: Literal["float32", "float64"] = "float32"


def run(argv: Sequence[str]) -> int:
    """Run the command; gives the exit code."""
    arguments = parse(Arguments, argv, command="spectrum")
    same = {item.name for item in fields(spectra.Settings)} & {item.name for item in fields(Arguments)}
    settings = spectra.Settings(**{name: getattr(arguments, name) for name in same}, deflate=not arguments.no_deflate)
    _check(arguments)
    kind = arguments.device.partition(":")[0]
    workers_device = init(device=kind if kind in ("cpu", "cuda") else None).device
    workers = Workers()
    if not workers.first:
        warnings.simplefilter("ignore")  # rank 0 says it
    several = "without a number where there are several workers: each takes its own"
    check(workers.size == 1 or ":" not in arguments.device, "spectrum", "--device", arguments.device, several)
    device = workers_device if arguments.device == "auto" or workers.size > 1 else torch.device(arguments.device)
    try:
        with reported_errors():
            measured = _measure(arguments, settings, device, workers)
            if workers.first:
                _show(measured, arguments)
    except KeyboardInterrupt:
        if workers.first:
            print(f"\ninterrupted; to go on: conjugo spectrum {shlex.join(argv)}", file=sys.stderr)
        return 130
    shutdown()
    return 0


def _check(arguments: Arguments) -> None:
    """Complain before anything takes time."""
    run_directory = _is_run(arguments.target)
    for name, wanted in (("step", arguments.step is None), ("all", not arguments.all)):
        check(run_directory or wanted, "spectrum", f"--{name}", arguments.target, "used with a run directory")
    check(
        not run_directory or arguments.data is None,
        "spectrum",
        "--data",
        arguments.data,
        "that of the run: leave it out",
    )
    check(arguments.step is None or not arguments.all, "spectrum", "--step", arguments.step, "left out, or --all")
    plot, animation = arguments.plot, arguments.animation
    check(plot is None or plot.suffix in _PLOTS, "spectrum", "--plot", str(plot), "a name that ends in .png or .svg")
    check(animation is None or arguments.all, "spectrum", "--animation", str(animation), "used with --all")
    check(
        animation is None or animation.suffix in (".gif", ".png"),
        "spectrum",
        "--animation",
        str(animation),
        "a name that ends in .gif or .png",
    )
    if not arguments.all and arguments.out is not None:
        check(arguments.out.suffix == ".json", "spectrum", "--out", str(arguments.out), "a name that ends in .json")


def _is_run(target: str) -> bool:
    script, colon, _ = target.rpartition(":")
    if Path(target).is_dir():
        return True
    if target.endswith(".py") or (colon and script.endswith(".py")):
        return False
    raise FileNotFoundError(f"there is no run directory {target} (and it is no script.py:function)")


def _measure(
    arguments: Arguments, settings: spectra.Settings, device: torch.device, workers: Workers
) -> list[tuple[Spectrum, Path]]:
    """Collective: the spectra, with their files."""
    if not _is_run(arguments.target):
        script, colon, function = arguments.target.rpartition(":")
        path = arguments.out or Path("spectrum.json")
        subject = spectra.of_script(
            Path(script if colon else arguments.target),
            function if colon else "build",
            settings,
            device=device,
            data=arguments.data,
            data_root=arguments.data_root,
        )
        workers.on_first(lambda: path.parent.mkdir(parents=True, exist_ok=True))
        with _bar("", workers.first) as callback:
            return [(spectra.spectrum_of(subject, settings, path, callback=callback), path)]
    folder = Path(arguments.target)
    found = []
    steps: list[int | None] = [*spectra.known_steps(folder)] if arguments.all else [arguments.step]
    for step in steps:
        subject = spectra.of_run(folder, step, settings, device=device, data_root=arguments.data_root)
        own = Path(f"{settings.matrix}-step-{subject.about['step']}.json")
        if arguments.all:
            path = (arguments.out or folder / "spectra") / own
        else:
            path = arguments.out or folder / "spectra" / own
        workers.on_first(lambda path=path: path.parent.mkdir(parents=True, exist_ok=True))  # type: ignore[misc]
        with _bar(f"step {subject.about['step']}", workers.first) as callback:
            found.append((spectra.spectrum_of(subject, settings, path, callback=callback), path))
    return found


@contextmanager
def _bar(name: str, first: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on standard error, if that is a terminal: gives what is called with products done and planned."""
    if not (first and sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("products"))
    with Progress(*columns, TimeRemainingColumn(), TextColumn("left"), console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, planned: bar.update(task, completed=done, total=planned)


def _show(measured: list[tuple[Spectrum, Path]], arguments: Arguments) -> None:
    from rich.console import Console

    from conjugo.studies import drawing, spectrum_plots, spectrum_summary

    found = [spectrum for spectrum, _ in measured]
    console = Console()
    console.print(spectrum_summary.heading(found), highlight=False, soft_wrap=True)
    console.print(spectrum_summary.table(found))
    last = measured[-1][1]
    if arguments.plot is not None:
        plot = arguments.plot
    else:
        plot = last.parent / f"{arguments.matrix}.png" if arguments.all else last.with_suffix(".png")
    figure = spectrum_plots.density(found[0]) if len(found) == 1 else spectrum_plots.over_training(found)
    plot.parent.mkdir(parents=True, exist_ok=True)
    drawn = drawing.png(figure) if plot.suffix == ".png" else drawing.svg(figure, plot.stem, background="white")
    write_aside(plot, drawn)
    files = [("numbers", last.parent if arguments.all else last), ("picture", plot)]
    if arguments.animation is not None:
        write_aside(arguments.animation, spectrum_plots.animation(found, arguments.animation.suffix))
        files.append(("animation", arguments.animation))
    for name, path in files:
        console.print(f"{name}: {path}", highlight=False, soft_wrap=True)
