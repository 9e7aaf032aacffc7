"""`miniconvit eval`."""

from dataclasses import replace
from math import isfinite
from pathlib import Path

import click
import numpy as np

from ..analysis.confusion import Answers, refuse_old_files, write_answers
from ..analysis.masks import without_branch, without_pos_embed
from ..arrays import to_device
from ..checkpoints.weights import open_weights
from ..data import Split, load_dataset
from ..data.classes import IMAGENET, places_of
from ..engine import classification, make_engine
from ..engine.cuda import resolve_device, without_reason
from ..errors import UserError, shortened
from ..layers import softmax_forward
from ..neighbours.models import is_convit
from ..training.evaluate import evaluate
from ..training.report import folded, table
from ..training.settings import DATA, MODEL, stored_data_dir, stored_settings
from .options import (
    PATH,
    Command,
    Name,
    checkpoint_options,
    device_option,
    json_option,
    option,
    overflow_is_answered,
    precision_option,
    print_json,
    stored_data_options,
    workers_option,
)


@click.command("eval", cls=Command)
@click.argument("checkpoint", metavar="RUN_OR_CHECKPOINT", type=PATH)
@stored_data_options
@option(
    "--split",
    type=Name(["val", "test", "train"]),
    default="val",
    group=DATA,
    help="Part of the data to use.",
    shown="val",
)
@checkpoint_options
@option(
    "--mask-pos-embed",
    is_flag=True,
    group=MODEL,
    help="Set the absolute positional embedding to zero.",
)
@option(
    "--mask",
    nargs=2,
    type=(Name(["content", "position"]), int),
    metavar="BRANCH N",
    group=MODEL,
    help="Leave out a branch in the first N GPSA layers. BRANCH is content or position.",
)
@option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="Write the confusion matrix and the mistakes into this folder, as CSV files and pictures.",
)
@precision_option
@device_option
@workers_option
@json_option
def command(
    checkpoint,
    split,
    data,
    data_dir,
    broken,
    mask_pos_embed,
    mask,
    variant,
    img_size,
    out,
    precision,
    device,
    workers,
    as_json,
):
    """Measure a model's accuracy on a data set.

    It prints the loss, the top-1 accuracy and the top-5 accuracy. Below stand the classes with the
    lowest accuracy, and what each is most often taken for. RUN_OR_CHECKPOINT is the folder of a
    run, of which the best checkpoint is taken, or a checkpoint file.
    """
    if out is not None:
        refuse_old_files(out)
    xp, place = resolve_device(device)
    path, model = open_weights(checkpoint, variant, img_size, any_kind=True)
    params, masked = _masked(path, model, mask, mask_pos_embed)
    name = data or model.data
    if name is None:
        raise UserError(f"{path} does not say on which data it was trained: add --data")
    dataset = open_dataset(checkpoint, model, name, data_dir, data is not None, broken)
    if model.config.num_classes == 1:
        raise UserError(f"{path} knows one class only: every answer would be right")
    dataset, classes = fitted(path, model, dataset)
    images = _images_of(dataset, name, split)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)  # where it cannot be made, before the work
    params = to_device(params, xp)
    mean, std = model.mean or dataset.mean, model.std or dataset.std
    said = []  # (predicted classes, their probabilities), a pair for each chunk

    def note(logits):
        said.append((logits.argmax(axis=1), softmax_forward(logits)[0].max(axis=1)))

    objective = classification(model.config)
    with make_engine(objective, xp, workers, precision) as engine, overflow_is_answered():
        loss, top1, top5 = evaluate(engine, images, mean, std, params, note=note)
    if not isfinite(loss):
        raise UserError(f"{path} gives no finite loss on {name}: use another checkpoint")
    values = {"checkpoint": str(path), "data": name, "split": split, "images": len(images.labels)}
    values |= {"classes": classes} if classes else {}
    values |= {"loss": loss, "top1": top1, "top5": top5, "computed": without_reason(place)}
    values |= {"masked": ", ".join(masked)} if masked else {}
    answers = Answers(dataset.classes, images.labels, *map(np.concatenate, zip(*said, strict=True)))
    _show(values, answers, as_json)
    if out is not None:
        written, notes = write_answers(answers, images.images, out)
        if not as_json:
            click.echo(folded(f"\nin {out}: {', '.join(written)}"))
        for line in notes:
            click.echo(line, err=True)


def _images_of(dataset, name, split):
    """A split of the data set. Raises UserError where it has none."""
    images = getattr(dataset, split)
    if images is None:
        raise UserError(
            f"{name} has no split {split} here: add a folder {split}, or choose another --split"
        )
    return images


