"""``conjugo ckpt``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from conjugo.cli._arguments import parse
from conjugo.distributed import export_step
from conjugo.distributed._manifest import problems, read, remove, step_folder, steps
from conjugo.errors import CorruptFile, check

__all__ = ["run"]


@dataclass(frozen=True)
class Arguments:
    """Look after the checkpoints in a folder.

    Args:
        action: ls lists the steps; verify reads all files and compares their checksums; prune removes the oldest steps;
            export writes weights as one safetensors file.
        path: A folder with checkpoints, or a run directory.
        out: The file that export writes.
        step: The step to verify or export; by default all, and the newest.
        part: What export takes from the checkpoint.
        keep: How many steps prune leaves; damaged ones do not count, and are removed.
    """

    action: Annotated[Literal["ls", "verify", "prune", "export"], tyro.conf.Positional]
    path: Annotated[Path, tyro.conf.Positional]
    out: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[OUT]")] = None
    step: int | None = None
    part: str = "model"
    keep: int = 1


def run(argv: Sequence[str]) -> int:
    """Run the command; gives the exit code."""
    arguments = parse(Arguments, argv, command="ckpt")
    root = arguments.path / "checkpoints" if (arguments.path / "checkpoints").is_dir() else arguments.path
    known = steps(root)
    if not known:
        raise FileNotFoundError(f"there are no checkpoints in {root}")
    return {"ls": _ls, "verify": _verify, "prune": _prune, "export": _export}[arguments.action](arguments, root, known)


def _ls(arguments: Arguments, root: Path, known: list[int]) -> int:
    table = Table("step", "size", "saved (UTC)", "workers", "parts", box=None)
    for step in known:
        try:
            manifest = read(step_folder(root, step))
        except CorruptFile as error:
            table.add_row(str(step), "damaged", str(error))
            continue
        size = sum(entry[0] for entry in manifest["files"].values()) / 2**20
        saved = manifest["created"].replace("T", " ").rstrip("Z")
        table.add_row(str(step), f"{size:,.1f} MiB", saved, str(manifest["world_size"]), ", ".join(manifest["parts"]))
    Console(width=120).print(table)
    return 0


def _verify(arguments: Arguments, root: Path, known: list[int]) -> int:
    wanted = known if arguments.step is None else [arguments.step]
    check(wanted[0] in known, "ckpt verify", "--step", wanted[0], f"one of {known}")
    damaged = 0
    for step in wanted:
        problem = problems(step_folder(root, step))
        damaged += bool(problem)
        print(f"step {step}: {problem or 'whole'}")
    return 1 if damaged else 0


def _prune(arguments: Arguments, root: Path, known: list[int]) -> int:
    check(arguments.keep >= 1, "ckpt prune", "--keep", arguments.keep, ">= 1")
    found = {step: problems(step_folder(root, step)) for step in known}
    good = [step for step, problem in found.items() if not problem]
    if not good:
        raise CorruptFile(f"all steps in {root} are damaged; nothing was removed")
    for step in known:
        if step not in good[-arguments.keep :]:
            remove(root, step)
            print(f"removed step {step}" + (f": {found[step]}" if found[step] else ""))
    print(f"kept {', '.join(map(str, good[-arguments.keep :]))}")
    return 0


def _export(arguments: Arguments, root: Path, known: list[int]) -> int:
    if arguments.out is None:
        raise ValueError("conjugo ckpt export needs the file to write: conjugo ckpt export PATH OUT.safetensors")
    step, count = export_step(root, arguments.out, step=arguments.step, part=arguments.part)
    print(f"{count} tensors of step {step}: {arguments.out}")
    return 0
