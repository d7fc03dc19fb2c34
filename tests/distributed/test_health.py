"""Watching over workers: every flipped bit is found and its holder named; no false alarms; slow and missing workers."""

import logging
import math
import random
import socket
import time

import pytest
import torch
import torch.distributed as dist
from tests.distributed import ranks
from tests.distributed.test_virtual_batch import Collectives, cross_entropy, examples, network, wrapped
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from conjugo._space import to_local
from conjugo.distributed import ReplicaCheck, StragglerMonitor, share
from conjugo.distributed.health import fingerprint
from conjugo.errors import ReplicasDiffer
from conjugo.optim import NLCG

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
    assert fingerprint(large[::2]) == fingerprint(large[::2].clone())


def caught(layout, kind, culprits):
    """At which step, of ten, and with which words the check speaks up, when a bit flips after step 3."""
    model = wrapped(layout)
    watch = ReplicaCheck(model, every=2)
    for step in range(10):
        if step == 3 and dist.get_rank() in culprits:
            with torch.no_grad():
                piece = to_local(list(model.parameters())[2])
                if kind == "bit":
                    piece.view(-1).view(torch.int64)[0] ^= 1
                elif kind == "swap":
                    piece.view(-1)[:2] = piece.view(-1)[:2].flip(0)
                else:
                    piece.view(-1)[0] = math.nan
        try:
            watch.after_step()
        except ReplicasDiffer as error:
            return step, str(error)
    return None


@pytest.mark.parametrize("kind", ["bit", "swap", "nan"])
def test_the_one_who_differs_is_named_to_all(kind):
    results = ranks.run(3, caught, "ddp", kind, [2])
    assert len(set(results)) == 1
    step, message = results[0]
    assert step == 5  # taken after the fourth step, seen when the next one is due
    assert message.startswith("after step 4 workers hold different bits of parameter 'module.4.weight': ")
    assert f"rank 2 on host {HOST} differs from the others" in message


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


def test_shards_without_replicas_have_nothing_to_compare():
    assert ranks.run(2, caught, "fsdp", "bit", [1]) == [None, None]


def training():
    model = DistributedDataParallel(network())
    optimizer = NLCG(model.parameters(), lr=0.05)
    watch = ReplicaCheck(model, every=3)
    x, y = (share(t, dist.get_rank(), dist.get_world_size()) for t in examples(8))
    with torch.no_grad():
        model.module[4].bias[0] = (
            math.nan if dist.get_world_size() == 3 else 0.0
        )  # the same NaN for all is no difference
    for _ in range(60):
        model.zero_grad()
        cross_entropy(model, (x, y)).backward()
        optimizer.step()
        watch.after_step()
    watch.compare()
    with Collectives() as seen:
        watch.after_step()  # not due
    return len(seen.names)


@pytest.mark.parametrize("world", [2, 3])
def test_no_false_alarm(world):
    assert ranks.run(world, training) == [0] * world


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
    assert monitor.times == []
    for bad in ({"every": 0}, {"threshold": 1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            StragglerMonitor(**bad)
    with pytest.raises(ValueError, match="every must be >= 1"):
        ReplicaCheck(nn.Linear(2, 2), every=0)


def slow_one():
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("conjugo.distributed.health").addHandler(handler)
    monitor = StragglerMonitor(every=3)
    for _ in range(6):
        with monitor.computing():
            time.sleep(0.1 if dist.get_rank() == 1 else 0.01)
        monitor.after_step()
    assert (len(messages) == 1) == (dist.get_rank() == 0)  # the first exchange was looked at when the second was due
    monitor.finish()
    return messages, monitor.times


def test_a_slow_worker_is_named():
    (said, times), *others = ranks.run(3, slow_one)
    assert len(said) == 2
    assert said[0].startswith(f"rank 1 on host {HOST} is slow: it computes 0.1")
    assert times[1] == pytest.approx(0.1, rel=0.5)
    assert all(messages == [] and seen == times for messages, seen in others)


def missing():
    monitor = StragglerMonitor()
    monitor.barrier(20)
    if dist.get_rank() == 1:
        time.sleep(3)
        return None
    try:
        monitor.barrier(0.5)
    except (TimeoutError, RuntimeError) as error:
        return type(error).__name__, str(error)
    finally:
        time.sleep(0 if dist.get_rank() == 1 else 3)


def late(path):
    import os

    try:
        path.joinpath(str(dist.get_rank())).write_text(repr(missing()))
    finally:
        os._exit(0)  # the group is broken now


def test_a_missing_worker_is_named(tmp_path):
    with pytest.raises(ranks.RankFailed):
        ranks.run(3, late, tmp_path)
    kind, message = eval((tmp_path / "0").read_text())
    assert kind == "TimeoutError"
    assert message == f"within 0.5 s nothing was heard of rank 1 on host {HOST}"
    assert eval((tmp_path / "2").read_text())[0] == "RuntimeError"
