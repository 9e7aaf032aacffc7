"""`miniconvit predict`."""

from importlib.util import find_spec
from pathlib import Path

import click
import numpy as np

from ..data import normalize
from ..device import resolve_device, to_cpu, to_device
from ..errors import UserError
from ..layers import softmax_forward
from ..model import convit_forward
from ..weights import open_weights
from .options import (
    checkpoint_options,
    device_option,
    json_option,
    overflow_is_answered,
    print_json,
)


@click.command("predict")
@click.argument("checkpoint", metavar="RUN_OR_CHECKPOINT", type=click.Path(path_type=Path))
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True, type=click.Path())
@checkpoint_options
@device_option
@json_option
def command(checkpoint, images, variant, img_size, device, as_json):
    """The five most probable classes of each image file.

    An image is cut to the model's aspect ratio around its centre, then resized.
    """
    if find_spec("PIL") is None:
        raise UserError("predict reads images with Pillow, which is missing: pip install Pillow")
    xp, place = resolve_device(device)
    path, model = open_weights(checkpoint, variant, img_size)
    config = model.config
    if model.mean is None or model.std is None:
        raise UserError(f"{path} does not say how its images are normalised: use another")
    params, answers = to_device(model.params, xp), []
    dtype = next(iter(params.values())).dtype
    for file in images:
        pixels = read_image(file, config.image, config.in_chans)[None]  # (1, chans, height, width)
        with overflow_is_answered():
            pixels = normalize(to_device(pixels, xp), model.mean, model.std, dtype)
            logits, _ = convit_forward(pixels, params, config)
        if not xp.isfinite(logits).all():
            raise UserError(f"{path} gives no finite answer for {file}: use another checkpoint")
        probabilities = to_cpu(softmax_forward(logits)[0][0])
        answers.append({"file": file, "top": _top(probabilities, model.classes)})
    if as_json:
        print_json({"checkpoint": str(path), "images": answers, "computed": place})
    else:
        click.echo("\n\n".join(_text(answer) for answer in answers))
        click.echo(f"\ncomputed {place}")


def read_image(file, size, channels):
    """The picture in a file as uint8 (channels, height, width), size = (height, width).

    Turned as its EXIF orientation says; transparent parts become white; 16-bit grey keeps its
    upper 8 bits. Raises UserError, naming the file, where it is missing, no image or damaged.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
            image = _to_rgb(image).convert("L" if channels == 1 else "RGB")
    except FileNotFoundError:
        raise UserError(f"there is no image {file}: give the path of an image file") from None
    except UnidentifiedImageError:
        raise UserError(f"{file} is not an image that Pillow can read: use PNG or JPEG") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{file} cannot be read as an image: {error}; use another file") from error
    fitted = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)
    pixels = np.asarray(fitted).reshape(*size, channels)  # (height, width, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _to_rgb(image):
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _top(probabilities, classes):
    """The five greatest of (C,) probabilities with their classes, greatest first."""
    order = np.argsort(-probabilities, kind="stable")[:5]
    return [
        {
            "class": classes[index] if classes else f"class {index}",
            "index": int(index),
            "probability": float(probabilities[index]),
        }
        for index in order
    ]


def _text(answer):
    lines = [answer["file"]]
    for entry in answer["top"]:
        lines.append(f"  {100 * entry['probability']:5.1f} %   {entry['class']}")
    return "\n".join(lines)
