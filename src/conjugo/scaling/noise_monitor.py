"""The gradient noise scale while a model is trained, from gradients that are computed anyway.

A step over several micro-batches, on several workers or one after the other, knows the squared norms of their gradients and
that of the mean. Each step gives an unbiased tr Sigma and |G|^2; a :class:`NoiseScaleMonitor` averages each over steps, and
divides last. :func:`attach` feeds it from DistributedDataParallel, :class:`MicroBatchNorms` from any loop
that adds up gradients, ``monitor.update`` from anywhere.

Source: McCandlish, Kaplan & Amodei 2018 (arXiv:1812.06162), appendix A.1; norms of all micro-batches instead of one, which
makes each step's estimate several times as exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from conjugo._tensors import CHUNK, dot, flat, wide_dtype
from conjugo.errors import check
from conjugo.scaling.metric import diagonal_metric
from conjugo.scaling.noise_scale import Moments, NoiseScale, examples_in, jackknife

__all__ = ["Attachment", "MicroBatchNorms", "NoiseScaleMonitor", "Norms", "attach"]

Number: TypeAlias = float | Tensor
Hook: TypeAlias = Callable[[Any, Any], Any]
"""hook(state, bucket): a communication hook of DDP, which gives a future of the reduced bucket."""

BLOCKS = 16
"""Blocks of steps that the jackknife leaves out in turn."""

NEIGHBOURS = 4
"""Steps before and after one that say how large its numbers usually are."""
OUTSTANDING = 4.0

Values: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]


class _Steps(NamedTuple):
    """What each of some steps says [n], the oldest first."""

    finite: Tensor
    trace: Tensor
    norm2: Tensor
    scale: Tensor
    """By what both are to be multiplied, so that steps with large gradients do not outvote those with small ones."""
    age: Tensor
    """Weight by age: 1, or a power of ema."""
    batch: Tensor

    def sums(self) -> Tensor:
        """[5, n]: what is summed over steps; 0 where a step is not finite."""
        scaled = self.age * self.scale
        rows = [scaled * self.trace, scaled * self.norm2, scaled, self.age, (self.age / self.batch).square()]
        return torch.where(self.finite, torch.stack(rows), 0.0)


def _steps(rows: Tensor, ema: float | None) -> _Steps:
    """rows [n, 5], as the monitor has them. Does not wait for a device."""
    finite = torch.isfinite(rows[:, :2]).all(1)
    small, big, b_small, b_big, population = torch.where(finite[:, None], rows, 1.0).unbind(1)
    counted = finite.to(rows.dtype)
    trace = (small - big) / (1 / b_small - 1 / b_big)
    norm2 = big - trace / b_big * (1 - b_big / population)
    later = counted.flip(0).cumsum(0).flip(0) - counted
    age = torch.ones_like(counted) if ema is None else ema**later
    return _Steps(finite, trace, norm2, _inverse_of_usual(small, counted), age, b_big)


def _inverse_of_usual(values: Tensor, counted: Tensor) -> Tensor:
    """1 over the mean of *values* [n] over the NEIGHBOURS before and after each, without itself: [n].

    So a factor does not know the noise of its own step, and products with it have no bias; except in steps that stand out,
    OUTSTANDING times as large as their neighbours: they count no more than that.
    """
    reach = torch.ones(1, 1, 2 * NEIGHBOURS + 1, dtype=values.dtype, device=values.device)
    own = torch.stack([values * counted, counted])
    sums, counts = (
        nn.functional.conv1d(nn.functional.pad(own[:, None], (NEIGHBOURS,) * 2), reach)[:, 0] - own
    ).unbind()
    known = (counts > 0.5) & (sums > 0)
    usual = torch.where(known, sums / counts.clamp(min=1), values)
    usual = torch.maximum(usual, values / OUTSTANDING)
    return torch.where(usual > 0, 1 / usual, 1.0)


def _moments(sums: Values) -> Moments:
    trace, norm2, scale, _ = sums.tolist()
    return Moments(trace / scale, norm2 / scale)


class NoiseScaleMonitor:
    """The gradient noise scale over the last steps.

    tr Sigma and |G|^2 of each step are divided by what |g|^2 was in the steps around it, and added up. So all steps count the
    same while gradients shrink or once jump; a plain sum would show the largest ones for long.

    Numbers stay where they are, on an accelerator too, until the monitor is read; then it waits for the device once.

    Args:
        window: how many updates count, equally, >= 1; by default 100.
        ema: instead of a window, the factor in (0, 1) by which an update loses weight with each that follows; the mean
            over the updates is right from the first one on (the weights are divided by their sum).
        optimizer: measure in its metric (:func:`~conjugo.scaling.diagonal_metric`): Adam's and its relatives', or NLCG's.
            :func:`attach` and :class:`MicroBatchNorms` weigh the gradients with it; one that feeds :meth:`update` must do
            so itself. None: Euclidean.

    Raises ValueError for an argument out of its range, and for a window together with an ema.

    >>> monitor = NoiseScaleMonitor(window=10)
    >>> monitor.update(3.0, 1.5, b_small=1, b_big=4)  # tr Sigma = 2, |G|^2 = 1
    >>> monitor.b_simple
    2.0
    """

    def __init__(
        self, window: int | None = None, ema: float | None = None, *, optimizer: Optimizer | None = None
    ) -> None:
        owner = "NoiseScaleMonitor"
        check(window is None or (isinstance(window, int) and window >= 1), owner, "window", window, "an integer >= 1")
        check(ema is None or 0 < ema < 1, owner, "ema", ema, "in (0, 1) or None")
        check(window is None or ema is None, owner, "window", window, "None where ema is given")
        self.ema = ema
        # With an ema: what is older than this weighs as much as one block at most.
        self.window = (window or 100) if ema is None else max(1, math.ceil(math.log(BLOCKS) / -math.log(ema)))
        self._optimizer = optimizer
        # Rows, in the order of the steps: |g|^2 (mean over the micro-batches), |mean|^2, examples of each, population.
        self._rows = torch.zeros(2 * self.window, 5, dtype=torch.float64)
        self._place = 0
        self._updates = 0
        self._skipped = torch.zeros((), dtype=torch.float64)  # of those whose rows are gone
        self._older = torch.zeros(5, dtype=torch.float64)  # sums of the rows that are gone, with an ema; see _forget
        self._constants: dict[float, Tensor] = {}
        self._sources: list[Callable[[], None]] = []

    @property
    def metric(self) -> str:
        """Name of the optimizer in whose metric it is."""
        return "euclidean" if self._optimizer is None else type(self._optimizer).__name__.lower()

    @property
    def updates(self) -> int:
        """How many there were, with the skipped ones."""
        self._gather()
        return self._updates

    @property
    def skipped(self) -> int:
        """Updates that were not finite, such as those of a step that overflowed: they do not count."""
        self._gather()
        bad = ~torch.isfinite(self._rows[: self._place, :2]).all(1)
        return int(self._skipped + bad.sum())

    def update(
        self,
        sq_small_mean: Number,
        sq_big: Number,
        b_small: Number,
        b_big: Number,
        population: float | None = None,
        *,
        loss_scale: Number = 1.0,
    ) -> None:
        """Take in one step. Numbers may be floats or 0-d tensors; nothing waits for a device.

        Args:
            sq_small_mean: mean of |g|^2 over all micro-batches of the step.
            sq_big: |g|^2 of their mean, the gradient of the batch, before clipping and without weight decay.
            b_small: examples of a micro-batch; the harmonic mean where they differ.
            b_big: examples of the batch, > *b_small*.
            population: so many examples there are, where batches are drawn without replacement from them and a batch is a
                good part of them; None: no limit, as with augmentation.
            loss_scale: what the loss was multiplied with, as by a GradScaler: norms are divided by its square.

        Raises ValueError for floats that are no batch sizes. Norms that are not finite are skipped and counted.
        """
        self._gather()
        if isinstance(b_small, int | float) and isinstance(b_big, int | float):
            accepted = "0 < b_small < b_big"
            check(0 < b_small < b_big, "NoiseScaleMonitor.update", "the batch sizes", (b_small, b_big), accepted)
            fits = population is None or b_big <= population
            check(fits, "NoiseScaleMonitor.update", "b_big", b_big, f"at most {population} (population)")
        values = (sq_small_mean, sq_big, b_small, b_big, math.inf if population is None else population)
        device = next((value.device for value in values if isinstance(value, Tensor)), self._rows.device)
        if device != self._rows.device or self._rows.dtype != wide_dtype(device):
            self._move(device)
        if self._place == len(self._rows):
            self._forget()
        row = torch.stack([self._here(value) for value in values])
        if not (isinstance(loss_scale, int | float) and loss_scale == 1):
            row[:2] /= self._here(loss_scale).square()
        self._rows[self._place] = row
        self._place += 1
        self._updates += 1

    def _here(self, value: Number) -> Tensor:
        if isinstance(value, Tensor):
            return value.detach().to(self._rows)
        if value not in self._constants:
            if len(self._constants) > 64:
                self._constants.clear()
            self._constants[value] = torch.full((), float(value), dtype=self._rows.dtype, device=self._rows.device)
        return self._constants[value]

    def _move(self, device: torch.device) -> None:
        dtype = wide_dtype(device)
        self._rows, self._skipped, self._older = (t.to(device, dtype) for t in (self._rows, self._skipped, self._older))
        self._constants.clear()

    def _forget(self) -> None:
        """Make room: the older half of the rows goes; with an ema it lives on in sums. Does not wait for the device."""
        steps = _steps(self._rows[: self.window], self.ema)
        self._skipped += (~steps.finite).sum()
        if self.ema is not None:
            decay = self.ema ** steps.finite.sum()
            self._older = steps.sums().sum(1) + self._older * torch.stack([decay] * 4 + [decay.square()])
        self._rows[: self.window] = self._rows[self.window :].clone()
        self._rows[self.window :] = 0
        self._place = self.window

    def noise_scale(self) -> NoiseScale:
        """The measurement; its interval is the jackknife's over blocks of consecutive steps.

        Where |G|^2 is not above 0 the lower bound is half of B sqrt(n) for n steps with batches B: the error of |G|^2 from B
        examples falls with the root of the number of steps. Raises ValueError before the first finite update.
        """
        found = self._estimate()
        check(found is not None, "NoiseScaleMonitor", "the number of finite updates", 0, "at least 1")
        assert found is not None
        return found

    def _estimate(self) -> NoiseScale | None:
        self._gather()
        first = 0 if self.ema is not None else max(0, self._place - self.window)
        rows, older = self._rows[first : self._place].cpu(), self._older.cpu()
        rows = rows[torch.isfinite(rows[:, :2]).all(1)]
        if len(rows) == 0 and not float(older[3]):
            return None
        if self.ema is not None:
            decay = self.ema ** torch.tensor(float(len(rows)), dtype=older.dtype)
            older = older * torch.stack([decay] * 4 + [decay.square()])
        sums = torch.cat([older[:, None], _steps(rows, self.ema).sums()], 1).double().numpy()
        # Blocks of steps of about equal weight, the older ones in the first.
        ages = sums[3]
        middle = (np.cumsum(ages) - ages / 2) / ages.sum()
        block = np.minimum((BLOCKS * middle).astype(int), BLOCKS - 1)
        blocks = np.stack([np.bincount(block, values, BLOCKS) for values in sums[:4]])
        total = blocks.sum(1)
        found = _moments(total)
        without = [_moments(total - blocks[:, i]) for i in range(BLOCKS) if 0 < blocks[3, i] < total[3]]
        whole = float(total[3]) / math.sqrt(sums[4].sum())
        b_simple, ci95, only_bound = jackknife(found, without, examples=whole)
        micro, examples = (float(rows[:, i].mean() if i == 2 else rows[:, i].sum()) for i in (2, 3))
        return NoiseScale(
            trace=found.trace,
            grad_norm2=found.grad_norm2,
            b_simple=b_simple,
            ci95=ci95,
            lower_bound_only=only_bound,
            micro_batches=round(examples / micro) if len(rows) else 0,
            micro_batch=round(micro) if len(rows) else 0,
            examples=round(examples),
            metric=self.metric,
        )

    @property
    def b_simple(self) -> float:
        """tr Sigma / |G|^2 in examples, or the lower bound; NaN before the first finite update."""
        found = self._estimate()
        return math.nan if found is None else found.b_simple

    @property
    def ci95(self) -> tuple[float, float]:
        """The 95 % interval of :attr:`b_simple`; (0, inf) where too few steps are known."""
        found = self._estimate()
        return (0.0, math.inf) if found is None else found.ci95

    def weights(self) -> Mapping[Tensor, Tensor] | None:
        """What squared gradients are to be multiplied with, by parameter (1 where it is absent); None: not known yet."""
        if self._optimizer is None:
            return {}
        try:
            return diagonal_metric(self._optimizer)
        except ValueError:  # it has not taken a step
            return None

    def feed(self, source: Callable[[], None]) -> None:
        """*source* is called before the monitor is read; it may bring in, by :meth:`update`, what has come meanwhile."""
        self._sources.append(source)

    def starve(self, source: Callable[[], None]) -> None:
        """The end of :meth:`feed`."""
        self._sources.remove(source)

    def _gather(self) -> None:
        sources, self._sources = self._sources, []  # they call update
        try:
            for source in sources:
                source()
        finally:
            self._sources = sources

    def state_dict(self) -> dict[str, Any]:
        """All updates that still count: tensors of fixed shapes and plain numbers."""
        self._gather()
        return {
            "window": self.window,
            "ema": self.ema,
            "updates": self._updates,
            "place": self._place,
            "rows": self._rows.clone(),
            "older": self._older.clone(),
            "skipped": self._skipped.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave. Raises ValueError, before anything changes, for another window or ema."""
        for name in ("window", "ema"):
            own = getattr(self, name)
            check(state[name] == own, "NoiseScaleMonitor", f"the saved {name}", state[name], f"{own!r} as here")
        self._gather()
        self._updates, self._place = state["updates"], state["place"]
        self._rows, self._older, self._skipped = (state[name].clone() for name in ("rows", "older", "skipped"))
        self._constants.clear()


