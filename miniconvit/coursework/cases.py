"""The inputs on which exercises are judged, drawn from a secret, and what is right there."""

import hashlib
import hmac
import inspect
from functools import cache

import numpy as np

from .. import layers
from ..config import ConViTConfig, as_pair
from ..layers.names import part
from ..model import param_shapes
from ..optim import AdamW
from .runner import adamw_steps
from .task import Case, Draw, Size, map_arrays

VISIBLE = (
    Size(2, (2, 3), 3, 5, 7, 4, 2, (3, 2)),
    Size(2, (3, 1), 2, 3, 4, 7, 3, (1, 2), "float32"),
)
HIDDEN = (
    Size(3, (3, 5), 2, 7, 11, 4, 2, (2, 3)),
    Size(1, (5, 2), 1, 9, 6, 3, 3, (3, 1)),
    Size(3, (1, 7), 1, 5, 8, 2, 1, (4, 3)),
    Size(3, (4, 2), 3, 3, 5, 7, 2, (1, 3), "float32"),
)
"""Odd, not square, one and three images, one head, one row: where symmetric sizes hide a bug."""


@cache
def cases(unit, secret, sizes):
    """The cases of a unit: the same for the same secret, which is text."""
    found = []
    for i, size in enumerate(sizes):
        draws = [_draws(unit, _generator(secret, unit.name, i, k), size) for k in range(2)]
        pairs = zip(*draws, strict=True)
        found += [Case(size, first, second, _parameters(unit)) for first, second in pairs]
    return tuple(found)


def _parameters(unit):
    """{function: the names of its parameters}, by which a change in place is told."""
    if not unit.gradients:
        return {unit.forward: tuple(inspect.signature(adamw_steps).parameters)[1:]}
    functions = {name: getattr(layers, name) for name in (unit.forward, unit.backward)}
    return {name: tuple(inspect.signature(f).parameters) for name, f in functions.items()}


def _generator(secret, *labels):
    """Random numbers that nobody can draw without the secret."""
    message = "/".join(map(str, labels)).encode()
    digest = hmac.new(secret.encode(), message, hashlib.sha256).digest()
    return np.random.default_rng(int.from_bytes(digest))


def _draws(unit, rng, size):
    def normal(*shape, scale=1.0):
        return (scale * rng.standard_normal(shape)).astype(size.dtype)

    return [_solve(unit, args, rng, size) for args in ARGUMENTS[unit.name](normal, size)]


def _solve(unit, args, rng, size):
    """The Draw of these arguments; right answers are computed in float64."""
    exact = map_arrays(lambda a: a.astype(float) if a.dtype.kind == "f" else a, args)
    if not unit.gradients:
        return Draw(args, adamw_steps(AdamW, *exact))
    y, kept = getattr(layers, unit.forward)(*exact)
    dy = map_arrays(lambda a: rng.standard_normal(a.shape).astype(size.dtype), y)
    if unit.outputs == ("loss",):
        dy = float(dy)
    backward = getattr(layers, unit.backward)
    exact_dy = map_arrays(lambda a: a.astype(float), dy)
    first = map_arrays(lambda a: _only_first(a, size.B), exact_dy)
    return Draw(args, y, dy, backward(exact_dy, kept), backward(first, kept))


def _only_first(dy, images):
    """dy with zeros for all images but the first; where it has no images, with zeros alone."""
    first = np.zeros_like(dy)
    if len(dy) == images:
        first[:1] = dy[:1]
    return first


def _params(normal, s, prefix, local, bias=True):
    """Random parameters of a block, below `prefix`; matrices scaled, so no softmax saturates."""
    config = ConViTConfig(
        img_size=s.grid, patch_size=1, embed_dim=s.D, depth=1, num_heads=s.H, qkv_bias=bias,
        mlp_ratio=s.M / s.D, local_up_to_layer=int(local),
    )  # fmt: skip
    shapes = part(param_shapes(config), f"blocks.0.{prefix}")
    return {
        name: normal(*shape, scale=shape[-1] ** -0.5 if len(shape) > 1 else 1.0)
        for name, shape in shapes.items()
    }


def _linear(normal, s):
    x, weight, bias = normal(s.B, s.N, s.D), normal(s.M, s.D), normal(s.M)
    return [(x, weight, bias), (x, weight), (x[:, 0], weight, bias)]


