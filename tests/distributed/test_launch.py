"""Starting workers: the command and the function, exit codes, what is said when a worker fails, signals."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conjugo.distributed import launch

PROGRAMS = Path(__file__).parent / "programs"
HOST = socket.gethostname()


def start(*arguments, **options):
    """`conjugo launch` in the background, with what it prints."""
    return subprocess.Popen(
        [sys.executable, "-m", "conjugo", "launch", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


def finished(process, timeout=120):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def program(tmp_path, text):
    path = tmp_path / "program.py"
    path.write_text(f"import os, sys, signal, time\nfrom conjugo.distributed import init, reported_errors\n{text}\n")
    return path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"workers": 0}, "workers must be >= 1 or 'auto', got 0"),
        ({"nodes": "2:1"}, "nodes must be a number >= 1, or 'MIN:MAX'"),
        ({"nodes": "x"}, "nodes must be"),
        ({"nodes": "2"}, "rendezvous must be 'host:port' for several nodes, got None"),
        ({"rendezvous": "host"}, "rendezvous must be 'host:port', got 'host'"),
        ({"max_restarts": -1}, "max_restarts must be >= 0, got -1"),
        ({"timeout": 0}, "timeout must be > 0"),
        ({"grace": 0}, "grace must be > 0"),
        ({"command": []}, "command must be a script"),
    ],
)
def test_bad_arguments(arguments, said):
    with pytest.raises(ValueError, match=said):
        launch(**{"command": ["program.py"], "workers": 1, **arguments})


def test_arguments_output_and_a_restart(tmp_path):
    path = program(
        tmp_path,
        "env = init()\nsys.stdout.write(f'{env.rank} {env.world_size} {env.restart_count} {sys.argv[1:]}\\n')\n"
        "if env.rank == 1 and not env.restart_count: os.kill(os.getpid(), signal.SIGKILL)\n"
        "if not env.restart_count: time.sleep(30)",
    )
    code, out, err = finished(start("--nproc", 2, "--max-restarts=1", path, "--nproc", "7", "-m"))
    assert code == 0, err
    assert "1 2 1 ['--nproc', '7', '-m']" in out
    assert (
        f"conjugo launch: rank 1 on host {HOST} was killed by SIGKILL (out of memory?); starting all workers anew (1 of 1)"
        in err
    )


def test_an_exception_names_rank_and_host_and_restarts_end(tmp_path):
    path = program(
        tmp_path,
        "env = init()\nwith reported_errors():\n    if env.rank == 1: raise OSError('no disk')\n    time.sleep(30)",
    )
    code, _, err = finished(start("--nproc", 2, "--max-restarts", 0, path))
    assert code == 1
    assert f"conjugo launch: rank 1 on host {HOST} ended with exit code 1: OSError: no disk; giving up" in err
    assert f"(rank 1 of 2 on host {HOST})" in err


def test_a_wrong_call_is_not_repeated(tmp_path):
    path = program(tmp_path, "print('once')\nsys.exit(2)")
    code, out, err = finished(start("--nproc", 1, path))
    assert (code, out, err) == (2, "once\n", "")


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_the_workers_which_write_a_checkpoint(sent, tmp_path):
    process = start("--nproc", 2, PROGRAMS / "train.py", tmp_path, 1000, 0.05)
    log = tmp_path / "log-1"
    until = time.monotonic() + 60
    while time.monotonic() < until and (not log.exists() or len(log.read_text().splitlines()) < 4):
        time.sleep(0.05)
    process.send_signal(sent)
    code, _, err = finished(process)
    assert code == 128 + sent, err
    steps = [line.split()[2] for line in log.read_text().splitlines()]
    names = sorted(os.listdir(tmp_path / "checkpoints"))
    assert names[-1] == f"step-{int(steps[-1]) + 1:08}"  # nothing was lost
    for line in log.read_text().splitlines()[-1:]:
        assert not Path(f"/proc/{line.split()[3]}").exists()


def test_the_command_explains_itself(capsys):
    from conjugo.cli import main

    assert main(["launch", "--help"]) == 0
    assert "--max-restarts" in capsys.readouterr().out
    assert main(["launch", "--nproc", "2"]) == 2
    assert "a script, or -m and a module" in capsys.readouterr().err
