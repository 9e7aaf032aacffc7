"""RandAugment: every operation is Pillow's to the bit, and what is drawn has the stated shares."""

import numpy as np
import pytest
from scipy.stats import kstest, norm

from miniconvit.arrays import normal
from miniconvit.data import randaugment as ra

Image = pytest.importorskip("PIL.Image")
ImageEnhance = pytest.importorskip("PIL.ImageEnhance")
ImageOps = pytest.importorskip("PIL.ImageOps")

MOVED = {"resample": Image.Resampling.BICUBIC, "fillcolor": (124, 116, 104)}


def moved(image, *matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, **MOVED)


def posterized(image, bits):
    # Pillow refuses to keep no bit at all, which leaves black.
    return ImageOps.posterize(image, bits) if bits else Image.new("RGB", image.size)


def solarize_added(image, amount):
    return image.point([min(255, x + amount) if x < 128 else x for x in range(256)] * 3)


FACTORS = [0.0, 0.1, 0.19, 0.73, 1.0, 1.37, 1.81, 1.9, 2.5]
SHEARS = [-0.3, -0.27, -0.25, 0.0, 0.11, 0.273, 0.5]
SHARES = [-0.45, -0.405, -0.25, 0.0, 0.125, 0.31, 0.45]
ANGLES = [-30.0, -29.9, -7.3, 0.0, 1.1, 15.0, 26.77, 30.0]

PILLOW = {  # name: (the operation with Pillow, arguments)
    "AutoContrast": (ImageOps.autocontrast, [None]),
    "Equalize": (ImageOps.equalize, [None]),
    "Invert": (ImageOps.invert, [None]),
    "Rotate": (lambda x, v: x.rotate(v, **MOVED), ANGLES),
    "PosterizeIncreasing": (posterized, range(9)),
    "SolarizeIncreasing": (ImageOps.solarize, [0, 1, 25, 128, 255, 256]),
    "SolarizeAdd": (solarize_added, [0, 1, 99, 110, 128]),
    "ColorIncreasing": (lambda x, v: ImageEnhance.Color(x).enhance(v), FACTORS),
    "ContrastIncreasing": (lambda x, v: ImageEnhance.Contrast(x).enhance(v), FACTORS),
    "BrightnessIncreasing": (lambda x, v: ImageEnhance.Brightness(x).enhance(v), FACTORS),
    "SharpnessIncreasing": (lambda x, v: ImageEnhance.Sharpness(x).enhance(v), FACTORS),
    "ShearX": (lambda x, v: moved(x, 1, v, 0, 0, 1, 0), SHEARS),
    "ShearY": (lambda x, v: moved(x, 1, 0, 0, v, 1, 0), SHEARS),
    "TranslateXRel": (lambda x, v: moved(x, 1, 0, v * x.width, 0, 1, 0), SHARES),
    "TranslateYRel": (lambda x, v: moved(x, 1, 0, 0, 0, 1, v * x.height), SHARES),
}


def pictures(height, width):
    """uint8 (n, 3, height, width): noise, narrow noise, gradients, two levels, constants."""
    rng = np.random.default_rng(height * width)
    shape = (3, height, width)
    ramp = np.arange(height)[:, None] * 5 + np.arange(width) * 3
    images = [rng.integers(0, 256, shape) for _ in range(6)]
    images += [rng.integers(low, high, shape) for low, high in ((90, 140), (0, 3), (252, 256))]
    images += [np.stack([ramp, 255 - ramp, 2 * ramp]), 255 * rng.integers(0, 2, shape)]
    images += [np.full(shape, level) for level in (0, 7, 128, 255)]
    images += [rng.integers(0, 256, shape) for _ in range(2)]
    images[-1][1] = 77  # one channel of a single level
    images[-2][:, 2:] = images[-2][:, 1:2]  # most pixels alike
    return np.array(images).astype(np.uint8)


def test_the_fifteen_operations_are_those_of_timm():
    assert list(PILLOW) == list(ra.OPERATIONS) and len(PILLOW) == 15


@pytest.mark.parametrize("size", [(32, 32), (13, 22), (31, 9), (2, 5)], ids=str)
@pytest.mark.parametrize("name", PILLOW)
def test_an_operation_is_pillows_to_the_bit(name, size):
    """All images with all arguments in one batch."""
    with_pillow, arguments = PILLOW[name]
    images = pictures(*size)
    batch = np.repeat(images, len(arguments), axis=0)
    values = list(arguments) * len(images)
    kind = np.int64 if isinstance(values[0], int) else np.float64
    given = [] if values[0] is None else [np.array(values, kind)]
    before = batch.copy()
    found = ra.OPERATIONS[name][0](batch, *given)
    assert (batch == before).all() and found.shape == batch.shape and found.dtype == np.uint8
    changed = 0
    for image, value, result in zip(batch, values, found, strict=True):
        picture = Image.fromarray(image.transpose(1, 2, 0))
        true = with_pillow(picture) if value is None else with_pillow(picture, value)
        true = np.asarray(true).transpose(2, 0, 1)
        np.testing.assert_array_equal(result, true, err_msg=f"{name} by {value}")
        changed += (true != image).any()
    assert changed >= 5 or min(size) < 3  # too small to smooth, and to equalize


RANGES = {  # name: smallest and largest argument at levels 0, 9 and 10, by timm's definition
    "Rotate": ((0, 0), (-27, 27), (-30, 30)),
    "PosterizeIncreasing": ((4, 4), (1, 1), (0, 0)),
    "SolarizeIncreasing": ((256, 256), (26, 26), (0, 0)),
    "SolarizeAdd": ((0, 0), (99, 99), (110, 110)),
    "ColorIncreasing": ((1, 1), (0.19, 1.81), (0.1, 1.9)),
    "ContrastIncreasing": ((1, 1), (0.19, 1.81), (0.1, 1.9)),
    "BrightnessIncreasing": ((1, 1), (0.19, 1.81), (0.1, 1.9)),
    "SharpnessIncreasing": ((1, 1), (0.19, 1.81), (0.1, 1.9)),
    "ShearX": ((0, 0), (-0.27, 0.27), (-0.3, 0.3)),
    "ShearY": ((0, 0), (-0.27, 0.27), (-0.3, 0.3)),
    "TranslateXRel": ((0, 0), (-0.405, 0.405), (-0.45, 0.45)),
    "TranslateYRel": ((0, 0), (-0.405, 0.405), (-0.45, 0.45)),
}


@pytest.mark.parametrize("name", RANGES)
def test_the_argument_of_an_operation(name):
    argument = ra.OPERATIONS[name][1]
    for level, (low, high) in zip((0, 9, 10), RANGES[name], strict=True):
        for sign, value in ((-1, low), (1, high)):
            (found,) = argument(np.full(2, level, "float32"), np.full(2, sign, "float32"))
            np.testing.assert_allclose(found, [value] * 2, rtol=1e-6)


def test_normal_numbers_are_nearly_normal():
    """The bound of the docstring, and five standard errors of 200,000 draws beside it."""
    draws = normal(3, 9, np.arange(200_000))
    assert draws.dtype == np.float32
    assert abs(draws.mean()) < 5 / 200_000**0.5 and abs(draws.std() - 1) < 5 / 400_000**0.5
    assert kstest(draws, norm.cdf).statistic < 0.004 + 5 * 0.5 / 200_000**0.5
    assert abs(draws).max() < 4.9
