"""Checkpoints that survive killed workers, full disks, flipped bits and a changed number of workers.

Tensors are stored by :mod:`torch.distributed.checkpoint`, which cuts them anew when they are loaded on other workers; all other
state in one small file. How a step becomes visible only when it is whole is in :mod:`conjugo.distributed._manifest`.
"""

from __future__ import annotations

import datetime
import functools
import io
import os
import pickle
import random
import secrets
import shutil
import socket
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from conjugo._files import sync_folder, write_aside
from conjugo._space import from_local, is_dtensor, to_local
from conjugo._version import __version__
from conjugo.distributed import _manifest
from conjugo.errors import CorruptFile, check

__all__ = ["Checkpointer", "PerRank", "RandomState", "export_step", "export_weights"]

PLAIN = "plain.pt"
"""The file with everything but tensors."""

_TENSOR = "__tensor__"
_TIMEOUT = datetime.timedelta(minutes=30)  # for disks that are slow on some hosts; a dead peer is noticed at once


class PerRank:
    """State that belongs to one rank, such as random numbers: each rank stores its own.

    It is restored where as many ranks load as have saved; otherwise it stays as it is. *value* has ``state_dict`` and
    ``load_state_dict``; its state must consist of tensors on this process's devices and plain values.
    """

    def __init__(self, value: Any) -> None:
        self.value = value


