"""The device path without a GPU: a strict stand-in for CuPy runs whole trainings, and every way in
which CUDA can be unusable is answered by one sentence."""

import ast
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import cupy_names
import fakecuda
import fakecupy
import numpy as np
import pytest
from click.testing import CliRunner
from small_run import FLAGS, small_dataset, stop_after

import miniconvit as mc
import miniconvit.training.loop as training
from miniconvit import layers
from miniconvit.arrays import random_bits, to_cpu, to_device
from miniconvit.checkpoints.checkpoint import load_checkpoint
from miniconvit.cli import program
from miniconvit.data import augment, epoch_order, normalize
from miniconvit.engine import cuda as device
from miniconvit.engine.cuda import examine_cuda, resolve_device
from miniconvit.engine.gpu import DeviceEngine
from miniconvit.engine.kernels.cuda import block as cuda_block
from miniconvit.engine.kernels.cuda import model as cuda_model
from miniconvit.engine.objective import Classification
from miniconvit.engine.threads import Engine
from miniconvit.gradcheck import mutants
from miniconvit.optim import clip_grad_norm
from miniconvit.training.interrupt import Diverged, Interrupted
from miniconvit.training.settings import make_settings

ROOT = Path(__file__).parents[2]
SETTINGS = {"img_size": 8, "epochs": 3, "batch_size": 16, "lr": 3e-3, "seed": 3, "drop_path": 0.3,
            "label_smoothing": 0.2, "clip_grad": 0.5, "augment": "crop-flip"}  # fmt: skip
CONFIG = mc.ConViTConfig(
    (4, 6), 2, 3, 7, 24, 3, 4, 2.0, local_up_to_layer=2, drop_path_rate=0.4, qkv_bias=True
)
OBJECTIVE = Classification(CONFIG)


@pytest.fixture(autouse=True)
def small_data(monkeypatch):
    monkeypatch.setattr("miniconvit.training.run.load_dataset", small_dataset)


def run(folder, device="cuda", resume=False, **given):
    settings = make_settings(**SETTINGS | given)
    return training.train(settings, folder, resume=resume, quiet=True, workers=2, device=device)


def without_times(rows):
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows
    ]


def metrics(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return without_times([json.loads(line) for line in lines])


def tensors(folder):
    found = load_checkpoint(folder / "last.safetensors")
    return found.params | {
        f"{kind} {name}": value
        for kind, values in found.moments.items()
        for name, value in values.items()
    }


def largest_error(found, true):
    """Relative, in the norm, over all tensors but the inert ones."""
    return max(
        np.linalg.norm(found[name] - value) / np.linalg.norm(value)
        for name, value in true.items()
        if np.linalg.norm(value) > 0 and not name.endswith("pos_proj.bias")
    )


# ---------------------------------------------------------------- the names


def chain(node):
    """The attributes after an array module: ["cuda", "runtime", "memGetInfo"], or None."""
    names = []
    while isinstance(node, ast.Attribute):
        if node.attr == "xp":
            return names[::-1]
        names.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name) and node.id in ("xp", "cupy"):
        return names[::-1]
    called = node.func if isinstance(node, ast.Call) else None
    if isinstance(called, ast.Name) and called.id == "array_module":
        return names[::-1]
    return None


