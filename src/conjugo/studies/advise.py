"""How large the batch may be, with which learning rate, and how much sooner training ends: from short probes.

:func:`advise` measures, on copies of the model, what a step costs, how curved the loss is, how noisy its gradients are along a
training run, and how many steps batches of some sizes need to a training loss. `Advice` says what follows for all others.
"""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from conjugo._space import is_dtensor
from conjugo.errors import check, unknown
from conjugo.optim import NLCG
from conjugo.scaling.forecast import StepsForecast
from conjugo.scaling.metric import diagonal_metric
from conjugo.scaling.noise_scale import LossFn, NoiseScale, devices_in_use, gradient_noise_scale
from conjugo.studies.advice import Advice, Probe
from conjugo.studies.probes import JUDGED, Clock, Examples, MakeOptimizer, Problem, Raced, Run, race
from conjugo.studies.throughput import Memory, StepTime, measure_memory, measure_step_time
from conjugo.training import optimizers

__all__ = ["Advice", "Mode", "advise"]

Mode: TypeAlias = Literal["fast", "branch"]

FEW = 256
"""Examples that runs are judged by at least."""
PRODUCTS = 15
"""Of the Hessian with a vector, for its largest eigenvalue."""
WINDOWS = 8
"""Places along a run at which its noise is measured."""
APART = 8
"""Ratio of the batches that are tried besides."""
PRIOR_FACTOR = 2.5
"""Within this factor of the noise scale along a run the critical batch was, on the development problems of the validation."""
MOMENTUM_FACTOR = 5.0
SEEDS = (1, 2, 3)
"""Batches with which the winner of a race is confirmed."""
SLOWER = 1.15
"""So many times the steps of the race are no reason yet to try a smaller learning rate."""


