"""Wang & Ye 2020: SGD with the Fletcher-Reeves momentum, at the scale of a CPU.

Digits with a 64-128-128-10 perceptron, with and without batch norm, batches of 64 (15 epochs) and 512 (30 epochs). The
learning rate warms up in 10 % of the steps (power 1/2) and drops at 51 % and 76.5 %, weight decay is 2e-4. Every optimizer gets
the same seven learning rates, half a decade apart, and four seeds; see :mod:`conjugo.studies.reproduce.grid_study`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from conjugo.studies import statistics
from conjugo.studies.records import Outcome, Task
from conjugo.studies.reproduce.grid_study import Entrant, GridStudy, GridStudyResult, run_study, run_task
from conjugo.studies.reproduce.grids import save
from conjugo.studies.reproduce.paper import Claim, NotRun, Paper, Request, not_below, sentences
from conjugo.studies.runs import load_data
from conjugo.training import TrainConfig, Trainer

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["EXPECTED", "PAPER", "FrsgdResult", "experiment", "plan", "trace"]

RATES = tuple(round(0.01 * 10 ** (k / 2), 4) for k in range(7))

EXPECTED: Mapping[str, Mapping[str, float]] = {
    "sgd": {"batch 64, BN": 0.988, "batch 64": 0.964, "batch 512, BN": 0.981, "batch 512": 0.837},
    "momentum": {"batch 64, BN": 0.986, "batch 64": 0.976, "batch 512, BN": 0.989, "batch 512": 0.929},
    "frsgd": {"batch 64, BN": 0.985, "batch 64": 0.983, "batch 512, BN": 0.990, "batch 512": 0.946},
    "frsgd-tensor": {"batch 64, BN": 0.986, "batch 64": 0.978, "batch 512, BN": 0.990, "batch 512": 0.958},
}
"""Test accuracy of a first, throw-away implementation: learning rate chosen on the test data, two seeds."""

PUBLISHED = (
    "Published (ResNet-110, test error, SGD with momentum / FRSGD): CIFAR-10 5.25 / 4.64 %, CIFAR-100 23.75 / 20.03 %. "
    "Nothing here is at that scale."
)


def plan() -> GridStudy:
    """The whole experiment."""
    train = TrainConfig(data="digits", schedule="polynomial", warmup=0.1, weight_decay=2e-4)

    def setting(batch: int, epochs: float, model: str) -> TrainConfig:
        return replace(train, batch_size=batch, epochs=epochs, model=model)

    return GridStudy(
        settings={
            "batch 64, BN": setting(64, 15, "mlp-bn"),
            "batch 64": setting(64, 15, "mlp"),
            "batch 512, BN": setting(512, 30, "mlp-bn"),
            "batch 512": setting(512, 30, "mlp"),
        },
        entrants={
            "sgd": Entrant(label="SGD", optimizer="sgd", values=RATES),
            "momentum": Entrant(label="momentum 0.9", optimizer="momentum", values=RATES),
            "frsgd": Entrant(label="FRSGD", optimizer="frsgd", values=RATES),
            "frsgd-tensor": Entrant(
                label="FRSGD per tensor", optimizer="frsgd", values=RATES, options={"scope": "tensor"}
            ),
        },
    )


def trace(study: GridStudy, setting: str, lr: float) -> list[float]:
    """Beta in each step of a run of FRSGD at *lr*."""
    train = study.settings[setting]
    trainer = Trainer(replace(train, optimizer="frsgd", lr=lr, threads=1), load_data(train, None, None))
    seen: list[float] = []
    trainer.optimizer.register_step_post_hook(lambda optimizer, *_: seen.append(optimizer.last["beta"].item()))
    trainer.fit(progress=False)
    return seen


def experiment(
    request: Request,
    *,
    study: GridStudy | None = None,
    run: Callable[[GridStudy, Task], Outcome] = run_task,
    traced: Callable[[GridStudy, str, float], list[float]] = trace,
) -> FrsgdResult:
    """Do the experiment. study: None is the whole of it; run, traced: do one run (stand-ins for tests)."""
    from conjugo.studies.reproduce import grid_figures

    study = plan() if study is None else study
    grids = run_study(study, request, paper="frsgd", expected=EXPECTED, run=run)
    best = {setting: cell.best for setting in study.settings if (cell := grids.cell("frsgd", setting)) is not None}
    result = FrsgdResult(grids, {setting: traced(study, setting, lr) for setting, lr in best.items()})
    if request.out is not None:
        drawn = {
            "learning_rates": grid_figures.curves(grids, "learning rate"),
            "beta": grid_figures.traces(result.betas, "β"),
        }
        save(result.to_dict(), drawn, request.out)
    return result


@dataclass(frozen=True)
class FrsgdResult:
    """The grids, and for each setting beta in every step of a run at the best learning rate."""

    grids: GridStudyResult
    betas: Mapping[str, list[float]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        claims = [claim.to_dict() for claim in self.claims()]
        return {**self.grids.to_dict(), "claims": claims, "betas": dict(self.betas)}

    def tables(self) -> list[RenderableType]:
        """Accuracy, expected and ours; the chosen learning rates and how wide the usable ones are."""
        source = "a first implementation, two seeds, learning rate chosen on the test data."
        return [
            self.grids.accuracy_table("Digits: test accuracy (%), and what was expected", source),
            self.grids.values_table("Chosen learning rate · width of the usable ones in octaves"),
        ]

    def text(self) -> str:
        """What reproduced and what did not."""
        means = [f"{setting} {statistics.mean_sd(betas)[0]:.2f}" for setting, betas in self.betas.items() if betas]
        notes = [*self.grids.notes(), f"Mean β at the best learning rate: {', '.join(means) or 'not run'}.", PUBLISHED]
        return sentences(self.claims(), notes)

    def claims(self) -> list[Claim]:
        """What was expected, judged by the runs."""
        settings = self.grids.study.settings
        return [
            self.grids.claim("FRSGD is not below tuned momentum", "frsgd", "momentum", not_below),
            self.grids.claim("FRSGD per tensor is not below tuned momentum", "frsgd-tensor", "momentum", not_below),
            Claim(
                "the largest usable learning rate of FRSGD is at least three times that of momentum",
                {setting: self._further(setting) for setting in settings},
            ),
        ]

    def _further(self, setting: str) -> tuple[bool | None, str]:
        """Compares the largest learning rates whose validation accuracy is within 2 points of the optimizer's best."""
        cells = [self.grids.cell(name, setting) for name in ("frsgd", "momentum")]
        if cells[0] is None or cells[1] is None:
            return None, "not run"
        ours, theirs = (statistics.largest_usable(cell.points) for cell in cells if cell is not None)
        edge = max(RATES)
        if theirs == edge:
            return None, f"momentum's is at the edge of the grid, {edge:g}"
        return ours >= 3 * theirs, f"{ours:.2g} against {theirs:.2g}"


PAPER = Paper(
    title="Stochastic Gradient Descent with Nonlinear Conjugate Gradient-Style Adaptive Momentum",
    source="B. Wang, Q. Ye, arXiv:2012.02188 (2020)",
    scales={
        "cpu": experiment,
        "gpu": NotRun(
            "frsgd",
            "gpu",
            "This would be CIFAR-10 with ResNet-20 and ResNet-56, batches of 128 and 512, 60 epochs, lr 0.05 to 0.8, "
            "two seeds. Expected: a best learning rate two to four times that of momentum, 0.2 to 0.6 points less test error.",
        ),
        "full": NotRun(
            "frsgd",
            "full",
            "This would be ResNet-110 on CIFAR-10 and CIFAR-100, 200 epochs, five seeds, and adversarial training with PGD-10. "
            + PUBLISHED,
        ),
    },
)
