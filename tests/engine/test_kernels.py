"""The blocks that the kernels make, against the lesson's in float64, and the corners where they
compute differently. Each of them holds for every arithmetic, up to its own rounding."""

import inspect
from typing import NamedTuple

import amx
import numpy as np
import pytest
from rounded import RoundedLesson
from with_numba import skip_without_numba

import miniconvit as mc
from miniconvit import layers
from miniconvit.layers.names import part

skip_without_numba()

from miniconvit.engine.kernels import attention, compiled, float32  # noqa: E402
from miniconvit.engine.kernels.block import Blocks  # noqa: E402
from miniconvit.engine.kernels.float32 import Float32  # noqa: E402


class Arithmetic(NamedTuple):
    """What blocks compute with, and how far their results may be off in norm.

    Gradients may be differences of large numbers, of which a rounding takes more. So they may also
    be off by three times what the lesson loses in float64, where it rounds the same operands.
    """

    kind: type
    forward: float
    backward: float
    lesson: object = None

    def blocks(self, keep=True):
        return Blocks(self.kind, keep)

    def too_far(self, grads, grads_true, rounded):
        """The errors that are too large, by name. rounded: gives the gradients of the lesson."""
        errors = {key: relative_error(grads[key], true) for key, true in grads_true.items()}
        errors = {key: error for key, error in errors.items() if not error <= self.backward}
        if errors and self.lesson:
            lost = rounded(self.lesson)
            limits = {key: 3 * relative_error(lost[key], grads_true[key]) for key in errors}
            errors = {key: error for key, error in errors.items() if not error <= limits[key]}
        return errors


def bf16():
    """bf16 rounds by 2^-8 at most. An output may be off by four roundings, a gradient by eight."""
    amx.emulate()
    from miniconvit.engine.kernels.bf16 import Bf16

    return Arithmetic(Bf16, 4 / 256, 8 / 256, RoundedLesson())


ARITHMETICS = {"float32": lambda: Arithmetic(Float32, 1e-6, 1e-5), "bf16": bf16}

WHOLE = ["block", "last_block"]  # what the model calls
GPSA, MHSA, PSA = 0, 1, 2  # the two blocks of every model here, and the first without its gate
CONFIGS = [
    mc.ConViTConfig((6, 10), 2, 3, 5, 12, 2, 4, 2.5, local_up_to_layer=1),
    mc.ConViTConfig(32, 4, 3, 10, 72, 2, 9, 4.0, local_up_to_layer=1, qkv_bias=True),
    mc.ConViTConfig((28, 20), (2, 4), 1, 3, 20, 2, 1, 3.0, True, local_up_to_layer=1),
    mc.ConViTConfig(4, 4, 1, 2, 7, 2, 1, 1.0, local_up_to_layer=1),  # a single patch
    mc.ConViTConfig((3, 33), (3, 3), 1, 2, 27, 2, 9, 2.2, local_up_to_layer=1),  # a row of them
]
SIZES = [(3, config) for config in CONFIGS] + [(1, CONFIGS[0]), (1, CONFIGS[3])]
REFERENCE_CASES = [(name, block) for name in WHOLE for block in (GPSA, MHSA, PSA)]
SERVED = [
    (arithmetic, name, block)
    for arithmetic in ARITHMETICS
    for name, block in REFERENCE_CASES
    if block != PSA or arithmetic == "float32"
]
DIFFERENT = [case for case in SERVED if case[1] == "block" or case[2] == MHSA]


@pytest.fixture(params=ARITHMETICS)
def arithmetic(request):
    return ARITHMETICS[request.param]()


def random_params(config, seed):
    """Random parameters of the size of trained ones, exactly representable in float32."""
    rng = np.random.default_rng(seed)
    params = mc.init_params(config, seed, "float64")
    return {
        name: (value + 0.3 * rng.standard_normal(value.shape)).astype("float32").astype("float64")
        for name, value in params.items()
    }


