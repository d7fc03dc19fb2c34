"""The step that LARS and LAMB share: measure, skip what is not finite, update layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conjugo._tensors import Array, namespace
from conjugo.errors import check
from conjugo.optim._base import Group, Optimizer, as_real, check_lr, evaluate, state_dtype

__all__ = ["LayerwiseOptimizer", "adapts", "choose", "masked", "norms", "trust_ratio"]


class LayerwiseOptimizer(Optimizer):
    """Base of the optimizers that scale each parameter's update by a trust ratio.

    A subclass offers two versions of the same update: ``_update`` for one parameter after the other, with scalars that
    are numbers: the specification, and the faster one on a CPU, where reading a scalar costs nothing; and
    ``_update_foreach`` for lists, with scalars that stay on the device and no host synchronisation.
    """

    def _check_group(self, group: Group) -> None:
        name = self._name
        check_lr(name, group["lr"])
        decay, bounds = group["weight_decay"], group["trust_bounds"]
        check(0 <= decay < math.inf, name, "weight_decay", decay, "in [0, inf)")
        ordered = len(bounds) == 2 and 0 <= bounds[0] <= bounds[1]
        check(ordered, name, "trust_bounds", bounds, "a pair (low, high) with 0 <= low <= high")

    def _init_state(self, p: Tensor, group: Group) -> dict[str, Tensor]:
        # One counter for each parameter: per-parameter state is all that every checkpoint format keeps.
        return {"skipped_steps": torch.zeros((), dtype=torch.int64, device=p.device)}

    def _update(self, group: Group, params: list[Tensor], grad_norms: Array) -> None:
        raise NotImplementedError

    def _update_foreach(self, group: Group, params: list[Tensor], grad_norms: Tensor, ok: Tensor) -> None:
        raise NotImplementedError

    def _trust_ratio(self, group: Group, weight_norms: Array, others: Array) -> Array:
        raise NotImplementedError

    @property
    def skipped_steps(self) -> Tensor:
        """Steps left out because a gradient was not finite: 0-d int64, on the device of the parameters."""
        return torch.stack(self._counters()).max()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update all parameters that have a gradient; returns the value of *closure* if one is given.

        If any gradient holds NaN or infinity (or is too large for its norm to be represented), no parameter and no
        state changes; the step is counted in :attr:`skipped_steps`. Raises ``RuntimeError`` for sparse gradients.
        """
        loss = evaluate(closure)
        work = self._with_gradient()
        if not work:
            return loss
        measured = [norms([p.grad for p in params if p.grad is not None]) for _, params in work]
        ok = torch.isfinite(torch.cat(measured)).all()
        as_lists = [use_foreach(group, params) for group, params in work]
        if not all(as_lists) and not ok:
            self._count_skipped(ok)
            return loss
        for (group, params), grad_norms, foreach in zip(work, measured, as_lists):
            if foreach:
                self._update_foreach(group, params, grad_norms, ok)
            else:
                self._update(group, params, grad_norms.numpy(force=True))
        if all(as_lists):
            self._count_skipped(ok)
        return loss

    def _count_skipped(self, ok: Tensor) -> None:
        counters = self._counters()
        torch._foreach_add_(counters, [torch.logical_not(ok).to(torch.int64)] * len(counters))

    def _counters(self) -> list[Tensor]:
        return [self.state[p]["skipped_steps"] for group in self.param_groups for p in group["params"]]

    def _ratios(self, group: Group, params: list[Tensor], weight_norms: Array, others: Array) -> Array:
        """The trust ratio of each parameter, [n]: of its norm with *others*, or 1 for a vector that is not to adapt."""
        ratios = self._trust_ratio(group, weight_norms, others)
        for i in (i for i, p in enumerate(params) if not adapts(group, p)):
            ratios[i] = 1.0
        return ratios


@np.errstate(over="ignore", invalid="ignore")  # weights beyond all bounds: inf and NaN, as in torch
def trust_ratio(numerator: Array, denominator: Array, defined: Array, bounds: tuple[float, float]) -> Array:
    """numerator / denominator where *defined*, else 1, clamped to *bounds*; all of one shape."""
    xp = namespace(denominator)
    return xp.where(defined, numerator / xp.where(defined, denominator, 1.0), 1.0).clip(*bounds)


def adapts(group: Group, p: Tensor) -> bool:
    """Whether the trust ratio of *p* is anything but 1."""
    return p.ndim > 1 or bool(group["adapt_vectors"])


def use_foreach(group: Group, params: list[Tensor]) -> bool:
    """The group's choice; without one, lists for accelerators and single parameters for CPUs."""
    return bool(params[0].device.type != "cpu" if group["foreach"] is None else group["foreach"])


def norms(tensors: list[Tensor]) -> Tensor:
    """The Euclidean norm of each tensor, at least in float32; [n]."""
    real = [as_real(t) for t in tensors]
    wide = torch.float64 if any(t.dtype == torch.float64 for t in real) else torch.float32
    return torch.stack(torch._foreach_norm(real, 2, wide))


def choose(ok: Tensor, value: float, otherwise: float, like: Tensor) -> Tensor:
    """*value* if *ok* (0-d bool), else *otherwise*: 0-d, in the type of *like* (foreach is slow with any other)."""
    return torch.where(ok, torch.full((), value, dtype=like.dtype, device=ok.device), otherwise)


def masked(params: list[Tensor], *, ok: Tensor, maximize: bool) -> list[Tensor]:
    """Copies of the gradients of *params* in their state's type, negated if *maximize*; all zero unless *ok* (0-d bool).

    NaN times zero is NaN, but the bits of NaN, read as an integer, times zero are the bits of 0.0.
    """
    bits = [_bits(as_real(p.grad).to(state_dtype(p))) for p in params if p.grad is not None]
    copies = torch._foreach_mul(bits, ok.to(torch.int32))
    grads = [copy.view(state_dtype(p)) for copy, p in zip(copies, params)]
    if maximize:
        torch._foreach_neg_(grads)
    return grads


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int64 if tensor.dtype == torch.float64 else torch.int32)
