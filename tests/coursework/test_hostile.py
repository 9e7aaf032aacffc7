"""Hostile submissions: each gets a score and a sentence, and the grader goes on.

They are put straight into the process, past the source check, which would refuse most of them.
"""

import inspect
import io
import os
import zipfile

import numpy as np
import pytest

import miniconvit
from miniconvit.coursework import exercises
from miniconvit.coursework.cases import VISIBLE, map_arrays
from miniconvit.coursework.grading import Assignment, grade_exercise
from miniconvit.coursework.runner import Wire
from miniconvit.coursework.sandbox import FORGED, Bounded, Limits, Sandbox
from miniconvit.coursework.skeleton import solution
from miniconvit.coursework.submission import read_submission

(GELU,) = exercises(["gelu"])
(SOFTMAX,) = exercises(["softmax"])
(MHSA,) = exercises(["mhsa"])
REFERENCE_FILE = inspect.getsourcefile(miniconvit)
LIMITS = Limits(seconds=20.0, memory=1 << 29, output=100_000)
POSIX = pytest.mark.skipif(os.name != "posix", reason="limits and signals of POSIX systems")


def gelu(body):
    """A file whose gelu_forward has this body, or a whole text as it is."""
    if body.startswith("#"):
        return body
    return "def gelu_forward(x):\n    " + body.replace("\n", "\n    ") + "\n"


def run(body, exercise=GELU, limits=LIMITS):
    """The Result of a whole text, or of a file whose gelu_forward has this body."""
    assignment = Assignment((exercise,), "secret", VISIBLE[:1], limits=limits)
    return grade_exercise(gelu(body), exercise, assignment)


