"""The kernels for a GPU without one: their source is executed thread by thread and compared with
the lesson, and CUDA's own compiler takes it for every kind of GPU.
"""

import io
import re
from dataclasses import replace

import fakecuda
import fakecupy
import numpy as np
import pytest

import miniconvit as mc
from miniconvit import layers
from miniconvit.arrays import to_cpu, to_device
from miniconvit.engine import make_engine
from miniconvit.engine.cuda import check_precision
from miniconvit.engine.gpu import DeviceEngine
from miniconvit.engine.kernels.cuda import Blocks, Buffers, Kernels
from miniconvit.engine.kernels.cuda.block import POSITION_WARPS
from miniconvit.engine.kernels.cuda.launch import source
from miniconvit.engine.objective import Classification
from miniconvit.layers.names import part
from miniconvit.optim import clip_grad_norm, update_average

TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
CONFIG = mc.ConViTConfig(
    (6, 10), 2, 3, 7, 24, 3, 4, 1.5, local_up_to_layer=2, drop_path_rate=0.4, qkv_bias=True
)
GRID = CONFIG.grid  # 3 x 5
executed = pytest.mark.skipif(not fakecuda.COMPILER, reason=fakecuda.REASON)


@pytest.fixture
def warps(cupy, monkeypatch):
    """CuPy's stand-in with kernels whose rows are warps of 32 threads, as on a GPU."""
    monkeypatch.setattr(fakecupy.RawModule, "LANES", 32)
    return cupy


def random_like(shapes, dtype, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def random_params(config, dtype):
    noise = random_like(mc.model.param_shapes(config), dtype, 6)
    return {name: p + 0.1 * noise[name] for name, p in mc.init_params(config, 0, dtype).items()}


def assert_close(found, true, tolerance):
    """Relative in the norm, tensor by tensor; of one that vanishes, to the largest."""
    found, largest = to_cpu(found), max(np.linalg.norm(x) for x in true.values())
    assert found.keys() == true.keys()
    for name, value in true.items():
        assert found[name].shape == value.shape and found[name].dtype == value.dtype, name
        norm = np.linalg.norm(value)
        scale = norm if norm > 1e-6 * largest else largest
        assert np.linalg.norm(found[name] - value) <= tolerance * scale, name


# ---------------------------------------------------------------- blocks


def compare_block(xp, config, i, batch, dtype, masks):
    """A block of the model beside the lesson's, as convit_forward calls it."""
    params = random_like(part(mc.model.param_shapes(config), f"blocks.{i}."), dtype, 6)
    params = {name: p / 10 + name.endswith("m1.weight") for name, p in params.items()}
    tokens = config.num_patches + (i >= config.local_up_to_layer)
    shape = (batch, tokens, config.embed_dim)
    given = random_like({"x": shape, "dy": shape, "dlast": (batch, config.embed_dim)}, dtype)
    x, params_there, dys = to_device((given["x"], params, given), xp)
    blocks = Blocks(Kernels(xp, dtype, "float32"))
    keep, keep_prob = (None, None), 1.0
    if masks:
        keep, keep_prob = (np.arange(batch) % 3 > 0, np.arange(batch) % 2 > 0), 0.7
    for kind, dy in (("block", "dy"), ("last_block", "dlast")):
        about = config.num_heads, config.grid, keep, keep_prob
        y, cache = getattr(layers, f"{kind}_forward")(given["x"], params, *about)
        dx, grads = getattr(layers, f"{kind}_backward")(given[dy], cache)
        about = config.num_heads, config.grid, to_device(keep, xp), keep_prob
        found, cache = getattr(blocks, f"{kind}_forward")(x, params_there, *about)
        found_dx, found_grads = getattr(blocks, f"{kind}_backward")(dys[dy], cache)
        found_grads |= {"y": found, "dx": found_dx}
        assert_close(found_grads, grads | {"y": y, "dx": dx}, TOLERANCE[dtype])


@executed
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("i", "changes", "masks"),
    [
        (0, {}, True),
        (0, {"qkv_bias": False}, False),
        (0, {"num_heads": 1, "embed_dim": 35}, False),
        (0, {"attention": "psa"}, True),
        (2, {}, True),
        (2, {"qkv_bias": False, "num_heads": 3, "use_local_init": False}, False),
    ],
)
def test_blocks_are_the_lessons(warps, i, changes, masks, dtype):
    compare_block(warps, replace(CONFIG, **changes), i, 5, dtype, masks)


