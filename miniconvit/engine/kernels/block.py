"""The block for the CPU, with the signatures of `layers/block.py`, for float32 NumPy arrays.

Given anything else, such as float64 or CuPy arrays, a whole block runs the reference where the
arithmetic has one. Every cache is (function, cache) and so names the backward for it.
"""

import numpy as np

from ... import layers
from ...errors import UserError
from ...layers.names import part, prefixed
from .adamw import adamw_step
from .attention import (
    attention_backward,
    attention_forward,
    first_token_backward,
    first_token_forward,
    is_psa,
    psa_backward,
    psa_forward,
)
from .compiled import empty, is_float32, plain
from .float32 import gelu


class Blocks:
    """What convit_forward takes as `blocks`, by an arithmetic such as Float32.

    An arithmetic may keep what it makes of the parameters, so that one of Blocks is for one state
    of them: fresh() gives the next. keep: whether a backward pass may follow.
    """

    def __init__(self, arithmetic, keep=True):
        self._arithmetic, self._a, self._keep = arithmetic, arithmetic(), keep

    def fresh(self, keep=True):
        """The same for parameters that may have changed."""
        return Blocks(self._arithmetic, keep)

    adamw_step = staticmethod(adamw_step)

    @property
    def gelu_pair(self):
        """As layers.gelu_forward and layers.gelu_backward."""
        return self._gelu_forward, _gelu_backward

    def block_forward(self, x, params, num_heads, grid, keep=(None, None), keep_prob=1.0):
        """As layers.block_forward."""
        if not self._serves(x, params):
            y, cache = layers.block_forward(x, params, num_heads, grid, keep, keep_prob)
            return y, (layers.block_backward, cache)
        y, cache = self._forward(x, params, num_heads, grid, keep, keep_prob, False)
        return y, (self._backward, cache)

    def last_block_forward(self, x, params, num_heads, grid, keep=(None, None), keep_prob=1.0):
        """Queries, proj and MLP for the class token alone; keys and values for all tokens.

        GPSA and PSA have no class token: their last block is a block.
        """
        if "attn.pos_proj.weight" in params or not self._serves(x, params):
            y, cache = self.block_forward(x, params, num_heads, grid, keep, keep_prob)
            return y[:, 0], (self._first_of_block_backward, (cache, y.shape))
        y, cache = self._forward(x, params, num_heads, grid, keep, keep_prob, True)
        return y[:, 0], (self._first_token_backward, cache)

    def block_backward(self, dy, cache):
        """As layers.block_backward, by the function that forward chose."""
        backward, cache = cache
        return backward(dy, cache)

    last_block_backward = block_backward

    def _serves(self, x, params):
        """Whether the arithmetic is for it: float32 arrays of NumPy, and PSA where it has that."""
        serves = self._a.has_psa or not is_psa(params)
        serves = serves and all(map(is_float32, (x, *params.values())))
        if not (serves or self._a.has_reference):
            raise UserError(
                "bf16 is for float32 parameters and images, and not for PSA: leave --precision at "
                "float32"
            )
        return serves

    def _gelu_forward(self, x):
        if not is_float32(x):
            return layers.gelu_forward(x)
        y, slope = gelu(np.array(x, order="C").reshape(-1, x.shape[-1]), self._keep)
        return y.reshape(x.shape), slope

    def _first_of_block_backward(self, dy, cache):
        cache_block, shape = cache
        dtokens = np.zeros(shape, dy.dtype)
        dtokens[:, 0] = dy
        return self.block_backward(dtokens, cache_block)

    def _first_token_backward(self, dy, cache):
        return self._backward(dy[:, None], cache)

    def _forward(self, x, params, num_heads, grid, keep, keep_prob, first):
        """Both branches, the second and the first one's sum for all tokens or the first alone."""
        a, (B, N, D) = self._a, x.shape
        tokens = 1 if first else N
        factor1, factor2 = (_factor(mask, keep_prob, B, tokens) for mask in keep)  # (B * tokens,)
        params = {name: plain(p) if p.ndim == 1 else p for name, p in params.items()}
        x0 = plain(x).reshape(-1, D)  # (R, D)
        normed1, statistics1 = a.norm(x0, params["norm1.weight"], params["norm1.bias"])
        attend, attend_backward = _attention_pair(params, first)
        attended, cache = attend(a, normed1, part(params, "attn."), B, num_heads, grid)
        residual = plain(x[:, :tokens]).reshape(-1, D)
        x1 = a.branch(
            attended, params["attn.proj.weight"], params["attn.proj.bias"], factor1, residual
        )
        normed2, statistics2 = a.norm(x1, params["norm2.weight"], params["norm2.bias"])
        active, slope = a.gelu(
            normed2, params["mlp.fc1.weight"], params["mlp.fc1.bias"], self._keep
        )
        x2 = a.branch(active, params["mlp.fc2.weight"], params["mlp.fc2.bias"], factor2, x1)
        cache1 = x0, statistics1, attended, (attend_backward, cache), factor1, first
        cache2 = x1, normed2, statistics2, active, slope, factor2
        return x2.reshape(B, tokens, D), (cache1, cache2, params, x.shape)

    def _backward(self, dy, cache):
        """Both in reverse: dx (B, N, D) and grads with params' keys."""
        a, (cache1, cache2, params, shape) = self._a, cache
        dx2 = plain(dy).reshape(-1, shape[-1])
        dx1, grads2 = _mlp_backward(a, dx2, params, cache2)
        dx0, grads1 = _attention_backward(a, dx1, params, cache1)
        return dx0.reshape(shape), grads1 | grads2


