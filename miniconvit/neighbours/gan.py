"""A ViT that draws and a ViT that judges it, and what keeps the two in balance (ViTGAN).

After Lee et al. 2021. Nothing in their training takes the gradient of a gradient: weights of a
given spectral norm and balanced consistency (Zhao et al. 2020) stand where other GANs penalise
slopes. So it is all by hand. Images are channels last, from -1 to 1. What is chosen by us is
starred.
"""

from dataclasses import dataclass
from math import pi

import numpy as np

from ..arrays import DIFFAUGMENT, LATENTS, array_module, normal, uniform
from ..config import as_pair, from_fields, is_count
from ..errors import UserError
from ..layers import (
    gelu_backward,
    gelu_forward,
    layernorm_backward,
    layernorm_forward,
    linear_backward,
    linear_forward,
    mhsa_backward,
    mhsa_forward,
    mlp_backward,
    mlp_forward,
)
from ..layers.block import _branch_backward, _branch_forward  # private to coursework's blanks alone
from ..layers.names import part, prefixed
from .conv import conv_backward, conv_forward
from .lipschitz import (
    spectral_backward,
    spectral_forward,
    tied_attention_backward,
    tied_attention_forward,
)

ATTENTIONS = {
    "dot": (mhsa_forward, mhsa_backward),
    "l2": (tied_attention_forward, tied_attention_backward),
}
"""The critic's attention: by dot products, or by distance as the paper has it."""

SHARE = 0.8  # of images, on which each operation of the augmentation falls


