"""`miniconvit data`."""

from pathlib import Path

import click

from ..data import PRESETS, load_dataset
from ..data.dataset import SOURCES
from ..data.preview import draw_preview
from ..training.report import table
from ..training.settings import make_settings
from .options import SIZE, broken_option, data_dir_option

IMG_SIZE = make_settings(data="imagefolder").img_size
"""What `train` uses without further flags."""


@click.command("data")
@click.argument("name", type=click.Choice(list(SOURCES)))
@data_dir_option
@broken_option
@click.option(
    "--img-size", type=SIZE, default=IMG_SIZE, show_default=True, help="Pixels, of image files."
)
@click.option("--no-download", is_flag=True, help="Never fetch a data set.")
@click.option("--preview", type=click.Path(path_type=Path), help="Draw a contact sheet, a PNG.")
@click.option(
    "--augment",
    type=click.Choice(list(PRESETS)),
    help="Of the contact sheet.  [default: what suits the data]",
)
def command(name, data_dir, broken, img_size, no_download, preview, augment):
    """Download and verify a data set; show its splits, and a contact sheet of its images.

    The sheet has training images, copies as --augment makes them, and mixtures of two by mixup and
    CutMix.
    """
    options = {"img_size": img_size, "broken": broken or "refuse"}
    dataset = load_dataset(name, data_dir, not no_download, **options)
    height, width = dataset.train.images.shape[2:]
    splits = [(split, getattr(dataset, split)) for split in ("train", "val", "test")]
    rows = [(split, f"{len(part.labels):,} images") for split, part in splits if part]
    classes = f"{len(dataset.classes)}: {'; '.join(dataset.classes[:5])}"
    rows += [
        ("classes", classes + "; ..." * (len(dataset.classes) > 5)),
        ("size", f"{height}x{width} pixels, {dataset.train.images.shape[1]} channels"),
        ("augmentation", f"{dataset.augmentation}: {PRESETS[dataset.augmentation].summary}"),
    ]
    click.echo(table(rows))
    if preview is not None:
        draw_preview(dataset, augment or dataset.augmentation, preview)
        click.echo(f"contact sheet in {preview}")
