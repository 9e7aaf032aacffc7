"""Every layer of this project, and a whole small ConViT, under the gradient checker.

Every parameter is random: gates, biases, LayerNorm weights and position scores too. Each layer is
checked at three sets of sizes. Where they all differ, exchanged axes do not fit. Where they agree,
exchanged axes fit, and only numbers can give them away. Wide grids and tall ones are both there.
What some bug needs, such as inputs far from zero or labels that differ, is drawn for certain.
"""

from collections import defaultdict
from dataclasses import replace
from functools import cache, lru_cache
from hashlib import sha256
from types import SimpleNamespace

import numpy as np

from .. import layers, neighbours
from ..config import ConViTConfig
from ..errors import UserError, unknown_name
from ..model import convit_backward, convit_forward, drop_path_masks, param_shapes
from .checker import check_gradients
from .drawing import APART, Case, at_every_size, composite, draw, draw_params, far_from_zero
from .mutants import mutate
from .neighbours import NEIGHBOURS

FUNCTIONS = SimpleNamespace(
    **{
        name: function
        for name, function in (vars(layers) | vars(neighbours)).items()
        if name.endswith(("_forward", "_backward"))
    },
    convit_forward=convit_forward,
    convit_backward=convit_backward,
)
"""The pairs by name, of layers, model and neighbours: what the cases check, and what a mutant
replaces."""


def _linear(rng, functions, s):
    inputs = draw(rng, x=s.x, weight=(s.hidden, s.dim), bias=(s.hidden,))
    yield Case(functions.linear_forward, functions.linear_backward, inputs)
    without_bias = {name: inputs[name] for name in ("x", "weight")}
    yield Case(functions.linear_forward, functions.linear_backward, without_bias)


def _layernorm(rng, functions, s):
    inputs = draw(rng, x=s.x, weight=(s.dim,), bias=(s.dim,))
    yield Case(functions.layernorm_forward, functions.layernorm_backward, inputs)


def _gelu(rng, functions, s):
    inputs = {"x": far_from_zero(rng, s.x)}
    yield Case(functions.gelu_forward, functions.gelu_backward, inputs)


def _softmax(rng, functions, s):
    yield Case(functions.softmax_forward, functions.softmax_backward, draw(rng, x=s.branch))


def _patch_embed(rng, functions, s):
    images = (s.B, s.channels, s.grid[0] * s.patch[0], s.grid[1] * s.patch[1])
    inputs = draw(rng, images=images, weight=(s.dim, s.channels, *s.patch), bias=(s.dim,))
    yield Case(
        lambda images, weight, bias: functions.patch_embed_forward(images, weight, bias, s.patch),
        functions.patch_embed_backward,
        inputs,
    )


def _position_attention(rng, functions, s, name="position_attention"):
    forward, backward = (getattr(functions, f"{name}_{way}") for way in ("forward", "backward"))
    inputs = draw(rng, weight=(s.heads, 3), bias=(s.heads,))
    yield Case(lambda weight, bias: forward(weight, bias, s.grid), backward, inputs, ("bias",))


def _position_attention_dense(rng, functions, s):
    yield from _position_attention(rng, functions, s, "position_attention_dense")


def _position_values(rng, functions, s):
    rows, cols = s.grid
    inputs = draw(rng, v=s.branch, py=(s.heads, rows, rows), px=(s.heads, cols, cols))
    yield Case(functions.position_values_forward, functions.position_values_backward, inputs)


def _gate(rng, functions, s):
    inputs = draw(rng, content=s.branch, position=s.branch, gating_param=(s.heads,))
    yield Case(functions.gate_forward, functions.gate_backward, inputs)


def _attention(rng, functions, s):
    inputs = draw(rng, q=s.branch, k=s.branch, v=s.branch)
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
        yield composite(name, functions, rng, shapes, s.x, s.heads, s.grid, expect_zero=zero)


def _gpsa_dense(rng, functions, s):
    yield from _gpsa(rng, functions, s, "gpsa_dense")


def _psa(rng, functions, s):
    yield from _gpsa(rng, functions, s, "psa")


def _mhsa(rng, functions, s):
    for bias in (True, False):
        shapes = _block_shapes(s, bias, False, "attn.")
        yield composite("mhsa", functions, rng, shapes, s.x, s.heads)


def _mlp(rng, functions, s):
    yield composite("mlp", functions, rng, _block_shapes(s, False, False, "mlp."), s.x)


def _drop_path(rng, functions, s):
    yield Case(
        lambda x: functions.drop_path_forward(x, s.masks[0], 0.7),
        functions.drop_path_backward,
        draw(rng, x=s.x),
    )


