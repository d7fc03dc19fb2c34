"""Whatever interrupts a comparison, resuming it gives the result of the uninterrupted one and repeats no finished run."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tests.studies.stand_ins import config, pretend, pretend_and_die_once

from conjugo.studies import compare, load_result
from conjugo.studies.records import read_journal

RUNS = 4 * (4 + 2)


class Counted:
    """Counts the runs, and is interrupted before one of them."""

    def __init__(self, stop_at=None):
        self.count, self.stop_at = 0, stop_at

    def __call__(self, config, task):
        if self.count == self.stop_at:
            raise KeyboardInterrupt
        self.count += 1
        return pretend(config, task)


@pytest.fixture(scope="module")
def uninterrupted():
    return compare(config(), run=pretend)


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("stop_at", [0, 1, 5, 11, RUNS - 1])
def test_ctrl_c(tmp_path, uninterrupted, stop_at):
    with pytest.raises(KeyboardInterrupt):
        compare(config(), out=tmp_path, run=Counted(stop_at))
    partial = load_result(tmp_path)
    assert len(partial.runs) == stop_at
    assert not partial.complete
    rest = Counted()
    assert compare(config(), out=tmp_path, resume=True, run=rest) == uninterrupted
    assert rest.count == RUNS - stop_at
    assert load_result(tmp_path) == uninterrupted


@pytest.mark.usefixtures("no_report")
def test_again_and_again(tmp_path, uninterrupted):
    for sitting in range(7):
        with pytest.raises(KeyboardInterrupt):
            compare(config(), out=tmp_path, resume=sitting > 0, run=Counted(3))
    assert compare(config(), out=tmp_path, resume=True, run=pretend) == uninterrupted


@pytest.mark.usefixtures("no_report")
def test_a_torn_journal(tmp_path, uninterrupted):
    compare(config(), out=tmp_path, run=pretend)
    journal = tmp_path / "journal.jsonl"
    content = journal.read_bytes()
    for end in (0, 10, len(content) // 3, len(content) // 2, len(content) - 1):
        journal.write_bytes(content[:end])
        whole = content[:end].count(b"\n")
        rest = Counted()
        assert compare(config(), out=tmp_path, resume=True, run=rest) == uninterrupted
        assert rest.count == RUNS - whole


@pytest.mark.usefixtures("no_report")
def test_lost_studies_are_made_again_from_the_journal(tmp_path):
    import optuna

    compare(config(), out=tmp_path, run=pretend)
    (tmp_path / "tuning.sqlite3").unlink()
    compare(config(), out=tmp_path, resume=True, run=Counted(0))
    studies = optuna.get_all_study_summaries(f"sqlite:///{tmp_path / 'tuning.sqlite3'}")
    assert {study.study_name: study.n_trials for study in studies} == {
        f"{name}, batch {batch}": 4 for name in ("momentum", "sgd") for batch in (16, 120)
    }


def test_a_finished_comparison_has_nothing_to_do(tmp_path, uninterrupted):
    compare(config(), out=tmp_path, run=pretend)
    page = (tmp_path / "report.html").read_bytes()
    assert compare(config(), out=tmp_path, resume=True, run=Counted(0)) == uninterrupted
    assert (tmp_path / "report.html").read_bytes() == page


@pytest.mark.usefixtures("no_report")
def test_a_run_that_raises_ends_its_cell_only(tmp_path, uninterrupted):
    def run(config, task):
        if task.cell == ("", "momentum", 16) and task.index == 2:
            raise RuntimeError("stopped")
        return pretend(config, task)

    broken = compare(config(), out=tmp_path, run=run)
    assert [cell.complete for cell in broken.cells] == [False, True, True, True]
    (message,) = broken.crashes
    assert "momentum, batch 16, tune 2, seed 100002" in message
    assert "RuntimeError: stopped" in message
    assert load_result(tmp_path) == broken
    assert compare(config(), out=tmp_path, resume=True, run=pretend) == uninterrupted


# ---- with processes ----


def wait_for(condition, seconds=100):
    """Poll until *condition* holds."""
    for _ in range(int(seconds / 0.05)):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("waited in vain")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.usefixtures("no_report")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
@pytest.mark.parametrize(
    ("how", "jobs", "workers"),
    [(signal.SIGINT, 2, 1), (signal.SIGKILL, 2, 1), (signal.SIGINT, 1, 2)],
    ids=["SIGINT", "SIGKILL", "SIGINT-workers"],
)
def test_ending_the_parent_ends_the_workers_and_loses_nothing(tmp_path, uninterrupted, how, jobs, workers):
    out, pids = tmp_path / "out", tmp_path / "pids"
    pids.mkdir()
    program = (
        "from pathlib import Path; from tests.studies.stand_ins import *\n"
        "if __name__ == '__main__': "
        f"compare(config(workers={workers}), out=Path({str(out)!r}), jobs={jobs}, run=pretend_slowly)"
    )
    script = tmp_path / "program.py"
    script.write_text(program)
    environment = {**os.environ, "CONJUGO_TEST_PIDS": str(pids), "PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.Popen(
        [sys.executable, str(script)], env=environment, start_new_session=True, stderr=subprocess.DEVNULL
    )
    journal = out / "journal.jsonl"
    try:
        wait_for(lambda: journal.exists() and journal.read_bytes().count(b"\n") >= 5 and len(list(pids.iterdir())) == 2)
        if how == signal.SIGINT:
            os.killpg(parent.pid, how)  # as a terminal does: to the whole group
        else:
            parent.kill()
        assert parent.wait(timeout=100) != 0
        wait_for(lambda: not any(alive(int(path.name)) for path in pids.iterdir()))
    finally:
        parent.kill()
    done = read_journal(journal)
    assert 5 <= len(done) < RUNS
    whole = config(workers=workers)
    assert compare(whole, out=out, resume=True, run=pretend) == replace(uninterrupted, config=whole)
    assert len(read_journal(journal)) == RUNS
    assert read_journal(journal)[: len(done)] == done


@pytest.mark.usefixtures("no_report")
def test_a_killed_worker_costs_its_cell_until_resumed(tmp_path, uninterrupted, monkeypatch):
    monkeypatch.setenv("CONJUGO_TEST_PIDS", str(tmp_path))
    out = tmp_path / "out"
    hurt = compare(config(), out=out, jobs=2, run=pretend_and_die_once)
    (message,) = hurt.crashes
    assert "the worker process died (exit code -9)" in message
    assert [cell.complete for cell in hurt.cells].count(False) == 1
    rest = Counted()
    assert compare(config(), out=out, resume=True, run=rest) == uninterrupted
    assert rest.count == RUNS - len(hurt.runs)
