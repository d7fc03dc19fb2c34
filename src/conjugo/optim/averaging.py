"""Running averages of the weights, for evaluation."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from conjugo._space import to_local
from conjugo.errors import check
from conjugo.optim._base import copy, state_dtype

__all__ = ["PolynomialAverage", "WeightAverage", "WeightEMA", "ema_decay"]


class WeightAverage(ABC):
    r"""Base of the running averages of a model's parameters, which :meth:`averaged` lends to the model for evaluation.

    .. math:: \bar w \leftarrow (1 - c_t) \bar w + c_t w

    with t the number of earlier updates; subclasses choose :math:`c_t`. Only parameters are averaged; buffers (running
    statistics of batch normalisation) stay those of the model. The averages are kept in float32 (float64 for float64
    parameters), one vector more than the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.updates = 0
        self._model = model
        self._reshard()
        self._parameters = dict(model.named_parameters())
        self._averages = {
            name: p.detach().to(state_dtype(p) if p.is_floating_point() else p.dtype, copy=True)
            for name, p in self._parameters.items()
        }
        self._lent = False

    @abstractmethod
    def _weight(self) -> float:
        """c of the coming update, in [0, 1]."""

    @abstractmethod
    def _setting(self) -> dict[str, float]:
        """What c depends on besides the number of updates: name and value of an attribute."""

    @torch.no_grad()
    def update(self) -> None:
        """Take in the model's present parameters; call it after each optimizer step."""
        if self._lent:
            raise RuntimeError(f"{self._name}: update() was called while the model holds the averages")
        weight = self._weight()
        for name, average in self._averages.items():
            to_local(average).lerp_(to_local(self._parameters[name]).to(average.dtype), weight)
        self.updates += 1

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the ``with`` block the model has the averaged parameters; afterwards its own, bit for bit."""
        if self._lent:
            raise RuntimeError(f"{self._name}: the model holds the averages already")
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
        """The averages by parameter name, the setting, and the number of updates."""
        return {**self._setting(), "updates": self.updates, "averages": dict(self._averages)}

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
            not differing, self._name, "averages", differing, "of the same names and shapes as the model's parameters"
        )
        for name in self._setting():
            check(name in state_dict, self._name, "the state", sorted(state_dict), f"one with {name!r}")
        for name, average in self._averages.items():
            copy(average, averages[name])
        for name in self._setting():
            setattr(self, name, state_dict[name])
        self.updates = state_dict["updates"]

    @property
    def _name(self) -> str:
        return type(self).__name__


class WeightEMA(WeightAverage):
    r"""An exponential moving average: :math:`c_t = 1 - \min(d, (1 + t) / (10 + t))`.

    The first averages forget the initial weights quickly.

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
        super().__init__(model)

    def _weight(self) -> float:
        return 1 - ema_decay(self.updates, self.decay)

    def _setting(self) -> dict[str, float]:
        return {"decay": self.decay}


class PolynomialAverage(WeightAverage):
    r"""An average over all of training in which later weights count more: :math:`c_t = (1 + \gamma) / (t + 1 + \gamma)`.

    With :math:`\gamma = 0` it is the plain mean of the weights seen at the updates; with :math:`\gamma = 8` they are on average
    a tenth of all steps old, however many there are. For constant step sizes and for
    :class:`~conjugo.optim.AdaGradNorm`, which has no schedule. (Shamir & Zhang 2013, section 4.)

    Args:
        model: the model in training; its parameters, also DTensors, are read at each :meth:`update`.
        gamma: :math:`\gamma \geq 0`.

    Raises:
        ValueError: *gamma* is out of its range.

    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> average = PolynomialAverage(model, gamma=0.0)
    >>> for value in (1.0, 2.0, 6.0):
    ...     _ = model.weight.data.fill_(value)
    ...     average.update()
    >>> with average.averaged():
    ...     round(model.weight.item(), 4)
    3.0
    """

    def __init__(self, model: nn.Module, gamma: float = 8.0) -> None:
        check(0 <= gamma < math.inf, "PolynomialAverage", "gamma", gamma, "in [0, inf)")
        self.gamma = gamma
        super().__init__(model)

    def _weight(self) -> float:
        return (1 + self.gamma) / (self.updates + 1 + self.gamma)

    def _setting(self) -> dict[str, float]:
        return {"gamma": self.gamma}


def ema_decay(t: int, decay: float) -> float:
    """min(decay, (1 + t) / (10 + t)), the decay of update t = 0, 1, 2, ...: at first the average follows quickly."""
    return min(decay, (1 + t) / (10 + t))
