"""Heads, content attention, and multi-head self-attention (MHSA)."""

from ..arrays import array_module
from .linear import linear_backward, linear_forward
from .softmax import softmax_backward, softmax_forward


def split_heads(x, parts, num_heads):
    """Cuts x (B, N, parts * D) into `parts` arrays (B, H, N, d), D = H * d: views, no copy.

    The features are ordered (part, head, d), so q comes before k, and each head is contiguous.
    """
    B, N, width = x.shape
    x = x.reshape(B, N, parts, num_heads, width // (parts * num_heads))
    return x.transpose(2, 0, 3, 1, 4)  # (parts, B, H, N, d)


def merge_heads(*parts):
    """The inverse of split_heads, and so its backward: arrays (B, H, N, d) to (B, N, parts * D)."""
    B, H, N, d = parts[0].shape
    xp = array_module(parts[0])
    return xp.stack(parts, axis=0).transpose(1, 3, 0, 2, 4).reshape(B, N, len(parts) * H * d)


def attention_forward(q, k, v):
    """y = C v,  C = softmax(q k^T / sqrt d): every query averages the values of similar keys.

    q, k, v (B, H, N, d). Returns y (B, H, N, d). (Vaswani et al. 2017.)
    """
    scale = q.shape[-1] ** -0.5
    C, cache = softmax_forward((q @ k.swapaxes(-1, -2)) * scale)  # (B, H, N, N)
    return C @ v, (cache, C, q, k, v, scale)


def attention_backward(dy, cache):
    """dv = C^T dy;  dC = dy v^T;  dS = softmax's;  dq = dS k / sqrt d;  dk = dS^T q / sqrt d."""
    cache_softmax, C, q, k, v, scale = cache
    dv = C.swapaxes(-1, -2) @ dy
    dC = dy @ v.swapaxes(-1, -2)
    dS = softmax_backward(dC, cache_softmax) * scale
    return dS @ k, dS.swapaxes(-1, -2) @ q, dv


def mhsa_forward(x, params, num_heads):
    """y = proj(attention(q, k, v)),  (q, k, v) = qkv(x).

    x (B, N, D); params: qkv.weight (3D, D), proj.weight (D, D), proj.bias (D,), maybe qkv.bias.
    """
    qkv, cache_qkv = linear_forward(x, params["qkv.weight"], params.get("qkv.bias"))
    q, k, v = split_heads(qkv, 3, num_heads)  # (B, H, N, d) each
    y, cache_attention = attention_forward(q, k, v)
    out, cache_proj = linear_forward(merge_heads(y), params["proj.weight"], params["proj.bias"])
    return out, (cache_qkv, cache_attention, cache_proj, num_heads)


def mhsa_backward(dout, cache):
    """Back through proj, the attention and qkv.

    Returns dx (B, N, D) and grads with params' keys.
    """
    cache_qkv, cache_attention, cache_proj, num_heads = cache
    dmerged, dproj_weight, dproj_bias = linear_backward(dout, cache_proj)
    (dy,) = split_heads(dmerged, 1, num_heads)
    dq, dk, dv = attention_backward(dy, cache_attention)
    dx, dqkv_weight, dqkv_bias = linear_backward(merge_heads(dq, dk, dv), cache_qkv)
    grads = {"qkv.weight": dqkv_weight, "proj.weight": dproj_weight, "proj.bias": dproj_bias}
    if dqkv_bias is not None:
        grads["qkv.bias"] = dqkv_bias
    return dx, grads
