"""Runs side by side: what each has reached, in what they differ, and what cannot be compared."""

import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ..analysis import style
from ..errors import UserError, shortened
from ..neighbours.models import config_from_dict, count_parameters
from .run_folder import RunFolder
from .settings import FIELDS, Settings, stored_settings

NAMED = 12  # runs that a legend has room to name


@dataclass(frozen=True)
class Outcome:
    """What the folder of a run says. rows: metrics.jsonl; is_training: by another process, now."""

    path: Path
    settings: Settings
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    is_training: bool

    @property
    def is_finished(self):
        """Whether its last epoch is done."""
        s, last = self.settings, self.rows[-1] if self.rows else {"epoch": 0, "step": 0}
        return last["step"] >= s.steps if s.epochs is None else last["epoch"] >= s.epochs

    @property
    def best(self):
        """The row of the highest validation accuracy, the first of equals, as training saves it."""
        return max(self.rows, key=lambda row: row["val_top1"])

    @property
    def model(self):
        return config_from_dict(self.config["model"])

    @property
    def data(self):
        """What must be equal where accuracies are to be compared."""
        return self.settings.data, self.model.num_classes, self.config.get("data_sha256")

    @property
    def machine(self):
        """What must be equal where speeds are to be compared. Without workers it was a GPU."""
        workers, place = self.config.get("workers"), self.config.get("place")
        return workers, None if workers else place, self.config.get("versions")

    def to_dict(self):
        """What it has reached, in JSON types; None for what no epoch has told yet."""
        found = {
            "run": str(self.path),
            "settings": asdict(self.settings),
            "parameters": count_parameters(self.model),
            "epochs": len(self.rows),
            "finished": self.is_finished,
            "training": self.is_training,
        }
        names = ("best_val_top1", "best_val_loss", "best_epoch", "last_val_top1", "last_val_loss")
        names += ("images_per_second", "seconds")
        if not self.rows:
            return found | dict.fromkeys(names)
        best, last = self.best, self.rows[-1]
        speeds = [row["images_per_second"] for row in self.rows if row["images_per_second"]]
        values = best["val_top1"], best["val_loss"], best["epoch"], last["val_top1"]
        values += last["val_loss"], median(speeds) if speeds else None
        values += (sum(row["seconds"] for row in self.rows),)
        return found | dict(zip(names, values, strict=True))


def read_outcomes(paths):
    """The Outcomes of run folders: twins first, each ViT behind its ConViT, else in their order.

    Raises UserError for fewer than two, one that is no run, and one that is given twice.
    """
    if len(paths) < 2:
        raise UserError("there is nothing to compare: give the folders of two runs or more")
    found = {}
    for path in paths:
        if path.resolve() in found:
            raise UserError(f"{path} is given twice: give each run once")
        settings = stored_settings(path)
        if settings is None:
            raise UserError(f"{path} holds no run: give folders that `miniconvit train` wrote")
        folder = RunFolder(path)
        config, rows = folder.config(), folder.finished_epochs()
        outcome = Outcome(path, settings, config, rows, folder.is_training())
        try:
            outcome.to_dict()
        except (KeyError, TypeError, UserError) as error:
            raise UserError(f"the model in {path}/config.json is damaged: {error}") from error
        found[path.resolve()] = outcome
    outcomes = list(found.values())
    paired = [outcome for pair in twins(outcomes) for outcome in pair]
    return paired + [outcome for outcome in outcomes if outcome not in paired]


def twins(outcomes):
    """The pairs (ConViT, ViT) of runs that differ in nothing but that."""
    pairs, left = [], list(outcomes)
    for convit in outcomes:
        name = convit.settings.model
        if not name.startswith("convit"):
            continue
        for vit in left:
            is_twin = vit.settings.model == name.replace("convit", "vit")
            others = set(differences([convit, vit])) - {"model", "local_up_to_layer"}
            if is_twin and not others and convit.data == vit.data:
                pairs.append((convit, vit))
                left.remove(vit)
                break
    return pairs


