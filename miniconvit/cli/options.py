"""What several commands share."""

import json
import warnings
from contextlib import contextmanager
from pathlib import Path

import click

from ..config import VARIANTS
from ..data.imagefolder import BROKEN
from ..engine.cuda import DEVICES


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


SIZE = _Size()

data_dir_option = click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    help="Folder in which to look for the data; of imagefolder the one above train.",
)
broken_option = click.option(
    "--broken",
    type=click.Choice(BROKEN),
    help="Image files that cannot be read: refuse the data, or skip and name them.  "
    "[default: refuse; of a run what it began with]",
)
workers_option = click.option(
    "--workers",
    "--threads",
    "workers",
    type=click.IntRange(1),
    help="How many processes share the work on a CPU. Any number gives the same bits.  "
    "[default: all cores]",
)
device_option = click.option(
    "--device",
    type=click.Choice(DEVICES),
    default="auto",
    show_default=True,
    help="auto: the GPU where CUDA works, else the CPU.",
)
img_size_option = click.option(
    "--img-size",
    type=SIZE,
    help="Pixels, N or HEIGHTxWIDTH: the positional embedding is interpolated to fit.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object only.")


def print_json(values):
    """One JSON object on standard output."""
    click.echo(json.dumps(values, indent=2, allow_nan=False))


@contextmanager
def overflow_is_answered():
    """While it lasts NumPy warns of no overflow: the caller looks for what is not finite itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def checkpoint_options(function):
    """--model and --img-size, for the commands that take any checkpoint."""
    model = click.option(
        "--model",
        "variant",
        type=click.Choice(list(VARIANTS)),
        metavar="NAME",
        help="What the checkpoint is.  [default: what it says, or what its shapes tell]",
    )
    return model(img_size_option(function))
