"""Ranks started by mpirun: the bits of one process, and one end for all whatever happens to one."""

import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_run import FLAGS, small_dataset

import miniconvit.training.loop as training
from miniconvit.system import arithmetic
from miniconvit.training.settings import make_settings

ROOT = Path(__file__).parents[2]
MPIRUN = Path(sys.executable).with_name("mpirun")
STEPS = 12
FEW = {"--patch-size": 1, "--batch-size": 48, "--epochs": STEPS // 2}
"""Four pieces a step, two steps an epoch."""

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None or not MPIRUN.exists(),
    reason="needs ranks: pip install mpi4py mpich",
)


def mpirun(out, n, *flags, workers=1, mpirun=MPIRUN, beside=(), **variables):
    """The finished process of n ranks that train in the folder `out`.

    beside: the words before the command of one more rank.
    """
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    env = os.environ | as_root | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    version = subprocess.run([mpirun, "--version"], capture_output=True, text=True, env=env)
    more = ["--oversubscribe"] if "Open MPI" in version.stdout else []
    command = [sys.executable, ROOT / "tests/small_run.py", "train", *FLAGS]
    command += [*(word for pair in FEW.items() for word in pair), "--workers", workers]
    command += ["--out", out, *flags]
    last = [":", "-n", 1, *beside, *command] if beside else []
    return subprocess.run(
        [str(word) for word in [mpirun, *more, "-n", n, *command, *last]],
        env=env | {name: str(value) for name, value in variables.items()},
        capture_output=True, text=True, timeout=300,
        start_new_session=True,  # a signal to all of its group does not reach pytest
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of the run in this process, by itself; resume(folder) goes on with another."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("miniconvit.training.run.load_dataset", small_dataset)
        for workers in (1, 2):
            train(folder.with_name(f"workers{workers}"), workers)
        same_files(folder.with_name("workers1"), folder.with_name("workers2"))
        yield folder.with_name("workers1")


def train(folder, workers=1, resume=False):
    names = dict(zip(FLAGS[::2], FLAGS[1::2], strict=True)) | FEW
    kinds = {"--model": str, "--augment": str, "--lr": float, "--drop-path": float}
    kinds |= {"--label-smoothing": float, "--clip-grad": float}
    settings = {
        name[2:].replace("-", "_"): kinds.get(name, int)(value) for name, value in names.items()
    }
    return training.train(
        make_settings(**settings), folder, resume=resume, workers=workers, quiet=True
    )


def rows(folder):
    """metrics.jsonl without what the clock says."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "images_per_second", "crc32")}
        for row in rows
    ]


def same_files(one, other):
    for name in ("last.safetensors", "best.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    assert rows(one) == rows(other)


@pytest.mark.parametrize(("n", "workers"), [(3, 1), (2, 2)])
def test_any_number_of_ranks_has_the_bits_of_one_process(whole, tmp_path, n, workers):
    done = mpirun(tmp_path / "run", n, workers=workers)
    assert done.returncode == 0, done.stderr
    same_files(tmp_path / "run", whole)
    host = os.uname().nodename
    line = f"{n} ranks on {host}, {workers} worker{'s' * (workers > 1)} each"
    assert done.stdout.splitlines()[0] == line
    assert done.stdout.count("best checkpoint") == 1  # rank 0 speaks for all
    assert done.stderr == ""


def test_a_signal_to_any_rank_saves_and_another_number_of_ranks_goes_on(whole, tmp_path):
    """2 ranks, then 3, then this process alone."""
    for n, at in ((2, "1:5:2"), (3, "2:9:15")):
        done = mpirun(tmp_path / "run", n, "--resume", SIGNAL_AT=at)
        _, step, signum = map(int, at.split(":"))
        assert done.returncode != 0
        name = signal.Signals(signum).name
        assert f"stopped by {name} after step {step} and saved; go on with" in done.stderr
    assert "resumed after step 5" in done.stdout
    assert train(tmp_path / "run", resume=True).step == STEPS
    same_files(tmp_path / "run", whole)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_all_and_the_run_goes_on(whole, tmp_path, rank):
    done = mpirun(tmp_path / "run", 2, SIGNAL_AT=f"{rank}:7:9", SAVE_SECONDS=0, workers=2)
    assert done.returncode != 0
    assert train(tmp_path / "run", resume=True).step == STEPS
    same_files(tmp_path / "run", whole)


def test_other_images_on_one_rank_are_one_sentence(tmp_path):
    """Two folders, of which each rank is given one: one of them has a file more."""
    from PIL import Image

    for name, count in (("a", 4), ("b", 5)):
        for split in ("train", "val"):
            for label in ("cat", "dog"):
                folder = tmp_path / name / split / label
                folder.mkdir(parents=True)
                for i in range(count if (split, label) == ("train", "dog") else 4):
                    Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(folder / f"{i}.png")
    command = [sys.executable, "-m", "miniconvit", "train", "--data", "imagefolder"]
    command += ["--model", "convit_micro32", "--img-size", 8, "--workers", 1]
    command += ["--out", tmp_path / "run"]
    parts = [["-n", 1, *command, "--data-dir", tmp_path / name] for name in ("a", "b")]
    done = subprocess.run(
        [str(word) for word in [MPIRUN, *parts[0], ":", *parts[1]]],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"},
        capture_output=True, text=True, timeout=300,
        start_new_session=True,  # a signal to all of its group does not reach pytest
    )  # fmt: skip
    assert done.returncode != 0
    host = os.uname().nodename
    sentence = f"Error: the images of rank 1 on {host} are not those of rank 0 on {host}: put"
    assert done.stderr.startswith(sentence)
    assert not (tmp_path / "run").exists()


def test_machines_of_two_kinds_are_named_and_train_the_same_model(whole, tmp_path):
    """A rank whose matrix products are those of another processor."""
    ours = arithmetic()["blas"]
    other = next(kind for kind in ("Haswell", "Nehalem") if kind not in ours)
    theirs = subprocess.run(
        [sys.executable, "-c", "from miniconvit.system import arithmetic; print(arithmetic())"],
        env=os.environ | {"OPENBLAS_CORETYPE": other}, cwd=ROOT, capture_output=True, text=True,
    ).stdout  # fmt: skip
    if other not in theirs:
        pytest.skip("NumPy's products have one kind of processor here")
    done = mpirun(tmp_path / "run", 1, beside=["env", f"OPENBLAS_CORETYPE={other}"])
    assert done.returncode == 0, done.stderr
    line = done.stdout.splitlines()[1]
    assert line.startswith("the last digits depend on who computes what: the machines have NumPy ")
    assert ours in line and other in line
    for row, true in zip(rows(tmp_path / "run"), rows(whole), strict=True):
        assert row["train_loss"] == pytest.approx(true["train_loss"], rel=1e-3)


@pytest.fixture
def small_disk(whole, tmp_path):
    """A disk on which a run's last checkpoint has no room beside the two before it, and a function
    that makes it larger."""
    size = sum((whole / f"{name}.safetensors").stat().st_size for name in ("last", "best"))
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size * 5 // 4}", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        yield disk, lambda: subprocess.run(["mount", "-o", "remount,size=1g", disk], check=True)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk_at_rank_0_ends_all_and_the_run_goes_on(whole, tmp_path, small_disk):
    disk, enlarge = small_disk
    done = mpirun(disk / "run", 2, SAVE_SECONDS=0)
    assert done.returncode == 2
    assert done.stderr.count("No space left on device") == done.stderr.count("\n") == 1, done.stderr
    assert (disk / "run/last.safetensors").exists()
    enlarge()
    assert train(disk / "run", resume=True).step == STEPS
    same_files(disk / "run", whole)


@pytest.mark.full
def test_twenty_kills_of_random_ranks_at_random_moments(whole, tmp_path):
    """Each time another number of ranks goes on, and the last ends with the same bytes."""
    draw = random.Random(0)
    for _ in range(20):
        n, step = draw.randint(2, 4), draw.randint(1, STEPS)
        at = f"{draw.randrange(n)}:{step}:9"
        mpirun(tmp_path / "run", n, "--resume", SIGNAL_AT=at, SAVE_SECONDS=0)
        if draw.random() < 0.2:
            shutil.rmtree(tmp_path / "run")
    train(tmp_path / "run", resume=True)
    same_files(tmp_path / "run", whole)


# two machines, as two network namespaces of this one


@pytest.fixture
def namespaces(tmp_path):
    """A launcher's arguments for two ranks with a cable between them, and a function that cuts
    it."""
    if os.geteuid() or not shutil.which("ip") or "UCX" not in mpich_devices():
        pytest.skip("needs root, the command ip, and the MPICH of PyPI")
    names = [f"mc{os.getpid()}-{i}" for i in (1, 2)]
    ssh = tmp_path / "ssh"  # [options] HOST COMMAND...
    ssh.write_text(
        "#!/bin/sh\n"
        'while [ "${1#-}" != "$1" ]; do shift; done\n'
        "host=$1; shift; i=${host##*.}\n"
        f'exec ip netns exec mc{os.getpid()}-$i unshare --uts sh -c "hostname machine-$i; $*"\n'
    )
    ssh.chmod(0o755)

    def ip(*words):
        subprocess.run(["ip", *map(str, words)], check=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ends = ["cable", "netns", names[0], "type", "veth", "peer", "cable", "netns", names[1]]
        ip("link", "add", *ends)
        for i, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.77.0.{i}/24", "dev", "cable")
            for link in ("cable", "lo"):
                ip("-n", name, "link", "set", link, "up")
        time.sleep(1)  # until both ends are up
        first = ["ip", "netns", "exec", names[0], "unshare", "--uts", "sh", "-c"]
        launcher = f"hostname machine-1; exec {MPIRUN} -launcher ssh -launcher-exec {ssh} "
        launcher += '-hosts 10.77.0.1,10.77.0.2 -localhost 10.77.0.1 -ppn 1 -n 2 "$@"'
        cut = ["-n", names[1], "link", "set", "cable", "down"]
        yield [*first, launcher, "mpirun"], lambda: ip(*cut)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name])


def mpich_devices():
    """What the installed MPICH can send through."""
    found = MPIRUN.with_name("mpichversion")
    return subprocess.run([found], capture_output=True, text=True).stdout.upper()


def over_the_cable(launcher, out, *flags, **variables):
    """The process of two ranks, on two machines, that train in the folder `out`."""
    command = [*launcher, sys.executable, ROOT / "tests/small_run.py", "train", *FLAGS]
    command += [*(word for pair in FEW.items() for word in pair), "--workers", 1, "--out", out]
    path = os.pathsep.join([str(ROOT), *sys.path])
    return subprocess.Popen(
        [str(word) for word in [*command, *flags]],
        env=os.environ | {"PYTHONPATH": path, "UCX_TLS": "tcp,self"} | variables,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.full
def test_two_machines_have_the_bits_of_one_process(whole, tmp_path, namespaces):
    with over_the_cable(namespaces[0], tmp_path / "run") as process:
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.startswith("2 ranks on 2 machines (machine-1, machine-2), 1 worker each\n")
    same_files(tmp_path / "run", whole)


@pytest.mark.full
def test_a_cut_cable_is_one_sentence_in_a_minute(whole, tmp_path, namespaces):
    launcher, cut = namespaces
    folder = tmp_path / "run"
    with over_the_cable(launcher, folder, "--epochs", "5000", SAVE_SECONDS="0") as process:
        while process.poll() is None and not (folder / "last.safetensors").exists():
            time.sleep(0.1)
        cut()
        _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Error: rank 0 on machine-1: rank 1 on machine-2 has not answered for 45 s: is" in err
