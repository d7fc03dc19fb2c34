"""How long a checkpoint keeps training waiting: Checkpointer beside torch.distributed.checkpoint, two processes."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from benchmarks._processes import run
from benchmarks._timing import ratio, show
from conjugo.distributed import Checkpointer
from conjugo.optim import NLCG

ROUNDS = 12
PEER = "torch.distributed.checkpoint, save"
CASES = (PEER, "Checkpointer", "torch.distributed.checkpoint, async_save", "Checkpointer, asynchronous")


def main() -> None:
    """Print the table."""
    seconds, whole, size = run(2, _measure)
    rows = []
    for name in CASES:
        middle, low, high = ratio(seconds[name], seconds[PEER])
        ms = [f"{1e3 * statistics.median(times[name]):.0f}" for times in (seconds, whole)]
        rows.append([name, *ms, f"{middle:.2f}", f"{low:.2f} - {high:.2f}"])
    columns = ("", "ms waiting", "ms until it is there", "ratio of waiting", "quartiles")
    caption = "Checkpointer also computes the SHA-256 of all files, syncs the folders and publishes atomically"
    show(f"{size / 2**20:.0f} MiB of model and optimizer, 2 processes", columns, rows, caption)


def _measure() -> tuple[dict[str, list[float]], dict[str, list[float]], int]:
    model = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(10)])
    optimizer = NLCG(model.parameters(), precond="bfgs")
    folder = [tempfile.mkdtemp(prefix="benchmark-") if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    root = Path(folder[0])
    state = {"model": model.state_dict(), **{f"{i}": s for i, s in enumerate(optimizer.state.values())}}
    ours = {name: Checkpointer(root / name, keep=1, asynchronous="async" in name) for name in CASES if "Check" in name}
    step = 0

    def theirs() -> Callable[[], object]:
        dcp.save(state, checkpoint_id=root / f"dcp-{step}")
        return lambda: None

    def theirs_in_the_background() -> Callable[[], object]:
        pending = dcp.async_save(state, checkpoint_id=root / f"async-{step}")
        return pending.result  # type: ignore[union-attr]

    def own(checkpoints: Checkpointer) -> Callable[[], object]:
        checkpoints.save(step, model=model, optimizer=optimizer)
        return checkpoints.wait

    calls: dict[str, Callable[[], Callable[[], object]]] = {
        CASES[0]: theirs,
        CASES[1]: lambda: own(ours[CASES[1]]),
        CASES[2]: theirs_in_the_background,
        CASES[3]: lambda: own(ours[CASES[3]]),
    }
    waiting: dict[str, list[float]] = {name: [] for name in CASES}
    whole: dict[str, list[float]] = {name: [] for name in CASES}
    for turn in range(2 + ROUNDS):
        step += 1
        for name, call in calls.items():
            dist.barrier()
            start = time.perf_counter()
            finish = call()
            called = time.perf_counter()
            finish()
            dist.barrier()
            if turn >= 2:
                waiting[name].append(called - start)
                whole[name].append(time.perf_counter() - start)
            if dist.get_rank() == 0:
                for path in (root / f"dcp-{step}", root / f"async-{step}"):
                    shutil.rmtree(path, ignore_errors=True)
    size = sum(t.nbytes for t in [*model.parameters(), *(t for s in optimizer.state.values() for t in s.values())])
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(root)
    return waiting, whole, size