class Norms:
    """Squared norms of gradients in the metric of a monitor, as it is now."""

    def __init__(self, monitor: NoiseScaleMonitor) -> None:
        self.monitor = monitor
        weights = monitor.weights()
        self.known = weights is not None
        self._roots = {} if not weights else dict(zip(weights, torch._foreach_sqrt(list(weights.values()))))

    def of(self, gradient: Tensor, p: Tensor) -> Tensor:
        """The norm of the gradient of *p*, 0-d."""
        return _norm(gradient, self._roots.get(p))

    def of_all(self, gradients: Iterable[Tensor], params: Iterable[Tensor]) -> Tensor:
        """The square of the norm of all together, 0-d."""
        return sum_of_squares([self.of(gradient, p) for gradient, p in zip(gradients, params)])

    def of_bucket(self, buffer: Tensor, params: Sequence[Tensor]) -> Tensor:
        """The same of the gradients of *params*, which lie one after the other in *buffer*, each as its parameter does."""
        if not self._roots:
            return sum_of_squares([_norm(buffer)])
        norms = []
        for p, piece in zip(params, torch.split(buffer, [p.numel() for p in params])):
            root = self._roots.get(p)
            norms.append(
                _norm(piece, None if root is None else flat(torch.empty_like(p, dtype=root.dtype).copy_(root)))
            )
        return sum_of_squares(norms)


