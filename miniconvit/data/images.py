"""Image files as arrays, by Pillow: reading any of them, the evaluation view, the training view.

Both views are those of the official script: for evaluation the shorter side is resized to 8/7 of
the model's and the centre cropped (224: 256), for training a random part is cropped, resized and
perhaps mirrored. Models of at most 32 pixels are shown the whole shorter side.
"""

from importlib.util import find_spec
from math import exp, log, sqrt

import numpy as np

from ..arrays import RANDOM_CROP, uniform
from ..errors import UserError

AREA = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)  # width over height
ATTEMPTS = 10
LARGEST_WITHOUT_MARGIN = 32
TAIL = 1024  # bytes within which a whole file shows its end


class BrokenImage(UserError):
    """An image file that is missing, no image or damaged."""


def require_pillow(who):
    """Raises UserError, with the line that installs it, where Pillow is missing."""
    if find_spec("PIL") is None:
        raise UserError(f"{who} needs Pillow, which is missing: pip install Pillow")


def read_image(file, size, channels=3):
    """The evaluation view of an image file: uint8 (channels, height, width), size (height, width).

    Raises BrokenImage, naming the file, where it is missing, no image or damaged.
    """
    return as_array(evaluation_view(open_image(file, channels), size))


def open_image(file, channels=3):
    """The picture in a file as an RGB Pillow image, or a grey one where channels is 1.

    Turned as its EXIF orientation says; transparent parts become white; 16-bit grey keeps its
    upper 8 bits. Raises BrokenImage, naming the file, where it is missing, no image or damaged.
    """
    from PIL import UnidentifiedImageError

    try:
        return _opened(file).convert("L" if channels == 1 else "RGB")
    except FileNotFoundError:
        raise BrokenImage(f"there is no image {file}: give the path of an image file") from None
    except UnidentifiedImageError:
        raise BrokenImage(f"{file} is not an image that Pillow can read: use PNG or JPEG") from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        text = f"{file} cannot be read as an image: {error}; use another file"
        raise BrokenImage(text) from error


def _opened(file):
    """As open_image's RGB image, with whatever Pillow raises."""
    from PIL import Image, ImageOps

    with Image.open(file) as opened:
        opened.load()
        try:
            image = ImageOps.exif_transpose(opened)
        except MemoryError:
            raise
        except Exception:  # the pixels are good, only what is said of them is not
            image = opened
        return _to_rgb(image)


def _to_rgb(image):
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def evaluation_view(image, size):
    """A Pillow image resized to cover 8/7 of size (height, width), bicubic, and its centre."""
    from PIL import Image

    height, width = size
    covered = [side * 8 // 7 if min(size) > LARGEST_WITHOUT_MARGIN else side for side in size]
    if image.height * covered[1] <= image.width * covered[0]:
        resized = covered[0] * image.width // image.height, covered[0]
    else:
        resized = covered[1], covered[1] * image.height // image.width
    image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def training_view(image, size, seed, epoch, index, repeat=0):
    """A random part of a Pillow image, resized to size (height, width), bicubic, and mirrored left
    and right with probability 1/2: a pure function of (seed, epoch, index, repeat)."""
    from PIL import Image

    draws = uniform(seed, RANDOM_CROP, epoch, index, repeat, np.arange(4 * ATTEMPTS + 1)).tolist()
    left, top, width, height = random_box(image.width, image.height, draws[:-1])
    part = image.crop((left, top, left + width, top + height))
    part = part.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draws[-1] >= 0.5 else part


def random_box(width, height, draws):
    """(left, top, width, height) of a part of so large an image (Szegedy et al. 2015).

    Its area is uniform in AREA of the image's, the logarithm of its ratio uniform in that of RATIO,
    its place uniform. draws: numbers in [0, 1), four for each attempt to find one that fits; after
    the last attempt it is the largest part in the middle whose ratio is allowed.
    """
    lowest, highest = (log(ratio) for ratio in RATIO)
    for area, ratio, right, down in zip(*[iter(draws)] * 4, strict=True):
        pixels = width * height * (AREA[0] + area * (AREA[1] - AREA[0]))
        ratio = exp(lowest + ratio * (highest - lowest))
        w, h = round(sqrt(pixels * ratio)), round(sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(right * (width - w + 1)), int(down * (height - h + 1)), w, h
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    return (width - w) // 2, (height - h) // 2, w, h


def as_array(image):
    """A grey or RGB Pillow image as uint8 (channels, height, width)."""
    pixels = np.asarray(image).reshape(image.height, image.width, -1)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def finding(file, thorough=False):
    """What is wrong with an image file, in words, or None.

    Looks at its header and for the mark at its end; where that mark is missing, and always if
    thorough, does all that open_image does.
    """
    from PIL import Image

    try:
        with open(file, "rb") as stream:
            end = stream.seek(0, 2)
            if end == 0:
                return "empty"
            stream.seek(max(0, end - TAIL))
            tail = stream.read()
        with Image.open(file) as image:
            mark = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}.get(image.format)
        if thorough or mark is None or mark not in tail:
            _opened(file)
    except MemoryError:
        raise
    except Exception as error:
        text = getattr(error, "strerror", None) or str(error).replace(f" {str(file)!r}", "")
        return text or type(error).__name__
    return None
