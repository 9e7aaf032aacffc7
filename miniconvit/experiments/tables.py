"""What the runs of a plan came to: a table beside the paper's numbers, and a sentence a pair."""

import csv
import io
from itertools import groupby
from math import hypot
from statistics import mean, stdev

import scipy

from ..config import VARIANTS
from ..system import write_file
from . import mobile
from .plan import HYBRID, STRENGTHS, masked_layers
from .run import LAST_LAYER, WHEN, mask_name

DIGITS = {"%": 1, "patches": 2, "": 3}
"""Unit to decimals."""
SCALE = {"%": 100, "patches": 1, "": 1}
COSTS = {
    "parameters": ("parameters", ",.0f"),
    "million_macs": ("MACs (millions)", ".2f"),
    "images_per_second": ("images/s", ",.0f"),
}
"""What a row may tell of its costs: key of an entry to the title of its column, and its format."""

DIVERSIFIED = (("vit-cosine", "vit"), ("vit-all", "vit"), ("convit-cosine", "convit"))
"""Rows with and without losses, of the experiment `diversity`."""

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
    "sample-efficiency": "The paper's numbers are those of its table 2: ConViT-S and DeiT-S on "
    "ImageNet.",
    "ablation": "The paper's numbers are those of its table 3: ConViT-S+ on ImageNet{}. Gates "
    "frozen stand at 0, so content and position have equal shares.",
    "locality": "The paper shows this in its figure 8a, on the first 100 classes of ImageNet. "
    "There accuracy increases with both the strength and the number of layers. Its colour scale "
    "runs from 77 to 81.",
    "masking": "The paper's numbers are those of its tables 5 and 6: ConViT-Ti and DeiT-Ti on "
    "ImageNet. Of its 10 GPSA layers 3, 5 and 10 are masked there, here the same share of ours.",
    "escape": "The paper shows this in its figures 5 and 6, which have no numbers to read. There "
    "nonlocality grows from its local start in all GPSA layers and ends below DeiT's. The mean of "
    "the gates falls in every layer, in layers 6 to 10 to about 0. Some heads of the first five "
    "layers keep high gates. Nonlocality is in patches, the mean over heads. For MHSA it leaves "
    "out the class token's row and column, with rows rescaled to sum one.",
    "mobile": "One grid has 8x8 tokens, three have 8x8 + 4x4 + 1x1. MACs are the multiplications "
    "of one image's forward pass, in matrix products and filters. images/s are of the few seconds "
    "of training that were timed for the plan. The protocol is ours, after the paper, which has no "
    "such table. The rule was fixed before the runs. It asks that the whole (convolutions, three "
    "grids, fusion) be ahead of patches with a class token beyond the spread. A part's effect is "
    "the average over the other factor, seed by seed. All have one rate. Of 0.0015, 0.003 and "
    "0.006 the validation split chose it for patches with a class token, in runs of 400 steps with "
    "one seed.",
    "diversity": "Similarity is the mean of |cos| over all pairs of two patches of an image, after "
    "the layer. The rule was fixed before the runs. The claim is shown where the cosine loss at "
    "least halves it in the last layer, in every seed. Accuracy stands beside it.",
    "hybrid": "The rule was fixed before the runs. The claim is shown where CMT is ahead of ViT "
    "and of ConViT, beyond the spread, at every share. LPU is the filter at a block's start, IRFFN "
    "its feed-forward. Running statistics are no parameters. Images per second are of the few "
    "seconds of training that were timed for the plan. ViT and ConViT have half the peak rate of "
    "CMT. The rates were chosen by the validation split of CIFAR-10, in runs of 400 steps on all "
    "its images with one seed. Of 0.0015, 0.003 and 0.006 the first was best for ViT and ConViT. "
    "For CMT the last two were half a point apart.",
}


