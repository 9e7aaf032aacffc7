"""Compiled loops check no index. Here all that they work on lies beside memory that nobody may
touch, right before it or right behind it, and a process that touches it is killed.

The processes are forked, so that the end of one is a failure and not the end of all tests.
"""

import ctypes
import inspect
import mmap
import os
import signal
import sys
import textwrap
import traceback
import tracemalloc
from dataclasses import replace

import amx
import numpy as np
import pytest
from with_numba import skip_without_numba

import miniconvit as mc
from miniconvit import AdamW
from miniconvit.engine.processes import can_fork
from miniconvit.layers.names import part

skip_without_numba()

import numba  # noqa: E402

from miniconvit.engine.kernels import compiled, float32, passes  # noqa: E402
from miniconvit.engine.kernels.adamw import adamw_step  # noqa: E402
from miniconvit.engine.kernels.block import Blocks  # noqa: E402
from miniconvit.engine.kernels.float32 import Float32  # noqa: E402

pytestmark = pytest.mark.skipif(not can_fork(), reason="memory is guarded on Linux alone")

ARITHMETICS = ["float32", "bf16"]
CONFIGS = [
    mc.ConViTConfig((6, 10), 2, 3, 5, 12, 2, 4, 2.5, local_up_to_layer=1),
    mc.ConViTConfig((3, 33), (3, 3), 1, 2, 27, 2, 9, 2.2, local_up_to_layer=1, qkv_bias=True),
    mc.ConViTConfig(4, 4, 1, 2, 7, 2, 1, 1.0, local_up_to_layer=1),
    mc.ConViTConfig((28, 20), (2, 4), 1, 3, 20, 2, 1, 3.0, True, local_up_to_layer=2),
]
WIDE = [
    mc.ConViTConfig(8, 2, 3, 5, 48, 2, 4, local_up_to_layer=1),
    mc.ConViTConfig(8, 2, 3, 5, 72, 2, 9, local_up_to_layer=1, qkv_bias=True),
    mc.ConViTConfig((6, 22), 2, 3, 5, 117, 2, 9, 3.3, local_up_to_layer=1),
    mc.ConViTConfig(6, 2, 3, 5, 432, 2, 9, local_up_to_layer=1),
]
VARIANTS = {
    (config.embed_dim, config.num_heads, config.num_patches): config
    for config in (
        # few tokens are enough for the widest ones
        replace(config, img_size=5 * config.patch_size) if config.embed_dim > 256 else config
        for config in mc.VARIANTS.values()
    )
}
NAMED = [
    pytest.param(size, id="D{}-H{}-N{}".format(*size), marks=[pytest.mark.full] * (size[0] > 400))
    for size in VARIANTS
]
EMPTY, PAGE = compiled.empty, mmap.PAGESIZE
BEFORE, BEHIND = False, True  # where the memory is that nobody may touch
KILLED = -signal.SIGSEGV, -signal.SIGBUS


@pytest.fixture(params=ARITHMETICS)
def arithmetic(request):
    return arithmetic_of(request.param)


def arithmetic_of(name):
    if name == "float32":
        return Float32
    amx.emulate()
    from miniconvit.engine.kernels.bf16 import Bf16

    return Bf16


