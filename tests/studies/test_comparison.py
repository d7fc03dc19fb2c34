import csv
import json
from dataclasses import replace

import pytest
import torch
from tests.studies.stand_ins import config, pretend

from conjugo import training
from conjugo.errors import CorruptFile, UnknownName
from conjugo.studies import CompareConfig, CompareResult, compare, load_result
from conjugo.studies.compare import run_task
from conjugo.studies.plans import FIRST_TUNING_SEED
from conjugo.studies.runs import load_data, tuning_data
from conjugo.training import TrainConfig, data, train

# ---- the protocol ----


def test_every_cell_gets_the_same_tuning_budget_and_fresh_seeds():
    result = compare(config(), run=pretend)
    assert [(cell.contender.name, cell.batch_size) for cell in result.cells] == [
        ("momentum", 16), ("sgd", 16), ("momentum", 120), ("sgd", 120),
    ]  # fmt: skip
    for cell in result.cells:
        assert cell.complete
        assert [run.task.index for run in cell.trials] == [0, 1, 2, 3]
        assert [run.task.seed for run in cell.trials] == [FIRST_TUNING_SEED + k for k in range(4)]
        assert [run.task.seed for run in cell.finals] == [0, 1]
        assert all(run.task.setting == cell.best.setting for run in cell.finals)
        assert cell.best.lr == max(cell.trials, key=lambda run: run.outcome.accuracy).task.lr
        assert all((run.task.second is None) == (cell.contender.name == "sgd") for run in (*cell.trials, *cell.finals))


def with_scores(scores, **changes):
    """The first cell of a comparison whose trials have *scores* (accuracy, loss), by index."""

    def run(config, task):
        accuracy, loss = scores[task.index]
        return replace(pretend(config, task), accuracy=accuracy, loss=loss)

    return compare(config(batch_sizes=(16,), optimizers=("momentum",), trials=len(scores), **changes), run=run).cells[0]


def test_of_few_trials_the_best_trial_wins_then_the_lowest_loss_then_the_earliest():
    assert with_scores([(0.8, 0.1), (0.9, 0.5), (0.9, 0.4)]).best.index == 2
    assert with_scores([(0.9, 0.4), (0.9, None), (0.9, 0.4)]).best.index == 0


def test_the_best_settings_are_repeated_and_the_best_mean_wins():
    lucky = (0.95, 0.1), (0.90, 0.2), (0.93, 0.1), (0.2, 2.0), (0.1, None)
    cell = with_scores([*lucky, (0.30, 2.0), (0.92, 0.1), (0.5, 1.0)])  # only the second holds when repeated
    assert [run.task.setting for run in cell.trials[5:]] == [cell.trials[k].task.setting for k in (0, 2, 1)]
    assert len({run.task.seed for run in cell.trials}) == 8
    assert cell.best.setting == cell.trials[2].task.setting
    assert all(run.task.setting == cell.best.setting for run in cell.finals)


def test_with_many_trials_three_settings_are_repeated_in_turns():
    cell = with_scores([(k / 20, 1.0) for k in range(20)])
    settings = [run.task.setting for run in cell.trials]
    assert settings[11:] == [settings[10], settings[9], settings[8]] * 3
    assert cell.best.setting == settings[8]  # its repetitions came last, with the highest scores


def test_the_default_target_is_one_point_below_the_baseline_at_the_smallest_batch():
    result = compare(config(), run=pretend)
    baseline = result.cells[0].accuracies
    assert result.target == pytest.approx(sum(baseline) / 2 - 0.01, abs=5e-4)
    assert compare(config(target=0.7), run=pretend).target == 0.7


def test_tuning_data_splits_the_training_data_and_leaves_the_test_split_alone():
    iris = data.load("iris")
    tuned = tuning_data(iris, 0.2, seed=3)
    assert (len(tuned.train), len(tuned.test)) == (96, 24)
    both = torch.cat([torch.cat([split.inputs, split.targets[:, None]], dim=1) for split in (tuned.train, tuned.test)])
    whole = torch.cat([iris.train.inputs, iris.train.targets[:, None]], dim=1)
    assert sorted(both.tolist()) == sorted(whole.tolist())
    assert torch.equal(tuning_data(iris, 0.2, seed=3).test.inputs, tuned.test.inputs)
    with pytest.raises(ValueError, match="validation must be"):
        tuning_data(iris, 0.001, seed=0)


