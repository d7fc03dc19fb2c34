"""What a machine has for training: versions, devices, memory bandwidth, compiled kernels, extras; and advice."""

from __future__ import annotations

import importlib.util
import os
import platform
import socket
import statistics
import subprocess
import sys
from dataclasses import dataclass

import torch

from conjugo.training.machine import Clock, choose_device, environment, pays_bfloat16

__all__ = ["Diagnosis", "all_reduce_test", "diagnose"]

_EXTRAS = {
    "study": ("optuna", "matplotlib", "scipy"),
    "data": ("pyarrow", "PIL"),
    "vision": ("PIL",),
    "tensorboard": ("tensorboard",),
}

_GOOD = "work together"

_WORKER = """
import sys, time
import torch, torch.distributed as dist
from conjugo.distributed import init, shutdown
env = init(timeout=float(sys.argv[2]), device=sys.argv[1])
value = torch.ones(1, device=env.device)
dist.all_reduce(value)
began = time.perf_counter()
for _ in range(20):
    dist.all_reduce(value)
assert value.item() == 2.0 ** 21, value
print(1e3 * (time.perf_counter() - began) / 20)
shutdown()
"""


@dataclass(frozen=True)
class Diagnosis:
    """findings: what was found, by name. advice: sentences; none means that all is well."""

    findings: dict[str, str]
    advice: tuple[str, ...]


def diagnose() -> Diagnosis:
    """Look at this machine. Takes some seconds: the memory bandwidth is measured, and two processes talk to each other."""
    from conjugo.optim._fused import kernels

    device = choose_device("auto")
    seen = environment(device)
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    workers = all_reduce_test()
    missing = {extra: absent for extra, modules in _EXTRAS.items() if (absent := _absent(modules))}
    findings = {
        "conjugo": seen["conjugo"],
        "torch": seen["torch"],
        "python": f"{seen['python']} on {seen['platform']}",
        "processor": f"{seen['processor']}, {_count(cores, 'core')}",
        "threads of torch": str(threads),
        "CPU features": torch.backends.cpu.get_cpu_capability(),
        "memory": _memory(),
        "memory bandwidth": f"{copy_bandwidth(torch.device('cpu')):.1f} GB/s (copying float32, {_count(threads, 'thread')})",
        "device": _described(device, seen["device"]),
        "bfloat16 units": "yes" if pays_bfloat16(device) else "no",
        "CPU kernels": "compiled" if kernels is not None else "not compiled",
        "torch.distributed": _backends(),
        "two workers": workers,
        "extras": ", ".join(f"{extra}: {'missing' if extra in missing else 'there'}" for extra in _EXTRAS),
    }
    return Diagnosis(findings, tuple(_advice(device, cores, threads, kernels is not None, missing, workers)))


def copy_bandwidth(device: torch.device, values: int = 16_000_000, repeats: int = 7) -> float:
    """Memory traffic in GB/s (10^9 bytes) while *values* float32 numbers are copied on *device*; the median of *repeats*."""
    source, target = torch.ones(values, device=device), torch.empty(values, device=device)
    target.copy_(source)
    seconds = []
    for _ in range(repeats):
        clock = Clock(device)
        with clock.running():
            target.copy_(source)
        seconds.append(clock.seconds)
    return 2 * source.nbytes / statistics.median(seconds) / 1e9


def all_reduce_test(timeout: float = 60.0) -> str:
    """Start two workers on this machine and let them add up a number: how long they took, or what went wrong.

    On two GPUs if there are so many, else on the CPU. timeout: seconds until they are given up.
    """
    import torch.distributed as dist

    if not dist.is_available():
        return "not tried: torch.distributed is not available"
    kind = "cuda" if torch.cuda.device_count() > 1 else "cpu"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, kind, str(timeout / 2)],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=timeout) for process in processes]
    except subprocess.TimeoutExpired:
        return f"no answer within {timeout:g} s"
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for (_, complained), process in zip(said, processes):
        if process.returncode:
            lines = complained.strip().splitlines()
            return f"failed: {lines[-1] if lines else f'exit code {process.returncode}'}"
    milliseconds = max(float(answer) for answer, _ in said)
    return f"{_GOOD} on {'two GPUs' if kind == 'cuda' else 'the CPU'} ({milliseconds:.2f} ms for a sum over both)"


def _described(device: torch.device, name: str) -> str:
    if device.type != "cuda":
        return name
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    return (
        f"{torch.cuda.device_count()} x {name}, {memory:.1f} GiB, {copy_bandwidth(device):.0f} GB/s (copying float32)"
    )


def _absent(modules: tuple[str, ...]) -> list[str]:
    return [module for module in modules if importlib.util.find_spec(module) is None]


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _memory() -> str:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on every system
        return "unknown"
    return f"{total / 2**30:.1f} GiB"


def _backends() -> str:
    import torch.distributed as dist

    if not dist.is_available():
        return "not available"
    named = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available, "mpi": dist.is_mpi_available}
    return ", ".join(name for name, there in named.items() if there()) or "no backend"


def _advice(
    device: torch.device, cores: int, threads: int, compiled: bool, missing: dict[str, list[str]], workers: str
) -> list[str]:
    advice = []
    if not compiled:
        advice.append(
            "The CPU kernels are not compiled: NLCG takes its slower PyTorch path on a CPU. Install a C compiler and the "
            "Python headers, then reinstall conjugo."
        )
    if not workers.startswith(_GOOD):
        advice.append(
            "Two processes on this machine cannot talk to each other, so training with several workers will not work. Look at "
            "the message above; a firewall, or an interface that GLOO_SOCKET_IFNAME should not name, is the usual reason."
        )
    if device.type == "cpu" and cores > 1:
        advice.append(f"{cores} cores: `conjugo compare --jobs {cores}` trains {cores} models at once, a thread each.")
    if threads > cores:
        advice.append(f"torch uses {threads} threads on {cores} cores: set OMP_NUM_THREADS={cores}.")
    for extra, modules in missing.items():
        advice.append(f"For {', '.join(modules)}: pip install 'conjugo[{extra}]'")
    if platform.system() == "Windows":
        advice.append("On Windows the package is not tested.")
    return advice
