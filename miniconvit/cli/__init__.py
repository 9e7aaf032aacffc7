"""The command line: one file per command, each of which parses, calls one function and prints."""

import os
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout, suppress
from importlib import import_module
from pathlib import Path

from .. import __version__
from ..errors import UserError, missing, unusable

try:
    import click

    from ..system import launched
    from .checkout import check_copy
    from .options import Group
except ImportError as error:
    raise unusable(missing(error)) from error

COMMANDS = (
    "train",
    "eval",
    "predict",
    "compare",
    "gradcheck",
    "inspect",
    "trace",
    "experiment",
    "export",
    "bench",
    "data",
    "tutorial",
    "coursework",
    "doctor",
)
TOGETHER = ("train", "doctor")
"""What may be started several times at once, by a launcher of ranks."""


class Program(Group):
    """The commands, each imported when it is asked for."""

    def list_commands(self, ctx):
        return COMMANDS

    def get_command(self, ctx, cmd_name):
        size, _, launcher = launched()
        if size > 1 and cmd_name in COMMANDS and cmd_name not in TOGETHER:
            raise UserError(
                f"started {size} times by {launcher}, and only train shares its work: start "
                f"{cmd_name} without {launcher}"
            )
        if cmd_name in COMMANDS:
            return import_module(f".{cmd_name}", __name__).command
        return None


@click.group(cls=Program)
@click.version_option(__version__, message="miniconvit %(version)s")
def program():
    """ConViT by hand: every gradient is written out, checked and trained.

    Begin with `miniconvit train`. It needs no download and takes about a minute.
    """


def main(argv=None, name="miniconvit"):
    """Runs the command line and exits: 0 success, 1 something came out wrong, 2 a mistake answered
    by a sentence, 130 and 143 stopped by Ctrl-C and SIGTERM.

    name: how the program was called, for its help and hints.
    """
    if launched()[1] == 0:
        sys.exit(_run(argv, name))
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        status = _run(argv, name)  # rank 0 speaks for all
    sys.exit(status)


def _run(argv, name):
    """The exit status of the command line argv."""
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # of metadata in images
    warnings.filterwarnings("ignore", "Image size", RuntimeWarning)  # the limits are our own
    try:
        check_copy(Path.cwd())
        color = False if os.environ.get("NO_COLOR") else None  # None: on terminals alone
        status = program.main(argv, prog_name=name, standalone_mode=False, color=color)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help())
        return 0
    except click.ClickException as error:
        ctx = getattr(error, "ctx", None)
        return _fail(f"{error.format_message().rstrip('.')} (see {_path(ctx, name)} --help)")
    except UserError as error:
        return _fail(error)
    except ImportError as error:  # of a library that this command alone needs
        return _fail(missing(error))
    except (KeyboardInterrupt, click.Abort):
        _say("stopped")
        return 130
    except BrokenPipeError:
        return 1
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        return _fail(f"cannot read or write{where}: {error.strerror or error}")
    except MemoryError as error:
        return _fail(f"not enough memory ({error}): a smaller --batch-size may help")
    finally:
        _end_output()


def _path(ctx, name):
    return ctx.command_path if ctx else name


def _fail(message):
    _say(f"Error: {' '.join(str(message).split())}")
    return 2


def _say(text):
    with suppress(OSError):  # nobody may be reading
        print(text, file=sys.stderr)


def _end_output():
    """Empties standard output; where that fails, which has been said by then, the interpreter shall
    not try it again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