def test_tuning_never_sees_the_test_split(monkeypatch):
    honest = compare(config(seeds=1))
    iris = data.load("iris")
    spoiled = replace(iris, test=replace(iris.test, inputs=torch.full_like(iris.test.inputs, torch.nan)))
    load_data.cache_clear()
    monkeypatch.setattr(data, "load", lambda *args, **kwargs: spoiled)
    blind = compare(config(seeds=1))
    load_data.cache_clear()
    assert [cell.trials for cell in blind.cells] == [cell.trials for cell in honest.cells]
    assert [cell.finals for cell in blind.cells] != [cell.finals for cell in honest.cells]


def test_every_run_processes_the_same_number_of_samples():
    result = compare(config(batch_sizes=(8, 40, "full"), trials=1, seeds=1))
    for cell in result.cells:
        outcome = cell.finals[0].outcome
        assert outcome.samples == outcome.steps * cell.batch_size == 240
        assert cell.trials[0].outcome.steps == outcome.steps
        assert outcome.curve[-1] == (outcome.steps, outcome.accuracy)


def test_limits_cut_the_data():
    result = compare(config(train_limit=60, test_limit=10, trials=1, seeds=1))
    assert result.num_train == 60
    assert result.batch_sizes == (16, 60)
    assert all(
        round(10 * accuracy) == pytest.approx(10 * accuracy) for cell in result.cells for accuracy in cell.accuracies
    )


def test_a_run_that_diverges_is_a_result():
    task = compare(config(trials=1, seeds=1), run=pretend).cells[0].finals[0].task
    outcome = run_task(
        config(train=TrainConfig(data="iris", epochs=40.0)), replace(task, contender="sgd", second=None, lr=1e30)
    )
    assert outcome.diverged
    assert outcome.loss is None or outcome.loss > 0
    assert 0 <= outcome.accuracy <= 1


def test_the_chosen_setting_reaches_the_optimizer(monkeypatch):
    seen = []
    monkeypatch.setattr(training, "train", lambda config, **rest: seen.append(config) or train(config, **rest))
    compare(config(optimizers=("momentum", "adamw"), trials=1, seeds=1, batch_sizes=(16,)))
    momentum, adamw = seen[0], seen[-1]
    assert set(momentum.optimizer_options) == {"momentum"}
    assert set(adamw.optimizer_options) == {"beta1"}
    assert (momentum.optimizer, adamw.optimizer) == ("momentum", "adamw")
    assert (momentum.steps, momentum.batch_size, momentum.evaluations, momentum.checkpoints) == (15, 16, 5, 0)


# ---- the same result whoever does it ----


def test_jobs_do_not_change_the_result():
    small = config(trials=3, optimizers=("nlcg", "momentum"))
    assert compare(small, jobs=2) == compare(small)


# ---- the run directory ----


def test_what_the_run_directory_holds(tmp_path):
    result = compare(config(), out=tmp_path, run=pretend)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {
        "config.json", "journal.jsonl", "tuning.sqlite3", "results.json", "results.csv", "report.html",
        "accuracy.png", "accuracy.svg", "steps_to_target.png", "steps_to_target.svg",
    }  # fmt: skip
    assert CompareConfig.from_dict(json.loads((tmp_path / "config.json").read_text())) == config()
    assert CompareResult.from_dict(json.loads((tmp_path / "results.json").read_text())) == result
    assert load_result(tmp_path) == result
    with open(tmp_path / "results.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["optimizer"], row["batch_size"]) for row in table] == [
        (cell.contender.name, str(cell.batch_size)) for cell in result.cells
    ]
    assert float(table[0]["accuracy"]) == pytest.approx(sum(result.cells[0].accuracies) / 2, abs=1e-15)


