"""`miniconvit inspect`."""

from pathlib import Path

import click
import numpy as np

from ..analysis.inspection import CLASS_TOKEN, inspect, write_inspection
from ..analysis.page import MOST_IMAGES, Picture, write_page
from ..checkpoints.weights import open_weights
from ..data.images import read_image, require_pillow
from ..errors import UserError
from ..training.history import run_history
from ..training.report import folded, table
from ..training.settings import DATA, DEFAULT_RECIPE
from .eval import fitted, open_dataset
from .options import (
    COUNT,
    PATH,
    Command,
    can_draw,
    checkpoint_options,
    json_option,
    option,
    print_json,
    stored_data_options,
)


class _Query(click.ParamType):
    name = "row,col"

    def convert(self, value, param, ctx):
        """'3,5' as (3, 5)."""
        try:
            row, col = (int(word) for word in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not of the form ROW,COL", param, ctx)
        return row, col


@click.command("inspect", cls=Command)
@click.argument("checkpoint", metavar="RUN_OR_CHECKPOINT", type=PATH)
@click.argument("files", metavar="[IMAGE]...", nargs=-1, type=click.Path())
@stored_data_options
@option(
    "--images",
    "count",
    type=COUNT,
    default=64,
    group=DATA,
    help="Number of validation images to average over.",
    shown="64",
)
@option(
    "--query",
    type=_Query(),
    metavar="ROW,COL",
    help="Show what this patch looks at. The first patch is 0,0.",
    shown="the middle",
)
@option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="Folder for inspect.json and the pictures.",
    shown="RUN/inspect",
)
@option(
    "--page",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.html",
    help="Write a page to open in a browser, and no pictures without --out.",
)
@checkpoint_options
@json_option
def command(
    checkpoint, files, data, data_dir, broken, count, query, out, page, variant, img_size, as_json
):
    """Show what a model looks at.

    It prints gates, head centres, locality strengths and nonlocality, and draws attention maps. The
    maps are those of the first image. The images are the IMAGE files, or else validation images.

    For a run it also draws how its heads changed over the epochs, unless --data or --img-size is
    given. In layers with a class token, that token is left out and the rows are scaled to sum 1.

    With --page it writes one HTML file, which needs no network. There you ask patches, turn the
    gates and see the maps and the answer change. It shows an image of each class, up to ten.

    With --json it prints maps only for a --query, and writes files only for --out and --page.
    """
    path, model = open_weights(checkpoint, variant, img_size)
    dataset = None if files else _dataset(checkpoint, path, model, data, data_dir, broken)
    if files:
        require_pillow("inspect")
        size, channels = model.config.image, model.config.in_chans
        pixels = np.stack([read_image(file, size, channels) for file in files])
    else:
        pixels = None if dataset is None else dataset.val.images[:count]
    as_trained = data is None and img_size is None
    has_history = checkpoint.is_dir() and dataset is not None and as_trained
    history = run_history(checkpoint, model.config, dataset) if has_history else ()
    inspection = inspect(model, pixels, query, history)
    left_out = []
    if page is not None:
        pictures = _pictures(files, pixels, dataset, count)
        title = f"{path.absolute().parent.name}/{path.name}" if checkpoint.is_dir() else path.name
        classes = dataset.classes if dataset else model.classes
        left_out = write_page(page, model, pictures, history, title, classes)
    if as_json:
        about = {"checkpoint": str(path), "data": dataset.name if dataset else None}
        print_json(about | inspection.to_dict(with_maps=query is not None))
    else:
        click.echo(_text(path, inspection))
        if page is not None:
            click.echo("\n".join([f"\nto open in a browser: {page}", *left_out]))
        elif out is None and checkpoint.is_dir():
            out = checkpoint / "inspect"
    if out is not None:
        names = write_inspection(inspection, out, can_draw())
        if not as_json:
            click.echo(folded(f"\nin {out}: {', '.join(names)}"))


def _dataset(checkpoint, path, model, data, data_dir, broken):
    """The data set to run on, None where the checkpoint was trained on none that is known here."""
    name = data or model.data
    if name not in DEFAULT_RECIPE:
        return None
    dataset = open_dataset(checkpoint, model, name, data_dir, data is not None, broken)
    return fitted(path, model, dataset)[0]


def _pictures(files, pixels, dataset, count):
    """The Pictures of a page: the files, or else the first validation image of each class."""
    if files:
        named = zip(pixels, files, strict=True)
        return [Picture(image, Path(file).name) for image, file in named]
    if dataset is None:
        raise UserError("a page needs images: add --data, or image files")
    labels = dataset.val.labels
    _, first = np.unique(labels, return_index=True)
    most = min(count, MOST_IMAGES, len(first))
    which = first[np.arange(most) * len(first) // most]
    chosen = zip(dataset.val.images[which], which, strict=True)
    return [Picture(image, f"image {i + 1}", int(labels[i])) for image, i in chosen]


COLUMNS = "layer      head   gate  strength          centre  nonlocality  content  position"
MEANINGS = """\
Nonlocality is the mean distance in patches from a query to what it looks at,
by content or position alone too. Even attention looks at all patches alike.
Strength is how sharply position looks at its centre, (right, down) of a query."""


def _text(path, inspection):
    found = inspection.to_dict(with_maps=False)
    lines = [
        table(
            [
                ("checkpoint", path),
                ("images", inspection.images or "none: add --data or image files for nonlocality"),
                ("even attention", f"nonlocality {found['uniform_nonlocality']:.2f} patches"),
            ]
        ),
        "",
        COLUMNS,
    ]
    pushed = False
    for layer in found["layers"]:
        for number, head in enumerate(layer["heads"], 1):
            lines.append(_line(layer, number, head))
            pushed |= head.get("centre", ()) is None
    lines += ["", MEANINGS]
    if pushed:
        lines += ["", "no centre: with a negative strength a head is pushed away on all sides"]
    if inspection.images and inspection.config.has_cls_token:
        lines += ["", CLASS_TOKEN]
    return "\n".join(lines)


def _line(layer, number, head):
    first = f"{layer['layer']:5d}  {layer['attention']}" if number == 1 else ""
    centre = head.get("centre")
    place = "no centre" if "centre" in head else ""
    if centre is not None:
        place = f"{centre[0]:+.2f}, {centre[1]:+.2f}"

    def cell(key, width, form=".3f"):
        return f"{format(head[key], form) if key in head else '':>{width}}"

    return (
        f"{first:11}{number:4d}{cell('gate', 7)}{cell('strength', 10)}  {place:>15}"
        f"{cell('nonlocality', 12)}{cell('content_nonlocality', 9)}"
        f"{cell('position_nonlocality', 10)}"
    ).rstrip()
