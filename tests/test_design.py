"""The house as docs/design.md draws it: imports go down only, every module says what it is, every public name exists."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "conjugo"
MODULES = sorted(PACKAGE.rglob("*.py"))

GROUND = {"_files", "_graphs", "_space", "_tensors", "errors", "_version"}
METHODS = {"optim", "distributed", "curvature", "scaling"}
ABOVE = {"training": METHODS | GROUND, "studies": {"training", "tabular"} | METHODS | GROUND}
ABOVE["cli"] = {"studies", *ABOVE["studies"]}
ALLOWED = {
    **dict.fromkeys(METHODS, GROUND),
    "optim": {"distributed"} | GROUND,
    "scaling": {"curvature", "optim"} | GROUND,
    "tabular": {"optim"} | GROUND,
    **ABOVE,
    **{room: {"_version"} for room in GROUND},
    "_space": {"_tensors", "errors"},
    "__init__": {"optim", *GROUND},
    "__main__": {"cli"},
}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """First names below ``conjugo`` that a module imports, also inside functions and under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module] if node.module != "conjugo" else [f"conjugo.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("conjugo.")}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    here = room(path)
    assert here in ALLOWED, f"{here}: a new room; give it its floor here and in docs/design.md"
    upwards = imported_rooms(path) - ALLOWED[here] - {here}
    assert not upwards


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_says_what_it_is_and_keeps_its_promises(path):
    name = ".".join(("conjugo", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    if name == "conjugo.__main__":
        return
    module = importlib.import_module(name)
    assert module.__doc__
    missing = [public for public in getattr(module, "__all__", ()) if not hasattr(module, public)]
    assert not missing
    if "__all__" in vars(module):
        assert sorted(module.__all__, key=str) == sorted(set(module.__all__), key=str)


def test_the_design_page_names_every_room():
    page = (ROOT / "docs" / "design.md").read_text()
    rooms = {room(path) for path in MODULES} - {"__init__", "__main__", "_version"}
    assert not [name for name in rooms if f"{name}/" not in page and f"{name}.py" not in page]


def test_nothing_names_a_machine_or_a_registry():
    """Paths of one machine and hosts of package registries have no place in a project that others install."""
    words = ["/" + "work/", "/" + "root/", "pypi" + ".org", "file:/" + "//opt"]
    kinds = {".py", ".md", ".toml", ".txt", ".c", ".h", ".yaml", ".html", ""}
    folders = [ROOT / name for name in ("src", "tests", "docs", "benchmarks", ".ci")]
    files = [p for folder in folders for p in folder.rglob("*") if p.is_file() and "_build" not in p.parts]
    files += [p for p in ROOT.iterdir() if p.is_file()]
    bad = [
        f"{path.relative_to(ROOT)}: {word}"
        for path in files
        if path.suffix in kinds and "__pycache__" not in path.parts
        for word in words
        if word in path.read_text(errors="ignore")
    ]
    assert not bad
