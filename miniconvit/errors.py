"""The one kind of error that a user is meant to read, and what its sentences are made of.

This file alone must also run where nothing else does: on an old Python, without any library.
"""

import os
import sys
from difflib import get_close_matches

PROGRAMS = {"miniconvit", "miniconvit.exe", "cli.py", "-m"}  # as Python calls them while they begin


class UserError(ValueError):
    """A sentence for the user: what was expected, what was found, what to do.

    The command line prints it on standard error and exits with status 2, without a traceback.
    """


def unknown_name(kind, name, names):
    """The sentence about a name that is none of `names`, such as "unknown layer 'gpas' ..."."""
    return f"unknown {kind} {name!r}{did_you_mean(name, names)}: choose one of {', '.join(names)}"


def did_you_mean(name, names):
    """The hint " (did you mean gpsa?)" for "gpas", or "" where none of `names` is close."""
    close = get_close_matches(str(name), list(names), n=1, cutoff=0.7)  # cpu is not meant by gpu
    return f" (did you mean {close[0]}?)" if close else ""


def printable(text: object) -> str:
    """The text without characters that a terminal would obey, or that are none."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def shortened(text: object, width: int) -> str:
    """The printable text in at most so many characters, with dots in the middle of a longer one."""
    text = printable(text)
    if len(text) <= width:
        return text
    kept = width - 3
    return f"{text[: kept - kept // 2]}...{text[len(text) - kept // 2 :]}"


def missing(error):
    """The sentence about a library that an ImportError was raised for."""
    name = (error.name or "a library").partition(".")[0]
    finding = " ".join(str(error).split())[:200].rstrip(" .")
    advice = f"pip install --force-reinstall {name}"
    if name == "miniconvit":
        advice = "install it again"
    return f"{name} is missing, or only a part of it is installed ({finding}): {advice}"


def unusable(sentence):
    """What to raise where Python or a library does not serve: an ImportError with the sentence or,
    where a command begins, its exit once the sentence is printed."""
    if os.path.basename(sys.argv[0]) in PROGRAMS:
        print(f"Error: {sentence}", file=sys.stderr)
        return SystemExit(2)
    return ImportError(sentence)
