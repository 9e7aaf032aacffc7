"""Makes a coursework: the students' folder and the instructor's."""

import hashlib
import json
import re
import secrets
import zipfile
from base64 import urlsafe_b64encode
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, requires
from importlib.metadata import files as installed_files
from pathlib import Path
from textwrap import fill

from .. import __version__
from ..errors import UserError
from ..gradcheck.mutants import MUTANTS
from .cases import VISIBLE, cases
from .exercises import EXERCISES, PAGES, allowed_functions, exercises
from .grading import INSTRUCTOR_FILE, STUDENT_FILE
from .skeleton import kit_source, skeleton, skeleton_hash, solution
from .student import TESTS, Visible, write_tests

PACKAGE = Path(__file__).parents[1]
SHORTEST_SECRET = 16

CHECKER = (
    *("errors", "gradcheck/checker", "gradcheck/forms", "gradcheck/pair", "gradcheck/slopes"),
    *("coursework/judge", "coursework/runner", "coursework/source", "coursework/student"),
    *("coursework/task", "coursework/work"),
)
"""The files of the students' checker: what judges, and nothing that could be an answer."""

README = """\
# Coursework: a vision transformer by hand

Write the functions that say `raise NotImplementedError`, forward and backward, with NumPy alone.
{formulas} What `x_forward` keeps for `x_backward` is yours to choose:
it returns `(output, cache)`, and `x_backward(dy, cache)` returns the gradients in the order named.

You need Python 3.11 and NumPy 2, or newer. In this folder:

```
python -m checker                  # what is right, what is wrong, and how
python -m checker {example:16} # one exercise
python -m checker pack             # writes submission.zip, where nothing is missing
python -m checker pack --partial   # the same with blanks in it, at the deadline
pytest                             # the check as tests
```

`from checker import check_gradients` compares a backward pass of your own with central differences.

Rules: import numpy, math and kit only. Leave your arguments as they are. Keep the dtype: float32
in, float32 out. A function's answer depends on its arguments alone, in any order of calls. Every
exercise counts by itself, and every tensor by itself. Leaving the arguments as they are counts as
one more tensor, called `arguments`. What `kit` gives you of other exercises is your own work here,
so do the exercises in this order. While you are graded it is right. Grading uses other numbers and
sizes: one image and three, one head, grids that are not square.
{given}
{table}
{hints}
"""

WITH_FORMULAS = "The docstrings give formulas and shapes."
WITHOUT_FORMULAS = """\
The docstrings give shapes and the formulas of the forward passes. Those of the backward passes are
yours to derive."""

GIVEN = (
    "These exercises build on {}. Put your own from earlier into this folder, or those that you "
    "are given."
)

INIT = """\
\"\"\"The visible tests and the gradient checker of miniconvit, without its layers.\"\"\"

import sys

if sys.version_info < (3, 11):
    sys.exit("Error: the checker needs Python 3.11 or newer")
try:
    import numpy
except ImportError:
    numpy = None
if numpy is None or int(numpy.__version__.partition(".")[0]) < 2:
    sys.exit("Error: the checker needs NumPy 2 or newer: python -m pip install -U numpy")

from .checker import check_gradients
from .student import read_tests, result_of
"""

MAIN = """\
import sys

from .student import main

sys.exit(main())
"""

TEST = """\
\"\"\"The visible tests: what `python -m checker` runs, for pytest.\"\"\"

import pytest
from checker import read_tests, result_of


@pytest.mark.parametrize("exercise", read_tests().exercises, ids=lambda exercise: exercise.name)
def test_exercise(exercise):
    result = result_of(exercise)
    assert result.is_full, result.text
"""

SETUP = """\
#!/usr/bin/env bash
# Runs once, when Gradescope builds the image. It needs Python 3.11 or newer.
set -e
apt-get update
apt-get install -y python3 python3-venv libseccomp2
python=python3
if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    # Ubuntu 22.04 has it beside its own 3.10.
    apt-get install -y python3.11 python3.11-venv
    python=python3.11
fi
"$python" -m venv /autograder/venv
/autograder/venv/bin/pip install /autograder/source/miniconvit-*.whl
"""

RUN = """\
#!/usr/bin/env bash
set -e
root=$(cd "$(dirname "$0")" && pwd)
# The students' code runs as nobody, who then cannot read the secret or the reference.
chmod 700 "$root/source" "$root/venv"
"$root/venv/bin/python" -c '
import sys
from miniconvit import UserError
from miniconvit.coursework import autograde
try:
    autograde(sys.argv[1])
except UserError as error:
    sys.exit(f"Error: {error}")' "$root"
"""


