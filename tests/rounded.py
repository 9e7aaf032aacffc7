"""Rounding to bf16 in NumPy, and the lesson in float64 with operands of its products rounded so.

What the second one loses is what bf16 costs, whatever else is exact: the measure for kernels.
"""

import numpy as np

from miniconvit import layers


def to_bf16(x):
    """The bf16 next to each number, of two the even one, as uint16. x: numbers of float32."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(halves):
    """The numbers of bf16's bits, in float64."""
    return (halves.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def rounded(x):
    """The nearest numbers of bf16, in float64."""
    return from_bf16(to_bf16(x))


class Rounded(np.ndarray):
    """Arrays of float64 whose matrix products round both operands."""

    __module__ = "numpy"  # where the lesson looks for an array's module

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
        inputs = [np.asarray(x) if isinstance(x, np.ndarray) else x for x in inputs]
        if ufunc is np.matmul:
            inputs = [rounded(x) for x in inputs]
        if out is not None:
            getattr(ufunc, method)(*inputs, out=tuple(map(np.asarray, out)), **options)
            return out[0]
        found = getattr(ufunc, method)(*inputs, **options)
        return found.view(Rounded) if isinstance(found, np.ndarray) else found


def _viewed(value):
    if isinstance(value, dict):
        return {name: _viewed(x) for name, x in value.items()}
    is_number = isinstance(value, np.ndarray) and value.dtype == np.float64
    return value.view(Rounded) if is_number else value


class RoundedLesson:
    """What convit_forward takes as `blocks`: the lesson's, with products of rounded operands."""

    def __getattr__(self, name):
        def call(*arguments, **options):
            return getattr(layers, name)(*map(_viewed, arguments), **_viewed(options))

        return call
