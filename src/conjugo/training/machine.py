"""What a run needs of the machine: a device, threads, random numbers, time, and what to write down about it."""

from __future__ import annotations

import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import torch

from conjugo._version import __version__
from conjugo.errors import check
from conjugo.training.config import TrainConfig

__all__ = ["Clock", "choose_device", "environment", "held_signals", "interrupt", "isolated", "pays_bfloat16"]


def choose_device(name: str) -> torch.device:
    """The device called *name*; ``"auto"`` is the GPU if there is one. Raises ValueError if there is no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    accepted = "'auto', or a device that torch can use here, such as 'cpu', 'cuda' or 'cuda:1'"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        check(False, "TrainConfig", "device", name, f"{accepted} ({str(error).splitlines()[0]})")
    return device


def pays_bfloat16(device: torch.device) -> bool:
    """Whether *device* computes convolutions faster in bfloat16 than in float32: it has units for it.

    On a CPU with avx512_bf16 autocast together with channels_last made steps of ResNet-8 3.2 times as fast, those of
    ResNet-20 2.4 times, but those of a 128-128 perceptron slower at batch 128.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())


@contextmanager
def isolated(config: TrainConfig) -> Iterator[None]:
    """Settings of torch that make equal configurations equal runs; afterwards they are what they were."""
    device = choose_device(config.device)
    threads, deterministic = torch.get_num_threads(), torch.backends.cudnn.deterministic
    on_gpu = device.type == "cuda"
    with torch.cuda.device(device) if on_gpu else nullcontext(), torch.random.fork_rng([device] if on_gpu else []):
        try:
            torch.set_num_threads(config.threads or threads)
            torch.backends.cudnn.deterministic = True
            yield
        finally:
            torch.set_num_threads(threads)
            torch.backends.cudnn.deterministic = deterministic


class Clock:
    """Seconds spent inside ``with clock.running():`` without those inside ``with clock.paused():``.

    It waits for the device wherever it starts or stops, so that the work queued there counts where it belongs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._since: float | None = None
        self._total = 0.0

    @property
    def seconds(self) -> float:
        """Until now."""
        return self._total + (0.0 if self._since is None else time.perf_counter() - self._since)

    @seconds.setter
    def seconds(self, value: float) -> None:
        self._total = value

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what is done inside."""
        self._start()
        try:
            yield
        finally:
            self._stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count what is done inside."""
        was_running = self._since is not None
        self._stop()
        try:
            yield
        finally:
            if was_running:
                self._start()

    def _start(self) -> None:
        self._wait()
        self._since = time.perf_counter()

    def _stop(self) -> None:
        self._wait()
        self._total, self._since = self.seconds, None

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


@contextmanager
def held_signals() -> Iterator[Callable[[], int]]:
    """Inside, the first Ctrl-C or SIGTERM is only noted: the function that is given returns its number, before that 0.

    A second one interrupts at once. In other threads than the main one, where Python delivers no signals, nothing is held.
    """
    asked = 0

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            interrupt(signum)
        asked = signum

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    previous = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def interrupt(signum: int) -> NoReturn:
    """End as the signal wants it: KeyboardInterrupt for Ctrl-C, else SystemExit with a shell's exit code, 128 + *signum*."""
    if signum == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + signum)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, machine and the state of the git repository in the working directory, ready for JSON."""
    return {
        "conjugo": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "command": sys.argv,
        "git": {"commit": _git("rev-parse", "HEAD"), "changed": _git("status", "--porcelain")},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git(*arguments: str) -> str | None:
    """What git says, or None outside a repository and where there is no git."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.rstrip()
