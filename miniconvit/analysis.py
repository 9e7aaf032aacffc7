"""What a trained ConViT attends to: maps, gates, and how far each head looks."""

from types import SimpleNamespace

import numpy as np

from .layers.gpsa import gpsa_dense_forward
from .layers.ops import REFERENCE
from .layers.position import relative_positions
from .model import convit_forward


def nonlocality(attention, grid):
    """Mean distance between a query and what it attends to, in patches (equation 8 of the paper).

    attention (..., M, M), rows summing to one, with M = N patches of grid = (rows, cols); or
    M = 1 + N, where the class token's row and column are dropped and the rest is rescaled to rows
    of sum one. Returns (...), averaged over the queries.
    """
    N = grid[0] * grid[1]
    if attention.shape[-1] == N + 1:
        attention = attention[..., 1:, 1:]
        attention = attention / attention.sum(axis=-1, keepdims=True)
    distance = np.sqrt(relative_positions(grid, attention)[..., 2])  # (N, N)
    return (attention * distance).sum(axis=(-1, -2)) / N


def attention_maps(images, params, config):
    """The attention of every block on its true input, the network run as it is.

    Returns a list with one namespace a block: mixture (B, H, M, M), what is applied to the values;
    and for GPSA its parts, content (B, H, N, N), position (H, N, N) and gate (H,), else None.
    """
    maps = []

    def record_gpsa(x, params, num_heads, grid, ops):
        out, cache = gpsa_dense_forward(x, params, num_heads, grid, ops)
        (*_, (content, position, gate), _), (*_, mixture), *_ = cache
        maps.append(SimpleNamespace(
            mixture=mixture, content=content, position=position, gate=gate[:, 0, 0]
        ))  # fmt: skip
        return out, cache

    def record_attention(q, k, v, ops):
        y, cache = REFERENCE.attention_forward(q, k, v, ops)
        maps.append(SimpleNamespace(mixture=cache[1], content=None, position=None, gate=None))
        return y, cache

    recording = vars(REFERENCE) | {
        "gpsa_forward": record_gpsa,
        "attention_forward": record_attention,
    }
    convit_forward(images, params, config, ops=SimpleNamespace(**recording))
    return maps
