"""Layers before batch norm: which weights are scale-invariant, how well-conditioned they are, how fast they turn.

Batch norm divides by the standard deviation of its inputs, so the loss does not depend on the length of a row w_c of the
weights before it. Its gradient is then orthogonal to w_c and in proportion to 1 / |w_c|, and what counts is the effective
learning rate lr / |w_c|^2. :mod:`conjugo.scaling.bngd` has the same for least squares, where it can be known exactly.

Source: the problem and H* of Y. Cai, Q. Li, Z. Shen, ICML 2019, arXiv:1810.00122. Its counterpart here, for one layer of any
network, is conjugo's: G is the block of the Hessian (or of the Gauss-Newton matrix) of this layer, with batch norm by the
statistics of each batch, Pi the projector that removes every w_c / |w_c|, and A = Pi G Pi is what a step of SGD meets.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from conjugo._space import is_dtensor
from conjugo.curvature import Operator, eigsh, from_matvec, ggn, hessian, spectral_density
from conjugo.errors import check, unknown
from conjugo.scaling.noise_scale import Data, LossFn

__all__ = [
    "EffectiveLRTracker",
    "LayerCondition",
    "LayerMatrix",
    "ScaleInvariant",
    "effective_condition",
    "scale_invariant_groups",
]

LayerMatrix: TypeAlias = Literal["hessian", "ggn"]

DENSE = 2000
"""Parameters of a layer up to which all eigenvalues are computed."""

QUANTILES = (0.5, 0.1)
PROBES = 2
"""Random vectors for the quantiles of larger layers."""

POWERS: Mapping[str, int] = {
    **dict.fromkeys(("SGD", "FRSGD", "NLCG"), 2),
    **dict.fromkeys(("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad"), 1),
    **dict.fromkeys(("LARS", "LAMB"), 0),
}
"""The effective learning rate of an optimizer is lr / |w|^power: its step is in proportion to the gradient, which is as
1 / |w|; or it ignores the gradient's size; or it is in proportion to |w|."""

MOMENTUM = ("SGD", "RMSprop", "LARS")
"""Optimizers whose ``momentum`` is constant and sums up steps."""


class ScaleInvariant(NamedTuple):
    """A parameter to whose rows' lengths the loss is indifferent."""

    name: str
    dim: int
    """The dimension of the output channels, whose slices are the rows."""


def scale_invariant_groups(
    model: nn.Module, loss_fn: LossFn, data: Data, tol: float = 1e-4, *, structural: bool = False
) -> list[ScaleInvariant]:
    """The weights of *model* whose rows are scale-invariant, with batch norm in training mode.

    A row w_c that is has w_c' g_c = 0 for its gradient g_c. A parameter is taken if sum_c |w_c' g_c| <= tol sum_c |w_c| |g_c|,
    at its values and once more with its rows scaled at random by 1 to 4. One without a gradient (a bias before batch norm, a
    layer that sees zeros, a minimum) shows nothing and is not taken, nor is one of a single value per row. LayerNorm and
    GroupNorm make layers or groups invariant, not rows: they are not found.

    structural: instead, the weights of linear layers and convolutions whose output goes straight into batch norm; that takes
    one forward pass, and does not see another use of the same output. Otherwise the time is that of two gradients.

    loss_fn, data: as of :func:`conjugo.curvature.hessian`. The model does not change. tol: > 0; batch norm's eps, which breaks
    the invariance, makes the left side about eps / variance of the right one.

    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
    >>> scale_invariant_groups(model, torch.nn.functional.mse_loss, (torch.randn(20, 3), torch.randn(20, 1)))
    [ScaleInvariant(name='0.weight', dim=0)]
    """
    owner = "scale_invariant_groups"
    check(0 < tol < 1, owner, "tol", tol, "in (0, 1)")
    if structural:
        return _before_batch_norm(model, data)
    dims = _dims(model)
    first = hessian(model, loss_fn, data, bn_mode="train")
    gradients = first.split(first.gradient())
    named = dict(model.named_parameters())
    found = [
        ScaleInvariant(name, dims.get(name, 0))
        for name, gradient in gradients.items()
        if gradient.ndim >= 2 and _orthogonal(named[name].detach(), gradient, dims.get(name, 0), tol)
    ]
    if not found:
        return []
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, dim in found:
            weights = dict(other.named_parameters())[name]
            factors = torch.exp2(2 * torch.rand(weights.shape[dim], generator=generator)).to(weights)
            weights.mul_(factors.view([-1 if i == dim else 1 for i in range(weights.ndim)]))
    second = hessian(other, loss_fn, data, bn_mode="train")
    gradients, named = second.split(second.gradient()), dict(other.named_parameters())
    return [group for group in found if _orthogonal(named[group.name].detach(), gradients[group.name], group.dim, tol)]


