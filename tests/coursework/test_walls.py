"""What holds whatever a submission does: memory, descriptors, system calls, and an end for all."""

import csv
import ctypes
import errno
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_hostile import GELU, LIMITS, MHSA, POSIX, run

import miniconvit
from miniconvit.coursework import confine, create, files, grade, read_submission, sandbox
from miniconvit.coursework.runner import Broken, Failure, Wire
from miniconvit.coursework.sandbox import Keeper, Limits, Sandbox, look_through
from miniconvit.coursework.skeleton import solution
from miniconvit.coursework.source import describe_source

ROOT = Path(miniconvit.__file__).parents[1]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="walls that only Linux has")
RIGHT = solution(GELU)


@pytest.fixture(scope="module")
def instructor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kit")
    create(folder / "kit", folder / "secret", ["gelu"])
    return folder / "kit" / "instructor"


def hand_in(folder, text=RIGHT):
    folder.mkdir(parents=True)
    (folder / "gelu.py").write_text(text)
    return folder


# Memory


@POSIX
@pytest.mark.parametrize(
    "heavy", ["x = [" + "a," * 60_000 + "]", "-" * 90_000 + "1", "a.b(c)[d]\n" * 15_000]
)
def test_texts_are_parsed_in_a_limited_process(monkeypatch, heavy):
    """Beside it, what is light is still read; the grader hardly notices."""
    limits = replace(sandbox.SOURCE_LIMITS, memory=1 << 26)
    monkeypatch.setattr(sandbox, "SOURCE_LIMITS", limits)
    tracemalloc.start()
    try:
        light, described, last = look_through([b"x = 1", heavy.encode(), b"y = 2"])
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()
    assert (light["text"], last["text"]) == ("x = 1", "y = 2")
    assert "it takes too much memory" in described["problem"]


@POSIX
def test_a_text_that_takes_too_long(monkeypatch):
    """A coding whose decoder is slow: the process is cut off, and the next text read by another."""
    monkeypatch.setattr(sandbox, "SOURCE_LIMITS", replace(sandbox.SOURCE_LIMITS, seconds=1.0))
    slow = b"# coding: punycode\n" + b"x" * 1000 + b"-" + b"a" * 190_000
    described, light = look_through([slow, b"y = 2"])
    assert described["problem"].startswith("is no valid Python: it takes too much memory or time")
    assert light == describe_source(b"y = 2")


def test_a_list_of_files_as_long_as_memory(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "anna.zip", "w") as archive:
        archive.writestr("gelu.py", RIGHT)
        for number in range(300):
            archive.writestr(f"{number}.txt", "")
    assert read_submission(tmp_path / "anna.zip", [GELU])[0] == {"gelu": RIGHT}
    monkeypatch.setattr(files, "LARGEST_LISTING", 10_000)
    assert "has too long a list of files" in read_submission(tmp_path / "anna.zip", [GELU])[2]


def test_what_is_read_is_bounded_in_all(tmp_path, monkeypatch):
    folder = hand_in(tmp_path / "anna", "#" * 600)
    for number in range(5):
        (folder / f"gelu{number}.py").write_text("#" * 600)
    monkeypatch.setattr(files, "MOST_BYTES", 2000)
    found = files.files_of(folder, lambda name: True)
    assert sum(map(len, found.files.values())) <= 2000
    assert found.remarks == ["only 2000 bytes of Python files were read"]


@pytest.mark.parametrize("shape", [(0, 10**6), (10**6, 0), (3, 0, 50_000), (0, 300, 300)])
def test_axes_of_length_0_hide_no_large_ones(shape):
    """Neither on the wire nor in what a right function computes: their sums are large."""
    sent = []
    Wire(None, sent.append, None).send("return", np.zeros(shape))
    data = iter((sent[0][:8], sent[0][8:]))
    with pytest.raises(Broken):
        Wire(lambda size: next(data), None, None).receive()
    with pytest.raises(Failure, match="more than 65536 entries"):
        np.add.reduce(np.zeros(shape).view(sandbox.Bounded), axis=shape.index(0))


def test_small_empty_arrays_are_fine():
    assert np.add.reduce(np.zeros((0, 5)).view(sandbox.Bounded)).tolist() == [0.0] * 5


def test_what_is_kept_is_weighed_whole():
    """A view keeps its whole array, and empty things are something too."""
    assert sandbox._weight(np.ones(1000)[:1]) >= 8000
    assert sandbox._weight(((np.ones(1000)[::2],), {"a": np.ones(1000)})) >= 16_000
    assert sandbox._weight({"k" * 500: (), "b": {}}) >= 500
    assert sandbox._weight([np.zeros(0)] * 100) >= 10_000


