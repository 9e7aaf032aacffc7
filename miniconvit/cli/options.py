"""What commands share: help in groups, names with a hint, and the options made from settings."""

import json
import warnings
from contextlib import contextmanager
from dataclasses import MISSING
from pathlib import Path
from typing import get_args

import click

from ..analysis.style import require_matplotlib
from ..data.images import allow_any_size
from ..engine.cuda import DEVICES
from ..errors import UserError, unknown_name
from ..training.settings import (
    AUGMENTATION,
    DATA,
    FIELDS,
    MODEL,
    RECIPES,
    TRAINING,
    check_setting,
    flag,
)

RUN = "Run"
GROUPS = (DATA, MODEL, TRAINING, AUGMENTATION, RUN)
"""The headings of the help, in their order; RUN has what decides no bit of a training run."""


class Option(click.Option):
    """An option that stands in a group of the help."""

    def __init__(self, *args, group=RUN, **kwargs):
        super().__init__(*args, **kwargs)
        self.group = group


HELP = {"help_option_names": ["-h", "--help"]}


class Command(click.Command):
    """A command whose help shows its options in their groups."""

    def __init__(self, *args, **kwargs):  # of its own, since it may be called without its group
        super().__init__(*args, context_settings=HELP, **kwargs)

    def format_options(self, ctx, formatter):
        groups = {group: [] for group in GROUPS}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and not isinstance(param, click.Argument):
                groups[getattr(param, "group", RUN)].append(record)
        used = {group: records for group, records in groups.items() if records}
        for group, records in used.items():
            with formatter.section(group if len(used) > 1 else "Options"):
                formatter.write_dl(records)


