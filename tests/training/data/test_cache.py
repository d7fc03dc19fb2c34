"""The cache of decoded data: mapped, checked, written anew when the source or the cache has changed."""

import errno
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.training.data.sources import flip_a_bit, pixels, truncate

from conjugo.errors import CorruptFile
from conjugo.training import data
from conjugo.training.data import cache, folders


def write_npz(folder, *, seed=0, n=6):
    images = pixels(n + 2, 4, 1, seed=seed)[:, 0]
    labels = np.arange(n + 2) % 2
    np.savez(folder / "data.npz", x_train=images[:n], y_train=labels[:n], x_test=images[n:], y_test=labels[n:])


@pytest.fixture
def folder(tmp_path):
    write_npz(tmp_path)
    return tmp_path


@pytest.fixture
def reads(monkeypatch):
    """Counts how often npz files are read."""
    calls = []
    real = np.load
    monkeypatch.setattr(folders.np, "load", lambda path, **options: (calls.append(path), real(path, **options))[1])
    return calls


def load(folder):
    return data.load("folder", root=folder)


def cache_file(folder):
    (path,) = folder.glob("*.cache")
    return path


def same(first, second):
    return (first.name, first.kind, first.classes) == (second.name, second.kind, second.classes) and all(
        torch.equal(getattr(getattr(first, split), part), getattr(getattr(second, split), part))
        for split in ("train", "test")
        for part in ("inputs", "targets")
    )


def test_the_second_load_comes_from_the_cache_and_is_the_same(folder, reads):
    first, second = load(folder), load(folder)
    assert len(reads) == 1
    assert same(first, second)
    assert np.array_equal(first.train.inputs[:, 0], pixels(8, 4, 1)[:6, 0])
    assert first.train.targets.tolist() == [0, 1, 0, 1, 0, 1]
    assert sorted(p.name for p in folder.iterdir()) == ["conjugo-folder.cache", "data.npz"]


def test_of_several_at_once_one_reads_the_source(folder, reads):
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(load, [folder] * 4))
    assert len(reads) == 1
    assert all(same(loaded[0], other) for other in loaded)


SECOND_PROCESS = """
import sys, time
import numpy as np
from pathlib import Path
from conjugo.training import data
from conjugo.training.data import folders

folder, real = Path(sys.argv[1]), np.load

def read(*arguments, **options):
    print("read", flush=True)
    time.sleep(0.5)  # long enough for the other process to come to the same point
    return real(*arguments, **options)

folders.np.load = read
print("ready", flush=True)
sys.stdin.readline()
dataset = data.load("folder", root=folder)
print(int(dataset.train.inputs.sum()), len(dataset.test), flush=True)
"""


def test_of_two_processes_at_once_one_reads_the_source(folder):
    command = [sys.executable, "-c", SECOND_PROCESS, str(folder)]
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **options) for _ in range(2)]
    try:
        assert [process.stdout.readline() for process in processes] == ["ready\n"] * 2
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        told = [process.communicate(timeout=60)[0].splitlines() for process in processes]
    finally:
        for process in processes:
            process.kill()
    expected = f"{int(pixels(8, 4, 1)[:6].sum(dtype=int))} 2"
    assert sorted(told) == [[expected], ["read", expected]]
    assert sorted(p.name for p in folder.iterdir()) == ["conjugo-folder.cache", "data.npz"]


def mapped_files():
    return Path("/proc/self/maps").read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_tensors_are_mapped_from_the_first_load_on(folder):
    dataset = load(folder)
    assert str(folder / "conjugo-folder.cache") in mapped_files()
    del dataset
    dataset = load(folder)
    assert str(folder / "conjugo-folder.cache") in mapped_files()
    addresses = [int(line.split("-")[0], 16) for line in mapped_files().splitlines() if "conjugo-folder.cache" in line]
    ends = [int(line.split("-")[1].split()[0], 16) for line in mapped_files().splitlines() if "conjugo-folder" in line]
    pointer = dataset.train.inputs.data_ptr()
    assert any(start <= pointer < end for start, end in zip(addresses, ends))
    assert pointer % 64 == 0