def advise(
    model: nn.Module,
    loss_fn: LossFn,
    data: Any,
    optimizer: str | MakeOptimizer | Optimizer = "nlcg",
    *,
    target_loss: float | None = None,
    seconds: float | None = None,
    max_examples: float | None = None,
    mode: Mode = "branch",
    efficiency: float = 0.5,
    max_batch: int | None = None,
    micro_batch: int | None = None,
    world_size: int | None = None,
    all_reduce: float | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    callback: Callable[[str], None] | None = None,
) -> Advice:
    """Find out what batch and learning rate to train *model* with. The model, its buffers and ``.grad``, an optimizer that is
    given, the data and all random numbers stay as they are.

    1. Time steps at some batch sizes, and count the memory that they need. 2. Measure the largest eigenvalue of the Hessian
    and the gradient noise scale. 3. Let learning rates race to *target_loss* with batches of about three times that. 4.
    Measure the noise scale along a run with the best one: the median is what the critical batch is expected to be. 5. In mode
    ``"branch"`` do 3 again with batches an eighth, and eight times as large.

    Args:
        model: with the weights to start from, in the mode (train) that training has.
        loss_fn: ``loss_fn(outputs, targets)``, the mean loss of a batch, 0-d.
        data: training examples: ``(inputs, targets)``, a map-style Dataset, a DataLoader (whose dataset and ``collate_fn`` are
            used), or batches, of which the first 65,536 examples are kept.
        optimizer: a name of :func:`conjugo.training.optimizers.names`, ``"adam"``; a function of parameters and learning rate
            that makes one; or an optimizer of the model's parameters, whose state and settings probes begin with.
        target_loss: mean training loss to be reached; None, or if time does not suffice: what the best probe has reached.
        seconds: time for all of it, about; > 0. None: a minute, or without end where *max_examples* is given.
        max_examples: examples that probes send forward and backward, at most (timing a few steps, and looking at losses, are
            not counted): with it, instead of a time, equal seeds give equal advice.
        mode: ``"branch"`` tries three batch sizes, ``"fast"`` one, with a wider interval in a third of the time.
        efficiency: the share in (0, 1) of examples that must not be wasted: the largest useful batch is the one with which
            training needs 1 / efficiency times as many examples as with the smallest ones.
        max_batch: largest batch to be tried; None: the number of examples.
        micro_batch: most examples that go through the model at once; None: as many as memory allows.
        world_size: workers that share each batch; None: the ranks of torch.distributed, or one. Where there are ranks, all call
            this together, rank 0 does the work, and all get the same.
        all_reduce: seconds in which these add up their gradients; None: measured, where torch.distributed has so many ranks,
            else not counted, with a warning.
        device: where to measure; None: that of the model.
        seed: of batches, random vectors, and what the model draws.
        callback: called with what begins.

    Raises ValueError for arguments out of range, data that are too few, a loss that is not finite and 0-d, a model without
    trainable parameters, and where no learning rate brings the loss down. UnknownName for an optimizer that does not exist.

    >>> _ = torch.manual_seed(0)
    >>> x = torch.randn(512, 8)
    >>> data = (x, x.sum(1, keepdim=True).sin())
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    >>> advice = advise(model, nn.functional.mse_loss, data, "sgd", target_loss=0.3, max_examples=20000, seconds=600)
    >>> advice.steps(8).value > advice.steps(64).value > advice.steps(512).value
    True
    """
    owner = "advise"
    if mode not in get_args(Mode):
        unknown("advise mode", mode, get_args(Mode))
    check(seconds is None or seconds > 0, owner, "seconds", seconds, "> 0 or None")
    check(max_examples is None or max_examples > 0, owner, "max_examples", max_examples, "> 0 or None")
    check(0 < efficiency < 1, owner, "efficiency", efficiency, "in (0, 1)")
    check(target_loss is None or math.isfinite(target_loss), owner, "target_loss", target_loss, "finite or None")
    check(world_size is None or world_size >= 1, owner, "world_size", world_size, ">= 1 or None")
    check(micro_batch is None or micro_batch >= 1, owner, "micro_batch", micro_batch, ">= 1 or None")
    check(all_reduce is None or all_reduce >= 0, owner, "all_reduce", all_reduce, "seconds >= 0 or None")
    params = [p for p in model.parameters() if p.requires_grad]
    check(len(params) > 0, owner, "the number of trainable parameters", 0, "at least 1")
    sharded = any(is_dtensor(p) for p in params)
    check(not sharded, owner, "the parameters", "sharded ones", "whole: load their full_tensor() into a plain model")
    where = params[0].device if device is None else torch.device(device)
    examples = Examples(data, where)
    accepted = f"in [2, {examples.n}], the number of examples"
    check(max_batch is None or 2 <= max_batch <= examples.n, owner, "max_batch", max_batch, accepted)
    model = _plain(model)
    normalised = any(isinstance(module, _BatchNorm) and module.training for module in model.modules())
    check(micro_batch != 1 or not normalised, owner, "micro_batch", micro_batch, "at least 2 with batch norm")
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if world_size is None:
        world_size = ranks
    if all_reduce is None and world_size == ranks > 1:
        all_reduce = _all_reduce_time(params)
    if seconds is None:
        seconds = 60.0 if max_examples is None else math.inf
    clock = Clock(seconds, math.inf if max_examples is None else max_examples)
    workers, reduction = world_size, all_reduce

    def found(group: Any) -> Advice:
        with _as_it_was(seed):
            own, made = _copied(model, optimizer, where, group)
            problem = Problem(own, loss_fn, examples, made, micro_batch=micro_batch)
            method = _method(optimizer, problem.fresh(1e-8)[1])
            advisor = _Advisor(problem, method, clock, seed, callback or (lambda text: None), group)
            advisor.largest = examples.n if max_batch is None else max_batch
            return advisor.run(target_loss, mode, efficiency, workers, reduction)

    return found(None) if ranks == 1 else _on_first(found)


def _on_first(found: Callable[[Any], Advice]) -> Advice:
    """Collective: what rank 0 finds alone, on all ranks; or its exception."""
    alone = dist.new_group([0])
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [found(alone)]
        except Exception as error:
            outcome = [error]
        dist.destroy_process_group(alone)
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    advice: Advice = outcome[0]
    return advice


