"""Every layer of this project, and a whole small ConViT, under the gradient checker.

Every parameter is random: gates, biases, LayerNorm weights and position scores too. Each layer is
checked at three sets of sizes. Where they all differ, exchanged axes do not fit. Where they agree,
exchanged axes fit, and only numbers can give them away. Wide grids and tall ones are both there.
What some bug needs, such as inputs far from zero or labels that differ, is drawn for certain.
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


@dataclass(frozen=True)
class Sizes:
    """Images, patches in a grid, heads and their width, features, hidden ones, classes, channels,
    and a patch's height and width. width: of the heads where no `dim` is shared among them."""

    B: int
    grid: tuple[int, int]
    heads: int
    width: int
    dim: int
    hidden: int
    classes: int
    channels: int
    patch: tuple[int, int]

    @property
    def tokens(self):
        return self.grid[0] * self.grid[1]

    @property
    def x(self):
        return self.B, self.tokens, self.dim

    @property
    def branch(self):
        return self.B, self.heads, self.tokens, self.width

    @property
    def masks(self):
        """Which images the two branches of a block keep: others in each, never all or none."""
        place = np.arange(self.B) % 3
        return (place != 2).astype(int), (place != 0).astype(int)


APART = Sizes(3, (2, 4), 3, 7, 12, 7, 5, 2, (3, 2))
TALL = Sizes(5, (3, 2), 2, 4, 8, 10, 7, 3, (2, 4))
ALIKE = Sizes(4, (2, 2), 2, 4, 4, 4, 4, 2, (2, 2))


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


def _far_from_zero(rng, shape):
    """Numbers spread over -4..4, in a random order: some lie where a curve has levelled off."""
    x = np.linspace(-4.0, 4.0, int(np.prod(shape))) + 0.1 * rng.uniform(-1, 1, np.prod(shape))
    return rng.permutation(x).reshape(shape)


def _composite(name, functions, rng, shapes, x, *args, expect_zero=()):
    """A case for x_forward(x, params, *args) and its backward, which returns dx and grads."""
    forward, backward = (getattr(functions, f"{name}_{way}") for way in ("forward", "backward"))

    def by_name(dy, cache):
        dx, grads = backward(dy, cache)
        return {"x": dx} | grads

    inputs = _draw(rng, x=x) | _draw_params(rng, shapes)
    return Case(lambda x, **params: forward(x, params, *args), by_name, inputs, expect_zero)


def _linear(rng, functions, s):
    inputs = _draw(rng, x=s.x, weight=(s.hidden, s.dim), bias=(s.hidden,))
    yield Case(functions.linear_forward, functions.linear_backward, inputs)
    without_bias = {name: inputs[name] for name in ("x", "weight")}
    yield Case(functions.linear_forward, functions.linear_backward, without_bias)


def _layernorm(rng, functions, s):
    inputs = _draw(rng, x=s.x, weight=(s.dim,), bias=(s.dim,))
    yield Case(functions.layernorm_forward, functions.layernorm_backward, inputs)


def _gelu(rng, functions, s):
    inputs = {"x": _far_from_zero(rng, s.x)}
    yield Case(functions.gelu_forward, functions.gelu_backward, inputs)


def _softmax(rng, functions, s):
    yield Case(functions.softmax_forward, functions.softmax_backward, _draw(rng, x=s.branch))


def _patch_embed(rng, functions, s):
    images = (s.B, s.channels, s.grid[0] * s.patch[0], s.grid[1] * s.patch[1])
    inputs = _draw(rng, images=images, weight=(s.dim, s.channels, *s.patch), bias=(s.dim,))
    yield Case(
        lambda images, weight, bias: functions.patch_embed_forward(images, weight, bias, s.patch),
        functions.patch_embed_backward,
        inputs,
    )


