"""What the two experiments of ``width`` share: perceptrons trained in stacks, and their accuracy at late times.

Networks are in NTK parameterisation, with ReLU and hidden layers of one width. SGD has a constant learning rate; each example
of a batch is drawn at random from all, with repetition, which makes the noise scale exactly eps N / B. Accuracies are means
over measurements in the last half of the steps.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from conjugo._files import write_aside
from conjugo.errors import check
from conjugo.scaling.width import StackedMLP, normalized_noise_scale
from conjugo.studies.reproduce.paper import Request, listed
from conjugo.studies.runs import load_data
from conjugo.training import TrainConfig

__all__ = ["Condition", "Outcome", "Problem", "Train", "done", "one_after_another", "train"]

CHUNK = 500
"""Steps whose examples are drawn at once."""

JUDGED = 10_000
"""At most so many training examples are looked at for the accuracy of training."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is learnt, and by which networks.

    examples: N, training examples. resample: each seed draws them from all there are, and is tested on the others; otherwise
    they are the first ones, and the test split is the data's own. label_noise: part of their labels that are replaced by random
    ones, anew for each seed. depth: number of hidden layers. seeds: of each condition; a seed sets data, labels and weights.
    evaluations: in the last half of the steps, evenly spaced.
    """

    data: str = "digits"
    examples: int = 400
    resample: bool = True
    label_noise: float = 0.2
    depth: int = 2
    weight_var: float = 1.0
    seeds: int = 24
    evaluations: int = 10

    def gbar(self, condition: Condition) -> float:
        """The normalised noise scale of a condition."""
        lr, batch, momentum = condition.lr, condition.batch, condition.momentum
        return normalized_noise_scale(lr, batch, self.examples, self.weight_var, momentum)


@dataclass(frozen=True, kw_only=True)
class Condition:
    """How a network is trained."""

    width: int
    lr: float
    batch: int
    steps: int
    momentum: float = 0.0

    @property
    def file(self) -> str:
        """Its name on the disk."""
        momentum = f"-momentum-{self.momentum:g}" if self.momentum else ""
        return f"width-{self.width}-lr-{self.lr:g}-batch-{self.batch}{momentum}.json"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came out, for each seed; None for a run that diverged. Accuracies are fractions."""

    test: tuple[float | None, ...]
    train: tuple[float | None, ...]
    """On the labels of training, wrong ones included."""
    seconds: float = field(compare=False)

    @property
    def diverged(self) -> int:
        """Number of runs."""
        return self.test.count(None)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of :func:`dataclasses.asdict`. Raises KeyError, TypeError and ValueError."""
        test, train = (tuple(None if a is None else float(a) for a in data[name]) for name in ("test", "train"))
        return cls(test=test, train=train, seconds=float(data["seconds"]))


Train = Callable[[Problem, Sequence[Condition]], Sequence[Outcome]]
"""Trains; a stand-in for tests."""


def one_after_another(request: Request) -> None:
    """Raise ValueError unless *request* asks for that."""
    for name in ("jobs", "workers"):
        value = getattr(request, name)
        check(
            value == 1,
            "reproduce",
            name,
            value,
            "1 for width, whose runs are trained in stacks, one stack after another",
        )


def done(
    problem: Problem, stacks: Sequence[Sequence[Condition]], train: Train, request: Request
) -> dict[Condition, Outcome]:
    """What comes out of all conditions: read from the run directory or, stack by stack, trained and kept there."""
    found: dict[Condition, Outcome] = {}
    folder = None if request.out is None else request.out / "runs"
    shown = sys.stderr.isatty() if request.progress is None else request.progress
    for i, stack in enumerate(stacks):
        found |= {condition: outcome for condition in stack if (outcome := _read(condition, problem.seeds, folder))}
        left = [condition for condition in stack if condition not in found]
        if left and shown:
            batches = listed([str(condition.batch) for condition in left])
            where = f"width {left[0].width}, learning rate {left[0].lr:g}, batch {batches}"
            print(f"{i + 1} of {len(stacks)}: {where}, {problem.seeds} seeds", file=sys.stderr)
        for condition, outcome in zip(left, train(problem, left) if left else (), strict=True):
            found[condition] = outcome
            if folder is not None:
                folder.mkdir(exist_ok=True)
                content = {**asdict(condition), **asdict(outcome)}
                write_aside(folder / condition.file, json.dumps(content, allow_nan=False))
    return {condition: found[condition] for stack in stacks for condition in stack}


def _read(condition: Condition, seeds: int, folder: Path | None) -> Outcome | None:
    """The outcome that *folder* holds; None unless it is there, whole, and for *seeds* seeds."""
    if folder is None:
        return None
    try:
        outcome = Outcome.from_dict(json.loads((folder / condition.file).read_bytes()))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return outcome if len(outcome.test) == len(outcome.train) == seeds else None


# ---- data ----


class _Data(NamedTuple):
    """Inputs [M, F] of all examples, and what each run has of them."""

    inputs: Tensor
    train_rows: Tensor
    """[R, N]."""
    train_targets: Tensor
    """[R, N]."""
    test_rows: Tensor
    """[R, K]."""
    targets: Tensor
    """[M]."""
    classes: int


@lru_cache(maxsize=1)
def _load(problem: Problem) -> _Data:
    """The data of each seed."""
    dataset = load_data(TrainConfig(data=problem.data), None, None)
    inputs = torch.cat([dataset.train.inputs, dataset.test.inputs]).float()
    dims = (0, *range(2, inputs.ndim)) if dataset.kind == "image" else (0,)
    inputs = (inputs - inputs.mean(dims, keepdim=True)) / inputs.std(dims, keepdim=True).clamp(min=1e-6)
    targets = torch.cat([dataset.train.targets, dataset.test.targets])
    train_rows, train_targets, test_rows = [], [], []
    for seed in range(problem.seeds):
        generator = torch.Generator().manual_seed(seed)
        first = len(targets) if problem.resample else len(dataset.train)
        order = torch.randperm(first, generator=generator) if problem.resample else torch.arange(first)
        rows = order[: problem.examples]
        labels = targets[rows].clone()
        wrong = torch.randperm(len(rows), generator=generator)[: round(problem.label_noise * len(rows))]
        labels[wrong] = torch.randint(dataset.num_classes, wrong.shape, generator=generator)
        train_rows.append(rows)
        train_targets.append(labels)
        test_rows.append(order[problem.examples :] if problem.resample else torch.arange(first, len(targets)))
    return _Data(
        inputs=inputs.flatten(1),
        train_rows=torch.stack(train_rows),
        train_targets=torch.stack(train_targets),
        test_rows=torch.stack(test_rows),
        targets=targets,
        classes=dataset.num_classes,
    )


def _of_runs(problem: Problem, runs: int, device: torch.device | str) -> _Data:
    """The data of all seeds as often as there are batch sizes."""
    data = _load(problem)
    times = runs // problem.seeds
    return _Data(
        inputs=data.inputs.to(device),
        train_rows=data.train_rows.repeat(times, 1).to(device),
        train_targets=data.train_targets.repeat(times, 1).to(device),
        test_rows=data.test_rows.repeat(times, 1).to(device),
        targets=data.targets.to(device),
        classes=data.classes,
    )


# ---- training ----


def train(problem: Problem, conditions: Sequence[Condition], device: torch.device | str = "cpu") -> list[Outcome]:
    """Train networks of all *conditions*, which differ in their batch size only, and all seeds at the same time.

    What comes out does not depend on which conditions share a call, to rounding.
    """
    one = conditions[0]
    assert all(replace(condition, batch=one.batch) == one for condition in conditions)
    started = time.perf_counter()
    runs = [(condition.batch, seed) for condition in conditions for seed in range(problem.seeds)]
    data = _of_runs(problem, len(runs), device)
    sizes = (data.inputs.shape[1], *[one.width] * problem.depth, data.classes)
    seeds = [seed for _, seed in runs]
    stack = StackedMLP(sizes, seeds, weight_var=problem.weight_var, momentum=one.momentum, device=device)
    even = len(conditions) == 1
    counts = None if even else torch.tensor([batch for batch, _ in runs], device=device)
    orders = [torch.Generator().manual_seed(1_000_003 * (1 + seed) + batch) for batch, seed in runs]
    half = one.steps / 2
    marks = {round(half + half * k / problem.evaluations) for k in range(1, problem.evaluations + 1)}
    largest = max(batch for batch, _ in runs)
    test, learnt = [], []
    for step in range(1, one.steps + 1):
        place = (step - 1) % CHUNK
        if place == 0:
            drawn = torch.zeros(len(runs), CHUNK, largest, dtype=torch.int64)
            for rows, (batch, _), order in zip(drawn, runs, orders, strict=True):
                rows[:, :batch] = torch.randint(problem.examples, (CHUNK, batch), generator=order)
            drawn = drawn.to(device)
        chosen = drawn[:, place]
        inputs = data.inputs[data.train_rows.gather(1, chosen)]
        stack.step(inputs, data.train_targets.gather(1, chosen), one.lr, counts)
        if step in marks:
            test.append(_accuracy(stack, data, data.test_rows, data.targets[data.test_rows]))
            learnt.append(_accuracy(stack, data, data.train_rows[:, :JUDGED], data.train_targets[:, :JUDGED]))
    finite = stack.finite().tolist()
    share = (time.perf_counter() - started) / len(conditions)
    means = [torch.stack(parts).mean(0).tolist() for parts in (test, learnt)]
    alive = [[mean if ok else None for mean, ok in zip(part, finite, strict=True)] for part in means]
    n = problem.seeds
    return [
        Outcome(test=tuple(alive[0][i * n : (i + 1) * n]), train=tuple(alive[1][i * n : (i + 1) * n]), seconds=share)
        for i in range(len(conditions))
    ]


def _accuracy(stack: StackedMLP, data: _Data, rows: Tensor, targets: Tensor) -> Tensor:
    """[R]."""
    right = torch.zeros(stack.runs, device=rows.device, dtype=torch.int64)
    for part, truth in zip(torch.split(rows, 1000, 1), torch.split(targets, 1000, 1), strict=True):
        right += (stack.logits(data.inputs[part]).argmax(2) == truth).sum(1)
    return right.cpu().double() / rows.shape[1]
