"""`miniconvit coursework create / check / grade / pack`."""

from textwrap import fill

import click

from .. import coursework
from ..errors import UserError
from ..training.report import table
from .options import COUNT, PATH, Command, Group, Name, option

EXERCISE = Name(exercise.name for exercise in coursework.EXERCISES)


@click.group("coursework", cls=Group)
def command():
    """Make and grade programming exercises.

    They are functions of this library with their bodies cut out. Instructors use create and grade.
    Students use check and pack.
    """


@command.command(cls=Command)
@click.argument("out", type=PATH)
@option(
    "--secret",
    required=True,
    type=PATH,
    metavar="FILE",
    help="File with the text that hidden inputs are drawn from. A missing one is written.",
)
@option(
    "--exercise",
    "names",
    multiple=True,
    type=EXERCISE,
    help="An exercise to hand out. You may repeat this option. The names are "
    f"{', '.join(EXERCISE.choices)}.",
    shown="all",
)
@option(
    "--no-formulas",
    "formulas",
    is_flag=True,
    default=True,
    flag_value=False,
    help="Leave the formulas of backward passes out of the blanks. To derive them is the exercise.",
)
def create(out, secret, names, formulas):
    """Write the folders of a new course.

    OUT then holds one folder for students and one for the instructor.
    """
    chosen, given = coursework.create(out, secret, names, formulas)
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
    if given:
        names = ", ".join(exercise.name for exercise in given)
        text = (
            f"These build on {names}. Students use their own files of earlier, or those that you "
            f"give them from {out / 'instructor' / 'given'}."
        )
        click.echo(f"\n{fill(text, 80, break_on_hyphens=False)}")


@command.command(cls=Command)
@click.argument("folder", type=PATH, default=".")
@option(
    "--exercise",
    "names",
    multiple=True,
    type=EXERCISE,
    help="An exercise to check. You may repeat this option.",
    shown="all",
)
def check(folder, names):
    """Run the visible tests.

    FOLDER is the students' folder. Without it the current folder is checked.
    """
    assignment = coursework.load_assignment(folder)
    chosen = [e for e in coursework.exercises(names) if e in assignment.exercises]
    if not chosen:
        raise UserError(f"{folder} has no exercise {', '.join(names)}")
    total = 0.0
    for name, copy in coursework.read_work(folder, chosen).items():
        (exercise,) = coursework.exercises([name])
        if copy.problem:
            score, text = 0.0, f"{copy.path} {copy.problem}"
        else:
            result = coursework.grade_exercise(copy.runs, exercise, assignment)
            score, text = result.score, "\n".join(filter(None, (result.text, copy.remark)))
        total += score
        click.echo(coursework.row(name, score, exercise.points, text))
    points = sum(exercise.points for exercise in chosen)
    click.echo(coursework.row("total", total, points, ""))
    if total < points:
        click.get_current_context().exit(1)


@command.command(cls=Command)
@click.argument("submissions", type=PATH)
@option(
    "--instructor",
    required=True,
    type=PATH,
    metavar="FOLDER",
    help="The instructor's folder of the course.",
)
@option(
    "--out",
    required=True,
    type=PATH,
    metavar="FOLDER",
    help="Folder for the results and grades.csv.",
)
@option("--jobs", type=COUNT, help="Number of submissions at a time.", shown="all cores")
def grade(submissions, instructor, out, jobs):
    """Grade a folder of submissions.

    The hidden tests judge every folder and zip file in SUBMISSIONS.
    """
    graded = coursework.grade(submissions, instructor, out, jobs)
    for one in graded.values():
        click.echo(coursework.row(one.student, one.score, one.max_score, one.remark))
    _, strangers = coursework.submissions_in(submissions)
    if strangers:
        names = ", ".join(path.name for path in strangers)
        line = coursework.printable(f"not graded, being no folder or archive: {names}")
        click.echo(f"\n{line}")
    click.echo(f"\n{coursework.walls()}")
    click.echo(f"{out / 'grades.csv'}, and a folder for each student:")
    click.echo("feedback.txt for the student, details.txt for you, results.json for Gradescope")


@command.command(cls=Command)
@click.argument("folder", type=PATH, default=".")
@option("--out", type=PATH, metavar="FILE", help="File to write.", shown="FOLDER/submission.zip")
@option("--partial", is_flag=True, help="Pack what there is. The file names what is still blank.")
def pack(folder, out, partial):
    """Pack the file to hand in.

    It says so where something is still missing.
    """
    assignment = coursework.load_assignment(folder)
    click.echo(coursework.packed(*coursework.pack(folder, assignment, out, partial)))
