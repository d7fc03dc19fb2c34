"""``conjugo compare``."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from conjugo.cli._arguments import Switch, as_yaml, merge_file, option, parse
from conjugo.cli.report import show
from conjugo.errors import check, unknown
from conjugo.studies import CompareConfig, compare
from conjugo.studies.presets import presets
from conjugo.training import TrainConfig

__all__ = ["run"]


@dataclass(frozen=True)
class Arguments:
    """Compare optimizers over batch sizes: each is tuned with the same budget, then measured with fresh seeds.

    Leaves a run directory with table (CSV, JSON), plots (PNG, SVG), report.html, and a journal from which an interrupted
    comparison goes on.

    Args:
        compare: the comparison.
        out: Run directory; by default a new one in ./runs.
        jobs: Training runs at the same time, each in --workers processes.
        resume: Go on with the comparison in --out; what is done is not done again.
        preset: Begin with a ready comparison: demo or cifar10. Other arguments override it.
        config: Begin with a file (YAML, JSON or TOML). Other arguments override it.
        print_config: Print the whole configuration as YAML, and stop.
    """

    compare: Annotated[CompareConfig, tyro.conf.arg(name="")]
    out: Path | None = None
    jobs: int = 1
    resume: Switch = False
    preset: str | None = None
    config: Path | None = None
    print_config: Switch = False


def run(argv: Sequence[str]) -> int:
    """Run the command; gives the exit code."""
    arguments = parse(Arguments, argv, command="compare", default=_beginning(argv))
    config = arguments.compare
    if arguments.print_config:
        print(as_yaml(config), end="")
        return 0
    check(arguments.jobs >= 1, "compare", "--jobs", arguments.jobs, ">= 1")
    check(arguments.out is not None or not arguments.resume, "compare", "--out", None, "the folder to resume")
    out = arguments.out or Path("runs") / f"compare-{config.train.data}-{time.strftime('%Y%m%d-%H%M%S')}"
    if (out / "config.json").exists() and not arguments.resume:
        raise ValueError(f"{out} holds a comparison already: add --resume to go on with it, or choose another --out")
    try:
        result = compare(config, out=out, jobs=arguments.jobs, resume=arguments.resume)
    except KeyboardInterrupt:
        words = [word for word in argv if word != "--resume"]
        words += [] if arguments.out else ["--out", str(out)]
        words += ["--resume"] if (out / "config.json").exists() else []  # else it had not begun
        print(f"\ninterrupted; to go on: conjugo compare {shlex.join(words)}", file=sys.stderr)
        return 130
    show(result, out)
    return 1 if result.crashes else 0


def _beginning(argv: Sequence[str]) -> Arguments | None:
    """The defaults that --preset and --config make; None where --batch-sizes has to be given."""
    preset, file = option("--preset", argv), option("--config", argv)
    known = presets()
    if preset is not None and preset not in known:
        unknown("preset", preset, known)
    if preset is None and file is None:
        # Without a beginning the batch sizes would be required even for a look at the help.
        return Arguments(CompareConfig(train=TrainConfig(), batch_sizes=(32, 128, 512, "full")))
    config = CompareConfig(train=TrainConfig(), batch_sizes=("full",)) if preset is None else known[preset]
    return Arguments(config if file is None else merge_file(config, Path(file)))
