"""What the runs of a plan came to: a table beside the paper's numbers, and a sentence a pair."""

import csv
import io
import json
from math import hypot
from statistics import mean, stdev

from ..checkpoint import write_file
from ..config import VARIANTS
from .plan import STRENGTHS, masked_layers
from .run import WHEN, mask_name

DIGITS = {"%": 1, "patches": 2, "": 3}
"""Unit to decimals."""

TABLE_2 = {
    0.05: (47.8, 34.8),
    0.1: (59.6, 48.0),
    0.3: (73.7, 66.1),
    0.5: (78.2, 74.6),
    1.0: (81.4, 79.9),
}
"""Fraction to top-1 of ConViT-S and DeiT-S."""
TABLE_3 = {
    "a": (82.2, 59.7),
    "b": (82.0, 57.4),
    "c": (81.4, 56.9),
    "d": (81.6, 54.6),
    "e": (79.1, 47.8),
    "f": (78.6, 54.3),
    "g": (73.7, 44.8),
}
"""Row to top-1 of ConViT-S+ on all and on 10 % of the data."""
TABLE_5 = {"convit": (73.1, 67.1), "vit": (72.2, 38.3)}
"""ConViT-Ti and DeiT-Ti: top-1 without and with the positional embedding masked."""
TABLE_6 = {3: (62.3, 63.5), 5: (35.0, 53.1), 10: (1.3, 46.8)}
"""GPSA layers masked to ConViT-Ti's top-1 with content and with position masked."""

NOTES = {
    "sample-efficiency": "Paper: its table 2, ConViT-S and DeiT-S on ImageNet.",
    "ablation": "Paper: its table 3, ConViT-S+ on {} of ImageNet. Gates frozen stand at 0: content "
    "and position have equal shares.",
    "locality": "Paper: the values of its figure 8a cannot be read off; they lie between 77 and 81 "
    "(first 100 classes of ImageNet) and increase with both the strength and the number of layers.",
    "masking": "Paper: its tables 5 and 6, ConViT-Ti and DeiT-Ti on ImageNet; 3, 5 and 10 of its "
    "10 GPSA layers are compared with the same share of ours.",
    "escape": "Paper: its figures 5 and 6, which have no numbers to read. ConViT's nonlocality "
    "grows from its local start in all GPSA layers and ends below DeiT's; the mean of the gates "
    "falls in every layer, the upper layers' to about 0. Nonlocality in patches, mean over heads; "
    "for MHSA without the class token's row and column, rows rescaled to sum one.",
}


def entries_of(plan, outcomes):
    """The lines of the table: dicts of row, label, quantity, unit, mean, spread (sample standard
    deviation; None for one seed), seeds (how many), diverged (how many), images, images_seen and
    paper (a number or None). Accuracies are in %."""
    entries = []
    for row in plan.rows:
        runs = [outcome for outcome in outcomes if outcome.row == row.name]
        good = [outcome.values for outcome in runs if outcome.values is not None]
        quantities = list(good[0]) if good else ["top1", *map(mask_name, row.masks)]
        for quantity in quantities:
            unit = _unit(quantity)
            scale = 100 if unit == "%" else 1
            values = [scale * run[quantity] for run in good]
            entries.append({
                "row": row.name,
                "label": row.label,
                "quantity": quantity,
                "unit": unit,
                "mean": mean(values) if values else None,
                "spread": stdev(values) if len(values) > 1 else None,
                "seeds": len(values),
                "diverged": len(runs) - len(values),
                "images": row.images,
                "images_seen": plan.images_seen,
                "paper": _paper(plan, row, quantity),
            })  # fmt: skip
    return entries


def _unit(quantity):
    return "patches" if "nonlocality" in quantity else "" if "gate" in quantity else "%"


def _is_full(plan):
    return plan.asked["subset"] > 0.3


def _paper(plan, row, quantity):
    """The paper's number for this entry, or None."""
    name, fraction = row.name, row.settings.subset
    if plan.experiment == "sample-efficiency":
        return TABLE_2.get(fraction, (None, None))[name.startswith("vit")]
    if plan.experiment == "ablation":
        return TABLE_3[name][0 if _is_full(plan) else 1]
    if plan.experiment == "masking":
        if quantity == "top1":
            return TABLE_5[name][0]
        if quantity == mask_name(["pos_embed"]):
            return TABLE_5[name][1]
        for depth, pair in TABLE_6.items():
            n = masked_layers(VARIANTS[plan.asked["model"]])[depth]
            for branch, number in zip(("content", "position"), pair, strict=True):
                if quantity == mask_name([branch, n]):
                    return number
    return None


def _pairs(plan):
    """What is compared: ((row, quantity), (row, quantity)) of names."""
    names = [row.name for row in plan.rows]
    if plan.experiment == "sample-efficiency":
        pairs = zip(names[::2], names[1::2], strict=True)
    elif plan.experiment == "ablation":
        pairs = [("a", other) for other in "bcdefg"] + [(other, "e") for other in "dfg"]
    elif plan.experiment == "locality":
        strongest = [row for row in plan.rows if row.settings.locality_strength == STRENGTHS[-1]]
        pairs = [(row.name, names[0]) for row in strongest if row.name != names[0]]
        deepest = names[-len(STRENGTHS) :]
        pairs += [(deepest[-1], weaker) for weaker in deepest[:-1]]
    else:
        pairs = [] if plan.experiment == "masking" else [names]
    pairs = [((first, "top1"), (second, "top1")) for first, second in pairs]
    if plan.experiment == "masking":
        for row in plan.rows:
            pairs += [((row.name, mask_name(mask)), (row.name, "top1")) for mask in row.masks]
    if plan.experiment == "escape":
        for i in range(1, plan.rows[0].settings.local_up_to_layer + 1):
            first, end = (f"nonlocality of layer {i} {when}" for when in WHEN)
            pairs += [(("convit", end), ("convit", first)), (("convit", end), ("vit", end))]
            first, end = (f"gate of layer {i} {when}" for when in WHEN)
            pairs.append((("convit", end), ("convit", first)))
    return pairs


