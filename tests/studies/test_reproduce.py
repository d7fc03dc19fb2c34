"""Reproductions: they resume to the same result, they judge what came out, and they refuse what they cannot do."""

import hashlib
import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from conjugo.errors import DataUnavailable, UnknownName
from conjugo.studies.records import Outcome, Run, read_journal
from conjugo.studies.reproduce import grids, names, nlcg_cifar, nlcg_cpu, nlcg_digits, nlcg_small, paper, reproduce
from conjugo.studies.reproduce.grids import Grid, GridResult
from conjugo.studies.reproduce.nlcg_cifar import CifarPlan, CifarResult
from conjugo.studies.reproduce.nlcg_digits import DigitsPlan, digits
from conjugo.studies.reproduce.nlcg_small import SmallPlan
from conjugo.studies.reproduce.paper import Claim, Request, above, compared, near, not_below
from conjugo.training import machine
from conjugo.training.data import Dataset, Split


def outcome(accuracy, loss=1.0):
    return Outcome(steps=1, samples=1, accuracy=accuracy, loss=loss, diverged=loss is None, seconds=0.0)


GAINS = {
    "sgd": -0.05,
    "momentum": 0.0,
    "rmsprop": 0.001,
    "nlcg": 0.01,
    "nlcg-step": 0.01,
    "nlcg-fr": 0.005,
    "nlcg-pr": -0.04,
    "adamw": 0.02,
}


def pretend(plan, task):
    """Best at the third learning rate, with a little noise; the range of the NLCG ones is one octave wider."""
    best = plan.grids[task.contender][3]
    distance = abs(torch.tensor(task.lr / best).log2().item()) / (2.0 if task.contender.startswith("nlcg") else 1.0)
    noise = int(hashlib.sha256(f"{task.contender} {task.study} {task.seed}".encode()).hexdigest(), 16) % 100 / 1e6
    return outcome(0.9 + GAINS[task.contender] - 0.0199 * distance - noise)


class Interrupted:
    """*pretend* that is stopped by Ctrl-C after so many runs."""

    def __init__(self, after):
        self.left = after

    def __call__(self, plan, task):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return pretend(plan, task)


def shown(result):
    console = Console(width=200, file=io.StringIO())
    for table in result.tables():
        console.print(table)
    return console.file.getvalue()


@pytest.fixture
def without_figures(monkeypatch):
    """Spares the seconds that drawing takes."""
    for module in (nlcg_digits, nlcg_cifar):
        monkeypatch.setattr(module, "save", lambda content, figures, out: grids.save(content, {}, out))


# ---- names and scales ----


def test_names_and_scales():
    assert {"nlcg", "tabular-cg"} <= set(names())
    assert set(paper("nlcg").scales) == {"cpu", "gpu", "full"}
    with pytest.raises(UnknownName, match="did you mean 'nlcg'"):
        reproduce("nlgc", scale="cpu")
    with pytest.raises(UnknownName, match="did you mean 'full'"):
        reproduce("nlcg", scale="ful")
    with pytest.raises(ValueError, match="jobs must be >= 1"):
        reproduce("nlcg", scale="cpu", jobs=0)


# ---- grids ----

GRID = Grid(study="s", contender="sgd", batch_size=4, lrs=(0.1, 0.2, 0.4, 0.8), seeds=2, choose=True)


def grid_runs(grid, accuracies, losses=None):
    """Runs of a whole grid with the given accuracy at each learning rate."""
    losses = [1.0] * len(accuracies) if losses is None else losses
    by_lr = dict(zip(grid.lrs, zip(accuracies, losses)))
    return [Run(task, outcome(*by_lr[task.lr])) for task in grid.ready([])]


def test_a_grid_is_tuned_then_run_with_fresh_seeds():
    tasks = GRID.ready([])
    assert [(t.lr, t.index) for t in tasks] == [(lr, 2 * i + j) for i, lr in enumerate(GRID.lrs) for j in range(2)]
    assert {t.phase for t in tasks} == {"tune"}
    runs = grid_runs(GRID, [0.5, 0.7, 0.9, 0.1])
    assert GRID.ready(runs[:-1]) == tasks
    finals = GRID.ready(runs)
    assert [(t.phase, t.lr) for t in finals] == [("final", 0.4)] * 2
    assert not {t.seed for t in tasks} & {t.seed for t in finals}
    assert len(tasks) + len(finals) == GRID.size


