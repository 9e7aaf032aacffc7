"""An old Python, and libraries that are missing or only partly installed: one sentence."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EARLY = ("cli.py", "miniconvit/__init__.py", "miniconvit/__main__.py", "miniconvit/errors.py")
"""What an old Python reads before it is told that it is old."""
BEGINNINGS = {
    "in a checkout": [str(ROOT / "cli.py"), "doctor"],
    "as a module": ["-m", "miniconvit", "doctor"],
    "as installed": ["miniconvit", "doctor"],
}
INSTALLED = "from miniconvit.cli import main\nmain()\n"  # as pip writes it


def call(folder, argv, before=""):
    """The answer of a Python that finds the folder's libraries first and runs `before`."""
    (folder / "sitecustomize.py").write_text(before)
    if argv[0] == "miniconvit":
        (folder / "miniconvit").mkdir(exist_ok=True)  # a folder without a package
        (folder / "bin").mkdir(exist_ok=True)
        (folder / "bin" / "miniconvit").write_text(INSTALLED)
        argv = [str(folder / "bin" / "miniconvit"), *argv[1:]]
    path = os.pathsep.join([str(folder), str(ROOT), *sys.path])
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, env=environment, timeout=120
    )


def assert_sentence(answer, *words):
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr.startswith("Error: ") and answer.stderr.count("\n") == 1, answer.stderr
    for word in words:
        assert word in answer.stderr


OLD = "import sys\nsys.version_info, sys.version = (3, 9, 18), '3.9.18 (main)'\n"


@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_an_old_python(tmp_path, beginning):
    answer = call(tmp_path, BEGINNINGS[beginning], OLD)
    assert_sentence(answer, "needs Python 3.11 or newer, and this is 3.9.18")


def test_an_old_python_can_read_so_far():
    for name in EARLY:
        ast.parse((ROOT / name).read_text(), feature_version=(3, 7))
    with pytest.raises(SyntaxError):
        ast.parse("match x:\n    case _: pass", feature_version=(3, 7))


DAMAGE = {
    "numpy": "raise ImportError('numpy.core failed\\n\\nPLEASE READ', name='numpy._core')",
    "scipy": "from scipy.special import erf",
    "click": "import no_such_part_of_click",
    "safetensors": "",
    "pooch": "raise ModuleNotFoundError(\"No module named 'pooch.core'\", name='pooch.core')",
}
"""Name of a library to the text of its package, of which the rest is not there."""


@pytest.mark.parametrize("name", DAMAGE)
def test_a_library_that_is_partly_installed(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text(DAMAGE[name])
    beginning = list(BEGINNINGS)[len(name) % len(BEGINNINGS)]
    answer = call(tmp_path, BEGINNINGS[beginning])
    assert_sentence(answer, "is missing, or only a part of it is installed", name)


def test_an_import_says_it_too(tmp_path):
    """Where Python goes on after it: the last line of the traceback is the sentence."""
    answer = call(tmp_path, ["-c", "import miniconvit"], OLD)
    last = answer.stderr.splitlines()[-1]
    assert last == "ImportError: miniconvit needs Python 3.11 or newer, and this is 3.9.18"
