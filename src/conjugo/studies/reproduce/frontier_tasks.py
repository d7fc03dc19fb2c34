"""One run of a contender on a task, and what a step of it costs."""

from __future__ import annotations

import statistics as plain
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conjugo.studies.records import Outcome, Task
from conjugo.studies.reproduce.frontier_plan import FAMILIES, FrontierPlan, Setting
from conjugo.studies.reproduce.frontier_text import CONTEXT, CharTransformer, load_text, loss_of, train_text
from conjugo.studies.runs import Contender, load_data, train_once, tuning_data
from conjugo.training import TrainConfig, optimizers
from conjugo.training.data import Dataset, Split
from conjugo.training.machine import choose_device

__all__ = ["Cost", "available", "costs", "dataset", "run_task"]

_SPLITS = 1_000_000
"""Added to the seed where it draws which examples are for training and which for testing."""


def available(setting: Setting) -> None:
    """Raise DataUnavailable, or whatever loading raises, if the data of a task is not there."""
    if setting.train is None:
        load_text()
    else:
        _whole(setting.train)


def _whole(train: TrainConfig) -> Dataset:
    where = TrainConfig(data=train.data, data_root=train.data_root, image_size=train.image_size)
    return load_data(where, None, None)


def dataset(setting: Setting, task: Task) -> Dataset:
    """What a run trains on and is judged by: drawn by its seed alone, so that contenders can be compared seed by seed."""
    assert setting.train is not None
    whole = _whole(setting.train)
    generator = torch.Generator().manual_seed(_SPLITS + task.seed)
    if setting.mixed:
        inputs = torch.cat([whole.train.inputs, whole.test.inputs])
        targets = torch.cat([whole.train.targets, whole.test.targets])
        order = torch.randperm(len(targets), generator=generator)
        test = _some(inputs, targets, order[setting.train_size :][: setting.test_size])
    else:
        inputs, targets = whole.train.inputs, whole.train.targets
        order = torch.randperm(len(targets), generator=generator)
        test = _some(whole.test.inputs, whole.test.targets, torch.arange(min(setting.test_size, len(whole.test))))
    drawn = replace(whole, train=_some(inputs, targets, order[: setting.train_size]), test=test)
    return tuning_data(drawn, setting.validation, task.seed) if task.phase == "tune" else drawn


def _some(inputs: Tensor, targets: Tensor, index: Tensor) -> Split:
    return Split(inputs[index], targets[index])


def options(name: str, variant: float | None) -> dict[str, Any]:
    """The options of a contender's optimizer."""
    family = FAMILIES[name]
    return {**family.options, **({} if variant is None else {family.second: variant})}


def run_task(plan: FrontierPlan, task: Task) -> Outcome:
    """Do one run."""
    setting, family = plan.settings[task.study], FAMILIES[task.contender]
    steps, chosen = setting.steps_of(task.contender), options(task.contender, task.second)
    if setting.train is None:
        torch.manual_seed(task.seed)
        text = load_text()
        model = CharTransformer(text.vocabulary)
        optimizer = optimizers.build(family.optimizer, model, lr=task.lr, **chosen)
        return train_text(model, optimizer, text, setting, task, steps=steps)
    contender = Contender(task.contender, family.optimizer, (), chosen)
    train = replace(setting.train, weight_decay=decay(setting.train, task.contender))
    evaluations = 1 if task.phase == "tune" else setting.evaluations
    return train_once(
        train,
        contender,
        replace(task, second=None),
        dataset(setting, task),
        steps=steps,
        evaluations=min(steps, evaluations),
    )


def decay(train: TrainConfig, name: str) -> float:
    """Coefficient of the weight decay: of :class:`TrainConfig` where it is in the gradient, 500 times that where it is not."""
    return (500 if FAMILIES[name].decoupled else 1) * train.weight_decay


class Cost(NamedTuple):
    """Of a step: seconds in the optimizer, seconds of a forward and a backward pass (medians), and floats per parameter that
    the optimizer keeps. On a CPU, seconds of one thread, without those that other programs take."""

    step: float
    passes: float
    state: float


def costs(setting: Setting, names: list[str], *, repetitions: int = 15) -> dict[str, Cost]:
    """What steps of the contenders *names* cost on a task, measured in turns on one batch, without those with extra passes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _costs(setting, names, repetitions)
    finally:
        torch.set_num_threads(threads)


def _costs(setting: Setting, names: list[str], repetitions: int) -> dict[str, Cost]:
    plain_steps = [name for name in names if FAMILIES[name].passes == 1.0]
    loops = {name: _steps(setting, name) for name in plain_steps}
    times: Mapping[str, list[tuple[float, float]]] = {name: [] for name in plain_steps}
    states = {}
    for _ in range(repetitions + 2):
        for name, loop in loops.items():
            taken, passed, states[name] = next(loop)
            times[name].append((taken, passed))
    return {
        name: Cost(
            plain.median(step for step, _ in pairs[2:]), plain.median(passed for _, passed in pairs[2:]), states[name]
        )
        for name, pairs in times.items()
    }


def _steps(setting: Setting, name: str) -> Iterator[tuple[float, float, float]]:
    # The transformer is trained on the CPU.
    device = choose_device("cpu" if setting.train is None else setting.train.device)
    model, backward = _problem(setting, device)
    family = FAMILIES[name]
    optimizer = optimizers.build(family.optimizer, model, lr=1e-4, **options(name, family.variants[0]))
    parameters = sum(p.numel() for p in model.parameters())
    while True:
        optimizer.zero_grad()
        begun = _now(device)
        backward()
        passed = _now(device)
        optimizer.step()
        yield _now(device) - passed, passed - begun, _floats(list(optimizer.state.values())) / parameters


def _now(device: torch.device) -> float:
    """A time at which all work queued on *device* is done; on a CPU that of this process."""
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize(device)
    return time.perf_counter()


def _problem(setting: Setting, device: torch.device) -> tuple[nn.Module, Callable[[], None]]:
    """A model, and what adds the gradient of one batch, micro-batch by micro-batch, to those of its parameters."""
    from conjugo.training import models

    torch.manual_seed(0)
    if setting.train is None:
        text = load_text()
        transformer = CharTransformer(text.vocabulary).to(device)
        sequences = text.train[: setting.batch_size * (CONTEXT + 1)].view(setting.batch_size, CONTEXT + 1).to(device)
        return transformer, lambda: loss_of(transformer, sequences).backward()  # type: ignore[no-untyped-call]
    data = _whole(setting.train)
    assert setting.train.model is not None
    model = models.build(setting.train.model, input_shape=data.input_shape, num_classes=data.num_classes).to(device)
    size = min(setting.batch_size, setting.train.micro_batch or setting.batch_size, len(data.train))
    inputs, targets = data.train.inputs[:size].to(device), data.train.targets[:size].to(device)
    images = inputs.float() / 255 if inputs.dtype == torch.uint8 else inputs
    parts = max(1, round(setting.batch_size / size))
    half = setting.train.precision == "bfloat16"

    def backward() -> None:
        for _ in range(parts):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
                logits = model(images)
            loss = F.cross_entropy(logits.float(), targets) / parts
            loss.backward()  # type: ignore[no-untyped-call]  # at once: no graph outlives its micro-batch

    return model, backward


def _floats(value: Any) -> int:
    """Floating-point numbers in nested states, single ones (counters and the like) left out."""
    if isinstance(value, Tensor):
        return value.numel() if value.is_floating_point() and value.numel() > 1 else 0
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return sum(map(_floats, items))
