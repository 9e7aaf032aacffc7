"""A small vision transformer that sees an image in patches of several sizes at once.

After Chen et al. 2021, "Exploring and Improving Mobile Level Vision Transformers". A convolutional
stem feeds branches, inverted residuals at different strides. Their grids of tokens all stand in one
sequence. In place of a class token, a weighted sum of the tokens is classified. The authors have
released no code. A star (*) marks what the paper leaves open and we chose.
"""

from dataclasses import dataclass

import numpy as np

from .. import layers
from ..arrays import array_module
from ..config import as_pair, from_fields, is_count
from ..errors import UserError
from ..layers import (
    layernorm_backward,
    layernorm_forward,
    linear_backward,
    linear_forward,
    mlp_backward,
    mlp_forward,
    patch_embed_backward,
    patch_embed_forward,
)
from ..layers.names import part, prefixed
from .conv import (
    batchnorm_backward,
    batchnorm_forward,
    conv_backward,
    conv_forward,
    depthwise_backward,
    depthwise_forward,
)


@dataclass(frozen=True)
class MobileConfig:
    """Shape of such a network; every number is ours (*).

    stem: conv, or patches of patch_size, as in a ViT, for which strides and the widths of the
    convolutions do not count. strides: of the branches, on the stem's grid, which is half as fine
    as the image. readout: class_token, mean or fusion. Raises UserError where the numbers do not
    fit together.
    """

    stem: str = "conv"
    readout: str = "fusion"
    strides: tuple[int, ...] = (2, 4, 16)
    img_size: int | tuple[int, int] = 32
    patch_size: int = 4
    in_chans: int = 3
    num_classes: int = 10
    embed_dim: int = 48
    depth: int = 4
    num_heads: int = 4
    hidden_dim: int = 96
    stem_dims: tuple[int, int] = (12, 24)
    expand_dim: int = 48
    squeeze_dim: int = 12
    fusion_dim: int = 24

    def __post_init__(self):
        for name in ("strides", "stem_dims", "img_size"):
            if isinstance(getattr(self, name), list):  # as JSON has it
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.stem not in ("conv", "patches") or self.readout not in READOUTS:
            raise UserError(
                f"there is no stem {self.stem!r:.80} with a read-out {self.readout!r:.80}"
            )
        for name in ("patch_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads",
                     "hidden_dim", "expand_dim", "squeeze_dim", "fusion_dim"):  # fmt: skip
            if not is_count(getattr(self, name), 1):
                raise UserError(f"{name} must be an integer of at least 1")
        if self.embed_dim % self.num_heads:
            raise UserError("embed_dim must be as many equal parts as heads")
        if not (self.strides and all(is_count(stride, 2) for stride in self.strides)):
            raise UserError("strides must be integers of at least 2")
        if len(self.stem_dims) != 2 or not all(is_count(width, 1) for width in self.stem_dims):
            raise UserError("stem_dims must be two integers of at least 1")
        if len(self.image) != 2 or not all(is_count(side, 1) for side in self.image):
            raise UserError("img_size must be one or two integers of at least 1")
        cells = self._cells
        if any(side % cell for side in self.image for cell in cells):
            raise UserError(
                f"images of {self.image[0]}x{self.image[1]} pixels cannot be cut into cells of "
                f"{', '.join(map(str, cells))} pixels: choose sides that are multiples of them"
            )

    @property
    def image(self):
        """(height, width) in pixels."""
        return as_pair(self.img_size)

    @property
    def _cells(self):
        """Pixels a side of the tokens of each grid."""
        return [self.patch_size] if self.stem == "patches" else [2 * s for s in self.strides]

    @property
    def grids(self):
        """[(rows, cols)] of the tokens: of the patches, or of each branch."""
        return [(self.image[0] // cell, self.image[1] // cell) for cell in self._cells]

    @property
    def num_tokens(self):
        """N: tokens of all grids, without a class token."""
        return sum(rows * cols for rows, cols in self.grids)

    @property
    def rows(self):
        """Of a piece 1024: batch statistics of 32 to 64 images, as a grid may have one token."""
        return 16

    @classmethod
    def from_dict(cls, values):
        """From plain types. Raises UserError on an unknown field."""
        return from_fields(cls, values)


def hardswish_forward(x):
    """y = x * gate,  gate = min(max(x + 3, 0), 6) / 6 (Howard et al. 2019).

    Our choice (*) wherever the convolutions need an activation.
    """
    gate = array_module(x).clip(x + 3.0, 0.0, 6.0) * (1 / 6)
    return x * gate, (x, gate)


def hardswish_backward(dy, cache):
    """dx = dy * (gate + x / 6 where the gate moves)."""
    x, gate = cache
    moves = (x > -3.0) & (x < 3.0)
    return dy * (gate + x * moves * (1 / 6))


def _sigmoid(z):
    return 0.5 + 0.5 * array_module(z).tanh(0.5 * z)


def squeeze_excite_forward(x, params):
    """y = x * e,  e = sigmoid(mlp(mean of x over the grid)): a gate for each channel of each image.

    x (B, rows, cols, C); params: those of an MLP from C to C, whose GELU is ours (*). (Hu et al.
    2018.)
    """
    z, cache_mlp = mlp_forward(x.mean(axis=(1, 2)), params)  # (B, C)
    e = _sigmoid(z)
    return x * e[:, None, None], (x, e, cache_mlp)


def squeeze_excite_backward(dy, cache):
    """dx = dy * e + what comes back through the mean;  de = sum of dy * x over the grid.

    Returns dx (B, rows, cols, C) and grads with params' keys.
    """
    x, e, cache_mlp = cache
    de = (dy * x).sum(axis=(1, 2))  # (B, C)
    dmean, grads = mlp_backward(de * e * (1.0 - e), cache_mlp)
    places = x.shape[1] * x.shape[2]
    return dy * e[:, None, None] + dmean[:, None, None] / places, grads


def _filtered_forward(x, params, stride, train):
    """A filter for each channel between two activations, then a linear layer; each is normalised.

    Squeeze-excite stands before the linear layer where params have it. The padding is 1. What a
    BatchNorm follows has no bias (*): its gradient would be 0, and Adam would move it by round-off.
    """
    x, cache_bn1 = batchnorm_forward(x, part(params, "bn1."), train)
    x, cache_act1 = hardswish_forward(x)
    x, cache_filter = depthwise_forward(x, params["depthwise.weight"], 0.0, stride, 1)
    x, cache_bn2 = batchnorm_forward(x, part(params, "bn2."), train)
    x, cache_act2 = hardswish_forward(x)
    cache_se = None
    if "se.fc1.weight" in params:
        x, cache_se = squeeze_excite_forward(x, part(params, "se."))
    x, cache_project = linear_forward(x, params["project.weight"])
    x, cache_bn3 = batchnorm_forward(x, part(params, "bn3."), train)
    caches = cache_bn1, cache_act1, cache_filter, cache_bn2, cache_act2, cache_se
    return x, (*caches, cache_project, cache_bn3)


def _filtered_backward(dy, cache):
    """Everything in reverse. Returns dx and grads with params' keys."""
    (cache_bn1, cache_act1, cache_filter, cache_bn2, cache_act2, cache_se, cache_project,
     cache_bn3) = cache  # fmt: skip
    dx, dbn3 = batchnorm_backward(dy, cache_bn3)
    dx, dproject, _ = linear_backward(dx, cache_project)
    grads = {"project.weight": dproject} | prefixed(dbn3, "bn3.")
    if cache_se is not None:
        dx, dse = squeeze_excite_backward(dx, cache_se)
        grads |= prefixed(dse, "se.")
    dx, dbn2 = batchnorm_backward(hardswish_backward(dx, cache_act2), cache_bn2)
    dx, grads["depthwise.weight"], _ = depthwise_backward(dx, cache_filter)
    dx, dbn1 = batchnorm_backward(hardswish_backward(dx, cache_act1), cache_bn1)
    return dx, grads | prefixed(dbn2, "bn2.") | prefixed(dbn1, "bn1.")


def branch_forward(x, params, stride, train):
    """Tokens of one grid: widen, filter at a stride, squeeze-excite, narrow.

    An inverted residual (Sandler et al. 2018) without the residual, as the grid changes. x (B,
    rows, cols, C); params: expand.weight, bn1.*, depthwise.*, bn2.*, se.*, project.weight, bn3.*.
    The filter has stride + 1 places a side (*): its window is a token's cell and one place above
    and to the left. Returns (B, N, D), N = rows * cols / stride^2.
    """
    x, cache_expand = linear_forward(x, params["expand.weight"])
    x, cache = _filtered_forward(x, params, stride, train)  # (B, rows / stride, cols / stride, D)
    return x.reshape(len(x), -1, x.shape[-1]), (cache_expand, cache, x.shape)


def branch_backward(dy, cache):
    """The layers in reverse. Returns dx (B, rows, cols, C) and grads with params' keys."""
    cache_expand, cache, shape = cache
    dx, grads = _filtered_backward(dy.reshape(shape), cache)
    dx, dexpand, _ = linear_backward(dx, cache_expand)
    return dx, grads | {"expand.weight": dexpand}


def fusion_forward(x, params):
    """y = sum over tokens of a_n g_n x_n,  g = sigmoid(mlp(x)): weights for place and content.

    x (B, N, D); params: weight (N,), which is a, the same for all images; fc1.*, fc2.* of an MLP
    from D to 1. That it sees a token alone, the sigmoid, and that nothing is normalised, is ours
    (*). Returns (B, D).
    """
    z, cache_mlp = mlp_forward(x, params)
    g = _sigmoid(z)  # (B, N, 1)
    w = params["weight"][:, None] * g
    return (w * x).sum(axis=1), (x, g, w, params["weight"], cache_mlp)


def fusion_backward(dy, cache):
    """dx = w dy + what comes back through the MLP;  dw = x . dy;  da = sum of dw g over images.

    Returns dx (B, N, D) and grads with params' keys.
    """
    x, g, w, weight, cache_mlp = cache
    dw = (x * dy[:, None]).sum(axis=-1, keepdims=True)  # (B, N, 1)
    dz = dw * weight[:, None] * g * (1.0 - g)
    dx, grads = mlp_backward(dz, cache_mlp)
    return dx + w * dy[:, None], grads | {"weight": (dw * g).sum(axis=(0, 2))}


def _first_forward(x, params):
    return x[:, 0], x.shape


def _first_backward(dy, shape):
    dx = array_module(dy).zeros(shape, dy.dtype)
    dx[:, 0] = dy
    return dx, {}


def _mean_forward(x, params):
    return x.mean(axis=1), x.shape


def _mean_backward(dy, shape):
    dx = array_module(dy).zeros(shape, dy.dtype)
    dx += dy[:, None] / shape[1]
    return dx, {}


READOUTS = {
    "class_token": (_first_forward, _first_backward),
    "mean": (_mean_forward, _mean_backward),
    "fusion": (fusion_forward, fusion_backward),
}
"""What of the tokens (B, N, D) is classified, (B, D), to its forward (x, params) and backward."""


def _tokens_forward(images, params, config, train):
    """The tokens of all grids, one after the other: (B, N, D)."""
    if config.stem == "patches":
        weight, bias = params["patch_embed.proj.weight"], params["patch_embed.proj.bias"]
        return patch_embed_forward(images, weight, bias, config.patch_size)
    x = images.transpose(0, 2, 3, 1)  # (B, height, width, C)
    x, cache_conv = conv_forward(x, params["stem.conv.weight"], None, 2, 1)
    x, cache_stem = _filtered_forward(x, part(params, "stem."), 1, train)
    x, cache_act = hardswish_forward(x)
    tokens, caches = [], []
    for i, stride in enumerate(config.strides):
        y, cache = branch_forward(x, part(params, f"branches.{i}."), stride, train)
        tokens.append(y)
        caches.append((y.shape[1], cache))
    return array_module(x).concatenate(tokens, axis=1), (cache_conv, cache_stem, cache_act, caches)


def _tokens_backward(dx, cache, config):
    """Each branch hears of its own tokens, and the stem of all. Returns grads."""
    if config.stem == "patches":
        _, dweight, dbias = patch_embed_backward(dx, cache, need_dimages=False)
        return {"patch_embed.proj.weight": dweight, "patch_embed.proj.bias": dbias}
    cache_conv, cache_stem, cache_act, caches = cache
    grads, dgrid, start = {}, 0.0, 0
    for i, (count, cache_branch) in enumerate(caches):
        dbranch, dparams = branch_backward(dx[:, start : start + count], cache_branch)
        dgrid = dgrid + dbranch
        start += count
        grads |= prefixed(dparams, f"branches.{i}.")
    dgrid, dstem = _filtered_backward(hardswish_backward(dgrid, cache_act), cache_stem)
    _, dstem["conv.weight"], _ = conv_backward(dgrid, cache_conv, need_dx=False)
    return grads | prefixed(dstem, "stem.")


def mobile_forward(images, params, config, train=False, blocks=layers):
    """logits = head(readout(norm(blocks(tokens + pos_embed)))).

    images (B, in_chans, height, width), in the dtype of the parameters. The blocks are ConViT's
    with plain attention, without a bias for q, k and v (*). With train=False the BatchNorms take
    their running statistics, and there is no way back. blocks: as in convit_forward. Returns
    logits (B, num_classes) and the cache.
    """
    x, cache_tokens = _tokens_forward(images, params, config, train)
    x = x + params["pos_embed"]
    if config.readout == "class_token":
        xp = array_module(x)
        cls_token = xp.broadcast_to(params["cls_token"], (len(x), 1, x.shape[2]))
        x = xp.concatenate([cls_token, x], axis=1)  # (B, 1 + N, D)
    caches = []
    for i in range(config.depth):
        block = part(params, f"blocks.{i}.")
        x, cache = blocks.block_forward(x, block, config.num_heads, None)
        caches.append(cache)
    x, cache_norm = layernorm_forward(x, params["norm.weight"], params["norm.bias"])
    x, cache_read = READOUTS[config.readout][0](x, part(params, "fusion."))  # (B, D)
    logits, cache_head = linear_forward(x, params["head.weight"], params["head.bias"])
    return logits, (cache_tokens, caches, cache_norm, cache_read, cache_head, config, blocks)


def mobile_backward(dlogits, cache):
    """Every layer in reverse. Returns the gradient of each parameter under its name.

    Of the running statistics it is what they are off by, see batchnorm_backward.
    """
    cache_tokens, caches, cache_norm, cache_read, cache_head, config, blocks = cache
    grads = {}
    dx, grads["head.weight"], grads["head.bias"] = linear_backward(dlogits, cache_head)
    dx, dread = READOUTS[config.readout][1](dx, cache_read)
    grads |= prefixed(dread, "fusion.")
    dx, grads["norm.weight"], grads["norm.bias"] = layernorm_backward(dx, cache_norm)
    for i in reversed(range(config.depth)):
        dx, dblock = blocks.block_backward(dx, caches[i])
        grads |= prefixed(dblock, f"blocks.{i}.")
    if config.readout == "class_token":
        grads["cls_token"] = dx[:, :1].sum(axis=0, keepdims=True)  # (1, 1, D)
        dx = dx[:, 1:]  # (B, N, D)
    grads["pos_embed"] = dx.sum(axis=0, keepdims=True)  # (1, N, D)
    grads |= _tokens_backward(dx, cache_tokens, config)
    return {name: grads[name] for name in mobile_shapes(config)}


def _norm(width):
    return {"weight": (width,), "bias": (width,)}


def _batchnorm(width):
    return _norm(width) | {"running_mean": (width,), "running_var": (width,)}


def _mlp(width, hidden, out):
    weights = {"fc1.weight": (hidden, width), "fc1.bias": (hidden,)}
    return weights | {"fc2.weight": (out, hidden), "fc2.bias": (out,)}


def _filtered(inside, out, k):
    """Name to shape of what _filtered_forward needs, but for squeeze-excite."""
    shapes = prefixed(_batchnorm(inside), "bn1.") | {"depthwise.weight": (inside, 1, k, k)}
    shapes |= prefixed(_batchnorm(inside), "bn2.") | {"project.weight": (out, inside)}
    return shapes | prefixed(_batchnorm(out), "bn3.")


def branch_shapes(config, stride):
    """Name to shape of a branch's parameters."""
    inside = config.expand_dim
    shapes = {"expand.weight": (inside, config.stem_dims[1])}
    shapes |= _filtered(inside, config.embed_dim, stride + 1)
    return shapes | prefixed(_mlp(inside, config.squeeze_dim, inside), "se.")


def mobile_shapes(config):
    """Name to shape of every parameter."""
    D = config.embed_dim
    if config.stem == "patches":
        P = config.patch_size
        shapes = {"patch_embed.proj.weight": (D, config.in_chans, P, P)}
        shapes["patch_embed.proj.bias"] = (D,)
    else:
        inside, out = config.stem_dims
        shapes = {"stem.conv.weight": (inside, config.in_chans, 3, 3)}
        shapes |= prefixed(_filtered(inside, out, 3), "stem.")
        for i, stride in enumerate(config.strides):
            shapes |= prefixed(branch_shapes(config, stride), f"branches.{i}.")
    shapes["pos_embed"] = (1, config.num_tokens, D)
    if config.readout == "class_token":
        shapes["cls_token"] = (1, 1, D)
    attn = {"qkv.weight": (3 * D, D), "proj.weight": (D, D), "proj.bias": (D,)}
    mlp = _mlp(D, config.hidden_dim, D)
    parts = {"norm1.": _norm(D), "attn.": attn, "norm2.": _norm(D), "mlp.": mlp}
    for i in range(config.depth):
        for name, entries in parts.items():
            shapes |= prefixed(entries, f"blocks.{i}.{name}")
    shapes |= prefixed(_norm(D), "norm.")
    if config.readout == "fusion":
        shapes["fusion.weight"] = (config.num_tokens,)
        shapes |= prefixed(_mlp(D, config.fusion_dim, 1), "fusion.")
    return shapes | {"head.weight": (config.num_classes, D), "head.bias": (config.num_classes,)}


def multiplications(config):
    """Of one image's forward pass, in matrix products and filters: each weight at so many places,
    and attention's two products."""
    fine = config.image[0] * config.image[1] // 4  # places of the stem's grid
    tokens = config.num_tokens + (config.readout == "class_token")
    places = {"stem.": fine, "patch_embed.": config.num_tokens, "fusion.": tokens}
    places |= {"blocks.": tokens, "head.": 1}
    for i, (rows, cols) in enumerate(config.grids):
        branch = f"branches.{i}."
        places |= {f"{branch}expand.": fine, f"{branch}se.": 1}
        places |= {f"{branch}{name}.": rows * cols for name in ("depthwise", "project")}
    count = 2 * config.depth * tokens**2 * config.embed_dim
    for name, shape in mobile_shapes(config).items():
        if len(shape) in (2, 4):
            (times,) = (times for prefix, times in places.items() if name.startswith(prefix))
            count += int(np.prod(shape)) * times
    return count


def init_mobile(config, seed=0):
    """Fresh parameters, float32 (*): convolutions N(0, 2 / fan in), other weights N(0, 0.02^2).

    Biases are 0, norms 1 and 0. The weights of the fusion begin so that it is the mean of tokens.
    """
    rng = np.random.default_rng(seed)
    params = {}
    for name, shape in mobile_shapes(config).items():
        if name == "fusion.weight":
            value = np.full(shape, 2.0 / config.num_tokens)  # times a sigmoid of about 1/2
        elif len(shape) == 1:
            value = np.full(shape, float(name.endswith(("weight", "running_var"))))
        elif len(shape) == 4 or name.endswith(("expand.weight", "project.weight")):
            value = rng.normal(0.0, (2.0 / np.prod(shape[1:])) ** 0.5, shape)
        else:
            value = rng.normal(0.0, 0.02, shape)
        params[name] = value.astype("float32")
    return params


_STEMS = {"patches": {"stem": "patches"}, "conv": {"strides": (2,)}, "grids": {}}
"""For 32 px images: patches of 4 pixels, a grid of 8x8 after convolutions, or 8x8 + 4x4 + 1x1."""
MOBILES = {
    f"mobile_micro32_{stem}_{readout}": MobileConfig(readout=readout, **fields)
    for stem, fields in _STEMS.items()
    for readout in READOUTS
}
MOBILES["mobile_micro32"] = MOBILES.pop("mobile_micro32_grids_fusion")
"""Name to configuration: the whole system, and what lacks some part of it."""
