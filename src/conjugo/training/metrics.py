"""What a run shows: records of its evaluations as JSON lines and for TensorBoard, and a progress bar."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from conjugo._files import write_aside

__all__ = ["Display", "JsonLines", "Record", "Sink", "TensorBoard", "read_metrics"]

Record = dict[str, Any]
"""One evaluation: step, epoch (samples through examples in the data), samples, batch_size (in the last step), train_loss, loss,
accuracy, lr, skipped_steps, seconds, images_per_second; with optimizers that have them beta, base_lr and step_size; with
discard_small_loss, where train_loss is over the kept examples, train_loss_all; with noise_scale what
:class:`~conjugo.training.noise_scale.NoiseScaleRecorder` says; what callbacks have measured since the last
one. Losses that are not finite are None."""


class Sink(Protocol):
    """Where records go."""

    def write(self, history: Sequence[Record]) -> None:
        """Take in all records of the run; new since the last call is the last one."""


class JsonLines:
    """All records of the run in one file, one JSON object per line.

    The file is written anew each time (there are few records), so that it is whole at any moment, and a resumed run has
    no step twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, history: Sequence[Record]) -> None:
        """Replace the file; if that fails there is a warning, and the next call tries again."""
        content = "".join(json.dumps(record) + "\n" for record in history)
        try:
            write_aside(self.path, content)
        except OSError as error:
            warnings.warn(f"{self.path} could not be written: {error}", stacklevel=2)


class TensorBoard:
    """Scalars for TensorBoard in *folder*. Raises ImportError, with what to install, where the package is missing."""

    def __init__(self, folder: Path, *, after: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("tensorboard=True needs TensorBoard: pip install 'conjugo[tensorboard]'") from error
        self._writer = SummaryWriter(str(folder), purge_step=after + 1)

    def write(self, history: Sequence[Record]) -> None:
        """Add the last record."""
        for record in history[-1:]:
            for name, value in record.items():
                if value is not None and name != "step":
                    self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()


def read_metrics(path: Path) -> list[Record]:
    """The records in a ``metrics.jsonl``."""
    return [json.loads(line) for line in path.read_text().splitlines()]


class Display:
    """A progress bar on standard error: steps, time left, and what the last evaluation said.

    steps: in all; done: of them, before this session. show: None: if standard error is a terminal.
    """

    def __init__(self, steps: int, *, done: int = 0, show: bool | None = None) -> None:
        self._show = sys.stderr.isatty() if show is None else show
        self._steps = steps
        self._done = done
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if self._show:
            self._start()
        return self

    def _start(self) -> None:
        # Costs more than a tenth of a second to import.
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task("", total=self._steps, completed=self._done, status="")
        self._bar.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def at(self, step: int) -> None:
        """*step* steps are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def evaluated(self, record: Record) -> None:
        """Show what an evaluation gave."""
        if self._bar is not None:
            loss = "not finite" if record["train_loss"] is None else f"{record['train_loss']:.4f}"
            status = f"loss {loss}, accuracy {record['accuracy']:.2%}, {record['images_per_second']:,.0f} images/s"
            if record.get("noise_scale") is not None:
                status += f", noise scale {record['noise_scale']:,.0f}"
            self._bar.update(self._task, status=status)
