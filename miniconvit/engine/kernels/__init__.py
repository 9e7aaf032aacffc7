"""Faster replacements of functions in `layers/`: same names, same signatures, same results up to
rounding. Deleting this folder leaves everything working, only slower."""

from types import SimpleNamespace

import numpy as np

from ...layers.ops import REFERENCE
from .attention import (
    gpsa_backward,
    gpsa_forward,
    last_block_backward,
    last_block_forward,
    mhsa_backward,
    mhsa_forward,
)
from .tokenwise import (
    block_backward,
    block_forward,
    gelu_backward,
    gelu_forward,
    layernorm_backward,
    layernorm_forward,
    mlp_backward,
    mlp_forward,
    mlp_inference,
)

CPU = SimpleNamespace(**vars(REFERENCE))
"""The reference with the kernels for the CPU in it. They serve float32 NumPy arrays; given anything
else, such as float64 or CuPy arrays, each function here is the reference."""


def _pair(forward, backward, reference_forward, reference_backward):
    """The two functions of one replacement, which fall back on the reference together.

    Their cache is (function, cache): it names the backward that understands it.
    """

    def pair_forward(x, *args, **kwargs):
        if isinstance(x, np.ndarray) and x.dtype == np.float32:
            y, cache = forward(x, *args, **kwargs)
            return y, (backward, cache)
        y, cache = reference_forward(x, *args, **kwargs)
        return y, (reference_backward, cache)

    def pair_backward(dy, cache):
        function, cache = cache
        return function(dy, cache)

    return pair_forward, pair_backward


for _name in [name for name in globals() if name.endswith("_forward")]:
    _names = _name, _name.replace("_forward", "_backward")
    _kernels = [globals()[name] for name in _names]
    _references = [getattr(REFERENCE, name) for name in _names]
    vars(CPU).update(zip(_names, _pair(*_kernels, *_references), strict=True))

INFERENCE = {"mlp_forward": _pair(mlp_inference, None, REFERENCE.mlp_forward, None)[0]}
"""What may take the place of functions in CPU where no backward pass follows."""
