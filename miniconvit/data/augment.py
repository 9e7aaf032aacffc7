"""Augmentation and normalisation, on whichever array module the images are."""

from ..backend import array_module, random_bits
from ..errors import UserError

AUGMENT_STREAM = 2  # keeps these random numbers apart from those of other uses of the same seed
PADDING = 4  # pixels of zeros on each side before the crop
PRESETS = ("none", "crop-flip")


def augment(images, indices, seed, epoch, preset, repeat=0):
    """Changes each image at random: a function of (seed, epoch, its index, repeat) alone.

    images uint8 (b, 3, height, width), indices (b,) their places in the data set. Presets: "none";
    "crop-flip": padded by 4 pixels of zeros, cropped to the old size, mirrored with probability
    1/2. Returns uint8 of the same shape. Raises UserError for an unknown preset.
    """
    if preset == "none":
        return images
    if preset != "crop-flip":
        raise UserError(f"unknown augmentation {preset!r}: choose one of {', '.join(PRESETS)}")
    xp = array_module(images)
    b, channels, height, width = images.shape
    bits = random_bits(seed, AUGMENT_STREAM, epoch, xp.asarray(indices), repeat, xp=xp)
    places = 2 * PADDING + 1
    dy = (bits >> 40) % places  # (b,) each, from bits apart from each other
    dx = (bits >> 16 & 0xFFFFFF) % places
    flip = (bits & 1).astype(bool)
    rows = dy[:, None].astype(xp.int64) + xp.arange(height)  # (b, height), in the padded image
    cols = dx[:, None].astype(xp.int64) + xp.arange(width)
    cols = xp.where(flip[:, None], cols[:, ::-1], cols)
    padded = xp.zeros((b, channels, height + 2 * PADDING, width + 2 * PADDING), dtype=images.dtype)
    padded[:, :, PADDING:-PADDING, PADDING:-PADDING] = images
    image, channel = xp.arange(b)[:, None, None, None], xp.arange(channels)[:, None, None]
    return padded[image, channel, rows[:, None, :, None], cols[:, None, None, :]]


def normalize(images, mean, std, dtype="float32"):
    """(images / 255 - mean) / std per channel, in dtype all the way. images uint8 (b, C, h, w)."""
    xp = array_module(images)
    scale = xp.asarray([1.0 / (255.0 * s) for s in std], dtype=dtype)[:, None, None]
    shift = xp.asarray([m / s for m, s in zip(mean, std, strict=True)], dtype=dtype)[:, None, None]
    return images.astype(dtype) * scale - shift
