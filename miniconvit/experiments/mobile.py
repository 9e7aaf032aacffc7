"""What the parts of the mobile transformer bring: three stems by three read-outs.

The question is Chen et al.'s (2021), and the protocol is ours, "after" their paper, which compares
the whole with other models. Nine arms tell convolutions, further grids and the fusion apart.

The rule, fixed before the runs: the whole (convolutions, three grids, fusion) is ahead of patches
with a class token beyond the spread. What each part brings of that is reported, whatever it is.
"""

from math import hypot
from statistics import mean, stdev

import numpy as np

from ..analysis import style
from ..neighbours.mobile import MOBILES, multiplications

STEMS = {
    "patches": "patches of 4",
    "conv": "convolutions, one grid",
    "grids": "convolutions, three grids",
}
READOUTS = {"class_token": "class token", "mean": "mean", "fusion": "fusion"}
WHOLE, PLAIN = "grids-fusion", "patches-class_token"
PARTS = {
    "Convolutions in place of patches": ("patches", "conv"),
    "Three grids in place of one": ("conv", "grids"),
    "The fusion in place of the class token": ("class_token", "fusion"),
}
"""What is exchanged, from what to what."""


def arms():
    """(name of the row, its label, its model) of the nine."""
    for stem, tokens in STEMS.items():
        for readout, pooled in READOUTS.items():
            name = f"{stem}-{readout}"
            model = "mobile_micro32" if name == WHOLE else f"mobile_micro32_{stem}_{readout}"
            yield name, f"{tokens}, {pooled}", model


def stem_of(model):
    """The key of STEMS by a model's name, or None: read-outs cost next to nothing."""
    return next((row.partition("-")[0] for row, _, name in arms() if name == model), None)


def million_macs(row):
    """Multiplications of an image's forward pass, in millions."""
    return multiplications(MOBILES[row.settings.model]) / 1e6


def verdicts(entries):
    """Sentences: what has become of the rule, and what each part brings, once all runs are there.

    A part's effect is the average over the other factor, seed by seed.
    """
    cells = {entry["row"]: entry for entry in entries}
    values = {row: entry["values"] for row, entry in cells.items()}
    if any(value is None for each in values.values() for value in each):
        return
    gain = _differences(values, WHOLE, PLAIN)
    if len(gain) > 1:
        spread = hypot(*(cells[row]["spread"] for row in (WHOLE, PLAIN)))
        is_ahead = "yes" if mean(gain) > spread else "NO"
        yield f"The rule, that the whole is ahead of patches with a class token: {is_ahead}"
    effects = {words: _effect(values, *change) for words, change in PARTS.items()}
    for words, effect in effects.items():
        share = f", {100 * mean(effect) / mean(gain):.0f} % of the gain" * (mean(gain) > 0)
        yield f"{words}, on the average: {_told(effect)}{share}"
    rest = [total - sum(each) for total, *each in zip(gain, *effects.values(), strict=True)]
    yield f"What these three do not add up to: {_told(rest)}"
    averaged = _effect(values, "class_token", "mean")
    yield f"A mean in place of the class token, on the average: {_told(averaged)}"


def _differences(values, first, second):
    """Of each seed."""
    return [a - b for a, b in zip(values[first], values[second], strict=True)]


def _effect(values, before, after):
    """What `after` in place of `before` brings to each seed, averaged over the other factor."""
    if before in STEMS:
        pairs = [(f"{after}-{readout}", f"{before}-{readout}") for readout in READOUTS]
    else:
        pairs = [(f"{stem}-{after}", f"{stem}-{before}") for stem in STEMS]
    return [mean(each) for each in zip(*(_differences(values, *p) for p in pairs), strict=True)]


def _told(differences):
    """As +1.2 ± 0.3 points, with the verdict on it; of one seed there is none."""
    average = f"{round(mean(differences), 1) + 0.0:+.1f}"  # no minus before a zero
    if len(differences) == 1:
        return f"{average} points"
    spread = stdev(differences)
    verdict = "beyond" if abs(mean(differences)) > spread else "within"
    return f"{average} ± {spread:.1f} points, {verdict} the spread of the seeds"


STYLES = {
    "class_token": (style.BLACK, "o-"),
    "mean": (style.SKY, "s--"),
    "fusion": (style.ORANGE, "D:"),
}


def draw(entries):
    """Accuracy by stem, a line for each read-out; and over what an image costs."""
    figure, ((left, right),) = style.new_figure(1, 2, height=3.0, sharey=True)
    by_row = {entry["row"]: entry for entry in entries}
    for readout, (color, form) in STYLES.items():
        line = [by_row[f"{stem}-{readout}"] for stem in STEMS]
        means, spreads = (
            [np.nan if entry[key] is None else entry[key] for entry in line]
            for key in ("mean", "spread")
        )
        costs = [entry["million_macs"] for entry in line]
        for axis, places in ((left, range(len(STEMS))), (right, costs)):
            axis.errorbar(places, means, spreads, fmt=form, color=color, label=READOUTS[readout])
    left.set_xticks(range(len(STEMS)), [stem.replace(", ", ",\n") for stem in STEMS.values()])
    left.set_ylabel("validation top-1 (%)")
    right.set_xlabel("million MACs an image")
    left.legend()
    return figure
