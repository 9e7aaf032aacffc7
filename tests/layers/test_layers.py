"""The layers against definitions written out in loops, and the identities of ConViT."""

from concurrent.futures import ThreadPoolExecutor
from math import erf, exp, log, pi, sqrt

import fakecupy
import numpy as np
import pytest

from miniconvit import layers
from miniconvit.analysis.maps import nonlocality
from miniconvit.errors import UserError
from miniconvit.gradcheck.cases import ALL_CASES, FUNCTIONS
from miniconvit.layers.position import relative_positions
from miniconvit.model import local_centres

GRIDS = [(1, 1), (1, 5), (3, 2), (4, 4), (3, 7)]


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def relative_error(a, b):
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-300)


def gpsa_params(rng, D, H, bias, dtype="float64"):
    shapes = {"gating_param": (H,), "qk.weight": (2 * D, D), "v.weight": (D, D)}
    shapes |= {"proj.weight": (D, D), "proj.bias": (D,)}
    shapes |= {"pos_proj.weight": (H, 3), "pos_proj.bias": (H,)}
    shapes |= {"qk.bias": (2 * D,), "v.bias": (D,)} if bias else {}
    return {
        name: (rng.standard_normal(s) / (sqrt(D) if len(s) > 1 else 1)).astype(dtype)
        for name, s in shapes.items()
    }


def position_maps(params, grid):
    weight, bias = params["pos_proj.weight"], params["pos_proj.bias"]
    P, _ = layers.position_attention_dense_forward(weight, bias, grid)
    (py, px), _ = layers.position_attention_forward(weight, bias, grid)
    return P, py, px


# Definitions, one number at a time.


def test_linear_is_the_sum_over_inputs(rng):
    x, weight, bias = (rng.standard_normal(s) for s in ((2, 3, 4), (5, 4), (5,)))
    y, _ = layers.linear_forward(x, weight, bias)
    for b, n, o in np.ndindex(2, 3, 5):
        assert y[b, n, o] == pytest.approx(sum(x[b, n] * weight[o]) + bias[o], rel=1e-13)


def test_layernorm_rows_have_the_mean_and_spread_of_their_parameters(rng):
    x = 3 + 5 * rng.standard_normal((2, 3, 40))
    weight, bias = np.full(40, 2.5), np.full(40, -1.5)
    y, _ = layers.layernorm_forward(x, weight, bias, eps=0.0)
    np.testing.assert_allclose(y.mean(axis=-1), -1.5, rtol=0, atol=1e-13)
    np.testing.assert_allclose(y.std(axis=-1), 2.5, rtol=1e-13)


def test_layernorm_eps_keeps_a_constant_row_finite():
    y, _ = layers.layernorm_forward(np.full((1, 8), 3.0), np.ones(8), np.full(8, 0.5))
    np.testing.assert_array_equal(y, 0.5)


def test_gelu_is_exact(rng):
    x = np.concatenate([rng.standard_normal(50) * 3, [0.0, -30.0, 30.0]])
    y, cache = layers.gelu_forward(x)
    dx = layers.gelu_backward(np.ones_like(x), cache)
    for value, out, slope in zip(x, y, dx, strict=True):
        cdf = 0.5 * (1 + erf(value / sqrt(2)))
        assert out == pytest.approx(value * cdf, rel=1e-13, abs=1e-15)
        density = exp(-value * value / 2) / sqrt(2 * pi)
        assert slope == pytest.approx(cdf + value * density, rel=1e-12, abs=1e-15)


def test_softmax_rows_sum_to_one_and_survive_huge_scores():
    y, _ = layers.softmax_forward(np.array([[1e4, 1e4 - 1, -1e4], [-1e30, 0.0, 0.0]]))
    np.testing.assert_allclose(y.sum(axis=-1), 1, rtol=1e-15)
    np.testing.assert_allclose(y[0, 0], 1 / (1 + exp(-1)), rtol=1e-12)
    np.testing.assert_array_equal(y[1], [0, 0.5, 0.5])


@pytest.mark.parametrize("patch", [1, 2, (3, 2), (2, 5)])
def test_patch_embedding_is_a_strided_convolution(rng, patch):
    ph, pw = (patch, patch) if isinstance(patch, int) else patch
    B, C, D, rows, cols = 2, 3, 4, 3, 2
    images = rng.standard_normal((B, C, rows * ph, cols * pw))
    weight, bias = rng.standard_normal((D, C, ph, pw)), rng.standard_normal(D)
    y, _ = layers.patch_embed_forward(images, weight, bias, patch)
    assert y.shape == (B, rows * cols, D)
    for b, r, c, o in np.ndindex(B, rows, cols, D):
        window = images[b, :, r * ph : (r + 1) * ph, c * pw : (c + 1) * pw]
        assert y[b, r * cols + c, o] == pytest.approx((window * weight[o]).sum() + bias[o])


