"""Cai, Li & Shen 2019: what batch norm does to gradient descent, on least squares and in networks, in four parts.

Maps: d = 100, H = diag(logspace(0, log10 kappa, d)) for kappa 80 and 1280, u uniform on the sphere, 2,000 steps, 43 learning
rates of w from 1e-5 to 1e16 and 41 of a from 1e-10 to 1, from w0 uniform on the sphere and from w0 = Hu / |Hu|; gradient
descent beside it.

Widths: the learning rates that are good, for d from 25 to 1,600, by the asymptotes and by runs.

Data: steps to an excess of 1e-6 S on diabetes and 1e-3 S on breast_cancer, standardised (also the targets), of gradient
descent from 0 and of BNGD from five random starts with a0 = 1.

Networks: see :mod:`conjugo.studies.reproduce.bngd_networks`.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from conjugo._files import write_aside
from conjugo.errors import check
from conjugo.scaling import bngd
from conjugo.scaling.bngd import OLS
from conjugo.studies.bngd import least_squares, taken
from conjugo.studies.reproduce.bngd_networks import (
    VARIANTS,
    ImagePlan,
    NetworkPlan,
    conditioning,
    image_run,
    law_of_scale,
    sweep,
)
from conjugo.studies.reproduce.grids import open_folder, save
from conjugo.studies.reproduce.paper import Claim, NotRun, Paper, Request, new_table, sentences
from conjugo.studies.runs import load_data, versions
from conjugo.training import TrainConfig
from conjugo.training.machine import choose_device

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["PAPER", "BngdImages", "BngdPlan", "BngdResult", "experiment", "images"]

STARTS: Mapping[str, str] = {"random": "w0 random", "g": "w0 = Hu / |Hu|"}

WIDTHS: Mapping[str, str] = {"asymptotes": "by the asymptotes", "late": "by the late ones", "runs": "by runs"}

EXPECTED_SWEEP: Mapping[str, Mapping[float, float]] = {
    "plain": {0.1: 0.61, 0.316: 0.185, 1.0: 0.079, 3.16: 2.31, 10.0: 2.33, 100.0: 44.0, 1000.0: 429.0},
    "bn": {0.1: 0.111, 0.316: 0.035, 1.0: 0.013, 3.16: 0.007, 10.0: 0.008, 100.0: 0.033, 1000.0: 0.48},
    "own": {0.1: 0.11, 0.316: 0.09, 1.0: 0.087, 3.16: 0.091, 10.0: 0.10, 100.0: 0.19, 1000.0: 0.61},
}
"""Final training loss on digits by learning rate of a first, throw-away implementation, means of two seeds."""

USABLE = 0.15
"""Training loss on digits up to which a learning rate counts as usable."""

Parts = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class BngdPlan:
    """All that the parts depend on.

    starts: of each dimension; run_starts: of those, how many are also run. long: steps of the runs with small learning rates.
    data: by name, the part of S up to which the excess is to fall.
    """

    d: int = 100
    kappas: tuple[float, ...] = (80.0, 1280.0)
    steps: int = 2000
    long: int = 40_000
    lrs: int = 43
    lr_as: int = 41
    dimensions: tuple[int, ...] = (25, 100, 400, 1600)
    starts: int = 15
    run_starts: int = 5
    data: Mapping[str, float] = field(default_factory=lambda: {"diabetes": 1e-6, "breast_cancer": 1e-3})
    data_steps: int = 20_000
    data_lrs: int = 61
    data_starts: int = 5
    networks: NetworkPlan = field(default_factory=NetworkPlan)

    def learning_rates(self) -> Tensor:
        """Of w, [lrs]."""
        return torch.logspace(-5, 16, self.lrs, dtype=torch.float64)

    def problem(self, d: int, kappa: float, seed: int) -> tuple[OLS, Tensor]:
        """The least squares, and a start, both from *seed*."""
        u, w = torch.randn(2, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        lam = torch.logspace(0, math.log10(kappa), d, dtype=torch.float64)
        return OLS(lam, u=u / u.norm()), w / w.norm()


# The parts --------------------------------------------------------------------------------------------------------------------


def maps(plan: BngdPlan) -> dict[str, Any]:
    """By condition number and start: the map over both learning rates, and its column lr_a = 1 in detail."""
    lrs, lr_as = plan.learning_rates(), torch.logspace(-10, 0, plan.lr_as, dtype=torch.float64)
    found: dict[str, Any] = {}
    for kappa in plan.kappas:
        problem, w = plan.problem(plan.d, kappa, seed=0)
        spectrum = problem.spectrum()
        descent = bngd.run(problem, lrs, w0=w, steps=plan.steps, method="gd", record=None)
        cases = {}
        for name, start in (("random", w), ("g", problem.g / problem.g.norm())):
            grid = bngd.convergence_map(problem, lrs, lr_as, plan.steps, start)
            alone = bngd.run(problem, lrs, w0=start, steps=plan.steps, record=None)
            ends = bngd.asymptotes(problem, start)
            small = [share * ends.plateau[0] for share in (0.02, 0.05, 0.1)]
            slow = bngd.run(problem, small, w0=start, steps=plan.long, record=None)
            cases[name] = {
                "counts": grid.counts(),
                "relative": _rounded(grid.relative),
                "excess": _rounded(alone.excess[:, 0] / problem.S),
                "rate": _rounded(alone.rate),
                "predicted": _rounded([spectrum.bn_rate(eff) ** 2 for eff in alone.eff_lr[:, 0].tolist()]),
                "edge": _rounded(alone.eff_lr[:, 0] / spectrum.eff_lr_max),
                "status": alone.status,
                "small": [small, _rounded(slow.eff_lr[:, 0] / spectrum.eff_lr_max)],
                "asymptotes": asdict(ends),
            }
        found[f"{kappa:g}"] = {
            "kappa_star": spectrum.kappa_star,
            "gd_lr_max": spectrum.gd_lr_max,
            "gd_rate_opt": spectrum.gd_rate_opt**2,
            "bn_rate_opt": spectrum.bn_rate_opt**2,
            "eff_lr_max": spectrum.eff_lr_max,
            "gd": {
                "excess": _rounded(descent.excess[:, 0] / problem.S),
                "rate": _rounded(descent.rate),
                "status": descent.status,
            },
            "starts": cases,
        }
    return found


def widths(plan: BngdPlan) -> dict[str, Any]:
    """By dimension: upper over lower end of the good learning rates, by the asymptotes and, of some starts, by runs."""
    kappa = plan.kappas[0]
    lrs = torch.logspace(-4, 8, 97, dtype=torch.float64)
    found: dict[str, Any] = {}
    for d in plan.dimensions:
        problems = [plan.problem(d, kappa, seed=1000 + k) for k in range(plan.starts)]
        ends = [bngd.asymptotes(problem, start) for problem, start in problems]
        measured = []
        for problem, start in problems[: plan.run_starts]:
            run = bngd.run(problem, lrs, w0=start, steps=plan.steps, record=None)
            near = lrs[run.eff_lr[:, 0] >= 0.5 * problem.spectrum().eff_lr_max]
            measured.append(float(near.max() / near.min()) if len(near) else 1.0)
        found[f"{d}"] = {
            "asymptotes": [end.width for end in ends],
            "late": [end.width * end.C2_late / end.C2 for end in ends],
            "runs": measured,
        }
    return found


def data(plan: BngdPlan) -> dict[str, Any]:
    """By data set: condition numbers, and steps to the excess that is wanted; None: not within the budget."""
    found: dict[str, Any] = {}
    for name, tol in plan.data.items():
        problem = least_squares(name)
        spectrum = problem.spectrum()
        shares = (0.99, 0.5, 0.1, 0.01, 1.01)
        rates = [share * spectrum.gd_lr_max for share in shares]
        descent = bngd.run(problem, rates, method="gd", steps=plan.data_steps, tol=tol, record=None)
        lrs = torch.logspace(-6, 6, plan.data_lrs, dtype=torch.float64)
        steps = []
        for seed in range(plan.data_starts):
            run = bngd.run(problem, lrs, a0=1.0, steps=plan.data_steps, tol=tol, record=None, seed=seed)
            steps.append(taken(run))
        found[name] = {
            "d": problem.d,
            "kappa": spectrum.kappa,
            "kappa_star": spectrum.kappa_star,
            "gd_lr_max": spectrum.gd_lr_max,
            "gd": dict(zip([f"{share:g}" for share in shares], taken(descent))),
            "lrs": lrs.tolist(),
            "bngd": steps,
        }
    return found


def _rounded(values: Tensor | Sequence[float]) -> list[Any]:
    """Plain values of nine digits, in nested lists; None: not finite."""
    if isinstance(values, Tensor):
        values = values.tolist()
    return [
        _rounded(value) if isinstance(value, list) else float(f"{value:.9g}") if math.isfinite(value) else None
        for value in values
    ]


PARTS: Mapping[str, Callable[[BngdPlan], Any]] = {
    "maps": maps,
    "widths": widths,
    "data": data,
    "sweep": lambda plan: sweep(plan.networks),
    "scale": lambda plan: law_of_scale(plan.networks),
    "layers": lambda plan: conditioning(plan.networks),
}


def experiment(
    request: Request, *, plan: BngdPlan | None = None, parts: Mapping[str, Callable[[BngdPlan], Any]] = PARTS
) -> BngdResult:
    """Do the experiment; parts: what does each of them (stand-ins for tests)."""
    from conjugo.studies.reproduce import bngd_figures

    _alone(request)
    plan = BngdPlan() if plan is None else plan
    out = request.out
    if out is not None:
        description = {"paper": "bngd", "scale": "cpu", "workers": 1, **asdict(plan)}
        open_folder(out, json.loads(json.dumps(description)), resume=request.resume)
    shown = sys.stderr.isatty() if request.progress is None else request.progress
    found = {}
    for name, compute in parts.items():
        if shown:
            print(f"bngd: {name}", file=sys.stderr)
        found[name] = _kept(None if out is None else out / f"{name}.json", partial(compute, plan))
    result = BngdResult(plan, found, versions(TrainConfig(data="digits")))
    if out is not None:
        save(result.to_dict(), bngd_figures.drawn(result), out)
    return result


def _alone(request: Request) -> None:
    for name in ("jobs", "workers"):
        value = getattr(request, name)
        check(value == 1, "reproduce", name, value, "1 for bngd, whose runs are done one after another")


def _kept(path: Path | None, compute: Callable[[], Any]) -> Any:
    """What *compute* gives, as JSON has it, from the file if an earlier run has left it there."""
    if path is not None and path.exists():
        return json.loads(path.read_bytes())
    text = json.dumps(compute(), allow_nan=False)
    if path is not None:
        write_aside(path, text)
    return json.loads(text)


@dataclass(frozen=True)
class BngdResult:
    """What the parts have found, by their names."""

    plan: BngdPlan
    parts: Parts
    versions: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "paper": "bngd",
            "scale": "cpu",
            "plan": json.loads(json.dumps(asdict(self.plan))),
            "versions": dict(self.versions),
            **self.parts,
            "claims": [claim.to_dict() for claim in self.claims()],
        }

    # ---- tables ----

    def tables(self) -> list[RenderableType]:
        """Least squares, widths, data, networks."""
        return [self._maps_table(), self._widths_table(), self._data_table(), self._sweep_table(), self._layers_table()]

    def _maps_table(self) -> RenderableType:
        lrs = self.plan.learning_rates().tolist()
        shown = [min(range(len(lrs)), key=lambda i: abs(math.log10(lrs[i]) - p)) for p in (-4, -2, 0, 2, 4, 8)]
        table = new_table(
            f"Least squares, d = {self.plan.d}, {self.plan.steps:,} steps: excess / S · effective learning rate / its bound",
            "By the learning rate of w; that of a is 1. The bound is 2 / the largest eigenvalue of H*.",
        )
        for i in shown:
            table.add_column(f"{lrs[i]:.0e}", justify="right", no_wrap=True)
        for kappa, case in self.parts["maps"].items():
            table.add_row(f"κ {kappa}: gradient descent", *(_number(case["gd"]["excess"][i]) for i in shown))
            for start, run in case["starts"].items():
                cells = [f"{_number(run['excess'][i])} · {_number(run['edge'][i])}" for i in shown]
                table.add_row(f"κ {kappa}: BNGD, {STARTS[start]}", *cells)
        return table

    def _widths_table(self) -> RenderableType:
        plan = self.plan
        table = new_table(
            f"Upper over lower end of the good learning rates, κ = {plan.kappas[0]:g}: medians",
            f"By the asymptotes: of {plan.starts} problems, before a run with a large learning rate has moved, and when it has "
            f"converged. By runs: effective learning rate at least half of its bound after {plan.steps:,} steps, of "
            f"{plan.run_starts} problems.",
        )
        found = self.parts["widths"]
        for d in found:
            table.add_column(f"d = {d}", justify="right")
        for name, label in WIDTHS.items():
            table.add_row(label, *(f"{statistics.median(case[name]):.3g}" for case in found.values()))
        return table

    def _data_table(self) -> RenderableType:
        table = new_table(
            "Data: steps to an excess of " + ", ".join(f"{tol:g} S ({name})" for name, tol in self.plan.data.items()),
            f"At most {self.plan.data_steps:,}. Gradient descent at a part of 2 / λmax. BNGD: least and most over "
            f"{self.plan.data_starts} starts, of the steps at the best of {self.plan.data_lrs} learning rates; of the range of "
            "those within twice as many steps; of the range of those that converge.",
        )
        for column in ("κ", "κ*", "GD 0.99", "0.5", "0.1", "0.01", "BNGD, best", "within twice", "converges"):
            table.add_column(column, justify="right")
        for name, case in self.parts["data"].items():
            descent = [_steps(case["gd"][share]) for share in ("0.99", "0.5", "0.1", "0.01")]
            found = zip(*(one for one in self.ranges(name) if one is not None))
            ours = [f"{min(values):,.0f} to {max(values):,.0f}" for values in found] or ["–"] * 3
            table.add_row(
                f"{name} (d = {case['d']})", f"{case['kappa']:,.1f}", f"{case['kappa_star']:,.1f}", *descent, *ours
            )
        return table

    def _sweep_table(self) -> RenderableType:
        plan = self.plan.networks
        table = new_table(
            f"Digits: training loss after {plan.steps} steps, by learning rate",
            f"Means of {plan.seeds} seeds; nan: not finite. In square brackets: a first implementation.",
        )
        for lr in plan.lrs:
            table.add_column(f"{lr:g}", justify="right", no_wrap=True)
        for variant, label in VARIANTS.items():
            cells = []
            for lr, loss in zip(plan.lrs, self.losses(variant)):
                expected = EXPECTED_SWEEP[variant].get(lr)
                cells.append(f"{loss:.2g}" + ("" if expected is None else f" [dim]\\[{expected:g}][/]"))
            table.add_row(label, *cells)
        return table

    def _layers_table(self) -> RenderableType:
        table = new_table(
            "Digits: the Hessian of each layer, largest eigenvalue · over the median of the sizes",
            "Effective: without the directions of the rows. Without batch norm there is only the raw block.",
        )
        for column in ("parameters", "raw", "effective"):
            table.add_column(column, justify="right")
        for c in self.parts["layers"]:
            raw = f"{_number(c['raw_lam_max'])} · {_ratio(c, 'raw_'):,.0f}"
            effective = f"{_number(c['lam_max'])} · {_ratio(c, ''):,.0f}" if c["network"] == "bn" else "–"
            network = {"bn": "BN", "plain": "plain"}[c["network"]]
            table.add_row(f"{network}, layer {c['layer']}, {c['moment']}", str(c["parameters"]), raw, effective)
        return table

    # ---- numbers ----

    def losses(self, variant: str) -> list[float]:
        """Mean final loss on digits for each learning rate; NaN where a run was not finite."""
        found = self.parts["sweep"][variant]
        return [math.nan if None in losses else statistics.fmean(losses) for losses in found]

    def usable(self, variant: str) -> float:
        """Largest over smallest learning rate whose loss on digits is at most USABLE; NaN without any."""
        good = [lr for lr, loss in zip(self.plan.networks.lrs, self.losses(variant)) if loss <= USABLE]
        return max(good) / min(good) if good else math.nan

    def ranges(self, name: str) -> list[tuple[int, float, float] | None]:
        """Of BNGD on a data set, from each start: fewest steps, the range of lr within twice as many, that which converges."""
        case = self.parts["data"][name]
        found: list[tuple[int, float, float] | None] = []
        for steps in case["bngd"]:
            done = {lr: count for lr, count in zip(case["lrs"], steps) if count is not None}
            if not done:
                found.append(None)
                continue
            best = min(done.values())
            near = [lr for lr, count in done.items() if count <= 2 * best]
            found.append((best, max(near) / min(near), max(done) / min(done)))
        return found

    def slope(self, name: str) -> float:
        """Of the logarithm of the median width against that of d."""
        found = self.parts["widths"]
        points = [(math.log(float(d)), math.log(statistics.median(case[name]))) for d, case in found.items()]
        return statistics.linear_regression(*zip(*points)).slope if len(points) > 1 else math.nan

    # ---- claims ----

    def text(self) -> str:
        """What reproduced and what did not."""
        notes = [
            "Of the paper we had the abstract and the authors' programs, not the text; the settings of least squares come "
            "from notes of others. In those programs the convolutional networks with batch norm do not use their second "
            "convolution, so that their curves are of smaller networks than the plain ones, and are not compared here.",
            "From w0 = Hu / |Hu| a giant first step lands beside the saddle: what comes of a large learning rate depends on "
            "the start.",
            "On digits, with weights times r and learning rates times r^2, losses are "
            + " and ".join(f"{_apart(losses):.1g} apart for eps {eps}" for eps, losses in self.parts["scale"].items())
            + " (relative): the eps of batch norm breaks the law.",
        ]
        return sentences(self.claims(), notes)

    def claims(self) -> list[Claim]:
        """What was published or expected, judged by the runs."""
        cases = {
            f"κ {kappa}, {STARTS[start]}": (case, run)
            for kappa, case in self.parts["maps"].items()
            for start, run in case["starts"].items()
        }
        return [
            Claim(
                "no pair of learning rates makes BNGD diverge, and gradient descent diverges above 2 / λmax only",
                {name: self._robust(case, run) for name, (case, run) in cases.items()},
            ),
            Claim(
                f"BNGD converges for every pair of learning rates within {self.plan.steps:,} steps (the theorem speaks of "
                "infinitely many)",
                {name: self._complete(run) for name, (_, run) in cases.items()},
            ),
            Claim(
                "convergence is linear, at the rate max |1 - lr* λ*| that the last effective learning rate lr* predicts "
                "(within 5 % of its logarithm)",
                {name: self._linear(run) for name, (_, run) in cases.items()},
            ),
            Claim(
                "the effective condition number is at most the plain one",
                {
                    name: (star <= kappa, f"{star:,.1f} against {kappa:,.1f}")
                    for name, star, kappa in [
                        *((f"κ {k}", c["kappa_star"], float(k)) for k, c in self.parts["maps"].items()),
                        *((name, c["kappa_star"], c["kappa"]) for name, c in self.parts["data"].items()),
                    ]
                },
            ),
            Claim(
                "the effective learning rate goes as lr where that is small, stays at 0.9 of its bound or more over a range "
                "of at least 10, and goes as 1 / lr where that is large, or 1 / lr^3 from w0 = Hu / |Hu| (derived; slopes "
                "within 0.1)",
                {
                    f"κ {kappa}, {STARTS[start]}": self._plateau(run)
                    for kappa, case in self.parts["maps"].items()
                    for start, run in case["starts"].items()
                },
            ),
            Claim(
                "the range of good learning rates grows in proportion to the dimension (slope 0.7 to 1.3 in logarithms)",
                {
                    label: (0.7 <= self.slope(name) <= 1.3, f"slope {self.slope(name):.2f}")
                    for name, label in WIDTHS.items()
                },
            ),
            Claim(
                "BNGD takes fewer steps at its best learning rate, from every start, than gradient descent at 0.99 of 2 / λmax",
                {name: self._faster(name) for name in self.parts["data"]},
            ),
            Claim(
                "the learning rates with which BNGD converges within the budget span at least ten times the range of those of "
                "gradient descent",
                {name: self._wider(name) for name in self.parts["data"]},
            ),
            Claim(
                "with batch norm a network learns with learning rates over at least ten times the range, and stays finite",
                {VARIANTS[variant]: self._learns(variant) for variant in ("bn", "own")},
            ),
            Claim(
                "weights r times as long with r^2 times the learning rate give the same loss, to 1e-9, without the eps of "
                "batch norm",
                {"digits": self._scaled()},
            ),
            Claim(
                "layers before batch norm are better conditioned than those of a network without (largest eigenvalue over the "
                "median of the sizes)",
                {
                    f"layer {c['layer']}, {c['moment']}": self._compared(c)
                    for c in self.parts["layers"]
                    if c["network"] == "bn"
                },
            ),
            Claim(
                "and better than the raw block of the same layer, with the directions of the rows in it",
                {
                    f"layer {c['layer']}, {c['moment']}": (
                        _ratio(c, "") <= _ratio(c, "raw_"),
                        f"{_ratio(c, ''):,.0f} against {_ratio(c, 'raw_'):,.0f}",
                    )
                    for c in self.parts["layers"]
                    if c["network"] == "bn"
                },
            ),
        ]

    def _robust(self, case: Mapping[str, Any], run: Mapping[str, Any]) -> tuple[bool, str]:
        above = [lr > case["gd_lr_max"] for lr in self.plan.learning_rates().tolist()]
        descent = [status == "diverged" for status in case["gd"]["status"]]
        diverged = run["counts"].get("diverged", 0)
        said = f"{diverged} of {sum(run['counts'].values()):,} pairs, and {sum(descent)} of {len(descent)} of gradient descent"
        return diverged == 0 and descent == above, said

    def _complete(self, run: Mapping[str, Any]) -> tuple[bool, str]:
        total, counts = sum(run["counts"].values()), run["counts"]
        words = ", ".join(f"{100 * count / total:.0f} % {status}" for status, count in counts.items())
        return counts.get("converged", 0) == total, words

    def _linear(self, run: Mapping[str, Any]) -> tuple[bool | None, str]:
        """Where the excess has fallen below 1e-10 by a rate that does not rest on the edge, where rounding decides."""
        ratios = [
            math.log(rate) / math.log(predicted)
            for rate, predicted, excess, edge in zip(run["rate"], run["predicted"], run["excess"], run["edge"])
            if rate and predicted and excess is not None and excess < 1e-10 and 0 < predicted < 1 and abs(edge) < 0.97
        ]
        if not ratios:
            return None, "no run in its asymptotic phase"
        off = max(abs(ratio - 1) for ratio in ratios)
        return off <= 0.05, f"within {100 * off:.1f} % at {len(ratios)} learning rates"

    def _plateau(self, run: Mapping[str, Any]) -> tuple[bool, str]:
        points = [(lr, abs(edge)) for lr, edge in zip(self.plan.learning_rates().tolist(), run["edge"]) if edge]
        there = [lr for lr, edge in points if edge >= 0.9]
        span = max(there) / min(there) if there else 1.0
        low = _slope(list(zip(*run["small"])))
        high = _slope([(lr, edge) for lr, edge in points if 0.9e7 < lr < 1.1e10])
        wanted = -run["asymptotes"]["power"]
        said = f"slopes {low:+.2f} and {high:+.2f}, a range of {span:.3g}"
        return abs(low - 1) < 0.1 and abs(high - wanted) < 0.1 and span >= 10, said

    def _faster(self, name: str) -> tuple[bool | None, str]:
        descent = self.parts["data"][name]["gd"]["0.99"]
        bests = sorted(found[0] for found in self.ranges(name) if found is not None)
        if not bests and descent is None:
            return None, "neither converges within the budget"
        said = f"{', '.join(f'{best:,}' for best in bests) or 'none'} against {_steps(descent)} steps"
        every = len(bests) == len(self.parts["data"][name]["bngd"])
        return every and (descent is None or max(bests) < descent), said

    def _wider(self, name: str) -> tuple[bool | None, str]:
        case = self.parts["data"][name]
        done = {float(share): steps for share, steps in case["gd"].items() if steps is not None}
        ranges = [found[2] for found in self.ranges(name) if found is not None]
        if not done or not ranges:
            return None, "one of them does not converge within the budget"
        # Steps grow as 1 / lr: from the slowest that was measured to the one that just takes the whole budget.
        slowest = min(done)
        descent = 1 / (slowest * done[slowest] / self.plan.data_steps)
        said = f"{', '.join(f'{r:,.0f}' for r in ranges)} against {descent:,.0f}"
        return min(ranges) >= 10 * descent, said

    def _learns(self, variant: str) -> tuple[bool, str]:
        ours, plain = self.usable(variant), self.usable("plain")
        finite = not any(math.isnan(loss) for loss in self.losses(variant))
        said = f"loss at most {USABLE} over a range of {ours:,.3g} against {plain:,.3g}" + (
            "" if finite else ", not finite"
        )
        return ours >= 10 * plain and finite, said

    def _scaled(self) -> tuple[bool, str]:
        off = _apart(self.parts["scale"]["1e-30"])
        return off <= 1e-9, f"{off:.1g} apart"

    def _compared(self, c: Mapping[str, Any]) -> tuple[bool, str]:
        (other,) = [
            o
            for o in self.parts["layers"]
            if (o["network"], o["moment"], o["layer"]) == ("plain", c["moment"], c["layer"])
        ]
        return _ratio(c, "") < _ratio(other, ""), f"{_ratio(c, ''):,.0f} against {_ratio(other, ''):,.0f}"


def _slope(points: Sequence[tuple[float, float]]) -> float:
    """Of log y against log x."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    return statistics.linear_regression(*zip(*logs)).slope if len(logs) > 1 else math.nan


