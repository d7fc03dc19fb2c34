"""Run all benchmarks, or those that are named: `python -m benchmarks optimizers imports`."""

from __future__ import annotations

import importlib
import pkgutil
import platform
import sys

import torch

import benchmarks
from conjugo.errors import unknown


def main(names: list[str]) -> None:
    """Run the benchmarks called *names*, or all."""
    known = sorted(
        module.name for module in pkgutil.iter_modules(benchmarks.__path__) if not module.name.startswith("_")
    )
    for name in names:
        if name not in known:
            unknown("benchmark", name, known)
    print(
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)"
    )
    for name in names or known:
        importlib.import_module(f"benchmarks.{name}").main()


if __name__ == "__main__":
    main(sys.argv[1:])
