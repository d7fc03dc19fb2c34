"""Checkpoints under attack: never a damaged one loaded silently, never a good one lost.

Every fault is put on the newest of two steps; then the older one must be loaded, with a warning, or, where the newest is still
whole, the newest.
"""

import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from tests.distributed import ranks
from torch import nn

from conjugo.distributed import Checkpointer, PerRank, RandomState
from conjugo.distributed import checkpoint as module
from conjugo.errors import CorruptFile
from conjugo.optim import NLCG


def objects(value):
    model = nn.Linear(40, 9)
    optimizer = NLCG(model.parameters(), precond="bfgs")
    with torch.no_grad():
        for t in [*model.parameters(), *(t for p in model.parameters() for t in optimizer.state[p].values())]:
            t.fill_(value)
    return {"model": model, "optimizer": optimizer, "progress": {"value": value}, "random": PerRank(RandomState())}


def content(things):
    """The value that all state holds; None if it is mixed: half loaded."""
    model, optimizer = things["model"], things["optimizer"]
    tensors = [*model.parameters(), *(t for p in model.parameters() for t in optimizer.state[p].values())]
    values = {v for t in tensors for v in t.detach().flatten().tolist()} | {things["progress"].get("value")}
    return values.pop() if len(values) == 1 else None


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    root = tmp_path_factory.mktemp("faults") / "checkpoints"
    ranks.run(2, save_two, root)
    return root


def save_two(root):
    checkpoints = Checkpointer(root)
    assert checkpoints.save(1, **objects(1.0))
    assert checkpoints.save(2, **objects(2.0))


def load(root):
    """The step that is loaded, the value found, and the warnings."""
    things = objects(0.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step = Checkpointer(root).load_latest(**things)
    return step, content(things), [str(w.message) for w in caught]


def flip_a_bit(path, rng):
    data = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def truncate(path, rng):
    os.truncate(path, rng.randrange(path.stat().st_size))


def lengthen(path, rng):
    with path.open("ab") as file:
        file.write(rng.randbytes(rng.randint(1, 100)))


def overwrite_a_block(path, rng):
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data))
    old = data[start : start + 64]
    data[start : start + 64] = bytes(b ^ 0x5A for b in old)
    path.write_bytes(data)


def zero(path, rng):
    path.write_bytes(bytes(path.stat().st_size))


def remove(path, rng):
    path.unlink()


def from_the_other_step(path, rng):
    shutil.copy(path.parent.parent / "step-00000001" / path.name, path)


def swap(path, rng):
    other = rng.choice([p for p in sorted(path.parent.iterdir()) if p != path])
    data = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(data)


FAULTS = [flip_a_bit, truncate, lengthen, overwrite_a_block, zero, remove, from_the_other_step, swap]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_damaged_file_sends_back_to_the_older_step(fault, two_steps, tmp_path):
    rng = random.Random(fault.__name__)
    names = sorted(path.name for path in (two_steps / "step-00000002").iterdir())
    assert len(names) == 7  # two of tensors, two of ranks, the plain one, two descriptions
    times = 1 if fault in (zero, remove, from_the_other_step) else 10
    for name in names:
        for _ in range(times):
            root = tmp_path / "try"
            shutil.copytree(two_steps, root)
            before = (root / "step-00000002" / name).read_bytes()
            fault(root / "step-00000002" / name, rng)
            harmless = not (root / "step-00000002" / name).exists() or (
                before == (root / "step-00000002" / name).read_bytes()
            )
            if fault is from_the_other_step and harmless and (root / "step-00000002" / name).exists():
                shutil.rmtree(root)  # the same in both steps
                continue
            step, value, said = load(root)
            assert (step, value) == (1, 1.0), (name, said)
            assert any("going back to step 1" in message and "step-00000002" in message for message in said)
            assert [path.name[-8:] for path in root.glob("step-00000002*")] == [".corrupt"]
            assert load(root)[:2] == (1, 1.0)  # and so it stays
            shutil.rmtree(root)


