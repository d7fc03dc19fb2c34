"""What is done between the steps of a training run, such as measuring something."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conjugo.training.trainer import Trainer

__all__ = ["Callback"]

Callback = Callable[["Trainer"], Mapping[str, Any] | None]
"""Called with the trainer before the first step (``trainer.step`` is 0 then) and after each step, on all workers.

What it gives, plain numbers by name or None, joins the record of the next evaluation. It may look at everything, and
communicate, and must change nothing that the run depends on: parameters, buffers, random state. What takes long belongs inside
``trainer.clock.paused()``; files go into ``trainer.folder``, from rank 0 and if that is not None. A resumed run calls it again
for the steps after the checkpoint only.
"""