def test_changing_a_tensor_changes_no_file(folder):
    dataset = load(folder)
    before = cache_file(folder).read_bytes()
    expected = dataset.train.inputs.clone()
    dataset.train.inputs.fill_(7)
    assert cache_file(folder).read_bytes() == before
    assert torch.equal(load(folder).train.inputs, expected)


def test_a_changed_source_is_read_again(folder, reads):
    load(folder)
    write_npz(folder, seed=1)
    os.utime(folder / "data.npz", ns=(1, 1))  # even where the clock is coarse
    assert np.array_equal(load(folder).train.inputs[:, 0], pixels(8, 4, 1, seed=1)[:6, 0])
    assert len(reads) == 2
    load(folder)
    assert len(reads) == 2


def test_a_new_classes_file_is_a_change(folder):
    assert load(folder).classes == ("0", "1")
    (folder / "classes.txt").write_text("even\nodd\n")
    assert load(folder).classes == ("even", "odd")


@pytest.mark.parametrize("place", [0, 9, 13, 40, -1], ids=["magic", "checksum", "length", "header", "pixels"])
def test_a_flipped_bit_is_noticed_and_the_cache_written_anew(folder, reads, place):
    first = load(folder)
    expected = torch.clone(first.train.inputs)
    good = cache_file(folder).read_bytes()
    flip_a_bit(cache_file(folder), place)
    assert torch.equal(load(folder).train.inputs, expected)
    assert len(reads) == 2
    assert cache_file(folder).read_bytes() == good


@pytest.mark.parametrize("size", [0, 5, 16, 100, -1])
def test_a_truncated_cache_is_written_anew(folder, reads, size):
    load(folder)
    good = cache_file(folder).read_bytes()
    cache_file(folder).write_bytes(good[:size])
    assert len(load(folder).train) == 6
    assert len(reads) == 2
    assert cache_file(folder).read_bytes() == good


def test_something_else_under_its_name_is_written_anew(folder, reads):
    (folder / "conjugo-folder.cache").write_bytes(b"{}" * 1000)
    assert len(load(folder).train) == 6
    load(folder)
    assert len(reads) == 1


def test_a_damaged_source_leaves_the_cache(folder):
    load(folder)
    good = cache_file(folder).read_bytes()
    truncate(folder / "data.npz")
    with pytest.raises(CorruptFile, match=r"data\.npz"):
        load(folder)
    assert cache_file(folder).read_bytes() == good


def test_a_read_only_folder_gets_its_cache_elsewhere(folder, reads, user_cache):
    folder.chmod(0o555)
    try:
        first, second = load(folder), load(folder)
        assert os.listdir(folder) == ["data.npz"]
    finally:
        folder.chmod(0o755)
    assert same(first, second)
    assert len(reads) == 1
    (path,) = user_cache.rglob("*.cache")
    assert path.name == "conjugo-folder.cache"


def test_folders_of_the_same_name_do_not_share_a_cache_file(tmp_path, user_cache):
    loaded = []
    for seed, parent in enumerate(("a", "b")):
        folder = tmp_path / parent / "same"
        folder.mkdir(parents=True)
        write_npz(folder, seed=seed)
        folder.chmod(0o555)
        loaded.append(load(folder))
        folder.chmod(0o755)
    assert len(list(user_cache.rglob("*.cache"))) == 2
    assert not torch.equal(loaded[0].train.inputs, loaded[1].train.inputs)


def test_where_nothing_can_be_written_there_is_a_warning_and_the_data(folder, monkeypatch):
    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.warns(UserWarning, match="decoded folder could not be cached: .*No space left"):
        dataset = load(folder)
    assert len(dataset.train) == 6
    assert os.listdir(folder) == ["data.npz"]


def test_what_a_killed_process_left_is_removed_once_it_is_old(folder):
    old, new = folder / "conjugo-folder.cache.0123abcd.tmp", folder / "conjugo-folder.cache.89abcdef.tmp"
    for path, age in ((old, 2 * cache._ABANDONED), (new, 0)):
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
    load(folder)
    assert not old.exists()
    assert new.exists()


def test_the_user_cache_follows_the_environment(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache.user_cache() == Path("/somewhere/conjugo")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.user_cache() == Path.home() / ".cache" / "conjugo"
