"""The house itself: the lesson stays small enough to print, and imports only go down."""

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
READING_PATH = [*sorted((PACKAGE / "layers").glob("*.py")), PACKAGE / "model.py"]
CEILING = 900

FLOORS = {
    "errors": 0,
    "config": 1,
    "backend": 1,
    "device": 1,
    "layers": 2,
    "kernels": 2.5,
    "train": 4,
    "experiments": 4,
    "coursework": 4,
    "cli": 5,
    "__main__": 5,
}
"""Every other module is on floor 3, where concepts may build on each other without a circle."""

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


def imported(path):
    """Names of our own modules that a file imports, by the first part below the package."""
    depth = len(path.relative_to(PACKAGE).parts) - 1
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth + 1:
            for name in [node.module] if node.module else [alias.name for alias in node.names]:
                yield name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = (
                [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            )
            for name in names:
                assert not (name or "").startswith("miniconvit"), f"{path}: import relatively"


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_imports_only_go_down(path):
    here = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if here == "__init__":
        return
    for there in imported(path):
        if (PACKAGE / there).exists() or (PACKAGE / f"{there}.py").exists():
            assert FLOORS.get(there, 3) <= FLOORS.get(here, 3), f"{path} imports {there} from above"


def test_imports_do_not_run_in_a_circle():
    graph = {}
    for path in PACKAGE.rglob("*.py"):
        here = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if here != "__init__":
            graph.setdefault(here, set()).update(set(imported(path)) - {here})

    def visit(module, trail):
        assert module not in trail, f"circle: {' -> '.join([*trail, module])}"
        for other in graph.get(module, ()):
            visit(other, [*trail, module])

    for module in graph:
        visit(module, [])


def test_no_framework_is_imported():
    for path in PACKAGE.rglob("*.py"):
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


def test_the_import_loads_the_lesson_and_the_checker_alone():
    code = "import sys, miniconvit; print(*(n for n in sys.modules if n.startswith('miniconvit.')))"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()
    names = {name.removeprefix("miniconvit.") for name in loaded}
    assert {"layers.gpsa", "model", "optim", "gradcheck.checker"} <= names
    unasked = {"checkpoint", "weights", "torch_file", "data", "engine"}
    assert not names & (unasked | {"gradcheck.cases", "gradcheck.mutants"})
