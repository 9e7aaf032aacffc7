"""What students are given and told: no solution, on request no formula, nothing hidden."""

import ast
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from test_coursework import environment, homework, invoke, submission

import miniconvit
from miniconvit import UserError
from miniconvit.coursework import EXERCISES, create, exercises, grade
from miniconvit.coursework.cases import HIDDEN, VISIBLE, cases
from miniconvit.coursework.grading import SMALL, Assignment, grade_exercise
from miniconvit.coursework.sandbox import MOST_DEATHS, SOURCE_LIMITS, Limits
from miniconvit.coursework.skeleton import skeleton, skeleton_hash, solution, source_module
from miniconvit.coursework.student import read_tests

PACKAGE = Path(miniconvit.__file__).parent


@pytest.fixture(scope="module")
def kits(tmp_path_factory):
    """{whether with formulas: a whole coursework}."""
    folder = tmp_path_factory.mktemp("kits")
    for formulas in (True, False):
        create(folder / str(formulas), folder / "secret", formulas=formulas)
    return {formulas: folder / str(formulas) for formulas in (True, False)}


def handed_out(kit):
    """Name to text of every file for students but the numbers."""
    files = [p for p in (kit / "student").rglob("*") if p.is_file() and p.name != "visible.bin"]
    return {str(p.relative_to(kit / "student")): p.read_text(encoding="utf-8") for p in files}


# No solution


def functions_in(text):
    return [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]


def code(function):
    """A function's body without its docstring, names of its variables and all."""
    is_doc = ast.get_docstring(function) is not None
    return [ast.dump(statement) for statement in function.body[is_doc:]]


def solved(text):
    """What the student's code must not hold: bodies of the exercises' functions that stand in it,
    and statements of theirs that are long enough to be nobody else's."""
    mine = {line for function in functions_in(text) for line in code(function)}
    found = []
    for exercise in EXERCISES:
        names = {name.rpartition(".")[2] for name in exercise.functions}
        for function in functions_in(solution(exercise)):
            if function.name in names:
                lines = [line for line in code(function) if len(line) > 250]
                found += [(function.name, line) for line in lines if line in mine]
    return found


def test_no_solution_is_in_what_students_get(kits):
    texts = {name: text for name, text in handed_out(kits[True]).items() if name.endswith(".py")}
    assert "checker/judge.py" in texts
    for name, text in texts.items():
        assert not solved(text), name
    guilty = {name for e in EXERCISES for name, _ in solved(solution(e))}  # the test can fail
    assert guilty == {name.rpartition(".")[2] for e in EXERCISES for name in e.functions}


def test_the_checker_holds_no_function_of_the_lesson(kits):
    lesson = [*(PACKAGE / "layers").glob("*.py"), PACKAGE / "model.py", PACKAGE / "optim.py"]
    taught = {tuple(code(f)) for path in lesson for f in functions_in(path.read_text())}
    checker = {n: t for n, t in handed_out(kits[True]).items() if n.startswith("checker/")}
    for name, text in checker.items():
        if name.endswith(".py"):
            assert not {tuple(code(f)) for f in functions_in(text)} & taught, name
            assert not re.search(r"^\s*(from|import) .*\b(miniconvit|layers)\b", text, re.M), name
    assert len(taught) > 50


# No formula


def formulas_in(texts):
    """Names of the exercises of whose backward passes a formula stands in the texts, or a sentence:
    what the first paragraph of the library's docstring says beside shapes."""
    everything = " ".join(" ".join(texts.values()).split())
    found = set()
    for exercise in EXERCISES:
        for function in functions_in(Path(source_module(exercise).__file__).read_text()):
            if function.name in exercise.functions and function.name.endswith("_backward"):
                first = " ".join(ast.get_docstring(function).partition("\n\n")[0].split())
                clauses = [c.strip(" .,") for c in re.split(r";|\. | with (?=d)", first)]
                telling = [c for c in clauses if not re.match(r"Returns|d[yP] \(", c)]
                found |= {exercise.name for clause in telling if clause in everything}
    return found


