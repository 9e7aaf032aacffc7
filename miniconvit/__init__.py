"""miniconvit: ConViT with hand-written gradients, on NumPy and CuPy."""

from . import layers
from .checkpoints.checkpoint import load_checkpoint, save_checkpoint
from .checkpoints.weights import open_weights
from .config import VARIANTS, ConViTConfig
from .errors import UserError
from .gradcheck import check_gradients
from .layers import cross_entropy_backward, cross_entropy_forward
from .model import convit_backward, convit_forward, init_params, param_shapes
from .optim import AdamW, clip_grad_norm, warmup_cosine

__version__ = "0.1.0"

__all__ = [
    "VARIANTS",
    "AdamW",
    "ConViTConfig",
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
