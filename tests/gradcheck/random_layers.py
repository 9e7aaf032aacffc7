"""Right layers of many kinds, shapes and scales, and errors to plant in them, all from a seed.

Each backward was derived on its own and shares no line with the library's layers.
"""

import numpy as np
from scipy.special import erf, expit

SCALES = -3.0, 4.0  # powers of ten


def _dense(rng, s):
    n, i, o = rng.integers(1, 6, 3)
    x, w, b = s * rng.standard_normal((n, i)), rng.standard_normal((o, i)), rng.standard_normal(o)
    return (
        lambda x, w, b: (x @ w.T + b, (x, w)),
        lambda dy, c: {"x": dy @ c[1], "w": dy.T @ c[0], "b": dy.sum(0)},
        {"x": x, "w": w / s, "b": b},
    )


def _normalise(rng, s):
    """LayerNorm, with an offset and an eps that follow the scale or not."""
    n, d = rng.integers(1, 5), rng.integers(3, 9)
    eps = rng.choice([1e-12, 1e-6, 1e-5])
    x = s * (rng.standard_normal((n, d)) + rng.choice([0, 1, 30]))

    def forward(x, w, b):
        z = x - x.mean(-1, keepdims=True)
        r = (np.square(z).mean(-1, keepdims=True) + eps) ** -0.5
        return z * r * w + b, (z * r, r, w)

    def backward(dy, c):
        h, r, w = c
        g = dy * w
        dx = r * (g - g.mean(-1, keepdims=True) - h * (g * h).mean(-1, keepdims=True))
        return {"x": dx, "w": (dy * h).sum(0), "b": dy.sum(0)}

    return forward, backward, {"x": x, "w": rng.standard_normal(d), "b": rng.standard_normal(d)}


def _elementwise(rng, s):
    """One of many functions of one variable, stretched to the scale of its inputs."""
    x = np.array(s * rng.standard_normal(tuple(rng.integers(1, 5, rng.integers(0, 4)))))
    functions = [
        (np.tanh, lambda z: 1 - np.tanh(z) ** 2),
        (np.sin, np.cos),
        (expit, lambda z: expit(z) * (1 - expit(z))),
        (erf, lambda z: 2 / np.sqrt(np.pi) * np.exp(-z * z)),
        (np.exp, np.exp),
        (lambda z: z**3, lambda z: 3 * z**2),
        (lambda z: 1 / (1 + z * z), lambda z: -2 * z / (1 + z * z) ** 2),
        (lambda z: np.logaddexp(0, z), expit),
        (lambda z: z * np.abs(z), lambda z: 2 * np.abs(z)),
        (lambda z: np.sin(30 * z), lambda z: 30 * np.cos(30 * z)),
    ]
    f, df = functions[rng.integers(len(functions))]
    return lambda x: (f(x / s), x), lambda dy, x: {"x": dy * df(x / s) / s}, {"x": x}


def _away_from_zero(rng, s):
    """Functions that end at zero."""
    sign = rng.choice([-1.0, 1.0], (3, 4))
    x = s * sign * rng.uniform(0.2, 3, (3, 4))
    kind = rng.integers(4)
    if kind == 0:
        return lambda x: (np.log(np.abs(x)), x), lambda dy, x: {"x": dy / x}, {"x": x}
    if kind == 1:
        return lambda x: (1 / x, x), lambda dy, x: {"x": -dy / x**2}, {"x": x}
    if kind == 2:
        return (
            lambda x: (np.sqrt(np.abs(x)), x),
            lambda dy, x: {"x": dy * np.sign(x) / (2 * np.sqrt(np.abs(x)))},
            {"x": x},
        )
    return (
        lambda x: (np.maximum(x, 0) + 0.1 * x, x),
        lambda dy, x: {"x": dy * ((x > 0) + 0.1)},
        {"x": x},
    )


def _attend(rng, s):
    n, d = rng.integers(2, 6, 2)

    def soft(z):
        z = np.exp(z - z.max(-1, keepdims=True))
        return z / z.sum(-1, keepdims=True)

    def forward(q, k, v):
        a = soft(q @ k.T / s)
        return a @ v, (q, k, v, a)

    def backward(dy, c):
        q, k, v, a = c
        da = dy @ v.T
        dz = a * (da - (da * a).sum(-1, keepdims=True)) / s
        return {"q": dz @ k, "k": dz.T @ q, "v": a.T @ dy}

    q, k, v = rng.standard_normal((3, n, d))
    return forward, backward, {"q": s * q, "k": k, "v": s * v}


