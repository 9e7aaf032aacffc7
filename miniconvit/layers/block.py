"""One transformer block, pre-norm: attention and MLP, each on its own residual branch."""

from ..arrays import array_module
from .attention import mhsa_backward, mhsa_forward
from .drop_path import drop_path_backward, drop_path_forward
from .gpsa import gpsa_backward, gpsa_forward
from .layernorm import layernorm_backward, layernorm_forward
from .mlp import mlp_backward, mlp_forward
from .names import part, prefixed
from .psa import psa_backward, psa_forward


def _branch_forward(x, function, norm, keep, keep_prob):
    """x + drop_path(function(layernorm(x))): one residual branch. keep None: nothing is dropped."""
    normed, cache_norm = layernorm_forward(x, norm["weight"], norm["bias"])
    y, cache_function = function(normed)
    cache_drop = None
    if keep is not None:
        y, cache_drop = drop_path_forward(y, keep, keep_prob)
    return x + y, (cache_norm, cache_function, cache_drop)


def _branch_backward(dy, function_backward, cache):
    """dx = dy (the residual) + what comes back through the branch.

    Returns dx and the gradients of the branch's function and of its norm.
    """
    cache_norm, cache_function, cache_drop = cache
    dbranch = dy if cache_drop is None else drop_path_backward(dy, cache_drop)
    dnormed, grads = function_backward(dbranch, cache_function)
    dx, dweight, dbias = layernorm_backward(dnormed, cache_norm)
    return dy + dx, grads, {"weight": dweight, "bias": dbias}


def block_forward(x, params, num_heads, grid, keep=(None, None), keep_prob=1.0):
    """x + attention(norm1(x)), then x + mlp(norm2(x)).

    x (B, N, D); params: `norm1.*, attn.*, norm2.*, mlp.*`. Names below attn. tell the attention:
    with gating_param it is GPSA on the patch grid, with pos_proj alone PSA, else MHSA, which needs
    no grid. keep: the drop-path masks (B,) of the two branches, or None. Returns (B, N, D).
    """
    attn = part(params, "attn.")
    kind = "gpsa" if "gating_param" in attn else "psa" if "pos_proj.weight" in attn else "mhsa"

    def attention(x):
        if kind == "mhsa":
            return mhsa_forward(x, attn, num_heads)
        forward = gpsa_forward if kind == "gpsa" else psa_forward
        return forward(x, attn, num_heads, grid)

    def mlp(x):
        return mlp_forward(x, part(params, "mlp."))

    x, cache1 = _branch_forward(x, attention, part(params, "norm1."), keep[0], keep_prob)
    x, cache2 = _branch_forward(x, mlp, part(params, "norm2."), keep[1], keep_prob)
    return x, (cache1, cache2, kind)


def block_backward(dy, cache):
    """The branches in reverse. Returns dx (B, N, D) and grads with params' keys."""
    cache1, cache2, kind = cache
    backwards = {"gpsa": gpsa_backward, "psa": psa_backward, "mhsa": mhsa_backward}
    dx, dmlp, dnorm2 = _branch_backward(dy, mlp_backward, cache2)
    dx, dattn, dnorm1 = _branch_backward(dx, backwards[kind], cache1)
    return dx, (
        prefixed(dnorm1, "norm1.")
        | prefixed(dattn, "attn.")
        | prefixed(dnorm2, "norm2.")
        | prefixed(dmlp, "mlp.")
    )


def last_block_forward(x, params, num_heads, grid, keep=(None, None), keep_prob=1.0):
    """Token 0 of the last block's output, which is all that the head reads: (B, D).

    Arguments as in block_forward.
    """
    y, cache = block_forward(x, params, num_heads, grid, keep, keep_prob)
    return y[:, 0], (cache, y.shape)


def last_block_backward(dy, cache):
    """dy (B, D) reaches token 0 alone; the block carries it to all tokens of its input."""
    cache_block, shape = cache
    dtokens = array_module(dy).zeros(shape, dy.dtype)
    dtokens[:, 0] = dy
    return block_backward(dtokens, cache_block)