@POSIX
@pytest.mark.parametrize(
    "argument",
    ["np.ones((1, 1, 8, 1024))", "np.zeros((0, 64))", "np.ones((1, 64, 1))[:, :1]"],
    ids=["large", "empty", "views"],
)
def test_the_grader_stays_small(argument, monkeypatch):
    """A student's process calls right functions as fast as it can, for as long as it may."""
    text = (
        "# calls\nimport numpy as np\n"
        "def attention_forward(*_): return 0, 0\n"
        "def mhsa_forward(x, params, heads):\n"
        f"    while True: softmax_forward({argument})\n"
        "from kit import softmax_forward\n"
    )
    tracemalloc.start()
    try:
        result = run(text, MHSA, replace(LIMITS, seconds=6.0))
        assert tracemalloc.get_traced_memory()[1] < 60_000_000
    finally:
        tracemalloc.stop()
    assert result.score == 0


# The process


@POSIX
def test_descriptors_are_limited():
    text = "files = []\ntry:\n    while True: files.append(open('kit.py'))\n"
    result = run(text + "except OSError as error: raise ValueError(error.errno, len(files))")
    number, opened = map(int, re.search(r"ValueError: \((\d+), (\d+)\)", result.text).groups())
    assert number == errno.EMFILE
    assert 10 < opened < confine.DESCRIPTORS


@POSIX
@pytest.mark.parametrize(
    "call",
    [
        *("memfd_create('x')", "pipe()", "mkfifo('x')", "nice(1)", "setpriority(0, 0, 5)"),
        *("sched_setaffinity(0, {0})", "umask(0)", "eventfd(1)"),
    ],
)
def test_functions_without_audit_events_are_taken_away(call):
    assert "AttributeError: module 'os' has no" in run(f"import os; os.{call}").text
    assert "has no attribute" in run(f"import posix; posix.{call}").text


@POSIX
def test_taken_functions_do_not_come_back_with_a_new_module():
    text = "import sys; del sys.modules['posix']; import posix; posix.umask(0)"
    assert "AttributeError" in run(text).text


PROBE = """
import ctypes, json, os, sys
sys.path.append({folder!r})
from confine import confine
libc = ctypes.CDLL(None, use_errno=True)
walls = confine(os.getppid(), 10, 1 << 30, 1000)
def refused(*call):
    ctypes.set_errno(0)
    return libc.syscall(*call) == -1 and ctypes.get_errno() == 1
import errno
paths = {{}}
for name, flags in (("read", os.O_RDONLY), ("write", os.O_WRONLY | os.O_CREAT)):
    try:
        os.close(os.open({target!r} if name == "write" else "/dev/null", flags))
        paths[name] = "opened"
    except OSError as error:
        paths[name] = errno.errorcode[error.errno]
tried = {{
    "getpid": refused(39), "socket": refused(41, 2, 1, 0), "memfd_create": refused(319, b"x", 0),
    "setpriority": refused(141, 0, 0, 5), "shmget": refused(29, 0, 4096, 0o600),
    "mlock": refused(149, 0, 0), "sched_setscheduler": refused(144, 0, 0, 0),
    "kill": refused(62, os.getppid(), 0), "tgkill": refused(234, os.getppid(), os.getppid(), 0),
    "unshare": refused(272, 0), "ptrace": refused(101, 0, 0, 0, 0), "prctl": refused(157, 1, 0),
    "fork": refused(57), "mkdir": refused(83, b"/dev/null/x", 0),
}}
print(json.dumps([walls, tried, paths]))
"""


@LINUX
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers of this machine's calls")
def test_system_calls_are_taken_away_where_the_library_is(tmp_path):
    """Asked of the kernel itself, by numbers, with arguments that do nothing where allowed."""
    program = PROBE.format(folder=str(Path(confine.__file__).parent), target=str(tmp_path / "x"))
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    walls, tried, paths = json.loads(outcome.stdout)
    assert walls["nobody"] == (os.getuid() == 0)
    try:
        ctypes.CDLL("libseccomp.so.2")
    except OSError:
        pytest.skip("no libseccomp here")
    assert walls["filter"]
    assert not tried.pop("getpid")
    assert tried == dict.fromkeys(tried, True)
    assert paths == {"read": "opened", "write": "EPERM"}
    assert not list(tmp_path.iterdir())


@POSIX
@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ({"nobody": True, "filter": True}, "as nobody, its system calls are filtered"),
        (
            {"nobody": False, "filter": False},
            "as you, its system calls are not filtered (no libsec",
        ),
    ],
)
def test_the_walls_are_said(monkeypatch, tmp_path, answer, sentence):
    (tmp_path / "stand_in.py").write_text(f"print({json.dumps(json.dumps(answer))})")
    assert sandbox.walls().startswith("student code runs as ")
    monkeypatch.setattr(confine, "__file__", str(tmp_path / "stand_in.py"))
    assert sentence in sandbox.walls()


# An end for everyone


@POSIX
def test_death_by_a_real_time_signal():
    result = run(f"import signal; signal.raise_signal({signal.SIGRTMIN + 3})")
    assert f"the process was killed by signal {signal.SIGRTMIN + 3}" in result.text
    assert "SIGSEGV" in run("import signal; signal.raise_signal(11)").text