class RandomState:
    """The global random numbers of this process: Python's, NumPy's, PyTorch's on the CPU and on the current GPU."""

    def state_dict(self) -> dict[str, Any]:
        """All four states."""
        kind, keys, *rest = np.random.get_state(legacy=True)  # type: ignore[misc]  # noqa: NPY002
        return {
            "python": random.getstate(),
            "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if _on_gpu() else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        version, internal, gauss = state_dict["python"]
        random.setstate((version, tuple(internal), gauss))
        kind, keys, *rest = state_dict["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
        torch.set_rng_state(state_dict["torch"].cpu())
        if state_dict["cuda"] is not None and _on_gpu():
            torch.cuda.set_rng_state(state_dict["cuda"].cpu())


def _on_gpu() -> bool:
    """Whether this process uses a GPU; asking for its random numbers would make it use one."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


class Checkpointer:
    """The checkpoints of one job in the folder *root*: ``step-<step>/``, of which the newest *keep* stay.

    All ranks call all methods that say *collective*; *root* must be the same folder for all of them, on a file system that
    all hosts share. What is given to :meth:`save` and the ``load`` methods by name is one of

    * a module: DDP and ``torch.compile`` wrappers do not count, so DDP, FSDP2 and one process read each other's checkpoints;
    * an optimizer: its state is stored by the names of the parameters, if their module is saved or loaded with it;
    * anything else with ``state_dict`` and ``load_state_dict``, whose state is tensors and plain values, the same on all ranks
      but for DTensors;
    * a dict of such values, which loading changes in place;
    * :class:`PerRank` of such a thing.

    root: the folder; made when first needed. keep: at least 1. asynchronous: :meth:`save` only copies the state to CPU
    memory, which it keeps for the next time, and a thread writes it while training goes on; one at a time. process_group: the
    ranks; None: all, if torch.distributed is initialised. Making a Checkpointer is collective, and deletes what killed
    processes have left half written in *root*.

    >>> import tempfile
    >>> model = torch.nn.Linear(2, 1)
    >>> checkpoints = Checkpointer(tempfile.mkdtemp())
    >>> checkpoints.save(10, model=model, progress={"best": 0.5})
    True
    >>> progress = {}
    >>> checkpoints.load_latest(model=model, progress=progress), progress
    (10, {'best': 0.5})
    """

    def __init__(
        self, root: Path | str, *, keep: int = 3, asynchronous: bool = False, process_group: Any = None
    ) -> None:
        check(keep >= 1, "Checkpointer", "keep", keep, ">= 1")
        self.root = Path(root)
        self._keep = keep
        self._thread = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._pending: Future[bool] | None = None
        self._buffers: dict[str, Tensor] = {}
        self._outcome = True
        if process_group is None and dist.is_available() and dist.is_initialized():
            process_group = dist.group.WORLD
        several = process_group is not None and dist.get_world_size(process_group) > 1
        # Of its own: objects and CPU tensors travel over gloo, and the thread must not mix with the collectives of training.
        ranks = dist.get_process_group_ranks(process_group) if several else []
        self._group = dist.new_group(ranks, backend="gloo", timeout=_TIMEOUT) if several else None
        self._rank = dist.get_rank(self._group) if self._group is not None else 0
        self._world_size = len(ranks) or 1
        if self._rank == 0:
            _manifest.clean(self.root)

    # Saving ----------------------------------------------------------------------------------------------------------

    def save(self, step: int, **stateful: Any) -> bool:
        """Collective: publish the state of *stateful* as that of *step*; older steps but for the newest *keep* go then.

        If it cannot be written (no space left, no permission, ...) there is a warning on rank 0, all published steps stay, and
        all ranks get False. With *asynchronous*, True means that the state was taken; see :meth:`wait`.

        Raises ValueError, on all ranks and before anything is written, if *step* is published already, or for state that is
        neither tensors nor plain values.
        """
        check(step >= 0, "Checkpointer", "step", step, ">= 0")
        self.wait()
        error, content = None, _Content()
        try:
            new = self._rank > 0 or not _manifest.step_folder(self.root, step).exists()
            check(new, "Checkpointer", "step", step, f"one that is not in {self.root}")
            content = _collect(stateful)
        except ValueError as raised:
            error = raised
        self._agree(error)
        if self._thread is None:
            self._outcome = self._write(step, content)
            return self._outcome
        content.stage(self._buffers)
        self._pending = self._thread.submit(self._write, step, content)
        return True

    def wait(self) -> bool:
        """Until a save in flight has ended; whether the last one is published. Call it before the process group ends."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            try:
                self._outcome = pending.result()
            except RuntimeError as error:  # others are gone
                self._warn(f"the checkpoint in flight was lost ({error}); {self.describe()}")
                self._outcome = False
        return self._outcome

    def _write(self, step: int, content: _Content) -> bool:
        folder = self.root / f".tmp-step-{step:08}"
        problem = ""
        if self._rank == 0:
            problem = _tried(functools.partial(_new_folder, folder))
        files: _manifest.Files = {}
        problem = self._first(problem)
        if not problem:
            problem = _tried(lambda: files.update(self._write_files(folder, content)))
        everyone = self._all((self._named(problem), files))
        problem = next((p for p, _ in everyone if p), "")
        if self._rank == 0 and not problem:
            together = {name: entry for _, part in everyone for name, entry in part.items()}
            parts = sorted(content.parts)
            problem = _tried(lambda: _manifest.publish(folder, self.root, step, self._world_size, together, parts))
        problem = self._first(problem)
        if self._rank == 0:
            if problem:
                shutil.rmtree(folder, ignore_errors=True)
                self._warn(f"no checkpoint of step {step} could be written ({problem}); {self.describe()}")
            else:
                for old in self.steps()[: -self._keep]:
                    _manifest.remove(self.root, old)
        return not problem

    def _write_files(self, folder: Path, content: _Content) -> _manifest.Files:
        """Collective: this rank's files in *folder*, synced; with their checksums."""
        checkpoint = _dcp()
        writer = checkpoint.FileSystemWriter(folder, sync_files=True)
        checkpoint.save(content.tensors, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
        if self._rank == 0:
            write_aside(folder / PLAIN, content.plain)
        if content.own:
            write_aside(folder / _own_file(self._rank), content.own)
        mine = [*folder.glob(f"__{self._rank}_*"), *folder.glob(_own_file(self._rank))]
        if self._rank == 0:
            mine += [folder / PLAIN, folder / ".metadata"]
        return {path.name: _manifest.digest(path) for path in mine}

    # Loading ---------------------------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """The published steps, the oldest first; as this host sees them, unverified."""
        return _manifest.steps(self.root)

    def describe(self) -> str:
        """Which the newest one is, for messages."""
        known = self.steps()
        return f"the last checkpoint is {_manifest.step_folder(self.root, known[-1])}" if known else "there is none yet"

    def load_latest(self, **stateful: Any) -> int | None:
        """Collective: load the newest good step into *stateful* and give its number; None if there is no step at all.

        All checksums are verified first. Damaged steps are set aside (``.corrupt`` behind their names) with a warning, if an
        older one is good. Names that were saved but are not asked for are left out.

        Raises, on all ranks: CorruptFile if all steps are damaged; ValueError, before anything changes, for a name that was not
        saved, and where names or shapes of tensors do not fit.
        """
        self.wait()
        damaged: dict[int, str] = {}
        for step in reversed(self._all(self.steps())[0]):
            try:
                self._load(step, stateful)
            except CorruptFile as error:
                damaged[step] = str(error)
                continue
            if self._rank == 0:
                for bad, message in damaged.items():
                    self._warn(f"{message}; going back to step {step}")
                    folder = _manifest.step_folder(self.root, bad)
                    folder.rename(folder.with_name(f"{folder.name}.{secrets.token_hex(2)}.corrupt"))
            return int(step)
        if damaged:
            raise CorruptFile(f"no checkpoint can be read: {'; '.join(damaged.values())}")
        return None

    def load(self, step: int, **stateful: Any) -> None:
        """Collective: load *step* into *stateful*.

        Raises, on all ranks: what :meth:`load_latest` raises, CorruptFile also if just this step is damaged, and ValueError
        if it is not there.
        """
        self.wait()
        known = self._all(self.steps())[0]
        check(step in known, "Checkpointer", "step", step, f"one of {known}")
        self._load(step, stateful)

    def _load(self, step: int, stateful: Mapping[str, Any]) -> None:
        folder = _manifest.step_folder(self.root, step)
        manifest = self._verified(folder)
        error: Exception | None = None
        loading: list[tuple[Any, Any]] = []
        targets: dict[str, Tensor] = {}
        try:
            metadata = _read_metadata(folder)
            plain = torch.load(folder / PLAIN, weights_only=True)
            for name, value in stateful.items():
                check(name in manifest["parts"], "Checkpointer", "the name", name, f"one of {manifest['parts']}")
                if isinstance(value, PerRank):
                    continue
                fitting = _Fitting(name, value, _names(stateful), metadata)
                loading.append((value, fitting.fit(plain[name])))
                targets |= fitting.targets
        except ValueError as raised:
            error = raised
        except Exception as raised:  # whole, but not ours: whatever torch and pickle raise
            error = CorruptFile(f"{folder} cannot be read: {raised}")
        self._agree(error)
        checkpoint = _dcp()
        try:
            checkpoint.load(
                targets,
                storage_reader=_reader(folder),
                process_group=self._group,
                no_dist=self._group is None,
            )
        except (Exception, checkpoint.CheckpointException) as raised:
            raise CorruptFile(f"{folder} cannot be read: {raised}") from raised
        for value, state in loading:
            _load_into(value, state)
        self._load_own(folder, manifest, stateful)

    def _verified(self, folder: Path) -> dict[str, Any]:
        """The manifest; the ranks share the work of checking the files. Raises CorruptFile on all ranks."""
        manifest: Any = None
        if self._rank == 0:
            try:
                manifest = _manifest.read(folder)
            except (CorruptFile, OSError) as error:
                manifest = str(error)
        manifest = self._all(manifest)[0]
        if isinstance(manifest, str):
            raise CorruptFile(manifest)
        by_size = sorted(manifest["files"].items(), key=lambda entry: (-entry[1][0], entry[0]))
        seen = folder.is_dir()
        message = _manifest.verify(folder, dict(by_size[self._rank :: self._world_size])) if seen else ""
        for host, visible, said in self._all((socket.gethostname(), seen, message)):
            if not visible:
                raise OSError(f"host {host} does not see {folder}: checkpoints need a file system that all hosts share")
            if said:
                raise CorruptFile(said)
        return dict(manifest)

    def _load_own(self, folder: Path, manifest: Mapping[str, Any], stateful: Mapping[str, Any]) -> None:
        own = {name: value.value for name, value in stateful.items() if isinstance(value, PerRank)}
        if not own:
            return
        if manifest["world_size"] != self._world_size:
            self._warn(
                f"{folder} was saved by {manifest['world_size']} ranks, now there are {self._world_size}: "
                f"{', '.join(sorted(own))} cannot be restored"
            )
            return
        saved = torch.load(folder / _own_file(self._rank), weights_only=True)
        for name, value in own.items():
            value.load_state_dict(saved[name])

    # Ranks -----------------------------------------------------------------------------------------------------------

    def _all(self, value: Any) -> list[Any]:
        """Collective: the *value* of every rank."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self._world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _first(self, problem: str) -> str:
        """Collective: the problem of the first rank that has one."""
        return next((p for p in self._all(self._named(problem)) if p), "")

    def _agree(self, error: Exception | None) -> None:
        """Collective: if there is an *error* on some rank, raise the first one on all."""
        found = self._all(None if error is None else (type(error), self._named(str(error))))
        for kind, message in filter(None, found):
            raise kind(message)

    def _named(self, problem: str) -> str:
        elsewhere = problem and self._rank > 0
        return f"{problem} (rank {self._rank}, host {socket.gethostname()})" if elsewhere else problem

    def _warn(self, message: str) -> None:
        if self._rank == 0:
            warnings.warn(message, stacklevel=4)


class _Content:
    """What one rank writes: tensors by key, and the rest as bytes."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.tensors: dict[str, Tensor] = {}
        self.plain = b""
        self.own = b""

    def stage(self, buffers: dict[str, Tensor]) -> None:
        """Copy the tensors to CPU memory, so that they may change; *buffers* is used again by the next call."""
        kept, moving = {}, {}
        for key, tensor in self.tensors.items():
            local = to_local(tensor)
            if is_dtensor(tensor) and local.device.type != "cpu":
                moving[key] = tensor  # its mesh is one of accelerators: torch knows how to make a stand-in on the CPU
                continue
            buffer = buffers.get(key)
            if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
                buffer = torch.empty_like(local, device="cpu", pin_memory=local.is_cuda)
            kept[key] = buffer
            buffer.copy_(local, non_blocking=True)
            self.tensors[key] = from_local(buffer, tensor)
        if moving:
            from torch.distributed.checkpoint.staging import BlockingAsyncStager

            self.tensors |= BlockingAsyncStager().stage(moving)
        if any(buffer.is_pinned() for buffer in kept.values()):
            torch.cuda.synchronize()
        buffers.clear()
        buffers.update(kept)


def _collect(stateful: Mapping[str, Any]) -> _Content:
    """Raises ValueError for what is neither tensor nor plain value."""
    content, names = _Content(), _names(stateful)
    plain, own = {}, {}
    for name, value in stateful.items():
        if isinstance(value, PerRank):
            own[name] = value.value.state_dict()
        else:
            plain[name] = _without_tensors((name,), _state_of(value, names), content.tensors)
    content.parts = list(stateful)
    content.plain = _plain_bytes(plain)
    content.own = _plain_bytes(own) if own else b""
    return content


def _plain_bytes(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    try:
        torch.save(state, buffer)
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except (pickle.PickleError, TypeError, AttributeError) as error:
        raise ValueError(f"Checkpointer: state must consist of tensors and plain values: {error}") from error
    return buffer.getvalue()


def _without_tensors(path: tuple[str, ...], value: Any, tensors: dict[str, Tensor]) -> Any:
    """*value* with references in place of its tensors, which go into *tensors* under their paths."""
    if isinstance(value, Tensor):
        key = "/".join(path)
        check(key not in tensors, "Checkpointer", "the path of a tensor", key, "unique")
        tensors[key] = value.detach()
        return {_TENSOR: key}
    if isinstance(value, Mapping):
        return {k: _without_tensors((*path, str(k)), v, tensors) for k, v in value.items()}
    if isinstance(value, list | tuple):
        items = [_without_tensors((*path, str(i)), v, tensors) for i, v in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    return value


def _with_tensors(value: Any, find: Callable[[str], Tensor]) -> Any:
    """The reverse of :func:`_without_tensors`."""
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return find(value[_TENSOR])
        return {k: _with_tensors(v, find) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_with_tensors(v, find) for v in value)
    return value


# What is in the objects --------------------------------------------------------------------------------------------------


def _inner(model: nn.Module) -> nn.Module:
    """*model* without the wrappers that put a prefix before its names."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def _names(stateful: Mapping[str, Any]) -> dict[Tensor, str]:
    """The parameters of all modules among *stateful* by their names."""
    names: dict[Tensor, str] = {}
    for part, value in stateful.items():
        if isinstance(value, nn.Module):
            for name, p in _inner(value).named_parameters():
                names.setdefault(p, f"{part}.{name}")
    return names


def _state_of(value: Any, names: Mapping[Tensor, str]) -> Any:
    if isinstance(value, nn.Module):
        return _inner(value).state_dict()
    if isinstance(value, Optimizer):
        # Not torch's get_optimizer_state_dict: that takes a step with a fresh optimizer, and drops state of frozen parameters.
        state, labels = value.state_dict(), list(_labels(value, names))
        return {
            **state,
            "state": {labels[i]: of_one for i, of_one in state["state"].items()},
            "param_groups": [{**g, "params": [labels[i] for i in g["params"]]} for g in state["param_groups"]],
        }
    return value.state_dict() if hasattr(value, "state_dict") else value


def _labels(optimizer: Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """The parameters of *optimizer* by name, or number for those without one, in its order."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {names.get(p, f"#{i}"): p for i, p in enumerate(params)}


def _load_into(value: Any, state: Any) -> None:
    if isinstance(value, dict):
        value.clear()
        value.update(state)
    elif isinstance(value, nn.Module):
        _inner(value).load_state_dict(state)
    else:
        value.load_state_dict(state)


class _Fitting:
    """Where the tensors of one part are read to: into the object's own memory if they fit there, else into new tensors."""

    def __init__(self, part: str, value: Any, names: Mapping[Tensor, str], metadata: Mapping[str, Any]) -> None:
        self.targets: dict[str, Tensor] = {}
        self._part = part
        self._value = value
        self._metadata = metadata
        self._own: dict[str, Tensor] = {}
        self._state = _without_tensors((part,), _state_of(value, names), self._own)
        self._params = _labels(value, names) if isinstance(value, Optimizer) else {}
        loadable = isinstance(value, dict) or hasattr(value, "load_state_dict")
        check(loadable, "Checkpointer", part, value, "a dict or an object with load_state_dict")

    def fit(self, saved: Any) -> Any:
        """The state to load, whose tensors are to be read. Raises ValueError where it does not fit."""
        if isinstance(self._value, nn.Module):
            self._same("tensors", self._state, saved)
        if isinstance(self._value, Optimizer):
            saved = self._by_number(saved)
        return _with_tensors(saved, self._target)

    def _same(self, kind: str, own: Any, saved: Any) -> None:
        missing, unknown = sorted(set(own) - set(saved)), sorted(set(saved) - set(own))
        if missing or unknown:
            raise ValueError(
                f"Checkpointer: {kind} of {self._part!r} do not fit: not saved are {missing}, only saved are {unknown}"
            )

    def _by_number(self, saved: dict[str, Any]) -> dict[str, Any]:
        """State by name as the optimizer's own state by number."""
        own, groups = self._state["param_groups"], saved["param_groups"]
        check(
            len(own) == len(groups), "Checkpointer", f"parameter groups of {self._part!r}", len(groups), f"{len(own)}"
        )
        number = {label: i for i, label in enumerate(self._params)}
        for mine, theirs in zip(own, groups, strict=True):
            self._same("parameters", mine["params"], theirs["params"])
        return {
            **saved,
            "state": {number[label]: of_one for label, of_one in saved["state"].items()},
            "param_groups": [
                {**theirs, "params": [number[label] for label in mine["params"]]}
                for mine, theirs in zip(own, groups, strict=True)
            ],
        }

    def _target(self, key: str) -> Tensor:
        stored = self._metadata[key]
        own, strict = self._own.get(key), isinstance(self._value, nn.Module | Optimizer)
        if own is not None and own.shape != stored.size:
            check(not strict, "Checkpointer", f"the saved shape of {key!r}", list(stored.size), f"{list(own.shape)}")
            own = None
        if own is None:
            own = self._parameter(key, stored.size)
        dtype = stored.properties.dtype
        if own is None:
            target = torch.empty(stored.size, dtype=dtype)
        else:
            target = own if own.dtype == dtype else torch.empty_like(own, dtype=dtype)
        self.targets[key] = target
        return target

    def _parameter(self, key: str, shape: torch.Size) -> Tensor | None:
        """For the state of an optimizer that has none yet: its parameter, if the state seems to be laid out like it."""
        label = key.removeprefix(f"{self._part}/state/").rpartition("/")[0]
        p = self._params.get(label)
        return torch.empty_like(p) if p is not None and p.shape == shape else None


# Files -------------------------------------------------------------------------------------------------------------------


def _own_file(rank: int) -> str:
    return f"rank-{rank:05}.pt"


def _new_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _tried(work: Callable[[], object]) -> str:
    """Do *work*; what went wrong, or nothing."""
    try:
        work()
    except (Exception, _dcp().CheckpointException) as error:
        return str(error) or type(error).__name__
    return ""


def _dcp() -> Any:
    from torch.distributed import checkpoint

    # That there is one process is no surprise. (Not for the time of a call only: that would not be safe in a thread.)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    return checkpoint


_DTYPES = {name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)}
_METADATA = {
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorStorageMetadata",
    "TensorProperties",
    "ChunkStorageMetadata",
}
_ALLOWED = {
    "pathlib": {"Path", "PosixPath", "WindowsPath"},
    "torch": {"Size"} | _DTYPES,
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {"_MEM_FORMAT_ENCODING"} | _METADATA,
}
"""What the pickle ``.metadata`` may name. It has a checksum, but that is no proof of who wrote it."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")
        return super().find_class(module, name)


def _reader(folder: Path) -> Any:
    """A reader of torch.distributed.checkpoint that runs no code of the files."""

    from torch.distributed.checkpoint.metadata import StorageMeta

    class Reader(_dcp().FileSystemReader):  # type: ignore[misc]
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            with (Path(self.path) / ".metadata").open("rb") as file:
                metadata = _Unpickler(file).load()
            metadata.storage_meta = metadata.storage_meta or StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            return metadata

    return Reader(folder)


def _read_metadata(folder: Path) -> dict[str, Any]:
    """Shapes and types of the tensors by key. Raises what pickle raises, ValueError for anything but tensors."""
    found: dict[str, Any] = _reader(folder).read_metadata().state_dict_metadata
    if not all(hasattr(entry, "chunks") for entry in found.values()):
        raise pickle.UnpicklingError("objects that are no tensors")
    return found


# Export ------------------------------------------------------------------------------------------------------------------


def export_weights(model: nn.Module, path: Path | str, **metadata: str) -> None:
    """Collective for a sharded model: its whole state in one file of the safetensors format, written by rank 0.

    Wrappers do not count, as for :class:`Checkpointer`. metadata: further entries for the file's header. The file is written
    aside and renamed. Raises OSError if it cannot be written.
    """
    weights = {}
    for name, tensor in _inner(model).state_dict().items():
        whole = tensor.full_tensor() if is_dtensor(tensor) else tensor
        weights[name] = whole.detach().cpu()
    if not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0:
        _write_safetensors(weights, Path(path), metadata)


def export_step(root: Path | str, path: Path | str, *, step: int | None = None, part: str = "model") -> tuple[int, int]:
    """Write the tensors of *part* in a published step (None: the newest) as one safetensors file, without a process group.

    Gives the step and the number of tensors. Raises ValueError for a step or part that is not there, CorruptFile if its
    checksums do not fit.
    """
    root = Path(root)
    known = _manifest.steps(root)
    check(bool(known), "export", "path", str(root), "a folder with published checkpoints")
    step = known[-1] if step is None else step
    check(step in known, "export", "step", step, f"one of {known}")
    folder = _manifest.step_folder(root, step)
    if problem := _manifest.problems(folder):
        raise CorruptFile(problem)
    manifest = _manifest.read(folder)
    check(part in manifest["parts"], "export", "part", part, f"one of {manifest['parts']}")
    stored = {key: entry for key, entry in _read_metadata(folder).items() if key.startswith(f"{part}/")}
    check(bool(stored), "export", "part", part, "one with tensors")
    weights = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in stored.items()}
    _dcp().load(weights, storage_reader=_reader(folder), no_dist=True)
    named = {key.removeprefix(f"{part}/"): tensor for key, tensor in weights.items()}
    _write_safetensors(named, Path(path), {"step": str(step)})
    return step, len(named)


def _write_safetensors(weights: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    from safetensors.torch import save_file

    # Tensors that share memory, such as tied weights, are written twice: other programs look for each by its name.
    seen: set[int] = set()
    separate = {}
    for name, tensor in weights.items():
        at = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone(memory_format=torch.contiguous_format) if at in seen else tensor.contiguous()
        seen.add(at)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        save_file(separate, temporary, {"format": "pt", "conjugo": __version__, **metadata})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
