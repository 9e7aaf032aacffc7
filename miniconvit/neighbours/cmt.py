"""Convolutions in every part of a transformer (Guo et al. 2022: CMT).

A stem of three convolutions, then four stages, each on half the grid of the one before. A block
adds to a token what a filter finds around it, attends to a coarser grid, and filters inside its
feed-forward. Names, shapes and each norm's eps are those of the authors' code. Its dropout, its
drop path and its counters (num_batches_tracked) are not here.
"""

from dataclasses import dataclass, replace
from math import isqrt, nextafter

import numpy as np

from ..arrays import array_module
from ..config import from_fields, is_count, is_number
from ..errors import UserError
from ..layers import (
    gelu_backward,
    gelu_forward,
    layernorm_backward,
    layernorm_forward,
    linear_backward,
    linear_forward,
    merge_heads,
    softmax_backward,
    softmax_forward,
    split_heads,
)
from ..layers.block import _branch_backward, _branch_forward  # private to coursework's blanks alone
from ..layers.names import part, prefixed
from .conv import (
    batchnorm_backward,
    batchnorm_forward,
    conv_backward,
    conv_forward,
    depthwise_backward,
    depthwise_forward,
)

STAGES = "abcd"
GELU = gelu_forward, gelu_backward
PATCH_EPS = 1e-5  # of the LayerNorms after the patches; those of the blocks have 1e-6


