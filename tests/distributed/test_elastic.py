"""Workers are killed, again and again: the result is that of the run that nobody disturbed."""

import itertools
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from tests.distributed.ranks import free_port
from tests.distributed.test_launch import PROGRAMS, finished, start


def entries(folder, rank):
    """What rank has logged: restart, workers, step, process."""
    path = folder / f"log-{rank}"
    return [tuple(map(int, line.split()[:4])) for line in path.read_text().splitlines()] if path.exists() else []


def weights(folder):
    return torch.load(folder / "weights.pt", weights_only=True)


def run_with_kills(folder, kills, steps, seed, *options):
    """Kill a random rank at random steps, *kills* times, each time after some progress."""
    rng = random.Random(seed)
    process = start("--nproc", 2, "--max-restarts", kills, PROGRAMS / "train.py", folder, steps, 0.03, *options)
    try:
        for attempt in range(kills):
            rank, after = rng.randrange(2), rng.randint(1, 6)
            until = time.monotonic() + 90
            while True:
                assert time.monotonic() < until, "no progress"
                assert process.poll() is None, process.communicate()
                mine = [entry for entry in entries(folder, rank) if entry[0] == attempt]
                if len(mine) >= after:
                    break
                time.sleep(0.01)
            os.kill(mine[-1][3], signal.SIGKILL)
        code, _, err = finished(process, timeout=200)
    finally:
        process.kill()
    assert code == 0, err
    assert err.count("was killed by SIGKILL (out of memory?); starting all workers anew") == kills
    return [entry[:3] for entry in entries(folder, 0)]


def check_that_nothing_was_lost(folder, log, kills):
    """After each restart training goes on from the last checkpoint: at most the steps since that are done again."""
    by_attempt = [[step for restart, _, step in log if restart == attempt] for attempt in range(kills + 1)]
    for before, after in itertools.pairwise(by_attempt):
        if after and before:
            assert after[0] % 3 == 0
            assert before[-1] - 3 <= after[0] <= before[-1] + 1


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    code, _, err = finished(start("--nproc", 2, PROGRAMS / "train.py", folder, 60, 0))
    assert code == 0, err
    return weights(folder)


def test_three_kills(undisturbed, tmp_path):
    log = run_with_kills(tmp_path, 3, 60, 0)
    check_that_nothing_was_lost(tmp_path, log, 3)
    for a, b in zip(weights(tmp_path), undisturbed, strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("async",)], ids=["waiting", "in the background"])
@pytest.mark.parametrize("seed", [1, 2])
def test_twenty_kills(undisturbed, seed, options, tmp_path):
    log = run_with_kills(tmp_path, 10, 60, seed, *options)
    for a, b in zip(weights(tmp_path), undisturbed, strict=True):
        assert torch.equal(a, b)
    if not options:
        check_that_nothing_was_lost(tmp_path, log, 10)


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


@pytest.mark.slow
def test_a_lost_host_costs_the_steps_since_the_last_checkpoint(tmp_path):
    """Two agents stand for two hosts; the second one and its worker die, the first goes on alone, with the same batches."""
    meeting = f"127.0.0.1:{free_port()}"
    options = ("--nproc", 1, "--nnodes", "1:2", "--rdzv", meeting, "--local-addr", "127.0.0.1")
    hosts = []
    try:
        for _ in range(2):  # the first one has the meeting point
            hosts.append(start(*options, PROGRAMS / "train.py", tmp_path, 150, 0.1))
            time.sleep(1)
        until = time.monotonic() + 90
        while not any(entry[1] == 2 and entry[2] > 4 for entry in entries(tmp_path, 1)):
            assert time.monotonic() < until, "the two never came together"
            time.sleep(0.05)
        both = [entries(tmp_path, rank)[-1][3] for rank in range(2)]
        lost = next(pid for pid in both if parent(pid) == hosts[1].pid)
        os.kill(hosts[1].pid, signal.SIGKILL)
        os.kill(lost, signal.SIGKILL)
        code, _, err = finished(hosts[0], timeout=200)
        assert code == 0, err
    finally:
        for host in hosts:
            host.kill()
            host.communicate()
    log = entries(tmp_path, 0)
    worlds = [entry[1] for entry in log]
    assert worlds[-1] == 1
    assert 2 in worlds
    first_alone = next(i for i in range(len(log) - 1, -1, -1) if log[i][1] == 2)
    assert log[first_alone + 1][2] >= log[first_alone][2] - 3
