"""The catalogue of optimizers: what a name stands for, its usual learning rate, and what is worth tuning."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer, RMSprop

from conjugo._space import is_dtensor
from conjugo.errors import unknown
from conjugo.optim import CBLR, FRSGD, LAMB, LARS, MCLR, NLCG, AdaGradNorm, parameter_groups
from conjugo.optim.probed_steps import NAMES, ProbedStep
from conjugo.training.rivals import MuonAdamW, muon_groups, soap

__all__ = ["Entry", "Tunable", "build", "entry", "names"]


@dataclass(frozen=True)
class Tunable:
    """A hyperparameter and the interval worth searching.

    log: on a logarithmic scale. complement: on a logarithmic scale of 1 - value, for averages over about 1 / (1 - value)
    steps. closed: *high* is the largest value that there is, so that an optimum there is no reason to search further.
    """

    name: str
    low: float
    high: float
    log: bool
    complement: bool = False
    closed: bool = False


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An optimizer as users name it.

    factory: makes it from parameters and keyword arguments. lr: a learning rate to begin with; lr_range: the interval
    to tune it in, logarithmically. second: the hyperparameter that matters most besides the learning rate when steps
    are few, or None. groups: makes groups of the parameters of a model, by their roles; None: it treats all alike.
    options: keyword arguments that belong to the name. needs_loss: ``step(loss=...)`` wants the mean
    loss of the batch.
    """

    name: str
    factory: Callable[..., Optimizer]
    lr: float
    lr_range: tuple[float, float]
    second: Tunable | None = None
    groups: Callable[[nn.Module], list[dict[str, Any]]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    needs_loss: bool = False


# From averages over 3 gradients to 100; on digits, from batch 32 to the full one, nothing is gained beyond either.
_MOMENTUM = Tunable("momentum", 0.7, 0.99, log=False, complement=True)
_BETA1 = Tunable("beta1", 0.7, 0.99, log=False, complement=True)
_BETA_MAX = Tunable("beta_max", 0.8, 1.0, log=False, closed=True)
_FIRST_STEP = Tunable("first_step", 0.03, 3.0, log=True)


def _nlcg(name: str, lr: float = 0.1, lr_range: tuple[float, float] = (0.01, 10.0), **options: Any) -> Entry:
    return Entry(
        name=name,
        factory=NLCG,
        lr=lr,
        lr_range=lr_range,
        second=_BETA_MAX,
        options=options,
        needs_loss=options.get("line_search", "none") != "none",
    )


_ENTRIES = (
    _nlcg("nlcg", rule="fr", precond="bfgs"),
    _nlcg("nlcg-online", rule="fr", precond="bfgs", line_search="online"),
    _nlcg("nlcg-step", rule="fr", precond="bfgs", line_search="step"),
    _nlcg("nlcg-fr", rule="fr", precond="none"),
    _nlcg("nlcg-pr", rule="pr", precond="bfgs"),
    _nlcg("nlcg-hutchinson", rule="fr", precond="hutchinson"),
    _nlcg("nlcg-gauss-newton", rule="fr", precond="gauss-newton"),
    # <g, P g> hardly falls along a run with these, so that beta needs a limit.
    _nlcg("nlcg-adam", lr=0.002, lr_range=(1e-4, 0.1), rule="fr", precond="adam", beta_max=0.9),
    replace(
        _nlcg("nlcg-orthogonal", lr=0.01, lr_range=(5e-4, 0.3), rule="fr", precond="orthogonal", beta_max=0.9),
        groups=parameter_groups,
    ),
    _nlcg("nlcg-kron", lr=0.004, lr_range=(2e-4, 0.1), rule="fr", precond="kron", beta_max=0.9),
    Entry(name="sgd", factory=SGD, lr=0.1, lr_range=(0.01, 10.0)),
    Entry(name="momentum", factory=SGD, lr=0.1, lr_range=(0.01, 10.0), second=_MOMENTUM, options={"momentum": 0.9}),
    Entry(
        name="nesterov",
        factory=SGD,
        lr=0.1,
        lr_range=(0.01, 10.0),
        second=_MOMENTUM,
        options={"momentum": 0.9, "nesterov": True},
    ),
    Entry(name="frsgd", factory=FRSGD, lr=0.1, lr_range=(0.01, 10.0), second=_BETA_MAX),
    Entry(
        name="adagrad-norm",
        factory=AdaGradNorm,
        lr=30.0,
        lr_range=(1.0, 1000.0),
        second=_FIRST_STEP,
        options={"momentum": 0.9},
    ),
    Entry(name="adamw", factory=AdamW, lr=1e-3, lr_range=(3e-4, 0.3), second=_BETA1),
    # Rivals that treat weights as matrices; the latter wants the package pytorch_optimizer (extra bench).
    Entry(name="muon", factory=MuonAdamW, lr=0.015, lr_range=(1e-3, 0.5), second=_MOMENTUM, groups=muon_groups),
    Entry(name="soap", factory=soap, lr=0.016, lr_range=(1e-3, 0.3), second=_BETA1),
    # The baseline of Adya, Palakkode & Tuzel 2018: with an epsilon of 1 it is practically SGD with momentum.
    Entry(
        name="rmsprop",
        factory=RMSprop,
        lr=0.1,
        lr_range=(0.01, 10.0),
        second=_MOMENTUM,
        options={"alpha": 0.9, "momentum": 0.9, "eps": 1.0},
    ),
    Entry(name="lars", factory=LARS, lr=10.0, lr_range=(0.5, 100.0), second=_MOMENTUM),
    Entry(name="lamb", factory=LAMB, lr=1e-2, lr_range=(1e-3, 1.0), second=_BETA1),
    Entry(name="mclr", factory=MCLR, lr=1.0, lr_range=(0.1, 10.0), second=_MOMENTUM),
    Entry(name="cblr", factory=CBLR, lr=1.0, lr_range=(0.1, 10.0), second=_MOMENTUM),
    Entry(
        name="cblr-secant",
        factory=CBLR,
        lr=10.0,
        lr_range=(1.0, 100.0),
        second=_MOMENTUM,
        options={"estimator": "secant"},
    ),
)
_CATALOGUE = {item.name: item for item in _ENTRIES}


def names() -> tuple[str, ...]:
    """The names that :func:`entry` and :func:`build` know."""
    return tuple(_CATALOGUE)


def entry(name: str) -> Entry:
    """The optimizer called *name*; raises UnknownName, with the nearest names, if there is none."""
    if name not in _CATALOGUE:
        unknown("optimizer", name, names())
    return _CATALOGUE[name]


def build(
    name: str,
    params: nn.Module | Iterable[Tensor] | Iterable[dict[str, Any]],
    *,
    lr: float | None = None,
    weight_decay: float = 0.0,
    decay_vectors: bool = True,
    **options: Any,
) -> Optimizer:
    """The optimizer called *name* for *params*: tensors, parameter groups, or a model.

    Of a model, ``nlcg-orthogonal`` and ``muon`` leave out embeddings and heads (:func:`conjugo.optim.roles`); otherwise they
    go by the shapes of parameters, and both by ``precond`` or ``matrices`` alone where that is said. lr: None takes that of
    the catalogue, 1 with a *line_search* that looks at the batch again. weight_decay: coupled, but decoupled with ``adamw``,
    ``lamb``, ``muon`` and ``soap``. decay_vectors: whether it acts on parameters with one dimension too. options: keyword
    arguments of the optimizer, over those of the catalogue; ``beta1`` and ``beta2`` stand for the two parts of ``betas``.
    torch's own SGD and AdamW are the fused ones, on CPU and GPU, where torch has them for the parameters.

    Raises UnknownName for a name or an option that does not exist, and whatever the optimizer raises for bad values.

    >>> optimizer = build("adamw", [torch.zeros(2, requires_grad=True)], beta1=0.95)
    >>> optimizer.defaults["betas"], optimizer.defaults["fused"]
    ((0.95, 0.999), True)
    """
    found = entry(name)
    if isinstance(params, nn.Module):
        said = "precond" in options or options.get("matrices") is not None  # over what the groups would say
        by_role = found.groups is not None and not said
        params = found.groups(params) if by_role and found.groups else params.parameters()
    listed: list[Any] = [_listed(item) if isinstance(item, dict) else item for item in params]
    if not decay_vectors:
        listed = _without_decay(listed)
    if lr is None:  # a step size that looks at the batch again wants a factor near 1
        search = options.get("line_search")
        lr = 1.0 if isinstance(search, ProbedStep) or search in tuple(NAMES) else found.lr
    arguments = {"lr": lr, "weight_decay": weight_decay, **found.options, **options}
    _check_options(found, options)
    _join_betas(found, arguments)
    if _may_be_fused(found.factory, listed):
        arguments.setdefault("fused", True)
    return found.factory(listed, **arguments)


def _without_decay(listed: list[Any]) -> list[Any]:
    """Groups, with those parameters apart that have fewer than two dimensions, which are not decayed."""
    groups: list[dict[str, Any]] = listed if listed and isinstance(listed[0], dict) else [{"params": listed}]
    apart = []
    for group in groups:
        params = group["params"]
        apart.append({**group, "params": [p for p in params if p.ndim > 1]})
        apart.append({**group, "params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0})
    return [group for group in apart if group["params"]]


def _accepted(found: Entry) -> dict[str, Any]:
    """Name and default of what the factory accepts as an option."""
    parameters = inspect.signature(found.factory).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in ("params", "lr", "weight_decay")}


def _check_options(found: Entry, options: Mapping[str, Any]) -> None:
    accepted = _accepted(found)
    if "betas" in accepted:
        accepted |= {"beta1": None, "beta2": None}
    for option in options:
        if option not in accepted:
            unknown(f"option of optimizer {found.name!r}", option, accepted)


def _join_betas(found: Entry, arguments: dict[str, Any]) -> None:
    betas = arguments.get("betas", _accepted(found).get("betas"))
    if betas is not None:
        arguments["betas"] = (arguments.pop("beta1", betas[0]), arguments.pop("beta2", betas[1]))


def _listed(group: dict[str, Any]) -> dict[str, Any]:
    params = group["params"]
    return {**group, "params": [params] if isinstance(params, Tensor) else list(params)}


def _may_be_fused(factory: Callable[..., Optimizer], params: list[Any]) -> bool:
    first = params[0] if params else None  # none: the optimizer itself complains
    if isinstance(first, dict):
        first = next(iter(first["params"]), None)
    if factory not in (SGD, AdamW) or (isinstance(first, Tensor) and first.device.type not in ("cpu", "cuda")):
        return False
    # On a CPU the fused SGD of torch 2.13 hardly moves parameters in bfloat16, without a word.
    if isinstance(first, Tensor) and first.device.type == "cpu" and first.dtype not in (torch.float32, torch.float64):
        return False
    return not (factory is SGD and is_dtensor(first))  # torch has no fused SGD for DTensors
