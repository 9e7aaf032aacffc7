"""Pictures of what the attention does, in the manner of the paper's figures 5, 6 and 7."""

import numpy as np

from . import style
from .maps import uniform_nonlocality


@style.look()
def draw_nonlocality(runs, note, path, xlabel="epoch"):
    """Figure 5: how far each layer looks, over the epochs, one panel a run.

    runs: a list of (title, config, epochs, values), values (seeds, epochs, depth): means over the
    heads, drawn as mean and, of several seeds, a band of ± their sample standard deviation; note:
    what else to say of them.
    """
    width = style.WIDTH if len(runs) > 1 else 4.6
    figure, axes = style.new_figure(1, len(runs), height=3.0, width=width, sharey=True)
    farthest = max(max(uniform_nonlocality(run[1].grid), np.max(run[3])) for run in runs)
    for axis, (title, config, epochs, values) in zip(axes[0], runs, strict=True):
        for i, columns in enumerate(np.moveaxis(np.asarray(values), -1, 0)):
            column, local = columns.mean(axis=0), i < config.local_up_to_layer
            color = style.shade(i, config.depth)
            axis.plot(
                epochs, column, "-" if local else "--", color=color,
                label=f"{i + 1} {config.attention.upper() if local else 'MHSA'}",
                marker=("o" if local else "s") if len(epochs) <= 21 else "",
            )  # fmt: skip
            if len(columns) > 1:
                spread = columns.std(axis=0, ddof=1)
                axis.fill_between(epochs, column - spread, column + spread, linewidth=0, alpha=0.2,
                                  color=color)  # fmt: skip
        uniform = uniform_nonlocality(config.grid)
        axis.axhline(uniform, color=style.GREY, linewidth=0.8, linestyle=":")
        axis.annotate("even attention", (0.0, uniform), (3, 4), ("axes fraction", "data"),
                      "offset points", va="bottom", fontsize=7, color=style.GREY)  # fmt: skip
        axis.set(ylim=(0, 1.14 * farthest), title=title, xlabel=xlabel)
        style.whole_numbers(axis)
        axis.legend(title="layer", loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes[0][0].set_ylabel("nonlocality (patches)")
    figure.supxlabel(note, fontsize=7)
    style.save(figure, path)


@style.look()
def draw_gates(epochs, values, path, xlabel="epoch", note=""):
    """Figure 6: the share of position in each GPSA layer over the epochs, head by head.

    values (seeds, epochs, GPSA layers, H); note: what to say of the seeds.
    """
    values = np.asarray(values)
    seeds, _, layers, heads = values.shape
    columns = min(layers, 5)
    rows = -(-layers // columns)
    figure, axes = style.new_figure(rows, columns, 0.6 + 1.7 * rows, sharex=True, sharey=True)
    for i, axis in enumerate(axes.flat):
        if i >= layers:
            axis.set_visible(False)
            continue
        for h in range(heads):
            lines = axis.plot(epochs, values[:, :, i, h].T, color=style.shade(h, heads),
                              linewidth=1.2 if seeds == 1 else 0.9)  # fmt: skip
            lines[0].set_label(f"{h + 1}")
        axis.plot(epochs, values[:, :, i].mean(axis=(0, 2)), "--", color=style.BLACK, label="mean")
        tenths = np.floor(10 * values)  # the axis ends at tenths around what the gates do
        axis.set(ylim=(tenths.min() / 10, (tenths.max() + 1) / 10))
        axis.set(title=style.layer_name(i), xlabel=xlabel if i + columns >= layers else "")
        axis.tick_params(labelbottom=i + columns >= layers)
        style.whole_numbers(axis)
    for row in axes:
        row[0].set_ylabel("gate (share of position)")
    lines, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, title="head", loc="outside right center")
    figure.supxlabel(note, fontsize=7)
    style.save(figure, path)


@style.look()
def draw_maps(picture, layers, query, note, path):
    """Figure 7: what the query attends to, one row a layer, one column a head.

    picture (height, width, 1 or 3), 0 to 1; layers: describe's dicts, each with the entry "maps" of
    query_maps; note: what else to say of the maps. Of GPSA the mixture is shown.
    """
    heads = len(layers[0]["heads"])
    height = 0.5 + style.WIDTH / (heads + 2) * len(layers)
    figure, axes = style.new_figure(len(layers), heads + 1, height)
    top = max(layer["maps"]["mixture"].max() for layer in layers)
    scales = {}  # name of an attention to its axes and an image
    for row, layer in zip(axes, layers, strict=True):
        kind = "content" if layer["attention"] == "mhsa" else "mixture"
        row[1].set_ylabel(f"{style.layer_name(layer['layer'] - 1)}\n{layer['attention'].upper()}")
        for h, axis in enumerate(row[1:]):
            shown = style.draw_map(axis, layer["maps"]["mixture"][h], kind, top, query)
            gate = layer["heads"][h].get("gate")
            axis.set_title("" if gate is None else f"gate {gate:.2f}", fontsize=7, pad=2)
        scales.setdefault(layer["attention"].upper(), ([], shown))[0].extend(row[1:])
    for h, axis in enumerate(axes[0][1:]):
        axis.set_title(f"{style.head_name(h)}\n{axis.get_title()}".strip(), fontsize=7, pad=2)
    _draw_picture_once(axes[:, 0], picture, layers[0], query)
    axes[0][0].set_title("image, query", fontsize=7, pad=2)
    for name, (rows, shown) in scales.items():
        style.color_bar(figure, rows, shown, name)
    note = "\n".join(filter(None, ["what the framed patch attends to", note]))
    figure.supxlabel(note, fontsize=7)
    style.save(figure, path)


@style.look()
def draw_parts(picture, layer, query, top, path):
    """One GPSA layer taken apart: content, position and mixture, one column a head.

    Arguments as in draw_maps, for one layer; top: where the scale ends.
    """
    heads = layer["heads"]
    height = 0.5 + 3 * style.WIDTH / (len(heads) + 2)
    figure, axes = style.new_figure(3, len(heads) + 1, height)
    for row, kind in zip(axes, ("content", "position", "mixture"), strict=True):
        row[1].set_ylabel(kind)
        for h, axis in enumerate(row[1:]):
            shown = style.draw_map(axis, layer["maps"][kind][h], kind, top, query)
            if kind == "position" and heads[h]["centre"] is not None:
                right, down = heads[h]["centre"]
                style.mark_centre(axis, query[1] + right, query[0] + down)
        style.color_bar(figure, row[1:], shown, "attention")
    for h, axis in enumerate(axes[0][1:]):
        axis.set_title(f"{style.head_name(h)}\ngate {heads[h]['gate']:.2f}", fontsize=7, pad=2)
    _draw_picture_once(axes[:, 0], picture, layer, query)
    axes[0][0].set_title(style.layer_name(layer["layer"] - 1), pad=2)
    note = "what the framed patch attends to; + is the centre of the head's position attention"
    figure.supxlabel(note, fontsize=7)
    style.save(figure, path)


def _draw_picture_once(column, picture, layer, query):
    """The image on the first axes of a column, of which the others are taken away."""
    style.draw_picture(column[0], picture, layer["maps"]["mixture"].shape[1:], query)
    for axis in column[1:]:
        axis.remove()
