"""`miniconvit compare`."""

from pathlib import Path
from textwrap import wrap

import click

from ..errors import UserError, printable
from ..training.compare import differences, draw_comparison, read_outcomes, remarks, twin_notes
from ..training.report import duration
from ..training.settings import flag
from .options import PATH, Command, json_option, option, print_json


@click.command("compare", cls=Command)
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=PATH)
@option(
    "--curves",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Draw the validation curves of all runs into this PNG file.",
)
@json_option
def command(runs, curves, as_json):
    """Compare training runs.

    It prints what each run has reached, and the settings in which they differ. A ConViT and its ViT
    twin come first, where all else is equal. Runs that are not finished, or saw different data, are
    named. Accuracies are those of the validation images. The loss is that of the best epoch.
    """
    if curves is not None and curves.exists():
        raise UserError(f"{curves} exists: choose another name, or remove it first")
    outcomes = read_outcomes(runs)
    found, differ = [outcome.to_dict() for outcome in outcomes], differences(outcomes)
    notes = twin_notes(outcomes) + remarks(outcomes)
    if as_json:
        print_json({"runs": found, "differences": differ, "notes": notes})
    else:
        click.echo("\n".join(_lines(found, differ, notes)))
    if curves is not None:
        try:
            draw_comparison(outcomes, curves)
            if not as_json:
                click.echo(f"\ncurves in {curves}")
        except UserError as error:
            click.echo(f"no {curves}: {error}", err=True)


def _lines(found, differ, notes):
    yield from (f"{n:>3}  {printable(entry['run'])}" for n, entry in enumerate(found, 1))
    yield ""
    yield "run     best     loss  epoch     last    epochs  parameters  images/s       time"
    for number, entry in enumerate(found, 1):
        yield _row(number, entry)
    if differ:
        yield "\nwhat differs"
    for name, values in differ.items():
        runs = {}
        for number, value in enumerate(values, 1):
            runs.setdefault("none" if value is None else printable(value), []).append(str(number))
        text = "   ".join(f"{', '.join(of)}: {value}" for value, of in runs.items())
        yield from wrap(f"{flag(name):<22}{text}", 80, subsequent_indent=" " * 22)
    if notes:
        yield ""
    for note in notes:
        yield from wrap(note, 80, subsequent_indent="  ")


def _row(number, entry):
    done = str(entry["epochs"])
    if entry["settings"]["epochs"]:
        done += f"/{entry['settings']['epochs']}"
    cells = [""] * 4
    speed = time = ""
    if entry["epochs"]:
        cells = [
            f"{100 * entry['best_val_top1']:.1f} %",
            f"{entry['best_val_loss']:.4f}",
            entry["best_epoch"],
            f"{100 * entry['last_val_top1']:.1f} %",
        ]
        speed, time = entry["images_per_second"], duration(entry["seconds"])
        speed = f"{speed:,.0f}" if speed else "-"
    best, loss, epoch, last = cells
    return (
        f"{number:>3}{best:>9}{loss:>9}{epoch:>7}{last:>9}{done:>10}{entry['parameters']:>12,}"
        f"{speed:>10}{time:>11}"
    ).rstrip()
