"""Losses that keep patch tokens apart (Gong et al. 2021: Patch Diversification).

h (B, N, D) are the patch tokens after a block, without the class token. The formulas are those of
the paper's later version; the authors' code has others, and no cosine. `Taps` gets tokens out of a
model and gradients in, without a line of it changed.
"""

from dataclasses import dataclass

import numpy as np

from .. import layers
from ..arrays import array_module
from ..config import ConViTConfig
from ..layers import (
    cross_entropy_backward,
    cross_entropy_forward,
    linear_backward,
    linear_forward,
)
from ..layers.names import prefixed
from ..model import convit_forward, init_params, param_shapes


def cosine_forward(h):
    """loss = mean over images and pairs i != j of |u_i . u_j|,  u = h / |h|: how alike they are."""
    xp = array_module(h)
    B, N, _ = h.shape
    length = xp.sqrt((h * h).sum(axis=-1, keepdims=True))  # (B, N, 1)
    u = h / length
    S = u @ u.swapaxes(-1, -2) * (1 - xp.eye(N, dtype=h.dtype))  # (B, N, N)
    return xp.abs(S).sum() / (B * N * (N - 1)), (u, length, S)


def cosine_backward(dloss, cache):
    """du = 2 dloss / (B N (N - 1)) sign(S) u;  dh = (du - u (u . du)) / |h|."""
    u, length, S = cache
    B, N, _ = u.shape
    du = array_module(u).sign(S) @ u * (2.0 * dloss / (B * N * (N - 1)))
    return (du - u * (u * du).sum(axis=-1, keepdims=True)) / length


def contrastive_forward(h, first):
    """loss = mean of log(1 + exp(d_i)),  d_i = e_i . (m_i - h_i): is a token still its own?

    e = first (B, N, D), the tokens after the first block, is a target: no gradient goes there.
    m_i is the mean of the other tokens h_j.
    """
    others = (h.sum(axis=1, keepdims=True) - h) / (h.shape[1] - 1)  # (B, N, D)
    d = (first * (others - h)).sum(axis=-1)  # (B, N)
    return array_module(h).logaddexp(0.0, d).mean(), (first, d)


def contrastive_backward(dloss, cache):
    """g = sigmoid(d) dloss / (B N);  dh_i = (sum of the other g_j e_j) / (N - 1) - g_i e_i."""
    first, d = cache
    g = (0.5 + 0.5 * array_module(d).tanh(0.5 * d)) * (dloss / d.size)
    ge = g[..., None] * first  # (B, N, D)
    return (ge.sum(axis=1, keepdims=True) - ge) / (d.shape[1] - 1) - ge


def patch_mixing_forward(h, weight, bias, labels):
    """loss = mean cross-entropy over all patches, each with a label of its own.

    h (B, N, D), weight (C, D), bias (C,): one linear head; labels (B, N), of images whose patches
    come from two.
    """
    logits, cache_head = linear_forward(h.reshape(-1, h.shape[-1]), weight, bias)  # (B * N, C)
    loss, cache_loss = cross_entropy_forward(logits, labels.reshape(-1))
    return loss, (cache_head, cache_loss, h.shape)


def patch_mixing_backward(dloss, cache):
    """Back through the cross-entropy and the head. Returns dh, dweight and dbias."""
    cache_head, cache_loss, shape = cache
    dlogits = cross_entropy_backward(dloss, cache_loss)
    dh, dweight, dbias = linear_backward(dlogits, cache_head)
    return dh.reshape(shape), dweight, dbias


def similarities(images, params, config):
    """How alike the patch tokens of an image are after each block, cosine_forward's mean: a list of
    floats. images (B, C, H, W), normalised."""
    taps = Taps(layers, config.num_patches)
    convit_forward(images, params, config, blocks=taps, keep_caches=False)
    return [float(cosine_forward(h)[0]) for h in taps.tokens]


@dataclass(frozen=True)
class PatchHeadConfig(ConViTConfig):
    """A ConViT with a linear head on each patch, which training alone uses."""


def patch_head_shapes(config):
    """Name to shape: a ConViT's, then patch_head.weight (C, D) and patch_head.bias (C,)."""
    head = {"weight": (config.num_classes, config.embed_dim), "bias": (config.num_classes,)}
    return param_shapes(config) | prefixed(head, "patch_head.")


def init_with_patch_head(config, seed=0):
    """init_params, and a head that begins as the model's own: N(0, 0.02^2), and 0."""
    params = init_params(config, seed)
    shapes = patch_head_shapes(config)
    weight = np.random.default_rng([seed, 1]).normal(0.0, 0.02, shapes["patch_head.weight"])
    bias = np.zeros(shapes["patch_head.bias"])
    head = {"weight": weight.astype("float32"), "bias": bias.astype("float32")}
    return params | prefixed(head, "patch_head.")


def without_patch_head(params, config):
    """(params, config) of the ConViT that answers."""
    if isinstance(config, PatchHeadConfig):
        config = ConViTConfig(**config.to_dict())
        params = {name: params[name] for name in param_shapes(config)}
    return params, config


class Taps:
    """Blocks for one pass of a model, which keep the patch tokens after each: `tokens`, a list.

    blocks: those that compute; the last is computed for all tokens, not for the first alone.
    send_back(tokens) -> (B, N, D): where the backward pass begins, what a loss on the last tokens
    adds to their gradient.
    """

    def __init__(self, blocks, num_patches, send_back=None):
        self._blocks, self._num_patches, self._send_back = blocks, num_patches, send_back
        self.tokens = []

    def __getattr__(self, name):
        return getattr(self._blocks, name)  # what is not changed here

    def _patches(self, x):
        """x without its class token, which joins in some block, if at all."""
        return x[:, x.shape[1] - self._num_patches :]

    def block_forward(self, *args):
        y, cache = self._blocks.block_forward(*args)
        self.tokens.append(self._patches(y))
        return y, cache

    def last_block_forward(self, *args):
        y, cache = self.block_forward(*args)
        return y[:, 0], (cache, y.shape)

    def last_block_backward(self, dy, cache):
        cache_block, shape = cache
        dx = array_module(dy).zeros(shape, dy.dtype)
        dx[:, 0] = dy
        self._patches(dx)[...] += self._send_back(self.tokens)
        return self._blocks.block_backward(dx, cache_block)