def entries_of(plan, outcomes):
    """The lines of the table: dicts of row, label, quantity, unit, mean, spread (sample standard
    deviation; None for one seed), seeds (how many), diverged (how many), images, passes, paper (a
    number or None), values (of each seed, None where it has none), and for some experiments what a
    row costs. Accuracies are in %."""
    entries = []
    for row in _by_size(plan):
        runs = {outcome.seed: outcome for outcome in outcomes if outcome.row == row.name}
        good = [run.values for run in runs.values() if run.values is not None]
        for quantity in good[0] if good else ["top1", *map(mask_name, row.masks)]:
            unit = _unit(quantity)
            found = [run[quantity] for run in good if run[quantity] is not None]
            entries.append({
                "row": row.name,
                "label": row.label,
                "quantity": quantity,
                "unit": unit,
                "mean": SCALE[unit] * mean(found) if found else None,
                "spread": SCALE[unit] * stdev(found) if len(found) > 1 else None,
                "seeds": len(found),
                "diverged": len(runs) - len(found),
                "images": row.images,
                "passes": plan.images_seen / row.images,
                "paper": _paper(plan, row, quantity),
                "values": [_value(runs.get(seed), quantity, SCALE[unit]) for seed in plan.seeds],
            } | _costs(plan, row, runs.values()))  # fmt: skip
    return entries


def _costs(plan, row, runs):
    """What an entry has beside, {name of COSTS: number}, where the experiment looks at it."""
    if plan.experiment not in ("hybrid", "mobile"):
        return {}
    more = {"million_macs": mobile.million_macs(row)} if plan.experiment == "mobile" else {}
    speed = {"images_per_second": row.speed["images_per_second"]}
    return {"parameters": next((run.parameters for run in runs), None)} | more | speed


def _by_size(plan):
    """The rows, those with the fewest images first: the order of training is another."""
    return sorted(plan.rows, key=lambda row: row.images)


def _unit(quantity):
    if "nonlocality" in quantity:
        return "patches"
    return "" if "gate" in quantity or "similarity" in quantity else "%"


def _value(outcome, quantity, scale):
    value = (outcome.values or {}).get(quantity) if outcome else None
    return None if value is None else scale * value


def _paper(plan, row, quantity):
    """The paper's number for this entry, or None."""
    fraction = row.settings.subset
    if plan.experiment == "sample-efficiency":
        return TABLE_2.get(fraction, (None, None))[row.name.startswith("vit")]
    if plan.experiment == "ablation":
        return dict(zip((1.0, 0.1), TABLE_3[row.name], strict=True)).get(fraction)
    if plan.experiment != "masking" or fraction < 1:
        return None
    layers = masked_layers(VARIANTS[plan.asked["model"]])
    numbers = dict(zip(("top1", mask_name(["pos_embed"])), TABLE_5[row.name], strict=True))
    for depth, pair in reversed(TABLE_6.items()):  # of two that are one here, the first counts
        names = (mask_name([branch, layers[depth]]) for branch in ("content", "position"))
        numbers |= zip(names, pair, strict=True)
    return numbers[quantity]


def _pairs(plan):
    """What is compared: ((row, quantity), (row, quantity)) of names."""
    names = [row.name for row in _by_size(plan)]
    if plan.experiment == "masking":
        return [
            ((row.name, mask_name(mask)), (row.name, "top1"))
            for row in plan.rows
            for mask in row.masks
        ]
    if plan.experiment == "escape":
        return [(("convit", "top1"), ("vit", "top1")), *_escape_pairs(plan)]
    if plan.experiment == "diversity":
        return [((a, quantity), (b, quantity)) for quantity in (LAST_LAYER, "top1")
                for a, b in DIVERSIFIED]  # fmt: skip
    if plan.experiment == "hybrid":
        return [((a, "top1"), (b, "top1")) for a, b in _of_cmt(plan)]
    if plan.experiment == "mobile":
        return [((mobile.WHOLE, "top1"), (mobile.PLAIN, "top1"))]
    if plan.experiment == "sample-efficiency":
        pairs = list(zip(names[::2], names[1::2], strict=True))
    elif plan.experiment == "ablation":
        pairs = [("a", other) for other in "bcdefg"] + [(other, "e") for other in "dfg"]
    else:
        strongest = [row for row in plan.rows if row.settings.locality_strength == STRENGTHS[-1]]
        pairs = [(row.name, names[0]) for row in strongest if row.name != names[0]]
        deepest = names[-len(STRENGTHS) :]
        pairs += [(deepest[-1], weaker) for weaker in deepest[:-1]]
    return [((first, "top1"), (second, "top1")) for first, second in pairs]