def _apart(losses: Mapping[str, float]) -> float:
    """Largest over smallest, less 1."""
    return max(losses.values()) / min(losses.values()) - 1


def _ratio(layer: Mapping[str, Any], kind: str) -> float:
    middle = layer[f"{kind}quantile"]
    return float(layer[f"{kind}lam_max"] / middle) if middle else math.inf


def _number(value: float | None) -> str:
    return "inf" if value is None else f"{value:.2g}"


def _steps(steps: int | None) -> str:
    return "–" if steps is None else f"{steps:,}"


# Images -----------------------------------------------------------------------------------------------------------------------


def images(
    request: Request,
    *,
    plan: ImagePlan | None = None,
    run: Callable[..., dict[str, Any]] = image_run,
) -> BngdImages:
    """Scale ``gpu``: CIFAR-10 with ResNet-20, with batch norm and without, an epoch for each learning rate.

    run: does one run (a stand-in for tests). Raises ValueError without an accelerator, unless forced, and DataUnavailable
    without the data.
    """
    from conjugo.studies.reproduce import bngd_figures

    _alone(request)
    plan = ImagePlan() if plan is None else plan
    device = choose_device("auto")
    if device.type == "cpu" and not request.force:
        raise ValueError(
            f"reproduce: scale 'gpu' is {len(plan.runs)} runs of {plan.epochs:g} epoch with {plan.model}; torch finds no "
            "accelerator here, and a CPU would take hours. Use scale 'cpu', or --force (force=True)"
        )
    train = TrainConfig(data=plan.data)
    dataset = load_data(train, None, None)
    if request.out is not None:
        description = {"paper": "bngd", "scale": "gpu", "workers": 1, **asdict(plan)}
        open_folder(request.out, json.loads(json.dumps(description)), resume=request.resume)
        (request.out / "runs").mkdir(exist_ok=True)
    found = []
    for i, (variant, lr) in enumerate(plan.runs):
        if sys.stderr.isatty() if request.progress is None else request.progress:
            print(f"bngd: run {i + 1} of {len(plan.runs)}", file=sys.stderr)
        path = None if request.out is None else request.out / "runs" / f"{variant}-{lr:.3g}.json"
        found.append(_kept(path, partial(run, plan, variant, lr, dataset, device)))
    result = BngdImages(plan, found, versions(train))
    if request.out is not None:
        save(result.to_dict(), bngd_figures.drawn_images(result), request.out)
    return result


