"""The parts of ``bngd`` about networks: learning rates with and without batch norm, its law of scale, and layers' conditioning.

Plain SGD, batches of random examples. Losses are over all training examples, with batch norm by the statistics of all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from conjugo.curvature import hessian
from conjugo.scaling import EffectiveLRTracker, effective_condition
from conjugo.studies.runs import load_data
from conjugo.training import TrainConfig, models
from conjugo.training.data import Dataset, default_augment

__all__ = [
    "VARIANTS",
    "ImagePlan",
    "NetworkPlan",
    "conditioning",
    "image_run",
    "law_of_scale",
    "perceptron",
    "sweep",
    "without_batch_norm",
]

VARIANTS: Mapping[str, str] = {"plain": "without BN", "bn": "BN", "own": "BN, own rate of its parameters"}


@dataclass(frozen=True, kw_only=True)
class NetworkPlan:
    """Perceptrons on digits. hidden: of the sweeps; layer_hidden: of the network whose layers are measured.

    lr_ab: of the parameters of batch norm where they have their own. scales: by which weights are multiplied.
    """

    lrs: tuple[float, ...] = (0.01, 0.0316, 0.1, 0.316, 1.0, 3.16, 10.0, 31.6, 100.0, 316.0, 1000.0)
    lr_ab: float = 0.1
    hidden: int = 100
    steps: int = 150
    batch: int = 100
    seeds: int = 2
    scales: tuple[float, ...] = (0.1, 1.0, 3.0)
    layer_hidden: int = 20
    layer_lr: float = 0.3
    layer_examples: int = 500


def _digits() -> tuple[Tensor, Tensor]:
    split = load_data(TrainConfig(data="digits"), None, None).train
    return split.inputs.flatten(1).double() / 255, split.targets


def perceptron(widths: Sequence[int], seed: int, *, norm: bool, last: bool = False, eps: float = 1e-5) -> nn.Sequential:
    """Linear layers with ReLU between them, float64. norm: batch norm after each, also after the last one if *last*."""
    layers: list[nn.Module] = []
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        for i in range(len(widths) - 1):
            end = i == len(widths) - 2
            normalised = norm and (last or not end)
            layers.append(nn.Linear(widths[i], widths[i + 1], bias=not normalised))
            layers += [nn.BatchNorm1d(widths[i + 1], eps=eps)] if normalised else []
            layers += [] if end else [nn.ReLU()]
    return nn.Sequential(*layers).double()


def _train(
    model: nn.Module, data: tuple[Tensor, Tensor], lr: float, lr_ab: float, *, steps: int, batch: int, seed: int
) -> float:
    """Train by SGD; the loss over all *data* in the end, NaN if it is not finite."""
    inputs, targets = data
    affine = [p for module in model.modules() if isinstance(module, _BatchNorm) for p in module.parameters()]
    own = {id(p) for p in affine}
    rest = [p for p in model.parameters() if id(p) not in own]
    groups = [{"params": rest, "lr": lr}, {"params": affine, "lr": lr_ab}]
    optimizer = torch.optim.SGD([group for group in groups if group["params"]], lr=lr)
    order = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(targets), (batch,), generator=order)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs[rows]), targets[rows])
        if not math.isfinite(float(loss.detach())):
            return math.nan
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        return float(F.cross_entropy(model(inputs), targets))


def sweep(plan: NetworkPlan) -> dict[str, list[list[float | None]]]:
    """By variant, for each learning rate and seed: the final training loss; None: not finite."""
    data = _digits()
    found: dict[str, list[list[float | None]]] = {}
    for variant in VARIANTS:
        found[variant] = []
        for lr in plan.lrs:
            losses = []
            for seed in range(plan.seeds):
                model = perceptron((64, plan.hidden, 10), seed, norm=variant != "plain", last=True)
                lr_ab = plan.lr_ab if variant == "own" else lr
                loss = _train(model, data, lr, lr_ab, steps=plan.steps, batch=plan.batch, seed=seed)
                losses.append(loss if math.isfinite(loss) else None)
            found[variant].append(losses)
    return found


def law_of_scale(plan: NetworkPlan) -> dict[str, dict[str, float]]:
    """Final losses with weights before batch norm times r and their learning rate times r^2; by batch norm's eps, then by r."""
    data = _digits()
    found: dict[str, dict[str, float]] = {}
    for eps in (1e-30, 1e-5):
        losses = {}
        for r in plan.scales:
            model = perceptron((64, plan.hidden, 10), 0, norm=True, last=True, eps=eps)
            with torch.no_grad():
                for module in model:
                    if isinstance(module, nn.Linear):
                        module.weight *= r
            losses[f"{r:g}"] = _train(model, data, 0.1 * r**2, 0.1, steps=plan.steps, batch=plan.batch, seed=0)
        found[f"{eps:g}"] = losses
    return found


