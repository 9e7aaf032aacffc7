"""The coursework kit: solution 100 %, blanks 0 %, a planted bug costs its own exercise alone."""

import ast
import csv
import inspect
import json
import os
import shutil
import subprocess
import sys
import types
import zipfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner

import miniconvit
from miniconvit import UserError, layers
from miniconvit.cli.coursework import command
from miniconvit.coursework import EXERCISES, create, exercises, grade, load_assignment
from miniconvit.coursework.cases import HIDDEN, VISIBLE, cases
from miniconvit.coursework.exercises import allowed_functions
from miniconvit.coursework.grading import Assignment, Result
from miniconvit.coursework.judge import complain, judge
from miniconvit.coursework.runner import Watched
from miniconvit.coursework.skeleton import (
    kit_source,
    skeleton,
    skeleton_hash,
    solution,
    source_module,
)
from miniconvit.coursework.source import describe_source
from miniconvit.coursework.student import looped
from miniconvit.coursework.submission import pack, read_submission
from miniconvit.coursework.task import Size, Unit
from miniconvit.gradcheck.mutants import MUTANTS, Mutant

SECRET = "a secret of the test suite"
ADAMW_MUTANTS = [
    Mutant(f"adamw-{name}", "AdamW.step", before, after, "")
    for name, before, after in (
        ("steps-not-counted", "self.step_count += 1", "self.step_count = 1"),
        ("first-correction-forgotten", "(lr / correction1)", "lr"),
        ("second-correction-forgotten", "denominator *= 1.0 / sqrt(correction2)", "pass"),
        ("decay-in-the-moments", "g, m, v = grads[name]", "g, m, v = grads[name] + 0.3 * p"),
        ("vectors-decayed", "p.ndim >= 2 and ", ""),
        ("positions-decayed", " and name not in NEVER_DECAYED", ""),
        ("eps-under-the-root", "sqrt(v)", "sqrt(v + self.eps)"),
        ("gradient-not-squared", "* g * g", "* g"),
        ("rate-of-the-call-ignored", "self.lr if lr is None else lr", "self.lr"),
        ("gradient-overwritten", "v *= beta2", "v *= beta2\n            g *= 1.0 - beta2"),
    )
]
OURS = [m for m in MUTANTS if any(m.function in e.functions for e in EXERCISES)] + ADAMW_MUTANTS


def mutated(mutant):
    """The exercise that a mutant belongs to, and its solution with the bug in it."""
    (exercise,) = (e for e in EXERCISES if mutant.function in e.functions)
    right = solution(exercise)
    if mutant in ADAMW_MUTANTS:
        part = right
    else:
        name = mutant.helper or mutant.function
        part = inspect.getsource(getattr(source_module(exercise), name))
    assert right.count(part) == 1
    assert part.count(mutant.before) == 1
    return exercise, right.replace(part, part.replace(mutant.before, mutant.after))


@cache
def compiled(text, name):
    return compile(text, name, "exec")


@pytest.fixture
def in_process(monkeypatch):
    """A function (exercise, text, sizes) -> Result that judges in this process: for speed, with
    the same inputs, comparisons and watched arguments as in a process of its own."""
    kit = types.ModuleType("kit")
    exec(kit_source(), vars(kit))
    kit.__getattr__ = lambda name: getattr(layers, name)
    monkeypatch.setitem(sys.modules, "kit", kit)

    def run(exercise, text, sizes=HIDDEN):
        rows = []
        for unit in exercise.units:
            namespace = {"__name__": exercise.name}
            exec(compiled(text, exercise.file), namespace)
            namespace |= {name: getattr(layers, name) for name in allowed_functions(unit.name)}
            with np.errstate(all="ignore"):
                rows += judge(looped(Watched(namespace)), unit, cases(unit, SECRET, sizes))
        return Result(exercise, tuple(rows))

    return run


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    """A whole coursework, as `create` writes it."""
    folder = tmp_path_factory.mktemp("coursework")
    create(folder / "kit", folder / "secret")
    return folder / "kit"