FATAL = {
    "raises": ("raise ValueError('no')", "ValueError: no (gelu.py, line 2)"),
    "raises what cannot be printed": (
        "class Mute(Exception):\n    def __str__(self): return 1 / 0\nraise Mute",
        "ZeroDivisionError",
    ),
    "sys.exit": ("import sys; sys.exit(0)", "SystemExit: 0"),
    "os._exit": ("import os; os._exit(0)", "the process ended by itself, with status 0"),
    "crashes": ("import os; os.abort()", "SIGABRT"),
    "recursion": ("return gelu_forward(x)", "RecursionError"),
    "memory hog": (
        "import numpy as np\nhog = []\nwhile True: hog.append(np.ones(1 << 22))",
        "MemoryError",
    ),
    "one huge array": ("import numpy as np; return np.ones((1 << 26, 2)), x", "MemoryError"),
    "a large result": ("import numpy as np; return np.ones(1 << 20), x", "far too many"),
    "prints gigabytes": ("while True: print('x' * 10000)", "gelu: it prints too much"),
    "writes results": ("open('results.json', 'w')", "PermissionError: not allowed while being gr"),
    "reads the parent's folder": ("import os; os.listdir('..')", "PermissionError: not allowed"),
    "reads the parent's memory": (
        "import os; open(f'/proc/{os.getppid()}/environ', 'rb')",
        "PermissionError: not allowed",
    ),
    "kills the grader": ("import os; os.kill(os.getppid(), 9)", "PermissionError: not allowed"),
    "forks": ("import os; os.fork()", "PermissionError: not allowed while being graded: os.fork"),
    "starts a program": ("import os; os.system('sleep 60')", "PermissionError: not allowed"),
    "starts a process": ("import subprocess; subprocess.run('sleep 60')", "PermissionError"),
    "opens a socket": ("import socket", "PermissionError: not allowed"),
    "imports a framework": ("__import__('tor' + 'ch')", "PermissionError: not allowed"),
    "imports the reference": ("import miniconvit", "PermissionError: not allowed"),
    "reads the reference": ("open(REFERENCE_FILE)", "PermissionError: not allowed"),
    "raises its limits": (
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
        "PermissionError",
    ),
    "calls C": ("import ctypes; ctypes.CDLL(None).getpid()", "PermissionError: not allowed"),
    "patches what the hook might call": (
        "import builtins, os\nos.fsdecode = os.path.realpath = lambda path: 'kit.py'\n"
        "builtins.any = lambda values: True\nopen('/etc/passwd')",
        "PermissionError: not allowed while being graded: open /etc/passwd",
    ),
    "opens below the surface": (
        "import os, posixpath\nposixpath._joinrealpath = lambda *a: (os.getcwd(), True)\n"
        "os.open('/etc/passwd', os.O_RDONLY)",
        "PermissionError: not allowed while being graded: open /etc/passwd",
    ),
    "climbs out of the folder": (
        "open('../../etc/passwd')",
        "PermissionError: not allowed while being graded: open ../../etc/passwd",
    ),
    "looks for the hook": ("import gc; gc.get_objects()", "not allowed while being graded: gc.get"),
    "takes the hook out of a frame": (
        "try: open('/etc/passwd')\nexcept PermissionError as error:\n"
        "    trace = error.__traceback__\n    while trace.tb_next: trace = trace.tb_next\n"
        "    for value in trace.tb_frame.f_locals.values():\n"
        "        for cell in getattr(value, '__closure__', None) or ():\n"
        "            if type(cell.cell_contents) is tuple: cell.cell_contents = ('',)\n"
        "            if cell.cell_contents == os.sep: cell.cell_contents = ''\n"
        "import os; open('/etc/passwd')",
        "PermissionError: not allowed while being graded: open /etc/passwd",
    ),
    "a text that lies about itself": (
        "class Name(str):\n    def partition(self, _): return ('math',)\n__import__(Name('torch'))",
        "PermissionError: not allowed while being graded: import",
    ),
    "what NumPy has loaded": ("import _ctypes", "not allowed while being graded: import _ctypes"),
    "a compiled module from elsewhere": (
        "import sys; Loader = type(sys.modules['numpy._core._multiarray_umath'].__loader__)\n"
        "from importlib.machinery import ModuleSpec\n"
        "path = '/usr/lib/foo.so'\n"
        "Loader('a.b', path).create_module(ModuleSpec('a.b', None, origin=path))",
        "PermissionError: not allowed while being graded: import a.b",
    ),
    "a signal by descriptor": (
        "import posix, _signal; _signal.pidfd_send_signal(posix.pidfd_open(1), 0)",
        "AttributeError",
    ),
    "no pair": ("return x", "gelu_forward must return the pair (output, cache)"),
    "no file": ("# nothing", "gelu: there is no gelu_forward"),
    "does not parse": ("# a syntax error\ndef gelu_forward(:", "SyntaxError"),
    "fails on import": ("# raises\n1 / 0", "ZeroDivisionError: division by zero (gelu.py, line 2)"),
    "monkeypatches NumPy": (
        "import numpy as np\nnp.max = np.abs = np.ndarray.tobytes = lambda *a, **k: 0",
        "cannot set",
    ),
}


@POSIX
@pytest.mark.parametrize("name", FATAL)
def test_fatal(name):
    body, sentence = FATAL[name]
    result = run(body.replace("REFERENCE_FILE", repr(REFERENCE_FILE)))
    assert sentence in result.text
    assert result.score == 0
    assert len(result.rows) == 3


@POSIX
@pytest.mark.parametrize(
    "text",
    [
        "# a loop in a function\ndef gelu_forward(x):\n    while True: pass",
        "# a loop on import\nwhile True: pass",
        "# deaf\ndef gelu_forward(x):\n    import time\n    while True:\n"
        "        try: time.sleep(9)\n        except BaseException: pass",
    ],
    ids=["in a function", "on import", "catches everything"],
)
def test_endless_loops_are_cut_off(text):
    result = run(text, limits=Limits(seconds=1.5))
    assert "stopped after 1.5 seconds: is there an endless loop?" in result.text
    assert result.score == 0


