"""`miniconvit data`."""

import click

from ..data import PRESETS, load_dataset
from ..data.dataset import SOURCES
from ..data.preview import draw_preview
from ..training.report import table
from ..training.settings import DATA, make_settings
from .options import (
    PATH,
    RUN,
    Command,
    Name,
    any_size_option,
    data_dir_option,
    no_download_option,
    option,
    setting_option,
)

IMG_SIZE = make_settings(data="imagefolder").img_size
"""What `train` uses without further flags."""


@click.command("data", cls=Command)
@click.argument("name", type=Name(SOURCES), metavar="NAME")
@data_dir_option
@setting_option("broken")
@any_size_option
@setting_option(
    "img_size", "Size in pixels to which image files are cut.", default=IMG_SIZE, group=DATA
)
@no_download_option
@option("--preview", type=PATH, metavar="FILE", help="Draw a contact sheet into this PNG file.")
@setting_option("augment", shown="what suits the data", group=RUN)
def command(name, data_dir, broken, img_size, no_download, preview, augment):
    """Download, verify and show a data set.

    NAME is one of shapes, cifar10, cifar100 and imagefolder.

    The contact sheet of --preview shows training images. Beside them it shows copies as --augment
    changes them, and pairs mixed by mixup and CutMix.
    """
    options = {"img_size": img_size, "broken": broken or "refuse"}
    dataset = load_dataset(name, data_dir, not no_download, **options)
    preset = augment or dataset.augmentation
    height, width = dataset.train.images.shape[2:]
    splits = [(split, getattr(dataset, split)) for split in ("train", "val", "test")]
    rows = [(split, f"{len(part.labels):,} images") for split, part in splits if part]
    classes = f"{len(dataset.classes)}: {'; '.join(dataset.classes[:5])}"
    rows += [
        ("classes", classes + "; ..." * (len(dataset.classes) > 5)),
        ("size", f"{height}x{width} pixels, {dataset.train.images.shape[1]} channels"),
        ("augmentation", f"{preset}: {PRESETS[preset].summary}"),
    ]
    click.echo(table(rows))
    if preview is not None:
        draw_preview(dataset, preset, preview)
        click.echo(f"contact sheet in {preview}")