def _layernorm(normal, s):
    x = 1.7 * normal(s.B, s.N, s.D) + 0.4
    args = x.astype(s.dtype), normal(s.D), normal(s.D)
    return [args, (*args, 0.3)]


def _softmax(normal, s):
    x = normal(s.B, s.H, s.N, s.M)
    return [(x,), (x[:, 0] + 1000,)]


def _cross_entropy(normal, s):
    labels = np.argsort(normal(s.B, s.C), axis=1)[:, 0]
    soft = normal(s.B, s.C) ** 2  # rows that do not sum to one
    logits = normal(s.B, s.C, scale=2.0)
    return [(logits, labels), (logits + 1000, labels, 0.1), (logits, soft, 0.1)]


def _patch_embed(normal, s):
    (rows, cols), sets = s.grid, []
    for patch in (s.patch, s.patch[1]):
        ph, pw = as_pair(patch)
        images = normal(s.B, s.channels, rows * ph, cols * pw)
        sets.append((images, normal(s.D, s.channels, ph, pw), normal(s.D), patch))
    return sets


def _attention(normal, s):
    return [tuple(normal(s.B, s.H, s.N, s.d) for _ in "qkv")]


def _mhsa(normal, s):
    x = normal(s.B, s.N + 1, s.D)
    return [(x, _params(normal, s, "attn.", False, bias), s.H) for bias in (True, False)]


def _position_attention(normal, s):
    return [(normal(s.H, 3, scale=0.5), normal(s.H), s.grid)]


def _position_values(normal, s):
    maps = [normal(s.H, side, side) for side in s.grid]
    return [(normal(s.B, s.H, s.N, s.d), *maps)]


def _gate(normal, s):
    """Two branches of the values; then two maps, of which the second has no image axis."""
    content, position = normal(s.B, s.H, s.N, s.d), normal(s.B, s.H, s.N, s.d)
    return [(content, position, normal(s.H)), (content, position[0], normal(s.H))]


def _gpsa(normal, s):
    x = normal(s.B, s.N, s.D)
    return [(x, _params(normal, s, "attn.", True, bias), s.H, s.grid) for bias in (True, False)]


def _mlp(normal, s):
    return [(normal(s.B, s.N, s.D), _params(normal, s, "mlp.", False))]


def _block(normal, s):
    """GPSA with drop path; then plain attention on one token more, nothing dropped."""
    masks = (np.array([1, 0, 1][: s.B]), np.array([0, 1, 1][-s.B :]))
    local, plain = (_params(normal, s, "", local) for local in (True, False))
    x, longer = normal(s.B, s.N, s.D), normal(s.B, s.N + 1, s.D)
    return [
        (x, local, s.H, s.grid, masks, 0.7),
        (longer, plain, s.H, s.grid, (None, None), 1.0),
    ]


def _adamw_steps(normal, s):
    """Three steps on a matrix, a vector, and the two tensors that are never decayed."""
    shapes = {"weight": (s.M, s.D), "bias": (s.M,)}
    shapes |= {"pos_embed": (1, s.N, s.D), "cls_token": (1, 1, s.D)}

    def tensors():
        return {name: normal(*shape) for name, shape in shapes.items()}

    settings = {"lr": 0.02, "weight_decay": 0.3, "betas": (0.8, 0.95), "eps": 1e-3}
    return [(tensors(), tuple(tensors() for _ in range(3)), (None, 0.05, 0.01), settings)]


ARGUMENTS = {
    "linear": _linear,
    "softmax": _softmax,
    "layernorm": _layernorm,
    "gelu": lambda normal, s: [(normal(s.B, s.N, s.D, scale=2.0),)],
    "cross_entropy": _cross_entropy,
    "patch_embed": _patch_embed,
    "attention": _attention,
    "mhsa": _mhsa,
    "position_attention_dense": _position_attention,
    "position_attention": _position_attention,
    "position_values": _position_values,
    "gate": _gate,
    "gpsa_dense": _gpsa,
    "gpsa": _gpsa,
    "mlp": _mlp,
    "block": _block,
    "adamw_steps": _adamw_steps,
}
"""Unit to the function (normal, size) that draws its sets of arguments."""
