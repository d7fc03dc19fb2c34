r"""Step sizes that are worked out from what a step sees anyway: its loss, the norm of its gradient, how far it has come.

A rule is a :class:`StepSize`: pure functions of :class:`Seen` and of a few numbers that it keeps. Optimizers keep these
numbers in their own state, so that they are saved, resumed, sharded and shown with the rest of it.

* :class:`~conjugo.optim.NLCG` takes a rule as ``line_search=``;
* :class:`~conjugo.optim.AdaGradNorm` is gradient descent, with or without momentum, with :class:`NormGrowth` or
  :class:`Distance`;
* :class:`StepSizeController` sets the learning rate of any other optimizer before each step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from conjugo._space import ParamSpace
from conjugo._tensors import Array, namespace
from conjugo.errors import check
from conjugo.optim.betas import ratio

__all__ = [
    "Constant",
    "Distance",
    "NormGrowth",
    "Polyak",
    "Seen",
    "StepSize",
    "StepSizeController",
    "Verdict",
]


class Seen(NamedTuple):
    """What a rule may look at: tensors or numpy arrays, float64, of one shape (one value for each independent scope)."""

    step: Array
    """Steps taken before this one."""
    lr: Array
    square: Array
    """<g, g>, or <g, P g> with a preconditioner P."""
    loss: Array = None
    """Mean over the batch; only for a rule that ``needs_loss``."""
    norm: Array = None
    """Euclidean norm that the parameters had before the first step; only for a rule that ``needs_norm``."""
    distance: Array = None
    """Euclidean distance of the parameters from where they were then; only for a rule that ``needs_distance``."""


class Verdict(NamedTuple):
    """What a rule decides."""

    length: Array
    """The multiple of the direction to go."""
    state: tuple[Array, ...]
    """What the rule keeps, in the order of its ``start``."""
    remove: Array | None = None
    """The part of the last move to take back, in [0, 1); None: nothing."""


class StepSize(ABC):
    """A rule for the length of a step.

    ``start``: names of the numbers that the rule keeps, with their values before the first step. Of a step that is skipped
    because something is not finite nothing is kept.
    """

    start: ClassVar[Mapping[str, float]] = {}
    needs_loss: ClassVar[bool] = False
    needs_distance: ClassVar[bool] = False
    needs_batch: ClassVar[bool] = False

    @property
    def needs_norm(self) -> bool:
        """Whether it looks at the norm that the parameters had before the first step."""
        return False

    @abstractmethod
    def __call__(self, seen: Seen, state: tuple[Array, ...]) -> Verdict:
        """The length of this step; no host synchronisation, no change of the arguments."""


@dataclass(frozen=True)
class Constant(StepSize):
    """The learning rate as it is.

    >>> one = torch.tensor(1.0)
    >>> Constant()(Seen(step=0 * one, lr=0.1 * one, square=one), ()).length
    tensor(0.1000)
    """

    def __call__(self, seen: Seen, state: tuple[Array, ...]) -> Verdict:
        """The learning rate."""
        return Verdict(seen.lr, state)


@dataclass(frozen=True, kw_only=True)
class NormGrowth(StepSize):
    r"""AdaGrad-Norm: the learning rate over the root of all squared gradient norms so far.

    .. math:: b_j^2 = b_{j-1}^2 + \langle g, P g \rangle, \qquad \alpha_j = \eta / b_j

    (Ward, Wu & Bottou 2019, Algorithm 1.) The new gradient enters before the step, so no step is longer than
    :math:`\eta`, which has the unit of a distance.

    Args:
        b0: :math:`b_0 \geq 0`.
        first_step: instead of *b0* the length of the first step relative to the norm of the parameters, above 0:
            :math:`b_1 = \eta \|g_0\| / (r \|x_0\|)`. If all parameters are zero it is the length itself.
        bounds: smallest and largest step size.
        owner: whose name error messages bear.

    Raises:
        ValueError: not exactly one of *b0* and *first_step* is given, or one is out of its range.

    >>> rule = NormGrowth(b0=1.0)
    >>> one = torch.tensor(1.0)
    >>> rule(Seen(step=0 * one, lr=one, square=3 * one), (0 * one,)).length
    tensor(0.5000)
    """

    b0: float | None = None
    first_step: float | None = None
    bounds: tuple[float, float] = (0.0, math.inf)
    owner: str = field(default="NormGrowth", repr=False)

    start: ClassVar[Mapping[str, float]] = {"b_squared": 0.0}

    def __post_init__(self) -> None:
        """Check the options."""
        one = (self.b0 is None) != (self.first_step is None)
        check(one, self.owner, "b0", self.b0, f"given if first_step is None, and only then (got {self.first_step})")
        check(self.b0 is None or 0 <= self.b0 < math.inf, self.owner, "b0", self.b0, "in [0, inf)")
        relative = self.first_step
        check(relative is None or 0 < relative < math.inf, self.owner, "first_step", relative, "in (0, inf)")
        _check_bounds(self.owner, self.bounds)

    @property
    def needs_norm(self) -> bool:
        """With *first_step*."""
        return self.first_step is not None

    def __call__(self, seen: Seen, state: tuple[Array, ...]) -> Verdict:
        """The length of this step and the new b squared."""
        (squared,) = state
        xp = namespace(squared)
        if self.first_step is None:
            assert self.b0 is not None
            first = self.b0 * self.b0 + seen.square
        else:
            size = self.first_step * xp.where(seen.norm > 0, seen.norm, 1.0)
            first = seen.lr * seen.lr * seen.square / (size * size)
        squared = xp.where(seen.step == 0, first, squared + seen.square)
        return Verdict(bounded(ratio(seen.lr, xp.sqrt(squared)), self.bounds), (squared,))


@dataclass(frozen=True, kw_only=True)
class Distance(StepSize):
    r"""DoG, distance over gradients: like :class:`NormGrowth` with the greatest distance so far from the start.

    .. math:: \alpha_t = \eta\, \frac{\max(r, \max_{i \leq t} \|x_i - x_0\|)}{\sqrt{10^{-8} + \sum_{i \leq t} \|g_i\|^2}}

    with r = *initial_distance* (1 + :math:`\|x_0\|`) (Ivgi, Hinder & Carmon 2023). Use a running average of the weights
    with it.

    Args:
        initial_distance: relative size of the first step, above 0; 1e-4 with batch norm.
        bounds: smallest and largest step size.
        owner: whose name error messages bear.

    Raises:
        ValueError: an argument is out of its range.
    """

    initial_distance: float = 1e-6
    bounds: tuple[float, float] = (0.0, math.inf)
    owner: str = field(default="Distance", repr=False)

    start: ClassVar[Mapping[str, float]] = {"b_squared": 0.0, "distance": 0.0}
    needs_distance: ClassVar[bool] = True
    FLOOR: ClassVar[float] = 1e-8

    def __post_init__(self) -> None:
        """Check the options."""
        check(
            0 < self.initial_distance < math.inf, self.owner, "initial_distance", self.initial_distance, "in (0, inf)"
        )
        _check_bounds(self.owner, self.bounds)

    @property
    def needs_norm(self) -> bool:
        """Always."""
        return True

    def __call__(self, seen: Seen, state: tuple[Array, ...]) -> Verdict:
        """The length of this step, the new sum of squares and the greatest distance."""
        squared, farthest = state
        xp = namespace(squared)
        first = seen.step == 0
        farthest = xp.maximum(xp.where(first, self.initial_distance * (1 + seen.norm), farthest), seen.distance)
        squared = xp.where(first, self.FLOOR, squared) + seen.square
        return Verdict(bounded(seen.lr * farthest / xp.sqrt(squared), self.bounds), (squared, farthest))


@dataclass(frozen=True, kw_only=True)
class Polyak(StepSize):
    r"""Polyak's step for a known minimum of the loss: :math:`\alpha = \eta\,(f - f^*) / \|g\|^2`.

    For models that can fit all of the data, :math:`f^* = 0` (Loizou et al. 2021).

    Args:
        minimum: :math:`f^*`.
        bounds: smallest and largest step size; the largest one matters near the minimum.

    Raises:
        ValueError: an argument is out of its range.

    >>> one = torch.tensor(1.0)
    >>> Polyak()(Seen(step=0 * one, lr=one, square=4 * one, loss=2 * one), ()).length
    tensor(0.5000)
    """

    minimum: float = 0.0
    bounds: tuple[float, float] = (0.0, math.inf)

    needs_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the options."""
        check(math.isfinite(self.minimum), "Polyak", "minimum", self.minimum, "a finite number")
        _check_bounds("Polyak", self.bounds)

    def __call__(self, seen: Seen, state: tuple[Array, ...]) -> Verdict:
        """The length of this step."""
        gap = (seen.loss - self.minimum).clip(min=0.0)
        return Verdict(bounded(ratio(seen.lr * gap, seen.square), self.bounds), state)


