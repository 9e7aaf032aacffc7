"""Runs one file of a student in a process of its own: inputs come in, arrays go out.

This file is copied beside the student's and needs NumPy alone. What a right answer would be is not
known here, neither are seeds; functions of other exercises are computed by the parent process.
"""

import errno
import json
import os
import struct
import sys
from contextlib import suppress
from functools import partial
from math import prod

import numpy as np

LARGEST = 1 << 17  # bytes of a message: the tests' arrays are far smaller
FRAMEWORKS = (
    *("miniconvit", "torch", "jax", "tensorflow", "autograd", "cupy", "mlx", "keras", "tinygrad"),
    *("subprocess", "_posixsubprocess", "socket", "_socket", "multiprocessing", "ctypes", "cffi"),
    "_ctypes",
)
SILENT = {
    *("pidfd_open", "mkfifo", "mknod", "pipe", "pipe2", "memfd_create", "eventfd", "openpty"),
    *("setpriority", "nice", "sched_setaffinity", "sched_setscheduler", "sched_setparam"),
    *("posix_fallocate", "copy_file_range", "splice", "sendfile", "sync", "fsync", "umask"),
    *("setsid", "setpgid", "unshare", "setns", "chroot", "timerfd_create"),
}
"""Functions of os that write, hold memory, or change priorities, without an audit event."""


class Broken(Exception):
    """The other side ended, or sent what is no message."""


class Failure(Exception):
    """The function called raised; the text says what."""


class Kept:
    """What a forward function kept, in the process that made it: here it is but a number."""

    def __init__(self, number):
        self.number = number


class Other:
    """A value that is no array, number, text, tuple or dict; `kind` says what it is."""

    def __init__(self, kind):
        self.kind = kind


class Wire:
    """Calls in both directions over two pipes, one at a time.

    Values travel as JSON, followed by the arrays' bytes; nothing is ever unpickled. functions(name)
    is what the other side may call; largest_number bounds the numbers it may send, so that it
    cannot ask for arrays larger than memory.
    """

    def __init__(self, read, write, functions, largest_number=None):
        self._read, self._write = read, write
        self._functions, self._largest, self._kept = functions, largest_number, []

    def call(self, name, *args, **kwargs):
        """What the other side's function returns; a cache comes back as Kept. Raises Failure."""
        self.send("call", name, args, kwargs)
        while True:
            kind, *content = self.receive()
            if kind == "return":
                return content[0]
            if kind == "error":
                raise Failure(_plain(content[0], 400))
            self._answer(*content)

    def serve(self):
        """Answers calls until the other side ends."""
        with suppress(Broken):
            while True:
                self.serve_one()

    def serve_one(self):
        """Answers one call."""
        self._answer(*self.receive()[1:])

    def _answer(self, name, args, kwargs):
        try:
            result = self._functions(name)(*args, **kwargs)
            if name.endswith("_forward"):
                if not isinstance(result, tuple | list) or len(result) != 2:
                    raise TypeError(f"{name} must return the pair (output, cache)")
                self._kept.append(result[1])
                result = result[0], Kept(len(self._kept) - 1)
            self.send("return", result)
        except Broken:
            raise
        except Exception as error:
            self.send("error", describe(error))

    def send(self, *message):
        """Writes ("return", value), ("error", text) or ("call", name, args, kwargs)."""
        arrays = []
        header = json.dumps(self._encode(message, arrays)).encode()
        size = len(header) + sum(a.nbytes for a in arrays)
        if size > LARGEST:
            raise ValueError(f"{size} bytes of results are far too many")
        parts = [struct.pack("<II", len(header), size), header, *(a.tobytes() for a in arrays)]
        try:
            self._write(b"".join(parts))
        except OSError as error:
            raise Broken from error

    def receive(self):
        """What the other side sent. Raises Broken."""
        header, size = struct.unpack("<II", self._read(8))
        if not header <= size <= LARGEST:
            raise Broken
        content = self._read(size)
        try:
            tree, *values = json.loads(content[:header])
            if len(values) != {"return": 1, "error": 1, "call": 3}[tree]:
                raise ValueError(f"not a message: {tree} with {len(values)} values")
            self._bytes, self._at, self._is_call = content, header, tree == "call"
            return tree, *map(self._decode, values)
        except Exception as error:  # these bytes are a student's: NumPy alone raises six kinds
            raise Broken from error

    def _encode(self, value, arrays):
        if isinstance(value, np.ndarray | np.generic):
            value = np.asarray(value)
            if value.dtype.kind not in "fiub":
                return {"other": f"an array of dtype {value.dtype}"}
            arrays.append(np.ascontiguousarray(value))
            return {"array": [value.dtype.str, list(value.shape)]}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, tuple | list):
            items = [self._encode(item, arrays) for item in value]
            return {"list": items} if isinstance(value, list) else items
        if isinstance(value, dict):
            return {"dict": [[str(k), self._encode(v, arrays)] for k, v in value.items()]}
        if isinstance(value, Kept):
            return {"kept": value.number}
        return {"other": f"a {type(value).__name__}"}

    def _decode(self, tree):
        if isinstance(tree, list):
            return tuple(self._decode(item) for item in tree)
        if not isinstance(tree, dict):
            is_bounded = self._is_call and self._largest and isinstance(tree, int | float)
            if is_bounded and not -self._largest <= tree <= self._largest:
                raise ValueError(f"the number {tree} is too large")
            return tree
        ((kind, content),) = tree.items()
        if kind == "array":
            return self._next_array(np.dtype(content[0]), content[1])
        if kind == "dict":
            return {str(key): self._decode(value) for key, value in content}
        if kind == "list":  # in a call all sequences are tuples, whose arrays are bounded
            return self._decode(content) if self._is_call else [*self._decode(content)]
        if kind == "kept":  # in a call a number of ours comes home, in an answer theirs arrives
            return self._kept[content] if self._is_call else Kept(int(content))
        return Other(_plain(content, 80))

    def _next_array(self, dtype, shape):
        if dtype.kind not in "fiub" or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError("not an array of numbers")
        if prod(max(n, 1) for n in shape) * dtype.itemsize > LARGEST:  # the sum of none is an array
            raise ValueError("an array too large, or axes of length 0 beside large ones")
        start, self._at = self._at, self._at + prod(shape) * dtype.itemsize
        array = np.frombuffer(self._bytes[start : self._at], dtype).reshape(shape)
        return array.astype(dtype.newbyteorder("="))