def _norm(x: Tensor, root: Tensor | None = None) -> Tensor:
    """|x|, or |P^(1/2) x| with *root* = P^(1/2) of the shape of x; 0-d."""
    if x.is_sparse:
        x = x.coalesce()
        root = None if root is None else root[tuple(x.indices())]
        x = x.values()
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    if x.is_complex():
        x = torch.view_as_real(x)
    if root is not None:
        x = x * root.view_as(x)
    if x.device.type == "cpu" and x.numel() > CHUNK:
        return dot(x, x).sqrt()
    norm: Tensor = torch.linalg.vector_norm(x)  # on an accelerator a sum by a tree: float32 is enough
    return norm


def sum_of_squares(norms: Sequence[Tensor]) -> Tensor:
    """0-d, in float64 where the device has it."""
    if len(norms) == 1:
        return norms[0].to(wide_dtype(norms[0].device)).square()
    stacked = torch.stack([norm.to(torch.float64) for norm in norms] if _mixed(norms) else list(norms))
    return stacked.to(wide_dtype(stacked.device)).square().sum()


def _mixed(tensors: Sequence[Tensor]) -> bool:
    return any(t.dtype != tensors[0].dtype for t in tensors)


class MicroBatchNorms:
    """Feeds monitors from a loop that adds up the gradients of micro-batches, on one process or, under DDP, on several.

    Put each backward pass inside :meth:`micro_batch` and call :meth:`step` after the last of a batch, before clipping and the
    optimizer's step. Gradients are looked at on their way to ``.grad``: none is copied, none changes. Several workers add
    up some numbers in :meth:`step`, once.

    Args:
        params: the model, or its parameters. With FSDP2 and HSDP the model, after ``fully_shard``: the whole gradients of
            micro-batches are seen before they are scattered. Not with tensor parallelism.
        monitors: one or several :class:`NoiseScaleMonitor`, such as a Euclidean one and one in the optimizer's metric.
        population: see :meth:`NoiseScaleMonitor.update`.
        process_group: the ranks that share a batch; by default all. Every batch needs at least two micro-batches over them.

    Raises ValueError if there are no trainable parameters or no monitors, for sharded parameters without their model, and for
    sharded parameters with a monitor in the metric of an optimizer, which is sharded, too.

    >>> model = torch.nn.Linear(4, 1)
    >>> monitor = NoiseScaleMonitor()
    >>> norms = MicroBatchNorms(model, monitor)
    >>> for part in torch.randn(32, 4).split(8):
    ...     with norms.micro_batch(len(part), weight=1 / 4):
    ...         (model(part).square().mean() / 4).backward()
    >>> norms.step()
    >>> monitor.updates
    1
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Tensor],
        *monitors: NoiseScaleMonitor,
        population: float | None = None,
        process_group: Any = None,
    ) -> None:
        owner = "MicroBatchNorms"
        given = params.parameters() if isinstance(params, nn.Module) else params
        self._params = [p for p in given if p.requires_grad]
        check(len(self._params) > 0, owner, "the number of trainable parameters", 0, "at least 1")
        check(len(monitors) > 0, owner, "the number of monitors", 0, "at least 1")
        sharded = [p for p in self._params if _is_sharded(p)]
        if sharded:
            check(
                isinstance(params, nn.Module), owner, "params", "sharded parameters", "the model, where it is sharded"
            )
            plain = all(monitor.metric == "euclidean" for monitor in monitors)
            check(plain, owner, "monitors", "the metric of an optimizer", "Euclidean ones for sharded parameters")
            self._watched = WeakIdKeyDictionary()
            for module in params.modules() if isinstance(params, nn.Module) else ():
                module.register_forward_pre_hook(self._watch)
        self._monitors = monitors
        self._population = population
        self._group = process_group
        several = dist.is_available() and dist.is_initialized()
        self._world = dist.get_world_size(process_group) if several else 1
        self._forget()

    def _forget(self) -> None:
        self._norms: list[Norms] = []
        self._squares: list[list[Tensor]] = []  # by monitor: of the micro-batches
        self._pieces: list[list[Tensor]] | None = None  # by monitor: of the micro-batch that goes backward now
        self._numbers = np.zeros(4)  # sums over micro-batches: 1, 1 / examples, weight, weight^2 / examples

    @property
    def seen(self) -> int:
        """Micro-batches of this rank since the last :meth:`step`, those that count."""
        return int(self._numbers[0])

    @contextmanager
    def micro_batch(self, examples: float, *, weight: float = 1.0) -> Iterator[None]:
        """Around the backward pass of a micro-batch of *examples* whose mean loss was multiplied with *weight*.

        With ``(loss / k).backward()`` for k micro-batches the weight is 1 / k. If it is left out, trace and |G|^2 come out
        smaller by its square; their ratio does not. A weight of 0: a micro-batch that does not count.
        """
        check(examples > 0, "MicroBatchNorms", "examples", examples, "> 0")
        if weight == 0:
            yield
            return
        if not self._norms:
            self._norms = [Norms(monitor) for monitor in self._monitors]
            self._squares = [[] for _ in self._monitors]
        pieces = self._pieces = [[] for _ in self._monitors]
        whole = [p for p in self._params if not _is_sharded(p)]
        handles = [p.register_hook(partial(self._look, p)) for p in whole]  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            self._pieces = None
            for handle in handles:
                handle.remove()
        self._numbers += (1, 1 / examples, weight, weight**2 / examples)
        for squares, found in zip(self._squares, pieces):
            if found:
                squares.append(sum_of_squares(found) / weight**2)

    def _look(self, p: Tensor, gradient: Tensor) -> None:
        if self._pieces is not None:
            for each, found in zip(self._norms, self._pieces):
                found.append(each.of(gradient, p))

    def _watch(self, module: nn.Module, args: Any) -> None:
        """Before *module* runs: FSDP2 has put whole parameters in the place of shards, the same tensors each time."""
        for p in module.parameters(recurse=False):
            accepted = "whole while a module runs, as with FSDP2"
            check(not _is_sharded(p), "MicroBatchNorms", "parameters", "sharded", accepted)
            if p.requires_grad and p not in self._watched:
                self._watched[p] = True
                p.register_hook(partial(self._look, p))  # type: ignore[no-untyped-call]

    def step(self) -> None:
        """Collective: give the monitors the batch whose micro-batches are done, from the gradients in ``.grad``.

        Raises ValueError if there were less than two micro-batches.
        """
        if not self._norms:
            return
        device = self._params[0].device
        with_gradient = [p for p in self._params if p.grad is not None]
        numbers = torch.tensor(self._numbers, dtype=wide_dtype(device))
        zero = torch.zeros((), dtype=numbers.dtype, device=device)
        small = [sum(squares, zero) for squares in self._squares]
        own = [_own(p) for p in with_gradient]
        big = [each.of_all(own, with_gradient) for each in self._norms]
        sums = torch.cat([torch.stack(small + big), numbers.to(device, non_blocking=True)])
        if self._world > 1:
            dist.all_reduce(sums, group=self._group)
        else:
            check(self._numbers[0] >= 2, "MicroBatchNorms", "micro-batches of a batch", int(self._numbers[0]), ">= 2")
        count, inverse, weight, squares = sums[-4:]
        b_small = count / inverse
        # The batch is the mean of its micro-batches with these weights; its noise is that of so many examples.
        b_big = weight.square() / squares
        scale = (self._world / weight).square()
        for i, each in enumerate(self._norms):
            if each.known:
                of_batch = sums[len(small) + i] / self._world * scale
                each.monitor.update(sums[i] / count, of_batch, b_small, b_big, self._population)
        self._forget()


def _is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, whose module takes long to import."""
    return hasattr(tensor, "full_tensor")