def _of_cmt(plan):
    """The rows that are compared with CMT, share by share: (CMT's, the other's) of names."""
    for row in _by_size(plan):
        name, _, share = row.name.rpartition("-")
        if name == "cmt":
            yield from ((row.name, f"{other}-{share}") for other in HYBRID if other != "cmt")


def _escape_pairs(plan):
    pairs = []
    for i in range(1, plan.rows[0].settings.local_up_to_layer + 1):
        first, end = (f"nonlocality of layer {i} {when}" for when in WHEN)
        pairs += [(("convit", end), ("convit", first)), (("convit", end), ("vit", end))]
        first, end = (f"gate of layer {i} {when}" for when in WHEN)
        pairs.append((("convit", end), ("convit", first)))
    return pairs


def compare(first, second):
    """A sentence: the difference of two entries, and whether it is beyond the spread.

    The spread of two rows is the standard deviation of a difference of two runs, sqrt(s1^2 +
    s2^2); of one row before and after, that of the differences of each run.
    """
    names = f"{name(first)} against {name(second)}"
    for entry in (first, second):
        if entry["mean"] is None:
            why = "diverged" if entry["diverged"] else "is still to come"
            return f"{names}: no comparison, as every run of {name(entry)} {why}"
    text = f"{names}: {_difference(first['mean'] - second['mean'], first['unit'])}"
    text += _verdict(first["mean"] - second["mean"], _spread(first, second), first, second)
    if first["paper"] is not None and second["paper"] is not None:
        text += f" (paper {first['paper'] - second['paper']:+.1f})"
    return text


def _difference(value, unit):
    points = {"%": " points", "": ""}.get(unit, f" {unit}")
    return f"{round(value, DIGITS[unit]) + 0.0:+.{DIGITS[unit]}f}{points}"  # no minus before a zero


def _spread(first, second):
    """The standard deviation that a difference is compared with, None where there is none."""
    if first["row"] == second["row"]:
        pairs = zip(first["values"], second["values"], strict=True)
        differences = [a - b for a, b in pairs if a is not None and b is not None]
        return stdev(differences) if len(differences) > 1 else None
    spreads = first["spread"], second["spread"]
    return None if None in spreads else hypot(*spreads)


def _verdict(difference, spread, *entries):
    if any(entry["diverged"] for entry in entries):
        return ", without a verdict, as some of their runs diverged"
    if spread is None:  # with one seed the table's head says so, once
        one_seed = len(entries[0]["values"]) == 1
        return "" if one_seed else ", a single run has no spread to compare it with"
    within = "within" if abs(difference) <= spread else "beyond"
    return f", {within} the spread of {spread:.{DIGITS[entries[0]['unit']]}f}"