def guarded(where):
    """As compiled.empty, between two pages that nobody may touch and beside one; all is NaN."""
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int

    def empty(shape, dtype=np.float32):
        count = int(np.prod(shape))
        size = count * np.dtype(dtype).itemsize
        room = -(-size // PAGE) * PAGE
        memory = mmap.mmap(-1, room + 2 * PAGE)  # lives as long as the array
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for page in (address, address + PAGE + room):
            assert mprotect(page, PAGE, 0) == 0
        start = PAGE + (room - size if where == BEHIND else 0)
        array = np.frombuffer(memory, dtype, count, start).reshape(shape)
        array.view(np.uint8)[...] = 0xFF
        return array

    return empty


def place(empty):
    """All modules of the kernels take their memory from here."""
    for name, module in list(sys.modules.items()):
        if name.startswith(compiled.__package__) and getattr(module, "empty", None) is EMPTY:
            module.empty = empty


def put(x, empty):
    y = empty(x.shape, x.dtype)
    y[...] = x
    return y


def end_of(function):
    """How a forked process that calls the function ends: 0, 1 after an exception, or minus the
    number of the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        for number in (signal.SIGSEGV, signal.SIGBUS):  # quietly, and SIGILL may execute tiles
            signal.signal(number, signal.SIG_DFL)
        try:
            function()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def results(arithmetic, config, B, empty, keep=True):
    """What all blocks of a model, and its last blocks, give for random arguments that lie there."""
    rng, found = np.random.default_rng(0), []
    params = {name: put(p, empty) for name, p in mc.init_params(config).items()}
    blocks = Blocks(arithmetic, keep)
    for i, name in [(0, "block"), (1, "block"), (0, "last_block"), (1, "last_block")]:
        mine = part(params, f"blocks.{i}.")
        N = config.num_patches + (i >= config.local_up_to_layer)
        x = put(rng.standard_normal((B, N, config.embed_dim), dtype="float32"), empty)
        forward, backward = (getattr(blocks, f"{name}_{way}") for way in ("forward", "backward"))
        masks = np.arange(B) != 1, np.arange(B) != 2
        y, cache = forward(x, mine, config.num_heads, config.grid, masks, 0.8)
        found.append(y)
        if keep:
            dy = put(rng.standard_normal(y.shape, dtype="float32"), empty)
            dx, grads = backward(dy, cache)
            found += [dx, *grads.values()]
    return found


def assert_stays_inside(arithmetic, config, B, where, keep=True):
    """Nothing outside is touched, and nothing is read that was not written before."""

    def check():
        expected = results(arithmetic, config, B, EMPTY, keep)
        empty = guarded(where)
        place(empty)
        for found, true in zip(results(arithmetic, config, B, empty, keep), expected, strict=True):
            assert np.abs(found - true).max() <= 1e-5 * np.abs(true).max()

    assert end_of(check) == 0


@pytest.mark.parametrize("where", [BEFORE, BEHIND], ids=["before", "behind"])
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"D{config.embed_dim}")
def test_nothing_outside_is_touched(arithmetic, config, B, where):
    for keep in (True, False):
        assert_stays_inside(arithmetic, config, B, where, keep)


@pytest.mark.parametrize("where", [BEFORE, BEHIND], ids=["before", "behind"])
@pytest.mark.parametrize("config", WIDE, ids=lambda config: f"D{config.embed_dim}")
def test_nothing_outside_is_touched_by_wide_models(arithmetic, config, where):
    assert_stays_inside(arithmetic, config, 2, where)


@pytest.mark.parametrize("where", [BEFORE, BEHIND], ids=["before", "behind"])
@pytest.mark.parametrize("size", NAMED)
@pytest.mark.parametrize("arithmetic", ["bf16"], indirect=True)
def test_nothing_outside_is_touched_by_the_named_models(arithmetic, size, where):
    """Both kinds of block, of one image."""
    config = replace(VARIANTS[size], depth=2, local_up_to_layer=1)

    def check():
        empty = guarded(where)
        place(empty)
        assert all(np.isfinite(found).all() for found in results(arithmetic, config, 1, empty))

    assert end_of(check) == 0


@pytest.mark.parametrize("where", [BEFORE, BEHIND], ids=["before", "behind"])
@pytest.mark.parametrize("maps", [1, 4, 7])
@pytest.mark.parametrize("arithmetic", ["float32"], indirect=True)
def test_nothing_outside_is_touched_by_tiles(arithmetic, maps, where, monkeypatch):
    """That cut images and heads, with a rest."""
    monkeypatch.setattr(float32, "TILE", maps * CONFIGS[1].num_patches ** 2)
    assert_stays_inside(arithmetic, CONFIGS[1], 3, where)


@pytest.mark.parametrize("where", [BEFORE, BEHIND], ids=["before", "behind"])
def test_gelu_alone_stays_inside(arithmetic, where):
    def check():
        place(guarded(where))
        for shape in [(5,), (3, 7), (2, 3, 5, 11), (129, 33)]:
            for keep in (True, False):
                y, _ = Blocks(arithmetic, keep).gelu_pair[0](np.ones(shape, "float32"))
                assert np.abs(y - 0.84134475).max() < 1e-6

    assert end_of(check) == 0


def update(empty):
    """AdamW of parameters, gradients and moments in this memory."""

    def all_ones():
        shapes = {"weight": (3, 5), "bias": (7,), "scale": (1,), "long": (129, 33)}
        return {name: put(np.ones(shape, "float32"), empty) for name, shape in shapes.items()}

    params = all_ones()
    optimizer = AdamW(params, lr=0.5, weight_decay=0.0)
    optimizer.exp_avg, optimizer.exp_avg_sq = all_ones(), all_ones()
    adamw_step(optimizer, params, all_ones())
    # m = v = 1 before, so mhat = 1 / 0.1 and vhat = 1 / 0.001
    for p in params.values():
        assert np.abs(p - (1 - 0.5 * 10 / 1000**0.5)).max() < 1e-6


@pytest.mark.parametrize("where", [BEFORE, BEHIND], ids=["before", "behind"])
def test_adamw_stays_inside(where):
    assert end_of(lambda: update(guarded(where))) == 0


LOOPS = [n for n, loop in vars(passes).items() if getattr(loop, "targetoptions", {}).get("nogil")]


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_that_goes_one_too_far_is_killed(name):
    """The tests' own test: each loop, with a mistake, is seen by those above."""
    loop = getattr(passes, name)
    source = textwrap.dedent(inspect.getsource(loop.py_func))
    lines = [line for line in source.splitlines(keepends=True) if not line.startswith("@")]
    last = max(i for i, line in enumerate(lines) if " in range(" in line)
    lines[last] = lines[last].replace("):\n", " + 1):\n")
    scope = dict(vars(passes))
    exec("".join(lines), scope)
    (signature,) = loop.signatures

    def check():
        wrong = numba.njit(signature, fastmath=compiled.FAST, error_model="numpy")(scope[name])
        setattr(passes, name, wrong)
        empty = guarded(BEHIND)
        place(empty)
        results(Float32, CONFIGS[1], 3, empty)
        results(Float32, CONFIGS[1], 3, empty, keep=False)
        update(empty)

    assert end_of(check) in KILLED


TOO_FAR = {
    "products": [
        ("scale_rows", "range(sums.size)", "range(sums.size + 1)"),
        ("norm_rows", "range(weight.size)", "range(weight.size + 1)"),
        ("sum_rows", "range(count)", "range(count + BLOCK + 1)"),
        ("pair_up, pair_rows", "range(pairs.shape[0])", "range(pairs.shape[0] + 1)"),
        ("transpose_words, transpose_pairs", "(0, rows, 16)", "(0, rows + 16, 16)"),
        ("transpose_words, transpose_pairs", "(0, columns, 16)", "(0, columns + 16, 16)"),
        ("multiply, block_of, product", "range(steps)", "range(steps + 1)"),
        ("block_of, product_rows", "r * lda, lda", "(r + BLOCK) * lda, lda"),
        ("block_of, product_rows", "4 * c, ldb", "4 * (c + BLOCK), ldb"),
        ("product", "range(n)", "range(n + 1)"),
        ("product_transposed", "range(n)", "range(n + 1)"),
        ("product_rows", "min(BLOCK, R - r)", "min(BLOCK, R - r) + BLOCK + 1"),
        ("product_branch", "range(n)", "range(n + 1)"),
        ("product_gelu", "range(n)", "range(n + 1)"),
        ("product_slope", "min(BLOCK, R - r)", "min(BLOCK, R - r) + BLOCK + 1"),
    ],
    "maps": [
        ("product_into, maps_forward", "out.shape[0], BLOCK", "out.shape[0] + 1, BLOCK"),
        ("product_into, maps_forward", "out.shape[1], BLOCK", "out.shape[1] + 1, BLOCK"),
        ("store_rows, maps_forward", "range(count)", "range(count + BLOCK + 1)"),
        ("pair_columns, maps_forward", "pairs.shape[1], p", "pairs.shape[1] + 16, p"),
        ("pair_columns, maps_forward", "pairs.shape[0],\n", "pairs.shape[0] + 16,\n"),
        ("maps_forward", "range(keys)", "range(keys + 1)"),
        ("maps_forward", "range(H)", "range(H + 1)"),
        ("maps_forward", "range(B)", "range(B + 1)"),
        ("maps_backward", "range(keys)", "range(keys + 1)"),
        ("maps_backward", "range(queries)", "range(queries + 1)"),
    ],
}
"""What is too far for each loop on tiles: rows have a block more, so that one is not enough."""


@pytest.mark.full  # each is compiled: a minute and a half
@pytest.mark.parametrize(
    ("module", "names", "right", "wrong"),
    [(module, *mistake) for module, mistakes in TOO_FAR.items() for mistake in mistakes],
)
@pytest.mark.parametrize("arithmetic", ["bf16"], indirect=True)
def test_a_tile_that_goes_too_far_is_killed(arithmetic, module, names, right, wrong):
    """names: what has the mistake, and who calls it."""
    module, (*inner, name) = sys.modules[f"{compiled.__package__}.{module}"], names.split(", ")
    scope, first = dict(vars(module)), True
    for function in (*inner, name):
        source = textwrap.dedent(inspect.getsource(getattr(module, function).py_func))
        source = source[source.index("def ") :]
        if first:
            assert right in source
            source, first = source.replace(right, wrong), False
        exec(source, scope)
        if function != name:
            scope[function] = compiled.inlined(scope[function])
    (signature,) = getattr(module, name).signatures

    def check():
        wrong = numba.njit(signature, fastmath=compiled.FAST, error_model="numpy")(scope[name])
        setattr(module, name, wrong)
        empty = guarded(BEHIND)
        place(empty)
        results(arithmetic, CONFIGS[1], 3, empty)
        results(arithmetic, CONFIGS[1], 3, empty, keep=False)

    assert end_of(check) in KILLED


def test_the_guards_guard():
    for where, number in ((BEHIND, 7), (BEFORE, -1)):
        array = guarded(where)((7,))

        def end(i, array=array):
            return end_of(lambda: ctypes.string_at(array.ctypes.data + 4 * i, 4))

        assert end(0) == end(6) == 0
        assert end(number) in KILLED


def test_all_large_arrays_come_from_there(arithmetic):
    """Of 200 images NumPy itself makes no array as large as their tokens are."""
    config, B = CONFIGS[0], 200
    blocks, rng = Blocks(arithmetic), np.random.default_rng(0)
    params = mc.init_params(config)
    tokens = rng.standard_normal((B, config.num_patches, config.embed_dim), dtype="float32")

    def check():
        place(guarded(BEHIND))
        for i in (0, 1):
            tracemalloc.start()
            y, cache = blocks.block_forward(
                tokens, part(params, f"blocks.{i}."), config.num_heads, config.grid
            )
            blocks.block_backward(y, cache)
            assert tracemalloc.get_traced_memory()[1] < tokens.nbytes
            tracemalloc.stop()

    assert end_of(check) == 0
