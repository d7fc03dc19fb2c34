"""Exponential moving average of the weights, for evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from conjugo._space import to_local
from conjugo.errors import check
from conjugo.optim._base import copy, state_dtype

__all__ = ["WeightEMA", "ema_decay"]


class WeightEMA:
    r"""A running average of a model's parameters, which :meth:`averaged` lends to the model for evaluation.

    .. math:: \bar w \leftarrow d_t \bar w + (1 - d_t) w, \qquad d_t = \min(d, (1 + t) / (10 + t))

    with t the number of earlier updates: the first averages forget the initial weights quickly. Only parameters are
    averaged; buffers (running statistics of batch normalisation) stay those of the model. The averages are kept in
    float32 (float64 for float64 parameters), one vector more than the model.

    Args:
        model: the model in training; its parameters, also DTensors, are read at each :meth:`update`.
        decay: the limit :math:`d`, in [0, 1).

    Raises:
        ValueError: *decay* is out of its range.

    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> ema = WeightEMA(model)
    >>> _ = model.weight.data.add_(1.0)
    >>> ema.update()  # the first decay is 1/10
    >>> with ema.averaged():
    ...     lent = model.weight.item()
    >>> round(model.weight.item() - lent, 3)
    0.1
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999) -> None:
        check(0 <= decay < 1, "WeightEMA", "decay", decay, "in [0, 1)")
        self.decay = decay
        self.updates = 0
        self._model = model
        self._reshard()
        self._parameters = dict(model.named_parameters())
        self._averages = {
            name: p.detach().to(state_dtype(p) if p.is_floating_point() else p.dtype, copy=True)
            for name, p in self._parameters.items()
        }
        self._lent = False

    @torch.no_grad()
    def update(self) -> None:
        """Take in the model's present parameters; call it after each optimizer step."""
        if self._lent:
            raise RuntimeError("WeightEMA: update() was called while the model holds the averages")
        weight = 1 - ema_decay(self.updates, self.decay)
        for name, average in self._averages.items():
            to_local(average).lerp_(to_local(self._parameters[name]).to(average.dtype), weight)
        self.updates += 1

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the ``with`` block the model has the averaged parameters; afterwards its own, bit for bit."""
        if self._lent:
            raise RuntimeError("WeightEMA: the model holds the averages already")
        own = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._lent = True
        try:
            self._write(self._averages)
            yield
        finally:
            self._write(own)
            self._lent = False

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, p in self._parameters.items():
            to_local(p).copy_(to_local(values[name]))
        self._reshard()

    def _reshard(self) -> None:
        """Drop whole parameters: ``fully_shard`` keeps some after a forward pass without backward pass, for the next one."""
        for module in self._model.modules():
            # Looked up on the class: a module is slow to say that it lacks something.
            if hasattr(type(module), "reshard"):
                module.reshard()  # type: ignore[operator]

    def state_dict(self) -> dict[str, Any]:
        """The averages by parameter name, the decay, and the number of updates."""
        return {"decay": self.decay, "updates": self.updates, "averages": dict(self._averages)}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from *state_dict*, whose averages may be laid out over ranks in another way.

        Raises ``ValueError``, before anything changes, if it is of another model.
        """
        averages = state_dict["averages"]
        shapes = {name: tuple(t.shape) for name, t in self._averages.items()}
        saved = {name: tuple(t.shape) for name, t in averages.items()}
        differing = sorted(name for name in shapes | saved if shapes.get(name) != saved.get(name))
        check(
            not differing, "WeightEMA", "averages", differing, "of the same names and shapes as the model's parameters"
        )
        for name, average in self._averages.items():
            copy(average, averages[name])
        self.decay, self.updates = state_dict["decay"], state_dict["updates"]


def ema_decay(t: int, decay: float) -> float:
    """min(decay, (1 + t) / (10 + t)), the decay of update t = 0, 1, 2, ...: at first the average follows quickly."""
    return min(decay, (1 + t) / (10 + t))