@dataclass(frozen=True)
class GANConfig:
    """Shape of both networks. attention: the critic's, dot or l2; the generator's is dot.

    img_size: pixels, an int or (height, width); patch_size: even. Raises UserError where the
    numbers do not fit together.
    """

    attention: str = "l2"
    img_size: int | tuple[int, int] = 16
    patch_size: int = 4
    in_chans: int = 3
    embed_dim: int = 64
    depth: int = 3
    num_heads: int = 4
    hidden_dim: int = 128
    latent_dim: int = 32

    def __post_init__(self):
        if self.attention not in ATTENTIONS:
            raise UserError(f"attention must be dot or l2, not {self.attention!r:.80}")
        for name in ("patch_size", "in_chans", "embed_dim", "depth", "num_heads", "hidden_dim",
                     "latent_dim"):  # fmt: skip
            if not is_count(getattr(self, name), 1):
                raise UserError(f"{name} must be an integer of at least 1")
        sides = as_pair(self.img_size)
        if len(sides) != 2 or any(not is_count(s, 1) or s % self.patch_size for s in sides):
            raise UserError("img_size must be one or two integers, of whole patches")
        if self.patch_size % 2 or self.embed_dim % self.num_heads:
            raise UserError("patch_size must be even, and embed_dim as many parts as heads")
        object.__setattr__(self, "img_size", sides[0] if sides[0] == sides[1] else sides)

    @property
    def image(self):
        """(height, width) in pixels."""
        return as_pair(self.img_size)

    @property
    def grid(self):
        """(rows, cols) of patches."""
        return tuple(side // self.patch_size for side in self.image)

    @property
    def num_patches(self):
        """N = rows * cols."""
        return self.grid[0] * self.grid[1]

    @classmethod
    def from_dict(cls, values):
        """From plain types. Raises UserError on an unknown field."""
        return from_fields(cls, values)


def places(rows, cols, like):
    """(row, col) of each place of a grid, from -1 to 1: (rows * cols, 2), as `like` is."""
    xp = array_module(like)
    row, col = divmod(xp.arange(rows * cols), cols)
    y, x = 2.0 * row / max(rows - 1, 1) - 1.0, 2.0 * col / max(cols - 1, 1) - 1.0
    return xp.stack([y, x], axis=-1).astype(like.dtype)


def sine_forward(x, weight, bias):
    """y = sin(linear(x)): features of places.  x (N, 2), weight (D, 2), bias (D,)."""
    phase, cache = linear_forward(x, weight, bias)
    return array_module(x).sin(phase), (cache, phase)


def sine_backward(dy, cache):
    """dphase = dy cos(phase). Returns dweight and dbias: places are fixed."""
    cache, phase = cache
    return linear_backward(dy * array_module(dy).cos(phase), cache, need_dx=False)[1:]


def modulated_norm_forward(x, w, params):
    """y = (1 + gamma) xhat + beta,  gamma and beta linear in w: self-modulated LayerNorm.

    x (B, N, D), w (B, D); params: gamma.weight, gamma.bias, beta.weight, beta.bias. The latent
    vector decides so what an image is: the tokens begin alike in all images.
    """
    gamma, cache_gamma = linear_forward(w, params["gamma.weight"], params["gamma.bias"])  # (B, D)
    beta, cache_beta = linear_forward(w, params["beta.weight"], params["beta.bias"])
    xp, D = array_module(x), x.shape[-1]
    xhat, cache_norm = layernorm_forward(x, xp.full(D, 1.0, x.dtype), xp.zeros(D, x.dtype))
    factor = 1.0 + gamma[:, None]  # (B, 1, D)
    return xhat * factor + beta[:, None], (cache_gamma, cache_beta, cache_norm, xhat, factor)


def modulated_norm_backward(dy, cache):
    """dgamma = sum over tokens of dy xhat;  dbeta = sum of dy. Returns dx, dw and grads."""
    cache_gamma, cache_beta, cache_norm, xhat, factor = cache
    dw, dgamma_weight, dgamma_bias = linear_backward((dy * xhat).sum(axis=1), cache_gamma)
    more, dbeta_weight, dbeta_bias = linear_backward(dy.sum(axis=1), cache_beta)
    dx, _, _ = layernorm_backward(dy * factor, cache_norm)
    grads = {"gamma.weight": dgamma_weight, "gamma.bias": dgamma_bias}
    return dx, dw + more, grads | {"beta.weight": dbeta_weight, "beta.bias": dbeta_bias}


def modulated_linear_forward(x, a, weight, eps=1e-8):
    """y = r W (a x),  r = 1 / |W a| by row: each token weighs its inputs, outputs keep their size.

    x (P, D): the same for all tokens; a (B, N, D), weight (O, D). Returns (B, N, P, O). As in
    StyleGAN2, where |W a|^2 = sum over inputs of (W a)^2.
    """
    u, cache = linear_forward(x * a[:, :, None], weight)  # (B, N, P, O)
    square, _ = linear_forward(a * a, weight * weight)
    r = 1.0 / array_module(x).sqrt(square + eps)  # (B, N, O)
    return u * r[:, :, None], (cache, x, a, weight, u, r)


def modulated_linear_backward(dy, cache):
    """du = r dy;  with dq = -r^3 / 2 sum over P of dy u, the gradient of (W a)^2's sum:
    da = sum of x W^T du + 2 a (W^2)^T dq;  dW = the linear layer's + 2 W dq^T a^2."""
    cache, x, a, weight, u, r = cache
    dinput, dweight, _ = linear_backward(dy * r[:, :, None], cache)  # (B, N, P, D), (O, D)
    dq = -0.5 * r * r * r * (dy * u).sum(axis=2)  # (B, N, O)
    dsquare, dsquares, _ = linear_backward(dq, (a * a, weight * weight, False))
    dx = (dinput * a[:, :, None]).sum(axis=(0, 1))
    da = (dinput * x).sum(axis=2) + 2.0 * a * dsquare
    return dx, da, dweight + 2.0 * weight * dsquares


def latents(seed, step, images, config):
    """What pictures are made of: (B, latent_dim) about N(0, 1), float32, for images of a batch."""
    xp = array_module(images)
    return normal(seed, LATENTS, step, images[:, None], xp.arange(config.latent_dim), xp=xp)


def augmentation(seed, step, images, size):
    """What is done to each of these images of a batch (B,), of size (height, width).

    (shift (B, 2), brightness (B, 1, 1, 1), and (B, height, width, 1) that is 0 in a box of a
    quarter of the sides), float32. Each of the three falls on 0.8 of the images. Shifts of an
    eighth and brightness of half a unit at most are those of Zhao et al.'s code. *The box is half
    as wide*, and *saturation and contrast are left out*: with consistent scores they would make the
    critic blind to what tells these small objects apart.
    """
    xp = array_module(images)
    u = uniform(seed, DIFFAUGMENT, step, images[:, None], xp.arange(8), xp=xp)  # (B, 8)
    moved, lit, cut = (u[:, i] < SHARE for i in range(3))
    most = xp.asarray([_most_shift(side) for side in size])
    shift = xp.floor(u[:, 3:5] * (2 * most + 1)).astype(int) - most
    brightness = xp.where(lit, u[:, 5] - 0.5, 0.0).astype(u.dtype)
    centre = xp.floor(u[:, 6:] * (xp.asarray(size) + 1)).astype(int)  # (B, 2)
    inside = []
    for axis, side in enumerate(size):
        place = xp.arange(side) - centre[:, axis : axis + 1] + side // 8
        inside.append((place >= 0) & (place < side // 4))
    box = inside[0][:, :, None] & inside[1][:, None] & cut[:, None, None]
    shift = xp.where(moved[:, None], shift, 0)
    return shift, brightness[:, None, None, None], 1.0 - box.astype(u.dtype)[..., None]


def _most_shift(side):
    """An eighth of a side, rounded."""
    return (side + 4) // 8


def _shifted(x, shift):
    """Each image moved by its (rows, cols), zeros behind it: the adjoint of the opposite way."""
    xp = array_module(x)
    (B, rows, cols), most = x.shape[:3], [_most_shift(side) for side in x.shape[1:3]]
    padded = xp.pad(x, ((0, 0), (most[0], most[0]), (most[1], most[1]), (0, 0)))
    row = xp.arange(rows) + most[0] - shift[:, :1]  # (B, rows)
    col = xp.arange(cols) + most[1] - shift[:, 1:]
    return padded[xp.arange(B)[:, None, None], row[:, :, None], col[:, None]]


def diffaugment_forward(images, drawn):
    """y = kept * shifted(images + brightness): linear but for brightness.

    images (B, height, width, C); drawn: of augmentation(). (Zhao et al. 2020, DiffAugment.)
    """
    shift, brightness, kept = drawn
    kept = kept.astype(images.dtype)
    return kept * _shifted(images + brightness.astype(images.dtype), shift), (shift, kept)


def diffaugment_backward(dy, cache):
    """dimages = dy, where it was seen, on its way back."""
    shift, kept = cache
    return _shifted(dy * kept, -shift)


def logistic_forward(scores, sign):
    """loss = mean of log(1 + exp(-sign scores)): sign 1 for what shall look real, -1 otherwise.

    scores (B,). The generator's loss is that of its images with sign 1: it does not saturate.
    """
    return array_module(scores).logaddexp(0.0 * scores, -sign * scores).mean(), (scores, sign)


def logistic_backward(dloss, cache):
    """dscores = -sign sigmoid(-sign scores) / B."""
    scores, sign = cache
    sigmoid = 0.5 - 0.5 * array_module(scores).tanh(0.5 * sign * scores)
    return dloss * -sign * sigmoid / len(scores)


def consistency_forward(plain, augmented):
    """loss = mean of (plain - augmented)^2: the scores of images and of the same ones augmented."""
    gap = plain - augmented
    return (gap * gap).mean(), gap


def consistency_backward(dloss, cache):
    """2 gap / B for the plain scores, and as much the other way for the augmented ones."""
    dplain = 2.0 * dloss * cache / len(cache)
    return dplain, -dplain


def critic_forward(images, params, config):
    """A score (B,) for each image (B, height, width, C), high where it looks real.

    Windows of two patches' side overlap; a class token reads them. Positions are *sines alone*.
    """
    xp, P = array_module(images), config.patch_size
    x, cache_patch = conv_forward(
        images, params["patch_embed.proj.weight"], params["patch_embed.proj.bias"], P, P // 2
    )  # (B, rows, cols, D)
    grid = places(*config.grid, x)
    pos, cache_pos = sine_forward(grid, params["pos.weight"], params["pos.bias"])
    x = x.reshape(len(x), *pos.shape) + pos
    tokens = xp.broadcast_to(params["cls_token"], (len(x), 1, x.shape[2]))
    x = xp.concatenate([tokens, x], axis=1)  # (B, 1 + N, D)
    attention, caches = ATTENTIONS[config.attention][0], []
    for i in range(config.depth):
        block = part(params, f"blocks.{i}.")
        attn, mlp = part(block, "attn."), part(block, "mlp.")
        x, cache1 = _branch_forward(
            x, lambda x, p=attn: attention(x, p, config.num_heads), part(block, "norm1."), None, 1
        )
        x = x[:, :1] if i == config.depth - 1 else x  # no other token is read again
        x, cache2 = _branch_forward(
            x, lambda x, p=mlp: mlp_forward(x, p), part(block, "norm2."), None, 1
        )
        caches.append((cache1, cache2))
    y, cache_norm = layernorm_forward(x, params["norm.weight"], params["norm.bias"])
    y, cache_head = linear_forward(y, params["head.weight"], params["head.bias"])  # (B, 1, 1)
    return y[:, 0, 0], (cache_patch, cache_pos, caches, cache_norm, cache_head, config)


def critic_backward(dy, cache, need_dimages=True):
    """Every layer in reverse, from the class token on. Returns dimages or None, and all grads."""
    cache_patch, cache_pos, caches, cache_norm, cache_head, config = cache
    xp, grads = array_module(dy), {}
    dx = dy[:, None, None]  # (B, 1, 1)
    dx, grads["head.weight"], grads["head.bias"] = linear_backward(dx, cache_head)
    dx, grads["norm.weight"], grads["norm.bias"] = layernorm_backward(dx, cache_norm)
    for i in reversed(range(config.depth)):
        cache1, cache2 = caches[i]
        dx, dmlp, dnorm2 = _branch_backward(dx, mlp_backward, cache2)
        if i == config.depth - 1:
            unread = xp.zeros((len(dx), config.num_patches, config.embed_dim), dx.dtype)
            dx = xp.concatenate([dx, unread], axis=1)  # (B, 1 + N, D)
        dx, dattn, dnorm1 = _branch_backward(dx, ATTENTIONS[config.attention][1], cache1)
        parts = {"norm1.": dnorm1, "attn.": dattn, "norm2.": dnorm2, "mlp.": dmlp}
        for name, dpart in parts.items():
            grads |= prefixed(dpart, f"blocks.{i}.{name}")
    grads["cls_token"] = dx[:, :1].sum(axis=0, keepdims=True)  # (1, 1, D)
    dpos = dx[:, 1:].sum(axis=0)  # (N, D)
    grads["pos.weight"], grads["pos.bias"] = sine_backward(dpos, cache_pos)
    dgrid = dx[:, 1:].reshape(len(dx), *config.grid, -1)
    dimages, dweight, dbias = conv_backward(dgrid, cache_patch, need_dimages)
    grads |= {"patch_embed.proj.weight": dweight, "patch_embed.proj.bias": dbias}
    return dimages, {name: grads[name] for name in critic_shapes(config)}


def generator_forward(z, params, config):
    """Images (B, height, width, C), from -1 to 1, of latent vectors z (B, latent_dim).

    Tokens begin as sines of their places, and w = map(z) modulates every LayerNorm. A pixel is made
    of sines of its place in the patch: weights modulated by the token, *the token added*, a GELU,
    three colours.
    """
    w, cache_map = mlp_forward(z, part(params, "map."))  # (B, D)
    grid = places(*config.grid, z)
    pos, cache_pos = sine_forward(grid, params["pos.weight"], params["pos.bias"])  # (N, D)
    x, caches = array_module(z).broadcast_to(pos, (len(z), *pos.shape)), []
    for i in range(config.depth):
        block = part(params, f"blocks.{i}.")
        h, cache1 = modulated_norm_forward(x, w, part(block, "norm1."))
        h, cache_attn = mhsa_forward(h, part(block, "attn."), config.num_heads)
        x = x + h
        h, cache2 = modulated_norm_forward(x, w, part(block, "norm2."))
        h, cache_mlp = mlp_forward(h, part(block, "mlp."))
        x = x + h
        caches.append((cache1, cache_attn, cache2, cache_mlp))
    x, cache_norm = modulated_norm_forward(x, w, part(params, "norm."))
    pixels, cache_pixels = _pixels_forward(x, params, config)
    return pixels, (cache_map, cache_pos, caches, cache_norm, cache_pixels, config)


def generator_backward(dimages, cache):
    """Every layer in reverse; w hears from every norm. Returns all grads, as z is no parameter."""
    cache_map, cache_pos, caches, cache_norm, cache_pixels, config = cache
    dx, grads = _pixels_backward(dimages, cache_pixels)
    dx, dw, dnorm = modulated_norm_backward(dx, cache_norm)
    grads |= prefixed(dnorm, "norm.")
    for i in reversed(range(config.depth)):
        cache1, cache_attn, cache2, cache_mlp = caches[i]
        dh, dmlp = mlp_backward(dx, cache_mlp)
        dh, dw2, dnorm2 = modulated_norm_backward(dh, cache2)
        dx = dx + dh
        dh, dattn = mhsa_backward(dx, cache_attn)
        dh, dw1, dnorm1 = modulated_norm_backward(dh, cache1)
        dx, dw = dx + dh, dw + dw1 + dw2
        parts = {"norm1.": dnorm1, "attn.": dattn, "norm2.": dnorm2, "mlp.": dmlp}
        for name, dpart in parts.items():
            grads |= prefixed(dpart, f"blocks.{i}.{name}")
    grads["pos.weight"], grads["pos.bias"] = sine_backward(dx.sum(axis=0), cache_pos)
    grads |= prefixed(mlp_backward(dw, cache_map)[1], "map.")
    return {name: grads[name] for name in generator_shapes(config)}


def _pixels_forward(x, params, config):
    """Each token (B, N, D) draws its patch."""
    P = config.patch_size
    within = places(P, P, x)
    sines, cache_sine = sine_forward(within, params["sine.weight"], params["sine.bias"])
    a, cache_style = linear_forward(x, params["style.weight"], params["style.bias"])
    h, cache_mod = modulated_linear_forward(sines, 1.0 + a, params["pixel.weight"])
    h, cache_gelu = gelu_forward(h + x[:, :, None])  # (B, N, P * P, D)
    h, cache_rgb = linear_forward(h, params["rgb.weight"], params["rgb.bias"])
    y = array_module(x).tanh(h)  # (B, N, P * P, C)
    images = y.reshape(len(x), *config.grid, P, P, -1).transpose(0, 1, 3, 2, 4, 5)
    caches = cache_sine, cache_style, cache_mod, cache_gelu, cache_rgb
    return images.reshape(len(x), *config.image, -1), (*caches, y, config)


def _pixels_backward(dimages, cache):
    """Back to the tokens, which hear by two ways. Returns dx (B, N, D) and grads."""
    cache_sine, cache_style, cache_mod, cache_gelu, cache_rgb, y, config = cache
    (rows, cols), P = config.grid, config.patch_size
    dy = dimages.reshape(len(y), rows, P, cols, P, -1).transpose(0, 1, 3, 2, 4, 5).reshape(y.shape)
    dh, drgb_weight, drgb_bias = linear_backward(dy * (1.0 - y * y), cache_rgb)
    dh = gelu_backward(dh, cache_gelu)
    dsines, da, dpixel = modulated_linear_backward(dh, cache_mod)
    dx, dstyle_weight, dstyle_bias = linear_backward(da, cache_style)
    dsine_weight, dsine_bias = sine_backward(dsines, cache_sine)
    grads = {"sine.weight": dsine_weight, "sine.bias": dsine_bias, "pixel.weight": dpixel}
    grads |= {"style.weight": dstyle_weight, "style.bias": dstyle_bias}
    return dx + dh.sum(axis=2), grads | {"rgb.weight": drgb_weight, "rgb.bias": drgb_bias}


def spectral_norms_forward(params, norms):
    """The parameters with each weight W named in norms replaced by norm * W / sigma(W).

    norms: name to the spectral norm, 1 for all in Miyato et al. 2018, sigma at the start in ViTGAN.
    A weight (out, ...) counts as a matrix of `out` rows. Done once a step, outside the networks.
    """
    replaced, caches = {}, {}
    for name, norm in norms.items():
        weight = params[name]
        y, caches[name] = spectral_forward(weight.reshape(len(weight), -1), norm)
        replaced[name] = y.reshape(weight.shape)
    return params | replaced, caches


def spectral_norms_backward(grads, caches):
    """The gradients with those of the replaced weights brought back to the weights."""
    back = {
        name: spectral_backward(grads[name].reshape(len(grads[name]), -1), cache)
        for name, cache in caches.items()
    }
    return grads | {name: dweight.reshape(grads[name].shape) for name, dweight in back.items()}


def spectral_names(config):
    """The critic's weights that images pass through: every matrix but that of positions."""
    shapes = prefixed(critic_shapes(config), "critic.")
    return [
        n for n, s in shapes.items() if n.endswith(".weight") and len(s) > 1 and ".pos." not in n
    ]


def _block_shapes(config, attention, norm):
    D, M = config.embed_dim, config.hidden_dim
    attn = {"qkv.weight": (3 * D, D)} if attention == "dot" else {"qv.weight": (2 * D, D)}
    attn |= {"proj.weight": (D, D), "proj.bias": (D,)}
    mlp = {"fc1.weight": (M, D), "fc1.bias": (M,), "fc2.weight": (D, M), "fc2.bias": (D,)}
    parts = {"norm1.": norm, "attn.": attn, "norm2.": norm, "mlp.": mlp}
    return {
        f"blocks.{i}.{prefix}{name}": shape
        for i in range(config.depth)
        for prefix, entries in parts.items()
        for name, shape in entries.items()
    }


def critic_shapes(config):
    """Name to shape of the critic's parameters."""
    D, side = config.embed_dim, 2 * config.patch_size
    norm = {"weight": (D,), "bias": (D,)}
    shapes = {"patch_embed.proj.weight": (D, config.in_chans, side, side)}
    shapes |= {"patch_embed.proj.bias": (D,), "cls_token": (1, 1, D)}
    shapes |= {"pos.weight": (D, 2), "pos.bias": (D,)}
    shapes |= _block_shapes(config, config.attention, norm) | prefixed(norm, "norm.")
    return shapes | {"head.weight": (1, D), "head.bias": (1,)}


def generator_shapes(config):
    """Name to shape of the generator's parameters."""
    D, C = config.embed_dim, config.in_chans
    norm = {"gamma.weight": (D, D), "gamma.bias": (D,), "beta.weight": (D, D), "beta.bias": (D,)}
    shapes = {"map.fc1.weight": (D, config.latent_dim), "map.fc1.bias": (D,)}
    shapes |= {"map.fc2.weight": (D, D), "map.fc2.bias": (D,)}
    shapes |= {"pos.weight": (D, 2), "pos.bias": (D,)}
    shapes |= _block_shapes(config, "dot", norm) | prefixed(norm, "norm.")
    shapes |= {"sine.weight": (D, 2), "sine.bias": (D,)}
    shapes |= {"style.weight": (D, D), "style.bias": (D,), "pixel.weight": (D, D)}
    return shapes | {"rgb.weight": (C, D), "rgb.bias": (C,)}


def gan_shapes(config):
    """Name to shape of every parameter, below critic. and generator."""
    shapes = prefixed(critic_shapes(config), "critic.")
    return shapes | prefixed(generator_shapes(config), "generator.")


def init_gan(config, seed=0):
    """Fresh parameters, float32: *weights N(0, 1 / fan in)*, those of sines and their phases
    U(-pi, pi), the class token N(0, 0.02^2), LayerNorms 1, biases 0."""
    rng, params = np.random.default_rng(seed), {}
    for name, shape in gan_shapes(config).items():
        owner = name.split(".")[-2]
        if owner in ("pos", "sine"):
            value = rng.uniform(-pi, pi, shape)
        elif name.endswith("cls_token"):
            value = rng.normal(0.0, 0.02, shape)
        elif len(shape) > 1:
            value = rng.normal(0.0, np.prod(shape[1:]) ** -0.5, shape)
        else:
            value = np.full(shape, float(name.endswith("weight")))
        params[name] = value.astype("float32")
    return params