def test_several_workers_go_back_together(two_steps, tmp_path):
    rng = random.Random(5)
    for name in ("__1_0.distcp", "rank-00000.pt", "manifest.json"):
        root = tmp_path / name
        shutil.copytree(two_steps, root)
        flip_a_bit(root / "step-00000002" / name, rng)
        results = ranks.run(3, load, root)
        assert [r[:2] for r in results] == [(1, 1.0)] * 3
        assert [any("going back" in message for message in r[2]) for r in results] == [True, False, False]


def test_nothing_good_is_an_error_and_nothing_is_touched(two_steps, tmp_path):
    root = tmp_path / "try"
    shutil.copytree(two_steps, root)
    for step in (1, 2):
        zero(root / f"step-0000000{step}" / "plain.pt", None)
    names = sorted(os.listdir(root))
    things = objects(0.0)
    with pytest.raises(CorruptFile, match=r"no checkpoint can be read: .*step-00000002.*plain.pt.*step-00000001"):
        Checkpointer(root).load_latest(**things)
    assert content(things) == 0.0
    assert sorted(os.listdir(root)) == names
    with pytest.raises(CorruptFile, match=r"plain.pt is damaged"):
        Checkpointer(root).load(1, **things)


def test_a_manifest_of_another_folder_or_format_is_refused(two_steps, tmp_path):
    root = tmp_path / "try"
    shutil.copytree(two_steps, root)
    (root / "step-00000002").rename(root / "step-00000003")
    step, value, said = load(root)
    assert (step, value) == (1, 1.0)
    assert "belongs to step 2" in said[-1]


class Malice:
    def __reduce__(self):
        return os.system, ("echo pwned > pwned",)


@pytest.mark.parametrize("name", [".metadata", "plain.pt"])
def test_a_file_that_wants_to_run_code_is_refused_even_with_a_good_checksum(name, two_steps, tmp_path, monkeypatch):
    root = tmp_path / "try"
    shutil.copytree(two_steps, root)
    monkeypatch.chdir(tmp_path)
    folder = root / "step-00000002"
    if name == ".metadata":
        (folder / name).write_bytes(pickle.dumps(Malice()))
    else:
        torch.save({"model": Malice()}, folder / name)
    manifest = module._manifest.read(folder)
    manifest["files"][name] = module._manifest.digest(folder / name)
    checksum = module._manifest.hashlib.sha256(module._manifest._canonical(manifest)).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"manifest": manifest, "sha256": checksum}))
    step, value, said = load(root)
    assert (step, value) == (1, 1.0)
    assert "cannot be read" in said[-1]
    assert not (tmp_path / "pwned").exists()


# Killed while writing ------------------------------------------------------------------------------------------------


def killed_at_every_point(root, stride):
    """Save step 2 in processes that die at the k-th thing they do to the file system, until one lives."""
    events = ("open", "os.rename", "os.mkdir", "os.remove", "os.truncate", "os.rmdir", "shutil.rmtree")
    outcomes = []
    k = 0
    while True:
        k += stride
        shutil.rmtree(root, ignore_errors=True)
        checkpoints = Checkpointer(root, keep=1)
        assert checkpoints.save(1, **objects(1.0))
        child = os.fork()
        if child == 0:
            left = k

            def hook(event, arguments):
                nonlocal left
                if event in events and str(root) in str(arguments[0]):
                    left -= 1
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            checkpoints.save(2, **objects(2.0))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        step, value, said = load(root)
        outcomes.append((step, value, len(said)))
        leftovers = [name for name in os.listdir(root) if not name.startswith("step-")]
        assert not leftovers, leftovers
        assert Checkpointer(root, keep=1).save(3, **objects(3.0))
        assert load(root)[:2] == (3, 3.0)
        if status == 0:
            return outcomes


def test_a_process_killed_at_any_point_leaves_a_good_step(tmp_path):
    outcomes = ranks.run(1, killed_at_every_point, tmp_path / "root", 1, initialize=False)[0]
    assert len(outcomes) > 12
    assert set(outcomes) == {(1, 1.0, 0), (2, 2.0, 0)}  # old or new, whole, without a warning
    assert outcomes == sorted(outcomes)


