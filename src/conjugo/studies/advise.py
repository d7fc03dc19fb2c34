"""How large the batch may be, with which learning rate, and how much sooner training ends: from short probes.

:func:`advise` measures, on copies of the model, what a step costs, how curved the loss is, how noisy its gradients are along a
training run, and how many steps batches of some sizes need to a training loss. `Advice` says what follows for all others.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from conjugo._space import is_dtensor
from conjugo.errors import check, unknown
from conjugo.scaling.forecast import StepsForecast
from conjugo.scaling.noise_scale import LossFn, NoiseScale, gradient_noise_scale
from conjugo.studies.advice import Advice, Probe, lr_power
from conjugo.studies.probes import JUDGED, Clock, Examples, MakeOptimizer, Problem, Raced, Run, race
from conjugo.studies.throughput import StepTime, measure_memory, measure_step_time
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
"""Within this factor of the mean noise scale of a run the critical batch was, on the development problems of the validation."""
MOMENTUM_FACTOR = 5.0
SEEDS = (1, 2, 3)
"""Batches with which the winner of a race is confirmed."""
SLOWER = 1.15
"""So many times the steps of the race are no reason yet to try a smaller learning rate."""


def advise(
    model: nn.Module,
    loss_fn: LossFn,
    data: Any,
    optimizer: str | MakeOptimizer | Optimizer = "sgd",
    *,
    target_loss: float | None = None,
    seconds: float = 60.0,
    max_examples: float = math.inf,
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
    Measure the noise scale along a run with the best one: its mean is what the critical batch is expected to be. 5. In mode
    ``"branch"`` do 3 again with batches an eighth, and eight times as large.

    Args:
        model: with the weights to start from, in the mode (train) that training has.
        loss_fn: ``loss_fn(outputs, targets)``, the mean loss of a batch, 0-d.
        data: training examples: ``(inputs, targets)``, a map-style Dataset, a DataLoader (whose dataset and ``collate_fn`` are
            used), or batches, of which the first 65,536 examples are kept.
        optimizer: a name of :func:`conjugo.training.optimizers.names`, ``"adam"``; a function of parameters and learning rate
            that makes one; or an optimizer of the model's parameters, whose state and settings probes begin with.
        target_loss: mean training loss to be reached; None, or if time does not suffice: what the best probe has reached.
        seconds: time for all of it, about; > 0.
        max_examples: examples to be sent forward and backward in probes, at most: unlike *seconds* it gives the same advice
            each time.
        mode: ``"branch"`` tries three batch sizes, ``"fast"`` one, with a wider interval in a third of the time.
        efficiency: the share in (0, 1) of examples that must not be wasted: the largest useful batch is the one with which
            training needs 1 / efficiency times as many examples as with the smallest ones.
        max_batch: largest batch to be tried; None: the number of examples.
        micro_batch: most examples that go through the model at once; None: as many as memory allows.
        world_size: workers that share each batch; None: the ranks of torch.distributed, or one. Where there are ranks, all call
            this together, rank 0 does the work, and all get the same.
        all_reduce: seconds in which these add up their gradients; None: measured, where torch.distributed has so many ranks,
        else not counted, with a warning. device: None: that of the model.
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
    check(seconds > 0, owner, "seconds", seconds, "> 0")
    check(max_examples > 0, owner, "max_examples", max_examples, "> 0")
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
    model = _plain(model)
    if where != params[0].device:
        model = copy.deepcopy(model).to(where)
    name, make, needs_loss = _optimizer(optimizer, params)
    examples = Examples(data, where)
    accepted = f"in [2, {examples.n}], the number of examples"
    check(max_batch is None or 2 <= max_batch <= examples.n, owner, "max_batch", max_batch, accepted)
    problem = Problem(model, loss_fn, examples, make, needs_loss=needs_loss, micro_batch=micro_batch)
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if world_size is None:
        world_size = ranks
    if all_reduce is None and world_size == ranks > 1:
        all_reduce = _all_reduce_time(params)

    def found(group: Any) -> Advice:
        advisor = _Advisor(problem, name, Clock(seconds, max_examples), seed, callback or (lambda text: None), group)
        advisor.largest = examples.n if max_batch is None else max_batch
        with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
            return advisor.run(target_loss, mode, efficiency, world_size, all_reduce)

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
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    advice: Advice = outcome[0]
    return advice


def _plain(model: nn.Module) -> nn.Module:
    found: nn.Module = getattr(model, "_orig_mod", model)  # of torch.compile
    return found.module if isinstance(found, nn.parallel.DistributedDataParallel) else found


def _optimizer(
    given: str | MakeOptimizer | Optimizer, params: Sequence[nn.Parameter]
) -> tuple[str, MakeOptimizer, bool]:
    """Its name, what makes it, and whether its steps want the loss."""
    if isinstance(given, str):
        found = optimizers.entry("adamw" if given == "adam" else given)
        return given, lambda own, lr: optimizers.build(found.name, own, lr=lr), found.needs_loss
    if isinstance(given, Optimizer):
        return type(given).__name__.lower(), _like(given, params), False
    check(
        callable(given),
        "advise",
        "optimizer",
        type(given).__name__,
        "a name, an optimizer or a function that makes one",
    )
    return getattr(given, "__name__", "optimizer"), given, False


def _like(given: Optimizer, params: Sequence[nn.Parameter]) -> MakeOptimizer:
    """Makes optimizers of other parameters with the settings and the state of *given*, whose learning rates keep their
    ratios."""
    places = {id(p): i for i, p in enumerate(params)}
    strange = [p for group in given.param_groups for p in group["params"] if id(p) not in places]
    check(
        not strange, "advise", "optimizer", f"one of {len(strange)} other parameters", "one of the model's parameters"
    )
    base = max(float(group["lr"]) for group in given.param_groups)

    def make(own: list[nn.Parameter], lr: float) -> Optimizer:
        groups = [
            {
                **{key: value for key, value in group.items() if key != "params"},
                "params": [own[places[id(p)]] for p in group["params"]],
            }
            for group in given.param_groups
        ]
        state = copy.deepcopy(given.state_dict())  # loading would share its tensors
        try:
            made = type(given)(groups)  # type: ignore[arg-type,call-arg]
            made.load_state_dict(state)
        except (TypeError, ValueError, KeyError, RuntimeError) as error:
            raise ValueError(
                f"advise: optimizer {type(given).__name__} cannot be made anew from its groups ({error}); "
                "pass a function of (parameters, lr) instead"
            ) from error
        for group, original in zip(made.param_groups, given.param_groups, strict=True):
            group["lr"] = lr * float(original["lr"]) / base
        return made

    return make


class _Advisor:
    """The order of things, and what came out so far."""

    def __init__(
        self, problem: Problem, name: str, clock: Clock, seed: int, say: Callable[[str], None], group: Any
    ) -> None:
        self.group = group  # of this rank alone, where there are several
        self.problem = problem
        self.name = name
        self.clock = clock
        self.seed = seed
        self.say = say
        self.warnings: list[str] = []
        self.largest = problem.examples.n
        self.affordable = math.inf

    def run(
        self, target: float | None, mode: Mode, efficiency: float, world_size: int, all_reduce: float | None
    ) -> Advice:
        problem = self.problem
        self.say("step time and memory")
        problem.judge_by(FEW)
        check(math.isfinite(problem.begin), "advise", "the loss of the model", problem.begin, "finite")
        memory = measure_memory(problem, lr=1e-8)
        if problem.micro_batch is None and memory.largest is not None and memory.largest < self.largest:
            check(memory.largest >= 1, "advise", "the memory", memory.available, f"at least {memory.fixed} bytes")
            problem.micro_batch = 2 ** int(math.log2(memory.largest))
        sizes = sorted({min(4**k, problem.micro_batch or self.largest, self.largest, 4096) for k in range(1, 7)})
        step_time = measure_step_time(problem, sizes, lr=1e-8, clock=self.clock.share(0.1))
        if step_time is None:
            raise MemoryError(f"advise: there is no memory for a batch of {sizes[0]} examples")
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
        self._remarks(mode, probes, b_prior, forecast, raced.reached)
        if world_size > 1 and all_reduce is None:
            self.warnings.append(
                f"the time in which {world_size} workers add up their gradients is not counted: give all_reduce"
            )
        return Advice(
            optimizer=self.name,
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
        size = min(size, problem.micro_batch or size, max(1, n // 16))
        most = min(16384, max(8 * size, int(share * self.affordable)))
        rows = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed if seed is None else seed))[:most]
        batches = _Batches(problem.examples, rows, max(size, 256 // size * size))
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
        known = "adamw" if self.name == "adam" else self.name
        if known not in optimizers.names():
            entry = None
        else:
            entry = optimizers.entry(known)
        like_sgd = (
            entry is None or entry.name in ("sgd", "momentum", "nesterov", "frsgd") or entry.name.startswith("nlcg")
        )
        if like_sgd and curvature is not None:
            middle = 2 / curvature / (1 + noise.b_simple / batch)
            return [middle * 2.0**j for j in range(-3, 4)]
        low, high = (1e-4, 10.0) if entry is None else entry.lr_range
        count = max(2, round(math.log(high / low, 4)) + 1)
        return [low * (high / low) ** (k / (count - 1)) for k in range(count)]

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
        lr = min(found, key=lambda each: _mean_log(found[each]))
        confirmed = len(found[lr]) == len(SEEDS) and math.isfinite(_mean_log(found[lr]))
        steps = tuple(s for s in found[lr] if math.isfinite(s)) or (max(1.0, raced.steps),)
        return Probe(batch=batch, lr=lr, steps=steps, race=raced, confirmed=confirmed)

    def _along(self, run: Run, steps: float, goal: float, along: list[NoiseScale]) -> None:
        """Train *run* and measure its noise in the middle of each of `WINDOWS` parts of *steps*."""
        taken = sorted({max(1, round(steps * (k + 0.5) / WINDOWS)) for k in range(WINDOWS)})
        for k, step in enumerate(taken):
            run.advance(step, goal)
            if run.failed or run.loss <= goal or run.problem.clock.over:
                return
            along.append(self._noise(run.model, run.optimizer, share=0.15 / WINDOWS, seed=self.seed + k))

    def _expected(self, along: Sequence[NoiseScale]) -> float:
        """What the critical batch is expected to be: the mean noise scale of a run, in the metric of its optimizer."""
        mean = sum(noise.b_simple for noise in along) / len(along)
        return float(min(max(1.0, mean), 100 * self.problem.examples.n))

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
            if size == batch or left.over:
                continue
            self.say(f"learning rates at batch {size}")
            raced = self._race(size, lrs, goal, left)
            if raced is None or not raced.reached:
                self.warnings.append(
                    f"there was no time for a probe with batches of {size} (about {expected:,.0f} examples)"
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
        return float(ratio ** lr_power(self.name))

    def _forecast(self, probes: Sequence[Probe], b_prior: float) -> StepsForecast:
        batches = [float(probe.batch) for probe in probes for _ in probe.steps]
        factor = MOMENTUM_FACTOR if self.name in ("momentum", "nesterov", "frsgd") else PRIOR_FACTOR
        return StepsForecast(
            batches,
            [s for probe in probes for s in probe.steps],
            b_prior=b_prior,
            prior_factor=factor,
            noise=0.12,
            common=0.08,
        )

    def _remarks(
        self, mode: Mode, probes: Sequence[Probe], b_prior: float, forecast: StepsForecast, reached: bool
    ) -> None:
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
        if not reached and b_crit > max(probe.batch for probe in probes):
            self.warnings.append("the critical batch lies beyond the batches that were tried")
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