def _orthogonal(weights: Tensor, gradient: Tensor, dim: int, tol: float) -> bool:
    w, g = _rows(weights, dim).double(), _rows(gradient, dim).double()
    size = float((w.norm(dim=1) * g.norm(dim=1)).sum())
    return size > 0 and float((w * g).sum(1).abs().sum()) <= tol * size


def _rows(weights: Tensor, dim: int) -> Tensor:
    """[C, n] of a tensor with C output channels at *dim*; a view where that can be."""
    return weights.movedim(dim, 0).reshape(weights.shape[dim], -1)


def _dims(model: nn.Module) -> dict[str, int]:
    """The dimension of the output channels of the weights of linear layers and convolutions, by name."""
    return {
        f"{name}.weight" if name else "weight": 1 if isinstance(module, _ConvTransposeNd) else 0
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, _ConvNd) and not _grouped_transposed(module))
    }


def _grouped_transposed(module: nn.Module) -> bool:
    return isinstance(module, _ConvTransposeNd) and module.groups > 1  # its output channels are no dimension


# Which layers stand before batch norm -----------------------------------------------------------------------------------------


class _Watch:
    """Hooks that tell *found*, in a forward pass, which layers hand their output to batch norm.

    The output carries the name of its layer, so that nothing is kept alive.
    """

    def __init__(self, model: nn.Module, found: Callable[[str, int], object]) -> None:
        dims, handles = _dims(model), []
        for name, module in model.named_modules():
            weights = f"{name}.weight" if name else "weight"
            if weights in dims:
                handles.append(module.register_forward_hook(self._mark(weights)))
            elif isinstance(module, _BatchNorm):
                handles.append(module.register_forward_pre_hook(self._see(found, dims)))
        self._handles = handles

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    @staticmethod
    def _mark(weights: str) -> Any:
        def mark(module: nn.Module, inputs: Any, output: Any) -> None:
            output._conjugo_weights = weights

        return mark

    @staticmethod
    def _see(found: Callable[[str, int], object], dims: Mapping[str, int]) -> Any:
        def see(module: nn.Module, inputs: Any) -> None:
            weights = getattr(inputs[0], "_conjugo_weights", None)
            if weights is not None:
                found(weights, dims[weights])

        return see


def _before_batch_norm(model: nn.Module, data: Data) -> list[ScaleInvariant]:
    found: dict[str, int] = {}
    other = copy.deepcopy(model).train()  # running statistics of the model stay as they are
    watch = _Watch(other, found.setdefault)
    inputs, _ = data if isinstance(data, tuple) else next(iter(data))
    with torch.no_grad(), torch.random.fork_rng():
        other(inputs)
    watch.remove()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    return [ScaleInvariant(name, dim) for name, dim in found.items() if name in trainable]


