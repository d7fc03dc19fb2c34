"""Two hosts: network namespaces with a limited link between them, which goes down, or one of which dies."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.distributed.test_elastic import entries, weights
from tests.distributed.test_launch import PROGRAMS, finished, start

ADDRESSES = ("10.77.0.1", "10.77.0.2")


def sh(*words, check=True):
    return subprocess.run(words, check=check, capture_output=True, text=True)


class Host:
    """A namespace; processes in it see their own loopback and one end of the link."""

    def __init__(self, name, end, address):
        self.name, self.end, self.address = name, end, address

    def start(self, *arguments):
        command = ["ip", "netns", "exec", self.name, sys.executable, "-m", "conjugo", "launch", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": self.end}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    def link(self, state):
        sh("ip", "netns", "exec", self.name, "ip", "link", "set", self.end, state)


@pytest.fixture
def hosts():
    """Both, with 200 Mbit/s between them."""
    if not (shutil.which("ip") and shutil.which("tc")):
        pytest.skip("needs the programs ip and tc")
    tag = f"cj{os.getpid() % 10000}"
    pair = [Host(f"{tag}{letter}", f"{tag}{letter}0", address) for letter, address in zip("ab", ADDRESSES, strict=True)]
    if sh("ip", "netns", "add", pair[0].name, check=False).returncode:
        pytest.skip("network namespaces are not permitted here")
    try:
        sh("ip", "netns", "add", pair[1].name)
        sh("ip", "link", "add", pair[0].end, "type", "veth", "peer", "name", pair[1].end)
        for host in pair:
            sh("ip", "link", "set", host.end, "netns", host.name)
            inside = ("ip", "netns", "exec", host.name)
            sh(*inside, "ip", "addr", "add", f"{host.address}/24", "dev", host.end)
            sh(*inside, "ip", "link", "set", "lo", "up")
            host.link("up")
            sh(*inside, "tc", "qdisc", "add", "dev", host.end, "root", "tbf", "rate", "200mbit", "burst", "64kb",
               "latency", "50ms", check=False)  # fmt: skip
        yield pair
    finally:
        for host in pair:
            pids = sh("ip", "netns", "pids", host.name, check=False).stdout.split()
            for pid in pids:
                os.kill(int(pid), signal.SIGKILL)
            sh("ip", "netns", "delete", host.name, check=False)


def options(host, nodes="2"):
    meeting = f"{ADDRESSES[0]}:29400"
    return "--nproc", 1, "--nnodes", nodes, "--rdzv", meeting, "--local-addr", host.address, "--max-restarts", 5


def until(condition, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come so far"
        time.sleep(0.05)


def launched(hosts, *program, nodes="2"):
    agents = []
    for host in hosts:
        agents.append(host.start(*options(host, nodes), PROGRAMS / "train.py", *program))
        time.sleep(1)
    return agents


@pytest.mark.slow
def test_training_over_two_hosts_is_that_on_one(hosts, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    assert finished(start("--nproc", 2, PROGRAMS / "train.py", one, 20, 0))[0] == 0
    for agent in launched(hosts, two, 20, 0):
        code, _, err = finished(agent)
        assert code == 0, err
    assert all((a == b).all() for a, b in zip(weights(one), weights(two), strict=True))


@pytest.mark.slow
def test_the_link_goes_down_and_comes_back(hosts, tmp_path):
    one = tmp_path / "one"
    one.mkdir()
    assert finished(start("--nproc", 2, PROGRAMS / "train.py", one, 120, 0))[0] == 0
    two = tmp_path / "two"
    two.mkdir()
    agents = launched(hosts, two, 120, 0.05)
    until(lambda: len(entries(two, 0)) > 8)
    hosts[1].link("down")
    reached = len(entries(two, 0))
    time.sleep(5)
    hosts[1].link("up")
    for agent in agents:
        code, _, err = finished(agent, timeout=240)
        assert code == 0, err
    assert len(entries(two, 0)) >= reached
    assert all((a == b).all() for a, b in zip(weights(one), weights(two), strict=True))


@pytest.mark.slow
def test_a_host_dies_and_the_other_goes_on(hosts, tmp_path):
    agents = launched(hosts, tmp_path, 200, 0.05, nodes="1:2")
    until(lambda: any(entry[1] == 2 and entry[2] > 8 for entry in entries(tmp_path, 0)))
    for pid in sh("ip", "netns", "pids", hosts[1].name).stdout.split():
        os.kill(int(pid), signal.SIGKILL)
    killed = time.monotonic()
    before = [entry for entry in entries(tmp_path, 0) if entry[1] == 2][-1]
    until(lambda: entries(tmp_path, 0)[-1][1] == 1)
    print(f"alone after {time.monotonic() - killed:.1f} s")
    code, _, err = finished(agents[0], timeout=240)
    agents[1].communicate()
    assert code == 0, err
    alone = [entry for entry in entries(tmp_path, 0) if entry[1] == 1]
    assert before[2] - 3 <= alone[0][2] or alone[0][2] <= 8  # if it began alone, before the other was there
    assert alone[-1][2] == 199
    assert Path(tmp_path / "weights.pt").exists()