@dataclass(frozen=True)
class BngdImages:
    """The runs on images."""

    plan: ImagePlan
    runs: Sequence[Mapping[str, Any]]
    versions: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "paper": "bngd",
            "scale": "gpu",
            "plan": json.loads(json.dumps(asdict(self.plan))),
            "versions": dict(self.versions),
            "runs": list(self.runs),
            "claims": [claim.to_dict() for claim in self.claims()],
        }

    def tables(self) -> list[RenderableType]:
        """Loss and accuracy by learning rate; edges at the end."""
        table = new_table(
            f"{self.plan.data}, {self.plan.model}, {self.plan.epochs:g} epoch: loss · test accuracy (%), by learning rate",
            "Edge: lr λmax / 2 of the effective Gauss-Newton block at the end, the largest of the layers that were measured.",
        )
        for lr in self.plan.lrs:
            table.add_column(f"{lr:.2g}", justify="right", no_wrap=True)
        for variant in ("bn", "plain"):
            cells = []
            for run in self.of(variant):
                cells.append("nan" if run["loss"] is None else f"{run['loss']:.2g} · {100 * run['accuracy']:.0f}")
            table.add_row(VARIANTS[variant], *cells)
        table.add_row("edge", *(_number(edge) if edge is not None else "–" for edge in map(_edge, self.of("bn"))))
        return [table]

    def of(self, variant: str) -> list[Mapping[str, Any]]:
        """The runs of a variant, by learning rate."""
        return [run for run in self.runs if run["variant"] == variant]

    def text(self) -> str:
        """What reproduced and what did not."""
        return sentences(self.claims(), ["One seed, one epoch: which learning rates work, not how well."])

    def claims(self) -> list[Claim]:
        """What was expected, judged by the runs."""
        usable = {variant: _span(self.of(variant)) for variant in ("bn", "plain")}
        edges = [edge for run in self.of("bn") if (edge := _edge(run)) is not None]
        finite = all(run["loss"] is not None for run in self.of("bn"))
        return [
            Claim(
                "with batch norm a network learns with learning rates over at least ten times the range, and stays finite",
                {
                    self.plan.model: (
                        usable["bn"] >= 10 * usable["plain"] and finite,
                        f"a range of {usable['bn']:.3g} against {usable['plain']:.3g}",
                    )
                },
            ),
            Claim(
                "rows grow until the edge lr λmax / 2 is at most about 1 (2 allows for the noise of batches)",
                {
                    self.plan.model: (
                        max(edges) <= 2 if edges else None,
                        f"at most {max(edges):.2g} at the end" if edges else "not measured",
                    )
                },
            ),
        ]


