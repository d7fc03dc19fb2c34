"""The gradient noise scale: how noisy the gradient of a batch is, measured in examples.

With G the gradient of the mean loss over all data and Sigma the covariance of the gradients of single examples,
B_simple = tr(Sigma) / |G|^2 (McCandlish, Kaplan & Amodei 2018, arXiv:1812.06162, equation 2.9): a batch of B_simple examples
has as much noise as signal. For steps along P g, P a diagonal metric such as Adam's, both are taken in the norm x' P x, which
is the Euclidean one of the coordinates in which these steps are those of SGD.

It is a property of the model, the data and the place in training, and not to be confused with SGD's noise scale
lr N / B, which is one of the hyperparameters (:mod:`conjugo.scaling.width`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map_only

from conjugo._tensors import dot
from conjugo.errors import check
from conjugo.scaling.metric import diagonal_metric

__all__ = ["Data", "LossFn", "Moments", "NoiseScale", "gradient_noise_scale", "jackknife", "moments"]

LossFn: TypeAlias = Callable[[Any, Any], Tensor]
"""loss_fn(outputs, targets): the mean loss of a batch, 0-d."""
Data: TypeAlias = tuple[Any, Any] | Iterable[tuple[Any, Any]]

MOST_GROUPS = 128
"""Gradients that are kept for the interval; beyond them, neighbours are added up."""
FEWEST_GROUPS = 8
FIRST = 16
"""Micro-batches before the first look at the interval."""


class Moments(NamedTuple):
    """tr Sigma and |G|^2, unbiased: each may be averaged over measurements, their ratio may not."""

    trace: float
    grad_norm2: float


def moments(sq_small: float, sq_big: float, small: float, big: float, *, population: int | None = None) -> Moments:
    """tr Sigma and |G|^2 from the squared norms of gradients over two batch sizes.

    sq_small: mean of |g|^2 over all micro-batches of *small* examples that *big* examples are cut into; sq_big: |g|^2 of all
    of them together. population: so many examples there are, if these were drawn without replacement from them.
    Source: McCandlish et al. 2018 (arXiv:1812.06162), appendix A.1, with all micro-batches for the small norm, which is what
    makes it as exact as it can be. Raises ValueError unless 0 < small < big <= population.

    >>> moments(3.0, 1.5, 1, 4)
    Moments(trace=2.0, grad_norm2=1.0)
    """
    check(0 < small < big, "moments", "the batch sizes", (small, big), "0 < small < big")
    check(population is None or big <= population, "moments", "big", big, f"at most {population} (population)")
    trace = (sq_small - sq_big) / (1 / small - 1 / big)
    left = 1.0 if population is None else 1 - big / population
    return Moments(trace, sq_big - trace / big * left)


@dataclass(frozen=True, kw_only=True)
class NoiseScale:
    """A measured gradient noise scale, in examples."""

    trace: float
    """tr Sigma, of the gradients of single examples."""
    grad_norm2: float
    """|G|^2; an unbiased estimate, which may be negative where the noise hides the gradient."""
    b_simple: float
    """trace / grad_norm2; where that is not positive, half of the examples it was measured on: a lower bound."""
    ci95: tuple[float, float]
    """Interval that contains the truth with a chance of 95 %, by the jackknife on the logarithm."""
    lower_bound_only: bool
    """Whether b_simple is a lower bound and no estimate."""
    micro_batches: int
    micro_batch: int
    """Examples of each."""
    examples: int
    """Measured on: micro_batches times micro_batch, over all ranks."""
    b_noise: float | None = None
    """tr(H Sigma) / G'HG where it was asked for: what the best learning rate depends on (equation 2.8 there). None, too, where
    one of them is not above 0."""
    metric: str = "euclidean"
    """Name of the optimizer in whose metric it is."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values; infinite ones as None."""
        low, high = self.ci95
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return plain | {"ci95": [low, high if math.isfinite(high) else None]}


