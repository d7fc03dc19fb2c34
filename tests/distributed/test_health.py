"""Watching over workers: every flipped bit is found and its holder named; no false alarms; slow and missing workers."""

import ast
import logging
import math
import os
import random
import socket
import time

import pytest
import torch
import torch.distributed as dist
from tests.distributed import ranks
from tests.distributed.test_virtual_batch import Collectives, cross_entropy, examples, network, wrapped
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from conjugo._space import to_local
from conjugo.distributed import ReplicaCheck, StragglerMonitor, share
from conjugo.distributed.health import fingerprint
from conjugo.errors import ReplicasDiffer
from conjugo.optim import NLCG, Kronecker

HOST = socket.gethostname()
TYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.bool,
    torch.complex64,
]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_fingerprint_depends_on_every_bit_and_on_the_order(dtype):
    g = torch.Generator().manual_seed(1)
    tensor = (torch.randn(300, 7, generator=g) * 50).to(dtype)
    mark = fingerprint(tensor)
    assert mark.dtype == torch.int64
    assert mark == fingerprint(tensor.clone())
    assert mark == fingerprint(tensor.t().contiguous().t()) or not tensor.t().contiguous().t().is_contiguous()
    rng = random.Random(2)
    for _ in range(200):
        other = tensor.clone()
        data = (torch.view_as_real(other) if dtype.is_complex else other).view(torch.uint8).reshape(-1)
        at = rng.randrange(len(data))
        data[at] = data[at] ^ (1 << (0 if dtype == torch.bool else rng.randrange(8)))
        assert fingerprint(other) != mark
    swapped = tensor.clone()
    swapped[[0, 250]] = tensor[[250, 0]]
    assert fingerprint(swapped) != mark or torch.equal(swapped, tensor)


def test_fingerprints_of_special_tensors():
    assert fingerprint(torch.empty(0)) == 0
    assert fingerprint(torch.tensor(math.nan)) == fingerprint(torch.tensor(math.nan))
    assert fingerprint(torch.tensor(0.0)) != fingerprint(torch.tensor(-0.0))
    large = torch.arange(70000 * 3, dtype=torch.float32)
    other = large.clone()
    other[[1, 65537]] = large[[65537, 1]]  # the same places in different rows
    assert fingerprint(large) != fingerprint(other)
    other = large.clone()
    other[[65536 + 2, 2 * 65536 + 1]] = large[[2 * 65536 + 1, 65536 + 2]]  # row and column exchanged
    assert fingerprint(large) != fingerprint(other)
    assert fingerprint(large[::2]) == fingerprint(large[::2].clone())


@pytest.mark.parametrize("dtype", [d for d in TYPES if d.is_floating_point], ids=str)
def test_two_signs_that_change_are_seen(dtype):
    """The highest bits of two values, which a sum of products could lose: twice 2^63 is nothing modulo 2^64."""
    tensor = torch.randn(200, generator=torch.Generator().manual_seed(3)).to(dtype)
    mark = fingerprint(tensor)
    for i in range(199):
        other = tensor.clone()
        other[i : i + 2] *= -1
        assert fingerprint(other) != mark


def damage(tensor, kind):
    with torch.no_grad():
        values = to_local(tensor).view(-1)
        if kind == "bit":
            values.view(torch.int64)[0] ^= 1
        elif kind == "swap":
            values[:2] = values[:2].flip(0)
        else:
            values[0] = math.nan


def caught(layout, kind, culprits, on_mismatch="raise"):
    """At which step, of ten, and with which words the check speaks up, when values change after step 3."""
    model = wrapped(layout)
    watch = ReplicaCheck(model, every=2, on_mismatch=on_mismatch)
    messages = recorded()
    for step in range(1, 11):
        if step == 4 and dist.get_rank() in culprits:
            damage(list(model.parameters())[2], kind)
        try:
            watch.after_step()
        except ReplicasDiffer as error:
            return step, str(error)
    return messages or None


