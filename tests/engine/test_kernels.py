"""Every kernel against the function it replaces, and the corners where it computes differently."""

import inspect

import numpy as np
import pytest
from scipy.special import ndtr

import miniconvit as mc
from miniconvit import layers
from miniconvit.engine import kernels
from miniconvit.engine.kernels import attention, inference, tokenwise
from miniconvit.layers.names import part

WHOLE = ["block", "last_block", "layernorm"]  # what the model calls: falls back on the reference
PARTS = {"gpsa": attention, "mhsa": attention, "mlp": tokenwise}  # what they are made of
HOMES = PARTS | dict.fromkeys(WHOLE, kernels)
GPSA, MHSA, PSA = 0, 1, 2  # the two blocks of every model here, and the first without its gate
CONFIGS = [
    mc.ConViTConfig((6, 10), 2, 3, 5, 12, 2, 4, 2.5, local_up_to_layer=1),
    mc.ConViTConfig(32, 4, 3, 10, 72, 2, 9, 4.0, local_up_to_layer=1, qkv_bias=True),
    mc.ConViTConfig((28, 20), (2, 4), 1, 3, 20, 2, 1, 3.0, True, local_up_to_layer=1),
]
CASES = [
    (name, config, block)
    for name in HOMES
    for config in CONFIGS
    for block in (GPSA, MHSA, PSA)
    if name in WHOLE or name == "mlp" or (name, block) in (("gpsa", GPSA), ("mhsa", MHSA))
]
WHOLE_CASES = [case for case in CASES if case[0] in WHOLE]


def random_params(config, seed):
    """Random parameters of the size of trained ones, exactly representable in float32."""
    rng = np.random.default_rng(seed)
    params = mc.init_params(config, seed, "float64")
    return {
        name: (value + 0.3 * rng.standard_normal(value.shape)).astype("float32").astype("float64")
        for name, value in params.items()
    }


def arguments(name, config, block, B=3, seed=0):
    """Keyword arguments in float64 for `name`_forward: what its signature asks for."""
    rng = np.random.default_rng(seed)
    D = config.embed_dim
    N = config.num_patches + (block == MHSA)
    params = part(random_params(config, seed), f"blocks.{block % 2}.")
    if block == PSA:
        del params["attn.gating_param"]
    prefix = {"mlp": "mlp.", "gpsa": "attn.", "mhsa": "attn."}.get(name, "")
    known = {
        "x": rng.standard_normal((B, N, D)).astype("float32").astype("float64"),
        "weight": params["norm1.weight"],
        "bias": params["norm1.bias"],
        "params": part(params, prefix),
        "num_heads": config.num_heads,
        "grid": config.grid,
        "keep": (np.arange(B) != 1, np.arange(B) != 0),
        "keep_prob": 0.75,
    }
    wanted = inspect.signature(getattr(layers, f"{name}_forward")).parameters
    return {key: value for key, value in known.items() if key in wanted}


def cast(value, dtype):
    if isinstance(value, dict):
        return {key: cast(item, dtype) for key, item in value.items()}
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return value.astype(dtype)
    return value


def flat(value, name="x"):
    """All arrays of a nested result, by name."""
    if isinstance(value, dict):
        value = {f"{name}.{key}": item for key, item in value.items()}
    elif isinstance(value, tuple):
        value = {f"{name}[{i}]": item for i, item in enumerate(value)}
    else:
        return {name: value}
    return {key: item for inner in value for key, item in flat(value[inner], inner).items()}


def run(home, name, kwargs, dy=None):
    """y, dy and the gradients by name; dy is random, in the dtype of y, unless given."""
    y, cache = getattr(home, f"{name}_forward")(**kwargs)
    if dy is None:
        dy = np.random.default_rng(9).standard_normal(y.shape).astype("float32").astype(y.dtype)
    return y, dy, flat(getattr(home, f"{name}_backward")(dy, cache))


def relative_error(ours, theirs):
    scale = np.linalg.norm(theirs)
    return np.linalg.norm(ours - theirs) / scale if scale else np.linalg.norm(ours)


def ids(value):
    if isinstance(value, mc.ConViTConfig):
        return f"{value.grid[0]}x{value.grid[1]}-D{value.embed_dim}-H{value.num_heads}"
    return value if isinstance(value, str) else ("gpsa", "mhsa", "psa")[value]


def test_the_kernels_have_what_the_model_calls():
    for name in WHOLE:
        for way in ("forward", "backward"):
            ours, theirs = (getattr(home, f"{name}_{way}") for home in (kernels, layers))
            assert ours is not theirs
            if name != "layernorm":  # the last norm has the eps of all
                names = [*inspect.signature(theirs).parameters]
                assert [*inspect.signature(ours).parameters][: len(names)] == names