def test_no_formula_of_a_backward_pass_is_left(kits):
    texts = handed_out(kits[False])
    assert formulas_in(texts) == set()
    gradient = re.compile(r"\bd[a-zA-Z]\w*(\[\w+\])? = ")
    for exercise in EXERCISES:
        text = texts[exercise.file]
        own = text.replace("dx = col", "").replace("dy = row", "")  # offsets, in position
        assert not gradient.search(own), exercise.name
        forward = [f for f in functions_in(text) if f.name.endswith("_forward")]
        for node in (ast.parse(text), *forward):
            said = ast.get_docstring(node) or ""
            assert exercise.name == "adamw" or not re.search("backward|gradient|derivative", said)
    # The same search finds them where they are meant to be.
    given = formulas_in(handed_out(kits[True]))
    assert given == {e.name for e in EXERCISES} - {"adamw"}  # which has no way back


def test_blanks_without_formulas_keep_the_rest(kits):
    """Forward docstrings, signatures, and every gradient by name; hints, which tell, are gone."""
    for exercise in EXERCISES:
        with_, without = (
            {f.name: f for f in functions_in(skeleton(exercise, formulas))}
            for formulas in (True, False)
        )
        gone = with_.keys() - without.keys()
        assert gone <= {"_project_backward", "_branch_backward"}
        for unit in exercise.units:
            if not unit.gradients:
                continue
            forward, backward = without[unit.forward], without[unit.backward]
            assert ast.unparse(backward.args) == ast.unparse(with_[unit.backward].args)
            shapes = ast.get_docstring(backward)
            assert all(re.search(rf"\b{name}\b", shapes) for name in unit.gradients), unit.name
            original = ast.get_docstring(with_[unit.forward])
            assert original.startswith(ast.get_docstring(forward)[:-1])
    readme = handed_out(kits[False])["README.md"]
    assert "yours to derive" in " ".join(readme.split())
    assert not [e.name for e in EXERCISES if e.hint in readme]


def test_an_edition_without_formulas_is_another_edition(kits):
    assert skeleton_hash(EXERCISES) != skeleton_hash(EXERCISES, formulas=False)
    config = json.loads((kits[False] / "student" / "coursework.json").read_text())
    assert config["skeleton"] == skeleton_hash(EXERCISES, formulas=False)
    assert (
        config["skeleton"]
        == read_tests(kits[False] / "student/checker/visible.bin").edition["skeleton"]
    )


# Helpers


def test_helpers_that_are_no_exercise_are_given():
    for exercise in EXERCISES:
        whole = {f.name: f for f in functions_in(solution(exercise))}
        names = {name.rpartition(".")[2] for name in exercise.functions}
        for function in functions_in(skeleton(exercise)):
            if function.name not in names:
                assert code(function) == code(whole[function.name])


# The checker


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """run(folder, *words): Python and NumPy, without miniconvit, SciPy or anything else."""
    site = tmp_path_factory.mktemp("site")
    for name in ("numpy", "numpy.libs"):
        path = Path(np.__file__).parents[1] / name
        if path.exists():
            (site / name).symlink_to(path)

    def run(folder, *words):
        command = [sys.executable, "-S", *words]
        env = environment(PYTHONPATH=str(site))
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env)

    return run


def test_the_homework_runs_with_numpy_alone(kits, tmp_path, bare):
    for name in ("miniconvit", "scipy", "click"):
        assert "No module named" in bare(tmp_path, "-c", f"import {name}").stderr
    texts = {exercise.name: solution(exercise) for exercise in EXERCISES}
    right = bare(homework(kits[True], tmp_path / "right", **texts), "-m", "checker")
    assert (right.returncode, right.stderr) == (0, "")
    assert right.stdout.splitlines()[-1].split() == ["total", "100", "/", "100"]
    blank = bare(homework(kits[False], tmp_path / "blank"), "-m", "checker")
    assert blank.returncode == 1
    assert blank.stdout.count("not written yet\n") == 12
    assert blank.stdout.splitlines()[-1].split() == ["total", "0", "/", "100"]