def submission(folder, texts):
    folder.mkdir(parents=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def homework(kit, folder, **texts):
    """A student's folder in which these exercises have these texts."""
    shutil.copytree(kit / "student", folder)
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    return folder


def solutions(**changed):
    return {e.file: changed.get(e.name, solution(e)) for e in EXERCISES}


# The proof of the kit


def test_solution_blanks_and_a_bug_as_submissions(kit, tmp_path):
    """Through files, processes, results.json and CSV, on the hidden tests."""
    bug = next(m for m in MUTANTS if m.name == "mlp-fc2-bias-averaged")
    submission(tmp_path / "all" / "solution", solutions())
    submission(tmp_path / "all" / "blank", {e.file: skeleton(e) for e in EXERCISES})
    submission(tmp_path / "all" / "bug", solutions(mlp=mutated(bug)[1]))
    graded = grade(tmp_path / "all", kit / "instructor", tmp_path / "out", jobs=2)
    assert {name: one.score for name, one in graded.items() if name != "bug"} == {
        "solution": 100,
        "blank": 0,
    }
    lost = [r for r in graded["bug"].results if not r.is_full]
    assert [result.exercise.name for result in lost] == ["mlp"]
    assert lost[0].score == round(6 * 6 / 7, 2)
    assert 'grads["fc2.bias"]' in lost[0].text
    assert "exactly 1 / 3 of the right value; 3 is the batch size" in lost[0].text
    with (tmp_path / "out" / "grades.csv").open() as file:
        table = {row["student"]: row for row in csv.DictReader(file)}
    assert [float(table[name]["score"]) for name in ("solution", "blank")] == [100, 0]
    assert float(table["bug"]["mlp"]) == lost[0].score
    results = json.loads((tmp_path / "out" / "bug" / "results.json").read_text())
    assert results["score"] == graded["bug"].score
    assert sum(test.get("score", 0) for test in results["tests"]) == pytest.approx(results["score"])
    assert [t.get("status") for t in results["tests"]].count("failed") == 1


@pytest.mark.parametrize("sizes", [VISIBLE, HIDDEN], ids=["visible", "hidden"])
def test_solution_is_full_and_blanks_are_empty(in_process, sizes):
    for exercise in EXERCISES:
        assert in_process(exercise, solution(exercise), sizes).is_full
        blank = in_process(exercise, skeleton(exercise), sizes)
        assert blank.score == 0
        assert not any(row.ok for row in blank.rows)


@pytest.mark.parametrize("sizes", [VISIBLE, HIDDEN], ids=["visible", "hidden"])
def test_every_mutant_loses_points_in_its_exercise(in_process, sizes):
    """And in its own pair alone, but where a helper is shared by two."""
    unexpected = []
    for mutant in OURS:
        rows = in_process(*mutated(mutant), sizes).rows
        guilty = {row.unit for row in rows if not row.ok}
        unit = mutant.function.removesuffix("_backward").replace("AdamW.step", "adamw_steps")
        if unit not in guilty or (guilty != {unit} and not mutant.helper):
            unexpected.append((mutant.name, guilty))
    assert not unexpected
    assert len(OURS) >= 150


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.name)
def test_no_mutant_loses_points_elsewhere(in_process, exercise):
    """Whole submissions with one bug: every file is judged with right functions around it."""
    for mutant in OURS:
        guilty, text = mutated(mutant)
        if guilty == exercise:
            texts = solutions(**{guilty.name: text})
            results = [in_process(e, texts[e.file], HIDDEN[:1]) for e in EXERCISES]
            lost = [result.exercise.name for result in results if not result.is_full]
            assert lost == [guilty.name], mutant.name