class StepSizeController:
    """Sets the learning rate of any optimizer, before each of its steps, by a :class:`StepSize`.

    Args:
        optimizer: each group gets its initial learning rate times the step size that the rule gives to a learning rate of
            1. Schedulers of it must not be used with it.
        rule: as :class:`NormGrowth`.
        process_group: the ranks that hold the parameters, as in :class:`~conjugo.optim.NLCG`.

    The controller takes part in ``optimizer.step`` by a hook, with all gradients of all groups together. A gradient that is not
    finite leaves the rule and the learning rates as they were. Reading the step size makes a GPU wait; optimizers of this
    package take rules themselves and do not wait.

    Raises:
        ValueError: the rule needs more than gradients (:class:`Polyak` gets the loss by :meth:`observe_loss`).

    >>> w = torch.nn.Parameter(torch.tensor([2.0]))
    >>> optimizer = torch.optim.SGD([w], lr=1.0)
    >>> controller = StepSizeController(optimizer, NormGrowth(b0=1.0))
    >>> w.grad = torch.tensor([1.0])
    >>> optimizer.step()
    >>> round(controller.step_size, 4)
    0.7071
    """

    def __init__(self, optimizer: Optimizer, rule: StepSize, *, process_group: Any = None) -> None:
        check(not rule.needs_distance, "StepSizeController", "rule", type(rule).__name__, "one without distances")
        check(not rule.needs_batch, "StepSizeController", "rule", type(rule).__name__, "one that needs no batch")
        self.rule = rule
        self._optimizer = optimizer
        self._group = process_group
        self._lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self._steps = 0
        self._state = tuple(rule.start.values())
        self._norm = 0.0
        self._space: ParamSpace | None = None
        self._loss: float | None = None
        self.step_size = math.nan
        """The factor on the groups' initial learning rates in the last step."""
        self._hook = optimizer.register_step_pre_hook(self._before)

    def observe_loss(self, loss: Tensor | float) -> None:
        """Tell the mean loss of the batch whose gradients the next step takes; for rules that need it."""
        self._loss = float(loss)

    def remove(self) -> None:
        """Let go of the optimizer; its learning rates stay as they are."""
        self._hook.remove()

    def _before(self, *_: Any) -> None:
        if self.rule.needs_loss and self._loss is None:
            raise ValueError(f"StepSizeController: {type(self.rule).__name__} needs the loss: call observe_loss first")
        params = [p for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not params:
            return
        space = self._look_at(params)
        square = space.norm([p.grad for p in params if p.grad is not None]).square()
        if not math.isfinite(square):
            return
        like = square.cpu()
        if self.rule.needs_norm and self._steps == 0:
            self._norm = float(space.norm(params))
        seen = Seen(
            step=torch.full_like(like, self._steps),
            lr=torch.ones_like(like),
            square=like,
            loss=None if self._loss is None else torch.full_like(like, self._loss),
            norm=torch.full_like(like, self._norm),
        )
        verdict = self.rule(seen, tuple(torch.full_like(like, value) for value in self._state))
        self._state = tuple(float(value) for value in verdict.state)
        self._steps += 1
        self._loss = None
        self.step_size = float(verdict.length)
        for group, lr in zip(self._optimizer.param_groups, self._lrs, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr * self.step_size)
            else:
                group["lr"] = lr * self.step_size

    def _look_at(self, params: list[Tensor]) -> ParamSpace:
        """The space that *params* span; making one is collective and takes long, so it is kept while they are the same."""
        known = [] if self._space is None else self._space.params
        if self._space is None or len(known) != len(params) or any(a is not b for a, b in zip(known, params)):
            self._space = ParamSpace(params, group=self._group, owner="StepSizeController")
        return self._space

    def state_dict(self) -> dict[str, Any]:
        """What the rule keeps, as plain numbers."""
        kept = dict(zip(self.rule.start, self._state, strict=True))
        return {"steps": self._steps, "lrs": list(self._lrs), "norm": self._norm, **kept}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self._steps, self._lrs, self._norm = state_dict["steps"], list(state_dict["lrs"]), state_dict["norm"]
        self._state = tuple(state_dict[name] for name in self.rule.start)


def _check_bounds(owner: str, bounds: tuple[float, float]) -> None:
    ordered = len(bounds) == 2 and 0 <= bounds[0] <= bounds[1] and bounds[1] > 0
    check(ordered, owner, "bounds", bounds, "a pair (low, high) with 0 <= low <= high, high > 0")


def bounded(length: Array, bounds: tuple[float, float]) -> Array:
    """*length* clamped to *bounds* (low, high)."""
    return length if bounds == (0.0, math.inf) else length.clip(*bounds)
