"""The table of the contract: one row for each optimizer, with what it can and, where it cannot, why."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from conjugo.optim import CBLR, FRSGD, LAMB, LARS, MCLR, NLCG, AdaGradNorm
from conjugo.optim._fused import kernels
from conjugo.optim.curvature_preconditioners import Hutchinson
from conjugo.optim.kronecker import Kronecker
from conjugo.optim.orthogonal import Orthogonal
from conjugo.optim.probed_steps import Parabola, Subspace

CLAUSES = {
    "state from the start": "all state is allocated by the constructor",
    "own state type": "state of bfloat16 parameters is float32, and stays so when it is loaded",
    "skips what is not finite": "a step with NaN or infinity anywhere changes nothing, and is counted in skipped_steps",
    "dense only": "sparse gradients are refused",
    "names what is wrong": "bad options are refused with owner, argument, value and range; integer parameters too",
    "stays without gradient": "a parameter whose gradient is missing in some step is left alone in that step",
    "no gradient, no step": "a step in which no parameter has a gradient changes nothing",
    "gradients will do": "a step wants no more of gradients than their values",
    "no host": "a step reads no value from the device on the host",
    "size counts at once": "the first step depends on the size of the gradient",
    "moves at once": "the first step moves the parameters",
    "groups apart": "options of a group do not change the first step of another",
    "stays close": "numbers that are rounded otherwise (another type, another order of sums) change results as little",
}
"""The clauses from which a row may be exempt."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """An optimizer and how to use it.

    lr solves the convex problem of :mod:`tests.contract.problems`. vectors: state tensors of a parameter's own shape.
    beyond: numbers of state for a parameter beyond those and a dozen scalars.
    implementations: options that choose how the same step is computed; the first one is the specification. errors: bad
    options with what the message must say. exempt: clauses that do not hold, each with the reason.
    """

    name: str
    factory: Callable[..., Optimizer]
    lr: float
    vectors: int
    beyond: Callable[[torch.Tensor], int] = lambda p: 0
    options: Mapping[str, Any] = field(default_factory=dict)
    needs_loss: bool = False
    needs_graph: bool = False
    needs_curvature: bool = False
    implementations: Sequence[Mapping[str, Any]] = ({"foreach": False}, {"foreach": True})
    errors: Sequence[tuple[Mapping[str, Any], str]] = ()
    exempt: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert set(self.exempt) <= set(CLAUSES)

    def make(self, params: Any, **options: Any) -> Optimizer:
        return self.factory(params, **{"lr": self.lr, **self.options, **options})

    def step(
        self, optimizer: Optimizer, loss: torch.Tensor | float = 1.0, batch: tuple[Any, ...] | None = None
    ) -> None:
        """One step; the gradients are there. batch: where they come from."""
        if self.needs_graph:
            _grow_graphs(optimizer)
        if self.needs_curvature and optimizer.needs_curvature:
            params = [p for group in optimizer.param_groups for p in group["params"]]
            optimizer.observe([torch.full_like(p, 2 + 2j if p.is_complex() else 2.0) for p in params])
        if getattr(optimizer, "needs_batch", False):
            loss = -loss if optimizer.param_groups[0].get("maximize") else loss
        self.show(optimizer, loss, batch)
        optimizer.step(**({"loss": loss} if self.needs_loss else {}))

    def show(
        self, optimizer: Optimizer, loss: torch.Tensor | float = 1.0, batch: tuple[Any, ...] | None = None
    ) -> None:
        """Hand over the batch of the next step, if the optimizer wants it."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if getattr(optimizer, "needs_batch", False) and any(p.grad is not None for p in params):
            sign = -1 if optimizer.param_groups[0].get("maximize") else 1
            model = _Quadratic(params, loss, sign)
            optimizer.observe_batch(*(batch or (model, model.loss, torch.zeros(1))))