def _position_attention(rng, functions, s, name="position_attention"):
    forward, backward = (getattr(functions, f"{name}_{way}") for way in ("forward", "backward"))
    inputs = _draw(rng, weight=(s.heads, 3), bias=(s.heads,))
    yield Case(lambda weight, bias: forward(weight, bias, s.grid), backward, inputs, ("bias",))


def _position_attention_dense(rng, functions, s):
    yield from _position_attention(rng, functions, s, "position_attention_dense")


def _position_values(rng, functions, s):
    rows, cols = s.grid
    inputs = _draw(rng, v=s.branch, py=(s.heads, rows, rows), px=(s.heads, cols, cols))
    yield Case(functions.position_values_forward, functions.position_values_backward, inputs)


def _gate(rng, functions, s):
    inputs = _draw(rng, content=s.branch, position=s.branch, gating_param=(s.heads,))
    yield Case(functions.gate_forward, functions.gate_backward, inputs)


def _attention(rng, functions, s):
    inputs = _draw(rng, q=s.branch, k=s.branch, v=s.branch)
    yield Case(functions.attention_forward, functions.attention_backward, inputs)


def _block_shapes(s, qkv_bias, local, prefix, attention="gpsa"):
    """Short name to shape of the parameters below `prefix` of a block of these sizes."""
    config = ConViTConfig(
        img_size=s.grid, patch_size=1, embed_dim=s.dim, depth=1, num_heads=s.heads,
        qkv_bias=qkv_bias, mlp_ratio=s.hidden / s.dim, local_up_to_layer=int(local),
        attention=attention,
    )  # fmt: skip
    prefix = f"blocks.0.{prefix}"
    return {k.removeprefix(prefix): s for k, s in param_shapes(config).items() if prefix in k}


def _gpsa(rng, functions, s, name="gpsa"):
    zero = ("pos_proj.bias",)
    for bias in (True, False):
        shapes = _block_shapes(s, bias, True, "attn.", "psa" if name == "psa" else "gpsa")
        yield _composite(name, functions, rng, shapes, s.x, s.heads, s.grid, expect_zero=zero)


def _gpsa_dense(rng, functions, s):
    yield from _gpsa(rng, functions, s, "gpsa_dense")


def _psa(rng, functions, s):
    yield from _gpsa(rng, functions, s, "psa")


def _mhsa(rng, functions, s):
    for bias in (True, False):
        shapes = _block_shapes(s, bias, False, "attn.")
        yield _composite("mhsa", functions, rng, shapes, s.x, s.heads)


def _mlp(rng, functions, s):
    yield _composite("mlp", functions, rng, _block_shapes(s, False, False, "mlp."), s.x)


def _drop_path(rng, functions, s):
    yield Case(
        lambda x: functions.drop_path_forward(x, s.masks[0], 0.7),
        functions.drop_path_backward,
        _draw(rng, x=s.x),
    )


def _block(rng, functions, s, name="block"):
    zero = ("attn.pos_proj.bias",)
    with_class_token = (s.B, s.tokens + 1, s.dim)
    for masks in (s.masks, (None, None)):
        args = (s.heads, s.grid, masks, 0.7)
        local, plain = (_block_shapes(s, True, local, "") for local in (True, False))
        ungated = _block_shapes(s, True, True, "", "psa")
        yield _composite(name, functions, rng, local, s.x, *args, expect_zero=zero)
        yield _composite(name, functions, rng, plain, with_class_token, *args)
        yield _composite(name, functions, rng, ungated, s.x, *args, expect_zero=zero)


def _last_block(rng, functions, s):
    yield from _block(rng, functions, s, "last_block")


