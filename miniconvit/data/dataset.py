"""A data set by its name: three splits, and what a model has to know about them."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pooch

from ..errors import UserError
from . import cifar, shapes

SOURCES = {"shapes": shapes, "cifar10": cifar}
"""Name to the module with MEAN, STD, AUGMENTATION and read(folders, download)."""


@dataclass(frozen=True)
class Split:
    """images: uint8 (n, 3, H, W); labels: int64 (n,)."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Dataset:
    """Three disjoint splits: choose settings on val, report on test.

    mean and std are per channel, in units where white is 1; augmentation is the preset that suits
    the data ("none" or "crop-flip").
    """

    name: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: str
    train: Split
    val: Split
    test: Split


def load_dataset(name, data_dir=None, download=True, subset=1.0):
    """The data set "shapes" (built in) or "cifar10" (files, see `cifar`).

    Files are looked for in data_dir, then in the folder that MINICONVIT_DATA names, then in the
    user's cache folder; what is found nowhere is downloaded to data_dir, or to the cache, if
    download is true. subset keeps the first fraction of each class of train, at least one image
    of each. Raises UserError on an unknown name, a fraction outside (0, 1], missing or damaged
    files and a failed download.
    """
    if name not in SOURCES:
        raise UserError(f"unknown data set {name!r}: choose one of {', '.join(SOURCES)}")
    if not 0 < subset <= 1:
        raise UserError(f"subset must be a fraction in (0, 1], not {subset}")
    source = SOURCES[name]
    classes, arrays = source.read(_folders(data_dir), download)
    splits = {split: Split(images, labels) for split, (images, labels) in arrays.items()}
    if subset < 1:
        splits["train"] = _first_of_each_class(splits["train"], subset)
    return Dataset(name, classes, source.MEAN, source.STD, source.AUGMENTATION, **splits)


def _folders(data_dir):
    """Where files may lie, in the order of search; the first and the last may be downloaded to."""
    named = (data_dir, os.environ.get("MINICONVIT_DATA"), pooch.os_cache("miniconvit"))
    return [Path(folder).expanduser() if folder else None for folder in named]


def _first_of_each_class(split, fraction):
    counts = np.bincount(split.labels)
    kept = []
    for label in np.flatnonzero(counts):
        count = max(1, round(fraction * int(counts[label])))
        kept.append(np.flatnonzero(split.labels == label)[:count])
    kept = np.sort(np.concatenate(kept))
    return Split(split.images[kept], split.labels[kept])
