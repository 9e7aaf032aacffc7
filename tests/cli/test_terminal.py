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


def test_red_lines_are_red_on_terminals_alone():
    command = [sys.executable, ROOT / "cli.py", "gradcheck", "--layer", "gate"]
    ended = subprocess.run(command, capture_output=True, env=ENVIRONMENT, timeout=120)
    assert ended.returncode == 0
    assert ended.stderr == b""
    assert b"gate, case 1" in ended.stdout
    assert not CONTROL.search(ended.stdout)


def test_every_bar_asks_whether_there_is_a_terminal():
    """disable=None is tqdm's way; without it a bar fills logs with carriage returns."""
    bars = 0
    for path in (ROOT / "miniconvit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "tqdm":
                bars += 1
                assert "disable" in {keyword.arg for keyword in node.keywords}, path
    assert bars >= 4
