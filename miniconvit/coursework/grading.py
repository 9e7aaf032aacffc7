"""Grading: one exercise, one submission, a folder of submissions."""

import csv
import json
import os
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from ..errors import UserError, printable
from ..system import read_json
from .cases import HIDDEN, VISIBLE, cases
from .exercises import allowed_functions, exercises
from .files import OTHER_ARCHIVES
from .judge import Result, judge
from .sandbox import LIMITS, Keeper, Limits, Sandbox, require_open_folder
from .submission import read_submission
from .task import Exercise, Size
from .work import row

STUDENT_FILE, INSTRUCTOR_FILE, TABLE = "coursework.json", "hidden.json", "grades.csv"
VISIBILITIES = ("visible", "hidden", "after_due_date", "after_published")
LITTER = {"thumbs.db", "desktop.ini", "__macosx", "@eadir", "icon\r"}
SMALL = replace(LIMITS, seconds=20.0, memory=512 << 20)
"""On Gradescope: endless loops everywhere fit into 10 minutes, and this process beside one of
student code into 768 MB, which are what it usually gives."""

ARCHIVES = (".zip", *OTHER_ARCHIVES)  # the others cannot be read, but some student's work is in it


@dataclass(frozen=True)
class Assignment:
    """What is graded, and on which inputs. The secret is text; visibility is Gradescope's word for
    who sees what hidden tests say: one of VISIBILITIES."""

    exercises: tuple[Exercise, ...]
    secret: str
    sizes: tuple[Size, ...]
    skeleton: str = ""
    visibility: str = "visible"
    limits: Limits = LIMITS

    def __post_init__(self):
        if self.visibility not in VISIBILITIES:
            raise UserError(
                f"visibility is one of {', '.join(VISIBILITIES)}, not {self.visibility!r}"
            )


@dataclass(frozen=True)
class Graded:
    """One submission. remark: a sentence on the submission as a whole."""

    student: str
    results: tuple[Result, ...]
    remark: str = ""
    seconds: float = 0.0

    @property
    def score(self):
        return round(sum(result.score for result in self.results), 2)

    @property
    def max_score(self):
        return sum(result.exercise.points for result in self.results)


def load_assignment(folder):
    """The Assignment of a student's folder (visible tests) or an instructor's (hidden tests).

    Raises UserError where there is none.
    """
    for name in (INSTRUCTOR_FILE, STUDENT_FILE):
        path = Path(folder) / name
        if path.is_file():
            break
    else:
        raise UserError(
            f"{folder} holds neither {STUDENT_FILE} nor {INSTRUCTOR_FILE}: name a folder that "
            "`miniconvit coursework create` made"
        )
    advice = "create the coursework again"
    config = read_json(path, advice)
    try:
        chosen = exercises(config["exercises"])
        if name == STUDENT_FILE:
            return Assignment(chosen, "visible", VISIBLE, config["skeleton"])
        secret, visibility = config["secret"], config["visibility"]
        return Assignment(chosen, secret, HIDDEN, config["skeleton"], visibility)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): {advice}") from error


def grade_exercise(text, exercise, assignment, keeper=None):
    """The Result of one file's text. Every unit runs in a process of its own."""
    rows, printed = [], ""
    for unit in exercise.units:
        allowed = allowed_functions(unit.name)
        drawn = cases(unit, assignment.secret, assignment.sizes)
        with Sandbox(text, exercise.name, allowed, assignment.limits, keeper) as sandbox:
            rows += judge(sandbox.call, unit, drawn)
        printed = printed or sandbox.printed
    return Result(exercise, tuple(rows), printed=printed)


def grade_submission(path, assignment, student="", keeper=None):
    """The Graded of a folder or zip file. Whatever is in it gets a score and a sentence."""
    start = time.monotonic()
    texts, problems, remark = read_submission(path, assignment.exercises, assignment.skeleton)
    results = tuple(
        grade_exercise(texts[exercise.name], exercise, assignment, keeper)
        if exercise.name in texts
        else Result(exercise, problem=problems[exercise.name])
        for exercise in assignment.exercises
    )
    return Graded(student, results, remark, time.monotonic() - start)


def grade(submissions, instructor, out, jobs=None):
    """Grades every folder and archive in `submissions`, `jobs` at a time (all cores where None).

    Writes out/STUDENT/results.json, feedback.txt for the student and details.txt for the instructor
    alone, and out/grades.csv. Returns the Graded, by name. Raises UserError where there is nothing
    to grade.
    """
    assignment = load_assignment(instructor)
    if assignment.sizes is not HIDDEN:
        raise UserError(f"{instructor} is a student's folder: name the instructor's")
    paths, _ = submissions_in(submissions)
    out = Path(out)
    if out.resolve() == Path(submissions).resolve():
        raise UserError(f"{out} holds the submissions: name another folder for the results")
    out.mkdir(parents=True, exist_ok=True)
    folders = _folders(paths, out)
    require_open_folder()
    graded, keeper = {}, Keeper()
    with ending_when_asked(), ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        futures = [
            pool.submit(_grade_safely, path, assignment, student, keeper)
            for student, path in paths.items()
        ]
        try:
            for future in tqdm(
                as_completed(futures), total=len(futures), unit=" submissions", disable=None
            ):
                one = future.result()
                graded[one.student] = one
                folders[one.student].mkdir(exist_ok=True)
                folder = folders[one.student]
                write_results(one, assignment, folder / "results.json")
                seen = report(one, lambda result: _seen(result, assignment))
                _write(folder / "feedback.txt", f"{seen}\n")
                _write(folder / "details.txt", report(one, lambda result: result.text) + "\n")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            keeper.stop()
            raise
    graded = dict(sorted(graded.items()))
    _write_csv(graded.values(), assignment, out / TABLE)
    return graded


