"""From the death of a worker to the next step: how long, and where the time goes."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from benchmarks._timing import show

KILLS = 5
PARTS = ("noticed, new process", "imports", "joining", "loading", "first step")


def main() -> None:
    """Print the table."""
    first: list[list[float]] = []
    recovered: list[list[float]] = []
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        command = [sys.executable, "-m", "conjugo", "launch", "--nproc", "2", "--max-restarts", str(KILLS)]
        begun = time.time()
        program = Path(__file__).with_name("_victim.py")
        process = subprocess.Popen([*command, str(program), name], stderr=subprocess.DEVNULL)
        last = begun
        for attempt in range(KILLS + 1):
            report = folder / f"attempt-{attempt}"
            while not report.exists() or len(report.read_text().split()) < len(PARTS):
                time.sleep(0.02)
                if process.poll() is not None:
                    raise SystemExit("the job ended")
            times = [last, *map(float, report.read_text().split())]
            (recovered if attempt else first).append([b - a for a, b in pairwise(times)])
            if attempt < KILLS:
                time.sleep(0.3)
                pid = int((folder / "pid-1").read_text().split()[0])
                last = time.time()
                os.kill(pid, signal.SIGKILL)
        process.terminate()
        process.wait()
    middle = [statistics.median(times) for times in zip(*recovered, strict=True)]
    totals = [sum(times) for times in recovered]
    rows = [[part, f"{a:.2f}", f"{b:.2f}"] for part, a, b in zip(PARTS, first[0], middle, strict=True)]
    rows.append(["all", f"{sum(first[0]):.2f}", f"{statistics.median(totals):.2f}"])
    ratio = statistics.median(totals) / sum(first[0])
    show(
        f"A worker of two is killed, {KILLS} times",
        ("seconds", "start", "recovery"),
        rows,
        f"recovery takes {ratio:.2f} times a start; {min(totals):.2f} to {max(totals):.2f} s",
    )