def _attention_pair(params, first):
    """Forward and backward of a block's attention, of all tokens or the first."""
    if first:
        return first_token_forward, first_token_backward
    if is_psa(params):
        return psa_forward, psa_backward
    return attention_forward, attention_backward


def _gelu_backward(dy, cache):
    if isinstance(cache, tuple):
        return layers.gelu_backward(dy, cache)
    return dy * cache.reshape(dy.shape)


def _mlp_backward(a, dx2, params, cache):
    """dx1 and the gradients of norm2 and mlp."""
    x1, normed, statistics, active, slope, factor = cache
    dbranch, dfc2_bias = a.scaled(dx2, factor)
    dhidden, dfc1_bias = a.back_gelu(dbranch, params["mlp.fc2.weight"], slope)
    dnormed = a.back(dhidden, [params["mlp.fc1.weight"]])
    dx1, dweight, dbias = a.norm_backward(dnormed, x1, statistics, params["norm2.weight"], dx2)
    return dx1, {
        "norm2.weight": dweight,
        "norm2.bias": dbias,
        "mlp.fc1.weight": a.outer(dhidden, normed),
        "mlp.fc1.bias": dfc1_bias,
        "mlp.fc2.weight": a.outer(dbranch, active),
        "mlp.fc2.bias": dfc2_bias,
    }


def _attention_backward(a, dx1, params, cache):
    """dx0 and the gradients of norm1 and attn."""
    x0, statistics, attended, (attend_backward, cache_attention), factor, first = cache
    dbranch, dproj_bias = a.scaled(dx1, factor)
    dattended = a.back_operand(dbranch, [params["attn.proj.weight"]])
    dnormed, dattn = attend_backward(a, dattended, cache_attention)
    dresidual = dx1
    if first:
        dresidual = empty(x0.shape)
        dresidual[...] = 0.0
        dresidual[:: len(x0) // len(dx1)] = dx1
    dx0, dweight, dbias = a.norm_backward(
        dnormed, x0, statistics, params["norm1.weight"], dresidual
    )
    return dx0, prefixed(dattn, "attn.") | {
        "norm1.weight": dweight,
        "norm1.bias": dbias,
        "attn.proj.weight": a.outer(dbranch, attended),
        "attn.proj.bias": dproj_bias,
    }


def _factor(keep, keep_prob, B, tokens):
    """Drop path's factor of each row, (B * tokens,)."""
    if keep is None:
        return np.ones(B * tokens, np.float32)
    return np.repeat((keep / keep_prob).astype(np.float32), tokens)
