"""`miniconvit predict`."""

import click
import numpy as np

from ..arrays import to_cpu, to_device
from ..checkpoints.weights import open_weights
from ..data import normalize
from ..data.images import read_image, require_pillow
from ..engine.cuda import resolve_device
from ..errors import UserError
from ..layers import softmax_forward
from ..model import convit_forward
from .options import (
    PATH,
    Command,
    checkpoint_options,
    device_option,
    json_option,
    overflow_is_answered,
    print_json,
)


@click.command("predict", cls=Command)
@click.argument("checkpoint", metavar="RUN_OR_CHECKPOINT", type=PATH)
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True, type=click.Path())
@checkpoint_options
@device_option
@json_option
def command(checkpoint, images, variant, img_size, device, as_json):
    """Say what image files show.

    It prints the five most probable classes of each file. The shorter side of an image is resized
    to the model's size, and the centre is cut out. Models of more than 32 pixels take 8/7 of that
    side.
    """
    require_pillow("predict")
    xp, place = resolve_device(device)
    path, model = open_weights(checkpoint, variant, img_size)
    config = model.config
    if model.mean is None or model.std is None:
        raise UserError(
            f"{path} does not say how its images, of in_chans {config.in_chans}, are normalised: "
            "write it again with mc.save_checkpoint(FILE, params, config, mean=[...], std=[...]), "
            "and give that file"
        )
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