def conditioning(plan: NetworkPlan) -> list[dict[str, Any]]:
    """The layers of a network with batch norm at the beginning and when trained, and those of one without, as plain values."""
    inputs, targets = _digits()
    some = inputs[: plan.layer_examples], targets[: plan.layer_examples]
    widths = (64, plan.layer_hidden, plan.layer_hidden, 10)
    found: list[dict[str, Any]] = []
    for norm in (True, False):
        for moment in ("beginning", "trained"):
            model = perceptron(widths, 0, norm=norm)
            if moment == "trained":
                options = {"steps": plan.steps, "batch": plan.batch, "seed": 0}
                _train(model, (inputs, targets), plan.layer_lr, plan.layer_lr, **options)
            linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][:-1]
            for i, layer in enumerate(linear):
                about = {"network": "bn" if norm else "plain", "moment": moment, "layer": i + 1}
                found.append(about | (_effective if norm else _plain)(model, some, layer))
    return found


def _effective(model: nn.Module, data: tuple[Tensor, Tensor], layer: str) -> dict[str, Any]:
    c = effective_condition(model, F.cross_entropy, data, layer)
    return {
        "parameters": c.parameters,
        "lam_max": c.lam_max,
        "quantile": c.quantiles[0.5],
        "raw_lam_max": c.raw_lam_max,
        "raw_quantile": c.raw_quantiles[0.5],
        "negative": float(-c.eigenvalues[-1].clamp(max=0)),
        "norm": float(c.norms.mean()),
    }


def _plain(model: nn.Module, data: tuple[Tensor, Tensor], layer: str) -> dict[str, Any]:
    """The same of a layer without batch norm, where nothing is projected."""
    dense = hessian(model, F.cross_entropy, data, f"^{layer}\\.weight$").to_dense()
    values = torch.linalg.eigvalsh((dense + dense.T) / 2)
    largest, middle = float(values[-1]), float(values.abs().median())
    weights = model.get_parameter(f"{layer}.weight").detach()
    return {
        "parameters": len(values),
        "lam_max": largest,
        "quantile": middle,
        "raw_lam_max": largest,
        "raw_quantile": middle,
        "negative": float(-values[0].clamp(max=0)),
        "norm": float(weights.norm(dim=1).mean()),
    }


# Images -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ImagePlan:
    """A residual network with batch norm, and the same without, over many decades of learning rates; plain SGD.

    looks: how often within a run effective learning rates and edges are recorded, the last time at the end. layers: of those
    before batch norm, how many have their edge measured, evenly from first to last; over so many *examples*.
    """

    data: str = "cifar10"
    model: str = "resnet20v1"
    lrs: tuple[float, ...] = tuple(10.0 ** (k / 2) for k in range(-6, 7))
    epochs: float = 1.0
    batch: int = 128
    looks: int = 4
    layers: int = 3
    examples: int = 2048
    seed: int = 0

    @property
    def runs(self) -> list[tuple[str, float]]:
        """Variant and learning rate."""
        return [(variant, lr) for variant in ("bn", "plain") for lr in self.lrs]


