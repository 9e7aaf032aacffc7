"""Draws the pictures of the tutorials: `python tutorials/figures/draw.py [NAME ...]`.

One function a picture, which returns a figure and gives its name to the file. Needs matplotlib
and Pillow. Three of them, training, gates and attention_maps, train a network for some minutes.
"""

import io
import sys
from functools import cache
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from threadpoolctl import threadpool_limits

import miniconvit as mc
from miniconvit import layers
from miniconvit.analysis import maps as analysis
from miniconvit.data import epoch_order, load_dataset, normalize
from miniconvit.engine.threads import Engine

FOLDER = Path(__file__).parent
# Okabe and Ito's colours, which the colour-blind can tell apart.
BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#777777"

plt.rcParams.update(
    {
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": plt.cycler(color=[BLUE, ORANGE, GREEN, VERMILION]),
        "figure.constrained_layout.use": True,
        "image.cmap": "viridis",
    }
)


def step_size():
    """Error of a difference quotient against its step (page 0)."""
    figure, axes = plt.subplots(figsize=(7, 4.2))
    steps = 10.0 ** np.arange(-13, -0.49, 0.25)

    def central(x, h):
        return (np.sin(x + h) - np.sin(x - h)) / (2 * h)

    def forward(x, h):
        return (np.sin(x + h) - np.sin(x)) / h

    def worst(quotient, dtype):
        x = np.linspace(-3, 3, 1001).astype(dtype)
        exact = np.cos(x.astype("float64"))
        return [np.abs(quotient(x, dtype(h)).astype("float64") - exact).max() for h in steps]

    for quotient, dtype, marker, label, place in (
        (central, np.float32, "s", "central, float32", (1e-11, 3)),
        (forward, np.float64, "^", "forward, float64", (3e-9, 8e-6)),
        (central, np.float64, "o", "central, float64", (3e-9, 4e-11)),
    ):
        (line,) = axes.loglog(steps, worst(quotient, dtype), marker=marker, ms=4)
        axes.annotate(label, place, color=line.get_color(), ha="right" if marker == "o" else "left")
    axes.axvline(1e-5, color=GREY, lw=1, ls="--")
    axes.annotate("h = 1e-5", (1.3e-5, 3e-12), color=GREY)
    axes.set(xlabel="step h", ylabel="largest error of the slope", ylim=(1e-12, 30))
    return figure


def gelu():
    """The GELU and its slope (page 5)."""
    figure, axes = plt.subplots(figsize=(7, 3.6))
    x = np.linspace(-4, 4, 401)
    y, cache = layers.gelu_forward(x)
    slope = layers.gelu_backward(np.ones_like(x), cache)
    axes.axhline(0, color=GREY, lw=0.8)
    axes.axhline(1, color=GREY, lw=0.8, ls=":")
    axes.plot(x, y, lw=2)
    axes.plot(x, slope, lw=2, ls="--", color=VERMILION)
    axes.annotate("GELU", (1.35, 1.6), color=BLUE, ha="right")
    axes.annotate("its slope", (2.6, 0.7), color=VERMILION)
    axes.set(xlabel="x", ylim=(-0.4, 2.6), xticks=range(-4, 5))
    return figure


def factors():
    """A head's two factor matrices, and the attention of one query (page 8)."""
    figure, panels = plt.subplots(1, 3, figsize=(9, 3.4))
    side, (row, column) = 14, (6, 5)
    weight = 0.25 * np.array([[2 * 2.0, 2 * -1.0, -1.0]])  # two to the right, one up
    (py, px), _ = layers.position_attention_forward(weight, np.zeros(1), (side, side))
    maps = (py[0], px[0], np.outer(py[0, row], px[0, column]))
    titles = ("$P^y$: rows", "$P^x$: columns", f"query in row {row}, column {column}")
    for panel, values, title in zip(panels, maps, titles, strict=True):
        panel.imshow(values)
        panel.set_title(title, fontsize=11)
        panel.set(xticks=(0, 4, 8, 12), yticks=(0, 4, 8, 12))
        panel.spines[:].set_visible(False)
    for panel, line, name in zip(panels[:2], (row, column), ("row", "column"), strict=True):
        panel.add_patch(plt.Rectangle((-0.5, line - 0.5), side, 1, fill=False, ec="white"))
        panel.set(ylabel=f"{name} of the query", xlabel=f"{name} of the key")
    panels[2].plot(column, row, "x", color="white", ms=9, mew=2)
    panels[2].set(ylabel="row of the key", xlabel="column of the key")
    return figure


