"""The blocks where nothing is kept for a backward pass: the GELU's derivative is not computed."""

from functools import partial

from . import block
from .tokenwise import gelu_inference, mlp_inference

block_forward = partial(block.block_forward, mlp=mlp_inference)
last_block_forward = partial(block.last_block_forward, mlp=mlp_inference)
layernorm_forward = block.layernorm_forward
gelu_pair = gelu_inference, None