def test_attention_averages_values_by_similarity(rng):
    B, H, N, d = 2, 3, 4, 5
    q, k, v = rng.standard_normal((3, B, H, N, d))
    y, _ = layers.attention_forward(q, k, v)
    for b, h, i in np.ndindex(B, H, N):
        scores = np.array([exp(q[b, h, i] @ k[b, h, j] / sqrt(d)) for j in range(N)])
        np.testing.assert_allclose(y[b, h, i], scores / scores.sum() @ v[b, h], rtol=1e-12)


def test_split_and_merge_heads_follow_the_official_order():
    x = np.arange(2 * 3 * 12).reshape(2, 3, 12)
    q, k = layers.split_heads(x, 2, 3)
    np.testing.assert_array_equal(q[1, 2, 0], x[1, 0, 4:6])
    np.testing.assert_array_equal(k[0, 1, 2], x[0, 2, 8:10])
    np.testing.assert_array_equal(layers.merge_heads(q, k), x)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.37])
def test_cross_entropy_from_its_definition(rng, smoothing):
    logits, labels = 5 * rng.standard_normal((4, 6)), np.array([5, 0, 2, 2])
    loss, _ = layers.cross_entropy_forward(logits, labels, smoothing)
    expected = 0.0
    for row, label in zip(logits, labels, strict=True):
        log_p = row - log(sum(exp(z) for z in row))
        expected -= (1 - smoothing) * log_p[label] + smoothing * log_p.mean()
    assert float(loss) == pytest.approx(expected / 4, rel=1e-12)
    one_hot = (1 - smoothing) * np.eye(6)[labels] + smoothing / 6
    assert float(layers.cross_entropy_forward(logits, one_hot, 0.5)[0]) == pytest.approx(
        expected / 4, rel=1e-12
    )


def loss_of(targets, logits=None, smoothing=0.0):
    if logits is None:
        logits = np.random.default_rng(5).standard_normal((3, 4))
    return float(layers.cross_entropy_forward(logits, targets, smoothing)[0])


@pytest.mark.parametrize(
    "targets",
    [
        [3, 0, 2],
        (3, 0, 2),
        np.array([3.0, 0.0, 2.0]),
        np.array([3, 0, 2], "u1"),
        np.eye(4)[[3, 0, 2]].tolist(),
        np.eye(4, dtype=bool)[[3, 0, 2]],
        np.eye(4, dtype="i8")[[3, 0, 2]],
        np.eye(4, dtype="f2")[[3, 0, 2]],
    ],
    ids=str,
)
def test_the_same_labels_in_another_form_give_the_same_loss(targets):
    assert loss_of(targets) == loss_of(np.array([3, 0, 2]))


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        ([1, 2, 4], "go from 1 to 4: classes count from 0, so subtract 1"),
        ([0, 2, 4], r"lie in 0\.\.3, but these go from 0 to 4$"),
        ([-100, 2, 3], "go from -100 to 3: leave out"),
        (np.array([0, 255, 1], "u1"), "go from 0 to 255"),
        ([0.0, 2.5, 1.0], "whole numbers"),
        ([0.0, np.nan, 1.0], "go from nan"),
        ([0.0, np.inf, 1.0], "to inf"),
        (
            [[3], [0], [2]],
            r"labels \(3,\) or probabilities \(3, 4\) .* not int64 of shape \(3, 1\)",
        ),
        ([[3, 0, 2]], r"shape \(1, 3\)"),
        ([3], r"shape \(1,\)"),
        (3, r"shape \(\)"),
        ([3, 0], r"shape \(2,\)"),
        ([3, 0, 2, 1], r"shape \(4,\)"),
        (np.eye(5)[[3, 0, 2]], r"shape \(3, 5\)"),
        (np.eye(4)[[3, 0, 2]].T, r"shape \(4, 3\)"),
        (np.full((3, 4, 1), 0.25), r"shape \(3, 4, 1\)"),
        ([[0.5, 0.5, 0, 0], [1, 0, 0], [0, 0, 0, 1]], "cannot be made an array"),
        (["cat", "dog", "dog"], "not <U3"),
        ([1, None, 2], "not object"),
        (None, "not object"),
        (np.array([1, 2, 3]) + 0j, "not complex128"),
        ([[0.5, 0.5, 0, 0], [1.5, -0.5, 0, 0], [0, 0, 0, 1]], "go from -0.5 to 1.5"),
        ([[0.5, np.inf, 0, 0]] * 3, "to inf"),
        ([[0.5, np.nan, 0, 0]] * 3, "go from nan"),
    ],
    ids=str,
)
def test_targets_that_would_train_wrongly_are_refused(targets, sentence):
    with pytest.raises(UserError, match=sentence):
        loss_of(targets)