@contextmanager
def ending_when_asked():
    """While it lasts, SIGTERM and SIGHUP end the program in order: processes and folders go.

    Elsewhere than in the main thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number, frame):
        raise SystemExit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    usual = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def submissions_in(folder):
    """({student: path}, paths of what is no submission) in a folder.

    A system's own files, such as Thumbs.db, are neither. Raises UserError where nothing is there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: name the one that holds the submissions")
    paths, strangers = [], []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name.casefold() in LITTER:
            continue
        is_submission = path.is_dir() or path.name.casefold().endswith(ARCHIVES)
        (paths if is_submission else strangers).append(path)
    names = Counter(_student(path) for path in paths)
    found = {}
    for path in paths:  # alice/ beside alice.zip: both, under their whole names
        student = _student(path)
        found[path.name if names[student] > 1 else student] = path
    if not found:
        raise UserError(f"{folder} holds no submissions: it needs a folder or zip file for each")
    return found, strangers


def _student(path):
    if path.is_dir():
        return path.name
    name = path.stem
    return name[:-4] if name.casefold().endswith(".tar") else name


def _folders(students, out):
    """{student: folder of the results}; no student's is where the table belongs."""
    taken = {student.casefold() for student in students}
    folders = {}
    for student in students:
        name = student
        while name.casefold() == TABLE or (name != student and name.casefold() in taken):
            name += "_"
        folders[student] = out / name
    return folders


def _grade_safely(path, assignment, student="", keeper=None):
    try:
        if path.is_symlink():
            raise UserError("it is a link, which may lead anywhere")
        return grade_submission(path, assignment, student, keeper)
    except Exception as error:  # one submission must not end the others' grading
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        problem = f"could not be graded, please look at it by hand: {kind}{error}"
        results = (Result(exercise, problem=problem) for exercise in assignment.exercises)
        return Graded(student, tuple(results), problem)


def write_results(graded, assignment, path):
    """results.json as Gradescope reads it, with what the student may see, and when."""
    tests = []
    for number, result in enumerate(graded.results, 1):
        test = {
            "name": result.exercise.name,
            "number": str(number),
            "score": result.score,
            "max_score": result.exercise.points,
            "status": "passed" if result.is_full else "failed",
            "output": _seen(result, assignment),
            "tags": [result.exercise.module],
            "visibility": "visible",
        }
        tests.append(test)
        if assignment.visibility.startswith("after") and result.text != result.brief:
            detail = {"name": f"{result.exercise.name}, in detail", "number": f"{number}.1"}
            tests.append(detail | {"output": result.text, "visibility": assignment.visibility})
    content = {
        "score": graded.score,
        "output": graded.remark or f"{graded.score:g} of {graded.max_score} points",
        "output_format": "text",
        "visibility": "visible",
        "stdout_visibility": "hidden",
        "execution_time": round(graded.seconds, 1),
        "tests": tests,
    }
    _write(path, json.dumps(content, indent=2) + "\n")


def _seen(result, assignment):
    """What a student sees of a Result at once."""
    return result.text if assignment.visibility == "visible" else result.brief


def report(graded, describe):
    """A row for each exercise; describe(result) is the text on it."""
    rows = [row(r.exercise.name, r.score, r.exercise.points, describe(r)) for r in graded.results]
    return "\n".join([*rows, row("total", graded.score, graded.max_score, graded.remark)])


def _write(path, text):
    new = path.with_name(f".{path.name}.new")  # never through a link that lies there
    new.unlink(missing_ok=True)
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def _write_csv(graded, assignment, path):
    names = [exercise.name for exercise in assignment.exercises]
    # A name that is no UTF-8, as archives of other systems leave it, must not end it all.
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["student", "score", "max_score", *names, "remark"])
        for one in graded:
            scores = [result.score for result in one.results]
            texts = [_cell(one.student), _cell(one.remark)]
            writer.writerow([texts[0], one.score, one.max_score, *scores, texts[1]])


def _cell(text):
    """A text that a spreadsheet takes for no formula, and that UTF-8 can hold."""
    return (
        "'" + printable(text) if text[:1] in ("=", "+", "-", "@", "\t", "\r") else printable(text)
    )


def autograde(root):
    """What Gradescope's run_autograder calls: root/submission in, root/results/results.json out.

    It prints what hidden tests say: only the instructor sees that.
    """
    root = Path(root)
    assignment = replace(load_assignment(root / "source"), limits=SMALL)
    require_open_folder()
    with ending_when_asked():
        graded = _grade_safely((root / "submission").resolve(), assignment)
    (root / "results").mkdir(exist_ok=True)
    write_results(graded, assignment, root / "results" / "results.json")
    print(report(graded, lambda result: result.text))
