"""A student's own folder: its files are read, shown and packed. It needs Python alone."""

import hashlib
import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap

from ..errors import UserError, printable

MANIFEST = "manifest.json"
LARGEST = 200_000  # bytes of one file
COLUMNS = 80


@dataclass(frozen=True)
class Copy:
    """One file. runs: its text without what never runs, of which remark speaks. problem: why it is
    not run. functions: name to whether it is blank; None where unknown."""

    parts: tuple[str, ...]
    text: str = ""
    runs: str = ""
    remark: str = ""
    problem: str = ""
    functions: dict[str, bool] | None = None

    @property
    def path(self):
        return shown(self.parts)

    def lacks(self, exercise):
        """The names of the exercise that are missing from it, or still blank."""
        return [name for name in exercise.functions if (self.functions or {}).get(name, True)]


def copies_of(files, look):
    """The Copy of every file, which is bytes, or the reason why there are none. look(list of bytes)
    says what `source.describe_source` says of each."""
    sources = {parts: data for parts, data in files.items() if isinstance(data, bytes)}
    reasons = {parts: reason for parts, reason in files.items() if isinstance(reason, str)}
    described = zip(sources, look([*sources.values()]), strict=True)
    read = [Copy(parts, **fields) for parts, fields in described]
    return read + [Copy(parts, problem=reason) for parts, reason in reasons.items()]


def own_copies(folder, exercises, look):
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
                if is_misnamed(other.name, exercise) and other.is_file()
            )
            advice = f": {shown(others[:1])} is there, rename it to {exercise.file}"
            files[exercise.file,] = "is missing" + advice * bool(others)
        except OSError as error:
            files[exercise.file,] = f"cannot be read: {error.strerror}"
    copies = {copy.path: copy for copy in copies_of(files, look)}
    return {exercise.name: copies[exercise.file] for exercise in exercises}


def pack(folder, exercises, edition, look, out=None, partial=False):
    """Writes submission.zip: the exercises' files alone, and a manifest. edition: what the manifest
    says of where they come from. partial: what is missing, broken or blank may be so, and is named.

    Returns its path and the sentences on what is not whole. Raises UserError where that is not
    allowed, and where nothing is written yet.
    """
    copies = own_copies(folder, exercises, look)
    lacking = {e: copies[e.name].lacks(e) for e in exercises}
    complaints = []
    for exercise, names in lacking.items():
        problem = copies[exercise.name].problem
        if problem or names:
            complaints.append(f"{exercise.file} {problem or 'still lacks ' + ', '.join(names)}")
    if complaints and not partial:
        advice = "pack --partial hands in what there is"
        raise UserError(f"nothing was packed: {'; '.join(complaints)} ({advice})")
    if all(len(names) == len(e.functions) for e, names in lacking.items()):
        raise UserError("nothing was packed, for nothing is written yet")
    files = {e.file: copies[e.name].text for e in exercises if copies[e.name].text}
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()}
    manifest = json.dumps(edition | {"files": hashes, "incomplete": complaints}, indent=2)
    out = Path(out or Path(folder) / "submission.zip")
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in (files | {MANIFEST: manifest}).items():
            archive.writestr(name, text)
    return out, complaints


def packed(path, complaints):
    """The lines on what `pack` did."""
    return "\n".join([f"packed {path}", *_below(complaints)])


def row(name, score, points, text):
    """The lines on one exercise or student, within 80 columns; the text stands below where it does
    not fit beside the score."""
    head, lines = f"{name:20}{score:7g} /{points:4}   ", text.splitlines() or [""]
    if len(lines) == 1 and len(head + text) <= COLUMNS:
        return printable(head + text).rstrip()
    return "\n".join([printable(head).rstrip(), *_below(lines)])


def _below(lines):
    """The lines indented, and broken at 80 columns."""
    return [f"    {part}" for line in lines for part in wrap(printable(line), COLUMNS - 4)]


def shown(parts):
    """A path as sentences name it."""
    return printable("/".join(parts))[-80:]


def bounded(file):
    """The bytes of a file, or the reason why they are too many."""
    data = file.read(LARGEST + 1)
    return data if len(data) <= LARGEST else f"is longer than {LARGEST} bytes"


def is_misnamed(name, exercise):
    """Whether a name is the exercise's but for its ending: linear, linear.pyi, linear.py.bak."""
    ending = r"(\.py([iw]|[^a-z].*)?)?"
    wrong = re.fullmatch(re.escape(exercise.name) + ending, name.casefold())
    return bool(wrong) and name != exercise.file
