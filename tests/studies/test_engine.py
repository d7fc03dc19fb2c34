import pytest
from tests.studies.stand_ins import config, pretend

from conjugo.studies import compare
from conjugo.studies.engine import _duration
from conjugo.studies.executors import Teams


def test_cells_are_finished_one_after_the_other():
    order = []
    compare(config(), run=lambda c, task: order.append(task) or pretend(c, task))
    cells = list(dict.fromkeys(task.cell for task in order))
    assert len(cells) == 4
    assert [task.cell for task in order] == [cell for cell in cells for _ in range(6)]
    assert [task.phase for task in order[:6]] == ["tune"] * 4 + ["final"] * 2


def test_progress_is_shown_when_asked_for(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # to rich a sign of a terminal
    compare(config(), run=pretend, progress=True)
    shown = capsys.readouterr().err
    assert "24/24" in shown
    assert "sgd, batch 120" in shown
    assert "0:00 left" in shown
    compare(config(), run=pretend, progress=False)
    assert capsys.readouterr().err == ""
    compare(config(), run=pretend)  # not a terminal
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (754, "12:34"), (3 * 3600 + 62, "3:01:02")])
def test_durations(seconds, text):
    assert _duration(seconds) == text


def test_a_worker_that_dies_between_tasks_is_noticed_and_replaced():
    plan = compare(config(trials=1, seeds=1, optimizers=("momentum",), batch_sizes=(16,)), run=pretend)
    task = plan.runs[0].task
    with Teams(_accuracy_of_lr, jobs=1, threads=1) as pool:
        pool.submit(task)
        assert pool.next() == (task, task.lr)
        process, _ = pool._idle[0].members[0]
        process.kill()
        process.join()
        pool.submit(task)
        _, crash = pool.next()
        assert "the worker process died (exit code -9)" in crash.error
        pool.submit(task)
        assert pool.next() == (task, task.lr)


def _accuracy_of_lr(task):
    return task.lr