def _cross_entropy(rng, functions, s):
    labels = rng.permutation(s.classes)[np.arange(s.B) % s.classes]
    soft = rng.uniform(size=(s.B, s.classes))  # rows need not sum to one: taken as they are
    for targets, smoothing in ((labels, 0.0), (labels, 0.1), (soft, 0.0)):
        yield Case(
            lambda logits, targets=targets, smoothing=smoothing: functions.cross_entropy_forward(
                logits, targets, smoothing
            ),
            functions.cross_entropy_backward,
            _draw(rng, logits=(s.B, s.classes)),
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


def _convit(rng, functions, s):
    """A whole model at training time: GPSA and plain blocks, drop path; then no GPSA; then all. At
    the other sizes a shallower one: where features are few, deep blocks hardly matter."""
    kinds = (3, 2, True, True), (3, 0, False, False), (3, 3, False, True)
    for depth, local, bias, pos_embed in kinds if s is APART else [(2, 1, True, True)]:
        config = ConViTConfig(
            img_size=(s.grid[0] * s.patch[0], s.grid[1] * s.patch[1]), patch_size=s.patch,
            in_chans=s.channels, num_classes=s.classes, embed_dim=s.dim, depth=depth,
            num_heads=s.heads, mlp_ratio=s.hidden / s.dim, qkv_bias=bias, local_up_to_layer=local,
            use_pos_embed=pos_embed, drop_path_rate=0.4,
        )  # fmt: skip
        images = rng.standard_normal((s.B, config.in_chans, *config.image))
        seed = _mixed_seed(int(rng.integers(1000)), images, config)
        inputs = _draw_params(rng, param_shapes(config))
        zero = [name for name in inputs if name.endswith("pos_proj.bias")]

        def forward(images=images, config=config, seed=seed, **params):
            images = images.astype(params["head.bias"].dtype)
            return functions.convit_forward(images, params, config, True, seed=seed)

        if not config.has_cls_token:
            zero.append("cls_token")
        yield Case(forward, functions.convit_backward, inputs, tuple(zero))


def _at_every_size(cases):
    """The cases at all three sets of sizes: (rng, functions) -> Cases."""
    return lambda rng, functions: (
        case for sizes in (APART, TALL, ALIKE) for case in cases(rng, functions, sizes)
    )


CASES = {
    "linear": _at_every_size(_linear),
    "layernorm": _at_every_size(_layernorm),
    "gelu": _at_every_size(_gelu),
    "softmax": _at_every_size(_softmax),
    "cross_entropy": _at_every_size(_cross_entropy),
    "patch_embed": _at_every_size(_patch_embed),
    "attention": _at_every_size(_attention),
    "mhsa": _at_every_size(_mhsa),
    "position_attention": _at_every_size(_position_attention),
    "position_attention_dense": _at_every_size(_position_attention_dense),
    "position_values": _at_every_size(_position_values),
    "gate": _at_every_size(_gate),
    "gpsa": _at_every_size(_gpsa),
    "gpsa_dense": _at_every_size(_gpsa_dense),
    "psa": _at_every_size(_psa),
    "mlp": _at_every_size(_mlp),
    "drop_path": _at_every_size(_drop_path),
    "block": _at_every_size(_block),
    "last_block": _at_every_size(_last_block),
    "convit": _at_every_size(_convit),
}
"""Layer to the function (rng, functions) that yields its cases."""


def check_layer(name, seed=0, every_entry=False, functions=FUNCTIONS):
    """The Reports of one layer's cases, drawn from seed. Raises UserError for an unknown name."""
    if name not in CASES:
        raise UserError(unknown_name("layer", name, CASES))
    return list(_reports(name, seed, every_entry, functions))


def _reports(name, seed, every_entry, functions):
    for c in CASES[name](np.random.default_rng(seed), functions):
        yield check_gradients(c.forward, c.backward, c.inputs, seed, every_entry, c.expect_zero)


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
        reports = _reports(layer, seed, every_entry, functions)
        return next(filter(None, map(_what_is_wrong, reports)), "")
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        return f"raises {type(error).__name__}"


def _what_is_wrong(report):
    """The first tensor or problem that a Report names; an empty string where all is right."""
    for row in report.rows:
        if row.verdict not in ("ok", "zero"):
            return f"{row.name}: {row.note or f'error {row.error:.0e}'}"
    return report.problems[0] if report.problems else ""