def convolution_error():
    """Distance between nine heads and the convolution, against locality strength (page 9)."""
    rng = np.random.default_rng(0)
    rows, cols = grid = (8, 8)
    image, kernel = rng.standard_normal((*grid, 6)), rng.standard_normal((9, 6, 5))
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    offsets = [(right, down) for right in (-1, 0, 1) for down in (-1, 0, 1)]
    exact = sum(
        padded[1 + down : 1 + down + rows, 1 + right : 1 + right + cols] @ W
        for (right, down), W in zip(offsets, kernel, strict=True)
    )
    centred = np.array([[2.0 * right, 2.0 * down, -1.0] for right, down in offsets])

    def error(strength):
        factors, _ = layers.position_attention_forward(strength * centred, np.zeros(9), grid)
        v = image.reshape(1, 1, -1, 6) @ kernel
        y, _ = layers.position_values_forward(v, *factors)
        return np.abs(y.sum(axis=1).reshape(exact.shape) - exact).max()

    figure, axes = plt.subplots(figsize=(7, 3.8))
    strengths = np.arange(0.5, 40, 0.5)
    axes.semilogy(strengths, [error(s) for s in strengths], lw=2)
    axes.semilogy(strengths, 4 * np.exp(-strengths), color=GREY, ls="--", lw=1)
    axes.annotate("9 heads against the convolution", (13, 1e-3), color=BLUE)
    axes.annotate("4 exp(-strength)", (9, 4e-7), color=GREY, ha="right")
    axes.set(xlabel="locality strength", ylabel="largest error", ylim=(1e-16, 1e2))
    axes.set_yticks(10.0 ** np.arange(-16, 3, 4))
    return figure


def locality():
    """Attention of one query for several locality strengths, for 9 and for 4 heads (page 9)."""
    figure, panels = plt.subplots(2, 4, figsize=(9, 4.9))
    side, query = 14, (7, 6)  # row, column
    strengths = (0.1, 0.5, 1.0, 5.0)
    rows = ((1.0, -1.0, "one of 9 heads"), (0.5, -0.5, "one of 4 heads"))
    for line, (right, down, name) in zip(panels, rows, strict=True):
        for panel, strength in zip(line, strengths, strict=True):
            weight = strength * np.array([[2 * right, 2 * down, -1.0]])
            (py, px), _ = layers.position_attention_forward(weight, np.zeros(1), (side, side))
            panel.imshow(np.outer(py[0, query[0]], px[0, query[1]]))
            panel.plot(*query[::-1], "x", color="black", ms=9, mew=4)
            panel.plot(*query[::-1], "x", color="white", ms=8, mew=2)
            panel.set(xticks=(), yticks=())
            panel.spines[:].set_visible(False)
        line[0].set_ylabel(name)
    for panel, strength in zip(panels[0], strengths, strict=True):
        panel.set_title(f"strength {strength:g}", fontsize=11)
    return figure


def gate():
    """One query's attention as its head's gate opens, from content to position (page 10)."""
    image, query = load_dataset("shapes").val.images[2], (4, 3)  # row, column
    colours = image.reshape(3, 8, 4, 8, 4).mean(axis=(2, 4)).reshape(3, 64).T / 255  # (N, 3)
    likeness = -100 * ((colours[:, None] - colours) ** 2).sum(axis=-1)
    content, _ = layers.softmax_forward(likeness)
    weight = 0.4 * np.array([[1.0, 1.0, -1.0]])  # towards the lower right
    position, _ = layers.position_attention_dense_forward(weight, np.zeros(1), (8, 8))
    q = query[0] * 8 + query[1]
    figure, panels = plt.subplots(1, 6, figsize=(10, 2.1))
    panels[0].imshow(image.transpose(1, 2, 0), extent=(-0.5, 7.5, 7.5, -0.5))
    panels[0].set_title("image", fontsize=11)
    for panel, g in zip(panels[1:], (0, 0.25, 0.5, 0.75, 1), strict=True):
        panel.imshow(((1 - g) * content[q] + g * position[0, q]).reshape(8, 8))
        panel.set_title(f"g = {g:g}", fontsize=11)
    for panel in panels:
        _mark(panel, query)
    return figure


def _mark(panel, query):
    """A cross on the query's patch, on a panel without axes."""
    for color, width in (("black", 4), ("white", 2)):
        panel.plot(query[1], query[0], "x", color=color, ms=8, mew=width)
    panel.set(xticks=(), yticks=())
    panel.spines[:].set_visible(False)


