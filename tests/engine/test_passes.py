"""Every compiled loop against its formula in float64, and what makes it differ from one: numbers
that are not finite, those next to nothing, and a type that nobody asked for."""

import numpy as np
import pytest
from scipy.special import ndtr
from with_numba import skip_without_numba

skip_without_numba()

import numba  # noqa: E402

from miniconvit.engine.kernels import passes  # noqa: E402
from miniconvit.engine.kernels.compiled import FAST  # noqa: E402

LOOPS = {
    name: loop
    for name, loop in vars(passes).items()
    if getattr(loop, "targetoptions", {}).get("nogil")
}
SHAPES = [(1, 1), (1, 7), (5, 3), (37, 33), (64, 96), (3, 197)]
"""(rows, columns): one of each, odd ones, and whole registers."""


def density(x):
    return np.exp(-0.5 * x * x) / np.sqrt(2 * np.pi)


def true_softmax(scores):
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def norm_forward(draw, R, D):
    x, weight, bias, eps = 3 * draw(R, D) + draw(R, 1), draw(D), draw(D), 1e-6
    mean, rstd = x.mean(axis=1), 1 / np.sqrt(x.var(axis=1) + eps)
    y = (x - mean[:, None]) * rstd[:, None] * weight + bias
    return (x, weight, bias, eps, None, None), {4: y, 5: np.stack([mean, rstd], axis=1)}


def norm_backward(draw, R, D):
    x, dy, dresidual, weight = draw(R, D), draw(R, D), draw(R, D), draw(D)
    statistics = draw(R, 2)  # any: x need not be what they are of
    xhat, dxhat = (x - statistics[:, :1]) * statistics[:, 1:], dy * weight
    through_variance = (dxhat * xhat).mean(axis=1, keepdims=True)
    dx = dxhat - dxhat.mean(axis=1, keepdims=True) - xhat * through_variance
    found = {5: dresidual + statistics[:, 1:] * dx, 6: (dy * xhat).sum(axis=0), 7: dy.sum(axis=0)}
    return (dy, x, statistics, weight, dresidual, None, None, None), found


def add_bias(draw, R, D):
    y, bias = draw(R, D), draw(D)
    return (y, bias), {0: y + bias}


def add_branch(draw, R, D):
    y, bias, factor, residual = draw(R, D), draw(D), draw(R), draw(R, D)
    return (y, bias, factor, residual), {0: residual + factor[:, None] * (y + bias)}


def scale(draw, R, D):
    dy, factor = draw(R, D), draw(R)
    scaled = factor[:, None] * dy
    return (dy, factor, None, None), {2: scaled, 3: scaled.sum(axis=0)}


def sum_rows(draw, R, D):
    x = draw(R, D)
    return (x, None), {1: x.sum(axis=0)}


def gelu(draw, R, D):
    x, bias = 3 * draw(R, D), draw(D)
    value = x + bias
    return (x, bias, None), {2: value * ndtr(value), 0: ndtr(value) + value * density(value)}


def gelu_alone(draw, R, D):
    (x, bias, _), found = gelu(draw, R, D)
    return (x, bias), {0: found[2]}


def gelu_backward(draw, R, D):
    dactive, slope = draw(R, D), draw(R, D)
    product = dactive * slope
    return (dactive, slope, None), {0: product, 2: product.sum(axis=0)}


def softmax(draw, R, D):
    scores, factor = 5 * draw(R, D), 0.25
    return (scores, factor), {0: true_softmax(factor * scores)}


def maps(draw, R, D):
    """Maps C of two images with three heads, and so is the shape of all others here."""
    return true_softmax(draw(2, 3, R, D)).astype("float32").astype("float64")


def mix(draw, R, D):
    C, keep, gP = maps(draw, R, D), draw(3), draw(3, R, D)
    return (C, keep, gP, None), {3: keep[:, None, None] * C + gP}


def softmax_backward(draw, R, D):
    dA, C, keep, factor = draw(2, 3, R, D), maps(draw, R, D), draw(3), 0.25
    rho = (C * dA).sum(axis=3, keepdims=True)
    before = draw(3, R, D)  # the sum goes on from what is there
    found = {0: factor * keep[:, None, None] * C * (dA - rho)}
    found |= {4: before + dA.sum(axis=0), 5: rho[..., 0]}
    return (dA, C, keep, factor, before, None), found


