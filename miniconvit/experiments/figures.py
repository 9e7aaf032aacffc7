"""A figure for each experiment, in the manner of the paper's."""

import numpy as np

from .. import pictures
from ..config import VARIANTS
from ..inspection import CLASS_TOKEN
from .plan import STRENGTHS, masked_layers
from .run import mask_name

# Of Okabe and Ito: all eyes tell them apart.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
COLORS = {"convit": BLUE, "vit": ORANGE}
YLABEL = "validation top-1 (%)"


def draw(plan, outcomes, entries, out):
    """Draws NAME.png (and for escape NAME-gates.png) into the folder out. Returns their names.

    Raises UserError where matplotlib is missing.
    """
    pictures.require_matplotlib()
    path = out / f"{plan.experiment}.png"
    if plan.experiment == "escape":
        return _draw_escape(plan, outcomes, path)
    by_name = {(entry["row"], entry["quantity"]): entry for entry in entries}
    function = {
        "sample-efficiency": _draw_sample_efficiency,
        "ablation": _draw_ablation,
        "locality": _draw_locality,
        "masking": _draw_masking,
    }[plan.experiment]
    figure = function(plan, by_name)
    if len(plan.seeds) > 1:
        note = f"± and bars: sample standard deviation over {len(plan.seeds)} seeds"
        figure.supxlabel(note, fontsize=6)
    pictures.save(figure, path)
    return [path.name]


def _bars(axis, x, entries, **style):
    """Means with their spread; what has none is left out."""
    pairs = [(at, e) for at, e in zip(x, entries, strict=True) if e["mean"] is not None]
    axis.errorbar(
        [at for at, _ in pairs],
        [e["mean"] for _, e in pairs],
        [e["spread"] or 0.0 for _, e in pairs],
        capsize=3, linewidth=1.3, markersize=4, **style,
    )  # fmt: skip


def _paper(axis, x, entries, marker, color, label):
    axis.errorbar(x, [e["paper"] for e in entries], fmt=marker[0] + ":", color=color, alpha=0.5,
                  markerfacecolor="w", label=label, linewidth=1.3, markersize=4)  # fmt: skip


def _draw_sample_efficiency(plan, entries):
    """Figure 2a: accuracy over the share of the images; and the gain, beside the paper's."""
    figure, ((left, right),) = pictures.new_figure(1, 2, height=3.0)
    fractions = plan.asked["fractions"]
    percent = [100 * fraction for fraction in fractions]
    rows = {
        kind: [entries[f"{kind}-{p:g}pct", "top1"] for p in percent] for kind in ("convit", "vit")
    }
    for kind, marker in (("convit", "o-"), ("vit", "s--")):
        label = rows[kind][0]["label"].partition(",")[0]
        _bars(left, percent, rows[kind], fmt=marker, color=COLORS[kind], label=label)
    left.set_ylabel(YLABEL, fontsize=8)
    for name, key, style in (("ours", "mean", "ko-"), ("paper (ImageNet, S)", "paper", "D:")):
        pairs = [
            (p, 100 * (c[key] / v[key] - 1))
            for p, c, v in zip(percent, rows["convit"], rows["vit"], strict=True)
            if c[key] and v[key]
        ]
        color = {} if name == "ours" else {"color": "0.45"}
        right.plot(*zip(*pairs, strict=True) if pairs else ([], []), style, label=name,
                   markersize=4, linewidth=1.3, **color)  # fmt: skip
    right.axhline(0, color="0.7", linewidth=0.8)
    right.set_ylabel("gain of ConViT over ViT (%)", fontsize=8)
    for axis in (left, right):
        axis.set_xscale("log")
        axis.set_xticks(percent, [f"{p:g}" for p in percent])
        axis.minorticks_off()
        axis.set_xlabel("images kept of each class (%)", fontsize=8)
        _finish(axis)
    return figure


def _draw_ablation(plan, entries):
    """Table 3 as dots: ours with its spread, the paper's beside it."""
    figure, axes = pictures.new_figure(1, 2, height=2.8, sharey=True)
    rows = [entries[row.name, "top1"] for row in plan.rows]
    height = range(len(rows), 0, -1)
    left, right = axes[0]
    for y, entry in zip(height, rows, strict=True):
        color = ORANGE if entry["row"] == "e" else BLUE
        right.plot(entry["paper"], y, "D", color=color, markersize=4)
        if entry["mean"] is None:
            left.annotate("diverged", (0.5, y), xycoords=("axes fraction", "data"), fontsize=7,
                          ha="center", va="center")  # fmt: skip
        else:
            left.errorbar(entry["mean"], y, xerr=entry["spread"], fmt="o", color=color, capsize=3,
                          markersize=4)  # fmt: skip
    left.set_yticks(list(height), [entry["label"] for entry in rows])
    left.set_ylim(0.4, len(rows) + 0.6)
    left.set_xlabel(YLABEL, fontsize=8)
    right.set_xlabel("paper: ImageNet top-1 (%)", fontsize=8)
    for axis in (left, right):
        _finish(axis, legend=False)
    return figure