def _own(p: Tensor) -> Tensor:
    """This rank's gradient of *p*, so that the sum of squares over the ranks is that of the whole one times their number."""
    gradient: Any = p.grad
    if _is_sharded(gradient):
        mesh = gradient.device_mesh
        shards = math.prod(mesh.size(i) for i, at in enumerate(gradient.placements) if at.is_shard())
        gradient = gradient.to_local() * math.sqrt(shards)
    return gradient  # type: ignore[no-any-return]


# DistributedDataParallel ---------------------------------------------------------------------------------------------


def attach(
    model: DistributedDataParallel,
    *monitors: NoiseScaleMonitor,
    inner_hook: Hook | None = None,
    inner_state: Any = None,
    every: int = 1,
    examples: int | None = None,
    population: float | None = None,
    loss_scale: Callable[[], Number] | None = None,
) -> Attachment:
    """Let *monitors* follow the training of a DDP *model*: each step compares the ranks' gradients with their mean.

    A communication hook takes the squared norm of each bucket before and after it is reduced, and one all-reduce of a few
    numbers per step joins those of the ranks. Gradients keep their bits. It works with ``gradient_as_bucket_view``, with
    ``static_graph`` and with ``no_sync``: the gradient of a rank is then what it has accumulated. Of ``loss / k`` over k
    micro-batches that is the mean; where losses are not divided, trace and |G|^2 are k^2 times as large, and B_simple is right.

    Args:
        model: all ranks' losses are means and count the same, as DDP has it; on at least 2 ranks.
        monitors: one or several, the same on all ranks.
        inner_hook: the hook that reduces, ``hook(state, bucket)``, such as ``fp16_compress_hook``: what comes out of it is
            the gradient of the batch. None: the mean. DDP takes one hook only, so one that is there is to be given here.
        inner_state: its state; for the hooks of PyTorch a process group or None.
        every: measure one of so many steps, >= 1; the others cost next to nothing.
        examples: of a rank in a step, over all its micro-batches. None: counted, as the length of the first tensor that the
            model is called with in train mode.
        population: see :meth:`NoiseScaleMonitor.update`.
        loss_scale: gives what the loss is multiplied with, asked in each measured step, for example ``scaler.get_scale``.

    Gives a handle; its :meth:`~Attachment.detach` ends it, though the hook itself stays and hands on to *inner_hook*. Then
    *model* may be attached again. Raises ValueError for an argument out of its range, one rank, or a model that has a hook.
    """
    check(isinstance(model, DistributedDataParallel), "attach", "model", type(model).__name__, "a DDP model")
    check(len(monitors) > 0, "attach", "the number of monitors", 0, "at least 1")
    check(isinstance(every, int) and every >= 1, "attach", "every", every, "an integer >= 1")
    check(examples is None or examples >= 1, "attach", "examples", examples, ">= 1 or None")
    world = dist.get_world_size(model.process_group)
    check(world >= 2, "attach", "the number of ranks", world, "at least 2: one has nothing to compare")
    switch = _SWITCHES.get(model)
    if switch is None:
        switch = _Switch(inner_hook or _mean, model.process_group if inner_hook is None else inner_state)
        try:
            model.register_comm_hook(switch, lambda switch, bucket: switch.reduce(bucket))  # unannotated, as DDP has it
        except RuntimeError as error:
            raise ValueError(f"attach: the model must take a communication hook: {error}; use inner_hook") from error
        _SWITCHES[model] = switch
    else:
        same = inner_hook is None or inner_hook is switch.inner
        check(switch.attachment is None and same, "attach", "model", "attached", "one without, or with the same hook")
    attachment = Attachment(model, monitors, every, examples, population, loss_scale)
    attachment.switch = switch
    switch.attachment = attachment
    return attachment


