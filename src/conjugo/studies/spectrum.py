"""Spectra of training runs and of models from scripts: what there is to measure, and measuring it so that it can go on later.

:func:`of_run` and :func:`of_script` make a `Subject`: a model, its loss, and the examples over which it is the mean.
:func:`spectrum_of` measures the `Subject` and leaves a file; a measurement that was killed goes on from what it had.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from conjugo.distributed import export_step
from conjugo.distributed._manifest import steps as checkpointed_steps
from conjugo.errors import CorruptFile, check, unknown
from conjugo.studies.scripts import function_of
from conjugo.training import TrainConfig, models
from conjugo.training import data as datasets
from conjugo.training.spectrum import (
    BATCH,
    TOP,
    Batches,
    Spectrum,
    batch_norm_batch,
    first_examples,
    has_batch_norm,
    measure,
    normalises_batches,
    unaugmented,
)
from conjugo.training.workers import Workers

__all__ = [
    "Matrix",
    "Settings",
    "Subject",
    "known_steps",
    "of_run",
    "of_script",
    "recorded",
    "same_series",
    "spectrum_of",
]

Matrix: TypeAlias = Literal["hessian", "ggn", "fisher", "empirical-fisher", "gradient-covariance"]
BNMode: TypeAlias = Literal["train", "eval", "as-is"]
DType: TypeAlias = Literal["float32", "float64"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure, and how accurately."""

    matrix: Matrix = "hessian"
    probes: int = 10
    steps: int = 80
    deflate: bool = True
    top: int | None = None
    bn_mode: BNMode | None = None
    split: Literal["train", "test"] = "train"
    examples: int | None = None
    batch: int | None = None
    params: str | None = None
    dtype: DType = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        named: tuple[tuple[str, Any], ...] = (("matrix", Matrix), ("bn_mode", BNMode), ("dtype", DType))
        for name, choice in named:
            value = getattr(self, name)
            if not (name == "bn_mode" and value is None) and value not in get_args(choice):
                unknown(f"spectrum {name}", value, get_args(choice))
        for name, least in (("probes", 1), ("steps", 1), ("top", 0), ("examples", 1), ("batch", 1)):
            value = getattr(self, name)
            optional = name in ("top", "examples", "batch")
            accepted = f"an integer >= {least}" + (" or None" if optional else "")
            check((value is None and optional) or value >= least, "spectrum", name, value, accepted)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model with the loss and this worker's share of the data, and the words for it.

    batch: examples that batch norm and gradient covariances see at once, if that is known; cut: gives batches of at most so
    many examples, of the same ones for all workers or not. bn_mode: as training has it. classes: None if there are none.
    """

    model: nn.Module
    loss_fn: Callable[[Any, Tensor], Tensor]
    cut: Callable[[int, bool], Iterable[tuple[Tensor, Tensor]]]
    examples: int | None
    batch: int | None
    bn_mode: BNMode
    classes: int | None
    about: Mapping[str, Any]


# Runs of conjugo train ----------------------------------------------------------------------------------------------------


def known_steps(folder: Path) -> list[int]:
    """The steps of a training run whose weights are there: 0, which can be made again, and the checkpoints. Ascending.

    Raises what :func:`of_run` raises.
    """
    _config_of(folder)
    return sorted({0, *checkpointed_steps(folder / "checkpoints")})


def of_run(
    folder: Path, step: int | None, settings: Settings, *, device: torch.device, data_root: str | None = None
) -> Subject:
    """The model of a training run at *step* (None: the newest checkpoint), on the data and with the loss it is trained with.

    Raises FileNotFoundError where there is no run or no checkpoint, ValueError for a step that is not there, CorruptFile for
    files that are damaged, DataUnavailable.
    """
    config = _config_of(folder)
    saved = checkpointed_steps(folder / "checkpoints")
    if step is None and not saved:
        raise FileNotFoundError(f"{folder} has no checkpoints (yet); --step 0 takes the weights at the beginning")
    step = saved[-1] if step is None else step
    check(step == 0 or step in saved, "spectrum", "step", step, f"one of {[0, *saved]}, the steps that {folder} has")
    data = datasets.load(
        config.data,
        root=config.data_root if data_root is None else data_root,
        download=config.download,
        image_size=config.image_size,
    )
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)  # as in training: these are the weights it began with
        name = config.model or models.default_for(data)
        model = models.build(name, input_shape=data.input_shape, num_classes=data.num_classes).to(device)
    if step:
        model.load_state_dict(_weights(folder, step))
    n = len(data.train)
    size = config.batch_size
    epoch = None if config.batch_schedule or config.batch_growth else step * (n if size == "full" else size) / n
    return replace(
        _of_data(model, data, settings, device),
        loss_fn=partial(F.cross_entropy, label_smoothing=config.label_smoothing),
        batch=batch_norm_batch(config, n, _workers_of(folder)),
        bn_mode="train",
        about={
            "run": str(folder),
            "step": step,
            "epoch": epoch,
            "model": name,
            "data": data.name,
            "split": settings.split,
        },
    )


def _config_of(folder: Path) -> TrainConfig:
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} is no run directory of conjugo train: it has no config.json")
    try:
        return TrainConfig.from_dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError, AttributeError) as error:
        raise CorruptFile(f"{path} is not that of a training run, or damaged: {error}") from error


def _workers_of(folder: Path) -> int:
    try:
        return int(json.loads((folder / "environment.json").read_bytes())["workers"])
    except (OSError, ValueError, KeyError, TypeError):
        return 1


def _weights(folder: Path, step: int) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory(prefix="conjugo-") as scratch:
        path = Path(scratch) / "model.safetensors"
        export_step(folder / "checkpoints", path, step=step)
        return {name: tensor.clone() for name, tensor in load_file(path).items()}


def _of_data(model: nn.Module, data: datasets.Dataset, settings: Settings, device: torch.device) -> Subject:
    take, n = unaugmented(data, settings.split, settings.examples, seed=settings.seed, device=device)
    return Subject(
        model=model,
        loss_fn=F.cross_entropy,
        cut=lambda size, together: Batches(take, n, size, Workers(), together=together),
        examples=n,
        batch=None,
        bn_mode="as-is",
        classes=data.num_classes,
        about={"data": data.name, "split": settings.split},
    )


# Scripts ------------------------------------------------------------------------------------------------------------------


def of_script(
    script: Path,
    function: str,
    settings: Settings,
    *,
    device: torch.device,
    data: str | None = None,
    data_root: str | None = None,
) -> Subject:
    """What *function* of *script* gives: (model, loss_fn, data), or a model, to be measured on the data set named *data*.

    The function is called without arguments, after ``torch.manual_seed(settings.seed)``. Its data are (inputs, targets), or
    batches of these that can be gone through again and again; of several workers each takes its share.

    Raises FileNotFoundError where there is no script, ValueError where there is no such function or it gives something else.
    """
    build = function_of(script, function)
    where = f"{script}:{function}"
    torch.manual_seed(settings.seed)
    built = build()
    about = {"script": where, "model": f"{script.name}:{function}"}
    if isinstance(built, nn.Module):
        if data is None:
            raise ValueError(f"{where} gives a model without data: name a data set, such as --data digits")
        loaded = datasets.load(data, root=data_root)
        subject = _of_data(built.to(device), loaded, settings, device)
        return replace(subject, about={**about, **subject.about})
    if not (isinstance(built, tuple) and len(built) == 3 and isinstance(built[0], nn.Module) and callable(built[1])):
        raise ValueError(f"{where} must give a model, or (model, loss_fn, data), got {_described(built)}")
    check(data is None, "spectrum", "--data", data, f"left out, as {where} gives data itself")
    check(settings.split == "train", "spectrum", "--split", settings.split, f"left out, as {where} gives data itself")
    model: nn.Module = getattr(built[0], "_orig_mod", built[0])
    _, loss_fn, own = built
    subject = Subject(
        model=model.to(device),
        loss_fn=loss_fn,
        cut=lambda size, together: Shared(own, Workers()),
        examples=None,
        batch=None,
        bn_mode="as-is",
        classes=None,
        about=about,
    )
    if not (isinstance(own, tuple) and len(own) == 2 and isinstance(own[0], Tensor) and isinstance(own[1], Tensor)):
        check(
            settings.examples is None,
            "spectrum",
            "--examples",
            settings.examples,
            "left out, as the script gives batches",
        )
        check(settings.batch is None, "spectrum", "--batch", settings.batch, "left out, as the script gives batches")
        return subject
    inputs, targets = own
    check(
        len(inputs) == len(targets), "spectrum", "the number of targets", len(targets), f"{len(inputs)}, one per input"
    )
    chosen = first_examples(len(inputs), settings.examples, settings.seed)

    def take(rows: Tensor) -> tuple[Tensor, Tensor]:
        which = chosen[rows].to(inputs.device)
        return inputs[which], targets[which.to(targets.device)]

    def cut(size: int, together: bool) -> Batches:
        return Batches(take, len(chosen), size, Workers(), together=together)

    return replace(subject, cut=cut, examples=len(chosen), batch=len(chosen))


class Shared:
    """Batches that all workers have, of which each takes every so-manieth."""

    def __init__(self, batches: Iterable[tuple[Tensor, Tensor]], workers: Workers) -> None:
        check(iter(batches) is not batches, "spectrum", "data", type(batches).__name__, "what can be read many times")
        self._batches = batches
        self._workers = workers

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return islice(self._batches, self._workers.rank, None, self._workers.size)


def _described(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(type(item).__name__ for item in value)})"
    return type(value).__name__


# Measuring ----------------------------------------------------------------------------------------------------------------


def spectrum_of(
    subject: Subject, settings: Settings, path: Path | None, *, callback: Callable[[int, int], None] | None = None
) -> Spectrum:
    """Collective: the `Spectrum` of *subject*; rank 0 leaves it at *path*.

    What is there already, of the same model, data and settings, is read instead. While it is measured there is a file beside
    *path*, ending in .partial, from which the next call goes on; the numbers are those of an uninterrupted one, bit for bit.
    callback: called with products that are done, and that are planned. Raises ValueError and FloatingPointError as the
    functions of :mod:`conjugo.curvature`.
    """
    workers = Workers()
    model = subject.model
    bn_mode = subject.bn_mode if settings.bn_mode is None else settings.bn_mode
    if bn_mode != "as-is":
        model.train(bn_mode == "train")
    together = normalises_batches(model, bn_mode.replace("-", "_")) or settings.matrix == "gradient-covariance"
    size = settings.batch or (subject.batch if together else None) or BATCH
    batches = subject.cut(size, together)
    top = min(TOP, subject.classes or TOP) if settings.top is None else settings.top
    about = {
        **subject.about,
        "matrix": settings.matrix,
        "examples": subject.examples,
        "batch": getattr(batches, "batch", None),
        "bn_mode": bn_mode.replace("-", "_") if has_batch_norm(model) else None,
        "params": settings.params,
        "workers": workers.size,
        "settings": asdict(settings),
    }
    about["fingerprint"] = workers.on_first(lambda: _fingerprint(model, batches, about))
    if path is not None:
        there = workers.on_first(lambda: _read(path, about["fingerprint"]))
        if there is not None:
            return there
    op = _operator(settings, model, subject.loss_fn, batches, bn_mode.replace("-", "_"), workers)
    if about["examples"] is None:
        about["examples"] = op.n_examples
    partial_file = None if path is None else path.with_name(f"{path.name}.{about['fingerprint']}.partial")
    found = measure(
        op,
        steps=settings.steps,
        probes=settings.probes,
        deflate=settings.deflate,
        top=top,
        seed=settings.seed,
        checkpoint=partial_file,
        callback=callback,
        about=about,
    )
    if path is not None:
        workers.on_first(lambda: _finish(found, path))
    return found


def _operator(
    settings: Settings, model: nn.Module, loss_fn: Any, batches: Iterable[Any], bn_mode: str, workers: Workers
) -> Any:
    from conjugo import curvature

    name = settings.matrix.removeprefix("empirical-").replace("-", "_")
    more: dict[str, Any] = {"dtype": getattr(torch, settings.dtype)}
    if name == "fisher":
        more |= {"kind": "empirical" if settings.matrix.startswith("empirical") else "mc", "seed": settings.seed}
    group = dist.group.WORLD if workers.size > 1 else None
    make = getattr(curvature, name)
    return make(model, loss_fn, batches, settings.params, bn_mode=bn_mode, process_group=group, **more)


def _fingerprint(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], about: Mapping[str, Any]) -> str:
    """Tells measurements apart: by weights, the first batch, and everything that was asked for."""
    digest = hashlib.sha256()
    asked = {name: value for name, value in about.items() if name not in ("run", "script", "model")}
    digest.update(json.dumps(asked, sort_keys=True, default=str).encode())
    tensors = [*model.state_dict().items(), *(("batch", tensor) for tensor in next(iter(batches), ()))]
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def _read(path: Path, fingerprint: str) -> Spectrum | None:
    try:
        found = Spectrum.load(path)
    except (CorruptFile, OSError):
        return None
    return found if found.about.get("fingerprint") == fingerprint else None


def _finish(found: Spectrum, path: Path) -> None:
    found.save(path)
    for other in path.parent.iterdir():
        if other.name.startswith(f"{path.name}.") and other.name.endswith(".partial"):
            other.unlink(missing_ok=True)


# Reading ------------------------------------------------------------------------------------------------------------------


def recorded(folder: Path) -> list[list[Spectrum]]:
    """The spectra in a run directory: series of what was measured alike, each by step. Damaged files are left out."""
    series: dict[str, list[Spectrum]] = {}
    for path in sorted((folder / "spectra").glob("*.json")):
        try:
            found = Spectrum.load(path)
        except (CorruptFile, OSError):
            continue
        if isinstance(found.about.get("step"), int):
            series.setdefault(same_series(found), []).append(found)
    return [sorted(group, key=lambda spectrum: spectrum.about["step"]) for group in series.values()]


def same_series(spectrum: Spectrum) -> str:
    """Equal for spectra that differ by the point in training alone."""
    names = ("matrix", "params", "split", "examples", "batch", "bn_mode")
    return json.dumps([spectrum.about.get(name) for name in names])