def adamw(draw, R, D):
    n = R * D
    p, g, m, v = draw(n), draw(n), draw(n), draw(n) ** 2
    numbers = 0.9, 0.1, 0.75, 0.3, 0.9, 0.2, 2.0, 0.01
    kept, rate, beta1, rest1, beta2, rest2, scale, eps = numbers
    first, second = beta1 * m + rest1 * g, beta2 * v + rest2 * g * g
    after = kept * p - rate * first / (scale * np.sqrt(second) + eps)
    return (p, g, m, v, *numbers), {0: after, 2: first, 3: second}


FORMULAS = {
    formula.__name__: formula
    for formula in (norm_forward, norm_backward, add_bias, add_branch, scale, sum_rows, gelu,
                    gelu_alone, gelu_backward, softmax, mix, softmax_backward, adamw)
}  # fmt: skip
"""By the loop's name: draw, rows and columns to its arguments, None for what it fills, and what
they are in the end, by their places."""


def drawing(seed, place=None, value=None):
    """draw(*shape): random numbers that float32 holds, of which the array number `place` begins or
    ends with a value."""
    rng, drawn = np.random.default_rng(seed), []

    def draw(*shape):
        x = rng.standard_normal(shape).astype("float32").astype("float64")
        if len(drawn) == place:
            x.flat[seed % 2 and -1] = value
        drawn.append(x)
        return x

    return draw, drawn


def run(name, arguments, found):
    """The arguments in float32 after the loop; what it fills is NaN before."""
    small = [
        np.full(found[i].shape, np.nan, "float32") if value is None
        else np.array(value, "float32") if isinstance(value, np.ndarray)
        else np.float32(value)
        for i, value in enumerate(arguments)
    ]  # fmt: skip
    LOOPS[name](*small)
    return small


def test_every_loop_has_its_formula():
    assert LOOPS.keys() == FORMULAS.keys()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("name", FORMULAS)