@pytest.mark.full
def test_every_mutant_as_a_submission(kit, tmp_path):
    """The whole catalogue through processes and files, all twelve exercises of each."""
    for mutant in OURS:
        exercise, text = mutated(mutant)
        submission(tmp_path / "all" / mutant.name, solutions(**{exercise.name: text}))
    graded = grade(tmp_path / "all", kit / "instructor", tmp_path / "out")
    for mutant in OURS:
        lost = [r.exercise.name for r in graded[mutant.name].results if not r.is_full]
        assert lost == [mutated(mutant)[0].name], mutant.name


# What students are given


def test_blanks_keep_signatures_and_docstrings_and_give_nothing_away(kit):
    student = "".join(p.read_text() for p in (kit / "student").rglob("*.*") if p.suffix != ".bin")
    hidden = 0
    for exercise in EXERCISES:
        blank, whole = (definitions(text) for text in (skeleton(exercise), solution(exercise)))
        assert blank.keys() == whole.keys()
        for name in exercise.functions:
            assert ast.unparse(blank[name].args) == ast.unparse(whole[name].args)
            assert ast.get_docstring(blank[name]) == ast.get_docstring(whole[name]) is not None
            body = [ast.unparse(statement) for statement in whole[name].body[1:]]
            secrets = [line for line in body if len(line) > 30]
            assert not [line for line in secrets if line in student]
            hidden += len(secrets)
    assert hidden > 60


def definitions(text):
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{m.name}": m for m in node.body[1:]}
    return found


def test_a_function_that_the_library_lacks_stops_the_build():
    with pytest.raises(UserError, match="no function sine_backward, sine_forward"):
        skeleton(
            replace(exercises(["gelu"])[0], units=(Unit("gelu", ("dx",)), Unit("sine", ("dx",))))
        )


def test_the_secret_stays_with_the_instructor(kit):
    secret = (kit.parent / "secret").read_text().strip()
    assert len(secret) == 64
    holders = {p for p in kit.rglob("*") if p.is_file() and secret.encode() in p.read_bytes()}
    assert holders == {
        kit / "instructor" / "hidden.json",
        kit / "instructor" / "autograder" / "hidden.json",
    }
    assert not any(p.stat().st_mode & 0o077 for p in holders)


def test_hidden_inputs_follow_from_the_secret_alone():
    unit = EXERCISES[0].units[0]
    first, other = (cases(unit, secret, HIDDEN)[0].first.args[0] for secret in ("a" * 20, "b" * 20))
    cases.cache_clear()
    again = cases(unit, "a" * 20, HIDDEN)[0].first.args[0]
    assert np.array_equal(first, again)
    assert not np.any(first == other)
    assert {size.B for size in HIDDEN} == {1, 3}
    assert {size.H for size in HIDDEN} >= {1, 3}
    assert all(size.grid[0] != size.grid[1] for size in HIDDEN)


def test_exercises_do_not_reach_their_own_answer():
    for exercise in EXERCISES:
        for unit in exercise.units:
            assert unit.forward not in allowed_functions(unit.name)
    assert not allowed_functions("softmax")
    assert "gpsa_dense_forward" not in allowed_functions("gpsa")
    assert "linear_backward" in allowed_functions("patch_embed")


def test_student_files_work_together_without_the_kit(tmp_path):
    """Outside of `check`, kit reaches the student's own files."""
    submission(tmp_path / "mine", solutions() | {"kit.py": kit_source()})
    program = (
        "import numpy as np, block, sys\n"
        "rng = np.random.default_rng(0)\n"
        "D = 6\n"
        "shapes = {'norm1.weight': (D,), 'norm1.bias': (D,), 'norm2.weight': (D,),\n"
        "          'norm2.bias': (D,), 'attn.qkv.weight': (3 * D, D), 'attn.proj.weight': (D, D),\n"
        "          'attn.proj.bias': (D,), 'mlp.fc1.weight': (7, D), 'mlp.fc1.bias': (7,),\n"
        "          'mlp.fc2.weight': (D, 7), 'mlp.fc2.bias': (D,)}\n"
        "params = {name: rng.normal(size=shape) for name, shape in shapes.items()}\n"
        "keep = np.array([1, 0])\n"
        "x = rng.normal(size=(2, 5, D))\n"
        "y, cache = block.block_forward(x, params, 2, None, (keep, keep))\n"
        "dx, grads = block.block_backward(y, cache)\n"
        "assert grads.keys() == params.keys() and 'miniconvit' not in sys.modules\n"
    )
    run = [sys.executable, "-c", program]
    subprocess.run(run, cwd=tmp_path / "mine", check=True, env=environment())


