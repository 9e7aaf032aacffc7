"""Interrupted and resumed equals uninterrupted, to the bit, whenever and however it stops.

The processes are real; see small_run.py for the data set and for the kills in the middle of a save.
"""

import json
import os
import pty
import random
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_run import FLAGS, command

from miniconvit.checkpoints.checkpoint import load_checkpoint

PROGRAM = Path(__file__).parents[1] / "small_run.py"
ROOT = PROGRAM.parent.parent


def start(*argv, **environment):
    """A training process; its values in `environment` are for small_run.py."""
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    variables |= {name: str(value) for name, value in environment.items()}
    return subprocess.Popen(
        [sys.executable, PROGRAM, "train", *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=variables,
    )


def finish(process):
    """(exit status, standard output, standard error)."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def outcome(folder):
    """What must be equal: both checkpoints' bytes and all metrics but the two timings."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        del row["images_per_second"], row["seconds"]
    return [(folder / f"{name}.safetensors").read_bytes() for name in ("last", "best")], rows


def resume(folder, *argv):
    """Goes on to the end; it must succeed."""
    status, out, err = finish(start("--resume", "--out", folder, *argv))
    assert status == 0, err
    return out


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    status, _, err = finish(start(*FLAGS, "--out", folder, "--workers", 2))
    assert status == 0, err
    checkpoints, rows = outcome(folder)
    assert [row["step"] for row in rows] == [6 * epoch for epoch in range(1, 17)]
    return checkpoints, rows


def wait_for_save(folder, process, before=None):
    """Until last.safetensors is another file than that of the number `before`, or the end."""
    while file_number(folder) in (None, before) and process.poll() is None:
        time.sleep(0.01)


def file_number(folder):
    try:
        return (folder / "last.safetensors").stat().st_ino
    except FileNotFoundError:
        return None


def kill_at_random(folder, rng, longest):
    """Trains in folder (from the start, or on) and sends SIGKILL at a random moment of the time
    `longest` (seconds) after its first save. False where the run was finished by then."""
    before = file_number(folder)
    process = start("--resume", "--out", folder, *FLAGS, SAVE_SECONDS=0)
    wait_for_save(folder, process, before)
    time.sleep(rng.uniform(0, longest))
    process.kill()
    status, _, err = finish(process)
    assert status in (0, -signal.SIGKILL), err
    return status != 0


def killed_run(folder, rng):
    """A folder in which a run from the start was killed at a random moment."""
    longest = 1.0
    while not kill_at_random(folder, rng, longest):
        shutil.rmtree(folder)
        longest /= 2  # the machine is that fast


def kill_in_save(folder, event):
    process = start(*FLAGS, "--out", folder, SAVE_SECONDS=0, KILL_AT=event)
    assert finish(process)[0] == -signal.SIGKILL


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_a_random_moment(tmp_path, uninterrupted, seed):
    folder = tmp_path / "run"
    killed_run(folder, random.Random(seed))
    resume(folder, "--workers", 1)
    assert outcome(folder) == uninterrupted


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no terminals to close")
def test_a_closed_terminal_saves_the_run(tmp_path, uninterrupted):
    """Its end is a SIGHUP, and no line can be shown any more. The run waits for it after step 9, so
    that it cannot be over before."""
    folder = tmp_path / "run"
    argv = [sys.executable, str(PROGRAM), "train", *FLAGS, "--out", str(folder), "--workers", "2"]
    path = os.pathsep.join([str(ROOT), *sys.path])
    pid, terminal = pty.fork()
    if pid == 0:
        stops = {"PYTHONPATH": path, "SIGNAL_AT": f"0:9:{signal.SIGSTOP}"}
        os.execve(sys.executable, argv, os.environ | stops)
    while os.waitpid(pid, os.WNOHANG | os.WUNTRACED) == (0, 0):
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 4096)
    os.close(terminal)  # it goes on, to end
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGHUP
    assert (folder / "log.txt").read_text().endswith("stopped by SIGHUP after step 9\n")
    resume(folder)
    assert outcome(folder) == uninterrupted


# Disk events as small_run.py counts them: a save is a flush, both sides of a rename and the flush
# of the folder. config.json and the six steps of the first epoch are saved before its end.
SAVE = 4
BEST = SAVE + 6 * SAVE + 1
METRICS = BEST + SAVE
LAST = METRICS + 1


@pytest.mark.parametrize("event, half_written", [(BEST, "best"), (METRICS, None), (LAST, "last")])
def test_killed_in_a_save(tmp_path, uninterrupted, event, half_written):
    folder = tmp_path / "run"
    kill_in_save(folder, event)
    left = [f"{half_written}.safetensors.partial"] if half_written else []
    assert [file.name for file in folder.glob("*.partial")] == left
    if event == METRICS:
        assert not (folder / "metrics.jsonl").read_bytes().endswith(b"\n")
    resume(folder)
    assert outcome(folder) == uninterrupted
    assert not list(folder.glob("*.partial"))


