"""The arithmetic in bf16, each method against NumPy in float64 with the very same operands.

Operands hold numbers of bf16 exactly. So a product in float32 is off by its sums alone, and a
result in bf16 by half a unit in its last place more. All operands here have random numbers around
them, which must not matter.
"""

import amx
import numpy as np
import pytest
from rounded import from_bf16, rounded, to_bf16
from scipy.special import ndtr, softmax
from with_numba import skip_without_numba

skip_without_numba()
amx.emulate_for_a_file()

from miniconvit.engine.kernels import bf16, products  # noqa: E402
from miniconvit.engine.kernels.bf16 import Bf16  # noqa: E402

COUNTS, WIDTHS = (1, 2, 31, 32, 33, 64, 65, 97), (1, 3, 12, 27, 48, 72, 192)
SUM = 2e-6  # of the sum of absolute values: float32's roundings in a sum of up to 192 products
NOTHING = 1e-36  # what tiles and normal numbers take for zero


def choice(seed, count, *sets):
    """So many cases, in which every member of every set comes up."""
    rng = np.random.default_rng(seed)
    columns = [rng.permutation(np.resize(members, count)).tolist() for members in sets]
    return list(zip(*columns, strict=True))


SHAPES = choice(0, 28, COUNTS, WIDTHS, WIDTHS)
"""(rows, width before, width after) of a layer."""


@pytest.fixture
def a():
    return Bf16()


@pytest.fixture
def rng():
    return np.random.default_rng(1)


def half_unit(x, tolerance=0.0):
    """Half of a unit in the last place of bf16, at x or a little further out."""
    size = np.maximum(np.abs(x) + tolerance, 2.0**-126)
    return 2.0 ** (np.floor(np.log2(size)) - 8)


def assert_within(found, true, limit):
    assert found.shape == true.shape
    gap = np.abs(found - true) - limit - NOTHING
    worst = np.unravel_index(gap.argmax(), gap.shape)
    assert gap[worst] <= 0, f"{worst}: {found[worst]} is not {true[worst]} +- {limit[worst]}"


def assert_float32(found, true, limit):
    assert found.dtype == np.float32
    assert_within(found, true, limit)


def assert_rows(found, true, limit=0.0):
    """An operand whose numbers lie so near, with finite numbers around."""
    assert np.isfinite(from_bf16(found.buffer[: found.count + 32])).all()
    assert_within(numbers(found), true, half_unit(true, limit) + limit)


def numbers(rows):
    return from_bf16(rows.buffer[: rows.count, rows.begin : rows.begin + rows.width])


def operand(rng, count, width, scale=1.0, value=None):
    """Rows and what they hold in float64, among random numbers."""
    rows = bf16._rows(count, width)
    rows.buffer[...] = to_bf16(30 * rng.standard_normal(rows.buffer.shape))
    value = scale * rng.standard_normal((count, width)) if value is None else value
    rows.buffer[:count, :width] = to_bf16(value)
    return rows, numbers(rows)


def drawn(rng, *shape):
    return rng.standard_normal(shape).astype("float32")


def weight_of(rng, *shape):
    """In float32, and as the product takes it."""
    weight = drawn(rng, *shape)
    return weight, rounded(weight)


def product(x, w):
    """x w in float64, and how far one in float32 may be off."""
    return x @ w, SUM * (np.abs(x) @ np.abs(w))


@pytest.mark.parametrize(("R", "D"), choice(1, 12, COUNTS, WIDTHS))
def test_norm(a, rng, R, D):
    x, weight, bias = 3 * drawn(rng, R, D) + drawn(rng, R, 1), drawn(rng, D), drawn(rng, D)
    y, statistics = a.norm(x, weight, bias)
    exact = x.astype("float64")
    mean, rstd = exact.mean(axis=1), 1 / np.sqrt(exact.var(axis=1) + 1e-6)
    xhat = (exact - mean[:, None]) * rstd[:, None]
    assert np.abs(statistics[:, 0] - mean).max() <= 1e-6 * np.abs(x).max()
    np.testing.assert_allclose(statistics[:, 1], rstd, rtol=1e-5)
    limit = 5e-6 * (np.abs(weight) * (np.abs(xhat) + 3) + np.abs(bias))
    assert_rows(y, weight * xhat + bias, limit)
    assert (y.count, y.begin, y.width) == (R, 0, D)


