"""What `import conjugo` adds to `import torch`, in fresh processes taking turns."""

from __future__ import annotations

import statistics
import subprocess
import sys

from benchmarks._timing import interleave, show


def main() -> None:
    """Print the table."""
    codes = {
        "torch": "import torch",
        "conjugo": "import torch, conjugo",
        "conjugo.optim": "import torch, conjugo.optim",
    }
    cases = {
        name: lambda code=code: subprocess.run([sys.executable, "-c", code], check=True) for name, code in codes.items()
    }
    seconds = interleave(cases, rounds=7, warmup=1)
    rows = []
    for name, values in seconds.items():
        beyond = statistics.median(a - b for a, b in zip(values, seconds["torch"], strict=True))
        rows.append([f"import {name}", f"{statistics.median(values):.2f}", f"{beyond:+.2f}"])
    show("Import time", ("", "s", "s beyond torch"), rows)


if __name__ == "__main__":
    main()
