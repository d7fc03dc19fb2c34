"""The training loop.

Read `Trainer.train_step` first: it is what happens in a step. `Trainer.fit` is the loop around it, `train` the function
that users call. What they rely on is next door: `batches` (data to device), `guard` (steps that are not finite), `workers` (how
several share the work), `run` (what is written), `metrics` (what is shown).
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from conjugo.distributed import (
    GlobalBatchSampler,
    PerRank,
    RandomState,
    ReplicaCheck,
    StragglerMonitor,
    average_statistics,
    gradient_sync,
    micro_batches,
    sync_batch_norm,
    warn_of_small_micro_batch,
)
from conjugo.errors import TrainingDiverged, check
from conjugo.optim import DiscardSmallLoss, WeightEMA
from conjugo.optim.schedules import BatchSizeSchedule, ScheduleLR, WarmupCosine, WarmupPolynomial
from conjugo.optim.small_loss import kept_count
from conjugo.scaling.batch_schedule import MeasuredBatchSize
from conjugo.training import data as datasets
from conjugo.training import models, optimizers
from conjugo.training.batch_norm import RunningStatistics
from conjugo.training.batches import Feed
from conjugo.training.callbacks import Callback
from conjugo.training.config import TrainConfig, TrainResult, finite
from conjugo.training.guard import Guard
from conjugo.training.machine import Clock, choose_device, held_signals, interrupt, isolated, pays_bfloat16
from conjugo.training.metrics import Display, Record
from conjugo.training.noise_scale import NoiseScaleRecorder
from conjugo.training.run import RunDirectory
from conjugo.training.spectrum import SpectrumRecorder
from conjugo.training.workers import Workers, spread

__all__ = ["TrainConfig", "TrainResult", "Trainer", "train"]

_EVALUATION_BATCH = 500


def train(
    config: TrainConfig,
    *,
    out: Path | None = None,
    data: datasets.Dataset | None = None,
    resume: bool = False,
    progress: bool | None = None,
    stop_on_divergence: bool = True,
    callbacks: Sequence[Callback] = (),
) -> TrainResult:
    """Train a model as *config* says and evaluate it.

    Where torch.distributed is initialised (:func:`conjugo.distributed.init`), this is collective: all workers train one model,
    on their shares of each batch, and get the same result. The batches and their augmentation do not depend on how many there
    are. A number of workers that has changed on *resume* changes results only by rounding, but for the random numbers that
    layers such as dropout draw.

    out: the run directory (see :class:`~conjugo.training.run.RunDirectory`); None writes nothing. data: instead of the
    data set that *config* names. resume: go on from the newest good checkpoint in *out*, or begin if there is none; the
    result is the one of the uninterrupted run, bit for bit on a CPU. progress: show a bar; None: if standard error is a
    terminal. stop_on_divergence: False gives a result with ``diverged=True`` where otherwise TrainingDiverged is raised.
    callbacks: what is done between the steps (:data:`~conjugo.training.callbacks.Callback`).

    torch's global random state, number of threads and deterministic mode are afterwards what they were.

    Raises ValueError for a batch larger than the data or a run that was started with another configuration,
    FileExistsError if *out* holds a run already, CorruptFile if no checkpoint of it can be read, TrainingDiverged after
    ``config.max_skipped`` steps in a row without a finite loss and gradient, and KeyboardInterrupt at Ctrl-C (SystemExit(143)
    at SIGTERM), on all workers if one of them is interrupted, when a
    checkpoint is written.

    >>> result = train(TrainConfig(data="digits", optimizer="nlcg", lr=0.3, epochs=3))
    >>> result.accuracy > 0.5
    True
    """
    if data is None:
        data = datasets.load(config.data, root=config.data_root, download=config.download, image_size=config.image_size)
    config = replace(config, data=data.name)
    with isolated(config):
        trainer = Trainer(config, data, callbacks)
        run = None if out is None else RunDirectory(Path(out), config, resume=resume)
        return trainer.fit(run, progress=progress, stop_on_divergence=stop_on_divergence)


class Trainer:
    """One training run: the model, its data, its optimizer, and how far they have come.

    Of several workers each makes one, together. Raises ValueError if a batch is larger than the data, or smaller than the
    number of workers.
    """

    def __init__(self, config: TrainConfig, data: datasets.Dataset, callbacks: Sequence[Callback] = ()) -> None:
        n = len(data.train)
        self.workers = Workers()
        self.batches = _batches(config, data, self.workers)
        accepted = f"at least {self.workers.size}, the number of workers"
        check(len(data.test) >= self.workers.size, "train", "the number of test examples", len(data.test), accepted)
        self.config = config
        self._parts: dict[int, list[tuple[slice, int]]] = {}
        self._cut(self.batches.batch_at(0))
        self._unit = self.batch_size if isinstance(self.batches, MeasuredBatchSize) else 0
        by_schedule = isinstance(self.batches, MeasuredBatchSize) or config.batch_schedule
        whole = self.batches.steps(n, config.epochs) if by_schedule else config.epochs * n / self.batch_size
        self.steps = config.steps or max(1, round(whole))
        several = "without a number where there are several workers: each takes its own"
        check(self.workers.size == 1 or ":" not in config.device, "TrainConfig", "device", config.device, several)
        self.device = choose_device(config.device)

        torch.manual_seed(config.seed)
        self._build_model(data)
        augment = datasets.default_augment(data) if data.kind == "image" else None
        self.train_data = self._feed(data.train, augment, random=config.augment)
        self.test_data = self._feed(data.test, augment, random=False)
        self.sampler = GlobalBatchSampler(n, self.batches, seed=config.seed)
        self._look_at_batch_norm()
        self.optimizer = _optimizer(config, self.model)
        self._probes = bool(getattr(self.optimizer, "needs_batch", False))
        if self._probes:
            _check_probed(config)
        self.schedule = _schedule(config, self.optimizer, self.steps)
        self.discard = _discard(config, self.steps)
        self.noise = self._noise_recorder() if config.noise_scale else None
        self.guard = Guard(
            self.optimizer,
            self.model,
            max_skipped=config.max_skipped,
            clip_norm=config.clip_norm,
            needs_loss=getattr(self.optimizer, "needs_loss", optimizers.entry(config.optimizer).needs_loss),
        )
        self.ema = None if config.ema is None else WeightEMA(self.model, config.ema)
        self.statistics = RunningStatistics(self.model)
        self.stragglers = StragglerMonitor(device=self.device) if self.workers.size > 1 else None
        watched = self.workers.size > 1 and config.replica_check > 0
        self.replicas = ReplicaCheck(self.model, every=config.replica_check) if watched else None

        self.step = 0
        self.samples = 0
        self._interrupted: Callable[[], int] = _never
        self._signals = torch.zeros(2, dtype=torch.float64, device=self.device)
        if self.workers.size > 1:
            self._seed_worker()
        self.clock = Clock(self.device)
        self.loss_sum = torch.zeros((), device=self.device)  # over the steps since the last evaluation
        self.loss_sum_all = torch.zeros_like(self.loss_sum)  # with the examples that were discarded
        self.loss_steps = 0
        self.history: list[Record] = []
        self.folder: Path | None = None  # where the run is written down
        self.callbacks = list(callbacks)
        if config.spectra or config.spectrum_at:
            self.callbacks.append(SpectrumRecorder(config, data, self.steps))
        self.measured: Record = {}  # by callbacks since the last evaluation

    def _build_model(self, data: datasets.Dataset) -> None:
        """The model on its device, in the precision and memory layout that pay there."""
        config = self.config
        name = config.model or models.default_for(data)
        self.model = models.build(name, input_shape=data.input_shape, num_classes=data.num_classes).to(self.device)
        convolutional = any(isinstance(module, nn.Conv2d) for module in self.model.modules())
        self.channels_last = convolutional if config.channels_last is None else config.channels_last
        whole = config.parallel == "ddp" or self.workers.size == 1
        if self.channels_last and whole:  # FSDP takes contiguous parameters only; convolutions go by their input then
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        wanted = {"float32": False, "bfloat16": True, "auto": convolutional and pays_bfloat16(self.device)}
        self.bfloat16 = wanted[config.precision]
        if config.sync_batch_norm:
            self.model = sync_batch_norm(self.model)
        self.spread = spread(
            self.model,
            config.parallel,
            workers=self.workers,
            device=self.device,
            shard_workers=config.shard_workers,
            bfloat16=self.bfloat16,
        )
        self.forward = torch.compile(self.spread) if config.compile else self.spread

    def _cut(self, batch_size: int) -> None:
        """Go on with batches of this size."""
        self.batch_size = batch_size
        self.parts = self._parts_of(batch_size)

    def _parts_of(self, batch_size: int) -> list[tuple[slice, int]]:
        """This worker's micro-batches: rows of a batch, and how many of them count."""
        if batch_size not in self._parts:
            rows = torch.arange(batch_size)
            parts, counts = micro_batches(rows, self.workers.rank, self.workers.size, size=self.config.micro_batch)
            slices = [slice(int(part[0]), int(part[-1]) + 1) for part in parts]
            self._parts[batch_size] = list(zip(slices, counts, strict=True))
        return self._parts[batch_size]

    def _look_at_batch_norm(self) -> None:
        """Warn if it is to see much less than a batch."""
        together = self.workers.size if self.config.sync_batch_norm else 1
        for _, batch_size in self.batches.milestones:
            examples = together * min(rows.stop - rows.start for rows, _ in self._parts_of(batch_size))
            if examples < batch_size and self.workers.first:
                warn_of_small_micro_batch(self.model, examples)

    def _noise_recorder(self) -> NoiseScaleRecorder:
        endless = self.train_data.random
        recorder = NoiseScaleRecorder(
            self.config,
            self.model,
            self.optimizer,
            workers=self.workers.size,
            population=None if endless else self.sampler.n,
        )
        if isinstance(self.batches, MeasuredBatchSize):
            self.batches.monitor = recorder.leading
        return recorder

    def _feed(self, split: datasets.Split, augment: datasets.Augment | None, *, random: bool) -> Feed:
        return Feed(
            split,
            augment,
            random=random,
            device=self.device,
            channels_last=self.channels_last,
            seed=self.config.seed,
        )

    # One step --------------------------------------------------------------------------------------------------------

    def train_step(self) -> None:
        """Draw a batch, sum the gradients of its micro-batches, and take one step of the optimizer."""
        batch = self.train_data.draw(self._next_batch())
        self.optimizer.zero_grad()
        if getattr(self.optimizer, "needs_curvature", False):
            self._measure_curvature(batch)
        if self._probes:
            self._show(batch)
        if self.discard is None:
            batch_loss = self._of_all_workers(self._backward(batch))
        else:
            loss, all_losses = self._backward_of_largest(batch, self.discard)
            batch_loss = self._of_all_workers(loss)
            self.loss_sum_all += batch_loss if all_losses is None else all_losses.mean()
        if self.noise is not None:
            self.noise.after_backward(self, batch)
        self.step += 1
        self.samples += self.batch_size
        self.loss_sum += batch_loss
        self.loss_steps += 1
        self.guard.step(batch_loss)
        self.schedule.advance(self.progress - self._progress_before)
        if self.ema is not None:
            self.ema.update()
        if self.stragglers is not None:
            self.stragglers.after_step()
        if self.replicas is not None:
            self.replicas.after_step()

    @property
    def progress(self) -> int:
        """Steps so far; where a measurement lets the batch grow: examples so far, in batches of the first size."""
        return self.samples // self._unit if self._unit else self.step

    @property
    def _progress_before(self) -> int:
        """Before the last step."""
        return (self.samples - self.batch_size) // self._unit if self._unit else self.step - 1

    def reached(self, marks: Collection[int]) -> bool:
        """Whether one of *marks*, numbers of steps as :attr:`progress` counts them, was reached in the last step."""
        return any(self._progress_before < mark <= self.progress for mark in marks)

    def _next_batch(self) -> Tensor:
        """Which examples: int64 [B]. Where an epoch begins with another batch size, all that goes by it follows."""
        indices = next(self.sampler)
        if len(indices) != self.batch_size:
            self._cut(len(indices))
            self.schedule.rescale(self.batches.lr_factor_at(self.sampler.epoch))
            restart = getattr(self.optimizer, "restart", None)
            if restart is not None:  # what it has learnt from other batches does not hold for these
                restart()
        return indices

    def _measure_curvature(self, batch: Tensor) -> None:
        """Collective: let the optimizer measure the curvature, in float32, on each worker's first micro-batch of *batch*."""
        rows, count = self._parts_of(len(batch))[0]
        inputs, targets = self.train_data.take(batch[rows])
        loss_fn = partial(F.cross_entropy, label_smoothing=self.config.label_smoothing)
        self.optimizer.measure(self.spread, loss_fn, inputs, targets, weight=count)  # type: ignore[attr-defined]

    def _show(self, batch: Tensor) -> None:
        """Let the optimizer look at *batch* once more in its step; its micro-batches are made again then."""
        smoothing = self.config.label_smoothing

        def loss_fn(logits: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)

        with torch.autocast(self.device.type, dtype=torch.bfloat16) if self.bfloat16 else nullcontext():
            for rows, count in self._parts_of(len(batch)):
                make = partial(self.train_data.take, batch[rows])
                self.optimizer.observe_batch(self.forward, loss_fn, make, weight=count)  # type: ignore[attr-defined]

    def _backward(self, batch: Tensor) -> Tensor:
        """The gradient of the mean loss of *batch*, a whole one or a part of it; the losses (0-d) of this worker's share."""
        parts = self._parts_of(len(batch))
        losses: list[Tensor] = []
        with self.statistics.following(self.step, updates=len(parts)):
            for rows, count in parts:
                with self._syncing(last=len(losses) + 1 == len(parts)):
                    with self._measured():
                        loss = self.loss(*self.train_data.take(batch[rows]))
                    # Gradients are averaged over the workers: so every example of the batch has the same weight.
                    weight = self.workers.size * count / len(batch)
                    if weight != 1:
                        loss = loss * weight
                    with self._looked_at(len(parts), count, weight):
                        loss.backward()  # type: ignore[no-untyped-call]
                losses.append(loss.detach())
        return sum(losses[1:], losses[0])

    def _backward_of_largest(self, batch: Tensor, discard: DiscardSmallLoss) -> tuple[Tensor, Tensor | None]:
        """:meth:`_backward` without the small losses, and all losses [B] of the batch (None: the small ones were not left out).

        The workers choose among the losses of all: so it does not depend on how they share the batch.
        """
        discard.steps = self.progress
        if not discard.active:
            return self._backward(batch), None
        if self.config.discard_forward == "twice":
            losses = self._score(batch)
            count = kept_count(len(batch), discard.q)
            kept = discard.keep_mask(losses).int().argsort(descending=True, stable=True)[:count]
            return self._backward(batch[kept]), losses
        ((rows, _),) = self.parts
        with self.statistics.following(self.step, updates=1):
            with self._measured():
                own = self.losses(*self.train_data.take(batch[rows]))
            losses = self._losses_of_all([(rows, own.detach())])
            keep = discard.keep_mask(losses)
            loss = torch.where(keep[rows], own, 0.0).sum() * (self.workers.size / keep.sum())
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), losses

    @torch.no_grad()
    def _score(self, batch: Tensor) -> Tensor:
        """Collective: the losses [B] of *batch*, which leave no trace in the model."""
        buffers = list(self.model.buffers())
        before = [buffer.clone() for buffer in buffers]
        with self._measured():
            own = [(rows, self.losses(*self.train_data.take(batch[rows]))) for rows, _ in self.parts]
        if buffers:
            torch._foreach_copy_(buffers, before)
        return self._losses_of_all(own)

    def _losses_of_all(self, own: list[tuple[slice, Tensor]]) -> Tensor:
        """Collective: the losses [B] of the batch, the same on all workers. *own*: rows of this worker, and their losses."""
        losses = torch.zeros(self.batch_size, device=self.device)
        for rows, values in own:
            losses[rows] = values
        return self.workers.sum(losses)

    def _measured(self) -> AbstractContextManager[None]:
        """Around what each worker computes without waiting for others (but with shards also its forward pass waits)."""
        return nullcontext() if self.stragglers is None else self.stragglers.computing()

    def _syncing(self, *, last: bool) -> AbstractContextManager[None]:
        """Around a micro-batch: the workers add up their gradients in the last one."""
        return nullcontext() if self.workers.size == 1 else gradient_sync(self.spread, last=last)

    def _looked_at(self, parts: int, count: int, weight: float) -> AbstractContextManager[None]:
        """Around the backward pass of one of *parts* micro-batches: *count* examples, whose loss has the factor *weight*."""
        return nullcontext() if self.noise is None else self.noise.micro_batch(self, parts, count, weight)

    def _of_all_workers(self, loss: Tensor) -> Tensor:
        """Collective: the mean of *loss* over the workers. Whether one of them is asked to stop travels with it."""
        if self.workers.size == 1:
            return loss
        asked = self._interrupted()
        told = torch.tensor([asked == signal.SIGINT, asked == signal.SIGTERM]).to(self._signals, non_blocking=True)
        shared = self.workers.sum(torch.cat([loss.to(told)[None] / self.workers.size, told]))
        self._signals += shared[1:]
        return shared[0].to(loss.dtype)

    def _asked_to_stop(self) -> int:
        """The number of the signal that asked a worker to stop, the same on all in the same step; 0: go on."""
        if self.workers.size == 1:
            return self._interrupted()
        if self.step % self.guard.window and self.progress < self.steps:  # reading would make a GPU wait in each step
            return 0
        by_ctrl_c, by_sigterm = self._signals.tolist()
        return signal.SIGINT if by_ctrl_c else signal.SIGTERM if by_sigterm else 0

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of a batch (0-d, float32)."""
        return F.cross_entropy(self.logits(inputs), targets, label_smoothing=self.config.label_smoothing)

    def losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each example of a batch (float32 [B])."""
        smoothing = self.config.label_smoothing
        return F.cross_entropy(self.logits(inputs), targets, label_smoothing=smoothing, reduction="none")

    def logits(self, inputs: Tensor) -> Tensor:
        """What the model says to a batch: float32 [B, num_classes]."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16) if self.bfloat16 else nullcontext():
            logits: Tensor = self.forward(inputs)
        return logits.float()

    # The loop --------------------------------------------------------------------------------------------------------

    def fit(
        self, run: RunDirectory | None = None, *, progress: bool | None = None, stop_on_divergence: bool = True
    ) -> TrainResult:
        """Train to the end, with evaluations and checkpoints in between; *run*: go on from where it stands.

        Arguments and exceptions as those of :func:`train`.
        """
        if run is not None:
            self.folder = run.folder
            run.restore(self.stateful())
            run.show(self.config, self.history)
        with (
            Display(self.steps, done=self.progress, show=progress if self.workers.first else False) as display,
            nullcontext(_never) if run is None else held_signals() as self._interrupted,
        ):
            diverged = False
            try:
                self._loop(run, display)
            except TrainingDiverged as error:
                if stop_on_divergence:
                    kept = "" if run is None else f"; {run.checkpoints.describe()}"
                    raise TrainingDiverged(f"step {self.step}: {error}{kept}") from None
                diverged = True
                self._evaluate(run, display)
            finally:
                if run is not None:
                    run.checkpoints.wait()
        result = self.result(diverged=diverged)
        if run is not None:
            run.finish(result)
        return result

    def _loop(self, run: RunDirectory | None, display: Display) -> None:
        evaluate_at = _evenly(self.steps, self.config.evaluations)
        save_at = _evenly(self.steps, self.config.checkpoints)
        with self.clock.running():
            if self.step == 0:
                self._call_back()
            while self.progress < self.steps:
                self.train_step()
                display.at(self.progress)
                self._call_back()
                if self.reached(evaluate_at):
                    self._evaluate(run, display)
                stop = self._asked_to_stop()
                if run is not None and (stop or self.reached(save_at)):
                    self._save(run)
                if stop:
                    interrupt(stop)
        if self.stragglers is not None:
            self.stragglers.finish()
        if self.replicas is not None:
            self.replicas.compare()

    def _call_back(self) -> None:
        for callback in self.callbacks:
            self.measured |= callback(self) or {}

    def _evaluate(self, run: RunDirectory | None, display: Display) -> None:
        with self.clock.paused():
            self.history.append(self.evaluate())
            display.evaluated(self.history[-1])
            if run is not None:
                run.record(self.history)

    def _save(self, run: RunDirectory) -> None:
        with self.clock.paused():
            self.guard.check()
            if self.replicas is not None:
                self.replicas.compare()  # a checkpoint is to be good
            # A step that was too long may have made weights infinite. Better a checkpoint from before that.
            if self.guard.space.isfinite(list(self.model.parameters())):
                stateful = self.stateful()
                with self.averaged_statistics():
                    run.checkpoints.save(self.step, **stateful)

    @contextmanager
    def averaged_statistics(self) -> Iterator[None]:
        """Collective: inside, the running statistics of batch norm are averages over the workers, which have their own."""
        if self.workers.size == 1:
            yield
            return
        buffers = list(self.model.buffers())
        own = [buffer.clone() for buffer in buffers]
        average_statistics(self.model)
        yield
        if buffers:
            torch._foreach_copy_(buffers, own)

    # What the run shows ----------------------------------------------------------------------------------------------

    def evaluate(self) -> Record:
        """Loss and accuracy on the test split now, with the averaged weights if there are any, and how training goes."""
        self.guard.check()
        with self.averaged_statistics(), nullcontext() if self.ema is None else self.ema.averaged():
            loss, accuracy = self._test()
        samples, seconds = self.samples, self.clock.seconds
        record = {
            "step": self.step,
            "epoch": samples / self.sampler.n,
            "samples": samples,
            "batch_size": self.batch_size,
            "train_loss": finite(self.loss_sum / max(1, self.loss_steps)),
            "loss": finite(loss),
            "accuracy": accuracy,
            "lr": self.schedule.base_lrs[0] * self.schedule.factor(max(0, self._progress_before)) * self.schedule.scale,
            "skipped_steps": self.guard.skipped,
            "seconds": seconds,
            "images_per_second": samples / seconds if seconds > 0 else 0.0,
        }
        last = getattr(self.optimizer, "last", {})
        # One value for each parameter where each has its own.
        record |= {name: finite(last[name].mean()) for name in ("beta", "base_lr", "step_size") if name in last}
        if self._probes:
            record["passes"] = self.optimizer.passes  # type: ignore[attr-defined]
        if self.discard is not None:
            record["train_loss_all"] = finite(self.loss_sum_all / max(1, self.loss_steps))
        if self.noise is not None:
            record |= self.noise.numbers()
        record |= self.measured
        self.measured = {}
        self.loss_sum.zero_()
        self.loss_sum_all.zero_()
        self.loss_steps = 0
        return record

    @torch.no_grad()
    def _test(self) -> tuple[Tensor, float]:
        """Mean cross-entropy (0-d) and accuracy on the test split."""
        self.model.eval()
        loss, correct = torch.zeros(2, device=self.device).unbind()
        batch = min(_EVALUATION_BATCH, self.config.micro_batch or _EVALUATION_BATCH)
        for inputs, targets, count in self.test_data.in_order(batch, rank=self.workers.rank, world=self.workers.size):
            logits = self.logits(inputs)
            if count:
                loss += F.cross_entropy(logits, targets, reduction="sum")
                correct += (logits.argmax(dim=1) == targets).sum()
        self.model.train()
        loss, correct = self.workers.sum(torch.stack([loss, correct]).double()).unbind()
        n = len(self.test_data)
        return loss.float() / n, correct.item() / n

    def result(self, *, diverged: bool) -> TrainResult:
        """Collective: the outcome, as the last evaluation saw it. The statistics of batch norm become those of all workers."""
        average_statistics(self.model)
        last = self.history[-1]
        return TrainResult(
            steps=self.step,
            samples=last["samples"],
            train_loss=last["train_loss"],
            loss=last["loss"],
            accuracy=last["accuracy"],
            curve=tuple((record["step"], record["accuracy"]) for record in self.history),
            diverged=diverged,
            skipped_steps=self.guard.skipped,
            seconds=last["seconds"],
            images_per_second=last["images_per_second"],
            parameters=sum(p.numel() for p in self.model.parameters()),
            model=self.model,
        )

    # Resuming --------------------------------------------------------------------------------------------------------

    def stateful(self) -> dict[str, Any]:
        """All that the rest of the run depends on, for a :class:`~conjugo.distributed.Checkpointer`."""
        parts = {
            "model": self.model,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "guard": self.guard,
            "sampler": self.sampler,
            "trainer": self,
            "worker": PerRank(_OwnState(self.model, self.guard)),
        }
        return parts if self.ema is None else {**parts, "ema": self.ema}

    def state_dict(self) -> dict[str, Any]:
        """How far the run has come, as far as the other parts in :meth:`stateful` do not know: tensors and plain values."""
        return {
            "step": self.step,
            "samples": self.samples,
            "batch_size": self.batch_size,
            "batches": self.batches.state_dict(),
            "history": self.history,
            "seconds": self.clock.seconds,
            "loss_sum": self.loss_sum,
            "loss_sum_all": self.loss_sum_all,
            "loss_steps": self.loss_steps,
            "measured": self.measured,
            "noise": None if self.noise is None else self.noise.state_dict(),
            "augmentation": self.train_data.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.step = state["step"]
        if "batches" in state:  # otherwise an older version wrote it: one batch size, all examples kept
            self.batches.load_state_dict(state["batches"])
            self._cut(state["batch_size"])
            self.loss_sum_all.copy_(state["loss_sum_all"])
        self.samples = state.get("samples", self.step * self.batch_size)
        self.history = state["history"]
        self.clock.seconds = state["seconds"]
        self.loss_sum.copy_(state["loss_sum"])
        self.loss_steps = state["loss_steps"]
        self.measured = state.get("measured", {})
        if self.noise is not None and state.get("noise") is not None:
            self.noise.load_state_dict(state["noise"])
        self.train_data.generator.set_state(state["augmentation"].cpu())
        self._seed_worker()  # if there are as many workers as before, each gets its own state back after this

    def _seed_worker(self) -> None:
        """Give this worker random numbers of its own for the rest of the run."""
        source = (self.config.seed, self.workers.rank, self.samples)
        torch.manual_seed(int(np.random.SeedSequence(source).generate_state(1)[0]))


class _OwnState:
    """What each worker has for itself: random numbers, and running statistics of batch norm."""

    def __init__(self, model: nn.Module, guard: Guard) -> None:
        self._buffers = list(model.buffers())
        self._values = [buffer.clone() for buffer in self._buffers]
        self._guard = guard

    def state_dict(self) -> dict[str, Any]:
        return {"random": RandomState().state_dict(), "buffers": self._values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        RandomState().load_state_dict(state["random"])
        for buffer, value in zip(self._buffers, state["buffers"], strict=True):
            buffer.copy_(value)
        self._guard.keep_buffers()


def _batches(config: TrainConfig, data: datasets.Dataset, workers: Workers) -> BatchSizeSchedule | MeasuredBatchSize:
    """The batch sizes of a run, which fit the data and the workers."""
    n = len(data.train)
    sizes = [("batch_size", n if config.batch_size == "full" else config.batch_size)]
    sizes += [("batch_schedule", batch) for _, batch in config.batch_schedule]
    if config.batch_max is not None:
        sizes.append(("batch_max", config.batch_max))
    for name, size in sizes:
        full = ", or 'full'" if name == "batch_size" else ""
        accepted = f"at most {n}, the number of training examples of {data.name!r}{full}"
        check(size <= n, "TrainConfig", name, size, accepted)
        accepted = f"at least {workers.size}, the number of workers"
        check(size >= workers.size, "TrainConfig", name, size, accepted)
        if config.discard_small_loss:
            share = -(-size // workers.size)
            once = config.discard_forward == "twice" or config.micro_batch is None or config.micro_batch >= share
            accepted = f"at least {share}, a worker's share of a batch, unless discard_forward is 'twice'"
            check(once, "TrainConfig", "micro_batch", config.micro_batch, accepted)
            kept = kept_count(size, config.discard_small_loss)
            accepted = f"so small that of {size} examples each of {workers.size} workers has one"
            check(kept >= workers.size, "TrainConfig", "discard_small_loss", config.discard_small_loss, accepted)
    first = sizes[0][1]
    if config.batch_growth:
        most = n if config.batch_max is None else config.batch_max
        check(most >= first, "TrainConfig", "batch_max", most, f"at least {first}, the batch_size")
        return MeasuredBatchSize(None, first, most, fraction=config.batch_growth, lr=config.batch_schedule_lr)
    assert config.batch_schedule_lr != "noise"
    return BatchSizeSchedule([(0, first), *config.batch_schedule], lr=config.batch_schedule_lr)


def _discard(config: TrainConfig, steps: int) -> DiscardSmallLoss | None:
    """What leaves small losses out, if that is wanted; losses that are not finite are the guard's."""
    if config.discard_small_loss == 0:
        return None
    return DiscardSmallLoss(config.discard_small_loss, warmup_steps=int(config.warmup * steps), nonfinite="keep")


