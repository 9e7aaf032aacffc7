"""A training's tensors in flat buffers: one kernel for all parameters in place of a dozen for each.

Every tensor begins at a multiple of CHUNK elements, so that a byte for each chunk says what happens
to it. What lies between tensors is 0 and stays so.
"""

from math import prod, sqrt

import numpy as np

from ....arguments import check_max_norm
from ....muon import Muon, is_hidden
from ....optim import NEVER_DECAYED, AdamW, is_running
from .launch import WARPS
from .muon import groups_of

CHUNK = 1024  # as in kernels.cu
TRAINED, DECAYED, RUNNING = 1, 2, 3
KNOWN = AdamW, Muon
"""The optimizers whose steps Buffers can make."""


class Buffers:
    """The gradients of tensors of `shapes`, name to shape, and once they are held also the
    parameters, AdamW's moments and an average, each in a buffer."""

    def __init__(self, kernels, shapes):
        self.kernels, self.shapes = kernels, shapes
        self._starts, self._size, self._kinds = {}, 0, {}
        for name, shape in shapes.items():
            self._starts[name] = self._size
            self._size += -(-prod(shape) // CHUNK) * CHUNK
        self._grads, self.grads = self._zeros()
        self.number = kernels.xp.zeros((1,), kernels.xp.int64)
        self._rates = kernels.empty(3)
        self._held, self._groups = {}, {}

    def _zeros(self):
        """(buffer, its tensors by name, which are views)."""
        buffer, views = self.kernels.xp.zeros((self._size,), self.kernels.dtype), {}
        for name, shape in self.shapes.items():
            start = self._starts[name]
            views[name] = buffer[start : start + prod(shape)].reshape(shape)
        return buffer, views

    def hold(self, params, optimizer, average=None, trained=None):
        """Gives these dictionaries new arrays of the same numbers, views of buffers. trained: the
        names that will be, by default all."""
        held = {"params": params, "exp_avg": optimizer.exp_avg, "exp_avg_sq": optimizer.exp_avg_sq}
        if average is not None:
            held["average"] = average
        for kind, tensors in held.items():
            buffer, views = self._zeros()
            for name, view in views.items():
                view[...] = tensors[name]
            tensors.update(views)
            self._held[kind] = buffer, tensors
        names = self.shapes if trained is None else trained
        self._kinds_of(names)
        self._parts_of(optimizer, names)

    def take(self, grads):
        """These gradients, copied to where the buffer has them."""
        for name, grad in grads.items():
            self.grads[name][...] = grad
        return {name: self.grads[name] for name in grads}

    def are_held(self, **dictionaries):
        """Whether these dictionaries' tensors are those in the buffers, of this `kind=tensors`."""
        return all(
            kind in self._held
            and all(self._held[kind][1].get(name) is value for name, value in tensors.items())
            for kind, tensors in dictionaries.items()
        )

    def _kinds_of(self, names):
        """A byte for each chunk: whether its tensor is among these names, decayed, or running."""
        key = tuple(names)
        if key not in self._kinds:
            kinds = np.zeros(self._size // CHUNK, np.uint8)
            for name in key:
                shape, first = self.shapes[name], self._starts[name] // CHUNK
                chunks = slice(first, first + -(-prod(shape) // CHUNK))
                is_decayed = len(shape) >= 2 and name not in NEVER_DECAYED
                kinds[chunks] = DECAYED if is_decayed else TRAINED
                if is_running(name):
                    kinds[chunks] = RUNNING
            self._kinds[key] = self.kernels.xp.asarray(kinds)
        return self._kinds[key]

    def _parts_of(self, optimizer, names):
        """(groups of matrices that Muon moves, the other names), of these names."""
        if type(optimizer) is not Muon:
            return [], names
        key = tuple(sorted(names))
        if key not in self._groups:
            matrices = [name for name in key if is_hidden(name, self.shapes[name])]
            others = [name for name in key if name not in matrices]
            groups = groups_of(self.kernels, self.shapes, self._starts, matrices)
            self._kinds_of(others)
            self._groups[key] = groups, others
        return self._groups[key]

    def note(self, step):
        """Tells the device the number of a step, from which chance is drawn."""
        self.kernels.launch("note_number", 1, self.number, step, warps=1)

    def clip(self, names, max_norm):
        """As clip_grad_norm of the gradients of these names; the norm stays on the device."""
        check_max_norm(max_norm)
        k, kinds, norm = self.kernels, self._kinds_of(names), self.kernels.empty()
        sums = k.empty(k.blocks(self._size))
        shared = WARPS * sums.dtype.itemsize
        k.flat("squares", self._size, self._grads, kinds, sums, self._size, shared=shared)
        k.flat("clip", self._size, self._grads, kinds, sums, norm, self._size, len(sums), max_norm)
        return norm

    def collect(self, loss, correct, norm):
        """(3,): three scalars."""
        numbers = self.kernels.empty(3)
        self.kernels.launch("collect", 1, loss, correct, norm, numbers, warps=1)
        return numbers

    def state(self):
        """Copies of all that an update changes."""
        return [buffer.copy() for buffer, _ in self._held.values()]

    def restore(self, state):
        """Puts such copies back."""
        for (buffer, _), saved in zip(self._held.values(), state, strict=True):
            buffer[...] = saved

    def note_rates(self, optimizer, lr):
        """Counts a step of the optimizer, and tells the device its rates."""
        optimizer.step_count += 1
        beta1, beta2 = optimizer.betas
        correction1, correction2 = (1.0 - beta**optimizer.step_count for beta in (beta1, beta2))
        rates = float(lr), lr / correction1, 1.0 / sqrt(correction2)
        self.kernels.launch("note_rates", 1, self._rates, *rates, warps=1)

    def update(self, optimizer, names):
        """As optimizer.step for the held parameters of these names, by the rates on the device."""
        held = [self._held[kind][0] for kind in ("params", "exp_avg", "exp_avg_sq")]
        groups, others = self._parts_of(optimizer, names)
        for group in groups:
            group.update(optimizer, held[0], self._grads, held[1], self._rates)
        self.kernels.flat("adamw", self._size, held[0], self._grads, *held[1:],
                          self._kinds_of(others), self._rates, self._size, optimizer.weight_decay,
                          *optimizer.betas, optimizer.eps)  # fmt: skip

    def average(self, decay):
        """As update_average of the held average."""
        average, params = self._held["average"][0], self._held["params"][0]
        self.kernels.flat("average", self._size, average, params, self._size, decay)
