"""Which preconditioner inside the conjugate-gradient frame beats every tuned rival at very large batch?

No paper of others: the question of this package. The protocol was fixed before the first run (docs/frontier-protocol.md). Every
contender tunes its learning rate on held-out training data until the best one is inside its grid, and runs with fresh seeds;
beside each rule with a computed beta stands the same with a constant one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from conjugo.errors import DataUnavailable
from conjugo.studies import statistics
from conjugo.studies.engine import execute
from conjugo.studies.executors import check_devices
from conjugo.studies.records import Journal, Outcome, Task
from conjugo.studies.reproduce.frontier_plan import (
    AXIS,
    FAMILIES,
    GAIN,
    OCTAVE,
    SAVED,
    Family,
    FrontierPlan,
    Setting,
    cpu_plan,
    digest,
    gpu_plan,
)
from conjugo.studies.reproduce.frontier_search import Searched
from conjugo.studies.reproduce.frontier_tasks import Cost, available, costs, run_task
from conjugo.studies.reproduce.grids import open_folder, save
from conjugo.studies.reproduce.paper import Claim, NotRun, Paper, Request, new_table, sentences
from conjugo.studies.runs import versions
from conjugo.studies.summary import SIGNIFICANT, p_text, percent
from conjugo.training import TrainConfig

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = ["PAPER", "FrontierResult", "Outcomes", "experiment"]

Run = Callable[[FrontierPlan, Task], Outcome]
Costs = Callable[[Setting, list[str]], Mapping[str, Cost]]


def cpu(request: Request) -> FrontierResult:
    """The experiment of the protocol page."""
    return experiment(request, cpu_plan(), scale="cpu")


def gpu(request: Request) -> FrontierResult:
    """The same question with ResNets, 200 epochs each. Raises ValueError without an accelerator, unless forced."""
    from conjugo.training.machine import choose_device

    plan = gpu_plan()
    if choose_device("auto").type == "cpu" and not request.force:
        runs = sum(search.size for name in plan.settings for search in plan.searches(name))
        raise ValueError(
            f"reproduce: scale 'gpu' is about {runs} runs of 200 epochs with ResNet-20 and ResNet-32; torch finds no "
            "accelerator here, and a CPU would take months. Use scale 'cpu', or --force (force=True)"
        )
    return experiment(request, plan, scale="gpu")


def experiment(
    request: Request, plan: FrontierPlan, *, scale: str = "cpu", run: Run = run_task, cost: Costs = costs
) -> FrontierResult:
    """Do the experiment of *plan*, each task in a sub-folder of its own; a task whose data is not there is left out.

    run: does one run; cost: measures steps (stand-ins for tests). A contender with a crashed run is left out; resuming tries
    it again.
    """
    check_devices("reproduce", jobs=request.jobs, workers=request.workers)
    if request.out is not None:
        whole = {"paper": "frontier", "scale": scale, "plan": digest(plan), "workers": request.workers}
        open_folder(request.out, whole, resume=request.resume)
    outcomes, messages = {}, []
    for name, setting in plan.settings.items():
        try:
            available(setting)
        except DataUnavailable as error:
            messages.append(f"Left out: {setting.title}: {error}")
            continue
        outcomes[name], crashes = _do(request, plan, name, run)
        messages += crashes
    measured = {
        name: dict(cost(plan.settings[name], list(done.cells)))
        for name, done in outcomes.items()
        if not done.setting.secondary and done.cells
    }
    about = {**versions(TrainConfig()), "workers": str(request.workers)}
    result = FrontierResult(scale, digest(plan), outcomes, measured, tuple(messages), about)
    if request.out is not None:
        from conjugo.studies.reproduce import frontier_figures

        save(result.to_dict(), frontier_figures.figures(result), request.out)
    return result


def _do(request: Request, plan: FrontierPlan, name: str, run: Run) -> tuple[Outcomes, list[str]]:
    """All runs of a task that its folder does not hold yet; and what crashed."""
    searches = plan.searches(name)
    folder = None if request.out is None else request.out / name
    if folder is not None:
        described = plan.describe(name)
        described["training"] = described.pop("train")  # only what is not the default
        description = json.loads(json.dumps({**described, "workers": request.workers}))
        open_folder(folder, description, resume=(folder / "config.json").exists())
    with Journal(None if folder is None else folder / "journal.jsonl") as journal:
        crashes = execute(
            searches,
            partial(run, plan),
            journal,
            jobs=request.jobs,
            workers=request.workers,
            progress=request.progress,
        )
        runs = tuple(journal.runs)
    found = {
        search.contender: Searched(search, tuple(one for one in runs if one.task.cell == search.cell))
        for search in searches
    }
    said = {crash.task.cell: f"Given up: {crash.task}: {crash.error.strip().splitlines()[-1]}" for crash in crashes}
    cells = {contender: cell for contender, cell in found.items() if cell.complete}
    return Outcomes(plan.settings[name], cells), list(said.values())


@dataclass(frozen=True)
class Outcomes:
    """What came out on a task: the finished contenders, by name."""

    setting: Setting
    cells: Mapping[str, Searched]

    @property
    def rival(self) -> str | None:
        """The best rival, by validation."""
        rivals = [name for name in self.cells if not FAMILIES[name].ours]
        return max(rivals, key=lambda name: self.cells[name].validation, default=None)

    @property
    def target(self) -> float | None:
        """A test accuracy: the mean of the best rival, less half a point."""
        return None if self.rival is None else self.mean(self.rival) - GAIN

    def mean(self, name: str) -> float:
        """Mean test accuracy of a contender."""
        return statistics.mean_sd(self.cells[name].accuracies)[0]

    def passes(self, name: str) -> float | None:
        """Median forward and backward passes to the target; None if the median run does not reach it, or there is none."""
        steps = None if self.target is None else self.cells[name].steps_to(self.target)
        return None if steps is None else steps * FAMILIES[name].passes

    def against(self, name: str, other: str | None) -> Comparison | None:
        """The accuracies of two contenders, seed by seed; None if one of them is not there."""
        if other is None or other not in self.cells or name not in self.cells:
            return None
        ours, theirs = self.cells[name].accuracies, self.cells[other].accuracies
        gain = statistics.mean_sd(ours)[0] - statistics.mean_sd(theirs)[0]
        return Comparison(gain, statistics.paired(ours, theirs), statistics.welch(ours, theirs))


@dataclass(frozen=True)
class Comparison:
    """gain: difference of mean accuracies. paired, welch: p-values, None where the tests say nothing."""

    gain: float
    paired: float | None
    welch: float | None

    def above(self, p: float | None, least: float = 0.0) -> bool:
        """Whether the gain is at least *least*, and significant by the p-value *p*."""
        return self.gain > 0 and self.gain >= least and p is not None and p < SIGNIFICANT


def _p(name: str, p: float | None) -> str:
    text = p_text(p)
    return f"no {name} test" if p is None else f"{name} p {text}" if text.startswith("<") else f"{name} p = {text}"


def _main(family: Family) -> bool:
    """Whether it is one of those whose wins are counted: Fletcher-Reeves in the frame, without extra passes."""
    return family.control is not None and family.passes == 1.0


@dataclass(frozen=True)
class FrontierResult:
    """The tasks that were done, what steps cost there, and messages about what was left out or given up."""

    scale: str
    digest: str
    tasks: Mapping[str, Outcomes]
    costs: Mapping[str, Mapping[str, Cost]]
    messages: tuple[str, ...]
    versions: Mapping[str, str]

    @property
    def primary(self) -> dict[str, Outcomes]:
        """The tasks whose tests are counted."""
        return {name: task for name, task in self.tasks.items() if not task.setting.secondary}

    def corrected(self) -> dict[tuple[str, str], float]:
        """Holm-corrected p-values of the paired tests against the best rival, by task and Fletcher-Reeves contender."""
        found = {
            (task, name): compared.paired
            for task, done in self.primary.items()
            for name in done.cells
            if _main(FAMILIES[name]) and (compared := done.against(name, done.rival)) is not None
        }
        # Differences that do not vary say nothing: they count as tests all the same.
        values = [1.0 if p is None else p for p in found.values()]
        return dict(zip(found, statistics.holm(values), strict=True))

    # ---- tables ----

    def tables(self) -> list[RenderableType]:
        """For each task the contenders; then the cost of a step."""
        shown: list[RenderableType] = [self._table(name) for name in self.tasks]
        return [*shown, *(self._cost_table(name) for name in self.costs)]

    def _table(self, task: str) -> Table:
        done = self.tasks[task]
        corrected = self.corrected()
        target = "" if done.target is None else f" Target {percent(done.target)} % (best rival less 0.5)."
        table = new_table(
            f"{done.setting.title}: test accuracy (%)",
            f"Mean ± sd of {done.setting.seeds} fresh seeds. p: paired t-test against the best rival by validation (†); Holm: "
            f"corrected.{target} Octaves: learning rates within 1 point of the best in validation. * not inside its grid.",
        )
        for column in ("accuracy", "loss", "p", "Welch", "Holm", "passes to target", "octaves", "chosen"):
            table.add_column(column, justify="right", no_wrap=True)
        for name, cell in done.cells.items():
            family, compared = FAMILIES[name], done.against(name, done.rival)
            holm, passes = corrected.get((task, name)), done.passes(name)
            variant, exponent = cell.best
            losses = [loss for loss in cell.losses if loss is not None]
            same = name == done.rival or compared is None
            table.add_row(
                f"{family.label}{' †' if name == done.rival else ''}",
                percent(*statistics.mean_sd(cell.accuracies)),
                f"{statistics.mean_sd(losses)[0]:.3f}" if len(losses) == len(cell.losses) else "–",
                "" if same or compared is None else p_text(compared.paired),
                "" if same or compared is None else p_text(compared.welch),
                "" if holm is None else p_text(holm),
                "–" if passes is None else f"{passes:.0f}",
                str(cell.octaves),
                f"{family.second} {variant:g}, lr {2.0**exponent:.2g}{'' if cell.interior else '*'}",
            )
        return table

    def _cost_table(self, task: str) -> Table:
        table = new_table(
            f"{self.tasks[task].setting.title}: cost of a step",
            "Median time in the optimizer, all in turns on one batch. State: floating-point numbers per parameter.",
        )
        for column in ("ms", "of AdamW", "of a pass", "state"):
            table.add_column(column, justify="right")
        measured = self.costs[task]
        usual = measured.get("adamw")
        for name, cost in measured.items():
            table.add_row(
                FAMILIES[name].label,
                f"{1000 * cost.step:.2f}",
                "–" if usual is None else f"{cost.step / usual.step:.1f}",
                f"{100 * cost.step / cost.passes:.1f} %",
                f"{cost.state:.2f}",
            )
        return table

    # ---- sentences ----

    def text(self) -> str:
        """What holds and what does not."""
        notes = [
            f"{len(self.corrected())} tests against the best rival are corrected for (Holm); the best rival is the best in "
            "validation.",
            *self.messages,
        ]
        return sentences(self.claims(), notes)

    def claims(self) -> list[Claim]:
        """What the protocol asks, judged by the runs."""
        names = [name for name, family in FAMILIES.items() if _main(family)]
        names = [name for name in names if any(name in task.setting.contenders for task in self.primary.values())]
        corrected = self.corrected()
        found = []
        for name in names:
            label = FAMILIES[name].label
            tasks = {task: done for task, done in self.primary.items() if name in done.setting.contenders}
            wins = {task: self._win(done, name, corrected.get((task, name))) for task, done in tasks.items()}
            statement = (
                f"{label} is at least {100 * GAIN:g} points above the best tuned rival (p < {SIGNIFICANT:g}, corrected)"
            )
            found.append(Claim(f"{statement}, or needs at least {100 * SAVED:g} % fewer passes to the target", wins))
            statement = (
                f"the usable learning rates of {label} span at least {OCTAVE:g} octave more than the best rival's"
            )
            found.append(Claim(statement, {task: _wider(done, name) for task, done in tasks.items()}))
            controls = {task: _above_control(done, name) for task, done in tasks.items()}
            found.append(Claim(f"{label} is above the same with a constant β", controls))
        if noise := self._noise():
            found.append(noise)
        return found

    @staticmethod
    def _win(done: Outcomes, name: str, holm: float | None) -> tuple[bool | None, str]:
        compared = done.against(name, done.rival)
        if compared is None or done.rival is None:
            return None, "not run"
        ours, theirs = done.passes(name), done.passes(done.rival)
        fewer = ours is not None and theirs is not None and ours <= (1 - SAVED) * theirs
        passes = [f"{value:.0f}" if value is not None else "never" for value in (ours, theirs)]
        said = (
            f"{100 * compared.gain:+.1f} points against {FAMILIES[done.rival].label} ({_p('paired', compared.paired)}, "
            f"{_p('Holm', holm)}), passes to the target {passes[0]} against {passes[1]}"
        )
        return compared.above(holm, GAIN) or fewer, said

    def _noise(self) -> Claim | None:
        """That to orthogonalise before averaging pays more where there is less noise."""
        axis = {task.setting.batch_size: task for task in self.tasks.values() if task.setting.secondary}
        statement = (
            f"the gain of {FAMILIES[AXIS[-1]].label} over Muon is larger with the full batch than with the smallest"
        )
        if len(axis) < 2:
            return None
        small, large = (axis[size] for size in (min(axis), max(axis)))
        names = ("orthogonal-constant", "muon")
        if any(name not in task.cells for name in names for task in (small, large)):
            return Claim(statement, {"digits": (None, "not run")})
        gains = [
            [a - b for a, b in zip(task.cells[names[0]].accuracies, task.cells[names[1]].accuracies, strict=True)]
            for task in (large, small)
        ]
        means = [statistics.mean_sd(gain)[0] for gain in gains]
        p = statistics.paired(*gains)
        said = f"{100 * means[0]:+.1f} points with {max(axis):,}, {100 * means[1]:+.1f} with {min(axis):,} ({_p('paired', p)})"
        return Claim(statement, {"digits": (means[0] > means[1] and p is not None and p < SIGNIFICANT, said)})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        corrected = self.corrected()
        return {
            "paper": "frontier",
            "scale": self.scale,
            "plan": self.digest,
            "versions": dict(self.versions),
            "tasks": {name: self._plain(name, done, corrected) for name, done in self.tasks.items()},
            "costs": {
                task: {name: cost._asdict() for name, cost in found.items()} for task, found in self.costs.items()
            },
            "messages": list(self.messages),
            "claims": [claim.to_dict() for claim in self.claims()],
        }

    @staticmethod
    def _plain(task: str, done: Outcomes, corrected: Mapping[tuple[str, str], float]) -> dict[str, Any]:
        cells = {}
        for name, cell in done.cells.items():
            compared = done.against(name, done.rival)
            tests = {} if compared is None else {"gain": compared.gain, "p": compared.paired, "welch": compared.welch}
            cells[name] = {**cell.to_dict(), **tests, "holm": corrected.get((task, name)), "passes": done.passes(name)}
        return {"title": done.setting.title, "rival": done.rival, "target": done.target, "contenders": cells}


def _wider(done: Outcomes, name: str) -> tuple[bool | None, str]:
    if done.rival is None or name not in done.cells:
        return None, "not run"
    ours, theirs = done.cells[name].octaves, done.cells[done.rival].octaves
    said = f"{ours} against {theirs} octaves"
    enough = ours.width - theirs.width >= OCTAVE
    open_end = theirs.at_least if enough else ours.at_least
    return None if open_end else enough, said


def _above_control(done: Outcomes, name: str) -> tuple[bool | None, str]:
    compared = done.against(name, FAMILIES[name].control)
    if compared is None:
        return None, "not run"
    return compared.above(compared.paired), f"{100 * compared.gain:+.1f} points ({_p('paired', compared.paired)})"


PAPER = Paper(
    title="Preconditioners inside the conjugate-gradient frame against tuned rivals at very large batch",
    source="a question of this package; protocol: docs/frontier-protocol.md",
    scales={
        "cpu": cpu,
        "gpu": gpu,
        "full": NotRun(
            "frontier",
            "full",
            "This would be ResNet-50 on ImageNet at batch 32,768, 90 epochs, and a transformer of 124 million parameters, each "
            "with all contenders, seven learning rates and five seeds: weeks of eight accelerators.",
        ),
    },
)