@pytest.mark.parametrize(("R", "K", "N"), SHAPES)
def test_linear(a, rng, R, K, N):
    """One layer, two side by side, and neither with a bias."""
    x, exact = operand(rng, R, K)
    for widths in ((N,), (N, 5)):
        weights = [weight_of(rng, n, K) for n in widths]
        biases = [drawn(rng, n) for n in widths]
        true, limit = product(exact, np.concatenate([w for _, w in weights]).T)
        small = [w for w, _ in weights]
        assert_rows(a.linear(x, small, [None] * len(widths)), true, limit)
        bias = np.concatenate(biases)
        limit += SUM * np.abs(bias)
        assert_rows(a.linear(x, small, biases), true + bias, limit)


@pytest.mark.parametrize(("R", "K", "N"), SHAPES)
def test_branch(a, rng, R, K, N):
    x, exact = operand(rng, R, K)
    weight, w = weight_of(rng, N, K)
    bias, residual = drawn(rng, N), drawn(rng, R, N)
    factor = drawn(rng, R) * (np.arange(R) % 3 != 1)
    true, limit = product(exact, w.T)
    share = np.abs(factor)[:, None]
    limit = share * (limit + SUM * np.abs(bias)) + 1e-6 * np.abs(residual)
    y = a.branch(x, weight, bias, factor, residual)
    assert_float32(y, residual + factor[:, None].astype("float64") * (true + bias), limit)


@pytest.mark.parametrize(("R", "K", "N"), SHAPES)
def test_gelu(a, rng, R, K, N):
    x, exact = operand(rng, R, K, 2 / np.sqrt(K))
    weight, w = weight_of(rng, N, K)
    bias = drawn(rng, N)
    true, limit = product(exact, w.T)
    true, limit = true + bias, limit + SUM * np.abs(bias)
    cdf, density = ndtr(true), np.exp(-0.5 * true**2) / np.sqrt(2 * np.pi)
    active, slope = a.gelu(x, weight, bias, True)
    # neither the slope nor its own one is larger than 1.2
    assert_rows(active, true * cdf, 1.2 * limit + 3e-7 * np.maximum(np.abs(true), 1))
    assert_rows(slope, cdf + true * density, 1.2 * limit + 4e-7)
    alone, nothing = a.gelu(x, weight, bias, False)
    assert nothing is None
    assert np.array_equal(numbers(alone), numbers(active))


@pytest.mark.parametrize(("R", "D"), choice(2, 12, COUNTS, WIDTHS))
def test_scaled(a, rng, R, D):
    dy, factor = drawn(rng, R, D), drawn(rng, R) * (np.arange(R) % 3 != 1)
    scaled, sums = a.scaled(dy, factor)
    value = factor[:, None] * dy  # float32, as there
    np.testing.assert_array_equal(numbers(scaled), rounded(value))
    assert_float32(sums, value.sum(axis=0, dtype="float64"), 3e-6 * np.abs(value).sum(axis=0))
    assert np.isfinite(from_bf16(scaled.buffer)).all()


@pytest.mark.parametrize(("R", "N", "K"), SHAPES)
def test_back(a, rng, R, N, K):
    """Through one layer and through two side by side, in float32 and as an operand."""
    for widths in ((K,), (K, 5)):
        dy, exact = operand(rng, R, sum(widths))
        weights = [weight_of(rng, k, N) for k in widths]
        true, limit = product(exact, np.concatenate([w for _, w in weights]))
        small = [w for w, _ in weights]
        assert_float32(a.back(dy, small), true, limit)
        assert_rows(a.back_operand(dy, small), true, limit)


