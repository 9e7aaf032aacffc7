"""Data parallelism: split the batch, same function on each piece, add up a tree.

The pieces' size and the order of the sum depend on the model and the batch alone, never on who
computes which piece, so any number of workers and machines gives the same bits.
"""

from itertools import accumulate
from math import ceil, prod

import numpy as np

from ..errors import UserError

PIECE_ROWS = 1024  # tokens in a piece: large matrix products, and a layer that stays in the cache


def cut(n, rows_per_image):
    """n images as pieces [(start, stop)] of nearly equal size, of at most PIECE_ROWS tokens.

    A multiple of four pieces, or of two, so that threads have equal shares, as long as the pieces
    do not fall below half of PIECE_ROWS for it. Raises UserError where there is no image.
    """
    if n < 1:
        raise UserError("a batch needs at least one image")
    most = max(1, PIECE_ROWS // rows_per_image)
    count = ceil(n / most)
    for multiple in (4, 2):
        rounded = ceil(count / multiple) * multiple
        if n >= rounded * max(1, most // 2):
            count = rounded
            break
    return [(n * i // count, n * (i + 1) // count) for i in range(count)]


class Tree:
    """The sum of a batch's pieces: the same bits in whatever order and place they are added.

    A piece is a leaf, of height 0. Two neighbours that are there are added, left + right, and
    stand one higher at half their index. add(left, right) adds into left.
    """

    def __init__(self, add):
        self.nodes, self._add = {}, add  # {(height, index): sum}

    def put(self, height, index, x):
        """Takes a sum, and adds what has become complete."""
        while (other := self.nodes.pop((height, index ^ 1), None)) is not None:
            left, right = (other, x) if index & 1 else (x, other)
            self._add(left, right)
            height, index, x = height + 1, index >> 1, left
        self.nodes[height, index] = x

    def ordered(self):
        """The nodes from left to right."""
        return dict(sorted(self.nodes.items(), key=lambda node: node[0][1] << node[0][0]))

    def root(self):
        """The whole sum, once all pieces are there: what has no neighbour is added from the left.
        It stands where the first piece stood."""
        total, *rest = self.ordered().values()
        self.nodes.clear()
        for x in rest:
            self._add(total, x)
        return total


class Layout:
    """How arrays of these shapes lie in one vector: in their order, each at the begin of a line of
    the cache. size: the vector's length."""

    LINE = 16  # numbers

    def __init__(self, shapes):
        self._shapes = shapes
        spaces = [ceil(prod(shape) / self.LINE) * self.LINE for shape in shapes.values()]
        *self._begins, self.size = accumulate(spaces, initial=0)

    def views(self, vector):
        """{name: array} of what lies in a vector."""
        named = zip(self._begins, self._shapes.items(), strict=True)
        return {
            name: vector[begin : begin + prod(shape)].reshape(shape)
            for begin, (name, shape) in named
        }

    def packed(self, arrays, xp=np):
        """A vector with copies of some or all of these arrays, and zeros."""
        dtype = next(iter(arrays.values())).dtype
        vector = xp.zeros(self.size, dtype)
        views = self.views(vector)
        for name, array in arrays.items():
            views[name][...] = array
        return vector
