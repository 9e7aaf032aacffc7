"""The engine: the same gradients as one pass over the batch, the same bits for any threads, and no
waste of memory."""

import platform
import shutil
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from time import sleep
from types import SimpleNamespace

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits
from with_numba import needs_numba

import miniconvit as mc
from miniconvit import layers
from miniconvit.engine import pieces as engine_pieces
from miniconvit.engine.cpu import cpu_blocks
from miniconvit.engine.objective import Classification
from miniconvit.engine.pieces import cut
from miniconvit.engine.threads import Engine
from miniconvit.system import available_threads

CONFIG = mc.ConViTConfig((12, 20), 2, 3, 7, 24, 3, 4, 2.0, local_up_to_layer=2, drop_path_rate=0.4)
OBJECTIVE = Classification(CONFIG)
N_IMAGES = 83  # 60 patches each: pieces of unequal size
BOTH = [
    pytest.param(cpu_blocks(), id="kernels", marks=needs_numba),
    pytest.param(layers, id="reference"),
]


def make_batch(config, n, dtype="float32"):
    rng = np.random.default_rng(5)
    images = rng.standard_normal((n, config.in_chans, *config.image)).astype("float32")
    targets = rng.integers(0, config.num_classes, n)
    return lambda start, stop: (images[start:stop].astype(dtype), targets[start:stop])


def random_params(config, dtype="float32"):
    rng = np.random.default_rng(6)
    params = mc.init_params(config, dtype="float64")
    return {
        name: (value + 0.1 * rng.standard_normal(value.shape)).astype("float32").astype(dtype)
        for name, value in params.items()
    }


@pytest.fixture(scope="module")
def truth():
    """Logits, loss and gradients of the whole batch at once, by the reference in float64."""
    params, load = random_params(CONFIG, "float64"), make_batch(CONFIG, N_IMAGES, "float64")
    images, targets = load(0, N_IMAGES)
    logits, cache = mc.convit_forward(images, params, CONFIG, train=True, seed=3, step=8)
    loss, cache_loss = mc.cross_entropy_forward(logits, targets, 0.1)
    grads = mc.convit_backward(mc.cross_entropy_backward(1.0, cache_loss), cache)
    evaluated, _ = mc.convit_forward(images, params, CONFIG)
    correct = (logits.argmax(axis=1) == targets).sum()
    return SimpleNamespace(logits=evaluated, loss=loss, grads=grads, correct=correct)


def step(threads, dtype="float32", **kwargs):
    with Engine(Classification(CONFIG, 0.1), threads, **kwargs) as engine:
        load, params = make_batch(CONFIG, N_IMAGES, dtype), random_params(CONFIG, dtype)
        return (
            engine.loss_and_grads(load, N_IMAGES, params, seed=3, step=8),
            engine.logits(load, N_IMAGES, params),
        )


def errors(grads, grads_true):
    return {
        name: np.linalg.norm(grads[name] - true) / (np.linalg.norm(true) or 1.0)
        for name, true in grads_true.items()
    }


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
def test_a_step_equals_one_pass_over_the_batch(truth, dtype, tolerance):
    (loss, correct, grads), logits = step(2, dtype)
    assert isinstance(loss, float) and isinstance(correct, int)
    assert loss == pytest.approx(truth.loss, rel=tolerance)
    assert correct == truth.correct
    assert list(grads) == list(truth.grads)
    assert {g.dtype for g in grads.values()} == {np.dtype(dtype)}
    wrong = {n: e for n, e in errors(grads, truth.grads).items() if not e <= tolerance}
    assert wrong == {}
    assert np.linalg.norm(logits - truth.logits) <= tolerance * np.linalg.norm(truth.logits)


def test_any_number_of_threads_gives_the_same_bits():
    (loss, correct, grads), logits = step(1)
    for threads in (2, 3, 8):
        (loss_again, correct_again, grads_again), logits_again = step(threads)
        assert (loss, correct) == (loss_again, correct_again)
        assert all(np.array_equal(grads[name], grads_again[name]) for name in grads)
        assert np.array_equal(logits, logits_again)


