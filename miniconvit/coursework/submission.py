"""A student's submission: found, read with care, chosen among copies, packed."""

import ast
import hashlib
import json
import re
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .. import __version__
from ..errors import UserError
from ..system import parse_json
from .files import OTHER_ARCHIVES, bounded, files_of, shown
from .sandbox import look_through
from .skeleton import skeleton
from .source import functions_of

MANIFEST = "manifest.json"
EXACT, ALIKE, CONTAINED, OTHER = range(4)


@dataclass(frozen=True)
class Copy:
    """One file of a submission. functions: name to whether it is blank; None where unknown."""

    parts: tuple[str, ...]
    text: str = ""
    problem: str = ""
    functions: dict[str, bool] | None = None

    @property
    def path(self):
        return shown(self.parts)

    def lacks(self, exercise):
        """The names of the exercise that are missing from it, or still blank."""
        return [name for name in exercise.functions if (self.functions or {}).get(name, True)]

    def is_blank(self, exercise):
        """Whether it is the blank, or nothing at all: no work."""
        if self.functions is None:
            return False
        names = {name for name, is_blank in self.functions.items() if not is_blank}
        return names <= _given(exercise)  # a misspelt function is work

    def serves(self, exercise, exercises):
        """Whether it is a file of the exercise: by its name, or by the functions in it."""
        likeness = like(self.parts[-1], exercise)
        if likeness <= ALIKE:
            return True
        if any(like(self.parts[-1], other) <= ALIKE for other in exercises):
            return False
        if self.functions is None:
            return likeness == CONTAINED
        return not self.functions.keys().isdisjoint(exercise.functions)

    def rank(self, exercise):
        """Sorts copies, the one to take first: work before blanks, then the name, then the place.

        The same for folders and zip files.
        """
        lacks = self.lacks(exercise)
        if self.is_blank(exercise):
            state = 2
        else:
            state = int(bool(self.problem) or len(lacks) == len(exercise.functions))
        likeness = like(self.parts[-1], exercise)
        return state, len(lacks), likeness, len(self.parts), self.parts


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
    copies, chosen, problems = _copies(found.files), {}, {}
    for exercise in exercises:
        mine = [copy for copy in copies if copy.serves(exercise, exercises)]
        if mine:
            chosen[exercise] = sorted(mine, key=lambda copy: copy.rank(exercise))
        else:
            problems[exercise.name] = f"{exercise.file} is missing{_advice(exercise, found)}"
    texts = {exercise.name: mine[0].text for exercise, mine in chosen.items()}
    for exercise, (copy, *_) in chosen.items():
        if copy.problem:
            problems[exercise.name] = f"{copy.path} {copy.problem}"
            del texts[exercise.name]
    remarks = _choices(chosen)
    if not chosen:
        none = f"the submission holds none of the files, such as {exercises[0].file}"
        remarks.append(none + _advice(exercises[0], found))
    elif problems:
        remarks += found.remarks
    if editions and skeleton and editions[0] != skeleton:
        remarks.append("this submission was packed from another edition of the coursework")
    return texts, problems, "; ".join(remarks)


def read_work(folder, exercises):
    """(name to text, name to problem) of the files at the top of a student's own folder."""
    copies = _own_copies(folder, exercises)
    problems = {
        name: f"{copy.path} {copy.problem}" for name, copy in copies.items() if copy.problem
    }
    return {name: c.text for name, c in copies.items() if not c.problem}, problems


def _own_copies(folder, exercises):
    """Name to the Copy of the exercise's file at the top of a folder."""
    files = {}
    for exercise in exercises:
        path = Path(folder) / exercise.file
        try:
            with path.open("rb") as file:
                files[exercise.file,] = bounded(file)
        except FileNotFoundError:
            others = sorted(
                other.name
                for other in Path(folder).glob("*")
                if _is_misnamed(other.name, exercise) and other.is_file()
            )
            advice = f": {shown(others[:1])} is there, rename it to {exercise.file}"
            files[exercise.file,] = "is missing" + advice * bool(others)
        except OSError as error:
            files[exercise.file,] = f"cannot be read: {error.strerror}"
    copies = {copy.path: copy for copy in _copies(files)}
    return {exercise.name: copies[exercise.file] for exercise in exercises}


def _is_wanted(name, exercises):
    low = name.casefold()
    is_text = low.endswith(".txt") and any(like(name, e) < OTHER for e in exercises)
    return low.endswith((".py", ".pyw")) or is_text or name == MANIFEST


def _copies(files):
    """The Copy of every file, which is bytes, or the reason why there are none."""
    sources = {parts: data for parts, data in files.items() if isinstance(data, bytes)}
    reasons = {parts: reason for parts, reason in files.items() if isinstance(reason, str)}
    described = zip(sources, look_through([*sources.values()]), strict=True)
    read = [Copy(parts, **fields) for parts, fields in described]
    return read + [Copy(parts, problem=reason) for parts, reason in reasons.items()]


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
    if one.is_blank(exercise):
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
    renamed = [path for name, path in names if _is_misnamed(name, exercise)]
    if renamed:
        return f": {renamed[0]} is there, rename it to {exercise.file}"
    if alike:
        return f": {alike[0]} is no Python file with {exercise.functions[0]} in it"
    if archives:
        return f": {archives[0]} cannot be opened here; hand in a zip file"
    return f": {found.remarks[0]}" if found.remarks else ""


def _is_misnamed(name, exercise):
    """Whether a name is the exercise's but for its ending: linear, linear.pyi, linear.py.bak."""
    ending = r"(\.py([iw]|[^a-z].*)?)?"
    wrong = re.fullmatch(re.escape(exercise.name) + ending, name.casefold())
    return bool(wrong) and name != exercise.file


def _edition(data):
    try:
        return parse_json(data)["skeleton"]
    except (ValueError, KeyError):
        return ""


def pack(folder, assignment, out=None):
    """Writes submission.zip: the exercises' files alone, and a manifest. Returns its path.

    Raises UserError where a file is missing, broken, or still has blanks.
    """
    complaints, files = [], {}
    copies = _own_copies(folder, assignment.exercises)
    for exercise in assignment.exercises:
        copy = copies[exercise.name]
        files[exercise.file] = copy.text
        if copy.problem:
            complaints.append(f"{exercise.file} {copy.problem}")
        elif lacking := copy.lacks(exercise):
            complaints.append(f"{exercise.file} still lacks {', '.join(lacking)}")
    if complaints:
        raise UserError(f"nothing was packed: {'; '.join(complaints)}")
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()}
    manifest = {"version": __version__, "skeleton": assignment.skeleton, "files": hashes}
    out = Path(out or Path(folder) / "submission.zip")
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in (files | {MANIFEST: json.dumps(manifest, indent=2)}).items():
            archive.writestr(name, text)
    return out