def create(out, secret_file, names=None, formulas=True):
    """Writes out/student and out/instructor for the exercises of these names (all where None).

    secret_file: the text that hidden inputs are drawn from; drawn and written where it is missing.
    formulas: whether the blanks' docstrings have those of the backward passes. What the exercises
    build on, and is none of them, goes to out/instructor/given. Returns the exercises, and those.
    Raises UserError where out is not empty or the secret is too short.
    """
    chosen, out, secret_file = exercises(names), Path(out), Path(secret_file)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already: choose a folder that is empty or new")
    if (out / "student").resolve() in secret_file.resolve().parents:
        raise UserError(f"{secret_file} would be in the students' folder: keep it elsewhere")
    secret = _secret(secret_file)
    given = tuple(
        e for e in EXERCISES if e not in chosen and any(e.name in _needs(one) for one in chosen)
    )
    edition = {"version": __version__, "skeleton": skeleton_hash(chosen, formulas)}
    config = {"exercises": [e.name for e in chosen], **edition}
    blanks = {exercise.file: skeleton(exercise, formulas) for exercise in chosen}
    readme = README.format(
        formulas=WITH_FORMULAS if formulas else WITHOUT_FORMULAS,
        example=chosen[0].name,
        table=_table(chosen, goals=formulas),
        hints=_hints(chosen) if formulas else "",
        given=f"\n{fill(GIVEN.format(', '.join(e.file for e in given)), 100)}\n" if given else "",
    )
    student = blanks | {
        "kit.py": kit_source(),
        "README.md": readme,
        "test_visible.py": TEST,
        STUDENT_FILE: json.dumps(config, indent=2) + "\n",
        **checker_files(),
    }
    hidden = json.dumps(config | {"secret": secret, "visibility": "hidden"}, indent=2) + "\n"
    solutions = {f"solution/{exercise.file}": solution(exercise) for exercise in chosen}
    solutions |= {f"given/{exercise.file}": solution(exercise) for exercise in given}
    instructor = solutions | {
        "solution/kit.py": kit_source(),
        f"solution/{STUDENT_FILE}": student[STUDENT_FILE],
        INSTRUCTOR_FILE: hidden,
        "notes.md": _notes(chosen),
        "autograder/setup.sh": SETUP,
        "autograder/run_autograder": RUN,
        f"autograder/{INSTRUCTOR_FILE}": hidden,
    }
    for folder, files in (("student", student), ("instructor", instructor)):
        for name, text in files.items():
            _write(out / folder / name, text)
    write_tests(out / "student" / "checker" / TESTS.name, _visible(chosen, edition))
    autograder = out / "instructor" / "autograder"
    write_wheel(autograder)
    _zip(autograder, out / "instructor" / "autograder.zip")
    return chosen, given


def checker_files():
    """Name to text of the checker: a flat package of what `CHECKER` names."""
    texts = {f"checker/{Path(name).name}.py": PACKAGE / f"{name}.py" for name in CHECKER}
    flat = {
        name: re.sub(r"(?m)^from \.+(?:\w+\.)*(\w+) import", r"from .\1 import", path.read_text())
        for name, path in texts.items()
    }
    extra = {"__init__.py": INIT, "__main__.py": MAIN, "LICENSE": _license()}
    return flat | {f"checker/{name}": text for name, text in extra.items()}


def _needs(exercise):
    """The names of the other exercises whose functions an exercise may call."""
    owners = {name: other.name for other in EXERCISES for name in other.functions}
    called = {name for unit in exercise.units for name in allowed_functions(unit.name)}
    return {owners[name] for name in called & owners.keys()} - {exercise.name}


def _visible(chosen, edition):
    drawn = {
        unit.name: cases(unit, "visible", VISIBLE) for exercise in chosen for unit in exercise.units
    }
    needs = {one.name: tuple(e.name for e in chosen if e.name in _needs(one)) for one in chosen}
    return Visible(chosen, needs, drawn, edition)


def _secret(path):
    if not path.exists():
        _write(path, secrets.token_hex(32) + "\n", mode=0o600)
    try:
        secret = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise UserError(
            f"the secret in {path} is no UTF-8 text: delete the file and a good one is drawn"
        ) from error
    if len(secret) < SHORTEST_SECRET:
        raise UserError(
            f"the secret in {path} has {len(secret)} characters, but needs {SHORTEST_SECRET}: "
            "delete the file and a good one is drawn"
        )
    return secret