def differences(outcomes):
    """{setting: its value in each run} of the settings that are not the same in all."""
    values = {name: [getattr(o.settings, name) for o in outcomes] for name in FIELDS}
    return {name: of for name, of in values.items() if any(value != of[0] for value in of)}


def remarks(outcomes):
    """Sentences on what cannot be compared and on what is not at its end. Runs count from 1."""
    notes = []
    for number, outcome in enumerate(outcomes, 1):
        s, done = outcome.settings, len(outcome.rows)
        if outcome.is_finished:
            continue
        step = outcome.rows[-1]["step"] if outcome.rows else 0
        length = f"{done} of {s.epochs} epochs" if s.epochs else f"{step:,} of {s.steps:,} steps"
        state = "is in training now" if outcome.is_training else "is not finished"
        notes.append(f"{number} {state}: {length}")
    for number, outcome in enumerate(outcomes[1:], 2):
        if outcome.data != outcomes[0].data:
            names = [o.settings.data for o in (outcomes[0], outcome)]
            what = f"{names[0]} and {names[1]}" if names[0] != names[1] else "other image files"
            notes.append(f"1 and {number} are of different data, {what}: do not compare accuracies")
    if any(outcome.machine != outcomes[0].machine for outcome in outcomes):
        notes.append("machines, workers or libraries differ: images/s tell little of the models")
    return notes


def twin_notes(outcomes):
    """A sentence on each pair of twins. Runs count from 1."""
    notes = []
    for pair in twins(outcomes):
        one, other = (outcomes.index(outcome) + 1 for outcome in pair)
        text = f"{one} and {other} are a ConViT and its ViT twin"
        if all(outcome.is_finished for outcome in pair):
            gain = 100 * (pair[0].best["val_top1"] - pair[1].best["val_top1"])
            notes.append(f"{text}: {gain:+.1f} points of best accuracy for the ConViT")
        else:
            notes.append(f"{text}, not both at their end")
    return notes


@style.look()
def draw_comparison(outcomes, path):
    """Validation loss and accuracy of all runs: dashed for a ViT, over epochs, or over the images
    seen where an epoch has not as many in each run."""
    shown = [(n, outcome) for n, outcome in enumerate(outcomes, 1) if outcome.rows]
    if not shown:
        raise UserError("no run has a finished epoch to draw yet")
    sizes = {o.rows[0]["step"] * o.settings.batch_size for _, o in shown}
    figure, ((left, right),) = style.new_figure(1, 2, 2.8 + 0.16 * min(len(shown), NAMED))
    pair = twins(outcomes) if len(outcomes) == 2 else ()
    for n, outcome in shown:
        rows, s = outcome.rows, outcome.settings
        x = [row["epoch"] if len(sizes) == 1 else row["step"] * s.batch_size for row in rows]
        is_vit = s.model.startswith("vit")
        color = style.shade(n - 1, len(outcomes))
        if pair:
            color = style.VIT if is_vit else style.CONVIT
        name = f"{n}  {shortened(outcome.path, 60)}" if len(shown) <= NAMED else str(n)
        marker = "o" if len(rows) <= 21 else ""
        for axis, key, scale in ((left, "val_loss", 1), (right, "val_top1", 100)):
            axis.plot(x, [scale * row[key] for row in rows], "--" if is_vit else "-",
                      color=color, marker=marker, label=name)  # fmt: skip
    for axis, label in ((left, "validation loss"), (right, "validation accuracy (%)")):
        axis.set(xlabel="epoch" if len(sizes) == 1 else "images seen", ylabel=label)
        style.whole_numbers(axis)
    if any(outcome.data != outcomes[0].data for _, outcome in shown):
        figure.supxlabel("These runs are of different data: their accuracies do not compare.",
                         fontsize=7)  # fmt: skip
    columns = 1 if len(shown) <= NAMED else 10
    legend = figure.legend(*left.get_legend_handles_labels(), loc="outside lower left",
                           ncols=columns)  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a script that the font has not
        style.save(figure, path, style.SCREEN)
