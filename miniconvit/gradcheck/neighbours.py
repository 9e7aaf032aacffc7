"""The cases of the papers beside ConViT, drawn as those of the lesson are."""

from .drawing import Case, at_every_size, composite, draw


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


NEIGHBOURS = {
    "l2_attention": at_every_size(_l2_attention),
    "tied_attention": at_every_size(_tied_attention),
    "kim_attention": at_every_size(_kim_attention),
    "spectral": at_every_size(_spectral),
    "cosine": at_every_size(_cosine),
    "contrastive": at_every_size(_contrastive),
    "patch_mixing": at_every_size(_patch_mixing),
}
"""Layer to the function (rng, functions) that yields its cases."""
