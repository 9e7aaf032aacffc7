"""Attention by distance (Kim, Papamakarios, Mnih 2021), and weights of a given spectral norm.

ViTGAN (Lee et al. 2021) builds its discriminator of both. Its layer ties keys to queries and leaves
the values free, which is not enough: `tied_attention`. Kim's theorem 3.2 is about values that pass
through W_q^T W_q as well: `kim_attention`. Their page is tutorials/18-lipschitz.md.
"""

from math import e, sqrt

import numpy as np
import scipy

from ..arrays import array_module
from ..layers import (
    linear_backward,
    linear_forward,
    merge_heads,
    softmax_backward,
    softmax_forward,
    split_heads,
)


def l2_attention_forward(q, v):
    """y = P v,  P = softmax(-|q_i - q_j|^2 / sqrt d): the keys are the queries.

    q, v (B, H, N, d). Returns y (B, H, N, d). The softmax does not see |q_i|^2, one for all keys.
    """
    scale = q.shape[-1] ** -0.5
    square = (q * q).sum(axis=-1)[..., None, :]  # (B, H, 1, N)
    P, cache = softmax_forward((2.0 * q @ q.swapaxes(-1, -2) - square) * scale)  # (B, H, N, N)
    return P @ v, (cache, P, q, v, scale)


def l2_attention_backward(dy, cache):
    """dS = softmax's / sqrt d;  dq = 2 (dS + dS^T) q - 2 q * column sums of dS;  dv = P^T dy."""
    cache_softmax, P, q, v, scale = cache
    dS = softmax_backward(dy @ v.swapaxes(-1, -2), cache_softmax) * scale
    columns = dS.sum(axis=-2)[..., None]  # (B, H, N, 1)
    dq = 2.0 * ((dS + dS.swapaxes(-1, -2)) @ q - columns * q)
    return dq, P.swapaxes(-1, -2) @ dy


def tied_attention_forward(x, params, num_heads):
    """y = proj(l2_attention(q, v)),  (q, v) = qv(x): as ViTGAN's paper has it.

    x (B, N, D); params: qv.weight (2D, D), proj.weight (D, D), proj.bias (D,). Returns (B, N, D).
    """
    qv, cache_qv = linear_forward(x, params["qv.weight"])
    q, v = split_heads(qv, 2, num_heads)  # (B, H, N, d) each
    y, cache_attention = l2_attention_forward(q, v)
    out, cache_proj = linear_forward(merge_heads(y), params["proj.weight"], params["proj.bias"])
    return out, (cache_qv, cache_attention, cache_proj, num_heads)


def tied_attention_backward(dout, cache):
    """Back through proj, the attention and qv. Returns dx (B, N, D) and grads by name."""
    cache_qv, cache_attention, cache_proj, num_heads = cache
    dmerged, dproj_weight, dproj_bias = linear_backward(dout, cache_proj)
    (dy,) = split_heads(dmerged, 1, num_heads)
    dq, dv = l2_attention_backward(dy, cache_attention)
    dx, dqv_weight, _ = linear_backward(merge_heads(dq, dv), cache_qv)
    return dx, {"qv.weight": dqv_weight, "proj.weight": dproj_weight, "proj.bias": dproj_bias}


def kim_attention_forward(x, params, num_heads):
    """The same, but v = q M,  M = W_q W_v^T / sqrt d of each head: nothing passes beside W_q.

    Shapes and keys as in tied_attention_forward.
    """
    D = x.shape[-1]
    per_head = num_heads, D // num_heads, D
    Wq, Wv = (w.reshape(per_head) for w in (params["qv.weight"][:D], params["qv.weight"][D:]))
    scale = per_head[1] ** -0.5
    M = Wq @ Wv.swapaxes(-1, -2) * scale  # (H, d, d)
    queries, cache_q = linear_forward(x, params["qv.weight"][:D])
    (q,) = split_heads(queries, 1, num_heads)
    y, cache_attention = l2_attention_forward(q, q @ M)  # (B, H, N, d)
    out, cache_proj = linear_forward(merge_heads(y), params["proj.weight"], params["proj.bias"])
    return out, (cache_q, cache_attention, cache_proj, (q, M, Wq, Wv, scale))


