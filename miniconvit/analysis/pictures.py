"""Pictures of what the attention does, in the manner of the paper's figures 5, 6 and 7.

Made for print: 300 dots per inch, colours that differ in lightness too, and a label on everything.
"""

import io
from importlib.util import find_spec

import numpy as np

from ..errors import UserError
from ..system import write_file
from .maps import uniform_nonlocality

WIDTH = 7.0  # inches: a page's text
FAINTEST = 1e-3  # attention below it has the colour of nothing


def require_matplotlib():
    """Raises UserError, with the line that installs it, where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise UserError("pictures need matplotlib, which is missing: pip install matplotlib")


def draw_nonlocality(runs, note, path, xlabel="epoch"):
    """Figure 5: how far each layer looks, over the epochs, one panel a run.

    runs: a list of (title, config, epochs, values), values (seeds, epochs, depth): means over the
    heads, drawn as mean and, of several seeds, a band of ± their sample standard deviation; note:
    what else to say of them.
    """
    width = WIDTH if len(runs) > 1 else 4.6
    figure, axes = new_figure(1, len(runs), height=3.2, width=width, sharey=True)
    farthest = max(max(uniform_nonlocality(run[1].grid), np.max(run[3])) for run in runs)
    for axis, (title, config, epochs, values) in zip(axes[0], runs, strict=True):
        for i, columns in enumerate(np.moveaxis(np.asarray(values), -1, 0)):
            column, local = columns.mean(axis=0), i < config.local_up_to_layer
            axis.plot(
                epochs, column, "-" if local else "--", color=_shade(i, config.depth),
                linewidth=1.3, label=f"{i + 1} {config.attention.upper() if local else 'MHSA'}",
                marker=("o" if local else "s") if len(epochs) <= 21 else "", markersize=2.5,
            )  # fmt: skip
            if len(columns) > 1:
                spread = columns.std(axis=0, ddof=1)
                axis.fill_between(epochs, column - spread, column + spread, linewidth=0, alpha=0.2,
                                  color=_shade(i, config.depth))  # fmt: skip
        uniform = uniform_nonlocality(config.grid)
        axis.axhline(uniform, color="0.55", linewidth=0.8, linestyle=":")
        axis.annotate("even attention", (0.0, uniform), (3, 2), ("axes fraction", "data"),
                      "offset points", va="bottom", fontsize=7, color="0.35")  # fmt: skip
        axis.set(ylim=(0, 1.12 * farthest))
        axis.set_title(title, fontsize=8)
        axis.set_xlabel(xlabel, fontsize=8)
        _whole_numbers(axis)
        axis.legend(title="layer", fontsize=7, title_fontsize=7, loc="center left",
                    bbox_to_anchor=(1.0, 0.5), frameon=False)  # fmt: skip
    axes[0][0].set_ylabel("nonlocality (patches)", fontsize=8)
    figure.supxlabel(note, fontsize=6)
    save(figure, path)


def draw_gates(epochs, values, path, xlabel="epoch", note=""):
    """Figure 6: the share of position in each GPSA layer over the epochs, head by head.

    values (seeds, epochs, GPSA layers, H); note: what to say of the seeds.
    """
    values = np.asarray(values)
    seeds, _, layers, heads = values.shape
    columns = min(layers, 5)
    rows = -(-layers // columns)
    figure, axes = new_figure(rows, columns, height=0.5 + 1.6 * rows, sharex=True, sharey=True)
    for i, axis in enumerate(axes.flat):
        if i >= layers:
            axis.set_visible(False)
            continue
        for h in range(heads):
            lines = axis.plot(epochs, values[:, :, i, h].T, color=_shade(h, heads),
                              linewidth=1.0 if seeds == 1 else 0.7)  # fmt: skip
            lines[0].set_label(f"{h + 1}")
        axis.plot(epochs, values[:, :, i].mean(axis=(0, 2)), "k--", linewidth=1.6, label="mean")
        axis.set(ylim=(0, 1))
        axis.set_title(f"layer {i + 1}", fontsize=8)
        _whole_numbers(axis)
        axis.set_xlabel(xlabel if i + columns >= layers else "", fontsize=8)
        axis.tick_params(labelbottom=i + columns >= layers)
    for row in axes:
        row[0].set_ylabel("gate (share of position)", fontsize=8)
    lines, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, title="head", loc="outside right center", fontsize=7,
                  title_fontsize=7, frameon=False)  # fmt: skip
    figure.supxlabel(note, fontsize=6)
    save(figure, path)


def draw_maps(picture, layers, query, note, path):
    """Figure 7: what the query attends to, one row a layer, one column a head.

    picture (height, width, 1 or 3), 0 to 1; layers: describe's dicts, each with the entry "maps" of
    query_maps; note: what else to say of the maps. Of GPSA the mixture is shown.
    """
    heads = len(layers[0]["heads"])
    height = 0.9 + WIDTH / (heads + 2) * len(layers)
    figure, axes = new_figure(len(layers), heads + 1, height)
    for row, layer in zip(axes, layers, strict=True):
        _draw_picture(row[0], picture, layer["maps"]["mixture"].shape[1:], query)
        row[0].set_ylabel(f"layer {layer['layer']}\n{layer['attention'].upper()}", fontsize=8)
        for h, axis in enumerate(row[1:]):
            shown = _draw_map(axis, layer["maps"]["mixture"][h], query)
            gate = layer["heads"][h].get("gate")
            axis.set_title("" if gate is None else f"gate {gate:.2f}", fontsize=7, pad=2)
    for h, axis in enumerate(axes[0][1:]):
        axis.set_title(f"head {h + 1}\n{axis.get_title()}".strip(), fontsize=7, pad=2)
    axes[0][0].set_title("image, query", fontsize=7, pad=2)
    _scale(figure, axes, shown, note)
    save(figure, path)


def draw_parts(picture, layer, query, path):
    """One GPSA layer taken apart: content, position and mixture, one column a head.

    Arguments as in draw_maps, for one layer.
    """
    heads = layer["heads"]
    height = 0.9 + 3 * WIDTH / (len(heads) + 2)
    figure, axes = new_figure(3, len(heads) + 1, height)
    for row, kind in zip(axes, ("content", "position", "mixture"), strict=True):
        _draw_picture(row[0], picture, layer["maps"][kind].shape[1:], query)
        row[0].set_ylabel(kind, fontsize=8)
        for h, axis in enumerate(row[1:]):
            shown = _draw_map(axis, layer["maps"][kind][h], query)
            if kind == "position" and heads[h]["centre"] is not None:
                right, down = heads[h]["centre"]
                axis.plot(query[1] + right, query[0] + down, "+w", scalex=False, scaley=False)
    for h, axis in enumerate(axes[0][1:]):
        axis.set_title(f"head {h + 1}\ngate {heads[h]['gate']:.2f}", fontsize=7, pad=2)
    axes[0][0].set_title(f"layer {layer['layer']}", fontsize=8, pad=2)
    _scale(figure, axes, shown, "+ is the centre of the head's position attention")
    save(figure, path)


def new_figure(rows, columns, height, width=WIDTH, **options):
    """(figure, axes (rows, columns)), sizes in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save(figure, path):
    """Writes the figure as a PNG file for print."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=300)
    write_file(path, content.getvalue())


def _shade(index, count):
    """A colour of viridis without its palest end: dark is the first."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.88 * index / max(count - 1, 1))


