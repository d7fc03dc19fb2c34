"""A worker that a command has started, one of several on this machine: ``python -m conjugo.cli._worker train ...``.

The elastic agent starts all workers anew when one fails, which is right after a crash and no use where the call was wrong, the
training diverged or a file is damaged. So a worker whose command has ended in an orderly way
leaves its exit code in a file and ends with 0. What ranks other than 0 have to say is shown only where it is news.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

__all__ = ["LOST", "run_workers"]

LOST = 75  # EX_TEMPFAIL
"""Exit code of a worker where starting all anew from the last checkpoint may help: others are gone, or memory was damaged."""

_OUTCOME = "CONJUGO_OUTCOME"
_PATIENCE = 2.0  # seconds to wait for rank 0


def run_workers(argv: Sequence[str], *, workers: int | Literal["auto"]) -> int:
    """Run ``conjugo`` *argv* as *workers* processes on this machine; gives the exit code, that of rank 0."""
    from conjugo.distributed.launch import launch

    with tempfile.TemporaryDirectory(prefix="conjugo-") as folder:
        outcome = Path(folder) / "outcome"
        code = launch(["-m", __name__, *argv], workers=workers, env={_OUTCOME: str(outcome)})
        return int(outcome.read_text()) if outcome.exists() and code in (0, 130, 143) else code


def _main(argv: Sequence[str]) -> int:
    from conjugo._files import write_aside
    from conjugo.cli import main

    outcome = Path(os.environ[_OUTCOME])
    if os.environ["RANK"] == "0":
        outcome.unlink(missing_ok=True)
        code = main(argv)
        if code == LOST:
            return code
        write_aside(outcome, str(code))
        return 0
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            code = main(argv)
    except BaseException:
        sys.stderr.write(said.getvalue())
        raise
    until = time.monotonic() + (0 if code == LOST else _PATIENCE)
    while code and not outcome.exists() and time.monotonic() < until:
        time.sleep(0.05)
    if code == LOST or (code and not (outcome.exists() and outcome.read_text() == str(code))):
        sys.stderr.write(said.getvalue())
        return code
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
