"""What happens to the images of an epoch: their order, their augmentation, their normalisation."""

import numpy as np

from ..backend import AUGMENTATION, DATA_ORDER, array_module, random_bits
from ..errors import UserError

PADDING = 4


def epoch_order(n, seed, epoch):
    """A permutation of 0 .. n-1, int64 (n,): a pure function of (n, seed, epoch)."""
    return np.argsort(random_bits(seed, DATA_ORDER, epoch, np.arange(n)), kind="stable")


def augment(images, indices, seed, epoch, preset, repeat=0):
    """Random changes of images that keep their class. Returns uint8 of the same shape.

    images: uint8 (b, 3, H, W); indices: their (b,) places in the data set. preset "none" returns
    images as they are; "crop-flip" pads by 4 black pixels, crops back to H x W at random and
    mirrors left and right with probability 1/2. The draw for an image is a pure function of
    (seed, epoch, index, repeat), whatever else is in the batch. Raises UserError on another preset.
    """
    if preset == "none":
        return images
    if preset != "crop-flip":
        raise UserError(
            f"unknown augmentation {preset!r}: expected 'none' or 'crop-flip', choose one of them"
        )
    xp = array_module(images)
    batch, channels, height, width = images.shape
    bits = random_bits(seed, AUGMENTATION, epoch, xp.asarray(indices), repeat, xp=xp)  # (b,)
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

    images: uint8 (b, 3, H, W); mean and std: one number for each channel, in units where white
    is 1. Returns (b, 3, H, W) of dtype.
    """
    xp = array_module(images)
    y = images.astype(dtype)
    y /= 255
    y -= xp.asarray(mean, dtype=dtype)[:, None, None]
    y /= xp.asarray(std, dtype=dtype)[:, None, None]
    return y