def test_a_grid_without_choice_has_only_final_runs():
    grid = replace(GRID, choose=False)
    runs = grid_runs(grid, [0.5, 0.7, 0.9, 0.1])
    assert {run.task.phase for run in runs} == {"final"}
    assert len(runs) == grid.size
    result = GridResult(grid, tuple(runs))
    assert result.complete
    assert result.best == 0.4
    assert result.accuracies == [0.9, 0.9]
    assert result.at(0.2) == [0.7, 0.7]


def test_the_best_learning_rate():
    equal = GridResult(GRID, tuple(grid_runs(GRID, [0.9, 0.9, 0.9, 0.1], [2.0, 1.0, None, 3.0])))
    assert equal.best == 0.2  # equal accuracies: the lowest loss, and one that is not finite is the highest
    assert not equal.at_edge
    assert equal.octaves == (2.0, True)
    edge = GridResult(GRID, tuple(grid_runs(GRID, [0.9, 0.5, 0.2, 0.1])))
    assert edge.at_edge
    assert edge.octaves is None


# ---- digits ----

SMALL = DigitsPlan(steps=(30, 60), seeds=2)
RUNS = 2 * 8 * (8 + 1) * 2


@pytest.fixture(scope="module")
def uninterrupted():
    return digits(Request(), plan=SMALL, run=pretend)


def test_the_plan_is_the_specified_one():
    plan = DigitsPlan()
    assert plan.steps == (30, 60, 120)
    assert plan.seeds == 4
    assert {len(lrs) for lrs in plan.grids.values()} == {8}
    assert sum(cell.size for cell in plan.cells(1437)) == 3 * 8 * (8 + 1) * 4


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize("stop_at", [0, 1, 100, RUNS - 1])
def test_digits_resume(tmp_path, uninterrupted, stop_at):
    with pytest.raises(KeyboardInterrupt):
        digits(Request(out=tmp_path), plan=SMALL, run=Interrupted(stop_at))
    assert len(read_journal(tmp_path / "journal.jsonl")) == stop_at
    rest = Interrupted(RUNS - stop_at)
    result = digits(Request(out=tmp_path, resume=True), plan=SMALL, run=rest)
    assert rest.left == 0
    assert result == uninterrupted
    assert result.text() == uninterrupted.text()
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(uninterrupted.to_dict()))


@pytest.mark.usefixtures("without_figures")
def test_a_folder_with_another_or_no_experiment(tmp_path):
    plan = DigitsPlan(steps=(30,), seeds=1)
    with pytest.raises(ValueError, match="out must be a folder that holds an experiment"):
        digits(Request(out=tmp_path, resume=True), plan=plan, run=pretend)
    digits(Request(out=tmp_path), plan=plan, run=pretend)
    with pytest.raises(ValueError, match="out must be a folder without an experiment"):
        digits(Request(out=tmp_path), plan=plan, run=pretend)
    with pytest.raises(ValueError, match="another experiment"):
        digits(Request(out=tmp_path, resume=True), plan=replace(plan, seeds=2), run=pretend)


def test_digits_tables_and_sentences(uninterrupted):
    text = shown(uninterrupted)
    assert "NLCG FR + BFGS" in text
    assert "89.3" in text  # expected of NLCG at 30 steps
    verdicts = {claim.statement.split(" is ")[0]: claim.verdict for claim in uninterrupted.claims()}
    assert verdicts["NLCG (FR + BFGS)"] == "reproduced"
    assert verdicts["AdamW"] == "reproduced"
    claims = {claim.statement: claim for claim in uninterrupted.claims()}
    wide = next(claim for statement, claim in claims.items() if "octave" in statement)
    assert wide.verdict == "reproduced"
    tolerant = next(claim for statement, claim in claims.items() if "three times" in statement)
    assert tolerant.verdict == "not reproduced"
    assert all(said.startswith("+2.") and said.endswith(" at 0.25") for _, said in tolerant.cases.values())
    assert "edge" not in uninterrupted.text()


