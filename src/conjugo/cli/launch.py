"""``conjugo launch``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from conjugo.cli._arguments import parse
from conjugo.distributed import launch

__all__ = ["run"]


@dataclass(frozen=True)
class Arguments:
    """Start a program as several workers: conjugo launch [options] script.py ..., or conjugo launch [options] -m module ...

    What follows the program is for it. When a worker fails, all are started anew. On several hosts the same command runs on
    each.

    Args:
        nproc: Workers on this host; auto: one for each GPU, or CPU core where there is none.
        nnodes: Number of hosts, or MIN:MAX for a job that goes on with those that are there.
        rdzv: host:port where the hosts meet, on one of them.
        local_addr: Address by which the others reach this host, where its name does not resolve.
        max_restarts: How often workers are started anew after a failure.
        timeout: Seconds to wait for other hosts.
        grace: Seconds that workers have after Ctrl-C or SIGTERM, to write a checkpoint.
    """

    nproc: Annotated[int | Literal["auto"], tyro.conf.arg(metavar="INT|auto")] = "auto"
    nnodes: str = "1"
    rdzv: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
    local_addr: str | None = None
    max_restarts: int = 3
    timeout: float = 600.0
    grace: float = 60.0


def run(argv: Sequence[str]) -> int:
    """Run the command; gives the exit code."""
    split = _program(argv)
    arguments = parse(Arguments, argv[:split], command="launch")
    return launch(
        argv[split:],
        workers=arguments.nproc,
        nodes=arguments.nnodes,
        rendezvous=arguments.rdzv,
        local_address=arguments.local_addr,
        max_restarts=arguments.max_restarts,
        timeout=arguments.timeout,
        grace=arguments.grace,
    )


def _program(argv: Sequence[str]) -> int:
    """Where the program begins: all options before it have a value."""
    at = 0
    while at < len(argv) and argv[at].startswith("--") and argv[at] != "--help":
        at += 1 if "=" in argv[at] else 2
    return len(argv) if at < len(argv) and argv[at] in ("--help", "-h") else at