def _check_probed(config: TrainConfig) -> None:
    """Step sizes that look at the loss of a batch again take its gradient as it is."""
    words = "with an optimizer that looks at the loss again"
    check(config.clip_norm is None, "TrainConfig", "clip_norm", config.clip_norm, f"None {words}")
    check(not config.discard_small_loss, "TrainConfig", "discard_small_loss", config.discard_small_loss, f"0 {words}")


def _optimizer(config: TrainConfig, model: nn.Module) -> Optimizer:
    options = {"shard_state": True, **config.optimizer_options} if config.shard_state else config.optimizer_options
    return optimizers.build(
        config.optimizer,
        model,
        lr=config.lr,
        weight_decay=config.weight_decay,
        decay_vectors=config.decay_norm_and_bias,
        **options,
    )


def _schedule(config: TrainConfig, optimizer: Optimizer, steps: int) -> ScheduleLR:
    warmup = int(config.warmup * steps)
    if config.schedule == "cosine":
        return WarmupCosine(optimizer, warmup, steps)
    if config.schedule == "constant":
        return WarmupPolynomial(optimizer, warmup, steps, drops=())
    return WarmupPolynomial(optimizer, warmup, steps)


def _evenly(steps: int, count: int) -> frozenset[int]:
    """*count* of the steps 1..*steps*, evenly spaced, the last one among them; fewer if there are not so many steps."""
    return frozenset(round(steps * k / count) for k in range(1, count + 1)) - {0}


def _never() -> int:
    return 0
