"""Carries a plan out: times a few steps for it, then trains run after run."""

import time
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory

from tqdm import tqdm

from ..analysis.masks import without_branch, without_pos_embed
from ..analysis.readings import reading_images
from ..arrays import to_device
from ..checkpoints.checkpoint import load_checkpoint
from ..data import load_dataset
from ..engine import Classification, make_engine
from ..engine.cuda import resolve_device, without_reason
from ..neighbours.diversity import similarities
from ..neighbours.models import config_from_dict, count_parameters
from ..system import read_text, write_file
from ..training.evaluate import evaluate
from ..training.history import run_history
from ..training.interrupt import Diverged
from ..training.loop import train
from ..training.report import BAR, duration
from ..training.run_folder import RunFolder
from .plan import make_plan, rows_of, speed_key

FIRST_STEPS = 10  # of an epoch of a run that is only timed, the first time
TIMED_EPOCHS = 5
TIMED_SECONDS = 6.0  # of their steps: the speed of a busy machine changes from second to second
WHEN = "before training", "at the end"  # the experiment `escape` looks
FIRST_LAYER, LAST_LAYER = (f"similarity in the {which} layer" for which in ("first", "last"))


@dataclass(frozen=True)
class Outcome:
    """What one run came to. values: {quantity: number, None where it is not finite}, None where it
    diverged (the reason); trained_on: the device; was_finished: nothing was left to do; history:
    run_history's list, or the similarities of patches, for the experiment that looks at it;
    parameters: their number, for one that looks at it."""

    row: str
    seed: int
    values: dict | None
    trained_on: str = ""
    diverged: str | None = None
    was_finished: bool = False
    history: tuple = ()
    parameters: int | None = None


def measure(settings, images, **where):
    """How fast such a run is: images_per_second and validation_seconds, medians over short epochs,
    and start_seconds, what else a run takes.

    images: how many the data set has to train on; where: train's data_dir, workers and device.
    """
    _, warm, _ = _time(settings, images, FIRST_STEPS, 2, where)
    share = TIMED_SECONDS / TIMED_EPOCHS
    steps = max(FIRST_STEPS, ceil(share * warm[-1]["images_per_second"] / settings.batch_size))
    rest, rows, size = _time(settings, images, steps, TIMED_EPOCHS, where)
    validations = [row["seconds"] - size / row["images_per_second"] for row in rows]
    return {
        "images_per_second": median(row["images_per_second"] for row in rows),
        "validation_seconds": median(validations),
        "start_seconds": rest,
    }


def _time(settings, images, steps, epochs, where):
    """Trains so many epochs of about so many steps: (seconds beside the epochs, with loading and
    saving; the epochs' rows; images in each)."""
    subset = min(1.0, (steps + 0.5) * settings.batch_size / images)  # classes are rounded
    short = replace(settings, subset=subset, steps=None, epochs=epochs, passes=1)
    began = time.perf_counter()
    with TemporaryDirectory() as folder:
        rows = train(short, Path(folder) / "run", quiet=True, **where).rows
    rest = time.perf_counter() - began - sum(row["seconds"] for row in rows)
    return rest, rows, rows[0]["step"] * settings.batch_size


def _dataset(settings, where, subset=1.0):
    """The data set of these settings, or a share of it."""
    return load_dataset(settings.data, where["data_dir"], subset=subset, img_size=settings.img_size)


def new_plan(asked, say, **where):
    """The Plan that fits what was asked for (see complete), measured on this machine."""
    rows, kinds = rows_of(asked), {}
    images = {
        subset: len(_dataset(rows[0].settings, where, subset).train.labels)
        for subset in {row.settings.subset for row in rows} | {1.0}
    }
    for row in rows:  # the first of a kind is the one of which everything is trained
        kinds.setdefault(speed_key(row.settings), row.settings)
    say(f"timing a few seconds of {len(kinds)} models")
    speeds = {key: measure(settings, images[1.0], **where) for key, settings in kinds.items()}
    _, place = resolve_device(where["device"])
    return make_plan(asked, rows, images, speeds, without_reason(place))


class _Part:
    """A run's part of the bar over the whole plan: what train calls its report."""

    def __init__(self, bar, _total, done, *_):
        self.bar = bar
        if not bar.disable:
            bar.initial += done  # what was trained before says nothing about the speed
            bar.n += done

    def lines(self, *texts):
        """A run of many says nothing of its own."""

    epoch = lines

    def step(self, images, *_):
        self.bar.update(images)

    def close(self):
        """The bar goes on as it is."""


