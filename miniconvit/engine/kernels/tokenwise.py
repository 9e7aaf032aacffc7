"""LayerNorm, GELU and MLP for the CPU: what treats every token alike.

All activations are kept features first: an array (B, N, D) is a view of a contiguous (D, B * N).
A bias or a statistic is then one number per row or one vector for all rows, which NumPy broadcasts
at full speed, and no head is ever cut out by a copy.
"""

from math import pi, prod, sqrt

import numpy as np

from ... import layers

CACHE_LINE = 64  # bytes
BLOCK = 32768  # elements: the four arrays of a GELU block, 128 KB each, stay in the L2 cache


def is_served(x):
    """Whether x is what these functions are for: NumPy's, float32."""
    return isinstance(x, np.ndarray) and x.dtype == np.float32


def features_first(x):
    """x (..., D) as a contiguous (D, R), R the product of the other axes: a view where x is one."""
    return np.ascontiguousarray(x.reshape(-1, x.shape[-1]).T)


def tokens_first(columns, shape):
    """The inverse: columns (D, R) seen as (*shape, D), no copy."""
    return columns.T.reshape(*shape, len(columns))


def aligned(shape):
    """An empty float32 array at the start of a cache line.

    NumPy begins arrays anywhere, and writes a + b more slowly where no line begins.
    """
    size, line = prod(shape), CACHE_LINE // 4
    whole = np.empty(size + line, np.float32)
    start = -whole.__array_interface__["data"][0] // 4 % line
    return whole[start : start + size].reshape(shape)


def product(a, b):
    """The matrix a @ b, at the start of a cache line."""
    return np.matmul(a, b, out=aligned((len(a), b.shape[1])))


def row_sums(columns):
    """(D, R) to (D,): the sum over all tokens, as a matrix-vector product."""
    return columns @ np.ones(columns.shape[1], columns.dtype)


def layernorm_forward(x, weight, bias, eps=1e-6):
    """As layers.layernorm_forward; the means over the features are matrix-vector products."""
    columns = features_first(x)  # (D, R)
    average = np.full(len(weight), 1.0 / len(weight), x.dtype)
    xhat = np.subtract(columns, average @ columns, out=aligned(columns.shape))
    y = np.multiply(xhat, xhat, out=aligned(xhat.shape))
    rstd = 1.0 / np.sqrt(average @ y + eps)  # (R,)
    xhat *= rstd
    np.multiply(xhat, weight[:, None], out=y)
    y += bias[:, None]
    return tokens_first(y, x.shape[:-1]), (xhat, rstd, weight)


def layernorm_backward(dy, cache):
    """The means of dxhat = weight * dy and of dxhat * xhat are products with weight / D."""
    xhat, rstd, weight = cache
    dcolumns = features_first(dy)
    scaled = weight * (1.0 / len(weight))
    dweighted = np.multiply(dcolumns, xhat, out=aligned(xhat.shape))
    dweight, dbias = row_sums(dweighted), row_sums(dcolumns)
    through_mean, through_variance = scaled @ dcolumns, scaled @ dweighted  # (R,) each
    dx = np.multiply(dcolumns, weight[:, None], out=aligned(xhat.shape))
    np.multiply(xhat, through_variance, out=dweighted)
    dx -= dweighted
    dx -= through_mean
    dx *= rstd
    return tokens_first(dx, dy.shape[:-1]), dweight, dbias


