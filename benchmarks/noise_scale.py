"""What watching the gradient noise scale costs, as a share of a training step: two gloo ranks under DDP, and one process.

Times are those of the processor, by a rank: the clock on the wall says nothing on a machine with other work.

Rivals: fairscale's AdaScale, where it is installed, which gathers the same statistics; and one Python hook for each parameter.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from benchmarks import _processes
from benchmarks._timing import interleave, ratio, show
from benchmarks.trainer import cifar_shaped
from conjugo.scaling import NoiseScaleMonitor, attach
from conjugo.training import TrainConfig, Trainer, data, models
from conjugo.training.machine import isolated

ROUNDS = 30

# Name, model, input shape, examples of a rank, steps per round.
DDP_CASES = (
    ("perceptron, 64 a rank", "mlp", (64,), 64, 25),
    ("perceptron, 719 a rank", "mlp", (64,), 719, 10),
    ("CNN, 64 a rank", "cnn", (3, 32, 32), 64, 1),
    ("ResNet-8, 32 a rank", "resnet8", (3, 32, 32), 32, 1),
)
MODELS = {name: (model, shape, examples) for name, model, shape, examples, _ in DDP_CASES}


class ByParameter:
    """The obvious way: a hook for each parameter, and a loop over them after the backward pass."""

    def __init__(self, model: nn.Module) -> None:
        self.params = list(model.parameters())
        self.local = torch.zeros(())
        self.trace, self.norm2 = torch.zeros(()), torch.zeros(())
        for p in self.params:
            p.register_hook(self.look)

    def look(self, gradient: Tensor) -> None:
        self.local = self.local + gradient.square().sum()

    def step(self) -> None:
        world = dist.get_world_size()
        dist.all_reduce(self.local)
        big = sum((p.grad.square().sum() for p in self.params if p.grad is not None), torch.zeros(()))
        trace = (self.local / world - big) / (1 - 1 / world)
        self.trace = 0.99 * self.trace + 0.01 * trace
        self.norm2 = 0.99 * self.norm2 + 0.01 * (big - trace / world)
        self.local = torch.zeros(())


def ddp_step(name: str, way: str) -> Callable[[], None]:
    """A step of DDP training as it is, or watched in one way."""
    kind, shape, examples = MODELS[name]
    torch.manual_seed(dist.get_rank())
    x, y = torch.randn(examples, *shape), torch.randint(0, 10, (examples,))
    model = DistributedDataParallel(models.build(kind, input_shape=shape, num_classes=10))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    after: Callable[[], object] = lambda: None  # noqa: E731
    stepper: Callable[[], object] = optimizer.step
    if way == "conjugo":
        attach(model, NoiseScaleMonitor(ema=0.99))
    elif way == "conjugo, every 10th":
        attach(model, NoiseScaleMonitor(ema=0.99), every=10)
    elif way == "hook per parameter":
        after = ByParameter(model).step
    elif way == "fairscale":
        from fairscale.optim import AdaScale  # type: ignore[import-not-found]

        stepper = AdaScale(optimizer).step

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        after()
        stepper()

    return step


def ways() -> list[str]:
    """Those that are installed."""
    found = ["plain", "conjugo", "conjugo, every 10th", "hook per parameter"]
    try:
        import fairscale.optim  # noqa: F401
    except ImportError:
        return found
    return [*found, "fairscale"]


def of_rank() -> list[tuple[str, dict[str, list[float]]]]:
    """Seconds of each case and way."""
    results = []
    for name, _, _, _, steps in DDP_CASES:
        cases = {way: partial(repeat, ddp_step(name, way), steps) for way in ways()}
        seconds = interleave(cases, rounds=ROUNDS, prepare=lambda way: dist.barrier(), clock=time.process_time)
        results.append((name, {way: [second / steps for second in found] for way, found in seconds.items()}))
    return results


def repeat(step: Callable[[], object], times: int) -> None:
    for _ in range(times):
        step()


TRAINER_CASES = (
    ("perceptron, batch 128", TrainConfig(model="mlp", batch_size=128), 20),
    ("perceptron, batch 128 of 4 parts", TrainConfig(model="mlp", batch_size=128, micro_batch=32), 20),
    ("CNN, batch 128 of 4 parts", TrainConfig(model="cnn", batch_size=128, micro_batch=32), 1),
    ("CNN, batch 128", TrainConfig(model="cnn", batch_size=128), 1),
)


def trainer_rows() -> list[list[str]]:
    """The trainer: a step that measures, and what that makes in every 20th."""
    rows = []
    for name, given, steps in TRAINER_CASES:
        for optimizer in ("momentum", "nlcg"):
            config = replace(given, optimizer=optimizer, lr=1e-3, steps=10**6, schedule="constant", threads=1)
            dataset = cifar_shaped(2000) if config.model == "cnn" else data.load("digits")
            with isolated(config):
                plain = Trainer(config, dataset)
                watched = Trainer(replace(config, noise_scale=1), dataset)
                cases = {
                    "plain": partial(repeat, plain.train_step, steps),
                    "watched": partial(repeat, watched.train_step, steps),
                }
                seconds = interleave(cases, rounds=ROUNDS // 2, clock=time.process_time)
            more = 100 * (ratio(seconds["watched"], seconds["plain"])[0] - 1)
            milliseconds = 1e3 * statistics.median(seconds["plain"]) / steps
            rows.append([f"{name}, {optimizer}", f"{milliseconds:.2f}", f"{more:+.0f}", f"{more / 20:+.1f}"])
    return rows


def main() -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    rows = []
    names = ways()
    for name, seconds in _processes.run(2, of_rank):
        row = [name, f"{1e3 * statistics.median(seconds['plain']):.2f}"]
        for way in names[1:]:
            middle, low, high = (100 * (value - 1) for value in ratio(seconds[way], seconds["plain"]))
            row.append(f"{middle:+.1f} ({low:+.0f}..{high:+.0f})")
        rows.append(row)
    show("DDP, two gloo ranks: % beyond a plain step (quartiles)", ("", "ms a step", *names[1:]), rows)
    show(
        "Trainer, one process: % beyond a plain step",
        ("", "ms a step", "a step that measures", "with noise_scale = 20"),
        trainer_rows(),
    )


if __name__ == "__main__":
    main()
