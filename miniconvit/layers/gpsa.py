"""Gated positional self-attention (d'Ascoli et al. 2021, equations 6 to 8), in two exact forms.

Dense, the definition:  A = (1 - g) C + g P,  y = A v, with content attention C (one map per image),
position attention P (one map for all images) and a gate g = sigmoid(gating_param) per head.
Factorised, the same function:  y = (1 - g) C v + g (Py (x) Px) v. Neither A nor P is ever formed.

The official code divides A by its row sums; both maps' rows sum to one, so that is a division by
one. Its gradient is a constant per row of dA, which both softmaxes and the gate ignore.
"""

from ..arrays import array_module
from .attention import attention_backward, attention_forward, merge_heads, split_heads
from .linear import linear_backward, linear_forward
from .position import (
    position_attention_backward,
    position_attention_dense_backward,
    position_attention_dense_forward,
    position_attention_forward,
    position_values_backward,
    position_values_forward,
)
from .softmax import softmax_backward, softmax_forward


def gate_forward(content, position, gating_param):
    """y = (1 - g) content + g position,  g = sigmoid(gating_param), one per head.

    content (B, H, N, K); position alike, or (H, N, K) for all images; gating_param (H,).
    """
    g = 0.5 + 0.5 * array_module(gating_param).tanh(0.5 * gating_param)[:, None, None]  # (H, 1, 1)
    return (1.0 - g) * content + g * position, (content, position, g)


def gate_backward(dy, cache):
    """dcontent = (1 - g) dy;  dposition = g dy;  dgating = g (1 - g) sum dy (position - content).

    dy (B, H, N, K). Returns dcontent and dposition (B, H, N, K), dgating_param (H,).
    """
    content, position, g = cache
    dg = (dy * (position - content)).sum(axis=(0, 2, 3))  # (H,)
    g_head = g[:, 0, 0]
    return (1.0 - g) * dy, g * dy, g_head * (1.0 - g_head) * dg


def _project_forward(x, params, num_heads):
    """q, k and v of GPSA, (B, H, N, d) each: two linear layers, because v starts as identity."""
    qk, cache_qk = linear_forward(x, params["qk.weight"], params.get("qk.bias"))
    values, cache_v = linear_forward(x, params["v.weight"], params.get("v.bias"))
    q, k = split_heads(qk, 2, num_heads)
    (v,) = split_heads(values, 1, num_heads)
    return q, k, v, (cache_qk, cache_v)


def _project_backward(dq, dk, dv, cache):
    """Returns dx, the sum of what the two layers send back, and their gradients by name."""
    cache_qk, cache_v = cache
    dx_qk, dqk_weight, dqk_bias = linear_backward(merge_heads(dq, dk), cache_qk)
    dx_v, dv_weight, dv_bias = linear_backward(merge_heads(dv), cache_v)
    grads = {"qk.weight": dqk_weight, "v.weight": dv_weight}
    if dqk_bias is not None:
        grads |= {"qk.bias": dqk_bias, "v.bias": dv_bias}
    return dx_qk + dx_v, grads


def gpsa_dense_forward(x, params, num_heads, grid):
    """The definition: two attention maps, mixed by the gate, applied to the values.

    x (B, N, D), N = rows * cols of grid; params: gating_param (H,), qk.weight (2D, D),
    v.weight (D, D), proj.weight (D, D), proj.bias (D,), pos_proj.weight (H, 3), pos_proj.bias (H,),
    maybe qk.bias and v.bias. Returns (B, N, D).
    """
    q, k, v, cache_project = _project_forward(x, params, num_heads)
    scale = q.shape[-1] ** -0.5
    C, cache_softmax = softmax_forward((q @ k.swapaxes(-1, -2)) * scale)  # (B, H, N, N)
    P, cache_position = position_attention_dense_forward(
        params["pos_proj.weight"], params["pos_proj.bias"], grid
    )  # (H, N, N)
    A, cache_gate = gate_forward(C, P, params["gating_param"])  # (B, H, N, N)
    y = A @ v  # (B, H, N, d)
    out, cache_proj = linear_forward(merge_heads(y), params["proj.weight"], params["proj.bias"])
    caches = (cache_project, cache_softmax, cache_position, cache_gate, cache_proj)
    return out, (caches, (q, k, v, A), scale, num_heads)


def gpsa_dense_backward(dout, cache):
    """dv = A^T dy and dA = dy v^T; the gate splits dA between C and P; P gets the sum over images.

    Returns dx (B, N, D) and grads with params' keys.
    """
    caches, (q, k, v, A), scale, num_heads = cache
    cache_project, cache_softmax, cache_position, cache_gate, cache_proj = caches
    dmerged, dproj_weight, dproj_bias = linear_backward(dout, cache_proj)
    (dy,) = split_heads(dmerged, 1, num_heads)
    dv = A.swapaxes(-1, -2) @ dy
    dA = dy @ v.swapaxes(-1, -2)
    dC, dP, dgating = gate_backward(dA, cache_gate)
    dpos_weight, dpos_bias = position_attention_dense_backward(dP.sum(axis=0), cache_position)
    dS = softmax_backward(dC, cache_softmax) * scale
    dx, grads = _project_backward(dS @ k, dS.swapaxes(-1, -2) @ q, dv, cache_project)
    return dx, grads | {
        "gating_param": dgating,
        "proj.weight": dproj_weight,
        "proj.bias": dproj_bias,
        "pos_proj.weight": dpos_weight,
        "pos_proj.bias": dpos_bias,
    }


def gpsa_forward(x, params, num_heads, grid):
    """The same function by applying each map to the values, then mixing: training uses this one.

    Shapes and keys as in gpsa_dense_forward.
    """
    q, k, v, cache_project = _project_forward(x, params, num_heads)
    content, cache_content = attention_forward(q, k, v)  # (B, H, N, d)
    (py, px), cache_position = position_attention_forward(
        params["pos_proj.weight"], params["pos_proj.bias"], grid
    )
    position, cache_values = position_values_forward(v, py, px)  # (B, H, N, d)
    y, cache_gate = gate_forward(content, position, params["gating_param"])
    out, cache_proj = linear_forward(merge_heads(y), params["proj.weight"], params["proj.bias"])
    caches = (cache_project, cache_content, cache_position, cache_values, cache_gate, cache_proj)
    return out, (caches, num_heads)


def gpsa_backward(dout, cache):
    """The gate splits dy between the two branches; v hears from both.

    Returns dx (B, N, D) and grads with params' keys.
    """
    caches, num_heads = cache
    cache_project, cache_content, cache_position, cache_values, cache_gate, cache_proj = caches
    dmerged, dproj_weight, dproj_bias = linear_backward(dout, cache_proj)
    (dy,) = split_heads(dmerged, 1, num_heads)
    dcontent, dposition, dgating = gate_backward(dy, cache_gate)
    dv, dpy, dpx = position_values_backward(dposition, cache_values)
    dpos_weight, dpos_bias = position_attention_backward((dpy, dpx), cache_position)
    dq, dk, dv_content = attention_backward(dcontent, cache_content)
    dx, grads = _project_backward(dq, dk, dv + dv_content, cache_project)
    return dx, grads | {
        "gating_param": dgating,
        "proj.weight": dproj_weight,
        "proj.bias": dproj_bias,
        "pos_proj.weight": dpos_weight,
        "pos_proj.bias": dpos_bias,
    }