def test_what_does_not_reproduce_is_said():
    def worse(plan, task):
        return outcome(0.5 if task.contender == "nlcg" else pretend(plan, task).accuracy)

    text = digits(Request(), plan=SMALL, run=worse).text()
    assert "Not reproduced: NLCG (FR + BFGS) is at least half a point above tuned momentum" in text
    assert "More than two points from the expected figure" in text
    assert "NLCG FR + BFGS at 30 steps (-39.3)" in text
    assert "at the edge of the grid for NLCG FR + BFGS at 30 steps and NLCG FR + BFGS at 60 steps" in text


def test_a_crash_is_reported_and_its_cell_left_out():
    def crashing(plan, task):
        if task.contender == "momentum" and task.study == "60":
            raise RuntimeError("out of memory")
        return pretend(plan, task)

    result = digits(Request(), plan=SMALL, run=crashing)
    assert result.cell("momentum", 60) is None
    assert result.cell("momentum", 30) is not None
    assert "out of memory" in result.text()
    assert "60 steps: not run" in result.text()
    assert "–" in shown(result)


def test_everything_crashes(tmp_path):
    def crashing(plan, task):
        raise RuntimeError("out of memory")

    result = digits(Request(out=tmp_path), plan=DigitsPlan(steps=(30,), seeds=1), run=crashing)
    assert result.cells == ()
    assert {claim.verdict for claim in result.claims()} == {"not judged"}
    assert (tmp_path / "accuracy.png").exists()
    resumed = digits(Request(out=tmp_path, resume=True), plan=DigitsPlan(steps=(30,), seeds=1), run=pretend)
    assert len(resumed.cells) == 8


@pytest.mark.parametrize(
    ("ours", "theirs", "better", "worse", "close"),
    [
        ([0.90, 0.91, 0.90], [0.80, 0.81, 0.80], True, False, False),
        ([0.80, 0.81, 0.80], [0.90, 0.91, 0.90], False, True, False),
        ([0.90, 0.91, 0.90], [0.89, 0.90, 0.89], False, False, True),  # significant, but too little
        ([0.99, 0.60, 0.90], [0.80, 0.50, 0.95], False, False, False),  # much, but not significant
        ([0.70, 0.50, 0.80], [0.80, 0.60, 0.90], False, False, False),
        ([0.9], [0.8], None, False, False),  # no test
    ],
)
def test_comparisons_count_where_they_are_significant(ours, theirs, better, worse, close):
    assert compared(ours, theirs, above(0.02))[0] is better
    assert compared(ours, theirs, not_below)[0] is not worse
    assert compared(ours, theirs, near(0.02))[0] is close
    assert compared(None, theirs, near(0.02)) == (None, "not run")


def test_claims():
    claim = Claim("it rains", {"a": (True, "wet"), "b": (False, "dry")})
    assert str(claim) == "Reproduced in part: it rains. a: wet; b: dry."
    assert Claim("it rains", {"a": (None, "?")}).verdict == "not judged"


def test_digits_really(tmp_path):
    """Few steps, real training, figures and all."""
    few = {"nlcg": (0.05, 0.2), "momentum": (0.05, 0.2)}
    plan = DigitsPlan(steps=(4,), grids=few, seeds=1)
    result = digits(Request(out=tmp_path), plan=plan)
    assert {path.name for path in tmp_path.iterdir()} >= {"accuracy.png", "accuracy.svg", "learning_rates.png"}
    tuned, final = result.cells[0].runs[0], result.cells[0].finals[0]
    assert tuned.outcome.samples == 4 * 1150
    assert final.outcome.samples == 4 * 1437
    assert 0.1 < final.outcome.accuracy < 1


# ---- CIFAR-10, small ----

FEW = SmallPlan(steps=2, train_limit=24, test_limit=12)


@pytest.fixture
def images(monkeypatch):
    """Synthetic images in the place of CIFAR-10."""

    def load(train, train_limit, test_limit):
        dataset = synthetic()
        parts = [(dataset.train, train_limit), (dataset.test, test_limit)]
        train, test = (Split(split.inputs[:limit], split.targets[:limit]) for split, limit in parts)
        return replace(dataset, train=train, test=test)

    monkeypatch.setattr(nlcg_small, "load_data", load)


def pretend_small(plan, task):
    """At the large rate momentum loses ten points and NLCG three."""
    lost = {"momentum": 0.1, "nlcg": 0.03}[task.contender] if task.lr > 1 else 0.0
    return outcome(0.43 - lost + 0.001 * task.seed)