VALUES = {
    "a text": ("'rubbish'", "is of type str, not an array"),
    "a list": ("[1.0, 2.0]", "is of type list, not an array"),
    "a tuple": ("(1.0, 2.0)", "is of type tuple, not an array"),
    "objects": ("np.array([x, None], dtype=object)", "is an array of dtype object"),
    "a class": ("np.ndarray", "is a type, not an array"),
    "complex": ("x + 0j", "is an array of dtype complex128"),
    "text array": ("np.array(['a'])", "is an array of dtype <U1"),
    "not a number": ("x * np.nan", "not finite in"),
    "a number": ("float('nan')", "shape () instead of"),
    "nothing": ("None", "missing"),
    "too deep": ("deep", "RecursionError"),
}


def returning(value):
    return (
        "# values\nimport numpy as np\ndeep = []\nfor _ in range(5000): deep = [deep]\n"
        f"def gelu_forward(x): return {value}, x\ndef gelu_backward(dy, x): return {value}"
    )


@pytest.mark.parametrize("name", VALUES)
def test_wrong_values(name):
    value, sentence = VALUES[name]
    result = run(returning(value))
    assert sentence in result.text
    assert result.score == 0


RUBBISH = {
    "bytes": "b'x' * 100",
    "a header that promises too much": "b'\\xff' * 8",
    "no JSON": "struct.pack('<II', 4, 4) + b'{{{{'",
    "an unknown kind": "message({'pickle': 'x'})",
    "an array without its bytes": "message({'array': ['<f8', [9]]})",
    "an array of objects": "message({'array': ['O', [1]]})",
    "a negative shape": "message({'array': ['<f8', [-1]]})",
    "a tree too deep": "struct.pack('<II', 90000, 90000) + b'[' * 90000",
    "a call of another function": "message('x')",
    "no content": "raw(b'[\"return\"]')",
    "a call without content": "raw(b'[\"call\"]')",
    "a call of too much": 'raw(b\'["call", "x", [], {"dict": []}, 1]\')',
    "an unknown message": "raw(b'[\"?\", 1]')",
    "a dict of kinds": "raw(b'{\"return\": 1}')",
    "a number that is no index": 'raw(b\'["return", {"kept": Infinity}]\')',
    "a dtype that NumPy parses as code": "message({'array': ['(1,f8', [1]]})",
}


def sending(rubbish):
    """A file that writes into the pipe of the results itself."""
    return (
        "# rubbish\nimport json, os, struct\n"
        "def message(value):\n"
        "    return raw(json.dumps(['return', value]).encode())\n"
        "def raw(header):\n"
        "    return struct.pack('<II', len(header), len(header)) + header\n"
        "def gelu_forward(x):\n"
        "    for fd in range(3, 20):\n"
        f"        try: os.write(fd, {rubbish})\n"
        "        except OSError: pass\n"
        "    while True: pass\n"
    )


@POSIX
@pytest.mark.parametrize("name", RUBBISH)
def test_rubbish_in_the_pipe(name):
    result = run(sending(RUBBISH[name]), limits=Limits(seconds=2.0))
    assert result.score == 0
    assert result.text


@POSIX
def test_an_error_that_cannot_be_printed():
    """Half a surrogate pair, and a text without end, as the student's side may send them."""
    result = run("from runner import Failure; raise Failure(chr(0xD800) + 'x' * 100_000)")
    assert result.text.encode()
    assert len(result.text) < 500


def test_an_integer_without_end():
    (exercise,) = exercises(["cross_entropy"])
    text = (
        "# long\ndef cross_entropy_forward(*_): return 10**400, 0\n"
        "def cross_entropy_backward(dy, cache): return 10**400\n"
    )
    result = run(text, exercise)
    assert "cross_entropy, loss: is an integer beyond 64 bits" in result.text
    assert result.score == 0