def gradient_noise_scale(
    model: nn.Module,
    loss_fn: LossFn,
    data: Data,
    *,
    micro_batch: int = 16,
    max_examples: int = 16384,
    precision: float = 1.5,
    optimizer: Optimizer | None = None,
    hessian: bool = False,
    seed: int = 0,
    memory: int = 2**29,
    population: int | None = None,
    process_group: Any = None,
) -> NoiseScale:
    r"""Measure the gradient noise scale of *model* where it is now.

    With gradients :math:`g_i` of n micro-batches of b examples, their mean :math:`\bar g` and :math:`M = n b`,

    .. math::
        s^2 = \frac{1}{n-1} \sum_i |g_i - \bar g|^2, \quad
        \operatorname{tr} \hat\Sigma = b s^2, \quad |\hat G|^2 = |\bar g|^2 - s^2 / n, \quad
        B_{simple} = \operatorname{tr} \hat\Sigma / |\hat G|^2.

    n grows, from 16 on, until the interval is within a factor *precision* and M is at least 4 B_simple, or there are
    *max_examples*, or the data end.

    Args:
        model: in the mode in which it is to be measured; usually ``train()``, where dropout counts as noise. Batch norm makes
            examples of a micro-batch depend on each other: then *micro_batch* should be what it sees in training.
        loss_fn: ``loss_fn(outputs, targets)``, the mean loss over a batch, 0-d and finite. Where it is a mean over tokens, all
            micro-batches should have equally many.
        data: ``(inputs, targets)``, of which examples are drawn without replacement, or batches of these, which are taken in
            their order and cut; what is left of a batch is not used.
        micro_batch: examples b of which each gradient is the mean, >= 1. Small ones make the estimate more exact.
        max_examples: at most so many examples, over all ranks.
        precision: factor > 1.
        optimizer: measure in its metric: Adam's and its relatives' 1 / (sqrt(v) + eps), NLCG's preconditioner; it must have
            taken a step. None and plain SGD: the Euclidean one.
        hessian: measure B_noise = tr(H Sigma) / G'HG too, by products with the Hessian over the examples that were used
            (at most 1,024), in the coordinates of the metric.
        seed: of the choice of examples and of what the model draws.
        memory: bytes for gradients that are kept for the interval; at least 8 are, whatever they take.
        population: how many examples there are, where *data* are batches that were drawn from them without replacement; a mean
            over all of them has no noise then. None: infinitely many; of ``(inputs, targets)`` it is known.
        process_group: of the ranks, which have data of their own and get the same result; by default all ranks.

    Parameters, their ``.grad``, buffers and random numbers stay what they were. Raises ValueError for an argument out of range,
    less than two micro-batches of data, a loss that is not finite and 0-d, and no trainable parameters.

    >>> _ = torch.manual_seed(0)
    >>> x = torch.randn(4096, 10)  # isotropic, without noise in the targets: B_simple = 1 + 10 anywhere
    >>> model = torch.nn.Linear(10, 1, bias=False)
    >>> found = gradient_noise_scale(model, torch.nn.functional.mse_loss, (x, torch.zeros(4096, 1)), micro_batch=4)
    >>> found.ci95[0] < 11 < found.ci95[1]
    True
    """
    owner = "gradient_noise_scale"
    check(isinstance(micro_batch, int) and micro_batch >= 1, owner, "micro_batch", micro_batch, "an integer >= 1")
    check(
        max_examples >= 2 * micro_batch, owner, "max_examples", max_examples, f">= {2 * micro_batch}, two micro-batches"
    )
    check(precision > 1, owner, "precision", precision, "> 1")
    params: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    check(len(params) > 0, owner, "the number of trainable parameters", 0, "at least 1")
    check(not any(p.is_complex() for p in params), owner, "the parameters", "complex ones", "real")
    ranks = _Ranks(process_group, params[0].device)
    accepted = f">= {ranks.size * micro_batch}, a micro-batch on each of {ranks.size} ranks"
    check(max_examples >= ranks.size * micro_batch, owner, "max_examples", max_examples, accepted)
    if micro_batch == 1 and any(isinstance(module, _BatchNorm) and module.training for module in model.modules()):
        raise ValueError(f"{owner}: micro_batch must be at least 2 with batch norm in train mode, got 1")
    metric = {} if optimizer is None else diagonal_metric(optimizer)
    weights = [metric.get(p) for p in params] if metric else None
    own = _population(data)
    if own is not None:
        check(population is None, owner, "population", population, "left out, as it is known")
        population = own * ranks.size
    kept = _Kept(params, weights, ranks, micro_batch, memory, population)
    used: list[tuple[Any, Any]] = []
    most = max_examples // (micro_batch * ranks.size)
    last = False
    with undisturbed(model, seed):
        stream = islice(_cut(data, micro_batch, seed, owner), most)
        while not last:
            wanted = FIRST if not kept.count else kept.count  # doubling
            before = kept.count
            for batch in islice(stream, wanted):
                kept.add(_gradients(model, loss_fn, batch, params, owner))
                if hessian and len(used) * micro_batch < 1024:
                    used.append(batch)
            last = ranks.any(kept.count < before + wanted)
            enough = kept.of_all() >= 2
            accepted = f"at least two micro-batches of {micro_batch} examples"
            check(enough or not last, owner, "data", f"{kept.of_all()} of them", accepted)
            found = kept.estimate()
            low, high = found.ci95
            exact = found.b_simple <= precision * low and high <= precision * found.b_simple
            last = last or (exact and found.examples >= 4 * found.b_simple) or kept.count >= most
        b_noise = None
        if hessian:
            b_noise = kept.b_noise(model, loss_fn, used, process_group)
    name = "euclidean" if optimizer is None or not metric else type(optimizer).__name__.lower()
    return NoiseScale(**{**found.__dict__, "b_noise": b_noise, "metric": name})


