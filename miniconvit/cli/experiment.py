"""`miniconvit experiment`."""

import os
import signal
import sys
from contextlib import contextmanager, suppress
from math import inf
from pathlib import Path
from shlex import quote
from shutil import get_terminal_size

import click

from ..errors import UserError
from ..experiments import biases, gan, lipschitz
from ..experiments.figures import draw
from ..experiments.plan import (
    EXPERIMENTS,
    FRACTIONS,
    MOST_SEEDS,
    PLAN,
    complete,
    load_plan,
    refuse_other,
)
from ..experiments.run import new_plan, run_plan
from ..experiments.tables import on_screen, write_tables
from ..system import read_text, write_file
from ..training.interrupt import Interrupted
from ..training.report import folded
from ..training.settings import DATA, TRAINING, flag
from .options import (
    PATH,
    Command,
    Name,
    can_draw,
    data_dir_option,
    device_option,
    option,
    setting_option,
    workers_option,
)

DATA_DIR = "data_dir.txt"  # beside the plan, which may be replayed where the data lie elsewhere
ONE_PLAN = {
    "biases": (biases, {"data", "data_dir", "steps", "seeds"}),
    "gan": (gan, {"steps", "seeds"}),
}
"""Experiments whose runs are always the same, but for these options."""
SHORT_RUN = 5.0  # seconds: after a shorter one no picture is drawn, which takes half a second
BEFORE_PLAN = {DATA_DIR, DATA_DIR + ".partial", PLAN + ".partial"}  # what a kill leaves behind


class _Fractions(click.ParamType):
    name = "fractions"

    def convert(self, value, param, ctx):
        """'1.0,0.1' as [0.1, 1.0]."""
        try:
            return sorted({float(x) for x in value.split(",")})
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers like 0.1,1.0", param, ctx)