def test_what_builds_on_wrong_work_says_so(kits, tmp_path, bare):
    texts = {exercise.name: solution(exercise) for exercise in EXERCISES}
    wrong = "dbias = drows.mean(axis=0)"
    assert texts["linear"].count("dbias = drows.sum(axis=0)") == 1
    texts["linear"] = texts["linear"].replace("dbias = drows.sum(axis=0)", wrong)
    texts["gelu"] = f"import time\n{texts['gelu']}"
    outcome = bare(homework(kits[True], tmp_path / "mine", **texts), "-m", "checker", "gelu", "mlp")
    assert outcome.returncode == 1
    assert outcome.stdout.count("not right yet") == 1
    assert "    it builds on work that is not right yet: linear\n" in outcome.stdout
    assert "1 / 12 of the right value; 12 is images times" in outcome.stdout
    assert "    time in line 1 is imported but not used, and left out\n" in outcome.stdout
    assert outcome.stdout.splitlines()[-1].split()[-1] == "11"
    assert max(map(len, outcome.stdout.splitlines())) <= 80


def test_what_a_smaller_coursework_builds_on_can_be_given(tmp_path, bare):
    made = invoke("create", tmp_path / "kit", "--secret", tmp_path / "secret", "--exercise", "mlp")
    assert "These build on linear, gelu." in made.output
    folder = homework(tmp_path / "kit", tmp_path / "mine", mlp=solution(exercises(["mlp"])[0]))
    alone = bare(folder, "-m", "checker")
    assert alone.returncode == 1
    sentence = "ImportError: gelu.py is missing in this folder: put your own there, or a given one"
    assert sentence in " ".join(alone.stdout.split())
    assert "build on linear.py, gelu.py." in (folder / "README.md").read_text()
    assert {path.name for path in (tmp_path / "kit/instructor/given").iterdir()} == {
        "linear.py",
        "gelu.py",
    }
    shutil.copytree(tmp_path / "kit" / "instructor" / "given", folder, dirs_exist_ok=True)
    assert bare(folder, "-m", "checker").returncode == 0


def test_the_checker_checks_gradients_of_ones_own(kits, tmp_path, bare):
    program = (
        "import numpy as np\n"
        "from checker import check_gradients\n"
        "x = np.random.default_rng(0).standard_normal((3, 2))\n"
        "forward = lambda x: (x**3, x)\n"
        "print(check_gradients(forward, lambda dy, x: (3 * x**2 * dy,), {'x': x}).ok)\n"
        "print(check_gradients(forward, lambda dy, x: (2 * x**2 * dy,), {'x': x}).ok)\n"
    )
    outcome = bare(homework(kits[True], tmp_path / "mine"), "-c", program)
    assert (outcome.stdout, outcome.stderr) == ("True\nFalse\n", "")


def test_the_checker_answers_mistakes_by_a_sentence(kits, tmp_path, bare):
    folder = homework(kits[True], tmp_path / "mine")
    command = [sys.executable, "-S", "-m", "checker"]
    poor = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment())
    assert poor.stderr.startswith("Error: the checker needs NumPy 2 or newer: python -m pip ")
    outcome = bare(folder, "-m", "checker", "sofmax")
    assert outcome.returncode == 2
    assert outcome.stderr.startswith("Error: unknown exercise 'sofmax' (did you mean softmax?)")
    data = (folder / "checker" / "visible.bin").read_bytes()
    for damaged in (data[:-3], b"", data[:8] + b"{" + data[9:]):
        (folder / "checker" / "visible.bin").write_bytes(damaged)
        outcome = bare(folder, "-m", "checker")
        assert (outcome.returncode, outcome.stdout) == (2, "")
        assert outcome.stderr.count("\n") == 1
        assert "cannot be read: unpack the coursework again" in outcome.stderr


def test_visible_numbers_are_those_of_the_library_to_the_bit(kits):
    tests = read_tests(kits[True] / "student" / "checker" / "visible.bin")
    assert [e.name for e in tests.exercises] == [e.name for e in EXERCISES]
    for exercise, ours in zip(tests.exercises, EXERCISES, strict=True):
        assert exercise.functions == ours.functions
        assert exercise.units == ours.units
        for unit in ours.units:
            assert same(tests.cases[unit.name], list(cases(unit, "visible", VISIBLE)))
    assert tests.needs["softmax"] == ()
    assert tests.needs["mlp"] == ("linear", "gelu")


