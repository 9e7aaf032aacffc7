"""The attention maps of one head of one image at a time, with bf16 products on AMX tiles.

q, k and v lie in rows of all heads: head h of image b begins at row b * N and column h * d. What a
tile reads beside them is another head's or image's, and meets zeros.
"""

import numpy as np

from .compiled import inlined, loop
from .passes import LOG2_E, F, exponentials
from .products import (
    BLOCK,
    as_bf16,
    from_bf16,
    multiply,
    pair_up,
    transpose_words,
)
from .tiles import CONFIG, begin_tiles, end_tiles


@inlined
def product_into(rows, r, begin, pairs, steps, out):
    """out = A B, in whole blocks; A begins at row r and column `begin`."""
    lda, ldb, ldc = rows.strides[0], pairs.strides[0], out.strides[0]
    a, b, c = rows.ctypes.data + r * lda + 2 * begin, pairs.ctypes.data, out.ctypes.data
    for i in range(0, out.shape[0], BLOCK):
        for j in range(0, out.shape[1], BLOCK):
            multiply(a + i * lda, lda, b + 4 * j, ldb, steps, c + i * ldc + 4 * j, ldc)


@inlined
def store_rows(block, count, d, rows, r, begin):
    """The first `count` rows and d columns as rows."""
    for i in range(count):
        here, there = block[i], rows[r + i, begin : begin + d]
        for j in range(d):
            there[j] = as_bf16(here[j])


@inlined
def pair_columns(rows, r, begin, d, pairs):
    """The transpose of d columns of rows from r on, (d, N), as pairs; 0 from d on."""
    step = rows.strides[0]
    transpose_words(
        rows.ctypes.data + r * step + 2 * begin, step, pairs.shape[1], pairs.shape[0],
        pairs.ctypes.data, pairs.strides[0],
    )  # fmt: skip
    if d % 2:
        pairs[d // 2] &= np.uint32(0xFFFF)
    pairs[(d + 1) // 2 :] = np.uint32(0)


@inlined
def turn(rows, count, pairs, words):
    """The transpose of a map in rows, of which `count` are something, as words of two numbers."""
    pair_up(rows, 0, 0, count, pairs)
    transpose_words(
        pairs.ctypes.data, pairs.strides[0], pairs.shape[0], pairs.shape[1],
        words.ctypes.data, words.strides[0],
    )  # fmt: skip


FORWARD = (
    "void(u2[:,::1], i8, u2[:,::1], i8, u2[:,::1], i8, i8, f4[::1], f4[:,:,::1], "
    "u4[:,::1], f4[:,::1], u2[:,::1], u4[:,::1], f4[:,::1], u2[:,:,:,::1], u2[:,::1])"
)


@loop(FORWARD)
def maps_forward(q, q0, k, k0, v, v0, d, keep, gP, k_pairs, S, A, v_pairs, Y, C, y):
    """C = softmax(q k^T / sqrt d) and y = (keep C + gP) v.

    q, k and v are rows that begin at columns q0, k0 and v0; keep (H,); gP (H, queries, keys); C
    (B, H, queries, keys) in bf16. k_pairs, S, A, v_pairs and Y are for one map, A with zeros.
    """
    B, H, queries, keys = C.shape
    depth, breadth = k_pairs.shape[0] // 16, v_pairs.shape[0] // 16  # steps of the two products
    factor = LOG2_E / np.sqrt(F(d))
    begin_tiles(CONFIG.ctypes.data)
    for b in range(B):
        for h in range(H):
            pair_columns(k, b * keys, k0 + h * d, d, k_pairs)
            pair_up(v, b * keys, v0 + h * d, keys, v_pairs)
            product_into(q, b * queries, q0 + h * d, k_pairs, depth, S)
            share = keep[h]
            for i in range(queries):
                scores, content, position, mixed = S[i], C[b, h, i], gP[h, i], A[i]
                inverse = exponentials(scores[:keys], factor)
                for j in range(keys):
                    value = scores[j] * inverse
                    content[j] = as_bf16(value)
                    mixed[j] = as_bf16(share * value + position[j])
            product_into(A, 0, 0, v_pairs, breadth, Y)
            store_rows(Y, queries, d, y, b * queries, h * d)
    end_tiles()


BACKWARD = (
    "void(u2[:,::1], u2[:,::1], i8, u2[:,::1], i8, u2[:,::1], i8, i8, f4[::1], f4[:,:,::1], "
    "u2[:,:,:,::1], u4[:,::1], f4[:,::1], u2[:,:,::1], u4[:,::1], u2[:,::1], u4[:,::1], "
    "u4[:,::1], f4[:,::1], u2[:,::1], u2[:,::1], u2[:,::1], f4[:,:,::1], f4[::1])"
)


@loop(BACKWARD)
def maps_backward(
    dy, q, q0, k, k0, v, v0, d, keep, gP, C,
    v_pairs, S, maps, map_pairs, turned, turned_words, thin_pairs, Y, dq, dk, dv, dA_sum, rho_sum,
):  # fmt: skip
    """dA = dy v^T;  dS = keep C (dA - rho) / sqrt d;  dq = dS k;  dk = dS^T q;  dv = A^T dy.

    Arguments as in maps_forward; dy begins at column 0, dq, dk and dv where q, k and v do. dA is
    added to dA_sum (H, queries, keys), rho to rho_sum (H,). maps: dS and A, with zeros; turned:
    the transpose of one, which turned_words sees as words.
    """
    B, H, queries, keys = C.shape
    depth = v_pairs.shape[0] // 16  # steps of dy v^T
    factor = F(1.0) / np.sqrt(F(d))
    begin_tiles(CONFIG.ctypes.data)
    for b in range(B):
        for h in range(H):
            r, s, c = b * queries, b * keys, h * d
            pair_columns(v, s, v0 + c, d, v_pairs)
            product_into(dy, r, c, v_pairs, depth, S)
            for i in range(queries):
                dA, content, position, total = S[i], C[b, h, i], gP[h, i], dA_sum[h, i]
                dscores, mixed = maps[0, i], maps[1, i]
                rho = F(0.0)
                for j in range(keys):
                    rho += from_bf16(content[j]) * dA[j]
                    total[j] += dA[j]
                rho_sum[h] += rho
                for j in range(keys):
                    share = keep[h] * from_bf16(content[j])
                    dscores[j] = as_bf16(factor * share * (dA[j] - rho))
                    mixed[j] = as_bf16(share + position[j])
            key_pairs, query_pairs = thin_pairs[: S.shape[1] // 2], thin_pairs[: S.shape[0] // 2]
            pair_up(k, s, k0 + c, keys, key_pairs)
            product_into(maps[0], 0, 0, key_pairs, S.shape[1] // BLOCK, Y[: S.shape[0]])
            store_rows(Y, queries, d, dq, r, q0 + c)
            turn(maps[0], queries, map_pairs, turned_words)  # dS^T
            pair_up(q, r, q0 + c, queries, query_pairs)
            product_into(turned, 0, 0, query_pairs, S.shape[0] // BLOCK, Y[: S.shape[1]])
            store_rows(Y, keys, d, dk, s, k0 + c)
            turn(maps[1], queries, map_pairs, turned_words)  # A^T
            pair_up(dy, r, c, queries, query_pairs)
            product_into(turned, 0, 0, query_pairs, S.shape[0] // BLOCK, Y[: S.shape[1]])
            store_rows(Y, keys, d, dv, s, v0 + c)
    end_tiles()
