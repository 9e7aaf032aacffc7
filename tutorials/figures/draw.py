"""Draws the pictures of the tutorials: `python tutorials/figures/draw.py [NAME ...]`.

One function a picture, which returns a figure and gives its name to the file. Needs matplotlib
and Pillow. Three of them, training, gates and heads, train a network for two minutes.
"""

import io
import sys
from functools import cache
from pathlib import Path
from time import perf_counter

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from threadpoolctl import threadpool_limits

import miniconvit as mc
from miniconvit import layers
from miniconvit.analysis import maps as analysis
from miniconvit.analysis import readings, style
from miniconvit.analysis.style import BLUE, GREEN, GREY, ORANGE, VERMILION, new_figure
from miniconvit.data import epoch_order, load_dataset, normalize
from miniconvit.engine.objective import Classification
from miniconvit.engine.threads import Engine
from miniconvit.gradcheck.mutants import planted

FOLDER = Path(__file__).parent
DOCS = FOLDER.parents[1] / "docs"
PLACES = {"heads": DOCS}  # the README shows it too


def step_size():
    """Error of a difference quotient against its step (page 0)."""
    figure, ((axes,),) = new_figure(1, 1, 3.4, 5.6)
    steps = 10.0 ** np.arange(-13, -0.49, 0.25)

    def central(x, h):
        return (np.sin(x + h) - np.sin(x - h)) / (2 * h)

    def forward(x, h):
        return (np.sin(x + h) - np.sin(x)) / h

    def worst(quotient, dtype):
        x = np.linspace(-3, 3, 1001).astype(dtype)
        exact = np.cos(x.astype("float64"))
        return [np.abs(quotient(x, dtype(h)).astype("float64") - exact).max() for h in steps]

    for quotient, dtype, line, color, label, place in (
        (central, np.float32, "s-", BLUE, "central, float32", (1e-11, 3)),
        (forward, np.float64, "^-", ORANGE, "forward, float64", (3e-9, 8e-6)),
        (central, np.float64, "o-", GREEN, "central, float64", (3e-9, 4e-11)),
    ):
        axes.loglog(steps, worst(quotient, dtype), line, color=color)
        axes.annotate(label, place, color=color, ha="right" if color is GREEN else "left")
    axes.axvline(1e-5, color=GREY, lw=1, ls="--")
    axes.annotate("h = 1e-5", (1.3e-5, 3e-12), color=GREY)
    axes.set(xlabel="step h", ylabel="largest error of the slope", ylim=(1e-12, 30))
    return figure


def gelu():
    """The GELU and its slope (page 5)."""
    figure, ((axes,),) = new_figure(1, 1, 3.0, 5.6)
    x = np.linspace(-4, 4, 401)
    y, cache = layers.gelu_forward(x)
    slope = layers.gelu_backward(np.ones_like(x), cache)
    axes.axhline(0, color=GREY, lw=0.8)
    axes.axhline(1, color=GREY, lw=0.8, ls=":")
    axes.plot(x, y, color=BLUE)
    axes.plot(x, slope, ls="--", color=VERMILION)
    axes.annotate("GELU", (1.35, 1.6), color=BLUE, ha="right")
    axes.annotate("its slope", (2.6, 0.7), color=VERMILION)
    axes.set(xlabel="x", ylim=(-0.4, 2.6), xticks=range(-4, 5))
    return figure


