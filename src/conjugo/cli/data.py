"""``conjugo data``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from conjugo.cli._arguments import parse
from conjugo.training import data

__all__ = ["run"]


@dataclass(frozen=True)
class Arguments:
    """Fetch, verify or describe a data set.

    Args:
        action: fetch downloads an official archive (checksum verified, broken downloads resumed); verify reads and decodes
            every file; info shows size, classes and place; list shows all names.
        name: The data set; conjugo data list shows the names.
        root: Folder to look in; by default that of CONJUGO_DATA and the user's cache.
        image_size: Side in pixels to which encoded images are scaled.
    """

    action: Annotated[Literal["fetch", "verify", "info", "list"], tyro.conf.Positional]
    name: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[NAME]")] = None
    root: Path | None = None
    image_size: int | None = None


def run(argv: Sequence[str]) -> int:
    """Run the command; gives the exit code."""
    arguments = parse(Arguments, argv, command="data")
    if arguments.action == "list":
        print("\n".join(data.names()))
        return 0
    if arguments.name is None:
        raise ValueError(f"conjugo data {arguments.action} needs the name of a data set: {', '.join(data.names())}")
    return {"fetch": _fetch, "verify": _verify, "info": _info}[arguments.action](arguments, arguments.name)


def _fetch(arguments: Arguments, name: str) -> int:
    with _download_bar(name) as progress:
        path = data.fetch(name, arguments.root, progress=progress)
    print(f"{name}: {path}")
    return 0


def _verify(arguments: Arguments, name: str) -> int:
    found = data.verify(name, arguments.root, image_size=arguments.image_size)
    for problem in found.problems:
        print(f"damaged: {problem}")
    if found.ok:
        files = ", ".join(str(path) for path in found.files)
        print(f"{name}: whole" + (f" ({files})" if files else " (comes with scikit-learn)"))
    return 0 if found.ok else 1


def _info(arguments: Arguments, name: str) -> int:
    found = data.info(name, arguments.root, image_size=arguments.image_size)
    if not found.available:
        print(f"{name}: {found.how_to_get}")
        return 1
    counts = found.class_counts
    balance = f"{counts[0]}" if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
    shown = ", ".join(found.classes[:10]) + (", ..." if len(found.classes) > 10 else "")
    print(
        f"{name}: {found.train:,} training and {found.test:,} test {'images' if found.kind == 'image' else 'rows'} "
        f"of shape {' x '.join(map(str, found.input_shape))}, {(found.bytes or 0) / 2**20:,.1f} MiB\n"
        f"{len(found.classes)} classes, {balance} training examples each: {shown}\n"
        f"place: {found.location or 'comes with scikit-learn'}"
    )
    return 0


@contextmanager
def _download_bar(name: str) -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar on standard error, if that is a terminal; yields what takes (bytes so far, bytes in all)."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
