"""The step that LARS and LAMB share: measure, skip what is not finite, update layer by layer without a host sync."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from conjugo.errors import check
from conjugo.optim._base import Group, Optimizer, all_finite, as_real, check_lr, evaluate, state_dtype

__all__ = ["LayerwiseOptimizer", "choose", "masked", "masked_foreach", "norms"]


class LayerwiseOptimizer(Optimizer):
    """Base of the optimizers that scale each parameter's update by a trust ratio.

    A subclass offers two versions of the same update: ``_update`` for one parameter at a time, which is the
    specification and, on a CPU, the faster one (its temporary stays in the cache), and ``_update_foreach`` for lists.
    """

    def _check_group(self, group: Group) -> None:
        name = self._name
        check_lr(name, group["lr"])
        check(_within(group["weight_decay"], 0, math.inf), name, "weight_decay", group["weight_decay"], "in [0, inf)")
        bounds = group["trust_bounds"]
        check(
            len(bounds) == 2 and 0 <= bounds[0] <= bounds[1],
            name,
            "trust_bounds",
            bounds,
            "a pair (low, high) with 0 <= low <= high",
        )

    def _init_state(self, p: Tensor, group: Group) -> dict[str, Tensor]:
        # One counter for each parameter: per-parameter state is all that every checkpoint format keeps.
        return {"skipped_steps": torch.zeros((), dtype=torch.int64, device=p.device)}

    def _update(self, group: Group, p: Tensor, grad_norm: Tensor, ok: Tensor) -> None:
        raise NotImplementedError

    def _update_foreach(self, group: Group, params: list[Tensor], grad_norms: list[Tensor], ok: Tensor) -> None:
        raise NotImplementedError

    def _trust_ratio(self, group: Group, weight_norms: Tensor, others: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def skipped_steps(self) -> Tensor:
        """Steps left out because a gradient was not finite: 0-d int64, on the device of the first parameter."""
        first = next(p for group in self.param_groups for p in group["params"])
        count: Tensor = self.state[first]["skipped_steps"]
        return count

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
        measured = [norms([p.grad for p in params if p.grad is not None], group) for group, params in work]
        ok = all_finite([norm for group_norms in measured for norm in group_norms])
        for (group, params), grad_norms in zip(work, measured):
            if use_foreach(group, params):
                self._update_foreach(group, params, grad_norms, ok)
            else:
                for p, grad_norm in zip(params, grad_norms):
                    self._update(group, p, grad_norm, ok)
        counters = [self.state[p]["skipped_steps"] for group in self.param_groups for p in group["params"]]
        torch._foreach_add_(counters, torch.logical_not(ok).to(torch.int64))
        return loss

    def _scales(self, group: Group, params: list[Tensor], others: list[Tensor], ok: Tensor) -> list[Tensor]:
        """Learning rate times trust ratio for each parameter (0-d), or zero unless *ok*.

        others: what the ratio compares the norm of each parameter with (0-d).
        """
        lr = choose(ok, group["lr"], 0.0)
        scales = [lr] * len(params)
        adaptive = [i for i, p in enumerate(params) if p.ndim > 1 or group["adapt_vectors"]]
        if adaptive:
            weight_norms = torch.stack(norms([params[i] for i in adaptive], group))
            ratios = self._trust_ratio(group, weight_norms, torch.stack([others[i] for i in adaptive]))
            # A ratio may be NaN in a step that is skipped, and NaN times zero is NaN.
            for i, scale in zip(adaptive, (torch.where(ok, ratios, 0.0) * lr).unbind()):
                scales[i] = scale
        return scales


def use_foreach(group: Group, params: list[Tensor]) -> bool:
    """The group's choice; without one, lists for accelerators and single parameters for CPUs."""
    return bool(params[0].device.type != "cpu" if group["foreach"] is None else group["foreach"])


def norms(tensors: list[Tensor], group: Group) -> list[Tensor]:
    """The Euclidean norm of each tensor (0-d, at least float32)."""
    real = [as_real(t) for t in tensors]
    if use_foreach(group, real):
        return list(
            torch._foreach_norm(
                real, 2, torch.float64 if any(t.dtype == torch.float64 for t in real) else torch.float32
            )
        )
    return [torch.linalg.vector_norm(t, dtype=state_dtype(t)) for t in real]


def choose(ok: Tensor, value: float | Tensor, otherwise: float) -> Tensor:
    """*value* if *ok* (0-d bool), else *otherwise*: 0-d float64, without a copy from or to the host."""
    if not isinstance(value, Tensor):
        value = torch.full((), value, dtype=torch.float64, device=ok.device)
    return torch.where(ok, value.to(torch.float64), otherwise)


def masked(p: Tensor, *, ok: Tensor, maximize: bool) -> Tensor:
    """A copy of the gradient of *p* in its state's type, negated if *maximize*; all zero unless *ok* (0-d bool)."""
    assert p.grad is not None
    grad = torch.where(ok, as_real(p.grad), 0).to(state_dtype(p))
    return grad.neg_() if maximize else grad


def masked_foreach(params: list[Tensor], *, ok: Tensor, maximize: bool) -> list[Tensor]:
    """:func:`masked` for a list, in one operation.

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


def _within(value: float, low: float, high: float) -> bool:
    """Whether low <= value < high; False for NaN."""
    return low <= value < high
