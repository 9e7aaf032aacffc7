"""What a trained ConViT attends to: maps, gates, centres, and how far each head looks."""

from types import SimpleNamespace

import numpy as np

from .arrays import array_module
from .data import normalize
from .engine.pieces import CPU
from .layers.gpsa import gpsa_dense_forward
from .layers.ops import REFERENCE
from .layers.position import relative_positions
from .layers.psa import psa_forward
from .model import convit_forward

READING_IMAGES = 64
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

    maps: a namespace with mixture (B, H, M, M), what is applied to the values; and for GPSA its
    parts, content (B, H, N, N), position (H, N, N) and gate (H,), else None.
    """

    def record_gpsa(x, params, num_heads, grid, ops):
        out, cache = gpsa_dense_forward(x, params, num_heads, grid, ops)
        (*_, (content, position, gate), _), (*_, mixture), *_ = cache
        visit(SimpleNamespace(
            mixture=mixture, content=content, position=position, gate=gate[:, 0, 0]
        ))  # fmt: skip
        return out, None

    def record_psa(x, params, num_heads, grid, ops):
        out, (*_, (_, _, _, mixture), _, _, _) = psa_forward(x, params, num_heads, grid, ops)
        visit(SimpleNamespace(mixture=mixture, content=None, position=None, gate=None))
        return out, None

    def record_attention(q, k, v, ops):
        y, cache = REFERENCE.attention_forward(q, k, v, ops)
        visit(SimpleNamespace(mixture=cache[1], content=None, position=None, gate=None))
        return y, None

    recording = vars(CPU) | {
        "gpsa_forward": record_gpsa,
        "psa_forward": record_psa,
        "mhsa_forward": REFERENCE.mhsa_forward,
        "attention_forward": record_attention,
        "block_forward": lambda *args: (REFERENCE.block_forward(*args)[0], None),
        "last_block_forward": REFERENCE.last_block_forward,
    }
    convit_forward(images, params, config, ops=SimpleNamespace(**recording))


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


def gates(params, config):
    """sigmoid(gating_param) of each GPSA block: {block: (H,)}, empty without gates."""
    found = {}
    for i in range(config.depth):
        if (gating_param := params.get(f"blocks.{i}.attn.gating_param")) is not None:
            found[i] = 0.5 + 0.5 * np.tanh(0.5 * _on_cpu(gating_param))
    return found


def decode_positions(params, config):
    """What pos_proj (w0, w1, w2) means: scores -strength * |offset - centre|^2, up to a constant.

    Returns {block: (strength (H,), centre (H, 2))} for the GPSA and PSA blocks, with strength = -w2
    and centre = (w0, w1) / (2 strength) in patches, to the right and down; NaN where w2 >= 0, as
    such a head is pushed away in all directions and has no centre.
    """
    found = {}
    for i in range(config.depth):
        if (weight := params.get(f"blocks.{i}.attn.pos_proj.weight")) is not None:
            weight = _on_cpu(weight)
            strength = -weight[:, 2]
            halved = np.where(strength > 0, 2 * strength, np.nan)
            found[i] = strength, weight[:, :2] / halved[:, None]
    return found


def reading_images(dataset):
    """Validation images from its beginning to its end, whatever their order, normalised: those of
    the readings in metrics.jsonl."""
    n = len(dataset.val.images)
    count = min(READING_IMAGES, n)
    which = np.arange(count) * n // count
    return normalize(dataset.val.images[which], dataset.mean, dataset.std)


def readings(images, params, config):
    """What a training run records of its attention after each epoch, in JSON types and to six
    digits: "nonlocality" by block and head; "gates", "strengths" and "centre_norms" (None where
    there is no centre) by GPSA block and head.
    """
    positions = decode_positions(params, config).values()
    return {
        "nonlocality": [
            plain(block["mixture"]) for block in measure_nonlocality(images, params, config)
        ],
        "gates": [plain(gate) for gate in gates(params, config).values()],
        "strengths": [plain(strength) for strength, _ in positions],
        "centre_norms": [plain(np.hypot(*centre.T)) for _, centre in positions],
    }


def describe(params, config, images=None):
    """Everything there is to say about the attention of each layer, in JSON types: a list with one
    dict a layer, of "layer" (from 1), "name" of the block, "attention" (gpsa, psa or mhsa) and
    "heads", dicts of "gate", "strength" and "centre" (right and down, in patches; None for a head
    without one, see decode_positions) where the layer has them; with images also of "nonlocality",
    for GPSA split into "content_nonlocality" and "position_nonlocality".
    """
    gate, position = gates(params, config), decode_positions(params, config)
    distances = None if images is None else measure_nonlocality(images, params, config)
    layers = []
    for i in range(config.depth):
        columns = {"gate": plain(gate[i])} if i in gate else {}
        if i in position:
            strength, centre = map(plain, position[i])
            centre = [None if None in pair else pair for pair in centre]
            columns |= {"strength": strength, "centre": centre}
        if distances is not None:
            columns["nonlocality"] = plain(distances[i]["mixture"])
            for kind in ("content", "position"):
                if kind in distances[i]:
                    columns[f"{kind}_nonlocality"] = plain(distances[i][kind])
        heads = [
            {name: values[h] for name, values in columns.items()} for h in range(config.num_heads)
        ]
        kind = "gpsa" if i in gate else "psa" if i in position else "mhsa"
        layers.append({"layer": i + 1, "name": f"blocks.{i}", "attention": kind, "heads": heads})
    return layers


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
            kind: _on_cpu(without_class_token(attention, config.grid))[..., index, :]
            .reshape(config.num_heads, rows, cols)
            for kind, attention in parts.items() if attention is not None
        })  # fmt: skip

    visit_attention(array_module(params["head.weight"]).asarray(image[None]), params, config, visit)
    return layers


def uniform_nonlocality(grid):
    """The nonlocality of attention that is spread evenly over the grid: a float."""
    N = grid[0] * grid[1]
    return float(nonlocality(np.full((N, N), 1.0 / N), grid))


def plain(values):
    """An array as nested lists of floats of six digits, NaN as None, for JSON."""
    if np.ndim(values):
        return [plain(value) for value in values]
    return float(f"{values:.6g}") if np.isfinite(values) else None


def _head_means(values):
    """(B, H) or (H,) as (H,) float64 on the CPU, averaged over the images."""
    return _on_cpu(values).reshape(-1, values.shape[-1]).mean(axis=0)


def _on_cpu(x):
    return np.asarray(x if array_module(x) is np else x.get(), dtype=np.float64)
