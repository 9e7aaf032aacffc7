"""Every layer of this project, and a whole small ConViT, under the gradient checker.

Sizes all differ, grids are rectangular, and every parameter is random: gates, biases, LayerNorm
weights and position scores too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace

import numpy as np

from .. import layers
from ..config import ConViTConfig
from ..errors import UserError, unknown_name
from ..model import convit_backward, convit_forward, drop_path_masks, param_shapes
from .checker import check_gradients
from .mutants import mutate

FUNCTIONS = SimpleNamespace(
    **{n: f for n, f in vars(layers).items() if n.endswith(("_forward", "_backward"))},
    convit_forward=convit_forward,
    convit_backward=convit_backward,
)
"""The layers and the model by name: what the cases check, and what a mutant replaces."""

B, GRID, HEADS, DIM, HIDDEN, CLASSES = 3, (2, 4), 3, 12, 7, 5
TOKENS = GRID[0] * GRID[1]


@dataclass(frozen=True)
class Case:
    """One function pair at one set of inputs."""

    forward: Callable
    backward: Callable
    inputs: dict
    expect_zero: tuple[str, ...] = ()


def _draw(rng, **shapes):
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


def _draw_params(rng, shapes):
    """Weights of matrices scaled so that no softmax saturates; everything random."""
    return {
        name: rng.standard_normal(shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 1.0)
        for name, shape in shapes.items()
    }


def _composite(name, functions, rng, shapes, *args, tokens=TOKENS, expect_zero=()):
    """A case for x_forward(x, params, *args) and its backward, which returns dx and grads."""
    forward, backward = (getattr(functions, f"{name}_{way}") for way in ("forward", "backward"))

    def by_name(dy, cache):
        dx, grads = backward(dy, cache)
        return {"x": dx} | grads

    inputs = _draw(rng, x=(B, tokens, DIM)) | _draw_params(rng, shapes)
    return Case(lambda x, **params: forward(x, params, *args), by_name, inputs, expect_zero)


def _linear(rng, functions):
    inputs = _draw(rng, x=(B, TOKENS, DIM), weight=(HIDDEN, DIM), bias=(HIDDEN,))
    yield Case(functions.linear_forward, functions.linear_backward, inputs)
    without_bias = {name: inputs[name] for name in ("x", "weight")}
    yield Case(functions.linear_forward, functions.linear_backward, without_bias)


def _layernorm(rng, functions):
    inputs = _draw(rng, x=(B, TOKENS, DIM), weight=(DIM,), bias=(DIM,))
    yield Case(functions.layernorm_forward, functions.layernorm_backward, inputs)


def _gelu(rng, functions):
    yield Case(functions.gelu_forward, functions.gelu_backward, _draw(rng, x=(B, TOKENS, DIM)))


def _softmax(rng, functions):
    inputs = _draw(rng, x=(B, HEADS, TOKENS, HIDDEN))
    yield Case(functions.softmax_forward, functions.softmax_backward, inputs)


def _patch_embed(rng, functions):
    C, ph, pw = 2, 3, 2
    images = (B, C, GRID[0] * ph, GRID[1] * pw)
    inputs = _draw(rng, images=images, weight=(DIM, C, ph, pw), bias=(DIM,))
    yield Case(
        lambda images, weight, bias: functions.patch_embed_forward(images, weight, bias, (ph, pw)),
        functions.patch_embed_backward,
        inputs,
    )


def _position_attention(rng, functions, name="position_attention"):
    forward, backward = (getattr(functions, f"{name}_{way}") for way in ("forward", "backward"))
    inputs = _draw(rng, weight=(HEADS, 3), bias=(HEADS,))
    yield Case(lambda weight, bias: forward(weight, bias, GRID), backward, inputs, ("bias",))


def _position_attention_dense(rng, functions):
    yield from _position_attention(rng, functions, "position_attention_dense")


def _position_values(rng, functions):
    rows, cols = GRID
    inputs = _draw(
        rng, v=(B, HEADS, TOKENS, HIDDEN), py=(HEADS, rows, rows), px=(HEADS, cols, cols)
    )
    yield Case(functions.position_values_forward, functions.position_values_backward, inputs)


def _gate(rng, functions):
    branch = (B, HEADS, TOKENS, HIDDEN)
    inputs = _draw(rng, content=branch, position=branch, gating_param=(HEADS,))
    yield Case(functions.gate_forward, functions.gate_backward, inputs)


def _attention(rng, functions):
    heads = (B, HEADS, TOKENS, HIDDEN)
    inputs = _draw(rng, q=heads, k=heads, v=heads)
    yield Case(functions.attention_forward, functions.attention_backward, inputs)


def _block_shapes(qkv_bias, local, prefix, attention="gpsa"):
    """Short name to shape of the parameters below `prefix` of a block of the checks' sizes."""
    config = ConViTConfig(
        img_size=GRID, patch_size=1, embed_dim=DIM, depth=1, num_heads=HEADS, qkv_bias=qkv_bias,
        mlp_ratio=HIDDEN / DIM, local_up_to_layer=int(local), attention=attention,
    )  # fmt: skip
    prefix = f"blocks.0.{prefix}"
    return {k.removeprefix(prefix): s for k, s in param_shapes(config).items() if prefix in k}


def _gpsa(rng, functions, name="gpsa"):
    zero = ("pos_proj.bias",)
    for bias in (True, False):
        shapes = _block_shapes(bias, True, "attn.", "psa" if name == "psa" else "gpsa")
        yield _composite(name, functions, rng, shapes, HEADS, GRID, expect_zero=zero)


def _gpsa_dense(rng, functions):
    yield from _gpsa(rng, functions, "gpsa_dense")


def _psa(rng, functions):
    yield from _gpsa(rng, functions, "psa")


