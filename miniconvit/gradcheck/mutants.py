"""Mutants: wrong versions of our own backward passes, each with one plausible bug planted.

Whoever checks gradients, with our checker or another, can run it on these and count what it
catches. The bugs are those that students and real projects make; many are right at initial values,
for one image, one head or a square grid, and so slip through a check that looks only there.
They stand in mutants.toml and neighbours.toml. `python -m miniconvit.gradcheck.mutants` prints them
as docs/mutants.md.
"""

import inspect
import sys
import tomllib
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby

from .. import layers, model, neighbours


@dataclass(frozen=True)
class Mutant:
    """One bug as a change of text: `before`, which occurs once, becomes `after`.

    function: the public function that goes wrong, of miniconvit.layers or neighbours, or
    convit_backward.
    story: the bug in one line, as one would say it to a student.
    helper: the function of the same module that holds the text, where it is not `function`.
    """

    name: str
    function: str
    before: str
    after: str
    story: str
    helper: str = ""


def _load(file):
    """A catalogue: the file has a list of bugs under each function."""
    text = files(__package__).joinpath(file).read_text(encoding="utf-8")
    catalogue = tomllib.loads(text).items()
    return tuple(Mutant(function=function, **bug) for function, bugs in catalogue for bug in bugs)


MUTANTS = _load("mutants.toml")
NEIGHBOUR_MUTANTS = _load("neighbours.toml")


def mutate(mutant):
    """The mutant's function with the bug in it, of the same signature; the original stays as it is.

    The whole module is compiled anew, so that the function sees a changed helper. To run the mutant
    inside a composite or the model, use planted(**{mutant.function: mutate(mutant)}).
    Raises ValueError where `before` does not occur exactly once.
    """
    home = next(home for home in (layers, model, neighbours) if hasattr(home, mutant.function))
    module = sys.modules[getattr(home, mutant.function).__module__]
    text = inspect.getsource(getattr(module, mutant.helper or mutant.function))
    if text.count(mutant.before) != 1:
        raise ValueError(
            f"mutant {mutant.name}: its text must occur once in the source of "
            f"{mutant.helper or mutant.function}, but occurs {text.count(mutant.before)} times"
        )
    wrong_text = text.replace(mutant.before, mutant.after)
    source = inspect.getsource(module).replace(text, wrong_text)
    namespace = {"__name__": module.__name__, "__package__": module.__package__}
    exec(compile(source, f"<mutant {mutant.name}>", "exec"), namespace)
    return namespace[mutant.function]


@contextmanager
def planted(**functions):
    """Within it, the layers and the model call these functions instead of their own.

    Each takes the place of its name in every module that calls it: a bug, a counter, a clock. For
    one thread at a time, because all threads see it. Raises ValueError for an unknown name.
    """
    lesson = (layers.__name__, model.__name__)
    modules = [vars(module) for name, module in sys.modules.items() if name.startswith(lesson)]
    places = [(module, name) for name in functions for module in modules if name in module]
    unknown = functions.keys() - {name for _, name in places}
    if unknown:
        raise ValueError(f"the lesson calls no {', '.join(sorted(unknown))}")
    originals = [module[name] for module, name in places]
    try:
        for module, name in places:
            module[name] = functions[name]
        yield
    finally:
        for (module, name), original in zip(places, originals, strict=True):
            module[name] = original


def page():
    """The catalogue as Markdown: docs/mutants.md."""
    lines = [
        "# The bugs that the gradient checker is tested on",
        "",
        "A checker that has never failed proves nothing. So we planted bugs in our own backward "
        f"passes, {len(MUTANTS)} of them, one at a time. A reader of the layers wrote them without "
        "seeing the checker. You can watch it catch every one, with the tensor that gives it away, "
        "whatever the `--seed`:",
        "",
        "```sh",
        "miniconvit gradcheck --mutants",
        "```",
        "",
        "What each bug changes stands in "
        "[`mutants.toml`](../miniconvit/gradcheck/mutants.toml). You can plant one yourself with "
        "`miniconvit.gradcheck.mutants.mutate`. If you add a bug there, print this page anew:",
        "",
        "```sh",
        "python -m miniconvit.gradcheck.mutants > docs/mutants.md",
        "```",
        "",
        "The catalogue is ours, and our checker was improved until it caught all of it. So "
        '"all caught" says less of us than it seems. It says more where somebody else\'s checker '
        "meets it: [how others fare](results/checkers.md), and what you can learn from each miss.",
    ]
    lines += _listed(MUTANTS)
    lines += [
        "",
        "# The bugs in the neighbours",
        "",
        f"{len(NEIGHBOUR_MUTANTS)} more are planted in [the papers beside ConViT](neighbours.md). "
        "They stand in [`neighbours.toml`](../miniconvit/gradcheck/neighbours.toml):",
        "",
        "```sh",
        "miniconvit gradcheck --part neighbours --mutants",
        "```",
        *_listed(NEIGHBOUR_MUTANTS),
    ]
    return "\n".join(lines)


def _listed(catalogue):
    for function, mutants in groupby(catalogue, lambda mutant: mutant.function):
        yield from ("", f"## `{function}`", "")
        yield from (f"- `{mutant.name}`: {mutant.story}" for mutant in mutants)


if __name__ == "__main__":
    print(page())
