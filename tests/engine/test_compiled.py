"""Compiled loops are kept: where, by whom they are found again, and when they are not."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from with_numba import skip_without_numba

import miniconvit as mc
from miniconvit.engine import classification
from miniconvit.engine.cpu import cpu_blocks
from miniconvit.engine.processes import ProcessEngine, can_fork
from miniconvit.engine.threads import Engine

skip_without_numba()

import numba  # noqa: E402

from miniconvit.engine.kernels import compiled  # noqa: E402

ROOT = Path(__file__).parents[2]

STEP = """
import numpy as np
import miniconvit as mc
from miniconvit.engine import classification, make_engine

config = mc.ConViTConfig(16, 2, 3, 5, 24, 2, 4, local_up_to_layer=1, qkv_bias=True)
params, rng = mc.init_params(config), np.random.default_rng(0)
images = rng.standard_normal((60, 3, 16, 16), dtype="float32")

def load(start, stop):
    return images[start:stop], np.arange(start, stop) % 5

def step(workers):
    with make_engine(classification(config), np, workers) as engine:
        loss, _, grads = engine.loss_and_grads(load, len(images), params)
        return loss, sum(np.abs(grad).sum() for grad in grads.values()), engine.logits(
            load, len(images), params).sum()
"""
COUNT = """
import sys
from collections import Counter
from numba.core.dispatcher import Dispatcher
import numba

before = numba.config.CACHE_DIR
found = step(1)
loops = {
    (module, name): loop
    for module, home in list(sys.modules.items()) if module.startswith("miniconvit.engine.kernels")
    for name, loop in vars(home).items() if isinstance(loop, Dispatcher)
}
counts = Counter()
for loop in {id(loop): loop for loop in loops.values()}.values():
    counts["kept"] += sum(loop.stats.cache_hits.values())
    counts["compiled"] += sum(loop.stats.cache_misses.values())
    counts["loops"] += "nogil" in loop.targetoptions
assert numba.config.CACHE_DIR == before
print(counts["loops"], counts["kept"], counts["compiled"], *found)
"""


def begun(code, **environment):
    """A new process with this code; where a variable is None there is none."""
    variables = os.environ | {"OPENBLAS_NUM_THREADS": "1"} | environment
    return subprocess.Popen(
        [sys.executable, "-c", STEP + code],
        env={name: value for name, value in variables.items() if value is not None},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def printed(process):
    """The words that it prints."""
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return said.split()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder for caches in which two processes at once have put their loops, and what these
    printed."""
    where = {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")), "NUMBA_CACHE_DIR": None}
    return where, [printed(process) for process in [begun(COUNT, **where) for _ in range(2)]]


def test_who_comes_after_compiles_nothing(cache):
    """Two that compile at the same time do not disturb each other either."""
    where, both = cache
    for loops, kept, newly, *_ in both:
        assert int(loops) >= 12 and int(kept) + int(newly) >= int(loops)
    (loops, _, newly, *numbers), other = both
    assert int(newly) > 0 and other[3:] == numbers
    again = printed(begun(COUNT, **where))
    assert again == [loops, loops, "0", *numbers]
    (home,) = Path(where["XDG_CACHE_HOME"]).iterdir()
    assert home.name == "miniconvit"
    (version,) = home.iterdir()
    assert version.name.startswith("numba-") and any(version.rglob("*.nbc"))


@pytest.mark.skipif(not can_fork(), reason="workers are processes on Linux alone")
def test_forked_workers_compile_nothing(monkeypatch):
    """Nor does this process, once the engine is there: whatever asks a compiler is an error."""

    def refuse(*arguments, **options):
        raise AssertionError("something was compiled")

    config = mc.ConViTConfig((12, 20), 2, 3, 7, 24, 3, 4, local_up_to_layer=2, drop_path_rate=0.4)
    params, rng = mc.init_params(config), np.random.default_rng(0)
    images, labels = rng.standard_normal((80, 3, 12, 20), dtype="float32"), np.arange(80) % 7

    def load(start, stop):
        return images[start:stop], labels[start:stop]

    cpu_blocks()
    monkeypatch.setattr(numba.core.compiler, "compile_extra", refuse)
    with pytest.raises(AssertionError, match="something was compiled"):
        numba.njit(lambda x: x)(1)
    for kind in (Engine, ProcessEngine):
        with kind(classification(config), 2) as engine:
            loss, _, grads = engine.loss_and_grads(load, 80, params)
            assert np.isfinite(loss) and len(grads) == len(params)
            assert np.isfinite(engine.logits(load, 80, params)).all()


def test_who_waits_at_a_terminal_is_told(folder_of, tmp_path, monkeypatch, capsys):
    """Once, and in no file or pipe."""
    folder, _ = folder_of(XDG_CACHE_HOME=tmp_path)
    for terminal, kept, lines in ((False, [], 0), (True, [], 1), (True, ["a"], 1),
                                  (True, ["a", "b"], 0)):  # fmt: skip
        for module in kept:
            (folder / "kernels_0").mkdir(exist_ok=True)
            (folder / "kernels_0" / f"{module}.loop-1.py311.1.nbc").touch()
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        with compiled.cached("a", "b"):
            pass
        out, err = capsys.readouterr()
        assert (out, err.count("compiling the kernels")) == ("", lines)


def test_a_home_that_cannot_be_written(cache, tmp_path):
    """A temporary folder takes its place, and is gone with the process."""
    where = {"XDG_CACHE_HOME": None, "NUMBA_CACHE_DIR": None, "HOME": "/dev/null"}
    loops, kept, newly, *numbers = printed(begun(COUNT, **where, TMPDIR=str(tmp_path)))
    assert int(kept) == 0 and int(newly) >= int(loops)
    assert numbers == cache[1][0][3:]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def folder_of(monkeypatch, tmp_path):
    """The folder for the loops with these variables; where one is None there is none."""
    temporary = []
    monkeypatch.setattr(compiled, "_TEMPORARY", temporary)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def find(**variables):
        for name, value in variables.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, str(value))
        return Path(compiled._folder()), bool(temporary)

    yield find
    for folder in temporary:
        folder.cleanup()