def _gelu_block(x, y, ratio, square, keep_slope):
    """y = x * Phi(x), and x becomes the derivative Phi(x) + x * phi(x); the rest is scratch.

    Without keep_slope x itself becomes x * Phi(x), and y is scratch too.

    Phi(x) = (1 + tanh(x r(x^2))) / 2 with r a quotient of a cubic and a quadratic, fitted so that
    Phi is off by at most 5.4e-8 where tanh has not yet reached 1 in float32.
    """
    np.multiply(x, x, out=square)
    if square.max() > 170.0:  # then phi is a denormal, and from 1e13 on the cube overflows
        np.minimum(square, 170.0, out=square)
    np.multiply(square, 0.018137991172216, out=ratio)
    ratio += 1.5772436119303772
    ratio *= square
    ratio += 28.719334687472237
    ratio *= square
    ratio += 250.1498947590534
    np.add(square, 21.718379202981694, out=y)
    y *= square
    y += 313.51613592418164
    ratio /= y
    ratio *= x
    cdf = np.tanh(ratio, out=ratio)
    cdf *= 0.5
    cdf += 0.5
    if not keep_slope:
        x *= cdf
        return
    np.multiply(x, cdf, out=y)
    square *= -0.5
    np.exp(square, out=square)
    square *= x
    square *= 1.0 / sqrt(2.0 * pi)
    np.add(square, cdf, out=x)


def _gelu(x, y, bias=None):
    """y = gelu(x + bias[:, None]) for contiguous x and y (M, R); x becomes the derivative.

    With y None x itself becomes the result.
    """
    rows = max(1, BLOCK // x.shape[1])
    ratio, square, scratch = aligned((3, rows, x.shape[1]))
    for start in range(0, len(x), rows):
        block = x[start : start + rows]
        if bias is not None:
            block += bias[start : start + rows, None]
        count = len(block)
        y_block = scratch[:count] if y is None else y[start : start + rows]
        _gelu_block(block, y_block, ratio[:count], square[:count], y is not None)


def _copied(x):
    """A contiguous copy (R, D) of x (..., D), at the start of a cache line."""
    rows = aligned((prod(x.shape[:-1]), x.shape[-1]))
    rows[...] = x.reshape(rows.shape)
    return rows


def gelu_forward(x):
    """As layers.gelu_forward; of float32 the derivative is kept."""
    if not is_served(x):
        return layers.gelu_forward(x)
    slope = _copied(x)
    y = aligned(slope.shape)
    _gelu(slope, y)
    return y.reshape(x.shape), slope


def gelu_backward(dy, cache):
    """As layers.gelu_backward."""
    if isinstance(cache, tuple):
        return layers.gelu_backward(dy, cache)
    return dy * cache.reshape(dy.shape)


def gelu_inference(x):
    """gelu_forward without the derivative and with the cache None."""
    if not is_served(x):
        return layers.gelu_forward(x)[0], None
    y = _copied(x)
    _gelu(y, None)
    return y.reshape(x.shape), None


def mlp_forward(x, params):
    """As layers.mlp_forward; fc1's bias is added within the pass of the GELU."""
    columns = features_first(x)  # (D, R)
    slope = product(params["fc1.weight"], columns)  # (M, R)
    active = aligned(slope.shape)
    _gelu(slope, active, params["fc1.bias"])
    y = product(params["fc2.weight"], active)
    y += params["fc2.bias"][:, None]
    return tokens_first(y, x.shape[:-1]), (columns, slope, active, params)


def mlp_inference(x, params):
    """mlp_forward without the GELU's derivative and with the cache None: for no backward."""
    hidden = product(params["fc1.weight"], features_first(x))  # (M, R)
    _gelu(hidden, None, params["fc1.bias"])
    y = product(params["fc2.weight"], hidden)
    y += params["fc2.bias"][:, None]
    return tokens_first(y, x.shape[:-1]), None


def mlp_backward(dy, cache):
    """As layers.mlp_backward: dx (B, N, D) and grads with params' keys."""
    columns, slope, active, params = cache
    dcolumns = features_first(dy)
    dhidden = product(params["fc2.weight"].T, dcolumns)  # (M, R)
    dhidden *= slope
    dx = product(params["fc1.weight"].T, dhidden)
    return tokens_first(dx, dy.shape[:-1]), {
        "fc1.weight": dhidden @ columns.T,
        "fc1.bias": row_sums(dhidden),
        "fc2.weight": dcolumns @ active.T,
        "fc2.bias": row_sums(dcolumns),
    }