def _write(path, text, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")
    if path.name == INSTRUCTOR_FILE:
        mode = 0o600
    if path.name in ("setup.sh", "run_autograder"):
        mode = 0o755
    if mode:
        path.chmod(mode)


def _zip(folder, path):
    """The files of a folder at the root of a zip file, with their permissions."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, file.name)
    path.chmod(0o600)


def _table(chosen, goals=True):
    """The exercises as a table; the goals say half of some derivations, and may be left out."""
    cells = [("exercise", "points", "minutes", "goal"), ("---",) * 4]
    cells += [(e.name, e.points, e.minutes, e.goal) for e in chosen]
    return "\n".join(f"| {' | '.join(map(str, row[: 3 + goals]))} |" for row in cells)


def _hints(chosen):
    lines = [
        f"- `{e.file}` ({', '.join(e.functions)}): {e.hint} Page: `{PAGES[e.name]}`" for e in chosen
    ]
    return "\n".join(["", "Hints, and pages of miniconvit's `tutorials/`:", "", *lines])


def _notes(chosen):
    """Notes for the instructor; common mistakes are the planted bugs that the tests find."""
    parts = [
        "# Notes for the instructor",
        _table(chosen),
        "Points are shared equally among the tensors of an exercise. The lists are bugs of "
        "students and of real projects; each, planted into the solution, loses points here.",
    ]
    for exercise in chosen:
        stories = [m.story for m in MUTANTS if m.function in exercise.functions]
        stories += exercise.mistakes
        functions = ", ".join(f"`{name}`" for name in exercise.functions)
        parts += [
            f"## {exercise.name}: {exercise.points} points, {exercise.minutes} minutes",
            f"{exercise.goal}\n\nStudents write {functions}. Hint: {exercise.hint}",
            f"The page of the tutorials: `tutorials/{PAGES[exercise.name]}`",
            "Common mistakes:",
            "\n".join(f"- {story}" for story in stories),
        ]
    return "\n\n".join(parts) + "\n"


def write_wheel(folder):
    """This project as a wheel, made of its files as they are, without build tools or a network.

    Returns its path.
    """
    info = f"miniconvit-{__version__}.dist-info"
    files = {
        f"miniconvit/{path.relative_to(PACKAGE).as_posix()}": path.read_bytes()
        for path in sorted(PACKAGE.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    dependencies = "".join(f"Requires-Dist: {line}\n" for line in _dependencies())
    texts = {
        "METADATA": f"Metadata-Version: 2.4\nName: miniconvit\nVersion: {__version__}\n"
        "License-Expression: Apache-2.0\nLicense-File: LICENSE\n"
        f"Requires-Python: >=3.11\n{dependencies}",
        "licenses/LICENSE": _license(),
        "WHEEL": "Wheel-Version: 1.0\nGenerator: miniconvit\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
        "entry_points.txt": "[console_scripts]\nminiconvit = miniconvit.cli:main\n",
    }
    files |= {f"{info}/{name}": text.encode() for name, text in texts.items()}
    record = "".join(f"{name},{_digest(data)},{len(data)}\n" for name, data in files.items())
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    path = Path(folder) / f"miniconvit-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def _digest(data):
    return "sha256=" + urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")


def _license():
    """The text of the license: of the checkout that this runs in, else as installed."""
    if (PACKAGE.parent / "setup.cfg").is_file():
        return (PACKAGE.parent / "LICENSE").read_text(encoding="utf-8")
    try:
        (path,) = (path for path in installed_files("miniconvit") or () if path.name == "LICENSE")
    except (PackageNotFoundError, ValueError) as error:
        raise UserError(
            "the autograder needs miniconvit's LICENSE, which was not found: run this in a "
            "checkout, or install miniconvit with pip"
        ) from error
    return path.read_text(encoding="utf-8")


def _dependencies():
    """The requirements without extras: of the checkout that this runs in, else as installed."""
    checkout = PACKAGE.parent / "setup.cfg"
    if checkout.is_file():
        parser = ConfigParser()
        parser.read(checkout, encoding="utf-8")
        return parser["options"]["install_requires"].split()
    try:
        return [line for line in requires("miniconvit") or [] if "extra ==" not in line]
    except PackageNotFoundError as error:
        raise UserError(
            "the autograder needs miniconvit's dependencies, but no list of them was found: run "
            "this in a checkout, or install miniconvit with pip"
        ) from error
