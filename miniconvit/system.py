"""What the operating system gives: cores, files that are written whole or not at all, and small
files that are read with suspicion."""

import json
import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from math import ceil, isfinite
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info

from .errors import UserError

NUMBA = "0.68"
"""The version of Numba whose compiled loops are tested. Another one may compute otherwise."""

MOST_TEXT_BYTES = 2**22  # as JSON of empty lists this takes thirty times as much memory
MOST_JSON_DEPTH = 20

LAUNCHERS = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "mpirun"),
    ("PMI_SIZE", "PMI_RANK", "mpirun"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "srun"),
)
"""Variables that say how many processes a launcher has started, and which of them this one is."""


def available_threads(cgroup="/sys/fs/cgroup"):
    """How many cores this process may use: its affinity, and a container's quota rounded up."""
    return limited(len(available_cores()), cgroup)


def available_cores(untie=False):
    """The numbers of the cores that this process may use: its affinity. untie: first takes back
    what its launcher has tied it to, as far as the system allows."""
    if not hasattr(os, "sched_getaffinity"):
        return set(range(os.cpu_count()))
    if untie:
        with suppress(OSError):
            os.sched_setaffinity(0, range(os.cpu_count()))
    return os.sched_getaffinity(0)


def limited(count, cgroup="/sys/fs/cgroup"):
    """A number of cores, or a container's quota, rounded up, where that is less."""
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # v2, v1
        with suppress(OSError, ValueError):  # not this version, or no limit: the word "max"
            words = " ".join(Path(cgroup, file).read_text() for file in files).split()
            quota, period = (int(word) for word in words)
            if quota > 0:  # else no limit: -1
                count = min(count, max(1, ceil(quota / period)))
    return count


def launched():
    """(how many processes a launcher has started, which of them this is, the launcher's name);
    (1, 0, None) where there was none."""
    for size, rank, launcher in LAUNCHERS:
        if os.environ.get(size, "").isdecimal() and int(os.environ[size]) > 1:
            return int(os.environ[size]), int(os.environ.get(rank, 0)), launcher
    return 1, 0, None


def numpy_blas():
    """What threadpoolctl knows of the BLAS under NumPy, or {}. SciPy may have another one."""
    libraries = [library for library in threadpool_info() if library["user_api"] == "blas"]
    own = str(Path(np.__file__).parent)  # numpy/.dylibs, or numpy.libs beside it
    return min(libraries, key=lambda one: not one["filepath"].startswith(own), default={})


def numba_version():
    """The version of Numba where it is the one that the kernels are tested with, else None."""
    try:
        found = version("numba")
    except PackageNotFoundError:
        return None
    return found if found.startswith(f"{NUMBA}.") else None


def arithmetic():
    """What the last digits of a training hang on: {"numpy": version, ..., "blas", "cpu"}. Numba
    counts where it compiles the kernels, else it is None."""
    blas = numpy_blas()
    names = (blas.get(key) for key in ("internal_api", "version", "architecture"))
    cpu = ""
    with suppress(OSError), open("/proc/cpuinfo") as file:
        models = (line.partition(":")[2].strip() for line in file if line.startswith("model name"))
        cpu = next(models, "")
    return {
        "numpy": version("numpy"),
        "scipy": version("scipy"),
        "numba": numba_version(),
        "blas": " ".join(filter(None, names)),
        "cpu": cpu or platform.processor(),
    }


def write_file(path, content):
    """Replaces the file at path by these bytes: at any moment it is the old file or the new one.

    Raises UserError where the disk or the folder refuses; the old file stays.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise UserError(cannot_write(path, error)) from error


def read_text(path: str | Path, advice: str) -> str | None:
    """The text of a small file, or None where there is none.

    Raises UserError, which names the file and ends with the advice, where it cannot be read.
    """
    path = Path(path)
    try:
        if not path.exists():
            return None
        if not path.is_file():  # a pipe would be waited for
            raise ValueError("it is no file")
        with open(path, "rb") as file:
            return _decoded(file.read(MOST_TEXT_BYTES + 1))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({reason}): {advice}") from error


def read_json(path: str | Path, advice: str, kind: type = dict) -> Any:
    """What the JSON in a file describes, or None where there is no file. Raises UserError as
    read_text, and as parse_json does for what is not of this kind."""
    text = read_text(path, advice)
    try:
        return None if text is None else parse_json(text, kind)
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}): {advice}") from error


def parse_json(text: str | bytes, kind: type = dict) -> Any:
    """What a JSON text describes: a value of this kind, most often an object.

    Raises ValueError with the reason for what none of our programs writes: text that is too long or
    nested too deeply, a key that comes twice, and numbers that are not finite or need over 64 bits.
    """
    try:
        value = json.loads(
            _decoded(text),
            object_pairs_hook=_without_twins,
            parse_float=_as_float,
            parse_int=_as_int,
            parse_constant=_as_float,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, kind):
        raise ValueError("it holds no JSON object")
    _check_parts(value)
    return value


def _decoded(text):
    """Bytes, or a text of them, as a text."""
    if len(text) > MOST_TEXT_BYTES:
        raise ValueError(f"it has more than {MOST_TEXT_BYTES:,} bytes")
    return text.decode() if isinstance(text, bytes) else text


def _without_twins(pairs):
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key comes twice")
    return values


def _as_float(text):
    if not isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is not finite")
    return value


def _as_int(text):
    if len(text) > 20 or abs(value := int(text)) >= 2**63:
        raise ValueError(f"{text[:20]}... is no integer of 64 bits")
    return value


def _check_parts(value):
    """Raises ValueError where a part is too deep, or a text could be no name of a file."""
    parts = [value]
    for _ in range(MOST_JSON_DEPTH):
        inner = []
        for part in parts:
            if isinstance(part, dict):
                inner += [*part, *part.values()]
            elif isinstance(part, list):
                inner += part
            elif isinstance(part, str) and b"\0" in part.encode(errors="surrogateescape"):
                raise ValueError("a text holds a zero byte")
        parts = inner
    if parts:
        raise ValueError("it is nested too deeply")


def cannot_write(path, error):
    """The sentence for an OSError on writing the file at path."""
    return (
        f"cannot write {path}: {error.strerror or error}; make room or choose another folder "
        "(what was saved before is untouched)"
    )


def _sync_folder(folder):
    """Makes a rename in the folder outlast a power failure, where the system can do that."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
