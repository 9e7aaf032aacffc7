"""The cases of the papers beside ConViT, drawn as those of the lesson are."""

import numpy as np

from ..neighbours.isotropic import MIXERS, IsotropicConfig, isotropic_shapes
from ..neighbours.mobile import MobileConfig, branch_shapes, mobile_shapes
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

    yield Case(
        lambda x, **params: functions.batchnorm_forward(x, params | running, True),
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


def _in_training(rng, forward, backward, shapes, inputs):
    """A case with BatchNorms. forward(params, **inputs); backward returns gradients by name.

    What running statistics are off by is no gradient, so that they are held. A bias that all
    readers normalise away has none.
    """
    params = draw_params(rng, shapes)
    running = {name: params.pop(name) for name in shapes if ".running_" in name}
    zero = tuple(name for name in params if name.endswith(("depthwise.bias", "stem.bn3.bias")))

    def held(**given):
        learned = {name: given.pop(name) for name in params}
        dtype = next(iter(learned.values())).dtype
        still = {name: value.astype(dtype) for name, value in running.items()}
        return forward(learned | still, **given)

    def learned_alone(dy, cache):
        grads = backward(dy, cache)
        return {name: grad for name, grad in grads.items() if name not in running}

    return Case(held, learned_alone, inputs | params, zero)


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
        lambda params, x: functions.branch_forward(x, params, stride, True),
        backward,
        branch_shapes(_mobile_config(s), stride),
        draw(rng, x=(s.B, *grid, 6)),
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

        yield _in_training(rng, forward, functions.mobile_backward, mobile_shapes(config), {})


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
    "hardswish": at_every_size(_hardswish),
    "squeeze_excite": at_every_size(_squeeze_excite),
    "branch": at_every_size(_branch),
    "fusion": at_every_size(_fusion),
    "mobile": at_every_size(_mobile),
}
"""Layer to the function (rng, functions) that yields its cases."""
