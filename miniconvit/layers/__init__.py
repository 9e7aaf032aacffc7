"""The lesson: every layer as a pair of pure functions, `x_forward` followed by `x_backward`.

    y, cache = x_forward(x, ...)
    dx, d... = x_backward(dy, cache)

Read the files in this order, and `model.py` after them:

- `linear`: a product and a sum, of which most gradients are made
- `softmax`: shares of one
- `layernorm`: statistics that the gradient goes through, too
- `gelu`, `mlp`: each token by itself
- `loss`: cross-entropy, where the backward pass begins
- `patch_embed`: an image becomes tokens
- `attention`: heads, content attention, plain self-attention
- `position`: where a patch is, as attention, dense or by rows and columns
- `gpsa`: content and position, mixed by a gate, the heart of ConViT
- `psa`: the same without gates, for comparison
- `drop_path`: a branch left out for some images
- `block`: attention and MLP on residual branches; names, for parts of a dict
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