def assert_equals_the_reference(name, kwargs):
    """Float32 kernels against the float64 reference: 1e-6 forward and 1e-5 backward, in norm."""
    small = {key: cast(value, "float32") for key, value in kwargs.items()}
    y, dy, grads = run(HOMES[name], name, small)
    y_true, _, grads_true = run(layers, name, kwargs, dy.astype("float64"))
    assert y.shape == y_true.shape and y.dtype == np.float32
    assert relative_error(y, y_true) <= 1e-6
    assert {k: g.shape for k, g in grads.items()} == {k: g.shape for k, g in grads_true.items()}
    assert {g.dtype for g in grads.values()} == {np.dtype("float32")}
    errors = {key: relative_error(grads[key], grads_true[key]) for key in grads}
    assert {key: error for key, error in errors.items() if not error <= 1e-5} == {}


@pytest.mark.parametrize(("name", "config", "block"), CASES, ids=ids)
def test_a_kernel_equals_its_reference(name, config, block):
    assert_equals_the_reference(name, arguments(name, config, block))


@pytest.mark.parametrize("maps", [1, 4, 9, 2 * 9], ids=lambda maps: f"{maps}-maps")
@pytest.mark.parametrize("name", ["gpsa", "mhsa", "last_block"])
def test_tiles_that_cut_images_and_heads(name, maps, monkeypatch):
    """Of 3 images with 9 heads: single maps, heads left over, single images, an image left over."""
    block, N = (GPSA, 64) if name == "gpsa" else (MHSA, 65)
    tile = maps * N * (1 if name == "last_block" else N)  # one query, or as many as keys
    monkeypatch.setattr(attention, "TILE", tile)
    assert_equals_the_reference(name, arguments(name, CONFIGS[1], block))


def test_gates_from_shut_to_open():
    """Nine heads, from all content to all position, where 1 - g or g is 0 in float32."""
    kwargs = arguments("gpsa", CONFIGS[1], GPSA)
    gates = [-80.0, -18.0, -4.0, -1.0, 0.0, 2.0, 4.0, 20.0, 80.0]
    kwargs["params"]["gating_param"] = np.array(gates)
    assert_equals_the_reference("gpsa", kwargs)


@pytest.mark.parametrize(("name", "config", "block"), WHOLE_CASES, ids=ids)
def test_float64_runs_the_reference(name, config, block):
    kwargs = arguments(name, config, block)
    y, dy, grads = run(kernels, name, kwargs)
    y_true, _, grads_true = run(layers, name, kwargs, dy)
    assert np.array_equal(y, y_true)
    assert all(np.array_equal(grads[key], grads_true[key]) for key in grads_true)


@pytest.mark.parametrize(("name", "config", "block"), CASES, ids=ids)
def test_a_kernel_is_a_pure_function(name, config, block):
    """Inputs stay as they are, and two forwards, then their backwards, do not meet."""
    kwargs = {k: cast(v, "float32") for k, v in arguments(name, config, block).items()}
    others = {k: cast(v, "float32") for k, v in arguments(name, config, block, seed=1).items()}
    before = {key: value.copy() for key, value in flat(kwargs).items() if hasattr(value, "copy")}
    forward, backward = (getattr(HOMES[name], f"{name}_{way}") for way in ("forward", "backward"))
    alone, dy, grads_alone = run(HOMES[name], name, kwargs)
    y, cache = forward(**kwargs)
    forward(**others)
    backward(-dy, cache)
    again = flat(backward(dy, cache))
    assert np.array_equal(y, alone)
    assert all(np.array_equal(again[key], grads_alone[key]) for key in again)
    after = flat(kwargs)
    assert all(np.array_equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("shape", [(1,), (3, 5), (192, 1024), (7, 11, 13)])
def test_large_arrays_begin_at_a_cache_line(shape):
    arrays = [tokenwise.aligned(shape) for _ in range(9)]
    for i, array in enumerate(arrays):
        array[...] = i
    for i, array in enumerate(arrays):
        assert array.ctypes.data % 64 == 0
        assert (array.shape, array.dtype, array.flags.c_contiguous) == (shape, np.float32, True)
        assert (array == i).all()


def test_gelu_far_from_zero():
    """From denormals to where a cube overflows: absolute errors of GELU and of its derivative."""
    magnitudes = np.concatenate([[0.0, 1e-40, 1e-3], np.linspace(0.1, 20, 997), [1e3, 1e8, 1e15]])
    x = np.concatenate([-magnitudes, magnitudes]).astype("float32")[None]  # (1, N)
    y, slope = np.empty_like(x), x.copy()
    tokenwise._gelu(slope, y)
    y_true, cache = layers.gelu_forward(x.astype("float64"))
    slope_true = layers.gelu_backward(np.ones(x.shape), cache)
    assert np.all(np.abs(y - y_true) <= 2e-7 * np.maximum(np.abs(x), 1.0))
    assert np.all(np.abs(slope - slope_true) <= 5e-7)


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (3, 40000), (5,)])
def test_gelu_of_any_shape(shape):
    """What a network of convolutions takes by itself; a transposed x is another layout."""
    rng = np.random.default_rng(len(shape))
    true = 3 * rng.standard_normal(shape).T, rng.standard_normal(shape).T
    (forward, backward), (infer, _) = kernels.gelu_pair, inference.gelu_pair
    for dtype, error in (("float32", 1e-6), ("float64", 0.0)):
        x, dy = (a.astype(dtype) for a in true)
        kept = x.copy()
        y, cache = forward(x)
        expected, cache_reference = layers.gelu_forward(x)
        found = (y, infer(x)[0], backward(dy, cache))
        for one, other in zip(
            found, (expected, expected, layers.gelu_backward(dy, cache_reference)), strict=True
        ):
            assert one.dtype == dtype and one.shape == x.shape
            assert np.abs(one - other).max() <= error * np.abs(other).max()
        assert np.array_equal(x, kept)


