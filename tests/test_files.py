"""Files written aside: old or new, never half; nothing left behind."""

import errno
import io
import os
import subprocess
import sys

import pytest

from conjugo import _files
from conjugo._files import alone_in, write_aside


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file.txt"
    path.write_bytes(b"old")
    return path


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("content", ["größer", "größer".encode(), lambda file: file.write("größer".encode())])
def test_text_bytes_or_a_function(path, content):
    write_aside(path, content)
    assert path.read_bytes() == "größer".encode()
    assert os.listdir(path.parent) == ["file.txt"]


def test_permissions_are_those_of_any_new_file(path):
    plain = path.with_name("plain")
    plain.touch()
    write_aside(path, b"new")
    assert path.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_content(path, monkeypatch, call):
    monkeypatch.setattr(os, call, no_space)
    with pytest.raises(OSError, match="No space left"):
        write_aside(path, b"new")
    assert os.listdir(path.parent) == ["file.txt"]
    assert path.read_bytes() == b"old"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_a_really_full_disk_leaves_the_old_content(path, monkeypatch):
    """Every write to /dev/full fails as it does on a full disk; the file is really opened, buffered and flushed."""
    monkeypatch.setattr(_files, "open", lambda *_: io.FileIO("/dev/full", "w"), raising=False)
    with pytest.raises(OSError, match="No space left"):
        write_aside(path, b"new" * 100_000)
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_writer_that_breaks_off_leaves_the_old_content(path, error):
    def fail(file):
        file.write(b"new")
        raise error("no")

    with pytest.raises(error):
        write_aside(path, fail)
    assert os.listdir(path.parent) == ["file.txt"]
    assert path.read_bytes() == b"old"


def test_a_folder_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        write_aside(tmp_path / "absent" / "file", b"new")


def test_the_new_content_is_synced_before_it_takes_the_place(path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a)))
    write_aside(path, b"new")
    assert calls[:2] == ["fsync", "replace"]


def test_alone_in_a_folder_until_killed(tmp_path):
    """Another process holds the folder; nobody else gets in before it dies."""
    fcntl = pytest.importorskip("fcntl")
    code = (
        "import sys, time; from pathlib import Path; from conjugo._files import alone_in\n"
        "with alone_in(Path(sys.argv[1])): print('in', flush=True); time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"in\n"
        descriptor = os.open(tmp_path, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
        other.kill()
        other.wait()
    with alone_in(tmp_path):
        pass
    assert os.listdir(tmp_path) == []
