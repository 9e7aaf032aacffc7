"""The cases of the papers beside ConViT, drawn as those of the lesson are."""

import numpy as np

from ..layers.names import part
from ..neighbours.cmt import CMTConfig, cmt_shapes
from ..neighbours.gan import (
    ATTENTIONS,
    GANConfig,
    augmentation,
    critic_shapes,
    generator_shapes,
)
from ..neighbours.isotropic import MIXERS, IsotropicConfig, isotropic_shapes
from ..neighbours.mobile import MobileConfig, branch_shapes, mobile_shapes
from ..optim import is_running
from .drawing import APART, TALL, Case, at_every_size, composite, draw, draw_params, far_from_zero


def _l2_attention(rng, functions, s):
    inputs = draw(rng, q=s.branch, v=s.branch)
    yield Case(functions.l2_attention_forward, functions.l2_attention_backward, inputs)


def _tied_attention(rng, functions, s, name="tied_attention"):
    shapes = {"qv.weight": (2 * s.dim, s.dim), "proj.weight": (s.dim, s.dim)}
    yield composite(name, functions, rng, shapes | {"proj.bias": (s.dim,)}, s.x, s.heads)


def _kim_attention(rng, functions, s):
    yield from _tied_attention(rng, functions, s, "kim_attention")


def _spectral(rng, functions, s):
    inputs = draw(rng, weight=(s.hidden, s.dim))
    yield Case(
        lambda weight: functions.spectral_forward(weight, 2.5), functions.spectral_backward, inputs
    )


def _cosine(rng, functions, s):
    yield Case(functions.cosine_forward, functions.cosine_backward, draw(rng, h=s.x))


def _contrastive(rng, functions, s):
    first = rng.standard_normal(s.x)
    yield Case(
        lambda h: functions.contrastive_forward(h, first.astype(h.dtype)),
        functions.contrastive_backward,
        draw(rng, h=s.x),
    )


def _patch_mixing(rng, functions, s):
    labels = rng.integers(s.classes, size=s.x[:2])
    yield Case(
        lambda h, weight, bias: functions.patch_mixing_forward(h, weight, bias, labels),
        functions.patch_mixing_backward,
        draw(rng, h=s.x, weight=(s.classes, s.dim), bias=(s.classes,)),
    )


def _filters(s):
    """(x's shape, k, stride, padding): k even and odd, windows that overlap, touch and miss."""
    x = s.B, s.grid[0] * s.patch[0], s.grid[1] * s.patch[1], s.dim
    yield from ((x, 3, 1, 1), (x, 3, 2, 1), (x, 2, 2, 0), (x, 1, 2, 0))


def _conv(rng, functions, s):
    for shape, k, stride, padding in _filters(s):
        inputs = draw(rng, x=shape, weight=(s.hidden, s.dim, k, k))
        bias = draw(rng, bias=(s.hidden,)) if stride == 2 else {}
        yield Case(
            lambda *, stride=stride, padding=padding, **inputs: functions.conv_forward(
                **inputs, stride=stride, padding=padding
            ),
            functions.conv_backward,
            inputs | bias,
        )


def _depthwise(rng, functions, s):
    for shape, k, stride, padding in _filters(s):
        yield Case(
            lambda x, weight, bias, stride=stride, padding=padding: functions.depthwise_forward(
                x, weight, bias, stride, padding
            ),
            functions.depthwise_backward,
            draw(rng, x=shape, weight=(s.dim, 1, k, k), bias=(s.dim,)),
        )


def _batchnorm(rng, functions, s):
    """In training. What running_* are off by is no gradient, and stays here."""
    running = draw(rng, running_mean=(s.dim,), running_var=(s.dim,))

    def backward(dy, cache):
        dx, grads = functions.batchnorm_backward(dy, cache)
        return {"x": dx, "weight": grads["weight"], "bias": grads["bias"]}

    def forward(x, **params):
        cast = {name: value.astype(x.dtype) for name, value in running.items()}
        return functions.batchnorm_forward(x, params | cast, True)

    yield Case(
        forward,
        backward,
        draw(rng, x=(s.B, *s.grid, s.dim), weight=(s.dim,), bias=(s.dim,)),
    )