def test_images_are_pooled():
    inputs = torch.tensor([[[[0, 1, 255, 255], [2, 4, 255, 255]]]], dtype=torch.uint8)
    split = Split(inputs, torch.zeros(1, dtype=torch.int64))
    small = nlcg_small.pooled(Dataset("x", "image", split, split, ("a",)))
    assert small.train.inputs.tolist() == [[[[2, 255]]]]
    assert small.test.inputs.dtype == torch.uint8


def test_small_really(images, tmp_path):
    result = nlcg_small.experiment(Request(out=tmp_path), FEW)
    assert not result.crashes
    runs = [run for cell in result.cells for run in cell.runs]
    assert len(runs) == FEW.runs == 8
    assert {run.outcome.samples for run in runs} == {2 * 24}
    assert nlcg_small.seconds_per_step(FEW) > 0
    assert json.loads((tmp_path / "results.json").read_text())["part"] == "cifar10"


def test_small_resumes_and_judges(tmp_path):
    whole = nlcg_small.experiment(Request(), FEW, run=pretend_small)
    left = iter(range(5))

    def interrupted(plan, task):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return pretend_small(plan, task)

    with pytest.raises(KeyboardInterrupt):
        nlcg_small.experiment(Request(out=tmp_path), FEW, run=interrupted)
    resumed = nlcg_small.experiment(Request(out=tmp_path, resume=True), FEW, run=pretend_small)
    assert resumed == whole
    large, best = resumed.claims()
    assert large.verdict == best.verdict == "reproduced"
    assert large.cases["lr 3"][1].startswith("+7.0 points (p")
    assert best.cases["lr 1"] == (True, "+0.0 points (no test)")
    table = shown(resumed)
    assert "(35.1)" in table  # expected of momentum at the large rate
    assert "lr 3 (3 seeds)" in table


def test_small_worse_is_not_reproduced():
    def worse(plan, task):
        return outcome(0.3 + 0.001 * task.seed + (0.1 if task.contender == "momentum" else 0.0))

    assert {claim.verdict for claim in nlcg_small.experiment(Request(), FEW, run=worse).claims()} == {"not reproduced"}


@pytest.mark.usefixtures("images")
def test_small_is_left_out_where_it_takes_too_long(tmp_path):
    def measure(seconds):
        return lambda plan: seconds

    step = 600 / (FEW.steps * FEW.runs)
    assert nlcg_small.why_not(Request(), FEW, measure=measure(0.99 * step)) is None
    reason = nlcg_small.why_not(Request(), FEW, measure=measure(2 * step))
    assert "8 runs would take about 20 minutes here" in reason
    assert "--force" in reason
    assert nlcg_small.why_not(Request(force=True), FEW, measure=measure(2 * step)) is None
    nlcg_small.experiment(Request(out=tmp_path), FEW, run=pretend_small)
    assert nlcg_small.why_not(Request(out=tmp_path, resume=True), FEW, measure=measure(2 * step)) is None


@pytest.mark.usefixtures("without_figures")
def test_without_its_data_it_is_left_out_and_done_later(monkeypatch, tmp_path):
    def absent(train, train_limit, test_limit):
        raise DataUnavailable("cifar10 is not here; set CONJUGO_DATA")

    whole, small = nlcg_cpu.digits, nlcg_small.experiment
    plan = DigitsPlan(steps=(30,), seeds=1)
    monkeypatch.setattr(nlcg_cpu, "digits", lambda request: whole(request, plan=plan, run=pretend))
    monkeypatch.setattr(nlcg_small, "experiment", lambda request: small(request, FEW, run=pretend_small))
    with monkeypatch.context() as patch:
        patch.setattr(nlcg_small, "load_data", absent)
        result = reproduce("nlcg", out=tmp_path)
    assert result.text().endswith("CIFAR-10, small, was left out: cifar10 is not here; set CONJUGO_DATA")
    assert len(result.tables()) == 2
    assert not (tmp_path / "cifar10").exists()
    monkeypatch.setattr(nlcg_small, "why_not", lambda request: None)
    later = reproduce("nlcg", out=tmp_path, resume=True)
    assert later.digits == result.digits
    assert len(later.tables()) == 3
    assert "on small CIFAR-10" in later.text()
    assert (tmp_path / "cifar10" / "results.json").exists()


# ---- ResNet-32 ----