# Conditioning -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LayerCondition:
    """The curvature of one layer before batch norm: G raw, A = Pi G Pi effective, D A D with D = diag(|w_c|) free of scale.

    Of A, C eigenvalues are zero by construction (the directions w_c); they are left out everywhere. Sizes are |eigenvalues|.
    """

    name: str
    """The parameter."""
    matrix: LayerMatrix
    exact: bool
    """All eigenvalues were computed; otherwise by Lanczos, and what needs the smallest ones is None."""
    parameters: int
    """P."""
    eigenvalues: Tensor
    """Of A, descending, float64: [P - C] if exact, else the k largest."""
    lam_max: float
    """Largest eigenvalue of A."""
    lam_min_pos: float | None
    """Smallest eigenvalue of A above 4 sqrt(P) eps lam_max."""
    kappa_eff: float | None
    """lam_max / lam_min_pos."""
    quantiles: dict[float, float]
    """By q, the size below which a part q of the eigenvalues of A is. In networks the smallest ones say little."""
    raw_lam_max: float
    """Largest eigenvalue of G."""
    kappa_raw: float | None
    """That of G: its largest eigenvalue over its smallest one above rounding."""
    raw_quantiles: dict[float, float]
    free_lam_max: float
    """Largest eigenvalue of D A D, which does not change when rows are rescaled."""
    kappa_free: float | None
    """That of D A D."""
    norms: Tensor
    """[C]: |w_c|."""
    n_matvec: int
    """Products with G."""

    def eff_lr(self, lr: float) -> Tensor:
        """[C]: lr / |w_c|^2, of plain SGD."""
        rates: Tensor = lr / self.norms.square()
        return rates

    def edge(self, lr: float) -> float:
        """lr lam_max / 2: above 1 the error along the sharpest direction grows, and the rows with it, until it is not."""
        return lr * self.lam_max / 2

    def kappa(self, q: float) -> float:
        """lam_max over the quantile q of the sizes, of A; q is one of 0.5 and 0.1. Infinite where that is zero."""
        check(q in self.quantiles, "LayerCondition.kappa", "q", q, f"one of {list(self.quantiles)}")
        return self.lam_max / self.quantiles[q] if self.quantiles[q] else math.inf