@contextmanager
def undisturbed(model: nn.Module, seed: int) -> Iterator[None]:
    """Inside, torch's random numbers begin with *seed*; afterwards they and the buffers of *model* are what they were."""
    before = [(m, name, b, b.clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    try:
        # Seeding concerns all devices.
        with torch.random.fork_rng(devices=devices_in_use()):
            torch.manual_seed(seed)
            yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in before:
                buffer.copy_(value)
                module._buffers[name] = buffer  # it may have been replaced


def devices_in_use() -> range:
    """The GPUs whose random numbers ``torch.manual_seed`` sets: all, if any is in use."""
    return range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)  # type: ignore[no-untyped-call]


def examples_in(batch: Any) -> int:
    """How many examples the inputs of a batch hold."""
    return len(next(leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)))


def rows_of(nested: Any, rows: Any) -> Any:
    """The examples *rows* (a slice or indices) of nested tensors."""
    return tree_map_only(Tensor, lambda x: x[rows.to(x.device) if isinstance(rows, Tensor) else rows], nested)


def is_whole(data: Any) -> bool:
    """Whether *data* are (inputs, targets), and no batches: a tuple of two, unless both are pairs themselves."""
    return isinstance(data, tuple) and len(data) == 2 and not all(isinstance(x, tuple) and len(x) == 2 for x in data)


def _population(data: Data) -> int | None:
    return examples_in(data[0]) if isinstance(data, tuple) and is_whole(data) else None


def _cut(data: Data, size: int, seed: int, owner: str) -> Iterator[tuple[Any, Any]]:
    """Micro-batches of *size* examples."""
    if isinstance(data, tuple) and is_whole(data):
        inputs, targets = data
        n = examples_in(inputs)
        same = examples_in(targets) == n
        check(same, owner, "the number of targets", examples_in(targets), f"{n}, one per input")
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        for start in range(0, n - size + 1, size):
            rows = order[start : start + size]
            yield rows_of(inputs, rows), rows_of(targets, rows)
        return
    for batch in data:
        pair = isinstance(batch, tuple | list) and len(batch) == 2
        check(pair, owner, "a batch", type(batch).__name__, "a pair: inputs, targets")
        inputs, targets = batch
        for start in range(0, examples_in(inputs) - size + 1, size):
            part = slice(start, start + size)
            yield rows_of(inputs, part), rows_of(targets, part)


def _gradients(
    model: nn.Module, loss_fn: LossFn, batch: tuple[Any, Any], params: list[Tensor], owner: str
) -> list[Tensor]:
    device = params[0].device
    inputs, targets = tree_map_only(Tensor, lambda x: x.to(device), batch)
    with torch.enable_grad():
        loss = loss_fn(model(inputs), targets)
    scalar = isinstance(loss, Tensor) and loss.numel() == 1 and bool(torch.isfinite(loss))
    check(scalar, owner, "the loss of a batch", loss, "a finite 0-d tensor")
    found = torch.autograd.grad(loss, params, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)]