@pytest.mark.parametrize(("R", "N", "K"), SHAPES)
def test_back_gelu(a, rng, R, N, K):
    dy, exact = operand(rng, R, K)
    weight, w = weight_of(rng, K, N)
    slope, s = operand(rng, R, N)
    true, limit = product(exact, w)
    true, limit = s * true, np.abs(s) * limit
    dhidden, sums = a.back_gelu(dy, weight, slope)
    assert_rows(dhidden, true, limit)
    assert_float32(sums, true.sum(axis=0), limit.sum(axis=0) + 3e-6 * np.abs(true).sum(axis=0))


@pytest.mark.parametrize(("R", "N", "K"), [*SHAPES, (65, 33, 33), (97, 1, 192), (97, 192, 1)])
def test_outer(a, rng, R, N, K):
    dy, exact_dy = operand(rng, R, N)
    x, exact_x = operand(rng, R, K)
    assert_float32(a.outer(dy, x), *product(exact_dy.T, exact_x))
    assert_float32(a.outer(x, dy), *product(exact_x.T, exact_dy))


def test_the_thinner_operand_is_transposed(a, rng, monkeypatch):
    seen, columns = [], bf16._columns
    monkeypatch.setattr(bf16, "_columns", lambda rows: seen.append(rows.width) or columns(rows))
    thin, wide = (operand(rng, 33, width)[0] for width in (12, 48))
    a.outer(thin, wide)
    a.outer(wide, thin)
    assert seen == [12, 12]


@pytest.mark.parametrize(("R", "D"), choice(3, 8, COUNTS, WIDTHS))
def test_sums(a, rng, R, D):
    dy, exact = operand(rng, R, D)
    assert_float32(a.sums(dy), exact.sum(axis=0), 3e-6 * np.abs(exact).sum(axis=0))


@pytest.mark.parametrize(("B", "N", "D"), [(1, 1, 1), (1, 5, 27), (3, 1, 12), (5, 17, 48)])
def test_first(a, rng, B, N, D):
    """With finite numbers around, which are nobody's."""
    x, exact = operand(rng, B * N, D)
    first = a.first(x, B)
    assert (first.count, first.begin, first.width) == (B, 0, D)
    np.testing.assert_array_equal(numbers(first), exact[::N])
    assert np.isfinite(from_bf16(first.buffer)).all()
    assert not np.shares_memory(first.buffer, x.buffer)


def test_split_and_like(a, rng):
    x, exact = operand(rng, 7, 36)
    for count in (1, 2, 3):
        parts = a.split(x, count)
        assert np.array_equal(np.concatenate([numbers(part) for part in parts], axis=1), exact)
        assert all(np.shares_memory(part.buffer, x.buffer) for part in parts)
    again = a.split(parts[1], 2)  # a part of a part
    assert np.array_equal(numbers(again[1]), exact[:, 18:24])
    like = a.like(parts[1])
    assert (like.count, like.begin, like.width) == (7, 0, 12)
    assert not np.shares_memory(like.buffer, x.buffer)
    assert np.isfinite(from_bf16(like.buffer[7:])).all()
    assert np.isfinite(from_bf16(like.buffer[:, 12:])).all()


MAPS = choice(4, 30, (1, 2, 3), range(1, 10), (1, 2, 3, 5, 12, 27, 31, 32, 33, 48), COUNTS, COUNTS)
MAPS += [
    (2, H, d, N, N) for H, d, N in ((1, 48, 1), (2, 48, 33), (4, 48, 65), (9, 5, 97), (3, 27, 31))
]
"""(images, heads, a head's width, queries, keys)."""
NAMES = ["q", "k", "v", "dy"]


