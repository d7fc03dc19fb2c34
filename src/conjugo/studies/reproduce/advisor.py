"""The advisor put to the test: predictions first, in a sealed file, then the measurements they are held against.

Protocol. (a) For each problem, optimizer and advise seed, ``conjugo advise`` predicts the steps to the training loss and the
learning rate at every batch size to be measured. All predictions are in predictions.json, and their SHA-256 beside it,
before the first measurement starts; resuming reads them and makes none anew. (b) The steps at the best learning rate of
each batch size are measured, and with the same seeds at the advised ones: see
:mod:`conjugo.studies.reproduce.steps_to_target`. The advisor sees networks with other weights than those that are measured.
(c) Both are compared, separately on the development problems, by which the constants of the method were found, and on
held-out ones, on which nobody has tuned it. Beside it stand the naive rules, which start from the same place: the advised
learning rate and steps at the tested batch size nearest to the predicted critical batch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import torch

from conjugo.errors import DataUnavailable, check
from conjugo.studies.engine import execute
from conjugo.studies.executors import check_devices
from conjugo.studies.records import Journal, Outcome, Run, Task
from conjugo.studies.reproduce.advisor_predictions import Ask, Prediction, predict, sealed
from conjugo.studies.reproduce.advisor_problems import GPU_PROBLEMS, PROBLEMS, Problem
from conjugo.studies.reproduce.advisor_result import AdvisorResult
from conjugo.studies.reproduce.grids import open_folder, save
from conjugo.studies.reproduce.paper import NotRun, Paper, Request, listed
from conjugo.studies.reproduce.steps_to_target import CATALOGUE, Measured, Sweep, run_task
from conjugo.studies.runs import versions
from conjugo.training import TrainConfig

__all__ = ["PAPER", "AdvisorPlan", "experiment", "on_gpu"]


@dataclass(frozen=True, kw_only=True)
class AdvisorPlan:
    """All that the experiment depends on besides its problems.

    advise_seeds: predictions of each problem and optimizer. seconds, mode: of each. tuning_seeds, seeds, paired: see
    :class:`~conjugo.studies.reproduce.steps_to_target.Sweep`. epochs: as long as no learning rate has reached the target, a run
    is given up after 1,000 steps and so many epochs more.
    """

    optimizers: tuple[str, ...] = ("sgd", "adam", "nlcg")
    advise_seeds: int = 3
    seconds: float = 60.0
    mode: Literal["fast", "branch"] = "branch"
    tuning_seeds: int = 3
    seeds: int = 6
    paired: int = 3
    epochs: int = 30

    def __post_init__(self) -> None:
        """Check what would otherwise fail in mid-experiment."""
        known = f"names among {listed(list(CATALOGUE))}"
        check(set(self.optimizers) <= set(CATALOGUE), "AdvisorPlan", "optimizers", self.optimizers, known)
        for name in ("advise_seeds", "tuning_seeds", "paired", "epochs"):
            check(getattr(self, name) >= 1, "AdvisorPlan", name, getattr(self, name), ">= 1")
        check(self.seeds >= self.paired, "AdvisorPlan", "seeds", self.seeds, f">= paired = {self.paired}")

    def asked(self, problems: Sequence[Problem]) -> list[tuple[Problem, str, int]]:
        """Problem, optimizer and seed of every prediction."""
        return [(p, name, seed) for p in problems for name in self.optimizers for seed in range(self.advise_seeds)]

    def sweeps(self, problems: Sequence[Problem], predictions: Sequence[Prediction]) -> list[Sweep]:
        """The measurements."""
        advice = [prediction for prediction in predictions if not prediction.error]
        return [
            Sweep(
                problem=problem.name,
                optimizer=name,
                batch_size=batch,
                limit=1000 + self.epochs * len(problem.examples()[0]) // batch,
                tuning_seeds=self.tuning_seeds,
                seeds=self.seeds,
                advised=tuple(p.lr[batch] for p in advice if (p.problem, p.optimizer) == (problem.name, name)),
                paired=self.paired,
            )
            for problem in problems
            for name in self.optimizers
            for batch in problem.batches
        ]


def experiment(
    request: Request,
    *,
    plan: AdvisorPlan | None = None,
    problems: Sequence[Problem] = PROBLEMS,
    ask: Ask | None = None,
    run: Callable[[Sequence[Problem], Task], Outcome] = run_task,
    scale: str = "cpu",
) -> AdvisorResult:
    """Do the experiment. ask: makes a prediction, None: the advisor does; run: does one run (stand-ins for tests).

    Problems whose data is not there are left out, and the result says so.
    """
    from conjugo.studies.reproduce import advisor_figures

    plan = AdvisorPlan() if plan is None else plan
    ask = partial(predict, seconds=plan.seconds, mode=plan.mode) if ask is None else ask
    check(request.workers == 1, "reproduce", "workers", request.workers, "1 for advisor, whose networks are small")
    check_devices("reproduce", jobs=request.jobs, workers=request.workers)
    there: list[Problem] = []
    missing: list[str] = []
    for problem in problems:
        try:
            problem.check()
            there.append(problem)
        except DataUnavailable as error:
            missing.append(f"{problem.label} was left out: {error}")
    out = request.out
    described = {problem.name: problem.describe() for problem in there}
    if out is not None:
        whole = {"paper": "advisor", "scale": scale, "workers": 1, **asdict(plan), "problems": described}
        open_folder(out, json.loads(json.dumps(whole)), resume=request.resume)
    shown = sys.stderr.isatty() if request.progress is None else request.progress
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as for the measurements
    try:
        predictions, digest = sealed(plan.asked(there), out, ask, shown=shown)
    finally:
        torch.set_num_threads(threads)
    sweeps = plan.sweeps(there, predictions)
    with Journal(None if out is None else out / "journal.jsonl") as journal:
        job = partial(run, tuple(there))
        crashes = execute(sweeps, job, journal, jobs=request.jobs, progress=request.progress)
        runs = tuple(journal.runs)
    found = [Measured(sweep, _ordered(run for run in runs if run.task.cell == sweep.cell)) for sweep in sweeps]
    result = AdvisorResult(
        scale=scale,
        plan=plan,
        problems=tuple(there),
        missing=tuple(missing),
        predictions=predictions,
        sha256=digest,
        cells=tuple(cell for cell in found if cell.complete),
        crashes=tuple({c.task.cell: f"{c.task}: {c.error.strip().splitlines()[-1]}" for c in crashes}.values()),
        versions=versions(TrainConfig(data="digits")),
    )
    if out is not None:
        save(result.to_dict(), advisor_figures.figures(result), out)
    return result


def _ordered(runs: Iterable[Run]) -> tuple[Run, ...]:
    """As one after the other, whatever the order in which jobs have ended."""
    return tuple(sorted(runs, key=lambda run: (run.task.phase, run.task.lr, run.task.index, run.task.seed)))


def on_gpu(request: Request) -> AdvisorResult:
    """The same with a residual network on CIFAR-10, on one GPU. Raises ValueError without one."""
    check(torch.cuda.is_available(), "reproduce", "scale", "gpu", "'cpu' on a machine without a GPU")
    plan = AdvisorPlan(
        optimizers=("sgd", "momentum", "adam", "nlcg"), advise_seeds=2, seconds=180.0, seeds=3, epochs=20
    )
    return experiment(request, plan=plan, problems=GPU_PROBLEMS, scale="gpu")


PAPER = Paper(
    title="An Empirical Model of Large-Batch Training, and what conjugo advise makes of it",
    source="S. McCandlish, J. Kaplan, D. Amodei and the OpenAI Dota Team, arXiv:1812.06162 (2018)",
    scales={
        "cpu": experiment,
        "gpu": on_gpu,
        "full": NotRun(
            "advisor",
            "full",
            "This would be the sweep of the paper: MNIST, SVHN, CIFAR-10, ImageNet, a language model and games, learning rates "
            "tuned at every batch size, with the advice given beforehand.",
        ),
    },
)