def _plain(value, length):
    """The beginning of what the other side says, as text that can be printed and saved."""
    return str(value)[:length].encode(errors="replace").decode()


MISSING = "there is no {}"


class Watched:
    """Functions by name that remember what they were given, to tell what they changed in it."""

    def __init__(self, namespace):
        self._namespace, self._given = namespace, []

    def __call__(self, name):
        """The function of this name, watched. Raises Failure."""
        if name == "changed_arguments":
            return self.changed
        wanted = "AdamW" if name == "adamw_steps" else name
        function = self._namespace.get(wanted)
        if not callable(function):
            raise Failure(MISSING.format(wanted))
        if name == "adamw_steps":
            function = partial(adamw_steps, function)

        def watched(*args):
            for i, argument in enumerate(args[:1] if name.endswith("_backward") else args):
                self._given += [(name, i, a, a.copy()) for a in arrays_in(argument)]
            try:
                return function(*args)
            except BaseException as error:  # SystemExit and its like too
                raise Failure(describe(error)) from error

        return watched

    def changed(self):
        """[(function, number of the argument), ...] of all arguments that changed since."""
        return sorted({(f, i) for f, i, a, before in self._given if not _same(a, before)})


def adamw_steps(AdamW, params, gradients, rates, settings):
    """Name to the parameter's values after each step, stacked: (steps, ...)."""
    params = {name: p.copy() for name, p in params.items()}
    optimizer = AdamW(params, **settings)
    trace = {name: [] for name in params}
    for grads, lr in zip(gradients, rates, strict=True):
        optimizer.step(params, grads, lr)
        for name, p in params.items():
            trace[name].append(p.copy())
    return {name: np.stack(values) for name, values in trace.items()}