def _edge(run: Mapping[str, Any]) -> float | None:
    last = run["looks"][-1]["edge"].values() if run["looks"] else ()
    return max((edge for edge in last if edge is not None), default=None)


def _span(runs: Sequence[Mapping[str, Any]]) -> float:
    """Largest over smallest learning rate with a loss at most halfway between the best and that of knowing nothing; 0: none."""
    losses = [run["loss"] for run in runs if run["loss"] is not None]
    if not losses:
        return 0.0
    limit = (min(losses) + math.log(10)) / 2
    good = [run["lr"] for run in runs if run["loss"] is not None and run["loss"] <= limit]
    return max(good) / min(good) if good else 0.0


PAPER = Paper(
    title="A Quantitative Analysis of the Effect of Batch Normalization on Gradient Descent",
    source="Y. Cai, Q. Li, Z. Shen, ICML 2019; arXiv:1810.00122",
    scales={
        "cpu": experiment,
        "gpu": images,
        "full": NotRun(
            "bngd",
            "full",
            "This would be the networks of the authors' programs, with their second convolutions connected: MNIST, "
            "Fashion-MNIST and CIFAR-10, 600 to 1,200 steps of batch 100, 40 learning rates from 1e-3 to 1e3 with batch norm "
            "(own rates of its parameters: four) and 20 without, 5 seeds: 3,300 runs, about a day of one accelerator.",
        ),
    },
)
