"""Position attention: where a head looks, whatever the image shows.

The score of key k for query q is linear in (dx, dy, dx^2 + dy^2), the key's offset from the query
in patches, and the keys fill a rectangle. So the softmax over all N keys is a product of a softmax
over the rows and one over the columns: P = Py (x) Px, a Kronecker product of two small matrices.
"""

from ..arrays import array_module
from .softmax import softmax_backward, softmax_forward


def relative_positions(grid, like):
    """R[q, k] = (dx, dy, dx^2 + dy^2), key minus query, in patches (columns first).

    grid = (rows, cols). Returns (N, N, 3) in the array module and dtype of `like`.
    """
    xp = array_module(like)
    row, col = divmod(xp.arange(grid[0] * grid[1]), grid[1])  # (N,) each
    dx = col[None, :] - col[:, None]  # (N, N)
    dy = row[None, :] - row[:, None]
    return xp.stack([dx, dy, dx * dx + dy * dy], axis=-1).astype(like.dtype)


def position_attention_dense_forward(weight, bias, grid):
    """P[h, q, k] = softmax over k of (R[q, k] . weight[h] + bias[h]): the definition.

    weight (H, 3), bias (H,). Returns P (H, N, N). The bias moves a whole row alike, so the softmax
    ignores it.
    """
    offsets = relative_positions(grid, weight)  # (N, N, 3)
    scores = (offsets @ weight.T + bias).transpose(2, 0, 1)  # (H, N, N)
    P, cache = softmax_forward(scores)
    return P, (cache, offsets)


def position_attention_dense_backward(dP, cache):
    """dweight[h] = sum over q, k of dscores[h, q, k] R[q, k];  dbias = 0, exactly: every row of a
    softmax's gradient sums to zero. dP (H, N, N)."""
    cache_softmax, offsets = cache
    dscores = softmax_backward(dP, cache_softmax)
    H = dP.shape[0]
    dweight = dscores.reshape(H, -1) @ offsets.reshape(-1, 3)  # (H, 3)
    return dweight, array_module(dP).zeros_like(dweight[:, 0])


def _offsets(size, like):
    """b - a for a, b in 0..size-1: (size, size), in the module and dtype of `like`."""
    xp = array_module(like)
    index = xp.arange(size)
    return (index[None, :] - index[:, None]).astype(like.dtype)


def position_attention_forward(weight, bias, grid):
    """The two factors of P:  py[h, a, b] = softmax over b of (w1 (b - a) + w2 (b - a)^2),
    px likewise with w0, where (w0, w1, w2) = weight[h].

    weight (H, 3), bias (H,), which has no effect. Returns (py (H, rows, rows), px (H, cols, cols)).
    """
    rows, cols = (_offsets(size, weight) for size in grid)
    w0, w1, w2 = (weight[:, c, None, None] for c in range(3))  # (H, 1, 1) each
    py, cache_y = softmax_forward(w1 * rows + w2 * rows * rows)
    px, cache_x = softmax_forward(w0 * cols + w2 * cols * cols)
    return (py, px), (cache_y, cache_x, rows, cols)


def position_attention_backward(dfactors, cache):
    """dw0 = sum dzx dx,  dw1 = sum dzy dy,  dw2 = sum dzx dx^2 + sum dzy dy^2,  dbias = 0,
    with dz the gradients of the two softmaxes' scores. dfactors = (dpy, dpx)."""
    cache_y, cache_x, rows, cols = cache
    dpy, dpx = dfactors
    dzy = softmax_backward(dpy, cache_y)
    dzx = softmax_backward(dpx, cache_x)
    dw0 = (dzx * cols).sum(axis=(1, 2))
    dw1 = (dzy * rows).sum(axis=(1, 2))
    dw2 = (dzx * cols * cols).sum(axis=(1, 2)) + (dzy * rows * rows).sum(axis=(1, 2))
    xp = array_module(dw0)
    return xp.stack([dw0, dw1, dw2], axis=1), xp.zeros_like(dw0)


def position_values_forward(v, py, px):
    """y = (py (x) px) v, first along the rows, then along the columns: P is never formed.

    v (B, H, N, d), py (H, rows, rows), px (H, cols, cols). Returns (B, H, N, d).
    """
    B, H, N, d = v.shape
    rows, cols = py.shape[1], px.shape[1]
    v = v.reshape(B, H, rows, cols * d)
    u = py @ v  # (B, H, rows, cols * d)
    y = px[:, None] @ u.reshape(B, H, rows, cols, d)  # (B, H, rows, cols, d)
    return y.reshape(B, H, N, d), (v, u, py, px)


def position_values_backward(dy, cache):
    """dpx = dy u^T and dpy = du v^T, summed over the images;  du = px^T dy,  dv = py^T du.

    dy (B, H, N, d). Returns dv (B, H, N, d), dpy (H, rows, rows), dpx (H, cols, cols).
    """
    v, u, py, px = cache
    B, H, rows, _ = v.shape
    columns = (B, H, rows, px.shape[1], -1)
    dcolumns = dy.reshape(columns)
    dpx = (dcolumns @ u.reshape(columns).swapaxes(-1, -2)).sum(axis=(0, 2))
    du = (px.swapaxes(-1, -2)[:, None] @ dcolumns).reshape(v.shape)
    dpy = (du @ v.swapaxes(-1, -2)).sum(axis=0)
    dv = py.swapaxes(-1, -2) @ du
    return dv.reshape(dy.shape), dpy, dpx
