"""A student's submission: found, read with care, chosen among copies, packed."""

import ast
import re
from functools import cache
from pathlib import Path

from .. import __version__
from ..errors import UserError
from ..system import parse_json
from . import work
from .files import OTHER_ARCHIVES, files_of
from .sandbox import look_through
from .skeleton import skeleton
from .source import functions_of
from .work import MANIFEST, copies_of, is_misnamed, own_copies, shown

EXACT, ALIKE, CONTAINED, OTHER = range(4)


def is_blank(copy, exercise):
    """Whether a Copy is the blank, or nothing at all: no work."""
    if copy.functions is None:
        return False
    names = {name for name, is_blank in copy.functions.items() if not is_blank}
    return names <= _given(exercise)  # a misspelt function is work


def _serves(copy, exercise, exercises):
    """Whether a Copy is a file of the exercise: by its name, or by the functions in it."""
    likeness = like(copy.parts[-1], exercise)
    if likeness <= ALIKE:
        return True
    if any(like(copy.parts[-1], other) <= ALIKE for other in exercises):
        return False
    if copy.functions is None:
        return likeness == CONTAINED
    return not copy.functions.keys().isdisjoint(exercise.functions)


def _rank(copy, exercise):
    """Sorts copies, the one to take first: work before blanks, then the name, then the place.

    The same for folders and zip files.
    """
    lacks = copy.lacks(exercise)
    if is_blank(copy, exercise):
        state = 2
    else:
        state = int(bool(copy.problem) or len(lacks) == len(exercise.functions))
    likeness = like(copy.parts[-1], exercise)
    return state, len(lacks), likeness, len(copy.parts), copy.parts


@cache
def _given(exercise):
    """The names of the functions that an exercise's blank has already."""
    functions = functions_of(ast.parse(skeleton(exercise)))
    return frozenset(name for name, is_blank in functions.items() if not is_blank)


def like(name, exercise):
    """How much a file's name is the exercise's: linear.py, Linear (1).PY, my_linear.py, mine.py."""
    if name == exercise.file:
        return EXACT
    letters, wanted = (re.sub("[^a-z]", "", text) for text in (stem(name), exercise.name))
    return ALIKE if letters == wanted else CONTAINED if wanted in letters else OTHER


def stem(name):
    """A file's name in small letters without its ending, and what was put behind that."""
    return re.sub(r"\.(pyw?|txt|ipynb)\b.*", "", name.casefold())


def read_submission(path, exercises, skeleton=""):
    """(name to text, name to problem, remark) of the exercises in a folder or zip file.

    Links are not followed, nothing is unpacked beside the rest, and a file that is missing, too
    long, no text, or that imports what it may not, is a problem: a sentence. The remark says
    which of several copies was taken, and what was taken under another name.
    """
    try:
        found = files_of(Path(path), lambda name: _is_wanted(name, exercises))
    except UserError as error:
        remark = f"the submission {error}"
        return {}, {exercise.name: remark for exercise in exercises}, remark
    manifests = sorted((parts for parts in found.files if parts[-1] == MANIFEST), key=len)
    editions = [_edition(found.files.pop(parts)) for parts in manifests]
    copies, chosen, problems = copies_of(found.files, look_through), {}, {}
    for exercise in exercises:
        mine = [copy for copy in copies if _serves(copy, exercise, exercises)]
        if mine:
            chosen[exercise] = sorted(mine, key=lambda copy: _rank(copy, exercise))
        else:
            problems[exercise.name] = f"{exercise.file} is missing{_advice(exercise, found)}"
    texts = {exercise.name: mine[0].runs for exercise, mine in chosen.items()}
    for exercise, (copy, *_) in chosen.items():
        if copy.problem:
            problems[exercise.name] = f"{copy.path} {copy.problem}"
            del texts[exercise.name]
    remarks = _choices(chosen)
    remarks += [f"{mine[0].path}: {mine[0].remark}" for mine in chosen.values() if mine[0].remark]
    if not chosen:
        none = f"the submission holds none of the files, such as {exercises[0].file}"
        remarks.append(none + _advice(exercises[0], found))
    elif problems:
        remarks += found.remarks
    if editions and skeleton and editions[0] != skeleton:
        remarks.append("this submission was packed from another edition of the coursework")
    return texts, problems, "; ".join(remarks)


def read_work(folder, exercises):
    """Name to the Copy of the file at the top of a student's own folder."""
    return own_copies(folder, exercises, look_through)


def _is_wanted(name, exercises):
    low = name.casefold()
    is_text = low.endswith(".txt") and any(like(name, e) < OTHER for e in exercises)
    return low.endswith((".py", ".pyw")) or is_text or name == MANIFEST


def _choices(chosen):
    """Sentences on what was taken under another name, and on which of several copies."""
    remarks, groups = [], {}
    for exercise, (copy, *rest) in chosen.items():
        names = {one.parts[-1] for one in (copy, *rest)}
        if rest and names == {exercise.file}:  # the same folders for many files: one sentence
            places = [
                f"the one in {shown(one.parts[:-1]) or 'the top folder'}" for one in (copy, *rest)
            ]
        else:
            places = [one.path for one in (copy, *rest)]
        others = [
            place + _why_not(one, copy, exercise)
            for place, one in zip(places[1:], rest, strict=True)
        ]
        if rest:
            listing = ", ".join(others[:3]) + (f" and {len(others) - 3} more" * (len(others) > 3))
            groups.setdefault(f"{places[0]} was graded, not {listing}", []).append(exercise.file)
        elif names != {exercise.file}:
            remarks.append(f"{copy.path} was taken for {exercise.file}")
    return remarks + [f"{', '.join(files)}: {sentence}" for sentence, files in groups.items()]


def _why_not(one, copy, exercise):
    if is_blank(one, exercise):
        return " (blank)"
    if one.problem:
        return " (cannot be used)"
    return " (the same)" if one.text == copy.text else ""


def _advice(exercise, found):
    """What to hand in instead, where a file is missing but something else is there."""
    names = [(parts[-1], shown(parts)) for parts in (*found.others, *found.files)]
    notebooks = [(name, path) for name, path in names if name.casefold().endswith(".ipynb")]
    notebooks.sort(key=lambda both: like(both[0], exercise))
    alike = [path for name, path in names if like(name, exercise) < OTHER]
    archives = [path for name, path in names if name.casefold().endswith(OTHER_ARCHIVES)]
    if notebooks:
        return (
            f": {notebooks[0][1]} is a notebook, which is not graded; export it as a Python script "
            f"and hand that in as {exercise.file}"
        )
    renamed = [path for name, path in names if is_misnamed(name, exercise)]
    if renamed:
        return f": {renamed[0]} is there, rename it to {exercise.file}"
    if alike:
        return f": {alike[0]} is no Python file with {exercise.functions[0]} in it"
    if archives:
        return f": {archives[0]} cannot be opened here; hand in a zip file"
    return f": {found.remarks[0]}" if found.remarks else ""


def _edition(data):
    try:
        return parse_json(data)["skeleton"]
    except (ValueError, KeyError):
        return ""


def pack(folder, assignment, out=None, partial=False):
    """(path, sentences on what is not whole): what `work.pack` makes of an Assignment's files."""
    edition = {"version": __version__, "skeleton": assignment.skeleton}
    return work.pack(folder, assignment.exercises, edition, look_through, out, partial)
