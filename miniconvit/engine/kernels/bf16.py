"""The arithmetic of a block with bf16 products on AMX tiles, for processors that have them.

What goes into a product is rounded to bf16. Sums, softmax, norms, GELU, residual sums, parameters
and gradients are float32.
"""

from typing import NamedTuple

import numpy as np

from .compiled import cached, empty
from .float32 import Float32

with cached("maps", "products"):
    from . import maps, products

BLOCK = products.BLOCK


class Rows(NamedTuple):
    """bf16 numbers (count, width) that begin at a column of a buffer, as uint16.

    The buffer has a block of rows more and at least a block of columns. There and between width and
    the buffer's next part lie zeros or other finite numbers.
    """

    buffer: np.ndarray
    count: int
    begin: int
    width: int


class Bf16:
    """What the blocks compute with, as Float32; operands are Rows.

    It keeps packed weights by their place in memory, and so serves one state of the parameters.
    """

    has_reference = has_psa = False

    def __init__(self):
        self._packed = {}

    norm_backward = Float32.norm_backward

    def norm(self, x, weight, bias, eps=1e-6):
        """As Float32.norm; y is an operand."""
        y, statistics = _rows(*x.shape), empty((len(x), 2))
        products.norm_rows(x, weight, bias, np.float32(eps), y.buffer, statistics)
        return y, statistics

    def linear(self, x, weights, biases):
        """As Float32.linear, an operand."""
        pairs, width = self._forward(weights)
        bias = np.zeros(width, np.float32) if biases[0] is None else np.concatenate(biases)
        y = _rows(x.count, width)
        products.product_rows(
            x.buffer, pairs, *_plan(x.count, x.width, width), bias, x.count, y.buffer
        )
        return y

    def branch(self, x, weight, bias, factor, residual):
        """As Float32.branch."""
        pairs, width = self._forward([weight])
        y = empty(residual.shape)
        products.product_branch(
            x.buffer, pairs, *_plan(x.count, x.width, width), bias, factor, residual, y
        )
        return y

    def gelu(self, x, weight, bias, keep):
        """As Float32.gelu, two operands."""
        pairs, width = self._forward([weight])
        active = _rows(x.count, width)
        slope = _rows(x.count, width) if keep else active
        plan = _plan(x.count, x.width, width)
        products.product_gelu(
            x.buffer, pairs, *plan, bias, x.count, keep, active.buffer, slope.buffer
        )
        return active, slope if keep else None

    def scaled(self, dy, factor):
        """As Float32.scaled."""
        scaled, sums = _rows(*dy.shape), np.empty(dy.shape[1], np.float32)
        products.scale_rows(dy, factor, scaled.buffer, sums)
        return scaled, sums

    def back(self, dy, weights):
        """As Float32.back."""
        pairs, width = self._backward(weights)
        dx = empty((dy.count, width))
        products.product(dy.buffer, pairs, *_plan(dy.count, dy.width, width), dx)
        return dx

    def back_operand(self, dy, weights):
        """The same, an operand."""
        pairs, width = self._backward(weights)
        dx, bias = _rows(dy.count, width), np.zeros(width, np.float32)
        products.product_rows(
            dy.buffer, pairs, *_plan(dy.count, dy.width, width), bias, dy.count, dx.buffer
        )
        return dx

    def back_gelu(self, dy, weight, slope):
        """As Float32.back_gelu."""
        pairs, width = self._backward([weight])
        dhidden, sums = _rows(dy.count, width), np.empty(width, np.float32)
        plan = _plan(dy.count, dy.width, width)
        products.product_slope(
            dy.buffer, pairs, *plan, slope.buffer, dy.count, dhidden.buffer, sums
        )
        return dhidden, sums

    def outer(self, dy, x):
        """As Float32.outer; of the two the thinner one is transposed."""
        out = empty((dy.width, x.width))
        thin, wide = (dy, x) if dy.width <= x.width else (x, dy)
        plan = _plan(thin.width, dy.count, wide.width)
        operands = _columns(thin), _pairs(wide), *plan
        if thin is dy:
            products.product(*operands, out)
        else:
            products.product_transposed(*operands, empty((BLOCK, BLOCK)), out)
        return out

    def sums(self, dy):
        """As Float32.sums."""
        sums = np.empty(dy.width, np.float32)
        products.sum_rows(dy.buffer, sums, dy.count)
        return sums

    def first(self, x, B):
        """As Float32.first."""
        first = _rows(B, x.width)
        first.buffer[:B] = x.buffer[: x.count : x.count // B]
        return first

    def like(self, x):
        """As Float32.like."""
        return _rows(x.count, x.width)

    def split(self, x, count):
        """As Float32.split."""
        width = x.width // count
        return [Rows(x.buffer, x.count, x.begin + i * width, width) for i in range(count)]

    def attend(self, q, k, v, shape, keep=None, gP=None):
        """As Float32.attend."""
        (B, H), d = shape, q.width // shape[1]
        queries, keys = q.count // B, k.count // B
        keep, gP = _gate(keep, gP, H, queries, keys)
        Q, K, W = _whole(queries), _whole(keys), _whole(d)
        y, C = _rows(q.count, q.width), empty((B, H, queries, keys), np.uint16)
        maps.maps_forward(
            q.buffer, q.begin, k.buffer, k.begin, v.buffer, v.begin, d, keep, gP,
            empty((W // 2, K), np.uint32), empty((Q, K)), _zeros((Q, K)),
            empty((K // 2, W), np.uint32), empty((Q, W)), C, y.buffer,
        )  # fmt: skip
        return y, C

    def attend_backward(self, dy, q, k, v, C, keep, gP, dq, dk, dv):
        """As Float32.attend_backward."""
        _, H, queries, keys = C.shape
        d = q.width // H
        keep, gP = _gate(keep, gP, H, queries, keys)
        Q, K, W = _whole(queries), _whole(keys), _whole(d)
        dA_sum, rho_sum = np.zeros((H, queries, keys), np.float32), np.zeros(H, np.float32)
        turned = empty((K, Q // 2), np.uint32)
        maps.maps_backward(
            dy.buffer, q.buffer, q.begin, k.buffer, k.begin, v.buffer, v.begin, d, keep, gP, C,
            empty((W // 2, K), np.uint32), empty((Q, K)), _zeros((2, Q, K)),
            empty((Q // 2, K), np.uint32), turned.view(np.uint16), turned,
            empty((max(Q, K) // 2, W), np.uint32), empty((max(Q, K), W)),
            dq.buffer, dk.buffer, dv.buffer, dA_sum, rho_sum,
        )  # fmt: skip
        return dA_sum, rho_sum

    def _forward(self, weights):
        """W^T of layers side by side, (D, the sum of their widths), as pairs, and that width."""
        return self._pack("forward", weights), sum(map(len, weights))

    def _backward(self, weights):
        """W of layers side by side, (the sum of their widths, D), as pairs, and D."""
        return self._pack("backward", weights), weights[0].shape[1]

    def _pack(self, way, weights):
        places = [(w.__array_interface__["data"][0], w.shape, w.strides) for w in weights]
        key = way, *places
        if key not in self._packed:
            weight = np.ascontiguousarray(np.concatenate(weights))
            rows, _ = self.scaled(weight, np.ones(len(weight), np.float32))
            packed = _pairs(rows) if way == "backward" else _pairs_of_columns(rows)
            self._packed[key] = packed, weights  # these, so that nothing else takes their places
        return self._packed[key][0]


def is_exact():
    """Whether products of whole numbers are NumPy's, for a shape with parts of blocks on all sides:
    the instructions are LLVM's own, which promises nothing about them."""
    a, dy, x = Bf16(), np.arange(37 * 45) % 17 - 8.0, np.arange(37 * 70) % 13 - 6.0
    dy, x = (x.astype(np.float32).reshape(37, -1) for x in (dy, x))
    dW = a.outer(*(a.scaled(each, np.ones(37, np.float32))[0] for each in (dy, x)))
    return bool((dW == dy.T @ x).all())


def _whole(n):
    """n or a little more: whole blocks."""
    return -(-n // BLOCK) * BLOCK


def _plan(R, K, N):
    """What a product of (R, K) and (K, N) needs: steps along K, blocks, and room for one."""
    steps = _whole(K) // BLOCK
    return steps, products.places_of(R, N, steps), empty((BLOCK, BLOCK))


def _rows(count, width):
    """An operand to be written, with zeros around.

    A row's length in bytes is an odd multiple of 64 for most widths, so that rows do not fall into
    the same lines of the cache.
    """
    buffer = empty((count + BLOCK, _whole(width) + BLOCK), np.uint16)
    buffer[count:] = 0
    buffer[:, width:] = 0
    return Rows(buffer, count, 0, width)


def _pairs(rows):
    """Rows (K, N) as pairs."""
    pairs = empty((_whole(rows.count) // 2, _whole(rows.width) + BLOCK // 2), np.uint32)
    products.pair_rows(rows.buffer, rows.count, pairs)
    return pairs


def _transposed(words, rows, columns):
    out = empty((columns, rows + BLOCK // 2), np.uint32)
    products.transpose_pairs(words, rows, columns, out)
    return out


def _pairs_of_columns(rows):
    """The transpose of rows (N, K), (K, N), as pairs."""
    words = rows.buffer.view(np.uint32)
    return _transposed(words, _whole(rows.count), _whole(rows.width) // 2)


def _columns(rows):
    """The transpose of rows (K, N), (N, K), as rows."""
    words = _transposed(_pairs(rows), _whole(rows.count) // 2, _whole(rows.width))
    return words.view(np.uint16)


def _zeros(shape):
    zeros = empty(shape, np.uint16)
    zeros[...] = 0
    return zeros


def _gate(keep, gP, *shape):
    """keep and gP, or what they are without a gate."""
    if keep is None:
        return np.ones(shape[0], np.float32), np.zeros(shape, np.float32)
    return keep, gP
