"""What the operating system gives: cores, and files that are written whole or not at all."""

import os
import platform
from contextlib import suppress
from importlib.metadata import version
from math import ceil
from pathlib import Path

from threadpoolctl import threadpool_info

from .errors import UserError


def available_threads(cgroup="/sys/fs/cgroup"):
    """Cores that this process may use: its affinity, and a container's quota rounded up."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # v2, v1
        with suppress(OSError, ValueError):  # not this version, or no limit: the word "max"
            words = " ".join(Path(cgroup, file).read_text() for file in files).split()
            quota, period = (int(word) for word in words)
            if quota > 0:  # else no limit: -1
                count = min(count, max(1, ceil(quota / period)))
    return count


def arithmetic():
    """What the last digits of a training hang on: {"numpy": version, ..., "blas", "cpu"}."""
    libraries = (library for library in threadpool_info() if library["user_api"] == "blas")
    blas = next(libraries, {})
    names = (blas.get(key) for key in ("internal_api", "version", "architecture"))
    cpu = ""
    with suppress(OSError), open("/proc/cpuinfo") as file:
        models = (line.partition(":")[2].strip() for line in file if line.startswith("model name"))
        cpu = next(models, "")
    return {
        "numpy": version("numpy"),
        "scipy": version("scipy"),
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