@pytest.mark.parametrize("rows", [1, 60, 64, 196, 5000])
@pytest.mark.parametrize("n", [1, 2, 15, 64, 83, 1000])
def test_pieces_cover_the_batch_once_and_evenly(n, rows):
    pieces = cut(n, rows)
    assert [start for start, _ in pieces] == [0] + [stop for _, stop in pieces[:-1]]
    assert pieces[-1][1] == n
    sizes = [stop - start for start, stop in pieces]
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1
    assert max(sizes) * rows <= max(rows, engine_pieces.PIECE_ROWS)


seen_dtypes, float64_shapes = set(), set()


class Watched(np.ndarray):
    """An array whose every descendant is one too, and reports its dtype when it is made."""

    def __array_finalize__(self, parent):
        if self.dtype == np.float64:
            float64_shapes.add(self.shape)
        else:
            seen_dtypes.add(self.dtype)


Watched.__module__ = "numpy"  # so that the layers compute with NumPy


@pytest.mark.parametrize("blocks", BOTH)
@pytest.mark.parametrize("local_up_to_layer", [0, 2, 3])
def test_a_float32_step_makes_no_float64_array_of_tokens(local_up_to_layer, blocks):
    config = replace(CONFIG, local_up_to_layer=local_up_to_layer, qkv_bias=True)
    params = {name: p.view(Watched) for name, p in random_params(config).items()}
    images, targets = make_batch(config, 3)(0, 3)
    seen_dtypes.clear()
    float64_shapes.clear()
    with Engine(Classification(config, 0.1), 1, blocks) as engine:
        engine.loss_and_grads(lambda *_: (images.view(Watched), targets), 3, params)
    assert np.dtype("float32") in seen_dtypes
    assert {dtype for dtype in seen_dtypes if dtype.kind == "f"} == {np.dtype("float32")}
    # the kernels add up in float64 what the position maps get of all images together
    H, N = config.num_heads, config.num_patches
    sums = {(), (H,), (H, N, 1), (H, N, N), (H, N * N), (H, 3)}
    assert float64_shapes <= (sums if blocks is not layers and local_up_to_layer > 0 else {()})


@pytest.mark.parametrize("threads", [1, 2])
def test_memory_grows_with_the_logarithm_of_the_batch(monkeypatch, threads):
    """One image a piece, gradients that outweigh its activations, and a first piece so slow that
    the other workers could run far ahead of it."""
    monkeypatch.setattr(engine_pieces, "PIECE_ROWS", 16)
    config = mc.ConViTConfig(16, 4, 3, 10, 192, 1, 4, local_up_to_layer=1)
    params = random_params(config)
    peaks = []
    with Engine(Classification(config), threads) as engine:
        for n in (8, 64):
            batch = make_batch(config, n)

            def load(start, stop, batch=batch):
                if start == 0:
                    sleep(0.5)
                return batch(start, stop)

            tracemalloc.start()
            engine.loss_and_grads(load, n, params)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    one_set = sum(p.nbytes for p in params.values())
    # three sums more wait for their neighbours, and others depending on the threads' luck
    assert peaks[1] - peaks[0] <= (3 + 3) * one_set


@pytest.mark.parametrize("blocks", BOTH)
def test_inference_holds_one_block_at_a_time(blocks):
    """Six blocks take no more memory than one: nothing is kept for a backward pass."""
    peaks = []
    for depth in (1, 6):
        config = mc.ConViTConfig(32, 4, 3, 10, 48, depth, 4, local_up_to_layer=depth)
        params, batch = random_params(config), make_batch(config, 16)
        with Engine(Classification(config), 1, blocks) as engine:
            tracemalloc.start()
            engine.logits(batch, 16, params)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert peaks[1] <= 1.1 * peaks[0]


