"""Runs that several workers share: the figures of one worker, and what a team does when a member fails."""

import json
import socket
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.studies.stand_ins import config, pretend, sum_of_ranks

from conjugo.cli import main
from conjugo.errors import CorruptFile
from conjugo.studies import compare, executors, report
from conjugo.studies.executors import Teams
from conjugo.studies.records import Crash, Task
from conjugo.studies.reproduce import reproduce
from conjugo.training import TrainConfig

TASK = Task(contender="good", batch_size=16, phase="tune", index=0, seed=0, lr=0.1)


def test_a_comparison_with_two_workers_is_that_with_one():
    small = config(
        train=TrainConfig(data="digits", epochs=3.0, schedule="cosine"),
        optimizers=("nlcg", "momentum"),
        batch_sizes=(256, "full"),
        trials=2,
        seeds=1,
    )
    alone, shared = compare(small), compare(replace(small, workers=2))
    assert [run.task for run in shared.runs] == [run.task for run in alone.runs]  # so tuning chose the same
    for ours, theirs in zip(shared.runs, alone.runs, strict=True):
        assert ours.outcome.loss == pytest.approx(theirs.outcome.loss, rel=1e-5)
        assert ours.outcome.accuracy == theirs.outcome.accuracy
        assert ours.outcome.samples == theirs.outcome.samples


def test_the_report_says_how_many_workers_there_were():
    alone = compare(config(trials=1, seeds=1), run=pretend)
    shared = replace(alone, config=replace(alone.config, workers=2))
    assert "2 processes share each run" in report.page(shared)


def test_a_failed_member_costs_its_run_and_the_team_is_replaced(tmp_path):
    with Teams(partial(sum_of_ranks, tmp_path), jobs=1, threads=1, workers=2, device="cpu") as pool:

        def result(contender):
            pool.submit(replace(TASK, contender=contender))
            return pool.next()[1]

        killed = result("killed")
        assert killed.error.startswith("worker 1 of 2 died (exit code -9)")  # not that rank 0 lost a connection
        assert result("good").accuracy == 1.0  # the sum of the ranks 0 and 1
        raised = result("raises")
        assert raised.error.startswith("worker 1 of 2: Traceback")
        assert "OSError: no luck" in raised.error
        assert result("good").accuracy == result("good").accuracy == 1.0
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 6  # three teams
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_two_teams_at_a_time(tmp_path):
    with Teams(partial(sum_of_ranks, tmp_path), jobs=2, threads=1, workers=2, device="cpu") as pool:
        for expected_room in (2, 1):
            assert pool.room == expected_room
            pool.submit(TASK)
        assert [pool.next()[1].accuracy for _ in range(2)] == [1.0, 1.0]
    assert len(list(tmp_path.iterdir())) == 4


def test_a_team_that_does_not_come_together(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(executors, "_free_port", lambda: port)
        with Teams(partial(sum_of_ranks, tmp_path), jobs=1, threads=1, workers=2, device="cpu") as pool:
            pool.submit(TASK)
            _, result = pool.next()
    assert isinstance(result, Crash)
    assert f"port {port} of this host is taken" in result.error


def test_workers_need_a_gpu_each(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(ValueError, match=r"jobs x workers must be at most 3, the GPUs: .* got 4"):
        compare(config(workers=2), out=tmp_path / "out", jobs=2, run=pretend)
    with pytest.raises(ValueError, match=r"jobs x workers must be at most 3, the GPUs: .* got 4"):
        reproduce("nlcg", out=tmp_path / "out", workers=4)
    assert not (tmp_path / "out").exists()
    for changes in ({"workers": 3}, {"workers": 1}):
        executors.check_devices("compare", jobs=1, **changes)
    executors.check_devices("compare", jobs=4, workers=1)
    executors.check_devices("compare", jobs=4, workers=2, device="cpu")


@pytest.mark.usefixtures("no_report")
def test_other_numbers_of_workers_are_other_comparisons(tmp_path):
    compare(config(trials=1, seeds=1), out=tmp_path, run=pretend)
    with pytest.raises(ValueError, match=r"another configuration: workers was 1 and is now 2$"):
        compare(config(trials=1, seeds=1, workers=2), out=tmp_path, resume=True, run=pretend)


@pytest.mark.usefixtures("no_report")
def test_a_comparison_of_an_older_version_goes_on(tmp_path):
    compare(config(trials=1, seeds=1), out=tmp_path, run=pretend)
    path = tmp_path / "config.json"
    kept = json.loads(path.read_text())
    del kept["workers"], kept["train"]["parallel"], kept["train"]["replica_check"]
    path.write_text(json.dumps(kept))
    compare(config(trials=1, seeds=1), out=tmp_path, resume=True, run=pretend)
    with pytest.raises(ValueError, match=r"another configuration: seeds was 1 and is now 2; train.parallel was 'ddp'"):
        compare(
            config(trials=1, train=replace(config().train, parallel="fsdp")), out=tmp_path, resume=True, run=pretend
        )
    path.write_text("{}")
    with pytest.raises(CorruptFile, match=r"config\.json: not the configuration of a comparison"):
        compare(config(trials=1, seeds=1), out=tmp_path, resume=True, run=pretend)


def test_bad_numbers_of_workers(tmp_path, capsys):
    with pytest.raises(ValueError, match="batch_sizes must be at least 17, the workers, got 16"):
        compare(config(workers=17), run=pretend)
    with pytest.raises(ValueError, match="workers must be >= 1, got 0"):
        config(workers=0)
    with pytest.raises(ValueError, match=r"train.device must be 'auto', 'cpu' or 'cuda' where workers share a run"):
        config(workers=2, train=TrainConfig(device="cuda:1"))
    assert main(["reproduce", "nlcg", "--workers", "0", "--out", str(tmp_path / "new")]) == 2
    assert "workers must be >= 1, got 0" in capsys.readouterr().err
