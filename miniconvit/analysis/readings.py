"""What is said of a model's attention in numbers: gates, centres, strengths, nonlocality."""

import numpy as np

from ..config import ConViTConfig
from ..data import normalize
from .maps import measure_nonlocality, on_cpu

READING_IMAGES = 64


def gates(params, config):
    """sigmoid(gating_param) of each GPSA block: {block: (H,)}, empty without gates."""
    found = {}
    for i in range(config.depth):
        if (gating_param := params.get(f"blocks.{i}.attn.gating_param")) is not None:
            found[i] = 0.5 + 0.5 * np.tanh(0.5 * on_cpu(gating_param))
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
            weight = on_cpu(weight)
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
    there is no centre) by GPSA block and head. Of another model than ConViT all are empty.
    """
    if not isinstance(config, ConViTConfig):
        return {name: [] for name in ("nonlocality", "gates", "strengths", "centre_norms")}
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


def plain(values):
    """An array as nested lists of floats of six digits, NaN as None, for JSON."""
    if np.ndim(values):
        return [plain(value) for value in values]
    return float(f"{values:.6g}") if np.isfinite(values) else None