def test_logits_and_smoothing_that_have_no_loss_are_refused():
    for logits in (np.zeros(4), np.zeros((0, 4)), np.zeros((1, 4), int), [[0.0, 1.0]], None):
        with pytest.raises(UserError, match="logits must be floats"):
            layers.cross_entropy_forward(logits, np.array([0]))
    for smoothing in (-0.1, 1.1, np.nan):
        with pytest.raises(UserError, match="label_smoothing"):
            loss_of([0, 1, 2], smoothing=smoothing)


def test_the_loss_does_not_wait_for_a_gpu(cupy):
    logits, labels = cupy.asarray(np.zeros((3, 4), "f4")), cupy.asarray(np.array([3, 0, 9]))
    with fakecupy.forbid("wait", "upload"):
        layers.cross_entropy_forward(logits, labels, 0.1)
        with pytest.raises(UserError, match=r"not int64 of shape \(2,\)"):
            layers.cross_entropy_forward(logits, labels[:2])


def test_cross_entropy_survives_huge_logits():
    loss, cache = layers.cross_entropy_forward(np.array([[1e5, -1e5]]), np.array([1]))
    assert float(loss) == 2e5
    np.testing.assert_array_equal(layers.cross_entropy_backward(1.0, cache), [[1.0, -1.0]])


def test_drop_path_keeps_the_mean(rng):
    x = rng.standard_normal((2, 3, 4))
    y, _ = layers.drop_path_forward(x, np.array([0, 1]), 0.8)
    np.testing.assert_array_equal(y[0], 0)
    np.testing.assert_allclose(y[1], x[1] / 0.8, rtol=1e-15)


# Position attention.


def test_relative_positions_of_a_2x2_grid():
    expected = [(0, 0, 0), (1, 0, 1), (0, 1, 1), (1, 1, 2)]
    np.testing.assert_array_equal(relative_positions((2, 2), np.zeros(0))[0], expected)


def test_relative_positions_of_a_rectangle():
    R = relative_positions((2, 5), np.zeros(0))
    np.testing.assert_array_equal(R[1, 9], [3, 1, 10])  # from (row 0, col 1) to (row 1, col 4)
    np.testing.assert_array_equal(R[9, 1], [-3, -1, 10])


@pytest.mark.parametrize("grid", GRIDS)
def test_position_attention_is_a_kronecker_product(rng, grid):
    P, py, px = position_maps(gpsa_params(rng, 12, 3, False), grid)
    for h in range(3):
        np.testing.assert_allclose(np.kron(py[h], px[h]), P[h], rtol=0, atol=1e-15)
    np.testing.assert_allclose(P.sum(axis=-1), 1, rtol=1e-14)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("heads", "bias"), [(1, True), (3, False), (4, True)])
def test_factorised_equals_dense(rng, grid, heads, bias):
    params = gpsa_params(rng, 12, heads, bias)
    x, dy = rng.standard_normal((2, 3, grid[0] * grid[1], 12))
    dense, cache_dense = layers.gpsa_dense_forward(x, params, heads, grid)
    fast, cache_fast = layers.gpsa_forward(x, params, heads, grid)
    assert relative_error(fast, dense) < 1e-14
    dx_dense, grads_dense = layers.gpsa_dense_backward(dy, cache_dense)
    dx_fast, grads_fast = layers.gpsa_backward(dy, cache_fast)
    assert relative_error(dx_fast, dx_dense) < 1e-13
    assert grads_fast.keys() == grads_dense.keys() == params.keys()
    largest = max(np.linalg.norm(g) for g in grads_dense.values())
    for name, grad in grads_dense.items():
        assert np.linalg.norm(grads_fast[name] - grad) < 1e-13 * largest, name


