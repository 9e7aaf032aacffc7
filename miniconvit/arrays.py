"""NumPy or CuPy: an array's module, what that lacks, counter-based chance, to and from a device."""

import sys
from importlib import import_module

import numpy as np

from .errors import UserError

Array = np.ndarray  # or cupy.ndarray
Params = dict[str, Array]
"""Parameters or gradients under the official names."""

DROP_PATH, DATA_ORDER, AUGMENTATION, RANDAUGMENT, ERASING, MIXING = range(1, 7)
RANDOM_CROP, HOLD_OUT, HIDING, LATENTS, DIFFAUGMENT = 8, 9, 10, 11, 12
"""The first counter after the seed says what is drawn, so that no two uses share random bits."""


def array_module(x):
    """numpy or cupy: the module that the array x belongs to."""
    return sys.modules[type(x).__module__.partition(".")[0]]


def erf(x):
    """The error function, elementwise, in the dtype of x."""
    name = array_module(x).__name__
    library = "scipy" if name == "numpy" else f"{name}x.scipy"  # loaded when it is needed
    return import_module(f"{library}.special").erf(x)


def _mix(bits):
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection that scrambles 64 bits."""
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    return bits ^ (bits >> 31)


def random_bits(seed, *counters, xp=np):
    """64 random bits for each combination of counters: a pure function of (seed, *counters).

    counters: non-negative integers or integer arrays, broadcast against each other. The same
    numbers come out for any array module, batch, thread and order of calls. Returns uint64.
    """
    bits = xp.full((1,), seed, dtype=xp.uint64)  # of one axis: overflow wraps without a warning
    for counter in counters:
        if isinstance(counter, int):
            counter = xp.full((1,), counter, dtype=xp.uint64)  # filled there: nothing is sent
        counter = xp.atleast_1d(xp.asarray(counter)).astype(xp.uint64)
        bits = _mix((bits ^ _mix(counter + 1)) + 0x9E3779B97F4A7C15)
    return bits


def uniform(seed, *counters, xp=np):
    """random_bits as float32 in [0, 1): the upper 24 bits, exactly representable."""
    return (random_bits(seed, *counters, xp=xp) >> 40).astype(xp.float32) * 2.0**-24


def normal(seed, *counters, xp=np):
    """About N(0, 1), float32: the sum of the eight bytes of random_bits, shifted and scaled.

    Integers and one product: the same on every machine. The distribution function is off by at
    most 0.004, and nothing lies beyond 4.9 standard deviations.
    """
    bits = random_bits(seed, *counters, xp=xp)
    pairs = (bits & 0x00FF00FF00FF00FF) + ((bits >> 8) & 0x00FF00FF00FF00FF)  # 4 sums of 2 bytes
    total = (pairs * 0x0001000100010001) >> 48  # their sum, in the upper 16 bits
    return (total.astype(xp.float32) - 1020.0) * (8 * (256**2 - 1) / 12) ** -0.5


def to_device(tree, device):
    """The arrays of nested dicts, tuples and lists on another device; anything else stays as it is.

    device: an array module, "cpu" or "cuda". Arrays that are there already are not copied. Raises
    UserError for another name and where CuPy cannot be imported.
    """
    xp = _module_named(device) if isinstance(device, str) else device
    return _map(xp.asarray, tree)


def _module_named(device):
    if device not in ("cpu", "cuda"):
        raise UserError(f"unknown device {device!r}: choose cpu or cuda")
    try:
        return np if device == "cpu" else import_module("cupy")
    except ImportError as error:
        raise UserError(
            f"CuPy cannot be imported ({error}): `miniconvit doctor` says what is missing"
        ) from error


def to_cpu(tree):
    """The arrays of nested dicts, tuples and lists as NumPy arrays. Waits for the device."""
    return _map(lambda x: x.get() if hasattr(x, "get") else x, tree)


def _map(function, tree):
    if isinstance(tree, dict):
        return {key: _map(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(_map(function, value) for value in tree)
    return function(tree) if hasattr(tree, "dtype") else tree
