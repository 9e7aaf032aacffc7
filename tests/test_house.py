"""The house itself: imports only go down, the lesson stays small, and importing it stays cheap."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "miniconvit"
FILES = sorted(PACKAGE.rglob("*.py"))
READING_PATH = [*sorted((PACKAGE / "layers").glob("*.py")), PACKAGE / "model.py"]
CEILING = 900

FLOORS = {
    "errors": 0,
    "arrays": 1,
    "arguments": 1,
    "config": 1,
    "system": 1,
    "layers": 2,
    "optim": 2,
    "data": 2,
    "model": 3,
    "muon": 3,
    "neighbours": 4,
    "gradcheck": 5,
    "engine": 5,
    "checkpoints": 5,
    "analysis": 5,
    "training": 6,
    "experiments": 7,
    "coursework": 7,
    "cli": 8,
    "__main__": 9,
}
"""Every room, a folder or a file beside them, and its floor. A room imports from floors below it
alone, which keeps neighbours apart too: data from layers, analysis from engine."""

NEVER = {"checkpoints": {"data"}, "layers": {"system"}, "model": {"data", "optim", "system"}}
"""Rooms further down that a room has no business with all the same."""

NOT_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def code_lines(source):
    """Line numbers that hold code: not blank, not a comment, not a docstring."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NOT_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return lines


def test_code_lines_counts_code_alone():
    lines = ['"""Doc."""', "", "# why", "x = (1,", "     2)  # shape", "def f():"]
    source = "\n".join([*lines, '    """Two', '    lines."""', "    return x", ""])
    assert code_lines(source) == {4, 5, 6, 9}


def test_the_reading_path_is_short_and_the_readme_says_how_short():
    lines = sum(len(code_lines(path.read_text())) for path in READING_PATH)
    assert lines <= CEILING
    stated = re.search(r"\*\*(\d+) lines of code\*\*", (ROOT / "README.md").read_text())
    assert stated, "the README states the reading path's length"
    assert int(stated[1]) == lines


def room_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(source, path):
    """Our own rooms that a file's source imports, also inside of functions."""
    folder = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = folder[: len(folder) - node.level + 1]
            parts = (*base, *(node.module or "").split("."))
            names = [parts[0]] if parts[0] else [alias.name for alias in node.names]
            yield from (name for name in names if name != room_of(path))
        elif isinstance(node, ast.ImportFrom | ast.Import):
            is_from = isinstance(node, ast.ImportFrom)
            names = [node.module] if is_from else [alias.name for alias in node.names]
            for name in names:
                assert not name.startswith("miniconvit"), f"{path}: import relatively"


def climbs(source, path):
    """The rooms that a file must not import: those on its own floor, above it, or in NEVER."""
    here = room_of(path)
    rooms = [name for name in imported(source, path) if name != "__version__"]
    return [r for r in rooms if FLOORS[r] >= FLOORS[here] or r in NEVER.get(here, ())]


def test_every_room_has_a_floor_and_no_more():
    rooms = {room_of(path) for path in FILES} - {"__init__"}
    assert rooms | {"__main__"} == set(FLOORS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_go_down(path):
    if room_of(path) != "__init__":
        assert climbs(path.read_text(), path) == []


@pytest.mark.parametrize(
    ("line", "file"),
    [
        ("from ..layers import linear_forward", "data/images.py"),
        ("from ..engine.pieces import cut", "layers/block.py"),
        ("from ..engine import make_engine", "analysis/maps.py"),
        ("from ..training.settings import Settings", "analysis/maps.py"),
        ("from ..data import load_dataset", "checkpoints/weights.py"),
        ("from ..coursework import create", "training/loop.py"),
        ("from ...training import train", "engine/kernels/attention.py"),
        ("from . import model", "arrays.py"),
        ("def f():\n    from .. import cli", "training/report.py"),
    ],
)
def test_an_import_that_climbs_is_seen(line, file):
    assert climbs(line, PACKAGE / file)


def test_nothing_but_the_command_line_imports_coursework():
    for path in FILES:
        if room_of(path) not in ("cli", "coursework", "__init__"):
            assert "coursework" not in imported(path.read_text(), path), path


def test_the_command_line_starts_without_scipys_functions():
    """They would be half of its start."""
    code = "import sys, miniconvit.cli.train; print('scipy.special' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


def test_importing_the_package_loads_the_lesson_and_the_checker_alone():
    code = "import sys, miniconvit; print(*sorted(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = found.stdout.split()
    ours = {name.split(".")[1] for name in modules if name.startswith("miniconvit.")}
    lesson = {"layers", "optim", "muon", "model", "gradcheck"}
    assert ours == {"errors", "arrays", "arguments", "config"} | lesson
    assert not {"miniconvit.gradcheck.cases", "miniconvit.gradcheck.mutants"} & set(modules)
    others = {
        "safetensors",
        "pooch",
        "tqdm",
        "click",
        "threadpoolctl",
        "PIL",
        "matplotlib",
        "numba",
    }
    assert not others & set(modules)


def test_no_framework_is_imported():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in names:
                assert name.partition(".")[0] not in {"torch", "jax", "tensorflow", "autograd"}, (
                    path
                )