def arguments(config, block, B=3, seed=0):
    """Keyword arguments of a block's forward, in float64. One image is dropped on each branch."""
    rng = np.random.default_rng(seed)
    N = config.num_patches + (block == MHSA)
    params = part(random_params(config, seed), f"blocks.{block % 2}.")
    if block == PSA:
        del params["attn.gating_param"]
    return {
        "x": rng.standard_normal((B, N, config.embed_dim)).astype("float32").astype("float64"),
        "params": params,
        "num_heads": config.num_heads,
        "grid": config.grid,
        "keep": (np.arange(B) != 1, np.arange(B) != 2),
        "keep_prob": 0.75,
    }


def cast(value, dtype):
    if isinstance(value, dict):
        return {key: cast(item, dtype) for key, item in value.items()}
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return value.astype(dtype)
    return value


def small(kwargs):
    return {key: cast(value, "float32") for key, value in kwargs.items()}


def flat(value, name="x"):
    """All arrays of a nested result, by name."""
    if isinstance(value, dict):
        value = {f"{name}.{key}": item for key, item in value.items()}
    elif isinstance(value, tuple):
        value = {f"{name}[{i}]": item for i, item in enumerate(value)}
    else:
        return {name: value}
    return {key: item for inner in value for key, item in flat(value[inner], inner).items()}


def run(blocks, name, kwargs, dy=None):
    """y, dy and the gradients by name; dy is random, in the dtype of y, unless given."""
    y, cache = getattr(blocks, f"{name}_forward")(**kwargs)
    if dy is None:
        dy = np.random.default_rng(9).standard_normal(y.shape).astype("float32").astype(y.dtype)
    return y, dy, flat(getattr(blocks, f"{name}_backward")(dy, cache))


def relative_error(ours, theirs):
    scale = np.linalg.norm(theirs)
    return np.linalg.norm(ours - theirs) / scale if scale else np.linalg.norm(ours)


def assert_equals_the_reference(arithmetic, name, kwargs):
    """Blocks for float32 against the reference in float64, in norm, with the shapes of all."""
    y, dy, grads = run(arithmetic.blocks(), name, small(kwargs))
    y_true, _, grads_true = run(layers, name, kwargs, dy.astype("float64"))
    assert y.shape == y_true.shape and y.dtype == np.float32
    assert relative_error(y, y_true) <= arithmetic.forward
    assert {k: g.shape for k, g in grads.items()} == {k: g.shape for k, g in grads_true.items()}
    assert {g.dtype for g in grads.values()} == {np.dtype("float32")}

    def rounded(lesson):
        return run(lesson, name, kwargs, dy.astype("float64"))[2]

    assert arithmetic.too_far(grads, grads_true, rounded) == {}


def ids(value):
    if isinstance(value, tuple):
        B, config = value
        return f"{B}-of-{config.grid[0]}x{config.grid[1]}-D{config.embed_dim}-H{config.num_heads}"
    return value if isinstance(value, str) else ("gpsa", "mhsa", "psa")[value]


def test_the_blocks_have_what_the_model_calls(arithmetic):
    blocks = arithmetic.blocks()
    for name in WHOLE:
        for way in ("forward", "backward"):
            ours, theirs = (getattr(home, f"{name}_{way}") for home in (blocks, layers))
            names = [*inspect.signature(theirs).parameters]
            assert [*inspect.signature(ours).parameters] == names


@pytest.mark.parametrize("size", SIZES, ids=ids)
@pytest.mark.parametrize(("arithmetic", "name", "block"), SERVED, ids=ids, indirect=["arithmetic"])
def test_a_block_equals_its_reference(arithmetic, name, size, block):
    B, config = size
    assert_equals_the_reference(arithmetic, name, arguments(config, block, B))


@pytest.mark.parametrize("keep", [(True, False), (False, True), (False, False), (True, True)])
@pytest.mark.parametrize(("name", "block"), [("block", GPSA), ("last_block", MHSA)])
def test_drop_path(arithmetic, name, block, keep):
    """One branch for all images, both or none; and no masks at all."""
    kwargs = arguments(CONFIGS[0], block)
    for branches in (
        [[value] * 3 for value in keep],
        [None if value else [0] * 3 for value in keep],
    ):
        masks = tuple(None if mask is None else np.array(mask, bool) for mask in branches)
        assert_equals_the_reference(arithmetic, name, kwargs | {"keep": masks})