def killed_rank(root, k):
    checkpoints = Checkpointer(root, keep=1)
    checkpoints.save(1, **objects(1.0))
    if dist.get_rank() == 1:
        left = k

        def hook(event, arguments):
            nonlocal left
            if event in ("open", "os.rename", "os.mkdir") and str(root) in str(arguments[0]):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
    checkpoints.save(2, **objects(2.0))


@pytest.mark.parametrize("k", range(1, 8))
def test_one_rank_killed_while_all_write(k, tmp_path):
    with pytest.raises(ranks.RankFailed) as failure:
        ranks.run(2, killed_rank, tmp_path, k)
    assert failure.value.kinds[1] == "died"
    assert load(tmp_path)[:2] in [(1, 1.0), (2, 2.0)]


# No space ------------------------------------------------------------------------------------------------------------


def limited(root, limit, asynchronous):
    """Save while the files of the last rank may have *limit* bytes only, and again when they may have any."""
    checkpoints = Checkpointer(root, keep=1, asynchronous=asynchronous)
    assert checkpoints.save(1, **objects(1.0))
    checkpoints.wait()
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == world - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outcome = checkpoints.save(2, **objects(2.0))
        outcome = checkpoints.wait() if asynchronous else outcome
    said = [str(w.message) for w in caught if "checkpoint" in str(w.message)]
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    names = sorted(os.listdir(root)) if rank == 0 else None
    found = load(root)[:2]
    later = checkpoints.save(3, **objects(3.0)) and checkpoints.wait()
    return outcome, said, names, found, later, load(root)[:2]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("limit", [0, 100, 1000, 3000])
def test_a_full_disk_costs_the_step_and_nothing_else(limit, world, asynchronous, tmp_path):
    results = ranks.run(world, limited, tmp_path, limit, asynchronous)
    for rank, (outcome, said, names, found, later, last) in enumerate(results):
        assert not outcome
        assert found == (1, 1.0)
        assert later
        assert last == (3, 3.0)
        if rank == 0:
            assert names == ["step-00000001"]
            assert len(said) == 1
            assert "no checkpoint of step 2 could be written" in said[0]
            assert "the last checkpoint is" in said[0]
        else:
            assert not said


def test_a_small_file_system_that_fills_up(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        model = nn.Linear(100, 100)
        checkpoints = Checkpointer(tmp_path, keep=2)
        assert checkpoints.save(1, model=model)
        for step in range(2, 9):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                outcome = checkpoints.save(step, model=model)
            assert outcome == (not caught)
            assert checkpoints.load_latest(model=model) in (step, *range(1, step))
        assert not outcome or len(checkpoints.steps()) == 2
        assert any(tmp_path.glob("step-*/manifest.json"))
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_step_that_is_not_seen_everywhere_is_no_damage(two_steps, tmp_path):
    """Hosts that do not share the folder must not set good steps aside."""
    roots = [tmp_path / str(r) for r in range(2)]
    shutil.copytree(two_steps, roots[0])
    roots[1].mkdir()
    for kind, message in ranks.run(2, not_shared, roots):
        assert kind == "OSError"
        assert "file system that all hosts share" in message
    assert sorted(os.listdir(roots[0])) == ["step-00000001", "step-00000002"]


def not_shared(roots):
    try:
        Checkpointer(roots[dist.get_rank()]).load_latest(**objects(0.0))
    except OSError as error:
        return type(error).__name__, str(error)


def written_apart(roots):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outcome = Checkpointer(roots[dist.get_rank()]).save(1, **objects(1.0))
    return outcome, [str(w.message) for w in caught]


def test_writing_to_folders_that_are_not_shared_is_noticed(tmp_path):
    results = ranks.run(2, written_apart, [tmp_path / "a", tmp_path / "b"])
    assert [outcome for outcome, _ in results] == [False, False]
    assert results[0][1]
