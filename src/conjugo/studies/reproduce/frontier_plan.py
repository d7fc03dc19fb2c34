"""The comparison of preconditioners inside the conjugate-gradient frame: contenders, tasks, budgets, and their digest.

The plan was written down, with its digest, before the first run (docs/frontier-protocol.md): :func:`digest` is what says that
the numbers in the code are still those.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from conjugo.errors import unknown
from conjugo.studies.reproduce.frontier_search import Search
from conjugo.studies.runs import num_steps
from conjugo.training import TrainConfig

__all__ = [
    "AXIS",
    "FAMILIES",
    "GAIN",
    "OCTAVE",
    "SAVED",
    "Family",
    "FrontierPlan",
    "Setting",
    "cpu_plan",
    "digest",
    "gpu_plan",
    "markdown",
]

GAIN = 0.005
"""So much more test accuracy (a fraction) than the best tuned rival is a win, if it is significant."""

SAVED = 0.05
"""So much less (a fraction) of the passes to the target is a win too."""

OCTAVE = 1.0
"""So many octaves more of usable learning rates are a wider range."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A contender: an optimizer in two variants, of which validation chooses one.

    optimizer: its name in the catalogue. second: the option that tells the variants apart. options: those they share. control:
    the family that is the same with a constant beta; None: a rival, or itself a control. ours: whether it is one of the frame.
    passes: forward and backward passes of a step, in units of one of each.
    """

    label: str
    optimizer: str
    second: str
    variants: tuple[float, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    ours: bool = False
    control: str | None = None
    passes: float = 1.0
    decoupled: bool = False


def _conjugate(precond: str) -> dict[str, Family]:
    common: dict[str, Any] = {
        "optimizer": f"nlcg-{precond}",
        "second": "beta_max",
        "variants": (0.9, 0.95),
        "ours": True,
    }
    common["decoupled"] = True
    control = f"{precond}-constant"
    return {
        f"{precond}-fr": Family(
            label=f"{precond}, Fletcher-Reeves", options={"decoupled": True}, control=control, **common
        ),
        control: Family(label=f"{precond}, constant β", options={"decoupled": True, "rule": "constant"}, **common),
    }


def _probed(search: str, passes: float) -> Family:
    return Family(
        label=f"orthogonal, {search}",
        optimizer="nlcg-orthogonal",
        second="beta_max",
        variants=(0.9, 0.95),
        options={"decoupled": True, "line_search": search},
        ours=True,
        decoupled=True,
        control="orthogonal-constant",
        passes=passes,
    )


FAMILIES: Mapping[str, Family] = {
    "nesterov": Family(label="Nesterov", optimizer="nesterov", second="momentum", variants=(0.9, 0.95)),
    "adamw": Family(label="AdamW", optimizer="adamw", second="beta2", variants=(0.99, 0.999), decoupled=True),
    "lamb": Family(label="LAMB", optimizer="lamb", second="beta1", variants=(0.9, 0.95), decoupled=True),
    "lars": Family(label="LARS", optimizer="lars", second="momentum", variants=(0.9, 0.95)),
    "muon": Family(label="Muon", optimizer="muon", second="momentum", variants=(0.9, 0.95), decoupled=True),
    "soap": Family(label="SOAP", optimizer="soap", second="beta1", variants=(0.9, 0.95), decoupled=True),
    "nlcg": Family(label="NLCG of the paper", optimizer="nlcg", second="beta_max", variants=(1.0, 0.95)),
    **_conjugate("adam"),
    **_conjugate("orthogonal"),
    **_conjugate("kron"),
    "orthogonal-parabola": _probed("parabola", 1.33),
    "orthogonal-subspace": _probed("subspace", 1.41),
}
"""All contenders. What is not said is the default of the catalogue; no weight decay at scale cpu."""

AXIS = ("muon", "adamw", "orthogonal-fr", "orthogonal-constant")
"""Those that take part in the comparison over batch sizes."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A task. train: how it is trained, without optimizer, rate, batch, steps and seed; None: the character transformer.

    contenders: by name, the exponent (to base 2) of the learning rate in the middle of the first grid. batch_size: examples of
    a step. steps: with one pass each; a family whose steps cost more gets fewer. tuning_seeds: runs at each rate. seeds: fresh
    ones. evaluations: of each final run. validation: fraction of the training data that tuning is judged on. train_size,
    test_size: examples; the training examples are drawn by the seed from all that there are. mixed: the test examples are drawn
    by the seed too, from the whole data set. secondary: not among those whose tests are counted. single: only the first
    variant of each contender takes part.
    """

    title: str
    contenders: Mapping[str, int]
    batch_size: int
    steps: int
    tuning_seeds: int
    seeds: int
    evaluations: int
    validation: float
    train_size: int
    test_size: int
    train: TrainConfig | None = None
    mixed: bool = False
    secondary: bool = False
    single: bool = False

    def steps_of(self, name: str) -> int:
        """Steps of a run of the contender *name*."""
        return max(1, round(self.steps / FAMILIES[name].passes))


@dataclass(frozen=True, kw_only=True)
class FrontierPlan:
    """The tasks, by name."""

    settings: Mapping[str, Setting]

    def searches(self, setting: str) -> list[Search]:
        """The plan of every contender of a task; raises UnknownName."""
        if setting not in self.settings:
            unknown("task", setting, self.settings)
        task = self.settings[setting]
        return [
            Search(
                study=setting,
                contender=name,
                batch_size=task.batch_size,
                start=start,
                variants=FAMILIES[name].variants[: 1 if task.single else None],
                tuning_seeds=task.tuning_seeds,
                seeds=task.seeds,
            )
            for name, start in task.contenders.items()
        ]

    def describe(self, setting: str) -> dict[str, Any]:
        """All that the runs of a task depend on, as plain values."""
        task = self.settings[setting]
        usual = TrainConfig().to_dict()
        train = {} if task.train is None else task.train.to_dict()
        return {
            **asdict(replace(task, train=None)),
            "train": {name: value for name, value in train.items() if value != usual[name]},
            "families": {name: asdict(FAMILIES[name]) for name in task.contenders},
        }


def digest(plan: FrontierPlan) -> str:
    """SHA-256 of all numbers of *plan*, and of what counts as a win, in hexadecimal digits."""
    content = {name: plan.describe(name) for name in plan.settings} | {"win": [GAIN, SAVED, OCTAVE]}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


_DIGITS = {
    "nesterov": -3,
    "adamw": -6,
    "muon": -6,
    "soap": -6,
    "orthogonal-fr": -7,
    "orthogonal-constant": -8,
    "kron-fr": -8,
    "kron-constant": -9,
    "lamb": -5,
    "lars": 3,
    "nlcg": -2,
    "adam-fr": -9,
    "adam-constant": -9,
    "orthogonal-parabola": 0,
    "orthogonal-subspace": 0,
}
# Contenders run in this order.
_LARGER = {
    "adamw": -6,
    "muon": -5,
    "soap": -6,
    "orthogonal-fr": -6,
    "orthogonal-constant": -7,
    "kron-fr": -7,
    "kron-constant": -8,
    "nesterov": -1,
    "lamb": -5,
}


def cpu_plan() -> FrontierPlan:
    """Digits, CIFAR-10, Shakespeare, and a comparison over batch sizes: about an hour of one core."""
    digits = TrainConfig(data="digits", model="mlp", schedule="cosine", warmup=0.1, precision="float32", augment=False)
    usual: dict[str, Any] = {"tuning_seeds": 2, "seeds": 10, "validation": 0.2, "train_size": 1437, "test_size": 360}
    usual |= {"mixed": True, "batch_size": 1437}
    cifar = replace(digits, data="cifar10", model="resnet8", image_size=16, micro_batch=1024, precision="bfloat16")
    settings = {
        "digits-mlp": Setting(
            title="Digits, perceptron 64-128-128-10, full batch, 60 steps",
            contenders=_DIGITS,
            steps=60,
            evaluations=60,
            train=digits,
            **usual,
        ),
        "digits-cnn": Setting(
            title="Digits, three convolutions with batch norm, full batch, 30 steps",
            contenders={**_DIGITS, "nesterov": -1, "adamw": -5, "muon": -4, "soap": -5, "nlcg": 0, "adam-fr": -7}
            | {"orthogonal-fr": -6, "orthogonal-constant": -7, "kron-fr": -6, "kron-constant": -8},
            steps=30,
            evaluations=30,
            train=replace(digits, model="cnn"),
            single=True,
            **usual,
        ),
        "cifar10-resnet8": Setting(
            title="CIFAR-10 at 16x16, ResNet-8, 8,192 images, batch 2,048, 20 steps",
            contenders=_LARGER,
            batch_size=2048,
            steps=20,
            tuning_seeds=1,
            seeds=5,
            evaluations=10,
            validation=0.2,
            train_size=8192,
            test_size=4000,
            single=True,
            train=cifar,
        ),
        "shakespeare-transformer": Setting(
            title="Characters of Shakespeare, transformer of two layers, 512 sequences of 16, 60 steps",
            contenders=_LARGER | {"nesterov": 0},
            batch_size=512,
            steps=60,
            tuning_seeds=1,
            seeds=5,
            evaluations=15,
            validation=0.05,
            train_size=0,
            test_size=1024,
            single=True,
        ),
    }
    for batch in (32, 128, 512, 1437):
        settings[f"batch-{batch}"] = Setting(
            title=f"Digits, perceptron, batch {batch:,}, 20 passes through the data",
            contenders={name: _DIGITS[name] + (batch == 1437) - (batch == 32) for name in AXIS},
            steps=num_steps(20, 1437, batch),
            evaluations=20,
            train=digits,
            secondary=True,
            single=True,
            **{**usual, "batch_size": batch, "tuning_seeds": 1, "seeds": 5},
        )
    return FrontierPlan(settings=settings)


def gpu_plan() -> FrontierPlan:
    """CIFAR-10 with ResNet-20 at batches 4,096 and 16,384, CIFAR-100 with ResNet-32 at 16,384: 200 epochs each.

    The weight decay is that of the paper of NLCG, 2e-4 in the gradient; decoupled it is 0.1.
    """
    recipe = TrainConfig(
        data="cifar10",
        model="resnet20",
        micro_batch=2048,
        schedule="polynomial",
        warmup=0.125,
        weight_decay=2e-4,
        decay_norm_and_bias=False,
        ema=0.9999,
    )
    cases = [("cifar10", "resnet20", 4096), ("cifar10", "resnet20", 16384), ("cifar100", "resnet32", 16384)]
    return FrontierPlan(
        settings={
            f"{data}-{model}-{batch}": Setting(
                title=f"{data}, {model}, batch {batch:,}, 200 epochs",
                contenders=_LARGER,
                batch_size=batch,
                steps=num_steps(200, 50000, batch),
                tuning_seeds=1,
                seeds=5,
                evaluations=40,
                validation=0.1,
                train_size=50000,
                test_size=10000,
                train=replace(recipe, data=data, model=model),
            )
            for data, model, batch in cases
        }
    )


def markdown(plan: FrontierPlan) -> str:
    """Tasks and contenders of *plan* as the tables of the protocol page."""
    lines = [
        "| task | batch | steps | tuning seeds | fresh seeds | training / test examples | held out to tune |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, task in plan.settings.items():
        sizes = (
            f"{task.train_size:,} / {task.test_size:,}" if task.train_size else f"90 % of the text / {task.test_size:,}"
        )
        lines.append(
            f"| {name} | {task.batch_size:,} | {task.steps:,} | {task.tuning_seeds} | {task.seeds} | {sizes} | "
            f"{100 * task.validation:.3g} % |"
        )
    names = list(dict.fromkeys(name for task in plan.settings.values() for name in task.contenders))
    lines += [
        "",
        "| contender | optimizer | fixed | variants | passes a step |"
        + "".join(f" {name} |" for name in plan.settings),
        "| --- | --- | --- | --- | --- |" + " --- |" * len(plan.settings),
    ]
    for name in names:
        family = FAMILIES[name]
        fixed = ", ".join(f"{key} {value}" for key, value in family.options.items() if key != "decoupled") or "–"
        variants = f"{family.second} {', '.join(map(str, family.variants))}"
        starts = [task.contenders.get(name) for task in plan.settings.values()]
        places = "".join(f" {'–' if start is None else f'2^{start}'} |" for start in starts)
        lines.append(f"| {name} | {family.optimizer} | {fixed} | {variants} | {family.passes:g} |{places}")
    return "\n".join(lines)