WIDTHS = {(c.embed_dim, c.num_heads, c.mlp_ratio): name for name, c in mc.VARIANTS.items()}


@executed
@pytest.mark.parametrize("name", WIDTHS.values())
def test_blocks_of_every_width(warps, name):
    """The variants' widths and heads, on a few tokens."""
    config = replace(mc.VARIANTS[name], img_size=(4, 6), patch_size=2, depth=2, local_up_to_layer=1)
    for i in (0, 1):
        compare_block(warps, config, i, 1, "float32", False)


@executed
def test_more_tokens_than_a_block_has_memory_for(cupy):
    """A block of 48 KB holds few rows of 5,000 numbers: as many warps share it as fit."""
    kernels = Kernels(cupy, "float64", "float32")
    assert [kernels.warps(numbers)[0] for numbers in (10, 1000, 5000, 10000)] == [8, 6, 1, 1]
    compare_block(cupy, replace(CONFIG, img_size=(46, 46)), 0, 2, "float64", False)


# ---------------------------------------------------------------- the whole model


def step_of(config, smoothing=0.1, soft=False, n=13, dtype="float64"):
    """(batch, params, numbers, gradients) of the lesson."""
    rng = np.random.default_rng(5)
    images = rng.standard_normal((n, config.in_chans, *config.image)).astype(dtype)
    targets = rng.integers(config.num_classes, size=n)
    if soft:
        targets = rng.dirichlet(np.ones(config.num_classes), n).astype(dtype) * 1.5
    params = random_params(config, dtype)
    numbers, grads = Classification(config, smoothing).step(
        (images, targets), params, 1.0, 0, 3, 2**40, layers
    )
    return (images, targets), params, numbers, grads


def compare_step(xp, config, smoothing=0.1, dtype="float64", **about):
    batch, params, numbers, grads = step_of(config, smoothing, dtype=dtype, **about)
    batch, params = to_device((batch, params), xp)
    with DeviceEngine(Classification(config, smoothing), xp) as engine:
        loss, correct, found = engine.loss_and_grads(
            lambda *_: batch, len(batch[0]), params, 3, 2**40
        )
        assert_close(found, grads, TOLERANCE[dtype])
        assert loss.item() == pytest.approx(numbers[0].item(), rel=TOLERANCE[dtype])
        assert correct.item() == numbers[1]
        logits = engine.logits(lambda a, b: batch[0][a:b], len(batch[0]), params)
    true = mc.convit_forward(to_cpu(batch[0]), to_cpu(params), config)[0]
    assert_close({"logits": logits}, {"logits": true}, TOLERANCE[dtype])


@executed
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_whole_step_is_the_lessons(warps, dtype, soft):
    compare_step(warps, CONFIG, dtype=dtype, soft=soft)


@executed
@pytest.mark.parametrize(
    "changes",
    [
        {"local_up_to_layer": 0},
        {"local_up_to_layer": 3},
        {"use_pos_embed": False, "drop_path_rate": 0.0, "qkv_bias": False},
        {"attention": "psa", "local_up_to_layer": 3},
        {"patch_size": (3, 2), "in_chans": 1, "num_classes": 1},
        {"depth": 1, "local_up_to_layer": 1},
    ],
)
def test_whole_steps_of_all_kinds(cupy, changes):
    compare_step(cupy, replace(CONFIG, **changes), smoothing=0.0)


class Tripled(Classification):
    """An objective that adds to another: it is still computed by what it says itself."""

    def step(self, *args):
        (loss, correct), grads = super().step(*args)
        return (3.0 * loss, correct), {name: 3.0 * grad for name, grad in grads.items()}


