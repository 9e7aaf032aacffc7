"""miniconvit: ConViT with hand-written gradients, on NumPy and CuPy."""

import sys
from importlib import import_module

from .errors import UserError, missing, unusable

if sys.version_info < (3, 11):  # noqa: UP036
    raise unusable(f"miniconvit needs Python 3.11 or newer, and this is {sys.version.split()[0]}")
try:
    from . import layers
    from .config import VARIANTS, ConViTConfig
    from .gradcheck import check_gradients
    from .layers import cross_entropy_backward, cross_entropy_forward
    from .model import convit_backward, convit_forward, init_params, param_shapes
    from .muon import Muon
    from .optim import AdamW, clip_grad_norm, warmup_cosine
except ImportError as error:
    raise unusable(missing(error)) from error

__version__ = "0.1.0"

__all__ = [
    "VARIANTS",
    "AdamW",
    "ConViTConfig",
    "Muon",
    "UserError",
    "check_gradients",
    "clip_grad_norm",
    "convit_backward",
    "convit_forward",
    "cross_entropy_backward",
    "cross_entropy_forward",
    "init_params",
    "layers",
    "load_checkpoint",
    "open_weights",
    "param_shapes",
    "save_checkpoint",
    "warmup_cosine",
]

_ON_DEMAND = {
    "load_checkpoint": "checkpoints.checkpoint",
    "open_weights": "checkpoints.weights",
    "save_checkpoint": "checkpoints.checkpoint",
}
"""What is not the lesson, with the module that is imported when somebody asks for it."""


def __getattr__(name):
    if name not in _ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_ON_DEMAND[name]}", __name__), name)