def run_plan(plan, out, say, show, **where):
    """Trains, or goes on with, every run of the plan in out/ROW/seedN. Returns their Outcomes.

    say(text) prints a line; show(outcomes, seconds) is called after every run that was trained now,
    with how long it took, but for the last; where: train's data_dir, workers and device. A run that
    diverges is an outcome; what train raises otherwise ends it, and calling again goes on.
    """
    runs, outcomes = plan.runs, []
    bar_options = {"unit": " images", "bar_format": BAR, "leave": False, "smoothing": 0}
    with tqdm(total=plan.images_seen * len(runs), disable=None, **bar_options) as bar:
        for row, seed in runs:
            began, end = time.perf_counter(), bar.n + plan.images_seen
            label = f"{row.label}, seed {seed}"
            bar.set_description_str(label)
            outcome = _run(plan, row, seed, out, partial(_Part, bar), where)
            outcomes.append(outcome)
            bar.update(end - bar.n)
            seconds = time.perf_counter() - began
            result = outcome.diverged or f"{100 * outcome.values['top1']:.1f} %"
            with bar.external_write_mode():
                say(f"{label}: {result} ({duration(seconds)})")
            if not outcome.was_finished and len(outcomes) < len(runs):
                show(outcomes, seconds)
    return outcomes


def _run(plan, row, seed, out, report, where):
    """One run, from wherever it stands, and what is read off it."""
    folder = RunFolder(Path(out) / row.name / f"seed{seed}")
    mark = folder.path / "diverged.txt"
    settings = replace(row.settings, seed=seed)
    was_finished = mark.exists()
    try:
        if was_finished:
            raise Diverged(read_text(mark, "delete it to train this run again").strip())
        result = train(settings, folder.path, resume=True, quiet=True, report=report, **where)
    except Diverged as error:
        reason = str(error).partition(";")[0]  # what follows is advice for a single run
        write_file(mark, f"{reason}\n".encode())
        return Outcome(row.name, seed, None, _trained_on(folder), reason, was_finished)
    values, history = {"top1": result.rows[-1]["val_top1"]}, ()
    if row.masks:
        values |= _masked(folder, row, where)
    if plan.experiment == "escape":
        dataset = _dataset(settings, where)
        history = tuple(run_history(folder.path, settings.model_config(dataset), dataset))
        values |= _escaped(history)
    if plan.experiment == "diversity":
        history = _similarities(folder, settings, where)
        values |= {FIRST_LAYER: history[0], LAST_LAYER: history[-1]}
    about = {"trained_on": _trained_on(folder), "was_finished": result.was_finished}
    if plan.experiment in ("hybrid", "mobile"):
        model = config_from_dict(folder.config()["model"])
        about["parameters"] = count_parameters(model)
    return Outcome(row.name, seed, values, history=history, **about)


def _similarities(folder, settings, where):
    """How alike patches are after each layer, on the images of the readings."""
    model = load_checkpoint(folder.last)
    images = reading_images(_dataset(settings, where))
    return similarities(images, model.params, model.config)


def _trained_on(folder):
    return str((folder.config() or {}).get("place", "unknown"))


def mask_name(mask):
    """Of a mask of a Row, also the name of the quantity: the top-1 accuracy under it."""
    if mask == ["pos_embed"]:
        return "positional embedding masked"
    branch, n = mask
    return f"{branch} masked in layer{f's 1 to {n}' if n > 1 else ' 1'}"


def _masked(folder, row, where):
    """{mask_name: top-1 on the validation split} of the last parameters."""
    model = load_checkpoint(folder.last)
    dataset = _dataset(row.settings, where)
    xp, _ = resolve_device(where["device"])
    found = {}
    with make_engine(Classification(model.config), xp, where["workers"]) as engine:
        for mask in row.masks:
            masked = (
                without_pos_embed(model.params)
                if mask == ["pos_embed"]
                else without_branch(model.params, *mask)
            )
            masked = to_device(masked, xp)
            _, top1, _ = evaluate(engine, dataset.val, dataset.mean, dataset.std, masked)
            found[mask_name(mask)] = top1 if top1 == top1 else None
    return found


def _escaped(history):
    """What has become of each layer: {"nonlocality of layer 1 before training": mean over heads},
    and so on for the gates, the other layers and the end."""
    found = {}
    for quantity, key in (("nonlocality", "nonlocality"), ("gate", "gates")):
        for i in range(len(history[0][1][key])):
            for when, (_, reading) in zip(WHEN, (history[0], history[-1]), strict=True):
                found[f"{quantity} of layer {i + 1} {when}"] = mean(reading[key][i])
    return found