@click.command("experiment", cls=Command)
@click.argument("name", type=Name((*EXPERIMENTS, *ONE_PLAN, "lipschitz")), metavar="NAME")
@setting_option("data", "Images to train on.", shown="cifar10")
@data_dir_option
@setting_option(
    "subset",
    "Train on this share of the images of each class. sample-efficiency and hybrid take "
    "--fractions instead.",
    shown="0.1 for ablation and locality, else 1",
)
@option(
    "--fractions",
    type=_Fractions(),
    metavar="X,Y,...",
    group=DATA,
    help="For sample-efficiency and hybrid, the shares of the images to compare.",
    shown=" or ".join(",".join(map(str, of)) for of in FRACTIONS.values()),
)
@setting_option(
    "model",
    "A ConViT. Its ViT twin comes by itself. `train --help` lists the names. mobile has its own.",
    shown="that of the data's recipe, for diversity convit_deep32",
)
@option(
    "--budget",
    type=float,
    metavar="MINUTES",
    group=TRAINING,
    help="Minutes that all runs together may take.",
    shown="60",
)
@setting_option("steps", "Length of each run in steps. Give it in place of --budget.")
@option("--seeds", type=int, metavar="N", group=TRAINING, help="Runs for each row.", shown="3")
@device_option
@workers_option
@option(
    "--out", type=PATH, metavar="FOLDER", help="Folder for tables and runs.", shown="one in runs"
)
@option(
    "--plan",
    "plan_file",
    type=PATH,
    metavar="FILE",
    help="Replay this plan.json without measuring. It takes the place of all options but "
    "--data-dir and those of this group.",
)
@click.pass_context
def command(ctx, name, data_dir, device, workers, out, plan_file, **flags):
    """Run one of the paper's experiments.

    NAME is one of these:

    \b
    sample-efficiency  ConViT and ViT on shares of the data (table 2)
    ablation           what each ingredient of ConViT brings (table 3)
    locality           locality strength and number of GPSA layers (figure 8a)
    masking            without a part of the trained model (tables 5 and 6)
    escape             nonlocality and gates over training (figures 5 and 6)
    diversity          losses that keep patches apart (Patch Diversification)
    hybrid             convolutions in a transformer on shares of the data (CMT)
    mobile             three stems by three read-outs (mobile ViT)
    biases             mixers of tokens reconstruct hidden patches (Cazenavette)
    gan                a transformer draws, another judges (ViTGAN)
    lipschitz          whether attention by distance is Lipschitz (ViTGAN)

    lipschitz trains nothing: it takes seconds, --seeds and --out. biases and gan have one
    plan each, of --steps. The others do as follows.

    It measures the speed for a few seconds and plans runs that fit into --budget. Then it trains
    them one by one. Every run sees the same number of images.

    It writes plan.json, and after each run table.md and table.csv. After runs of over 5 seconds,
    and in the end, it draws a picture. Give NAME and --out again to continue where it stopped.
    """
    given = {key: value for key, value in flags.items() if value is not None}
    if name == "lipschitz":
        where = {"workers": workers, "device": None if device == "auto" else device}
        return _lipschitz(out, given, data_dir=data_dir, plan=plan_file, **where)
    if name in ONE_PLAN:
        given |= {"data_dir": data_dir} if data_dir else {}
        return _one_plan(ctx, out, plan_file, {"workers": workers, "device": device}, **given)
    replayed = load_plan(plan_file) if plan_file else None
    if replayed:
        _refuse_flags(replayed, name, given)
    asked = replayed.asked if replayed else complete(name, given)
    out = out or Path("runs", f"{name}-{asked['data']}-{asked['model']}")
    where = {"data_dir": _kept_data_dir(out, data_dir), "workers": workers, "device": device}
    try:
        with _sigterm_too():
            plan = _stored_plan(out, replayed, given, name)
            if plan is None:
                plan = replayed or new_plan(asked, click.echo, **where)
                _keep(plan, out, where["data_dir"])
            click.echo(folded(_announcement(plan, out)))
            has_pictures = can_draw()

            def show(outcomes, seconds=inf):
                entries, text = write_tables(plan, outcomes, out)
                draws = has_pictures and seconds > SHORT_RUN
                names = draw(plan, outcomes, entries, out) if draws else []
                return text, ["table.md", "table.csv", *names]

            outcomes = run_plan(plan, out, click.echo, show, **where)
    except KeyboardInterrupt as stop:
        _say_stopped(f"{ctx.command_path} {name}", out, device)
        return 128 + getattr(stop, "signal", signal.SIGINT)
    text, names = show(outcomes)
    _show(text, out, names)
    return 0


def _lipschitz(out, given, **where):
    """given: the flags that are there; where: the others, None where they are not."""
    seeds = given.pop("seeds", 3)
    for name in (*given, *(name for name, value in where.items() if value is not None)):
        raise UserError(f"lipschitz trains nothing: leave out {flag(name)}")
    _check_seeds(seeds)
    out = out or Path("runs", "lipschitz")
    text, names = lipschitz.run(out, seeds, can_draw())
    _show(text, out, names)
    return 0


def _check_seeds(seeds):
    if not 1 <= seeds <= MOST_SEEDS:
        raise UserError(f"--seeds must be from 1 to {MOST_SEEDS}, not {seeds}")


def _show(text, out, names):
    """The text of table.md, which a terminal has in its own way, and where everything is."""
    if sys.stdout.isatty():
        text = on_screen(text, get_terminal_size().columns)
    click.echo(folded(f"\n{text}\nin {out}: {', '.join(names)}"))


