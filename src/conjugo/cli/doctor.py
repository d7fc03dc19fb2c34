"""``conjugo doctor``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from conjugo.cli._arguments import Switch, parse

__all__ = ["run"]


@dataclass(frozen=True)
class Arguments:
    """Show what this machine has for training, measure its memory, and advise.

    Args:
        json: Print JSON.
    """

    json: Switch = False


def run(argv: Sequence[str]) -> int:
    """Run the command; gives the exit code."""
    from rich.console import Console
    from rich.table import Table

    from conjugo.training.doctor import diagnose

    arguments = parse(Arguments, argv, command="doctor")
    found = diagnose()
    if arguments.json:
        print(json.dumps(asdict(found), indent=1))
        return 0
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in found.findings.items():
        table.add_row(name, value)
    console = Console()
    console.print(table)
    for line in found.advice:
        console.print(f"- {line}", highlight=False, markup=False)
    return 0
