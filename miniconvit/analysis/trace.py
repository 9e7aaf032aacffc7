"""One training step, layer by layer: shapes, parameters, multiplications, memory, gradients."""

from math import prod, sqrt

import numpy as np

from ..layers import cross_entropy_backward, cross_entropy_forward
from ..layers.names import prefixed
from ..model import convit_backward, convit_forward


def trace_step(images, labels, params, config):
    """What each layer of `layers/` does in one training step on this batch, in JSON types.

    images (B, in_chans, height, width), normalised; labels (B,); NumPy arrays. Drop path is that of
    step 0. Returns a dict of "loss", "gradient" (the norm of all) and "layers": one dict a layer,
    of "layer" (the official name), "kind", "output" (its shape), "parameters", "forward" and
    "backward" (multiplications in matrix products, of the whole batch), "cache" (bytes kept for the
    backward pass) and "gradient" (the norm of its parameters' gradient, None without any).
    """
    logits, cache = convit_forward(images, params, config, train=True)
    loss, cache_loss = cross_entropy_forward(logits, labels)
    kept = _bytes_kept(cache, cache_loss, known=(images, labels, params))
    grads = convit_backward(cross_entropy_backward(1.0, cache_loss), cache)
    layers = []
    for layer, kind, output, forward, backward in _layers(config, len(images)):
        names = [name for name in params if name == layer or name.startswith(f"{layer}.")]
        layers.append({
            "layer": layer,
            "kind": kind,
            "output": list(output),
            "parameters": sum(params[name].size for name in names),
            "forward": forward,
            "backward": backward,
            "cache": kept.get(layer, 0),
            "gradient": _norm([grads[name] for name in names]) if names else None,
        })  # fmt: skip
    return {"loss": float(loss), "gradient": _norm(grads.values()), "layers": layers}


def _layers(config, B):
    """(name, kind, shape of the output, multiplications forward and backward) of each layer.

    A product of two arrays that both have a gradient takes two products of its size in the backward
    pass. The images, and the offsets that PSA multiplies, need none.
    """
    N, D, M, H = config.num_patches, config.embed_dim, config.hidden_dim, config.num_heads
    patches = B * N * D * config.in_chans * prod(config.patch)
    yield "patch_embed", "", (B, N, D), patches, patches
    if config.use_pos_embed:
        yield "pos_embed", "", (B, N, D), 0, 0
    for i in range(config.depth):
        if i == config.local_up_to_layer:
            N += 1
            yield "cls_token", "", (B, N, D), 0, 0
        name, shape = f"blocks.{i}", (B, N, D)
        kind = config.attention if i < config.local_up_to_layer else "mhsa"
        attention = B * (4 * N * D * D + 2 * N * N * D)  # q, k, v and proj; q k^T and C v
        once = 0
        if kind == "gpsa":
            attention += B * N * D * sum(config.grid)  # along the rows, then along the columns
        elif kind == "psa":
            once = 3 * H * N * N  # the position scores, of all images
        yield f"{name}.norm1", "layernorm", shape, 0, 0
        yield f"{name}.attn", kind, shape, attention + once, 2 * attention + once
        yield f"{name}.norm2", "layernorm", shape, 0, 0
        yield f"{name}.mlp", "mlp", shape, 2 * B * N * D * M, 4 * B * N * D * M
    yield "norm", "layernorm", (B, D), 0, 0
    head = B * D * config.num_classes
    yield "head", "", (B, config.num_classes), head, 2 * head
    yield "loss", "", (), 0, 0


def _bytes_kept(cache, cache_loss, known):
    """Bytes of the arrays in the caches of convit_forward and the loss, by layer.

    Memory that several layers or views share counts once, for the first layer that keeps it, and
    that of the known arrays, which are there anyway, not at all.
    """
    cache_patch, caches, cache_norm, cache_head, *_ = cache
    parts = {"": known, "patch_embed": cache_patch}
    for i, block in enumerate(caches):
        block = block[0] if i == len(caches) - 1 else block  # beside it the shape of its output
        (norm1, *attention), (norm2, *mlp), _ = block
        found = {"norm1": norm1, "attn": attention, "norm2": norm2, "mlp": mlp}
        parts |= prefixed(found, f"blocks.{i}.")
    parts |= {"norm": cache_norm, "head": cache_head, "loss": cache_loss}
    owners = {}
    return {layer: sum(_new_bytes(part, owners)) for layer, part in parts.items()}


def _new_bytes(part, owners):
    """The size of each piece of memory in nested tuples, lists and dicts that owners, {id: array},
    have not; they get it."""
    if isinstance(part, dict):
        part = tuple(part.values())
    if isinstance(part, tuple | list):
        for inner in part:
            yield from _new_bytes(inner, owners)
    elif isinstance(part, np.ndarray):
        while isinstance(part.base, np.ndarray):
            part = part.base
        if id(part) not in owners:
            owners[id(part)] = part
            yield part.nbytes


def _norm(arrays):
    """The joint L2 norm of arrays, summed in float64."""
    return sqrt(sum(float(np.square(x, dtype=np.float64).sum()) for x in arrays))