class Attention:
    """Operands of attention and the same in float64, by heads: (B, H, N, d)."""

    def __init__(self, rng, B, H, d, queries, keys, gated):
        D = H * d
        self.shape, self.d, self.queries, self.keys = (B, H), d, queries, keys
        if queries == keys:  # all three of one layer
            self.whole, _ = operand(rng, B * keys, 3 * D)
            self.whole.buffer[: B * keys, : 3 * D] = to_bf16(rng.standard_normal((B * keys, 3 * D)))
            self.rows = Bf16().split(self.whole, 3)
        else:
            self.whole, _ = operand(rng, B * keys, 2 * D)
            self.whole.buffer[: B * keys, : 2 * D] = to_bf16(rng.standard_normal((B * keys, 2 * D)))
            self.rows = [operand(rng, B * queries, D)[0], *Bf16().split(self.whole, 2)]
        self.rows.append(operand(rng, B * queries, D)[0])  # dy
        self.keep = self.gP = None
        if gated:
            g = rng.uniform(0, 1, H)
            P = rng.uniform(0, 1, (H, queries, keys)) ** 3
            self.keep = (1 - g).astype("float32")
            self.gP = (g[:, None, None] * P / P.sum(axis=2, keepdims=True)).astype("float32")

    def heads(self, rows):
        """What rows hold, by heads."""
        B, H = self.shape
        return numbers(rows).reshape(B, -1, H, self.d).transpose(0, 2, 1, 3)

    def gate(self):
        """keep and gP in float64, to be broadcast."""
        if self.keep is None:
            return 1.0, 0.0
        return self.keep[:, None, None].astype("float64"), self.gP.astype("float64")

    def forward(self):
        return Bf16().attend(*self.rows[:3], self.shape, self.keep, self.gP)

    def backward(self, C):
        """dA_sum, rho_sum, and dq, dk and dv as rows, which hold NaN before."""
        a, (q, k, v, dy) = Bf16(), self.rows
        if self.queries == self.keys:
            out = a.like(self.whole)
            parts = a.split(out, 3)
            out.buffer[: out.count, : out.width] = 0x7FC0
        else:
            out = a.like(self.whole)
            parts = [a.like(q), *a.split(out, 2)]
            for rows in (out, parts[0]):
                rows.buffer[: rows.count, : rows.width] = 0x7FC0
        sums = a.attend_backward(dy, q, k, v, C, self.keep, self.gP, *parts)
        return *sums, *parts


def turned(x):
    return x.swapaxes(-1, -2)


def assert_rounded(found, true, limit):
    assert_within(found, true, half_unit(true, limit) + limit)


def assert_attention_holds(case):
    """Every rounding that the method makes, and no more."""
    q, k, v, dy = (case.heads(rows) for rows in case.rows)
    keep, gP = case.gate()
    scale = case.d**-0.5
    S, off_S = (scale * x for x in product(q, turned(k)))
    weights = np.exp(S - S.max(axis=-1, keepdims=True))
    C = weights / weights.sum(axis=-1, keepdims=True)
    off_S = 2 * off_S.max(axis=-1, keepdims=True) + 4e-7 * np.ptp(S, axis=-1, keepdims=True)
    off_C = C * (3e-6 + off_S)
    y, C_found = case.forward()
    assert C_found.shape == C.shape and C_found.dtype == np.uint16
    assert_rounded(from_bf16(C_found), C, off_C)
    A = keep * C + gP
    off_A = keep * off_C + 1e-6 * A
    off_A += half_unit(A, off_A)
    assert_rounded(case.heads(y), A @ v, (off_A + SUM * A) @ np.abs(v))
    # what comes back takes C as it is kept
    C = from_bf16(C_found)
    A = keep * C + gP
    off_A = half_unit(A) + 1e-6 * A
    dA, off_dA = product(dy, turned(v))
    rho = (C * dA).sum(axis=-1, keepdims=True)
    off_rho = (C * (off_dA + 3e-6 * np.abs(dA))).sum(axis=-1, keepdims=True)
    share = scale * keep * C
    dS = share * (dA - rho)
    off_dS = share * (off_dA + off_rho + 1e-6 * (np.abs(dA) + np.abs(rho)))
    off_dS += half_unit(dS, off_dS)
    dA_sum, rho_sum, dq, dk, dv = case.backward(C_found)
    size = np.abs(dA).sum(axis=0)
    assert_float32(dA_sum, dA.sum(axis=0), off_dA.sum(axis=0) + 1e-6 * size)
    off = off_rho.sum(axis=(0, 2, 3)) + 1e-5 * np.abs(rho).sum(axis=(0, 2, 3))
    assert_float32(rho_sum, rho.sum(axis=(0, 2, 3)), off)
    big_dS = off_dS + SUM * np.abs(dS)
    assert_rounded(case.heads(dq), dS @ k, big_dS @ np.abs(k))
    assert_rounded(case.heads(dk), turned(dS) @ q, turned(big_dS) @ np.abs(q))
    assert_rounded(case.heads(dv), turned(A) @ dy, turned(off_A + SUM * A) @ np.abs(dy))