def environment(**more):
    names = ("PATH", "HOME", "LD_LIBRARY_PATH")
    return {n: os.environ[n] for n in names if n in os.environ} | more


# Messages


SIZE = Size(3, (2, 5), 2, 7, 11, 4, 2, (2, 3))
RIGHT = np.random.default_rng(3).standard_normal((3, 6, 6))


@pytest.mark.parametrize(
    ("got", "sentence"),
    [
        (2.0 * RIGHT, "exactly 2 times the right value"),
        (RIGHT / 3, "exactly 1 / 3 of the right value; 3 is the batch size: a mean where a sum"),
        (RIGHT * 10, "exactly 10 times the right value; 10 is the number of tokens"),
        (RIGHT * 7**0.5, "exactly 2.64575 times the right value; 2.64575 is the root of the head"),
        (-RIGHT, "opposite sign"),
        (RIGHT.swapaxes(1, 2), "equal up to transposition"),
        (np.stack([RIGHT[0]] * 3), "right for the first image only"),
        (RIGHT[::-1, :, ::-1], "the right numbers in the wrong places"),
        (RIGHT - RIGHT.mean(), "right up to a constant"),
        (RIGHT * 0, "zero everywhere"),
        (RIGHT + np.eye(6), "entries wrong, the first at [0, 0, 0]"),
        (RIGHT + 1e-4 * RIGHT**2, "nearly right"),
        (RIGHT * np.nan, "not finite in 108 of 108"),
        (RIGHT.reshape(3, 36), "a reshape is missing"),
        (RIGHT[:2], "shape (2, 6, 6) instead of (3, 6, 6)"),
        (RIGHT.T.copy().reshape(6, 6, 3), "shape (6, 6, 3) instead of (3, 6, 6): equal up to tr"),
        (np.stack([RIGHT / 2] * 2), "not summed over the first axis"),
        ("rubbish", "is of type str"),
        (None, "is of type NoneType"),
    ],
)
def test_hints(got, sentence):
    assert sentence in complain(got, RIGHT, SIZE)


def test_hints_on_other_gradients_and_images():
    other = RIGHT * RIGHT
    assert "right dk: are the two exchanged" in complain(other, RIGHT, SIZE, others={"dk": other})
    assert "first image alone" in complain(other, RIGHT, SIZE, of_first_image=other)
    assert "should be exactly zero" in complain(RIGHT, RIGHT * 0, SIZE)


def test_hints_stay_silent_on_what_is_nearly_right():
    nearly = RIGHT * (1 + 5e-8)
    assert "nearly right, " in complain(nearly, RIGHT, SIZE)
    assert "1 times" not in complain(nearly, RIGHT, SIZE)


@pytest.mark.parametrize("change, word", [(1.01e-7, "large"), (-4e-7, "small"), (4e-6, "large")])
def test_a_factor_of_nearly_one_is_not_called_exactly_one(change, word):
    text = complain(RIGHT * (1 + change), RIGHT, SIZE)
    assert text.endswith(f"; nearly right, all of it too {word} by the same factor")
    assert "exactly" not in text


