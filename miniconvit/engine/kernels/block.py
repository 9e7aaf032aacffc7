"""The block for the CPU, with the signatures of `layers/block.py`, for float32 NumPy arrays.

Given anything else, such as float64 or CuPy arrays, a whole block runs the reference. Every cache
is (function, cache) and so names the backward that understands it.
"""

import numpy as np

from ... import layers
from ...layers.names import part, prefixed
from . import tokenwise
from .attention import (
    first_token_backward,
    first_token_forward,
    gpsa_backward,
    gpsa_forward,
    mhsa_backward,
    mhsa_forward,
)
from .tokenwise import features_first, is_served, mlp_backward, mlp_forward, tokens_first


def _laid_out(x):
    """The same x (B, N, D), features first."""
    return tokens_first(features_first(x), x.shape[:-1])


def _branch_forward(x, function, norm, keep, keep_prob):
    """As layers.block's, on as many first tokens as the function returns."""
    normed, cache_norm = tokenwise.layernorm_forward(x, norm["weight"], norm["bias"])
    y, cache_function = function(normed)
    cache_drop = None
    if keep is not None:
        y, cache_drop = layers.drop_path_forward(y, keep, keep_prob)
    return x[:, : y.shape[1]] + y, (cache_norm, cache_function, cache_drop)


def _branch_backward(dy, function_backward, cache):
    """As layers.block's; dy belongs to the first tokens, dx to all."""
    cache_norm, cache_function, cache_drop = cache
    dbranch = dy if cache_drop is None else layers.drop_path_backward(dy, cache_drop)
    dnormed, grads = function_backward(dbranch, cache_function)
    dx, dweight, dbias = tokenwise.layernorm_backward(dnormed, cache_norm)
    dx[:, : dy.shape[1]] += dy
    return dx, grads, {"weight": dweight, "bias": dbias}


def _branches_forward(x, params, attention, keep, keep_prob, mlp):
    """Both branches, on x laid out features first; attention is a function of x alone."""
    x = _laid_out(x)
    x, cache1 = _branch_forward(x, attention, part(params, "norm1."), keep[0], keep_prob)
    mlp_params = part(params, "mlp.")
    x, cache2 = _branch_forward(
        x, lambda x: mlp(x, mlp_params), part(params, "norm2."), keep[1], keep_prob
    )
    return x, cache1, cache2


def _branches_backward(dy, cache):
    """Both in reverse: dx (B, N, D) and grads with params' keys."""
    cache1, cache2, attention_backward = cache
    dx, dmlp, dnorm2 = _branch_backward(_laid_out(dy), mlp_backward, cache2)
    dx, dattn, dnorm1 = _branch_backward(dx, attention_backward, cache1)
    return dx, (
        prefixed(dnorm1, "norm1.")
        | prefixed(dattn, "attn.")
        | prefixed(dnorm2, "norm2.")
        | prefixed(dmlp, "mlp.")
    )


def block_forward(x, params, num_heads, grid, keep=(None, None), keep_prob=1.0, mlp=mlp_forward):
    """As layers.block_forward; PSA has no kernel, so its attention is the reference's."""
    if not is_served(x):
        y, cache = layers.block_forward(x, params, num_heads, grid, keep, keep_prob)
        return y, (layers.block_backward, cache)
    attn = part(params, "attn.")
    if "gating_param" in attn:
        forward, backward, more = gpsa_forward, gpsa_backward, (grid,)
    elif "pos_proj.weight" in attn:
        forward, backward, more = layers.psa_forward, layers.psa_backward, (grid,)
    else:
        forward, backward, more = mhsa_forward, mhsa_backward, ()

    def attention(x):
        return forward(x, attn, num_heads, *more)

    y, *caches = _branches_forward(x, params, attention, keep, keep_prob, mlp)
    return y, (_branches_backward, (*caches, backward))


def last_block_forward(
    x, params, num_heads, grid, keep=(None, None), keep_prob=1.0, mlp=mlp_forward
):
    """Queries, proj and MLP for the class token alone; keys and values for all tokens.

    GPSA and PSA have no class token: their last block is a block.
    """
    if not is_served(x):
        y, cache = layers.last_block_forward(x, params, num_heads, grid, keep, keep_prob)
        return y, (layers.last_block_backward, cache)
    attn = part(params, "attn.")
    if "pos_proj.weight" in attn:
        y, cache = block_forward(x, params, num_heads, grid, keep, keep_prob, mlp)
        return y[:, 0], (_first_of_block_backward, (cache, y.shape))

    def attention(x):
        return first_token_forward(x, attn, num_heads)

    y, *caches = _branches_forward(x, params, attention, keep, keep_prob, mlp)
    return y[:, 0], (_first_token_backward, (*caches, first_token_backward))


def _first_of_block_backward(dy, cache):
    """As layers.last_block_backward."""
    cache_block, shape = cache
    dtokens = np.zeros(shape, dy.dtype)
    dtokens[:, 0] = dy
    return block_backward(dtokens, cache_block)


def _first_token_backward(dy, cache):
    return _branches_backward(dy[:, None], cache)


def layernorm_forward(x, weight, bias):
    """As layers.layernorm_forward: for the norm after the last block."""
    if not is_served(x):
        y, cache = layers.layernorm_forward(x, weight, bias)
        return y, (layers.layernorm_backward, cache)
    y, cache = tokenwise.layernorm_forward(x, weight, bias)
    return y, (tokenwise.layernorm_backward, cache)


def block_backward(dy, cache):
    """As layers.block_backward, by the function that forward chose."""
    backward, cache = cache
    return backward(dy, cache)


last_block_backward = layernorm_backward = block_backward
