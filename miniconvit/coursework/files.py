"""What a submission holds: files in folders, in zip files, and in zip files within these.

Nothing is followed, unpacked beside the rest, or read without bounds.
"""

import os
import stat
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath

from ..errors import UserError
from .work import bounded, shown

LARGEST_LISTING = 4 << 20  # bytes of a zip file's list of files
LARGEST_INNER = 64 << 20  # bytes of a zip file in a zip file
MOST_FILES = 50_000
MOST_BYTES = 8 << 20  # of all files that are read
MOST_ARCHIVES, DEEPEST_ARCHIVE, DEEPEST_FOLDER = 20, 3, 50
ELSEWHERE = {"__macosx", "__pycache__", "venv", "env", "site-packages", "node_modules", "@eadir"}
OTHER_ARCHIVES = (".7z", ".rar", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".zipx")
BEGINNINGS = {
    b"Rar!": "a RAR archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"\x1f\x8b": "a gzip archive",
    b"%PDF": "a PDF",
}


@dataclass
class Found:
    """Parts of paths, such as ("hw.zip", "linear.py"), to bytes, or to why there are none.

    others: paths that were not read. remarks: sentences on what could not be looked into.
    """

    files: dict[tuple[str, ...], bytes | str] = field(default_factory=dict)
    others: list[tuple[str, ...]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    count: int = 0
    size: int = 0
    archives: int = 0

    def remark(self, sentence):
        if sentence not in self.remarks:
            self.remarks.append(sentence)


def files_of(path, wanted):
    """The Found of a folder or zip file; wanted(name) says which files are read.

    Raises UserError where it is neither.
    """
    found = Found()
    if Path(path).is_dir():
        _walk_folder(path, (), wanted, found)
    else:
        with open_regular(path) as file:
            _walk_zip(file, (), wanted, found)
    return found


def open_regular(path):
    """The file at the path, opened for reading its bytes.

    Raises UserError for links, pipes and devices, and for a file with a second name, which may be
    one of the grader's own.
    """
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        if path.is_symlink():
            raise UserError("is a link, which may lead anywhere")
        file = os.fdopen(os.open(path, flags), "rb")
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}") from error
    status = os.fstat(file.fileno())
    if stat.S_ISREG(status.st_mode) and status.st_nlink <= 1:
        return file
    file.close()
    if stat.S_ISREG(status.st_mode):
        raise UserError("is a hard link, a second name of some file: hand in a copy")
    raise UserError("is no file, but a pipe, a socket or a device")


def _walk_folder(folder, parts, wanted, found):
    try:
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
    except OSError as error:
        found.remark(f"{shown(parts)} cannot be read: {error.strerror}")
        return
    for entry in entries:
        below = (*parts, entry.name)
        if entry.is_dir(follow_symlinks=False) and len(below) < DEEPEST_FOLDER:
            if not _is_elsewhere(below, found):
                _walk_folder(entry.path, below, wanted, found)
        else:
            _take(below, lambda path=Path(entry.path): open_regular(path), wanted, found)


def _walk_zip(file, parts, wanted, found):
    """Raises UserError where the file is no zip file."""
    entries = {}
    try:
        archive = zipfile.ZipFile(_Frugal(file))
        for info in archive.infolist():
            path = PureWindowsPath(info.filename)  # takes / and \
            if not info.filename.endswith(("/", "\\")):
                entries[tuple(part for part in path.parts if part not in ("..", path.anchor))] = (
                    info
                )
    except UserError:
        raise
    except Exception as error:  # zipfile's kinds of errors are many, and differ by version
        file.seek(0)
        begin = file.read(4)
        kinds = [kind for start, kind in BEGINNINGS.items() if begin.startswith(start)]
        reason = (
            f"is {kinds[0]}: hand in a zip file" if kinds else f"is no readable zip file: {error}"
        )
        raise UserError(reason) from error
    for path, info in sorted(entries.items()):
        below = (*parts, *path)
        if not any(_is_elsewhere(below[:i], found) for i in range(len(parts) + 1, len(below))):
            _take(below, lambda info=info: _open_entry(archive, info), wanted, found)


def _open_entry(archive, info):
    if info.flag_bits & 1:
        raise UserError("is encrypted: zip it without a password")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError("is packed by another method than deflate: zip it the ordinary way")
    if stat.S_ISLNK(info.external_attr >> 16):
        raise UserError("is a link, which may lead anywhere")
    return archive.open(info)


def _is_elsewhere(parts, found):
    """Whether a folder is none of the student's own: hidden, an environment, a system's."""
    name = parts[-1]
    if not name.startswith(".") and name.casefold() not in ELSEWHERE:
        return False
    if name.casefold() not in ("__macosx", "__pycache__"):
        found.remark(f"{shown(parts)} was not looked into")
    return True


def _take(parts, opened, wanted, found):
    """Enters one file: its bytes, or what is in it, or only its name."""
    name = parts[-1]
    found.count += 1
    if name.startswith(".") or found.count > MOST_FILES:
        if found.count > MOST_FILES:
            found.remark(f"only {MOST_FILES} files were looked at")
        return
    is_zip = name.casefold().endswith(".zip")
    if not is_zip and not wanted(name):
        found.others.append(parts)
        return
    try:
        with opened() as file:
            if is_zip:
                _open_inner(file, parts, wanted, found)
                return
            data = bounded(file)
    except Exception as error:  # as above, of whatever zipfile or the system finds
        reason = str(error) if isinstance(error, UserError) else f"cannot be read: {error}"
        if is_zip:
            found.remark(f"{shown(parts)} {reason}")
        else:
            found.files[parts] = reason
        return
    found.size += len(data)
    if found.size > MOST_BYTES:
        found.others.append(parts)
        found.remark(f"only {MOST_BYTES} bytes of Python files were read")
    else:
        found.files[parts] = data


def _open_inner(file, parts, wanted, found):
    found.archives += 1
    if found.archives > MOST_ARCHIVES:
        raise UserError("is one zip file too many to look into")
    if sum(part.casefold().endswith(".zip") for part in parts) > DEEPEST_ARCHIVE:
        raise UserError("is a zip file too deep in others to look into")
    if not isinstance(file, zipfile.ZipExtFile):
        _walk_zip(file, parts, wanted, found)
        return
    with tempfile.TemporaryFile() as copy:
        _copy(file, copy)
        _walk_zip(copy, parts, wanted, found)


def _copy(file, copy):
    """A zip file is read from its end, which a compressed one does not offer."""
    while chunk := file.read(1 << 16):
        copy.write(chunk)
        if copy.tell() > LARGEST_INNER:
            raise UserError(f"is longer than {LARGEST_INNER} bytes")


class _Frugal:
    """A file that zipfile may read in small pieces only: a list of files as long as memory would
    be read at once otherwise."""

    def __init__(self, file):
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable
        self.close = file.close

    def read(self, size=-1):
        data = self._file.read(LARGEST_LISTING + 1 if size < 0 else min(size, LARGEST_LISTING + 1))
        if len(data) > LARGEST_LISTING:
            raise UserError("has too long a list of files: hand in the exercises' files alone")
        return data
