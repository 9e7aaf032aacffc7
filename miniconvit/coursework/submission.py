"""A student's submission: found, read with care, looked through, packed."""

import ast
import hashlib
import json
import zipfile
from pathlib import Path, PureWindowsPath

from .. import __version__
from ..errors import UserError
from .runner import WHITELIST
from .skeleton import unfinished

LARGEST = 200_000  # bytes of one file
MANIFEST = "manifest.json"
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__", "open", "breakpoint", "input"}
HARMLESS = {"__init__", "__name__", "__doc__", "__call__", "__len__"}


def read_submission(path, exercises, skeleton=""):
    """(name to text, name to problem, remark) of the exercises in a folder or zip file.

    Links are not followed, nothing is unpacked to disk, and a file that is missing, too long,
    no text, or that imports what it may not, is a problem: a sentence.
    """
    texts, problems, remark = {}, {}, ""
    try:
        path = Path(path)
        files = _files_of_zip(_archive(path)) if _archive(path) else _files_of_folder(path)
        for exercise in exercises:
            try:
                text = _read(files, exercise.file)
                problem = source_problem(text)
            except UserError as error:
                problem = str(error)
            if problem:
                problems[exercise.name] = f"{exercise.file} {problem}"
            else:
                texts[exercise.name] = text
        if not any(exercise.file in files for exercise in exercises):
            remark = f"the submission holds none of the files, such as {exercises[0].file}"
        if MANIFEST in files and skeleton and _edition(files) != skeleton:
            remark = "this submission was packed from another edition of the coursework"
    except UserError as error:
        remark = f"the submission {error}"
        problems = {exercise.name: remark for exercise in exercises}
    return texts, problems, remark


def _archive(path):
    """The zip file that a submission is, or that is all a folder holds, as Moodle puts it; or
    None."""
    if not path.is_dir():
        return path
    inside = [p for p in path.iterdir() if not p.name.startswith(".")]
    alone = len(inside) == 1 and inside[0].is_file() and not inside[0].is_symlink()
    return inside[0] if alone and inside[0].suffix.lower() == ".zip" else None


def _files_of_folder(path):
    """{file name: function that gives its first bytes}; of equal names the least deep."""
    paths = [p for p in Path(path).rglob("*") if p.is_file() and not p.is_symlink()]
    paths.sort(key=lambda p: (-len(p.parts), p))

    def reader(path):
        def read():
            with path.open("rb") as file:
                return file.read(LARGEST + 1)

        return read

    return {p.name: reader(p) for p in paths}


def _files_of_zip(path):
    """The same of a zip file. Raises UserError where it is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [i.filename for i in archive.infolist() if not i.is_dir()]
    except Exception as error:  # zipfile's kinds of errors are many, and differ by version
        raise UserError(f"is no readable zip file: {error}") from error
    names = [name for name in names if not name.startswith("__MACOSX")]
    names.sort(key=lambda name: (-name.count("/"), name))

    def reader(name):
        def read():
            with zipfile.ZipFile(path) as archive, archive.open(name) as file:
                return file.read(LARGEST + 1)

        return read

    return {PureWindowsPath(name).name: reader(name) for name in names}  # takes / and \\


def _read(files, name):
    if name not in files:
        raise UserError("is missing")
    try:
        data = files[name]()
    except Exception as error:  # as above
        raise UserError(f"cannot be read: {error}") from error
    if len(data) > LARGEST:
        raise UserError(f"is longer than {LARGEST} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"is no UTF-8 text: {error}") from error


def _edition(files):
    try:
        return json.loads(_read(files, MANIFEST))["skeleton"]
    except (UserError, ValueError, LookupError, TypeError, RecursionError):
        return ""


def source_problem(text):
    """Why a text is not run, or "": syntax, imports beyond the white list, names that open doors.

    A help for the honest, no wall: what holds is the process that the text runs in.
    """
    try:
        tree = ast.parse(text)
        nodes = list(ast.walk(tree))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"is no valid Python: {error}"
    for node in nodes:
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = ["." * node.level + (node.module or "")]
        for module in modules:
            if module.partition(".")[0] not in WHITELIST:
                return (
                    f"imports {module} in line {node.lineno}: allowed are {', '.join(WHITELIST)}; "
                    "other exercises come through kit"
                )
        name = getattr(node, "id", None) or getattr(node, "attr", None) or ""
        dunder = isinstance(node, ast.Attribute) and name.startswith("__") and name not in HARMLESS
        if dunder or (isinstance(node, ast.Name) and name in FORBIDDEN_NAMES):
            return f"uses {name} in line {node.lineno}, which no exercise needs"
    return ""


def pack(folder, assignment, out=None):
    """Writes submission.zip: the exercises' files alone, and a manifest. Returns its path.

    Raises UserError where a file is missing, broken, or still has blanks.
    """
    texts, problems, _ = read_submission(folder, assignment.exercises)
    complaints = list(problems.values())
    for exercise in assignment.exercises:
        if exercise.name in texts and (blanks := unfinished(texts[exercise.name], exercise)):
            complaints.append(f"{exercise.file} still lacks {', '.join(blanks)}")
    if complaints:
        raise UserError(f"nothing was packed: {'; '.join(complaints)}")
    files = {exercise.file: texts[exercise.name] for exercise in assignment.exercises}
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()}
    manifest = {"version": __version__, "skeleton": assignment.skeleton, "files": hashes}
    out = Path(out or Path(folder) / "submission.zip")
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in (files | {MANIFEST: json.dumps(manifest, indent=2)}).items():
            archive.writestr(name, text)
    return out
