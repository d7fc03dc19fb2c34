"""The diagonal metric in which an optimizer measures gradients: its steps go along -P g."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer

from conjugo.errors import check
from conjugo.optim import NLCG

__all__ = ["diagonal_metric"]


def diagonal_metric(optimizer: Optimizer) -> dict[Tensor, Tensor]:
    """P of each parameter, of its shape and above 0; empty where P is 1, as for SGD.

    Of Adam and its relatives (whatever keeps ``exp_avg_sq``) 1 / (sqrt(v / (1 - beta2^t)) + eps), with the momentum left out;
    of :class:`~conjugo.optim.NLCG` its preconditioner where that is diagonal.

    Raises ValueError if the optimizer has not taken a step.
    """
    if isinstance(optimizer, NLCG):
        return optimizer.metric()
    found: dict[Tensor, Tensor] = {}
    adaptive = "betas" in optimizer.defaults and "eps" in optimizer.defaults
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            if "exp_avg_sq" in state:
                taken = float(state["step"])
                check(taken >= 1, "diagonal_metric", "the steps of the optimizer", taken, ">= 1")
                variance = state["exp_avg_sq"] / (1 - float(group["betas"][1]) ** taken)
                found[p] = 1 / (variance.sqrt() + float(group["eps"]))
    steps = "at least one: its metric is in its state"
    check(not adaptive or len(found) > 0, "diagonal_metric", "the steps of the optimizer", 0, steps)
    return found