def _token_conv(rng, functions, s):
    shapes = {"depthwise.weight": (s.dim, 1, 3, 3), "depthwise.bias": (s.dim,)}
    shapes |= {"proj.weight": (s.dim, s.dim), "proj.bias": (s.dim,)}
    yield composite("token_conv", functions, rng, shapes, s.x, s.grid)


def _token_mlp(rng, functions, s):
    shapes = {"fc1.weight": (s.hidden, s.tokens), "fc1.bias": (s.hidden,)}
    shapes |= {"fc2.weight": (s.tokens, s.hidden), "fc2.bias": (s.tokens,)}
    yield composite("token_mlp", functions, rng, shapes, s.x)


def _hidden(rng, B, N):
    """A mask (B, N): some patches of each image are hidden, never all, others in each."""
    return (
        rng.permuted(np.arange(N) < max(1, N // 2), axis=0)[None] ^ (np.arange(B) % 2 == 1)[:, None]
    )


def _masked_loss(rng, functions, s):
    mask, patches = _hidden(rng, s.B, s.tokens), rng.standard_normal(s.x)
    yield Case(
        lambda predicted: functions.masked_loss_forward(
            predicted, patches.astype(predicted.dtype), mask
        ),
        functions.masked_loss_backward,
        draw(rng, predicted=s.x),
    )


def _isotropic(rng, functions, s):
    """Whole networks with each mixer. A bias that all readers normalise away has no gradient."""
    for mixer in MIXERS if s is APART else ["conv"]:
        config = IsotropicConfig(
            mixer, 0.5, img_size=6, patch_size=2,
            in_chans=s.channels, embed_dim=s.dim, depth=2, num_heads=s.heads, hidden_dim=s.hidden,
            token_dim=5,
        )  # fmt: skip
        images = rng.standard_normal((s.B, config.in_chans, 6, 6))
        mask = _hidden(rng, s.B, config.num_patches)
        inputs = draw_params(rng, isotropic_shapes(config))
        zero = [name for name in inputs if name.endswith(("pos_proj.bias", "mix.fc2.bias"))]

        def forward(images=images, config=config, mask=mask, **params):
            images = images.astype(params["head.bias"].dtype)
            return functions.isotropic_forward(images, params, config, mask)

        yield Case(forward, functions.isotropic_backward, inputs, tuple(zero))


def _sine(rng, functions, s):
    x = rng.standard_normal((s.tokens, 2))
    yield Case(
        lambda weight, bias: functions.sine_forward(x.astype(weight.dtype), weight, bias),
        functions.sine_backward,
        draw(rng, weight=(s.dim, 2), bias=(s.dim,)),
    )


def _modulated_norm(rng, functions, s):
    shapes = {"gamma.weight": (s.dim, s.dim), "gamma.bias": (s.dim,)}
    shapes |= {"beta.weight": (s.dim, s.dim), "beta.bias": (s.dim,)}
    inputs = draw(rng, x=s.x, w=(s.B, s.dim)) | draw_params(rng, shapes)

    def backward(dy, cache):
        dx, dw, grads = functions.modulated_norm_backward(dy, cache)
        return {"x": dx, "w": dw} | grads

    yield Case(
        lambda x, w, **params: functions.modulated_norm_forward(x, w, params), backward, inputs
    )


def _modulated_linear(rng, functions, s):
    inputs = draw(rng, x=(s.tokens + 1, s.dim), a=s.x, weight=(s.hidden, s.dim))
    yield Case(functions.modulated_linear_forward, functions.modulated_linear_backward, inputs)


def _diffaugment(rng, functions, s):
    """Images are moved, each in its own way, and a box is cut out of one."""
    size = 8 * s.patch[0], 8 * s.patch[1]
    shift = rng.permuted(np.tile(np.arange(s.B) % 3 - 1, (2, 1)), axis=1).T  # (B, 2)
    brightness = rng.standard_normal((s.B, 1, 1, 1))
    kept = np.ones((s.B, *size, 1))
    kept[1, 1:5, 2:9] = 0.0
    yield Case(
        lambda images: functions.diffaugment_forward(images, (shift, brightness, kept)),
        functions.diffaugment_backward,
        draw(rng, images=(s.B, *size, s.channels)),
    )


def _logistic(rng, functions, s):
    for sign in (1, -1):
        yield Case(
            lambda scores, sign=sign: functions.logistic_forward(scores, sign),
            functions.logistic_backward,
            {"scores": far_from_zero(rng, (s.B,))},
        )


def _consistency(rng, functions, s):
    inputs = draw(rng, plain=(s.B,), augmented=(s.B,))
    yield Case(functions.consistency_forward, functions.consistency_backward, inputs)


def _gan_config(s, attention="l2"):
    """Networks of two blocks on a small grid: wide, tall or square."""
    return GANConfig(
        attention, img_size=tuple(2 * side for side in s.grid), patch_size=2,
        in_chans=s.channels, embed_dim=s.dim, depth=2, num_heads=s.heads, hidden_dim=s.hidden,
        latent_dim=3,
    )  # fmt: skip


def _critic(rng, functions, s):
    for attention in ATTENTIONS if s is APART else ["l2"]:
        config = _gan_config(s, attention)
        inputs = draw(rng, images=(s.B, *config.image, s.channels))

        def backward(dy, cache):
            dimages, grads = functions.critic_backward(dy, cache)
            return {"images": dimages} | grads

        yield Case(
            lambda images, config=config, **params: functions.critic_forward(
                images, params, config
            ),
            backward,
            inputs | draw_params(rng, critic_shapes(config)),
        )


def _generator(rng, functions, s):
    """Alone, and judged: its images augmented, and the critic's score of them."""
    config = _gan_config(s)
    z, shapes = rng.standard_normal((s.B, config.latent_dim)), generator_shapes(config)

    def forward(**params):
        z_alike = z.astype(params["rgb.bias"].dtype)
        return functions.generator_forward(z_alike, params, config)

    yield Case(forward, functions.generator_backward, draw_params(rng, shapes))
    judge = draw_params(rng, critic_shapes(config))
    drawn = augmentation(1, 0, np.arange(s.B), config.image)

    def judged(**params):
        images, cache_images = forward(**params)
        images, cache_augmented = functions.diffaugment_forward(images, drawn)
        critic = {name: value.astype(images.dtype) for name, value in judge.items()}
        scores, cache_scores = functions.critic_forward(images, critic, config)
        return scores, (cache_images, cache_augmented, cache_scores)

    def backward(dy, cache):
        cache_images, cache_augmented, cache_scores = cache
        dimages, _ = functions.critic_backward(dy, cache_scores)
        dimages = functions.diffaugment_backward(dimages, cache_augmented)
        return functions.generator_backward(dimages, cache_images)

    yield Case(judged, backward, draw_params(rng, shapes))


def _spectral_norms(rng, functions, s):
    """Two weights replaced, one of them a convolution's, and one left alone."""
    inputs = draw(rng, a=(s.hidden, s.channels, *s.patch), b=(s.dim, s.hidden), c=(s.dim, s.dim))

    def forward(**params):
        replaced, caches = functions.spectral_norms_forward(params, {"a": 2.5, "b": 1.0})
        return tuple(replaced.values()), caches

    def backward(dys, caches):
        grads = dict(zip(inputs, dys, strict=True))
        return functions.spectral_norms_backward(grads, caches)

    yield Case(forward, backward, inputs)


def _silu(rng, functions, s):
    inputs = {"x": far_from_zero(rng, s.x)}
    yield Case(functions.silu_forward, functions.silu_backward, inputs)


def _moderate(rng, name, shape):
    """Random numbers of a size at which no channel is nearly constant, which batch normalisation
    would blow up: weights of norms far from 0, small biases, and others by their fan in."""
    if len(shape) == 1 and name.endswith("weight"):
        return rng.choice([-1.0, 1.0], shape) * rng.uniform(0.5, 1.5, shape)
    return rng.standard_normal(shape) * (0.3 if len(shape) == 1 else np.prod(shape[1:]) ** -0.5)


def _in_training(rng, shapes, forward, backward, inputs, expect_zero):
    """A case for forward(params, **inputs) with batch normalisation, and a backward that returns
    gradients by name: what running_* are off by is none, and stays here."""
    drawn = {name: _moderate(rng, name, shape) for name, shape in shapes.items()}
    running = {name: drawn.pop(name) for name in shapes if is_running(name)}

    def by_name(dy, cache):
        return {n: grad for n, grad in backward(dy, cache).items() if not is_running(n)}

    def call(**given):
        params = {name: given.pop(name) for name in drawn}
        dtype = next(iter(params.values())).dtype
        return forward(params | {n: x.astype(dtype) for n, x in running.items()}, **given)

    zero = tuple(name for name in drawn if name.endswith(expect_zero))
    return Case(call, by_name, inputs | drawn, zero)


COARSER = 2  # of keys and values
DEAD = {
    "cmt_attention": ("k.bias", "sr.0.bias"),
    "irffn": ("conv2.0.bias", "proj_bn.bias"),
    "cmt": ("_fc.bias", "blocks_b.0.mlp.conv2.1.bias"),
}
"""Biases without a gradient: one that all keys have a softmax ignores, one that all of a batch have
batch normalisation takes off, also where a residual carries it there."""


def _cmt_part(rng, functions, s, name, prefix, expect_zero):
    """Cases of a part of a CMT's block, with and without its filters."""
    rows, cols = (COARSER * side for side in s.grid)
    for has_filters in (True, False):
        config = CMTConfig(
            8, embed_dims=(s.dim,), depths=(1,), num_heads=(s.heads,), sr_ratios=(COARSER,),
            mlp_ratio=s.hidden / s.dim, local=has_filters, ff_filter=has_filters,
        )  # fmt: skip
        shapes = part(cmt_shapes(config), f"blocks_a.0.{prefix}")
        inputs = draw(rng, x=(s.B, rows, cols, s.dim))
        if name != "irffn":
            inputs |= draw(rng, relative_pos=(s.heads, rows * cols, rows * cols // COARSER**2))
        forward, backward = (getattr(functions, f"{name}_{way}") for way in ("forward", "backward"))

        def call(params, x, relative_pos=None, forward=forward):
            more = () if relative_pos is None else (relative_pos, s.heads)
            return forward(x, params, *more, True)

        def by_name(dy, cache, backward=backward):
            dx, grads = backward(dy, cache)
            return {"x": dx} | grads

        yield _in_training(rng, shapes, call, by_name, inputs, expect_zero)


def _cmt_attention(rng, functions, s):
    case, _ = _cmt_part(rng, functions, s, "cmt_attention", "attn.", DEAD["cmt_attention"])
    yield case


def _irffn(rng, functions, s):
    yield from _cmt_part(rng, functions, s, "irffn", "mlp.", DEAD["irffn"])


def _cmt_block(rng, functions, s):
    dead = DEAD["cmt_attention"] + DEAD["irffn"]
    yield from _cmt_part(rng, functions, s, "cmt_block", "", dead)


def _cmt(rng, functions, s):
    """A whole network of two stages: one with two blocks, one whose keys lie on the same grid."""
    config = CMTConfig(32, s.channels, s.classes, 3, (s.dim, 2 * s.dim), (2, 1), (s.heads, 2),
                       (COARSER, 1), 1.5, s.hidden)  # fmt: skip
    images = rng.standard_normal((s.B, s.channels, *config.image))

    def forward(params):
        return functions.cmt_forward(images.astype(params["head.bias"].dtype), params, config, True)

    dead = sum((DEAD[name] for name in ("cmt_attention", "irffn", "cmt")), ())
    yield _in_training(rng, cmt_shapes(config), forward, functions.cmt_backward, {}, dead)


def _hardswish(rng, functions, s):
    yield Case(
        functions.hardswish_forward, functions.hardswish_backward, {"x": far_from_zero(rng, s.x)}
    )


def _squeeze_excite(rng, functions, s):
    shapes = {"fc1.weight": (s.hidden, s.dim), "fc1.bias": (s.hidden,)}
    shapes |= {"fc2.weight": (s.dim, s.hidden), "fc2.bias": (s.dim,)}
    yield composite("squeeze_excite", functions, rng, shapes, (s.B, *s.grid, s.dim))


def _fusion(rng, functions, s):
    shapes = {"weight": (s.tokens,), "fc1.weight": (s.hidden, s.dim), "fc1.bias": (s.hidden,)}
    shapes |= {"fc2.weight": (1, s.hidden), "fc2.bias": (1,)}
    yield composite("fusion", functions, rng, shapes, s.x)


def _mobile_config(s, stem="conv", readout="fusion", strides=(2, 4), img_size=(8, 16)):
    return MobileConfig(
        stem, readout, strides, img_size, 4, s.channels, s.classes,
        embed_dim=s.dim, depth=2, num_heads=s.heads, hidden_dim=s.hidden, stem_dims=(5, 6),
        expand_dim=7, squeeze_dim=3, fusion_dim=4,
    )  # fmt: skip


def _branch(rng, functions, s):
    stride = 3 if s is TALL else 2
    grid = stride * s.grid[0], stride * s.grid[1]

    def backward(dy, cache):
        dx, grads = functions.branch_backward(dy, cache)
        return {"x": dx} | grads

    yield _in_training(
        rng,
        branch_shapes(_mobile_config(s), stride),
        lambda params, x: functions.branch_forward(x, params, stride, True),
        backward,
        draw(rng, x=(s.B, *grid, 6)),
        (),
    )


def _mobile(rng, functions, s):
    """Whole networks: each stem and each read-out, grids that are wide, tall and square."""
    kinds = [("conv", "fusion", (2, 4), (16, 8) if s is TALL else (8, 16))]
    if s is APART:
        kinds += [("patches", "class_token", (2,), (8, 12)), ("conv", "mean", (3, 2), (24, 12))]
    for kind in kinds:
        config = _mobile_config(s, *kind)
        images = rng.standard_normal((s.B, config.in_chans, *config.image))

        def forward(params, images=images, config=config):
            images = images.astype(params["head.bias"].dtype)
            return functions.mobile_forward(images, params, config, True)

        yield _in_training(rng, mobile_shapes(config), forward, functions.mobile_backward, {}, ())


NEIGHBOURS = {
    "l2_attention": at_every_size(_l2_attention),
    "tied_attention": at_every_size(_tied_attention),
    "kim_attention": at_every_size(_kim_attention),
    "spectral": at_every_size(_spectral),
    "cosine": at_every_size(_cosine),
    "contrastive": at_every_size(_contrastive),
    "patch_mixing": at_every_size(_patch_mixing),
    "conv": at_every_size(_conv),
    "depthwise": at_every_size(_depthwise),
    "batchnorm": at_every_size(_batchnorm),
    "token_conv": at_every_size(_token_conv),
    "token_mlp": at_every_size(_token_mlp),
    "masked_loss": at_every_size(_masked_loss),
    "isotropic": at_every_size(_isotropic),
    "sine": at_every_size(_sine),
    "modulated_norm": at_every_size(_modulated_norm),
    "modulated_linear": at_every_size(_modulated_linear),
    "diffaugment": at_every_size(_diffaugment),
    "logistic": at_every_size(_logistic),
    "consistency": at_every_size(_consistency),
    "critic": at_every_size(_critic),
    "generator": at_every_size(_generator),
    "spectral_norms": at_every_size(_spectral_norms),
    "silu": at_every_size(_silu),
    "cmt_attention": at_every_size(_cmt_attention),
    "irffn": at_every_size(_irffn),
    "cmt_block": at_every_size(_cmt_block),
    "cmt": at_every_size(_cmt),
    "hardswish": at_every_size(_hardswish),
    "squeeze_excite": at_every_size(_squeeze_excite),
    "branch": at_every_size(_branch),
    "fusion": at_every_size(_fusion),
    "mobile": at_every_size(_mobile),
}
"""Layer to the function (rng, functions) that yields its cases."""
