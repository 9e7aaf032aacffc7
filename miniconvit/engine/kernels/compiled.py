"""Loops that Numba compiles to machine code: once on a machine, then they are read from a cache."""

import os
import sys
import tempfile
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

import numba
import numpy as np

CACHE_LINE = 64  # bytes
FAST = {"contract", "reassoc", "nsz", "arcp", "afn"}  # what is not finite stays so
_TEMPORARY = []  # a folder for compiled loops, which goes with the process


def empty(shape, dtype=np.float32):
    """An empty array at the start of a cache line. All large ones that the loops take are such."""
    size, line = int(np.prod(shape)), CACHE_LINE // np.dtype(dtype).itemsize
    whole = np.empty(size + line, dtype)
    start = -whole.__array_interface__["data"][0] // whole.itemsize % line
    return whole[start : start + size].reshape(shape)


def is_float32(x):
    """Whether it is such an array of NumPy."""
    return isinstance(x, np.ndarray) and x.dtype == np.float32


def plain(x):
    """x, or a copy where it is not what loops take: float32, contiguous, and not read-only."""
    return x if is_float32(x) and x.flags.carray else np.require(x, np.float32, "CAW")


def inlined(function):
    """A function for other loops to call."""
    return numba.njit(fastmath=FAST, error_model="numpy")(function)


def loop(signature):
    """Compiles a function that works on arrays of these types, which allocates nothing."""
    return numba.njit(signature, fastmath=FAST, error_model="numpy", nogil=True, cache=True)


@contextmanager
def cached(*modules):
    """While it lasts, what is compiled is kept where the next process finds it, beside nothing of
    another version of these files: in a folder in NUMBA_CACHE_DIR, or else in the user's cache.

    modules: those with loops that are imported in it. Whoever waits for them at a terminal is told.
    """
    before = numba.config.CACHE_DIR
    folder = Path(_folder(before))
    numba.config.CACHE_DIR = str(folder)
    kept = all(any(folder.rglob(f"{module}.*.nbc")) for module in modules)
    if not kept and sys.stderr and sys.stderr.isatty():
        print("compiling the kernels for this processor, once", file=sys.stderr)
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before


def _folder(given=""):
    """A folder for this version of the loops, a temporary one where none can be written."""
    digest = sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    with suppress(OSError, RuntimeError):  # RuntimeError: there is no home folder
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        parent = Path(given or f"{home}/miniconvit").expanduser()
        folder = parent / f"numba-{digest.hexdigest()[:16]}"
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        return folder
    _TEMPORARY.append(tempfile.TemporaryDirectory(prefix="miniconvit-"))
    return _TEMPORARY[-1].name