def test_position_bias_has_no_effect_and_a_gradient_of_zero(rng):
    params = gpsa_params(rng, 12, 4, False)
    x = rng.standard_normal((2, 6, 12))
    for form in ("gpsa", "gpsa_dense"):
        forward, backward = (getattr(layers, f"{form}_{way}") for way in ("forward", "backward"))
        y, cache = forward(x, params, 4, (2, 3))
        shifted, _ = forward(x, params | {"pos_proj.bias": np.full(4, 3.0)}, 4, (2, 3))
        np.testing.assert_allclose(shifted, y, rtol=0, atol=1e-14)
        _, grads = backward(rng.standard_normal(y.shape), cache)
        np.testing.assert_array_equal(grads["pos_proj.bias"], 0.0)


def test_renormalisation_is_the_identity_forward_and_backward(rng):
    B, H, N, d = 3, 2, 6, 5
    q, k, v, dy = rng.standard_normal((4, B, H, N, d))
    params = gpsa_params(rng, 4, H, False)
    C, cache_C = layers.softmax_forward(q @ k.swapaxes(-1, -2))
    P, cache_P = layers.position_attention_dense_forward(
        params["pos_proj.weight"], params["pos_proj.bias"], (2, 3)
    )
    M, cache_gate = layers.gate_forward(C, P, params["gating_param"])
    row_sums = M.sum(axis=-1, keepdims=True)
    A = M / row_sums
    np.testing.assert_allclose(A, M, rtol=0, atol=1e-15)
    dA = dy @ v.swapaxes(-1, -2)
    rho = (dA * A).sum(axis=-1, keepdims=True)
    for dM in (dA, (dA - rho) / row_sums):
        dC, dP, dgate = layers.gate_backward(dM, cache_gate)
        dscores = layers.softmax_backward(dC, cache_C)
        dweight, _ = layers.position_attention_dense_backward(dP.sum(axis=0), cache_P)
        if dM is dA:
            without = dscores, dweight, dgate
    for a, b in zip(without, (dscores, dweight, dgate), strict=True):
        assert relative_error(a, b) < 1e-13


# The local initialisation, and the paper's nonlocality.


def test_local_centres_of_4_and_9_heads():
    np.testing.assert_array_equal(2 * local_centres(4), [(-1, -1), (-1, 1), (1, -1), (1, 1)])
    np.testing.assert_array_equal(
        2 * local_centres(9),
        [(-2, -2), (-2, 0), (-2, 2), (0, -2), (0, 0), (0, 2), (2, -2), (2, 0), (2, 2)],
    )
    outer, inner = np.repeat([-3, -1, 1, 3], 4), np.tile([-3, -1, 1, 3], 4)
    np.testing.assert_array_equal(2 * local_centres(16), np.stack([outer, inner], axis=1))


def local_weight(heads, strength=1.0):
    return strength * np.concatenate([2 * local_centres(heads), -np.ones((heads, 1))], axis=1)


def test_local_attention_is_the_published_gaussian():
    P, _ = layers.position_attention_dense_forward(local_weight(9), np.zeros(9), (14, 14))
    middle = P[4].reshape(14, 14, 14, 14)[7, 7]
    values = [middle[7, 7], middle[7, 8], middle[6, 7], middle[8, 8], middle[7, 9]]
    np.testing.assert_allclose(
        values, [0.318244, 0.117075, 0.117075, 0.043070, 0.005829], rtol=0, atol=5e-7
    )
    corner = P[4].reshape(14, 14, 14, 14)[0, 0]
    np.testing.assert_allclose(
        [corner[0, 0], corner[0, 1], corner[1, 1]],
        [0.520324, 0.191417, 0.070418],
        rtol=0,
        atol=5e-7,
    )
    P, _ = layers.position_attention_dense_forward(local_weight(4), np.zeros(4), (14, 14))
    for h, (dx, dy) in enumerate(local_centres(4)):
        near = P[h].reshape(14, 14, 14, 14)[7, 7]
        rows, cols = (sorted({7, round(7 + 2 * delta)}) for delta in (dy, dx))
        np.testing.assert_allclose(near[np.ix_(rows, cols)], 0.193105, rtol=0, atol=5e-7)


@pytest.mark.parametrize("strength", [0.3, 1.0, 2.0])
def test_centre_and_strength_can_be_read_back(strength):
    weight = local_weight(9, strength)
    np.testing.assert_allclose(-weight[:, 2], strength)
    np.testing.assert_allclose(weight[:, :2] / (-2 * weight[:, 2:]), local_centres(9))


