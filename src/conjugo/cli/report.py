"""``conjugo report``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from conjugo.cli._arguments import parse
from conjugo.errors import check
from conjugo.studies import CompareResult, load_result, run_report
from conjugo.studies.compare import save_result

__all__ = ["run", "show"]


@dataclass(frozen=True)
class Arguments:
    """Make report.html of training runs, or table, plots and report.html of comparisons again; also of unfinished ones.

    Args:
        folders: Run directories of conjugo train or conjugo compare.
    """

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DIR ...")]


def run(argv: Sequence[str]) -> int:
    """Run the command; gives the exit code."""
    folders = parse(Arguments, argv, command="report").folders
    check(len(folders) > 0, "report", "DIR", None, "a run directory, at least one")
    for folder in folders:
        if run_report.is_run(folder):
            print(f"report: {run_report.write(folder)}")
            continue
        result = load_result(folder)
        save_result(result, folder)
        show(result, folder)
    return 0


def show(result: CompareResult, folder: Path) -> None:
    """Print the tables of a comparison, what they say, and where the report lies."""
    from rich.console import Console

    from conjugo.studies import summary

    console = Console()
    for table in summary.tables(result):
        console.print(table)
    for sentence in (summary.headline(result), summary.scaling(result)):
        console.print(sentence, highlight=False)
    console.print(f"report: {folder / 'report.html'}", highlight=False, soft_wrap=True)
    for crash in result.crashes:
        print(f"a run failed: {crash}", file=sys.stderr)
