"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019): every image is mixed with a partner.

The partner of image i of a batch of n is image n - 1 - i, and one share serves the whole batch, as
in timm.
"""

from dataclasses import dataclass
from math import sqrt

import scipy  # loads scipy.special, which takes long, where it is used

from ..arrays import MIXING, array_module, random_bits, uniform


@dataclass(frozen=True)
class Mix:
    """How a batch is mixed. share: of the image itself in what comes out; box: rows and columns
    (top, bottom, left, right) that come from the partner, or None where all pixels are blended."""

    share: float
    box: tuple[int, int, int, int] | None = None


def draw_mix(mixup, cutmix, seed, step, size):
    """The Mix of a step, or None where mixup and cutmix are 0: a function of (seed, step).

    mixup, cutmix: the parameter of the symmetric Beta distribution of the share; where both are
    positive a coin decides. size: (height, width) of the images. The box of CutMix has the share's
    complement of the area, its centre anywhere; what lies outside the image is cut off, and the
    share is that of the box that is left.
    """
    if not mixup and not cutmix:
        return None
    coin, quantile = (float(uniform(seed, MIXING, step, k)[0]) for k in range(2))
    by_box = cutmix and (not mixup or coin < 0.5)
    alpha = cutmix if by_box else mixup
    share = float(scipy.special.betaincinv(alpha, alpha, quantile))
    if not by_box:
        return Mix(share)
    ends, area = [], 1
    for axis, side in enumerate(size):
        centre = int(random_bits(seed, MIXING, step, 2 + axis)[0]) % side
        half = int(side * sqrt(1.0 - share)) // 2
        low, high = max(0, centre - half), min(side, centre + half)
        ends += [low, high]
        area *= high - low
    return Mix(1.0 - area / (size[0] * size[1]), tuple(ends))


def draw_patch_mix(seed, step, grid, patch):
    """The Mix of a step whose box falls on the borders of patches: CutMix with Beta(1, 1) on a grid
    (rows, cols) of patches (height, width)."""
    mix = draw_mix(0.0, 1.0, seed, step, grid)
    top, bottom, left, right = mix.box
    height, width = patch
    return Mix(mix.share, (height * top, height * bottom, width * left, width * right))


def mix_patch_labels(labels, partners, mix, grid, patch):
    """The label of each patch, int64 (b, N): the partner's inside of the box of draw_patch_mix."""
    xp = array_module(labels)
    (rows, cols), (top, bottom, left, right) = grid, mix.box
    inside = xp.zeros(grid, bool)
    inside[top // patch[0] : bottom // patch[0], left // patch[1] : right // patch[1]] = True
    return xp.where(inside.reshape(rows * cols), partners[:, None], labels[:, None])


def mix_images(images, partners, mix):
    """images (b, 3, H, W), changed in place and returned; partners: as many others."""
    if mix.box is None:
        images *= mix.share
        images += (1.0 - mix.share) * partners
    else:
        top, bottom, left, right = mix.box
        images[:, :, top:bottom, left:right] = partners[:, :, top:bottom, left:right]
    return images


def mix_targets(labels, partners, mix, num_classes, label_smoothing=0.0):
    """share y1 + (1 - share) y2, float32 (b, C): y1 and y2 are the one-hot targets of labels and
    partners (b,), smoothed as (1 - s) y + s / C."""
    xp = array_module(labels)
    classes = xp.arange(num_classes)
    first, second = ((classes == y[:, None]).astype(xp.float32) for y in (labels, partners))
    targets = mix.share * first + (1.0 - mix.share) * second
    return (1.0 - label_smoothing) * targets + label_smoothing / num_classes