@pytest.mark.full
@pytest.mark.parametrize("event", range(1, LAST + 6 * SAVE))
def test_killed_at_every_disk_event_up_to_the_second_epoch(tmp_path, uninterrupted, event):
    folder = tmp_path / "run"
    kill_in_save(folder, event)
    resume(folder, *FLAGS)  # the first two events come before config.json is in place
    assert outcome(folder) == uninterrupted


def fork(folder, *argv):
    """A training of six epochs in a copy of this process, which has all imports behind it."""
    pid = os.fork()
    if pid == 0:
        status = 70  # of whatever is raised instead of an exit
        try:
            argv = ["train", "--resume", "--quiet", "--out", folder, *FLAGS, "--epochs", 6, *argv]
            command([str(word) for word in argv], save_seconds=0)
        except SystemExit as end:
            status = end.code
        finally:
            os._exit(status)
    return pid


def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.full
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes to copy")
def test_killed_at_200_random_moments(tmp_path):
    """On one to three workers, and resumed on as many or on others."""
    began = time.monotonic()
    assert ended(fork(tmp_path / "whole")) == 0
    longest = time.monotonic() - began
    expected, steps = outcome(tmp_path / "whole"), set()
    for i in range(200):
        rng, folder, status = random.Random(1000 + i), tmp_path / "run", 0
        while status == 0:
            shutil.rmtree(folder, ignore_errors=True)
            pid = fork(folder, "--workers", 1 + i % 3)
            time.sleep(rng.uniform(0, longest))
            os.kill(pid, signal.SIGKILL)
            status = ended(pid)
        assert status == -signal.SIGKILL
        if (folder / "last.safetensors").exists():
            steps.add(load_checkpoint(folder / "last.safetensors").state["step"])
        assert ended(fork(folder, "--workers", 1 + i // 3 % 3)) == 0
        assert outcome(folder) == expected, i
    print(f"\nkilled after {len(steps)} different saves of 36 steps")
    assert len(steps) > 20


@pytest.mark.full
def test_killed_again_and_again(tmp_path, uninterrupted):
    folder, rng, kills = tmp_path / "run", random.Random(9), 0
    while kill_at_random(folder, rng, longest=0.1):
        kills += 1
    assert kills >= 5
    assert outcome(folder) == uninterrupted


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop(tmp_path, uninterrupted, signum):
    folder = tmp_path / "a run"
    process = start(*FLAGS, "--out", folder)
    wait_for_save(folder, process)
    process.send_signal(signum)
    status, _, err = finish(process)
    assert status == 128 + signum
    command = re.search(r"go on with: miniconvit train (.*)", err)[1]
    assert shlex.split(command) == ["--resume", "--out", str(folder)]
    assert "Traceback" not in err
    step = int(re.search(r"after step (\d+)", err)[1])
    assert f"resumed after step {step} of 96" in resume(folder)
    assert outcome(folder) == uninterrupted
    assert "is finished" in resume(folder)
    assert outcome(folder) == uninterrupted


def test_asked_to_stop_while_nobody_reads(tmp_path, uninterrupted):
    """Ctrl-C ends the `tee` behind a pipe too: what is said of the stop can then not be written."""
    folder = tmp_path / "run"
    process = start(*FLAGS, "--out", folder, "--quiet")
    process.stdout.close()
    process.stderr.close()
    wait_for_save(folder, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 128 + signal.SIGINT
    assert "stopped by SIGINT" in (folder / "log.txt").read_text()
    resume(folder)
    assert outcome(folder) == uninterrupted


def test_killed_before_the_first_save_begins_again(tmp_path, uninterrupted):
    folder = tmp_path / "run"
    kill_in_save(folder, 1)
    assert not (folder / "config.json").exists()
    process = start("--resume", "--out", folder, *FLAGS, SAVE_SECONDS=0, KILL_AT=SAVE + 2)
    assert finish(process)[0] == -signal.SIGKILL
    assert (folder / "config.json").exists()
    assert not (folder / "last.safetensors").exists()
    resume(folder)
    assert outcome(folder) == uninterrupted


def test_a_second_process_is_refused(tmp_path):
    folder = tmp_path / "run"
    process = start(*FLAGS, "--out", folder, "--epochs", 400)
    wait_for_save(folder, process)
    status, _, err = finish(start("--resume", "--out", folder))
    process.kill()
    process.communicate()
    assert status == 2
    assert "another process is training" in err