@executed
def test_an_objective_that_adds_to_it_computes_by_blocks(cupy):
    batch, params, _, _ = step_of(CONFIG)
    objective = Tripled(CONFIG, 0.1)
    numbers, grads = objective.step(batch, params, 1.0, 0, 3, 8, layers)
    batch, params = to_device((batch, params), cupy)
    with DeviceEngine(objective, cupy) as engine:
        before = fakecupy.STATE.launches
        loss, _, found = engine.loss_and_grads(lambda *_: batch, 13, params, 3, 8)
        assert_close(found, grads, 1e-10)
        assert loss.item() == pytest.approx(numbers[0].item(), rel=1e-10)
        by_blocks = fakecupy.STATE.launches - before
        engine.hold(params, optimizer := mc.AdamW(params))
        assert not engine.takes_whole_steps
        before = fakecupy.STATE.launches
        engine.clip(found, 1.0)
        engine.update(optimizer, params, found)
        assert fakecupy.STATE.launches - before == 4  # by the flat buffers
    before = fakecupy.STATE.launches
    objective.step(batch, params, 1.0, 0, 3, 8, layers)
    copies = len(grads)
    assert fakecupy.STATE.launches - before > 2 * (by_blocks - 4 * 114 - copies)


@executed
def test_what_is_dropped_is_what_the_lesson_drops(warps):
    kernels = Kernels(warps, "float32", "float32")
    config = replace(CONFIG, depth=5, drop_path_rate=0.6)
    from miniconvit.engine.kernels.cuda import Model

    buffers = Buffers(kernels, {"a": (2,)})
    for step in (0, 7, 2**40):
        buffers.note(step)
        found = Model(config, kernels)._factors(33, 2**62, buffers.number).get()
        for i in range(5):
            keep, share = mc.model.drop_path_masks(i, np.zeros((33, 1)), config, 2**62, step)
            for branch in range(2):
                true = 1.0 if keep[branch] is None else keep[branch].astype("float32") / share
                assert np.array_equal(found[i, branch], np.broadcast_to(np.float32(true), 33))


@executed
def test_images_and_parameters_that_do_not_fit_are_refused(cupy):
    """A kernel that is given less than it expects would read what lies behind."""
    batch, params, _, _ = step_of(CONFIG, n=2)
    batch, params = to_device((batch, params), cupy)
    with DeviceEngine(Classification(CONFIG), cupy) as engine:
        for images in (batch[0][:, :, :4], batch[0].astype("float32"), batch[0][:0]):
            with pytest.raises(mc.UserError, match="image"):
                engine.loss_and_grads(lambda *_, i=images: (i, batch[1]), 2, params)
        with pytest.raises(mc.UserError, match="targets must be"):
            engine.loss_and_grads(lambda *_: (batch[0], batch[1][:1]), 2, params)
        short = params | {"head.bias": params["head.bias"][:3]}
        with pytest.raises(mc.UserError, match=r"head.bias has shape"):
            engine.loss_and_grads(lambda *_: batch, 2, short)
        turned = params | {"head.weight": params["head.weight"].copy().T.copy().T}
        engine.loss_and_grads(lambda *_: batch, 2, turned)  # a product takes it as it lies
    with pytest.raises(ValueError, match="strides"):
        k = Kernels(cupy, "float64", "float32")
        k.rows("scale", 3, cupy.zeros((4, 3), "float64").T, None, k.empty(3, 4), 3, 1, 4)


# ---------------------------------------------------------------- the flat buffers


