"""`miniconvit experiment`."""

import signal
from contextlib import contextmanager, suppress
from pathlib import Path
from shlex import quote

import click

from ..data.dataset import SOURCES
from ..errors import UserError
from ..experiments.figures import draw
from ..experiments.plan import EXPERIMENTS, PLAN, complete, load_plan, refuse_other
from ..experiments.run import new_plan, run_plan
from ..experiments.tables import write_tables
from ..settings import flag
from ..train import Interrupted
from .options import data_dir_option, device_option, threads_option


class _Fractions(click.ParamType):
    name = "fractions"

    def convert(self, value, param, ctx):
        """'0.1,1.0' as [0.1, 1.0]."""
        try:
            return value if isinstance(value, list) else [float(x) for x in value.split(",")]
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers like 0.1,1.0", param, ctx)


@click.command("experiment")
@click.argument("name", type=click.Choice(EXPERIMENTS), metavar="NAME")
@click.option("--data", type=click.Choice(list(SOURCES)), help="Data set.  [default: cifar10]")
@data_dir_option
@click.option("--model", metavar="NAME", help="A ConViT.  [default: the data set's recipe's]")
@click.option("--budget", type=float, metavar="MINUTES", help="For all runs.  [default: 60]")
@click.option("--seeds", type=int, help="Runs of each row.  [default: 3]")
@click.option(
    "--fractions",
    type=_Fractions(),
    metavar="X,Y,...",
    help="sample-efficiency: shares of the images.  [default: 0.05,0.1,0.3,0.5,1.0]",
)
@click.option(
    "--subset",
    type=float,
    help="The others: train on this share of each class.  [default: 0.1; escape: 1.0]",
)
@device_option
@threads_option
@click.option("--out", type=click.Path(path_type=Path), help="Folder.  [default: runs/NAME-...]")
@click.option(
    "--plan",
    "plan_file",
    type=click.Path(path_type=Path),
    help="Replay this plan.json, measuring nothing; it stands for the options above --device.",
)
@click.option("--resume", is_flag=True, help="Go on with the plan in --out.")
@click.pass_context
def command(ctx, name, data_dir, device, threads, out, plan_file, resume, **flags):
    """One of the paper's experiments, at a size that fits into --budget.

    \b
    sample-efficiency  ConViT and ViT on shares of the data (table 2)
    ablation           what each ingredient of ConViT brings (table 3)
    locality           locality strength and number of GPSA layers (figure 8a)
    masking            without a part of the trained model (tables 5 and 6)
    escape             nonlocality and gates over training (figures 5 and 6)

    A few steps are timed, the runs planned to fit, then trained one by one; the same command goes
    on where it was stopped. Every run sees the same number of images. Writes plan.json, table.md,
    table.csv, table.json and a picture, and keeps every run's folder.
    """
    given = {option: value for option, value in flags.items() if value is not None}
    replayed = load_plan(plan_file) if plan_file else None
    if replayed:
        _refuse_flags(replayed, name, given)
    asked = replayed.asked if replayed else complete(name, given)
    out = out or Path("runs", f"{name}-{asked['data']}-{asked['model']}")
    where = {"data_dir": data_dir, "threads": threads, "device": device}
    try:
        with _sigterm_too():
            plan = _stored_plan(out, replayed, given if resume else asked, name)
            if plan is None:
                plan = replayed or new_plan(asked, click.echo, **where)
                out.mkdir(parents=True, exist_ok=True)
                plan.save(out / PLAN)
            click.echo(_announcement(plan, out))
            outcomes = run_plan(plan, out, click.echo, **where)
    except KeyboardInterrupt as stop:
        again = f"{ctx.command_path} {name} --resume --out {quote(str(out))}"
        again += f" --data-dir {quote(str(data_dir))}" if data_dir else ""
        again += f" --device {device}" if device != "auto" else ""
        saved = (
            f"and saved; go on with: {again}"
            if (out / PLAN).exists()
            else "before anything was planned"
        )
        with suppress(OSError):  # Ctrl-C stops the reader of a pipe too
            click.echo(f"stopped {saved}", err=True)
        return 128 + getattr(stop, "signal", signal.SIGINT)
    entries, text = write_tables(plan, outcomes, out)
    click.echo(f"\n{text}\nin {out}: table.md, table.csv, table.json")
    click.echo(f"in {out}: {', '.join(draw(plan, outcomes, entries, out))}")
    return 0


def _refuse_flags(plan, name, given):
    if given:
        raise UserError(f"--plan says it all: leave out {flag(next(iter(given)))}")
    if plan.experiment != name:
        raise UserError(f"this is a plan of {plan.experiment}: give that name, not {name}")


def _stored_plan(out, replayed, asked, name):
    """The Plan that was begun in the folder out, or None. Raises UserError where it is another."""
    if not (out / PLAN).exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} is not empty and holds no plan: choose a new folder with --out")
        return None
    plan = load_plan(out / PLAN)
    if replayed and replayed != plan:
        raise UserError(f"{out} holds another plan: choose another folder with --out")
    if plan.experiment != name:
        raise UserError(
            f"{out} holds a plan of {plan.experiment}, not of {name}: choose another --out"
        )
    refuse_other(plan.asked, asked, out)
    return plan


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
    runs = len(plan.rows) * len(plan.seeds)
    lines = [
        f"planned: {runs} runs of {plan.steps:,} steps, {plan.images_seen:,} images each, in "
        f"{plan.minutes:.3g} of {plan.asked['budget']:g} minutes; kept in {out}",
        f"measured {plan.place}",
        "",
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
