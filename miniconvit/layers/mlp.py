"""The two-layer perceptron of a block."""

from .gelu import gelu_backward, gelu_forward
from .linear import linear_backward, linear_forward


def mlp_forward(x, params):
    """y = fc2(gelu(fc1(x))).  x (B, N, D); params: fc1.weight (M, D), fc1.bias (M,),
    fc2.weight (D, M), fc2.bias (D,). Returns (B, N, D)."""
    hidden, cache_fc1 = linear_forward(x, params["fc1.weight"], params["fc1.bias"])
    active, cache_gelu = gelu_forward(hidden)  # (B, N, M)
    y, cache_fc2 = linear_forward(active, params["fc2.weight"], params["fc2.bias"])
    return y, (cache_fc1, cache_gelu, cache_fc2)


def mlp_backward(dy, cache):
    """Back through fc2, the GELU and fc1. Returns dx (B, N, D) and grads with params' keys."""
    cache_fc1, cache_gelu, cache_fc2 = cache
    dactive, dfc2_weight, dfc2_bias = linear_backward(dy, cache_fc2)
    dhidden = gelu_backward(dactive, cache_gelu)
    dx, dfc1_weight, dfc1_bias = linear_backward(dhidden, cache_fc1)
    return dx, {
        "fc1.weight": dfc1_weight,
        "fc1.bias": dfc1_bias,
        "fc2.weight": dfc2_weight,
        "fc2.bias": dfc2_bias,
    }