def kim_attention_backward(dout, cache):
    """dq = through the distances + dv M^T;  dM = sum over images of q^T dv;
    dW_q = the linear layer's + dM W_v / sqrt d;  dW_v = dM^T W_q / sqrt d."""
    cache_q, cache_attention, cache_proj, (q, M, Wq, Wv, scale) = cache
    dmerged, dproj_weight, dproj_bias = linear_backward(dout, cache_proj)
    (dy,) = split_heads(dmerged, 1, len(M))
    dq, dv = l2_attention_backward(dy, cache_attention)
    dM = (q.swapaxes(-1, -2) @ dv).sum(axis=0) * scale  # (H, d, d)
    dx, dWq, _ = linear_backward(merge_heads(dq + dv @ M.swapaxes(-1, -2)), cache_q)
    dWq = dWq + (dM @ Wv).reshape(dWq.shape)  # (D, D)
    dWv = (dM.swapaxes(-1, -2) @ Wq).reshape(dWq.shape)
    dqv_weight = array_module(dWq).concatenate([dWq, dWv])
    return dx, {"qv.weight": dqv_weight, "proj.weight": dproj_weight, "proj.bias": dproj_bias}


def spectral_forward(weight, norm=1.0):
    """y = norm * W / sigma,  sigma = u^T W v, the largest singular value of W.

    weight (out, in). norm: 1 in Miyato et al. 2018; in ViTGAN sigma at the start. Nothing is
    iterated over the steps: u (out, 1) and v (in, 1) are those of now. The shorter one is an
    eigenvector of W W^T or W^T W.
    """
    xp = array_module(weight)
    wide = weight if len(weight) <= weight.shape[1] else weight.T
    u = xp.linalg.eigh(wide @ wide.T)[1][:, -1:]  # of the largest eigenvalue, which is the last
    v = wide.T @ u
    sigma = xp.sqrt((v * v).sum())
    u, v = (u, v / sigma) if wide is weight else (v / sigma, u)
    y = weight * (norm / sigma)
    return y, (y, u, v, sigma, norm)


def spectral_backward(dy, cache):
    """dW = norm / sigma * (dy - (sum of dy * y / norm) u v^T): dsigma / dW = u v^T."""
    y, u, v, sigma, norm = cache
    return (norm * dy - (dy * y).sum() * (u * v[:, 0])) / sigma


def kim_bound(params, num_heads, tokens):
    """The Lipschitz constant of kim_attention is at most this, in the 2-norm, for so many tokens.

    sqrt(N / d) (4 phi + 1) |W_o| sqrt(sum over heads of |W_q|^4 |W_v|^2), with spectral norms and
    phi exp(phi + 1) = N - 1: Kim, Papamakarios and Mnih's theorem 3.2, derived in the tutorial.
    """
    D = len(params["proj.weight"])
    per_head = num_heads, D // num_heads, D
    Wq, Wv = params["qv.weight"].reshape(2, *per_head)
    norms = (np.linalg.norm(W, 2, axis=(1, 2)) for W in (Wq, Wv))  # (H,) each
    heads = np.sqrt(sum(q**4 * v**2 for q, v in zip(*norms, strict=True)))
    phi = float(scipy.special.lambertw((tokens - 1) / e).real)
    outer = float(np.linalg.norm(params["proj.weight"], 2))
    return sqrt(tokens / per_head[1]) * (4.0 * phi + 1.0) * float(heads) * outer


def jacobian_norm(forward, backward, x):
    """The largest singular value of a layer's Jacobian at x (1, N, D): each row is one backward.

    forward(x) -> (y, cache) and backward(dy, cache) -> dx, both for many images at once.
    """
    rows = x.size
    _, cache = forward(np.repeat(x, rows, axis=0))
    dy = np.eye(rows).reshape(rows, *x.shape[1:])
    return float(np.linalg.norm(backward(dy, cache).reshape(rows, rows), 2))