@pytest.mark.parametrize("gated", [False, True], ids=["content", "gate"])
@pytest.mark.parametrize(("B", "H", "d", "queries", "keys"), MAPS)
def test_attention(rng, B, H, d, queries, keys, gated):
    assert_attention_holds(Attention(rng, B, H, d, queries, keys, gated))


@pytest.mark.parametrize("missing", ["key", "query", "image"])
@pytest.mark.parametrize("tokens", [2, 33, 97])
def test_one_that_is_missing_is_seen(rng, missing, tokens):
    """The test's own test: what the method is given lacks one, and the truth does not."""
    case = Attention(rng, 2, 3, 27, tokens, tokens, True)
    assert_attention_holds(case)
    lacking = Attention(np.random.default_rng(1), 2, 3, 27, tokens, tokens, True)
    rows = slice(tokens, None) if missing == "image" else 2 * tokens - 1
    if missing == "query":
        lacking.rows[3].buffer[rows, : 3 * 27] = 0  # dy
        forward, case.backward = case.forward, lacking.backward
    else:
        lacking.whole.buffer[rows, 6 * 27 : 9 * 27] = 0  # v
        forward, case.forward = case.forward, lacking.forward
    with pytest.raises(AssertionError):
        assert_attention_holds(case)
    case.forward = forward


def is_finite(*arrays):
    """Of each image."""
    return np.all([np.isfinite(x).reshape(len(x), -1).all(axis=1) for x in arrays], axis=0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gated", [False, True], ids=["content", "gate"])
@pytest.mark.parametrize(("d", "queries", "keys"), [(5, 33, 33), (12, 1, 7), (33, 31, 65)])
def test_what_is_not_finite_reaches_its_own_image_alone(rng, d, queries, keys, gated, name, value):
    """The other images' results have the same bits as without it."""
    case = Attention(rng, 3, 4, d, queries, keys, gated)

    def results():
        y, C = case.forward()
        _, _, dq, dk, dv = case.backward(C)
        arrays = [case.heads(y), from_bf16(C), *map(case.heads, (dq, dk, dv))]
        return [x.astype("float32") for x in arrays]

    before = results()
    assert is_finite(*before).all()
    rows = case.rows[NAMES.index(name)]
    N = rows.count // 3
    for row, column in ((0, 0), (N - 1, rows.width - 1)):  # of the second image
        place = N + row, rows.begin + column
        kept = rows.buffer[place]
        rows.buffer[place] = to_bf16(np.float32(value)) if np.isinf(value) else 0x7FC1
        after = results()
        with np.errstate(invalid="ignore"):
            weights = softmax(case.heads(case.rows[0]) @ turned(case.heads(case.rows[1])), axis=-1)
        rows.buffer[place] = kept
        if name in "qk":  # a score of -inf has no weight, and all is finite
            np.testing.assert_array_equal(is_finite(after[1]), is_finite(weights))
        else:
            reached = after[:1] if name == "v" else after[2:]
            assert is_finite(*reached).tolist() == [True, False, True]
        for x, y in zip(before, after, strict=True):
            for image in (0, 2):
                np.testing.assert_array_equal(x[image], y[image])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("R", "K", "N"), [(1, 1, 1), (33, 27, 12), (65, 48, 33), (97, 33, 72)])
