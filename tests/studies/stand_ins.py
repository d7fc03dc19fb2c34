"""Stand-ins for training, quick and deterministic, and small comparisons of them; importable by worker processes."""

from __future__ import annotations

import hashlib
import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from conjugo.studies import CompareConfig, CompareResult, compare
from conjugo.studies.records import Outcome, Task
from conjugo.training import TrainConfig


def config(**changes: Any) -> CompareConfig:
    """Two optimizers (one with a second hyperparameter), two batch sizes: 4 cells of 4 trials and 2 seeds on iris."""
    base = CompareConfig(
        train=TrainConfig(data="iris", epochs=2.0),
        optimizers=("momentum", "sgd"),
        batch_sizes=(16, "full"),
        trials=4,
        seeds=2,
        evaluations=5,
    )
    return replace(base, **changes)


def pretend(config: CompareConfig, task: Task) -> Outcome:
    """An accuracy that has its optimum at a learning rate that depends on optimizer and batch, and some noise."""
    optimum = 0.1 * len(task.contender) / 4 * math.sqrt(task.batch_size / 16)
    noise = int(hashlib.sha256(f"{task.contender} {task.batch_size} {task.seed}".encode()).hexdigest(), 16) % 1000 / 1e5
    accuracy = max(0.1, 0.95 - 0.1 * math.log10(task.lr / optimum) ** 2 - noise)
    steps = max(1, round(240 / task.batch_size))
    curve = tuple((round(steps * k / 5), accuracy * k / 5) for k in range(1, 6))
    return Outcome(
        steps=steps,
        samples=steps * task.batch_size,
        accuracy=accuracy,
        loss=1 - accuracy,
        diverged=task.lr > 8,
        seconds=0.01,
        curve=curve,
    )


def pretend_slowly(config: CompareConfig, task: Task) -> Outcome:
    """As *pretend*, in time for somebody to interrupt; leaves the worker's process id in the folder CONJUGO_TEST_PIDS."""
    (Path(os.environ["CONJUGO_TEST_PIDS"]) / str(os.getpid())).touch()
    time.sleep(0.2)
    return pretend(config, task)


def pretend_and_die_once(config: CompareConfig, task: Task) -> Outcome:
    """As *pretend*, but the first worker to come to one of the trials is killed in the middle of it."""
    flag = Path(os.environ["CONJUGO_TEST_PIDS"]) / "died"
    if task.index == 2 and task.contender == "sgd" and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return pretend(config, task)


def sum_of_ranks(pids: Path, task: Task) -> Outcome:
    """A run whose accuracy is the sum of the ranks; rank 1 fails as the contender's name says.

    Leaves the process id in folder *pids*.
    """
    (pids / str(os.getpid())).touch()
    total = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(total)  # now all have left their process id
    if dist.get_rank() == 1 and task.contender == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if dist.get_rank() == 1 and task.contender == "raises":
        raise OSError("no luck")
    dist.barrier()
    return replace(pretend(config(), task), accuracy=total.item())


def result(**changes: Any) -> CompareResult:
    """A finished comparison of pretended runs."""
    return compare(config(**changes), run=pretend)