def recorded():
    """The messages that the module logs from now on."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("conjugo.distributed.health").addHandler(handler)
    return messages


@pytest.mark.parametrize("kind", ["bit", "swap", "nan"])
def test_the_one_who_differs_is_named_to_all(kind):
    results = ranks.run(3, caught, "ddp", kind, [2])
    assert len(set(results)) == 1
    step, message = results[0]
    assert step == 5  # begun after the fourth step
    assert message.startswith("after step 4 workers hold different bits of parameter 'module.4.weight': ")
    assert f"rank 2 on host {HOST} differs from the others; " in message


def test_a_warning_instead():
    first, second = ranks.run(2, caught, "ddp", "bit", [0], "warn")
    assert [message[:13] for message in first] == ["after step 4 ", "after step 6 ", "after step 8 "]
    assert second is None


def test_two_who_differ_are_both_named():
    for _, message in ranks.run(2, caught, "ddp", "bit", [0]):
        assert f"rank 0 on host {HOST}, rank 1 on host {HOST} do not agree, and there is no majority" in message


def test_replicas_of_shards():
    """On four ranks in two replicas of two shards only those of the same shard can be compared; all have to stop."""
    results = ranks.run(4, caught, "hsdp", "bit", [3])
    assert len(set(results)) == 1
    assert "rank 1" in results[0][1]
    assert "rank 3" in results[0][1]
    assert "rank 0" not in results[0][1]


def all_differ_later():
    """The damage reaches all parameters before anybody looks."""
    model = DistributedDataParallel(network())
    watch = ReplicaCheck(model, every=1)
    if dist.get_rank() == 1:
        damage(list(model.parameters())[2], "nan")
    watch.after_step()
    for p in model.parameters():
        damage(p, "swap" if dist.get_rank() else "nan")
    try:
        watch.finish()
    except ReplicasDiffer as error:
        return str(error)
    return None


def test_what_differed_when_it_was_compared_is_named():
    for message in ranks.run(3, all_differ_later):
        assert "of parameter 'module.4.weight': rank 1 on host" in message
        assert "more" not in message


def state_damaged(name):
    model = DistributedDataParallel(network().double())
    optimizer = (
        NLCG(model.parameters(), lr=0.05, shard_state=name == "slices", precond="bfgs")
        if name in ("nlcg", "slices")
        else torch.optim.Adam(model.parameters(), lr=0.01)
    )
    watch = ReplicaCheck(model.parameters(), every=5, optimizer=optimizer)
    data = [share(t, dist.get_rank(), dist.get_world_size()) for t in examples(8)]
    for step in range(10):
        model.zero_grad()
        cross_entropy(model, data).backward()
        optimizer.step()
        if step == 9 and dist.get_rank() == 0:
            state = optimizer.state[list(model.parameters())[2]]
            damage(next(t for t in state.values() if t.numel() > 1 and type(t) is torch.Tensor), "bit")
        watch.after_step()
    try:
        watch.finish()
    except ReplicasDiffer as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", ["nlcg", "slices", "adam"])
def test_the_state_of_an_optimizer_is_compared(name):
    for message in ranks.run(3, state_damaged, name):
        assert message.startswith(
            f"after step 10 workers hold different bits of the optimizer state of parameter '2': rank 0 on host {HOST} "
        )


def after_an_evaluation():
    """The check is made, and used, while a module shows whole parameters instead of its shards."""
    from torch.distributed.device_mesh import init_device_mesh

    model = fully_shard(network(), mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards")))
    with torch.no_grad():
        model(examples(8)[0])
    watch = ReplicaCheck(model)
    with torch.no_grad():
        model(examples(8)[0])
    watch.compare()
    if dist.get_rank() == 0:
        damage(list(watch._params.values())[2], "nan")
    try:
        watch.compare()
    except ReplicasDiffer as error:
        return str(error)
    return None


def test_shards_are_compared_whatever_the_model_shows():
    for message in ranks.run(2, after_an_evaluation):
        assert "parameter '4.weight': rank 0" in message


def unlike():
    try:
        ReplicaCheck(nn.Linear(2, 2 + dist.get_rank()))
    except ValueError as error:
        return str(error)
    return None


def test_models_that_differ_are_refused():
    for message in ranks.run(2, unlike):
        assert message.startswith("ReplicaCheck: all ranks must have the same parameters, got on rank 1")
        assert "weight: shape [3, 2]" in message


def test_shards_without_replicas_have_nothing_to_compare():
    assert ranks.run(2, caught, "fsdp", "bit", [1]) == [None, None]


def training(layout, steps):
    model = wrapped(layout)
    optimizer = NLCG(model.parameters(), lr=0.05, precond="bfgs")
    watch = ReplicaCheck(model, every=3, optimizer=optimizer)
    x, y = (share(t, dist.get_rank(), dist.get_world_size()) for t in examples(8))
    if dist.get_world_size() == 3:  # the same NaN for all is no difference
        with torch.no_grad():
            model.module[4].bias[0] = math.nan
    for _ in range(steps):
        model.zero_grad()
        cross_entropy(model, (x, y)).backward()
        optimizer.step()
        watch.after_step()
    watch.compare()
    with Collectives() as seen:
        for _ in range(3):
            watch.after_step()
        watch.finish()
    return len(seen.names), len(watch._sets)


@pytest.mark.parametrize(("world", "layout", "steps"), [(2, "ddp", 200), (3, "ddp", 200), (4, "hsdp", 30)])
def test_no_false_alarm(world, layout, steps):
    for collectives, sets in ranks.run(world, training, layout, steps):
        assert sets == 1
        assert collectives == (1 if layout == "ddp" else 2)  # with shards all have to be told


def owned(steps):
    """Training where the state of matrices is up to date with their owners only."""
    model = wrapped("ddp")
    optimizer = NLCG(model.parameters(), lr=0.01, precond=Kronecker(spread=True))
    watch = ReplicaCheck(model, every=2, optimizer=optimizer)
    x, y = (share(t, dist.get_rank(), dist.get_world_size()) for t in examples(8))
    for _ in range(steps):
        model.zero_grad()
        cross_entropy(model, (x, y)).backward()
        optimizer.step()
        watch.after_step()
    watch.finish()
    return True


def test_no_false_alarm_where_ranks_own_matrices():
    assert ranks.run(2, owned, 6) == [True, True]


def test_alone_nothing_is_done():
    watch = ReplicaCheck(nn.Linear(2, 2), every=1)
    watch.after_step()
    watch.compare()
    monitor = StragglerMonitor(every=1)
    with monitor.computing():
        pass
    monitor.after_step()
    monitor.finish()
    monitor.barrier(1)
    assert monitor.report() == []
    for bad in ({"every": 0}, {"threshold": 1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            StragglerMonitor(**bad)
    with pytest.raises(ValueError, match="every must be >= 1"):
        ReplicaCheck(nn.Linear(2, 2), every=0)
    with pytest.raises(ValueError, match="on_mismatch must be 'raise' or 'warn', got 'log'"):
        ReplicaCheck(nn.Linear(2, 2), on_mismatch="log")


def slow_one():
    messages = recorded()
    monitor = StragglerMonitor(every=3)
    for step in range(1, 7):
        with monitor.computing():
            time.sleep(0.01)
        with monitor.computing():
            time.sleep((0.2 if step == 2 else 0.05) if dist.get_rank() == 1 else 0)
        monitor.after_step()
        assert len(messages) == (1 if step > 3 and dist.get_rank() == 0 else 0)
        if step == 4:
            assert 0.2 <= monitor.report()[1].longest < 0.5
    monitor.finish()
    return messages, monitor.report()


def test_a_slow_worker_is_named():
    (said, report), *others = ranks.run(2, slow_one)
    assert len(said) == 2
    assert said[0].startswith(f"rank 1 on host {HOST} is slow: it computes 0.1")
    assert all(messages == [] and seen == report for messages, seen in others)
    for rank, worker in enumerate(report):
        assert (worker.rank, worker.host) == (rank, HOST)
    assert report[1].mean == pytest.approx(0.06, rel=0.5)


def missing(path, kind):
    """One rank comes to the first barrier, and not to the second; the others write down what they hear."""
    if kind == "mixed":  # as on GPUs: gloo is one of several backends
        dist.init_process_group("cpu:gloo,cuda:gloo")
    group = dist.new_group([1, 2]) if kind == "subgroup" else None
    rank, said = dist.get_rank(), None
    if rank > 0 or group is None:
        monitor = StragglerMonitor(process_group=group)
        monitor.barrier(20)
        if rank != LATE[kind]:
            try:
                monitor.barrier(0.5)
            except (TimeoutError, RuntimeError) as error:
                said = type(error).__name__, str(error)
    path.joinpath(str(rank)).write_text(repr(said))
    time.sleep(2)
    os._exit(0)  # the group is broken now


LATE = {"gloo": 1, "mixed": 1, "subgroup": 2}


@pytest.mark.parametrize("kind", LATE)
def test_a_missing_worker_is_named(kind, tmp_path):
    with pytest.raises(ranks.RankFailed):
        ranks.run(3, missing, tmp_path, kind, initialize=kind != "mixed")
    heard = [ast.literal_eval((tmp_path / str(rank)).read_text()) for rank in range(3)]
    told = ("TimeoutError", f"within 0.5 s nothing was heard of rank {LATE[kind]} on host {HOST}")
    if kind == "subgroup":
        assert heard == [None, told, None]
    else:
        assert heard[:2] == [told, None]
        assert heard[2][0] == "RuntimeError"