@POSIX
def test_odd_names_and_files_end_no_grading(instructor, tmp_path, program):
    inbox = tmp_path / "inbox"
    for name in (
        "grades.csv",
        "grades.csv_",
        "GRADES.CSV",
        "a\nb\x1b]0;owned\x07",
        "-rf",
        "\u202etxt",
    ):
        hand_in(inbox / name)
    os.mkfifo(inbox / "pipe.zip")
    os.mkfifo(inbox / "pipe")
    os.mkfifo(hand_in(inbox / "dora") / "work.zip")
    (hand_in(inbox / "emil") / "gelu.py").unlink()
    os.link(instructor / "hidden.json", inbox / "emil" / "gelu.py")
    os.link(instructor / "hidden.json", inbox / "frida.zip")
    out = tmp_path / "out"
    (out / "dora").mkdir(parents=True)
    (out / "dora" / "results.json").symlink_to(tmp_path / "precious")
    where = ("--instructor", instructor, "--out", out)
    status, output, errors = program("coursework", "grade", inbox, *where, "--jobs", "2")
    assert (status, errors) == (0, "")
    assert all(c.isprintable() or c == "\n" for c in output)
    with (out / "grades.csv").open(encoding="utf-8", newline="") as file:
        table = {row["student"]: row for row in csv.DictReader(file)}
    bad = {"pipe", "emil", "frida"}
    assert {name for name, row in table.items() if float(row["score"]) == 0} == bad
    assert table.keys() - bad == {
        *("grades.csv", "grades.csv_", "GRADES.CSV", "a?b?]0;owned?", "'-rf", "?txt", "dora"),
    }
    assert "hard link" in table["frida"]["remark"]
    assert "a pipe, a socket or a device" in table["pipe"]["remark"]
    assert len(list(out.glob("*/results.json"))) == 10
    assert not (tmp_path / "precious").exists()
    secret = json.loads((instructor / "hidden.json").read_text())["secret"]
    assert not any(secret in path.read_text() for path in out.rglob("*") if path.is_file())


def test_results_do_not_go_among_the_submissions(instructor, tmp_path):
    hand_in(tmp_path / "inbox" / "anna")
    with pytest.raises(miniconvit.UserError, match="holds the submissions"):
        grade(tmp_path / "inbox", instructor, tmp_path / "inbox")


def test_a_keeper_ends_what_runs_and_what_begins_later():
    keeper = Keeper()
    with Sandbox("while True: pass", "gelu", frozenset(), LIMITS, keeper) as first:
        keeper.stop()
        with pytest.raises(Broken, match="killed by SIGKILL"):
            first.call("changed_arguments")
    with Sandbox(RIGHT, "gelu", frozenset(), LIMITS, keeper) as later, pytest.raises(Broken):
        later.call("changed_arguments")


@POSIX
@pytest.mark.skipif(os.name == "posix" and os.getuid() != 0, reason="only root has students moved")
def test_a_folder_that_nobody_can_reach_is_named(instructor, tmp_path, monkeypatch):
    """Every student would lose all points."""
    hand_in(tmp_path / "inbox" / "anna")
    tmp_path.chmod(0o700)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(miniconvit.UserError, match="is closed to others, so student code"):
        grade(tmp_path / "inbox", instructor, tmp_path / "out")


@pytest.fixture
def temporary():
    """A folder that nobody can reach too."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def grader(instructor, tmp_path, temporary):
    """A grader as a program of its own that grades a student's endless loop, and its children."""
    hand_in(tmp_path / "inbox" / "anna", "while True: pass\n")
    where = ["--instructor", instructor, "--out", tmp_path / "out"]
    command = [ROOT / "cli.py", "coursework", "grade", tmp_path / "inbox", *where]
    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], env=environment, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    children = []
    while time.monotonic() < deadline and not (children and all(map(is_busy, children))):
        time.sleep(0.05)
        children = students_of(process.pid)
    yield process, children
    process.kill()
    process.wait()


def students_of(pid):
    """The processes below a process that run a student's file, while they compute."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            if b"runner.py" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return found


def is_busy(pid):
    """Whether it has computed for longer than its start takes: it is in the student's loop."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) > 2 * os.sysconf("SC_CLK_TCK")


def are_gone(pids):
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if not any(is_alive(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def is_alive(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@LINUX
def test_students_do_not_outlive_a_killed_grader(grader):
    process, children = grader
    assert len(children) == 1
    process.kill()
    assert are_gone(children)


@LINUX
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_grader_that_is_asked_to_end_cleans_up(grader, temporary, name):
    process, children = grader
    assert len(children) == 1
    process.send_signal(getattr(signal, name))
    status = process.wait(timeout=20)
    assert status not in (0, None)
    assert are_gone(children)
    assert not list(temporary.iterdir())


def test_the_page_says_what_the_limits_are():
    page = (ROOT / "docs" / "coursework.md").read_text()
    assert Limits() == Limits(seconds=30.0, memory=2 << 30, output=1 << 20)
    for words in ("30 seconds", "2 GiB", "1 MiB", f"{confine.DESCRIPTORS} open files"):
        assert words in page, words
    assert f"{sandbox.LARGEST_ARRAY:,} entries" in page
    assert f"{sandbox.MOST_KEPT >> 20} MiB in all" in page