def same(a, b):
    if isinstance(b, np.ndarray | np.generic):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in b)
    if hasattr(b, "__dataclass_fields__"):
        return same(vars(a), vars(b))
    return a == b


@pytest.mark.full
def test_the_homework_runs_in_a_fresh_environment(kits, tmp_path):
    """What the students' page says: Python and `pip install numpy`, nothing else."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", "numpy"], check=True, env=environment())
    texts = {exercise.name: solution(exercise) for exercise in EXERCISES}
    folder = homework(kits[False], tmp_path / "mine", **texts)
    outcome = subprocess.run(
        [python, "-m", "checker"], cwd=folder, capture_output=True, text=True, env=environment()
    )
    assert (outcome.returncode, outcome.stderr) == (0, "")


# What is handed in


def test_unfinished_work_is_packed_when_asked(kits, tmp_path, bare):
    texts = {exercise.name: solution(exercise) for exercise in EXERCISES}
    texts["mlp"] = "def mlp_forward(:\n"
    del texts["softmax"], texts["gelu"]
    folder = homework(kits[True], tmp_path / "mine", **texts)
    (folder / "adamw.py").unlink()
    refused = bare(folder, "-m", "checker", "pack")
    assert refused.returncode == 2
    assert "nothing was packed: softmax.py still lacks softmax_forward, softmax" in refused.stderr
    assert "(pack --partial hands in what there is)" in refused.stderr
    assert not (folder / "submission.zip").exists()
    done = bare(folder, "-m", "checker", "pack", "--partial")
    assert done.returncode == 0
    said = [line.strip() for line in done.stdout.splitlines()[1:]]
    assert said == [
        "softmax.py still lacks softmax_forward, softmax_backward",
        "gelu.py still lacks gelu_forward, gelu_backward",
        "mlp.py is no valid Python: invalid syntax in line 1",
        "adamw.py is missing",
    ]
    with zipfile.ZipFile(folder / "submission.zip") as archive:
        assert json.loads(archive.read("manifest.json"))["incomplete"] == said
        assert set(archive.namelist()) == {
            "manifest.json",
            *(e.file for e in EXERCISES if e.name != "adamw"),
        }
    # The command of the library packs the same.
    invoke("pack", folder, "--partial", "--out", tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes()[:4] == b"PK\3\4"
    with zipfile.ZipFile(tmp_path / "again.zip") as archive:
        assert json.loads(archive.read("manifest.json"))["incomplete"] == said


def test_nothing_at_all_is_not_packed(kits, tmp_path, bare):
    outcome = bare(homework(kits[True], tmp_path / "mine"), "-m", "checker", "pack", "--partial")
    assert outcome.stderr == "Error: nothing was packed, for nothing is written yet\n"


# What students see of hidden tests

LEAK = """
def gelu_forward(x):
    print("printed", x.shape)
    raise ValueError(f"raised {x.shape}")