def test_mlp_without_a_backward_pass():
    """Large and small hidden values, against the definition in float64; nothing is kept."""
    rng = np.random.default_rng(5)
    D, M = 6, 23
    x = (rng.standard_normal((2, 7, D)) * 4).astype("float32")
    before = x.copy()
    params = {"fc1.weight": (M, D), "fc1.bias": (M,), "fc2.weight": (D, M), "fc2.bias": (D,)}
    params = {name: rng.standard_normal(shape) for name, shape in params.items()}
    y, cache = tokenwise.mlp_inference(x, cast(params, "float32"))
    hidden = x @ params["fc1.weight"].T + params["fc1.bias"]
    expected = hidden * ndtr(hidden) @ params["fc2.weight"].T + params["fc2.bias"]
    assert y.dtype == "float32" and cache is None
    assert np.abs(y - expected).max() <= 1e-6 * np.abs(expected).max()
    assert np.array_equal(x, before)


@pytest.mark.parametrize("block", [GPSA, MHSA, PSA], ids=ids)
@pytest.mark.parametrize("name", WHOLE)
def test_blocks_for_inference(name, block):
    """In float32 equal to the reference up to rounding, in float64 to the last bit."""
    kwargs = arguments(name, CONFIGS[1], block)
    y_true, _ = getattr(layers, f"{name}_forward")(**kwargs)
    forward = getattr(inference, f"{name}_forward")
    assert np.array_equal(forward(**kwargs)[0], y_true)
    y, _ = forward(**{key: cast(value, "float32") for key, value in kwargs.items()})
    assert y.dtype == "float32" and relative_error(y, y_true) <= 1e-6


@pytest.mark.parametrize("sharpness", [1.0, 30.0, 1000.0])
def test_attention_with_large_scores(sharpness):
    """Scores far beyond the range of exp, against softmax's own definition in float64."""
    rng = np.random.default_rng(4)
    D, N, B = 6, 11, 2
    x = rng.standard_normal((B, N, D)).astype("float32")
    params = {
        "qkv.weight": np.concatenate([sharpness * np.eye(D), np.eye(D), np.eye(D)]),
        "proj.weight": np.eye(D),
        "proj.bias": np.zeros(D),
    }
    y, cache = attention.mhsa_forward(x, cast(params, "float32"), 1)
    scores = np.einsum("bqd,bkd->bqk", x, x, dtype="float64") * sharpness / np.sqrt(D)
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    expected = weights / weights.sum(axis=2, keepdims=True) @ x.astype("float64")
    # a score s is rounded by about 1e-7 s, and its weight by that much relatively
    assert np.abs(y - expected).max() <= 1e-6 * max(1.0, np.abs(scores).max())
    assert all(np.isfinite(grad).all() for grad in flat(attention.mhsa_backward(y, cache)).values())


def test_position_maps_hold_no_denormals():
    """The published initialisation on the published grid, where the definition has thousands."""
    config = mc.VARIANTS["convit_tiny"]
    params = mc.init_params(config)
    weight, bias = (params[f"blocks.0.attn.pos_proj.{kind}"] for kind in ("weight", "bias"))
    maps = attention._position_maps(weight, bias, config.grid)  # (H, keys, queries)
    dense, _ = layers.position_attention_dense_forward(weight, bias, config.grid)
    tiny = np.finfo("float32").tiny
    assert ((dense > 0) & (dense < tiny)).any()
    assert not ((maps > 0) & (maps < tiny)).any()
    assert np.abs(maps.swapaxes(1, 2) - dense).max() <= 1e-6
