"""The diagonal metric in which an optimizer measures gradients: its steps go along -P g."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from conjugo.errors import check
from conjugo.optim import NLCG

__all__ = ["diagonal_metric"]


def diagonal_metric(optimizer: Optimizer) -> dict[Tensor, Tensor]:
    """P of each parameter, of its shape and above 0; empty where P is 1, as for SGD.

    Of Adam and its relatives (whatever keeps ``exp_avg_sq``; AMSGrad its maximum) 1 / (sqrt(v / (1 - beta2^t)) + eps), with the
    momentum left out; of Adamax, RMSprop and Adagrad what they divide by; of :class:`~conjugo.optim.NLCG` its preconditioner
    where that is diagonal.

    Raises ValueError if an adaptive optimizer has not taken a step.
    """
    if isinstance(optimizer, NLCG):
        return optimizer.metric()
    found: dict[Tensor, Tensor] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            scale = _divisor(state, group)
            if scale is not None:
                found[p] = 1 / scale
    adaptive = "eps" in optimizer.defaults and ("betas" in optimizer.defaults or "alpha" in optimizer.defaults)
    steps = "at least one: its metric is in its state"
    check(not adaptive or len(optimizer.state) > 0, "diagonal_metric", "the steps of the optimizer", 0, steps)
    return found


def _divisor(state: dict[str, Any], group: dict[str, Any]) -> Tensor | None:
    """What the gradient of a parameter is divided by; None: nothing, or it is not known."""
    eps = float(group.get("eps", 0.0))
    if "exp_avg_sq" in state and "step" in state:  # SOAP's, in an eigenbasis, are no diagonal and come without
        variance: Tensor = state.get("max_exp_avg_sq", state["exp_avg_sq"])
        seen = 1 - float(group["betas"][1]) ** float(state["step"])
        scale: Tensor = (variance / seen).sqrt() + eps
        return scale
    if "exp_inf" in state:
        largest: Tensor = state["exp_inf"]
        return largest.clamp(min=eps)
    for name in ("square_avg", "sum"):  # RMSprop, Adagrad
        if isinstance(state.get(name), Tensor):
            squares: Tensor = state[name]
            return squares.sqrt() + eps
    return None
