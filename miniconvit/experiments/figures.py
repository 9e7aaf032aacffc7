"""A figure for each experiment, in the manner of the paper's."""

from math import hypot

import numpy as np

from ..analysis import pictures, style
from ..analysis.inspection import CLASS_TOKEN
from ..config import VARIANTS
from . import mobile
from .plan import HYBRID, STRENGTHS
from .tables import name, number

YLABEL = "validation top-1 (%)"


@style.look()
def draw(plan, outcomes, entries, out):
    """Draws NAME.png (and for escape escape-gates.png) into the folder out. Returns their names.

    Raises UserError where matplotlib is missing.
    """
    path = out / f"{plan.experiment}.png"
    if plan.experiment == "escape":
        return _draw_escape(plan, outcomes, path)
    if plan.experiment == "diversity":
        return _draw_diversity(plan, outcomes, entries, path)
    function = {
        "sample-efficiency": _draw_sample_efficiency,
        "locality": _draw_locality,
        "hybrid": _draw_hybrid,
        "mobile": lambda plan, entries: mobile.draw(entries),
    }
    figure = function.get(plan.experiment, _draw_dots)(plan, entries)
    if len(plan.seeds) > 1:
        note = f"±: sample standard deviation over {len(plan.seeds)} seeds"
        figure.supxlabel(note, fontsize=7)
    style.save(figure, path)
    return [path.name]


def _draw_sample_efficiency(plan, entries):
    """Figure 2a: accuracy over the share of the images; and the gain, beside the paper's."""
    figure, ((left, right),) = style.new_figure(1, 2, height=3.0)
    percent = [100 * fraction for fraction in plan.asked["fractions"]]
    ordered = sorted(entries, key=lambda entry: entry["images"])
    convit, vit = ordered[::2], ordered[1::2]
    for rows, marker, color in ((convit, "o-", style.CONVIT), (vit, "s--", style.VIT)):
        points = [(p, e["mean"], e["spread"] or 0.0) for p, e in zip(percent, rows, strict=True)]
        label = rows[0]["label"].partition(",")[0]
        _bars(left, points, fmt=marker, color=color, label=label)
    pairs = list(zip(percent, convit, vit, strict=True))
    _bars(
        right, [(p, *_gain(c, v)) for p, c, v in pairs], fmt="o-", color=style.BLACK, label="ours"
    )
    papers = [(p, c["paper"] and 100 * (c["paper"] / v["paper"] - 1), 0.0) for p, c, v in pairs]
    _bars(right, papers, fmt="D:", color=style.GREY, label="paper (ImageNet, S)")
    left.set_ylabel(YLABEL)
    right.axhline(0, color="0.7", linewidth=0.8)
    right.set_ylabel("gain of ConViT over ViT (% of ViT's)")
    for axis in (left, right):
        axis.set_xscale("log")
        axis.set_xticks(percent, [f"{p:g}" for p in percent])
        axis.minorticks_off()
        axis.set_xlabel("images kept of each class (%)")
        axis.legend()
    return figure


def _draw_hybrid(plan, entries):
    """Accuracy over the share of the images, and on the largest share over the speed."""
    figure, ((left, right),) = style.new_figure(1, 2, height=3.0)
    percent = [100 * fraction for fraction in sorted(plan.asked["fractions"])]
    looks = (("s--", style.VIT), ("o-", style.CONVIT), ("D-", style.BLACK))
    looks += (("v:", style.GREY), ("^:", style.GREY))
    for i, (look, color) in enumerate(looks):
        found = entries[i :: len(HYBRID)]
        points = [(p, e["mean"], e["spread"] or 0.0) for p, e in zip(percent, found, strict=True)]
        options = {"fmt": look, "color": color, "label": found[0]["label"].partition(",")[0]}
        _bars(left, points, **options)
        _bars(right, [(found[-1]["images_per_second"], *points[-1][1:])], **options)
    left.set_xscale("log")
    left.set_xticks(percent, [f"{p:g}" for p in percent])
    left.minorticks_off()
    left.set(xlabel="images kept of each class (%)", ylabel=YLABEL)
    right.set(xlabel="images per second in training", ylabel=f"{YLABEL}, {percent[-1]:g} %")
    left.legend()
    return figure


def _bars(axis, points, **options):
    """(x, mean, spread) of what has a mean."""
    points = [[np.nan if value is None else value for value in point] for point in points]
    axis.errorbar(*zip(*points, strict=True), **options)


def _gain(first, second):
    """How much better the first is than the second, in % of the second, and the spread of that."""
    if not first["mean"] or not second["mean"]:
        return None, None
    ratio = first["mean"] / second["mean"]
    relative = [(entry["spread"] or 0.0) / entry["mean"] for entry in (first, second)]
    return 100 * (ratio - 1), 100 * ratio * hypot(*relative)