@executed
@pytest.mark.parametrize("kind", [mc.AdamW, mc.Muon])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_clipping_an_optimizer_and_average_are_the_libraries(warps, dtype, kind):
    shapes = {"a.weight": (5, 7), "cls_token": (1, 1, 3), "gate": (1,), "b": (2500,), "w": (40, 60)}
    shapes |= {"bn.running_var": (30,), "wide.weight": (5, 7), "tall.weight": (7, 5)}
    shapes |= {"long.weight": (3, 700), "square.weight": (6, 6, 1, 1), "row.weight": (1, 9)}
    shapes |= {"column.weight": (9, 1), "head.weight": (5, 7)}
    params, average = random_like(shapes, dtype, 1), random_like(shapes, dtype, 2)
    there, average_there = to_device((params, average), warps)
    kernels = Kernels(warps, dtype, "float32")
    buffers, optimizers = Buffers(kernels, shapes), []
    for tensors in (params, there):
        optimizers.append(kind(tensors, 1e-2, weight_decay=0.3))
    trained = [name for name in shapes if name != "gate"]
    buffers.hold(there, optimizers[1], average_there, trained)
    frozen = there["gate"].get()
    for number in range(3):
        grads = random_like(shapes, dtype, 3 + number)
        for name, grad in grads.items():
            buffers.grads[name][...] = warps.asarray(grad)
        del grads["gate"]
        limit = (3.0, 1e9, float("inf"))[number]
        norm = buffers.clip(trained, limit)
        true = clip_grad_norm(grads, limit)
        assert norm.item() == pytest.approx(true, rel=TOLERANCE[dtype]) and true > 3.0
        assert_close({n: buffers.grads[n] for n in trained}, grads, TOLERANCE[dtype])
        lr = 1e-2 * (number + 1)
        optimizers[0].step({n: params[n] for n in trained}, grads, lr)
        buffers.note_rates(optimizers[1], lr)
        buffers.update(optimizers[1], trained)
        update_average(average, params, 0.9)
        buffers.average(0.9)
    for found, true in ((there, params), (average_there, average)):
        assert_close(found, true, TOLERANCE[dtype])
    for moment in ("exp_avg", "exp_avg_sq"):
        found, true = (getattr(optimizer, moment) for optimizer in optimizers[::-1])
        assert_close(found, true, TOLERANCE[dtype])
    assert np.array_equal(there["gate"].get(), frozen)
    assert optimizers[1].step_count == 3


@executed
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_shows_in_the_norm(warps, bad):
    buffers = Buffers(Kernels(warps, "float32", "float32"), {"a": (3,)})
    buffers.grads["a"][...] = warps.asarray(np.array([1.0, bad, 2.0], "float32"))
    assert not np.isfinite(buffers.clip(["a"], 1.0).item())


# ---------------------------------------------------------------- products