def effective_condition(
    model: nn.Module,
    loss_fn: LossFn,
    data: Data,
    layer: str,
    matrix: LayerMatrix = "hessian",
    k: int = 10,
    steps: int = 80,
    *,
    tol: float = 1e-2,
    seed: int = 0,
) -> LayerCondition:
    """How well-conditioned a layer before batch norm is for SGD, with batch norm by the statistics of each batch.

    Args:
        model, loss_fn, data: As of :func:`conjugo.curvature.hessian`. The model does not change.
        layer: A module with weights ("features.0"), or a parameter ("features.0.weight"). Its rows must be scale-invariant.
        matrix: ``"hessian"``, or ``"ggn"`` (Gauss-Newton), which has no negative eigenvalues for a convex loss.
        k: Of a layer of more than 2,000 parameters, eigenvalues to find one by one. Smaller ones are computed as a whole.
        steps: Lanczos steps, there.
        tol: The layer is refused if sum_c |w_c' g_c| > tol sum_c |w_c| |g_c| (g the gradient, and not next to zero).
        seed: Of the random vectors.

    Raises ValueError for a model without batch norm (one that was fused for inference, say), a layer that does not exist, that
    is not scale-invariant, or with a row of zeros; FloatingPointError for a loss that is not finite.

    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False), torch.nn.BatchNorm1d(2)).double()
    >>> inputs = torch.randn(50, 3, dtype=torch.float64)
    >>> found = effective_condition(model, torch.nn.functional.mse_loss, (inputs, inputs[:, :2]), "0")
    >>> found.exact, len(found.eigenvalues)
    (True, 4)
    """
    owner = "effective_condition"
    if matrix not in get_args(LayerMatrix):
        unknown("matrix of a layer", matrix, get_args(LayerMatrix))
    check(k >= 1, owner, "k", k, ">= 1")
    check(steps >= 2, owner, "steps", steps, ">= 2")
    check(0 < tol < 1, owner, "tol", tol, "in (0, 1)")
    normalised = any(isinstance(module, _BatchNorm) for module in model.modules())
    check(normalised, owner, "model", type(model).__name__, "one with batch norm (not fused into the layers before it)")
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    name = layer if layer in named else f"{layer}.weight"
    if name not in named:
        unknown("layer", layer, [known.removesuffix(".weight") for known, p in named.items() if p.ndim >= 2])
    weights = named[name].detach()
    check(weights.ndim >= 2, owner, f"the shape of {name}", tuple(weights.shape), "one of rows: two dimensions or more")
    dim = _dims(model).get(name, 0)
    norms = _rows(weights, dim).double().norm(dim=1).cpu()
    check(bool((norms > 0).all()), owner, f"{name}", "a row of zeros", "without rows of zeros")
    make = hessian if matrix == "hessian" else ggn
    raw = make(model, loss_fn, data, f"^{re.escape(name)}$", bn_mode="train")
    rows = _Rows(weights, dim, raw)
    zeros = len(norms)
    if raw.size <= DENSE:
        dense = raw.to_dense().double()
        dense = (dense + dense.T) / 2
        effective = rows.project(rows.project(dense).T)
        of_raw = _whole(dense, raw.dtype, 0)
        of_effective = _whole(effective, raw.dtype, zeros)
        of_free = _whole(rows.stretch(rows.stretch(effective).T), raw.dtype, zeros)
    else:
        made: dict[str, Any] = {"dtype": raw.dtype, "device": raw.device, "rows": True}
        operator = from_matvec(lambda v: rows.project(raw.matmat(rows.project(v))), raw.size, **made)
        free = from_matvec(lambda v: rows.stretch(operator.matmat(rows.stretch(v))), raw.size, **made)
        of_raw = _estimated(raw, 1, steps, seed, 0)
        of_effective = _estimated(operator, k, steps, seed, zeros)
        of_free = _Values(eigsh(free, 1, seed=seed, tol=1e-5).values, None, {})
    # At a minimum gradients are rounding and show nothing, so that there must be something to compare them with.
    gradient = _rows(raw.split(raw.gradient())[name], dim).double().cpu()
    w = _rows(weights, dim).double().cpu()
    least = 1e-6 * float(of_raw.values.abs().max()) * float(norms.max())
    radial = float((w * gradient).sum(1).abs().sum() / (norms * gradient.norm(dim=1).clamp(min=least)).sum())
    accepted = f"next to nothing (tol = {tol:g}), as it is for a layer before batch norm"
    check(radial <= tol, owner, f"the part of the gradient of {name} along its rows", round(radial, 6), accepted)
    return LayerCondition(
        name=name,
        matrix=matrix,
        exact=raw.size <= DENSE,
        parameters=raw.size,
        eigenvalues=of_effective.values,
        lam_max=of_effective.largest,
        lam_min_pos=of_effective.smallest,
        kappa_eff=of_effective.kappa,
        quantiles=of_effective.quantiles,
        raw_lam_max=of_raw.largest,
        kappa_raw=of_raw.kappa,
        raw_quantiles=of_raw.quantiles,
        free_lam_max=of_free.largest,
        kappa_free=of_free.kappa,
        norms=norms,
        n_matvec=raw.n_matvec,
    )


