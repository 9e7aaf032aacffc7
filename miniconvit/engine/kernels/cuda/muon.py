"""Muon for tensors in flat buffers: matrices of one shape go through each product together."""

from math import sqrt

import numpy as np

from ....muon import LENGTH, NEWTON_SCHULZ, ROUNDS
from .launch import WARPS


def groups_of(kernels, shapes, starts, names):
    """A Group for each shape of matrix among those of these names.

    shapes, starts: name to shape, and to where the tensor begins in a buffer.
    """
    found = {}
    for name in names:
        sides = rows, cols = shapes[name][:2]
        found.setdefault((min(sides), max(sides)), []).append((starts[name], rows > cols))
    return [Group(kernels, *sides, matrices) for sides, matrices in found.items()]


class Group:
    """Matrices with the same two sides, and memory for their iteration.

    matrices: (start, whether it is taller than wide) of each.
    """

    def __init__(self, kernels, least, most, matrices):
        xp, count = kernels.xp, len(matrices)
        self.kernels, self.count = kernels, count
        starts, turned = zip(*matrices, strict=True)
        self.starts = xp.asarray(np.array(starts, np.int64))
        self.turned = xp.asarray(np.array(turned, np.uint8))
        self.x, self.next = (kernels.empty(count, least, most) for _ in range(2))
        self.gram, self.square = (kernels.empty(count, least, least) for _ in range(2))

    def update(self, optimizer, params, grads, exp_avg, rates):
        """As Muon.step for these matrices in the buffers, by the rates on the device."""
        k, (least, most), places = self.kernels, self.x.shape[1:], (self.starts, self.turned)
        shared = WARPS * self.x.dtype.itemsize
        k.launch("muon_begin", self.count, grads, exp_avg, *places, self.x, least, most,
                 optimizer.momentum, shared=shared)  # fmt: skip
        for _ in range(ROUNDS):
            k.product(self.x, self.x.swapaxes(1, 2), out=self.gram)
            k.product(self.gram, self.gram, out=self.square)
            k.flat("muon_polynomial", self.gram.size, self.gram, self.square, self.gram.size, least,
                   *NEWTON_SCHULZ)  # fmt: skip
            k.product(self.square, self.x, out=self.next)
            self.x, self.next = self.next, self.x
        k.flat("muon_end", self.x.size, params, self.x, *places, rates, self.x.size, least, most,
               optimizer.weight_decay, LENGTH * sqrt(most))  # fmt: skip