def test_what_is_not_finite_stays_in_its_row(a, rng, R, K, N, value):
    """And in its column of an outer product."""
    x, _ = operand(rng, R, K)
    dy, _ = operand(rng, R, N)
    slope, _ = operand(rng, R, N)
    weight, bias = drawn(rng, N, K), drawn(rng, N)
    ones, residual = np.ones(R, "float32"), drawn(rng, R, N)
    for row, column in ((0, K - 1), (R - 1, 0)):
        kept = x.buffer[row, column]
        x.buffer[row, column] = to_bf16(np.float32(value)) if np.isinf(value) else 0x7F81
        found = [
            numbers(a.linear(x, [weight], [bias])),
            a.branch(x, weight, bias, ones, residual),
            *map(numbers, a.gelu(x, weight, bias, True)),
            a.back(x, [weight.T.copy()]),
            numbers(a.back_operand(x, [weight.T.copy()])),
            numbers(a.back_gelu(x, weight.T.copy(), slope)[0]),
        ]
        with np.errstate(invalid="ignore"):
            small = numbers(x).astype("float32")
            normed, _ = a.norm(small, np.ones(K, "float32"), np.ones(K, "float32"))
            small, _ = a.scaled(small, ones)
        for y in (*found, numbers(small), numbers(normed)):
            broken = ~np.isfinite(y).all(axis=1)
            # gelu(-inf) is NaN here, and its slope as well
            assert broken.tolist() == (np.arange(R) == row).tolist()
        for outer in (a.outer(x, dy), a.outer(dy, x).T):
            broken = ~np.isfinite(outer).all(axis=1)
            assert broken.tolist() == (np.arange(K) == column).tolist()
        sums = a.sums(x)
        assert (~np.isfinite(sums)).tolist() == (np.arange(K) == column).tolist()
        x.buffer[row, column] = kept


UPPER = np.arange(2**16, dtype=np.uint32)


@pytest.mark.parametrize("lower", [0, 1, 0x1234, 0x7FFF, 0x8000, 0x8001, 0xFFFF], ids=hex)
def test_every_number_is_rounded_to_the_nearest(a, lower):
    """By integers alone: all upper halves, from denormals to NaN, whatever its payload."""
    bits = UPPER << 16 | np.uint32(lower)
    x = bits.view(np.float32).reshape(256, 256)
    with np.errstate(all="ignore"):
        found = a.scaled(x, np.ones(256, "float32"))[0]
    halves = found.buffer[:256, :256].reshape(-1)
    is_nan = ((UPPER & 0x7F80) == 0x7F80) & ((bits & 0x7FFFFF) != 0)
    up = (lower > 0x8000) | ((lower == 0x8000) & (UPPER & 1 == 1))
    expected = (UPPER + up).astype(np.uint16)  # at most to infinity, the next one
    np.testing.assert_array_equal(halves[~is_nan], expected[~is_nan])
    assert np.isnan(from_bf16(halves[is_nan])).all() and is_nan.any()
    is_normal = np.isfinite(x.reshape(-1)) & ~is_nan
    np.testing.assert_array_equal(to_bf16(x.reshape(-1)[is_normal]), expected[is_normal])


def test_every_number_is_read(a):
    rows = bf16._rows(1, 2**16)
    rows.buffer[0, : 2**16] = UPPER
    expected = (UPPER << 16).view(np.float32)
    np.testing.assert_array_equal(a.sums(rows), expected)


def test_results_beyond_bf16_become_infinite(a):
    """As in float32 those beyond that: from half a unit above the largest number on."""
    largest = from_bf16(np.array([0x7F7F], np.uint16))[0]
    x = np.array([[largest, largest * (1 + 2**-10), 3.4e38, -3.4e38]], "float32")
    found = numbers(a.scaled(x, np.ones(1, "float32"))[0])
    assert found.tolist() == [[largest, largest, np.inf, -np.inf]]