def _whole_numbers(axis):
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axis.grid(alpha=0.3, linewidth=0.5)
    axis.tick_params(labelsize=7)


def _draw_picture(axis, picture, grid, query):
    rows, cols = grid
    extent = (-0.5, cols - 0.5, rows - 0.5, -0.5)
    picture = picture[..., 0] if picture.shape[-1] == 1 else picture
    axis.imshow(picture, extent=extent, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    _mark(axis, query)


def _draw_map(axis, attention, query):
    from matplotlib.colors import LogNorm

    shown = axis.imshow(np.maximum(attention, FAINTEST), cmap="magma", norm=LogNorm(FAINTEST, 1.0))
    _mark(axis, query)
    return shown


def _mark(axis, query):
    """A frame around the query's patch, to be seen on light and dark."""
    from matplotlib.patches import Rectangle

    for color, width in (("k", 2.2), ("c", 1.2)):
        corner = query[1] - 0.5, query[0] - 0.5
        axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=color, linewidth=width))
    axis.set(xticks=[], yticks=[])


def _scale(figure, axes, shown, note):
    bar = figure.colorbar(shown, ax=axes, orientation="horizontal", fraction=0.03, aspect=50)
    bar.set_label("\n".join(filter(None, ["attention of the framed patch", note])), fontsize=7)
    bar.ax.tick_params(labelsize=7)
