"""The gradient noise scale while a model is trained: recording it, as ``TrainConfig.noise_scale`` says."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from conjugo.optim import NLCG
from conjugo.scaling.noise_monitor import MicroBatchNorms, NoiseScaleMonitor, Norms
from conjugo.scaling.noise_scale import undisturbed

if TYPE_CHECKING:
    from conjugo.training.config import TrainConfig
    from conjugo.training.trainer import Trainer

__all__ = ["NoiseScaleRecorder"]

WINDOW = 64
"""Measurements that count."""

PARTS = 4
"""Micro-batches into which a batch is cut where training itself does not cut it."""


class NoiseScaleRecorder:
    """Measures in every so many steps, and says what it found where a run is evaluated.

    Where a step has several micro-batches, over workers and accumulation, their gradients are looked at on their way.
    Otherwise the gradients of four parts of the batch are computed besides; with batch norm, which wants to see whole
    batches, that of another batch. Gradients are those of the loss: without weight decay, before clipping.

    config: of the run. model: whose parameters the optimizer has, sharded or not. population: so many examples there are,
    None where augmentation makes ever new ones.
    """

    def __init__(
        self, config: TrainConfig, model: nn.Module, optimizer: Optimizer, *, workers: int, population: int | None
    ) -> None:
        self._every = config.noise_scale
        self._seed = config.seed
        self._workers = workers
        self._population = population
        self.monitors = {"noise_scale": NoiseScaleMonitor(WINDOW)}
        whole = workers == 1 or (config.parallel == "ddp" and not config.shard_state)
        if whole and _has_metric(optimizer):
            self.monitors["noise_scale_optimizer"] = NoiseScaleMonitor(WINDOW, optimizer=optimizer)
        self._params = [p for p in model.parameters() if p.requires_grad]
        self._norms = MicroBatchNorms(model, *self.monitors.values(), population=population)
        self._by_batch = any(isinstance(module, _BatchNorm) for module in model.modules())

    @property
    def leading(self) -> NoiseScaleMonitor:
        """The monitor in the metric of the optimizer, if it has one; otherwise the Euclidean one."""
        return list(self.monitors.values())[-1]

    def micro_batch(self, trainer: Trainer, parts: int, examples: int, weight: float) -> AbstractContextManager[None]:
        """Around a backward pass: one of *parts* micro-batches of this worker. See :class:`MicroBatchNorms`."""
        if trainer.step % self._every or parts * self._workers < 2:
            return nullcontext()
        return self._norms.micro_batch(max(1, examples), weight=weight)

    def after_backward(self, trainer: Trainer, batch: Tensor) -> None:
        """Collective: the gradient of *batch* is there, and nothing has changed it."""
        if trainer.step % self._every:
            return
        if self._norms.seen:
            self._norms.step()
        elif self._by_batch:
            self._measure_with_another(trainer, batch)
        else:
            self._measure_parts(trainer, batch)

    def _measure_parts(self, trainer: Trainer, batch: Tensor) -> None:
        parts = torch.tensor_split(batch, min(PARTS, len(batch)))
        if len(parts) < 2:
            return
        norms = [Norms(monitor) for monitor in self.monitors.values()]
        total = [torch.zeros_like(p) for p in self._params]
        squares: list[list[Tensor]] = []
        with undisturbed(trainer.model, self._seed + trainer.step):
            for part in parts:
                gradients = self._gradients(trainer, part)
                squares.append([each.of_all(gradients, self._params) for each in norms])
                torch._foreach_add_(total, gradients, alpha=len(part) / len(batch))
        b_small = len(parts) / sum(1 / len(part) for part in parts)
        for each, *small in zip(norms, *squares):
            self._update(each, torch.stack(small).mean(), total, b_small, len(batch))

    def _measure_with_another(self, trainer: Trainer, batch: Tensor) -> None:
        """With a batch of other examples as large as *batch*, whose gradient is in ``.grad``."""
        n, size = trainer.sampler.n, len(batch)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(self._seed + trainer.step))
        others = order[~torch.isin(order, batch[:, 0].cpu().long())]
        if size < 2 or len(others) < size:
            return
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._params]
        with undisturbed(trainer.model, self._seed + trainer.step), _untouched(trainer.train_data.generator):
            other = self._gradients(trainer, trainer.train_data.draw(others[:size]))
        mean = torch._foreach_lerp(own, other, 0.5)
        for each in (Norms(monitor) for monitor in self.monitors.values()):
            small = (each.of_all(own, self._params) + each.of_all(other, self._params)) / 2
            self._update(each, small, mean, size, 2 * size)

    def _gradients(self, trainer: Trainer, part: Tensor) -> list[Tensor]:
        loss = trainer.loss(*trainer.train_data.take(part))
        found = torch.autograd.grad(loss, self._params, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self._params, found)]

    def _update(self, norms: Norms, small: Tensor, mean: Sequence[Tensor], b_small: float, b_big: int) -> None:
        if norms.known:
            population = self._population if self._population is not None and b_big <= self._population else None
            norms.monitor.update(small, norms.of_all(mean, self._params), b_small, b_big, population)

    def numbers(self) -> dict[str, float | None]:
        """What the last measurements say: ``noise_scale``, its ``_low`` and ``_high`` ends, and the same ``_optimizer``.

        None where nothing is known, and where only the lower end is.
        """
        found: dict[str, float | None] = {}
        for name, monitor in self.monitors.items():
            b_simple, (low, high) = monitor.b_simple, monitor.ci95
            found[name] = b_simple if math.isfinite(high) else None
            found[f"{name}_low"] = low if math.isfinite(low) and low > 0 else None
            found[f"{name}_high"] = high if math.isfinite(high) else None
        return found

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {name: monitor.state_dict() for name, monitor in self.monitors.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        for name, monitor in self.monitors.items():
            if name in state:
                monitor.load_state_dict(state[name])


def _has_metric(optimizer: Optimizer) -> bool:
    """Whether :func:`~conjugo.scaling.diagonal_metric` will know one."""
    if isinstance(optimizer, NLCG):
        return bool(optimizer.metric())
    return "betas" in optimizer.defaults and "eps" in optimizer.defaults


@contextmanager
def _untouched(generator: torch.Generator) -> Iterator[None]:
    """Afterwards *generator* is where it was."""
    state = generator.get_state()
    try:
        yield
    finally:
        generator.set_state(state)
