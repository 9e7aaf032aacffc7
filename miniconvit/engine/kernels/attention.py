"""GPSA, PSA and MHSA for the CPU, by an arithmetic `a` such as Float32. Rows are tokens, (R, D)."""

from functools import lru_cache

import numpy as np

from ...layers.position import position_attention_forward, relative_positions

SMALLEST = 1e-18  # products of two numbers above it are no denormals, which cost 100 times more


def is_psa(params):
    """Whether a block's parameters are of positional attention without gates."""
    return "attn.pos_proj.weight" in params and "attn.gating_param" not in params


def _layers(params):
    """The weights and biases that give q, k and v, side by side, and their names."""
    names = ["qk", "v"] if "qk.weight" in params else ["qkv"]
    weights = [params[f"{name}.weight"] for name in names]
    return names, weights, [params.get(f"{name}.bias") for name in names]


def _layers_backward(a, dqkv, x, params):
    """dx, and the gradients of these layers by name."""
    names, weights, biases = _layers(params)
    dweight, dbias = a.outer(dqkv, x), a.sums(dqkv)
    grads, begin = {}, 0
    for name, weight, bias in zip(names, weights, biases, strict=True):
        grads[f"{name}.weight"] = dweight[begin : begin + len(weight)]
        if bias is not None:
            grads[f"{name}.bias"] = dbias[begin : begin + len(weight)]
        begin += len(weight)
    return a.back(dqkv, weights), grads


@lru_cache(maxsize=8)
def _offsets(grid):
    """relative_positions, (N * N, 3)."""
    return relative_positions(grid, np.empty(0, np.float32)).reshape(-1, 3)


def _position_maps(weight, bias, grid):
    """P = Py (x) Px as (H, queries, keys), without denormals: one map serves all images."""
    py, px = position_attention_forward(weight, bias, grid)[0]  # (H, rows, rows), (H, cols, cols)
    for factor in (py, px):
        factor[factor < SMALLEST] = 0.0
    P = py[:, :, None, :, None] * px[:, None, :, None, :]  # (H, rows, cols, rows, cols)
    return P.reshape(len(weight), grid[0] * grid[1], -1)


def _position_backward(dA, P, g, grid):
    """As position_attention_dense_backward for dP = g dA: dA and P (H, queries, keys), g (H,).

    In float64, with rows of P that sum to 1: what a row of dscores is off 0 by is multiplied by all
    of its offsets. Returns dweight (H, 3) and each head's sum of P dA, (H,).
    """
    dscores = np.multiply(dA, P, dtype=np.float64)
    dots = dscores.sum(axis=2, keepdims=True)  # (H, queries, 1)
    dscores -= P * (dots / P.sum(axis=2, keepdims=True, dtype=np.float64))
    dweight = g[:, None] * (dscores.reshape(len(P), -1) @ _offsets(grid))
    return dweight.astype(P.dtype), dots.sum(axis=(1, 2))


def attention_forward(a, x, params, B, num_heads, grid):
    """y = A v of all heads, side by side, from normalised tokens x: GPSA where there is a gate.

    x: an operand of (B * N, D). Returns another, and the cache.
    """
    qkv = a.linear(x, *_layers(params)[1:])  # (R, 3D)
    gate = keep = gP = None
    if "gating_param" in params:
        g = 0.5 + 0.5 * np.tanh(0.5 * params["gating_param"])  # (H,)
        P = _position_maps(params["pos_proj.weight"], params["pos_proj.bias"], grid)
        keep, gP = 1.0 - g, g[:, None, None] * P
        gate = g, P, grid
    y, C = a.attend(*a.split(qkv, 3), (B, num_heads), keep, gP)
    return y, (x, qkv, C, keep, gP, gate, params)


def attention_backward(a, dy, cache):
    """dy: an operand of (R, D). Returns dx (R, D) of the normalised tokens, and grads."""
    x, qkv, C, keep, gP, gate, params = cache
    dqkv = a.like(qkv)
    dA, rho = a.attend_backward(dy, *a.split(qkv, 3), C, keep, gP, *a.split(dqkv, 3))
    dx, grads = _layers_backward(a, dqkv, x, params)
    if gate:
        g, P, grid = gate
        grads["pos_proj.weight"], dots = _position_backward(dA, P, g, grid)
        grads["pos_proj.bias"] = np.zeros_like(g)
        grads["gating_param"] = (g * (1.0 - g) * (dots - rho)).astype(g.dtype)
    return dx, grads


def psa_forward(a, x, params, B, num_heads, grid):
    """As attention_forward, by PSA: what position says is added to the scores of content."""
    qkv = a.linear(x, *_layers(params)[1:])
    scores = params["pos_proj.weight"] @ _offsets(grid).T + params["pos_proj.bias"][:, None]
    scores = scores.reshape(num_heads, grid[0] * grid[1], -1)
    y, C = a.attend(*a.split(qkv, 3), (B, num_heads), scores=scores)
    return y, (x, qkv, C, grid, params)


def psa_backward(a, dy, cache):
    """As attention_backward."""
    x, qkv, C, grid, params = cache
    dqkv, dscores = a.like(qkv), np.zeros(C.shape[1:])  # (H, queries, keys), float64
    a.attend_backward(dy, *a.split(qkv, 3), C, None, None, *a.split(dqkv, 3), dscores)
    dx, grads = _layers_backward(a, dqkv, x, params)
    weight = params["pos_proj.weight"]
    dweight = dscores.reshape(len(weight), -1) @ _offsets(grid)  # (H, 3)
    grads["pos_proj.weight"] = dweight.astype(weight.dtype)
    grads["pos_proj.bias"] = np.zeros_like(params["pos_proj.bias"])
    return dx, grads


def first_token_forward(a, x, params, B, num_heads, grid):
    """As attention_forward for the query of each image's token 0 alone, by MHSA: y (B, D)."""
    weight, bias = params["qkv.weight"], params.get("qkv.bias")
    D = len(weight) // 3
    first = a.first(x, B)
    q = a.linear(first, [weight[:D]], [None if bias is None else bias[:D]])  # (B, D)
    kv = a.linear(x, [weight[D:]], [None if bias is None else bias[D:]])  # (R, 2D)
    y, C = a.attend(q, *a.split(kv, 2), (B, num_heads))
    return y, (x, first, q, kv, C, params)


def first_token_backward(a, dy, cache):
    """As attention_backward: dy of (B, D), dx (R, D)."""
    x, first, q, kv, C, params = cache
    weight = params["qkv.weight"]
    D = len(weight) // 3
    dq, dkv = a.like(q), a.like(kv)
    a.attend_backward(dy, q, *a.split(kv, 2), C, None, None, dq, *a.split(dkv, 2))
    grads = {"qkv.weight": np.concatenate([a.outer(dq, first), a.outer(dkv, x)])}
    if "qkv.bias" in params:
        grads["qkv.bias"] = np.concatenate([a.sums(dq), a.sums(dkv)])
    dx = a.back(dkv, [weight[D:]])
    dx[:: len(dx) // len(C)] += a.back(dq, [weight[:D]])
    return dx, grads