class _Quadratic(nn.Module):
    """A loss with the value *loss*, the gradients that the parameters have, and curvature 2 *sign*."""

    def __init__(self, params: Sequence[torch.Tensor], loss: torch.Tensor | float, sign: int) -> None:
        super().__init__()
        self.params = nn.ParameterList(params)
        self.used = [p for p in params if p.grad is not None]
        self.value = float(loss)
        self.sign = sign
        self.start = self(None).detach().clone()
        self.slope = torch.cat([_flat(p.grad.detach()) for p in self.used])

    def forward(self, _: Any) -> torch.Tensor:
        return torch.cat([_flat(p) for p in self.used])

    def loss(self, outputs: torch.Tensor, _: Any) -> torch.Tensor:
        moved = outputs - self.start.to(outputs.dtype)
        return self.value + (self.slope * moved).sum() + self.sign * moved.square().sum()


def _flat(p: torch.Tensor) -> torch.Tensor:
    return (torch.view_as_real(p) if p.is_complex() else p).flatten()


def _grow_graphs(optimizer: Optimizer) -> None:
    """Make the gradients, without changing them, those of a quadratic with curvature 2."""
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        if p.grad is not None and p.grad.layout == torch.strided:
            p.grad = p.grad.detach() + 2 * (p - p.detach())


def rows(clause: str | None = None) -> pytest.MarkDecorator:
    """The rows for which *clause* holds (or all) as the parameter ``row``."""
    assert clause is None or clause in CLAUSES
    return pytest.mark.parametrize("row", [r for r in ROWS if clause not in r.exempt], ids=lambda row: row.name)


def variants(clause: str | None = None) -> list[Row]:
    """The rows for which *clause* holds, once for each way in which the step is computed."""
    assert clause is None or clause in CLAUSES
    return [
        replace(r, name=f"{r.name}, {_words(chosen)}", options={**r.options, **chosen})
        for r in ROWS
        if clause not in r.exempt
        for chosen in r.implementations
    ]


def implementations(clause: str | None = None) -> pytest.MarkDecorator:
    """Like :func:`rows`, with :func:`variants`."""
    return pytest.mark.parametrize("row", variants(clause), ids=lambda row: row.name)


def cases(argument: str, clause: str | None, values: Callable[[Row], Sequence[Any]]) -> pytest.MarkDecorator:
    """The parameters ``row`` and *argument*: all :func:`variants`, each with those *values* that concern it."""
    found = [pytest.param(row, value, id=f"{row.name}, {value}") for row in variants(clause) for value in values(row)]
    return pytest.mark.parametrize(("row", argument), found)


def _words(chosen: Mapping[str, Any]) -> str:
    return "".join(name for name, value in chosen.items() if value) or "plain"