def compare(first, second):
    """What the difference of two entries is worth: a dict with the sentence.

    It is within the spread if it is not greater than the standard deviation of a difference of two
    runs, sqrt(s1^2 + s2^2).
    """
    names = f"{_name(first)} against {_name(second)}"
    found = {"first": _name(first), "second": _name(second), "difference": None, "spread": None}
    found |= {"within_spread": None, "paper": None}
    missing = [_name(entry) for entry in (first, second) if entry["mean"] is None]
    if missing:
        text = f"{names}: no comparison, as every run of {' and '.join(missing)} diverged"
        return found | {"sentence": text}
    unit, digits = first["unit"], DIGITS[first["unit"]]
    difference = first["mean"] - second["mean"]
    shown = round(difference, digits) + 0.0  # no minus before a zero
    points = {"%": " points", "": ""}.get(unit, f" {unit}")
    text = f"{names}: {shown:+.{digits}f}{points} ({_number(first)} against {_number(second)})"
    found["difference"] = difference
    if first["spread"] is None or second["spread"] is None:
        text += ", a single run has no spread to compare it with"
    else:
        spread = hypot(first["spread"], second["spread"])
        within = abs(difference) <= spread
        found |= {"spread": spread, "within_spread": within}
        text += f", {'within' if within else 'beyond'} the spread of {spread:.{digits}f}"
    if first["paper"] is not None and second["paper"] is not None:
        found["paper"] = round(first["paper"] - second["paper"], 1)
        text += f"; paper {found['paper']:+.1f}"
    return found | {"sentence": text}


def _name(entry):
    quantity = entry["quantity"]
    return entry["label"] if quantity == "top1" else f"{entry['label']}, {quantity}"


def _number(entry):
    """The mean with its spread, and what has diverged."""
    digits, lost = DIGITS[entry["unit"]], entry["diverged"]
    if entry["mean"] is None:
        return "diverged" if lost else "no run"
    text = f"{entry['mean']:.{digits}f}"
    if entry["spread"] is not None:
        text += f" ± {entry['spread']:.{digits}f}"
    return text + f" ({lost} diverged)" * (lost > 0)


def write_tables(plan, outcomes, out):
    """Writes table.md, table.csv and table.json into the folder out.

    Returns (entries, the text of table.md).
    """
    entries = entries_of(plan, outcomes)
    by_name = {(entry["row"], entry["quantity"]): entry for entry in entries}
    comparisons = [
        compare(by_name[first], by_name[second])
        for first, second in _pairs(plan)
        if first in by_name and second in by_name
    ]
    text = _markdown(plan, entries, comparisons)
    write_file(out / "table.md", text.encode())
    lines = io.StringIO()
    writer = csv.DictWriter(lines, entries[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(entries)
    write_file(out / "table.csv", lines.getvalue().encode())
    values = {"asked": plan.asked, "place": plan.place, "steps": plan.steps, "note": _note(plan)}
    values |= {"spread": "sample standard deviation", "entries": entries}
    values |= {"comparisons": comparisons, "runs": [
        {"row": o.row, "seed": o.seed, "values": o.values, "diverged": o.diverged}
        for o in outcomes
    ]}  # fmt: skip
    write_file(out / "table.json", json.dumps(values, indent=2).encode() + b"\n")
    return entries, text


def _note(plan):
    if plan.experiment == "ablation":
        return NOTES["ablation"].format("all" if _is_full(plan) else "10 %")
    return NOTES[plan.experiment]


def _markdown(plan, entries, comparisons):
    seeds = len(plan.seeds)
    subset = plan.asked.get("subset", 1.0)
    data = plan.asked["data"] + f", {100 * subset:g} % of each class" * (subset < 1)
    lines = [
        f"# {plan.experiment}: {plan.asked['model']} on {data}",
        "",
        f"{seeds} seed{'s' * (seeds > 1)}, {plan.steps:,} steps and {plan.images_seen:,} images "
        "seen in every run. Accuracies: top-1 in %, on the validation split, after the last step; "
        "the test set is not read. ± is the sample standard deviation over the seeds.",
        "",
        "| row | ours | seeds | training images | images seen | paper |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for entry in entries:
        unit = f" ({entry['unit']})" if entry["unit"] == "patches" else ""
        paper = "" if entry["paper"] is None else f"{entry['paper']:.1f}"
        lines.append(
            f"| {_name(entry)}{unit} | {_number(entry)} | {entry['seeds']} | {entry['images']:,} "
            f"| {entry['images_seen']:,} | {paper} |"
        )
    lines += ["", _note(plan), ""]
    lines += [f"- {comparison['sentence']}." for comparison in comparisons]
    return "\n".join(lines) + "\n"
