"""Park, Sohl-Dickstein, Le & Smith 2019: the normalised noise scale of SGD, at the scale of a CPU.

That learning rate and batch size matter through gbar = eps N / (B v) alone is what the paper builds on. 400 images of digits, a
fifth of their labels replaced by random ones, are learnt by a 64-64-64-10 perceptron in NTK parameterisation (v = 1) with plain
SGD: four values of gbar, each with six learning rates and the batch sizes that belong to them, all for the same physical
time eps T = 12,000; 40 seeds. For each gbar there is also momentum 0.9 with a tenth of a learning rate.

How the best gbar grows with the width is the scale of a GPU: :mod:`conjugo.studies.reproduce.width_families`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from conjugo.errors import check
from conjugo.studies import statistics
from conjugo.studies.reproduce.grids import open_folder, save
from conjugo.studies.reproduce.paper import Claim, NotRun, Paper, Request, new_table, sentences
from conjugo.studies.reproduce.width_families import proportionality
from conjugo.studies.reproduce.width_training import Condition, Outcome, Problem, Train, done, one_after_another, train
from conjugo.studies.runs import versions
from conjugo.studies.summary import SIGNIFICANT, p_text
from conjugo.training import TrainConfig

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["EXPECTED", "PAPER", "CollapsePlan", "CollapseResult", "difference", "equality", "experiment"]

Kind = Literal["test", "train"]
Values = np.ndarray[Any, np.dtype[np.float64]]

EXPECTED: Mapping[float, tuple[float, float]] = {50: (0.819, 0.9945), 100: (0.8216, 0.988), 400: (0.800, 0.8775)}
"""Test and training accuracy by gbar of a first, throw-away implementation, whose learning rates were 0.5 to 4. Its task was
this one; depth and scaling of the inputs are not known, so that its levels need not be ours. Nor are the paper's figures."""

POINT = 0.01
"""So far apart accuracies may be, by the ends of the 95 % interval of their difference, to count as equal."""


@dataclass(frozen=True, kw_only=True)
class CollapsePlan:
    """All that the runs depend on.

    gbars: normalised noise scales, ascending. lrs: ascending; the first *inside* of them are well inside stability. time:
    eps T. momentum, momentum_lr: of a further condition for each gbar.
    """

    problem: Problem = field(default_factory=lambda: Problem(seeds=40))
    width: int = 64
    gbars: tuple[float, ...] = (50, 100, 200, 400)
    lrs: tuple[float, ...] = (0.5, 1, 2, 4, 8, 16)
    inside: int = 3
    time: float = 12_000
    momentum: float = 0.9
    momentum_lr: float = 0.2

    def __post_init__(self) -> None:
        """Raise ValueError if there are fewer than two learning rates inside stability."""
        check(2 <= self.inside <= len(self.lrs), "CollapsePlan", "inside", self.inside, f"in [2, {len(self.lrs)}]")

    def condition(self, gbar: float, lr: float, momentum: float = 0.0) -> Condition | None:
        """How to have *gbar* with *lr*; None if there is no whole batch size for it."""
        reached = lr / (1 - momentum)
        batch = round(reached * self.problem.examples / (gbar * self.problem.weight_var), 6)
        if batch < 1 or batch != int(batch):
            return None
        return Condition(width=self.width, lr=lr, batch=int(batch), steps=round(self.time / reached), momentum=momentum)

    def conditions(self, gbar: float) -> list[Condition]:
        """All of a noise scale, by learning rate; momentum at the end."""
        pairs = [*((lr, 0.0) for lr in self.lrs), (self.momentum_lr, self.momentum)]
        found = [self.condition(gbar, lr, momentum) for lr, momentum in pairs]
        return [condition for condition in found if condition is not None]

    def inner(self, gbar: float) -> list[Condition]:
        """Those without momentum whose learning rate is well inside stability."""
        return [c for c in self.conditions(gbar) if not c.momentum and c.lr in self.lrs[: self.inside]]