def synthetic():
    """Images whose class is their brightest channel."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, 128, (48, 3, 8, 8), dtype=torch.uint8, generator=generator)
    targets = torch.arange(48) % 3
    inputs[torch.arange(48), targets] += 100
    return Dataset(
        "synthetic", "image", Split(inputs[:36], targets[:36]), Split(inputs[36:], targets[36:]), ("r", "g", "b")
    )


TINY = CifarPlan(
    train=replace(nlcg_cifar.TRAIN, model="resnet8", micro_batch=8, epochs=2.0, precision="float32"),
    grids={
        16: dict.fromkeys(nlcg_cifar.LABELS, (0.1, 0.2)),
        8: {"nlcg": (0.1,), "momentum": (0.1,)},
    },
    seeds=1,
    evaluations=2,
)


@pytest.mark.filterwarnings("ignore:batch norm sees 8 examples")
def test_resnet_dry(tmp_path):
    def run(plan, task):
        return nlcg_cifar.run_on(plan, task, synthetic())

    result = nlcg_cifar.experiment(Request(out=tmp_path), TINY, run=run)
    assert len(result.cells) == 7
    assert not result.crashes
    large = result.cell("nlcg-step", 16)
    assert [run.outcome.steps for run in large.runs] == [4, 4]
    assert [run.outcome.samples for run in large.runs] == [64, 64]
    assert "lr 0.2: " in shown(result)
    assert "NLCG is above momentum" in result.text()
    assert (tmp_path / "curves_16.svg").exists()
    again = nlcg_cifar.experiment(Request(out=tmp_path, resume=True), TINY, run=Interrupted(0))
    assert again == result


def test_resnet_recipe():
    plan = CifarPlan()
    assert sum(cell.size for cell in plan.cells()) == 5 * 3 * 2 + 5 * 2
    assert int(plan.train.epochs * 50_000 / nlcg_cifar.LARGE) == 610
    assert int(plan.train.warmup * 610) == 76


def test_resnet_needs_an_accelerator(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "choose_device", lambda name: torch.device("cpu"))
    with pytest.raises(ValueError, match=r"no accelerator.*scale 'cpu'"):
        reproduce("nlcg", scale="gpu", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_forced_it_still_needs_the_data(monkeypatch, tmp_path):
    def absent(train, train_limit, test_limit):
        raise DataUnavailable("cifar100 is not here")

    monkeypatch.setattr(machine, "choose_device", lambda name: torch.device("cpu"))
    monkeypatch.setattr(nlcg_cifar, "load_data", absent)
    with pytest.raises(DataUnavailable):
        reproduce("nlcg", scale="gpu", out=tmp_path / "run", force=True)
    assert not (tmp_path / "run").exists()


def test_resnet_claims():
    def cell(name, batch, *accuracies):
        lrs = (1.6, 3.2)[: len(accuracies)]
        grid = Grid(study="", contender=name, batch_size=batch, lrs=lrs, seeds=2, choose=False)
        values = [value for pair in accuracies for value in pair]
        return GridResult(grid, tuple(Run(task, outcome(value)) for task, value in zip(grid.ready([]), values)))

    plan = CifarPlan(grids={16: {"nlcg": (1.6, 3.2), "momentum": (1.6, 3.2)}, 8: {"nlcg": (1.6,), "momentum": (1.6,)}})
    cells = (
        cell("nlcg", 16, (0.5, 0.51), (0.4, 0.41)),
        cell("momentum", 16, (0.4, 0.41), (0.39, 0.4)),
        cell("nlcg", 8, (0.6, 0.61)),
        cell("momentum", 8, (0.5, 0.51)),
    )
    best, largest, control = CifarResult(plan, cells, (), {}).claims()
    assert best.cases["NLCG FR + BFGS"] == (True, "+10.0 points (p = 0.005)")
    assert best.cases["NLCG FR + BFGS, line search"] == (None, "not run")
    assert largest.verdict == "not reproduced"
    assert control.verdict == "not reproduced"


# ---- ImageNet ----


def test_full_is_a_plan(tmp_path):
    result = reproduce("nlcg", scale="full", out=tmp_path)
    assert result.steps == 1759
    assert "1,759 steps" in shown(result)
    assert result.text().startswith("Nothing was run")
    assert json.loads((tmp_path / "results.json").read_text())["train"]["batch_size"] == 65_536
