"""Joining the process group: from torchrun's variables, from Slurm's, alone, and what goes wrong."""

import json
import os
import socket

import pytest
import torch
import torch.distributed as dist
from tests.distributed import ranks

from conjugo.distributed import Env, environment, init, rank, reported_errors, shutdown, where, world_size


def test_without_a_launcher_a_process_is_alone():
    env = init()
    assert (env.rank, env.world_size, env.local_rank, env.local_world_size, env.restart_count) == (0, 1, 0, 1, 0)
    assert not dist.is_initialized()
    assert (rank(), world_size()) == (0, 1)
    shutdown()


def joined():
    os.environ |= {"LOCAL_WORLD_SIZE": os.environ["WORLD_SIZE"], "TORCHELASTIC_RESTART_COUNT": "2"}
    env = init(timeout=20)
    total = torch.tensor(1)
    dist.all_reduce(total)
    again = init()
    seen = where()
    shutdown()
    shutdown()
    return env, again, total.item(), seen, dist.is_initialized(), world_size()


@pytest.mark.parametrize("world", [1, 3])
def test_workers_find_each_other(world):
    for r, (env, again, total, seen, left, after) in enumerate(ranks.run(world, joined, initialize=False)):
        assert env == again == Env(r, world, r, world, 2, torch.device("cpu"))
        assert total == world
        assert seen == f"rank {r} of {world} on host {socket.gethostname()}"
        assert not left
        assert after == 1


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"RANK": "2"}, r"RANK must be in \[0, 1\] \(WORLD_SIZE = 2\), got 2"),
        ({"MASTER_PORT": None}, "MASTER_PORT must be set"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR must be set"),
        ({"RANK": None}, "RANK must be set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be an integer >= 0, got 'two'"),
    ],
)
def test_variables_that_do_not_fit_are_refused_before_anything_connects(changes, said, monkeypatch):
    for name, value in (TORCHRUN | changes).items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        init()


def test_bad_arguments():
    with pytest.raises(ValueError, match="timeout must be > 0"):
        init(timeout=0)
    with pytest.raises(ValueError, match="device must be 'cpu', 'cuda' or None"):
        init(device="tpu")


def test_more_workers_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="must be <= 2, its GPUs"):
        environment._device(None, 2, 3)
    assert environment._device("cpu", 2, 3) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="no GPU is there"):
        environment._device("cuda", 0, 1)


SLURM = {
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_NODELIST": "node[03-04,11]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),3",
    "SLURM_JOB_ID": "123456",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
}


def test_slurm_tasks_are_workers():
    assert environment._place(SLURM) == {
        "RANK": "5",
        "WORLD_SIZE": "7",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "node03",
        "MASTER_PORT": "23456",
    }
    assert environment._place(SLURM | {"MASTER_ADDR": "ten", "MASTER_PORT": "9"})["MASTER_ADDR"] == "ten"
    assert environment._place(SLURM | {"SLURM_STEP_NODELIST": "a1,b[1-2]"})["MASTER_ADDR"] == "a1"
    # A single task, and a batch script outside srun, are alone; torchrun inside srun decides itself.
    assert environment._place(SLURM | {"SLURM_STEP_NUM_TASKS": "1"}) == {}
    assert environment._place({name: SLURM[name] for name in ("SLURM_JOB_ID", "SLURM_PROCID")}) == {}
    assert environment._place(SLURM | TORCHRUN) == TORCHRUN


def port_taken():
    """Rank 0 of two finds its port in use."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "2"}
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        os.environ["MASTER_PORT"] = str(holder.getsockname()[1])
        try:
            init(timeout=3)
        except ConnectionError as error:
            return str(error), os.environ["MASTER_PORT"]
    return None


def test_a_port_in_use_is_named():
    message, port = ranks.run(1, port_taken, initialize=False)[0]
    assert message.startswith(f"port {port} of this host is taken")


def peer_missing(rank):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    try:
        init(timeout=2)
    except ConnectionError as error:
        return str(error), os.environ["MASTER_PORT"]
    return None


@pytest.mark.parametrize("rank", [0, 1])
def test_missing_peers_are_counted(rank):
    message, _ = ranks.run(1, peer_missing, rank, initialize=False)[0]
    assert message.startswith(
        f"rank {rank} of 2 on host {socket.gethostname()} waited 2 s for all workers at 127.0.0.1:"
    )
    if rank == 0:
        assert message.endswith("1 of 2 workers had joined")


def failing(path):
    os.environ["TORCHELASTIC_ERROR_FILE"] = f"{path}-{rank()}"
    try:
        with reported_errors():
            if rank() == 1:
                raise OSError("no disk")
    except OSError as error:
        return error.__notes__
    return None


def test_errors_of_workers_name_rank_and_host_and_reach_the_launcher(tmp_path):
    notes = ranks.run(2, failing, str(tmp_path / "error"))
    assert notes == [None, [f"(rank 1 of 2 on host {socket.gethostname()})"]]
    assert "no disk" in json.dumps(json.loads((tmp_path / "error-1").read_text()))
    assert not (tmp_path / "error-0").exists()
    with pytest.raises(OSError, match="alone") as caught, reported_errors():
        raise OSError("alone")
    assert not getattr(caught.value, "__notes__", [])
