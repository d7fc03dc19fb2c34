"""Short training runs that leave no trace: what learning rate is best for a batch, and how many steps to a loss.

`Problem` is what is trained: a model, its loss, the examples and how an optimizer is made. `Run` trains a copy with constant
learning rate. `race` lets learning rates run against each other and keeps those that lead.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from conjugo.distributed import GlobalBatchSampler
from conjugo.errors import check
from conjugo.scaling.noise_scale import LossFn, devices_in_use, examples_in, is_whole, rows_of, undisturbed

__all__ = ["Clock", "Examples", "MakeOptimizer", "Problem", "Raced", "Run", "race"]

MakeOptimizer = Callable[[list[nn.Parameter], float], Optimizer]
"""make(parameters, lr)."""

JUDGED = 4096
"""Examples at most, the same ones always, over which the loss of a probe is taken."""
EVERY = 1.02
"""The loss is taken each time the steps have grown by this factor."""
ROOT2 = math.sqrt(2)


class Clock:
    """What a measurement may take: seconds, and examples sent forward and backward; either may be infinite."""

    def __init__(self, seconds: float = math.inf, examples: float = math.inf) -> None:
        self._end = time.monotonic() + seconds
        self._most = examples
        self.examples = 0
        self._begin = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._begin

    @property
    def most(self) -> float:
        """Examples; infinite: no limit."""
        return self._most

    @property
    def over(self) -> bool:
        """Whether seconds or examples are used up."""
        return self.examples >= self._most or time.monotonic() >= self._end

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def share(self, fraction: float) -> Clock:
        """A clock of *fraction* of what is left here, which counts examples of its own."""
        return Clock(self.left * fraction, (self._most - self.examples) * fraction)


class Examples:
    """Examples that can be taken in any order and number.

    data: ``(inputs, targets)``, a map-style Dataset of such pairs, a DataLoader of one, batches, which are put together, or
    ``(take, n)``: a function that gives inputs and targets of the rows asked for, on the device, and how many rows there are.
    Raises ValueError for anything else, and for less than two examples.
    """

    n: int

    MOST = 2**16
    """Of batches that are put together, so many examples are kept, and no more than `BYTES`."""
    BYTES = 2**31
    ON_DEVICE = 2**30
    """Bytes of tensors up to which all of them are moved to the device at once."""

    def __init__(self, data: Any, device: torch.device) -> None:
        self.device = device
        self._take: Callable[[Tensor], tuple[Any, Any]]
        collate: Callable[[list[Any]], Any] = torch.utils.data.default_collate
        if isinstance(data, torch.utils.data.DataLoader):
            if not isinstance(data.dataset, torch.utils.data.IterableDataset):
                collate = data.collate_fn if data.batch_size is not None else collate
                data = data.dataset
        elif isinstance(data, Tensor | Mapping | torch.utils.data.IterableDataset):
            accepted = "(inputs, targets), a map-style Dataset, a DataLoader or batches"
            check(False, "advise", "data", type(data).__name__, accepted)
        if isinstance(data, tuple) and len(data) == 2 and callable(data[0]):
            self._take, self.n = data
        elif hasattr(data, "__getitem__") and not isinstance(data, list | tuple):
            self._take = lambda rows: _pair(collate([data[i] for i in rows.tolist()]), "what the dataset gives")
            self.n = len(data)
        else:
            inputs, targets = data if is_whole(data) else _joined(data, self.MOST, self.BYTES)
            self.n = examples_in(inputs)
            same = examples_in(targets) == self.n
            check(same, "advise", "the number of targets", examples_in(targets), f"{self.n}, one per input")
            whole = (inputs, targets)
            if sum(x.numel() * x.element_size() for x in tree_leaves(whole) if isinstance(x, Tensor)) <= self.ON_DEVICE:
                whole = self._moved(whole)
            self._take = lambda rows: rows_of(whole, rows)
        check(self.n >= 2, "advise", "the number of examples", self.n, ">= 2")

    def _moved(self, nested: Any) -> Any:
        return tree_map_only(Tensor, lambda x: x.to(self.device), nested)

    def take(self, rows: Tensor) -> tuple[Any, Any]:
        """Inputs and targets of the examples *rows* (int64), on the device."""
        inputs, targets = self._take(rows)
        return self._moved(inputs), self._moved(targets)


def _pair(batch: Any, what: str) -> tuple[Any, Any]:
    good = isinstance(batch, tuple | list) and len(batch) == 2
    check(good, "advise", what, type(batch).__name__, "a pair: inputs, targets")
    return batch[0], batch[1]


def _joined(data: Iterable[Any], most: int, most_bytes: int) -> tuple[Any, Any]:
    batches, n, size = [], 0, 0
    for batch in data:
        batches.append(_pair(batch, "a batch"))
        n += examples_in(batch[0])
        size += sum(x.numel() * x.element_size() for x in tree_leaves(batch) if isinstance(x, Tensor))
        if n >= most or size >= most_bytes:
            break
    check(n > 0, "advise", "the number of examples", n, ">= 2")
    inputs, targets = tree_map(lambda *parts: torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0], *batches)
    return inputs, targets


@dataclass
class Problem:
    """What is trained. The model is never changed: every run has a copy.

    optimizer: what makes one for parameters and a learning rate, or one of the model's parameters, with which runs begin:
    each has a copy of it, whose learning rates keep their ratios. micro_batch: most examples that go through the model at
    once. judged: the examples that runs are judged by. gap: from the size of a batch, how many steps there are at least
    between two looks at their loss.
    """

    model: nn.Module
    loss_fn: LossFn
    examples: Examples
    optimizer: MakeOptimizer | Optimizer
    micro_batch: int | None = None
    clock: Clock = field(default_factory=Clock)
    judged: Tensor = field(init=False)
    gap: Callable[[int], int] = lambda batch: 1

    def __post_init__(self) -> None:
        """Be judged by as many examples as pay where time does not matter."""
        self.judge_by(JUDGED)

    def fresh(self, lr: float) -> tuple[nn.Module, Optimizer]:
        """A copy of the model, and its optimizer with the (largest) learning rate *lr*."""
        if not isinstance(self.optimizer, Optimizer):
            model = copy.deepcopy(self.model)
            return model, self.optimizer([p for p in model.parameters() if p.requires_grad], lr)
        model, optimizer = copy.deepcopy((self.model, self.optimizer))
        # What a schedule has set to 0 at its beginning has its place all the same.
        rates = [float(group["lr"]) or float(group.get("initial_lr", 0.0)) for group in optimizer.param_groups]
        check(max(rates) > 0, "advise", "the learning rate of the optimizer", max(rates), "> 0 in one of its groups")
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = lr * rate / max(rates)
        return model, optimizer

    def judge_by(self, count: int) -> None:
        """Judge by *count* examples, or all if there are fewer."""
        self.judged = torch.randperm(self.examples.n, generator=torch.Generator().manual_seed(0))[:count]
        self._begin: float | None = None

    @property
    def begin(self) -> float:
        """The loss of the model as it is."""
        if self._begin is None:
            self._begin = self.loss(self.model)
        return self._begin

    def parts(self, rows: Tensor) -> Sequence[Tensor]:
        """*rows*, cut into micro-batches."""
        size = self.micro_batch or len(rows)
        return list(torch.tensor_split(rows, -(-len(rows) // size)))

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        """The mean loss over the examples that runs are judged by, in the mode that training has; changes nothing."""
        total = torch.zeros((), dtype=torch.float64)
        with undisturbed(model, 0):
            # Parts of about equal size: batch norm cannot do with a single example.
            for part in torch.tensor_split(self.judged, -(-len(self.judged) // (self.micro_batch or 1024))):
                inputs, targets = self.examples.take(part)
                total += mean_loss(self.loss_fn, model(inputs), targets).double().cpu() * len(part)
        return float(total / len(self.judged))


class Run:
    """A copy of the model in training with batches of *batch* at the constant learning rate *lr*."""

    def __init__(self, problem: Problem, lr: float, batch: int, *, seed: int = 0) -> None:
        self.problem = problem
        self.lr = lr
        self.batch = batch
        self.seed = seed
        self.model, self.optimizer = problem.fresh(lr)
        self._sampler = GlobalBatchSampler(problem.examples.n, batch, seed=seed)
        self.step = 0
        self._next = 1.0
        self.curve: list[tuple[int, float]] = [(0, problem.begin)]
        self.failed = False

    @property
    def loss(self) -> float:
        """The last that was taken."""
        return self.curve[-1][1]

    def advance(self, to: int, target: float = -math.inf) -> None:
        """Train until step *to*, or until the loss is at *target*, or the clock is over, or it fails."""
        with _seeded((self.seed, self.step)):
            while self.step < to and not self.failed and not self.problem.clock.over:
                self._train()
                if self.step >= self._next or self.step == to:
                    self._judge()
                    if self.loss <= target:
                        return

    def _train(self) -> None:
        self.take_step(self.draw())

    def draw(self) -> list[tuple[Any, Any]]:
        """The next batch, cut into micro-batches."""
        return [self.problem.examples.take(part) for part in self.problem.parts(next(self._sampler))]

    def take_step(self, parts: Sequence[tuple[Any, Any]]) -> None:
        """A step with the batch that *parts* make up."""
        problem = self.problem
        counts = [examples_in(inputs) for inputs, _ in parts]
        self.optimizer.zero_grad()
        if getattr(self.optimizer, "needs_curvature", False):
            self.optimizer.measure(self.model, problem.loss_fn, *parts[0])  # type: ignore[attr-defined]
        total = torch.zeros((), device=problem.examples.device)
        for (inputs, targets), count in zip(parts, counts, strict=True):
            loss = mean_loss(problem.loss_fn, self.model(inputs), targets) * (count / sum(counts))
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        if getattr(self.optimizer, "needs_loss", False):
            self.optimizer.step(loss=total)  # type: ignore[call-overload]
        else:
            self.optimizer.step()
        self.step += 1
        problem.clock.examples += sum(counts)

    def _judge(self) -> None:
        loss = self.problem.loss(self.model)
        self.failed = not math.isfinite(loss) or loss > 100 * abs(self.curve[0][1]) + 1
        self.curve.append((self.step, loss if math.isfinite(loss) else math.inf))
        self._next = max(self.step + self.problem.gap(self.batch), self.step * EVERY)

    def loss_at(self, step: int) -> float:
        """The last loss that was taken up to *step*."""
        return [loss for at, loss in self.curve if at <= step][-1]

    def release(self) -> None:
        """Give the memory back; the curve stays."""
        del self.model, self.optimizer

    @property
    def stalled(self) -> bool:
        """Whether the last half of the steps brought the loss down by less than 3 %."""
        half = [loss for step, loss in self.curve if step <= self.step / 2]
        return self.step >= 40 and min(loss for _, loss in self.curve) > 0.97 * min(half)

    def steps_to(self, target: float) -> float:
        """Steps until the loss was at *target* first, between two looks by its logarithm; infinite: never so far."""
        return steps_to(self.curve, target)


def mean_loss(loss_fn: LossFn, outputs: Any, targets: Any) -> Tensor:
    """What *loss_fn* gives, 0-d. Raises ValueError for more than one number."""
    loss = loss_fn(outputs, targets)
    shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
    check(isinstance(loss, Tensor) and loss.numel() == 1, "advise", "the loss of a batch", shape, "a 0-d tensor")
    return loss.reshape(())


def steps_to(curve: Sequence[tuple[int, float]], target: float) -> float:
    """Where *curve*, pairs (step, loss), first reaches *target*."""
    if curve[0][1] <= target:
        return 0.0
    for (s0, l0), (s1, l1) in pairwise(curve):
        if l1 <= target:
            logs = l0 > 0 and l1 > 0 and target > 0
            part = math.log(l0 / target) / math.log(l0 / l1) if logs else (l0 - target) / (l0 - l1)
            return s0 + (s1 - s0) * part
    return math.inf


@contextmanager
def _seeded(source: tuple[int, int]) -> Iterator[None]:
    """What models draw inside depends on *source* alone, and nothing outside depends on it."""
    with torch.random.fork_rng(devices=devices_in_use()):
        torch.manual_seed(hash(source) % 2**63)
        yield


@dataclass
class Raced:
    """The outcome of a race. target: what was asked for, or what the leader reached when the time was over."""

    lr: float
    """The best learning rate, between those that ran, by a parabola through the best three."""
    steps: float
    """To the target, of the best one that ran."""
    target: float
    reached: bool
    """Whether the target is the one asked for."""
    bracketed: bool
    """Whether a larger and a smaller learning rate were worse."""
    results: dict[float, float]
    """Steps by learning rate; infinite: given up."""
    failed: tuple[float, ...]
    """Learning rates whose loss exploded."""


def race(
    problem: Problem,
    batch: int,
    lrs: Sequence[float],
    *,
    target: float | None,
    seed: int = 0,
    patience: float = 2.0,
) -> Raced | None:
    """Find the learning rate that brings the loss down fastest; None if none of them does at all.

    All *lrs* run on the same batches, in rounds of growing length. Whoever needs *patience* times as many steps as the leader
    to the same loss drops out. When the leader is at *target* (None: never), neighbours of the best one are tried, until it
    has a worse one on either side: first with the ratio of *lrs*, then by the square root of 2.
    """
    goal = -math.inf if target is None else target
    alive = [Run(problem, lr, batch, seed=seed) for lr in sorted(lrs)]
    ratio = min((b / a for a, b in pairwise(sorted(lrs))), default=2.0)
    curves: dict[float, Run] = {}
    beaten: set[float] = set()
    length = 8
    failed: list[float] = []
    while True:
        for run in alive:
            run.advance(length, goal)
        failed += [run.lr for run in alive if run.failed]
        good = [run for run in alive if not run.failed]
        for run in good:
            curves[run.lr] = run
        for lr in failed:
            curves.pop(lr, None)
        if not good:  # the leader has exploded: those that it had beaten, and smaller ones, try again
            if len(failed) > 8 + len(lrs) or problem.clock.over:
                return None
            smaller = {*(lr for lr in lrs if lr < min(failed)), min(failed) / ratio, min(failed) / ratio**2}
            alive = [Run(problem, lr, batch, seed=seed) for lr in sorted(smaller)]
            continue
        if problem.clock.over:  # it stops them at different steps: who has hardly begun does not count
            good = [run for run in good if 2 * run.step >= max(other.step for other in good)]
        common = min(run.step for run in good)
        leader = min(good, key=lambda run: (run.steps_to(goal), run.loss_at(common)))
        if leader.loss <= goal or problem.clock.over:
            break
        if leader.stalled and all(loss >= leader.curve[0][1] for run in curves.values() for _, loss in run.curve):
            return None
        alive = [run for run in good if steps_to(leader.curve, run.loss) >= run.step / patience or run is leader]
        for run in good:
            if run not in alive:
                beaten.add(run.lr)
                run.release()
        below = leader.lr / ratio
        if leader.stalled and not any(run.lr < 0.99 * leader.lr for run in alive):
            alive.append(Run(problem, below, batch, seed=seed))
        length = math.ceil(length * 1.5)
    reached = leader.loss <= goal
    if not reached:
        # The leader may have lost what it had: then one that was beaten is ahead.
        goal = min(leader.loss_at(common), *(curves[lr].loss for lr in beaten & set(curves)), math.inf)
        if goal >= leader.curve[0][1]:
            return None
    results = {lr: run.steps_to(goal) for lr, run in curves.items()}
    best = min(results, key=lambda lr: results[lr])
    # Of those that were still in the race when it ended nothing more is known than that they were behind.
    known = {lr for lr in results if math.isfinite(results[lr])} | beaten
    for step in (ratio, ROOT2) if ratio > 1.5 else (ratio,):
        while not problem.clock.over:
            wanted = [best * step, best / step]
            new = next((lr for lr in wanted if not _tried(lr, results, failed)), None)
            if new is None:
                break
            run = Run(problem, new, batch, seed=seed)
            run.advance(math.ceil(results[best] * 1.3) + 1, goal)
            if problem.clock.over and not run.failed and run.loss > goal:
                break  # it had no chance
            results[new] = run.steps_to(goal)
            known.add(new)
            if run.failed:
                failed.append(new)
            best = min(results, key=lambda lr: results[lr])
    if reached:
        known |= set(results)  # whoever was still running was slower than the leader
    lr, bracketed = _vertex({lr: steps for lr, steps in results.items() if lr in known}, best)
    below_failure = any(lr < other <= 2 * lr for other in failed)
    bracketed = bracketed or (below_failure and any(other < best for other in known))
    return Raced(lr, results[best], goal, reached, bracketed, results, tuple(sorted(set(failed))))


def _tried(lr: float, results: dict[float, float], failed: Sequence[float]) -> bool:
    near = any(abs(math.log(lr / other)) < 0.05 for other in results)
    return near or any(lr >= other * 0.99 for other in failed)


def _vertex(results: dict[float, float], best: float) -> tuple[float, bool]:
    """Where the parabola through the best learning rate and its finite neighbours is lowest, and whether there are
    neighbours."""
    order = sorted(results)
    at = order.index(best)
    if at in (0, len(order) - 1):
        return best, False
    low, high = order[at - 1], order[at + 1]
    if not (math.isfinite(results[low]) and math.isfinite(results[high])):
        return best, True
    x0, x1, x2 = math.log(low), math.log(best), math.log(high)
    y0, y1, y2 = (math.log(max(results[lr], 1.0)) for lr in (low, best, high))
    curvature = (y2 - y1) / (x2 - x1) - (y1 - y0) / (x1 - x0)
    if curvature <= 0:
        return best, True
    slope0, slope1 = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    middle0, middle1 = (x0 + x1) / 2, (x1 + x2) / 2
    vertex = middle0 - slope0 * (middle1 - middle0) / (slope1 - slope0)
    return math.exp(min(max(vertex, middle0), middle1)), True
