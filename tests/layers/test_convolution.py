"""Convolution as a special case of position attention: theorem 1 of Cordonnier et al. (2020)."""

import numpy as np
import pytest

from miniconvit import layers
from miniconvit.model import local_centres

GRID, D_IN, D_OUT = (8, 8), 6, 5


def convolution(images, kernel, padding):
    """Cross-correlation in loops: out[q] = sum over offsets of x[q + offset] kernel[offset].

    images (B, rows, cols, D_in), kernel (k, k, D_in, D_out); padding: a mode of np.pad.
    """
    k = len(kernel)
    r = k // 2
    _, rows, cols, _ = images.shape
    padded = np.pad(images, ((0, 0), (r, r), (r, r), (0, 0)), mode=padding)
    return sum(
        padded[:, dy : dy + rows, dx : dx + cols] @ kernel[dy, dx]
        for dy in range(k)
        for dx in range(k)
    )


def position_weight(k, strength, dtype="float64"):
    centres = local_centres(k * k)
    weight = strength * np.concatenate([2 * centres, -np.ones((k * k, 1))], axis=1)
    return weight.astype(dtype)


def attention_as_convolution(images, kernel, strength):
    """One head per offset, attending by position alone; head h's values are x kernel[offset h]."""
    B, rows, cols, _ = images.shape
    k, dtype = len(kernel), images.dtype
    (py, px), _ = layers.position_attention_forward(
        position_weight(k, strength, dtype), np.zeros(k * k, dtype), (rows, cols)
    )
    by_head = np.stack([kernel[h % k, h // k] for h in range(k * k)])  # column first
    v = images.reshape(B, 1, rows * cols, -1) @ by_head  # (B, H, N, D_out)
    y, _ = layers.position_values_forward(v, py, px)
    return y.sum(axis=1).reshape(B, rows, cols, -1)


def worst_error(k, strength, dtype="float64", padding="edge"):
    rng = np.random.default_rng(0)
    images = rng.standard_normal((1, *GRID, D_IN)).astype(dtype)
    kernel = rng.standard_normal((k, k, D_IN, D_OUT)).astype(dtype)
    out = attention_as_convolution(images, kernel, strength)
    return np.abs(out - convolution(images, kernel, padding)).max()


# Claim A: the limit of strong locality is the convolution with replicated edges.
# The measured errors fall as 4 exp(-strength); the bounds allow other random numbers.


@pytest.mark.parametrize(
    ("k", "strength", "measured"),
    [
        (3, 5, 0.69),
        (3, 10, 4.7e-3),
        (3, 20, 2.1e-7),
        (5, 5, 0.83),
        (5, 10, 5.7e-3),
        (5, 20, 2.6e-7),
    ],
)
def test_error_at_finite_strength(k, strength, measured):
    assert measured / 2 < worst_error(k, strength) < 2 * measured


@pytest.mark.parametrize("strength", [37, 46])
@pytest.mark.parametrize("k", [3, 5])
def test_limit_is_the_convolution_in_float64(k, strength):
    assert worst_error(k, strength) < 3e-14


def test_limit_is_the_convolution_in_float32():
    assert worst_error(3, 20, "float32") < 1e-5
    assert worst_error(3, 46, "float32") < 1e-5


def test_weak_locality_is_not_a_convolution():
    assert worst_error(3, 1) > 5


def test_other_paddings_are_not_the_limit():
    assert worst_error(3, 46, padding="constant") > 0.1
    assert worst_error(3, 46, padding="reflect") > 0.1


# Claim B: how close at finite strength.


@pytest.mark.parametrize("strength", [1.0, 2.0, 5.0, 10.0])
def test_probability_of_the_target_patch(strength):
    weight = position_weight(3, strength)
    P, _ = layers.position_attention_dense_forward(weight, np.zeros(9), (21, 21))
    middle = 10 * 21 + 10
    series = sum(np.exp(-strength * n * n) for n in range(-9, 10))
    for h, (dx, dy) in enumerate(local_centres(9)):
        target = P[h, middle, middle + int(dy) * 21 + int(dx)]
        assert target == pytest.approx(1 / series**2, rel=1e-12)
        assert target >= 1 - 4 * np.exp(-strength)


# Claim C: zero padding, by adding zero tokens around the image.


def test_zero_tokens_around_the_image_give_zero_padding():
    rng = np.random.default_rng(1)
    images = rng.standard_normal((2, 5, 7, D_IN))
    kernel = rng.standard_normal((3, 3, D_IN, D_OUT))
    ring = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    out = attention_as_convolution(ring, kernel, 46)[:, 1:-1, 1:-1]
    np.testing.assert_allclose(out, convolution(images, kernel, "constant"), rtol=0, atol=3e-14)


# Claim D: a whole GPSA layer, whatever its queries and keys.


def gpsa_layer(rng, gate, strength, heads=9, d=4):
    D = heads * d
    return {
        "gating_param": np.full(heads, gate),
        "qk.weight": rng.standard_normal((2 * D, D)),
        "v.weight": rng.standard_normal((D, D)),
        "proj.weight": rng.standard_normal((D, D)),
        "proj.bias": rng.standard_normal(D),
        "pos_proj.weight": position_weight(int(heads**0.5), strength),
        "pos_proj.bias": rng.standard_normal(heads),
    }


def equivalent_kernel(params, heads=9):
    """W[offset of head h] = Wv[rows of h]^T Wproj[:, columns of h]^T, of rank d at most."""
    D = len(params["v.weight"])
    d, k = D // heads, int(heads**0.5)
    kernel = np.empty((k, k, D, D))
    for h in range(heads):
        mine = slice(h * d, (h + 1) * d)
        kernel[h % k, h // k] = params["v.weight"][mine].T @ params["proj.weight"][:, mine].T
    return kernel


@pytest.mark.parametrize("form", [layers.gpsa_forward, layers.gpsa_dense_forward])
def test_gpsa_with_open_gates_is_a_convolution(form):
    rng = np.random.default_rng(2)
    params = gpsa_layer(rng, gate=40.0, strength=40.0)
    x = rng.standard_normal((2, 6 * 5, 36))
    out, _ = form(x, params, 9, (6, 5))
    expected = convolution(x.reshape(2, 6, 5, 36), equivalent_kernel(params), "edge")
    expected = expected.reshape(x.shape) + params["proj.bias"]
    np.testing.assert_allclose(out, expected, rtol=0, atol=3e-13)


def test_gpsa_at_its_initial_gate_mixes_convolution_and_content():
    rng = np.random.default_rng(3)
    params = gpsa_layer(rng, gate=1.0, strength=40.0)
    x = rng.standard_normal((2, 6 * 5, 36))
    bias = params["proj.bias"]
    out, content = (
        layers.gpsa_dense_forward(x, params | {"gating_param": np.full(9, g)}, 9, (6, 5))[0] - bias
        for g in (1.0, -800.0)
    )
    image = x.reshape(2, 6, 5, 36)
    local = convolution(image, equivalent_kernel(params), "edge").reshape(x.shape)
    g = 1 / (1 + np.exp(-1.0))
    assert g == pytest.approx(0.731, abs=5e-4)
    np.testing.assert_allclose(out, g * local + (1 - g) * content, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("heads", "h", "offsets"),
    [(4, 0, (-1, 0)), (4, 3, (0, 1)), (16, 0, (-2, -1)), (16, 15, (1, 2))],
)
def test_an_even_kernel_averages_two_by_two_patches(heads, h, offsets):
    k = int(heads**0.5)
    P, _ = layers.position_attention_dense_forward(
        position_weight(k, 40.0), np.zeros(heads), (9, 9)
    )
    near = P[h].reshape(9, 9, 9, 9)[4, 4]
    expected = np.zeros((9, 9))
    expected[np.ix_([4 + o for o in offsets], [4 + o for o in offsets])] = 0.25
    np.testing.assert_allclose(near, expected, rtol=0, atol=1e-12)
