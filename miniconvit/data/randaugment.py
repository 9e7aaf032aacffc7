"""RandAugment (Cubuk et al. 2020) as timm's rand-m9-mstd0.5-inc1: fifteen operations on images.

Every operation takes uint8 images (b, 3, H, W), and where it has one an argument (b,), and returns
new ones. Pixel for pixel they are Pillow's: integers and float32 where Pillow has these, and double
precision where it has that, because results are truncated and the last bit can decide a level.
"""

from math import pi

import numpy as np

from ..arrays import RANDAUGMENT, array_module, normal, random_bits

FILL = (124, 116, 104)
"""What an image moved aside leaves behind: ImageNet's mean colour, as in the official recipe."""


def randaugment(images, indices, seed, epoch, repeat, count, magnitude):
    """`count` times for each image: with probability 1/2, an operation chosen at random.

    images: uint8 (b, 3, H, W), changed in place; indices, repeat: as in `augment`. The strength of
    an operation, 0 to 10, is drawn from N(magnitude, 0.5), and its direction is a coin.
    """
    xp = array_module(images)
    for layer in range(count):
        bits = random_bits(seed, RANDAUGMENT, epoch, indices, repeat, layer, xp=xp)  # (b,)
        chosen = bits % (2 * len(OPERATIONS))  # half of these are none
        sign = 2.0 * (bits >> 63).astype(xp.float32) - 1.0
        level = normal(seed, RANDAUGMENT, epoch, indices, repeat, layer, 0, xp=xp)
        level = xp.clip(magnitude + 0.5 * level, 0.0, 10.0)
        for number, (operation, argument) in enumerate(OPERATIONS.values()):
            mask = chosen == number
            places = chosen_places(mask)
            if places is not None:
                before = images[places]
                after = operation(before, *argument(level[places], sign[places]))
                images[places] = xp.where(_column(mask[places]), after, before)


def chosen_places(mask):
    """An index of what mask (b,) chooses, or None where that is nothing; on a device an index of
    everything, because counting would wait for it."""
    if array_module(mask) is not np:
        return slice(None)
    places = np.flatnonzero(mask)
    return places if len(places) else None


def invert(images):
    """255 - x."""
    return 255 - images


