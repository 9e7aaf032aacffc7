"""`miniconvit coursework create / check / grade / pack`."""

from pathlib import Path

import click

from .. import coursework
from ..errors import UserError
from ..training.report import table

_PATH = click.Path(path_type=Path)


@click.group("coursework")
def command():
    """Blanks for students, cut out of this library, and their grading.

    `create` and `grade` are for instructors, `check` and `pack` for students.
    """


@command.command()
@click.argument("out", type=_PATH)
@click.option("--secret", required=True, type=_PATH, help="File with the text that hidden inputs "
              "are drawn from; written if missing.")  # fmt: skip
@click.option("--exercise", "names", multiple=True, metavar="NAME",
              help="One of " + ", ".join(e.name for e in coursework.EXERCISES)
              + "; may be repeated.  [default: all]")  # fmt: skip
def create(out, secret, names):
    """Write the students' folder and the instructor's into OUT."""
    chosen = coursework.create(out, secret, names)
    points, minutes = (sum(getattr(e, key) for e in chosen) for key in ("points", "minutes"))
    click.echo(
        table(
            [
                ("exercises", f"{len(chosen)}, {points} points, about {minutes / 60:.1f} hours"),
                ("for students", out / "student"),
                ("for you alone", out / "instructor"),
                ("for Gradescope", out / "instructor" / "autograder.zip"),
                ("secret", secret),
            ]
        )
    )


@command.command()
@click.argument("folder", type=_PATH, default=".")
@click.option("--exercise", "names", multiple=True, metavar="NAME", help="Only this one; may be "
              "repeated.")  # fmt: skip
def check(folder, names):
    """Run the visible tests in FOLDER, or here."""
    assignment = coursework.load_assignment(folder)
    chosen = [e for e in coursework.exercises(names) if e in assignment.exercises]
    if not chosen:
        raise UserError(f"{folder} has no exercise {', '.join(names)}")
    texts, problems, _ = coursework.read_submission(folder, chosen)
    total = 0.0
    for exercise in chosen:
        if exercise.name in problems:
            score, text = 0.0, problems[exercise.name]
        else:
            result = coursework.grade_exercise(texts[exercise.name], exercise, assignment)
            score, text = result.score, result.text
        total += score
        first, *more = text.splitlines()
        click.echo(f"{exercise.name:20}{score:6g} /{exercise.points:3}   {first}")
        for line in more:
            click.echo(f"{'':33}{line}")
    points = sum(exercise.points for exercise in chosen)
    click.echo(f"{'total':20}{total:6g} /{points:3}")
    if total < points:
        click.get_current_context().exit(1)


@command.command()
@click.argument("submissions", type=_PATH)
@click.option("--instructor", required=True, type=_PATH, help="The instructor's folder.")
@click.option("--out", required=True, type=_PATH, help="Folder for results and grades.csv.")
@click.option("--jobs", type=click.IntRange(1), help="Submissions at a time.  [default: all cores]")
def grade(submissions, instructor, out, jobs):
    """Grade a folder of submissions.

    Every folder and zip file in SUBMISSIONS is judged by the hidden tests.
    """
    graded = coursework.grade(submissions, instructor, out, jobs)
    for one in graded.values():
        click.echo(f"{one.student:30}{one.score:7g} /{one.max_score:4}   {one.remark}".rstrip())
    click.echo(f"\n{out / 'grades.csv'}, and results.json for each")


@command.command()
@click.argument("folder", type=_PATH, default=".")
@click.option("--out", type=_PATH, help="The file.  [default: FOLDER/submission.zip]")
def pack(folder, out):
    """Write submission.zip, or say what is still missing."""
    click.echo(coursework.pack(folder, coursework.load_assignment(folder), out))
