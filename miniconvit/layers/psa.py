"""Positional self-attention without gates (PSA; Cordonnier, Loukas, Jaggi 2020): the paper's
ablation of GPSA.

A = softmax(content scores + position scores),  y = A v. One softmax for both, so the larger score
decides, where GPSA's gate would: the reason for the gates.
"""

from ..arrays import array_module
from .attention import merge_heads, split_heads
from .gpsa import _project_backward, _project_forward
from .linear import linear_backward, linear_forward
from .position import relative_positions
from .softmax import softmax_backward, softmax_forward


def psa_forward(x, params, num_heads, grid):
    """A[q, k] = softmax over k of (q k^T / sqrt d + R[q, k] . pos_proj + bias),  y = A v.

    Shapes and keys as in gpsa_dense_forward, without gating_param. Returns (B, N, D).
    """
    q, k, v, cache_project = _project_forward(x, params, num_heads)
    scale = q.shape[-1] ** -0.5
    offsets = relative_positions(grid, x)  # (N, N, 3)
    position = offsets @ params["pos_proj.weight"].T + params["pos_proj.bias"]  # (N, N, H)
    content = (q @ k.swapaxes(-1, -2)) * scale  # (B, H, N, N)
    A, cache_softmax = softmax_forward(content + position.transpose(2, 0, 1))
    y = A @ v  # (B, H, N, d)
    out, cache_proj = linear_forward(merge_heads(y), params["proj.weight"], params["proj.bias"])
    return out, (cache_project, cache_softmax, cache_proj, (q, k, v, A), offsets, num_heads)


def psa_backward(dout, cache):
    """dv = A^T dy and dA = dy v^T; the scores' gradient goes to q, k and, summed over images, to
    pos_proj, whose bias moves whole rows of scores and so gets zero.

    Returns dx (B, N, D) and grads with params' keys.
    """
    cache_project, cache_softmax, cache_proj, (q, k, v, A), offsets, num_heads = cache
    dmerged, dproj_weight, dproj_bias = linear_backward(dout, cache_proj)
    (dy,) = split_heads(dmerged, 1, num_heads)
    dv = A.swapaxes(-1, -2) @ dy
    dA = dy @ v.swapaxes(-1, -2)
    dscores = softmax_backward(dA, cache_softmax)  # (B, H, N, N)
    dpos_weight = dscores.sum(axis=0).reshape(num_heads, -1) @ offsets.reshape(-1, 3)  # (H, 3)
    dS = dscores * q.shape[-1] ** -0.5
    dx, grads = _project_backward(dS @ k, dS.swapaxes(-1, -2) @ q, dv, cache_project)
    return dx, grads | {
        "proj.weight": dproj_weight,
        "proj.bias": dproj_bias,
        "pos_proj.weight": dpos_weight,
        "pos_proj.bias": array_module(dout).zeros_like(dpos_weight[:, 0]),
    }
