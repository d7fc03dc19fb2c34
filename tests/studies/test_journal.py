import json

import pytest

from conjugo.errors import CorruptFile
from conjugo.studies.records import Journal, Outcome, Run, Task, read_journal


def run(index: int) -> Run:
    task = Task(contender="sgd", batch_size=16, phase="tune", index=index, seed=index, lr=0.1 + index / 3)
    outcome = Outcome(
        steps=3, samples=48, accuracy=0.1 + 1e-17, loss=None, diverged=True, seconds=0.5, curve=((1, 0.2), (3, 1 / 3))
    )
    return Run(task, outcome)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        for index in range(3):
            journal.append(run(index))
    return path


def test_what_was_appended_is_read_back_exactly(path):
    assert read_journal(path) == [run(0), run(1), run(2)]
    with Journal(path) as journal:
        assert journal.runs == [run(0), run(1), run(2)]
        journal.append(run(3))
    assert read_journal(path)[-1] == run(3)


def test_a_torn_last_line_is_cut_off(path):
    content = path.read_bytes()
    start = content[:-1].rfind(b"\n") + 1
    for end in range(start, len(content)):
        path.write_bytes(content[:end])
        with Journal(path) as journal:
            assert journal.runs == [run(0), run(1)]
            journal.append(run(2))
        assert path.read_bytes() == content


@pytest.mark.parametrize("damage", [b"{", b"[]", b'{"task": {}, "outcome": {}}', b"\xff\xfe"])
def test_damage_elsewhere_is_reported_and_nothing_is_overwritten(path, damage):
    lines = path.read_bytes().splitlines()
    lines[1] = damage
    damaged = b"\n".join(lines) + b"\n"
    path.write_bytes(damaged)
    with pytest.raises(CorruptFile, match=r"journal\.jsonl, line 2"):
        Journal(path)
    assert path.read_bytes() == damaged


def test_only_one_process_at_a_time(path):
    pytest.importorskip("fcntl", reason="files are locked on POSIX systems only")
    with Journal(path), pytest.raises(ValueError, match="is in use: another process"):
        Journal(path)
    with Journal(path) as journal:  # free again, and whole
        assert len(journal.runs) == 3


def test_lines_are_plain_json(path):
    first = json.loads(path.read_text().splitlines()[0])
    assert first["task"]["contender"] == "sgd"
    assert first["outcome"]["curve"] == [[1, 0.2], [3, 1 / 3]]


def test_without_a_path_runs_are_kept_in_memory():
    with Journal(None) as journal:
        journal.append(run(0))
    assert journal.runs == [run(0)]


def test_seconds_do_not_make_outcomes_different():
    other = Run.from_dict(run(0).to_dict() | {"outcome": run(0).to_dict()["outcome"] | {"seconds": 7.0}})
    assert other == run(0)