class Group(click.Group):
    """A group of commands that asks which one was meant."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, context_settings=HELP, **kwargs)

    def resolve_command(self, ctx, args):
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            ctx.fail(unknown_name("command", name, self.list_commands(ctx)))
        return super().resolve_command(ctx, args)


class Name(click.Choice):
    """One of a few names; of many the help shows NAME and the text of the option lists them."""

    def __init__(self, names):
        super().__init__(list(names))

    def get_metavar(self, param, ctx=None):
        short = len("|".join(self.choices)) <= 40
        return f"[{'|'.join(self.choices)}]" if short else "NAME"

    def convert(self, value, param, ctx):
        if value not in self.choices:
            self.fail(unknown_name("name", value, self.choices), param, ctx)
        return value


class _Size(click.ParamType):
    name = "size"

    def convert(self, value, param, ctx):
        """'32' as 32, '32x48' as (32, 48): height, then width."""
        try:
            sides = tuple(int(side) for side in str(value).split("x"))
        except ValueError:
            sides = ()
        if len(sides) not in (1, 2):
            self.fail(f"{value!r} is neither a number of pixels nor HEIGHTxWIDTH", param, ctx)
        return sides[0] if len(set(sides)) == 1 else sides


class _Count(click.ParamType):
    name = "n"

    def convert(self, value, param, ctx):
        """'4' as 4, which is at least 1."""
        try:
            count = int(value)
        except ValueError:
            count = 0
        if count < 1:
            self.fail(f"{value!r} is not an integer of at least 1", param, ctx)
        return count


COUNT = _Count()
PATH = click.Path(path_type=Path)


def option(*names, help, shown=None, **attributes):
    """click.option in a group; shown: the default in words."""
    text = help if shown is None else f"{help}  [default: {shown}]"
    return click.option(*names, cls=Option, help=text, **attributes)


def setting_option(name, help=None, shown=None, default=None, called=None, **attributes):
    """The option of a setting, with what `Settings` says of it and its limits.

    help, shown: in place of the setting's own, where a command means something else by it;
    default: a value, where the command has one of its own; called: the function's argument.
    """
    about = FIELDS[name].metadata

    def check(ctx, param, value):
        if value is not None:
            check_setting(name, value)
        return value

    if shown is None:
        shown = _shown_default(name) if default is None else default
    is_switch = FIELDS[name].type is bool
    attributes = {"group": about["group"]} | _type_of(name) | attributes
    return option(
        f"{flag(name)}/{flag('no_' + name)}" if is_switch else flag(name),
        called or name,
        help=help or about["help"],
        shown=shown,
        default=default,
        callback=check,
        **attributes,
    )


def _type_of(name):
    """The click type of a setting, and how the help calls its value."""
    kind, names = FIELDS[name].type, FIELDS[name].metadata["limits"].names
    kinds = [one for one in get_args(kind) or [kind] if one is not type(None)]
    if names:
        return {"type": Name(names)}
    if len(kinds) > 1:
        return {"type": _Size()}
    return {bool: {}, str: {"metavar": "PATH"}}.get(
        kinds[0], {"type": kinds[0], "metavar": "X" if kinds[0] is float else "N"}
    )


def _shown_default(name):
    """What a run takes without this option, in words."""
    value, shown = FIELDS[name].default, FIELDS[name].metadata["shown"]
    if shown is None and value is not MISSING and value is not None:
        shown = f"{value:g}" if isinstance(value, float) else value
    if not any(name in recipe for recipe in RECIPES.values()):
        return shown
    return "the recipe's" if shown is None else f"the recipe's, else {shown}"


def options(*made):
    """A decorator of many options, which the help shows in this order."""

    def decorate(function):
        for one in reversed(made):
            function = one(function)
        return function

    return decorate


data_dir_option = option(
    "--data-dir",
    type=PATH,
    metavar="FOLDER",
    group=DATA,
    help="Folder of the data. For imagefolder it is the folder above train, or above the classes.",
    shown="MINICONVIT_DATA, else a cache folder",
)
no_download_option = option(
    "--no-download", is_flag=True, group=DATA, help="Use only files that are already here."
)
workers_option = option(
    "--workers",
    "--threads",
    "workers",
    type=COUNT,
    help="How many processes share the work on a CPU. Any number gives the same bits.",
    shown="all cores",
)
precision_option = setting_option("precision", default="float32")
device_option = option(
    "--device",
    type=Name(DEVICES),
    default="auto",
    help="Where to compute. auto takes the GPU where CUDA works, and else the CPU.",
    shown="auto",
)
json_option = option(
    "--json", "as_json", is_flag=True, help="Print one JSON object and nothing else."
)
any_size_option = option(
    "--any-size",
    is_flag=True,
    group=DATA,
    expose_value=False,
    callback=lambda ctx, param, value: allow_any_size() if value else None,
    help="Read images of any area and shape. Without it, extreme ones count as broken.",
)
stored_data_options = options(
    setting_option("data", "Images to look at.", shown="those that it was trained on"),
    data_dir_option,
    setting_option("broken", shown="what its run began with, else refuse"),
    any_size_option,
)
"""For the commands that read a data set for a checkpoint."""
checkpoint_options = options(
    setting_option(
        "model",
        "Variant of the checkpoint. `train --help` lists the names.",
        shown="what the file says",
        called="variant",
        metavar="NAME",
    ),
    setting_option(
        "img_size",
        "Size of the images in pixels, as N or HEIGHTxWIDTH. The positional embedding is "
        "interpolated to fit.",
        shown="the checkpoint's",
    ),
)
"""For the commands that take any checkpoint."""


def can_draw():
    """Whether there will be pictures; says so where there will not."""
    try:
        require_matplotlib()
    except UserError as error:
        click.echo(f"no picture will be drawn: {error}", err=True)
        return False
    return True


def print_json(values):
    """One JSON object on standard output."""
    click.echo(json.dumps(values, indent=2, allow_nan=False))


@contextmanager
def overflow_is_answered():
    """While it lasts NumPy warns of no overflow: the caller looks for what is not finite itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