class _Rows:
    """The rows of a parameter in blocks of vectors [k, P], as the operator *raw* has them."""

    def __init__(self, weights: Tensor, dim: int, raw: Operator) -> None:
        self._shape, self._dim = weights.shape, dim + 1
        w = _rows(weights, dim).to(raw.device, torch.float64)
        self._norms = w.norm(dim=1, keepdim=True)
        self._directions = w / self._norms

    def project(self, vectors: Tensor) -> Tensor:
        """Pi v for each row v of *vectors*."""
        directions = self._directions.to(vectors.dtype)
        return self._mapped(vectors, lambda v: v - (v * directions).sum(-1, keepdim=True) * directions)

    def stretch(self, vectors: Tensor) -> Tensor:
        """D v for each row v of *vectors*."""
        return self._mapped(vectors, lambda v: v * self._norms.to(v.dtype))

    def _mapped(self, vectors: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        shaped = vectors.reshape(-1, *self._shape).movedim(self._dim, 1)
        found = function(shaped.reshape(*shaped.shape[:2], -1)).reshape(shaped.shape)
        return found.movedim(1, self._dim).reshape(vectors.shape)


@dataclass(frozen=True)
class _Values:
    """Eigenvalues, descending; the smallest one that is not zero; quantiles of their sizes."""

    values: Tensor
    smallest: float | None
    quantiles: dict[float, float]

    @property
    def largest(self) -> float:
        return float(self.values[0]) if len(self.values) else 0.0

    @property
    def kappa(self) -> float | None:
        return None if self.smallest is None else self.largest / self.smallest


def _whole(matrix: Tensor, dtype: torch.dtype, zeros: int) -> _Values:
    """All eigenvalues but those *zeros* smallest in size, which are zero by construction. dtype: of the products."""
    values = torch.linalg.eigvalsh((matrix + matrix.T) / 2).cpu()
    values = values[values.abs().argsort()[zeros:]].sort(descending=True).values
    sizes = values.abs()
    limit = 4 * math.sqrt(len(matrix)) * torch.finfo(dtype).eps * float(sizes.max() if len(sizes) else 0.0)
    positive = values[values > limit]
    quantiles = {q: _quantile(sizes, torch.ones_like(sizes), q) for q in QUANTILES} if len(sizes) else {}
    return _Values(values, float(positive[-1]) if len(positive) else None, quantiles)


def _estimated(operator: Operator, k: int, steps: int, seed: int, zeros: int) -> _Values:
    """The *k* largest eigenvalues, and quantiles by Lanczos quadrature."""
    pairs = eigsh(operator, k, seed=seed, tol=1e-5)
    points, masses = spectral_density(operator, PROBES, min(steps, operator.size - 1), seed=seed).measure
    sizes, order = points.abs().sort()
    masses = masses[order] * operator.size
    before = masses.cumsum(0) - masses
    masses = masses - (zeros - before).clamp(min=0).minimum(masses)  # without the zeros, which come first
    return _Values(pairs.values, None, {q: _quantile(sizes, masses, q) for q in QUANTILES})


def _quantile(sizes: Tensor, masses: Tensor, q: float) -> float:
    """The smallest of *sizes* [n] at or below which a part *q* of their masses [n] is."""
    sizes, order = sizes.sort()
    below = masses[order].cumsum(0)
    at = torch.searchsorted(below, q * below[-1] * (1 - 1e-12))
    return float(sizes[min(int(at), len(sizes) - 1)])


# Training ---------------------------------------------------------------------------------------------------------------------


class EffectiveLRTracker:
    """Watches rows before batch norm while a network is trained: their lengths, effective learning rates and turns.

    :meth:`step` after each step of the optimizer compares the weights with those of the last time: no gradient is needed, no
    backward pass, and nothing waits for an accelerator. It keeps a copy of these weights.

    Args:
        model: With whole parameters (not sharded).
        optimizer: Gives the learning rate of each parameter at the time.
        groups: The parameters, as of :func:`scale_invariant_groups`. None: those whose layers hand their output straight to
            batch norm in the first forward pass after this, which must come before the optimizer's first step.
        power: The effective learning rate is lr / |w_c|^power: 2 for SGD, whose step is in proportion to the gradient and so to
            1 / |w_c|; 1 for Adam and others that ignore the size of the gradient; 0 for LARS and LAMB. None: by the class of
            the optimizer. Momentum m (of SGD, RMSprop and LARS) multiplies it by 1 / (1 - m), less with dampening.

    Raises ValueError for an optimizer whose power is not known and not given, for groups that name no parameter of the model or
    of the optimizer, and for sharded parameters.

    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> tracker = EffectiveLRTracker(model, optimizer)
    >>> model(torch.randn(8, 3)).square().sum().backward()
    >>> optimizer.step()
    >>> {name: sorted(found) for name, found in tracker.step().items()}
    {'0.weight': ['angle', 'eff_lr', 'norm']}
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        groups: Sequence[tuple[str, int]] | None = None,
        *,
        power: int | None = None,
    ) -> None:
        owner = "EffectiveLRTracker"
        kinds = [kind.__name__ for kind in type(optimizer).__mro__]
        if power is None:
            power = next((POWERS[kind] for kind in kinds if kind in POWERS), None)
        accepted = (
            f"given for {kinds[0]} (2: steps in proportion to gradients, 1: of any gradient alike, 0: to weights)"
        )
        check(power is not None and power >= 0, owner, "power", power, accepted)
        assert power is not None
        self._power = power
        self._momentum = any(kind in MOMENTUM for kind in kinds)
        self._optimizer = optimizer
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        sharded = any(is_dtensor(p) for p in self._named.values())
        check(not sharded, owner, "the parameters", "sharded ones", "whole")
        self._before: dict[str, Tensor] = {}
        self._dims: dict[str, int] = {}
        self._watch: _Watch | None = None
        if groups is None:
            self._watch = _Watch(model, self._add)
        else:
            check(len(groups) > 0, owner, "groups", groups, "at least one")
            for name, dim in groups:
                if name not in self._named:
                    unknown("trainable parameter", name, self._named)
                dims = self._named[name].ndim
                check(0 <= dim < dims, owner, f"the dimension of the rows of {name}", dim, f"from 0 to {dims - 1}")
                self._add(name, dim)

    def _add(self, name: str, dim: int) -> None:
        if name in self._before or name not in self._named:
            return
        self._group(name)
        self._dims[name] = dim
        self._before[name] = self._named[name].detach().clone()

    def _group(self, name: str) -> dict[str, Any]:
        """The parameter group of the optimizer in which *name* is now."""
        wanted = self._named[name]
        found = next((g for g in self._optimizer.param_groups if any(p is wanted for p in g["params"])), None)
        check(
            found is not None, "EffectiveLRTracker", "optimizer", type(self._optimizer).__name__, f"one that has {name}"
        )
        assert found is not None
        return found

    @torch.no_grad()
    def step(self) -> dict[str, dict[str, Tensor]]:
        """After a step of the optimizer, by parameter: norm, eff_lr and angle of its rows, [C] each, on their device.

        norm: |w_c|. eff_lr: lr / |w_c|^power, times what momentum adds. angle: by which w_c has turned since the last call, in
        radians.

        Raises ValueError if no layer before batch norm has been seen.
        """
        if self._watch is not None:
            self._watch.remove()
            self._watch = None
        check(len(self._before) > 0, "EffectiveLRTracker.step", "the model", "no layer seen to hand its output to batch norm",
              "run forward before the first step, or groups given")  # fmt: skip
        names = list(self._before)
        now, before = [self._named[name].detach() for name in names], list(self._before.values())
        moved = torch._foreach_sub(now, before)
        squares = torch._foreach_mul(before, before)
        along = torch._foreach_mul(moved, before)
        torch._foreach_mul_(moved, moved)
        # From here on all rows of all layers in one vector: many small operations would cost more than the sums.
        dims = [self._dims[name] for name in names]
        old, inner, step = (
            torch.cat([_rows(x, dim).sum(1, dtype=torch.float32) for x, dim in zip(part, dims, strict=True)])
            for part in (squares, along, moved)
        )
        aside = (step - inner.square() / old).clamp(min=0)
        squared = old + 2 * inner + step
        rows = [x.shape[dim] for x, dim in zip(now, dims, strict=True)]
        found = {
            "norm": squared.sqrt(),
            "angle": torch.atan2((aside * old).sqrt(), old + inner),
            "eff_lr": squared.pow(-self._power / 2),
        }
        torch._foreach_copy_(before, now)
        parts = {what: torch.split(values, rows) for what, values in found.items()}
        return {
            name: {
                "norm": parts["norm"][i],
                "eff_lr": self._rate(name) * parts["eff_lr"][i],
                "angle": parts["angle"][i],
            }
            for i, name in enumerate(names)
        }

    def _rate(self, name: str) -> Any:
        group = self._group(name)
        rate, momentum = group["lr"], group.get("momentum", 0.0)
        if not (self._momentum and momentum):
            return rate
        return rate * (1 - group.get("dampening", 0.0)) / (1 - momentum)