def test_a_bias_of_positions_that_is_not_finite_is_noticed():
    """By PSA alone: GPSA's reference does not read it either."""
    kwargs = small(arguments(CONFIGS[0], PSA))
    kwargs["params"]["attn.pos_proj.bias"][0] = np.nan
    y, _, grads = run(ARITHMETICS["float32"]().blocks(), "block", kwargs)
    assert np.isnan(y).any() and any(np.isnan(grad).any() for grad in grads.values())


@pytest.mark.parametrize("maps", [1, 4, 9, 2 * 9], ids=lambda maps: f"{maps}-maps")
@pytest.mark.parametrize(
    ("arithmetic", "name", "block"), DIFFERENT, ids=ids, indirect=["arithmetic"]
)
def test_tiles_that_cut_images_and_heads(arithmetic, name, block, maps, monkeypatch):
    """Of 3 images with 9 heads: single maps, heads left over, single images, an image left over."""
    N = 64 + (block == MHSA)
    tile = maps * N * (1 if name == "last_block" else N)  # one query, or as many as keys
    monkeypatch.setattr(float32, "TILE", tile)
    assert_equals_the_reference(arithmetic, name, arguments(CONFIGS[1], block))


def test_the_tiles_cover_all_maps_once(monkeypatch):
    for B, H, N, tile in [(3, 9, 64, 2**17), (3, 9, 8, 64), (3, 9, 8, 4 * 64), (5, 3, 8, 7 * 64)]:
        monkeypatch.setattr(float32, "TILE", tile)
        seen = np.zeros((B, H, N, N), int)
        for images, heads in float32._tiles(seen):
            seen[images, heads] += 1
            assert seen[images, heads].size <= max(tile, N * N)
        assert (seen == 1).all()


def test_gates_from_shut_to_open(arithmetic):
    """Nine heads, from all content to all position, where 1 - g or g is 0 in float32."""
    kwargs = arguments(CONFIGS[1], GPSA)
    gates = [-80.0, -18.0, -4.0, -1.0, 0.0, 2.0, 4.0, 20.0, 80.0]
    kwargs["params"]["attn.gating_param"] = np.array(gates)
    assert_equals_the_reference(arithmetic, "block", kwargs)


@pytest.mark.parametrize(("name", "block"), REFERENCE_CASES, ids=ids)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("arithmetic", ["float32"], indirect=True)
def test_float64_runs_the_reference(arithmetic, dtype, name, block):
    """To the bit, as float32 does not."""
    kwargs = arguments(CONFIGS[1], block)
    if dtype == "float32":
        kwargs = small(kwargs)
    y, dy, grads = run(arithmetic.blocks(), name, kwargs)
    y_true, _, grads_true = run(layers, name, kwargs, dy)
    same = np.array_equal(y, y_true) and all(
        np.array_equal(grads[key], grads_true[key]) for key in grads_true
    )
    assert same == (dtype == "float64")
    assert {g.dtype for g in grads.values()} == {kwargs["x"].dtype}


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(("name", "block"), REFERENCE_CASES, ids=ids)
@pytest.mark.parametrize("kind", ["float64", "x", "norm1.bias", ">f4", "psa"])
@pytest.mark.parametrize("arithmetic", ["bf16"], indirect=True)
def test_where_there_is_no_reference_one_sentence_refuses(arithmetic, kind, name, block, keep):
    """float64, one array of another type among them, and PSA."""
    kwargs = arguments(CONFIGS[1], block)
    one = kwargs["params"]["norm1.bias"]
    if kind != "float64":
        kwargs = small(kwargs)
    if kind == "x":
        kwargs["x"] = kwargs["x"].astype("float64")
    elif kind in ("norm1.bias", ">f4"):
        kwargs["params"]["norm1.bias"] = one.astype("float64" if kind == "norm1.bias" else ">f4")
    forward = getattr(arithmetic.blocks(keep), f"{name}_forward")
    if kind == "psa" and block != PSA:
        assert np.isfinite(forward(**kwargs)[0]).all()
        return
    with pytest.raises(mc.UserError) as error:
        forward(**kwargs)
    assert str(error.value) == (
        "bf16 is for float32 parameters and images, and not for PSA: leave --precision at float32"
    )


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


