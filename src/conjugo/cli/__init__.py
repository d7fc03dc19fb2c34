"""The command ``conjugo``: one module per command, each with ``run(argv)``; :func:`main` turns exceptions into messages.

Exit codes: 0 all is well; 1 it failed (diverged, damaged file, data not there); 2 the call is wrong; 75 other workers are gone,
or one's memory is damaged: to be started anew; 130 interrupted by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import torch

from conjugo._version import __version__
from conjugo.errors import CorruptFile, DataUnavailable, TrainingDiverged, UnknownName, unknown

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "train": "train a model, in a run directory that can be resumed",
    "launch": "start a program as several workers, on one host or several",
    "spectrum": "how the eigenvalues of a model's Hessian are distributed: picture, numbers",
    "bngd": "gradient descent with batch norm: maps on least squares, data, layers of a model",
    "advise": "how large the batch may be, with which learning rate, and how much sooner training ends",
    "compare": "compare optimizers over batch sizes: tuning, fresh seeds, table, HTML report",
    "report": "make the report of a training run, or table, plots and report of a comparison again",
    "reproduce": "set a paper's headline result beside what comes out here",
    "data": "fetch, verify or describe a data set",
    "ckpt": "list, verify, prune or export checkpoints",
    "doctor": "what this machine has for training, and what is missing",
}

_DEBUG = "CONJUGO_DEBUG"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line *argv* (default: that of the process) and give its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or bool(os.environ.get(_DEBUG))
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except SystemExit as error:  # the parser's own: help (0) or a wrong call (2)
        return error.code if isinstance(error.code, int) else 2
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough; do not fail once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (CorruptFile, DataUnavailable, TrainingDiverged, ImportError, OSError, ValueError) as error:
        if debug:
            raise
        where = "".join(f" {note}" for note in getattr(error, "__notes__", []))  # rank and host, of several workers
        _say(f"error: {error}{where}")
        wrong_call = isinstance(error, ValueError | FileExistsError | NotADirectoryError)
        return 2 if wrong_call else 1
    except (MemoryError, torch.OutOfMemoryError) as error:
        if debug:
            raise
        _say(f"error: out of memory ({error}); a --micro-batch sends fewer examples through the model at once")
        return 1


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    command, *rest = arguments
    if command == "--version":
        print(f"conjugo {__version__}")
        return 0
    if command not in COMMANDS:
        try:
            unknown("command", command, COMMANDS)
        except UnknownName as error:
            raise UnknownName(f"{error} (conjugo --help)") from None
    module = importlib.import_module(f"conjugo.cli.{command}")
    code: int = module.run(rest)
    return code


def _overview() -> str:
    width = max(map(len, COMMANDS)) + 2
    commands = "\n".join(f"  {name:{width}}{text}" for name, text in COMMANDS.items())
    return (
        "usage: conjugo COMMAND [options]\n\n"
        "Train PyTorch models on very large batches, and find out how far a batch can be scaled, and with what.\n\n"
        f"commands:\n{commands}\n\n"
        "conjugo COMMAND --help explains a command; conjugo --version; --debug shows tracebacks.\n"
        "To begin with: conjugo compare --preset demo --jobs 2"
    )


def _say(message: str) -> None:
    print(f"conjugo: {message}", file=sys.stderr)
