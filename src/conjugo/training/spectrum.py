"""The eigenvalue density of the curvature of a model in training: what is measured, on which data, and recording it.

:func:`measure` makes a `Spectrum` of any operator; `Batches` deals examples out to the workers; `SpectrumRecorder` is the
callback behind ``TrainConfig.spectra``.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from conjugo._files import write_aside
from conjugo._version import __version__
from conjugo.errors import CorruptFile, check
from conjugo.training import data as datasets
from conjugo.training import models
from conjugo.training.batches import Feed
from conjugo.training.config import TrainConfig
from conjugo.training.workers import Workers

if TYPE_CHECKING:
    from conjugo.curvature import Eigenpairs, Operator, SpectralDensity
    from conjugo.training.trainer import Trainer

__all__ = [
    "BATCH",
    "TOP",
    "Batches",
    "Spectrum",
    "SpectrumRecorder",
    "batch_norm_batch",
    "build_model",
    "first_examples",
    "has_batch_norm",
    "measure",
    "normalises_batches",
    "unaugmented",
]

BATCH = 500
"""Examples that go through the model at once, where that changes nothing but memory."""

TOP = 10
"""How many of the largest eigenvalues are found one by one: one for each class, but at most so many."""

_ACCURATE = 1e-3
"""Residuals of eigenpairs relative to the largest eigenvalue; the errors of the eigenvalues are about their squares."""


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """The eigenvalue density of a P x P matrix at one point, its largest eigenvalues, and how the gradient lies to them."""

    density: SpectralDensity
    """The quadrature."""
    eigenvalues: tuple[float, ...]
    """The largest ones, descending."""
    residuals: tuple[float, ...]
    """|A u - lambda u| of their unit eigenvectors u."""
    fractions: tuple[float, ...] | None
    """(u'g)^2 / |g|^2 of each, g being the gradient of the loss; None where g is zero or there is none."""
    loss: float | None
    """The mean loss, if there is one."""
    gradient_norm: float | None
    """|g|"""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What was measured and how, plain values: step, epoch, matrix, bn_mode, examples, products, seconds, ..."""

    @property
    def gradient_fraction(self) -> float | None:
        """How much of the squared gradient lies in the space of the largest eigenvalues, in [0, 1]."""
        return None if self.fractions is None else sum(self.fractions)

    def numbers(self) -> dict[str, float | None]:
        """lambda_max, lambda_min, trace, trace_stderr, negative_mass, effective_rank, ..., ratio (the largest eigenvalue over
        the last of ``eigenvalues``) and gradient_fraction; None where a number is not finite or not there.
        """
        found: dict[str, Any] = dict(self.density.summary())
        if self.eigenvalues:
            found["lambda_max"] = max(self.eigenvalues[0], found["lambda_max"])
            last = self.eigenvalues[-1]
            found["ratio"] = self.eigenvalues[0] / last if last > 0 else None
        else:
            found["ratio"] = None
        found["gradient_fraction"] = self.gradient_fraction
        return {name: value if value is None else _finite(value) for name, value in found.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "about": dict(self.about),
            "loss": self.loss,
            "gradient_norm": self.gradient_norm,
            "eigenvalues": list(self.eigenvalues),
            "residuals": list(self.residuals),
            "gradient_fractions": None if self.fractions is None else list(self.fractions),
            "summary": self.numbers(),
            "density": self.density.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`."""
        from conjugo.curvature import SpectralDensity

        fractions = values["gradient_fractions"]
        return cls(
            density=SpectralDensity.from_dict(values["density"]),
            eigenvalues=tuple(values["eigenvalues"]),
            residuals=tuple(values["residuals"]),
            fractions=None if fractions is None else tuple(fractions),
            loss=values["loss"],
            gradient_norm=values["gradient_norm"],
            about=values["about"],
        )

    def save(self, path: Path) -> None:
        """Write it as JSON, aside and renamed."""
        write_aside(path, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what :meth:`save` wrote. Raises CorruptFile for anything else, OSError if it cannot be read."""
        try:
            return cls.from_dict(json.loads(path.read_bytes()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptFile(f"{path} is no spectrum, or damaged: {error!r}") from error


def measure(
    op: Operator,
    *,
    steps: int,
    probes: int,
    deflate: bool = True,
    top: int = TOP,
    seed: int = 0,
    checkpoint: Path | None = None,
    callback: Callable[[int, int], None] | None = None,
    about: Mapping[str, Any] | None = None,
) -> Spectrum:
    """The `Spectrum` of *op* (P, P), in about steps * probes products and some more for the largest eigenvalues.

    steps: at most P are taken. top: how many of the largest eigenvalues to find, >= 0; at most P are. All else as in
    :func:`~conjugo.curvature.spectral_density`. Collective where *op* has a process group.
    """
    from conjugo.curvature import gradient_alignment, spectral_density

    check(top >= 0, "measure", "top", top, ">= 0")
    start = time.perf_counter()
    network: Any = op
    loss = float(network.loss()) if hasattr(op, "loss") else None
    gradient = network.gradient() if hasattr(op, "gradient") else None
    density = spectral_density(
        op, probes, min(steps, op.size), deflate=deflate, seed=seed, checkpoint=checkpoint, callback=callback
    )
    pairs = _largest(op, density, min(top, op.size), seed) if top else None
    fractions = None
    if pairs is not None and gradient is not None and bool(gradient.any()):
        fractions = tuple(gradient_alignment(op, gradient=gradient, pairs=pairs).fractions.tolist())
    return Spectrum(
        density=density,
        eigenvalues=() if pairs is None else tuple(pairs.values.tolist()),
        residuals=() if pairs is None else tuple(pairs.residuals.tolist()),
        fractions=fractions,
        loss=loss,
        gradient_norm=None if gradient is None else float(gradient.double().norm()),
        about={
            **(about or {}),
            "products": density.n_matvec + (0 if pairs is None else pairs.n_matvec),
            "seconds": time.perf_counter() - start,
            "device": op.device.type,
            "dtype": str(op.dtype).removeprefix("torch."),
            "conjugo": __version__,
            "torch": torch.__version__,
        },
    )


def _largest(op: Operator, density: SpectralDensity, k: int, seed: int) -> Eigenpairs:
    """The *k* largest eigenpairs: those that *density* has found already, if they are the largest; else found anew."""
    from conjugo.curvature import Eigenpairs, eigsh

    known = density.eigenvectors
    if known is not None and len(known) >= k:
        values, vectors = density.eigenvalues[:k], known[:k].to(op.device, op.dtype)
        # What the random vectors see of the rest must lie below.
        if all(bool((nodes <= values[-1]).all()) for nodes in density.nodes):
            off = op.matmat(vectors) - values.to(vectors)[:, None] * vectors
            residuals = off.double().norm(dim=1).cpu()
            if float(residuals.max()) <= _ACCURATE * float(values.abs().max()):
                return Eigenpairs(values, vectors, residuals, True, False, k)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the residuals are part of the result
        return eigsh(op, k, tol=_ACCURATE, max_matvec=20 * k + 100, seed=seed, verify=False)


def _finite(value: float) -> float | None:
    return float(value) if abs(value) < float("inf") else None


# Models and data --------------------------------------------------------------------------------------------------------


def build_model(config: TrainConfig, data: datasets.Dataset, device: torch.device) -> nn.Module:
    """The model of a run, whole, in float32 on *device*, with weights of its own; random states stay as they are."""
    name = config.model or models.default_for(data)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        return models.build(name, input_shape=data.input_shape, num_classes=data.num_classes).to(device)


def unaugmented(
    data: datasets.Dataset, split: str, examples: int | None, *, seed: int, device: torch.device
) -> tuple[Callable[[Tensor], tuple[Tensor, Tensor]], int]:
    """Examples of *split* (train or test) as the model sees them in evaluations: what gives the rows asked for, and how many.

    examples: so many, chosen by *seed*; None: all.
    """
    chosen = data.train if split == "train" else data.test
    rows = first_examples(len(chosen), examples, seed)
    augment = datasets.default_augment(data) if data.kind == "image" else None
    feed = Feed(datasets.Split(chosen.inputs[rows], chosen.targets[rows]), augment, random=False, device=device)
    return lambda part: feed.take(part[:, None].to(device)), len(rows)


def first_examples(n: int, examples: int | None, seed: int) -> Tensor:
    """The first *examples* of *n* (None: all) in an order that *seed* decides: int64, ascending."""
    if examples is None or examples >= n:
        return torch.arange(n)
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:examples].sort().values


class Batches:
    """Examples in batches (inputs, targets), this worker's share of them, which can be gone through again and again.

    take: gives inputs and targets of some rows, int64 [b]. n: how many rows there are. batch: at most so many at once; all
    batches are of about equal size. together: batches are cut from all rows, the same ones however many workers there are,
    because what is in a batch matters (batch norm sees it); otherwise each worker cuts up its own share of the rows.
    """

    def __init__(
        self, take: Callable[[Tensor], tuple[Tensor, Tensor]], n: int, batch: int, workers: Workers, *, together: bool
    ) -> None:
        check(n >= 1, "spectrum", "the number of examples", n, ">= 1")
        self._take = take
        rows = torch.arange(n)
        if together:
            parts = _cut(rows, batch)
            self.batch = len(parts[0])
            self._parts = parts[workers.rank :: workers.size]
        else:
            self._parts = _cut(rows.tensor_split(workers.size)[workers.rank], batch)
            self.batch = min(batch, -(-n // workers.size))

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return map(self._take, self._parts)


def _cut(rows: Tensor, batch: int) -> list[Tensor]:
    return list(rows.tensor_split(-(-len(rows) // batch))) if len(rows) else []


def has_batch_norm(model: nn.Module) -> bool:
    """Whether there is any, so that its mode matters."""
    return bool(_batch_norms(model))


def normalises_batches(model: nn.Module, bn_mode: str) -> bool:
    """Whether batch norm makes the loss depend on how examples are cut into batches. bn_mode: train, eval or as_is."""
    norms = _batch_norms(model)
    by_batch = [norm.training if bn_mode == "as_is" else bn_mode == "train" for norm in norms]
    return any(by_batch) or any(norm.running_mean is None for norm in norms)


def _batch_norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def batch_norm_batch(config: TrainConfig, n: int, workers: int) -> int:
    """How many examples batch norm sees at once when a run begins. n: training examples; workers: of the run."""
    batch = n if config.batch_size == "full" else config.batch_size
    share = -(-batch // workers)
    share = share if config.micro_batch is None else min(share, config.micro_batch)
    return min(batch, share * workers) if config.sync_batch_norm else share


# Recording while a model is trained --------------------------------------------------------------------------------------


class SpectrumRecorder:
    """The callback that measures the Hessian of the training loss, as ``TrainConfig.spectra`` and the like say.

    A copy of the model in float32 is measured, on ``spectrum_examples`` of the training data that the seed chooses, without
    augmentation and weight decay, in batches as large as those that batch norm sees in training. Each `Spectrum` goes to
    ``spectra/step-<step>.json`` in the run directory, its numbers into the metrics: spectrum_step, lambda_max, lambda_min,
    trace, negative_mass, gradient_fraction. Where weights or losses are not finite nothing is written, and these are None.
    """

    NAMES = ("lambda_max", "lambda_min", "trace", "negative_mass", "gradient_fraction")

    def __init__(self, config: TrainConfig, data: datasets.Dataset, steps: int) -> None:
        self._config = config
        self._data = data
        self._evenly = {round(steps * k / config.spectra) for k in range(1, config.spectra + 1)} - {0}
        self._samples = [round(epoch * len(data.train)) for epoch in config.spectrum_at]

    def __call__(self, trainer: Trainer) -> dict[str, Any] | None:
        """Collective: measure, if it is time."""
        before = trainer.samples - trainer.batch_size if trainer.step else -1
        if not (trainer.reached(self._evenly) or any(before < wanted <= trainer.samples for wanted in self._samples)):
            return None
        with trainer.clock.paused():
            found = self._measure(trainer)
            if found is not None and trainer.folder is not None and trainer.workers.first:
                _write(found, trainer.folder / "spectra" / f"step-{trainer.step}.json")
        numbers: Mapping[str, Any] = {} if found is None else found.numbers()
        return {"spectrum_step": trainer.step, **{name: numbers.get(name) for name in self.NAMES}}

    def _measure(self, trainer: Trainer) -> Spectrum | None:
        from conjugo.curvature import hessian

        config, device, workers = self._config, trainer.device, trainer.workers
        model = build_model(config, self._data, device)
        with trainer.averaged_statistics():
            model.load_state_dict({name: _whole(tensor) for name, tensor in trainer.model.state_dict().items()})
        by_batch = normalises_batches(model, config.spectrum_bn_mode)
        take, n = unaugmented(self._data, "train", config.spectrum_examples, seed=config.seed, device=device)
        size = batch_norm_batch(config, len(self._data.train), workers.size) if by_batch else BATCH
        batches = Batches(take, n, size, workers, together=by_batch)
        loss = partial(F.cross_entropy, label_smoothing=config.label_smoothing)
        about = {
            "step": trainer.step,
            "epoch": trainer.samples / len(self._data.train),
            "model": config.model or models.default_for(self._data),
            "data": self._data.name,
            "matrix": "hessian",
            "split": "train",
            "examples": n,
            "batch": batches.batch,
            "bn_mode": config.spectrum_bn_mode if has_batch_norm(model) else None,
            "params": None,
            "workers": workers.size,
        }
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            if not _all_finite(model.train(config.spectrum_bn_mode == "train"), loss, batches, workers, device):
                return None
            try:
                op = hessian(
                    model,
                    loss,
                    batches,
                    bn_mode=config.spectrum_bn_mode,
                    process_group=dist.group.WORLD if workers.size > 1 else None,
                )
                return measure(
                    op,
                    steps=config.spectrum_steps,
                    probes=config.spectrum_probes,
                    top=min(TOP, self._data.num_classes),
                    seed=config.seed,
                    about=about,
                )
            except FloatingPointError:  # of sums over all workers
                return None


@torch.no_grad()
def _all_finite(
    model: nn.Module, loss: Callable[..., Tensor], batches: Batches, workers: Workers, device: torch.device
) -> bool:
    """Collective: whether all losses of all workers are finite. Asked before, as one that stops alone lets the others wait."""
    own = all(bool(loss(model(inputs), targets).isfinite()) for inputs, targets in batches)
    return int(workers.sum(torch.tensor(float(not own), device=device))) == 0


def _write(found: Spectrum, path: Path) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        found.save(path)
    except OSError as error:
        warnings.warn(f"{path} could not be written: {error}", stacklevel=2)


def _whole(tensor: Tensor) -> Tensor:
    """Collective for a DTensor: all of it."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor.detach() if gather is None else gather().detach()