def misaligned(x):
    """At an odd address, as a file's bytes may lie."""
    y = np.empty(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    y[...] = x
    return y


def scattered(x):
    """Every other number of an array."""
    y = np.full((*x.shape, 2), np.nan, x.dtype)
    y[..., 0] = x
    return y[..., 0]


@pytest.mark.parametrize("layout", [read_only, misaligned, scattered, np.asfortranarray])
@pytest.mark.parametrize(("arithmetic", "name", "block"), SERVED, ids=ids, indirect=["arithmetic"])
def test_arrays_may_lie_anyhow(arithmetic, name, block, layout):
    kwargs = small(arguments(CONFIGS[0], block))
    y, dy, grads = run(arithmetic.blocks(), name, kwargs)
    kwargs["x"] = layout(kwargs["x"])
    kwargs["params"] = {name: layout(p) for name, p in kwargs["params"].items()}
    y_again, _, grads_again = run(arithmetic.blocks(), name, kwargs, layout(dy))
    assert relative_error(y_again, y) <= arithmetic.forward
    for key, grad in grads.items():
        assert relative_error(grads_again[key], grad) <= arithmetic.backward, key


@pytest.mark.parametrize("dtype", ["float64", ">f4"])
def test_other_types_among_them(arithmetic, dtype):
    """Parameters of one run the reference, where there is one, and so is dy of one taken."""
    kwargs = arguments(CONFIGS[0], MHSA)
    y, dy, grads = run(layers, "block", kwargs)
    mixed = small(kwargs)
    mixed["params"]["norm1.bias"] = mixed["params"]["norm1.bias"].astype(dtype)
    for case in (mixed, small(kwargs)) if arithmetic.kind.has_reference else (small(kwargs),):
        y_found, _, found = run(arithmetic.blocks(), "block", case, dy.astype(dtype))
        assert relative_error(y_found, y) <= arithmetic.forward
        assert all(relative_error(found[key], g) <= arithmetic.backward for key, g in grads.items())


@pytest.mark.parametrize(("arithmetic", "name", "block"), SERVED, ids=ids, indirect=["arithmetic"])
@pytest.mark.parametrize("config", CONFIGS[:3], ids=lambda config: ids((3, config)))
def test_a_block_is_a_pure_function(arithmetic, config, name, block):
    """Inputs and dy stay as they are; forwards and backwards, in any order, do not meet."""
    kwargs, others = (small(arguments(config, block, seed=seed)) for seed in (0, 1))
    before = {key: value.copy() for key, value in flat(kwargs).items() if hasattr(value, "copy")}
    blocks = arithmetic.blocks()
    forward, backward = (getattr(blocks, f"{name}_{way}") for way in ("forward", "backward"))
    alone, dy, grads_alone = run(arithmetic.blocks(), name, kwargs)
    dy_before = dy.copy()
    y, cache = forward(**kwargs)
    others, cache_others = forward(**others)
    kept = others.copy()
    backward(-dy, cache)
    first = backward(dy, cache)
    backward(dy, cache_others)
    again = flat(backward(dy, cache))
    assert np.array_equal(y, alone) and np.array_equal(others, kept)
    for grads in (flat(first), again):
        assert all(np.array_equal(grads[key], grad) for key, grad in grads_alone.items())
    assert np.array_equal(dy, dy_before)
    after = flat(kwargs)
    assert all(np.array_equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize(
    ("arithmetic", "name", "block"), DIFFERENT, ids=ids, indirect=["arithmetic"]
)
def test_what_is_given_out_is_nobody_elses(arithmetic, name, block):
    """Results share no memory with the arguments, the cache or each other: all may be written to.

    Gradients of layers side by side are views of one array, but of different parts of it.
    """
    kwargs = small(arguments(CONFIGS[0], block))
    y, dy, grads = run(arithmetic.blocks(), name, kwargs)
    results = [y, *grads.values()]
    inputs = [value for value in flat(kwargs).values() if isinstance(value, np.ndarray)]
    for i, result in enumerate(results):
        assert result.flags.writeable
        for other in [*results[:i], *inputs, dy]:
            assert not np.shares_memory(result, other)


@pytest.mark.parametrize("where", ["x", "dy", "mlp.fc1.bias", "attn.proj.weight", "norm1.weight"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("arithmetic", "name", "block"), DIFFERENT, ids=ids, indirect=["arithmetic"]
)
def test_what_is_not_finite_is_noticed(arithmetic, name, block, value, where):
    """In the same image and in the same gradients as by the reference."""
    kwargs = arguments(CONFIGS[0], block) | {"keep": (None, None), "keep_prob": 1.0}
    y, _ = getattr(layers, f"{name}_forward")(**kwargs)
    dy = np.random.default_rng(9).standard_normal(y.shape)
    target = {"x": kwargs["x"], "dy": dy}.get(where, kwargs["params"].get(where))
    target[(0,) * target.ndim] = value
    with np.errstate(all="ignore"):
        y, _, grads = run(arithmetic.blocks(), name, small(kwargs), dy.astype("float32"))
        y_true, _, grads_true = run(layers, name, kwargs, dy)
    finite, finite_true = (np.isfinite(a).reshape(3, -1).all(axis=1) for a in (y, y_true))
    np.testing.assert_array_equal(finite, finite_true)
    finite, finite_true = (
        {key for key, grad in g.items() if np.isfinite(grad).all()} for g in (grads, grads_true)
    )
    assert finite == finite_true


@pytest.mark.parametrize("size", [1e-36, 1e-18, 1e-3, 1e3, 1e15])
def test_tokens_of_any_size(arithmetic, size):
    """From next to nothing to large: what LayerNorm makes of them is finite, and so is the rest."""
    kwargs = arguments(CONFIGS[1], MHSA)
    kwargs["x"] = (size * kwargs["x"]).astype("float32").astype("float64")
    assert_equals_the_reference(arithmetic, "block", kwargs)


@pytest.mark.parametrize("sharpness", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize(
    ("arithmetic", "name", "block"), DIFFERENT, ids=ids, indirect=["arithmetic"]
)
def test_attention_with_large_scores(arithmetic, name, block, sharpness):
    """Scores far beyond the range of exp."""
    kwargs = arguments(CONFIGS[0], block)
    params, D = kwargs["params"], CONFIGS[0].embed_dim
    params["norm1.weight"], params["norm1.bias"] = np.ones(D), np.zeros(D)
    queries = params["attn.qkv.weight" if block == MHSA else "attn.qk.weight"][:D]
    queries *= sharpness
    y, _, grads = run(arithmetic.blocks(), name, small(kwargs))
    y_true, _, _ = run(layers, name, kwargs)
    # a score s is rounded by about 1e-7 s, and its weight by that much relatively
    largest = np.abs(queries).sum(axis=1).max() * np.sqrt(D)
    assert relative_error(y, y_true) <= arithmetic.forward * max(1.0, largest)
    assert all(np.isfinite(grad).all() for grad in grads.values())


def test_position_maps_hold_no_denormals():
    """The published initialisation on the published grid, where the definition has thousands."""
    config = mc.VARIANTS["convit_tiny"]
    params = mc.init_params(config)
    weight, bias = (params[f"blocks.0.attn.pos_proj.{kind}"] for kind in ("weight", "bias"))
    maps = attention._position_maps(weight, bias, config.grid)  # (H, queries, keys)
    dense, _ = layers.position_attention_dense_forward(weight, bias, config.grid)
    tiny = np.finfo("float32").tiny
    assert maps.dtype == np.float32
    assert ((dense > 0) & (dense < tiny)).any()
    assert not ((maps > 0) & (maps < tiny)).any()
    assert np.abs(maps - dense).max() <= 1e-6


@pytest.mark.parametrize(("arithmetic", "name", "block"), SERVED, ids=ids, indirect=["arithmetic"])
def test_blocks_for_inference(arithmetic, name, block):
    """As those that keep something for a backward pass; the reference equal to the last bit."""
    kwargs = arguments(CONFIGS[1], block)
    y_true, _ = getattr(layers, f"{name}_forward")(**kwargs)
    forward = getattr(arithmetic.blocks(keep=False), f"{name}_forward")
    if arithmetic.kind.has_reference:
        assert np.array_equal(forward(**kwargs)[0], y_true)
    y, _ = forward(**small(kwargs))
    trained, _ = getattr(arithmetic.blocks(), f"{name}_forward")(**small(kwargs))
    assert y.dtype == "float32" and relative_error(y, y_true) <= arithmetic.forward
    assert relative_error(y, trained) <= arithmetic.forward


@pytest.mark.parametrize(
    ("arithmetic", "attention"),
    [("float32", "gpsa"), ("float32", "psa"), ("bf16", "gpsa")],
    indirect=["arithmetic"],
)
@pytest.mark.parametrize("local_up_to_layer", [0, 1, 3])
@pytest.mark.parametrize("train", [False, True])
def test_whole_models(arithmetic, attention, local_up_to_layer, train):
    """Forward, backward and inference of a model whose last block is GPSA, PSA or MHSA."""
    config = mc.ConViTConfig(
        (6, 10), 2, 3, 5, 12, 3, 4, 2.5, local_up_to_layer=local_up_to_layer, drop_path_rate=0.4,
        attention=attention,
    )  # fmt: skip
    params, rng = random_params(config, 2), np.random.default_rng(3)
    images = rng.standard_normal((7, 3, 6, 10)).astype("float32")
    dlogits = rng.standard_normal((7, 5)).astype("float32")

    def results(dtype, blocks):
        logits, cache = mc.convit_forward(
            images.astype(dtype), cast(params, dtype), config, train, 1, 2, 3, blocks
        )
        return logits, mc.convit_backward(dlogits.astype(dtype), cache)

    logits, grads = results("float32", arithmetic.blocks())
    logits_true, grads_true = results("float64", layers)
    assert logits.dtype == np.float32
    assert relative_error(logits, logits_true) <= 2 * arithmetic.forward
    too_far = arithmetic.too_far(grads, grads_true, lambda lesson: results("float64", lesson)[1])
    assert too_far == {}
    if not train:
        blocks = arithmetic.blocks(keep=False)
        answers, _ = mc.convit_forward(
            images, cast(params, "float32"), config, blocks=blocks, keep_caches=False
        )
        assert relative_error(answers, logits_true) <= 2 * arithmetic.forward


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (3, 40000), (5,)])
def test_gelu_of_any_shape(arithmetic, shape):
    """What a network of convolutions takes by itself; a transposed x is another layout."""
    rng = np.random.default_rng(len(shape))
    true = 3 * rng.standard_normal(shape).T, rng.standard_normal(shape).T
    (forward, backward), (infer, _) = (arithmetic.blocks(keep).gelu_pair for keep in (True, False))
    for dtype, error in (("float32", arithmetic.forward), ("float64", 0.0)):
        x, dy = (a.astype(dtype) for a in true)
        kept, dy_kept = x.copy(), dy.copy()
        y, cache = forward(x)
        expected, cache_reference = layers.gelu_forward(x)
        found = (y, infer(x)[0], backward(dy, cache), backward(dy, cache))
        dx = layers.gelu_backward(dy, cache_reference)
        for one, other in zip(found, (expected, expected, dx, dx), strict=True):
            assert one.dtype == dtype and one.shape == x.shape
            assert np.abs(one - other).max() <= error * np.abs(other).max()
        assert np.array_equal(x, kept) and np.array_equal(dy, dy_kept)


@pytest.mark.parametrize("shape", [(1,), (3, 5), (192, 1024), (7, 11, 13)])
@pytest.mark.parametrize("dtype", ["float32", "uint16", "float64"])
def test_large_arrays_begin_at_a_cache_line(shape, dtype):
    arrays = [compiled.empty(shape, dtype) for _ in range(9)]
    for i, array in enumerate(arrays):
        array[...] = i
    for i, array in enumerate(arrays):
        assert array.ctypes.data % 64 == 0
        assert (array.shape, array.dtype, array.flags.c_contiguous) == (shape, dtype, True)
        assert (array == i).all()