def factors():
    """A head's two factor matrices, and the attention of one query (page 8)."""
    figure, (panels,) = new_figure(1, 3, 2.0)
    side, (row, column) = 14, (6, 5)
    weight = 0.25 * np.array([[2 * 2.0, 2 * -1.0, -1.0]])  # two to the right, one up
    (py, px), _ = layers.position_attention_forward(weight, np.zeros(1), (side, side))
    maps = (py[0], px[0], np.outer(py[0, row], px[0, column]))
    titles = ("$P_y$: rows", "$P_x$: columns", f"query in row {row}, column {column}")
    for panel, values, title in zip(panels, maps, titles, strict=True):
        shown = style.draw_map(panel, values, "position", values.max())
        style.color_bar(figure, panel, shown, "")
        panel.set(title=title, xticks=(0, 4, 8, 12), yticks=(0, 4, 8, 12))
    for panel, line, name in zip(panels[:2], (row, column), ("row", "column"), strict=True):
        panel.add_patch(Rectangle((-0.5, line - 0.5), side, 1, fill=False, lw=1.2))
        panel.set(ylabel=f"{name} of the query", xlabel=f"{name} of the key")
    style.mark_query(panels[2], (row, column))
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

    figure, ((axes,),) = new_figure(1, 1, 3.0, 5.6)
    strengths = np.arange(0.5, 40, 0.5)
    axes.semilogy(strengths, [error(s) for s in strengths], color=BLUE)
    axes.semilogy(strengths, 4 * np.exp(-strengths), color=GREY, ls="--", lw=1)
    axes.annotate("9 heads against the convolution", (13, 1e-3), color=BLUE)
    axes.annotate("4 exp(-strength)", (9, 4e-7), color=GREY, ha="right")
    axes.set(xlabel="locality strength", ylabel="largest error", ylim=(1e-16, 1e2))
    axes.set_yticks(10.0 ** np.arange(-16, 3, 4))
    return figure


def locality():
    """Attention of one query for several locality strengths, for 9 and for 4 heads (page 9)."""
    figure, panels = new_figure(2, 4, 3.5)
    side, query = 14, (7, 6)  # row, column
    strengths = (0.1, 0.5, 1.0, 5.0)
    rows = ((1.0, -1.0, "one of 9 heads"), (0.5, -0.5, "one of 4 heads"))
    for line, (right, down, name) in zip(panels, rows, strict=True):
        for panel, strength in zip(line, strengths, strict=True):
            weight = strength * np.array([[2 * right, 2 * down, -1.0]])
            (py, px), _ = layers.position_attention_forward(weight, np.zeros(1), (side, side))
            attention = np.outer(py[0, query[0]], px[0, query[1]])
            shown = style.draw_map(panel, attention, "position", 1.0, query)
        line[0].set_ylabel(name)
    for panel, strength in zip(panels[0], strengths, strict=True):
        panel.set_title(f"strength {strength:g}")
    style.color_bar(figure, panels, shown, "attention of the framed patch")
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
    C, P = content[q].reshape(8, 8), position[0, q].reshape(8, 8)
    figure, (panels,) = new_figure(1, 6, 1.4)
    style.draw_picture(panels[0], image.transpose(1, 2, 0), (8, 8), query)
    panels[0].set_title("image")
    shown = {}  # kind to a map
    for panel, g in zip(panels[1:], (0, 0.25, 0.5, 0.75, 1), strict=True):
        kind = {0: "content", 1: "position"}.get(g, "mixture")
        shown[kind] = style.draw_map(panel, (1 - g) * C + g * P, kind, P.max(), query)
        panel.set_title(f"g = {g:g}")
    style.color_bar(figure, panels, shown["position"], "attention, in each colour")
    for kind in ("mixture", "content"):  # to the left of it, the same scale in the other colours
        bar = figure.colorbar(shown[kind], ax=panels, fraction=0.05, pad=0.015, aspect=18, ticks=[])
        bar.outline.set_linewidth(0.5)
    return figure


def optimizer():
    """Two ways down a valley, and the learning rate over a training (page 13)."""
    figure, ((valley, rate),) = new_figure(1, 2, 2.7)
    valley.grid(False)
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
    valley.annotate("gradient descent", (-1.05, 0.55), color=VERMILION)
    valley.annotate("Adam", (0.42, 0.32), color=BLUE)
    valley.set(
        xlabel="a, the steep direction", ylabel="b, the flat one", xticks=(-1, -0.5, 0, 0.5, 1)
    )
    epochs = np.linspace(0, 300, 601)
    rate.plot(epochs, [1000 * mc.warmup_cosine(t, 300, 1e-3, 5) for t in epochs], color=BLUE)
    rate.set(xlabel="epoch", ylabel="learning rate / 0.001", ylim=(0, 1.05))
    return figure


