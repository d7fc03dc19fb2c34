"""Fixed factors on the gradients of single layers: ``NLCG(..., grad_scale=depth_scales(model))``.

Two rules of the program of Adya, Palakkode & Tuzel 2018; both give one factor for each parameter, in the order of
``model.parameters()``.
"""

from __future__ import annotations

from torch import nn

from conjugo.errors import check

__all__ = ["batch_norm_scales", "depth_scales"]


def batch_norm_scales(model: nn.Module, factor: float = 0.01) -> list[float]:
    """*factor* for the weights and biases of batch normalisation, 1 for all other parameters.

    >>> batch_norm_scales(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    [1.0, 1.0, 0.01, 0.01]
    """
    kind = nn.modules.batchnorm._NormBase
    inside = {id(p) for m in model.modules() if isinstance(m, kind) for p in m.parameters(recurse=False)}
    return [factor if id(p) in inside else 1.0 for p in model.parameters()]


def depth_scales(model: nn.Module, lowest: float = 0.1) -> list[float]:
    """lowest + (1 - lowest) i / M for parameter i = 0, 1, ..., M - 1: the first layers learn slowest.

    lowest: in [0, 1]; raises ``ValueError`` otherwise.

    >>> [round(s, 3) for s in depth_scales(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)))]
    [0.1, 0.325, 0.55, 0.775]
    """
    check(0 <= lowest <= 1, "depth_scales", "lowest", lowest, "in [0, 1]")
    count = sum(1 for _ in model.parameters())
    return [lowest + (1 - lowest) * i / count for i in range(count)]