def _draw_locality(plan, entries):
    """Figure 8a: accuracy over locality strength and number of GPSA layers."""
    from matplotlib.ticker import NullLocator

    layers = sorted({row.settings.local_up_to_layer for row in plan.rows})
    values = np.full((len(STRENGTHS), len(layers)), np.nan)
    texts = {}
    for row in plan.rows:
        entry, s = entries[row.name, "top1"], row.settings
        at = [i for i, strength in enumerate(STRENGTHS) if strength == s.locality_strength]
        for i in at if s.local_up_to_layer else range(len(STRENGTHS)):
            values[i, layers.index(s.local_up_to_layer)] = entry["mean"] or np.nan
            spread = "" if entry["spread"] is None else f"\n± {entry['spread']:.1f}"
            text = "diverged" if entry["mean"] is None else f"{entry['mean']:.1f}{spread}"
            texts[i, layers.index(s.local_up_to_layer)] = text
    figure, ((axis,),) = pictures.new_figure(1, 1, height=3.0, width=4.6)
    shown = axis.imshow(values, cmap="cividis", origin="lower", aspect="auto")
    for (i, j), text in texts.items():
        color = "w" if shown.norm(values[i, j]) < 0.5 else "k"
        axis.text(j, i, text, ha="center", va="center", fontsize=7, color=color)
    axis.set_xticks(range(len(layers)), layers)
    axis.set_yticks(range(len(STRENGTHS)), [f"{strength:g}" for strength in STRENGTHS])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.tick_params(labelsize=7)
    axis.set_xlabel("GPSA layers (0: plain ViT, which has no strength)", fontsize=8)
    axis.set_ylabel("locality strength", fontsize=8)
    bar = figure.colorbar(shown, ax=axis)
    bar.set_label(YLABEL, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def _draw_masking(plan, entries):
    """Tables 5 and 6: what is left without the positional embedding, and without a branch."""
    figure, ((left, right),) = pictures.new_figure(1, 2, height=3.2, sharey=True)
    quantities = "top1", mask_name(["pos_embed"])
    for kind, marker in (("convit", "o-"), ("vit", "s--")):
        ours = [entries[kind, q] for q in quantities if (kind, q) in entries]
        label = ours[0]["label"]
        _bars(left, range(len(ours)), ours, fmt=marker, color=COLORS[kind], label=label)
        _paper(left, range(len(ours)), ours, marker, COLORS[kind], f"{label}, paper")
    left.set_xticks([0, 1], ["with", "masked"])
    left.set(xlim=(-0.3, 1.3))
    left.set_xlabel("positional embedding", fontsize=8)
    model = VARIANTS[plan.asked["model"]]
    depths = sorted(set(masked_layers(model).values()))
    for branch, color, marker in (("content", GREEN, "o-"), ("position", PURPLE, "s--")):
        names = ["top1", *(mask_name([branch, n]) for n in depths)]
        ours = [entries["convit", name] for name in names if ("convit", name) in entries]
        x = [0, *depths][: len(ours)]
        _bars(right, x, ours, fmt=marker, color=color, label=f"{branch} masked")
        _paper(right, x, ours, marker, color, f"{branch} masked, paper")
    right.set_xticks([0, *depths])
    gpsa = min(model.local_up_to_layer, model.depth)
    right.set_xlabel(f"first GPSA layers masked, of {gpsa} (paper: of 10)", fontsize=8)
    left.set_ylabel("top-1 (%): ours validation, paper ImageNet", fontsize=8)
    for axis in (left, right):
        axis.set_ylim(bottom=0)
        _finish(axis)
    return figure


def _draw_escape(plan, outcomes, path):
    """Figures 5 and 6: nonlocality and gates over the epochs, means over the seeds."""
    panels, names = [], []
    for row in plan.rows:
        histories = [o.history for o in outcomes if o.row == row.name and o.history]
        if not histories:
            continue
        s, per_pass = row.settings, row.images // row.settings.batch_size
        epochs = [min(e * s.passes, s.steps / per_pass) for e, _ in histories[0]]  # single passes
        values = np.mean([
            [np.mean(reading["nonlocality"], axis=1) for _, reading in history]
            for history in histories
        ], axis=0)  # fmt: skip
        panels.append((row.label, VARIANTS[s.model], epochs, values))
        if histories[0][0][1]["gates"]:
            gates = np.mean([[r["gates"] for _, r in history] for history in histories], axis=0)
            name = path.with_name("escape-gates.png")
            pictures.draw_gates(epochs, gates, name)
            names.append(name.name)
    if panels:
        pictures.draw_nonlocality(panels, CLASS_TOKEN, path)
        names.insert(0, path.name)
    return names


def _finish(axis, legend=True):
    axis.grid(alpha=0.3, linewidth=0.5)
    axis.tick_params(labelsize=7)
    if legend:
        axis.legend(fontsize=7, frameon=False)