def experiment(request: Request, *, plan: CollapsePlan | None = None, train: Train = train) -> CollapseResult:
    """Do the experiment. plan: None is the whole of it; train: trains (a stand-in for tests)."""
    from conjugo.studies.reproduce import width_figures

    plan = CollapsePlan() if plan is None else plan
    one_after_another(request)
    if request.out is not None:
        description = {"paper": "width", "scale": "cpu", "workers": 1, **asdict(plan)}
        open_folder(request.out, json.loads(json.dumps(description)), resume=request.resume)
    stacks = [[condition] for gbar in plan.gbars for condition in plan.conditions(gbar)]
    outcomes = done(plan.problem, stacks, train, request)
    result = CollapseResult(plan, outcomes, versions(TrainConfig(data=plan.problem.data)))
    if request.out is not None:
        figures = {"collapse": width_figures.collapse(result), "stability": width_figures.stability(result)}
        save(result.to_dict(), figures, request.out)
    return result


# ---- paired comparisons ----


def difference(a: Values, b: Values, level: float = 0.95) -> tuple[float, float, float | None]:
    """Mean of the paired differences *a* - *b* [S], half the width of its confidence interval, p-value that it is 0.

    By Student's t over the seeds. The p-value is None where nothing differs.
    """
    from scipy import stats

    d = a - b
    stderr = float(d.std(ddof=1)) / math.sqrt(len(d))
    mean = float(d.mean())
    if stderr <= 1e-12:  # equal to rounding
        return mean, 0.0, None if abs(mean) <= 1e-12 else 0.0
    p = 2 * float(stats.t.sf(abs(mean) / stderr, len(d) - 1))
    return mean, float(stats.t.ppf((1 + level) / 2, len(d) - 1)) * stderr, p


def equality(table: Values) -> float | None:
    """p-value that all conditions have one mean; table: [conditions, seeds], a seed being a block.

    The F test of a two-way layout without repetition. None where nothing varies beyond conditions and seeds.
    """
    from scipy import stats

    k, n = table.shape
    between = n * float(((table.mean(1) - table.mean()) ** 2).sum()) / (k - 1)
    rest = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    within = float((rest**2).sum()) / ((k - 1) * (n - 1))
    return None if within <= 1e-24 else float(stats.f.sf(between / within, k - 1, (k - 1) * (n - 1)))


def _same(mean: float, half: float, p: float | None) -> bool | None:
    """Whether a difference is surely small; False if it is not and there surely is one."""
    if abs(mean) + half <= POINT:
        return True
    return False if p is not None and p < SIGNIFICANT else None


def _test(p: float | None) -> str:
    if p is None:
        return "no test"
    text = p_text(p)
    return f"p {text}" if text.startswith("<") else f"p = {text}"


# ---- the result ----