def _mhsa(rng, functions):
    for bias in (True, False):
        yield _composite("mhsa", functions, rng, _block_shapes(bias, False, "attn."), HEADS)


def _mlp(rng, functions):
    yield _composite("mlp", functions, rng, _block_shapes(False, False, "mlp."))


def _drop_path(rng, functions):
    keep = np.array([1, 1, 0])
    yield Case(
        lambda x: functions.drop_path_forward(x, keep, 0.7),
        functions.drop_path_backward,
        _draw(rng, x=(B, TOKENS, DIM)),
    )


def _block(rng, functions, name="block"):
    keep = np.array([1, 1, 0]), np.array([0, 1, 1])
    zero = ("attn.pos_proj.bias",)
    for masks in (keep, (None, None)):
        args = (HEADS, GRID, masks, 0.7)
        local, plain = (_block_shapes(True, local, "") for local in (True, False))
        ungated = _block_shapes(True, True, "", "psa")
        yield _composite(name, functions, rng, local, *args, expect_zero=zero)
        yield _composite(name, functions, rng, plain, *args, tokens=TOKENS + 1)
        yield _composite(name, functions, rng, ungated, *args, expect_zero=zero)


def _last_block(rng, functions):
    yield from _block(rng, functions, "last_block")


def _cross_entropy(rng, functions):
    labels = rng.integers(CLASSES, size=B)
    soft = rng.uniform(size=(B, CLASSES))  # rows need not sum to one: taken as they are
    for targets, smoothing in ((labels, 0.0), (labels, 0.1), (soft, 0.0)):
        yield Case(
            lambda logits, targets=targets, smoothing=smoothing: functions.cross_entropy_forward(
                logits, targets, smoothing
            ),
            functions.cross_entropy_backward,
            _draw(rng, logits=(B, CLASSES)),
        )


def _mixed_seed(seed, images, config):
    """The first seed from here on whose drop-path masks all keep some images and drop others, and
    keep something that the last attention passes on to the class token: no gradient vanishes."""
    while True:
        masks = [drop_path_masks(i, images, config, seed)[0] for i in range(1, config.depth)]
        last_attention = masks[-1][0]
        if all(0 < keep.sum() < len(keep) for pair in masks for keep in pair) and all(
            (keep & last_attention).any() for pair in masks[:-1] for keep in pair
        ):
            return seed
        seed += 1


def _convit(rng, functions):
    """A whole model at training time: GPSA and plain blocks, drop path; then no GPSA; then all."""
    for local, bias, pos_embed in ((2, True, True), (0, False, False), (3, False, True)):
        config = ConViTConfig(
            img_size=(4, 12), patch_size=(2, 3), in_chans=2, num_classes=CLASSES, embed_dim=DIM,
            depth=3, num_heads=HEADS, mlp_ratio=HIDDEN / DIM, qkv_bias=bias,
            local_up_to_layer=local, use_pos_embed=pos_embed, drop_path_rate=0.4,
        )  # fmt: skip
        images = rng.standard_normal((B, config.in_chans, *config.image))
        seed = _mixed_seed(int(rng.integers(1000)), images, config)
        inputs = _draw_params(rng, param_shapes(config))
        zero = [name for name in inputs if name.endswith("pos_proj.bias")]

        def forward(images=images, config=config, seed=seed, **params):
            images = images.astype(params["head.bias"].dtype)
            return functions.convit_forward(images, params, config, True, seed=seed)

        if not config.has_cls_token:
            zero.append("cls_token")
        yield Case(forward, functions.convit_backward, inputs, tuple(zero))


CASES = {
    "linear": _linear,
    "layernorm": _layernorm,
    "gelu": _gelu,
    "softmax": _softmax,
    "cross_entropy": _cross_entropy,
    "patch_embed": _patch_embed,
    "attention": _attention,
    "mhsa": _mhsa,
    "position_attention": _position_attention,
    "position_attention_dense": _position_attention_dense,
    "position_values": _position_values,
    "gate": _gate,
    "gpsa": _gpsa,
    "gpsa_dense": _gpsa_dense,
    "psa": _psa,
    "mlp": _mlp,
    "drop_path": _drop_path,
    "block": _block,
    "last_block": _last_block,
    "convit": _convit,
}
"""Layer to the function (rng, functions) that yields its cases."""


def check_layer(name, seed=0, every_entry=False, functions=FUNCTIONS):
    """The Reports of one layer's cases, drawn from seed. Raises UserError for an unknown name."""
    if name not in CASES:
        raise UserError(unknown_name("layer", name, CASES))
    cases = CASES[name](np.random.default_rng(seed), functions)
    return [
        check_gradients(c.forward, c.backward, c.inputs, seed, every_entry, c.expect_zero)
        for c in cases
    ]


@cache
def _is_right(layer, seed, every_entry):
    return all(report.ok for report in check_layer(layer, seed, every_entry))


def catch(mutant, seed=0, every_entry=False):
    """How the checker answers one mutant of the catalogue: the tensor that gives it away, with its
    error, or the exception that it raises; an empty string where it gets away."""
    layer = mutant.function.removesuffix("_backward")
    if not _is_right(layer, seed, every_entry):
        raise RuntimeError(f"{layer} itself fails its check: no mutant of it can be judged")
    functions = SimpleNamespace(**(vars(FUNCTIONS) | {mutant.function: mutate(mutant)}))
    try:
        reports = check_layer(layer, seed, every_entry, functions)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        return f"raises {type(error).__name__}"
    for report in reports:
        for row in report.rows:
            if row.verdict == "WRONG":
                return f"{row.name}: {row.note or f'error {row.error:.0e}'}"
        if report.problems:
            return report.problems[0]
    return ""
