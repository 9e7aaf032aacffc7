"""shapes: procedural 32x32 colour images whose ten classes need both texture and layout.

Four objects stand in the four quarters of an image; three are plain and one is textured, and the
class says with which texture and in which quarter: ten of the twelve pairs. Outline, colours, place
within the quarter, and phase of the texture are drawn independently of the class. Hence, exactly:

- Whoever sees only the layout (`flatten_textures`: outlines, places, mean colours) is left with
  chance, 10 %, because nothing but the texture differs between the classes.
- Whoever sees only the textures can tell the three apart and no more, 30 %. `shuffle_patches`
  leaves just that: objects stay within their quarter and quarters begin at multiples of 4 pixels,
  so that the 4x4 patches of an object are distributed alike in every quarter.
- The mean of every pixel is the same in all classes, because dark and light change places with
  probability 1/2 and a plain object has the colour between them. A linear classifier can only
  guess from where the contrast is: 35 % (`benchmarks/shapes_controls.py`).

The texture's cells are 3 pixels wide, so a 4x4 patch shows less than one period: a texture is read
from a patch and its neighbours. All pixels come from counter-based bits by integer arithmetic,
which gives the same bytes on every machine.
"""

import hashlib

import numpy as np

from ..arrays import random_bits
from ..errors import UserError
from .image_sets import ImageArray

COUNTS = {"train": 10_000, "val": 2_000, "test": 2_000}
SHA256 = "73458124d24635a9e05eb84a14db453697ec4844174d3da210ea2ec774232745"
"""Of the bytes of images and labels (little-endian), train, val, test."""

MEAN = (0.526, 0.500, 0.485)
STD = (0.142, 0.133, 0.137)
AUGMENTATION = "none"  # a flip would change the class

TEXTURES = ("vertical stripes", "horizontal stripes", "checks")
QUARTERS = ("top left", "top right", "bottom left", "bottom right")
MISSING = {("horizontal stripes", "bottom right"), ("checks", "top left")}  # twelve less two: ten
PAIRS = tuple(
    (texture, quarter)
    for texture in range(len(TEXTURES))
    for quarter in range(len(QUARTERS))
    if (TEXTURES[texture], QUARTERS[quarter]) not in MISSING
)
"""Class to its (texture, quarter)."""
CLASSES = tuple(f"{TEXTURES[texture]}, {QUARTERS[quarter]}" for texture, quarter in PAIRS)

SEED = 2021
CELL = 3
PLACES = np.arange(4)
CHUNK = 500  # scenes drawn at a time: the intermediate arrays stay in the cache

DARK = np.array(
    [(38, 70, 83), (29, 53, 87), (106, 4, 15), (45, 106, 79), (90, 24, 154), (20, 20, 24)]
)
LIGHT = np.array(
    [
        (255, 214, 92),
        (244, 162, 97),
        (168, 218, 220),
        (255, 255, 246),
        (255, 175, 204),
        (183, 228, 130),
    ]
)
GROUND = np.array([(128, 132, 140), (140, 128, 116), (116, 134, 122), (134, 120, 138)])
OUTLINES = np.array([(12, 24, 150), (11, 22, 242), (12, 17, 288), (12, 15, 288)])
"""Disc, square, octagon, diamond: the largest max(|x|, |y|), |x| + |y| and x^2 + y^2 of a pixel,
in half pixels from the centre."""


def read(folders=(), download=False):
    """(class names, {"train", "val", "test": (ImageArray, labels)}). Nothing is looked for."""
    return CLASSES, {split: (ImageArray(_render(split)), _labels(split)) for split in COUNTS}


def flatten_textures(split):
    """The images of a split ("train", "val", "test") with the textures gone, uint8 (n, 3, 32, 32).

    The same scenes, noise included, but every object is filled with the mean of its two colours.
    """
    return _render(split, flat=True)


