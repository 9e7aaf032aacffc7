"""What every case of the checker is drawn from: three sets of sizes, and random numbers."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


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


def draw(rng, **shapes):
    """{name: standard normal numbers} of these shapes."""
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


def draw_params(rng, shapes):
    """Weights of matrices scaled so that no softmax saturates; everything random."""
    return {
        name: rng.standard_normal(shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 1.0)
        for name, shape in shapes.items()
    }


def far_from_zero(rng, shape):
    """Numbers spread over -4..4, in a random order: some lie where a curve has levelled off."""
    x = np.linspace(-4.0, 4.0, int(np.prod(shape))) + 0.1 * rng.uniform(-1, 1, np.prod(shape))
    return rng.permutation(x).reshape(shape)


def composite(name, functions, rng, shapes, x, *args, expect_zero=()):
    """A case for x_forward(x, params, *args) and its backward, which returns dx and grads."""
    forward, backward = (getattr(functions, f"{name}_{way}") for way in ("forward", "backward"))

    def by_name(dy, cache):
        dx, grads = backward(dy, cache)
        return {"x": dx} | grads

    inputs = draw(rng, x=x) | draw_params(rng, shapes)
    return Case(lambda x, **params: forward(x, params, *args), by_name, inputs, expect_zero)


def at_every_size(cases):
    """The cases at all three sets of sizes: (rng, functions) -> Cases."""
    return lambda rng, functions: (
        case for sizes in (APART, TALL, ALIKE) for case in cases(rng, functions, sizes)
    )