def _gaps(plan, entries):
    """The gap of ConViT over ViT at the smallest and at the largest fraction: [a sentence], or []
    where there is nothing to compare."""
    if plan.experiment != "sample-efficiency" or len(plan.asked["fractions"]) < 2:
        return []
    ordered = sorted(entries, key=lambda entry: entry["images"])  # ConViT, ViT; ConViT, ViT; ...
    four = c1, v1, c2, v2 = ordered[:2] + ordered[-2:]
    if any(entry["mean"] is None for entry in four):
        return []
    small, large = c1["mean"] - v1["mean"], c2["mean"] - v2["mean"]
    names = [f"{entry['label'].partition(', ')[2]}" for entry in (c1, c2)]
    spreads = _spread(c1, v1), _spread(c2, v2)
    spread = None if None in spreads else hypot(*spreads)
    text = f"The gap ConViT - ViT is {_difference(small, '%')} at {names[0]} and "
    text += f"{_difference(large, '%')} at {names[1]}: a change of "
    text += f"{_difference(small - large, '%')}{_verdict(small - large, spread, *four)}"
    if all(entry["paper"] is not None for entry in four):
        papers = c1["paper"] - v1["paper"], c2["paper"] - v2["paper"]
        text += " (paper {:+.1f} and {:+.1f})".format(*papers)
    return [text]


def _halved(plan, by_name):
    """Whether the losses halve the similarity of the last layer, seed by seed: sentences."""
    for pair in DIVERSIFIED if plan.experiment == "diversity" else ():
        if all((row, LAST_LAYER) in by_name for row in pair):
            first, second = (by_name[row, LAST_LAYER] for row in pair)
            values = zip(first["values"], second["values"], strict=True)
            shares = [a / b for a, b in values if a is not None and b is not None]
            halved, n = sum(share <= 0.5 for share in shares), len(shares)
            yield (
                f"{first['label']} at least halves the last layer's similarity of "
                f"{second['label']} in {halved} of {n} seed{'s' * (n != 1)}: to "
                f"{', '.join(f'{share:.2f}' for share in shares)} of it"
            )


def _ahead(plan, by_name):
    """At how many shares CMT is ahead of ViT and ConViT beyond the spread: a sentence."""
    if plan.experiment != "hybrid":
        return
    ahead = {}  # share to whether it is, of each rival
    for pair in _of_cmt(plan):
        if pair[1].startswith(("vit", "convit")):
            cmt, other = (by_name[row, "top1"] for row in pair)
            if None in (cmt["mean"], other["mean"]) or _spread(cmt, other) is None:
                return
            found = cmt["mean"] - other["mean"] > _spread(cmt, other)
            ahead.setdefault(cmt["images"], []).append(found)
    shares = sum(map(all, ahead.values()))
    yield f"CMT is ahead of both beyond the spread at {shares} of {len(ahead)} shares"


def name(entry):
    """What a line of the table is called."""
    quantity = entry["quantity"]
    return entry["label"] if quantity == "top1" else f"{entry['label']}, {quantity}"


def number(entry):
    """The mean of an entry with its spread, and what has diverged."""
    digits, lost = DIGITS[entry["unit"]], entry["diverged"]
    if entry["mean"] is None:
        return "diverged" if lost else "no run"
    text = f"{entry['mean']:.{digits}f}"
    if entry["spread"] is not None:
        text += f" ± {entry['spread']:.{digits}f}"
    return text + f" ({lost} diverged)" * (lost > 0)


def _each_seed(entry):
    digits = DIGITS[entry["unit"]]
    return ", ".join("-" if v is None else f"{v:.{digits}f}" for v in entry["values"])


def write_tables(plan, outcomes, out):
    """Writes table.md and table.csv into the folder out: (entries, the text of table.md)."""
    entries = entries_of(plan, outcomes)
    by_name = {(entry["row"], entry["quantity"]): entry for entry in entries}
    sentences = [
        compare(by_name[first], by_name[second])
        for first, second in _pairs(plan)
        if first in by_name and second in by_name
    ]
    sentences += _gaps(plan, entries)
    sentences += [*_halved(plan, by_name), *_ahead(plan, by_name)]
    if plan.experiment == "mobile":
        sentences += mobile.verdicts(entries)
    text = _markdown(plan, outcomes, entries, sentences)
    write_file(out / "table.md", text.encode())
    lines = io.StringIO()
    writer = csv.DictWriter(lines, entries[0].keys(), lineterminator="\n")
    writer.writeheader()
    for entry in entries:
        values = ";".join("" if value is None else str(value) for value in entry["values"])
        writer.writerow(entry | {"values": values})
    write_file(out / "table.csv", lines.getvalue().encode())
    return entries, text


