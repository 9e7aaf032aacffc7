"""The lesson: every layer as a pair of pure functions, `x_forward` followed by `x_backward`.

y, cache = x_forward(x, ...)        dx, d... = x_backward(dy, cache)
"""

from .attention import (
    attention_backward,
    attention_forward,
    merge_heads,
    mhsa_backward,
    mhsa_forward,
    split_heads,
)
from .block import block_backward, block_forward, last_block_backward, last_block_forward
from .drop_path import drop_path_backward, drop_path_forward
from .gelu import gelu_backward, gelu_forward
from .gpsa import (
    gate_backward,
    gate_forward,
    gpsa_backward,
    gpsa_dense_backward,
    gpsa_dense_forward,
    gpsa_forward,
)
from .layernorm import layernorm_backward, layernorm_forward
from .linear import linear_backward, linear_forward
from .loss import cross_entropy_backward, cross_entropy_forward
from .mlp import mlp_backward, mlp_forward
from .patch_embed import patch_embed_backward, patch_embed_forward
from .position import (
    position_attention_backward,
    position_attention_dense_backward,
    position_attention_dense_forward,
    position_attention_forward,
    position_values_backward,
    position_values_forward,
    relative_positions,
)
from .psa import psa_backward, psa_forward
from .softmax import softmax_backward, softmax_forward
