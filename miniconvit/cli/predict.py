"""`miniconvit predict`."""

import os
from pathlib import Path

import click
import numpy as np

from .. import layers
from ..analysis.saliency import MOST, draw_saliency, logit_gradient
from ..analysis.style import require_matplotlib
from ..arrays import to_cpu, to_device
from ..checkpoints.weights import open_weights
from ..data import normalize
from ..data.images import BrokenImage, read_image, require_pillow
from ..data.layout import counted, images_below
from ..engine import classification, make_engine
from ..engine.cuda import resolve_device, without_reason
from ..errors import UserError
from ..layers import softmax_forward
from ..neighbours.models import is_convit
from .options import (
    PATH,
    Command,
    any_size_option,
    checkpoint_options,
    device_option,
    json_option,
    option,
    overflow_is_answered,
    precision_option,
    print_json,
)


@click.command("predict", cls=Command)
@click.argument("checkpoint", metavar="RUN_OR_CHECKPOINT", type=PATH)
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True, type=click.Path())
@any_size_option
@checkpoint_options
@option(
    "--saliency",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Draw into this PNG file where a small change of a pixel moves the first answer most.",
)
@precision_option
@device_option
@json_option
def command(checkpoint, images, variant, img_size, saliency, precision, device, as_json):
    """Say what image files show.

    It prints the five most probable classes of each file. IMAGE may be a folder of images too.
    The shorter side of an image is resized to the model's size, and the centre is cut out. Models
    of more than 32 pixels take 8/7 of that side.

    The picture of --saliency shows the gradient of the first answer's logit. It is the slope at
    this very image. It does not show what the model would say without a part of it.
    """
    require_pillow("predict")
    if saliency is not None:
        require_matplotlib()
        if saliency.exists():
            raise UserError(f"{saliency} exists: choose another name, or remove it first")
    xp, place = resolve_device(device)
    path, model = open_weights(checkpoint, variant, img_size, any_kind=True)
    config = model.config
    _refuse_no_answers(path, model)
    if saliency is not None and not is_convit(config):
        raise UserError(f"{path} holds no ConViT or ViT: leave out --saliency")
    answer = _answerer(classification(config), xp, precision)
    params = to_device(model.params, xp)
    dtype = next(iter(params.values())).dtype
    answers, failed, drawn = [], [], []
    for file, problem in _files(images):
        try:
            if problem is not None:
                raise BrokenImage(problem, problem)
            pixels = read_image(file, config.image, config.in_chans)[None]  # (1, chans, H, W)
        except BrokenImage as error:
            failed.append({"file": file, "problem": str(error)})
            continue
        with overflow_is_answered():
            inputs = normalize(to_device(pixels, xp), model.mean, model.std, dtype)
            logits = answer(inputs, params)
        if not xp.isfinite(logits).all():
            raise UserError(f"{path} gives no finite answer for {file}: use another checkpoint")
        probabilities = to_cpu(softmax_forward(logits)[0][0])
        answers.append({"file": file, "top": _top(probabilities, model.classes)})
        if saliency is not None and len(drawn) < MOST:
            first = answers[-1]["top"][0]
            gradient = to_cpu(logit_gradient(inputs, [first["index"]], params, config)[0])
            slope = gradient / np.reshape(model.std, (-1, 1, 1))  # of pixels from 0 to 1
            title = f"{first['class']}, {100 * first['probability']:.1f} %"
            title += f", {os.path.basename(file)}"
            drawn.append((title, pixels[0].transpose(1, 2, 0) / 255.0, slope))
    if as_json:
        found = {"checkpoint": str(path), "images": answers, "computed": without_reason(place)}
        print_json(found | ({"failed": failed} if failed else {}))
    elif answers:
        click.echo("\n\n".join(_text(answer) for answer in answers))
        click.echo(f"\ncomputed {without_reason(place)}")
    for failure in failed:
        click.echo(f"Error: {failure['problem']}", err=True)
    if drawn:
        draw_saliency(drawn, saliency)
        if not as_json:
            first = f" of the first {MOST} images" if len(answers) > MOST else ""
            click.echo(f"saliency{first} in {saliency}")
    return 1 if failed else 0


def _answerer(objective, xp, precision):
    """A function of images and parameters that gives logits. In float32 it is the lesson's layers,
    which no image has to wait for."""
    if precision == "float32":
        return lambda images, params: objective.answer((images,), params, layers)
    engine = make_engine(objective, xp, 1, precision)
    return lambda images, params: engine.logits(lambda start, stop: images, 1, params)


def _refuse_no_answers(path, model):
    """Raises UserError where nothing can be said of an image."""
    config = model.config
    if model.mean is None or model.std is None:
        raise UserError(
            f"{path} does not say how its images, of in_chans {config.in_chans}, are normalised: "
            "write it again with mc.save_checkpoint(FILE, params, config, mean=[...], std=[...]), "
            "and give that file"
        )
    if config.num_classes == 1:
        raise UserError(
            f"{path} has one logit, and a softmax over one class says nothing: give a model of two "
            "classes or more"
        )


def _files(given):
    """(path, what is wrong with it or None) of each image, those in folders among them."""
    for name in given:
        if os.path.isdir(name):
            paths, ignored = images_below(name)
            if ignored:
                click.echo(f"ignored in {name}: {counted(ignored)}", err=True)
            yield from ((path, None) for path in paths)
            if not paths:
                yield name, f"the folder {name} holds no image: give another, or image files"
        elif set("*?[") & set(name) and not os.path.lexists(name):
            yield name, f"no file matches {name}: give patterns without quotes, for the shell"
        else:
            yield name, None


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
