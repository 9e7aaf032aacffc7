"""A data set by its name: three splits, and what a model has to know about them."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..arrays import to_device
from ..errors import UserError, unknown_name
from . import imagefolder, shapes
from .cifar import CIFAR10, CIFAR100, cache_folder
from .image_sets import Images

SOURCES = {"shapes": shapes, "cifar10": CIFAR10, "cifar100": CIFAR100, "imagefolder": imagefolder}
"""Name to the module or object with MEAN, STD, AUGMENTATION and read(folders, download)."""


@dataclass(frozen=True)
class Split:
    """images: uint8 (n, 3, H, W), an ImageArray or ImageFiles; labels: int64 (n,)."""

    images: Images
    labels: np.ndarray


@dataclass(frozen=True)
class Dataset:
    """Three disjoint splits: choose settings on val, report on test, None where there is no such.

    mean and std are per channel, in units where white is 1; augmentation is the preset that suits
    the data ("none" or "crop-flip").
    """

    name: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: str
    train: Split | None
    val: Split
    test: Split | None


def load_dataset(
    name, data_dir=None, download=True, subset=1.0, img_size=224, broken="refuse", to_train=True
):
    """The data set "shapes" (built in), "cifar10" or "cifar100" (files, see `cifar`), or any images
    in folders, "imagefolder", which alone takes img_size, broken and to_train (see its read).

    CIFAR's files are looked for in data_dir, then in the folder that MINICONVIT_DATA names, then in
    the user's cache folder; what is found nowhere is downloaded to data_dir, or to the cache, if
    download is true. Image folders lie in data_dir or, where that is None, in MINICONVIT_DATA.
    subset keeps the first fraction of each class of train, at least one image of each. Raises
    UserError on an unknown name, a fraction outside (0, 1], missing or damaged files and a failed
    download.
    """
    if name not in SOURCES:
        raise UserError(unknown_name("data set", name, SOURCES))
    if not 0 < subset <= 1:
        raise UserError(f"subset must be a fraction in (0, 1], not {subset}")
    source = SOURCES[name]
    options = {"img_size": img_size, "broken": broken, "to_train": to_train}
    options = options if source is imagefolder else {}
    classes, found = source.read(_folders(data_dir), download, **options)
    splits = {split: Split(*both) if both else None for split, both in found.items()}
    if subset < 1:
        splits["train"] = _first_of_each_class(splits["train"], subset)
    return Dataset(name, classes, source.MEAN, source.STD, source.AUGMENTATION, **splits)


def fingerprint(dataset):
    """SHA-256 of the names and labels of the image files to train and to validate on, in their
    order; None for arrays, which are always the same. Another picture under the same name changes
    nothing, one file more or less does."""
    if dataset.val.images.names() is None:
        return None
    found = hashlib.sha256(repr(dataset.classes).encode())
    for split in (dataset.train, dataset.val):
        for name, label in zip(split.images.names(), split.labels.tolist(), strict=True):
            found.update(f"{label} {name}\n".encode(errors="surrogateescape"))
        found.update(b"\n")
    return found.hexdigest()


def on_device(dataset, xp):
    """The data set as a training on arrays of the module xp needs it.

    The images of train and val (but not those in files), the labels of train, and mean and std,
    float32, are moved.
    """
    train, val = dataset.train, dataset.val
    labels, mean, std = to_device(
        (train.labels, *(np.asarray(x, "float32") for x in (dataset.mean, dataset.std))), xp
    )
    return Dataset(
        dataset.name,
        dataset.classes,
        mean,
        std,
        dataset.augmentation,
        Split(train.images.on(xp), labels),
        Split(val.images.on(xp), val.labels),
        dataset.test,
    )


def _folders(data_dir):
    """Where files may lie, in the order of search; the first and the last may be downloaded to."""
    named = (data_dir, os.environ.get("MINICONVIT_DATA"), cache_folder())
    return [Path(folder).expanduser() if folder else None for folder in named]


def _first_of_each_class(split, fraction):
    counts = np.bincount(split.labels)
    kept = []
    for label in np.flatnonzero(counts):
        count = max(1, round(fraction * int(counts[label])))
        kept.append(np.flatnonzero(split.labels == label)[:count])
    kept = np.sort(np.concatenate(kept))
    return Split(split.images.select(kept), split.labels[kept])