FAULTS = """
import os
import sys
from pathlib import Path
import numpy as np
import miniconvit as mc
from miniconvit.engine.threads import Engine
from miniconvit.engine.processes import ProcessEngine
from miniconvit.engine.objective import Classification

def minor_faults(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])

config = mc.VARIANTS["convit_mini32"]
images = np.random.default_rng(0).standard_normal((64, 3, 32, 32)).astype("float32")
params, targets = mc.init_params(config), np.arange(64) % 10
optimizer = mc.AdamW(params)
counted = [0]
kind = {"threads": Engine, "processes": ProcessEngine}[sys.argv[1]]
with kind(Classification(config), 2) as engine:
    for step in range(9):
        load = lambda start, stop: (images[start:stop], targets[start:stop])
        grads = engine.loss_and_grads(load, 64, params)[2]
        optimizer.step(params, grads)
        del grads
        pids = [os.getpid(), *getattr(engine, "_workers", {}).values()]
        counted.append(sum(map(minor_faults, pids)))
print(*np.diff(counted))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.parametrize("workers", ["threads", "processes"])
def test_a_warm_step_touches_no_fresh_memory(workers):
    """In a process of its own: the first step takes its memory page by page, later ones reuse it.

    Half of the warm steps may meet a heap that still grows a little: the median decides.
    """
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, workers],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    faults = [int(word) for word in done.stdout.split()]
    assert faults[0] > 10_000
    assert np.median(faults[3:]) <= 100


def test_an_error_in_a_worker_reaches_the_caller_and_the_engine_lives_on():
    good, params = make_batch(CONFIG, N_IMAGES), random_params(CONFIG)

    def bad(start, stop):
        if start > 0:
            raise OSError("unreadable")
        return good(start, stop)

    with Engine(OBJECTIVE, 2) as engine:
        with pytest.raises(OSError, match="unreadable"):
            engine.loss_and_grads(bad, N_IMAGES, params)
        assert engine.logits(good, N_IMAGES, params).shape == (N_IMAGES, CONFIG.num_classes)


@pytest.mark.parametrize(("limit", "expected"), [("50000 100000", 1), ("150000 100000", 2)])
def test_a_container_s_quota_limits_the_threads(tmp_path, monkeypatch, limit, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)), raising=False)
    (tmp_path / "cpu.max").write_text(limit + "\n")
    assert available_threads(tmp_path) == expected
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert available_threads(tmp_path) == 16
    assert available_threads(tmp_path / "absent") == 16
    old = tmp_path / "version1"
    (old / "cpu").mkdir(parents=True)
    (old / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    for quota, expected in (("250000", 3), ("-1", 16)):
        (old / "cpu" / "cpu.cfs_quota_us").write_text(quota + "\n")
        assert available_threads(old) == expected


def blas_threads():
    return {lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"}


def test_any_thread_takes_blas_to_one_thread_and_back():
    """Also where another one, alive or not, has set the number before."""
    config = mc.ConViTConfig(img_size=8, embed_dim=12, depth=1, local_up_to_layer=0)
    with threadpool_limits(limits=2, user_api="blas"):
        before, found = blas_threads(), []
        for _ in range(2):
            with Engine(Classification(config), 1):
                found.append(blas_threads())
            with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
                engine = one.submit(Engine, Classification(config), 1).result()
                found.append(blas_threads())
                other.submit(engine.close).result()
                assert blas_threads() == before
        assert found == [{1}] * 4


def test_blas_stays_at_one_thread_until_the_last_engine_closes():
    config = mc.ConViTConfig(img_size=8, embed_dim=12, depth=1, local_up_to_layer=0)
    with threadpool_limits(limits=2, user_api="blas"):
        before = blas_threads()
        first, second = Engine(Classification(config), 1), Engine(Classification(config), 2)
        assert blas_threads() == {1}
        first.close()
        first.close()
        assert blas_threads() == {1}
        second.close()
        assert blas_threads() == before


WITHOUT_NUMBA = """
import importlib.metadata
import sys

def version(name, found=importlib.metadata.version):
    if name == "numba":
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)

importlib.metadata.version, sys.modules["numba"] = version, None  # importing it is an ImportError
"""
WORKS = """
from miniconvit import layers
from miniconvit.cli import main
from miniconvit.engine.cpu import cpu_blocks
assert cpu_blocks() is layers
for device in [[], ["--inference"], ["--workers", "2"]]:
    try:
        main(["bench", "--model", "convit_micro32", "--img-size", "8", "--steps", "1", *device])
    except SystemExit as end:
        assert not end.code
import sys
assert not {"llvmlite", "miniconvit.engine.kernels.block"} & set(sys.modules)
"""


@pytest.mark.parametrize("left_out", ["the folder", "numba", "both"])
def test_everything_works_without_the_kernels(tmp_path, left_out):
    """On a copy of the package: the reference takes their place."""
    package, names = Path(mc.__file__).parent, ["__pycache__"]
    names += [] if left_out == "numba" else ["kernels"]
    shutil.copytree(package, tmp_path / "miniconvit", ignore=shutil.ignore_patterns(*names))
    code = WORKS if left_out == "the folder" else WITHOUT_NUMBA + WORKS
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