def shapes():
    """One image of each class (page 14)."""
    data = load_dataset("shapes")
    figure, panels = new_figure(2, 5, 3.4)
    for panel, image, name in zip(panels.flat, data.train.images, data.classes, strict=False):
        style.draw_picture(panel, image.transpose(1, 2, 0) / 255, (8, 8))
        panel.set_title(name.replace(", ", ",\n"))
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
    with Engine(Classification(config)) as engine:
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
    figure, ((left, right),) = new_figure(1, 2, 2.7)
    steps = np.arange(1, len(losses) + 1) * epochs / len(losses)
    smooth = np.convolve(losses, np.ones(25) / 25, "valid")
    left.plot(steps, losses, lw=0.5, alpha=0.5, color=style.TRAIN)
    left.plot(steps[12:-12], smooth, color=style.TRAIN)
    left.axhline(np.log(10), color=GREY, lw=1, ls="--")
    left.annotate("guessing: ln 10", (epochs, np.log(10) + 0.05), color=GREY, ha="right")
    texture = 0.4 * np.log(4) + 0.6 * np.log(3)  # four classes share one, three each the others
    left.axhline(texture, color=GREY, lw=1, ls="--")
    left.annotate("texture alone", (epochs, texture + 0.05), color=GREY, ha="right")
    left.set(xlabel="epoch", ylabel="training loss", ylim=(0, 2.7))
    right.plot(range(1, epochs + 1), 100 * accuracies, "o-", color=style.VAL)
    right.axhline(10, color=GREY, lw=1, ls="--")
    right.annotate("guessing", (epochs, 12), color=GREY, ha="right")
    right.axhline(30, color=GREY, lw=1, ls="--")
    right.annotate("texture alone", (epochs, 32), color=GREY, ha="right")
    right.set(
        xlabel="epoch", ylabel="validation accuracy (%)", ylim=(0, 105), xlim=(0, epochs + 0.2)
    )
    return figure


def gates():
    """The gates of every head during the training of page 14 (page 16)."""
    *_, gating_params, accuracies = _trained()
    shares = 1 / (1 + np.exp(-gating_params))  # (steps, layers, H)
    epochs = np.linspace(0, len(accuracies), len(shares))
    figure, (panels,) = new_figure(1, 3, 2.4, sharey=True)
    for i, panel in enumerate(panels):
        for h, line in enumerate(("-", "--", "-.", ":")):
            panel.plot(epochs, shares[:, i, h], line, color=style.shade(h, 4), label=f"{h + 1}")
        panel.axhline(1 / (1 + np.exp(-1)), color=GREY, lw=0.8)
        panel.set(title=style.layer_name(i), xlabel="epoch")
    panels[0].set(ylabel="gate (share of position)")
    figure.legend(*panels[0].get_legend_handles_labels(), title="head", loc="outside right center")
    return figure