@dataclass(frozen=True)
class CollapseResult:
    """What came out of each condition."""

    plan: CollapsePlan
    outcomes: Mapping[Condition, Outcome]
    versions: Mapping[str, str]

    def table(self, conditions: Sequence[Condition], kind: Kind) -> Values:
        """Accuracies [conditions, seeds], of the seeds that diverged in none of *conditions*."""
        rows = [getattr(self.outcomes[condition], kind) for condition in conditions]
        kept = [values for values in zip(*rows, strict=True) if None not in values]
        return np.array(kept, dtype=np.float64).reshape(len(kept), len(rows)).T

    def mean(self, condition: Condition, kind: Kind) -> tuple[float, float]:
        """Mean accuracy and its standard error; NaN without runs."""
        values = self.table([condition], kind)[0].tolist()
        if not values:
            return math.nan, math.nan
        mean, sd = statistics.mean_sd(values)
        return mean, sd / math.sqrt(len(values))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        rows = [
            {
                "gbar": gbar,
                **asdict(condition),
                **asdict(self.outcomes[condition]),
                **{f"mean_{kind}": _plain(self.mean(condition, kind)[0]) for kind in _KINDS},
                **{f"stderr_{kind}": _plain(self.mean(condition, kind)[1]) for kind in _KINDS},
            }
            for gbar in self.plan.gbars
            for condition in self.plan.conditions(gbar)
        ]
        return {
            "paper": "width",
            "scale": "cpu",
            "plan": asdict(self.plan),
            "versions": dict(self.versions),
            "expected": {f"{gbar:g}": pair for gbar, pair in EXPECTED.items()},
            "conditions": rows,
            "claims": [claim.to_dict() for claim in self.claims()],
        }

    # ---- table ----

    def tables(self) -> list[RenderableType]:
        """Test and training accuracy of every condition."""
        return [self._table(kind, column) for column, kind in enumerate(_KINDS)]

    def _table(self, kind: Kind, column: int) -> RenderableType:
        table = new_table(
            f"Digits: {_KINDS[kind]} (%) by noise scale and learning rate",
            f"Mean and standard error of {self.plan.problem.seeds} seeds. The law: equal in a row. m: momentum, learning rate "
            f"{self.plan.momentum_lr:g}. ×: runs that diverged. Expected: a first implementation.",
        )
        for title in ("expected", *(f"lr {lr:g}" for lr in self.plan.lrs), f"m {self.plan.momentum:g}"):
            table.add_column(title, justify="right", no_wrap=True)
        pairs = [*((lr, 0.0) for lr in self.plan.lrs), (self.plan.momentum_lr, self.plan.momentum)]
        for gbar in self.plan.gbars:
            cells = [self._cell(self.plan.condition(gbar, lr, momentum), kind) for lr, momentum in pairs]
            expected = EXPECTED.get(gbar) if self.plan == CollapsePlan() else None
            table.add_row(f"gbar {gbar:g}", "" if expected is None else f"{100 * expected[column]:.1f}", *cells)
        return table

    def _cell(self, condition: Condition | None, kind: Kind) -> str:
        if condition is None:
            return "–"
        mean, error = self.mean(condition, kind)
        diverged = self.outcomes[condition].diverged
        return f"{100 * mean:.1f}\n± {100 * error:.1f}" + (f"\n×{diverged}" if diverged else "")

    # ---- sentences ----

    def text(self) -> str:
        """What reproduced and what did not."""
        inner = self.plan.lrs[: self.plan.inside]
        notes = [
            f"Equal: the 95 % interval of every difference of two means, paired by seed, is within {100 * POINT:g} point; "
            "where it is not and there is no significant difference either, nothing is concluded. "
            f"That is asked of learning rates from {inner[0]:g} to {inner[-1]:g}. The p-value there is that of the F test that "
            "all are equal, which finds smaller differences. p-values are not corrected for the number of comparisons.",
            "How the best noise scale changes with the width is not shown here: --scale gpu.",
        ]
        diverged = sum(outcome.diverged for outcome in self.outcomes.values())
        return sentences(
            self.claims(), [*notes, *([f"{diverged} runs diverged and were left out."] if diverged else [])]
        )

    def claims(self) -> list[Claim]:
        """What follows from the law, judged by the runs."""
        gbars = self.plan.gbars
        first, last = self.plan.lrs[0], self.plan.lrs[self.plan.inside - 1]
        return [
            *(
                Claim(
                    f"at one gbar {name} is the same for learning rates from {first:g} to {last:g}",
                    {f"gbar {gbar:g}": self._equal(self.plan.inner(gbar), kind) for gbar in gbars},
                )
                for kind, name in _KINDS.items()
            ),
            *(
                Claim(
                    f"momentum {self.plan.momentum:g} has the same {name} as plain SGD at this gbar",
                    {f"gbar {gbar:g}": self._momentum(gbar, kind) for gbar in gbars},
                )
                for kind, name in _KINDS.items()
            ),
            *(
                Claim(
                    f"{name} differs between different gbar",
                    {f"{a:g} and {b:g}": self._differs(a, b, kind) for a, b in zip(gbars, gbars[1:])},  # noqa: RUF007
                )
                for kind, name in _KINDS.items()
            ),
            Claim(
                f"the law ends near the limit of stability: learning rate {self.plan.lrs[-1]:g} has another training accuracy",
                {f"gbar {gbar:g}": self._ends(gbar) for gbar in gbars},
            ),
        ]

    def _equal(self, conditions: Sequence[Condition], kind: Kind) -> tuple[bool | None, str]:
        table = self.table(conditions, kind)
        if min(table.shape) < 2:
            return None, "too few runs"
        pairs = [(i, j) for j in range(len(table)) for i in range(j)]
        differences = [difference(table[j], table[i]) for i, j in pairs]
        mean, half, _ = max(differences, key=lambda found: abs(found[0]) + found[1])
        levels = 100 * table.mean(1)
        p = equality(table)
        said = f"{levels.min():.2f} to {levels.max():.2f} %, at most {100 * mean:+.2f} ± {100 * half:.2f} points apart"
        return _same(mean, half, p), f"{said} ({_test(p)})"

    def _inner_mean(self, gbar: float, kind: Kind, other: Condition | None = None) -> tuple[Values, Values]:
        """Accuracy of each seed, the mean over learning rates inside stability, and under *other*."""
        inner = self.plan.inner(gbar)
        table = self.table([*inner, *([other] if other is not None else [])], kind)
        return table[: len(inner)].mean(0), table[-1]

    def _momentum(self, gbar: float, kind: Kind) -> tuple[bool | None, str]:
        condition = self.plan.condition(gbar, self.plan.momentum_lr, self.plan.momentum)
        return self._against(gbar, kind, condition, equal=True)

    def _ends(self, gbar: float) -> tuple[bool | None, str]:
        return self._against(gbar, "train", self.plan.condition(gbar, self.plan.lrs[-1]), equal=False)

    def _against(self, gbar: float, kind: Kind, condition: Condition | None, *, equal: bool) -> tuple[bool | None, str]:
        """A condition compared with the mean over learning rates inside stability: whether equal, or different."""
        if condition is None:
            return None, "no whole batch size"
        plain, other = self._inner_mean(gbar, kind, condition)
        if len(plain) < 2:
            return None, "too few runs"
        mean, half, p = difference(other, plain)
        said = f"{100 * mean:+.2f} ± {100 * half:.2f} points ({_test(p)})"
        return (_same(mean, half, p) if equal else abs(mean) - half > POINT), said

    def _differs(self, a: float, b: float, kind: Kind) -> tuple[bool | None, str]:
        inner = self.plan.inner(a), self.plan.inner(b)
        table = self.table([*inner[0], *inner[1]], kind)
        if table.shape[1] < 2:
            return None, "too few runs"
        mean, half, p = difference(table[len(inner[0]) :].mean(0), table[: len(inner[0])].mean(0))
        return p is not None and p < SIGNIFICANT, f"{100 * mean:+.2f} ± {100 * half:.2f} points ({_test(p)})"


_KINDS: dict[Kind, str] = {"test": "test accuracy", "train": "training accuracy"}


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


PAPER = Paper(
    title="The Effect of Network Width on Stochastic Gradient Descent and Generalization: an Empirical Study",
    source="D. S. Park, J. Sohl-Dickstein, Q. V. Le, S. L. Smith, ICML 2019; arXiv:1905.03776",
    scales={
        "cpu": experiment,
        "gpu": proportionality,
        "full": NotRun(
            "width",
            "full",
            "This would be families of perceptrons, convolutional and residual networks, with and without batch norm, in "
            "standard and NTK parameterisation: SGD at a constant learning rate to late times, about 20 seeds for each batch "
            "size and width. The paper's own figures are not known here: only its abstract was to be had.",
        ),
    },
)
