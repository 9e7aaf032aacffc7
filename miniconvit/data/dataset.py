"""A data set in memory, and the order in which an epoch visits it."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pooch

from ..errors import UserError


@dataclass(frozen=True)
class Split:
    """images uint8 (n, 3, height, width), labels int64 (n,)."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Dataset:
    """Three splits and what is known of them. Settings are chosen on val; test is for reporting.

    mean and std are the training images' per channel, in 0..1; augmentation: the usual preset.
    """

    name: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: str
    train: Split
    val: Split
    test: Split


def take_subset(dataset, fraction):
    """The data set with that fraction of each class of train: the first images, at least one.

    Raises UserError for a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise UserError(f"the subset must be above 0 and at most 1, not {fraction}")
    if fraction == 1:
        return dataset
    labels = dataset.train.labels
    chosen = []
    for label in range(len(dataset.classes)):
        indices = np.flatnonzero(labels == label)
        # Rounded first: 0.29 * 100 is 28.999999999999996.
        chosen.append(indices[: max(1, int(round(len(indices) * fraction, 6)))])
    kept = np.sort(np.concatenate(chosen))
    return replace(dataset, train=Split(dataset.train.images[kept], labels[kept]))


def epoch_order(n, seed, epoch):
    """The order in which epoch `epoch` visits n images: int64 (n,), a function of its arguments."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def data_folders(data_dir):
    """Where data are looked for, in this order: data_dir, MINICONVIT_DATA, the user's cache."""
    folders = [data_dir, os.environ.get("MINICONVIT_DATA"), pooch.os_cache("miniconvit")]
    return [Path(folder) for folder in folders if folder]
