"""GPSA and MHSA for the CPU, features first as in `tokenwise.py`.

Attention maps are (B, H, keys, queries), so that every product reads and writes contiguous rows. Of
an image's maps only E = exp(scores) is kept, with the sums of its columns. MHSA never divides it:
the sums act on the values, which are thinner than a map. GPSA mixes both maps, a tile at a time,
which costs two passes over the tile in the cache and spares the products of a second map.
"""

from functools import lru_cache

import numpy as np

from ...layers.position import position_attention_forward, relative_positions
from .tokenwise import aligned, features_first, product, row_sums, tokens_first

TILE = 2**17  # elements: a tile of maps, 512 KB, stays in the L2 cache
LARGEST_SUM = 1e12  # a sum of exp(scores) within it and its inverse is far from float32's ends
SMALLEST = 1e-18  # products of two numbers above it are no denormals, which cost 100 times more


def _heads(columns, num_heads, B):
    """columns (D, B * N) as (B, H, d, N): a view."""
    D, R = columns.shape
    return columns.reshape(num_heads, D // num_heads, B, R // B).transpose(2, 0, 1, 3)


def _tiles(E):
    """Slices of the images and of the heads: as many maps at a time, of E (B, H, keys, queries), as
    fill a tile."""
    B, H, keys, queries = E.shape
    images = max(1, TILE // (H * keys * queries))
    heads = min(H, max(1, TILE // (keys * queries)))
    starts = ((image, head) for image in range(0, B, images) for head in range(0, H, heads))
    return [(slice(i, i + images), slice(h, h + heads)) for i, h in starts]


def _like(maps, buffer):
    """A part of the buffer of the maps' shape: a last tile may be smaller."""
    return buffer[: maps.shape[0], : maps.shape[1]]


def _exp_scores(q, k, E, sums):
    """E = exp(k^T q) and its sums over the keys, (B, H, 1, queries). Only where a sum comes near
    float32's ends are the maxima taken off first, which changes nothing else."""
    np.matmul(k.swapaxes(-1, -2), q, out=E)
    ones = np.ones((1, E.shape[-2]), E.dtype)
    with np.errstate(over="ignore"):
        np.exp(E, out=E)
        np.matmul(ones, E, out=sums)
    if not (sums.max() < LARGEST_SUM and sums.min() > 1.0 / LARGEST_SUM):
        np.matmul(k.swapaxes(-1, -2), q, out=E)
        E -= E.max(axis=-2, keepdims=True)
        np.exp(E, out=E)
        np.matmul(ones, E, out=sums)


def _content_forward(q, k, v, num_heads, B):
    """y = C v with C = softmax(k^T q) over the keys; q is scaled by 1 / sqrt d already.

    q (D, B * queries), k and v (D, B * keys). Returns y like q, the maps E (B, H, keys, queries)
    and the inverse sums of their columns (H, 1, B * queries).
    """
    y, H = aligned(q.shape), num_heads
    q, k, v, y_heads = (_heads(columns, H, B) for columns in (q, k, v, y))  # (B, H, d, N) each
    keys, queries = k.shape[-1], q.shape[-1]
    E = aligned((B, H, keys, queries))
    sums = np.empty((H, B, 1, queries), y.dtype)
    for tile in _tiles(E):
        _exp_scores(q[tile], k[tile], E[tile], sums.swapaxes(0, 1)[tile])
        np.matmul(v[tile], E[tile], out=y_heads[tile])
    inverse = (1.0 / sums).reshape(H, 1, -1)
    y.reshape(H, -1, inverse.shape[-1])[...] *= inverse
    return y, E, inverse


def _content_backward(dy, q, k, v, E, inverse, rho, dq, dk, dv):
    """dE = v^T dy - rho;  dS = E dE;  dq = k dS;  dk = q dS^T;  dv = dy E^T, into dq, dk and dv.

    inverse (H, 1, B * queries) turns E into C; rho (H, B * queries) is the row's dy . y.
    """
    B, H, _, queries = E.shape
    scaled = (dy.reshape(H, -1, B * queries) * inverse).reshape(dy.shape)
    rho = (rho * inverse[:, 0]).reshape(H, B, 1, queries).swapaxes(0, 1)  # (B, H, 1, queries)
    scaled, q, k, v, dq, dk, dv = (_heads(c, H, B) for c in (scaled, q, k, v, dq, dk, dv))
    tiles = _tiles(E)
    buffer = aligned(E[tiles[0]].shape)
    for tile in tiles:
        dS = _like(E[tile], buffer)
        np.matmul(v[tile].swapaxes(-1, -2), scaled[tile], out=dS)
        dS -= rho[tile]
        dS *= E[tile]
        np.matmul(scaled[tile], E[tile].swapaxes(-1, -2), out=dv[tile])
        np.matmul(k[tile], dS, out=dq[tile])
        np.matmul(q[tile], dS.swapaxes(-1, -2), out=dk[tile])


def _mixed_forward(q, k, v, keep, gP, B):
    """y = A v with A = keep C + gP and C as in _content_forward; A itself is not kept.

    q, k and v (D, B * N); keep = 1 - g (H, 1, 1); gP = g P (H, keys, queries). Returns y like q,
    the maps E (B, H, keys, queries) and the inverse sums of their columns (B, H, 1, queries).
    """
    y, (H, N, _) = aligned(q.shape), gP.shape
    q, k, v, y_heads = (_heads(columns, H, B) for columns in (q, k, v, y))  # (B, H, d, N) each
    E, inverse = aligned((B, H, N, N)), np.empty((B, H, 1, N), y.dtype)
    tiles = _tiles(E)
    buffer = aligned(E[tiles[0]].shape)
    for tile in tiles:
        heads, A = tile[1], _like(E[tile], buffer)
        _exp_scores(q[tile], k[tile], E[tile], inverse[tile])
        np.reciprocal(inverse[tile], out=inverse[tile])
        np.multiply(E[tile], keep[heads] * inverse[tile], out=A)
        A += gP[heads]
        np.matmul(v[tile], A, out=y_heads[tile])
    return y, E, inverse


def _mixed_backward(dy, q, k, v, E, inverse, keep, gP, dq, dk, dv):
    """dA = v^T dy;  dS = keep C (dA - rho);  dq = k dS;  dk = q dS^T;  dv = dy A^T.

    rho is the sum over the keys of C dA. Writes into dq, dk and dv; returns dA summed over the
    images (H, keys, queries) and rho summed over images and queries (H,).
    """
    B, H, N, _ = E.shape
    ones = np.ones((1, N), E.dtype)
    dy, q, k, v, dq, dk, dv = (_heads(c, H, B) for c in (dy, q, k, v, dq, dk, dv))
    dA_sum, rho_sum = np.zeros_like(gP), np.zeros(H, gP.dtype)
    tiles = _tiles(E)
    buffers = [aligned(E[tiles[0]].shape) for _ in range(2)]
    for tile in tiles:
        heads, (dS, A) = tile[1], (_like(E[tile], buffer) for buffer in buffers)
        np.matmul(v[tile].swapaxes(-1, -2), dy[tile], out=dS)
        for dA in dS:  # of one image
            dA_sum[heads] += dA
        rho = (ones @ np.multiply(dS, E[tile], out=A)) * inverse[tile]  # (B, H, 1, queries)
        rho_sum[heads] += rho.sum(axis=(0, 2, 3))
        dS -= rho
        dS *= np.multiply(E[tile], keep[heads] * inverse[tile], out=A)
        np.matmul(k[tile], dS, out=dq[tile])
        np.matmul(q[tile], dS.swapaxes(-1, -2), out=dk[tile])
        A += gP[heads]
        np.matmul(dy[tile], A.swapaxes(-1, -2), out=dv[tile])
    return dA_sum, rho_sum


def _projection(weights, biases, num_heads):
    """The weight (3D, D) and bias (3D, 1) or None that give q / sqrt d, k and v at once."""
    weight = np.concatenate(weights)
    D = weight.shape[1]
    weight[:D] *= (D // num_heads) ** -0.5
    if biases[0] is None:
        return weight, None
    bias = np.concatenate(biases)[:, None]
    bias[:D] *= (D // num_heads) ** -0.5
    return weight, bias


def _linear(columns, weight, bias):
    y = product(weight, columns)
    if bias is not None:
        y += bias.reshape(-1, 1)
    return y


def _projection_backward(dqkv, columns, num_heads, has_bias):
    """The gradients of the unscaled weight (3D, D) and bias (3D,) or None."""
    D = len(columns)
    dweight = dqkv @ columns.T
    dweight[:D] *= (D // num_heads) ** -0.5
    if not has_bias:
        return dweight, None
    dbias = row_sums(dqkv)
    dbias[:D] *= (D // num_heads) ** -0.5
    return dweight, dbias


def mhsa_forward(x, params, num_heads):
    """As layers.mhsa_forward; the scale 1 / sqrt d is folded into the queries' weight."""
    columns = features_first(x)  # (D, R)
    weight, bias = _projection([params["qkv.weight"]], [params.get("qkv.bias")], num_heads)
    qkv = _linear(columns, weight, bias).reshape(3, *columns.shape)
    y, E, inverse = _content_forward(*qkv, num_heads, len(x))
    out = _linear(y, params["proj.weight"], params["proj.bias"])
    cache = columns, weight, bias is not None, qkv, y, E, inverse, params["proj.weight"]
    return tokens_first(out, x.shape[:-1]), cache


def mhsa_backward(dout, cache):
    """As layers.mhsa_backward: dx (B, N, D) and grads with params' keys."""
    columns, weight, has_bias, qkv, y, E, inverse, proj_weight = cache
    H = len(inverse)
    dcolumns = features_first(dout)
    dy = product(proj_weight.T, dcolumns)
    rho = (dy * y).reshape(H, -1, columns.shape[1]).sum(axis=1)  # (H, R)
    dqkv = aligned(qkv.shape)
    _content_backward(dy, *qkv, E, inverse, rho, *dqkv)
    dqkv = dqkv.reshape(len(weight), -1)
    dweight, dbias = _projection_backward(dqkv, columns, H, has_bias)
    grads = {
        "qkv.weight": dweight,
        "proj.weight": dcolumns @ y.T,
        "proj.bias": row_sums(dcolumns),
    }
    if has_bias:
        grads["qkv.bias"] = dbias
    return tokens_first(product(weight.T, dqkv), dout.shape[:-1]), grads


@lru_cache(maxsize=8)
def _offsets(grid):
    """relative_positions with the key first, (N * N, 3)."""
    offsets = relative_positions(grid, np.empty(0, np.float32))
    return np.ascontiguousarray(offsets.swapaxes(0, 1)).reshape(-1, 3)


def _position_maps(weight, bias, grid):
    """P = Py (x) Px as (H, keys, queries), without denormals: one product serves all images."""
    factors, _ = position_attention_forward(weight, bias, grid)
    for factor in factors:
        factor[factor < SMALLEST] = 0.0
    py, px = (factor.swapaxes(-1, -2) for factor in factors)  # (H, keys, queries) each
    P = py[:, :, None, :, None] * px[:, None, :, None, :]  # (H, rows, cols, rows, cols)
    return P.reshape(len(weight), grid[0] * grid[1], -1)


def _position_backward(dA, P, g, grid):
    """As position_attention_dense_backward for dP = g dA: dA and P (H, keys, queries), g (H, 1).

    Returns dweight (H, 3) and each head's sum of P dA, (H,).
    """
    dscores = dA * P
    dots = dscores.sum(axis=1, keepdims=True)  # (H, 1, queries)
    dscores -= P * dots
    return g * (dscores.reshape(len(P), -1) @ _offsets(grid)), dots.sum(axis=(1, 2))


def gpsa_forward(x, params, num_heads, grid):
    """As layers.gpsa_forward; P = Py (x) Px is formed once for all images of the piece."""
    H, columns = num_heads, features_first(x)  # (D, R)
    weights = [params["qk.weight"], params["v.weight"]]
    biases = [params.get("qk.bias"), params.get("v.bias")]
    weight, bias = _projection(weights, biases, H)
    qkv = _linear(columns, weight, bias).reshape(3, *columns.shape)
    g = 0.5 + 0.5 * np.tanh(0.5 * params["gating_param"])[:, None, None]  # (H, 1, 1)
    P = _position_maps(params["pos_proj.weight"], params["pos_proj.bias"], grid)  # (H, N, N)
    gP = g * P
    y, E, inverse = _mixed_forward(*qkv, 1.0 - g, gP, len(x))
    out = _linear(y, params["proj.weight"], params["proj.bias"])
    projections = columns, weight, bias is not None, y, params["proj.weight"]
    return tokens_first(out, x.shape[:-1]), (projections, qkv, E, inverse, g, P, gP, grid)


def gpsa_backward(dout, cache):
    """As layers.gpsa_backward: dx (B, N, D) and grads with params' keys."""
    projections, qkv, E, inverse, g, P, gP, grid = cache
    columns, weight, has_bias, y, proj_weight = projections
    dcolumns = features_first(dout)
    dy = product(proj_weight.T, dcolumns)
    dqkv = aligned(qkv.shape)
    dA, rho = _mixed_backward(dy, *qkv, E, inverse, 1.0 - g, gP, *dqkv)
    dqkv = dqkv.reshape(len(weight), -1)
    dweight, dbias = _projection_backward(dqkv, columns, len(P), has_bias)
    dpos_weight, dots = _position_backward(dA, P, g[:, 0], grid)
    g, D = g[:, 0, 0], len(columns)
    grads = {
        "gating_param": g * (1.0 - g) * (dots - rho),
        "qk.weight": dweight[: 2 * D],
        "v.weight": dweight[2 * D :],
        "proj.weight": dcolumns @ y.T,
        "proj.bias": row_sums(dcolumns),
        "pos_proj.weight": dpos_weight,
        "pos_proj.bias": np.zeros_like(g),
    }
    if has_bias:
        grads |= {"qk.bias": dbias[: 2 * D], "v.bias": dbias[2 * D :]}
    return tokens_first(product(weight.T, dqkv), dout.shape[:-1]), grads


def first_token_forward(x, params, num_heads):
    """As mhsa_forward for the query of token 0 alone: (B, 1, D)."""
    B, N, D = x.shape
    columns = features_first(x)  # (D, B * N)
    first = np.ascontiguousarray(columns[:, ::N])  # (D, B)
    weight, bias = _projection([params["qkv.weight"]], [params.get("qkv.bias")], num_heads)
    q = _linear(first, weight[:D], None if bias is None else bias[:D])
    kv = _linear(columns, weight[D:], None if bias is None else bias[D:]).reshape(2, D, -1)
    y, E, inverse = _content_forward(q, *kv, num_heads, B)
    out = tokens_first(_linear(y, params["proj.weight"], params["proj.bias"]), (B, 1))
    projections = columns, first, weight, bias is not None, params["proj.weight"]
    return out, (projections, q, kv, y, E, inverse)


def first_token_backward(dout, cache):
    """dout (B, 1, D) to dx (B, N, D) and grads with params' keys."""
    projections, q, kv, y, E, inverse = cache
    columns, first, weight, has_bias, proj_weight = projections
    D, B = first.shape
    H = len(inverse)
    dout = features_first(dout)  # (D, B)
    dattended = proj_weight.T @ dout
    rho = (dattended * y).reshape(H, -1, B).sum(axis=1)
    dq, dkv = np.empty_like(q), np.empty_like(kv)
    _content_backward(dattended, q, *kv, E, inverse, rho, dq, *dkv)
    dkv = dkv.reshape(2 * D, -1)
    dcolumns = weight[D:].T @ dkv
    dcolumns[:, :: columns.shape[1] // B] += weight[:D].T @ dq
    scale = (D // H) ** -0.5
    grads = {
        "qkv.weight": np.concatenate([dq @ first.T * scale, dkv @ columns.T]),
        "proj.weight": dout @ y.T,
        "proj.bias": row_sums(dout),
    }
    if has_bias:
        grads["qkv.bias"] = np.concatenate([row_sums(dq) * scale, row_sums(dkv)])
    return tokens_first(dcolumns, (B, columns.shape[1] // B)), grads