def _block(rng, functions, s, name="block"):
    zero = ("attn.pos_proj.bias",)
    with_class_token = (s.B, s.tokens + 1, s.dim)
    for masks in (s.masks, (None, None)):
        args = (s.heads, s.grid, masks, 0.7)
        local, plain = (_block_shapes(s, True, local, "") for local in (True, False))
        ungated = _block_shapes(s, True, True, "", "psa")
        yield composite(name, functions, rng, local, s.x, *args, expect_zero=zero)
        yield composite(name, functions, rng, plain, with_class_token, *args)
        yield composite(name, functions, rng, ungated, s.x, *args, expect_zero=zero)


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
            draw(rng, logits=(s.B, s.classes)),
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
        inputs = draw_params(rng, param_shapes(config))
        zero = [name for name in inputs if name.endswith("pos_proj.bias")]

        def forward(images=images, config=config, seed=seed, **params):
            images = images.astype(params["head.bias"].dtype)
            return functions.convit_forward(images, params, config, True, seed=seed)

        if not config.has_cls_token:
            zero.append("cls_token")
        yield Case(forward, functions.convit_backward, inputs, tuple(zero))


CASES = {
    "linear": at_every_size(_linear),
    "layernorm": at_every_size(_layernorm),
    "gelu": at_every_size(_gelu),
    "softmax": at_every_size(_softmax),
    "cross_entropy": at_every_size(_cross_entropy),
    "patch_embed": at_every_size(_patch_embed),
    "attention": at_every_size(_attention),
    "mhsa": at_every_size(_mhsa),
    "position_attention": at_every_size(_position_attention),
    "position_attention_dense": at_every_size(_position_attention_dense),
    "position_values": at_every_size(_position_values),
    "gate": at_every_size(_gate),
    "gpsa": at_every_size(_gpsa),
    "gpsa_dense": at_every_size(_gpsa_dense),
    "psa": at_every_size(_psa),
    "mlp": at_every_size(_mlp),
    "drop_path": at_every_size(_drop_path),
    "block": at_every_size(_block),
    "last_block": at_every_size(_last_block),
    "convit": at_every_size(_convit),
}
"""Layer to the function (rng, functions) that yields its cases."""

PARTS = {"lesson": CASES, "neighbours": NEIGHBOURS}
ALL_CASES = CASES | NEIGHBOURS


def check_layer(name, seed=0, every_entry=False, functions=FUNCTIONS):
    """The Reports of one layer's cases, drawn from seed. Raises UserError for an unknown name."""
    if name not in ALL_CASES:
        raise UserError(unknown_name("layer", name, ALL_CASES))
    return list(_reports(name, seed, every_entry, functions))


def _reports(name, seed, every_entry, functions, known=None):
    """known: outputs of each case, where forward is the same as in the call before."""
    for i, c in enumerate(ALL_CASES[name](np.random.default_rng(seed), functions)):
        if known is not None:
            c = _remembering(c, known[i])
        yield check_gradients(c.forward, c.backward, c.inputs, seed, every_entry, c.expect_zero)


def _remembering(case, known):
    """The case with a forward that computes its outputs beside the inputs once for all mutants.

    At the inputs themselves it always runs, since what it keeps for a backward pass is used there.
    """

    def digest(inputs):
        return sha256(b"".join(np.asarray(x).tobytes() for x in inputs.values())).digest()

    own = digest(case.inputs)

    def forward(**inputs):
        key = digest(inputs)
        if key == own:
            return case.forward(**inputs)
        if key not in known:
            known[key] = case.forward(**inputs)[0], None
        return known[key]

    return replace(case, forward=forward)


@lru_cache(maxsize=1)
def _known(layer, seed, every_entry):
    """What the mutants of one layer share: of each case the outputs by what they are of. Nothing
    where every entry is moved: these would be too many to keep."""
    return None if every_entry else defaultdict(dict)


@cache
def _is_right(layer, seed, every_entry):
    reports = _reports(layer, seed, every_entry, FUNCTIONS, _known(layer, seed, every_entry))
    return all(report.ok for report in reports)


def catch(mutant, seed=0, every_entry=False):
    """How the checker answers one mutant of the catalogue: the tensor that gives it away, with its
    error, or the exception that it raises; an empty string where it gets away."""
    layer = mutant.function.removesuffix("_backward")
    if not _is_right(layer, seed, every_entry):
        raise RuntimeError(f"{layer} itself fails its check: no mutant of it can be judged")
    functions = SimpleNamespace(**(vars(FUNCTIONS) | {mutant.function: mutate(mutant)}))
    try:
        known = _known(layer, seed, every_entry)
        reports = _reports(layer, seed, every_entry, functions, known)
        return next(filter(None, map(_what_is_wrong, reports)), "")
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        return f"raises {type(error).__name__}"


def _what_is_wrong(report):
    """The first tensor or problem that a Report names; an empty string where all is right."""
    for row in report.rows:
        if row.verdict not in ("ok", "zero"):
            return f"{row.name}: {row.note or f'error {row.error:.0e}'}"
    return report.problems[0] if report.problems else ""