def test_a_slight_change_in_place_is_named_where_it_shows(in_process):
    (linear,) = exercises(["linear"])
    first = "    rows = x.reshape"
    text = solution(linear).replace(first, f"    x *= 1.0000001\n{first}", 1)
    found = in_process(linear, text)
    assert "1 times" not in found.text
    complaints = {row.tensor: row.complaint for row in found.rows if not row.ok}
    changed = "linear_forward changes its argument x in place"
    assert complaints.keys() == {"y", "dweight", "arguments"}
    assert complaints["arguments"] == changed
    for tensor in ("y", "dweight"):
        assert "nearly right" in complaints[tensor]
        assert complaints[tensor].endswith(f"; {changed}")


def test_what_is_right():
    assert complain(RIGHT * (1 + 1e-9), RIGHT, SIZE) == ""
    assert "error 1.0e-06" in complain(RIGHT * (1 + 1e-6), RIGHT, SIZE)
    single = replace(SIZE, dtype="float32")
    assert complain(RIGHT.astype(np.float32), RIGHT, single) == ""
    assert "is float64, but the inputs are float32" in complain(RIGHT, RIGHT, single)


def test_free_tensors_earn_nothing_alone(in_process):
    """Zeros are the right gradient of a bias that softmax ignores; that alone is no work."""
    (exercise,) = exercises(["position_attention"])
    zeros = (
        "import numpy as np\n"
        "def position_attention_dense_forward(weight, bias, grid):\n"
        "    N = grid[0] * grid[1]\n"
        "    return np.zeros((len(weight), N, N), weight.dtype), weight\n"
        "def position_attention_dense_backward(dP, weight):\n"
        "    return np.zeros_like(weight), np.zeros_like(weight[:, 0])\n"
    )
    result = in_process(exercise, zeros)
    assert {row.tensor for row in result.rows if row.ok} == {"dbias", "arguments"}
    assert result.score == 0


# The command line


def invoke(*args):
    return CliRunner().invoke(command, [str(a) for a in args])


def test_check_tells_right_from_wrong(kit, tmp_path):
    only = ["--exercise", "gelu", "--exercise", "linear"]
    right = invoke("check", kit / "instructor" / "solution", *only)
    assert right.exit_code == 0
    assert right.output.splitlines()[-1].split() == ["total", "11", "/", "11"]
    wrong = invoke("check", kit / "student", *only)
    assert wrong.exit_code == 1
    assert "gelu                      0 /   5   not written yet" in wrong.output


def test_visible_tests_run_in_pytest(kit, tmp_path):
    folder = homework(kit, tmp_path / "mine", gelu=solution(exercises(["gelu"])[0]))
    run = [sys.executable, "-m", "pytest", "-q", "-k", "gelu or softmax"]
    outcome = subprocess.run(run, cwd=folder, capture_output=True, text=True, env=environment())
    assert "1 failed, 1 passed, 10 deselected" in outcome.stdout
    assert "AssertionError: not written yet" in outcome.stdout


def test_pack_refuses_incomplete_work(kit, tmp_path):
    assignment = Assignment(exercises(["gelu", "softmax", "adamw"]), SECRET, VISIBLE, "edition")
    texts = solutions() | {"softmax.py": skeleton(exercises(["softmax"])[0])}
    del texts["adamw.py"]
    folder = submission(tmp_path / "mine", texts)
    with pytest.raises(UserError, match=r"softmax.py still lacks softmax_f.*; adamw.py is missing"):
        pack(folder, assignment)
    assert not (folder / "submission.zip").exists()
    (folder / "softmax.py").write_text(texts["softmax.py"].replace("raise Not", "raise Not("))
    with pytest.raises(UserError, match=r"softmax.py is no valid Python"):
        pack(folder, assignment)