@contextmanager
def _as_it_was(seed: int) -> Iterator[None]:
    """Inside, all random numbers begin with *seed*; afterwards they are what they were."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=devices_in_use()):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def _plain(model: nn.Module) -> nn.Module:
    """Without what torch.compile and DDP put around it."""
    while True:
        inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        inner = getattr(inner, "_orig_mod", inner)
        if inner is model:
            return model
        model = inner


def _copied(
    model: nn.Module, given: str | MakeOptimizer | Optimizer, device: torch.device, group: Any
) -> tuple[nn.Module, MakeOptimizer | Optimizer]:
    """The model on *device*, and what makes its optimizer, or a copy of that which is given with its state."""
    if isinstance(given, Optimizer):
        places = {id(p) for p in model.parameters()}
        strange = sum(id(p) not in places for g in given.param_groups for p in g["params"])
        check(
            strange == 0, "advise", "optimizer", f"one of {strange} other parameters", "one of the model's parameters"
        )
        same = device in {next(model.parameters()).device, torch.device(next(model.parameters()).device.type)}
        check(same, "advise", "device", str(device), "that of the model, as the optimizer is given")
        try:
            pair: tuple[nn.Module, Optimizer] = copy.deepcopy((model, given))
        except (TypeError, ValueError, RuntimeError, AttributeError, pickle.PicklingError) as error:
            raise ValueError(
                f"advise: model or optimizer {type(given).__name__} cannot be copied ({str(error).splitlines()[0]}); "
                "for the optimizer, pass a function of (parameters, lr) instead"
            ) from error
        return pair
    if isinstance(given, str):
        entry = optimizers.entry(_catalogued(given))
        alone = group is not None and "process_group" in inspect.signature(entry.factory).parameters
        options = {"process_group": group} if alone else {}
        return copy.deepcopy(model).to(device), lambda own, lr: optimizers.build(entry.name, own, lr=lr, **options)
    kind = type(given).__name__
    check(callable(given), "advise", "optimizer", kind, "a name, an optimizer or a function that makes one")
    return copy.deepcopy(model).to(device), given


def _catalogued(name: str) -> str:
    return "adamw" if name == "adam" else name


class _Method(NamedTuple):
    """What matters about an optimizer. entry: of the catalogue, if asked for by name. lr_power: see :class:`Advice`."""

    name: str
    entry: optimizers.Entry | None
    lr_power: float
    prior_factor: float
    like_sgd: bool
    conjugate: bool


def _method(given: str | MakeOptimizer | Optimizer, made: Optimizer) -> _Method:
    """*made*: the optimizer as it comes out."""
    check(not isinstance(made, torch.optim.LBFGS), "advise", "optimizer", "LBFGS", "one whose steps need no closure")
    kind = type(made).__name__.lower()
    momentum = any(float(group.get("momentum", 0.0)) > 0 for group in made.param_groups)
    momentum = momentum or kind in ("frsgd", "cblr", "mclr", "adagradnorm", "lars")
    adaptive = "betas" in made.defaults or kind in ("rmsprop", "adagrad", "adadelta")
    conjugate = isinstance(made, NLCG)
    entry = optimizers.entry(_catalogued(given)) if isinstance(given, str) else None
    name = given if isinstance(given, str) else "momentum" if kind == "sgd" and momentum else kind
    return _Method(
        name=name,
        entry=entry,
        # 1 for SGD (equation 2.7 of arXiv:1812.06162), 1/2 for adaptive methods (Malladi et al. 2022, arXiv:2205.10287); for
        # NLCG something between, as measured.
        lr_power=0.75 if conjugate else 0.5 if adaptive else 1.0,
        prior_factor=MOMENTUM_FACTOR if momentum else PRIOR_FACTOR,
        like_sgd=kind in ("sgd", "frsgd") or conjugate,
        conjugate=conjugate,
    )


class _Advisor:
    """The order of things, and what came out so far."""

    def __init__(
        self, problem: Problem, method: _Method, clock: Clock, seed: int, say: Callable[[str], None], group: Any
    ) -> None:
        self.group = group  # of this rank alone, where there are several
        self.problem = problem
        self.method = method
        self.clock = clock
        self.seed = seed
        self.say = say
        self.warnings: list[str] = []
        self.largest = problem.examples.n
        self.affordable = math.inf
        self.most_runs = 2

    def run(
        self, target: float | None, mode: Mode, efficiency: float, world_size: int, all_reduce: float | None
    ) -> Advice:
        problem = self.problem
        self.say("step time and memory")
        memory = measure_memory(problem, lr=1e-8)
        self._fit_into(memory)
        problem.judge_by(FEW)
        check(math.isfinite(problem.begin), "advise", "the loss of the model", problem.begin, "finite")
        part = problem.micro_batch
        # With small micro-batches only their multiples lie on a line; with large ones it is that of batches below.
        multiples = part is not None and part < 64
        sizes = {(part or 1) * k for k in (1, 2, 4, 8)} if multiples else {4**k for k in range(1, 7)}
        sizes = {min(size, self.largest) for size in sizes}
        step_time = measure_step_time(problem, sorted(sizes), lr=1e-8, clock=self.clock.share(0.1))
        if step_time is None:
            raise MemoryError(f"advise: there is no memory for a batch of {min(sizes)} examples")
        self._budget(step_time)
        begin = problem.begin
        check(target is None or target < begin, "advise", "target_loss", target, f"below {begin:.4g}, where it begins")
        self.say("noise and curvature at the beginning")
        noise = self._noise(problem.model, None, share=0.03)
        curvature = self._curvature()
        batch = self._first_batch(noise)
        probes: list[Probe] = []
        self.say(f"learning rates at batch {batch}")
        raced = self._race(batch, self._first_lrs(curvature, noise, batch), target, self.clock.share(0.4))
        if raced is None:
            if self.problem.clock.over:
                raise ValueError(
                    f"advise: there was not enough time: after {self.problem.clock.examples:,} examples no learning rate "
                    "has brought the loss down; give more seconds or max_examples"
                )
            raise ValueError(
                "advise: no learning rate brings the loss down: is the model trainable, the loss to be minimised?"
            )
        goal = raced.target
        if target is not None and not raced.reached:
            self.warnings.append(
                f"the target {target:g} was not reached in the time; all is about the loss {goal:.4g} instead"
            )
        self.say(f"noise along a run at batch {batch}")
        problem.clock = self.clock.share(0.6 if mode == "branch" else 1.0)
        along: list[NoiseScale] = []
        probes.append(self._confirmed(batch, raced, goal, along))
        b_prior = self._expected(along or [noise])
        if mode == "branch":
            self._branch(batch, probes, goal, b_prior)
        forecast = self._forecast(probes, b_prior)
        self._remarks(mode, probes, b_prior, forecast)
        if world_size > 1 and all_reduce is None:
            self.warnings.append(
                f"the time in which {world_size} workers add up their gradients is not counted: give all_reduce"
            )
        return Advice(
            optimizer=self.method.name,
            catalogue_name=None if self.method.entry is None else self.method.entry.name,
            lr_power=self.method.lr_power,
            examples=problem.examples.n,
            target_loss=goal,
            reached=target is None or raced.reached,
            efficiency=efficiency,
            max_batch=self.largest,
            world_size=world_size,
            all_reduce=all_reduce or 0.0,
            forecast=forecast,
            probes=tuple(probes),
            noise_scale=noise,
            noise_along=tuple(along),
            expected_batch=b_prior,
            lambda_max=curvature,
            step_time=step_time,
            memory=memory,
            micro_batch=problem.micro_batch,
            mode=mode,
            seed=self.seed,
            seconds=self.clock.seconds,
            probed_examples=self.clock.examples,
            warnings=tuple(self.warnings),
        )

    def _fit_into(self, memory: Memory) -> None:
        """Choose micro-batches that fit, and how many runs there may be at a time."""
        problem = self.problem
        self.most_runs = memory.available // max(1, memory.fixed)
        if self.most_runs < 2 or (memory.largest is not None and memory.largest < 2):
            raise MemoryError(
                f"advise: a probe needs {memory.fixed:,} bytes besides its activations, and two of them are compared; "
                f"{memory.available:,} are there"
            )
        if problem.micro_batch is None and memory.largest is not None and memory.largest < self.largest:
            problem.micro_batch = 2 ** int(math.log2(memory.largest))

    def _budget(self, step_time: StepTime) -> None:
        """How many examples can be afforded, and what follows: by how many runs are judged, and how often."""
        problem = self.problem
        if math.isfinite(self.clock.most):  # the same each time
            self.affordable = self.clock.most
            problem.judge_by(min(JUDGED, max(FEW, int(self.affordable / 100))))
            return
        self.affordable = max(1024.0, self.clock.left / (step_time.seconds(64) / 64))
        problem.judge_by(min(JUDGED, max(FEW, 2 ** int(math.log2(self.affordable / 100)))))
        look = step_time.seconds(len(problem.judged)) / 3  # forward only
        problem.gap = lambda batch: max(1, round(look / step_time.seconds(batch)))

    # Measurements ------------------------------------------------------------------------------------------------------

    def _noise(
        self, model: nn.Module, optimizer: Optimizer | None, *, share: float, seed: int | None = None
    ) -> NoiseScale:
        """With at most *share* of the examples that can be afforded."""
        problem = self.problem
        n = problem.examples.n
        normalised = any(isinstance(module, _BatchNorm) for module in model.modules())
        size = 32 if normalised else 8
        size = min(size, problem.micro_batch or size, max(2 if normalised else 1, n // 16))
        most = min(16384, max(8 * size, int(share * self.affordable)))
        rows = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed if seed is None else seed))[:most]
        batches = _Batches(problem.examples, rows, max(size, 256 // size * size))
        if optimizer is not None and not isinstance(optimizer, NLCG) and not diagonal_metric(optimizer):
            optimizer = None  # its metric is the Euclidean one, or not known
        found = gradient_noise_scale(
            model,
            problem.loss_fn,
            batches,
            micro_batch=size,
            max_examples=most,
            optimizer=optimizer,
            seed=self.seed,
            population=n,
            process_group=self.group,
        )
        self.clock.examples += found.examples
        return found

    def _curvature(self) -> float | None:
        """The largest eigenvalue of the Hessian over at most 1,024 examples, by a few products; None: there is none above 0."""
        from conjugo.curvature import eigsh, hessian

        problem = self.problem
        most = max(32, int(0.1 * self.affordable / (4 * PRODUCTS)))
        rows = problem.judged[: min(1024, problem.micro_batch or 1024, most)]
        try:
            op = hessian(
                problem.model,
                problem.loss_fn,
                [problem.examples.take(rows)],
                method="autograd",
                seed=self.seed,
                process_group=self.group,
                dtype=None if next(problem.model.parameters()).dtype == torch.float64 else torch.float32,
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pairs = eigsh(op, 1, tol=0.02, max_matvec=PRODUCTS, seed=self.seed, verify=False)
        except (RuntimeError, ValueError, FloatingPointError, NotImplementedError) as error:
            self.warnings.append(f"the curvature could not be measured: {str(error).splitlines()[0]}")
            return None
        self.clock.examples += 3 * PRODUCTS * len(rows)
        value = float(pairs.values[0])
        return value if value > 0 else None

    def _first_batch(self, noise: NoiseScale) -> int:
        """A power of 2 at about three times the noise scale, with room on both sides."""
        wanted = 2 ** round(math.log2(max(8.0, 3 * noise.b_simple)))
        most = 2 ** int(math.log2(max(2, self.largest / 4)))
        affordable = 2 ** int(math.log2(max(16, self.affordable / 300)))
        return int(min(wanted, most, affordable))

    def _first_lrs(self, curvature: float | None, noise: NoiseScale, batch: int) -> list[float]:
        """Where to look for the best learning rate."""
        entry = self.method.entry
        if self.method.like_sgd and curvature is not None:
            middle = 2 / curvature / (1 + noise.b_simple / batch)
            lrs = [middle * 2.0**j for j in range(-3, 4)]
        else:
            adaptive = self.method.lr_power < 1
            low, high = entry.lr_range if entry is not None else (1e-4, 0.3) if adaptive else (1e-3, 10.0)
            count = max(2, round(math.log(high / low, 4)) + 1)
            lrs = [low * (high / low) ** (k / (count - 1)) for k in range(count)]
        if len(lrs) > self.most_runs:
            lrs = lrs[:: -(-len(lrs) // self.most_runs)]
        return lrs

    def _race(self, batch: int, lrs: Sequence[float], target: float | None, clock: Clock) -> Raced | None:
        self.problem.clock = clock
        found = race(self.problem, batch, lrs, target=target, seed=self.seed)
        self.clock.examples += clock.examples
        return found

    def _confirmed(self, batch: int, raced: Raced, goal: float, along: list[NoiseScale] | None = None) -> Probe:
        """Steps with other batches of examples. The winner of a race may have been lucky: if it is slower here, or fails,
        smaller learning rates get the same chance. Along the first run the noise is measured."""
        problem = self.problem
        clock, before = problem.clock, problem.clock.examples
        found: dict[float, list[float]] = {}
        lr = raced.lr
        while not found or (len(found) < 4 and not clock.over):
            best = min((_mean_log(steps) for steps in found.values()), default=math.inf)
            limit = math.ceil(min(2 * raced.steps, 1.5 * math.exp(best) if math.isfinite(best) else math.inf)) + 10
            found[lr] = []
            for seed in SEEDS:
                run = Run(problem, lr, batch, seed=self.seed + seed)
                if along is not None and len(found) == 1 and not found[lr]:
                    self._along(run, raced.steps, goal, along)
                run.advance(limit, goal)
                found[lr].append(max(1.0, run.steps_to(goal)))
                if not math.isfinite(found[lr][-1]):
                    break
            if _mean_log(found[lr]) > best + 1e-9 and len(found) > 1:
                break
            if _mean_log(found[lr]) <= math.log(SLOWER * raced.steps):
                break
            lr /= math.sqrt(2)
        self.clock.examples += clock.examples - before
        lost = sorted(each for each, steps in found.items() if not math.isfinite(_mean_log(steps)))
        if len(lost) == len(found):  # none of them holds: what is left is smaller, and a guess
            lr, steps = lost[0] / 2, [raced.steps * raced.lr / lost[0] * 2]
        else:
            lr = min(found, key=lambda each: _mean_log(found[each]))
            steps = found[lr]
        raced = replace(raced, failed=tuple(sorted({*raced.failed, *(each for each in lost if each > lr)})))
        confirmed = lr in found and len(steps) == len(SEEDS)
        return Probe(batch=batch, lr=lr, steps=tuple(steps), race=raced, confirmed=confirmed)

    def _along(self, run: Run, steps: float, goal: float, along: list[NoiseScale]) -> None:
        """Train *run* and measure its noise in the middle of each of `WINDOWS` parts of *steps*."""
        taken = sorted({max(1, round(steps * (k + 0.5) / WINDOWS)) for k in range(WINDOWS)})
        for k, step in enumerate(taken):
            run.advance(step, goal)
            if run.failed or run.loss <= goal or run.problem.clock.over:
                return
            along.append(self._noise(run.model, run.optimizer, share=0.15 / WINDOWS, seed=self.seed + k))

    def _expected(self, along: Sequence[NoiseScale]) -> float:
        """What the critical batch is expected to be: the median noise scale of a run, in the metric of its optimizer."""
        # A mean would follow the few places where the gradient was hardly seen.
        middle = median(noise.b_simple for noise in along)
        if 2 * sum(noise.lower_bound_only for noise in along) > len(along):
            self.method = self.method._replace(prior_factor=2 * self.method.prior_factor)
            self.warnings.append("the gradient was hardly seen for noise: the noise scale is a lower bound")
        return float(min(max(1.0, middle), 100 * self.problem.examples.n))

    def _branch(self, batch: int, probes: list[Probe], goal: float, b_prior: float) -> None:
        """Probes with smaller and larger batches, if there is time."""
        first = probes[0]
        small, large = max(2, batch // APART), min(self.largest, batch * APART)
        for size in (large, small):
            forecast = self._forecast(probes, b_prior)
            lr = first.lr * self._lr_ratio(size, batch, forecast.b_crit.value)
            others = [p for p in probes if p.batch > size]
            limit = min((max(p.race.failed, default=math.inf) for p in others), default=math.inf)
            lrs = [lr / 2, lr] if lr * 2 > limit else [lr / 2, lr, lr * 2]
            expected = forecast.steps(size).value * size * (len(lrs) + 4)
            left = self.clock.share(0.7 if size == large else 1.0)
            if size == batch:
                continue
            if left.over:
                self.warnings.append(f"there was no time for a probe with batches of {size}")
                continue
            self.say(f"learning rates at batch {size}")
            raced = self._race(size, lrs, goal, left)
            if raced is None or not raced.reached:
                why = f"no time for a probe with batches of {size} (about {expected:,.0f} examples)"
                self.warnings.append(
                    f"there was {why}" if left.over else f"no learning rate reached the loss with batches of {size}"
                )
                continue
            self.problem.clock = self.clock.share(1.0)
            if self.problem.clock.over:
                probes.append(
                    Probe(batch=size, lr=raced.lr, steps=(max(1.0, raced.steps),), race=raced, confirmed=False)
                )
            else:
                probes.append(self._confirmed(size, raced, goal))
        probes.sort(key=lambda probe: probe.batch)

    def _lr_ratio(self, batch: float, base: float, b_crit: float) -> float:
        ratio = (1 + b_crit / base) / (1 + b_crit / batch)
        return float(ratio**self.method.lr_power)

    def _forecast(self, probes: Sequence[Probe], b_prior: float) -> StepsForecast:
        batches = [float(probe.batch) for probe in probes for _ in probe.steps]
        return StepsForecast(
            batches,
            [s for probe in probes for s in probe.steps],
            b_prior=b_prior,
            prior_factor=self.method.prior_factor,
            noise=0.12,
            common=0.08,
        )

    def _remarks(self, mode: Mode, probes: Sequence[Probe], b_prior: float, forecast: StepsForecast) -> None:
        b_crit = forecast.b_crit.value
        if mode == "branch" and len(probes) > 1 and not 0.5 <= b_prior / b_crit <= 2:
            self.warnings.append(
                f"the noise scale along the run ({b_prior:,.0f}) and the probes ({b_crit:,.0f}) differ by more than 2"
            )
        for probe in probes:
            if not probe.race.bracketed:
                self.warnings.append(
                    f"at batch {probe.batch} the best learning rate lies at the end of those that were tried"
                )
            if not probe.confirmed:
                self.warnings.append(f"at batch {probe.batch} the learning rate was not confirmed with other batches")
        if b_crit > max(probe.batch for probe in probes):
            self.warnings.append("the critical batch lies beyond the batches that were tried")
        if self.method.conjugate:
            self.warnings.append(
                f"with batches below {min(probe.batch for probe in probes)} NLCG may not get to the target at all"
            )
        if any(isinstance(module, _BatchNorm) for module in self.problem.model.modules()):
            self.warnings.append(
                "batch norm: noise was measured with micro-batches of its own, steps with the batches themselves"
            )


def _all_reduce_time(params: Sequence[nn.Parameter]) -> float:
    """Collective: seconds in which the ranks add up a gradient; the median of five, of the slowest rank."""
    buffer = torch.zeros(sum(p.numel() for p in params), device=params[0].device)
    times: list[float] = []
    for _ in range(5):
        dist.barrier()
        begin = time.perf_counter()
        dist.all_reduce(buffer)
        if buffer.is_cuda:
            torch.cuda.synchronize(buffer.device)
        times.append(time.perf_counter() - begin)
    slowest = torch.tensor([sorted(times)[2]], device=buffer.device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def _mean_log(steps: Sequence[float]) -> float:
    return sum(math.log(s) for s in steps) / len(steps)


class _Batches:
    """The examples *rows* in batches of *size*, as an iterable."""

    def __init__(self, examples: Examples, rows: torch.Tensor, size: int) -> None:
        self._examples = examples
        self._parts = torch.split(rows, size)

    def __iter__(self) -> Any:
        return (self._examples.take(part) for part in self._parts)
