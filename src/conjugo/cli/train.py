"""``conjugo train``."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from conjugo.cli._arguments import Switch, as_yaml, merge_file, option, parse
from conjugo.training import TrainConfig, TrainResult, train

__all__ = ["run"]


@dataclass(frozen=True)
class Arguments:
    """Train a model and leave everything in a run directory: configuration, metrics, checkpoints, result.

    Args:
        train: the run.
        out: Run directory; by default a new one in ./runs.
        resume: Go on where the run in --out stands.
        config: File (YAML, JSON or TOML) with settings; other arguments override it.
        print_config: Print the whole configuration as YAML, and stop.
    """

    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    out: Path | None = None
    resume: Switch = False
    config: Path | None = None
    print_config: Switch = False


def run(argv: Sequence[str]) -> int:
    """Run the command; gives the exit code."""
    file = option("--config", argv)
    default = Arguments(TrainConfig() if file is None else merge_file(TrainConfig(), Path(file)))
    arguments = parse(Arguments, argv, command="train", default=default)
    config = arguments.train
    if arguments.print_config:
        print(as_yaml(config), end="")
        return 0
    out = arguments.out or Path("runs") / f"{config.data}-{config.optimizer}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        result = train(config, out=out, resume=arguments.resume)
    except KeyboardInterrupt:
        words = [word for word in argv if word != "--resume"]
        words += [] if arguments.out else ["--out", str(out)]
        print(f"\ninterrupted; to go on: conjugo train {shlex.join([*words, '--resume'])}", file=sys.stderr)
        return 130
    print(_summary(config, result, out))
    return 0


def _summary(config: TrainConfig, result: TrainResult, out: Path) -> str:
    loss = "not finite" if result.loss is None else f"{result.loss:.4f}"
    skipped = f", {result.skipped_steps} skipped" if result.skipped_steps else ""
    return (
        f"{config.optimizer} on {config.data}: test accuracy {100 * result.accuracy:.2f} %, test loss {loss}\n"
        f"{result.steps:,} steps{skipped}, {result.samples:,} examples in {result.seconds:.1f} s "
        f"({result.images_per_second:,.0f} a second), {result.parameters:,} parameters\n"
        f"run directory: {out}"
    )