def test_a_loop_equals_its_formula(name, shape):
    arguments, found = FORMULAS[name](drawing(shape[1])[0], *shape)
    after = run(name, arguments, found)
    for i, value in enumerate(after):
        if i in found:
            gap = np.linalg.norm(value - found[i])
            assert gap <= 1e-6 * max(np.linalg.norm(found[i]), np.sqrt(found[i].size)), i
        else:  # what is read stays
            np.testing.assert_array_equal(value, np.float32(arguments[i]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", FORMULAS)
def test_what_is_not_finite_stays_so(name, value):
    """Wherever it comes in, the results are not finite where the formula's are not."""
    formula = FORMULAS[name]
    draw, drawn = drawing(0)
    formula(draw, 3, 21)
    for place in range(len(drawn)):
        for seed in (0, 1):  # at the first and at the last place
            with np.errstate(all="ignore"):
                arguments, found = formula(drawing(seed, place, value)[0], 3, 21)
                after = run(name, arguments, found)
            for i, expected in found.items():
                np.testing.assert_array_equal(np.isfinite(after[i]), np.isfinite(expected))


@pytest.mark.parametrize("name", FORMULAS)
def test_a_loop_knows_float32_alone(name):
    """No number of it becomes a float64, which a plain 0.5 in a formula would bring about."""
    (signature,) = LOOPS[name].signatures
    assert {getattr(kind, "dtype", kind).name for kind in signature} == {"float32"}
    compiled = numba.njit(signature, fastmath=FAST, error_model="numpy")(LOOPS[name].py_func)
    (code,) = compiled.inspect_llvm().values()
    assert "fmul" in code or "fadd" in code
    assert "fpext" not in code


def test_a_plain_number_would_be_seen():
    """As would fpext, by the test before: the test's own test."""
    compiled = numba.njit("void(f4[::1])")(lambda x: _times(x))
    (code,) = compiled.inspect_llvm().values()
    assert "fpext" in code


@numba.njit
def _times(x):
    for i in range(len(x)):
        x[i] = x[i] * 0.3


def test_powers_of_two():
    """Off by 1e-7 of themselves, zero below float32's normal numbers, and NaN stays NaN."""
    y = -np.concatenate([[0.0, 0.5, 1.0, 1e-30, 1e-42, 125.5, 126.0], np.linspace(0, 126, 5001)])
    y = y.astype("float32")
    found = np.array([passes.exp2_of_negative(value) for value in y])
    true = np.exp2(y.astype("float64"))
    assert np.abs(found / true - 1).max() <= 2e-7
    assert passes.exp2_of_negative(np.float32(0)) == 1.0
    for value in (-126.1, -127.0, -150.0, -1e10, -3e38, -np.inf):
        assert passes.exp2_of_negative(np.float32(value)) == 0.0
    assert np.isnan(passes.exp2_of_negative(np.float32(np.nan)))


def test_gelu_and_its_slope_from_minus_to_plus_15():
    """Against the normal distribution in float64: absolute errors, and what is left of a tail."""
    x = np.linspace(-15, 15, 60001).astype("float32")
    true = x.astype("float64")
    slope, y, alone = x[None].copy(), np.empty_like(x)[None], x[None].copy()
    nothing = np.zeros(len(x), "float32")
    passes.gelu(slope, nothing, y)
    passes.gelu_alone(alone, nothing)
    cdf = ndtr(true)
    assert np.all(np.abs(y[0] - true * cdf) <= 2e-7 * np.maximum(np.abs(true), 1))
    assert np.all(np.abs(alone[0] - true * cdf) <= 2e-7 * np.maximum(np.abs(true), 1))
    assert np.abs(slope[0] - cdf - true * density(true)).max() <= 3e-7
    tail = (true < -0.5) & (true > -12)
    assert np.abs(y[0][tail] / (true * cdf)[tail] - 1).max() <= 2e-5


def test_gelu_far_from_zero():
    """From denormals to where a square overflows, and beyond."""
    sizes = [0.0, 1e-45, 1e-40, 1e-20, 1e-3, 14.0, 20.0, 1e3, 1e8, 1e15, 1e19, 1e30, 3e38]
    x = [-size for size in sizes] + sizes + [np.nan, np.inf, -np.inf]
    x = np.array([x], "float32")  # (1, N)
    nothing, slope, y, alone = np.zeros(x.size, "float32"), x.copy(), np.empty_like(x), x.copy()
    passes.gelu(slope, nothing, y)
    passes.gelu_alone(alone, nothing)
    true = x[:, :-3].astype("float64")
    for found in (y, alone):
        assert np.all(np.abs(found[:, :-3] - true * ndtr(true)) <= 2e-7 * np.abs(true) + 1e-45)
        assert not np.isfinite(found[0, -3:]).any()
    expected = ndtr(true) + true * density(true)
    assert np.all(np.abs(slope[:, :-3] - expected) <= 2e-7)
    assert not np.isfinite(slope[0, -3:]).any()


@pytest.mark.parametrize("sharpness", [1e-42, 1e-6, 1.0, 100.0, 1e6, 1e30])
def test_softmax_of_any_size_of_scores(sharpness):
    """Also where all but one weight vanish; a row's weights add up to one."""
    scores = sharpness * drawing(3)[0](50, 65)
    small = scores.astype("float32")
    true = true_softmax(small.astype("float64") * np.float32(0.3))
    passes.softmax(small, 0.3)
    largest = max(1.0, 4 * sharpness)  # a score s is rounded by 1e-7 s, and its weight by as much
    assert np.abs(small - true).max() <= min(1.0, 2e-7 * largest)
    np.testing.assert_allclose(small.sum(axis=1, dtype="float64"), 1.0, rtol=1e-6)


def test_softmax_of_masked_scores():
    """-inf has no weight, wherever it stands; a row of nothing else has no answer."""
    scores = drawing(4)[0](4, 9).astype("float32")
    scores[0, 0] = scores[1, 3:] = scores[2, -1] = scores[3] = -np.inf
    true = true_softmax(scores[:3].astype("float64"))
    passes.softmax(scores, 1.0)
    assert np.abs(scores[:3] - true).max() <= 2e-7 and np.all(scores[:3][true == 0] == 0)
    assert np.isnan(scores[3]).all()
