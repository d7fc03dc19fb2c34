"""The run directory: everything that a training run leaves behind."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from conjugo._files import write_aside
from conjugo.distributed import Checkpointer
from conjugo.errors import CorruptFile
from conjugo.training.config import TrainConfig, TrainResult
from conjugo.training.machine import choose_device, environment
from conjugo.training.metrics import JsonLines, Record, Sink, TensorBoard
from conjugo.training.workers import Workers

__all__ = ["RunDirectory"]

_MAY_DIFFER = (
    *("data_root", "download", "keep", "asynchronous", "tensorboard"),
    *("micro_batch", "parallel", "shard_workers", "shard_state", "replica_check"),
    *("spectra", "spectrum_at", "spectrum_steps", "spectrum_probes", "spectrum_examples", "spectrum_bn_mode"),
)
"""Settings that a resumed run may have otherwise: they change no number, or only its last digits."""


class RunDirectory:
    """A folder with

    - ``config.json``: the configuration, as :meth:`TrainConfig.from_dict` reads it;
    - ``environment.json``: versions, machine, command and git state when the run was last started;
    - ``metrics.jsonl``: one line per evaluation (:data:`conjugo.training.metrics.Record`);
    - ``spectra/step-<step>.json``, if wanted (:class:`~conjugo.training.spectrum.SpectrumRecorder`);
    - ``checkpoints/``: the newest ones (:class:`~conjugo.distributed.Checkpointer`);
    - ``result.json``: a :class:`TrainResult` without the model, when the run has ended;
    - ``tensorboard/``, if wanted.

    Every file is whole at any moment: written aside, synced, renamed. Of several workers, which must all see the folder, rank
    0 writes everything but the checkpoints. All methods but :meth:`record` are collective, and so is the constructor.

    Workers that an elastic agent (torchrun, conjugo launch) starts anew, because one failed or a host came or went, resume also
    where *resume* is not set.

    Raises FileExistsError if there is a run otherwise, ValueError if the run there has another
    configuration (the message names the differences), CorruptFile if its configuration cannot be read.
    """

    def __init__(self, folder: Path, config: TrainConfig, *, resume: bool) -> None:
        self.folder = folder
        self._config_path = folder / "config.json"
        self._workers = Workers()
        self._sinks: list[Sink] = []
        launchers = self._workers.launchers()
        self._workers.on_first(lambda: self._open(config, resume, launchers))
        self.checkpoints = Checkpointer(folder / "checkpoints", keep=config.keep, asynchronous=config.asynchronous)

    def _open(self, config: TrainConfig, resume: bool, launchers: list[str]) -> None:
        if self._config_path.exists():
            self._check_resumable(config, resume or self._was_started_by(launchers))
        self.folder.mkdir(parents=True, exist_ok=True)
        found = environment(choose_device(config.device))
        self._write("environment.json", {**found, "workers": self._workers.size, "launchers": launchers})
        self._write("config.json", config.to_dict())

    def _was_started_by(self, launchers: list[str]) -> bool:
        try:
            before = json.loads((self.folder / "environment.json").read_bytes())["launchers"]
        except (OSError, ValueError, KeyError):
            return False
        return not set(before).isdisjoint(launchers)

    def _check_resumable(self, config: TrainConfig, resume: bool) -> None:
        if not resume:
            raise FileExistsError(f"{self.folder} holds a run already: resume it, or choose another folder")
        try:
            saved = TrainConfig.from_dict(json.loads(self._config_path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise CorruptFile(f"{self._config_path} cannot be read: {error}") from error
        may_differ = _MAY_DIFFER if config.batch_growth else (*_MAY_DIFFER, "noise_scale")
        names = [item.name for item in fields(config) if item.name not in may_differ]
        differences = [
            f"{name} was {getattr(saved, name)!r}, now {getattr(config, name)!r}"
            for name in names
            if getattr(saved, name) != getattr(config, name)
        ]
        if differences:
            raise ValueError(f"{self.folder} was started with another configuration: {'; '.join(differences)}")

    def restore(self, parts: Mapping[str, Any]) -> bool:
        """Load the newest good checkpoint into *parts*; False, and nothing changes, at the beginning of a run."""
        return self.checkpoints.load_latest(**parts) is not None

    def show(self, config: TrainConfig, history: Sequence[Record]) -> None:
        """Begin to write metrics: first the records of the run so far; what was recorded after them is forgotten."""
        self._workers.on_first(lambda: self._open_sinks(config, history))

    def _open_sinks(self, config: TrainConfig, history: Sequence[Record]) -> None:
        self._sinks = [JsonLines(self.folder / "metrics.jsonl")]
        self._sinks[0].write(history)
        if config.tensorboard:
            self._sinks.append(TensorBoard(self.folder / "tensorboard", after=history[-1]["step"] if history else 0))

    def record(self, history: Sequence[Record]) -> None:
        """Write down the last of all records of the run."""
        for sink in self._sinks:
            sink.write(history)

    def finish(self, result: TrainResult) -> None:
        """Write down the result, when the last checkpoint is there."""
        self.checkpoints.wait()
        self._workers.on_first(lambda: self._write("result.json", result.to_dict()))

    def _write(self, name: str, content: dict[str, Any]) -> None:
        write_aside(self.folder / name, json.dumps(content, indent=1) + "\n")
