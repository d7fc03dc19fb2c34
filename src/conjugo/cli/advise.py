"""``conjugo advise``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import tyro

from conjugo._files import write_aside
from conjugo.cli._arguments import parse
from conjugo.errors import check

if TYPE_CHECKING:
    from conjugo.studies.advice import Advice

__all__ = ["run"]

_PLOTS = (".png", ".svg")


@dataclass(frozen=True)
class Arguments:
    """Find out, in about a minute, how large the batch may be, with which learning rate, and how much sooner training ends.

    Short probes on this device; no file is touched but --out and --plot. The last line is the conjugo train command that
    follows.

    Args:
        target: script.py:function for a function that gives (model, loss_fn, data); else --data and --model say what is
            trained.
        data: Data set: digits, cifar10, ... (conjugo data list).
        data_root: Folder to look for the data in.
        model: As in conjugo train; by default the usual one for the data.
        optimizer: sgd, momentum, nlcg, adam, or any other that conjugo train has.
        target_loss: Training loss to be reached; by default what the best probe reaches in its time.
        seconds: Time that it may take, about; by default a minute.
        max_examples: Examples that probes may process; with it, instead of a time, the advice is the same each time.
        mode: branch tries three batch sizes; fast tries one, in a third of the time, with a wider interval.
        efficiency: Examples that must not be wasted, as a share: 0.5 allows twice as many as small batches need.
        max_batch: Largest batch to be tried; by default all of the data.
        micro_batch: Most examples that go through the model at once; by default what memory allows.
        workers: Workers that share each batch in the run to be planned, each on a device like this one.
        all_reduce: Seconds in which these add up their gradients.
        seed: Decides weights, batches and random vectors.
        device: auto: a GPU if there is one; or cpu, cuda, cuda:1, ...
        out: File for everything that was measured and follows, as JSON.
        plot: Picture, .png or .svg, of steps and time against the batch.
    """

    target: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[SCRIPT.PY:FUNCTION]")] = None
    data: str | None = None
    data_root: str | None = None
    model: str | None = None
    optimizer: str = "nlcg"
    target_loss: float | None = None
    seconds: float | None = None
    max_examples: int | None = None
    mode: Literal["branch", "fast"] = "branch"
    efficiency: float = 0.5
    max_batch: int | None = None
    micro_batch: int | None = None
    workers: int = 1
    all_reduce: float | None = None
    seed: int = 0
    device: str = "auto"
    out: Path | None = None
    plot: Path | None = None


def run(argv: Sequence[str]) -> int:
    """Run the command; gives the exit code."""
    arguments = parse(Arguments, argv, command="advise")
    plot, out = arguments.plot, arguments.out
    check(plot is None or plot.suffix in _PLOTS, "advise", "--plot", str(plot), "a name that ends in .png or .svg")
    check(out is None or out.suffix == ".json", "advise", "--out", str(out), "a name that ends in .json")
    most = arguments.max_examples
    check(most is None or most >= 1, "advise", "--max-examples", most, ">= 1")
    from conjugo.studies.advise import advise
    from conjugo.training.machine import choose_device

    device = choose_device(arguments.device)
    model, loss_fn, data, settings = _subject(arguments, device)
    with _spinner() as say:
        advice = advise(
            model,
            loss_fn,
            data,
            arguments.optimizer,
            target_loss=arguments.target_loss,
            seconds=arguments.seconds,
            max_examples=most,
            mode=arguments.mode,
            efficiency=arguments.efficiency,
            max_batch=arguments.max_batch,
            micro_batch=arguments.micro_batch,
            world_size=arguments.workers,
            all_reduce=arguments.all_reduce,
            device=device,
            seed=arguments.seed,
            callback=say,
        )
    _show(advice, settings, arguments)
    return 0


def _subject(arguments: Arguments, device: torch.device) -> tuple[Any, Any, Any, dict[str, Any] | None]:
    """Model, loss, data, and what conjugo train is to be told about them; None: it cannot train them."""
    from conjugo.studies.scripts import function_of, split_target

    if arguments.target is not None:
        script = split_target(arguments.target)
        check(script is not None, "advise", "the target", arguments.target, "script.py:function")
        assert script is not None
        for name in ("data", "model"):
            given = getattr(arguments, name)
            check(given is None, "advise", f"--{name}", given, "left out, as the script gives it")
        build = function_of(*script)
        torch.manual_seed(arguments.seed)
        built = build()
        good = isinstance(built, tuple) and len(built) == 3 and isinstance(built[0], torch.nn.Module)
        described = type(built).__name__
        check(
            good and callable(built[1]), "advise", f"what {arguments.target} gives", described, "(model, loss_fn, data)"
        )
        return built[0].to(device), built[1], built[2], None
    from torch.nn import functional as F

    from conjugo.training import data as datasets
    from conjugo.training import models
    from conjugo.training.spectrum import unaugmented

    name = "digits" if arguments.data is None else arguments.data
    loaded = datasets.load(name, root=arguments.data_root)
    torch.manual_seed(arguments.seed)
    model_name = arguments.model or models.default_for(loaded)
    model = models.build(model_name, input_shape=loaded.input_shape, num_classes=loaded.num_classes).to(device)
    settings: dict[str, Any] = {"data": name, "model": model_name}
    if arguments.data_root is not None:
        settings["data-root"] = arguments.data_root
    return model, F.cross_entropy, unaugmented(loaded, "train", None, seed=arguments.seed, device=device), settings


@contextmanager
def _spinner() -> Iterator[Callable[[str], None]]:
    """Says on standard error, if that is a terminal, what is being measured."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console

    with Console(stderr=True).status("") as status:
        yield lambda text: status.update(text)


def _show(advice: Advice, settings: dict[str, Any] | None, arguments: Arguments) -> None:
    from rich.console import Console

    from conjugo.studies import advice_plots, drawing

    console = Console()
    console.print(advice.table())
    console.print(advice.summary(), highlight=False)
    files = []
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        advice.save(arguments.out)
        files.append(("numbers", arguments.out))
    if arguments.plot is not None:
        arguments.plot.parent.mkdir(parents=True, exist_ok=True)
        figure = advice_plots.steps_and_time(advice)
        png = arguments.plot.suffix == ".png"
        drawn = drawing.png(figure) if png else drawing.svg(figure, arguments.plot.stem, background="white")
        write_aside(arguments.plot, drawn)
        files.append(("picture", arguments.plot))
    for name, path in files:
        console.print(f"{name}: {path}", highlight=False, soft_wrap=True)
    if settings is not None:
        console.print(f"\n{advice.command(settings)}", highlight=False, soft_wrap=True)