def posterize(images, bits):
    """x without its lowest 8 - bits bits; bits (b,) from 0 to 8."""
    xp = array_module(images)
    step = (xp.full((1,), 1, xp.int64) << (8 - bits))[:, None, None, None]
    return (images // step * step).astype(xp.uint8)


def solarize(images, threshold):
    """255 - x from the threshold (b,) on."""
    return array_module(images).where(images < _column(threshold), images, 255 - images)


def solarize_add(images, amount):
    """x + amount below 128, at most 255; amount (b,) integers."""
    xp = array_module(images)
    brighter = xp.minimum(images + _column(amount), 255).astype(xp.uint8)
    return xp.where(images < 128, brighter, images)


def autocontrast(images):
    """The darkest level of each channel becomes 0 and the lightest 255; one level alone stays."""
    xp = array_module(images)
    low = images.min(axis=(2, 3))[:, :, None, None].astype(xp.int64)
    high = images.max(axis=(2, 3))[:, :, None, None].astype(xp.int64)
    scale = 255.0 / xp.maximum(high - low, 1).astype(xp.float64)
    y = xp.clip(images * scale + -low * scale, 0.0, 255.0).astype(xp.uint8)
    return xp.where(high > low, y, images)


def equalize(images):
    """Levels so that each is about as frequent as any other, in each channel."""
    xp = array_module(images)
    b, channels, height, width = images.shape
    rows = b * channels
    first = 256 * xp.arange(rows)[:, None]
    keys = images.reshape(rows, -1) + first  # (rows, H W): levels of different rows stay apart
    below = xp.searchsorted(xp.sort(keys.reshape(-1)), xp.arange(256 * rows))
    below = below.reshape(rows, 256) - height * width * xp.arange(rows)[:, None]
    darker = below.reshape(-1)[keys]  # (rows, H W): how many pixels of the row are darker
    high = images.max(axis=(2, 3)).reshape(rows, 1)
    step = below.reshape(-1)[high + first] // 255  # of all pixels but the lightest
    y = xp.minimum((step // 2 + darker) // xp.maximum(step, 1), 255)
    # Pillow leaves a channel of one level alone, and then step is 0 too.
    return xp.where(step > 0, y, images.reshape(rows, -1)).astype(xp.uint8).reshape(images.shape)


def brightness(images, factor):
    """Between black (0) and the image (1), and beyond; factor (b,), as in the next three."""
    return _blend(0, images, factor)


def contrast(images, factor):
    """Between a plain grey of the image's mean (0) and the image (1)."""
    grey = _grey(images)
    count = grey.size // len(grey)
    mean = (2 * grey.sum(axis=(1, 2, 3)) + count) // (2 * count)
    return _blend(_column(mean), images, factor)


def color(images, factor):
    """Between black and white (0) and the image (1)."""
    return _blend(_grey(images), images, factor)


def sharpness(images, factor):
    """Between a smoothed image (0) and the image (1); the outermost pixels are not smoothed."""
    xp = array_module(images)
    smooth = images.astype(xp.int64)
    _, _, height, width = images.shape
    if min(height, width) >= 3:
        rows = smooth[:, :, :-2] + smooth[:, :, 1:-1] + smooth[:, :, 2:]
        total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * smooth[:, :, 1:-1, 1:-1]
        smooth[:, :, 1:-1, 1:-1] = (2 * total + 13) // 26  # total / 13, rounded
    return _blend(smooth, images, factor)


def rotate(images, degrees):
    """Counter-clockwise about the centre; degrees (b,)."""
    xp = array_module(images)
    _, _, height, width = images.shape
    # Modulo 360 and to fifteen decimals like Pillow, so that 30 degrees have a sine of 1/2.
    angle = (degrees.astype(xp.float64) % 360.0)[:, None, None] * (-pi / 180)
    cos, sin = (xp.rint(1e15 * x) / 1e15 for x in (xp.cos(angle), xp.sin(angle)))
    x, y = xp.arange(width) + 0.5, (xp.arange(height) + 0.5)[:, None]
    right, down = width / 2, height / 2
    from_x = cos * x + sin * y + (right - (cos * right + sin * down))  # (b, H, W)
    from_y = cos * y - sin * x + (down - (cos * down - sin * right))
    return _resample(images, from_x, from_y)


def shear_x(images, factor):
    """Each row moves to the left by factor (b,) times its distance from the upper edge."""
    xp = array_module(images)
    down = xp.arange(images.shape[2]) + 0.5
    return _slide(images, factor.astype(xp.float64)[:, None] * down)


def shear_y(images, factor):
    """Each column moves up by factor (b,) times its distance from the left edge."""
    return shear_x(images.swapaxes(2, 3), factor).swapaxes(2, 3)


def translate_x(images, share):
    """To the left by share (b,) of the width."""
    xp = array_module(images)
    return _slide(images, share.astype(xp.float64)[:, None] * images.shape[3])


def translate_y(images, share):
    """Up by share (b,) of the height."""
    return translate_x(images.swapaxes(2, 3), share).swapaxes(2, 3)


def _slide(images, shift):
    """Every row moves to the left by shift pixels, (b, H) or (b, 1)."""
    xp = array_module(images)
    return _resample(images, xp.arange(images.shape[3]) + 0.5 + shift[:, :, None])


def _resample(images, x, y=None):
    """The image at the places (x, y), (b, H, W) each, bicubic; FILL where these are outside.

    The first pixel is the place from 0 to 1. Without y every pixel stays in its row, and x may be
    (b, 1, W).
    """
    xp = array_module(images)
    batch, channels, height, width = images.shape
    outside = (x < 0) | (x >= width)
    if y is None:
        top, rows = xp.arange(height)[:, None], (1,)
    else:
        outside = outside | (y < 0) | (y >= height)
        y = xp.where(outside, 0.5, y) - 0.5
        top, rows = xp.floor(y), range(4)
        y = (y - top)[:, None]  # (b, 1, H, W)
    x = xp.where(outside, 0.5, x) - 0.5
    left = xp.floor(x)
    x = (x - left)[:, None]

    # With two pixels more on each side, which repeat the edge, all sixteen neighbours exist.
    rows_padded = xp.clip(xp.arange(height + 4) - 2, 0, height - 1)[:, None]
    cols_padded = xp.clip(xp.arange(width + 4) - 2, 0, width - 1)
    padded = images[:, :, rows_padded, cols_padded].astype(xp.float64).reshape(-1)
    stride = width + 4
    first = ((top + 1) * stride + (left + 1)).astype(xp.int64)[:, None]  # (b, 1, H, W)
    planes = xp.arange(batch * channels).reshape(batch, channels, 1, 1)
    first = first + planes * ((height + 4) * stride)  # (b, 3, H, W)
    across = [
        _cubic(*(xp.take(padded, first + (stride * row + col)) for col in range(4)), x)
        for row in rows
    ]
    found = across[0] if y is None else _cubic(*across, y)
    found = xp.clip(found, 0.0, 255.0).astype(xp.uint8)
    fill = xp.stack([xp.full((1, 1), level, xp.uint8) for level in FILL])  # (3, 1, 1)
    return xp.where(outside[:, None], fill, found)


def _cubic(v1, v2, v3, v4, t):
    """The cubic through v2 (t = 0) and v3 (t = 1) with the slopes v3 - v1 and v4 - v2.

    In differences, so that equal values give just this value.
    """
    return v2 + t * ((v3 - v1) + t * ((2.0 * (v1 - v2) + v3 - v4) + t * (v2 - v1 - v3 + v4)))


def _grey(images):
    """The brightness (b, 1, H, W) as Pillow has it, int64."""
    red, green, blue = (images[:, channel : channel + 1].astype("int64") for channel in range(3))
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


def _blend(other, images, factor):
    """other + factor (images - other) in float32, without its fraction; factor (b,)."""
    xp = array_module(images)
    factor = factor.astype(xp.float32)[:, None, None, None]
    y = factor * (images - other).astype(xp.float32)
    y = y + other if isinstance(other, int) else y + other.astype(xp.float32)
    return xp.clip(y, 0.0, 255.0).astype(xp.uint8)


def _column(values):
    return values[:, None, None, None]


def _nothing(level, sign):
    """No argument."""
    return ()


def _steps(most):
    """0 to most, by the level, without a fraction."""
    return lambda level, sign: ((level * (most / 10)).astype("int64"),)


def _signed(most):
    """-most to most."""
    return lambda level, sign: (level * sign * (most / 10),)


def _factor(level, sign):
    """0.1 to 1.9."""
    return (1.0 + level * sign * 0.09,)


OPERATIONS = {
    "AutoContrast": (autocontrast, _nothing),
    "Equalize": (equalize, _nothing),
    "Invert": (invert, _nothing),
    "Rotate": (rotate, _signed(30)),
    "PosterizeIncreasing": (posterize, lambda level, sign: (4 - _steps(4)(level, sign)[0],)),
    "SolarizeIncreasing": (solarize, lambda level, sign: (256 - _steps(256)(level, sign)[0],)),
    "SolarizeAdd": (solarize_add, _steps(110)),
    "ColorIncreasing": (color, _factor),
    "ContrastIncreasing": (contrast, _factor),
    "BrightnessIncreasing": (brightness, _factor),
    "SharpnessIncreasing": (sharpness, _factor),
    "ShearX": (shear_x, _signed(0.3)),
    "ShearY": (shear_y, _signed(0.3)),
    "TranslateXRel": (translate_x, _signed(0.45)),
    "TranslateYRel": (translate_y, _signed(0.45)),
}
"""timm's name to the operation, and to a function of the level (0 to 10) and a sign (-1 or 1) that
gives its argument."""
