"""Convolution, a filter for each channel, and batch normalisation (Ioffe, Szegedy 2015).

Images are channels last, (B, rows, cols, C): a token sequence (B, N, C) is an image, and `linear`,
`layernorm` and `gelu` take either. Weights have the shapes of the official code.
"""

import numpy as np

from ..arrays import array_module
from ..errors import UserError
from ..layers import linear_backward, linear_forward


def _windows(x, k, stride, padding):
    """(padded x, [(a, b, place)]): where the windows' pixels of row a and column b lie in it."""
    sides = (padding, padding)
    padded = array_module(x).pad(x, ((0, 0), sides, sides, (0, 0))) if padding else x
    rows, cols = ((side - k) // stride * stride + 1 for side in padded.shape[1:3])
    places = [np.s_[:, a : a + rows : stride, b : b + cols : stride] for a, b in np.ndindex(k, k)]
    return padded, [(*divmod(i, k), place) for i, place in enumerate(places)]


def _without(padding, padded):
    """The image inside its frame of zeros."""
    rows, cols = padded.shape[1:3]
    return padded[:, padding : rows - padding, padding : cols - padding]


def _sum(x):
    """x (..., C) summed over all but its last axis, as a product, which is faster: (C,)."""
    rows = x.reshape(-1, x.shape[-1])
    return (array_module(x).full((1, len(rows)), 1.0, x.dtype) @ rows)[0]


def conv_forward(x, weight, bias=None, stride=1, padding=0):
    """y at each place: the k x k window of x there, flattened, times the weight; zeros outside.

    x (B, rows, cols, C), weight (D, C, k, k), bias (D,) or None. Returns y (B, rows', cols', D).
    """
    padded, windows = _windows(x, weight.shape[-1], stride, padding)
    pixels = [padded[place] for _, _, place in windows]
    flat = array_module(x).concatenate(pixels, axis=-1)  # (B, rows', cols', k * k * C)
    rows = weight.transpose(0, 2, 3, 1).reshape(len(weight), -1)  # (D, k * k * C)
    y, cache = linear_forward(flat, rows, bias)
    return y, (cache, windows, padded.shape, weight.shape, padding)


def conv_backward(dy, cache, need_dx=True):
    """dx at each place: the sum of what its windows send back. dweight, dbias: the linear layer's.

    dy (B, rows', cols', D). dx is None with need_dx=False, dbias None without a bias.
    """
    cache, windows, shape, (D, C, k, _), padding = cache
    dflat, drows, dbias = linear_backward(dy, cache, need_dx)
    dweight = drows.reshape(D, k, k, C).transpose(0, 3, 1, 2)
    if not need_dx:
        return None, dweight, dbias
    dpadded = array_module(dy).zeros(shape, dy.dtype)
    for i, (_, _, place) in enumerate(windows):
        dpadded[place] += dflat[..., i * C : (i + 1) * C]
    return _without(padding, dpadded), dweight, dbias


def depthwise_forward(x, weight, bias, stride=1, padding=0):
    """y = sum over the places of a k x k window of x there * weight, + bias; zeros outside.

    x (B, rows, cols, C), weight (C, 1, k, k), bias (C,): a filter for each channel.
    """
    padded, windows = _windows(x, weight.shape[-1], stride, padding)
    y = bias + sum(padded[place] * weight[:, 0, a, b] for a, b, place in windows)
    return y, (padded, weight, windows, padding)


def depthwise_backward(dy, cache):
    """dx at each place: dy of the windows that hold it * weight;  dweight = sum of dy * x there."""
    padded, weight, windows, padding = cache
    xp = array_module(dy)
    dpadded, dweight = xp.zeros_like(padded), xp.zeros_like(weight)
    for a, b, place in windows:
        dpadded[place] += dy * weight[:, 0, a, b]
        dweight[:, 0, a, b] = _sum(dy * padded[place])
    return _without(padding, dpadded), dweight, _sum(dy)


def batchnorm_forward(x, params, train, eps=1e-5):
    """y = weight * xhat + bias,  xhat = (x - mean) / sqrt(variance + eps), both of each channel.

    x (..., C); params: weight, bias, running_mean, running_var, (C,) each. In training mean and
    variance are those of x over all but its last axis, in evaluation the running ones, and nothing
    is kept. Raises UserError for a single value of each channel in training.
    """
    xp = array_module(x)
    if not train:
        scale = params["weight"] / xp.sqrt(params["running_var"] + eps)
        return (x - params["running_mean"]) * scale + params["bias"], None
    rows = x.reshape(-1, x.shape[-1])  # (R, C)
    if len(rows) < 2:
        raise UserError("batch normalisation trains on two values of each channel, not on one")
    mean = _sum(rows) / len(rows)
    centred = rows - mean
    variance = _sum(centred * centred) / len(rows)
    rstd = 1.0 / xp.sqrt(variance + eps)
    xhat = centred * rstd
    unbiased = variance * (len(rows) / (len(rows) - 1))  # as the official code averages it
    off = params["running_mean"] - mean, params["running_var"] - unbiased
    y = (xhat * params["weight"] + params["bias"]).reshape(x.shape)
    return y, (xhat, rstd, params["weight"], off)


def batchnorm_backward(dy, cache):
    """dx = rstd * (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat)), as LayerNorm's down a column.

    Returns dx and grads with params' keys. Those of running_* are no gradients but what they are
    off by: an optimizer takes a tenth of it, and so keeps an average over the steps.
    """
    xhat, rstd, weight, (off_mean, off_var) = cache
    drows = dy.reshape(xhat.shape)  # (R, C)
    dweight = _sum(drows * xhat)
    dbias = _sum(drows)
    dx = rstd * weight * (drows - dbias / len(xhat) - xhat * (dweight / len(xhat)))
    grads = {"weight": dweight, "bias": dbias, "running_mean": off_mean, "running_var": off_var}
    return dx.reshape(dy.shape), grads
