"""Operands in bf16 and their products on AMX tiles, with what follows in the same pass.

Rows, the left operand (M, K), are uint16. Pairs, the right one (K, N), are (K / 2, N) uint32, two
neighbours along K in each, as a tile wants them. A product reads and computes blocks of 32 x 32 and
keeps of the last ones what belongs to the result. So the buffers of rows and pairs are larger than
what they hold (see bf16.py): all sizes of which blocks are read lie within them, and zeros, where
they meet numbers, lie around.
"""

from functools import lru_cache

import numpy as np

from .compiled import inlined, loop
from .passes import INVERSE_SQRT_2PI, F, as_float, mean_and_rstd, normal_cdf
from .tiles import (
    CONFIG,
    begin_tiles,
    end_tiles,
    multiply_tiles,
    store_tiles,
    transpose_square,
    zero_tiles,
)

BLOCK = 32
IN_CACHE = 16  # blocks of pairs, 32 KB, stay in the L1 cache


@lru_cache(maxsize=64)
def places_of(R, N, steps):
    """Where the blocks of a product (R, N) begin, (count, 2), in the order in which they are
    computed: as many columns of pairs as stay in the cache, while all rows pass by."""
    group = BLOCK * max(1, IN_CACHE // steps)
    starts = [range(begin, min(begin + group, N), BLOCK) for begin in range(0, N, group)]
    places = [(r, c) for columns in starts for r in range(0, R, BLOCK) for c in columns]
    return np.array(places, np.int64)


@inlined
def as_bf16(x):
    """The bf16 next to a float32, of two the even one, as its 16 bits; NaN stays NaN."""
    bits = np.float32(x).view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.uint16(nearest) if x == x else np.uint16(0x7FC0)


@inlined
def from_bf16(half):
    """The float32 of a bf16's 16 bits."""
    return as_float(np.uint32(half) << np.uint32(16))


@loop("void(f4[:,::1], f4[::1], u2[:,::1], f4[::1])")
def scale_rows(x, factor, rows, sums):
    """rows = factor * x, with one factor for each row, and the sums over the rows."""
    sums[:] = F(0.0)
    for r in range(x.shape[0]):
        here, there = x[r], rows[r]
        for d in range(sums.size):
            value = factor[r] * here[d]
            there[d] = as_bf16(value)
            sums[d] += value


@loop("void(u2[:,::1], f4[::1], i8)")
def sum_rows(rows, sums, count):
    """The sums over the first `count` rows."""
    sums[:] = F(0.0)
    for r in range(count):
        here = rows[r]
        for d in range(sums.size):
            sums[d] += from_bf16(here[d])


@loop("void(f4[:,::1], f4[::1], f4[::1], f4, u2[:,::1], f4[:,::1])")
def norm_rows(x, weight, bias, eps, rows, statistics):
    """rows = weight * xhat + bias. statistics (R, 2): a row's mean and 1 / deviation."""
    for r in range(x.shape[0]):
        here, there = x[r], rows[r]
        mean, rstd = mean_and_rstd(here, eps)
        statistics[r, 0], statistics[r, 1] = mean, rstd
        for d in range(weight.size):
            there[d] = as_bf16((here[d] - mean) * rstd * weight[d] + bias[d])


@inlined
def pair_up(rows, first, begin, count, pairs):
    """pairs[p, d] = rows first + 2p and first + 2p + 1, column begin + d; 0 after `count` rows."""
    end = begin + pairs.shape[1]
    for p in range(pairs.shape[0]):
        there = pairs[p]
        if 2 * p + 1 < count:
            low, high = rows[first + 2 * p, begin:end], rows[first + 2 * p + 1, begin:end]
            for d in range(there.size):
                there[d] = np.uint32(low[d]) | (np.uint32(high[d]) << np.uint32(16))
        elif 2 * p < count:
            low = rows[first + 2 * p, begin:end]
            for d in range(there.size):
                there[d] = np.uint32(low[d])
        else:
            there[:] = np.uint32(0)


@loop("void(u2[:,::1], i8, u4[:,::1])")
def pair_rows(rows, count, pairs):
    """Rows (K, N), of which `count` are something, as the right operand (K, N)."""
    pair_up(rows, 0, 0, count, pairs)


@inlined
def transpose_words(source, step, rows, columns, out, out_step):
    """The transpose of words of four bytes, in squares of 16 x 16, from address to address."""
    for r in range(0, rows, 16):
        for c in range(0, columns, 16):
            transpose_square(source + r * step + 4 * c, step, out + c * out_step + 4 * r, out_step)


@loop("void(u4[:,::1], i8, i8, u4[:,::1])")
def transpose_pairs(pairs, rows, columns, out):
    """out = the transpose of the first rows and columns, both multiples of 16.

    Of pairs (K, N) it gives rows (N, K), and of rows (N, K), seen as words, pairs (K, N).
    """
    transpose_words(
        pairs.ctypes.data, pairs.strides[0], rows, columns, out.ctypes.data, out.strides[0]
    )


@inlined
def multiply(a, lda, b, ldb, steps, c, ldc):
    """A block, 32 x 32 float32 at address c, of rows at a and pairs at b, with K = 32 * steps."""
    zero_tiles()
    for k in range(steps):
        multiply_tiles(a + 64 * k, lda, b + 16 * k * ldb, ldb)
    store_tiles(c, ldc)


@inlined
def block_of(rows, r, pairs, c, steps, block):
    """multiply for the block that begins at row r and column c."""
    lda, ldb = rows.strides[0], pairs.strides[0]
    multiply(
        rows.ctypes.data + r * lda, lda, pairs.ctypes.data + 4 * c, ldb, steps,
        block.ctypes.data, 4 * BLOCK,
    )  # fmt: skip


@loop("void(u2[:,::1], u4[:,::1], i8, i8[:,::1], f4[:,::1], f4[:,::1])")
def product(rows, pairs, steps, places, block, out):
    """out = A B."""
    R, N = out.shape
    begin_tiles(CONFIG.ctypes.data)
    for p in range(len(places)):
        r, c = places[p, 0], places[p, 1]
        block_of(rows, r, pairs, c, steps, block)
        n = min(BLOCK, N - c)
        for i in range(min(BLOCK, R - r)):
            here, there = block[i], out[r + i, c : c + n]
            for j in range(n):
                there[j] = here[j]
    end_tiles()


@loop("void(u2[:,::1], u4[:,::1], i8, i8[:,::1], f4[:,::1], f4[:,::1], f4[:,::1])")
def product_transposed(rows, pairs, steps, places, block, turned, out):
    """out = (A B)^T."""
    N, R = out.shape
    begin_tiles(CONFIG.ctypes.data)
    for p in range(len(places)):
        r, c = places[p, 0], places[p, 1]
        block_of(rows, r, pairs, c, steps, block)
        step = block.strides[0]
        transpose_words(block.ctypes.data, step, BLOCK, BLOCK, turned.ctypes.data, step)
        n = min(BLOCK, R - r)
        for j in range(min(BLOCK, N - c)):
            here, there = turned[j], out[c + j, r : r + n]
            for i in range(n):
                there[i] = here[i]
    end_tiles()


@loop("void(u2[:,::1], u4[:,::1], i8, i8[:,::1], f4[:,::1], f4[::1], i8, u2[:,::1])")
def product_rows(rows, pairs, steps, places, block, bias, R, out):
    """out = A B + bias, as rows, of which R are something."""
    N = bias.size
    begin_tiles(CONFIG.ctypes.data)
    for p in range(len(places)):
        r, c = places[p, 0], places[p, 1]
        block_of(rows, r, pairs, c, steps, block)
        n = min(BLOCK, N - c)
        more = bias[c : c + n]
        for i in range(min(BLOCK, R - r)):
            here, there = block[i], out[r + i, c : c + n]
            for j in range(n):
                there[j] = as_bf16(here[j] + more[j])
    end_tiles()


@loop(
    "void(u2[:,::1], u4[:,::1], i8, i8[:,::1], f4[:,::1], f4[::1], f4[::1], f4[:,::1], f4[:,::1])"
)
def product_branch(rows, pairs, steps, places, block, bias, factor, residual, out):
    """out = residual + factor * (A B + bias), with one factor for each row."""
    R, N = out.shape
    begin_tiles(CONFIG.ctypes.data)
    for p in range(len(places)):
        r, c = places[p, 0], places[p, 1]
        block_of(rows, r, pairs, c, steps, block)
        n = min(BLOCK, N - c)
        more = bias[c : c + n]
        for i in range(min(BLOCK, R - r)):
            here, there = block[i], out[r + i, c : c + n]
            before, share = residual[r + i, c : c + n], factor[r + i]
            for j in range(n):
                there[j] = before[j] + share * (here[j] + more[j])
    end_tiles()


@loop("void(u2[:,::1], u4[:,::1], i8, i8[:,::1], f4[:,::1], f4[::1], i8, b1, u2[:,::1], u2[:,::1])")
def product_gelu(rows, pairs, steps, places, block, bias, R, keep, active, slope):
    """active = gelu(A B + bias) and, with keep, its derivative, both as rows."""
    N = bias.size
    begin_tiles(CONFIG.ctypes.data)
    for p in range(len(places)):
        r, c = places[p, 0], places[p, 1]
        block_of(rows, r, pairs, c, steps, block)
        n = min(BLOCK, N - c)
        more = bias[c : c + n]
        for i in range(min(BLOCK, R - r)):
            here, there = block[i], active[r + i, c : c + n]
            if keep:
                derivative = slope[r + i, c : c + n]
                for j in range(n):
                    x = here[j] + more[j]
                    cdf, e = normal_cdf(x)
                    there[j] = as_bf16(x * cdf)
                    derivative[j] = as_bf16(cdf + x * e * INVERSE_SQRT_2PI)
            else:
                for j in range(n):
                    x = here[j] + more[j]
                    there[j] = as_bf16(x * normal_cdf(x)[0])
    end_tiles()


@loop("void(u2[:,::1], u4[:,::1], i8, i8[:,::1], f4[:,::1], u2[:,::1], i8, u2[:,::1], f4[::1])")
def product_slope(rows, pairs, steps, places, block, slope, R, out, sums):
    """out = slope * (A B), as rows, and its sums over the rows."""
    N = sums.size
    sums[:] = F(0.0)
    begin_tiles(CONFIG.ctypes.data)
    for p in range(len(places)):
        r, c = places[p, 0], places[p, 1]
        block_of(rows, r, pairs, c, steps, block)
        n = min(BLOCK, N - c)
        total = sums[c : c + n]
        for i in range(min(BLOCK, R - r)):
            here, there = block[i], out[r + i, c : c + n]
            derivative = slope[r + i, c : c + n]
            for j in range(n):
                here[j] *= from_bf16(derivative[j])
                there[j] = as_bf16(here[j])
            for j in range(n):
                total[j] += here[j]
    end_tiles()