@dataclass(frozen=True)
class CMTConfig:
    """Shape of a CMT, under the official names. A tuple has a number for each of 1 to 4 stages.

    sr_ratios: how much coarser the grid of keys and values is. local and ff_filter: whether blocks
    have the filter at their start, and the one in the feed-forward. Raises UserError where the
    numbers do not fit together.
    """

    img_size: int = 32
    in_chans: int = 3
    num_classes: int = 10
    stem_channel: int = 8
    embed_dims: tuple[int, ...] = (24, 32, 48, 64)
    depths: tuple[int, ...] = (1, 1, 2, 1)
    num_heads: tuple[int, ...] = (1, 2, 4, 4)
    sr_ratios: tuple[int, ...] = (2, 1, 1, 1)
    mlp_ratio: float = 2.0
    fc_dim: int = 96
    local: bool = True
    ff_filter: bool = True

    def __post_init__(self):
        if isinstance(self.img_size, list | tuple) and len(set(self.img_size)) == 1:
            object.__setattr__(self, "img_size", self.img_size[0])
        for name in ("img_size", "in_chans", "num_classes", "stem_channel", "fc_dim"):
            if not is_count(getattr(self, name), 1):
                raise UserError(f"{name} must be an integer of at least 1")
        for name in ("embed_dims", "depths", "num_heads", "sr_ratios"):
            values = getattr(self, name)
            values = tuple(values) if isinstance(values, list) else values  # as JSON has it
            object.__setattr__(self, name, values)
            if not isinstance(values, tuple) or not all(is_count(value, 1) for value in values):
                raise UserError(f"{name} must be integers of at least 1")
        widths = {len(values) for values in (self.embed_dims, self.depths, self.num_heads)}
        if widths != {len(self.sr_ratios)} or len(self.sr_ratios) not in range(1, 5):
            raise UserError("embed_dims, depths, num_heads and sr_ratios speak of 1 to 4 stages")
        if not (is_number(self.mlp_ratio) and all(M >= 1 for M in self.hidden_dims)):
            raise UserError(f"mlp_ratio must give at least one hidden unit, not {self.mlp_ratio}")
        if not all(isinstance(flag, bool) for flag in (self.local, self.ff_filter)):
            raise UserError("local and ff_filter must be true or false")
        pairs = zip(self.embed_dims, self.num_heads, strict=True)
        if any(D % H for D, H in pairs):
            raise UserError(f"embed_dims {self.embed_dims} must be multiples of {self.num_heads}")
        least = 2 ** (len(self.depths) + 1)
        if self.img_size % least or any(
            side % k for (side, _), k in zip(self.grids, self.sr_ratios, strict=True)
        ):
            raise UserError(
                f"a CMT of {len(self.depths)} stages takes images whose side is a multiple of "
                f"{least}, and grids that are multiples of sr_ratios: not {self.img_size} pixels"
            )

    @property
    def image(self):
        """(height, width) in pixels."""
        return self.img_size, self.img_size

    @property
    def grids(self):
        """(rows, cols) of each stage."""
        return [(self.img_size // 2 ** (i + 2),) * 2 for i in range(len(self.depths))]

    @property
    def hidden_dims(self):
        """Features inside the feed-forward of each stage."""
        return [int(D * self.mlp_ratio) for D in self.embed_dims]

    @property
    def depth(self):
        """Blocks in all stages."""
        return sum(self.depths)

    @property
    def rows(self):
        """Of a piece 1024: batch statistics of 32 to 64 images, which the last grid needs."""
        return 16

    @classmethod
    def from_dict(cls, values):
        """From plain types. Raises UserError on an unknown field."""
        return from_fields(cls, values)


def _official(img_size, dims, depths, stem, ratio):
    more = {"num_heads": (1, 2, 4, 8), "sr_ratios": (8, 4, 2, 1), "fc_dim": 1280}
    return CMTConfig(img_size, 3, 1000, stem, dims, depths, mlp_ratio=ratio, **more)


def _variants():
    micro = {
        "cmt_micro32": CMTConfig(),
        "cmt_micro64": CMTConfig(64, sr_ratios=(4, 2, 1, 1)),
    }
    without = {f"{name}_nolocal": replace(config, local=False) for name, config in micro.items()}
    without |= {
        f"{name}_nofilter": replace(config, ff_filter=False) for name, config in micro.items()
    }
    published = {
        "cmt_ti": _official(160, (46, 92, 184, 368), (2, 2, 10, 2), 16, 3.6),
        "cmt_xs": _official(192, (52, 104, 208, 416), (3, 3, 12, 3), 16, 3.77),
        "cmt_s": _official(224, (64, 128, 256, 512), (3, 3, 16, 3), 32, 4.0),
        "cmt_b": _official(256, (76, 152, 304, 608), (4, 4, 20, 4), 38, 4.0),
    }
    return published | micro | without


CMT_VARIANTS = _variants()
"""Name to configuration: the four of the authors' code at their sizes of images, one for images of
32 pixels and one for 64, and these without one of their filters."""


def _pointwise_forward(x, params):
    """A 1x1 convolution: a linear layer on the channels."""
    return linear_forward(x, params["weight"][:, :, 0, 0], params["bias"])


def _pointwise_backward(dy, cache):
    dx, dweight, dbias = linear_backward(dy, cache)
    return _named(dx, dweight[:, :, None, None], dbias)


def _named(dx, dweight, dbias):
    return dx, {"weight": dweight, "bias": dbias}


def silu_forward(x):
    """y = x g,  g = sigmoid(x)."""
    g = 0.5 + 0.5 * array_module(x).tanh(0.5 * x)
    return x * g, (x, g)


def silu_backward(dy, cache):
    """dx = dy g (1 + x (1 - g))."""
    x, g = cache
    return dy * (g * (1.0 + x * (1.0 - g)))


def cmt_attention_forward(x, params, relative_pos, num_heads, train):
    """y = proj(softmax(q k^T / sqrt d + relative_pos) v): k and v are of a coarser grid.

    x (B, rows, cols, D), relative_pos (H, N, M) a score for each place and each coarser one;
    params: q.*, k.*, v.*, proj.*, and sr.0.* and sr.1.* where M < N. Returns x's shape.
    """
    B, D = len(x), x.shape[-1]
    coarse, cache_coarse = x, None
    if "sr.0.weight" in params:
        weight = params["sr.0.weight"]
        coarse, cache_filter = depthwise_forward(
            x, weight, params["sr.0.bias"], stride=weight.shape[-1]
        )  # (B, rows / k, cols / k, D)
        coarse, cache_norm = batchnorm_forward(coarse, part(params, "sr.1."), train)
        cache_coarse = cache_filter, cache_norm
    heads, caches = {}, []
    for name, source in {"q": x, "k": coarse, "v": coarse}.items():
        rows = source.reshape(B, -1, D)  # (B, N, D) or (B, M, D)
        y, cache = linear_forward(rows, params[f"{name}.weight"], params[f"{name}.bias"])
        (heads[name],) = split_heads(y, 1, num_heads)  # (B, H, N, d) or (B, H, M, d)
        caches.append(cache)
    q, k, v = heads.values()
    scale = q.shape[-1] ** -0.5
    A, cache_softmax = softmax_forward(q @ k.swapaxes(-1, -2) * scale + relative_pos)
    out, cache_proj = linear_forward(merge_heads(A @ v), params["proj.weight"], params["proj.bias"])
    kept = cache_coarse, caches, cache_softmax, cache_proj, (q, k, v, A, scale)
    return out.reshape(x.shape), (*kept, x.shape, coarse.shape)


def cmt_attention_backward(dout, cache):
    """Back through proj and the attention; x hears as queries, and by the coarser grid.

    Returns dx (B, rows, cols, D) and grads with params' keys, and relative_pos's under its name.
    """
    cache_coarse, caches, cache_softmax, cache_proj, (q, k, v, A, scale), shape, coarse = cache
    dmerged, dweight, dbias = linear_backward(dout.reshape(len(dout), -1, shape[-1]), cache_proj)
    grads = {"proj.weight": dweight, "proj.bias": dbias}
    (dy,) = split_heads(dmerged, 1, q.shape[1])
    dscores = softmax_backward(dy @ v.swapaxes(-1, -2), cache_softmax)  # (B, H, N, M)
    grads["relative_pos"] = dscores.sum(axis=0)
    dS = dscores * scale
    back = {"q": dS @ k, "k": dS.swapaxes(-1, -2) @ q, "v": A.swapaxes(-1, -2) @ dy}
    dx = {}
    for (name, d), cache_linear in zip(back.items(), caches, strict=True):
        dx[name], grads[f"{name}.weight"], grads[f"{name}.bias"] = linear_backward(
            merge_heads(d), cache_linear
        )
    dcoarse = (dx["k"] + dx["v"]).reshape(coarse)
    if cache_coarse:
        cache_filter, cache_norm = cache_coarse
        dcoarse, dnorm = batchnorm_backward(dcoarse, cache_norm)
        dcoarse, dfilter = _named(*depthwise_backward(dcoarse, cache_filter))
        grads |= prefixed(dfilter, "sr.0.") | prefixed(dnorm, "sr.1.")
    return dx["q"].reshape(shape) + dcoarse, grads


def irffn_forward(x, params, train, gelu=GELU):
    """y = BN(conv2(BN(gelu(z + filter(z))))),  z = BN(gelu(conv1(x))): the feed-forward.

    x (B, rows, cols, D); params: conv1.0.*, conv1.2.*, proj.*, proj_bn.*, conv2.0.*, conv2.1.*.
    Without proj.* there is no filter. gelu: the pair to compute it by. Returns x's shape.
    """
    gelu_forward, gelu_backward = gelu
    z, cache_conv1 = _pointwise_forward(x, part(params, "conv1.0."))  # (B, rows, cols, M)
    z, cache_gelu1 = gelu_forward(z)
    z, cache_norm1 = batchnorm_forward(z, part(params, "conv1.2."), train)
    cache_filter = None
    if "proj.weight" in params:
        y, cache_filter = depthwise_forward(z, params["proj.weight"], params["proj.bias"], 1, 1)
        z = z + y
    y, cache_gelu2 = gelu_forward(z)
    y, cache_norm2 = batchnorm_forward(y, part(params, "proj_bn."), train)
    y, cache_conv2 = _pointwise_forward(y, part(params, "conv2.0."))  # (B, rows, cols, D)
    y, cache_norm3 = batchnorm_forward(y, part(params, "conv2.1."), train)
    before = cache_conv1, cache_gelu1, cache_norm1
    after = cache_gelu2, cache_norm2, cache_conv2, cache_norm3
    return y, (before, cache_filter, after, gelu_backward)


def irffn_backward(dy, cache):
    """Every step in reverse; z hears directly, and by the filter. Returns dx and grads by name."""
    before, cache_filter, after, gelu_backward = cache
    cache_conv1, cache_gelu1, cache_norm1 = before
    cache_gelu2, cache_norm2, cache_conv2, cache_norm3 = after
    dy, dnorm3 = batchnorm_backward(dy, cache_norm3)
    dy, dconv2 = _pointwise_backward(dy, cache_conv2)
    dy, dnorm2 = batchnorm_backward(dy, cache_norm2)
    dz = gelu_backward(dy, cache_gelu2)
    grads = prefixed(dnorm2, "proj_bn.") | prefixed(dconv2, "conv2.0.")
    grads |= prefixed(dnorm3, "conv2.1.")
    if cache_filter:
        dfiltered, dfilter = _named(*depthwise_backward(dz, cache_filter))
        dz = dz + dfiltered
        grads |= prefixed(dfilter, "proj.")
    dz, dnorm1 = batchnorm_backward(dz, cache_norm1)
    dx, dconv1 = _pointwise_backward(gelu_backward(dz, cache_gelu1), cache_conv1)
    return dx, grads | prefixed(dconv1, "conv1.0.") | prefixed(dnorm1, "conv1.2.")


def cmt_block_forward(x, params, relative_pos, num_heads, train, gelu=GELU):
    """x + filter(x), then x + attention(norm1(x)), then x + irffn(norm2(x)).

    x (B, rows, cols, D); params: proj.*, norm1.*, attn.*, norm2.*, mlp.*. Without proj.* there is
    no filter at the start.
    """
    attn, mlp, cache_filter = part(params, "attn."), part(params, "mlp."), None
    if "proj.weight" in params:
        y, cache_filter = depthwise_forward(x, params["proj.weight"], params["proj.bias"], 1, 1)
        x = x + y

    def attention(x):
        return cmt_attention_forward(x, attn, relative_pos, num_heads, train)

    x, cache1 = _branch_forward(x, attention, part(params, "norm1."), None, 1)
    x, cache2 = _branch_forward(
        x, lambda x: irffn_forward(x, mlp, train, gelu), part(params, "norm2."), None, 1
    )
    return x, (cache_filter, cache1, cache2)


def cmt_block_backward(dy, cache):
    """The three in reverse. Returns dx, and grads with params' keys and relative_pos."""
    cache_filter, cache1, cache2 = cache
    dx, dmlp, dnorm2 = _branch_backward(dy, irffn_backward, cache2)
    dx, dattn, dnorm1 = _branch_backward(dx, cmt_attention_backward, cache1)
    grads = {"relative_pos": dattn.pop("relative_pos")} | prefixed(dattn, "attn.")
    grads |= prefixed(dnorm1, "norm1.") | prefixed(dnorm2, "norm2.") | prefixed(dmlp, "mlp.")
    if cache_filter:
        dlocal, dfilter = _named(*depthwise_backward(dx, cache_filter))
        dx = dx + dlocal
        grads |= prefixed(dfilter, "proj.")
    return dx, grads


def _stem_forward(x, params, i, train, gelu):
    """BN(gelu(conv(x))), the first at stride 2."""
    conv = part(params, f"stem_conv{i}.")
    x, cache_conv = conv_forward(x, conv["weight"], conv["bias"], 2 if i == 1 else 1, 1)
    gelu_forward, gelu_backward = gelu
    x, cache_gelu = gelu_forward(x)
    x, cache_norm = batchnorm_forward(x, part(params, f"stem_norm{i}."), train)
    return x, (cache_conv, cache_gelu, cache_norm, gelu_backward)


def _stem_backward(dx, cache, i):
    cache_conv, cache_gelu, cache_norm, gelu_backward = cache
    dx, dnorm = batchnorm_backward(dx, cache_norm)
    dx = gelu_backward(dx, cache_gelu)
    dx, dconv = _named(*conv_backward(dx, cache_conv, need_dx=i > 1))
    return dx, prefixed(dconv, f"stem_conv{i}.") | prefixed(dnorm, f"stem_norm{i}.")


def _stage_forward(x, params, i, config, train, gelu):
    """Patches of 2x2 of the stage before, normalised, then blocks."""
    stage, H, caches = STAGES[i], config.num_heads[i], []
    proj, norm = (part(params, f"patch_embed_{stage}.{name}.") for name in ("proj", "norm"))
    x, cache_proj = conv_forward(x, proj["weight"], proj["bias"], 2)  # (B, rows / 2, cols / 2, D)
    x, cache_norm = layernorm_forward(x, norm["weight"], norm["bias"], PATCH_EPS)
    for j in range(config.depths[i]):
        block = part(params, f"blocks_{stage}.{j}.")
        x, cache = cmt_block_forward(x, block, params[f"relative_pos_{stage}"], H, train, gelu)
        caches.append(cache if train else None)
    return x, (cache_proj, cache_norm, caches)


def _stage_backward(dx, cache, i):
    """All blocks add to the one relative_pos of their stage."""
    (cache_proj, cache_norm, caches), stage, grads = cache, STAGES[i], {}
    dpos = 0.0
    for j in reversed(range(len(caches))):
        dx, dblock = cmt_block_backward(dx, caches[j])
        dpos = dpos + dblock.pop("relative_pos")
        grads |= prefixed(dblock, f"blocks_{stage}.{j}.")
    dx, dnorm = _named(*layernorm_backward(dx, cache_norm))
    dx, dproj = _named(*conv_backward(dx, cache_proj))
    grads |= {f"relative_pos_{stage}": dpos} | prefixed(dproj, f"patch_embed_{stage}.proj.")
    return dx, grads | prefixed(dnorm, f"patch_embed_{stage}.norm.")


def cmt_forward(images, params, config, train, blocks=None):
    """logits (B, C) = head(mean over the grid of silu(BN(fc(x)))),  x after stem and stages.

    images (B, in_chans, height, width). In training batches are normalised by themselves; else by
    the running statistics, and nothing is kept for a backward pass. blocks: as in convit_forward,
    for a faster GELU.
    """
    gelu = getattr(blocks, "gelu_pair", GELU)
    x, caches = images.transpose(0, 2, 3, 1), []  # (B, height, width, in_chans)
    for i in (1, 2, 3):
        x, cache = _stem_forward(x, params, i, train, gelu)
        caches.append(cache if train else None)
    for i in range(len(config.depths)):
        x, cache = _stage_forward(x, params, i, config, train, gelu)
        caches.append(cache if train else None)
    z, cache_fc = _pointwise_forward(x, part(params, "_fc."))  # (B, rows, cols, fc_dim)
    z, cache_norm = batchnorm_forward(z, part(params, "_bn."), train)
    z, cache_silu = silu_forward(z)
    logits, cache_head = linear_forward(
        z.mean(axis=(1, 2)), params["head.weight"], params["head.bias"]
    )
    return logits, (caches, (cache_fc, cache_norm, cache_silu, cache_head), config)


def cmt_backward(dlogits, cache):
    """Every layer in reverse. Returns all grads, and under running_* what these are off by."""
    caches, (cache_fc, cache_norm, cache_silu, cache_head), config = cache
    caches, grads = list(caches), {}
    dmean, grads["head.weight"], grads["head.bias"] = linear_backward(dlogits, cache_head)
    x, _ = cache_silu
    dz = dmean[:, None, None] / (x.shape[1] * x.shape[2])  # (B, 1, 1, fc_dim)
    dz, dnorm = batchnorm_backward(silu_backward(dz, cache_silu), cache_norm)
    dx, dfc = _pointwise_backward(dz, cache_fc)
    grads |= prefixed(dfc, "_fc.") | prefixed(dnorm, "_bn.")
    for i in reversed(range(len(config.depths))):
        dx, dstage = _stage_backward(dx, caches.pop(), i)
        grads |= dstage
    for i in (3, 2, 1):
        dx, dstem = _stem_backward(dx, caches.pop(), i)
        grads |= dstem
    return {name: grads[name] for name in cmt_shapes(config)}


def _conv(out, into, k):
    return {"weight": (out, into, k, k), "bias": (out,)}


def _norm(D):
    return {"weight": (D,), "bias": (D,)}


def _batchnorm(D):
    return _norm(D) | {"running_mean": (D,), "running_var": (D,)}


def _block_shapes(D, M, k, config):
    """Short name to shape of a block's parameters, in the official order."""
    linear = {"weight": (D, D), "bias": (D,)}
    parts = {"norm1.": _norm(D)}
    parts |= dict.fromkeys(("attn.q.", "attn.k.", "attn.v.", "attn.proj."), linear)
    if k > 1:
        parts |= {"attn.sr.0.": _conv(D, 1, k), "attn.sr.1.": _batchnorm(D)}
    parts |= {"norm2.": _norm(D), "mlp.conv1.0.": _conv(M, D, 1), "mlp.conv1.2.": _batchnorm(M)}
    parts |= {"mlp.proj.": _conv(M, 1, 3)} if config.ff_filter else {}
    parts |= {"mlp.proj_bn.": _batchnorm(M), "mlp.conv2.0.": _conv(D, M, 1)}
    parts |= {"mlp.conv2.1.": _batchnorm(D)}
    parts |= {"proj.": _conv(D, 1, 3)} if config.local else {}
    return {prefix + n: shape for prefix, of in parts.items() for n, shape in of.items()}


def cmt_shapes(config):
    """Name to shape of every parameter, running statistics among them, in the official order."""
    c, into, shapes = config, config.in_chans, {}
    stages = list(zip(STAGES, c.embed_dims, c.sr_ratios, strict=False))
    for (stage, _, k), (rows, cols), H in zip(stages, c.grids, c.num_heads, strict=True):
        shapes[f"relative_pos_{stage}"] = (H, rows * cols, rows * cols // k**2)
    for i in (1, 2, 3):
        shapes |= prefixed(_conv(c.stem_channel, into, 3), f"stem_conv{i}.")
        shapes |= prefixed(_batchnorm(c.stem_channel), f"stem_norm{i}.")
        into = c.stem_channel
    for stage, D, _ in stages:
        shapes |= prefixed(_conv(D, into, 2), f"patch_embed_{stage}.proj.")
        shapes |= prefixed(_norm(D), f"patch_embed_{stage}.norm.")
        into = D
    for (stage, D, k), M, depth in zip(stages, c.hidden_dims, c.depths, strict=True):
        for j in range(depth):
            shapes |= prefixed(_block_shapes(D, M, k, c), f"blocks_{stage}.{j}.")
    shapes |= prefixed(_conv(c.fc_dim, into, 1), "_fc.") | prefixed(_batchnorm(c.fc_dim), "_bn.")
    return shapes | {"head.weight": (c.num_classes, c.fc_dim), "head.bias": (c.num_classes,)}


def is_cmt(tensors):
    """Whether a dict by name is the state of the authors' CMT."""
    return "stem_conv1.weight" in tensors and "relative_pos_a" in tensors


def recognise_cmt(tensors):
    """The CMTConfig that the shapes of official tensors (a dict by name) tell. Raises UserError
    where they tell none."""
    stages = [stage for stage in STAGES if f"relative_pos_{stage}" in tensors]
    try:
        positions = [tensors[f"relative_pos_{stage}"].shape for stage in stages]
        shapes = [tensors[f"blocks_{stage}.0.mlp.conv1.0.weight"].shape for stage in stages]
        ratio, M, D = max((M / D, M, D) for M, D, _, _ in shapes)
        stem, in_chans = tensors["stem_conv1.weight"].shape[:2]
        classes, fc_dim = tensors["head.weight"].shape
        return CMTConfig(
            img_size=4 * isqrt(positions[0][1]),
            in_chans=in_chans,
            num_classes=classes,
            stem_channel=stem,
            embed_dims=tuple(len(tensors[f"patch_embed_{stage}.proj.bias"]) for stage in stages),
            depths=tuple(
                len({name.split(".")[1] for name in tensors if name.startswith(f"blocks_{stage}.")})
                for stage in stages
            ),
            num_heads=tuple(H for H, _, _ in positions),
            sr_ratios=tuple(isqrt(N // M) for _, N, M in positions),
            mlp_ratio=ratio if int(D * ratio) == M else nextafter(ratio, M),
            fc_dim=fc_dim,
            local="blocks_a.0.proj.weight" in tensors,
            ff_filter="blocks_a.0.mlp.proj.weight" in tensors,
        )
    except KeyError as error:
        raise UserError(f"the tensor {error.args[0]} is missing") from None
    except UserError as error:
        raise UserError(f"its shapes tell no CMT: {error}") from None
    except (ValueError, TypeError, ZeroDivisionError, IndexError) as error:
        raise UserError(f"its shapes tell no CMT ({error!r:.80})") from None


def init_cmt(config, seed=0):
    """Fresh parameters, float32, as in the authors' code: linear weights N(0, 0.02^2), filters
    N(0, 2 / (k^2 out)), relative positions N(0, 1), biases 0, norms 1 and 0."""
    rng = np.random.default_rng(seed)
    params = {}
    for name, shape in cmt_shapes(config).items():
        if len(shape) == 1:
            value = np.full(shape, float(name.endswith(("weight", "running_var"))))
        else:
            filters = (2.0 / (shape[0] * shape[-1] ** 2)) ** 0.5
            value = rng.normal(0.0, {2: 0.02, 3: 1.0, 4: filters}[len(shape)], shape)
        params[name] = value.astype("float32")
    return params