LAYOUTS = {  # a (..., m, k) and b (..., k, n) out of arrays that lie in rows
    "plain": ((5, 3), (3, 4), lambda a, b: (a, b)),
    "a turned": ((3, 5), (3, 4), lambda a, b: (a.T, b)),
    "b turned": ((5, 3), (4, 3), lambda a, b: (a, b.T)),
    "both turned": ((3, 5), (4, 3), lambda a, b: (a.T, b.T)),
    "columns of more": ((5, 9), (3, 8), lambda a, b: (a[:, 3:6], b[:, 2:6])),
    "turned columns": ((5, 9), (5, 4), lambda a, b: (a[:, 3:6].T, b)),
    "one row": ((1, 3), (3, 4), lambda a, b: (a, b)),
    "one column": ((5, 3), (3, 1), lambda a, b: (a, b)),
    "one turned row": ((3, 1), (3, 4), lambda a, b: (a.T, b)),
    "batches": ((2, 3, 5, 4), (2, 3, 4, 6), lambda a, b: (a, b)),
    "turned batches": ((2, 3, 4, 5), (2, 3, 6, 4),
                       lambda a, b: (a.swapaxes(-1, -2), b.swapaxes(-1, -2))),
    "first rows of batches": ((2, 3, 5, 4), (2, 3, 4, 6), lambda a, b: (a[:, :, :2], b)),
    "one turned first row": ((2, 3, 5, 4), (2, 3, 5, 6),
                             lambda a, b: (a[:, :, :1].swapaxes(-1, -2), b[:, :, :1])),
    "one batch of several": ((1, 3, 5, 4), (1, 3, 4, 6), lambda a, b: (a, b)),
    "batches of one": ((2, 1, 5, 4), (2, 1, 4, 6), lambda a, b: (a, b)),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_products_of_every_layout(cupy, layout, dtype):
    product = __import__("miniconvit.engine.kernels.cuda.product", fromlist=["x"]).Products(
        cupy, "float32"
    )
    shape_a, shape_b, view = LAYOUTS[layout]
    given = random_like({"a": shape_a, "b": shape_b}, dtype)
    true = np.matmul(*view(given["a"], given["b"]))
    a, b = view(*to_device((given["a"], given["b"]), cupy))
    before = fakecupy.STATE.copies, fakecupy.STATE.launches
    tolerance = TOLERANCE[dtype]
    assert_close({"y": product(a, b)}, {"y": true}, tolerance)
    wide = cupy.zeros((*true.shape[:-1], true.shape[-1] + 3), dtype)
    out = wide[..., 2 : 2 + true.shape[-1]]
    product(a, b, out=out, alpha=0.5)
    product(a, b, out=out, add=True)
    assert_close({"y": out}, {"y": 1.5 * true}, tolerance)
    assert np.abs(wide.get()).sum() == pytest.approx(np.abs(out.get()).sum())
    assert (fakecupy.STATE.copies, fakecupy.STATE.launches) == before


def test_products_that_cannot_be_are_refused(cupy):
    from miniconvit.engine.kernels.cuda.product import Products

    product = Products(cupy, "float32")
    zeros = lambda *shape: cupy.zeros(shape, "float32")  # noqa: E731
    for a, b, out in (
        (zeros(3, 4), zeros(5, 4), None),
        (zeros(2, 3, 4), zeros(3, 4, 4), None),
        (zeros(3, 4, 2)[:, :, 0], zeros(4, 5), None),
        (zeros(3, 4), zeros(4, 5), zeros(5, 3).T),
        (zeros(3, 5, 3, 4)[:, :2], zeros(3, 2, 4, 4), None),
    ):
        with pytest.raises(ValueError, match=r"strides|product"):
            product(a, b, out=out)
    with pytest.raises(RuntimeError, match="CUBLAS_STATUS_ALLOC_FAILED"):
        product._library.cublasDestroy = lambda: 3
        product._call("cublasDestroy")


# ---------------------------------------------------------------- precision


@executed
@pytest.mark.parametrize(
    ("precision", "least", "most"), [("tf32", 1e-5, 4e-3), ("bf16", 5e-4, 3e-2)]
)
def test_products_in_less_precision(cupy, precision, least, most):
    """Gradients of a whole step, relative in the norm: TF32 keeps 10 bits, bfloat16 7, so a product
    is off by 2^-11 or 2^-8 at most, and a gradient by a few of that."""
    batch, params, _, grads = step_of(CONFIG, dtype="float32")
    batch, params = to_device((batch, params), cupy)
    engine = DeviceEngine(Classification(CONFIG, 0.1), cupy, precision)
    found = to_cpu(engine.loss_and_grads(lambda *_: batch, 13, params, 3, 2**40)[2])
    errors = {
        name: np.linalg.norm(found[name] - true) / np.linalg.norm(true)
        for name, true in grads.items()
        if np.linalg.norm(true) > 1e-4
    }
    assert len(errors) > 40 and least < max(errors.values()) < most
    assert all(grad.dtype == np.float32 for grad in found.values())
    logits = engine.logits(lambda a, b: batch[0][a:b], 13, params)
    true = mc.convit_forward(to_cpu(batch[0]), to_cpu(params), CONFIG)[0]
    assert 0 < np.linalg.norm(logits - true) / np.linalg.norm(true) < most


@executed
def test_bfloat16_is_rounded_to_the_nearest_even(warps):
    tie = 2.0**-8
    bits = {1.0: 0x3F80, 1 + tie: 0x3F80, 1 + 3 * tie: 0x3F82, 1 + 1.01 * tie: 0x3F81,
            -2.5: 0xC020, 3.4e38: 0x7F80, float("inf"): 0x7F80, 0.0: 0, 1e-40: 0x0001}  # fmt: skip
    k = Kernels(warps, "float32", "bf16")
    x = warps.asarray(np.array([*bits, float("nan")], "float32"))
    *found, nan = Blocks(k).operand(x[None]).get()[0].tolist()
    assert found == list(bits.values())
    assert nan & 0x7F80 == 0x7F80 and nan & 0x7F


def test_a_gpu_without_such_products_is_refused(cupy, monkeypatch):
    for capability in (80, 120, None):
        monkeypatch.setattr("miniconvit.engine.cuda._compute_capability", lambda c=capability: c)
        check_precision("bf16", cupy)
    monkeypatch.setattr("miniconvit.engine.cuda._compute_capability", lambda: 75)
    check_precision("float32", cupy)
    for precision in ("tf32", "bf16"):
        with pytest.raises(mc.UserError, match=rf"--precision {precision} needs .* 8.0 .* has 7.5"):
            check_precision(precision, cupy)
    with pytest.raises(mc.UserError, match="--precision tf32 is for --device cuda: a CPU takes"):
        make_engine(Classification(CONFIG), np, 1, "tf32")
    with pytest.raises(
        mc.UserError, match=r"unknown precision 'fp16' .*: choose one of float32, tf32"
    ):
        check_precision("fp16", np)


# ---------------------------------------------------------------- the stand-in, CUDA's compiler

WRONG = """
typedef long long i64;
typedef float T;
typedef T S;
#define KERNEL extern "C" __global__ void
KERNEL sum(const T* x, T* y) {
    T v = x[threadIdx.x];
    if (threadIdx.x %s) v += __shfl_xor_sync(0xffffffff, v, 1, 32);
    y[threadIdx.x] = v;
}
"""


@executed
def test_the_stand_in_executes_threads_and_notices_those_that_never_come(warps):
    x, y = warps.asarray(np.arange(32, dtype="float32")), warps.empty((32,), "float32")
    whole = warps.RawModule(code=WRONG % "< 32").get_function("sum")
    whole((1,), (32, 1), (x, y))
    assert y.get().tolist() == [2 * (i // 2 * 2) + 1 for i in range(32)]
    half = warps.RawModule(code=WRONG % "< 16").get_function("sum")
    with pytest.raises(fakecupy.Refused, match="threads wait"):
        half((1,), (32, 1), (x, y))
    for args in ((x,), (x, y.astype("float64")), (x, 1.0), (x[::2], y)):
        with pytest.raises(fakecupy.Refused):
            whole((1,), (32, 1), args)


@pytest.mark.parametrize(
    ("dtype", "precision", "capability"),
    [
        *(("float32", "float32", capability) for capability in (75, 80, 90, 120)),
        ("float32", "bf16", 80),
        ("float32", "bf16", 120),
        ("float64", "float32", 90),
    ],
)
def test_cudas_compiler_takes_the_kernels(dtype, precision, capability):
    """NVRTC with the options of CuPy; no kernel keeps registers in memory, and the registers of the
    largest block suffice."""
    compiler = pytest.importorskip("cupy.cuda.compiler", reason="CuPy is not installed")
    program = compiler._NVRTCProgram(source(dtype, precision), "kernels.cu", (), (), method="cubin")
    log = io.StringIO()
    options = (f"-arch=sm_{capability}", "-std=c++17", "-ftz=true", "-Xptxas", "-v")
    try:
        cubin, _ = program.compile(options, log)
    except RuntimeError as error:  # of cuda.pathfinder
        pytest.skip(f"NVRTC is not installed: {' '.join(str(error).split())[:60]}")
    assert len(cubin) > 10_000
    names = fakecuda.signatures(source(dtype, precision))
    assert len(names) > 15 and all(name.encode() in cubin for name in names)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log.getvalue())]
    assert len(registers) == len(names) and max(registers) <= 65536 // (32 * POSITION_WARPS)
    spills = [line for line in log.getvalue().splitlines() if "spill" in line]
    assert len(spills) == len(names)
    assert all("0 bytes spill stores, 0 bytes spill loads" in line for line in spills)
