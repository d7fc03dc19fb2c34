"""`compare`: optimizers x batch sizes, all tuned with the same budget, then measured with fresh seeds.

Protocol. Every run processes the same number of samples, forward and backward (epochs x training examples), so nothing is
free. A cell is an (optimizer, batch size) pair. Each cell gets the same number of tuning trials over the learning rate and,
where the optimizer has one, its second sensitive hyperparameter; they train on a part of the training data, for as many
steps as the final runs, and are judged on the rest of it. From 8 trials on nearly half of them repeat the three best settings
with other seeds, and the best mean wins. Its setting is then trained on all training data with seeds that tuning never saw, and
only these runs touch the test split.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from conjugo._files import write_aside
from conjugo.errors import CorruptFile, check
from conjugo.studies import statistics
from conjugo.studies.engine import execute
from conjugo.studies.executors import check_devices
from conjugo.studies.plans import TunedCell, of_phase, scores
from conjugo.studies.records import Journal, Outcome, Run, Task, read_journal
from conjugo.studies.results import CellResult, CompareConfig, CompareResult
from conjugo.studies.runs import Contender, load_data, num_steps, train_once, tuning_data, versions
from conjugo.studies.tuning import StudyFile

__all__ = [
    "CompareConfig",
    "CompareResult",
    "TrainTask",
    "compare",
    "differences",
    "load_result",
    "run_task",
    "save_result",
]

TrainTask = Callable[[CompareConfig, Task], Outcome]
"""Does one run of a comparison: :func:`run_task`, or a stand-in (a module's function, so that worker processes find it)."""

_tuning_data = lru_cache(maxsize=1)(tuning_data)


def run_task(config: CompareConfig, task: Task) -> Outcome:
    """Do one run of a comparison."""
    dataset = load_data(config.train, config.train_limit, config.test_limit)
    steps = num_steps(config.train.epochs, len(dataset.train), task.batch_size)
    if task.phase == "tune":
        dataset = _tuning_data(dataset, config.validation, config.seed)
    contender = Contender.from_catalogue(task.contender)
    return train_once(config.train, contender, task, dataset, steps=steps, evaluations=config.evaluations)


def compare(
    config: CompareConfig,
    *,
    out: Path | None = None,
    jobs: int = 1,
    resume: bool = False,
    progress: bool | None = None,
    run: TrainTask = run_task,
) -> CompareResult:
    """Compare optimizers over batch sizes; the module's docstring tells the protocol.

    out: run directory; receives config.json, journal.jsonl (every run as it ends), tuning.sqlite3 (Optuna's studies),
    results.json, results.csv, plots and report.html. None writes nothing. jobs: runs at the same time, each
    in a process of its own (1 with ``config.workers`` 1: in this one) or in ``config.workers`` of them.
    resume: continue the comparison in *out*: what is in its journal is not done again, and the result is that of the
    uninterrupted comparison. progress: None shows a bar if standard error is a terminal.

    A run that crashes ends its cell; the other cells go on, the messages are in ``CompareResult.crashes``, and resuming
    tries it again. Raises ValueError for a batch larger than the data, if *out* holds a comparison already and *resume*
    is False, and if it holds none or one with another configuration and *resume* is True.
    """
    check(jobs >= 1, "compare", "jobs", jobs, ">= 1")
    check_devices("compare", jobs=jobs, workers=config.workers, device=_device(config))
    _check_installed("optuna", *(() if out is None else ("matplotlib",)))
    num_train = len(load_data(config.train, config.train_limit, config.test_limit).train)
    plans = _plans(config, num_train)
    if out is None:
        return _execute(config, plans, num_train, None, jobs=jobs, progress=progress, run=run)
    out = Path(out)
    _open_directory(out, config, resume=resume)
    result = _execute(config, plans, num_train, out, jobs=jobs, progress=progress, run=run)
    save_result(result, out)
    return result


def _check_installed(*packages: str) -> None:
    """Say before hours of work what would stop it at its end."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"a comparison needs {' and '.join(missing)}: pip install 'conjugo[study]'")


def _plans(config: CompareConfig, num_train: int) -> list[TunedCell]:
    sizes = sorted({num_train if size == "full" else size for size in config.batch_sizes})
    accepted = f"at most the {num_train} training examples, or 'full'"
    check(sizes[-1] <= num_train, "compare", "batch_sizes", sizes[-1], accepted)
    check(sizes[0] >= config.workers, "compare", "batch_sizes", sizes[0], f"at least {config.workers}, the workers")
    return [
        TunedCell(Contender.from_catalogue(name), size, config.trials, config.seeds, config.seed)
        for size in sizes
        for name in config.optimizers
    ]


def _execute(
    config: CompareConfig,
    plans: Sequence[TunedCell],
    num_train: int,
    out: Path | None,
    *,
    jobs: int,
    progress: bool | None,
    run: TrainTask,
) -> CompareResult:
    study = StudyFile(None if out is None else out / "tuning.sqlite3")
    with Journal(None if out is None else out / "journal.jsonl") as journal:
        begun = _result(config, plans, journal.runs, {}, num_train, versions(config.train))
        if out is not None:
            _write_json(out / "results.json", begun.to_dict())  # what load_result needs, should we be interrupted

        def keep(plan: TunedCell) -> None:
            trials = of_phase("tune", [run for run in journal.runs if run.task.cell == plan.cell])
            study.record(f"{plan.contender.name}, batch {plan.batch_size}", plan.contender.axes, scores(trials))

        for plan in plans:
            keep(plan)
        by_cell = {plan.cell: plan for plan in plans}
        crashes = execute(
            plans,
            partial(run, config),
            journal,
            jobs=jobs,
            threads=config.threads,
            workers=config.workers,
            device=_device(config),
            progress=progress,
            on_finish=lambda run: keep(by_cell[run.task.cell]) if run.task.phase == "tune" else None,
        )
        messages = {crash.task.cell: f"{crash.task}:\n{crash.error}" for crash in crashes}
        return _result(config, plans, journal.runs, messages, num_train, begun.versions)


def _device(config: CompareConfig) -> str | None:
    return "cpu" if config.train.device == "cpu" else None


def _result(
    config: CompareConfig,
    plans: Sequence[TunedCell],
    runs: Sequence[Run],
    crashes: Mapping[tuple[str, str, int], str],
    num_train: int,
    versions: Mapping[str, str],
) -> CompareResult:
    cells = []
    for plan in plans:
        mine = [run for run in runs if run.task.cell == plan.cell]
        trials, finals = of_phase("tune", mine), of_phase("final", mine)
        complete = len(finals) == config.seeds
        crash = None if complete else crashes.get(plan.cell)
        cells.append(CellResult(plan.contender, plan.batch_size, trials, finals, complete, crash))
    target = config.target if config.target is not None else _default_target(config, cells)
    return CompareResult(config=config, cells=tuple(cells), num_train=num_train, target=target, versions=versions)


def _default_target(config: CompareConfig, cells: Sequence[CellResult]) -> float:
    """One point below the baseline at the smallest batch where it is complete (1 if it is complete nowhere)."""
    done = [cell for cell in cells if cell.complete and cell.contender.name == config.baseline]
    return round(statistics.mean_sd(done[0].accuracies)[0] - 0.01, 3) if done else 1.0


# ---- the run directory ----


def _open_directory(out: Path, config: CompareConfig, *, resume: bool) -> None:
    """Make sure that *out* is a new run directory of *config*, or with *resume* the old one of the same configuration."""
    path = out / "config.json"
    if not path.exists():
        check(not resume, "compare", "out", str(out), "a folder that holds a comparison, to resume it")
        out.mkdir(parents=True, exist_ok=True)
        _write_json(path, config.to_dict(), indent=1)
        return
    check(resume, "compare", "out", str(out), "a folder without a comparison, unless that is resumed")
    kept = _read_json(path)
    try:
        before = CompareConfig.from_dict(kept)  # settings that older versions did not have get their defaults
    except (AttributeError, KeyError, TypeError) as error:
        raise CorruptFile(f"{path}: not the configuration of a comparison ({error!r})") from error
    if different := differences(before.to_dict(), config.to_dict()):
        raise ValueError(f"compare: {out} holds a comparison with another configuration: {'; '.join(different)}")


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What is not the same in two nested configurations, in words."""
    found = []
    for key in sorted({*old, *new}):
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            found += differences(before, now, f"{prefix}{key}.")
        elif before != now:
            found.append(f"{prefix}{key} was {before!r} and is now {now!r}")
    return found


def _write_json(path: Path, content: Any, indent: int | None = None) -> None:
    write_aside(path, json.dumps(content, allow_nan=False, indent=indent))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise CorruptFile(f"{path}: not valid JSON ({error})") from error


def save_result(result: CompareResult, out: Path) -> None:
    """Write results.json, results.csv, the plots as PNG and SVG, and report.html into *out*."""
    from conjugo.studies import report, summary

    _write_json(out / "results.json", result.to_dict())
    write_aside(out / "results.csv", summary.csv_text(result))
    report.write_plots(result, out)
    report.write(result, out / "report.html")


def load_result(out: Path) -> CompareResult:
    """The result kept in run directory *out*; of an unfinished comparison, as far as its journal goes.

    Raises ValueError if there is none, CorruptFile if it cannot be read.
    """
    path, journal = Path(out) / "results.json", Path(out) / "journal.jsonl"
    check(path.exists(), "load_result", "out", str(out), "a folder that holds a comparison")
    try:
        kept = CompareResult.from_dict(_read_json(path))
    except (AttributeError, KeyError, TypeError) as error:
        raise CorruptFile(f"{path}: not the result of a comparison ({error!r})") from error
    if not journal.exists():
        return kept
    plans = [
        TunedCell(cell.contender, cell.batch_size, kept.config.trials, kept.config.seeds, kept.config.seed)
        for cell in kept.cells
    ]
    crashes = {plan.cell: cell.crash for plan, cell in zip(plans, kept.cells) if cell.crash is not None}
    return _result(kept.config, plans, read_journal(journal), crashes, kept.num_train, kept.versions)