def _reduce(rng, s):
    """Norms, means, products and sums over one axis, to one number or several."""
    x = s * (rng.standard_normal((4, 3)) + 0.1)
    kind = rng.integers(4)
    if kind == 0:

        def forward(x):
            return np.sqrt((x * x).sum()), x

        return forward, lambda dy, x: {"x": dy * x / np.sqrt((x * x).sum())}, {"x": x}  # fmt: skip
    if kind == 1:
        return (
            lambda x: (np.prod(x / s, axis=1), x),
            lambda dy, x: {"x": (dy * np.prod(x / s, axis=1))[:, None] / x},
            {"x": x},
        )
    if kind == 2:
        return (
            lambda x: ((x.mean(0), x.max(1)), x),
            lambda dy, x: {"x": dy[0] / 4 + dy[1][:, None] * (x == x.max(1, keepdims=True))},
            {"x": x},
        )
    return (
        lambda x, y: (((x - y) ** 2).sum() / s, (x, y)),
        lambda dy, c: {"x": 2 * dy * (c[0] - c[1]) / s, "y": 2 * dy * (c[1] - c[0]) / s},
        {"x": x, "y": s * rng.standard_normal((4, 3))},
    )


def _convolve(rng, s):
    n, k = rng.integers(5, 9), rng.integers(1, 4)
    return (
        lambda x, w: (np.convolve(x, w, "valid"), (x, w)),
        lambda dy, c: {"x": np.convolve(dy, c[1][::-1]), "w": np.correlate(c[0], dy)[::-1]},
        {"x": s * rng.standard_normal(n), "w": rng.standard_normal(k)},
    )


def _two_layers(rng, s):
    """A small network: its inner values are of another scale than its inputs."""
    i, h = rng.integers(2, 6, 2)

    def forward(x, u, v):
        z = np.tanh(x @ u / s)
        return z @ v + x[:, :1], (x, u, v, z)

    def backward(dy, c):
        x, u, v, z = c
        g = (dy @ v.T) * (1 - z * z) / s
        dx = g @ u.T
        dx[:, 0] += dy[:, 0]
        return {"x": dx, "u": x.T @ g, "v": z.T @ dy}

    u, v = rng.standard_normal((i, h)), s * rng.standard_normal((h, 1))
    return forward, backward, {"x": s * rng.standard_normal((3, i)), "u": u, "v": v}


def _mixed(rng, s):
    """Outputs and gradients whose entries differ by up to a thousand times."""
    sizes = 10.0 ** rng.uniform(-1.5, 1.5, 6)
    return (
        lambda x: (sizes * np.sin(x / s), x),
        lambda dy, x: {"x": dy * sizes * np.cos(x / s) / s},
        {"x": s * rng.standard_normal(6)},
    )


KINDS = [
    _dense, _normalise, _elementwise, _away_from_zero, _attend, _reduce, _convolve, _two_layers,
    _mixed,
]  # fmt: skip


def right_layer(seed):
    """(forward, backward, inputs): a right one, at a scale of 1e-3 to 1e4."""
    rng = np.random.default_rng([seed, 1])
    return KINDS[seed % len(KINDS)](rng, 10 ** rng.uniform(*SCALES))


def plant(seed, backward, inputs):
    """The same backward with one error in one gradient, and what the error is."""
    rng = np.random.default_rng([seed, 2])
    name = str(rng.choice(list(inputs)))
    kinds = ["factor", "sign", "entry", "constant", "lost", "noise", "forgotten"]
    kind = str(rng.choice(kinds))
    size = 10 ** rng.uniform(-5, 0)
    place = int(rng.integers(max(inputs[name].size, 1)))
    drawn = rng.standard_normal(inputs[name].shape)

    def wrong(dy, cache):
        grads = dict(backward(dy, cache))
        g = np.array(grads[name], dtype="float64")
        typical = np.sqrt((g * g).mean())
        if kind == "factor":
            g *= 1 + size
        elif kind == "sign":
            g *= -1
        elif kind == "entry":
            g.flat[place] += size * typical
        elif kind == "constant":
            g += size * typical
        elif kind == "lost":
            g.flat[np.abs(g).argmax()] = 0
        elif kind == "noise":
            g *= 1 + size * np.abs(drawn)
        else:
            g *= 0
        return grads | {name: g}

    return wrong, f"{kind} of {name}, size {size:.0e}"
