"""Bars and colours are for terminals: what goes into pipes and files is plain text."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import FLAGS

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    "TERM": "xterm-256color",
    "COLUMNS": "100",
}
TRAIN = [sys.executable, ROOT / "tests" / "small_run.py", "train", *FLAGS, "--epochs", "2"]
CONTROL = re.compile(rb"[^\n\t -~\x80-\xff]")  # carriage returns and escapes among them


def test_training_writes_plain_lines_into_files(tmp_path):
    run = tmp_path / "run"
    with open(tmp_path / "out", "wb") as out, open(tmp_path / "log", "wb") as log:
        command = [*TRAIN, "--out", run]
        ended = subprocess.run(command, stdout=out, stderr=log, env=ENVIRONMENT, timeout=120)
    assert ended.returncode == 0
    assert (tmp_path / "log").read_bytes() == b""
    for file in (tmp_path / "out", run / "log.txt"):
        content = file.read_bytes()
        assert len(content.splitlines()) >= 4
        assert not CONTROL.search(content), file


def test_the_bar_is_on_the_terminal_alone(tmp_path):
    """Standard error is a terminal, where the bar moves; standard output is a pipe."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    pytest.importorskip("termios").tcsetwinsize(theirs, (24, 100))
    command = [*TRAIN, "--out", tmp_path / "run"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=ENVIRONMENT)
    os.close(theirs)
    seen = b""
    while chunk := _read(ours):
        seen += chunk
    os.close(ours)
    out = process.stdout.read()
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert b"epoch 1/2, loss" in seen and b"\r" in seen
    assert b"best validation accuracy" in out
    assert not CONTROL.search(out)


def _read(terminal):
    try:
        return os.read(terminal, 4096)
    except OSError:  # Linux: nobody writes any more
        return b""


BROKEN = """
from miniconvit import cli
from miniconvit.gradcheck.mutants import planted
with planted(softmax_backward=lambda dy, cache: 2 * dy):
    cli.main(["gradcheck", "--layer", "softmax"])
"""
RED = re.compile(rb"\x1b\[31m(.*?)\x1b\[0m")


def on_a_terminal(command, typed=b"", **variables):
    """(exit status, what a command printed) on a terminal, where somebody typed this before."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    os.write(ours, typed)
    terminal = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = subprocess.Popen(command, **terminal, env=ENVIRONMENT | variables)
    os.close(theirs)
    seen = b""
    while chunk := _read(ours):
        seen += chunk
    os.close(ours)
    return process.wait(timeout=60), seen.replace(b"\r\n", b"\n")


def test_rows_that_are_wrong_are_red_on_terminals_alone():
    command = [sys.executable, "-c", BROKEN]
    status, seen = on_a_terminal(command)
    wrong = {line.split(b"m", 1)[-1] for line in seen.splitlines() if b"WRONG" in line}
    assert status == 1 and len(wrong) >= 2
    assert {line.removesuffix(b"\x1b[0m") for line in wrong} == set(RED.findall(seen))
    assert b"\x1b" not in on_a_terminal(command, NO_COLOR="1")[1]
    ended = subprocess.run(command, capture_output=True, env=ENVIRONMENT, timeout=120)
    assert (ended.returncode, ended.stderr) == (1, b"")
    assert b"WRONG, see above" in ended.stdout and not CONTROL.search(ended.stdout)


def test_a_printed_report_is_red_at_the_prompt_alone():
    code = (
        "import numpy as np, miniconvit as mc\n"
        "f, wrong = lambda x: (x**3, x), lambda dy, x: dy * x**2\n"
        "print(mc.check_gradients(f, wrong, {'x': np.arange(1.0, 4)}))\n"
    )
    typed = (code + "exit()\n").encode()
    _, seen = on_a_terminal([sys.executable, "-q", "-i"], typed, PYTHON_BASIC_REPL="1")
    (row,) = RED.findall(seen)
    assert row.startswith(b"x ") and row.endswith(b"WRONG")
    prompt = [sys.executable, "-q", "-i"]
    assert not RED.search(on_a_terminal(prompt, typed, PYTHON_BASIC_REPL="1", NO_COLOR="1")[1])
    assert not RED.search(on_a_terminal([sys.executable, "-c", code])[1])


def test_every_bar_asks_whether_there_is_a_terminal():
    """disable=None is tqdm's way; without it a bar fills logs with carriage returns."""
    bars = 0
    for path in (ROOT / "miniconvit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "tqdm":
                bars += 1
                assert "disable" in {keyword.arg for keyword in node.keywords}, path
    assert bars >= 4