_LAYERWISE = (
    ({"lr": -0.1}, r"{}: lr must be a finite number >= 0 \(float or 0-d tensor\), got -0.1"),
    ({"lr": math.nan}, "{}: lr must be .*, got nan"),
    ({"lr": torch.ones(2)}, r"{}: lr must be .*, got tensor\(\[1., 1.\]\)"),
    ({"weight_decay": -1.0}, r"{}: weight_decay must be in \[0, inf\), got -1.0"),
    ({"weight_decay": math.nan}, "{}: weight_decay must be"),
    ({"trust_bounds": (2.0, 1.0)}, r"{}: trust_bounds must be a pair .* got \(2.0, 1.0\)"),
    ({"trust_bounds": (1.0,)}, "{}: trust_bounds must be a pair"),
)
_LARS = (
    ({"momentum": 1.0}, r"LARS: momentum must be in \[0, 1\), got 1.0"),
    ({"momentum": 0.0, "nesterov": True}, "LARS: momentum must be positive with nesterov=True, got 0.0"),
    ({"trust_coefficient": 0.0}, r"LARS: trust_coefficient must be in \(0, inf\), got 0.0"),
    ({"eps": -1.0}, r"LARS: eps must be in \[0, inf\), got -1.0"),
)
_LAMB = (
    ({"betas": (0.9, 1.0)}, r"LAMB: betas must be a pair in \[0, 1\), got \(0.9, 1.0\)"),
    ({"betas": (0.9,)}, "LAMB: betas must be a pair"),
    ({"eps": 0.0}, r"LAMB: eps must be in \(0, inf\), got 0.0"),
)
_CBLR = (
    *_LAYERWISE[:5],
    ({"momentum": 1.0}, r"{}: momentum must be in \[0, 1\), got 1.0"),
    ({"momentum": 0.0, "nesterov": True}, "{}: momentum must be positive with nesterov=True, got 0.0"),
    ({"trust": 0.0}, r"{}: trust must be in \(0, inf\), got 0.0"),
    ({"rate_bounds": (1.0, 1.0)}, r"{}: rate_bounds must be a pair .* got \(1.0, 1.0\)"),
    ({"rate_bounds": (-1.0, 1.0)}, "{}: rate_bounds must be a pair"),
    ({"fallback": -1.0}, r"{}: fallback must be in \[0, inf\), got -1.0"),
    ({"exempt_scale": -1.0}, r"{}: exempt_scale must be None or in \[0, inf\), got -1.0"),
    ({"sample": 7}, "{}: sample must be None or >= 8, got 7"),
)
_ESTIMATORS = (
    ({"estimator": "secants"}, "unknown CBLR estimator 'secants'; did you mean 'secant'"),
    ({"statistic": "modian"}, "unknown CBLR statistic 'modian'; did you mean 'median'"),
    ({"quantile": 0.5}, "CBLR: quantile must be None unless statistic='quantile', got 0.5"),
    ({"statistic": "quantile"}, r"CBLR: quantile must be in \(0, 1\) with statistic='quantile', got None"),
    ({"statistic": "quantile", "quantile": 1.0}, r"CBLR: quantile must be in \(0, 1\) .* got 1.0"),
    ({"ema": 1.0}, r"CBLR: ema must be in \[0, 1\), got 1.0"),
    ({"every": 0}, "CBLR: every must be an integer >= 1, got 0"),
)
_NLCG = (
    ({"lr": -0.1}, "NLCG: lr must be a finite number >= 0 .*, got -0.1"),
    ({"lr": math.inf}, "NLCG: lr must be .*, got inf"),
    ({"rule": "frr"}, "unknown NLCG rule 'frr'; did you mean 'fr'"),
    ({"rule": "constnt"}, "unknown NLCG rule 'constnt'; did you mean 'constant'"),
    ({"precond": "adamw"}, "unknown NLCG precond 'adamw'; did you mean 'adam'"),
    ({"precond": "ortogonal"}, "unknown NLCG precond 'ortogonal'; did you mean 'orthogonal'"),
    ({"precond": "krom"}, "unknown NLCG precond 'krom'; did you mean 'kron'"),
    ({"precond": "bfgss"}, "unknown NLCG precond 'bfgss'; did you mean 'bfgs'"),
    ({"line_search": "onlin"}, "unknown NLCG line_search 'onlin'; did you mean 'online'"),
    ({"removal": "previus"}, "unknown NLCG removal 'previus'; did you mean 'previous'"),
    ({"mode": "exakt"}, "unknown NLCG mode 'exakt'; did you mean 'exact'"),
    ({"scope": "globl"}, "unknown NLCG scope 'globl'; did you mean 'global'"),
    ({"grad_scale": [1.0]}, r"NLCG: grad_scale must be a number, or 3 numbers, .* got \[1.0\]"),
    ({"foreach": True, "fused": True}, "NLCG: foreach must be False or None together with fused=True, got True"),
    ({"period": 0}, "NLCG: period must be an integer >= 1, got 0"),
    ({"threshold": 0.0}, "NLCG: threshold must be .*, got 0.0"),
    ({"weight_decay": -1.0}, r"NLCG: weight_decay must be in \[0, inf\), got -1.0"),
    ({"lars": 0.0}, r"NLCG: lars must be None or in \(0, inf\), got 0.0"),
    ({"beta_max": 1.5}, r"NLCG: beta_max must be in \[0, 1\], got 1.5"),
    ({"precond": "hutchison"}, "unknown NLCG precond 'hutchison'; did you mean 'hutchinson'"),
    ({"h0": 0.0}, "NLCG: h0 must be .*, got 0.0"),
    ({"h_bounds": (0.0, 1.0)}, r"NLCG: h_bounds must be \(low, high\) with 0 < low < high, got \(0.0, 1.0\)"),
)