def test_forged_answers_do_not_help():
    """Right shapes, wrong numbers, and a patched runner: the comparison happens elsewhere."""
    text = (
        "# forged\nimport sys\nimport numpy as np\n"
        "main = sys.modules['__main__']\nmain._same = lambda a, b: True\n"
        "main.Watched.changed = lambda self: []\nnp.allclose = lambda *a, **k: True\n"
        "def gelu_forward(x):\n    x[...] = 0.0\n    return x, x\n"
        "def gelu_backward(dy, cache): return dy\n"
    )
    result = run(text)
    assert result.score == 0
    assert "gelu, y: error" in result.text


@POSIX
@pytest.mark.skipif(os.name == "posix" and os.getuid() != 0, reason="only root can become nobody")
def test_root_runs_students_as_nobody():
    result = run("import os; raise ValueError(f'{os.getuid()}, {os.getgid()}, {os.getgroups()}')")
    assert "ValueError: 65534, 65534, []" in result.text


@POSIX
def test_no_process_without_the_audit_hook_either():
    """The limit on processes and threads, by a call that raises no audit event."""
    result = run("import threading; threading.Thread(target=print).start()")
    assert "RuntimeError: can't start new thread" in result.text


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "for the grader alone")
    result = run("import os; raise ValueError(sorted(os.environ))")
    assert "ValueError" in result.text
    assert "MY_TOKEN" not in result.text


def test_the_folder_holds_the_one_file():
    result = run("import os; raise ValueError(sorted(os.listdir('.')))")
    assert "ValueError: ['confine.py', 'gelu.py', 'kit.py', 'runner.py']" in result.text


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run("raise ValueError(1)").score == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        ("kit.attention_forward(q, k, v)", "attention_forward may not be called here"),
        ("kit.gelu_forward(q)", "gelu_forward may not be called here"),
        ("kit.softmax_forward(q @ 1)", "ValueError: matmul"),
        ("kit.softmax_forward(None)", "AttributeError"),
        ("kit.softmax_forward(np.ones(1 << 20))", "far too many"),
        ("kit.softmax_backward(q, 10**9)", FORGED),
    ],
)
def test_right_functions_are_asked_with_care(call, sentence):
    """What students may call of the reference, and what it makes of rubbish."""
    text = (
        "# right functions\nimport kit\nimport numpy as np\n"
        f"def attention_forward(q, k, v): return {call}\n"
    )
    result = run(text, MHSA)
    assert sentence in result.text


def test_right_functions_do_not_fill_the_memory(monkeypatch):
    """A column times a row; and small results, kept again and again."""
    column = "np.ones((1, 1, 300, 1))"
    start = (
        "# memory\nimport numpy as np\n"
        "def attention_forward(*_): return 0, 0\n"
        "def mhsa_forward(x, params, heads):\n    "
    )
    attend = f"attention_forward({column}, {column}, {column})"
    assert "has more than 65536 entries" in run(start + attend, MHSA).text
    monkeypatch.setattr("miniconvit.coursework.sandbox.MOST_KEPT", 1 << 20)
    attend = "while True: " + attend.replace("300", "20")
    assert "other exercises were called too often" in run(start + attend, MHSA).text


def test_a_pair_is_judged_with_right_functions_of_its_own_file():
    """Attention is wrong, and the MHSA below it, which calls it, is right."""
    scaled = solution(MHSA).replace("return C @ v, (", "return 2 * C @ v, (")
    assert scaled != solution(MHSA)
    wrong = {row.unit for row in run("# scaled\n" + scaled, MHSA).rows if not row.ok}
    assert wrong == {"attention"}


def test_softmax_cannot_be_had_from_attention():
    text = (
        "# a detour\nimport numpy as np\nfrom kit import attention_forward, softmax_forward\n"
        "def softmax_forward(x):\n"
        "    return attention_forward(np.ones((1, 1, 1, 1)), x, x)\n"
    )
    assert "attention_forward may not be called here" in run(text, SOFTMAX).text


