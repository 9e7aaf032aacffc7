"""The one kind of error that a user is meant to read, and what its sentences are made of."""

from difflib import get_close_matches


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