_SCOPED = (
    ({"lr": -0.1}, r"{}: lr must be a finite number >= 0 \(float or 0-d tensor\), got -0.1"),
    ({"lr": math.nan}, "{}: lr must be .*, got nan"),
    ({"weight_decay": -1.0}, r"{}: weight_decay must be in \[0, inf\), got -1.0"),
    ({"scope": "globl"}, "unknown {} scope 'globl'; did you mean 'global'"),
    ({"foreach": True, "fused": True}, "{}: foreach must be False or None together with fused=True, got True"),
)
_FRSGD = (
    ({"beta_max": 1.5}, r"FRSGD: beta_max must be in \[0, 1\], got 1.5"),
    ({"beta_min": 0.9, "beta_max": 0.5}, r"FRSGD: beta_min must be in \[0, 0.5\] \(beta_max\), got 0.9"),
    ({"restart_every": 0}, "FRSGD: restart_every must be an integer >= 1 or None, got 0"),
)
_ADAGRAD_NORM = (
    ({"b0": 1.0, "first_step": 0.1}, "AdaGradNorm: the start must be one of b0, first_step and distance, got 'b0 and"),
    ({"b0": 1.0, "distance": True}, "AdaGradNorm: the start must be one of .*, got 'b0 and distance'"),
    ({"b0": None, "scope": "row"}, "AdaGradNorm: b0 must be given with scope='row', and nothing else, got None"),
    ({"b0": -1.0}, r"AdaGradNorm: b0 must be in \[0, inf\), got -1.0"),
    ({"b0": None, "first_step": 0.0}, r"AdaGradNorm: first_step must be in \(0, inf\), got 0.0"),
    (
        {"b0": None, "distance": True, "initial_distance": 0.0},
        r"AdaGradNorm: initial_distance must be in \(0, inf\), got 0.0",
    ),
    ({"bounds": (1.0, 0.5)}, r"AdaGradNorm: bounds must be a pair .*, got \(1.0, 0.5\)"),
    ({"momentum": 1.0}, r"AdaGradNorm: momentum must be in \[0, 1\), got 1.0"),
)

_TORCH = {
    "state from the start": "torch allocates in the first step",
    "own state type": "torch keeps state in the parameter's type and casts what is loaded",
    "skips what is not finite": "torch leaves that to GradScaler and the training loop",
    "names what is wrong": "torch has messages of its own",
    "no host": "AdamW reads its step counter on the host unless capturable",
}
_FIXED_SET = "beta compares gradients of the same parameters, so a set that changes is refused"
_LISTS = ({"foreach": False}, {"foreach": True})
_ON_HOST = ({"foreach": False, "fused": False}, {"foreach": True, "fused": False}) + (
    ({"fused": True},) if kernels else ()
)


def _scoped(name: str, factory: Callable[..., Optimizer], lr: float, vectors: int, **options: Any) -> Row:
    errors = {FRSGD: _FRSGD, AdaGradNorm: _ADAGRAD_NORM}[factory]
    return Row(
        name=f"{factory.__name__} {name}",
        factory=factory,
        lr=lr,
        vectors=vectors,
        options=options,
        implementations=_ON_HOST,
        errors=errors + tuple((bad, said.format(factory.__name__)) for bad, said in _SCOPED)
        if name == "as it is"
        else (),
    )


def _nlcg(
    name: str,
    vectors: int,
    *,
    lr: float = 0.5,
    exempt: Mapping[str, str] | None = None,
    needs: str | None = None,
    beyond: Callable[[torch.Tensor], int] = lambda p: 0,
    implementations: Sequence[Mapping[str, Any]] | None = None,
    **options: Any,
) -> Row:
    searching = options.get("line_search", "none") != "none"
    errors = () if options else _NLCG
    options.setdefault("precond", "bfgs")
    return Row(
        name=f"NLCG {name}",
        factory=NLCG,
        lr=lr,
        vectors=vectors,
        beyond=beyond,
        options=options,
        needs_loss=searching,
        needs_graph=needs == "graph",
        needs_curvature=needs == "curvature",
        implementations=implementations or (_LISTS if needs else _ON_HOST),
        errors=errors,
        exempt={"stays without gradient": _FIXED_SET} | dict(exempt or {}),
    )


def two_dimensional(p: torch.Tensor) -> bool:
    """What the rows below take for a matrix: also small ones, and no kernels."""
    return p.ndim == 2