def used_names():
    """Full name to file of what the product takes from an array module."""
    used = {}
    for path in (ROOT / "miniconvit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and (names := chain(node)):
                used[".".join(["cupy", *names])] = path.name
    return {name: file for name, file in used.items() if not name.endswith("__")}


def test_every_name_that_is_used_exists_in_cupy():
    used = used_names()
    assert {"cupy.exp", "cupy.tanh", "cupy.cuda.runtime.memGetInfo", "cupy.minimum"} <= set(used)
    known = cupy_names.recorded_names()
    assert {name: file for name, file in used.items() if name not in known} == {}


def test_recorded_names_are_those_of_an_installed_cupy():
    pytest.importorskip("cupy", reason="CuPy is not installed; its recorded names are used")
    missing = {name for name in used_names() if name not in cupy_names.installed_names()}
    assert missing == set()


def test_the_stand_in_offers_nothing_that_cupy_lacks():
    known = cupy_names.recorded_names()
    owners = {
        "cupy": fakecupy.FUNCTIONS,
        "cupy.cuda.runtime": fakecupy.RUNTIME,
        "cupy.linalg": fakecupy.LINALG,
        "cupy.cuda.MemoryPool": vars(fakecupy.FUNCTIONS["get_default_memory_pool"]()),
        "cupy.RawModule": ["get_function"],
        "cupy.ndarray": [n for n in vars(fakecupy.DArray) if n not in ("_host", "_memory")],
        "cupyx.scipy.special": ["erf"],
    }
    of_classes = {"cupy.ndarray.__module__", "cupy.ndarray.__slots__"}
    offered = {f"{owner}.{name}" for owner, names in owners.items() for name in names}
    assert offered - known - of_classes == set()
    assert not {"cupy.errstate", "cupy.vecdot"} & known


# ---------------------------------------------------------------- the stand-in is strict

MISUSE = {
    "a NumPy function": lambda xp, d, h: np.exp(d),
    "a NumPy function of many": lambda xp, d, h: np.concatenate([d, d]),
    "a NumPy array on the right": lambda xp, d, h: d * h,
    "a NumPy array on the left": lambda xp, d, h: h * d,
    "a NumPy scalar": lambda xp, d, h: d * np.float32(2),
    "a NumPy scalar on the left": lambda xp, d, h: np.float64(2) * d,
    "a list": lambda xp, d, h: d * [1.0, 2.0, 3.0],
    "a NumPy array added in place": lambda xp, d, h: d.__iadd__(h),
    "a device array added to a NumPy array": lambda xp, d, h: h.__iadd__(d),
    "a NumPy array assigned": lambda xp, d, h: d.__setitem__(0, h[0]),
    "a NumPy index": lambda xp, d, h: d[np.array([0, 1])],
    "a list as index": lambda xp, d, h: d[[0, 1]],
    "a slice's end": lambda xp, d, h: d[: xp.arange(3)[2]],
    "a NumPy array into a device function": lambda xp, d, h: xp.exp(h),
    "a NumPy array in a stack": lambda xp, d, h: xp.stack([d, h]),
    "a NumPy factor": lambda xp, d, h: d @ h,
    "an implicit copy": lambda xp, d, h: np.asarray(d),
    "products of two types": lambda xp, d, h: d @ d.astype("float64"),
    "products of integers": lambda xp, d, h: d.astype("int64") @ d.astype("int64"),
}


@pytest.mark.parametrize("misuse", MISUSE)
def test_the_stand_in_refuses(cupy, misuse):
    array = np.ones((3, 3), "float32")
    with pytest.raises(TypeError):
        MISUSE[misuse](cupy, cupy.asarray(array), array)


def test_the_stand_in_refuses_other_names_and_bounds(cupy):
    x = cupy.arange(3)
    for missing in ("errstate", "random", "fft"):
        with pytest.raises(AttributeError):
            getattr(cupy, missing)
    with pytest.raises(IndexError):
        x[cupy.asarray([3])]


WAITS = {
    "float": float,
    "int": int,
    "bool": bool,
    "an if": lambda x: 1 if x > 0 else 0,
    "item": lambda x: x.item(),
    "get": lambda x: x.get(),
    "sqrt of math": lambda x: __import__("math").sqrt(x),
    "a mask": lambda x: x.reshape(1)[x.reshape(1) > 0],
}


@pytest.mark.parametrize("how", WAITS)
def test_the_stand_in_counts_waits(cupy, how):
    x = cupy.asarray(2.0, dtype="float32")
    assert fakecupy.STATE.waits == 0
    WAITS[how](x)
    assert fakecupy.STATE.waits == 1
    with fakecupy.forbid("wait"), pytest.raises(TypeError, match="waits"):
        WAITS[how](x)


def test_the_stand_in_counts_memory_copies_and_uploads(cupy):
    state = fakecupy.STATE
    x = cupy.zeros((2, 3, 5), "float32")
    assert (state.allocations, state.used, state.uploads) == (1, 120, 0)
    view = x.swapaxes(1, 2)[0]
    assert (state.allocations, state.used) == (1, 120)
    y = x @ x.swapaxes(1, 2)  # CuPy copies the transposed factor of a product of more than two axes
    assert (state.allocations, state.copies, state.used) == (3, 1, 120 + 2 * 3 * 3 * 4)
    z = view @ view.T  # but not of a plain one
    assert (state.copies, z.shape) == (1, (5, 5))
    del x, y, z
    assert state.used == 120  # a view keeps its memory
    cupy.asarray(np.zeros(4))
    assert (state.uploads, state.reserved) == (1, 120 + 120 + 72)  # x, its copy and y
    fakecupy.reset()
    del view
    assert state.used == 0  # what an earlier test still held is not this one's
    view = cupy.zeros((5, 3), "float32")
    with fakecupy.memory_limit(100), pytest.raises(MemoryError):
        cupy.zeros((26,), "float32")
    with fakecupy.forbid("float64"), pytest.raises(TypeError, match="float64"):
        view.astype("float64")


# ---------------------------------------------------------------- one step


def batch(n=13):
    rng = np.random.default_rng(5)
    images = rng.standard_normal((n, 3, *CONFIG.image), dtype="float32")
    return images, rng.integers(CONFIG.num_classes, size=n)


def random_params(dtype="float32"):
    rng = np.random.default_rng(6)
    params = mc.init_params(CONFIG, dtype="float64")
    return {n: (p + 0.1 * rng.standard_normal(p.shape)).astype(dtype) for n, p in params.items()}


def test_a_step_is_the_reference_and_nobody_waits(cupy):
    images, labels = batch()
    params = random_params()
    here = to_device((images, labels, params), cupy)
    fakecupy.reset()
    optimizer = mc.AdamW(here[2], lr=1e-2)
    with (
        DeviceEngine(Classification(CONFIG, 0.1), cupy) as engine,
        fakecupy.forbid("wait", "upload", "float64"),
    ):
        loss, correct, grads = engine.loss_and_grads(lambda *_: here[:2], 13, here[2], 3, 8)
        norm = clip_grad_norm(grads, 0.25)
        optimizer.step(here[2], grads)

    logits, cache = mc.convit_forward(images, params, CONFIG, True, 3, 8)
    loss_true, cache_loss = mc.cross_entropy_forward(logits, labels, 0.1)
    grads_true = mc.convit_backward(mc.cross_entropy_backward(1.0, cache_loss), cache)
    norm_true = clip_grad_norm(grads_true, 0.25)
    # of what has no gradient Adam makes +-lr, so the parameters follow the device's gradients
    mc.AdamW(params, lr=1e-2).step(params, to_cpu(grads))
    assert loss.item() == pytest.approx(loss_true, rel=1e-6)
    assert correct.item() == (logits.argmax(1) == labels).sum()
    assert norm.item() == pytest.approx(norm_true, rel=1e-6) and norm_true > 0.25
    assert largest_error(to_cpu(grads), grads_true) < 1e-6
    assert largest_error(to_cpu(here[2]), params) < 1e-6


def test_a_norm_below_the_limit_changes_nothing(cupy):
    grads = {"a": cupy.asarray(np.array([3.0, 4.0], "float32"))}
    assert clip_grad_norm(grads, 5.5).item() == 5.0
    assert grads["a"].get().tolist() == [3.0, 4.0]
    assert clip_grad_norm(grads, 2.5).item() == 5.0
    np.testing.assert_allclose(grads["a"].get(), [1.5, 2.0], rtol=1e-6)
    nothing = {"a": cupy.asarray(np.zeros(2, "float32"))}
    clip_grad_norm(nothing, 1.0)
    assert nothing["a"].get().tolist() == [0.0, 0.0]


def test_random_numbers_and_augmentation_are_the_cpus(cupy):
    images = np.random.default_rng(1).integers(0, 256, (9, 3, 5, 6)).astype(np.uint8)
    order = epoch_order(9, 4, 2)
    here, order_here = to_device((images, order), cupy)
    bits = random_bits(2**62, 7, order_here, 3, xp=cupy)
    assert np.array_equal(bits.get(), random_bits(2**62, 7, order, 3))
    changed = augment(here[order_here], order_here, 4, 2, "crop-flip")
    assert np.array_equal(changed.get(), augment(images[order], order, 4, 2, "crop-flip"))
    assert not np.array_equal(changed.get(), images[order])
    mean, std = (0.3, 0.4, 0.5), (0.2, 0.3, 0.4)
    with fakecupy.forbid("float64"):
        assert np.array_equal(normalize(changed, mean, std).get(),
                              normalize(changed.get(), mean, std))  # fmt: skip


def test_inference_fits_itself_to_the_memory(cupy):
    images, _ = batch(37)
    params = random_params()
    here = to_device(params, cupy)
    images_here = to_device(images, cupy)
    true = mc.convit_forward(images, params, CONFIG)[0]
    pieces = []

    def load(start, stop):
        pieces.append(stop - start)
        return images_here[start:stop]

    with DeviceEngine(OBJECTIVE, cupy) as engine:
        np.testing.assert_allclose(engine.logits(load, 37, here), true, rtol=1e-4, atol=1e-5)
        assert pieces == [37]
        with fakecupy.memory_limit(100_000):
            found = engine.logits(load, 37, here)
        np.testing.assert_allclose(found, true, rtol=1e-4, atol=1e-5)
        assert 1 < pieces[-1] < 19
        with fakecupy.memory_limit(1_000), pytest.raises(MemoryError):
            engine.logits(load, 37, here)


def test_a_batch_that_does_not_fit_is_answered_by_one_that_does(cupy):
    images, labels = batch(64)
    images, labels, params = to_device((images, labels, random_params()), cupy)

    def load(start, stop):
        return images[start:stop], labels[start:stop]

    with DeviceEngine(OBJECTIVE, cupy) as engine:
        engine.loss_and_grads(load, 1, params)  # cuBLAS asks for its own memory
        with fakecupy.memory_limit(500_000):
            with pytest.raises(
                mc.UserError, match=r"of 64 images does not fit .* 8.0 GB"
            ) as raised:
                engine.loss_and_grads(load, 64, params)
            fits = int(re.search(r"--batch-size (\d+), which fits", str(raised.value))[1])
            assert 1 < fits < 32
            engine.loss_and_grads(load, fits, params)
            with pytest.raises(mc.UserError):
                engine.loss_and_grads(load, 2 * fits, params)
        with (
            fakecupy.memory_limit(1_000),
            pytest.raises(mc.UserError, match=r"one image does not fit .* smaller --model"),
        ):
            engine.loss_and_grads(load, 1, params)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA_ERROR_OUT_OF_MEMORY: out of memory",  # where a kernel is loaded
        "CUBLAS_STATUS_ALLOC_FAILED",
        "cudaErrorMemoryAllocation: out of memory",
    ],
)
def test_memory_that_ends_outside_of_the_pool_is_answered_alike(cupy, monkeypatch, text):
    images, labels, params = to_device((*batch(64), random_params()), cupy)
    reference = cuda_model.Model._forward

    def fails(self, images, *args):
        if len(images) > 20:
            raise RuntimeError(text)
        return reference(self, images, *args)

    def load(start, stop):
        return images[start:stop], labels[start:stop]

    engine = DeviceEngine(Classification(CONFIG), cupy)
    with monkeypatch.context() as patch:
        patch.setattr(cuda_model.Model, "_forward", fails)
        with pytest.raises(mc.UserError, match=r"64 images .*: add --batch-size 16, which fits"):
            engine.loss_and_grads(load, 64, params)
        assert engine.logits(load, 64, params).shape == (64, CONFIG.num_classes)
    with monkeypatch.context() as patch:
        other = raising(RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS"))
        patch.setattr(cuda_model.Model, "_forward", other)
        for call in (engine.loss_and_grads, engine.logits):
            with pytest.raises(RuntimeError, match="ILLEGAL_ADDRESS"):
                call(load, 64, params)


def test_the_first_error_of_cuda_is_the_one_that_is_told(cupy, monkeypatch):
    pool = SimpleNamespace(free_all_blocks=raising(RuntimeError("cudaErrorIllegalAddress again")))
    monkeypatch.setattr(cupy, "get_default_memory_pool", lambda: pool)
    with pytest.raises(RuntimeError, match="the first"), DeviceEngine(Classification(CONFIG), cupy):
        raise RuntimeError("the first")


PLANTED = {  # name of a function of the layers: a version of it with a bug that a GPU would show
    "a float() in the step": ("gelu_forward", lambda f, x: (f(x)[0] * float(x.max()), f(x)[1])),
    "numpy on a device array": ("gelu_forward", lambda f, x: (f(x)[0], np.exp(x))),
    "a NumPy array mixed in": ("gelu_forward", lambda f, x: (f(x)[0] * np.ones(1), f(x)[1])),
    "a NumPy scalar mixed in": ("gelu_forward", lambda f, x: (f(x)[0] * np.sqrt(2.0), f(x)[1])),
    "float64 by a type": ("gelu_forward", lambda f, x: (f(x.astype("float64"))[0], f(x)[1])),
    "a constant that is sent": (
        "gelu_forward",
        lambda f, x: (f(x)[0] * fakecupy.asarray([1.0], "float32"), f(x)[1]),
    ),
    "a mask": ("softmax_backward", lambda f, dy, y: f(dy, y)[y > -1].reshape(dy.shape)),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_refused(cupy, bug, monkeypatch):
    name, planted = PLANTED[bug]
    monkeypatch.setattr("miniconvit.engine.gpu.kernels", None)  # the layers themselves
    function = getattr(layers, name)
    wrong = {name: lambda *args: planted(function, *args)}
    images, labels, params = to_device((*batch(), random_params()), cupy)
    engine = DeviceEngine(OBJECTIVE, cupy)
    with (
        mutants.planted(**wrong),
        fakecupy.forbid("wait", "upload", "float64"),
        pytest.raises(fakecupy.Refused),
    ):
        engine.loss_and_grads(lambda *_: (images, labels), 13, params)


# ---------------------------------------------------------------- whole runs


def test_a_run_is_the_cpus_and_steps_neither_wait_nor_send(cupy, tmp_path, monkeypatch):
    steps = []
    whole_step = training.train_step

    def strict_step(run, state, load):
        before = fakecupy.STATE.allocations
        strictly = ("wait", "upload", "float64") if state.step != 1 else ()  # a graph is recorded
        with fakecupy.forbid(*strictly):
            whole_step(run, state, load)
        steps.append(fakecupy.STATE.allocations - before)

    monkeypatch.setattr(training, "train_step", strict_step)
    on_device = run(tmp_path / "device")
    assert len(steps) == 18 and len(set(steps[2:])) == 1 and steps[0] > 2 * steps[2]
    assert fakecupy.STATE.graphs == 17
    monkeypatch.setattr(training, "train_step", whole_step)
    on_cpu = run(tmp_path / "cpu", "cpu")
    assert largest_error(tensors(tmp_path / "device"), tensors(tmp_path / "cpu")) < 1e-3
    for row, true in zip(on_device.rows, on_cpu.rows, strict=True):
        assert row["train_loss"] == pytest.approx(true["train_loss"], rel=1e-5)
        assert row["val_loss"] == pytest.approx(true["val_loss"], rel=1e-4)
        assert row["train_top1"] == pytest.approx(true["train_top1"], abs=0.02)
    config = json.loads((tmp_path / "device" / "config.json").read_text())
    assert config["place"] == "on the GPU: Stand-in, cupy-cuda13x 14.2.0"


def test_losses_that_tap_the_blocks_are_the_cpus(cupy, tmp_path, monkeypatch):
    """Diversity losses send gradients into the last block, whose blocks are the kernels' here."""
    weights = {"cosine": 1.0, "contrastive": 1.0, "patch_mixing": 1.0}
    counted = []
    forward = cuda_block.Blocks.forward

    def counting(self, *args):
        counted.append(1)
        return forward(self, *args)

    monkeypatch.setattr(cuda_block.Blocks, "forward", counting)
    on_device = run(tmp_path / "device", epochs=1, **weights)
    assert len(counted) >= 6 * 4 or not fakecuda.COMPILER  # 6 steps of 4 blocks
    on_cpu = run(tmp_path / "cpu", "cpu", epochs=1, **weights)
    for key in ("train_loss", "val_loss"):
        assert on_device.rows[0][key] == pytest.approx(on_cpu.rows[0][key], rel=1e-4)
    assert largest_error(tensors(tmp_path / "device"), tensors(tmp_path / "cpu")) < 1e-3


def test_one_wait_for_an_interval(cupy, tmp_path, monkeypatch):
    """18 steps in 3 epochs: the interval changes the waits, and no bit of the results."""
    found = {}
    for interval in (1, 4, 50):
        waits = []
        read = DeviceEngine.read

        def counted(self, rows, read=read, waits=waits):
            before = fakecupy.STATE.waits
            numbers = read(self, rows)
            waits.append((len(rows), fakecupy.STATE.waits - before))
            return numbers

        with monkeypatch.context() as patch:
            patch.setattr(DeviceEngine, "read", counted)
            patch.setattr(DeviceEngine, "steps_between_reads", interval)
            run(tmp_path / str(interval))
        found[interval] = metrics(tmp_path / str(interval)), tensors(tmp_path / str(interval))
        sizes = {1: [1] * 18, 4: [4, 2] * 3, 50: [6] * 3}[interval]
        assert [wait for wait in waits if wait[0]] == [(size, 1) for size in sizes]
        assert all(wait == 0 for size, wait in waits if not size)
    for rows, values in found.values():
        assert rows == found[50][0]
        assert all(np.array_equal(values[name], found[50][1][name]) for name in values)


@pytest.mark.parametrize(("first", "second"), [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")])
def test_interrupted_and_resumed(cupy, tmp_path, monkeypatch, first, second):
    whole = run(tmp_path / "whole", first)
    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        with pytest.raises(Interrupted):
            run(tmp_path / "parts", first)
    resumed = run(tmp_path / "parts", second, resume=True)
    found, true = tensors(tmp_path / "parts"), tensors(tmp_path / "whole")
    if first == second:
        assert all(np.array_equal(found[name], true[name]) for name in true)
        assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
        best = [tmp_path / name / "best.safetensors" for name in ("parts", "whole")]
        assert best[0].read_bytes() == best[1].read_bytes()
    assert largest_error(found, true) < 1e-3
    assert resumed.rows[-1]["train_loss"] == pytest.approx(whole.rows[-1]["train_loss"], rel=1e-4)


def test_the_precision_belongs_to_the_run(cupy, tmp_path, monkeypatch):
    monkeypatch.setattr("miniconvit.engine.cpu.numba_version", lambda: None)
    for precision, sentence in (
        ("tf32", "--precision tf32 is for --device cuda: a CPU takes float32 or bf16"),
        ("bf16", "--precision bf16 on a CPU needs Numba"),
    ):
        with pytest.raises(mc.UserError, match=sentence):
            run(tmp_path / "cpu", "cpu", precision=precision)
    assert not (tmp_path / "cpu").exists()
    if not fakecuda.COMPILER:
        pytest.skip(fakecuda.REASON)
    whole = run(tmp_path / "whole", precision="bf16")
    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        with pytest.raises(Interrupted):
            run(tmp_path / "parts", precision="bf16")
    kept = json.loads((tmp_path / "parts" / "config.json").read_text())
    assert kept["settings"]["precision"] == "bf16"
    with pytest.raises(mc.UserError, match="began with --precision bf16 and cannot go on"):
        run(tmp_path / "parts", resume=True)
    with pytest.raises(mc.UserError, match="--precision bf16 on a CPU needs Numba"):
        run(tmp_path / "parts", "cpu", resume=True, precision="bf16")
    run(tmp_path / "parts", resume=True, precision="bf16")
    found, true = tensors(tmp_path / "parts"), tensors(tmp_path / "whole")
    assert all(np.array_equal(found[name], true[name]) for name in true)
    exact = run(tmp_path / "float32")
    losses = [result.rows[-1]["train_loss"] for result in (whole, exact)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)


def test_divergence_names_the_step_that_began_it(cupy, tmp_path, monkeypatch):
    monkeypatch.setattr(DeviceEngine, "takes_whole_steps", False)
    for place in ("cpu", "cuda"):
        with monkeypatch.context() as patch:
            loss_and_grads = {"cpu": Engine, "cuda": DeviceEngine}[place].loss_and_grads

            def spoiled(self, load, n, params, seed, step, whole=loss_and_grads):
                loss, correct, grads = whole(self, load, n, params, seed, step)
                grads["head.bias"] *= float("nan") if step == 8 else 1.0
                return loss, correct, grads

            engine = {"cpu": Engine, "cuda": DeviceEngine}[place]
            patch.setattr(engine, "loss_and_grads", spoiled)
            with pytest.raises(Diverged, match=r"step 9 \(epoch 2\): .* norm nan"):
                run(tmp_path / place, place)
        kept = load_checkpoint(tmp_path / place / "last.safetensors")
        assert kept.state["step"] == 6


def test_the_commands_on_a_device(cupy, tmp_path, monkeypatch):
    monkeypatch.setattr("miniconvit.cli.eval.load_dataset", small_dataset)
    pytest.importorskip("PIL")
    from PIL import Image

    def call(*argv):
        result = CliRunner().invoke(program, [str(a) for a in argv], standalone_mode=False)
        assert result.exception is None, result.output
        return result.stdout

    out = tmp_path / "run"
    shown = call("train", *FLAGS, "--epochs", 2, "--out", out)  # --device auto
    assert "on the GPU: Stand-in" in shown and "worker" not in shown
    assert "on the GPU: Stand-in" in (out / "log.txt").read_text()
    answers = {d: json.loads(call("eval", out, "--device", d, "--json")) for d in ("auto", "cpu")}
    assert answers["auto"]["computed"].startswith("on the GPU: ")
    assert answers["cpu"]["computed"] == "on the CPU"
    assert answers["auto"]["loss"] == pytest.approx(answers["cpu"]["loss"], rel=1e-5)
    assert answers["auto"]["top1"] == answers["cpu"]["top1"]
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(tmp_path / "a.png")
    tops = {
        d: json.loads(call("predict", out, tmp_path / "a.png", "--device", d, "--json"))
        for d in ("cuda", "cpu")
    }
    for found, true in zip(*(tops[d]["images"][0]["top"] for d in ("cuda", "cpu")), strict=True):
        assert found["index"] == true["index"]
        assert found["probability"] == pytest.approx(true["probability"], rel=1e-5)
    small = ["--model", "convit_micro32", "--img-size", 8, "--batch-size", 6, "--steps", 2]
    found = json.loads(call("bench", *small, "--device", "cuda", "--json"))
    assert found["workers"] is None and 0 < found["peak_memory_mb"] < 50
    assert "on the GPU: Stand-in" in call("bench", *small)
    found = json.loads(call("doctor", "--json"))
    expected = {"cupy": "cupy-cuda13x 14.2.0", "cuda_driver": "13.0", "cuda_runtime": "13.2",
                "gpu": "Stand-in", "gpu_memory_gb": 8.0, "gpu_free_gb": 6.0,
                "cuda": "ready"}  # fmt: skip
    assert found.items() >= expected.items() and found["first_kernel_ms"] > 0


def test_parameters_can_begin_on_a_device(cupy):
    params = mc.init_params(CONFIG, 4, device="cuda")
    assert all(type(p) is fakecupy.DArray for p in params.values())
    true = mc.init_params(CONFIG, 4)
    assert all(np.array_equal(p.get(), true[name]) for name, p in params.items())


def test_trees_move(cupy):
    tree = {"a": [np.ones(2), ("text", 3)], "b": {"c": np.zeros(1)}}
    there = to_device(tree, cupy)
    assert type(there["a"][0]) is type(there["b"]["c"]) is fakecupy.DArray
    assert there["a"][1] == ("text", 3)
    back = to_cpu(there)
    assert back["a"][0].tolist() == [1.0, 1.0] and back["b"]["c"].tolist() == [0.0]
    assert to_device(there["a"][0], cupy) is there["a"][0]
    assert to_cpu(tree)["a"][0] is tree["a"][0]


# ---------------------------------------------------------------- what may be missing


def raising(error):
    def function(*args, **kwargs):
        raise error

    return function


class DynamicLibNotFoundError(RuntimeError):
    pass


class CompileException(Exception):
    pass


def broken_runtime(cupy, monkeypatch, **functions):
    runtime = SimpleNamespace(**fakecupy.RUNTIME | functions)
    monkeypatch.setattr(cupy.cuda, "runtime", runtime)


def broken_kernel(error):
    return lambda cupy, patch: patch.setattr(cupy, "arange", raising(error))


def set_driver(number):
    return lambda cupy, patch: patch.setattr(device, "_driver_version", lambda: number)


def no_cupy(driver):
    def change(cupy, patch):
        patch.setattr(device, "_driver_version", lambda: driver)
        patch.setattr(device, "_wheels", dict)
        patch.setattr(
            device, "import_module", raising(ModuleNotFoundError("No module", name="cupy"))
        )

    return change


def cannot_import(error, cause=None):
    error.__cause__ = cause
    return lambda cupy, patch: patch.setattr(device, "import_module", raising(error))


def set_wheels(**wheels):
    wheels = {name.replace("_", "-"): number for name, number in wheels.items()}
    return lambda cupy, patch: patch.setattr(device, "_wheels", lambda: wheels)


def old_gpu(capability, runtime=13020, **wheels):
    def change(cupy, patch):
        patch.setattr(device, "_compute_capability", lambda: capability)
        broken_runtime(cupy, patch, runtimeGetVersion=lambda: runtime)
        no_cupy(13000)(cupy, patch) if not wheels else set_wheels(**wheels)(cupy, patch)

    return change


def no_files(cupy, patch):
    patch.setattr(
        device, "import_module", raising(ModuleNotFoundError("No module named 'cupy'", name="cupy"))
    )


def cache_that_cannot_be_made(cupy, patch):
    patch.setenv("CUPY_CACHE_DIR", "/dev/null/kernels")
    patch.setattr(device, "_find_cache", FIND_CACHE)


FIND_CACHE = device._find_cache  # the stand-in's place takes none
WRAPPED = f"""
{"=" * 64}
Failed to import CuPy.

If you installed CuPy via wheels (cupy-cudaXXX)
Original error:
  ImportError: libfoo.so.1: cannot open shared object file
{"=" * 64}
"""  # what cupy/__init__.py raises
INSTALL = "pip install -U 'cupy-cuda13x[ctk]'"
REMOVE = "pip uninstall -y"
TROUBLES = {
    "CuPy missing": (no_cupy(13000), "CuPy is not installed", INSTALL),
    "CuPy missing, older driver": (
        no_cupy(12080), "CuPy is not installed", "pip install -U 'cupy-cuda12x[ctk]'"),
    "CuPy missing, older GPU": (
        old_gpu(61), "CuPy is not installed", "pip install -U 'cupy-cuda12x[ctk]'"),
    "CuPy's files missing": (
        no_files, "the files of cupy-cuda13x are missing, though it counts as installed",
        f"{REMOVE} cupy-cuda13x, then {INSTALL}"),
    "CuPy too old": (
        set_wheels(cupy_cuda13x="13.6.0"),
        "cupy-cuda13x 13.6.0 is too old: it must be 14.1 or newer", INSTALL),
    "CuPy of another CUDA too old": (
        set_wheels(cupy_cuda11x="13.6.0"), "cupy-cuda11x 13.6.0 is too old",
        f"{REMOVE} cupy-cuda11x, then {INSTALL}"),
    "CuPy without metadata too old": (
        lambda cupy, patch: patch.setattr(cupy, "__version__", "14.0.1"),
        "CuPy 14.0.1 is too old", f"{REMOVE} cupy, then {INSTALL}"),
    "CUPY_CACHE_DIR": (
        cache_that_cannot_be_made, "CuPy cannot keep compiled kernels in CUPY_CACHE_DIR ([Errno",
        "set CUPY_CACHE_DIR to a folder that can be written"),
    "CuPy and driver missing": (
        no_cupy(0), "CuPy is not installed and there is no NVIDIA driver", "--device cpu"),
    "CuPy broken": (
        cannot_import(ImportError("numpy.core.multiarray\nfailed to import")),
        "CuPy cannot be imported (numpy.core.multiarray failed to import)",
        f"{REMOVE} cupy-cuda13x, then {INSTALL}"),
    "CuPy broken, as it says it": (
        cannot_import(ImportError(WRAPPED), ImportError("libfoo.so.1: cannot open shared object")),
        "CuPy cannot be imported (libfoo.so.1: cannot open shared object)",
        f"{REMOVE} cupy-cuda13x, then {INSTALL}"),
    "a part of CuPy missing": (
        cannot_import(ModuleNotFoundError("No module named 'cuda.pathfinder'", name="cuda")),
        "No module named 'cuda.pathfinder'", f"{REMOVE} cupy-cuda13x, then {INSTALL}"),
    "no driver": (set_driver(0), "no NVIDIA driver was found", "--device cpu"),
    "driver too old": (
        set_driver(12040), "the driver serves CUDA 12.4, and cupy-cuda13x needs CUDA 13",
        f"update the driver to 580 or newer, or {REMOVE} cupy-cuda13x and pip install -U "
        "'cupy-cuda12x[ctk]'"),
    "driver much too old": (
        set_driver(11040), "the driver serves CUDA 11.4", "update the driver to 580 or newer"),
    "two wheels": (
        set_wheels(cupy_cuda12x="14.2.0", cupy_cuda13x="14.2.0"),
        "2 CuPy packages are installed over each other (cupy-cuda12x, cupy-cuda13x)",
        f"{REMOVE} cupy-cuda12x cupy-cuda13x, then {INSTALL}"),
    "no GPU": (
        lambda cupy, patch: broken_runtime(
            cupy, patch, getDeviceCount=raising(RuntimeError("cudaErrorNoDevice: none"))),
        "no GPU can be used (cudaErrorNoDevice: none)", "CUDA_VISIBLE_DEVICES"),
    "hidden GPU": (
        lambda cupy, patch: broken_runtime(cupy, patch, getDeviceCount=lambda: 0),
        "no GPU can be used (0 devices)", "CUDA_VISIBLE_DEVICES"),
    "no NVRTC": (
        broken_kernel(DynamicLibNotFoundError('Failure finding "libnvrtc.so.13"')),
        "CUDA's compiler NVRTC was not found", INSTALL),
    "no headers": (
        broken_kernel(
            CompileException('k.cu(1): catastrophic error: cannot open source file "cuda_fp16.h"')),
        "CUDA's headers were not found", INSTALL),
    "no cuBLAS": (
        broken_kernel(ImportError('Failure finding "libcublasLt.so.13"')),
        "cuBLAS was not found", INSTALL),
    "a GPU too old for CUDA 13": (
        old_gpu(61, cupy_cuda13x="14.2.0"),
        "this GPU (compute capability 6.1) is served by CUDA 12 only, and cupy-cuda13x needs CUDA",
        f"{REMOVE} cupy-cuda13x, then pip install -U 'cupy-cuda12x[ctk]'"),
    "a GPU too new for the compiler": (
        broken_kernel(RuntimeError("CUDA_ERROR_NO_BINARY_FOR_GPU: no kernel image is available")),
        "CuPy cannot compile and run a kernel (CUDA_ERROR_NO_BINARY_FOR_GPU", INSTALL),
    "memory full": (
        broken_kernel(fakecupy.OutOfMemoryError("Out of memory allocating 512 bytes")),
        "the GPU's memory is full", "stop the programs that nvidia-smi lists"),
    "wrong results": (
        lambda cupy, patch: patch.setattr(
            sys.modules["cupyx.scipy.special"], "erf", lambda x: x),
        "the GPU computes wrongly", "update the driver"),
}  # fmt: skip


@pytest.mark.parametrize("trouble", TROUBLES)
def test_what_is_missing_is_one_sentence_with_the_next_step(cupy, monkeypatch, trouble):
    change, finding, remedy = TROUBLES[trouble]
    change(cupy, monkeypatch)
    with pytest.raises(mc.UserError) as raised:
        resolve_device("cuda")
    sentence = str(raised.value)
    assert sentence.startswith("--device cuda cannot be used: ")
    assert finding in sentence and remedy in sentence and "\n" not in sentence
    chosen, why = resolve_device("auto")
    assert chosen is np
    assert why.startswith("on the CPU: ") and finding in why
    verdict = examine_cuda()["cuda"]
    assert finding in verdict and remedy in verdict


def test_an_old_gpu_computes_with_cuda_12(cupy, monkeypatch):
    for capability, runtime in ((61, 12090), (75, 13020), (None, 13020)):
        with monkeypatch.context() as patch:
            old_gpu(capability, runtime, cupy_cuda12x="14.2.0")(cupy, patch)
            assert resolve_device("cuda")[0] is cupy


def test_a_home_that_cannot_be_written_is_no_obstacle(cupy, monkeypatch, tmp_path):
    monkeypatch.setattr(device, "_find_cache", FIND_CACHE)
    monkeypatch.delenv("CUPY_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_device("cuda")[0] is cupy
    assert (tmp_path / ".cupy/kernel_cache").is_dir() and "CUPY_CACHE_DIR" not in os.environ
    monkeypatch.setenv("HOME", "/dev/null")
    monkeypatch.setenv("CUPY_CACHE_DIR", "x")  # put back at the end as it was
    monkeypatch.delenv("CUPY_CACHE_DIR")
    assert resolve_device("cuda")[0] is cupy
    folder = Path(os.environ["CUPY_CACHE_DIR"])
    assert folder.is_dir() and not list(folder.iterdir())
    device._CACHE.pop().cleanup()
    assert not folder.exists()


def test_that_kernels_are_compiled_is_said_once(cupy, monkeypatch, tmp_path):
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    arange = cupy.arange

    def compiled(*args, **kwargs):
        (tmp_path / "0123.cubin").touch()
        return arange(*args, **kwargs)

    monkeypatch.setattr(cupy, "arange", compiled)
    sentence = "on the GPU: Stand-in, cupy-cuda13x 14.2.0"
    compiles = ", which compiles its kernels in the first step, once"
    assert resolve_device("cuda")[1] == sentence + compiles
    assert resolve_device("cuda")[1] == sentence


def test_devices_by_name(cupy):
    assert resolve_device("cpu") == (np, "on the CPU, as asked for")
    sentence = "on the GPU: Stand-in, cupy-cuda13x 14.2.0"
    assert resolve_device("cuda") == resolve_device("auto") == (cupy, sentence)
    with pytest.raises(mc.UserError, match="unknown device 'gpu': choose one of auto, cpu, cuda"):
        resolve_device("gpu")


def test_on_this_machine_as_it_is(tmp_path):
    """Whatever is installed: a run on the GPU, or a sentence and exit status 2."""
    found = examine_cuda()
    module, why = resolve_device("auto")
    assert (found["cuda"] == "ready") == (module is not np)
    if module is not np:
        return
    assert why.removeprefix("on the CPU: ") in found["cuda"]
    with pytest.raises(mc.UserError, match=r"^--device cuda cannot be used: .*; .*"):
        run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", [mc.AdamW, mc.Muon])
def test_without_the_kernels_an_optimizer_moves_the_parameters(cupy, monkeypatch, kind):
    monkeypatch.setattr("miniconvit.engine.gpu.kernels", None)
    params = random_params()
    (images, labels), there = to_device((batch(), params), cupy)
    with DeviceEngine(Classification(CONFIG), cupy) as engine:
        engine.hold(there, optimizer := kind(there, 0.1))
        _, _, grads = engine.loss_and_grads(lambda *_: (images, labels), 13, there)
        engine.update(optimizer, there, grads)
    kind(params, 0.1).step(params, to_cpu(grads))
    assert largest_error(to_cpu(there), params) < 1e-5
