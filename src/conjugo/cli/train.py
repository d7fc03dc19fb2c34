"""``conjugo train``."""

from __future__ import annotations

import os
import shlex
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from conjugo.cli._arguments import Switch, as_yaml, merge_file, option, parse
from conjugo.cli._worker import LOST, run_workers
from conjugo.distributed import init, reported_errors, shutdown, where
from conjugo.errors import ReplicasDiffer, TrainingDiverged, check
from conjugo.training import TrainConfig, TrainResult, train
from conjugo.training.workers import Workers

__all__ = ["run"]

_BROKEN = ("gloo", "NCCL", "Connection reset", "Connection closed", "Broken pipe", "Timed out")
"""What errors of collectives say when another worker is gone."""


@dataclass(frozen=True)
class Arguments:
    """Train a model and leave everything in a run directory: configuration, metrics, checkpoints, result.

    Args:
        train: the run.
        workers: Worker processes to start on this machine, or auto: one per GPU, or per core where there is none. Under a
            launcher (torchrun, conjugo launch, srun) that has started the workers it means nothing.
        out: Run directory; by default a new one in ./runs.
        resume: Go on where the run in --out stands.
        config: File (YAML, JSON or TOML) with settings; other arguments override it.
        print_config: Print the whole configuration as YAML, and stop.
    """

    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    workers: int | Literal["auto"] = 1
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
    check(
        arguments.workers == "auto" or arguments.workers >= 1, "train", "--workers", arguments.workers, ">= 1 or auto"
    )
    if arguments.workers != 1 and not {"RANK", "SLURM_PROCID"} & os.environ.keys():
        return _start_workers(argv, arguments)
    return _work(argv, arguments)


def _start_workers(argv: Sequence[str], arguments: Arguments) -> int:
    """Make the folder's name, and complain, once for all workers."""
    out = arguments.out or _new_folder(arguments.train)
    if not arguments.resume and (out / "config.json").exists():
        raise FileExistsError(f"{out} holds a run already: resume it, or choose another folder")
    words = [*argv, *([] if arguments.out else ["--out", str(out)])]
    return run_workers(["train", *words], workers=arguments.workers)


def _work(argv: Sequence[str], arguments: Arguments) -> int:
    """Train, alone or as one of several workers."""
    config = arguments.train
    kind = config.device.partition(":")[0]
    init(device=kind if kind in ("cpu", "cuda") else None)
    workers = Workers()
    if not workers.first:
        warnings.simplefilter("ignore")  # rank 0 says it
    out = arguments.out or workers.on_first(lambda: _new_folder(config))
    try:
        with reported_errors():
            result = train(config, out=out, resume=arguments.resume)
    except (KeyboardInterrupt, SystemExit) as stop:
        shutdown()
        if workers.first:
            words = [word for word in argv if word != "--resume"]
            words += [] if arguments.out else ["--out", str(out)]
            print(f"\ninterrupted; to go on: conjugo train {shlex.join([*words, '--resume'])}", file=sys.stderr)
        return 130 if isinstance(stop, KeyboardInterrupt) else int(stop.code or 0)
    except TrainingDiverged:  # on all workers alike
        shutdown()
        if workers.first:
            raise
        return 1
    except ReplicasDiffer as error:  # on all workers alike; the last checkpoint is from before that
        shutdown()
        if workers.first:
            print(f"conjugo: error: {error}", file=sys.stderr)
        return LOST
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _BROKEN):
            raise
        print(f"conjugo: {where()} lost the others: {str(error).splitlines()[0]}", file=sys.stderr)
        return LOST
    shutdown()
    if workers.first:
        print(_summary(config, result, out, workers.size))
    return 0


def _new_folder(config: TrainConfig) -> Path:
    return Path("runs") / f"{config.data}-{config.optimizer}-{time.strftime('%Y%m%d-%H%M%S')}"


def _summary(config: TrainConfig, result: TrainResult, out: Path, workers: int) -> str:
    loss = "not finite" if result.loss is None else f"{result.loss:.4f}"
    skipped = f", {result.skipped_steps} skipped" if result.skipped_steps else ""
    several = f" on {workers} workers" if workers > 1 else ""
    return (
        f"{config.optimizer} on {config.data}: test accuracy {100 * result.accuracy:.2f} %, test loss {loss}\n"
        f"{result.steps:,} steps{skipped}, {result.samples:,} examples in {result.seconds:.1f} s "
        f"({result.images_per_second:,.0f} a second){several}, {result.parameters:,} parameters\n"
        f"run directory: {out}"
    )