def _markdown(plan, outcomes, entries, sentences):
    subset = plan.asked.get("subset", 1.0)
    data = plan.asked["data"] + f", {100 * subset:g} % of each class" * (subset < 1)
    devices = sorted({outcome.trained_on for outcome in outcomes})
    lines = [
        f"# {plan.experiment}: {plan.asked['model']} on {data}",
        "",
        f"{len(outcomes)} of {len(plan.runs)} runs were trained {' and '.join(devices)}. Each has "
        f"{plan.steps:,} steps and sees {plan.images_seen:,} images. All follow the "
        f"{plan.recipe}. Accuracies are top-1 in % on the validation split, after the last step. "
        f"The test set is not read. {_about_spread(plan)}",
        "",
        "| row | ours | seeds | training images | passes over the data | paper | each seed |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    columns = [title for key, (title, _) in COSTS.items() if key in entries[0]]
    lines[-2] += "".join(f" {title} |" for title in columns)
    lines[-1] += " --- |" * len(columns)
    for entry in entries:
        unit = f" ({entry['unit']})" if entry["unit"] == "patches" else ""
        paper = "" if entry["paper"] is None else f"{entry['paper']:.1f}"
        lines.append(
            f"| {name(entry)}{unit} | {number(entry)} | {entry['seeds']} | {entry['images']:,} "
            f"| {entry['passes']:.1f} | {paper} | {_each_seed(entry)} |" + _cost_cells(entry)
        )
    note = NOTES[plan.experiment].format(", 10 % of each class" * (subset == 0.1))
    lines += ["", note, "", *(f"- {sentence}." for sentence in sentences)]
    return "\n".join(lines) + "\n"


def _cost_cells(entry):
    """The last cells of a row that tells its costs."""
    costs = [(entry[key], form) for key, (_, form) in COSTS.items() if key in entry]
    return "".join(f" {'-' if cost is None else format(cost, form)} |" for cost, form in costs)


def _about_spread(plan):
    """What ± is, and how often it misleads: Student's t of equal rows passes sqrt(n)."""
    n = len(plan.seeds)
    if n == 1:
        return "There is one seed, and a single run has no spread to compare a difference with."
    between, within = (200 * float(scipy.special.stdtr(df, -(n**0.5))) for df in (2 * n - 2, n - 1))
    return (
        f"± is the sample standard deviation over {n} seeds. It holds neither the choice of the "
        "subset nor that of the validation images. Chance alone goes beyond the spread in "
        f"{between:.0f} % of comparisons of two rows, {within:.0f} % within a row."
    )


def on_screen(text, width):
    """A Markdown text with its tables aligned, in lines of at most `width` characters."""
    lines = []
    for is_table, part in groupby(text.split("\n"), lambda line: line.startswith("|")):
        block = list(part)
        lines += _aligned(block, width) if is_table else block
    return "\n".join(lines)


def _aligned(lines, width):
    """Of the columns that are not empty, the first two, the paper's and as many more as fit."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    columns = [column for column in zip(*(rows[:1] + rows[2:]), strict=True) if any(column[1:])]
    wide = [max(map(len, column)) + 2 for column in columns]
    chosen, left = [], width + 2
    for i in sorted(range(len(columns)), key=lambda i: (i > 1, columns[i][0] != "paper")):
        if i < 2 or wide[i] <= left:
            chosen.append(i)
            left -= wide[i]
    cells = ([cell.ljust(wide[i]) for cell in columns[i]] for i in sorted(chosen))
    return ["".join(row).rstrip() for row in zip(*cells, strict=True)]
