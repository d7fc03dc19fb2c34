"""The part of ``hessian-spectrum`` about networks with and without batch norm: training, measuring, judging.

A network and its twin, which has biases in the place of batch norm, are trained by SGD with momentum at a constant learning
rate. The Hessian of the training loss is measured at the beginning, where a branch begins whose learning rate is a tenth, at
the end of that branch and, where the plan says so, at the same epoch without the drop, and at equal losses.
With batch norm there are two Hessians: with the statistics of each batch, as in training, and with the running ones.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conjugo.errors import CorruptFile
from conjugo.studies import statistics
from conjugo.studies.reproduce.nlcg_small import pooled
from conjugo.studies.reproduce.paper import new_table
from conjugo.studies.runs import load_data
from conjugo.studies.spectrum_summary import number
from conjugo.training import TrainConfig
from conjugo.training.models.small import MLP
from conjugo.training.spectrum import Spectrum, first_examples, measure

if TYPE_CHECKING:
    from rich.console import RenderableType

    from conjugo.training.data import Split

__all__ = [
    "CIFAR",
    "DIGITS",
    "EXPECTED",
    "MOMENTS",
    "VIEWS",
    "NetworkPlan",
    "NetworksResult",
    "Place",
    "SmallResNet",
    "read",
    "train_and_measure",
]

Net = Literal["plain", "bn"]

VIEWS: Mapping[str, str] = {
    "plain": "plain",
    "bn train": "BN by batch",
    "bn eval": "BN running",
}
"""What is measured: the network without batch norm, and that with it, whose Hessian is taken with either statistics."""

MOMENTS: Mapping[str, str] = {
    "init": "beginning",
    "equal": "equal loss",
    "before": "before drop",
    "after": "after drop",
    "undropped": "no drop",
}

CONCENTRATED, ABSENT = 0.5, 0.1
"""Parts of the squared gradient in the top eigenspace from which on we call it concentrated there, and up to which not."""

EXPECTED: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "plain": {"lambda_max": (13.2, 6.6, 19.3), "ratio": (8.8, 6.7, 10.2), "fraction": (0.986, 0.92, 0.985)},
    "bn train": {"lambda_max": (0.60, 1.94, 0.68), "ratio": (1.9, 5.2, 2.4), "fraction": (0.68, 0.79, 0.85)},
    "bn eval": {"lambda_max": (4.3, 11.4, 8.5), "ratio": (4.5, 6.6, 8.1), "fraction": (0.91, 0.96, 0.97)},
}
"""Of a first, throw-away implementation on digits, after 30 epochs, three seeds. The paper's own figures are not known here."""


@dataclass(frozen=True, kw_only=True)
class NetworkPlan:
    """All that the runs depend on.

    model: ``mlp`` or ``resnet``; width, depth: of its hidden layers, or of its first stage and blocks in each stage. drop_at,
    dropped: epochs before and behind the drop. control: measure at the end without the drop, too. equal:
    measure at the end of the first epoch that leaves at most this training loss as well. examples: training
    examples on which the Hessian is taken (whole batches are prepared only once), None: all. top: how many of the largest
    eigenvalues make the top eigenspace. method: of the products.
    """

    label: str = "digits"
    data: str = "digits"
    pool: bool = False
    train_limit: int | None = None
    test_limit: int | None = None
    model: Literal["mlp", "resnet"] = "mlp"
    width: int = 32
    depth: int = 5
    lr: float = 0.05
    momentum: float = 0.9
    batch: int = 128
    drop_at: int = 20
    dropped: int = 10
    control: bool = True
    equal: float | None = 0.5
    seeds: int = 3
    examples: int | None = 1408
    steps: int = 60
    probes: int = 4
    top: int = 10
    method: Literal["auto", "autograd"] = "auto"

    @property
    def trained(self) -> tuple[str, ...]:
        """The moments at which the networks count as trained."""
        return (*self._equal, *(("undropped",) if self.control else ("before", "after")))

    @property
    def _equal(self) -> tuple[str, ...]:
        return () if self.equal is None else ("equal",)

    @property
    def runs(self) -> list[tuple[Net, int]]:
        """Networks and seeds."""
        nets: tuple[Net, ...] = ("plain", "bn")
        return [(net, seed) for seed in range(self.seeds) for net in nets]

    def places(self, net: Net, seed: int) -> list[Place]:
        """What is measured of a run."""
        moments = ["init", *self._equal, "before", "after", *(["undropped"] if self.control else [])]
        views = ["plain"] if net == "plain" else ["bn train", "bn eval"]
        # At the beginning there are no running statistics yet.
        return [Place(v, m, seed) for m in moments for v in views if (v, m) != ("bn eval", "init")]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