"""


@pytest.mark.parametrize("visibility", ["hidden", "after_due_date", "visible"])
def test_hidden_tests_are_hidden_from_students_by_default(tmp_path, visibility):
    create(tmp_path / "kit", tmp_path / "secret", ["linear", "gelu", "softmax"])
    config = tmp_path / "kit" / "instructor" / "hidden.json"
    assert json.loads(config.read_text())["visibility"] == "hidden"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"visibility": visibility}))
    right = solution(exercises(["linear"])[0])
    wrong = right.replace("dbias = drows.sum(axis=0)", "dbias = drows.mean(axis=0)")
    submission(tmp_path / "all" / "anna", {"linear.py": wrong, "gelu.py": LEAK})
    grade(tmp_path / "all", tmp_path / "kit" / "instructor", tmp_path / "out")
    results = json.loads((tmp_path / "out" / "anna" / "results.json").read_text())
    at_once = [test for test in results["tests"] if test["visibility"] == "visible"]
    later = [test for test in results["tests"] if test not in at_once]
    read, details = (
        (tmp_path / "out" / "anna" / name).read_text() for name in ("feedback.txt", "details.txt")
    )
    for text in (" ".join(test["output"] for test in at_once), read):
        found = ["head" in text, "raised" in text, "printed" in text]
        assert found == [visibility == "visible"] * 3
    scores = {test["name"]: test["score"] for test in at_once}
    assert scores == {"linear": 4.8, "softmax": 0, "gelu": 0}
    assert results["score"] == 4.8
    assert {test["visibility"] for test in later} <= {visibility}
    assert bool(later) == (visibility == "after_due_date")  # a hidden test would hide the total
    assert "raised (3, 15, 14)" in details
    assert "45 is images times tokens" in " ".join(details.split())
    if visibility != "visible":
        outputs = {test["name"]: test["output"] for test in at_once}
        assert outputs["linear"] == "linear: wrong in dbias"
        assert outputs["softmax"] == "softmax.py is missing"
        assert outputs["gelu"] == "gelu: wrong in y, dx, arguments"


def test_a_wrong_visibility_is_refused(tmp_path):
    create(tmp_path / "kit", tmp_path / "secret", ["gelu"])
    config = tmp_path / "kit" / "instructor" / "hidden.json"
    config.write_text(config.read_text().replace('"hidden"', '"hiden"'))
    with pytest.raises(UserError, match=r"visibility is one of visible, .* not .hiden."):
        grade(tmp_path, tmp_path / "kit" / "instructor", tmp_path / "out")


def test_limits_on_gradescope_fit_its_usual_ones():
    """10 minutes and 768 MB (its page on troubleshooting, January 2025), whatever is handed in."""
    units = sum(len(exercise.units) for exercise in EXERCISES)
    reading = (MOST_DEATHS + 1) * SOURCE_LIMITS.seconds
    assert units * SMALL.seconds + reading < 0.8 * 600
    assert SMALL.memory < 0.8 * 768e6


def test_what_shows_no_input_is_said_of_hidden_tests():
    """A change in place and an endless loop, beside what is wrong."""
    (gelu,) = exercises(["gelu"])
    text = solution(gelu)
    changed = text.replace("    cdf =", "    x += 0.0\n    x *= 2.0\n    cdf =")
    loop = text.replace("    x, cdf = cache", "    while True: pass")
    assert changed != text != loop
    assignment = Assignment((gelu,), "secret", HIDDEN[:1], limits=Limits(seconds=3.0))
    found = [grade_exercise(wrong, gelu, assignment).brief for wrong in (changed, loop)]
    assert found == [
        "gelu: gelu_forward changes its argument x in place\ngelu: wrong in y, dx",
        "gelu: stopped after 3 seconds: is there an endless loop?",
    ]


def test_printing_and_a_missing_function_are_said_of_hidden_tests():
    """But nothing that the student's process adds to these sentences."""
    (gelu,) = exercises(["gelu"])
    text = solution(gelu)
    body = "    x, cdf = cache"
    printing = text.replace(body, f"    for _ in range(40000): print('debug', dy.shape)\n{body}")
    renamed = text.replace("gelu_backward", "geluBackward")
    forged = text.replace(body, f"    raise OSError(27, str(dy[0]))\n{body}")
    other = text.replace(body, f"    raise ValueError(str(dy[0]))\n{body}")
    assert len({text, printing, renamed, forged, other}) == 5
    assignment = Assignment((gelu,), "secret", HIDDEN[:1])
    wrongs = (printing, renamed, forged, other)
    found = [grade_exercise(wrong, gelu, assignment).brief for wrong in wrongs]
    prints = "gelu: it prints too much, and was stopped there: take the printing out"
    assert found == [
        prints,
        "gelu: there is no gelu_backward",
        prints,
        "gelu: wrong in dx, arguments",
    ]


def test_without_formulas_no_goal_is_given(tmp_path):
    create(tmp_path / "kit", tmp_path / "secret", formulas=False)
    readme = (tmp_path / "kit" / "student" / "README.md").read_text()
    notes = (tmp_path / "kit" / "instructor" / "notes.md").read_text()
    for exercise in EXERCISES:
        assert f"| {exercise.name} | {exercise.points} | {exercise.minutes} |\n" in readme
        assert exercise.goal not in readme and exercise.goal in notes
