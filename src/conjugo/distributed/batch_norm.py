"""Batch norm on many workers: by default each normalises its own micro-batch; here all of them together, and their averages."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from conjugo.distributed.environment import world_size

__all__ = ["GlobalBatchNorm", "average_statistics", "sync_batch_norm", "warn_of_small_micro_batch"]

SMALL = 16
"""Below this number of examples for each statistic networks lose accuracy (Wu & He 2018, arXiv:1803.08494, figure 1)."""


class GlobalBatchNorm(_BatchNorm):
    """Batch norm over what all ranks hold of a micro-batch, on any device; ranks may hold different numbers of examples.

    What :class:`torch.nn.SyncBatchNorm` is on GPUs. In training, forward and backward pass each take one small all-reduce.
    Input and output: [B, C, ...], floating point.
    """

    process_group: Any = None

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"GlobalBatchNorm: the input must have at least 2 dimensions, got {input.ndim}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise with the statistics of all ranks (training), or with the running ones."""
        alone = not dist.is_available() or not dist.is_initialized() or dist.get_world_size(self.process_group) == 1
        if alone or not (self.training or self.running_mean is None):
            return super().forward(input)
        self._check_input_dim(input)
        y, mean, variance, count = _Normalize.apply(input, self.weight, self.bias, self.eps, self.process_group)  # type: ignore[no-untyped-call]
        if self.training and self.running_mean is not None:
            self._update(mean, variance, count)
        return y  # type: ignore[no-any-return]

    @torch.no_grad()
    def _update(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        factor = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        unbiased = variance * (count / (count - 1).clamp(min=1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), factor)


class _Normalize(torch.autograd.Function):
    """y = weight (x - mean) / sqrt(variance + eps) + bias; also gives mean and variance [C] and the number of values."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = _wide(x)
        mean, variance, count = _statistics(wide, group)
        scale = (variance + eps).rsqrt()
        normal = _normalised(wide, mean, scale)
        y = normal if weight is None or bias is None else normal * _along(weight, x) + _along(bias, x)
        ctx.save_for_backward(x, weight, mean, scale, count)
        ctx.eps, ctx.group = eps, group
        ctx.mark_non_differentiable(mean, variance, count)
        return y.to(x.dtype), mean, variance, count

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, mean, scale, count = ctx.saved_tensors
        wide, g = _wide(x), _wide(grads[0])
        over = [0, *range(2, g.ndim)]
        by_normal = g if weight is None else g * _along(weight, g)
        if not ctx.needs_input_grad[0]:
            normal, dx = _normalised(wide, mean, scale), None
        elif torch.is_grad_enabled():  # second derivatives will be asked for: the same, in steps that have them
            mean, variance, _ = _statistics(wide, ctx.group)
            normal = _normalised(wide, mean, (variance + ctx.eps).rsqrt())
            (dx,) = torch.autograd.grad(normal, wide, by_normal, create_graph=True)
        else:
            normal = _normalised(wide, mean, scale)
            sums = torch.stack([by_normal.sum(over), (by_normal * normal).sum(over)]).double()
            dist.all_reduce(sums, group=ctx.group)
            mean_g, mean_gn = (sums / count).to(normal.dtype)
            dx = (by_normal - _along(mean_g, g) - normal * _along(mean_gn, g)) * _along(scale, g).to(g.dtype)
        dx = None if dx is None else dx.to(x.dtype)
        if weight is None:
            return dx, None, None, None, None
        return dx, (g * normal).sum(over).to(weight.dtype), g.sum(over).to(weight.dtype), None, None


class _Sum(torch.autograd.Function):
    """The sum over the ranks of a group, whose derivative is another one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _Sum.apply(grads[0].contiguous(), ctx.group), None  # type: ignore[no-untyped-call]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _statistics(x: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance [C] and the number of values of a channel, over all ranks, in float64."""
    n = x.numel() // x.shape[1]
    own_variance, own_mean = torch.var_mean(x, dim=[0, *range(2, x.ndim)], correction=0)
    own_mean, own_variance = own_mean.double(), own_variance.double()
    packed = torch.cat([n * own_mean, n * (own_variance + own_mean.square()), own_mean.new_tensor([float(n)])])
    total = _Sum.apply(packed, group)  # type: ignore[no-untyped-call]
    mean, square = (total[:-1] / total[-1]).chunk(2)
    return mean, (square - mean.square()).clamp(min=0), total[-1]


def _normalised(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    return (x - _along(mean, x).to(x.dtype)) * _along(scale, x).to(x.dtype)


def _along(values: Tensor, like: Tensor) -> Tensor:
    """[C] as a view that goes with [B, C, ...]."""
    return values.view(1, -1, *[1] * (like.ndim - 2))


def sync_batch_norm(model: nn.Module, process_group: Any = None) -> nn.Module:
    """*model* with all batch norms computed over all ranks; gives the model itself, or its replacement if it is one.

    Parameters and buffers stay the same tensors. On GPUs torch.nn.SyncBatchNorm does the work, elsewhere
    :class:`GlobalBatchNorm`. Call it before DDP or ``fully_shard``. With one rank nothing changes.

    process_group: the ranks; None: all.
    """
    if world_size() == 1:
        return model
    if any(p.device.type == "cuda" for p in model.parameters()):
        return nn.SyncBatchNorm.convert_sync_batchnorm(model, process_group)  # type: ignore[no-any-return,no-untyped-call]
    if isinstance(model, _BatchNorm):
        return _replaced(model, process_group)
    for name, child in model.named_children():
        setattr(model, name, sync_batch_norm(child, process_group))
    return model


def _replaced(norm: _BatchNorm, group: Any) -> GlobalBatchNorm:
    new = GlobalBatchNorm(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, device="meta"
    )
    new.weight, new.bias = norm.weight, norm.bias
    new.running_mean, new.running_var = norm.running_mean, norm.running_var
    new.num_batches_tracked = norm.num_batches_tracked
    new.training = norm.training
    new.process_group = group
    return new


@torch.no_grad()
def average_statistics(model: nn.Module, process_group: Any = None) -> None:
    """Collective: give all ranks the mean of their running means and variances; one all-reduce, none with one rank.

    Where each rank normalises by itself, each knows the statistics of its own examples only. A variance within micro-batches is
    an unbiased estimate of that of all examples, so their mean is one, too. process_group: the ranks; None: all.
    """
    if world_size() == 1:
        return
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    averages = [t for norm in norms for t in (norm.running_mean, norm.running_var) if t is not None]
    if not averages:
        return
    packed = torch.cat([t.reshape(-1).double() for t in averages])
    dist.all_reduce(packed, group=process_group)
    packed /= dist.get_world_size(process_group)
    for t, values in zip(averages, torch.split(packed, [t.numel() for t in averages]), strict=True):
        t.copy_(values.view_as(t))


def warn_of_small_micro_batch(model: nn.Module, examples: int) -> None:
    """Warn if *model* has batch norm, whose statistics would come from few *examples* (of all ranks, if they are synchronised).

    >>> warn_of_small_micro_batch(torch.nn.Linear(2, 2), 1)
    """
    normalises = any(isinstance(module, _BatchNorm) and module.training for module in model.modules())
    if normalises and examples < SMALL:
        warnings.warn(
            f"batch norm sees {examples} examples at a time, which makes it noisy (at least {SMALL} are usual): take larger "
            "micro-batches, or sync_batch_norm on several workers",
            stacklevel=3,
        )
