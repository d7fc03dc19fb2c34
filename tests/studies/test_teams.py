"""Runs that several workers share: the figures of one worker, and what a team does when a member fails."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.studies.stand_ins import config, pretend

from conjugo.cli import main
from conjugo.studies import compare
from conjugo.studies.executors import Teams


def small(**changes):
    base = config(optimizers=("nlcg", "momentum"), baseline="momentum", trials=2, seeds=1, **changes)
    return replace(base, train=replace(base.train, data="iris", model="mlp", epochs=3.0))


def test_a_comparison_with_two_workers_is_that_with_one(tmp_path):
    alone = compare(small())
    shared = compare(small(workers=2), out=tmp_path / "two")
    assert [run.task for run in shared.runs] == [run.task for run in alone.runs]  # so tuning saw the same
    for ours, theirs in zip(shared.runs, alone.runs, strict=True):
        assert (ours.outcome.loss is None) == (
            theirs.outcome.loss is None
        )  # one of the learning rates is far too large
        if theirs.outcome.loss is not None:
            assert ours.outcome.loss == pytest.approx(theirs.outcome.loss, rel=1e-3)
            assert ours.outcome.accuracy == pytest.approx(theirs.outcome.accuracy, abs=0.03)
    assert "2 processes share each run" in (tmp_path / "two" / "report.html").read_text()
    assert json.loads((tmp_path / "two" / "config.json").read_text())["workers"] == 2


def misbehave(folder, task):
    """A run in which, the first time, rank 1 does what the task's name says; the others wait in a collective."""
    rank, flag = dist.get_rank(), Path(folder) / f"{task.contender}-{task.index}"
    (Path(folder) / f"pid-{os.getpid()}").touch()
    if rank == 1 and not flag.exists():
        flag.touch()
        if task.contender == "momentum":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError("no luck")
    total = torch.tensor(float(rank))
    dist.all_reduce(total)
    return replace(pretend(None, task), accuracy=total.item())


class Bound:
    """Picklable: *misbehave* in a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __call__(self, task):
        return misbehave(self.folder, task)


@pytest.mark.parametrize(
    ("contender", "said"),
    [("momentum", "worker 1 of 2 died (exit code -9)"), ("sgd", "worker 1 of 2: Traceback")],
)
def test_a_failed_member_costs_its_run_and_the_team_is_replaced(contender, said, tmp_path):
    task = next(
        run.task for run in compare(config(trials=1, seeds=1), run=pretend).runs if run.task.contender == contender
    )
    with Teams(Bound(tmp_path), jobs=1, threads=1, workers=2, device="cpu") as pool:
        for attempt in range(3):
            pool.submit(task)
            same, result = pool.next()
            assert same == task
            if attempt == 0:
                assert result.error.startswith(said)
                assert contender == "momentum" or "OSError: no luck" in result.error
            else:
                assert result.accuracy == 1.0  # the sum of the ranks 0 and 1
    pids = [int(path.name[4:]) for path in tmp_path.glob("pid-*")]
    assert len(pids) in (3, 4)  # rank 0 of the first team may be killed before it has come so far
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_two_teams_at_a_time(tmp_path):
    tasks = [run.task for run in compare(config(trials=1, seeds=1), run=pretend).runs]
    for task in tasks:
        (tmp_path / f"{task.contender}-{task.index}").touch()
    with Teams(Bound(tmp_path), jobs=2, threads=1, workers=2, device="cpu") as pool:
        assert pool.room == 2
        waiting, done = list(tasks), []
        while len(done) < len(tasks):
            while waiting and pool.room:
                pool.submit(waiting.pop())
            task, result = pool.next()
            done.append(task)
            assert result.accuracy == 1.0
    assert sorted(map(str, done)) == sorted(map(str, tasks))
    assert len(list(tmp_path.glob("pid-*"))) == 4


def test_other_numbers_of_workers_are_other_comparisons(tmp_path, capsys):
    compare(config(trials=1, seeds=1), out=tmp_path, run=pretend)
    with pytest.raises(ValueError, match="workers was 1 and is now 2"):
        compare(config(trials=1, seeds=1, workers=2), out=tmp_path, resume=True, run=pretend)
    kept = json.loads((tmp_path / "config.json").read_text())
    del kept["workers"]  # as older versions wrote it
    (tmp_path / "config.json").write_text(json.dumps(kept))
    compare(config(trials=1, seeds=1), out=tmp_path, resume=True, run=pretend)
    with pytest.raises(ValueError, match="batch_sizes must be at least 17, the workers, got 16"):
        compare(config(workers=17), run=pretend)
    with pytest.raises(ValueError, match="workers must be >= 1, got 0"):
        config(workers=0)
    assert main(["reproduce", "nlcg", "--workers", "0", "--out", str(tmp_path / "new")]) == 2
    assert "workers must be >= 1, got 0" in capsys.readouterr().err
