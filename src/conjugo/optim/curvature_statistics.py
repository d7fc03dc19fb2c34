"""The typical curvature of a layer, and the learning rate that it allows (Gao & Zhong 2020, arXiv:2012.08795).

Near its minimum w* a loss has along each coordinate the gradient g_i = k_i (w_i - w*_i). Two vectors whose quotient is k
are enough to measure it:

* the gradient and the weights (``ratio``), if the minima are near 0 compared with the weights;
* the changes of both over a step (``secant``);
* the product H v of the Hessian and a vector v of random signs, and v (``hutchinson``).

A statistic over the coordinates of a layer makes one number of it. Gao & Zhong's abstract names the rule and its special
case LARS; the formulas here are a reconstruction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from conjugo._space import ParamSpace, is_dtensor, to_local
from conjugo._tensors import Array, dot, flat, namespace, wide_dtype
from conjugo.errors import check, unknown
from conjugo.optim._base import as_real, state_dtype

__all__ = [
    "DELTA",
    "SAMPLE",
    "Quotient",
    "Statistic",
    "Summary",
    "curvature_rates",
    "is_vector",
    "layer_curvature",
    "layer_rates",
    "samples",
]

Statistic: TypeAlias = Literal["norm", "median", "mean", "max", "quantile"]

DELTA = 1e-8
"""Added to |w_i|, so that a weight of nearly 0 does not have an infinite curvature."""

FLOOR = 1e-12
"""Denominators below this size say nothing about curvature."""

FEWEST = 8
"""Coordinates below whose number a median or another quantile means nothing."""

SAMPLE = 4096
"""Coordinates of a layer among which a median is taken. Its relative error is about 2.5 % then; more would be slow: each of
them is a cache miss."""

_PER_OCTAVE, _OCTAVES, _LOWEST = 8, 64, -44
_BINS = _PER_OCTAVE * _OCTAVES
"""Of the histogram of log2 k, from 2^-44 to 2^20, that sharded layers add up."""


class Quotient(NamedTuple):
    """What this rank holds, or a sample, of the two vectors whose quotient is the curvature along each coordinate."""

    numerator: Tensor
    """1-D, real, float32 or float64."""
    denominator: Tensor | None
    """Like the numerator; None: all ones."""
    delta: float = 0.0
    """Added to the size of the denominator."""
    weight: float = 1.0
    """Coordinates for which each of them stands."""

    def sizes(self) -> tuple[Tensor, Tensor]:
        """|k_i|, and whether coordinate i counts: neither without gradient, as of a dead unit, nor with weight 0."""
        size = self.numerator.abs()
        counts = size != 0
        if self.denominator is None:
            return size, counts
        below = self.denominator.abs()
        return size / (below + self.delta), counts.logical_and_(below >= FLOOR)


@dataclass(frozen=True)
class Summary:
    """A statistic over the coordinates of each of n layers, taken in two steps with a sum over ranks in between.

    quantile: of the coordinates that count, in (0, 1), with ``statistic="quantile"``; the element of a sorted list that
    is at this fraction of its length, rounded down, so that 0.5 is the lower median. None otherwise.
    """

    statistic: Statistic
    quantile: float | None = None

    def check(self, owner: str) -> None:
        """Raise UnknownName or ValueError for a statistic that does not exist or a quantile out of range."""
        if self.statistic not in get_args(Statistic):
            unknown(f"{owner} statistic", self.statistic, get_args(Statistic))
        if self.statistic == "quantile":
            inside = self.quantile is not None and 0 < self.quantile < 1
            check(inside, owner, "quantile", self.quantile, "in (0, 1) with statistic='quantile'")
        else:
            check(self.quantile is None, owner, "quantile", self.quantile, "None unless statistic='quantile'")

    @property
    def position(self) -> float | None:
        """Of the element of the sorted coordinates that is wanted; None: the statistic does not sort."""
        return 0.5 if self.statistic == "median" else self.quantile

    def parts(self, layers: Sequence[Iterable[Quotient]], space: ParamSpace | None, *, lists: bool) -> Tensor:
        """What this rank contributes to the sum over *space*: float64 [rows, n].

        layers: each in pieces, one after the other; in a single one for a statistic that sorts. lists: all layers at once,
        without the host having to wait for the device.
        """
        if self.position is not None:
            quotients = [quotient for (quotient,) in layers]
            if space is not None and space.sharded:
                return _histograms(quotients)
            return _elements_of_all(quotients, self.position) if lists else _elements(quotients, self.position)
        columns = [torch.stack([self._part(quotient) for quotient in layer]) for layer in layers]
        if self.statistic != "max":
            return torch.stack([column.sum(0) for column in columns], 1)
        largest = torch.stack([column.amax(0) for column in columns], 1)
        if space is None or not space.sharded:
            return largest
        # A sum of which every rank fills its own row.
        rows = largest.new_zeros(space.world_size, len(layers))
        rows[space.rank] = largest[0]
        return rows

    def _part(self, q: Quotient) -> Tensor:
        """Of a piece of a layer: what is added up over the pieces, or compared; float64 [rows]."""
        wide = wide_dtype(q.numerator.device)
        if self.statistic == "norm":
            n = q.numerator.new_full((), q.numerator.numel(), dtype=wide)
            return torch.stack([dot(v, v) if v is not None else n for v in q[:2]])
        sizes, counts = q.sizes()
        sizes = torch.where(counts, sizes, 0.0)
        if self.statistic == "mean":
            return torch.stack([sizes.sum(dtype=wide), counts.sum(dtype=wide)])
        return (sizes.max() if len(sizes) else sizes.sum()).to(wide)[None]

    def value(self, parts: Tensor, sizes: Sequence[int]) -> Tensor:
        """The curvature of each layer, [n]; NaN where there is none. parts: summed over the ranks; sizes: of the layers."""
        if self.statistic == "norm":
            numerator, denominator = parts
            counts = torch.tensor(sizes, dtype=parts.dtype).to(parts.device, non_blocking=True)
            return torch.where(denominator >= FLOOR**2 * counts, (numerator / denominator).sqrt(), math.nan)
        if self.statistic == "mean":
            return parts[0] / parts[1]
        if self.statistic == "max":
            return parts.amax(0)
        assert self.position is not None
        if len(parts) == _BINS:
            return _of_histograms(parts, self.position)
        value, count = parts
        return torch.where(count >= FEWEST, value, math.nan)


# ---- elements of sorted lists ----


def _elements(quotients: Sequence[Quotient], position: float) -> Tensor:
    """The wanted element of each layer, and how many coordinates count: [2, n]. For CPUs, by numpy, in half the time."""
    columns = []
    for q in quotients:
        sizes = np.abs(q.numerator.numpy())
        if q.denominator is not None:
            below = np.abs(q.denominator.numpy())
            if below.size and below.min() < FLOOR:
                kept = below >= FLOOR
                sizes, below = sizes[kept], below[kept]
            below += q.delta
            with np.errstate(all="ignore"):  # what is not finite ends the step
                sizes /= below
        # Coordinates without gradient do not count: as zeros they stand before all others.
        n = np.count_nonzero(sizes)
        at = len(sizes) - n + max(math.floor(position * (n - 1)), 0)
        columns.append((np.partition(sizes, at)[at] if n else math.nan, n * q.weight))
    return torch.tensor(columns, dtype=torch.float64).T


def _elements_of_all(quotients: Sequence[Quotient], position: float) -> Tensor:
    """:func:`_elements` by two sorts over all layers."""
    values, counts, layer = _joined(quotients)
    n, wide = len(quotients), wide_dtype(values.device)
    # What does not count goes to the end of its layer. A stable sort by layer keeps the order within each.
    values, order = torch.where(counts, values, math.inf).sort()
    values = values[layer[order].sort(stable=True).indices]
    found = torch.zeros(n, dtype=torch.int64, device=values.device).index_add_(0, layer, counts.to(torch.int64))
    lengths = [len(q.numerator) for q in quotients]
    starts = _on([sum(lengths[:i]) for i in range(n)], torch.int64, values)
    at = starts + (position * (found - 1).clamp(min=0)).floor().to(torch.int64)
    # An empty layer at the end would point behind the last value.
    padded = torch.cat([values, values.new_full((1,), math.nan)])
    weights = _on([q.weight for q in quotients], wide, values)
    return torch.stack([padded[at.clamp(max=len(values))].to(wide), found * weights])


def _joined(quotients: Sequence[Quotient]) -> tuple[Tensor, Tensor, Tensor]:
    """Sizes, whether they count, and the number of their layer, of all layers in a row."""
    pairs = [q.sizes() for q in quotients]
    sizes, counts = (torch.cat(column) for column in zip(*pairs))
    lengths = [len(q.numerator) for q in quotients]
    layer = torch.cat([torch.full((n,), i, device=sizes.device) for i, n in enumerate(lengths)])
    return sizes, counts, layer


def _on(values: Sequence[float], dtype: torch.dtype, like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=dtype).to(like.device, non_blocking=True)


# ---- histograms ----


def _histograms(quotients: Sequence[Quotient]) -> Tensor:
    """How many coordinates of each layer there are in each bin of log2 k: [bins, n]. Ranks can add these up."""
    sizes, counts, layer = _joined(quotients)
    wide = wide_dtype(sizes.device)
    # NaN and what does not count end in some bin, with no weight; NaN makes the whole step be skipped.
    logs = torch.where(counts, sizes, 1.0).log2().nan_to_num_().sub_(_LOWEST).mul_(_PER_OCTAVE)
    bins = logs.floor_().clamp_(0, _BINS - 1).to(torch.int64)
    table = torch.zeros(_BINS * len(quotients), dtype=torch.int64, device=sizes.device)
    table.index_add_(0, bins * len(quotients) + layer, counts.to(torch.int64))
    weights = _on([q.weight for q in quotients], wide, sizes)
    return table.view(_BINS, len(quotients)) * weights


def _of_histograms(table: Tensor, position: float) -> Tensor:
    """The quantiles, [n], interpolated within their bins; NaN where there are too few coordinates."""
    below = table.cumsum(0)
    total = below[-1]
    wanted = position * total
    at = (below < wanted).sum(0, keepdim=True).clamp(max=_BINS - 1)
    inside = table.gather(0, at)[0]
    fraction = (wanted - below.gather(0, at)[0] + inside) / torch.where(inside > 0, inside, 1.0)
    value = torch.exp2((at[0] + fraction) / _PER_OCTAVE + _LOWEST)
    return torch.where(total >= FEWEST, value, math.nan)


# ---- samples ----


def samples(tensors: Sequence[Tensor], limit: int | None, dtype: torch.dtype) -> tuple[list[Tensor], float]:
    """The same at most *limit* coordinates (None: all) of real tensors of one shape, as 1-D tensors of type *dtype*; and
    for how many coordinates each of them stands.

    They lie evenly spaced in memory. The distance is odd, as the length of a row seldom is, so that they are of all columns.
    """
    alike = all(t.stride() == tensors[0].stride() for t in tensors)
    rows = [flat(t) if alike else t.reshape(-1) for t in tensors]
    n = len(rows[0])
    step = 1 if limit is None or n <= limit else math.ceil(n / limit) | 1
    taken = [row[::step].to(dtype) for row in rows]
    return taken, n / max(len(taken[0]), 1)


# ---- functions for users ----


def is_vector(name: str | None, p: Tensor) -> bool:
    """Whether *p* has fewer than two dimensions, as biases and the parameters of normalisation have."""
    return p.ndim < 2


def layer_curvature(
    grads: Iterable[Tensor],
    params: Iterable[Tensor],
    *,
    statistic: Statistic = "median",
    quantile: float | None = None,
    sample: int | None = SAMPLE,
    delta: float = DELTA,
    process_group: Any = None,
) -> Tensor:
    r"""The typical size of the curvature :math:`k_i = |g_i| / (|w_i| + \delta)` of each layer.

    ``norm`` is :math:`\|g\| / \|w\|`, the quotient in LARS. The others are taken over the coordinates with
    :math:`g_i \neq 0` and :math:`|w_i| \geq 10^{-12}`: those of dead units, unused rows of an embedding and pruned weights
    say nothing. The median of an even number is the lower one.

    Args:
        grads: :math:`g`, one tensor for each layer; any shapes, real or complex (whose parts are coordinates of their
            own). Changes of the gradient over a step, with those of the weights as *params*, give the secant estimate,
            and H v with v Hutchinson's.
        params: :math:`w`, of the same shapes; DTensors where the gradients are.
        statistic: ``"norm"``, ``"median"``, ``"mean"``, ``"max"`` or ``"quantile"``.
        quantile: in (0, 1), with ``statistic="quantile"``.
        sample: the number of evenly spaced coordinates of a layer (or of a rank's piece) among which a median or
            quantile is taken, >= 8; None: all. The relative error is about ``1.6 / sqrt(sample)``.
        delta: :math:`\delta \geq 0`, without effect on ``norm``.
        process_group: the ranks that hold DTensors; None: all. Medians and quantiles of what is sharded come from
            histograms, with an error below 1 % for layers of 2,000 coordinates or more (3 % for 500), besides that of the
            sample.

    Returns:
        Tensor: [number of layers], float64, on the device of *params*; in the unit of the loss over the square of that of
        the weights. NaN where there is no curvature: all gradients are 0, all weights are, or (median, quantile) fewer than
        8 coordinates count.

    Raises:
        ValueError: an argument is out of its range, or numbers or shapes of *grads* and *params* differ.

    Source: reconstruction after Gao & Zhong 2020 (arXiv:2012.08795), of which only the abstract was to be had.

    >>> w = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0], [32.0, 64.0, 128.0, 256.0, 512.0]])
    >>> g = torch.ones(2, 5)
    >>> g[1, 4] = 0
    >>> layer_curvature([g], [w])  # of 1, 1/2, ..., 1/256
    tensor([0.0625], dtype=torch.float64)
    """
    summary, grads, params = Summary(statistic, quantile), list(grads), list(params)
    summary.check("layer_curvature")
    check_sample("layer_curvature", sample)
    check(0 <= delta < math.inf, "layer_curvature", "delta", delta, "in [0, inf)")
    shapes, wanted = [tuple(g.shape) for g in grads], [tuple(p.shape) for p in params]
    check(bool(params) and shapes == wanted, "layer_curvature", "shapes of grads", shapes, f"those of params, {wanted}")
    space = None
    if any(is_dtensor(p) for p in params):
        space = ParamSpace(params, group=process_group, owner="layer_curvature")
    limit = sample if summary.position is not None else None
    layers = []
    for g, p in zip(grads, params):
        dtype = state_dtype(p)
        (numerator, denominator), weight = samples([as_real(to_local(t.detach())) for t in (g, p)], limit, dtype)
        layers.append([Quotient(numerator, denominator, delta, weight)])
    parts = summary.parts(layers, space, lists=params[0].device.type != "cpu")
    return summary.value(parts if space is None else space.reduce(parts), [p.numel() for p in params])


def layer_rates(
    params: Iterable[Tensor],
    *,
    trust: float = 0.003,
    weight_decay: float = 0.0,
    statistic: Statistic = "median",
    quantile: float | None = None,
    sample: int | None = SAMPLE,
    rate_bounds: tuple[float, float] = (0.0, math.inf),
    fallback: float = 1.0,
    exempt: Callable[[str | None, Tensor], bool] = is_vector,
    exempt_scale: float | None = None,
    process_group: Any = None,
) -> list[Tensor]:
    """The factor of each gradient that :class:`~conjugo.optim.MCLR` would apply, for use in front of any other optimizer.

    Args:
        params: parameters, all with a gradient.
        trust, weight_decay, rate_bounds, fallback, exempt, exempt_scale: as of :class:`conjugo.optim.CBLR`.
        statistic, quantile, sample, process_group: as of :func:`~conjugo.optim.layer_curvature`.

    Returns:
        list[Tensor]: one 0-d tensor for each parameter, in the type of its state (float32, or float64 for float64).

    Raises:
        ValueError: an argument is out of its range, or a parameter has no gradient.

    >>> layer = torch.nn.Linear(4, 2, bias=False)
    >>> _ = torch.nn.init.constant_(layer.weight, 2.0)
    >>> layer(torch.full((1, 4), 4.0)).sum().backward()
    >>> (rate,) = layer_rates([layer.weight], trust=0.5)  # the curvature is 4 / 2
    >>> rate
    tensor(0.2500)
    >>> _ = layer.weight.grad.mul_(rate)  # then a step with any optimizer
    """
    params = list(params)
    check_rule("layer_rates", trust=trust, bounds=rate_bounds, fallback=fallback, exempt_scale=exempt_scale)
    grads = [p.grad for p in params if p.grad is not None]
    missing = len(params) - len(grads)
    check(missing == 0, "layer_rates", "params without gradient", missing, "none")
    curvature = layer_curvature(
        grads, params, statistic=statistic, quantile=quantile, sample=sample, process_group=process_group
    )
    rates = curvature_rates(curvature, trust=trust, weight_decay=weight_decay, fallback=fallback, bounds=rate_bounds)
    fixed = trust if exempt_scale is None else exempt_scale
    return [
        (torch.full_like(rate, fixed) if exempt(None, p) else rate).to(state_dtype(p))
        for p, rate in zip(params, rates.unbind())
    ]


def curvature_rates(
    curvature: Array, *, trust: Array, weight_decay: Array, fallback: Array, bounds: tuple[Array, Array]
) -> Array:
    """trust / (curvature + weight_decay) within *bounds*; where there is no positive finite curvature trust * fallback.

    curvature: of each layer, any shape; the others are numbers or have its shape. With curvature |g| / |w| this is the trust
    ratio of LARS, trust |w| / (|g| + weight_decay |w|).
    """
    xp = namespace(curvature)
    known = (curvature > 0) & xp.isfinite(curvature)
    return xp.where(known, trust / (xp.where(known, curvature, 1.0) + weight_decay), trust * fallback).clip(*bounds)


def check_sample(owner: str, sample: int | None) -> None:
    """Raise ``ValueError`` unless *sample* is None or large enough for a median."""
    check(sample is None or sample >= FEWEST, owner, "sample", sample, f"None or >= {FEWEST}")


def check_rule(
    owner: str, *, trust: float, bounds: tuple[float, float], fallback: float, exempt_scale: float | None
) -> None:
    """Raise ``ValueError`` for options of the rule that are out of range."""
    check(0 < trust < math.inf, owner, "trust", trust, "in (0, inf)")
    ordered = len(bounds) == 2 and 0 <= bounds[0] < bounds[1]
    check(ordered, owner, "rate_bounds", bounds, "a pair (low, high) with 0 <= low < high")
    check(0 <= fallback < math.inf, owner, "fallback", fallback, "in [0, inf)")
    inside = exempt_scale is None or 0 <= exempt_scale < math.inf
    check(inside, owner, "exempt_scale", exempt_scale, "None or in [0, inf)")