DIGITS = NetworkPlan()

CIFAR = NetworkPlan(
    label="CIFAR-10",
    data="cifar10",
    pool=True,
    train_limit=4096,
    test_limit=2000,
    model="resnet",
    width=8,
    depth=2,
    control=False,
    equal=None,
    seeds=2,
    examples=1000,
    steps=60,
    probes=1,
)


class Place(NamedTuple):
    """What is measured, when, of which seed."""

    view: str
    moment: str
    seed: int

    @property
    def file(self) -> str:
        """Its name on the disk."""
        return f"{self.view.replace(' ', '-')}-{self.moment}-{self.seed}.json"


# ---- networks ----


class _Block(nn.Module):
    """conv, norm, ReLU, conv, norm, add the shortcut (subsampled, new channels zero), ReLU."""

    def __init__(self, channels: int, width: int, stride: int, batch_norm: bool) -> None:
        super().__init__()
        self.stride, self.new = stride, width - channels
        self.first = _conv(channels, width, stride, batch_norm)
        self.second = _conv(width, width, 1, batch_norm)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new))
        return F.relu(self.second(F.relu(self.first(x))) + shortcut)


def _conv(channels: int, width: int, stride: int, batch_norm: bool) -> nn.Sequential:
    conv = nn.Conv2d(channels, width, 3, stride, padding=1, bias=not batch_norm)
    nn.init.kaiming_normal_(conv.weight, mode="fan_in", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return nn.Sequential(conv, *([nn.BatchNorm2d(width)] if batch_norm else []))


class SmallResNet(nn.Sequential):
    """The original residual network for small images, of any width: three stages of *depth* blocks, 6 * depth + 2 layers.

    Without batch norm convolutions have biases, and the last one of each block begins smaller by the square root of the
    number of blocks, so that activations keep their size.
    """

    def __init__(self, channels: int, classes: int, *, width: int, depth: int, batch_norm: bool) -> None:
        blocks: list[nn.Module] = []
        before = width
        for stage in range(3):
            for i in range(depth):
                after, stride = width * 2**stage, 2 if stage and i == 0 else 1
                blocks.append(_Block(before, after, stride, batch_norm))
                before = after
        stem = _conv(channels, width, 1, batch_norm)
        super().__init__(stem, nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))
        if not batch_norm:
            with torch.no_grad():
                for block in blocks:
                    second: Any = block.second
                    second[0].weight.mul_(len(blocks) ** -0.5)