def shuffle_patches(images, seed, patch_size=4):
    """The patches of each image in a random order of its own: the textures stay, the layout goes.

    images (n, channels, H, W). Returns the same shape and dtype. Raises UserError where patch_size
    does not divide H and W.
    """
    n, channels, height, width = images.shape
    if height % patch_size or width % patch_size:
        raise UserError(
            f"images of {height}x{width} pixels cannot be cut into patches of {patch_size}: choose "
            "a patch size that divides both sides"
        )
    rows, cols = height // patch_size, width // patch_size
    tiles = images.reshape(n, channels, rows, patch_size, cols, patch_size)
    tiles = tiles.transpose(0, 2, 4, 1, 3, 5).reshape(n, rows * cols, -1)
    order = random_bits(seed, np.arange(n)[:, None], np.arange(rows * cols)).argsort(axis=1)
    tiles = np.take_along_axis(tiles, order[:, :, None], axis=1)
    tiles = tiles.reshape(n, rows, cols, channels, patch_size, patch_size)
    return tiles.transpose(0, 3, 1, 4, 2, 5).reshape(images.shape)


def digest(splits):
    """SHA-256 of the splits that `read` returns, to compare with SHA256."""
    sha = hashlib.sha256()
    for split in COUNTS:
        images, labels = splits[split]
        sha.update(images[:].tobytes())
        sha.update(labels.astype("<i8").tobytes())
    return sha.hexdigest()


def _labels(split):
    return np.arange(COUNTS[split], dtype=np.int64) % len(CLASSES)


def _render(split, flat=False):
    """Scenes are numbered through train, val and test, so no two splits share a draw."""
    first = sum(COUNTS[name] for name in list(COUNTS)[: list(COUNTS).index(split)])
    labels = _labels(split)
    chunks = [
        _render_scenes(np.arange(first + start, first + start + len(part)), part, flat)
        for start in range(0, len(labels), CHUNK)
        for part in [labels[start : start + CHUNK]]
    ]
    return np.concatenate(chunks)


def _render_scenes(scenes, labels, flat):
    """uint8 (n, 3, 32, 32): four quarters of 16 x 16, each with an object on the ground."""
    n = len(scenes)

    def choose(detail, options):
        """One of so many options for every object, (n, 4, 1, 1)."""
        chosen = random_bits(SEED, scenes[:, None], PLACES, detail) % options
        return chosen.astype(np.int16)[:, :, None, None]

    def colour(values):
        return values.astype(np.int16)[..., None, None]

    x, y = np.arange(16, dtype=np.int16), np.arange(16, dtype=np.int16)[:, None]
    right, down = abs(2 * x - 12 - choose(0, 7)), abs(2 * y - 12 - choose(1, 7))  # from the centre
    largest, diamond, disc = OUTLINES.astype(np.int16)[choose(2, len(OUTLINES))[..., 0, 0]].T
    largest, diamond, disc = (limit.T[:, :, None, None] for limit in (largest, diamond, disc))
    inside = (np.maximum(right, down) <= largest) & (right + down <= diamond)
    inside &= right * right + down * down <= disc  # (n, 4, 16, 16)

    across, along = (x + choose(3, 2 * CELL)) // CELL, (y + choose(4, 2 * CELL)) // CELL
    texture, quarter = np.array(PAIRS)[labels].T[:, :, None, None, None]  # (n, 1, 1, 1) each
    cells = np.where(texture == 0, across, np.where(texture == 1, along, across + along))
    is_light = (cells + choose(6, 2)) % 2 == 1
    textured = (PLACES[:, None, None] == quarter) & (not flat)  # (n, 4, 1, 1)

    dark = DARK[choose(7, len(DARK))[..., 0, 0]]  # (n, 4, 3)
    light = LIGHT[choose(8, len(LIGHT))[..., 0, 0]]
    plain = (dark + light) // 2
    ground = GROUND[choose(9, len(GROUND))[:, :1, 0, 0]]  # (n, 1, 3): one for the image
    quarters = np.where(is_light[:, :, None], colour(light), colour(dark))
    quarters = np.where(textured[:, :, None], quarters, colour(plain))
    quarters = np.where(inside[:, :, None], quarters, colour(ground))  # (n, 4, 3, 16, 16)
    images = quarters.reshape(n, 2, 2, 3, 16, 16).transpose(0, 3, 1, 4, 2, 5).reshape(n, 3, 32, 32)

    words = random_bits(SEED, scenes[:, None], len(PLACES), np.arange(images[0].size // 8))
    noise = words.astype("<u8").view(np.uint8).reshape(images.shape) >> 4
    return np.clip(images + noise.astype(np.int16) - 8, 0, 255).astype(np.uint8)