class Attachment:
    """What :func:`attach` gives."""

    def __init__(
        self,
        model: DistributedDataParallel,
        monitors: Sequence[NoiseScaleMonitor],
        every: int,
        examples: int | None,
        population: float | None,
        loss_scale: Callable[[], Number] | None,
    ) -> None:
        self.switch: _Switch | None = None
        self._model = model
        self._monitors = monitors
        self._every = every
        self._examples = examples
        self._population = population
        self._loss_scale = loss_scale
        self._world = dist.get_world_size(model.process_group)
        self._seen = 0  # examples of this rank since the last step
        self._step = 0
        self._norms: list[Norms] = []
        self._local: list[list[Tensor]] = []  # by monitor: squared norms of this rank's buckets
        self._reduced: list[dict[int, Tensor]] = []  # by monitor and bucket: of the reduced ones
        self._waiting: tuple[Any, Tensor, list[dict[int, Tensor]], list[Norms], Number] | None = None
        self._counter = None if examples else model.register_forward_pre_hook(self._count, with_kwargs=True)
        for monitor in monitors:
            monitor.feed(self._flush)

    def detach(self) -> None:
        """End it; what was measured is in the monitors. Again, nothing happens."""
        if self.switch is None:
            return
        for monitor in self._monitors:
            monitor.updates  # noqa: B018 - takes in what is waiting
            monitor.starve(self._flush)
        self.switch.attachment = None
        self.switch = None
        if self._counter is not None:
            self._counter.remove()

    def _count(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if model.training and torch.is_grad_enabled():
            self._seen += examples_in((args, kwargs))

    def reduce(self, inner: Hook, state: Any, bucket: Any) -> Any:
        """Collective: what *inner* makes of a bucket; its norms before and after are kept."""
        last = bucket.is_last()
        if self._step % self._every:
            if last:
                self._next()
            return inner(state, bucket)
        if not self._norms:
            self._flush()  # the step before
            self._norms = [Norms(monitor) for monitor in self._monitors]
            self._local = [[] for _ in self._monitors]
            self._reduced = [{} for _ in self._monitors]
        index, params, norms, reduced = bucket.index(), bucket.parameters(), self._norms, self._reduced
        for each, local in zip(norms, self._local):
            local.append(each.of_bucket(bucket.buffer(), params))
        future = inner(state, bucket)
        if last:
            self._send()

        def after(done: Any) -> Any:
            value = done.value()
            whole = value[0] if isinstance(value, list | tuple) else value
            for each, found in zip(norms, reduced):
                found[index] = each.of_bucket(whole, params)
            return value

        return future.then(after)

    def _send(self) -> None:
        """All buckets of this rank are known: add up over the ranks, while the gradients are on their way."""
        local = torch.stack([torch.stack(found).sum() for found in self._local])
        seen = self._examples or self._seen
        inverse = torch.full((1,), 1 / seen if seen else math.inf, dtype=local.dtype, device=local.device)
        sums = torch.cat([local, inverse])
        work = dist.all_reduce(sums, group=self._model.process_group, async_op=True)
        scale = 1.0 if self._loss_scale is None else self._loss_scale()
        self._waiting = (work, sums, self._reduced, self._norms, scale)
        self._next()

    def _next(self) -> None:
        self._step += 1
        self._seen = 0
        self._norms = []

    def _flush(self) -> None:
        """Hand the last step over to the monitors. After the backward pass, which has waited for all buckets."""
        if self._waiting is None:
            return
        (work, sums, reduced, norms, scale), self._waiting = self._waiting, None
        work.wait()
        b_small = self._world / sums[-1]
        for each, small, pieces in zip(norms, sums, reduced):
            if each.known:
                # Buckets may be done in any order; ranks are to add up in the same one.
                big = torch.stack([pieces[index] for index in sorted(pieces)]).sum()
                each.monitor.update(
                    small / self._world, big, b_small, self._world * b_small, self._population, loss_scale=scale
                )


class _Switch:
    """State of the hook of a model: what reduces, and who listens."""

    def __init__(self, inner: Hook, state: Any) -> None:
        self.inner = inner
        self.state = state
        self.attachment: Attachment | None = None

    def reduce(self, bucket: Any) -> Any:
        """The hook."""
        if self.attachment is None:
            return self.inner(self.state, bucket)
        return self.attachment.reduce(self.inner, self.state, bucket)


_SWITCHES: WeakKeyDictionary[DistributedDataParallel, _Switch] = WeakKeyDictionary()


def _mean(group: Any, bucket: Any) -> torch.futures.Future[Tensor]:
    """What DDP does without a hook, to the last bit: it multiplies and does not divide."""
    buffer = bucket.buffer().mul_(1 / dist.get_world_size(group))
    work = dist.all_reduce(buffer, group=group, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])  # type: ignore[union-attr,no-any-return]
