"""Carries a plan out: times a few steps for it, then trains run after run."""

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

from tqdm import tqdm

from ..ablation import without_branch, without_pos_embed
from ..checkpoint import load_checkpoint, write_file
from ..data import load_dataset
from ..device import resolve_device, to_device
from ..device_engine import make_engine
from ..errors import UserError
from ..inspection import run_history
from ..report import BAR, duration
from ..run_folder import RunFolder
from ..train import Diverged, evaluate, train
from .plan import make_plan, rows_of, speed_key

TIMED_STEPS = 10  # and as many before them, which are not counted
WHEN = "at first", "at the end"  # of training, the experiment `escape` looks


@dataclass(frozen=True)
class Outcome:
    """What one run came to. values: {quantity: number}, None where it diverged (the reason);
    history: run_history's list, for the experiment that looks at it."""

    row: str
    seed: int
    values: dict | None
    diverged: str | None = None
    history: tuple = ()


def measure(settings, images, **where):
    """How fast such a run is: images_per_second and validation_seconds, from the second of two
    short epochs, and start_seconds, what else a run takes.

    images: how many the data set has to train on; where: train's data_dir, threads and device.
    """
    subset = min(1.0, TIMED_STEPS * settings.batch_size / images)
    short = replace(settings, subset=subset, steps=None, epochs=2, passes=1)
    began = time.perf_counter()
    with TemporaryDirectory() as folder:
        first, row = train(short, Path(folder) / "run", quiet=True, **where).rows
    seconds = time.perf_counter() - began
    size = min(settings.batch_size, images)
    training = (row["step"] - first["step"]) * size / row["images_per_second"]
    return {
        "images_per_second": row["images_per_second"],
        "validation_seconds": row["seconds"] - training,
        "start_seconds": seconds - first["seconds"] - row["seconds"],
    }


def _dataset(settings, where, subset=1.0):
    """The data set of these settings, or a share of it."""
    return load_dataset(settings.data, where["data_dir"], subset=subset, img_size=settings.img_size)


def new_plan(asked, say, **where):
    """The Plan that fits what was asked for (see complete), measured on this machine."""
    rows = rows_of(asked)
    images = {
        subset: len(_dataset(rows[0].settings, where, subset).train.labels)
        for subset in {row.settings.subset for row in rows} | {1.0}
    }
    kinds = {speed_key(row.settings): row.settings for row in rows}
    say(f"timing {2 * TIMED_STEPS} steps of {len(kinds)} models")
    speeds = {key: measure(settings, images[1.0], **where) for key, settings in kinds.items()}
    return make_plan(asked, rows, images, speeds, resolve_device(where["device"])[1])


class _Part:
    """A run's part of the bar over the whole plan: what train calls its report."""

    def __init__(self, bar, label, total, done, epochs, quiet):
        self.bar, self.label, self.best = bar, label, 0.0
        if not bar.disable:
            bar.initial += done  # what was trained before says nothing about the speed
            bar.n = bar.last_print_n = bar.n + done
        self._show()

    def _show(self):
        best = f"best val {100 * self.best:.1f} %" if self.best else ""
        self.bar.set_description_str(self.label, refresh=False)
        self.bar.set_postfix_str(best, refresh=True)

    def lines(self, *texts):
        """A run of many says nothing of its own."""

    def epoch(self, row):
        self.best = max(self.best, row["val_top1"])
        self._show()

    def step(self, images, epoch, loss, accuracy):
        self.bar.update(images)

    def close(self):
        """The bar goes on as it is."""


def run_plan(plan, out, say, **where):
    """Trains, or goes on with, every run of the plan in out/ROW/seedN. Returns their Outcomes.

    say(text) prints a line; where: train's data_dir, threads and device. A run that diverges is an
    outcome; what train raises otherwise ends it, and calling again goes on.
    """
    total, outcomes = plan.images_seen * len(plan.rows) * len(plan.seeds), []
    bar_options = {"unit": " images", "bar_format": BAR + "{postfix}", "smoothing": 0}
    with tqdm(total=total, disable=None, leave=False, **bar_options) as bar:
        for row in plan.rows:
            for seed in plan.seeds:
                began, end = time.perf_counter(), bar.n + plan.images_seen
                label = f"{row.label}, seed {seed}"
                report = partial(_Part, bar, label)
                outcome = _run(plan, row, seed, Path(out), report, where)
                outcomes.append(outcome)
                bar.update(end - bar.n)
                result = outcome.diverged or f"{100 * outcome.values['top1']:.1f} %"
                with bar.external_write_mode():
                    say(f"{label}: {result} ({duration(time.perf_counter() - began)})")
    return outcomes


def _run(plan, row, seed, out, report, where):
    """One run, from wherever it stands, and what is read off it."""
    folder = RunFolder(out / row.name / f"seed{seed}")
    mark = folder.path / "diverged.txt"
    if mark.exists():
        return Outcome(row.name, seed, None, mark.read_text().strip())
    settings = replace(row.settings, seed=seed)
    try:
        result = train(settings, folder.path, resume=True, quiet=True, report=report, **where)
    except Diverged as reason:
        write_file(mark, f"{reason}\n".encode())
        return Outcome(row.name, seed, None, str(reason))
    values = {"top1": result.rows[-1]["val_top1"]}
    if row.masks:
        values |= _masked(folder, row, where)
    history = ()
    if plan.experiment == "escape":
        dataset = _dataset(settings, where)
        history = run_history(folder.path, settings.model_config(dataset), dataset)
        values |= _escaped(history)
    return Outcome(row.name, seed, values, history=tuple(history))


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
    with make_engine(model.config, xp, where["threads"]) as engine:
        for mask in row.masks:
            masked = (
                without_pos_embed(model.params)
                if mask == ["pos_embed"]
                else without_branch(model.params, *mask)
            )
            masked = to_device(masked, xp)
            _, top1, _ = evaluate(engine, dataset.val, dataset.mean, dataset.std, masked)
            if top1 != top1:
                raise UserError(f"{folder.last} gives no finite answers with {mask_name(mask)}")
            found[mask_name(mask)] = top1
    return found


def _escaped(history):
    """What has become of each layer: {"nonlocality of layer 1 at first": mean over heads}, and so
    on for the gates, the other layers and the end."""
    found = {}
    for quantity, key in (("nonlocality", "nonlocality"), ("gate", "gates")):
        for i in range(len(history[0][1][key])):
            for when, (_, reading) in zip(WHEN, (history[0], history[-1]), strict=True):
                found[f"{quantity} of layer {i + 1} {when}"] = mean(reading[key][i])
    return found
