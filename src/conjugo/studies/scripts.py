"""Functions of users' scripts, which give a model, or (model, loss_fn, data)."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conjugo.errors import unknown

__all__ = ["function_of", "split_target"]


def split_target(target: str) -> tuple[Path, str] | None:
    """Script and function of ``script.py:function``; ``build`` where no function is named. None: it names no script."""
    script, colon, function = target.rpartition(":")
    if target.endswith(".py"):
        return Path(target), "build"
    return (Path(script), function) if colon and script.endswith(".py") else None


def function_of(script: Path, name: str) -> Callable[[], Any]:
    """The function *name* of *script*, which is executed. Raises FileNotFoundError, UnknownName, and what the script raises."""
    if not script.is_file():
        raise FileNotFoundError(f"there is no script {script}")
    specification = importlib.util.spec_from_file_location(f"conjugo_script_{script.stem}", script)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # where pickle and dataclasses look for it
    folder = str(script.parent.resolve())
    if folder not in sys.path:  # as Python does for a script; functions may import later
        sys.path.insert(0, folder)
    specification.loader.exec_module(module)
    functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    if not callable(getattr(module, name, None)):
        unknown(f"function in {script}", name, functions)
    found: Callable[[], Any] = getattr(module, name)
    return found