def test_nonlocality_table():
    grid = (14, 14)
    uniform = np.full((196, 196), 1 / 196)
    np.testing.assert_allclose(nonlocality(uniform, grid), 7.2807641932, rtol=0, atol=5e-11)
    position, gated = {}, {}
    g = 1 / (1 + exp(-1))
    for heads in (4, 9, 16):
        P, _ = layers.position_attention_dense_forward(local_weight(heads), np.zeros(heads), grid)
        position[heads] = nonlocality(P, grid)
        gated[heads] = nonlocality((1 - g) * uniform + g * P, grid).mean()
    np.testing.assert_allclose(position[4], 0.98596917, rtol=0, atol=5e-9)
    corner, edge, centre = 1.48455664, 1.16568830, 0.75937571
    np.testing.assert_allclose(
        position[9],
        [corner, edge, corner, edge, centre, edge, corner, edge, corner],
        rtol=0,
        atol=5e-9,
    )
    np.testing.assert_allclose(position[9].mean(), 1.26226172, rtol=0, atol=5e-9)
    table = position[16].reshape(4, 4)
    np.testing.assert_allclose(table[[0, 0, 3, 3], [0, 3, 0, 3]], 2.05943384, rtol=0, atol=5e-9)
    np.testing.assert_allclose(table[0, 1:3], 1.60046181, rtol=0, atol=5e-9)
    np.testing.assert_allclose(table[1:3, 1:3], 0.98596917, rtol=0, atol=5e-9)
    np.testing.assert_allclose(table.mean(), 1.56158166, rtol=0, atol=5e-9)
    np.testing.assert_allclose(
        [gated[4], gated[9], gated[16]], [2.67890029, 2.88088633, 3.09970674], rtol=0, atol=5e-9
    )


def test_nonlocality_leaves_the_class_token_out(rng):
    A = rng.uniform(size=(2, 3, 7, 7))
    A /= A.sum(axis=-1, keepdims=True)
    patches = A[..., 1:, 1:] / A[..., 1:, 1:].sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(nonlocality(A, (2, 3)), nonlocality(patches, (2, 3)), rtol=1e-14)


# Properties of every pair: dtype kept, no hidden state, safe among threads.


def every_array(item):
    if isinstance(item, np.ndarray):
        yield item
    elif isinstance(item, dict):
        for value in item.values():
            yield from every_array(value)
    elif isinstance(item, list | tuple):
        for value in item:
            yield from every_array(value)


def run_case(case, dtype="float64", rng=None):
    inputs = {name: x.astype(dtype) for name, x in case.inputs.items()}
    y, cache = case.forward(**inputs)
    rng = rng or np.random.default_rng(3)
    parts = y if isinstance(y, tuple) else (y,)
    dy = tuple(rng.standard_normal(np.shape(part)).astype(dtype) for part in parts)
    dy = dy if isinstance(y, tuple) else dy[0] if np.ndim(y) else float(dy[0])
    return y, cache, dy


@pytest.mark.parametrize("layer", ALL_CASES)
def test_float32_stays_float32(layer):
    for case in ALL_CASES[layer](np.random.default_rng(1), FUNCTIONS):
        y, cache, dy = run_case(case, "float32")
        arrays = [*every_array(y), *every_array(cache)]
        arrays += every_array(case.backward(dy, cache))
        assert arrays
        assert {a.dtype for a in arrays if a.dtype.kind == "f"} == {np.dtype("float32")}


@pytest.mark.parametrize("layer", ALL_CASES)
def test_forward_twice_then_backward_twice(layer):
    first, second = (
        next(iter(ALL_CASES[layer](np.random.default_rng(seed), FUNCTIONS))) for seed in (1, 2)
    )
    runs = [run_case(case) for case in (first, second)]
    interleaved = [case.backward(dy, cache) for case, (_, cache, dy) in zip(
        (first, second), runs, strict=True)][::-1]  # fmt: skip
    for case, grads in zip((second, first), interleaved, strict=True):
        _, cache, dy = run_case(case)
        alone = case.backward(dy, cache)
        for a, b in zip(every_array(grads), every_array(alone), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("layer", ALL_CASES)
def test_eight_threads_give_the_single_threads_bits(layer):
    case = next(iter(ALL_CASES[layer](np.random.default_rng(1), FUNCTIONS)))

    def gradients(seed):
        _, cache, dy = run_case(case, rng=np.random.default_rng(seed))
        return list(every_array(case.backward(dy, cache)))

    with ThreadPoolExecutor(8) as pool:
        threaded = list(pool.map(gradients, range(24)))
    for seed, grads in enumerate(threaded):
        for a, b in zip(grads, gradients(seed), strict=True):
            np.testing.assert_array_equal(a, b)