def arrays_in(value):
    """The arrays in a value, whatever its nesting."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        return [array for item in value for array in arrays_in(item)]
    return [value] if isinstance(value, np.ndarray) else []


def _same(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


PRINTING = "it prints too much, and was stopped there: take the printing out"


def describe(error):
    """One line: the exception, and the last line of the student's file that it went through."""
    if isinstance(error, Failure):
        return str(error)
    text = f"{type(error).__name__}: {error}".splitlines()[0][:300].rstrip(": ")
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        text = PRINTING
    trace, where = error.__traceback__, ""
    while trace is not None:
        name = os.path.basename(trace.tb_frame.f_code.co_filename)
        if name not in ("runner.py", "kit.py", "confine.py") and os.path.exists(name):
            where = f" ({name}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return text + where


def _guard(folder):
    """An audit hook, which cannot be taken off: no file but those beside us and NumPy's own, for
    reading only; no process, network, foreign library or framework."""
    near = (folder, os.path.dirname(np.__file__))
    near += tuple(map(os.path.realpath, near))
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    families = ("os.", "subprocess.", "socket.", "ctypes.", "shutil.", "signal.", "resource.")
    families += ("pty.", "fcntl.", "mmap.", "syslog.", "tempfile.", "glob.", "pathlib.", "gc.get_")
    families += ("cpython.PyInterpreterState_New",)  # another interpreter would have no hook
    for name in FRAMEWORKS:
        sys.modules.pop(name, None)  # NumPy loads ctypes; what is loaded raises no event
    # What raises no event is taken away by name; the interpreter cannot make such modules anew
    for module in (os, sys.modules[os.name]):
        for name in SILENT & vars(module).keys():
            del vars(module)[name]
    del vars(sys.modules["_imp"])["create_builtin"]

    # What it needs are its defaults: a global, a builtin or a module's function could be replaced
    # by the student, and so could the methods of a subclass of str.
    def hook(
        event,
        args,
        writing=writing,
        families=families,
        frameworks=frozenset(FRAMEWORKS),
        roots=tuple(path + os.sep for path in near),
        separator=os.sep,
        kind=type,
        text=str,
        begins=str.startswith,
        partition=str.partition,
        error=PermissionError,
    ):
        subject = args[0] if args else None
        path = args[1] if event == "import" else subject  # of a compiled module
        inside = kind(path) is text and ".." not in path
        if inside and (begins(path, ("/", "\\")) or ":" in path):
            inside = begins(path + separator, roots)
        if event == "open":
            refused = not inside or (args[2] or 0) & writing
        elif event == "os.listdir" or event == "os.scandir":
            refused = not inside
        elif event == "import":
            refused = kind(subject) is not text or partition(subject, ".")[0] in frameworks
            refused = refused or not (path is None or inside)
        else:
            refused = begins(event, families)
        if refused:
            what = subject if kind(subject) is text else ""
            raise error(f"not allowed while being graded: {event} {what}")

    sys.addaudithook(hook)


def _pipes():
    """Exact reads from, and writes to, the parent; prints go where errors go."""
    incoming, outgoing = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)

    def read(size):
        data = incoming.read(size)
        if len(data) < size:
            raise Broken
        return data

    def write(data):
        outgoing.write(data)
        outgoing.flush()

    return read, write


def main(name, allowed, modules, *limits):
    """Loads name.py, then answers the parent's calls.

    The functions of the other exercises are right ones, which the parent computes; so are those in
    `allowed` that stand in the same file, whatever the student has written there.
    """
    folder = os.getcwd()
    sys.path.insert(0, folder)
    from confine import confine

    for module in (*modules, "numpy.linalg", "numpy.random", "inspect", "traceback", "gc"):
        __import__(module)  # later, nothing outside the folder can be read
    kit = sys.modules["kit"]
    read, write = _pipes()

    def right(other):
        if not other.endswith(("_forward", "_backward")):
            raise AttributeError(other)
        return lambda *args, **kwargs: wire.call(other, *args, **kwargs)

    kit.__getattr__ = right
    confine(*limits)
    _guard(folder)
    try:
        student = vars(__import__(name))
        student.update({other: right(other) for other in allowed if other in student})
        watched, problem = Watched(student), None
    except BaseException as error:
        problem = describe(error)

    def functions(function):
        if problem is not None:
            raise Failure(problem)
        return watched(function)

    wire = Wire(read, write, functions)
    wire.serve()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2].split(), sys.argv[3].split(), *map(int, sys.argv[4:8]))