def heads():
    """A layer's maps for one patch, before and after the training of page 14 (README, page 16)."""
    after, config, *_ = _trained()
    data, query, layer = load_dataset("shapes"), (6, 2), 2  # the third layer
    image = data.val.images[47]
    pixels = normalize(image[None], data.mean, data.std)[0]
    times = {"before training": mc.init_params(config), "after training": after}
    maps = [analysis.query_maps(pixels, p, config, query)[layer] for p in times.values()]
    top = 0.5  # little is above it
    figure = Figure(figsize=(style.WIDTH, 2.65))

    def panel(x, y, width, height):
        """Axes at a place in inches, y from the top."""
        x, width = x / style.WIDTH, width / style.WIDTH
        return figure.add_axes((x, 1 - (y + height) / 2.65, width, height / 2.65))

    picture = panel(0.05, 0.8, 1.3, 1.3)
    style.draw_picture(picture, image.transpose(1, 2, 0) / 255, config.grid, query)
    picture.set_title("what does the\nframed patch look at?")
    size, step = 0.56, 0.61
    for t, (title, params) in enumerate(times.items()):
        left = 1.62 + 2.53 * t
        figure.text((left + 2 * step - 0.03) / style.WIDTH, 0.93, title, ha="center", weight="bold")
        for h, g in enumerate(readings.gates(params, config)[layer]):
            x = left + h * step
            for y, kind in ((0.4, "content"), (1.04, "position"), (2.0, "mixture")):
                axis = panel(x, y, size, size)
                shown = style.draw_map(axis, maps[t][kind][h], kind, top, query)
                axis.set_title(style.head_name(h) if kind == "content" else "", pad=3)
                if t == h == 0:
                    axis.set_ylabel(kind, color=style.MAPS[kind][1])
                if t == 1 and h == 3:
                    bar = figure.colorbar(shown, cax=panel(x + step, y, 0.07, size), extend="max")
                    style.label_bar(bar)
            _draw_gate(panel(x, 1.72, size, 0.16), g)
    figure.text(1.57 / style.WIDTH, 1 - 1.8 / 2.65, "gate", ha="right", va="center")
    return figure


def _draw_gate(axis, g):
    """The shares of content, 1 - g, and of position, g, as a bar."""
    axis.barh(0, 1 - g, color=style.CONTENT)
    axis.barh(0, g, left=1 - g, color=style.POSITION)
    axis.set(xlim=(0, 1), ylim=(-0.4, 0.4), xticks=(), yticks=())
    axis.text(1 - g / 2, 0, f"{g:.2f}", color="white", ha="center", va="center_baseline")
    axis.spines[:].set_visible(False)


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

    pairs = ("_forward", "_backward")
    functions = {n: timed(n, f) for n, f in vars(layers).items() if n.endswith(pairs)}
    with planted(**functions), threadpool_limits(limits=1, user_api="blas"):
        for _ in range(10):
            logits, cache = mc.convit_forward(x, params, config)
            mc.convit_backward(np.ones_like(logits), cache)
    work = {"linear": 80.7, "attention": 17.6, "position_values": 1.6}  # as page 15 counts them
    figure, ((axes,),) = new_figure(1, 1, 2.8, 6.2)
    place = np.arange(len(groups))
    total = sum(seconds.values())
    axes.bar(
        place - 0.2, [work.get(g, 0) for g in groups], 0.4, color=BLUE, label="multiplications"
    )
    shares = [100 * seconds[g] / total for g in groups]
    axes.bar(place + 0.2, shares, 0.4, color=ORANGE, hatch="//", label="time")
    names = ("linear\nlayers", "attention\nproducts", "position\nproducts")
    axes.set_xticks(place, (*names, "softmax", "GELU", "LayerNorm", "the rest"))
    axes.set(ylabel="share (%)")
    axes.grid(axis="x", visible=False)
    axes.legend()
    return figure


def main(names):
    drawings = {name: item for name, item in globals().items() if _is_drawing(name, item)}
    for name in names or drawings:
        picture = io.BytesIO()
        with style.look():
            drawings[name]().savefig(picture, dpi=style.SCREEN)
        path = PLACES.get(name, FOLDER) / f"{name}.png"
        Image.open(picture).convert("RGB").quantize(256).save(path, optimize=True)


def _is_drawing(name, item):
    is_ours = getattr(item, "__module__", "") == __name__ and callable(item)
    return is_ours and name != "main" and not name.startswith("_")


if __name__ == "__main__":
    main(sys.argv[1:])
