"""Linear layer: one matrix product over the last axis."""


def linear_forward(x, weight, bias=None):
    """y = x W^T + b.

    x (..., in), weight (out, in), bias (out,) or None. Returns y (..., out).
    All leading axes are folded into rows, so that it is one large product.
    """
    rows = x.reshape(-1, x.shape[-1])  # (R, in)
    y = rows @ weight.T  # (R, out)
    if bias is not None:
        y += bias
    return y.reshape(*x.shape[:-1], weight.shape[0]), (x, weight, bias is not None)


def linear_backward(dy, cache, need_dx=True):
    """dx = dy W;  dW = dy^T x;  db = sum of dy over the rows, or None without a bias.

    dy (..., out). Returns dx (..., in), or None with need_dx=False, dweight (out, in) and
    dbias (out,).
    """
    x, weight, has_bias = cache
    rows = x.reshape(-1, x.shape[-1])  # (R, in)
    drows = dy.reshape(-1, dy.shape[-1])  # (R, out)
    dx = (drows @ weight).reshape(x.shape) if need_dx else None
    dweight = drows.T @ rows  # (out, in)
    dbias = drows.sum(axis=0) if has_bias else None
    return dx, dweight, dbias
