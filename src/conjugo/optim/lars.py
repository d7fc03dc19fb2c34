"""LARS: layer-wise adaptive rate scaling (You, Gitman & Ginsburg 2017, arXiv:1708.03888)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from conjugo._tensors import Array
from conjugo.errors import check
from conjugo.optim._base import Group, zeros_for
from conjugo.optim._layerwise import LayerwiseOptimizer, Piece, choose, masked, trust_ratio

__all__ = ["LARS", "lars_trust_ratio"]


class LARS(LayerwiseOptimizer):
    r"""Momentum SGD whose learning rate is scaled, layer by layer, to the ratio of weight norm and gradient norm.

    .. math::
        \lambda = \eta \frac{\|w\|}{\|g\| + \beta \|w\| + \varepsilon}, \qquad
        v \leftarrow m v + \gamma \lambda (g + \beta w), \qquad w \leftarrow w - v

    (Algorithm 1 of the paper; with ``nesterov``, :math:`w \leftarrow w - (m v + \gamma \lambda (g + \beta w))`.)
    The learning rate is inside the velocity, so that a schedule acts smoothly. If the weights or the gradient of a
    layer are all zero, :math:`\lambda = 1`.

    Args:
        params: parameters or parameter groups; real or complex floating point; also DTensors (FSDP2, HSDP, tensor
            parallelism).
        lr: :math:`\gamma \geq 0`, a number or a 0-d tensor.
        momentum: :math:`m`, in [0, 1).
        weight_decay: :math:`\beta \geq 0`, coupled: it enters the ratio and the velocity.
        nesterov: look ahead along the velocity; needs ``momentum > 0``.
        trust_coefficient: :math:`\eta > 0`.
        eps: :math:`\varepsilon \geq 0`.
        trust_bounds: smallest and largest :math:`\lambda`; ``(1, 1)`` makes the method momentum SGD.
        adapt_vectors: scale parameters with fewer than two dimensions (biases, normalisation) too. By default they
            take :math:`\lambda = 1`: their norms say little about a layer.
        foreach: update lists of tensors at once; by default on accelerators only. With False an accelerator has to wait
            for the norms in each step.
        maximize: ascend instead of descend.
        process_group: where parameters are DTensors, the ranks that hold them; None: all. A step then
            needs one small all-reduce.

    State: ``momentum_buffer``, one vector per parameter, float32 for bfloat16 and float16 parameters.

    Raises:
        ValueError: an argument is out of its range.
        TypeError: a parameter is of an integer type.

    >>> w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    >>> w.grad = torch.tensor([[0.0, 2.0]])
    >>> LARS([w], lr=1.0, trust_coefficient=0.1).step()  # the ratio is 0.1 * 5 / 2
    >>> w.data
    tensor([[3.0000, 3.5000]])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        trust_coefficient: float = 1e-3,
        eps: float = 1e-9,
        trust_bounds: tuple[float, float] = (0.0, math.inf),
        adapt_vectors: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        process_group: Any = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "trust_bounds": trust_bounds,
            "adapt_vectors": adapt_vectors,
            "foreach": foreach,
            "maximize": maximize,
        }
        super().__init__(params, defaults, process_group)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        momentum, coefficient, eps = group["momentum"], group["trust_coefficient"], group["eps"]
        check(0 <= momentum < 1, "LARS", "momentum", momentum, "in [0, 1)")
        check(momentum > 0 or not group["nesterov"], "LARS", "momentum", momentum, "positive with nesterov=True")
        check(0 < coefficient < math.inf, "LARS", "trust_coefficient", coefficient, "in (0, inf)")
        check(0 <= eps < math.inf, "LARS", "eps", eps, "in [0, inf)")

    def _init_state(self, p: Tensor, group: Group) -> dict[str, Tensor]:
        return {"momentum_buffer": zeros_for(p)} | super()._init_state(p, group)

    def _update(self, group: Group, pieces: list[Piece], weight_norms: Array, grad_norms: Array) -> None:
        momentum, decay, sign = group["momentum"], group["weight_decay"], -1 if group["maximize"] else 1
        ratios = self._ratios(group, pieces, weight_norms, grad_norms)
        for (w, g, state, _), scale in zip(pieces, (ratios * float(group["lr"])).tolist()):
            velocity = state["momentum_buffer"]
            velocity.mul_(momentum).add_(g, alpha=sign * scale)
            if decay:
                velocity.add_(w, alpha=scale * decay)
            if group["nesterov"]:
                w.sub_((velocity * momentum).add_(g, alpha=sign * scale).add_(w, alpha=scale * decay))
            else:
                w.sub_(velocity)

    def _propose(self, group: Group, pieces: list[Piece], ok: Tensor) -> list[Tensor]:
        return masked(pieces, ok=ok, maximize=group["maximize"])

    def _apply(self, group: Group, pieces: list[Piece], proposed: list[Tensor], scales: Tensor, ok: Tensor) -> None:
        momentum, ws = group["momentum"], [piece.w for piece in pieces]
        velocities = [piece.state["momentum_buffer"] for piece in pieces]
        if group["weight_decay"]:
            torch._foreach_add_(proposed, ws, alpha=group["weight_decay"])
        torch._foreach_mul_(proposed, list(scales.unbind()))
        torch._foreach_mul_(velocities, choose(ok, momentum, 1.0, velocities[0]))
        torch._foreach_add_(velocities, proposed)
        if group["nesterov"]:
            torch._foreach_add_(proposed, torch._foreach_mul(velocities, choose(ok, momentum, 0.0, velocities[0])))
        else:
            torch._foreach_copy_(proposed, velocities)
            torch._foreach_mul_(proposed, ok)
        torch._foreach_sub_(ws, proposed)

    def _trust_ratio(self, group: Group, weight_norms: Array, others: Array) -> Array:
        return lars_trust_ratio(
            weight_norms,
            others,
            coefficient=group["trust_coefficient"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            bounds=group["trust_bounds"],
        )


@np.errstate(over="ignore", invalid="ignore")  # weights beyond all bounds: inf and NaN, as in torch
def lars_trust_ratio(
    weight_norm: Array,
    grad_norm: Array,
    *,
    coefficient: float,
    weight_decay: float,
    eps: float,
    bounds: tuple[float, float] = (0.0, math.inf),
) -> Array:
    """coefficient * weight_norm / (grad_norm + weight_decay * weight_norm + eps), clamped to *bounds*.

    weight_norm, grad_norm: Euclidean norms (same shape, one entry for each layer); where one of them is zero the ratio
    is 1 before clamping. Source: You, Gitman & Ginsburg 2017, equation 6; eps is ours.
    """
    denominator = grad_norm + weight_decay * weight_norm + eps
    return trust_ratio(coefficient * weight_norm, denominator, (weight_norm > 0) & (grad_norm > 0), bounds)
