"""The arithmetic of a block in float32: products by NumPy's library, the rest by `passes.py`."""

import numpy as np

from .compiled import cached, empty

with cached("passes"):
    from . import passes

TILE = 2**17  # elements: a tile of maps, 512 KB, stays in the L2 cache


class Float32:
    """What the blocks compute with. Rows are tokens: x (R, D)."""

    has_reference = True  # the lesson's layers compute in the arrays' precision
    has_psa = True

    def norm(self, x, weight, bias, eps=1e-6):
        """y = layernorm(x), and what its backward needs beside x."""
        y, statistics = empty(x.shape), empty((len(x), 2))
        passes.norm_forward(x, weight, bias, np.float32(eps), y, statistics)
        return y, statistics

    def norm_backward(self, dy, x, statistics, weight, dresidual):
        """dx, to which dresidual is added, dweight and dbias."""
        dx, dweight, dbias = empty(x.shape), np.empty_like(weight), np.empty_like(weight)
        passes.norm_backward(dy, x, statistics, weight, dresidual, dx, dweight, dbias)
        return dx, dweight, dbias

    def linear(self, x, weights, biases):
        """y = x W^T + b of layers side by side: (R, the sum of their widths)."""
        weight = _joined(weights)
        y = np.matmul(x, weight.T, out=empty((len(x), len(weight))))
        if biases[0] is not None:
            passes.add_bias(y, _joined(biases))
        return y

    def branch(self, x, weight, bias, factor, residual):
        """y = residual + factor * (x W^T + b), with one factor for each row."""
        y = np.matmul(x, weight.T, out=empty((len(x), len(weight))))
        passes.add_branch(y, bias, factor, residual)
        return y

    def gelu(self, x, weight, bias, keep):
        """gelu(x W^T + b), and its derivative or, where nothing is kept, None."""
        return gelu(np.matmul(x, weight.T, out=empty((len(x), len(weight)))), keep, bias)

    def scaled(self, dy, factor):
        """factor * dy as the product's operand, and its sums over the rows."""
        scaled, sums = empty(dy.shape), np.empty(dy.shape[1], dy.dtype)
        passes.scale(dy, factor, scaled, sums)
        return scaled, sums

    def back(self, dy, weights):
        """dx = dy W, of layers side by side."""
        weight = _joined(weights)
        return np.matmul(dy, weight, out=empty((len(dy), weight.shape[1])))

    back_operand = back  # the same as an operand

    def back_gelu(self, dy, weight, slope):
        """dhidden = slope * (dy W), and its sums over the rows."""
        dhidden = self.back(dy, [weight])
        sums = np.empty(dhidden.shape[1], dhidden.dtype)
        passes.gelu_backward(dhidden, slope, sums)
        return dhidden, sums

    def outer(self, dy, x):
        """dW = dy^T x."""
        return dy.T @ x

    def sums(self, dy):
        """The sums over the rows."""
        sums = np.empty(dy.shape[1], dy.dtype)
        passes.sum_rows(dy, sums)
        return sums

    def first(self, x, B):
        """Each of the B images' first row: a copy."""
        return np.ascontiguousarray(x[:: len(x) // B])

    def like(self, x):
        """An empty operand of the same shape."""
        return empty(x.shape)

    def split(self, x, count):
        """So many operands of equal width, which lie side by side in x."""
        return np.split(x, count, axis=1)

    def attend(self, q, k, v, shape, keep=None, gP=None, scores=None):
        """y = A v with A = keep C + gP and C = softmax(q k^T / sqrt d), or A = C.

        shape (B, H); q (B * queries, D), k and v (B * keys, D); keep (H,); gP (H, queries, keys).
        scores (H, queries, keys) are added within the softmax, where they are given.
        Returns y like q and the maps C (B, H, queries, keys).
        """
        y = empty(q.shape)
        q, k, v, y_heads = (_heads(rows, *shape) for rows in (q, k, v, y))  # (B, H, N, d) each
        C = empty((*q.shape[:3], k.shape[2]))
        tiles = _tiles(C)
        buffer = empty(C[tiles[0]].shape)
        if scores is not None:
            scores = scores / _scale(q)
        for tile in tiles:
            np.matmul(q[tile], k[tile].swapaxes(-1, -2), out=C[tile])
            if scores is not None:
                C[tile] += scores[tile[1]]
            passes.softmax(C[tile].reshape(-1, C.shape[-1]), _scale(q))
            A = _mixed(C, keep, gP, tile, buffer)
            np.matmul(A, v[tile], out=y_heads[tile])
        return y, C

    def attend_backward(self, dy, q, k, v, C, keep, gP, dq, dk, dv, dscores=None):
        """dA = dy v^T;  dS = keep C (dA - rho) / sqrt d;  dq = dS k;  dk = dS^T q;  dv = A^T dy.

        rho is the sum over the keys of C dA. Writes into dq, dk and dv, and adds the gradient of
        attend's scores to dscores; returns dA summed over the images (H, queries, keys) and rho
        summed over images and queries (H,).
        """
        B, H, queries, keys = C.shape
        heads = (_heads(rows, B, H) for rows in (dy, q, k, v, dq, dk, dv))
        dy, q, k, v, dq, dk, dv = heads
        dA_sum, rho = np.zeros((H, queries, keys), C.dtype), empty((B, H, queries))
        factors = np.ones(H, C.dtype) if keep is None else keep
        tiles = _tiles(C)
        buffers = [empty(C[tiles[0]].shape) for _ in range(2)]
        for tile in tiles:
            heads, dS = tile[1], _like(C[tile], buffers[0])
            np.matmul(dy[tile], v[tile].swapaxes(-1, -2), out=dS)
            A = _mixed(C, keep, gP, tile, buffers[1])
            np.matmul(A.swapaxes(-1, -2), dy[tile], out=dv[tile])
            passes.softmax_backward(
                dS, C[tile], factors[heads], _scale(q), dA_sum[heads], rho[tile]
            )
            np.matmul(dS, k[tile], out=dq[tile])
            np.matmul(dS.swapaxes(-1, -2), q[tile], out=dk[tile])
            if dscores is not None:
                dscores[heads] += dS.sum(axis=0) / _scale(q)
        return dA_sum, rho.sum(axis=(0, 2), dtype=np.float64)


def gelu(x, keep, bias=None):
    """gelu(x + bias) of x (R, D), and its derivative or None. One of them is written into x."""
    if bias is None:
        bias = np.zeros(x.shape[1], np.float32)
    if not keep:
        passes.gelu_alone(x, bias)
        return x, None
    active = empty(x.shape)
    passes.gelu(x, bias, active)
    return active, x


def _joined(arrays):
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _heads(rows, B, H):
    """rows (B * N, D) as (B, H, N, d): a view."""
    R, D = rows.shape
    step, size = rows.strides
    shape, strides = (B, H, R // B, D // H), (R // B * step, D // H * size, step, size)
    return np.lib.stride_tricks.as_strided(rows, shape, strides)


def _scale(q):
    return np.float32(q.shape[-1] ** -0.5)


def _tiles(C):
    """Slices of the images and of the heads: as many maps at a time, of C (B, H, queries, keys), as
    fill a tile."""
    B, H, queries, keys = C.shape
    images = max(1, TILE // (H * queries * keys))
    heads = min(H, max(1, TILE // (queries * keys)))
    starts = ((image, head) for image in range(0, B, images) for head in range(0, H, heads))
    return [(slice(i, i + images), slice(h, h + heads)) for i, h in starts]


def _like(maps, buffer):
    """A part of the buffer of the maps' shape: a last tile may be smaller."""
    return buffer[: maps.shape[0], : maps.shape[1]]


def _mixed(C, keep, gP, tile, buffer):
    """A tile of A."""
    if keep is None:
        return C[tile]
    A = _like(C[tile], buffer)
    passes.mix(C[tile], keep[tile[1]], gP[tile[1]], A)
    return A