def test_pack_takes_the_white_list_and_is_graded(kit, tmp_path):
    chosen = exercises(["gelu", "softmax"])
    assignment = Assignment(chosen, SECRET, VISIBLE, skeleton_hash(chosen))
    folder = submission(tmp_path / "mine", solutions() | {"diary.txt": "private"})
    packed, _ = pack(folder, assignment)
    with zipfile.ZipFile(packed) as archive:
        assert set(archive.namelist()) == {"gelu.py", "softmax.py", "manifest.json"}
    texts, problems, remark = read_submission(packed, chosen, assignment.skeleton)
    assert (texts.keys(), problems, remark) == ({"gelu", "softmax"}, {}, "")
    assert "another edition" in read_submission(packed, chosen, "older")[2]


def test_create_refuses(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("...")
    (tmp_path / "short").write_text("1234")
    with pytest.raises(UserError, match="is there already"):
        create(tmp_path / "full", tmp_path / "secret")
    with pytest.raises(UserError, match="4 characters, but needs 16"):
        create(tmp_path / "new", tmp_path / "short")
    (tmp_path / "short").write_bytes(b"\xff" * 40)
    with pytest.raises(UserError, match="is no UTF-8 text"):
        create(tmp_path / "new", tmp_path / "short")
    with pytest.raises(UserError, match="unknown exercise 'conv'"):
        create(tmp_path / "new", tmp_path / "secret", ["conv"])
    with pytest.raises(UserError, match="in the students' folder"):
        create(tmp_path / "new", tmp_path / "new" / "student" / "secret")
    assert {p.name for p in tmp_path.iterdir()} == {"full", "short"}


def test_grade_refuses(kit, tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="holds no submissions"):
        grade(tmp_path / "none", kit / "instructor", tmp_path / "out")
    with pytest.raises(UserError, match="is a student's folder"):
        grade(tmp_path / "none", kit / "student", tmp_path / "out")
    with pytest.raises(UserError, match="holds neither coursework"):
        grade(tmp_path / "none", tmp_path, tmp_path / "out")


@pytest.mark.parametrize("name", ["coursework.json", "hidden.json"])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("[]", "no JSON object"),
        ("", "cannot be read"),
        ('{"exercises": 3}', "is damaged"),
        ('{"exercises": ["conv"]}', "unknown exercise 'conv'"),
        ('{"exercises": ["gelu"]}', "is damaged"),
    ],
)
def test_a_damaged_coursework_is_made_again(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=rf"{name}.*{words}.*: create the coursework again$"):
        load_assignment(tmp_path)


@pytest.mark.parametrize(
    "manifest", ["[" * 100_000, "[]", "{}", '{"skeleton": ' + "1" * 5000 + "}"]
)
def test_a_damaged_manifest_costs_nothing(tmp_path, manifest):
    chosen = exercises(["gelu"])
    folder = submission(tmp_path / "mine", {"gelu.py": solution(chosen[0])})
    (folder / "manifest.json").write_text(manifest)
    texts, problems, remark = read_submission(folder, chosen, "edition")
    assert (texts.keys(), problems, remark) == (
        {"gelu"},
        {},
        "this submission was packed from another edition of the coursework",
    )


def test_submissions_as_they_arrive(kit, tmp_path):
    """What learning platforms and other systems make of them: none is lost, none ends the rest."""
    chosen = exercises(["gelu"])
    create(tmp_path / "kit", kit.parent / "secret", ["gelu"])
    inbox = tmp_path / "inbox"
    packed, _ = pack(tmp_path / "kit" / "instructor" / "solution", assignment_of(chosen))
    for name in ("Upper.ZIP", "=1+2, cmd.zip", os.fsdecode(b"M\xfcller.zip"), "moodle/essay.zip"):
        (inbox / name).parent.mkdir(parents=True, exist_ok=True)
        (inbox / name).write_bytes(packed.read_bytes())
    with zipfile.ZipFile(inbox / "windows.zip", "w") as archive:
        archive.writestr("kit\\gelu.py", solution(chosen[0]))
    (inbox / "empty").mkdir()
    (inbox / "link").symlink_to(tmp_path / "kit" / "instructor" / "solution")
    graded = grade(inbox, tmp_path / "kit" / "instructor", tmp_path / "out", jobs=2)
    assert {name for name, one in graded.items() if not one.score} == {"empty", "link"}
    assert len(graded) == 7
    assert "holds none of the files, such as gelu.py" in graded["empty"].remark
    by_hand = "could not be graded, please look at it by hand"
    assert graded["link"].remark == f"{by_hand}: it is a link, which may lead anywhere"
    with (tmp_path / "out" / "grades.csv").open(encoding="utf-8") as file:
        names = {row["student"] for row in csv.DictReader(file)}
    assert names >= {"'=1+2, cmd", "M?ller", "Upper", "moodle"}


