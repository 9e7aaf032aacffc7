"""What happens to the images of an epoch: their order, their augmentation, their normalisation."""

from dataclasses import dataclass
from math import log

import numpy as np

from ..arrays import AUGMENTATION, DATA_ORDER, ERASING, array_module, normal, random_bits, uniform
from ..errors import UserError, unknown_name
from .randaugment import chosen_places, randaugment

PADDING = 4
SMALLEST, LARGEST = 0.02, 1 / 3  # share of the image that random erasing takes
ASPECT = 0.3  # of its box: between this and its inverse


@dataclass(frozen=True)
class Preset:
    """An augmentation. summary: what it does to images, for help; operations, magnitude: of
    RandAugment (timm's n and m); erasing: the share of images that lose a box."""

    summary: str
    operations: int = 0
    magnitude: float = 0.0
    erasing: float = 0.0


PRESETS = {
    "none": Preset("leaves images as they are"),
    "crop-flip": Preset(
        "mirrors half of the images and shifts them by up to 4 pixels, or crops image files at "
        "random"
    ),
    "light": Preset(
        "adds to crop-flip one operation of RandAugment at strength 5, half of the time",
        operations=1,
        magnitude=5.0,
    ),
    "paper": Preset(
        "adds to crop-flip two operations of RandAugment at strength 9, and noise boxes in a "
        "quarter of images",
        operations=2,
        magnitude=9.0,
        erasing=0.25,
    ),
}
"""Name to augmentation, each stronger than the one before; `paper` is the official recipe's below
33 pixels, rand-m9-mstd0.5-inc1 and random erasing included."""


def epoch_order(n, seed, epoch, repeats=1):
    """What an epoch draws, int64 (n,): divmod(draw, repeats) is (index in the data set, copy).

    A pure function of the arguments. With repeats=1 it is a permutation of 0 .. n-1; with more
    (repeated augmentation, Hoffer et al. 2020), the copies of an image follow each other and an
    epoch sees only the first n / repeats images of the permutation.
    """
    order = np.argsort(random_bits(seed, DATA_ORDER, epoch, np.arange(n)), kind="stable")
    return (order[: -(-n // repeats), None] * repeats + np.arange(repeats)).reshape(-1)[:n]


def augment(images, indices, seed, epoch, preset, repeat=0):
    """Random changes of images that keep their class. Returns uint8 of the same shape.

    images: uint8 (b, 3, H, W); indices: their (b,) places in the data set; preset: a name of
    PRESETS; repeat: the copy, a number or (b,). The draw for an image is a pure function of
    (seed, epoch, index, repeat), whatever else is in the batch. Random erasing comes later, see
    `erase`. Raises UserError on another preset.
    """
    if preset not in PRESETS:
        raise UserError(unknown_name("augmentation", preset, PRESETS))
    if preset == "none":
        return images
    xp = array_module(images)
    indices = xp.asarray(indices)
    images = _crop_flip(images, random_bits(seed, AUGMENTATION, epoch, indices, repeat, xp=xp))
    return operate(images, indices, seed, epoch, preset, repeat)


def operate(images, indices, seed, epoch, preset, repeat=0):
    """The preset's operations of RandAugment: images are changed in place and returned; the rest as
    for `augment`."""
    operations, magnitude = PRESETS[preset].operations, PRESETS[preset].magnitude
    randaugment(images, indices, seed, epoch, repeat, operations, magnitude)
    return images


def _crop_flip(images, bits):
    """A window of H x W in the image with a black margin, perhaps mirrored; bits: uint64 (b,)."""
    xp = array_module(images)
    batch, channels, height, width = images.shape
    offsets = 2 * PADDING + 1
    top = (bits % offsets).astype(xp.int64)[:, None]
    left = (bits // offsets % offsets).astype(xp.int64)[:, None]
    mirrored = (bits >> 63).astype(bool)[:, None]
    rows = top + xp.arange(height)  # (b, H)
    cols = left + xp.where(mirrored, xp.arange(width)[::-1], xp.arange(width))  # (b, W)
    margin = (PADDING, PADDING)
    padded = xp.pad(images, ((0, 0), (0, 0), margin, margin))
    which = xp.arange(batch)[:, None, None, None]
    channel = xp.arange(channels)[:, None, None]
    return padded[which, channel, rows[:, None, :, None], cols[:, None, None, :]]  # (b, 3, H, W)


def normalize(images, mean, std, dtype="float32"):
    """(images / 255 - mean) / std per channel, computed in dtype throughout.

    images: uint8 (b, 3, H, W), or the Images of a split; mean and std: one number for each channel,
    in units where white is 1. Returns (b, 3, H, W) of dtype.
    """
    y = images[:].astype(dtype)
    xp = array_module(y)
    y /= 255
    y -= xp.asarray(mean, dtype=dtype)[:, None, None]
    y /= xp.asarray(std, dtype=dtype)[:, None, None]
    return y


def erase(images, indices, seed, epoch, preset, repeat=0):
    """Random erasing (Zhong et al. 2020): a box of some images becomes noise, N(0, 1) per value.

    images: normalised, (b, 3, H, W), changed in place and returned; the rest as for `augment`. The
    box takes 2 % to a third of the area, with an aspect from 0.3 to 1 / 0.3, uniform in its
    logarithm; a side that is longer than the image is cut to it.
    """
    probability = PRESETS[preset].erasing
    if not probability:
        return images
    xp = array_module(images)
    _, channels, height, width = images.shape
    counters = (seed, ERASING, epoch, xp.asarray(indices), repeat)
    whether, area, aspect, row, col = uniform(*counters, xp.arange(5)[:, None], xp=xp)  # (5, b)
    erased = whether < probability
    area = (SMALLEST + (LARGEST - SMALLEST) * area) * (height * width)
    aspect = xp.exp((2.0 * aspect - 1.0) * log(1 / ASPECT))
    tall = xp.minimum((xp.sqrt(area * aspect) + 0.5).astype(xp.int64), height)
    wide = xp.minimum((xp.sqrt(area / aspect) + 0.5).astype(xp.int64), width)
    top = (row * (height - tall + 1).astype(xp.float32)).astype(xp.int64)
    left = (col * (width - wide + 1).astype(xp.float32)).astype(xp.int64)
    rows, cols = xp.arange(height)[:, None], xp.arange(width)
    top, left, tall, wide = (x[:, None, None] for x in (top, left, tall, wide))
    box = (rows >= top) & (rows < top + tall) & (cols >= left) & (cols < left + wide)  # (b, H, W)
    places = chosen_places(erased)
    if places is not None:
        box = box[places] & erased[places][:, None, None]
        of_image = [x if isinstance(x, int) else x[places][:, None] for x in counters]
        pixels = xp.arange(channels * height * width)
        noise = normal(*of_image, 5, pixels, xp=xp).reshape(-1, channels, height, width)
        images[places] = xp.where(box[:, None], noise.astype(images.dtype), images[places])
    return images