@pytest.mark.parametrize("steps", [1, 2, 3, 16, 17, 40])
def test_the_blocks_of_a_product_cover_it_once(steps):
    for R in (1, 31, 32, 33, 97, 1000):
        for N in (1, 32, 65, 513, 1025):
            places = products.places_of(R, N, steps)
            expected = {(r, c) for r in range(0, R, 32) for c in range(0, N, 32)}
            assert set(map(tuple, places.tolist())) == expected and len(places) == len(expected)


def test_weights_are_packed_once(a, rng, monkeypatch):
    """For each way, whatever the layers and their rows; other ones are others."""
    packed, real = [], products.pair_rows
    monkeypatch.setattr(
        bf16,
        "_pairs_of_columns",
        lambda r, f=bf16._pairs_of_columns: (packed.append("forward"), f(r))[1],
    )
    monkeypatch.setattr(products, "pair_rows", lambda *given: (packed.append("back"), real(*given)))
    weight, w = weight_of(rng, 48, 48)
    for R in (1, 33, 65):
        x, exact = operand(rng, R, 48)
        true, limit = product(exact, w.T)
        assert_rows(a.linear(x, [weight], [None]), true, limit)
        assert_float32(a.back(x, [weight]), *product(exact, w))
        assert_float32(a.back(x, [weight[:]]), *product(exact, w))
    assert packed == ["forward", "back"]
    half, transposed = weight[:24], weight.T
    for part in (half, transposed, np.ascontiguousarray(transposed)):
        true, limit = product(exact, rounded(part).T)
        assert_rows(a.linear(x, [part], [None]), true, limit)
    true, limit = product(exact, np.concatenate([rounded(half)] * 2).T)
    assert_rows(a.linear(x, [half, half], [None, None]), true, limit)
    assert packed.count("forward") == 5


def test_packed_weights_are_of_one_state(rng):
    """A new arithmetic sees what has changed, and no other array takes a place that is known."""
    x, exact = operand(rng, 33, 27)
    a, weight = Bf16(), drawn(rng, 12, 27)
    a.back(operand(rng, 2, 12)[0], [weight])
    a.linear(x, [weight], [None])
    weight *= -2
    true, limit = product(exact, rounded(weight).T)
    assert_rows(Bf16().linear(x, [weight], [None]), true, limit)
    for _ in range(20):
        weight, w = weight_of(rng, 12, 27)
        true, limit = product(exact, w.T)
        assert_rows(a.linear(x, [weight], [None]), true, limit)


def test_the_products_are_exact(monkeypatch):
    assert bf16.is_exact()
    for wrong in (0.0, np.nan, 1.0):
        real = Bf16.outer

        def outer(self, dy, x, wrong=wrong, real=real):
            out = real(self, dy, x)
            out[-1, -1] += wrong
            return out

        with monkeypatch.context() as patch:
            patch.setattr(Bf16, "outer", outer)
            assert bf16.is_exact() == (wrong == 0.0)


def test_whoever_begins_with_tiles_gives_them_up(a, rng):
    """Otherwise the system would save and load 8 KB with every change of processes."""
    tiles = amx.emulate()
    if not tiles.emulated:
        pytest.skip("silicon does not count")
    x, _ = operand(rng, 5, 12)
    wide, _ = operand(rng, 5, 48)
    weight, bias, ones = drawn(rng, 48, 12), drawn(rng, 48), np.ones(5, "float32")
    case = Attention(rng, 1, 2, 3, 4, 4, True)
    C = case.forward()[1]
    for call in (
        lambda: a.linear(x, [weight], [bias]),
        lambda: a.branch(x, weight, bias, ones, drawn(rng, 5, 48)),
        lambda: a.gelu(x, weight, bias, True),
        lambda: a.back(wide, [weight]),
        lambda: a.back_operand(wide, [weight]),
        lambda: a.back_gelu(wide, weight, x),
        lambda: a.outer(x, wide),
        lambda: a.outer(wide, x),
        case.forward,
        lambda: case.backward(C),
    ):
        before = tiles.counts()
        call()
        after = tiles.counts()
        used = [after[name] - before[name] for name in ("ldtilecfg", "tilerelease")]
        assert used == [1, 1]
