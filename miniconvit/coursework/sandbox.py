"""A student's process seen from outside: started, asked, cut off in time, and cleared away."""

import json
import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from math import prod
from pathlib import Path

import numpy as np

from .. import layers
from ..errors import UserError
from . import confine, runner, source
from .runner import Broken, Failure, Wire
from .skeleton import kit_source
from .task import map_arrays

LARGEST_NUMBER = 16  # in a student's call of a right function: grids, heads, patch sizes
LARGEST_ARRAY = 1 << 16  # entries of whatever such a call computes
MOST_KEPT = 1 << 25  # bytes of what all calls of one process keep for their backward passes


@dataclass(frozen=True)
class Limits:
    """Of one student process: seconds of the clock, bytes of memory, bytes printed."""

    seconds: float = 30.0
    memory: int = 2 << 30
    output: int = 1 << 20


LIMITS = Limits()
FORGED = "the process wrote something into the pipe of the results"


class Bounded(np.ndarray):
    """An array in the hands of a right function, computing nothing of more than LARGEST_ARRAY
    entries: a column times a row, sent by a student, could fill the grader's memory."""

    __module__ = "numpy"  # by which backend.array_module knows it

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        shapes = [np.shape(value) for value in inputs]
        cells = 1
        if ufunc is np.matmul:
            cells = _size((*shapes[0][-2:-1], *shapes[1][-1:]))
            shapes = [shape[:-2] for shape in shapes]
        axes = zip_longest(*(shape[::-1] for shape in shapes), fillvalue=1)
        if cells * _size(map(max, axes)) > LARGEST_ARRAY:
            raise Failure(f"what this computes has more than {LARGEST_ARRAY} entries")
        if "out" in kwargs:
            kwargs["out"] = tuple(_plain(array) for array in kwargs["out"])
        result = getattr(ufunc, method)(*map(_plain, inputs), **kwargs)
        return result.view(Bounded) if isinstance(result, np.ndarray) else result


def _size(shape):
    """Entries of an array, or of what its sum over axes of length 0 would have."""
    return prod(max(n, 1) for n in shape)


def _weight(value):
    """About the bytes that a value holds in memory: whole arrays behind views, dicts, tuples."""
    if isinstance(value, dict):
        return 200 + sum(100 + len(key) + _weight(item) for key, item in value.items())
    if isinstance(value, tuple | list):
        return 100 + sum(map(_weight, value))
    weight = 200
    while isinstance(value, np.ndarray):
        weight, value = max(weight, 200 + value.nbytes), value.base
    return weight


def _plain(value):
    return value.view(np.ndarray) if isinstance(value, Bounded) else value


class Sandbox:
    """One process with one file of a student in it, and a temporary folder around it.

    with Sandbox(text, name, allowed, limits) as sandbox: sandbox.call("x_forward", ...)
    allowed: names of the right functions that the file may call. keeper: who can end it early.
    """

    def __init__(self, text, name, allowed, limits=LIMITS, keeper=None):
        self._text, self._name, self._allowed, self._limits = text, name, allowed, limits
        self._keeper = keeper or Keeper()
        self.printed, self._kept = "", 0

    def __enter__(self):
        self._folder = Path(tempfile.mkdtemp(prefix="coursework-"))
        self._folder.chmod(0o755)  # nobody may read it, and only read it
        (self._folder / f"{self._name}.py").write_text(self._text, encoding="utf-8")
        (self._folder / "kit.py").write_text(kit_source(), encoding="utf-8")
        for module in (runner, confine):
            shutil.copy(module.__file__, self._folder)
        self._log = tempfile.TemporaryFile()
        limits = self._limits
        numbers = (os.getpid(), int(limits.seconds) + 1, limits.memory, limits.output)
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-I", "-B", "-u", "runner.py", self._name),
                *(" ".join(sorted(self._allowed)), " ".join(source.WHITELIST)),
                *map(str, numbers),
            ],
            cwd=self._folder,
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
        )
        self._keeper.add(self._process)
        self._deadline = time.monotonic() + limits.seconds
        self._clock = threading.Timer(limits.seconds, _kill, [self._process])
        self._clock.start()
        self._wire = Wire(self._read, self._write, self._function, LARGEST_NUMBER)
        return self

    def __exit__(self, *_):
        self._clock.cancel()
        _kill(self._process)
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                pipe.close()
        self._process.wait()
        self._keeper.discard(self._process)
        self._log.seek(0)
        self.printed = self._log.read(4000).decode(errors="replace")
        self._log.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def call(self, name, *args):
        """What the student's function returns. Raises Failure where it raises, and Broken, with a
        sentence, where the process is gone."""
        try:
            answer = self._wire.call(name, *args)
        except Broken as error:
            raise Broken(self._epitaph()) from error
        if name.endswith("_forward") and not (isinstance(answer, tuple) and len(answer) == 2):
            raise Broken(FORGED)
        return answer

    def _function(self, name):
        if name not in self._allowed:
            raise Failure(f"{name} may not be called here")
        return lambda *args, **kwargs: self._compute(getattr(layers, name), args, kwargs)

    def _compute(self, function, args, kwargs):
        """What a right function makes of a student's arguments, with bounds on its memory."""
        args, kwargs = map_arrays(lambda a: a.view(Bounded), (args, kwargs))
        result = function(*args, **kwargs)
        self._kept += _weight(result)
        if self._kept > MOST_KEPT:
            raise Failure("the functions of other exercises were called too often")
        return result

    def _read(self, size):
        data, pipe = b"", self._process.stdout.fileno()
        while len(data) < size:
            left = self._deadline - time.monotonic()
            if os.name == "posix" and not select.select([pipe], [], [], max(left, 0))[0]:
                raise Broken
            chunk = os.read(pipe, size - len(data))
            if not chunk or left < 0:
                raise Broken
            data += chunk
        return data

    def _write(self, data):
        self._process.stdin.write(data)
        self._process.stdin.flush()

    def _epitaph(self):
        """Why there is no answer, in a sentence."""
        if time.monotonic() >= self._deadline:
            return f"stopped after {self._limits.seconds:g} seconds: is there an endless loop?"
        try:
            status = self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return FORGED
        if status < 0:
            return f"the process was killed by {_signal_name(-status)}"
        return f"the process ended by itself, with status {status}"