def _masked(path, model, mask, mask_pos_embed):
    """The parameters without what is masked, and what that is, in words. Raises UserError where
    the model has no such thing."""
    if not is_convit(model.config) and (mask or mask_pos_embed):
        raise UserError(f"{path} holds no ConViT or ViT: leave out --mask and --mask-pos-embed")
    params, words = model.params, []
    if mask_pos_embed:
        params, words = without_pos_embed(params), ["pos_embed"]
    if mask:
        params = without_branch(params, *mask)
        words.append(f"{mask[0]} in the first {mask[1]} layers")
    return params, words


def _show(values, answers, as_json):
    """Prints what was measured, and of the classes in JSON all, else the worst."""
    by_class = answers.by_class()
    if as_json:
        print_json(values | {"by_class": by_class, "confusions": answers.confusions()})
        return
    shares = {key: f"{100 * values[key]:.2f} %" for key in ("top1", "top5")}
    click.echo(table((values | {"loss": f"{values['loss']:.4f}"} | shares).items()))
    click.echo("\n" + "\n".join(_class_lines(by_class)))


MOST_ROWS = 10


def _class_lines(by_class):
    """The classes with the lowest accuracy as lines, and how many there are beside them."""
    rows = sorted(filter(lambda row: row["images"], by_class), key=lambda row: row["accuracy"])
    yield f"{'lowest accuracy first':<29}{'images':>7}{'right':>8}  most often taken for"
    for row in rows[:MOST_ROWS]:
        taken = ""
        if row["taken"]:
            share = 100 * row["taken"] / row["images"]
            taken = f"  {shortened(row['taken_for'], 27)}, {share:.0f} %"
        name, right = shortened(row["class"], 29), f"{100 * row['accuracy']:.1f} %"
        yield f"{name:<29}{row['images']:>7,}{right:>8}{taken}"
    more, empty = len(rows) - MOST_ROWS, len(by_class) - len(rows)
    rest = [f"{more:,} more classes"] * (more > 0) + [f"{empty:,} without an image"] * (empty > 0)
    if rest:
        yield f"and {', '.join(rest)}"


def open_dataset(checkpoint, model, name, data_dir, download, broken):
    """The data set called `name`, for a model and the path it was opened by: a run knows where its
    data lie and what became of broken files."""
    if name == model.data and checkpoint.is_dir():
        stored = stored_settings(checkpoint)
        data_dir = data_dir or stored_data_dir(checkpoint)
        broken = broken or (stored.broken if stored else None)
    size = model.config.img_size
    options = {"img_size": size, "broken": broken or "refuse", "to_train": False}
    return load_dataset(name, data_dir, download, **options)


def fitted(path, model, dataset):
    """(data set with the labels that the model gives its classes, a note on them or None).

    Raises UserError where the model cannot be asked about these images.
    """
    shape = dataset.val.images.shape[1:]
    expected = (model.config.in_chans, *model.config.image)
    if shape != expected:
        raise UserError(
            f"{path} expects images of (channels, height, width) {expected}, those of "
            f"{dataset.name} are {shape}: choose another --data or another checkpoint"
        )
    try:
        known, note = _known_classes(model, dataset)
        labels = places_of(dataset.classes, known)
    except UserError as error:
        raise UserError(
            f"{path} was trained for other classes than those of {dataset.name}: {error}; choose "
            "another --data or another checkpoint"
        ) from None
    if list(dataset.classes) == known:
        return dataset, note
    splits = {name: getattr(dataset, name) for name in ("train", "val", "test")}
    splits = {
        name: split and Split(split.images, labels[split.labels]) for name, split in splits.items()
    }
    note = f"{len(labels):,} of the {len(known):,} that the model tells apart"
    return replace(dataset, classes=tuple(known), **splits), note


def _known_classes(model, dataset):
    """(names of the model's classes in its order, a note or None): what it says, ImageNet's where
    it has as many, or those of the data set where it has as many."""
    classes, count = list(dataset.classes), model.config.num_classes
    if model.classes:
        return model.classes, None
    if count == len(IMAGENET) and (len(classes) != count or set(classes) & set(IMAGENET)):
        return list(IMAGENET), None
    if count == len(classes):
        is_guess = dataset.name == "imagefolder"
        return classes, "by the order of the folders: the model names none" if is_guess else None
    raise UserError(f"it tells {count:,} apart and names none, and here are {len(classes):,}")
