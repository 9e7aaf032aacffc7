"""What a trained ConViT attends to: its maps, and how far each head looks."""

from types import SimpleNamespace

import numpy as np

from ..arrays import array_module
from ..layers.block import block_forward
from ..layers.gpsa import gate_forward
from ..layers.position import position_attention_dense_forward, relative_positions
from ..model import convit_forward

MAP_NUMBERS = 2**22  # in the maps of one block that are held at a time


def without_class_token(attention, grid):
    """Attention among the patches of grid = (rows, cols): (..., N, N).

    attention (..., M, M), rows summing to one, with M = N; or M = 1 + N, where the class token's
    row and column are dropped and the rest is rescaled to rows of sum one.
    """
    if attention.shape[-1] == grid[0] * grid[1] + 1:
        attention = attention[..., 1:, 1:]
        attention = attention / attention.sum(axis=-1, keepdims=True)
    return attention


def nonlocality(attention, grid):
    """Mean distance between a query and what it attends to, in patches (equation 8 of the paper).

    attention (..., M, M) as in without_class_token. Returns (...), averaged over the queries.
    """
    attention = without_class_token(attention, grid)
    distance = np.sqrt(relative_positions(grid, attention)[..., 2])  # (N, N)
    return (attention * distance).sum(axis=(-1, -2)) / (grid[0] * grid[1])


def visit_attention(images, params, config, visit):
    """Runs the network as it is and calls visit(maps) for each block's attention, in order.

    maps: a namespace with mixture (B, H, M, M), what is applied to the values; q and k
    (B, H, M, d), which its content comes from; and for GPSA its parts, content (B, H, N, N),
    position (H, N, N) and gate (H,), else None. Returns the logits (B, num_classes).
    """

    def record(x, block, num_heads, grid, *drop_path):
        y, cache = block_forward(x, block, num_heads, grid, *drop_path)
        visit(_maps_of_block(cache, block, grid))
        return y, None

    def record_last(*args):
        y, _ = record(*args)
        return y[:, 0], None

    blocks = SimpleNamespace(block_forward=record, last_block_forward=record_last)
    logits, _ = convit_forward(images, params, config, blocks=blocks, keep_caches=False)
    return logits


def _maps_of_block(cache, block, grid):
    """visit_attention's namespace from the cache of layers.block_forward and its parameters."""
    (_, attention, _), _, kind = cache
    content = position = gate = None
    if kind == "mhsa":
        _, (_, mixture, q, k, *_), *_ = attention
    elif kind == "psa":
        _, _, _, (q, k, _, mixture), *_ = attention
    else:
        (_, (_, content, q, k, *_), _, _, (_, _, g), _), _ = attention
        weight, bias = block["attn.pos_proj.weight"], block["attn.pos_proj.bias"]
        position, _ = position_attention_dense_forward(weight, bias, grid)
        mixture, _ = gate_forward(content, position, block["attn.gating_param"])
        gate = g[:, 0, 0]
    return SimpleNamespace(mixture=mixture, q=q, k=k, content=content, position=position, gate=gate)


def attention_maps(images, params, config):
    """The attention of every block on its true input: a list of visit_attention's namespaces."""
    maps = []
    visit_attention(images, params, config, maps.append)
    return maps


def measure_nonlocality(images, params, config):
    """How far the heads of each block look, as a mean over the images, which go through the network
    a few at a time: one dict a block, of "mixture" and for GPSA "content" and "position", (H,).

    For MHSA the class token is left out, see without_class_token. images as in convit_forward.
    """
    count = max(1, MAP_NUMBERS // (config.num_heads * config.num_patches**2))
    total = [{} for _ in range(config.depth)]
    for start in range(0, len(images), count):
        part = array_module(params["head.weight"]).asarray(images[start : start + count])
        size, sums = len(part), []

        def visit(maps, size=size, sums=sums):
            parts = {"mixture": maps.mixture, "content": maps.content, "position": maps.position}
            sums.append({
                kind: size * _head_means(nonlocality(attention, config.grid))
                for kind, attention in parts.items() if attention is not None
            })  # fmt: skip

        visit_attention(part, params, config, visit)
        for block, more in zip(total, sums, strict=True):
            for kind, value in more.items():
                block[kind] = block.get(kind, 0.0) + value / len(images)
    return total


def query_maps(image, params, config, query):
    """What one patch attends to in one image: a list with one dict a layer of "mixture" and for
    GPSA "content" and "position", each (H, rows, cols) float64 and of sum one a head.

    image (in_chans, height, width), normalised; query (row, col) of a patch. For MHSA the class
    token is left out, see without_class_token.
    """
    rows, cols = config.grid
    index = query[0] * cols + query[1]
    layers = []

    def visit(maps):
        parts = {"content": maps.content, "position": maps.position, "mixture": maps.mixture}
        layers.append({
            kind: on_cpu(without_class_token(attention, config.grid))[..., index, :]
            .reshape(config.num_heads, rows, cols)
            for kind, attention in parts.items() if attention is not None
        })  # fmt: skip

    visit_attention(array_module(params["head.weight"]).asarray(image[None]), params, config, visit)
    return layers


def uniform_nonlocality(grid):
    """The nonlocality of attention that is spread evenly over the grid: a float."""
    N = grid[0] * grid[1]
    return float(nonlocality(np.full((N, N), 1.0 / N), grid))


def _head_means(values):
    """(B, H) or (H,) as (H,) float64 on the CPU, averaged over the images."""
    return on_cpu(values).reshape(-1, values.shape[-1]).mean(axis=0)


def on_cpu(x):
    """The array as NumPy's float64."""
    return np.asarray(x if array_module(x) is np else x.get(), dtype=np.float64)
