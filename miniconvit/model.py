"""The whole ConViT: parameters, forward, backward."""

from typing import Any

import numpy as np

from . import layers
from .arguments import check_params
from .arrays import DROP_PATH, Array, Params, array_module, to_device, uniform
from .config import ConViTConfig
from .errors import UserError
from .layers.layernorm import layernorm_backward, layernorm_forward
from .layers.linear import linear_backward, linear_forward
from .layers.names import part, prefixed
from .layers.patch_embed import patch_embed_backward, patch_embed_forward


def param_shapes(config: ConViTConfig) -> dict[str, tuple[int, ...]]:
    """Name to shape of every parameter, official names in official (state dict) order."""
    D, H, M = config.embed_dim, config.num_heads, config.hidden_dim
    shapes = {"cls_token": (1, 1, D)}
    if config.use_pos_embed:
        shapes["pos_embed"] = (1, config.num_patches, D)
    shapes["patch_embed.proj.weight"] = (D, config.in_chans, *config.patch)
    shapes["patch_embed.proj.bias"] = (D,)
    gpsa = {"gating_param": (H,), "qk.weight": (2 * D, D), "qk.bias": (2 * D,)}
    gpsa |= {"v.weight": (D, D), "v.bias": (D,), "proj.weight": (D, D), "proj.bias": (D,)}
    gpsa |= {"pos_proj.weight": (H, 3), "pos_proj.bias": (H,)}
    mhsa = {"qkv.weight": (3 * D, D), "qkv.bias": (3 * D,)}
    mhsa |= {"proj.weight": (D, D), "proj.bias": (D,)}
    norm = {"weight": (D,), "bias": (D,)}
    mlp = {"fc1.weight": (M, D), "fc1.bias": (M,), "fc2.weight": (D, M), "fc2.bias": (D,)}
    for i in range(config.depth):
        attn = gpsa if i < config.local_up_to_layer else mhsa
        if config.attention == "psa":
            attn = {k: v for k, v in attn.items() if k != "gating_param"}
        if not config.qkv_bias:
            attn = {k: v for k, v in attn.items() if k not in ("qk.bias", "v.bias", "qkv.bias")}
        parts = {"norm1.": norm, "attn.": attn, "norm2.": norm, "mlp.": mlp}
        for prefix, entries in parts.items():
            shapes |= prefixed(entries, f"blocks.{i}.{prefix}")
    shapes |= prefixed(norm, "norm.")
    return shapes | {"head.weight": (config.num_classes, D), "head.bias": (config.num_classes,)}


def local_centres(num_heads):
    """Where the heads look at first: (H, 2) offsets (columns, rows) in patches, k x k of them.

    Heads walk down a column first. Raises UserError where num_heads is not a square.
    """
    k = round(num_heads**0.5)
    if k * k != num_heads:
        raise UserError(
            f"the local initialisation of GPSA needs a square number of heads (1, 4, 9, 16, ...), "
            f"not {num_heads}: change num_heads, or set local_up_to_layer to 0"
        )
    column, row = np.divmod(np.arange(num_heads), k)
    return np.stack([column, row], axis=1) - (k - 1) / 2


def init_params(
    config: ConViTConfig, seed: int = 0, dtype: str = "float32", device: str = "cpu"
) -> Params:
    """Fresh parameters by name: the official initialisation (section 2 and appendix of the paper).

    Weights N(0, 0.02^2), biases 0, LayerNorms 1 and 0; the patch convolution U(-b, b) with
    b = 1 / sqrt(fan in); GPSA: gating_param 1, v the identity, and position scores
    -locality_strength * |offset - centre|^2, so that a head starts as a blurred shift; without
    use_local_init v and the position scores are weights like others.
    Drawn on the CPU in float64, then cast, so that every dtype holds the same numbers.
    """
    rng = np.random.default_rng(seed)
    bound = (config.in_chans * config.patch[0] * config.patch[1]) ** -0.5
    local = config.local_up_to_layer > 0 and config.use_local_init
    centres = local_centres(config.num_heads) if local else None  # (H, 2)
    params = {}
    for name, shape in param_shapes(config).items():
        if name.startswith("patch_embed."):
            value = rng.uniform(-bound, bound, shape)
        elif local and name.endswith("pos_proj.weight"):
            value = np.concatenate([2 * centres, -np.ones((len(centres), 1))], axis=1)
            value *= config.locality_strength
        elif local and name.endswith("attn.v.weight"):
            value = np.eye(config.embed_dim)
        elif name.endswith("gating_param") or (len(shape) == 1 and name.endswith("weight")):
            value = np.ones(shape)
        elif name.endswith("bias"):
            value = np.zeros(shape)
        else:
            value = rng.normal(0.0, 0.02, shape)
        params[name] = value.astype(dtype)
    return to_device(params, device)