def _build(plan: NetworkPlan, net: Net, shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        if plan.model == "mlp":
            return MLP(shape, classes, hidden=(plan.width,) * plan.depth, batch_norm=net == "bn")
        return SmallResNet(shape[0], classes, width=plan.width, depth=plan.depth, batch_norm=net == "bn")


# ---- training and measuring ----


class _Data(NamedTuple):
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: int


def _load(plan: NetworkPlan) -> _Data:
    """Images are standardised by channel; those of digits are only brought to [0, 1]."""
    dataset = load_data(TrainConfig(data=plan.data), plan.train_limit, plan.test_limit)
    dataset = pooled(dataset) if plan.pool else dataset

    def floats(split: Split) -> Tensor:
        return split.inputs.float() / 255

    train, test = floats(dataset.train), floats(dataset.test)
    if plan.model == "resnet":
        std, mean = torch.std_mean(train, (0, 2, 3), keepdim=True)
        train, test = (train - mean) / std, (test - mean) / std
    return _Data((train, dataset.train.targets), (test, dataset.test.targets), dataset.num_classes)


def train_and_measure(plan: NetworkPlan, net: Net, seed: int, keep: Callable[[Place, Spectrum], None]) -> None:
    """Train a network and its branch; *keep* gets each spectrum. Raises FloatingPointError if training diverges."""
    data = _load(plan)
    model = _build(plan, net, tuple(data.train[0].shape[1:]), data.classes, seed)
    places = plan.places(net, seed)

    seen: set[str] = set()

    def look(moment: str, model: nn.Module, epoch: int) -> None:
        seen.add(moment)
        for place in places:
            if place.moment == moment:
                keep(place, _measured(plan, model, data, place, epoch))

    def ended(epoch: int) -> None:
        if plan.equal is not None and "equal" not in seen and _loss(model, data, plan) <= plan.equal:
            look("equal", model, epoch)

    look("init", model, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=plan.lr, momentum=plan.momentum)
    order = torch.Generator().manual_seed(seed)
    last = plan.drop_at + plan.dropped
    _train(model, optimizer, data, plan, range(1, plan.drop_at + 1), order, ended)
    look("before", model, plan.drop_at)
    branch = copy.deepcopy(model)
    slower = torch.optim.SGD(branch.parameters(), lr=plan.lr, momentum=plan.momentum)
    slower.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    slower.param_groups[0]["lr"] = plan.lr / 10
    same = torch.Generator()
    same.set_state(order.get_state())
    rest = range(plan.drop_at + 1, last + 1)
    _train(branch, slower, data, plan, rest, same, lambda _: None)
    look("after", branch, last)
    if plan.control or (plan.equal is not None and "equal" not in seen):
        _train(model, optimizer, data, plan, rest, order, ended)
        look("undropped", model, last)
        if "equal" not in seen:  # it has not come so far; its loss says so
            look("equal", model, last)


def _train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: _Data,
    plan: NetworkPlan,
    epochs: range,
    order: torch.Generator,
    ended: Callable[[int], None],
) -> None:
    inputs, targets = data.train
    model.train()
    for epoch in epochs:
        for rows in torch.split(torch.randperm(len(targets), generator=order), plan.batch):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs[rows]), targets[rows])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()}")
        ended(epoch)