def _factors(p: torch.Tensor) -> int:
    """Numbers in two means and two bases."""
    return sum(2 * n * n for n in p.shape) if p.ndim == 2 else 0


_SIGNS = {"size counts at once": "the first step is the sign of the gradient"}
_ADAM = {"lr": 0.1, "beta_max": 0.8, "implementations": _LISTS}
_KRON = {
    **_ADAM,
    "beyond": _factors,
    "exempt": {
        "size counts at once": "the first step only learns",
        "moves at once": "the first step only learns",
        "stays close": "where no gradient has shown anything yet the basis is arbitrary",
        "no host": "the host decides when to renew the basis",
    },
}


_PROBED = {
    "lr": 1.0,
    "implementations": _LISTS,
    "exempt": {
        "gradients will do": "they want the batch",
        "no host": "the host decides on the step size",
        "groups apart": "there is one step size for all",
    },
}
_PARABOLA = {
    **_PROBED,
    "exempt": {**_PROBED["exempt"], "stays close": "a trial is rounded to the type of the parameters"},
}


def _cblr(
    name: str, vectors: int, *, needs_graph: bool = False, exempt: Mapping[str, str] | None = None, **options: Any
) -> Row:
    return Row(
        name=f"CBLR {name}",
        factory=CBLR,
        lr=1.0,
        vectors=vectors,
        options=options,
        needs_graph=needs_graph,
        implementations=_ON_HOST,
        exempt=exempt or {},
    )


