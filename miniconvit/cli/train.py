"""`miniconvit train`."""

import sys
from contextlib import suppress
from os.path import abspath
from pathlib import Path
from shlex import quote

import click

from ..engine.ranks import find_ranks
from ..training.interrupt import Diverged, Interrupted
from ..training.loop import train
from ..training.report import draw_curves, duration, table, text_curve
from ..training.run_folder import RunFolder, default_out
from ..training.settings import FIELDS, make_settings, refuse_difference, stored_settings
from .options import (
    PATH,
    Command,
    any_size_option,
    data_dir_option,
    device_option,
    no_download_option,
    option,
    options,
    setting_option,
    workers_option,
)


@click.command("train", cls=Command)
@options(*map(setting_option, FIELDS))
@data_dir_option
@any_size_option
@no_download_option
@device_option
@workers_option
@option("--out", type=PATH, metavar="FOLDER", help="Folder for the run.", shown="a new one in runs")
@option("--resume", is_flag=True, help="Continue the run in --out. It ends with the same bits.")
@option("--quiet", is_flag=True, help="Show only the summary at the end.")
@click.pass_context
def command(ctx, data_dir, no_download, device, workers, out, resume, quiet, **flags):
    """Train a model.

    Without options it trains a small ConViT on shapes, which the program draws itself. It writes
    metrics and checkpoints into a folder for the run.

    For your own images add --data imagefolder --data-dir FOLDER. They lie there as
    train/CLASS/NAME.jpg and val/CLASS/NAME.jpg. Without val, a tenth of train is held out.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    ranks = find_ranks()
    ranks.same(
        (given, str(out), resume),
        "{1} has other options than {0}: start all ranks alike, and runs of their own without "
        "mpirun or srun",
    )
    out, settings = ranks.first(_chosen, given, out, resume)
    try:
        result = train(
            settings,
            out,
            resume=resume,
            data_dir=data_dir,
            download=not no_download,
            workers=workers,
            device=device,
            quiet=quiet,
        )
    except Interrupted as stop:
        again = f"{ctx.command_path} --resume --out {quote(str(out))}{_where(data_dir)}"
        if device != "auto":
            again += f" --device {device}"
        with suppress(OSError):  # Ctrl-C stops the reader of a pipe too
            click.echo(f"{stop} and saved; go on with: {again}", err=True)
        return 128 + stop.signal
    except Diverged as reason:
        click.echo(f"Error: {reason}", err=True)
        return 1
    if ranks.rank == 0:
        _summarise(ctx, result, data_dir)
    return 0


def _chosen(given, out, resume):
    """The run's folder and Settings."""
    if "init_from" in given and Path(given["init_from"]).exists():
        given["init_from"] = abspath(given["init_from"])  # a published name stays as it is
    out = out or default_out(make_settings(**given), resume)
    settings = stored_settings(out) if resume else None
    if settings is None:
        return out, make_settings(**given)
    refuse_difference(settings, given, out)
    return out, settings


def _where(data_dir):
    return f" --data-dir {quote(str(data_dir))}" if data_dir else ""


def _summarise(ctx, result, data_dir):
    """The table at the end, and curves: a picture, or characters where matplotlib is missing."""
    folder = RunFolder(result.folder)
    rows, last = result.rows, result.rows[-1]
    if result.was_finished:
        click.echo(f"nothing to resume: the run in {folder.path} is finished")
    has_picture = draw_curves(rows, folder.curves)
    if not has_picture:
        click.echo("\n" + text_curve([row["val_top1"] for row in rows], sys.stdout.encoding))
    seconds = sum(row["seconds"] for row in rows)
    best = result.best
    test = f"{ctx.find_root().command_path} eval {quote(str(folder.path))} --split test"
    entries = [
        ("best validation accuracy", f"{100 * best['val_top1']:.1f} %, epoch {best['epoch']}"),
        ("last validation accuracy", f"{100 * last['val_top1']:.1f} %, epoch {last['epoch']}"),
        ("time", f"{duration(seconds)}, {result.step} step{'s' * (result.step != 1)}"),
        ("best checkpoint", folder.best),
        *([("curves", folder.curves)] if has_picture else []),
    ]
    click.echo("\n" + table(entries))
    if result.has_test:  # a command stays on its line, so that it can be copied
        click.echo(f"\ntest it: {test}{_where(data_dir)}")
