"""What a training run is asked for (`TrainConfig`) and what it gives (`TrainResult`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from typing import Any, Literal, Self, get_args

import torch
from torch import nn

from conjugo.errors import check, unknown
from conjugo.optim import NLCG
from conjugo.scaling.batch_schedule import BatchLR
from conjugo.training import models, optimizers

__all__ = ["BNMode", "DiscardForward", "Parallel", "Precision", "Schedule", "TrainConfig", "TrainResult", "finite"]

Schedule = Literal["polynomial", "cosine", "constant"]
Precision = Literal["auto", "float32", "bfloat16"]
Parallel = Literal["ddp", "fsdp", "hsdp"]
DiscardForward = Literal["once", "twice"]
BNMode = Literal["train", "eval"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that a training run depends on: equal configurations give equal runs on one machine.

    Args:
        data: Data set: digits, cifar10, cifar100, mnist, folder, ... (conjugo data list).
        data_root: Folder to look for the data in.
        image_size: Side in pixels to which encoded images are scaled; None: they have one size.
        download: Fetch an official archive that is absent.
        model: mlp, mlp-bn (with batch norm), cnn, resnet8, resnet20, resnet32, resnet56, resnet50 (for ImageNet), or, in
            the original form, resnet8v1, ..., resnet56v1; None: the usual one for the data.
        optimizer: nlcg (nlcg-online, nlcg-step, nlcg-fr, nlcg-pr, nlcg-hutchinson, nlcg-gauss-newton, nlcg-adam,
            nlcg-orthogonal, nlcg-kron), sgd, momentum, nesterov, frsgd, adagrad-norm, adamw, muon, soap, rmsprop, lars, lamb,
            mclr, cblr, cblr-secant.
        lr: Highest learning rate; None: the usual one of the optimizer.
        weight_decay: Coefficient of the weight decay, in the way of the optimizer.
        optimizer_options: Other options of the optimizer, by name.
        batch_size: Examples per step, over all workers, or full for all of the training data.
        batch_schedule: Pairs of an epoch >= 1 and a batch size: from the beginning of that epoch on batches have this size
            instead. 8 512 12 1024: 512 from epoch 8 on, 1,024 from epoch 12 on. An epoch here is a pass through the data in
            whole batches; what is left over waits for the next one.
        batch_schedule_lr: How the learning rate follows the batch: constant, linear or sqrt; with batch_growth also noise, by
            the law 1 / (1 + noise scale / batch).
        batch_growth: Let a measurement say how the batch grows: it doubles when an epoch begins and the gradient noise scale,
            the lower end of its interval, times this number has reached twice the batch; 0: it does not. Wants noise_scale.
            Epochs are counted in examples, learning-rate schedules too.
        batch_max: The largest batch for that; None: all of the training data.
        micro_batch: Most examples that a worker sends through the model at once; the gradients of a batch are added up,
            each example with equal weight. None: all of the worker's share.
        epochs: Times that the training data is gone through, rounded to whole steps; with batch_schedule the passes in whole
            batches.
        steps: Steps, instead of epochs.
        schedule: polynomial: warm-up with power 1/2, drops to 1/10 and 1/100 at 51 % and 76.5 % of the steps (Adya,
            Palakkode & Tuzel 2018); cosine: linear warm-up, half a cosine down to 0; constant: the warm-up only.
        warmup: Fraction of the steps that warm up.
        decay_norm_and_bias: Whether weight decay acts on parameters with one dimension too.
        ema: Limit of the decay of a running average of the weights, with which evaluations are made; None: no average.
        label_smoothing: Share of the target that is spread over all classes, in [0, 1).
        discard_small_loss: Fraction of each batch, the examples with the smallest losses, whose gradient is left out after the
            warm-up, in [0, 1).
        discard_forward: once: all of a batch goes forward and backward, which wants a worker's share in one micro-batch; twice:
            forward without gradients, then forward and backward with the kept examples only. That saves time beyond a
            fraction of 1/3, and batch norm sees the kept examples only.
        augment: Random crops and flips where the data allow them.
        precision: bfloat16 is autocast; auto: that where it pays (convolutions on hardware with bfloat16 units).
        channels_last: Memory layout of images; None: for convolutional models.
        compile: Use torch.compile.
        evaluations: Number of evaluations, evenly spaced, the last at the end.
        checkpoints: Number of checkpoints, evenly spaced, the last at the end; 0: only where the run is interrupted.
        keep: Newest checkpoints that are kept.
        asynchronous: Write checkpoints while training goes on.
        max_skipped: Training stops after so many steps in a row whose loss or gradient is not finite.
        clip_norm: Upper limit of the gradient's norm; None: no limit.
        spectra: How often the eigenvalue density of the Hessian is recorded, evenly spaced, the last at the end
            (spectra/ in the run directory; docs/spectrum.md).
        spectrum_at: Epochs at which it is recorded besides; 0 is the beginning.
        spectrum_steps: Lanczos steps for each random vector.
        spectrum_probes: Random vectors.
        spectrum_examples: Training examples, drawn once, whose mean loss it is; None: all.
        spectrum_bn_mode: Batch norm by the statistics of each batch (train), as in training, or by running ones (eval).
        noise_scale: Steps between two measurements of the gradient noise scale, which the records show, over the last 64 of
            them, also in the metric of Adam and NLCG; 0: none. Next to free where a batch has several micro-batches, over
            workers and accumulation; otherwise a measurement takes as long as a step (docs/noise-scale.md).
        seed: Decides weights, batches and augmentation.
        device: auto: a GPU if there is one; or cpu, cuda, cuda:1, ...
        threads: CPU threads of torch; None: as they are.
        tensorboard: Write a TensorBoard log too (extra tensorboard).
        parallel: How several workers share the model: ddp: each has all of it; fsdp: parameters, gradients and the
            optimizer's state are cut into shards, one per worker; hsdp: shards within groups of workers, whole copies
            over the groups.
        shard_workers: Workers of one such group; None: those on one host.
        shard_state: Under ddp, cut the state of NLCG into shards, one per worker.
        sync_batch_norm: Batch norm over the examples of all workers, not of each micro-batch alone.
        replica_check: Steps between two comparisons of the parameters over the workers that have the same ones, which
            finds damage by faulty hardware; 0: none.

    Raises UnknownName for a name that does not exist and ValueError for a value out of its range.
    """

    data: str = "digits"
    data_root: str | None = None
    image_size: int | None = None
    download: bool = False
    model: str | None = None
    optimizer: str = "nlcg"
    lr: float | None = None
    weight_decay: float = 0.0
    optimizer_options: dict[str, Any] = field(default_factory=dict, hash=False)
    batch_size: int | Literal["full"] = 128
    batch_schedule: tuple[tuple[int, int], ...] = ()
    batch_schedule_lr: BatchLR = "constant"
    batch_growth: float = 0.0
    batch_max: int | None = None
    micro_batch: int | None = None
    epochs: float = 20.0
    steps: int | None = None
    schedule: Schedule = "polynomial"
    warmup: float = 0.125
    decay_norm_and_bias: bool = True
    ema: float | None = None
    label_smoothing: float = 0.0
    discard_small_loss: float = 0.0
    discard_forward: DiscardForward = "once"
    augment: bool = True
    precision: Precision = "auto"
    channels_last: bool | None = None
    compile: bool = False
    evaluations: int = 10
    checkpoints: int = 10
    keep: int = 2
    asynchronous: bool = False
    max_skipped: int = 10
    clip_norm: float | None = None
    spectra: int = 0
    spectrum_at: tuple[float, ...] = ()
    spectrum_steps: int = 40
    spectrum_probes: int = 2
    spectrum_examples: int | None = 1000
    spectrum_bn_mode: BNMode = "train"
    noise_scale: int = 0
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    tensorboard: bool = False
    parallel: Parallel = "ddp"
    shard_workers: int | None = None
    shard_state: bool = False
    sync_batch_norm: bool = False
    replica_check: int = 0

    def __post_init__(self) -> None:
        if self.model is not None and self.model not in models.names():
            unknown("model", self.model, models.names())
        factory = optimizers.entry(self.optimizer).factory
        choices = (
            *(("schedule", Schedule), ("precision", Precision), ("parallel", Parallel)),
            *(("batch_schedule_lr", BatchLR), ("discard_forward", DiscardForward)),
            ("spectrum_bn_mode", BNMode),
        )
        for name, accepted in ((name, get_args(choice)) for name, choice in choices):
            if getattr(self, name) not in accepted:
                unknown(name, getattr(self, name), accepted)
        if self.batch_size != "full":
            self._check_count("batch_size", "an integer >= 1 or 'full'")
        self._check_batch_schedule()
        self._check_batch_growth()
        for name in ("evaluations", "keep", "max_skipped", "spectrum_steps", "spectrum_probes"):
            self._check_count(name, "an integer >= 1")
        for name in (
            "micro_batch",
            "batch_max",
            "steps",
            "threads",
            "image_size",
            "shard_workers",
            "spectrum_examples",
        ):
            if getattr(self, name) is not None:
                self._check_count(name, "an integer >= 1 or None")
        for name in ("checkpoints", "seed", "replica_check", "spectra", "noise_scale"):
            self._check_count(name, "an integer >= 0", least=0)
        self._check("lr", self.lr is None or 0 <= self.lr < math.inf, "in [0, inf) or None")
        self._check("weight_decay", 0 <= self.weight_decay < math.inf, "in [0, inf)")
        self._check("epochs", 0 < self.epochs < math.inf, "in (0, inf)")
        self._check("warmup", 0 <= self.warmup <= 1, "a fraction of the steps, in [0, 1]")
        self._check("ema", self.ema is None or 0 <= self.ema < 1, "in [0, 1) or None")
        self._check("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)")
        self._check("discard_small_loss", 0 <= self.discard_small_loss < 1, "in [0, 1)")
        self._check("clip_norm", self.clip_norm is None or 0 < self.clip_norm < math.inf, "in (0, inf) or None")
        self._check("spectrum_at", all(0 <= epoch < math.inf for epoch in self.spectrum_at), "epochs in [0, inf)")
        hsdp, sliced = self.parallel == "hsdp", factory is NLCG and self.parallel == "ddp"
        self._check("shard_workers", self.shard_workers is None or hsdp, "None unless parallel is 'hsdp'")
        self._check("shard_state", not self.shard_state or sliced, "False unless the optimizer is NLCG, under 'ddp'")

    def _check_batch_schedule(self) -> None:
        pairs = self.batch_schedule
        good = all(len(pair) == 2 and all(_is_count(number) for number in pair) for pair in pairs)
        good = good and all(early[0] < late[0] for early, late in pairwise(pairs))
        self._check("batch_schedule", good, "pairs of integers (epoch >= 1, batch >= 1), with growing epochs")

    def _check_batch_growth(self) -> None:
        grows = self.batch_growth != 0
        self._check("batch_growth", 0 <= self.batch_growth < math.inf, "in [0, inf)")
        self._check("batch_max", self.batch_max is None or grows, "None without batch_growth")
        self._check("batch_schedule_lr", self.batch_schedule_lr != "noise" or grows, "another without batch_growth")
        apart = "with batch_growth"
        self._check("noise_scale", not grows or self.noise_scale >= 1, f">= 1 {apart}")
        self._check("batch_schedule", not (grows and self.batch_schedule), f"empty {apart}")
        self._check("batch_size", not grows or self.batch_size != "full", f"a number {apart}")
        self._check("steps", not grows or self.steps is None, f"None {apart}: epochs say how long")
        keeps = self.discard_small_loss == 0 or self.noise_scale == 0
        self._check("noise_scale", keeps, "0 with discard_small_loss, which chooses examples by their losses")

    def _check(self, name: str, condition: bool, accepted: str) -> None:
        check(condition, "TrainConfig", name, getattr(self, name), accepted)

    def _check_count(self, name: str, accepted: str, *, least: int = 1) -> None:
        self._check(name, _is_count(getattr(self, name), least), accepted)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON, YAML or TOML (which has no None: leave those out there)."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`; settings that are absent keep their defaults.

        Raises UnknownName for a setting that does not exist.
        """
        known = [item.name for item in fields(cls)]
        for name in values:
            if name not in known:
                unknown("training setting", name, known)
        pairs = tuple(tuple(pair) for pair in values.get("batch_schedule", ()))
        epochs = tuple(values.get("spectrum_at", ()))
        return cls(**{**values, "batch_schedule": pairs, "spectrum_at": epochs})


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What came out of a training run.

    steps: taken, the skipped ones too. samples: examples sent forward and backward. train_loss: mean over the steps
    since the last evaluation but one, with augmentation and label smoothing. loss, accuracy (fraction): on the test
    split, at the end, with the averaged weights if there are any. Losses are None where they are not finite. curve:
    (step, accuracy) of every evaluation. diverged: stopped after too many skipped steps. seconds: spent in training
    steps, not in evaluations and checkpoints; images_per_second: samples over seconds, of all workers together.
    parameters: their number. model: on the training device, with its own weights (not their average); with fsdp and hsdp
    they are DTensors. All else is the same on all workers.
    """

    steps: int
    samples: int
    train_loss: float | None
    loss: float | None
    accuracy: float
    curve: tuple[tuple[int, float], ...]
    diverged: bool
    skipped_steps: int
    seconds: float
    images_per_second: float
    parameters: int
    model: nn.Module = field(compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """All but the model, as plain values."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "model"}


def _is_count(value: object, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def finite(value: torch.Tensor) -> float | None:
    """The number in a 0-d tensor, or None if it is NaN or infinite."""
    number = value.item()
    return number if math.isfinite(number) else None