class _Ranks:
    """Sums over the ranks that measure together; alone, everything is its own."""

    def __init__(self, group: Any, device: torch.device) -> None:
        self._device = device  # NCCL knows no other memory
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1
        self.group = group
        self.size = dist.get_world_size(group) if several else 1
        self.rank = dist.get_rank(group) if several else 0

    def sum(self, tensor: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def any(self, flag: bool) -> bool:
        return bool(self.sum(torch.tensor([float(flag)], device=self._device)).item()) if self.size > 1 else flag

    def gather(self, row: list[list[float]]) -> list[list[float]]:
        if self.size == 1:
            return row
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, row, group=self.group)
        return [item for part in found for item in part]


class _Kept:
    """Sums of gradients of consecutive micro-batches: as many, and as small, as memory allows.

    weights: of the metric, for each parameter or None. With them gradients are multiplied with their roots, and all is
    Euclidean.
    """

    def __init__(
        self,
        params: list[Tensor],
        weights: list[Tensor | None] | None,
        ranks: _Ranks,
        size: int,
        memory: int,
        population: int | None,
    ) -> None:
        self._params = params
        self._roots = None if weights is None else [None if w is None else w.sqrt() for w in weights]
        self._ranks = ranks
        self._size = size
        self._population = population
        self._dtype = torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32
        numbers = sum(p.numel() for p in params)
        fits = memory // (numbers * self._dtype.itemsize)
        self._most = min(MOST_GROUPS, max(FEWEST_GROUPS, int(fits))) // 2 * 2
        self._rows = torch.zeros(0, numbers, dtype=self._dtype, device=params[0].device)
        self._squares: list[float] = []  # sums of |g|^2 of the micro-batches in a row
        self._counts: list[int] = []
        self._per_row = 1
        self.count = 0

    def add(self, gradients: list[Tensor]) -> None:
        """The gradient of a further micro-batch."""
        if self._roots is not None:
            gradients = [g if r is None else g * r for g, r in zip(gradients, self._roots, strict=True)]
        row = torch.cat([g.detach().reshape(-1).to(self._dtype) for g in gradients])
        square = float(dot(row, row))
        if self._counts and self._counts[-1] < self._per_row:
            self._rows[len(self._counts) - 1] += row
            self._squares[-1] += square
            self._counts[-1] += 1
        else:
            if len(self._counts) == self._most:
                self._merge()
            at = len(self._counts)
            if at == len(self._rows):
                more = torch.zeros(
                    min(self._most, max(FIRST, 2 * at)), self._rows.shape[1], dtype=row.dtype, device=row.device
                )
                more[:at] = self._rows
                self._rows = more
            self._rows[at] = row
            self._squares.append(square)
            self._counts.append(1)
        self.count += 1

    def _merge(self) -> None:
        """Add up neighbours."""
        half = len(self._counts) // 2
        for i in range(half):
            self._rows[i] = self._rows[2 * i] + self._rows[2 * i + 1]
        self._squares = [self._squares[2 * i] + self._squares[2 * i + 1] for i in range(half)]
        self._counts = [self._counts[2 * i] + self._counts[2 * i + 1] for i in range(half)]
        self._per_row *= 2

    def of_all(self) -> int:
        """Micro-batches of all ranks."""
        return int(self._ranks.sum(torch.tensor([float(self.count)], device=self._rows.device)).item())

    def estimate(self) -> NoiseScale:
        """Collective: what the gradients say so far; at least two micro-batches are needed."""
        rows = self._rows[: len(self._counts)]
        total = self._ranks.sum(rows.sum(0))
        own = [
            [float(count), square, float(dot(row, total)), float(dot(row, row))]
            for count, square, row in zip(self._counts, self._squares, rows, strict=True)
        ]
        groups = self._ranks.gather(own)
        n = int(sum(count for count, *_ in groups))
        squares = sum(square for _, square, *_ in groups)
        whole = float(dot(total, total))
        b = self._size

        def of(count: float, sum_of_squares: float, square_of_sum: float) -> Moments:
            return moments(sum_of_squares / count, square_of_sum / count**2, b, b * count, population=self._population)

        found = of(n, squares, whole)
        # Leaving the micro-batches of one row out changes |sum|^2 by what it had in common with the rest.
        without = [
            of(n - count, squares - square, whole - 2 * common + own_square)
            for count, square, common, own_square in groups
            if n - count >= 2
        ]
        b_simple, ci95, only_bound = jackknife(found, without, examples=n * b)
        return NoiseScale(
            trace=found.trace,
            grad_norm2=found.grad_norm2,
            b_simple=b_simple,
            ci95=ci95,
            lower_bound_only=only_bound,
            micro_batches=n,
            micro_batch=b,
            examples=n * b,
        )

    def b_noise(self, model: nn.Module, loss_fn: LossFn, used: list[tuple[Any, Any]], group: Any) -> float | None:
        """Collective: tr(H Sigma) / G'HG, from products of the Hessian over the examples *used* with the rows.

        None where one of them is not above 0: the Hessian may have negative eigenvalues.
        """
        from conjugo.curvature import hessian as hessian_of

        op = hessian_of(model, loss_fn, used, process_group=group, dtype=self._dtype)
        sizes = [p.numel() for p in self._params]
        roots = self._roots or [None] * len(sizes)

        def scaled(flat: Tensor) -> Tensor:  # P^(1/2) H P^(1/2): the Hessian in the coordinates of the metric
            pieces = torch.split(flat, sizes)
            return torch.cat([x if r is None else x * r.reshape(-1) for x, r in zip(pieces, roots, strict=True)])

        rows = self._rows[: len(self._counts)]
        total = self._ranks.sum(rows.sum(0))
        n = self.of_all()
        # Rows are means over blocks of `count` micro-batches: their covariance is 1/count of that of one.
        away = [row / count - total / n for row, count in zip(rows, self._counts, strict=True)]
        # The products are collective: all ranks take the same row at a time.
        rank = self._ranks.rank
        owners = self._ranks.gather([[float(rank), float(count)] for count in self._counts])
        mine = iter(away)
        inside = 0.0
        for owner, count in owners:
            row = self._ranks.sum(next(mine) if owner == rank else torch.zeros_like(total))
            inside += count * float(dot(row, scaled(op @ scaled(row))))
        trace: float = self._size * inside / (len(owners) - 1)
        mean = total / n
        along = float(dot(mean, scaled(op @ scaled(mean))))
        examples = n * self._size
        left = 1.0 if self._population is None else 1 - examples / self._population
        along -= trace / examples * left
        return trace / along if trace > 0 and along > 0 else None


