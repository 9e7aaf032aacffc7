"""Networks that differ in how tokens mix alone, and what they reconstruct of hidden patches.

After Cazenavette and Lucey 2021, "On the Bias Against Inductive Biases". Attention, an MLP across
tokens, a filter on the grid, and GPSA whose gate is a dial from content (0) to position (1). All
have the blocks of a ConViT, on its own residual branches.
"""

from dataclasses import dataclass

import numpy as np

from ..arrays import HIDING, array_module, uniform
from ..config import from_fields, is_count
from ..errors import UserError
from ..layers import (
    gpsa_backward,
    gpsa_forward,
    layernorm_backward,
    layernorm_forward,
    linear_backward,
    linear_forward,
    mhsa_backward,
    mhsa_forward,
    mlp_backward,
    mlp_forward,
    patch_embed_backward,
    patch_embed_forward,
)
from ..layers.block import _branch_backward, _branch_forward  # private to coursework's blanks alone
from ..layers.names import part, prefixed
from ..model import local_centres
from .conv import depthwise_backward, depthwise_forward

GATES = {0.0: -40.0, 0.5: 0.0, 1.0: 40.0}
"""Gate to the gating_param whose sigmoid it is, exactly in float32; there it cannot move."""


@dataclass(frozen=True)
class IsotropicConfig:
    """Shape of such a network. mixer: attention, mlp, conv or gpsa; gate: GPSA's, 0, 1/2 or 1.

    hidden_dim: of the MLP on each token; token_dim: of the one across tokens. Raises UserError
    where the numbers do not fit together.
    """

    mixer: str = "attention"
    gate: float = 0.5
    img_size: int = 32
    patch_size: int = 4
    in_chans: int = 3
    embed_dim: int = 64
    depth: int = 6
    num_heads: int = 4
    hidden_dim: int = 128
    token_dim: int = 64

    def __post_init__(self):
        if self.mixer not in MIXERS or self.gate not in GATES:
            raise UserError(
                f"there is no mixer {self.mixer!r:.80} with a gate of {self.gate!r:.80}"
            )
        for name in ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads",
                     "hidden_dim", "token_dim"):  # fmt: skip
            if not is_count(getattr(self, name), 1):
                raise UserError(f"{name} must be an integer of at least 1")
        if self.img_size % self.patch_size or self.embed_dim % self.num_heads:
            raise UserError("img_size must be whole patches, and embed_dim as many parts as heads")

    @property
    def grid(self):
        """(rows, cols) of patches."""
        return (self.img_size // self.patch_size,) * 2

    @property
    def num_patches(self):
        """N = rows * cols."""
        return self.grid[0] * self.grid[1]

    @property
    def patch_values(self):
        """K: numbers in a patch."""
        return self.in_chans * self.patch_size**2

    @classmethod
    def from_dict(cls, values):
        """From plain types. Raises UserError on an unknown field."""
        return from_fields(cls, values)


def token_conv_forward(x, params, grid):
    """y = proj(depthwise(x on the grid)).  x (B, N, D); params: depthwise.*, proj.*."""
    image = x.reshape(len(x), *grid, x.shape[2])
    y, cache = depthwise_forward(
        image, params["depthwise.weight"], params["depthwise.bias"], padding=1
    )
    y, cache_proj = linear_forward(y.reshape(x.shape), params["proj.weight"], params["proj.bias"])
    return y, (cache, cache_proj, image.shape)


def token_conv_backward(dy, cache):
    """Back through proj and the filters. Returns dx (B, N, D) and grads with params' keys."""
    cache, cache_proj, shape = cache
    dx, dproj_weight, dproj_bias = linear_backward(dy, cache_proj)
    dx, dweight, dbias = depthwise_backward(dx.reshape(shape), cache)
    grads = {"depthwise.weight": dweight, "depthwise.bias": dbias}
    grads |= {"proj.weight": dproj_weight, "proj.bias": dproj_bias}
    return dx.reshape(dy.shape), grads


def token_mlp_forward(x, params):
    """The block's MLP across tokens in place of features: transpose, MLP, transpose."""
    y, cache = mlp_forward(x.swapaxes(1, 2), params)  # (B, D, N)
    return y.swapaxes(1, 2), cache


def token_mlp_backward(dy, cache):
    """The same two transposes. Returns dx (B, N, D) and grads with params' keys."""
    dx, grads = mlp_backward(dy.swapaxes(1, 2), cache)
    return dx.swapaxes(1, 2), grads


MIXERS = {
    "attention": (lambda x, p, c: mhsa_forward(x, p, c.num_heads), mhsa_backward),
    "mlp": (lambda x, p, c: token_mlp_forward(x, p), token_mlp_backward),
    "conv": (lambda x, p, c: token_conv_forward(x, p, c.grid), token_conv_backward),
    "gpsa": (lambda x, p, c: gpsa_forward(x, p, c.num_heads, c.grid), gpsa_backward),
}
"""Mixer to its forward (x, params, config) and its backward."""


def isotropic_forward(images, params, config, mask):
    """What the patches are: (B, N, K), guessed from those that are not hidden.

    images (B, C, height, width); mask (B, N) of truth: hidden patches begin as mask_token. The
    cache begins with the means over the tokens after each block, (B, D) each.
    """
    xp = array_module(images)
    x, cache_patch = patch_embed_forward(
        images,
        params["patch_embed.proj.weight"],
        params["patch_embed.proj.bias"],
        config.patch_size,
    )  # (B, N, D)
    x = xp.where(mask[..., None], params["mask_token"], x) + params["pos_embed"]
    means, caches = [], []
    for i in range(config.depth):
        block = part(params, f"blocks.{i}.")
        mix, mlp = part(block, "mix."), part(block, "mlp.")
        x, cache1 = _branch_forward(
            x,
            lambda x, p=mix: MIXERS[config.mixer][0](x, p, config),
            part(block, "norm1."),
            None,
            1,
        )
        x, cache2 = _branch_forward(
            x, lambda x, p=mlp: mlp_forward(x, p), part(block, "norm2."), None, 1
        )
        means.append(x.mean(axis=1))
        caches.append((cache1, cache2))
    x, cache_norm = layernorm_forward(x, params["norm.weight"], params["norm.bias"])
    y, cache_head = linear_forward(x, params["head.weight"], params["head.bias"])  # (B, N, K)
    return y, (means, cache_patch, mask, caches, cache_norm, cache_head, config)


def isotropic_backward(dy, cache):
    """Every layer in reverse; a hidden patch hears through mask_token alone. Returns all grads."""
    _, cache_patch, mask, caches, cache_norm, cache_head, config = cache
    grads = {}
    dx, grads["head.weight"], grads["head.bias"] = linear_backward(dy, cache_head)
    dx, grads["norm.weight"], grads["norm.bias"] = layernorm_backward(dx, cache_norm)
    for i in reversed(range(config.depth)):
        cache1, cache2 = caches[i]
        dx, dmlp, dnorm2 = _branch_backward(dx, mlp_backward, cache2)
        dx, dmix, dnorm1 = _branch_backward(dx, MIXERS[config.mixer][1], cache1)
        parts = {"norm1.": dnorm1, "mix.": dmix, "norm2.": dnorm2, "mlp.": dmlp}
        for name, dpart in parts.items():
            grads |= prefixed(dpart, f"blocks.{i}.{name}")
    grads["pos_embed"] = dx.sum(axis=0, keepdims=True)  # (1, N, D)
    hidden = mask[..., None].astype(dx.dtype)  # (B, N, 1)
    grads["mask_token"] = (dx * hidden).sum(axis=(0, 1), keepdims=True)  # (1, 1, D)
    _, dweight, dbias = patch_embed_backward(dx * (1 - hidden), cache_patch, need_dimages=False)
    grads |= {"patch_embed.proj.weight": dweight, "patch_embed.proj.bias": dbias}
    return {name: grads[name] for name in isotropic_shapes(config)}


def masked_loss_forward(predicted, patches, mask):
    """loss = mean squared error over the hidden patches alone. predicted, patches (B, N, K)."""
    wrong = (predicted - patches) * mask[..., None]
    count = mask.sum() * predicted.shape[-1]
    return (wrong * wrong).sum() / count.astype(wrong.dtype), (wrong, count.astype(wrong.dtype))


def masked_loss_backward(dloss, cache):
    """dpredicted = 2 dloss (predicted - patches) / count where hidden, 0 elsewhere."""
    wrong, count = cache
    return wrong * (2.0 * dloss / count)


def hidden_patches(seed, step, places, num_patches):
    """Half of the patches of each image, truth (b, N), by (seed, step, place in the batch)."""
    xp = array_module(places)
    drawn = uniform(seed, HIDING, step, places[:, None], xp.arange(num_patches), xp=xp)  # (b, N)
    return drawn <= xp.sort(drawn)[:, num_patches // 2 - 1, None]


def patches_of(images, patch_size):
    """images (B, C, height, width) as (B, N, K), each patch flattened as (channel, y, x)."""
    B, C, height, width = images.shape
    P = patch_size
    cut = images.reshape(B, C, height // P, P, width // P, P).transpose(0, 2, 4, 1, 3, 5)
    return cut.reshape(B, -1, C * P * P)


def isotropic_shapes(config):
    """Name to shape of every parameter."""
    D, N, M, T, K = (config.embed_dim, config.num_patches, config.hidden_dim, config.token_dim,
                     config.patch_values)  # fmt: skip
    norm, proj = {"weight": (D,), "bias": (D,)}, {"proj.weight": (D, D), "proj.bias": (D,)}
    H, k = config.num_heads, 3

    def mlp(width, hidden):
        weights = {"fc1.weight": (hidden, width), "fc1.bias": (hidden,)}
        return weights | {"fc2.weight": (width, hidden), "fc2.bias": (width,)}

    mixers = {
        "attention": {"qkv.weight": (3 * D, D)} | proj,
        "mlp": mlp(N, T),
        "conv": {"depthwise.weight": (D, 1, k, k), "depthwise.bias": (D,)} | proj,
        "gpsa": {"gating_param": (H,), "qk.weight": (2 * D, D), "v.weight": (D, D)}
        | proj
        | {"pos_proj.weight": (H, 3), "pos_proj.bias": (H,)},
    }
    P = config.patch_size
    shapes = {"mask_token": (1, 1, D), "pos_embed": (1, N, D)}
    shapes |= {"patch_embed.proj.weight": (D, config.in_chans, P, P), "patch_embed.proj.bias": (D,)}
    parts = {"norm1.": norm, "mix.": mixers[config.mixer], "norm2.": norm, "mlp.": mlp(D, M)}
    for i in range(config.depth):
        for name, entries in parts.items():
            shapes |= prefixed(entries, f"blocks.{i}.{name}")
    shapes |= prefixed(norm, "norm.")
    return shapes | {"head.weight": (K, D), "head.bias": (K,)}


def init_isotropic(config, seed=0):
    """Fresh parameters, float32: weights N(0, 1 / (4 fan in)), embeddings N(0, 0.02^2), biases 0,
    LayerNorms 1 and 0; GPSA as in ConViT, but for its gate."""
    rng = np.random.default_rng(seed)
    params = {}
    for name, shape in isotropic_shapes(config).items():
        if name.endswith("gating_param"):
            value = np.full(shape, GATES[config.gate])
        elif name.endswith("pos_proj.weight"):
            centres = local_centres(config.num_heads)
            value = np.concatenate([2 * centres, -np.ones((len(centres), 1))], axis=1)
        elif name.endswith("mix.v.weight"):
            value = np.eye(config.embed_dim)
        elif len(shape) == 1:
            value = np.full(shape, float(name.endswith("weight")))
        elif name in ("mask_token", "pos_embed"):
            value = rng.normal(0.0, 0.02, shape)
        else:
            value = rng.normal(0.0, 0.5 * np.prod(shape[1:]) ** -0.5, shape)
        params[name] = value.astype("float32")
    return params
