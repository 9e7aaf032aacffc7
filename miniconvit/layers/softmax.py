"""Softmax over the last axis."""

from ..arrays import array_module


def softmax_forward(x):
    """y_i = exp(x_i) / sum_j exp(x_j);  the row's maximum is subtracted first, which changes
    nothing but keeps exp from overflowing. x (..., K)."""
    y = array_module(x).exp(x - x.max(axis=-1, keepdims=True))
    y /= y.sum(axis=-1, keepdims=True)
    return y, y


def softmax_backward(dy, cache):
    """dx_i = y_i * (dy_i - sum_j dy_j y_j): a constant added to a row of dy is lost."""
    y = cache
    return y * (dy - (dy * y).sum(axis=-1, keepdims=True))