def assignment_of(chosen):
    return Assignment(chosen, SECRET, VISIBLE, skeleton_hash(chosen))


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("linear", "drows.sum(axis=0)", "dy.sum(axis=(0, 1))"),
        ("layernorm", "True) + eps)", "True) + 1e-6)"),
        ("layernorm", "True) + eps)", "True))"),
        ("patch_embed", "as_pair(patch_size)", "patch_size"),
        ("cross_entropy", "t = targets.", "t = (1.0 - label_smoothing) * targets."),
        ("adamw", '("pos_embed", "cls_token")', '("pos_embed",)'),
        ("gelu", "return x * cdf,", 'return (x * cdf).astype("f4").astype(x.dtype),'),
    ],
)
@pytest.mark.parametrize("sizes", [VISIBLE, HIDDEN], ids=["visible", "hidden"])
def test_half_of_the_docstring_is_not_enough(in_process, sizes, name, before, after):
    """Bugs that show only with other arguments than most calls have, or in the last digits."""
    (exercise,) = exercises([name])
    right = solution(exercise)
    assert right.count(before) == 1
    assert not in_process(exercise, right.replace(before, after), sizes).is_full


def test_notes_and_readme_name_every_exercise(kit):
    notes = (kit / "instructor" / "notes.md").read_text()
    readme = (kit / "student" / "README.md").read_text()
    for exercise in EXERCISES:
        assert f"## {exercise.name}: {exercise.points} points, {exercise.minutes} min" in notes
        assert exercise.goal in notes
        assert exercise.goal in readme
        assert all(mistake in notes for mistake in exercise.mistakes)
    assert all(m.story in notes for m in OURS)
    assert not any(m.story in readme for m in OURS if m.story)


# The autograder

GRADESCOPE = Path(__file__).with_name("gradescope.json")


@pytest.mark.parametrize(
    "wrong",
    [
        {"score": "44"},
        {"tests": [{"visibility": "never"}]},
        {"tests": [{"status": "partly"}]},
        {"tests": [{"points": 2}]},
        {"stdout_visibility": "visible", "output_format": "rich"},
    ],
)
def test_the_schema_of_gradescope_refuses(wrong):
    schema = json.loads(GRADESCOPE.read_text())
    jsonschema.validate({"score": 44.0}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"score": 44.0} | wrong, schema)