def test_where_the_loops_are_kept(folder_of, tmp_path):
    folder, temporary = folder_of(XDG_CACHE_HOME=tmp_path / "own")
    assert folder.parent == tmp_path / "own" / "miniconvit" and not temporary
    assert folder.is_dir() and list(folder.iterdir()) == []
    for nothing in (None, ""):
        home, temporary = folder_of(XDG_CACHE_HOME=nothing, HOME=tmp_path / "home")
        assert home == tmp_path / "home" / ".cache" / "miniconvit" / folder.name
        assert not temporary


def test_a_folder_that_cannot_be_made(folder_of, tmp_path):
    (tmp_path / "file").write_text("")
    folder, temporary = folder_of(XDG_CACHE_HOME=tmp_path / "file")
    assert temporary and folder.parent == tmp_path and folder.is_dir()


def test_a_folder_that_cannot_be_written(folder_of, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    folder, temporary = folder_of(XDG_CACHE_HOME=tmp_path / "full")
    assert temporary and folder.parent == tmp_path


def test_where_there_is_no_home(folder_of, tmp_path, monkeypatch):
    def homeless(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    folder, temporary = folder_of(XDG_CACHE_HOME=None)
    assert temporary and folder.parent == tmp_path


def test_a_changed_source_gets_another_folder(folder_of, tmp_path, monkeypatch):
    here = folder_of(XDG_CACHE_HOME=tmp_path / "cache")[0]
    copy = tmp_path / "kernels"
    shutil.copytree(Path(compiled.__file__).parent, copy)
    monkeypatch.setattr(compiled, "__file__", str(copy / "compiled.py"))
    assert compiled._folder() == here
    seen = {here}
    for name in ("passes.py", "float32.py", "compiled.py"):
        (copy / name).write_text((copy / name).read_text() + "\n")
        seen.add(compiled._folder())
    assert len(seen) == 4


@pytest.mark.parametrize("given", [False, True])
def test_numbas_own_setting_is_left_as_it_was(folder_of, tmp_path, monkeypatch, given):
    """And holds, where there is one: with a folder in it for this version of the loops."""
    before = str(tmp_path / "given") if given else ""
    monkeypatch.setattr(numba.config, "CACHE_DIR", before)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with compiled.cached():
        parent = tmp_path / ("given" if given else "miniconvit")
        (folder,) = parent.glob("numba-*")
        assert str(folder) == numba.config.CACHE_DIR
    assert before == numba.config.CACHE_DIR
    with pytest.raises(ZeroDivisionError), compiled.cached():
        1 / 0  # noqa: B018
    assert before == numba.config.CACHE_DIR
