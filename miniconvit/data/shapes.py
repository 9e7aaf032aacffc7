"""shapes: procedural 32x32 colour images whose ten classes need both texture and layout.

Four objects stand in the four quarters of the image, each striped vertically or horizontally; the
class says which ones are vertical: one of the four, or two of them (4 + 6 = 10 classes). Outline,
colours, position within the quarter and phase of the stripes are drawn at random, independently of
the class. Hence, exactly:

- Whoever sees only the layout (outlines, places, mean colours: `render(..., flat=True)`) is left
  with chance, 10 %: nothing but the texture differs between the classes.
- Whoever sees only the textures (the patches in any order: `shuffle_patches`) can count the
  vertical objects and no more, 20 %: one of four classes or one of six, (4/10)/4 + (6/10)/6 = 1/5.
  An object never leaves its quarter and the quarters begin on multiples of 4 pixels, so that no 4x4
  patch tells which quarter it comes from.
- A pixel's mean is the same in all classes, since dark and light are exchanged with probability
  1/2: a linear classifier stays near chance.

Every pixel is decided by integer arithmetic on counter-based bits, so the bytes are the same on
every machine; SHA256 pins them.
"""

import numpy as np

from ..backend import random_bits
from .dataset import Dataset, Split

SEED = 2021
SHA256 = "afb754d49250453c6e24068a58115676abf03079608f726e02171f591b2b0f69"
"""Of each split's images and then labels (little-endian), one after the other."""
COUNTS = {"train": 10_000, "val": 2_000, "test": 2_000}
CHUNK = 500  # scenes rendered at once, to stay in the caches

ARRANGEMENTS = {
    "top left vertical": (1, 0, 0, 0),
    "top right vertical": (0, 1, 0, 0),
    "bottom left vertical": (0, 0, 1, 0),
    "bottom right vertical": (0, 0, 0, 1),
    "top row vertical": (1, 1, 0, 0),
    "bottom row vertical": (0, 0, 1, 1),
    "left column vertical": (1, 0, 1, 0),
    "right column vertical": (0, 1, 0, 1),
    "falling diagonal vertical": (1, 0, 0, 1),
    "rising diagonal vertical": (0, 1, 1, 0),
}
"""Class to which places are vertical: top left, top right, bottom left, bottom right."""

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
"""Disc, square, octagon, diamond: the most that max(|x|, |y|), |x| + |y| and x^2 + y^2 may be, in
half pixels from the centre."""

STRIPE = 4  # pixels of one colour
SIDE = 16  # pixels of a quarter
NOISE_PLACE = 4  # the random stream after those of the four places
NOISE = 8  # grey levels: each value of a pixel is shifted by -8..7


def load_shapes():
    """The three splits: disjoint draws, balanced classes."""
    splits, first = {}, 0
    for name, count in COUNTS.items():
        parts = [render(start, CHUNK) for start in range(first, first + count, CHUNK)]
        splits[name] = Split(*map(np.concatenate, zip(*parts, strict=True)))
        first += count
    images = splits["train"].images
    # Exact sums of integers, so that mean and std too are the same on every machine.
    n = images.size // 3
    total = images.sum(axis=(0, 2, 3), dtype=np.int64)
    squares = np.square(images, dtype=np.int32).sum(axis=(0, 2, 3), dtype=np.int64)
    mean = total / n
    std = np.sqrt(squares / n - mean**2)
    mean, std = (tuple(round(float(x) / 255, 4) for x in values) for values in (mean, std))
    return Dataset("shapes", tuple(ARRANGEMENTS), mean, std, "none", **splits)


def render(first, count, flat=False):
    """Scenes number first..first+count-1: images uint8 (count, 3, 32, 32), labels int64 (count,).

    flat: every texture is replaced by its mean colour, the scenes staying the same.
    """
    s = _scenes(first, count)
    x = np.arange(SIDE, dtype=np.int16)
    y = x[:, None]
    u = abs(2 * x - (SIDE - 1) - _pixels(s["dx"]))  # (n, 4, 1, 16), half pixels from the centre
    v = abs(2 * y - (SIDE - 1) - _pixels(s["dy"]))  # (n, 4, 16, 1)
    a, b, c = (_pixels(OUTLINES[s["outline"]][..., i]) for i in range(3))
    inside = (np.maximum(u, v) <= a) & (u + v <= b) & (u * u + v * v <= c)  # (n, 4, 16, 16)
    across = (x + _pixels(s["phase_x"])) // STRIPE & 1
    down = (y + _pixels(s["phase_y"])) // STRIPE & 1
    vertical = np.array(list(ARRANGEMENTS.values()), dtype=bool)[s["label"]]  # (n, 4)
    is_light = np.where(_pixels(vertical), across, down) ^ _pixels(s["swap"])
    dark, light = DARK[s["dark"]], LIGHT[s["light"]]  # (n, 4, 3)
    if flat:
        dark = light = (dark + light) // 2
    colour = np.where(is_light[:, :, None], _pixels(light), _pixels(dark))  # (n, 4, 3, 16, 16)
    ground = GROUND[s["ground"]].astype(np.int16)[:, None, :, None, None]
    quarters = np.where(inside[:, :, None], colour, ground).reshape(count, 2, 2, 3, SIDE, SIDE)
    images = quarters.transpose(0, 3, 1, 4, 2, 5).reshape(count, 3, 2 * SIDE, 2 * SIDE)
    images = np.clip(images + _noise(first, count, images.shape), 0, 255).astype(np.uint8)
    return images, s["label"]


def shuffle_patches(images, seed, patch=4):
    """Each image's patches in a random order of its own: textures stay, the layout goes."""
    n, channels, height, width = images.shape
    rows, cols = height // patch, width // patch
    tiles = images.reshape(n, channels, rows, patch, cols, patch)
    tiles = tiles.transpose(0, 2, 4, 1, 3, 5).reshape(n, rows * cols, channels, patch, patch)
    order = np.random.default_rng(seed).random((n, rows * cols)).argsort(axis=1)
    tiles = tiles[np.arange(n)[:, None], order].reshape(n, rows, cols, channels, patch, patch)
    return tiles.transpose(0, 3, 1, 4, 2, 5).reshape(images.shape)


def _scenes(first, count):
    """What is drawn for each scene and place, by name: (n,) or (n, 4)."""
    scene = np.arange(first, first + count)[:, None]  # (n, 1)
    place = np.arange(4)

    def choose(detail, options):
        return (random_bits(SEED, scene, place, detail) >> 32).astype(np.int64) % options

    return {
        "label": scene[:, 0] % len(ARRANGEMENTS),
        "dark": choose(0, len(DARK)),
        "light": choose(1, len(LIGHT)),
        "swap": choose(2, 2),
        "dx": choose(3, 7) - 3,
        "dy": choose(4, 7) - 3,
        "outline": choose(5, len(OUTLINES)),
        "phase_x": choose(6, 2 * STRIPE),
        "phase_y": choose(7, 2 * STRIPE),
        "ground": choose(9, len(GROUND))[:, 0],
    }


def _noise(first, count, shape):
    scene = np.arange(first, first + count)[:, None]
    words = random_bits(SEED, scene, NOISE_PLACE, np.arange(shape[1] * shape[2] * shape[3] // 8))
    levels = words.astype("<u8").view(np.uint8) >> 4  # 0..15
    return levels.reshape(shape).astype(np.int16) - NOISE


def _pixels(values):
    """One number for all pixels of a quarter: two axes more."""
    return values.astype(np.int16)[..., None, None]