@pytest.mark.skipif(os.name != "posix", reason="Gradescope runs Linux")
def test_autograder_runs_from_its_own_wheel(kit, tmp_path):
    """Gradescope's layout, but for the virtual environment: a script that knows only the wheel."""
    source = tmp_path / "source"
    with zipfile.ZipFile(kit / "instructor" / "autograder.zip") as archive:
        archive.extractall(source)
        modes = {i.filename: i.external_attr >> 16 for i in archive.infolist()}
    assert modes["run_autograder"] & modes["setup.sh"] & 0o111 == 0o111
    (wheel,) = source.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "venv" / "site")
    (licensed,) = (tmp_path / "venv" / "site").glob("miniconvit-*.dist-info/licenses/LICENSE")
    assert licensed.read_text() == (Path(__file__).parents[2] / "LICENSE").read_text()
    (tmp_path / "run_autograder").write_bytes((source / "run_autograder").read_bytes())
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}/venv/site" exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    chosen = solutions() | {"softmax.py": "import torch\ntorch.softmax\n"}
    del chosen["gpsa.py"]
    submission(tmp_path / "submission", chosen)
    run = ["bash", str(tmp_path / "run_autograder")]
    done = subprocess.run(
        run, check=True, cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    jsonschema.validate(results, json.loads(GRADESCOPE.read_text()))
    assert results["stdout_visibility"] == "hidden"
    assert "gpsa                      0 /  15   gpsa.py is missing" in done.stdout
    lost = {test["name"]: test["output"] for test in results["tests"] if test["status"] == "failed"}
    assert lost.keys() == {"softmax", "gpsa"}
    assert results["score"] == 100 - 15 - 6 == sum(test["score"] for test in results["tests"])
    assert lost["gpsa"] == "gpsa.py is missing"
    assert "imports torch in line 1" in lost["softmax"]
    assert subprocess.run(["bash", "-n", str(source / "setup.sh")]).returncode == 0


@pytest.mark.full
def test_wheel_installs(kit, tmp_path):
    """pip takes it and makes the command, in a new environment that borrows our NumPy."""
    (wheel,) = (kit / "instructor" / "autograder").glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    binaries = tmp_path / "venv" / "bin"
    pip = [str(binaries / "pip"), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True, env=environment())
    env = environment(PYTHONPATH=str(Path(np.__file__).parents[1]))
    program = [str(binaries / "miniconvit"), "coursework", "--help"]
    outcome = subprocess.run(program, check=True, capture_output=True, text=True, env=env)
    assert "create" in outcome.stdout


# The source check


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("import torch as t\nt", "imports torch in line 1"),
        ("import numpy as np\nimport jax.numpy\njax", "imports jax.numpy in line 2"),
        ("from miniconvit import layers as np\nnp", "imports miniconvit in line 1"),
        ("from .linear import f\nf(1)", "imports .linear"),
        ("from linear import f\nf(1)", "other exercises come through kit"),
        ("import os\nos", "imports os"),
        ("def f():\n    import ctypes\n    ctypes", "imports ctypes in line 2"),
        ("eval('1')", "uses eval"),
        ("x = open", "uses open"),
        ("().__class__.__base__", "uses __"),
        ("def f(:", "is no valid Python"),
        ("\0", "holds zero bytes"),
        ("-" * 100_000 + "1", "is no valid Python"),
        ("(" * 100_000, "is no valid Python"),
    ],
)
def test_source_problems(text, sentence):
    assert sentence in describe_source(text.encode())["problem"]


def test_source_check_passes_honest_code():
    honest = "import numpy as np\nfrom math import sqrt\nfrom kit import erf\nx = np.open = 1\n"
    assert describe_source(honest.encode())["problem"] == ""


# The page for instructors


def test_the_documented_example_runs(tmp_path):
    """docs/coursework.md: a layer written elsewhere, and its test, which notices a bug."""
    page = Path(__file__).parents[2] / "docs" / "coursework.md"
    blocks = page.read_text().split("```python\n")[1:]
    files = {}
    for block in (block.partition("```")[0] for block in blocks):
        first, _, text = block.partition("\n")
        files[first.removeprefix("# ")] = text
    folder = submission(tmp_path / "mine", files)
    env = environment(PYTHONPATH=str(Path(miniconvit.__file__).parents[1]))
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]

    def outcome():
        return subprocess.run(run, cwd=folder, capture_output=True, text=True, env=env).stdout

    assert "1 passed" in outcome()
    (name,) = (name for name in files if not name.startswith("test_"))
    assert files[name].count("sum(") == 1
    (folder / name).write_text(files[name].replace("sum(", "mean("))
    assert "1 failed" in outcome()
    assert "WRONG" in outcome()
