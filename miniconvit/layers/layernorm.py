"""Layer normalisation over the last axis (Ba, Kiros, Hinton 2016)."""

from ..arrays import array_module


def layernorm_forward(x, weight, bias, eps=1e-6):
    """y = weight * xhat + bias,  xhat = (x - mean) * rstd,  rstd = 1 / sqrt(variance + eps).

    x (..., D), weight and bias (D,). Mean and variance (over D, not D - 1) per row.
    Keeps xhat and rstd: everything else in backward follows from them.
    """
    xp = array_module(x)
    centred = x - x.mean(axis=-1, keepdims=True)
    rstd = 1.0 / xp.sqrt((centred * centred).mean(axis=-1, keepdims=True) + eps)  # (..., 1)
    xhat = centred * rstd
    return xhat * weight + bias, (xhat, rstd, weight)


def layernorm_backward(dy, cache):
    """dx = rstd * (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat))  with  dxhat = weight * dy.

    The first mean comes through the mean of x, the second through its variance.
    Returns dx (..., D), dweight (D,) = sum of dy * xhat, dbias (D,) = sum of dy, over all rows.
    """
    xhat, rstd, weight = cache
    rows = tuple(range(dy.ndim - 1))
    dweight = (dy * xhat).sum(axis=rows)
    dbias = dy.sum(axis=rows)
    dxhat = dy * weight
    through_mean = dxhat.mean(axis=-1, keepdims=True)
    through_variance = (dxhat * xhat).mean(axis=-1, keepdims=True)
    dx = rstd * (dxhat - through_mean - xhat * through_variance)
    return dx, dweight, dbias
