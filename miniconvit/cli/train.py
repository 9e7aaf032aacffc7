"""`miniconvit train`."""

import sys
from contextlib import suppress
from os.path import abspath
from pathlib import Path
from shlex import quote

import click

from ..config import VARIANTS
from ..data import PRESETS
from ..training.freeze import FREEZE
from ..training.interrupt import Diverged, Interrupted
from ..training.loop import train
from ..training.report import draw_curves, duration, table, text_curve
from ..training.run_folder import RunFolder, default_out
from ..training.settings import (
    DEFAULT_RECIPE,
    RECIPES,
    make_settings,
    refuse_difference,
    stored_settings,
)
from .options import SIZE, broken_option, data_dir_option, device_option, workers_option


def _absolute(ctx, param, value):
    """A path that exists as one that another folder finds too; a published name as it is."""
    return abspath(value) if value and Path(value).exists() else value


@click.command("train")
@click.option(
    "--data", type=click.Choice(list(DEFAULT_RECIPE)), help="Data set.  [default: shapes]"
)
@data_dir_option
@broken_option
@click.option("--no-download", is_flag=True, help="Never fetch a data set.")
@click.option(
    "--subset", type=float, help="Train on this share of the images, the first of each class."
)
@click.option(
    "--model",
    type=click.Choice(list(VARIANTS)),
    metavar="NAME",
    help="One of "
    + ", ".join(name for name in VARIANTS if name.startswith("convit_"))
    + ", or vit_... for the plain ViT of each.",
)
@click.option(
    "--recipe",
    type=click.Choice(list(RECIPES)),
    help="Named settings; explicit flags win.  [default: by --data]",
)
@click.option(
    "--img-size", type=SIZE, help="Pixels: N, or HEIGHTxWIDTH; image files are cut to it."
)
@click.option("--patch-size", type=SIZE, help="Pixels: N, or HEIGHTxWIDTH.")
@click.option("--local-up-to-layer", type=int, help="How many of the first blocks are GPSA.")
@click.option("--locality-strength", type=float, help="How sharply heads look at first.")
@click.option(
    "--attention",
    type=click.Choice(["gpsa", "psa"]),
    help="Of the first blocks; psa: content and position in one softmax, no gates.",
)
@click.option(
    "--local-init/--no-local-init",
    default=None,
    help="Begin those blocks as a soft convolution, or at random.  [default: --local-init]",
)
@click.option(
    "--freeze",
    type=click.Choice(FREEZE),
    help="Do not train their gates, which then stand at 0 (with --init-from: as there), or all of "
    "their attention.",
)
@click.option(
    "--init-from",
    metavar="CHECKPOINT",
    callback=_absolute,
    help="Begin from a run, a checkpoint, a .safetensors or .pth file of timm's or the official "
    "names, or a published name such as convit_tiny.fb_in1k.",
)
@click.option("--passes", type=int, help="Passes over the data in an epoch.  [default: 1]")
@click.option("--epochs", type=int, help="Length of the run; each ends with a validation.")
@click.option("--steps", type=int, help="Length of the run in steps, instead of --epochs.")
@click.option("--batch-size", type=int, help="Images in a step.")
@click.option("--lr", type=float, help="Peak learning rate.")
@click.option("--weight-decay", type=float, help="AdamW's decoupled decay.")
@click.option("--warmup-epochs", type=float, help="Epochs in which the rate rises to its peak.")
@click.option("--clip-grad", type=float, help="Greatest norm of the gradient.")
@click.option("--label-smoothing", type=float, help="Share of a target spread over all classes.")
@click.option("--drop-path", type=float, help="Drop rate of the last block's branches.")
@click.option(
    "--augment",
    type=click.Choice(list(PRESETS)),
    help="; ".join(f"{name}: {preset.summary}" for name, preset in PRESETS.items()) + ".",
)
@click.option("--repeats", type=int, help="Differently augmented copies of an image in a batch.")
@click.option(
    "--mixup",
    type=float,
    help="Blend images in pairs; shares from Beta(X, X). "
    "Training accuracy then counts the class with the larger share.",
)
@click.option("--cutmix", type=float, help="Paste boxes in pairs; with --mixup, half of the steps.")
@click.option(
    "--ema",
    type=float,
    help="Decay, such as 0.999, of a moving average of the parameters, which is then what is "
    "validated and kept as best.",
)
@click.option("--seed", type=int, help="Of all that is random.")
@device_option
@workers_option
@click.option("--out", type=click.Path(path_type=Path), help="Run folder.  [default: runs/...]")
@click.option("--resume", is_flag=True, help="Go on with the run in --out, to the bit.")
@click.option("--quiet", is_flag=True, help="Show only the end.")
@click.pass_context
def command(ctx, data_dir, no_download, device, workers, out, resume, quiet, **flags):
    """Train a model; keep metrics and checkpoints in a run folder.

    Without flags: a small ConViT on `shapes`, images drawn by the program itself. Your own images:
    --data imagefolder --data-dir FOLDER, in which they lie as train/CLASS/NAME.jpg and
    val/CLASS/NAME.jpg; without val a tenth of train is held out.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    out = out or default_out(make_settings(**given), resume)
    settings = stored_settings(out) if resume else None
    if settings is None:
        settings = make_settings(**given)
    else:
        refuse_difference(settings, given, out)
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
    _summarise(ctx, result, data_dir)
    return 0


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
    test = ("test it", test + _where(data_dir))
    entries = [
        ("best validation accuracy", f"{100 * best['val_top1']:.1f} %, epoch {best['epoch']}"),
        ("last validation accuracy", f"{100 * last['val_top1']:.1f} %, epoch {last['epoch']}"),
        ("time", f"{duration(seconds)}, {result.step} steps"),
        ("best checkpoint", folder.best),
        *([("curves", folder.curves)] if has_picture else []),
        *([test] if result.has_test else []),
    ]
    click.echo("\n" + table(entries))