@pytest.mark.usefixtures("no_report")
def test_without_the_journal_the_results_are_enough(tmp_path):
    result = compare(config(), out=tmp_path, run=pretend)
    (tmp_path / "journal.jsonl").unlink()
    assert load_result(tmp_path) == result


@pytest.mark.usefixtures("no_report")
def test_a_folder_holds_one_comparison(tmp_path):
    compare(config(), out=tmp_path, run=pretend)
    before = (tmp_path / "journal.jsonl").read_bytes()
    with pytest.raises(ValueError, match="unless that is resumed"):
        compare(config(), out=tmp_path, run=pretend)
    other = config(trials=5, train=TrainConfig(data="iris", epochs=3.0))
    with pytest.raises(ValueError, match=r"train\.epochs was 2\.0 and is now 3\.0; trials was 4 and is now 5"):
        compare(other, out=tmp_path, resume=True, run=pretend)
    with pytest.raises(ValueError, match="a folder that holds a comparison, to resume it"):
        compare(config(), out=tmp_path / "nothing", resume=True, run=pretend)
    assert (tmp_path / "journal.jsonl").read_bytes() == before
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"config": {}, "cells": []}'])
def test_damaged_results_are_reported(tmp_path, damage):
    (tmp_path / "results.json").write_text(damage)
    with pytest.raises(CorruptFile, match=r"results\.json"):
        load_result(tmp_path)


def test_a_folder_without_results(tmp_path):
    with pytest.raises(ValueError, match="a folder that holds a comparison"):
        load_result(tmp_path)


# ---- bad input ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizers": ()}, "optimizers must be at least one name"),
        ({"optimizers": ("sgd", "sgd", "momentum")}, "without repetition"),
        ({"batch_sizes": ()}, "batch_sizes must be different positive integers or 'full'"),
        ({"batch_sizes": (16, 16)}, "batch_sizes must be different"),
        ({"batch_sizes": (0,)}, "batch_sizes must be different"),
        ({"batch_sizes": ("half",)}, "batch_sizes must be different"),
        ({"trials": 0}, "trials must be >= 1"),
        ({"seeds": 0}, "seeds must be from 1 to"),
        ({"seed": -1}, "seed must be >= 0"),
        ({"validation": 1.0}, "validation must be a fraction"),
        ({"target": 90.0}, "target must be None or in"),
        ({"evaluations": 0}, "evaluations must be >= 1"),
        ({"threads": 0}, "threads must be >= 1"),
        ({"train_limit": 1}, "train_limit must be None or >= 2"),
        ({"train": TrainConfig(steps=3)}, "train.steps must be None: the comparison sets it"),
        ({"train": TrainConfig(batch_growth=1.0, batch_max=64, noise_scale=4)}, "train.batch_growth must be 0.0"),
        (
            {"train": TrainConfig(shard_state=True)},
            "TrainConfig: shard_state must be False unless the optimizer is NLCG",
        ),
        ({"train": TrainConfig(lr=0.1)}, "train.lr must be None"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(UnknownName, match="did you mean 'adamw'"):
        config(optimizers=("momentum", "adam"))
    with pytest.raises(UnknownName, match=r"baseline .* 'nesterov'.*Known: momentum, sgd"):
        config(baseline="nesterov")


def test_a_batch_larger_than_the_data(tmp_path):
    with pytest.raises(ValueError, match="batch_sizes must be at most the 120 training examples, or 'full', got 121"):
        compare(config(batch_sizes=(16, 121)), out=tmp_path / "out", run=pretend)
    assert not (tmp_path / "out").exists()


def test_jobs_have_to_be_positive():
    with pytest.raises(ValueError, match="jobs must be >= 1"):
        compare(config(), jobs=0, run=pretend)


def test_configurations_go_through_json():
    full = config(target=0.8, batch_sizes=(4, "full"), train_limit=50, threads=2)
    assert CompareConfig.from_dict(json.loads(json.dumps(full.to_dict()))) == full
