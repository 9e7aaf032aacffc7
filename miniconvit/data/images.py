"""Image files as arrays, by Pillow: reading any of them, the evaluation view, the training view.

Both views are those of the official script: for evaluation the shorter side is resized to 8/7 of
the model's and the centre cropped (224: 256), for training a random part is cropped, resized and
perhaps mirrored. Models of at most 32 pixels are shown the whole shorter side.
"""

import errno
import os
import stat
import sys
from importlib.util import find_spec
from itertools import count
from math import ceil, exp, floor, log, sqrt

import numpy as np

from ..arrays import RANDOM_CROP, uniform
from ..errors import UserError

PILLOW = (10, 1)  # the first with has_transparency_data
AREA = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)  # width over height
ATTEMPTS = 10
LARGEST_WITHOUT_MARGIN = 32
TAIL = 1024  # bytes within which a whole file shows its end
LONGEST = 1000  # the longer side over the shorter one
PIXELS_PER_BYTE = 10  # of a large photograph, at most
RESIZED_WHOLE = 64  # times the pixels of a view: what is larger is cut before it is resized
STRIPE = 256  # rows
PHOTOMETRIC = 262  # the TIFF tag that is 0 where 0 is white
DARK = 64  # of 255: a quarter

_dark_images = count()


class BrokenImage(UserError):
    """An image file that is missing, no image, damaged or too large; reason: why, in few words."""

    def __init__(self, text, reason):
        super().__init__(text)
        self.reason = reason

    def __reduce__(self):  # from one process to another
        return BrokenImage, (str(self), self.reason)


def require_pillow(who):
    """Raises UserError, with the line that helps, where Pillow is missing, too old or damaged."""
    if find_spec("PIL") is None:
        raise UserError(f"{who} needs Pillow, which is missing: pip install Pillow")
    try:
        from PIL import Image
    except ImportError as error:
        raise UserError(
            f"{who} needs Pillow, which cannot be loaded here ({error}): "
            "pip install --force-reinstall Pillow"
        ) from error
    if tuple(int(part) for part in Image.__version__.split(".")[:2]) < PILLOW:
        raise UserError(
            f"{who} needs Pillow {PILLOW[0]}.{PILLOW[1]} or newer, and here is {Image.__version__}"
            ": pip install --upgrade Pillow"
        )


def allow_any_size():
    """Lifts the limits on the area and the shape of images, Pillow's and ours, for this process."""
    require_pillow("--any-size")
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None


def read_image(file, size, channels=3):
    """The evaluation view of an image file: uint8 (channels, height, width), size (height, width).

    Raises BrokenImage as open_image does.
    """
    return as_array(evaluation_view(open_image(file, channels), size))


def open_image(file, channels=3):
    """The picture in a file as an RGB Pillow image, or a grey one where channels is 1.

    Turned as its EXIF orientation says; transparent parts become white; 16-bit grey keeps its
    upper 8 bits, and where little is left of an image it is said once. Raises BrokenImage, naming
    the file, where it is missing, no image, damaged, or larger than the limits or the memory, and
    where its values are negative, of more than 16 bits, or floats beyond 255.
    """
    from PIL import Image, ImageOps

    try:
        _refuse_pipe(file)
        with Image.open(file) as image:
            _refuse_extreme(file, image)
            is_deep = image.mode[0] in "IF" or ";16" in str(image.tile[:1])  # until it is loaded
            image.load()
            try:
                ImageOps.exif_transpose(image, in_place=True)
            except MemoryError:
                raise
            except Exception:  # the pixels are good, only what is said of them is not
                pass
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        raise _broken(file, error) from error
    mode = "L" if channels == 1 else "RGB"
    try:
        image = _to_rgb(image)
        image = image if image.mode == mode else image.convert(mode)
    except (ValueError, OverflowError, MemoryError) as error:  # what else is raised is our fault
        raise _broken(file, error) from error
    if is_deep:
        _say_if_dark(file, image)
    return image


