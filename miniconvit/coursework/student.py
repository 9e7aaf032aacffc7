"""What is right in a student's folder, what is wrong, and the file to hand in.

python -m checker                    runs the visible tests
python -m checker linear gelu        runs those of some exercises
python -m checker pack [--partial]   writes submission.zip

It needs NumPy alone and holds no solution: `visible.bin` has the numbers that
go in and those that should come out. Functions of other exercises are yours.
"""

import signal
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from contextlib import chdir
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from pathlib import Path

from ..errors import UserError, unknown_name
from .judge import Result, judge
from .runner import Broken, Watched, Wire, describe
from .source import describe_source
from .task import Case, Draw, Exercise, Size, Unit
from .work import own_copies, pack, packed, row

FOLDER = Path(__file__).parents[1]
TESTS = Path(__file__).with_name("visible.bin")


@dataclass(frozen=True)
class Visible:
    """The visible tests. needs: exercise's name to those of whose functions it is made; cases:
    unit's name to its Cases; edition: where they come from."""

    exercises: tuple[Exercise, ...]
    needs: dict[str, tuple[str, ...]]
    cases: dict[str, list[Case]]
    edition: dict[str, str]


def write_tests(path, visible):
    """A file of messages as a Wire sends them: no pickle, and every number to the bit."""
    table = [(e.name, e.points, tuple(map(_fields, e.units))) for e in visible.exercises]
    cases = [(name, case) for name, cases in visible.cases.items() for case in cases]
    head = tuple(table), visible.needs, visible.edition, len(cases)
    with path.open("wb") as file:
        wire = Wire(None, file.write, None)
        wire.send("return", head)
        for name, case in cases:
            draws = tuple(map(_fields, (case.first, case.second)))
            wire.send("return", (name, _fields(case.size), case.parameters, *draws))


def _fields(described):
    return tuple(vars(described).values())


@cache
def read_tests(path=TESTS):
    """The Visible of a file. Raises UserError where it is damaged."""
    try:
        with path.open("rb") as file:
            wire = Wire(partial(_exactly, file), None, None)
            _, (table, needs, edition, count) = wire.receive()
            exercises = tuple(
                Exercise(name, "", tuple(Unit(*unit) for unit in units), points)
                for name, points, units in table
            )
            cases = {unit.name: [] for exercise in exercises for unit in exercise.units}
            for _ in range(count):
                _, (name, size, parameters, *draws) = wire.receive()
                draws = [Draw(*draw) for draw in draws]
                cases[name].append(Case(Size(*size), *draws, parameters))
    except (OSError, Broken, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be read: unpack the coursework again") from error
    return Visible(exercises, needs, cases, edition)


def _exactly(file, size):
    data = file.read(size)
    if len(data) < size:
        raise Broken
    return data


def result_of(exercise, folder=FOLDER):
    """The Result of one file in the folder on the visible tests, in this very process."""
    copy = own_copies(folder, [exercise], look)[exercise.name]
    if copy.problem:
        return Result(exercise, problem=f"{copy.path} {copy.problem}")
    with chdir(folder):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
        try:
            namespace = vars(import_module(exercise.name))
        except Exception as error:
            return Result(exercise, problem=describe(error))
        cases = read_tests().cases
        units = [judge(looped(Watched(namespace)), u, cases[u.name]) for u in exercise.units]
    return Result(exercise, tuple(row for rows in units for row in rows), remark=copy.remark)


def look(files):
    """What `source.describe_source` says of each of these files' bytes."""
    return [describe_source(data) for data in files]


def looped(functions):
    """call(name, *args) over a Wire whose other end is here: arguments and results are copies, as
    they are in grading."""
    questions, answers = bytearray(), bytearray()

    def take(buffer, size):
        data = bytes(buffer[:size])
        del buffer[:size]
        return data

    def read(size):
        if not answers:
            student.serve_one()
        return take(answers, size)

    student = Wire(partial(take, questions), answers.extend, functions)
    return Wire(read, questions.extend, None).call


def check(names):
    """Prints a row for each exercise of these names, or of all; whether all is right."""
    visible = read_tests()
    known = {exercise.name: exercise for exercise in visible.exercises}
    for name in names:
        if name not in known:
            raise UserError(unknown_name("exercise", name, known))
    chosen = [known[name] for name in names] or visible.exercises
    needed = [known[name] for e in chosen for name in visible.needs[e.name]]
    results = {e.name: result_of(e) for e in visible.exercises if e in (*chosen, *needed)}
    for exercise in chosen:
        result = results[exercise.name]
        text = result.text
        missing = [name for name in visible.needs[exercise.name] if not results[name].is_full]
        if missing and not (result.is_full or result.is_blank):
            text += f"\nit builds on work that is not right yet: {', '.join(missing)}"
        print(row(exercise.name, result.score, exercise.points, text))
    score = sum(results[e.name].score for e in chosen)
    points = sum(e.points for e in chosen)
    print(row("total", score, points, ""))
    return score == points


def main(argv=None):
    """The exit status: 0 all is right, 1 something is not, 2 a mistake answered by a sentence."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an endless loop ends at once
    parser = ArgumentParser(
        "python -m checker", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", metavar="EXERCISE", help="what to check, or pack")
    parser.add_argument("--partial", action="store_true", help="pack what there is, with blanks")
    asked = parser.parse_args(argv)
    try:
        if asked.what != ["pack"]:
            return 0 if check(asked.what) else 1
        tests = read_tests()
        print(packed(*pack(FOLDER, tests.exercises, tests.edition, look, partial=asked.partial)))
        return 0
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