def drop_path_masks(i, images, config, seed=0, step=0, first=0):
    """Masks of block i's two branches, 1 = keep, and the probability to keep, which falls linearly
    with depth. images[0] is image `first` of the whole batch.

    Each mask (B,) depends on (seed, step, block, branch, position in the whole batch) alone.
    """
    drop_prob = config.drop_path_rate * i / max(config.depth - 1, 1)
    if drop_prob == 0.0:
        return (None, None), 1.0
    xp = array_module(images)
    position = first + xp.arange(len(images))
    keep = [
        uniform(seed, DROP_PATH, step, i, branch, position, xp=xp) >= drop_prob
        for branch in range(2)
    ]
    return keep, 1.0 - drop_prob


def convit_forward(
    images: Array,
    params: Params,
    config: ConViTConfig,
    train: bool = False,
    seed: int = 0,
    step: int = 0,
    first: int = 0,
    blocks: Any = layers,
    keep_caches: bool = True,
) -> tuple[Array, tuple]:
    """logits = head(norm(token 0 of the last block)).

    images (B, in_chans, height, width), normalised, in the dtype of the parameters. With train=True
    drop path is active, drawn from (seed, step); first is the position of images[0] in the whole
    batch where these images are a piece of it. blocks: a module with block_forward and
    last_block_forward and their backwards, whose layernorm, if it has one, is the last norm too.
    keep_caches=False keeps nothing of the blocks: for inference, with no backward pass.
    Returns logits (B, num_classes) and the cache.
    """
    shape = getattr(images, "shape", ())
    if len(shape) != 4 or shape[1:] != (config.in_chans, *config.image):
        expected = f"(B, {config.in_chans}, {config.image[0]}, {config.image[1]})"
        found = shape or f"{type(images).__name__}: pass an array"
        raise UserError(f"the model expects images of shape {expected}, not {found}")
    check_params(params, param_shapes(config))
    if images.dtype != params["head.weight"].dtype:
        raise UserError(
            f"images are {images.dtype} but the parameters {params['head.weight'].dtype}: "
            "normalise the images and cast them to the parameters' dtype"
        )
    B = len(images)
    x, cache_patch = patch_embed_forward(
        images, params["patch_embed.proj.weight"], params["patch_embed.proj.bias"], config.patch
    )  # (B, N, D)
    if config.use_pos_embed:
        x = x + params["pos_embed"]
    caches = []
    for i in range(config.depth):
        if i == config.local_up_to_layer:
            cls_token = array_module(x).broadcast_to(params["cls_token"], (B, 1, x.shape[2]))
            x = array_module(x).concatenate([cls_token, x], axis=1)  # (B, 1 + N, D)
        keep, keep_prob = (None, None), 1.0
        if train:
            keep, keep_prob = drop_path_masks(i, images, config, seed, step, first)
        is_last = i == config.depth - 1
        block_forward = blocks.last_block_forward if is_last else blocks.block_forward
        block = part(params, f"blocks.{i}.")
        x, cache = block_forward(x, block, config.num_heads, config.grid, keep, keep_prob)
        if keep_caches:
            caches.append(cache)
        del cache  # before the next block makes its own
    norm_forward = getattr(blocks, "layernorm_forward", layernorm_forward)
    x, cache_norm = norm_forward(x, params["norm.weight"], params["norm.bias"])  # (B, D)
    logits, cache_head = linear_forward(x, params["head.weight"], params["head.bias"])
    return logits, (cache_patch, caches, cache_norm, cache_head, config, blocks)


def convit_backward(dlogits: Array, cache: tuple) -> Params:
    """Every layer in reverse. Returns the gradient of each parameter under its own name and shape.

    The blocks' caches are given up on the way, to free their memory: a cache serves one backward.
    Raises UserError on a second one, and where none was kept.
    """
    cache_patch, caches, cache_norm, cache_head, config, blocks = cache
    if not caches:
        raise UserError(
            "this cache has served a backward pass already, or keep_caches was False: "
            "run convit_forward again"
        )
    grads = {}
    dx, grads["head.weight"], grads["head.bias"] = linear_backward(dlogits, cache_head)
    norm_backward = getattr(blocks, "layernorm_backward", layernorm_backward)
    dx, grads["norm.weight"], grads["norm.bias"] = norm_backward(dx, cache_norm)
    dcls_token = array_module(dx).zeros((1, 1, config.embed_dim), dx.dtype)
    for i in reversed(range(config.depth)):
        is_last = i == config.depth - 1
        block_backward = blocks.last_block_backward if is_last else blocks.block_backward
        dx, dblock = block_backward(dx, caches.pop())
        grads |= prefixed(dblock, f"blocks.{i}.")
        if i == config.local_up_to_layer:
            dcls_token = dx[:, :1].sum(axis=0, keepdims=True)  # (1, 1, D)
            dx = dx[:, 1:]  # (B, N, D)
    grads["cls_token"] = dcls_token
    if config.use_pos_embed:
        grads["pos_embed"] = dx.sum(axis=0, keepdims=True)  # (1, N, D)
    _, dweight, dbias = patch_embed_backward(dx, cache_patch, need_dimages=False)
    grads |= {"patch_embed.proj.weight": dweight, "patch_embed.proj.bias": dbias}
    return {name: grads[name] for name in param_shapes(config)}