def optimizer():
    """Two ways down a valley, and the learning rate over a training (page 13)."""
    figure, (valley, rate) = plt.subplots(1, 2, figsize=(10, 3.6))
    steep, flat = np.meshgrid(np.linspace(-1.1, 1.1, 101), np.linspace(-0.2, 1.1, 101))
    levels = 50 * 2.0 ** np.arange(-9, 1)
    valley.contour(steep, flat, 50 * steep**2 + flat**2 / 2, levels, colors=GREY, linewidths=0.5)
    descent, adam = [np.ones(2)], [np.ones(2)]
    params = {"p": np.ones(2)}
    adamw = mc.AdamW(params, lr=0.05, weight_decay=0.0)
    for _ in range(50):
        descent.append(descent[-1] - 0.019 * np.array([100, 1]) * descent[-1])
        adamw.step(params, {"p": np.array([100, 1]) * params["p"]})
        adam.append(params["p"].copy())
    for path, marker, color in ((descent, "o", VERMILION), (adam, "s", BLUE)):
        valley.plot(*np.array(path).T, marker=marker, ms=3, lw=1, color=color)
    valley.annotate("gradient descent", (-0.95, 0.72), color=VERMILION)
    valley.annotate("Adam", (0.42, 0.32), color=BLUE)
    valley.set(
        xlabel="a, the steep direction", ylabel="b, the flat one", xticks=(-1, -0.5, 0, 0.5, 1)
    )
    epochs = np.linspace(0, 300, 601)
    rate.plot(epochs, [1000 * mc.warmup_cosine(t, 300, 1e-3, 5) for t in epochs], lw=2)
    rate.set(xlabel="epoch", ylabel="learning rate / 0.001", ylim=(0, 1.05))
    return figure


def shapes():
    """One image of each class (page 14)."""
    data = load_dataset("shapes")
    figure, panels = plt.subplots(2, 5, figsize=(8.5, 4.0))
    for panel, image, name in zip(panels.flat, data.train.images, data.classes, strict=False):
        panel.imshow(image.transpose(1, 2, 0))
        panel.set_title(name.replace(", ", ",\n"), fontsize=9)
        panel.set(xticks=(), yticks=())
        panel.spines[:].set_visible(False)
    return figure


@cache
def _trained():
    """The training of page 14, which takes minutes: parameters, config, loss and gates of every
    step (gates in order of block and head), validation accuracy of every epoch."""
    data, config = load_dataset("shapes"), mc.VARIANTS["convit_micro32"]
    params = mc.init_params(config)
    adamw = mc.AdamW(params, weight_decay=0.05)
    losses, gates, accuracies, batch, epochs, peak = [], [], [], 64, 6, 2e-3
    per_epoch = len(data.train.labels) // batch
    with Engine(config) as engine:
        for step in range(epochs * per_epoch):
            epoch, position = divmod(step, per_epoch)
            order = epoch_order(len(data.train.labels), 0, epoch)[position * batch :]

            def load(start, stop, order=order):
                images = data.train.images[order[start:stop]]
                return normalize(images, data.mean, data.std), data.train.labels[order[start:stop]]

            loss, _, grads = engine.loss_and_grads(load, batch, params)
            lr = mc.warmup_cosine(step / per_epoch, epochs, peak, 1, peak / 100, peak / 100)
            adamw.step(params, grads, lr)
            losses.append(loss)
            gates.append([p.copy() for name, p in params.items() if name.endswith("gating_param")])
            if position == per_epoch - 1:
                logits = engine.logits(
                    lambda a, b: normalize(data.val.images[a:b], data.mean, data.std),
                    len(data.val.labels), params,
                )  # fmt: skip
                accuracies.append((logits.argmax(axis=1) == data.val.labels).mean())
    return params, config, np.array(losses), np.array(gates), np.array(accuracies)


def training():
    """Loss and accuracy of the training of page 14."""
    *_, losses, _, accuracies = _trained()
    epochs = len(accuracies)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    steps = np.arange(1, len(losses) + 1) * epochs / len(losses)
    smooth = np.convolve(losses, np.ones(25) / 25, "valid")
    left.plot(steps, losses, lw=0.5, alpha=0.35)
    left.plot(steps[12:-12], smooth, lw=2, color=BLUE)
    left.axhline(np.log(10), color=GREY, lw=1, ls="--")
    left.annotate("guessing: ln 10", (epochs, np.log(10) + 0.05), color=GREY, ha="right")
    texture = 0.4 * np.log(4) + 0.6 * np.log(3)  # four classes share one, three each the others
    left.axhline(texture, color=GREY, lw=1, ls="--")
    left.annotate("texture alone", (epochs, texture + 0.05), color=GREY, ha="right")
    left.set(xlabel="epoch", ylabel="training loss", ylim=(0, 2.7))
    right.plot(range(1, epochs + 1), 100 * accuracies, marker="o", color=VERMILION)
    right.axhline(10, color=GREY, lw=1, ls="--")
    right.annotate("guessing", (epochs, 12), color=GREY, ha="right")
    right.axhline(30, color=GREY, lw=1, ls="--")
    right.annotate("texture alone", (epochs, 32), color=GREY, ha="right")
    right.set(
        xlabel="epoch", ylabel="validation accuracy in %", ylim=(0, 105), xlim=(0, epochs + 0.2)
    )
    return figure