def test_partial_credit_and_hidden_state():
    """A right forward, and a backward that looks at the last forward's cache."""
    text = "# state\n" + solution(GELU).replace(
        "    return x * cdf, (x, cdf)",
        "    global last\n    last = (x, cdf)\n    return x * cdf, 0",
    ).replace("    x, cdf = cache", "    x, cdf = last")
    result = run(text)
    assert [row.tensor for row in result.rows if not row.ok] == ["dx"]
    assert "right at first, wrong when it runs again after other inputs" in result.text
    assert result.score == round(5 * 2 / 3, 2)


def test_changed_arguments_are_named():
    right, in_place = "    return dy * (", "    dy *= cdf + x * pdf\n    return dy + 0 * ("
    result = run("# in place\n" + solution(GELU).replace(right, in_place))
    assert result.text == "gelu, arguments: gelu_backward changes its argument dy in place"


def test_what_is_printed_is_shown():
    result = run("print('shape', x.shape); raise ValueError('x')")
    assert "printed: shape (2, 6, 15)" in result.text


@POSIX
def test_links_and_odd_files_are_not_followed(tmp_path):
    (tmp_path / "hidden.json").write_text("secret")
    folder = tmp_path / "mallory"
    folder.mkdir()
    (folder / "gelu.py").symlink_to(tmp_path / "hidden.json")
    (folder / "softmax.py").write_bytes(b"\xff\xfe\x00")
    (folder / "linear.py").write_text("#" * 300_000)
    os.mkfifo(folder / "mlp.py")
    chosen = exercises(["gelu", "softmax", "linear", "mlp"])
    texts, problems, _ = read_submission(folder, chosen)
    assert not texts
    assert problems["gelu"] == "gelu.py is a link, which may lead anywhere"
    assert problems["mlp"] == "mlp.py is no file, but a pipe, a socket or a device"
    assert "is no UTF-16 text" in problems["softmax"]
    assert "is longer than 200000 bytes" in problems["linear"]


def test_zip_bombs_and_broken_zips(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("deep/er/gelu.py", b"\0" * 50_000_000)
        archive.writestr("../../softmax.py", "x = 1")
    texts, problems, _ = read_submission(tmp_path / "bomb.zip", (GELU, SOFTMAX))
    assert "is longer than" in problems["gelu"]
    assert texts == {"softmax": "x = 1"}
    (tmp_path / "broken.zip").write_bytes((tmp_path / "bomb.zip").read_bytes()[:300])
    texts, problems, remark = read_submission(tmp_path / "broken.zip", (GELU,))
    assert not texts
    assert "is no readable zip file" in remark == problems["gelu"]
    assert not (tmp_path.parent / "softmax.py").exists()


def test_values_survive_the_wire():
    """What the two sides send each other, through a loop of one."""
    sent = []
    wire = Wire(None, sent.append, None, None)
    arrays = (np.arange(6.0).reshape(2, 3).T, np.float32(1.5), np.array([], dtype=np.int64))
    wire.send("return", [{"a": arrays, "b": None}, [True, 3, "x"]])
    data = sent[0]

    def read(size):
        nonlocal data
        part, data = data[:size], data[size:]
        return part

    kind, (value, rest) = Wire(read, None, None, None).receive()
    assert (kind, rest, value["b"]) == ("return", [True, 3, "x"], None)
    for got, expected in zip(value["a"], arrays, strict=True):
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)


def test_lists_in_a_call_are_tuples_whose_arrays_are_bounded():
    """Bounds are laid on the arrays of tuples and dicts alone."""
    sent = []
    Wire(None, sent.append, None, None).send("call", "f", ([np.ones(2), [3]],), {})
    stream = io.BytesIO(sent[0])
    _, _, (given,), _ = Wire(stream.read, None, None, None).receive()
    assert isinstance(given, tuple) and given[1] == (3,)
    assert isinstance(map_arrays(lambda a: a.view(Bounded), given)[0], Bounded)


def test_the_process_ends_with_the_sandbox():
    with Sandbox(solution(GELU), "gelu", frozenset()) as sandbox:
        assert sandbox.call("changed_arguments") == []
    assert sandbox._process.returncode is not None