def _one_plan(ctx, out, plan_file, where, **given):
    """An experiment of ONE_PLAN. given: the flags that are there, data_dir among them."""
    name = ctx.params["name"]
    module, takes = ONE_PLAN[name]
    for other in given.keys() - takes | ({"plan"} if plan_file else set()):
        raise UserError(f"{name} has one plan: leave out {flag(other)}")
    _check_seeds(given.get("seeds", 1))
    folder = f"{name}-{given.get('data', 'cifar10')}" if "data" in takes else name
    out = out or Path("runs", folder)
    if "data_dir" in given:
        given["data_dir"] = str(given["data_dir"].expanduser().absolute())
    asked = module.open_plan(out, given)
    try:
        with _sigterm_too():
            text, names = module.run(out, asked, click.echo, pictures=can_draw(), **where)
    except KeyboardInterrupt as stop:
        _say_stopped(f"{ctx.command_path} {name}", out, where["device"])
        return 128 + getattr(stop, "signal", signal.SIGINT)
    _show(text, out, names)
    return 0


def _refuse_flags(plan, name, given):
    if given:
        raise UserError(f"--plan says it all: leave out {flag(next(iter(given)))}")
    if plan.experiment != name:
        raise UserError(f"this is a plan of {plan.experiment}: give that name, not {name}")


def _kept_data_dir(out, given):
    """Where the data lie: as given, or as it was when the plan in the folder out was made."""
    if given is None and (out / PLAN).exists():
        kept = read_text(out / DATA_DIR, "delete it, and add --data-dir")
        return kept and Path(kept.rstrip("\n"))
    return given


def _stored_plan(out, replayed, given, name):
    """The Plan that was begun in the folder out, or None. Raises UserError where it is another."""
    if not (out / PLAN).exists():
        if out.exists() and (not out.is_dir() or set(os.listdir(out)) - BEFORE_PLAN):
            raise UserError(f"{out} is not empty and holds no plan: choose a new folder with --out")
        return None
    plan = load_plan(out / PLAN)
    if replayed and replayed != plan:
        raise UserError(f"{out} holds another plan: choose another folder with --out")
    refuse_other(plan, name, given, out)
    return plan


def _keep(plan, out, data_dir):
    """Makes the folder out that of the plan, which is written last: it says that all is there."""
    out.mkdir(parents=True, exist_ok=True)
    (out / DATA_DIR).unlink(missing_ok=True)
    if data_dir is not None:
        write_file(out / DATA_DIR, f"{data_dir.expanduser().absolute()}\n".encode())
    plan.save(out / PLAN)


def _say_stopped(command_line, out, device):
    again = f"{command_line} --out {quote(str(out))}"
    again += f" --device {device}" if device != "auto" else ""
    saved = (
        f"and saved; go on with: {again}"
        if (out / PLAN).exists()
        else "before anything was planned"
    )
    with suppress(OSError):  # Ctrl-C stops the reader of a pipe too
        click.echo(f"stopped {saved}", err=True)


@contextmanager
def _sigterm_too():
    """While it lasts SIGTERM, like Ctrl-C, raises; train answers both in its own way."""

    def stop(signum, frame):
        raise Interrupted(signum, 0)

    usual = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, usual)


def _announcement(plan, out):
    """What is going to happen, before it does."""
    budget = f" of {plan.asked['budget']:g}" if "budget" in plan.asked else ""
    lines = [
        f"planned: {len(plan.runs)} runs of {plan.steps:,} steps, {plan.images_seen:,} images "
        f"each, in about {plan.minutes:.3g}{budget} minutes as measured {plan.measured_on}; kept "
        f"in {out}",
        plan.recipe,
        f"{'row':<38}{'runs':>5}{'images':>9}{'passes':>9}{'images/s':>10}{'minutes':>9}",
    ]
    for row in plan.rows:
        passes = plan.images_seen / row.images
        minutes = len(plan.seeds) * row.seconds / 60
        speed = row.speed["images_per_second"]
        lines.append(
            f"{row.label:<38}{len(plan.seeds):>5}{row.images:>9,}{passes:>9.1f}"
            f"{speed:>10.0f}{minutes:>9.1f}"
        )
    return "\n".join(lines) + "\n"