def gates():
    """The gates of every head during the training of page 14 (page 16)."""
    *_, gating_params, accuracies = _trained()
    shares = 1 / (1 + np.exp(-gating_params))  # (steps, blocks, H)
    epochs = np.linspace(0, len(accuracies), len(shares))
    figure, panels = plt.subplots(1, 3, figsize=(9, 3.2), sharey=True)
    for i, panel in enumerate(panels):
        for head, style in enumerate(("-", "--", "-.", ":")):
            panel.plot(epochs, shares[:, i, head], style, lw=2, label=f"head {head}")
        panel.axhline(0.731, color=GREY, lw=0.8)
        panel.set_title(f"block {i}", fontsize=11)
        panel.set(xlabel="epoch")
    panels[0].set(ylabel="gate: share of position")
    panels[0].legend(fontsize=9, frameon=False)
    return figure


def attention_maps():
    """Content, position and mixture for one query in the network of page 14 (page 16)."""
    params, config, *_ = _trained()
    data, query, block = load_dataset("shapes"), (5, 6), 2
    image = data.val.images[4:5]
    maps = analysis.attention_maps(normalize(image, data.mean, data.std), params, config)[block]
    q = query[0] * 8 + query[1]
    figure, panels = plt.subplots(config.num_heads, 4, figsize=(7.5, 7.4))
    for head, row in enumerate(panels):
        row[0].imshow(image[0].transpose(1, 2, 0), extent=(-0.5, 7.5, 7.5, -0.5))
        shown = (maps.content[0, head], maps.position[head], maps.mixture[0, head])
        for panel, attention in zip(row[1:], shown, strict=True):
            panel.imshow(attention[q].reshape(8, 8))
        for panel in row:
            _mark(panel, query)
        row[0].set_ylabel(f"head {head}, gate {maps.gate[head]:.2f}")
    for panel, title in zip(panels[0], ("image", "content", "position", "mixture"), strict=True):
        panel.set_title(title, fontsize=11)
    return figure


def time():
    """Shares of the multiplications and of the time of a step on one core (page 15)."""
    config = mc.VARIANTS["convit_micro32"]
    params, groups = mc.init_params(config), ("linear", "attention", "position_values", "softmax")
    groups += ("gelu", "layernorm", "the rest")
    x = np.random.default_rng(15).standard_normal((16, 3, 32, 32)).astype("float32")
    seconds, inner = dict.fromkeys(groups, 0.0), [0.0]

    def timed(name, function):
        group = next((g for g in groups if name.startswith(f"{g}_")), "the rest")

        def wrapper(*args, **kwargs):
            inner.append(0.0)
            began = perf_counter()
            result = function(*args, **kwargs)
            elapsed = perf_counter() - began
            seconds[group] += elapsed - inner.pop()
            inner[-1] += elapsed
            return result

        return wrapper

    ops = SimpleNamespace(
        **{name: timed(name, f) for name, f in vars(layers.ops.REFERENCE).items()}
    )
    with threadpool_limits(limits=1, user_api="blas"):
        for _ in range(10):
            logits, cache = mc.convit_forward(x, params, config, ops=ops)
            mc.convit_backward(np.ones_like(logits), cache)
    work = {"linear": 80.7, "attention": 17.6, "position_values": 1.6}  # as page 15 counts them
    figure, axes = plt.subplots(figsize=(8, 3.6))
    place = np.arange(len(groups))
    total = sum(seconds.values())
    axes.bar(place - 0.2, [work.get(g, 0) for g in groups], 0.4, label="multiplications")
    axes.bar(place + 0.2, [100 * seconds[g] / total for g in groups], 0.4, label="time", hatch="//")
    names = ("linear\nlayers", "attention\nproducts", "position\nproducts")
    axes.set_xticks(place, (*names, "softmax", "GELU", "LayerNorm", "the rest"))
    axes.set(ylabel="share in %")
    axes.legend(frameon=False)
    return figure


def main(names):
    drawings = {name: item for name, item in globals().items() if _is_drawing(name, item)}
    for name in names or drawings:
        figure = drawings[name]()
        picture = io.BytesIO()
        figure.savefig(picture, dpi=100)
        plt.close(figure)
        Image.open(picture).convert("RGB").quantize(256).save(FOLDER / f"{name}.png", optimize=True)


def _is_drawing(name, item):
    is_ours = getattr(item, "__module__", "") == __name__ and callable(item)
    return is_ours and name != "main" and not name.startswith("_")


if __name__ == "__main__":
    main(sys.argv[1:])
