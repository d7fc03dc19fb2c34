"""LAMB: layer-wise adaptive moments (You et al. 2020, arXiv:1904.00962)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from conjugo._tensors import Array
from conjugo.errors import check
from conjugo.optim._base import Group, zeros_for
from conjugo.optim._layerwise import LayerwiseOptimizer, Piece, adapts, choose, masked, norms, trust_ratio

__all__ = ["LAMB", "lamb_trust_ratio"]


class LAMB(LayerwiseOptimizer):
    r"""AdamW whose update is scaled, layer by layer, to the norm of the weights.

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
        u = \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \varepsilon} + \lambda w, \quad
        w \leftarrow w - \gamma \frac{\|w\|}{\|u\|} u

    (Algorithm 2 of the paper.) If the weights or the update of a layer are all zero, the ratio is 1.

    Args:
        params: parameters or parameter groups; real or complex floating point; also DTensors (FSDP2, HSDP, tensor
            parallelism).
        lr: :math:`\gamma \geq 0`, a number or a 0-d tensor.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        eps: :math:`\varepsilon > 0`.
        weight_decay: :math:`\lambda \geq 0`, decoupled from the moments, inside the norm of the update.
        trust_bounds: smallest and largest ratio; ``(1, 1)`` makes the method AdamW.
        adapt_vectors: scale parameters with fewer than two dimensions (biases, normalisation) too. By default their
            ratio is 1: their norms say little about a layer.
        foreach: update lists of tensors at once; by default on accelerators only. With False an accelerator has to wait
            for the norms in each step.
        maximize: ascend instead of descend.
        process_group: where parameters are DTensors, the ranks that hold them; None: all. A step then
            needs two small all-reduces.

    State: ``exp_avg`` and ``exp_avg_sq``, two vectors per parameter, float32 for bfloat16 and float16 parameters.

    Raises:
        ValueError: an argument is out of its range.
        TypeError: a parameter is of an integer type.

    >>> w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    >>> w.grad = torch.tensor([[7.0, -0.1]])
    >>> LAMB([w], lr=0.1).step()  # the first update is the sign of the gradient: norm sqrt(2), that of w is 5
    >>> w.data
    tensor([[2.6464, 4.3536]])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        trust_bounds: tuple[float, float] = (0.0, math.inf),
        adapt_vectors: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        process_group: Any = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "trust_bounds": trust_bounds,
            "adapt_vectors": adapt_vectors,
            "foreach": foreach,
            "maximize": maximize,
        }
        super().__init__(params, defaults, process_group)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        betas, eps = group["betas"], group["eps"]
        check(len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "LAMB", "betas", betas, "a pair in [0, 1)")
        check(0 < eps < math.inf, "LAMB", "eps", eps, "in (0, inf)")

    def _init_state(self, p: Tensor, group: Group) -> dict[str, Tensor]:
        return {
            "step": torch.zeros((), dtype=torch.float64, device=p.device),
            "exp_avg": zeros_for(p),
            "exp_avg_sq": zeros_for(p),
        } | super()._init_state(p, group)

    def _update(self, group: Group, pieces: list[Piece], weight_norms: Array, grad_norms: Array) -> None:
        (beta1, beta2), lr, sign = group["betas"], float(group["lr"]), -1 if group["maximize"] else 1
        for piece, weight_norm in zip(pieces, weight_norms):
            w, g, state, _ = piece
            mean = state["exp_avg"].mul_(beta1).add_(g, alpha=sign * (1 - beta1))
            square = state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
            t = state["step"].add_(1).item()
            update = square.sqrt().div_(math.sqrt(1 - beta2**t)).add_(group["eps"])
            torch.div(mean, update, out=update).div_(1 - beta1**t).add_(w, alpha=group["weight_decay"])
            scale = lr
            if adapts(group, piece):
                scale *= float(self._trust_ratio(group, weight_norm, norms([update]).numpy(force=True)[0]))
            w.sub_(update, alpha=scale)

    def _propose(self, group: Group, pieces: list[Piece], ok: Tensor) -> list[Tensor]:
        states, (beta1, beta2) = [piece.state for piece in pieces], group["betas"]
        means, squares = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        updates = masked(pieces, ok=ok, maximize=group["maximize"])
        torch._foreach_mul_(means, choose(ok, beta1, 1.0, means[0]))
        torch._foreach_add_(means, updates, alpha=1 - beta1)
        torch._foreach_mul_(squares, choose(ok, beta2, 1.0, squares[0]))
        torch._foreach_addcmul_(squares, updates, updates, value=1 - beta2)

        steps = [s["step"] for s in states]
        torch._foreach_add_(steps, [ok.to(torch.float64)] * len(steps))
        t = torch.stack(steps).clamp_(min=1)
        torch._foreach_copy_(updates, squares)
        torch._foreach_sqrt_(updates)
        torch._foreach_div_(updates, list((1 - beta2**t).sqrt().unbind()))
        torch._foreach_add_(updates, group["eps"])
        torch._foreach_reciprocal_(updates)  # there is no foreach division into the divisor
        torch._foreach_mul_(updates, means)
        torch._foreach_div_(updates, list((1 - beta1**t).unbind()))
        if group["weight_decay"]:
            torch._foreach_add_(updates, [piece.w for piece in pieces], alpha=group["weight_decay"])
        return updates

    def _compared(self, proposed: list[Tensor]) -> list[Tensor]:
        return proposed

    def _apply(self, group: Group, pieces: list[Piece], proposed: list[Tensor], scales: Tensor, ok: Tensor) -> None:
        torch._foreach_mul_(proposed, list(scales.unbind()))
        torch._foreach_sub_([piece.w for piece in pieces], proposed)

    def _trust_ratio(self, group: Group, weight_norms: Array, others: Array) -> Array:
        return lamb_trust_ratio(weight_norms, others, bounds=group["trust_bounds"])


def lamb_trust_ratio(weight_norm: Array, update_norm: Array, *, bounds: tuple[float, float] = (0.0, math.inf)) -> Array:
    """weight_norm / update_norm, clamped to *bounds*.

    weight_norm, update_norm: Euclidean norms (same shape, one entry for each layer); where one of them is zero the
    ratio is 1 before clamping. Source: You et al. 2020, Algorithm 2 with the identity as scaling function; the paper
    bounds the weight norm, this bounds the ratio.
    """
    return trust_ratio(weight_norm, update_norm, (weight_norm > 0) & (update_norm > 0), bounds)