def _broken(file, error):
    """The BrokenImage of what Pillow raised on a file; what is no fault of the file is raised."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, BrokenImage):
        return error
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        raise error
    reason = getattr(error, "strerror", None) or str(error).replace(f" {str(file)!r}", "")
    reason = reason or type(error).__name__
    if reason.startswith("decoder ") and reason.endswith(" not available"):
        raise UserError(
            f"Pillow {Image.__version__} is installed without what {file} needs ({reason}): "
            "pip install --force-reinstall Pillow"
        ) from error
    if isinstance(error, FileNotFoundError):
        return BrokenImage(f"there is no image {file}: give the path of an image file", reason)
    if isinstance(error, UnidentifiedImageError):
        reason = reason if os.path.getsize(file) else "empty"
        text = f"{file} is not an image that Pillow {Image.__version__} can read: use PNG or JPEG"
        return BrokenImage(text, reason)
    if isinstance(error, MemoryError | Image.DecompressionBombError):
        reason = "not enough memory for it"
        if not isinstance(error, MemoryError):
            reason = f"it has more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels"
        return _too_large(file, reason)
    return BrokenImage(f"{file} cannot be read as an image: {reason}; use another file", reason)


def _too_large(file, reason):
    advice = "use a smaller copy, or lift this limit with --any-size"
    if reason.startswith("not"):
        advice = "use a smaller copy"
    return BrokenImage(f"{file} cannot be read as an image: {reason}; {advice}", reason)


def _refuse_pipe(file):
    """Raises BrokenImage for a pipe, socket or device: to open one may wait for ever."""
    if not stat.S_ISREG(mode := os.stat(file).st_mode) and not stat.S_ISDIR(mode):
        reason = "it is no file, but a pipe, a socket or a device"
        raise BrokenImage(f"{file} cannot be read as an image: {reason}; use a file", reason)


def _refuse_extreme(file, image):
    """Raises BrokenImage where a picture is too long, or larger than Pillow's MAX_IMAGE_PIXELS and
    its file's bytes make believable: 254 bytes can ask for gigabytes."""
    from PIL import Image

    if Image.MAX_IMAGE_PIXELS is None:
        return
    width, height = image.size
    size = os.path.getsize(file)
    if width * height > max(Image.MAX_IMAGE_PIXELS // 2, PIXELS_PER_BYTE * size):
        raise _too_large(file, f"it has {width:,} x {height:,} pixels in {size:,} bytes")
    if max(width, height) > LONGEST * min(width, height):
        raise _too_large(file, f"its {width:,} x {height:,} pixels are a line and no picture")


def _is_white_zero(image):
    """Whether 0 is white in a TIFF: Pillow minds that where there are 8 bits or fewer alone."""
    return getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0


def _refuse_floats(image):
    """Raises ValueError where Pillow would clip floats, or show them inverted."""
    pixels = np.asarray(image)
    low, high = pixels.min(), pixels.max()
    if not (low >= 0 and high <= 255):  # NaN too
        raise ValueError(f"its floats reach from {low:.6g} to {high:.6g}, not within 0 to 255")
    if _is_white_zero(image):
        raise ValueError("its floats are white at 0 (WhiteIsZero), which is not read here")


def _to_rgb(image):
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits, in as many or in 32
        pixels = np.asarray(image)
        if pixels.min() < 0:
            raise ValueError(f"it has negative values, down to {pixels.min()}")
        if pixels.max() >= 2**16:
            raise ValueError("it has values of more than 16 bits")
        pixels = 2**16 - 1 - pixels.astype(np.int32) if _is_white_zero(image) else pixels
        return Image.fromarray((pixels >> 8).astype(np.uint8))
    if image.mode == "F":
        _refuse_floats(image)
    if not image.has_transparency_data:
        return image if image.mode in ("L", "RGB") else image.convert("RGB")
    on_white = Image.new("RGB", image.size)
    for top in range(0, image.height, STRIPE):
        part = image.crop((0, top, image.width, min(top + STRIPE, image.height))).convert("RGBA")
        white = Image.new("RGBA", part.size, "white")
        on_white.paste(Image.alpha_composite(white, part).convert("RGB"), (0, top))
    return on_white


def _say_if_dark(file, image):
    """Says of the first file of 16 bits or floats that hardly any light is left of it in 8 bits."""
    extrema = image.getextrema()
    brightest = max(high for _, high in ([extrema] if image.mode == "L" else extrema))
    if brightest < DARK and next(_dark_images) == 0:
        print(
            f"{file} is nearly black: of its 16 bits or floats the upper 8 bits are kept, which "
            f"are at most {brightest} of 255. Data of fewer bits (12, say) must be scaled up first",
            file=sys.stderr,
        )


def evaluation_view(image, size):
    """A Pillow image resized to cover 8/7 of size (height, width), bicubic, and its centre."""
    from PIL import Image

    height, width = size
    covered = [side * 8 // 7 if min(size) > LARGEST_WITHOUT_MARGIN else side for side in size]
    if image.height * covered[1] <= image.width * covered[0]:
        resized = covered[0] * image.width // image.height, covered[0]
    else:
        resized = covered[1], covered[1] * image.height // image.width
    left, top = round((resized[0] - width) / 2), round((resized[1] - height) / 2)
    if resized[0] * resized[1] > RESIZED_WHOLE * width * height:
        return _part_of_resized(image, resized, left, top, size)
    image = image.resize(resized, Image.Resampling.BICUBIC)
    return image.crop((left, top, left + width, top + height))


def _part_of_resized(image, resized, left, top, size):
    """The part of this size (height, width) of an image that is resized, without the rest.

    Columns before rows, as Pillow resizes. Pillow rounds the corners of a box to float32, so values
    may differ by 2 from those of the whole image.
    """
    from PIL import Image

    height, width = size
    outer, inner = zip(
        _source(image.width, resized[0], left, width),
        _source(image.height, resized[1], top, height),
        strict=True,
    )
    (x0, x1), (y0, y1) = inner
    image = image.crop((outer[0][0], outer[1][0], outer[0][1], outer[1][1]))
    box = x0, 0, x1, image.height
    image = image.resize((width, image.height), Image.Resampling.BICUBIC, box=box)
    return image.resize((width, height), Image.Resampling.BICUBIC, box=(0, y0, width, y1))


def _source(side, resized, first, count):
    """((first, end) of the pixels that are looked at, (first, end) within them of what is shown)
    where of a side, resized, `count` pixels from `first` on are wanted."""
    scale = side / resized
    begin, end = first * scale, min((first + count) * scale, side)
    reach = 2 * max(scale, 1) + 1  # of the bicubic filter, and one to spare
    outer = max(0, floor(begin - reach)), min(side, ceil(end + reach))
    return outer, (begin - outer[0], end - outer[0])


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
        _refuse_pipe(file)
        with open(file, "rb") as stream:
            end = stream.seek(0, 2)
            stream.seek(max(0, end - TAIL))
            tail = stream.read()
        with Image.open(file) as image:
            _refuse_extreme(file, image)
            mark = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}.get(image.format)
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        return _broken(file, error).reason
    if not thorough and mark is not None and mark in tail:
        return None
    try:
        open_image(file)
    except BrokenImage as error:
        return error.reason
    return None
