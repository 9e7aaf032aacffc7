"""Bars and colours are for terminals: what goes into pipes and files is plain text."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import FLAGS

from miniconvit.experiments.tables import on_screen

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    "TERM": "xterm-256color",
}
ENVIRONMENT.pop("COLUMNS", None)  # the terminal says itself how wide it is
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


def on_a_terminal(command, typed=b"", columns=100, **variables):
    """(exit status, what a command printed) on a terminal, where somebody typed this before."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    pytest.importorskip("termios").tcsetwinsize(theirs, (24, columns))
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


COMMANDS = """
train --epochs 2 --out run --workers 1
train --resume --out run
train --batch-size 500 --epochs 1 --out other --workers 1
eval run
eval run --split test --out mistakes
inspect run
trace run
gradcheck --layer convit
bench --model convit_micro32 --batch-size 2 --steps 1 --device auto
data shapes
export run model.safetensors
experiment lipschitz --seeds 1 --out norms
doctor
"""
SESSION = f"""
import small_run
from miniconvit import cli
small_run.use_small_data()
for line in {COMMANDS.strip().splitlines()!r}:
    print("$", line, flush=True)
    words = line.split()
    flags = small_run.FLAGS if words[0] == "train" and words[1] != "--resume" else []
    try:
        cli.main([words[0], *flags, *words[1:]])
    except SystemExit as end:
        assert end.code == 0, line
"""


def test_at_80_columns_nothing_wraps_and_the_time_left_is_seen(tmp_path):
    """What is longer is a command to copy, which stands alone, or one word, such as a path."""
    (tmp_path / "session.py").write_text(SESSION)
    path = os.pathsep.join([str(ROOT / "tests"), ENVIRONMENT["PYTHONPATH"]])
    command = ["sh", "-c", f"cd {tmp_path} && {sys.executable} session.py"]
    status, seen = on_a_terminal(command, columns=80, PYTHONPATH=path)
    print(seen.decode())
    assert status == 0
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", seen.decode())
    lines = re.split(r"[\r\n]+", plain)
    assert not [line for line in lines if len(line) > 80]
    frames = [line for line in lines if line.startswith("epoch 1/2, loss")]
    assert frames and all(re.search(r"acc [\d. ]+%, [\d:?]+ left \|", frame) for frame in frames)
    assert "there are fewer images than --batch-size 500: a step takes all 100" in plain


def test_a_table_fits_80_columns_though_its_markdown_does_not():
    for path in (ROOT / "docs" / "results" / "experiments").glob("*/table.md"):
        lines = on_screen(path.read_text(), 80).split("\n")
        rows = [line for line in lines if re.search(r"\S  +\S", line)]
        assert len(rows) > 4 and max(map(len, rows)) <= 80


def test_every_bar_asks_whether_there_is_a_terminal():
    """disable=None is tqdm's way; without it a bar fills logs with carriage returns."""
    bars = 0
    for path in (ROOT / "miniconvit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "tqdm":
                bars += 1
                assert "disable" in {keyword.arg for keyword in node.keywords}, path
    assert bars >= 4