def _batches(data: _Data, plan: NetworkPlan) -> list[tuple[Tensor, Tensor]]:
    """Those on which the Hessian is taken."""
    inputs, targets = data.train
    rows = first_examples(len(targets), plan.examples, 0)
    return [(inputs[part], targets[part]) for part in rows.tensor_split(-(-len(rows) // plan.batch))]


def _measured(plan: NetworkPlan, model: nn.Module, data: _Data, place: Place, epoch: int) -> Spectrum:
    from conjugo.curvature import hessian

    batches = _batches(data, plan)
    mode: Literal["eval", "train"] = "eval" if place.view == "bn eval" else "train"
    op = hessian(model, F.cross_entropy, batches, bn_mode=mode, method=plan.method)
    about = {**place._asdict(), "epoch": epoch, "accuracy": _accuracy(model, data), "matrix": "hessian"}
    about |= {"model": VIEWS[place.view], "data": plan.label, "examples": sum(len(targets) for _, targets in batches)}
    return measure(op, steps=plan.steps, probes=plan.probes, top=plan.top, about=about)


@torch.no_grad()
def _loss(model: nn.Module, data: _Data, plan: NetworkPlan) -> float:
    """The training loss, batch norm with the statistics of each batch."""
    model = copy.deepcopy(model).train()
    batches = _batches(data, plan)
    total = sum(len(targets) * F.cross_entropy(model(inputs), targets).item() for inputs, targets in batches)
    return total / sum(len(targets) for _, targets in batches)


@torch.no_grad()
def _accuracy(model: nn.Module, data: _Data) -> float:
    mode = model.training
    model.eval()
    inputs, targets = data.test
    right = sum(
        int((model(x).argmax(1) == y).sum()) for x, y in zip(torch.split(inputs, 500), torch.split(targets, 500))
    )
    model.train(mode)
    return right / len(targets)


def read(plan: NetworkPlan, net: Net, seed: int, folder: Path | None) -> dict[Place, Spectrum] | None:
    """The spectra of a run that *folder* holds; None unless all are there."""
    if folder is None:
        return None
    try:
        return {place: Spectrum.load(folder / place.file) for place in plan.places(net, seed)}
    except (OSError, CorruptFile):
        return None


# ---- the result ----


@dataclass(frozen=True, eq=False)
class NetworksResult:
    """The spectra, and messages about runs that were given up."""

    plan: NetworkPlan
    spectra: Mapping[Place, Spectrum]
    crashes: tuple[str, ...] = ()

    def values(self, name: str, view: str, moment: str) -> list[float]:
        """A number of each seed; see :func:`numbers`. Only of seeds for which all views are there, and only where it is one."""
        found = [self._number(name, Place(view, moment, seed)) for seed in range(self.plan.seeds)]
        return [value for value in found if value is not None]

    def _number(self, name: str, place: Place) -> float | None:
        spectrum = self.spectra.get(place)
        return None if spectrum is None else numbers(spectrum)[name]

    def paired(self, name: str, first: tuple[str, str], second: tuple[str, str]) -> list[tuple[float, float]]:
        """A number at two (view, moment), for each seed that has both."""
        pairs = [
            (self._number(name, Place(*first, seed)), self._number(name, Place(*second, seed)))
            for seed in range(self.plan.seeds)
        ]
        return [(a, b) for a, b in pairs if a is not None and b is not None]

    def shown(self) -> Iterator[tuple[str, str]]:
        """The pairs of a view and a moment that are there, by moment."""
        there = {(place.view, place.moment) for place in self.spectra}
        return ((view, moment) for moment in MOMENTS for view in VIEWS if (view, moment) in there)

    def when(self, moment: str) -> str:
        """A moment in words, with the epochs."""
        epochs = {spectrum.about["epoch"] for place, spectrum in self.spectra.items() if place.moment == moment}
        low, high = min(epochs, default=0), max(epochs, default=0)
        return f"{low if low == high else f'{low}-{high}'}, {MOMENTS[moment]}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; the densities are in files of their own."""
        found = [
            {**place._asdict(), **numbers(spectrum), "eigenvalues": list(spectrum.eigenvalues)}
            for place, spectrum in self.spectra.items()
        ]
        return {"plan": self.plan.to_dict(), "spectra": found, "crashes": list(self.crashes)}

    def table(self) -> RenderableType:
        """The numbers at every moment: means over the seeds."""
        size = next((s.density.size for s in self.spectra.values()), 0)
        expects = self.plan == DIGITS
        table = new_table(
            f"{self.plan.label}: the Hessian of the training loss, {size:,} parameters",
            f"Means of {self.plan.seeds} seeds. in top: of the squared gradient, in the space of the ten largest. BN: batch "
            "norm, with the statistics of each batch or running ones."
            + (" In brackets: a first implementation." if expects else ""),
        )
        table.columns[0].header = "epoch"
        for column in COLUMNS.values():
            table.add_column(column, justify="right")
        last = ""
        for view, moment in self.shown():
            if moment not in (last, ""):
                table.add_section()
                table.add_row(f"[dim]{self.when(moment)}[/]")
            table.add_row(f"  {VIEWS[view]}", *(_mean(self.values(name, view, moment), name) for name in COLUMNS))
            if expects and moment == "undropped":
                cells = (_mean(EXPECTED[view].get(name, ()), name) for name in COLUMNS)
                table.add_row("", *(f"[dim]{'' if cell == '–' else f'({cell})'}[/]" for cell in cells))
            last = moment
        return table

    # ---- claims ----

    def cases(self) -> dict[str, dict[str, tuple[bool | None, str]]]:
        """For each claim (a key of `CLAIMS`) what these networks say about it."""
        trained = self.plan.trained
        bn = ("bn train", "bn eval")
        found: dict[str, dict[str, tuple[bool | None, str]]] = {name: {} for name in CLAIMS}
        for moment in trained:
            when = f"{self.plan.label}, {MOMENTS[moment]}"
            for name, quantity in (("lambda_max", "λ1"), ("ratio", "λ1 / λ10")):
                grown = self._paired(name, ("plain", "init"), ("plain", moment), lambda a, b: b > a)
                found["outliers"][f"{when}, {quantity}"] = grown
            found["concentrates"][when] = self._all("fraction", "plain", moment, lambda x: x >= CONCENTRATED)
            for view in bn:
                case = f"{when}, {VIEWS[view]}"
                lower = self._paired("ratio", ("plain", moment), (view, moment), lambda a, b: b < a)
                found["ratio"][case] = lower
                lower = self._paired("fraction", ("plain", moment), (view, moment), lambda a, b: b < a)
                found["fraction"][case] = lower
                found["absent"][case] = self._all("fraction", view, moment, lambda x: x <= ABSENT)
        for view in VIEWS:
            case = f"{self.plan.label}, {VIEWS[view]}"
            if view != "bn eval":
                found["negative"][case] = self._paired(
                    "negative", (view, "init"), (view, trained[-1]), lambda a, b: b <= a / 10
                )
            found["positive"][case] = self._all("energies", view, trained[-1], lambda x: x >= 10)
            for name in ("lambda_max", "energy"):
                quantity = {"lambda_max": "λ1", "energy": "mean |λ|"}[name]
                found["drop"][f"{case}, {quantity}"] = self._paired(
                    name, (view, "before"), (view, "after"), lambda a, b: b < a
                )
                if self.plan.control:
                    found["control"][f"{case}, {quantity}"] = self._paired(
                        name, (view, "undropped"), (view, "after"), lambda a, b: b < a
                    )
        return found

    def _paired(
        self, name: str, first: tuple[str, str], second: tuple[str, str], holds: Callable[[float, float], bool]
    ) -> tuple[bool | None, str]:
        pairs = self.paired(name, first, second)
        if not pairs:
            return None, "not measured"
        count = sum(holds(a, b) for a, b in pairs)
        a, b = (number(statistics.mean_sd(side)[0]) for side in zip(*pairs))
        earlier = first[0] == second[0] and first[1] != "undropped"
        return count == len(pairs), f"{b} {'after' if earlier else 'against'} {a}" + _seeds(count, len(pairs))

    def _all(self, name: str, view: str, moment: str, holds: Callable[[float], bool]) -> tuple[bool | None, str]:
        values = self.values(name, view, moment)
        if not values:
            return None, "not measured"
        count = sum(map(holds, values))
        return count == len(values), number(statistics.mean_sd(values)[0]) + _seeds(count, len(values))


def _seeds(count: int, n: int) -> str:
    return "" if count in (0, n) else f", so for {count} of {n} seeds"


COLUMNS: Mapping[str, str] = {
    "loss": "loss",
    "accuracy": "test (%)",
    "lambda_max": "λ1",
    "ratio": "λ1 / λ10",
    "fraction": "in top (%)",
    "negative": "−λmin / λ1",
    "energy": "mean |λ|",
}
"""Names of :func:`numbers` and how they are called."""

CLAIMS: Mapping[str, str] = {
    "outliers": "without batch norm training makes large isolated eigenvalues: λ1 and λ1 / λ10 grow",
    "concentrates": "without batch norm the gradient concentrates in the space of the ten largest: at least half of its square",
    "ratio": "with batch norm λ1 / λ10 is smaller than without",
    "fraction": "with batch norm less of the gradient lies in that space than without",
    "absent": "with batch norm that concentration is almost absent: at most a tenth (our threshold)",
    "negative": "negative eigenvalues fade: −λmin / λ1 falls by a factor of at least 10 in training (from notes on the paper)",
    "positive": "positive eigenvalues outweigh negative ones by far: 10 to 1 in Σ|λ| (from notes on the paper)",
    "drop": "a drop of the learning rate contracts the density (from notes on the paper)",
    "control": "it does so more than the same epochs without a drop (our control)",
}
"""What is judged; the published ones are those of the abstract and of notes on the paper, whose text was not at hand."""


def numbers(spectrum: Spectrum) -> dict[str, float | None]:
    """What is compared: loss, accuracy (test), lambda_max, ratio (of the largest to the tenth), fraction (of the squared
    gradient in the space of the ten largest), negative (the smallest eigenvalue, negated, over the largest), energy (the mean
    size of an eigenvalue), energies (the sum of the positive ones over that of the negative ones, negated).
    """
    whole = spectrum.numbers()
    positive, negative = spectrum.density.energy()
    largest, smallest = whole["lambda_max"], whole["lambda_min"]
    assert largest is not None
    assert smallest is not None
    return {
        "loss": spectrum.loss,
        "accuracy": spectrum.about.get("accuracy"),
        "lambda_max": largest,
        "ratio": whole["ratio"],
        "fraction": spectrum.gradient_fraction,
        "negative": max(0.0, -smallest) / largest if largest > 0 else None,
        "energy": positive + negative,
        "energies": positive / negative if negative > 0 else None,
    }


def _mean(values: Sequence[float], name: str) -> str:
    """Short enough for a table in 80 columns."""
    if not values:
        return "–"
    mean = statistics.mean_sd(values)[0]
    if name in ("accuracy", "fraction"):
        return f"{100 * mean:.0f}"
    return number(float(f"{mean:.2g}") if abs(mean) < 0.1 else mean)
