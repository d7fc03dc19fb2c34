"""``conjugo reproduce``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from conjugo.cli._arguments import Switch, parse
from conjugo.studies import reproduce

__all__ = ["run"]


@dataclass(frozen=True)
class Arguments:
    """Set a paper's headline result beside what comes out here, at a scale that fits the machine.

    Args:
        name: Which result: nlcg, frsgd, adagrad-norm, mclr, batch-size, tabular-cg, hessian-spectrum, bngd, width, advisor,
            frontier.
        scale: cpu takes minutes, gpu needs one GPU, full says what the original experiment would take.
        out: Folder for results and figures; by default runs/reproduce-NAME-SCALE.
        jobs: Training runs at the same time.
        workers: Processes that share each training run.
        resume: Go on with what is in --out; what is done is not done again.
        force: Run it on a machine that is too slow for it all the same.
    """

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    scale: Literal["cpu", "gpu", "full"] = "cpu"
    out: Path | None = None
    jobs: int = 1
    workers: int = 1
    resume: Switch = False
    force: Switch = False


def run(argv: Sequence[str]) -> int:
    """Run the command; gives the exit code."""
    from rich.console import Console

    arguments = parse(Arguments, argv, command="reproduce")
    out = arguments.out or Path("runs") / f"reproduce-{arguments.name}-{arguments.scale}"
    try:
        result = reproduce.reproduce(
            arguments.name,
            scale=arguments.scale,
            out=out,
            jobs=arguments.jobs,
            workers=arguments.workers,
            resume=arguments.resume,
            force=arguments.force,
        )
    except KeyboardInterrupt:
        words = shlex.join([*(word for word in argv if word != "--resume"), "--resume"])
        print(f"\ninterrupted; to go on: conjugo reproduce {words}", file=sys.stderr)
        return 130
    console = Console()
    for table in result.tables():
        console.print(table)
    console.print(result.text(), highlight=False)
    if arguments.workers > 1 and arguments.scale != "full":  # which runs nothing
        console.print(f"{arguments.workers} workers shared each run.", highlight=False)
    console.print(f"results: {out}", highlight=False, soft_wrap=True)
    return 0