class _Bias(nn.Module):
    """What stands in the place of batch norm: a number for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """x plus the biases, [N, C, ...]."""
        return x + self.bias.view(-1, *[1] * (x.ndim - 2))


def without_batch_norm(model: nn.Module) -> nn.Module:
    """*model*, in which biases have taken the place of all batch norm layers."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, _BatchNorm):
                setattr(module, name, _Bias(child.num_features))
    return model


def image_run(plan: ImagePlan, variant: str, lr: float, dataset: Dataset, device: torch.device) -> dict[str, Any]:
    """Do one run with random crops and mirror images; plain values.

    loss: mean over the last tenth of the steps, None if it was not finite at any step; accuracy: on the test split. looks: at
    some steps, the median effective learning rate of the rows of each layer before batch norm, and of some the edge
    lr lam_max / 2.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(plan.seed)
        model = models.build(plan.model, input_shape=dataset.input_shape, num_classes=dataset.num_classes)
    model = (model if variant == "bn" else without_batch_norm(model)).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    augment = default_augment(dataset)
    images, targets = dataset.train.inputs.to(device), dataset.train.targets.to(device)
    random = torch.Generator().manual_seed(plan.seed)
    chances = torch.Generator(device).manual_seed(plan.seed)
    steps = max(1, round(plan.epochs * len(targets) / plan.batch))
    at = {max(1, round(steps * (i + 1) / plan.looks)) for i in range(plan.looks)}
    tracker = EffectiveLRTracker(model, optimizer) if variant == "bn" else None
    losses: list[float] = []
    looks: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        rows = torch.randint(len(targets), (plan.batch,), generator=random).to(device)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(augment(images[rows], train=True, generator=chances)), targets[rows])
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            return {"variant": variant, "lr": lr, "steps": step, "loss": None, "accuracy": None, "looks": looks}
        optimizer.step()
        if tracker is not None:
            turned = tracker.step()
            if step in at:
                some = augment(images[: plan.examples], train=False), targets[: plan.examples]
                looks.append({"step": step, **_look(plan, model, lr, some, turned)})
    last = losses[-max(1, steps // 10) :]
    accuracy = _accuracy(model, dataset, device)
    return {
        "variant": variant,
        "lr": lr,
        "steps": steps,
        "loss": math.fsum(last) / len(last),
        "accuracy": accuracy,
        "looks": looks,
    }


def _look(
    plan: ImagePlan,
    model: nn.Module,
    lr: float,
    data: tuple[Tensor, Tensor],
    turned: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, Any]:
    """Effective learning rates and angles by layer, and edges of some layers; None where a curvature is not finite."""
    batches = list(zip(*(torch.split(x, plan.batch) for x in data), strict=True))
    names = list(turned)
    chosen = {names[round(i * (len(names) - 1) / max(1, plan.layers - 1))] for i in range(plan.layers)}
    edges: dict[str, float | None] = {}
    for name in sorted(chosen):
        try:
            # Of rows that have grown by orders of magnitude the gradient is rounding; they are known to be invariant.
            found = effective_condition(model, F.cross_entropy, batches, name, "ggn", k=1, steps=2, tol=0.99)
            edges[name] = found.edge(lr)
        except (FloatingPointError, ValueError):
            edges[name] = None
    return {
        "eff_lr": {name: float(found["eff_lr"].median()) for name, found in turned.items()},
        "angle": {name: float(found["angle"].median()) for name, found in turned.items()},
        "edge": edges,
    }


@torch.no_grad()
def _accuracy(model: nn.Module, dataset: Dataset, device: torch.device) -> float:
    augment = default_augment(dataset)
    model.eval()
    right = 0
    for inputs, targets in zip(
        *(torch.split(x, 1000) for x in (dataset.test.inputs, dataset.test.targets)), strict=True
    ):
        right += int((model(augment(inputs.to(device), train=False)).argmax(1) == targets.to(device)).sum())
    return right / len(dataset.test)
