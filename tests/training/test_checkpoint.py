"""Checkpoints: whole or not there, checked, the newest good one found."""

import errno
import hashlib
import os

import pytest
import torch

from conjugo._files import write_aside
from conjugo.errors import CorruptFile
from conjugo.training.checkpoint import Checkpoints


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", keep=2)


def state(step: int) -> dict:
    return {"step": step, "weights": torch.arange(step % 1000 + 10.0), "text": "x", "nested": [{"a": (1, None)}]}


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def test_round_trip(checkpoints):
    assert checkpoints.load() is None
    assert checkpoints.save(7, state(7))
    loaded = checkpoints.load()
    assert torch.equal(loaded.pop("weights"), state(7)["weights"])
    assert loaded == {key: value for key, value in state(7).items() if key != "weights"}


def test_the_name_holds_the_checksum_and_torch_reads_the_file(checkpoints):
    checkpoints.save(7, state(7))
    (path,) = checkpoints.paths()
    assert path.name == f"step-00000007-{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}.pt"
    assert torch.load(path, weights_only=True)["step"] == 7


def test_the_newest_are_kept(checkpoints):
    for step in (5, 90, 100, 1000, 123456789):
        checkpoints.save(step, state(step))
    assert [path.name.split("-")[1] for path in checkpoints.paths()] == ["00001000", "123456789"]
    assert checkpoints.load()["step"] == 123456789


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, empty])
def test_a_damaged_newest_one_falls_back_with_a_warning(checkpoints, damage):
    for step in (1, 2):
        checkpoints.save(step, state(step))
    newest = checkpoints.paths()[-1]
    damage(newest)
    with pytest.warns(UserWarning, match=f"{newest.name} is damaged.*going back to step-00000001"):
        assert checkpoints.load()["step"] == 1
    # It no longer counts as one of those that are kept, and is not deleted either.
    checkpoints.save(2, state(2))
    assert [path.name.split("-")[1] for path in checkpoints.paths()] == ["00000001", "00000002"]
    assert newest.with_name(newest.name + ".corrupt").exists()


def test_all_damaged_is_an_error_each_time(checkpoints):
    for step in (1, 2):
        checkpoints.save(step, state(step))
    for path in checkpoints.paths():
        truncate(path)
    for _ in range(2):
        with pytest.raises(CorruptFile, match=r"no checkpoint can be read.*step-00000002.*step-00000001"):
            checkpoints.load()
    assert len(checkpoints.paths()) == 2


def test_nothing_in_a_file_is_executed(checkpoints, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    checkpoints.folder.mkdir()
    write_aside(checkpoints.folder / "step-00000001.pt", lambda f: torch.save({"a": Evil()}, f), checksum_digits=16)
    with pytest.raises(CorruptFile, match="cannot be read"):
        checkpoints.load()
    assert not (tmp_path / "executed").exists()


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_space_after(size):
    """A write that fails once *size* bytes are there."""
    written = 0

    def write(self, data):
        nonlocal written
        written += len(data)
        if written > size:
            no_space()
        return self._file.write(data)

    return write


@pytest.mark.parametrize("where", ["first write", "later write", "sync", "rename"])
def test_a_full_disk_leaves_the_old_checkpoints(checkpoints, monkeypatch, where):
    checkpoints.save(1, state(1))
    before = {path: path.read_bytes() for path in checkpoints.folder.iterdir()}
    with monkeypatch.context() as patch:
        if where == "sync":
            patch.setattr(os, "fsync", no_space)
        elif where == "rename":
            patch.setattr(os, "replace", no_space)
        else:
            size = 0 if where == "first write" else 200
            patch.setattr("conjugo._files._Hashed.write", no_space_after(size))
        with pytest.warns(
            UserWarning, match="no checkpoint of step 2 could be written.*last checkpoint is.*step-00000001"
        ):
            assert checkpoints.save(2, state(2)) is False
    assert {path: path.read_bytes() for path in checkpoints.folder.iterdir()} == before
    assert checkpoints.save(3, state(3))
    assert checkpoints.load()["step"] == 3


def test_leftovers_of_a_killed_process_are_removed(checkpoints):
    checkpoints.save(1, state(1))
    leftover = checkpoints.folder / "step-00000002.pt1234.tmp"
    leftover.write_bytes(b"half")
    checkpoints.clean()
    assert not leftover.exists()
    assert checkpoints.load()["step"] == 1
