"""The run directory: everything that a training run leaves behind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from conjugo._files import write_aside
from conjugo.errors import CorruptFile
from conjugo.training.checkpoint import Checkpoints
from conjugo.training.config import TrainConfig, TrainResult
from conjugo.training.machine import choose_device, environment
from conjugo.training.metrics import JsonLines, Record, Sink, TensorBoard

__all__ = ["RunDirectory"]

_MAY_DIFFER = ("data_root", "download", "keep", "tensorboard")
"""Settings that a resumed run may have otherwise: they change no number."""


class RunDirectory:
    """A folder with

    - ``config.json``: the configuration, as :meth:`TrainConfig.from_dict` reads it;
    - ``environment.json``: versions, machine, command and git state when the run was last started;
    - ``metrics.jsonl``: one line per evaluation (:data:`conjugo.training.metrics.Record`);
    - ``checkpoints/``: the newest ones (:class:`conjugo.training.checkpoint.Checkpoints`);
    - ``result.json``: a :class:`TrainResult` without the model, when the run has ended;
    - ``tensorboard/``, if wanted.

    Every file is whole at any moment: written aside, synced, renamed.

    Raises FileExistsError if there is a run and *resume* is not set, ValueError if the run there has another
    configuration (the message names the differences), CorruptFile if its configuration cannot be read.
    """

    def __init__(self, folder: Path, config: TrainConfig, *, resume: bool) -> None:
        self.folder = folder
        self._config_path = folder / "config.json"
        self._wants_tensorboard = config.tensorboard
        if self._config_path.exists():
            self._check_resumable(config, resume)
        folder.mkdir(parents=True, exist_ok=True)
        self.checkpoints = Checkpoints(folder / "checkpoints", keep=config.keep)
        self.checkpoints.clean()
        self._write("environment.json", environment(choose_device(config.device)))
        self._write("config.json", config.to_dict())
        self._sinks: list[Sink] = [JsonLines(folder / "metrics.jsonl")]

    def _check_resumable(self, config: TrainConfig, resume: bool) -> None:
        if not resume:
            raise FileExistsError(f"{self.folder} holds a run already: resume it, or choose another folder")
        try:
            saved = TrainConfig.from_dict(json.loads(self._config_path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise CorruptFile(f"{self._config_path} cannot be read: {error}") from error
        names = [item.name for item in fields(config) if item.name not in _MAY_DIFFER]
        differences = [
            f"{name} was {getattr(saved, name)!r}, now {getattr(config, name)!r}"
            for name in names
            if getattr(saved, name) != getattr(config, name)
        ]
        if differences:
            raise ValueError(f"{self.folder} was started with another configuration: {'; '.join(differences)}")

    def restore(self) -> dict[str, Any] | None:
        """The state to go on from; None at the beginning of a run. What was recorded after it is forgotten."""
        state = self.checkpoints.load()
        history: list[Record] = [] if state is None else state["history"]
        if self._wants_tensorboard:
            self._sinks.append(TensorBoard(self.folder / "tensorboard", after=0 if state is None else state["step"]))
        self._sinks[0].write(history)
        return state

    def record(self, history: Sequence[Record]) -> None:
        """Write down the last of all records of the run."""
        for sink in self._sinks:
            sink.write(history)

    def finish(self, result: TrainResult) -> None:
        """Write down the result."""
        self._write("result.json", result.to_dict())

    def _write(self, name: str, content: dict[str, Any]) -> None:
        write_aside(self.folder / name, json.dumps(content, indent=1) + "\n")