ROWS = (
    Row(
        name="SGD with momentum",
        factory=SGD,
        lr=0.05,
        vectors=1,
        options={"momentum": 0.9},
        exempt={**_TORCH, "dense only": "torch's SGD takes sparse gradients"},
    ),
    Row(name="AdamW", factory=AdamW, lr=0.1, vectors=2, options={"weight_decay": 0.0}, exempt=_TORCH),
    Row(
        name="LARS",
        factory=LARS,
        lr=3.0,
        vectors=1,
        options={"trust_coefficient": 0.005},
        errors=_LARS + tuple((bad, message.format("LARS")) for bad, message in _LAYERWISE),
    ),
    Row(
        name="LARS nesterov",
        factory=LARS,
        lr=2.0,
        vectors=1,
        options={"nesterov": True, "trust_coefficient": 0.003, "weight_decay": 1e-4},
    ),
    Row(
        name="LAMB",
        factory=LAMB,
        lr=0.2,
        vectors=2,
        errors=_LAMB + tuple((bad, message.format("LAMB")) for bad, message in _LAYERWISE),
    ),
    Row(name="LAMB everywhere", factory=LAMB, lr=0.2, vectors=2, options={"adapt_vectors": True, "weight_decay": 1e-4}),
    Row(
        name="CBLR",
        factory=CBLR,
        lr=1.0,
        vectors=1,
        implementations=_ON_HOST,
        errors=_ESTIMATORS + tuple((bad, message.format("CBLR")) for bad, message in _CBLR),
    ),
    _cblr("secant", 3, estimator="secant", weight_decay=1e-4, nesterov=True),
    _cblr("secant median", 3, estimator="secant", statistic="median"),
    _cblr("fisher", 2, estimator="fisher", statistic="mean"),
    _cblr(
        "hutchinson",
        1,
        estimator="hutchinson",
        every=2,
        needs_graph=True,
        exempt={
            "gradients will do": "gradients need a graph",
            "no host": "the host decides whether to multiply with the Hessian",
        },
    ),
    Row(
        name="MCLR",
        factory=MCLR,
        lr=10.0,
        vectors=1,
        implementations=_ON_HOST,
        errors=tuple((bad, message.format("MCLR")) for bad, message in _CBLR),
    ),
    _scoped("as it is", FRSGD, 0.05, 1),
    _scoped("per tensor", FRSGD, 0.05, 1, scope="tensor", beta_max=0.9),
    _scoped("nesterov", FRSGD, 0.05, 1, nesterov=True, beta_max=0.9, weight_decay=1e-4, decoupled=True),
    _scoped("lr in buffer", FRSGD, 0.05, 1, lr_in_buffer=True, beta_max=0.9, weight_decay=1e-4, scope="group"),
    _scoped("as it is", AdaGradNorm, 5.0, 0, b0=0.1),
    _scoped("momentum", AdaGradNorm, 10.0, 1, momentum=0.5, first_step=2.0, weight_decay=1e-4),
    _scoped("per tensor", AdaGradNorm, 5.0, 0, b0=0.1, scope="tensor", weight_decay=1e-4, decoupled=False),
    _scoped("per group", AdaGradNorm, 5.0, 0, b0=0.1, scope="group"),
    _scoped("distance", AdaGradNorm, 1.0, 1, distance=True, initial_distance=0.01),
    _nlcg("fr bfgs", 3),
    _nlcg("fr", 1, precond="none"),
    _nlcg("pr bfgs", 3, rule="pr"),
    _nlcg("pr", 2, rule="pr", precond="none"),
    _nlcg("online", 3, line_search="online"),
    _nlcg("step", 3, line_search="step", period=3),
    _nlcg("reference", 3, mode="reference"),
    _nlcg("reference step", 3, mode="reference", line_search="step"),
    _nlcg("per group", 3, scope="group"),
    _nlcg("per tensor", 3, scope="tensor"),
    _nlcg("decoupled", 3, weight_decay=1e-4, decoupled=True),
    _nlcg("lars", 3, lr=2.0, lars=0.01),
    _nlcg(
        "missing is zero",
        3,
        allow_missing=True,
        exempt={
            "stays without gradient": "the gradient counts as zero, and the direction goes on",
            "no gradient, no step": "all gradients count as zero then",
        },
    ),
    _nlcg(
        "hutchinson",
        2,
        precond=Hutchinson(every=2),
        needs="graph",
        exempt={"gradients will do": "gradients need a graph", "no host": "the host decides when to measure"},
    ),
    _nlcg(
        "hutchinson pr per tensor",
        3,
        precond=Hutchinson(probes=2, positive="rms", newton=True),
        rule="pr",
        scope="tensor",
        weight_decay=1e-4,
        needs="graph",
        exempt={"gradients will do": "gradients need a graph", "no host": "the host decides when to measure"},
    ),
    _nlcg(
        "gauss-newton",
        2,
        precond="gauss-newton",
        needs="curvature",
        exempt={"gradients will do": "curvature must be measured", "no host": "the host decides when to measure"},
    ),
    _nlcg("restarts", 3, restart_on_ascent=True, beta_max=0.9, weight_decay=1e-4),
    _nlcg("constant", 3, rule="constant", beta_max=0.5, lr=0.2),
    _nlcg("constant, no preconditioner", 1, rule="constant", beta_max=0.8, precond="none", lr=0.1),
    _nlcg("adam", 2, precond="adam", exempt=_SIGNS, **_ADAM),
    _nlcg("adam nesterov", 2, precond="adam", nesterov=True, exempt=_SIGNS, **_ADAM),
    _nlcg("adam pr per tensor", 3, precond="adam", rule="pr", scope="tensor", exempt=_SIGNS, **_ADAM),
    _nlcg("orthogonal", 1, precond=Orthogonal(matrices=two_dimensional), **_ADAM),
    _nlcg(
        "orthogonal pr per group", 2, precond=Orthogonal(matrices=two_dimensional), rule="pr", scope="group", **_ADAM
    ),
    _nlcg("kron", 2, precond=Kronecker(matrices=two_dimensional, period=2), **_KRON),
    _nlcg(
        "kron constant per tensor",
        2,
        precond=Kronecker(matrices=two_dimensional, period=1),
        rule="constant",
        scope="tensor",
        **_KRON,
    ),
    _nlcg("kron pr decay", 3, precond=Kronecker(matrices=two_dimensional), rule="pr", weight_decay=1e-4, **_KRON),
    _nlcg("parabola", 1, precond="none", line_search="parabola", **_PARABOLA),
    _nlcg("parabola bfgs decay", 3, line_search=Parabola(growth=3.0), precond="bfgs", weight_decay=1e-4, **_PARABOLA),
    _nlcg("subspace", 1, precond="none", line_search="subspace", **_PROBED),
    _nlcg("subspace adam", 2, precond="adam", line_search=Subspace(fraction=1.0), **_PROBED),
)
