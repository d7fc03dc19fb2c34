"""Everything the documentation shows is run: code, commands, links, and the site itself.

What happens to a fenced block of README.md and docs/*.md depends on its language:

* ``python`` runs; all blocks of a page share one namespace and one empty folder.
* ``output`` is what the blocks since the last one printed; numbers may differ by 5 %, ``...`` stands for anything.
* ``yaml`` and ``toml`` blocks that begin with ``# NAME`` are written to the file NAME.
* ``console`` and ``bash``: each line that begins with ``$`` is a command; ``conjugo`` must succeed, and print what is
  shown below it; other programs are not run.

``<!-- slow -->`` above a block puts it into the slow tests, ``<!-- not run: REASON -->`` excepts it.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if "_build" not in page.parts]
PLAN = ROOT / "docs" / "design.md"
"""Its code is what the project is to be in the end."""

SHOWN = ("text", "bibtex", "{eval-rst}", "{toctree}", "{include}")
"""Languages of blocks with nothing to run."""

NUMBER = re.compile(r"\d+\.\d+|\d+(?:,\d{3})*")


@dataclass(frozen=True)
class CodeBlock:
    """A fenced block: its language, its text, the line where it begins, and the marker above it."""

    language: str
    text: str
    line: int
    marker: str


def blocks(page: Path) -> Iterator[CodeBlock]:
    """The outermost fenced blocks of a page."""
    lines = page.read_text(encoding="utf-8").splitlines()
    fence, start, above = "", 0, ""
    for number, line in enumerate(lines):
        if not fence and (match := re.match(r"(```+|~~~+|:::+)(\S.*)?$", line)):
            fence, start = match[1], number
            above = next((previous for previous in reversed(lines[:number]) if previous.strip()), "")
        elif fence and line.rstrip() == fence:
            language = lines[start][len(fence) :].strip()
            marker = re.fullmatch(r"<!-- (slow|not run: \S.*) -->", above)
            yield CodeBlock(
                language, "\n".join(lines[start + 1 : number]), start + 2, marker[1].split(":")[0] if marker else ""
            )
            fence = ""
    assert not fence, f"{page}: the block of line {start + 1} has no end"


def identifier(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# ---- running what is shown ----


class Reader:
    """Does what a page shows, in order, as a reader would."""

    def __init__(self, page: Path) -> None:
        self.page = page
        self.namespace: dict[str, object] = {"__name__": "__main__"}
        self.printed = ""

    def read(self, block: CodeBlock) -> None:
        action = {
            "python": self.run,
            "output": self.compare,
            "console": self.command,
            "bash": self.command,
            "yaml": self.save,
            "toml": self.save,
        }.get(block.language)
        if action is None:
            assert block.language.split()[0] in SHOWN, f"{self.where(block)}: nobody knows what {block.language!r} is"
            return
        action(block)

    def where(self, block: CodeBlock) -> str:
        return f"{identifier(self.page)}, line {block.line}"

    def run(self, block: CodeBlock) -> None:
        printed = io.StringIO()
        code = compile("\n" * (block.line - 1) + block.text, str(self.page), "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, self.namespace)
        self.printed += printed.getvalue()

    def compare(self, block: CodeBlock) -> None:
        difference = mismatch(block.text, self.printed)
        assert difference is None, f"{self.where(block)}: {difference}"
        self.printed = ""

    def save(self, block: CodeBlock) -> None:
        name = re.match(r"# (\S+\.(?:yaml|toml))$", block.text.splitlines()[0])
        assert name, f"{self.where(block)}: a configuration begins with '# FILE NAME'"
        Path(name[1]).write_text(block.text + "\n")

    def command(self, block: CodeBlock) -> None:
        for line, shown in commands(block.text):
            program, *arguments = shlex.split(line, comments=True)
            assert program == "conjugo", f"{self.where(block)}: {program} is not run here, mark the block 'not run'"
            with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
                code = conjugo(arguments)
            assert code == 0, f"{self.where(block)}: {line}\n{out.getvalue()}{errors.getvalue()}"
            difference = mismatch(shown, out.getvalue()) if shown else None
            assert difference is None, f"{self.where(block)}: {line}: {difference}"


def commands(text: str) -> list[tuple[str, str]]:
    """What stands behind each ``$ `` (continued behind a backslash), and the output shown below it."""
    joined = re.sub(r"\\\n\s*", " ", text)
    parts = re.split(r"^\$ ", joined, flags=re.MULTILINE)[1:]
    return [(command, shown) for command, _, shown in (part.partition("\n") for part in parts)]


def conjugo(arguments: list[str]) -> int:
    from conjugo.cli import main

    try:
        return main(arguments)
    except SystemExit as leaving:
        return int(leaving.code or 0)


def mismatch(expected: str, printed: str) -> str | None:
    """Why *printed* is not what a page shows, or None.

    Numbers may differ by 5 %; ``...`` stands for anything, and numbers are not compared in a text that has it.
    """
    want, got = (re.sub(r"\s+", " ", text.strip()) for text in (expected, printed))
    pattern = ".*".join(re.escape(NUMBER.sub("#", part)) for part in want.split("..."))
    if not re.fullmatch(pattern, NUMBER.sub("#", got)):
        return f"shown is\n{expected}\nprinted was\n{printed}"
    if "..." in want:
        return None
    differing = [f"{a} and {b}" for a, b in zip(numbers(want), numbers(got), strict=True) if abs(a - b) > 0.05 * abs(a)]
    return f"more than 5 % between {', '.join(differing)}; printed was\n{printed}" if differing else None


def numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in NUMBER.findall(text)]


def read_page(page: Path, folder: Path, *, slow: bool) -> None:
    reader = Reader(page)
    threads = torch.get_num_threads()
    with contextlib.chdir(folder):
        for block in blocks(page):
            if block.marker != "not run" and (slow or block.marker != "slow"):
                reader.read(block)
    torch.set_num_threads(threads)


WITH_CODE = [page for page in PAGES if page != PLAN and any(block.language not in SHOWN for block in blocks(page))]
SLOW = [page for page in WITH_CODE if any(block.marker == "slow" for block in blocks(page))]


@pytest.mark.parametrize("page", WITH_CODE, ids=identifier)
def test_what_a_page_shows_works(page, tmp_path):
    read_page(page, tmp_path, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW, ids=identifier)
def test_what_a_page_shows_works_with_the_slow_parts(page, tmp_path):
    read_page(page, tmp_path, slow=True)


def test_the_comparison_of_outputs_finds_differences():
    assert mismatch("accuracy 0.950 after 30 steps", "accuracy 0.960 after 30 steps") is None
    assert mismatch("accuracy 0.95", "accuracy 0.85") is not None
    assert mismatch("accuracy 0.95", "loss 0.95") is not None
    assert mismatch("a 1\nb 2", "a 1") is not None
    assert mismatch("a ... b", "a 17 b") is None
    assert mismatch("1,347 steps", "1,347 steps") is None


def test_commands_are_told_from_their_output():
    assert commands("$ a 1 \\\n  2\nout\n$ b\n") == [("a 1  2", "out\n"), ("b", "")]


def test_blocks_are_found_with_their_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("text\n\n<!-- slow -->\n\n```python\nx = 1\n```\n\n````text\n```python\n```\n````\n")
    assert [(b.language, b.text, b.line, b.marker) for b in blocks(page)] == [
        ("python", "x = 1", 6, "slow"),
        ("text", "```python\n```", 10, ""),
    ]


# ---- links and names ----


def prose(page: Path) -> str:
    """The page without its fenced blocks, except those that hold links."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^(```+|:::+)(?!\{).*?^\1\s*$", "", text, flags=re.MULTILINE | re.DOTALL)


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and MyST make it."""
    plain = re.sub(r"[`*_]|\[|\]\([^)]*\)", "", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = prose(page)
    named = re.findall(r"^\((\S+)\)=$", text, flags=re.MULTILINE)
    return {slug(h) for h in re.findall(r"^#{1,6} (.+)$", text, flags=re.MULTILINE)} | set(named)


def broken_links(page: Path) -> list[str]:
    targets = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", prose(page))
    broken = []
    for target in (a or b for a, b in targets):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=identifier)
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "b.md").write_text("# A `heading` here\n")
    page = tmp_path / "a.md"
    page.write_text("[1](b.md) [2](b.md#a-heading-here) [3](b.md#nowhere) [4](c.md) [5](https://example.org)\n")
    assert broken_links(page) == ["b.md#nowhere", "c.md"]


def test_every_page_is_in_a_table_of_contents():
    listed = set()
    for page in PAGES:
        for block in blocks(page):
            if block.language == "{toctree}":
                names = [
                    line.split("<")[-1].rstrip(">") for line in block.text.splitlines() if line[:1] not in ("", ":")
                ]
                listed |= {(page.parent / name.strip()).resolve() for name in names}
    pages = {page.with_suffix("") for page in PAGES if page.parent != ROOT and page.name != "index.md"}
    assert pages <= listed
    assert {name for name in listed if not name.with_suffix(".md").exists()} == set()


def resolves(name: str) -> bool:
    """Whether a dotted name is a module or something inside one."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@pytest.mark.parametrize("page", [page for page in PAGES if page != PLAN], ids=identifier)
def test_names_exist(page):
    text = page.read_text(encoding="utf-8")
    names = set(re.findall(r"`~?(conjugo(?:\.\w+)+)(?:\(\))?`", text))
    names |= set(re.findall(r"^\.\. auto\w+:: (conjugo(?:\.\w+)+)", text, flags=re.MULTILINE))
    assert [name for name in sorted(names) if not resolves(name)] == []


def test_pictures_are_small_and_used():
    used = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for picture in (ROOT / "docs" / "images").iterdir():
        assert picture.stat().st_size < 150_000, picture.name
        assert picture.name in used


# ---- the site ----


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    for module in ("sphinx", "furo", "myst_parser", "sphinx_copybutton"):
        pytest.importorskip(module, reason="the site needs the extra conjugo[docs]")
    command = [sys.executable, "-W", "ignore", "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    built = subprocess.run(
        [*command, "-d", str(tmp_path / "doctrees"), str(ROOT / "docs"), str(tmp_path / "html")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "html" / "index.html").stat().st_size > 5_000