def _draw_dots(plan, entries):
    """Tables 3, 5 and 6 as dots: ours with its spread, the paper's beside it."""
    figure, axes = style.new_figure(1, 2, height=0.8 + 0.28 * len(entries), sharey=True)
    left, right = axes[0]
    heights = range(len(entries), 0, -1)
    for y, entry in zip(heights, entries, strict=True):
        color = style.VIT if entry["row"] in ("e", "vit") else style.CONVIT
        if entry["paper"] is not None:
            right.plot(entry["paper"], y, "D", color=color)
        if entry["mean"] is None:
            left.annotate(number(entry), (0.5, y), xycoords=("axes fraction", "data"), fontsize=7,
                          ha="center", va="center")  # fmt: skip
        else:
            left.errorbar(entry["mean"], y, xerr=entry["spread"], fmt="o", color=color)
    left.set_yticks(list(heights), [name(entry) for entry in entries])
    left.set_ylim(0.4, len(entries) + 0.6)
    left.set_xlabel(YLABEL)
    share = "all images" if plan.asked["subset"] == 1 else f"{100 * plan.asked['subset']:g} %"
    right.set_xlabel(f"paper: ImageNet top-1 (%), {share}")
    return figure


def _draw_locality(plan, entries):
    """Figure 8a: accuracy over locality strength and number of GPSA layers."""
    by_row = {entry["row"]: entry for entry in entries}
    layers = sorted({row.settings.local_up_to_layer for row in plan.rows})
    values = np.full((len(STRENGTHS), len(layers)), np.nan)
    texts = {}
    for row in plan.rows:
        entry, s = by_row[row.name], row.settings
        at = [i for i, strength in enumerate(STRENGTHS) if strength == s.locality_strength]
        for i in at if s.local_up_to_layer else range(len(STRENGTHS)):
            place = i, layers.index(s.local_up_to_layer)
            values[place] = np.nan if entry["mean"] is None else entry["mean"]
            texts[place] = number(entry).replace(" ", "\n", 1)
    figure, ((axis,),) = style.new_figure(1, 1, height=3.0, width=4.6)
    shown = axis.imshow(values, cmap="cividis", origin="lower", aspect="auto")
    for (i, j), text in texts.items():
        color = "w" if shown.norm(values[i, j]) < 0.5 else "k"
        axis.text(j, i, text, ha="center", va="center", fontsize=7, color=color)
    axis.set_xticks(range(len(layers)), layers)
    axis.set_yticks(range(len(STRENGTHS)), [f"{strength:g}" for strength in STRENGTHS])
    axis.grid(False)
    axis.set_xlabel("GPSA layers (0: plain ViT, which has no strength)")
    axis.set_ylabel("locality strength")
    bar = figure.colorbar(shown, ax=axis)
    bar.set_label(YLABEL)
    return figure


def _draw_diversity(plan, outcomes, entries, path):
    """How alike patches are after each layer, and accuracy, of every row."""
    figure, ((left, right),) = style.new_figure(1, 2, height=3.0, width_ratios=(3, 2))
    labels = []
    for i, row in enumerate(plan.rows):
        color = style.CONVIT if row.name.startswith("convit") else style.VIT
        losses = row.name.partition("-")[2]
        line, marker = {"": ("-", "o"), "cosine": ("--", "s"), "all": (":", "D")}[losses]
        options = {"color": color, "linestyle": line, "marker": marker}
        found = np.array([o.history for o in outcomes if o.row == row.name and o.history])
        if len(found):
            layers = range(1, found.shape[1] + 1)
            spread = found.std(axis=0, ddof=1) if len(found) > 1 else None
            left.errorbar(layers, found.mean(axis=0), spread, label=row.label, **options)
        (top1,) = (e for e in entries if (e["row"], e["quantity"]) == (row.name, "top1"))
        labels.append(row.label)
        if top1["mean"] is not None:
            right.errorbar(top1["mean"], -i, xerr=top1["spread"], fmt=marker, color=color)
    left.set(xlabel="layer", ylabel="similarity of patches", ylim=(0, None))
    style.whole_numbers(left)
    left.legend()
    right.set_yticks([-i for i in range(len(labels))], labels)
    right.set(xlabel=YLABEL, ylim=(0.5 - len(labels), 0.5))
    if len(plan.seeds) > 1:
        note = f"±: sample standard deviation over {len(plan.seeds)} seeds"
        figure.supxlabel(note, fontsize=7)
    style.save(figure, path)
    return [path.name]


def _draw_escape(plan, outcomes, path):
    """Figures 5 and 6: nonlocality and gates over training, of every seed."""
    panels, names, xlabel = [], [], "passes over the data"
    for row in plan.rows:
        histories = [o.history for o in outcomes if o.row == row.name and o.history]
        if not histories:
            continue
        s = row.settings
        passes = [min(e * s.passes, s.steps / row.steps_per_pass) for e, _ in histories[0]]
        values = [[np.mean(r["nonlocality"], axis=1) for _, r in h] for h in histories]
        panels.append((row.label, VARIANTS[s.model], passes, values))
        if histories[0][0][1]["gates"]:
            gates = [[reading["gates"] for _, reading in h] for h in histories]
            names.append("escape-gates.png")
            seeds = f"{len(gates)} seed{'s' * (len(gates) > 1)}"
            note = f"one line per head and seed ({seeds}), dashed: their mean"
            pictures.draw_gates(passes, gates, path.with_name(names[-1]), xlabel, note)
    if panels:
        count = len(panels[0][3])
        note = f"mean ± sample standard deviation over {count} seeds" if count > 1 else "1 seed"
        pictures.draw_nonlocality(panels, f"{note}; {CLASS_TOKEN}", path, xlabel)
        names.insert(0, path.name)
    return names
