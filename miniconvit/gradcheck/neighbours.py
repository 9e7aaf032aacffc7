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


NEIGHBOURS = {
    "l2_attention": at_every_size(_l2_attention),
    "tied_attention": at_every_size(_tied_attention),
    "kim_attention": at_every_size(_kim_attention),
    "spectral": at_every_size(_spectral),
}
"""Layer to the function (rng, functions) that yields its cases."""