def _kill(process):
    """Ends a process and all of its session."""
    with suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def _signal_name(number):
    try:
        return signal.Signals(number).name
    except ValueError:  # most real-time signals have none
        return f"signal {number}"


class Keeper:
    """The processes that run for one grading: `stop` ends them, and each that begins later."""

    def __init__(self):
        self._lock, self._running, self._is_stopped = threading.Lock(), set(), False

    def add(self, process):
        with self._lock:
            self._running.add(process)
            if self._is_stopped:
                _kill(process)

    def discard(self, process):
        with self._lock:
            self._running.discard(process)

    def stop(self):
        with self._lock:
            self._is_stopped = True
            for process in self._running:
                _kill(process)


SOURCE_LIMITS = Limits(seconds=20.0, memory=1 << 30)
MOST_DEATHS = 4  # of processes that look through one submission


def walls():
    """A sentence on how student code is walled in on this machine."""
    numbers = (os.getpid(), 10, 1 << 30, LIMITS.output)
    command = [sys.executable, "-I", "-B", confine.__file__, *map(str, numbers)]
    answer = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    user = "nobody" if answer["nobody"] else "you"
    filtered = "filtered" if answer["filter"] else "not filtered (no libseccomp)"
    return f"student code runs as {user}, its system calls are {filtered}"


def require_open_folder():
    """Raises UserError where nobody, as whom root runs students, cannot reach their folders."""
    folder = Path(tempfile.gettempdir()).resolve()
    if os.name != "posix" or os.getuid() != 0:
        return
    for path in (folder, *folder.parents):
        if not path.stat().st_mode & 0o001:
            raise UserError(
                f"{path} is closed to others, so student code, which runs as nobody in {folder}, "
                "could not be read: set TMPDIR to an open folder, such as /tmp"
            )


def look_through(files):
    """What `describe_source` says of each of these files' bytes, from a limited process that runs
    none of them."""
    described, deaths = [], 0
    while len(described) < len(files):
        if deaths < MOST_DEATHS:
            described += _described(files[len(described) :])
        if len(described) < len(files):  # the process died of this one
            deaths += 1
            problem = "is no valid Python: it takes too much memory or time to be read"
            described.append({"problem": problem})
    return described


def _described(files):
    """What a process says of these files before it ends."""
    limits = SOURCE_LIMITS
    numbers = (os.getpid(), int(limits.seconds), limits.memory, limits.output)
    command = [sys.executable, "-I", "-B", source.__file__, *map(str, numbers)]
    sent = b"".join(struct.pack("<I", len(data)) + data for data in files)
    try:
        answer = subprocess.run(
            command,
            input=sent,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment(),
            timeout=limits.seconds,
        ).stdout
    except subprocess.TimeoutExpired as error:
        answer = error.stdout or b""
    lines = answer.split(b"\n")[:-1]  # what is cut off is no line
    return [json.loads(line) for line in lines]


def _environment():
    """Nothing of ours but what a Python process needs to start; NumPy on one thread."""
    names = ("LD_LIBRARY_PATH", "SYSTEMROOT")
    threads = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    return {n: os.environ[n] for n in names if n in os.environ} | dict.fromkeys(threads, "1")