def jackknife(found: Moments, without: list[Moments], *, examples: float) -> tuple[float, tuple[float, float], bool]:
    """B_simple, its 95 % interval, and whether it is a lower bound only.

    without: the moments without each of the parts of the measurement in turn. The interval is that of log(trace / grad_norm2),
    by Student's t distribution. examples: how many were measured on; where |G|^2 is not above 0, half of them is the bound.
    """
    trace, norm2 = found
    if norm2 <= 0 or not math.isfinite(norm2):
        return examples / 2, (examples / 2, math.inf), True
    if trace <= 0:
        return 0.0, (0.0, 0.0), False
    b_simple = trace / norm2
    if len(without) < 2 or any(each.trace <= 0 for each in without):
        return b_simple, (0.0, math.inf), False
    if any(each.grad_norm2 <= 0 for each in without):  # the gradient is hardly seen: no upper end
        return b_simple, (min(examples / 2, b_simple), math.inf), False
    logs = [math.log(each.trace / each.grad_norm2) for each in without]
    k = len(logs)
    mean = sum(logs) / k
    deviation = math.sqrt((k - 1) / k * sum((x - mean) ** 2 for x in logs))
    half = student975(k - 1) * deviation
    return b_simple, (b_simple * math.exp(-half), b_simple * math.exp(half)), False


def student975(freedom: int) -> float:
    """The 97.5 % quantile of Student's t distribution, to 1e-3; freedom >= 1.

    Abramowitz & Stegun, Handbook of Mathematical Functions, 26.7.5, which is exact enough from four degrees on.
    """
    if freedom < 4:
        return (12.7062, 4.3027, 3.1824)[freedom - 1]
    z: float = 1.959964
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / freedom**power for power, term in enumerate(terms, start=1))
