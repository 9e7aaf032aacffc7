"""`miniconvit trace`."""

from dataclasses import replace

import click
import numpy as np

from ..analysis.trace import trace_step
from ..checkpoints.weights import open_weights
from ..config import VARIANTS
from ..data import normalize
from ..errors import UserError
from ..model import init_params
from ..training.report import table
from ..training.settings import DATA, DEFAULT_RECIPE
from .eval import fitted, open_dataset
from .options import (
    PATH,
    Command,
    json_option,
    overflow_is_answered,
    print_json,
    setting_option,
    stored_data_options,
)

MODEL = "convit_micro32"


@click.command("trace", cls=Command)
@click.argument("checkpoint", metavar="[RUN_OR_CHECKPOINT]", type=PATH, required=False)
@stored_data_options
@setting_option(
    "model",
    "Network to look at. `train --help` lists the names. Of a checkpoint it is the variant.",
    shown=f"{MODEL}, or what the file says",
    called="variant",
    metavar="NAME",
)
@setting_option("img_size", "Size of the images in pixels, as N or HEIGHTxWIDTH.")
@setting_option("patch_size")
@setting_option("batch_size", group=DATA, default=8)
@json_option
def command(checkpoint, data, data_dir, broken, variant, img_size, patch_size, batch_size, as_json):
    """Look at one training step, layer by layer.

    It prints the shape, parameters and multiplications of each layer. Beside them stand the bytes
    kept for the backward pass and the norm of the gradient. Nothing is trained.

    For a run, the images are the first ones of its validation data. Without a run, or for a file
    that names no data, images and labels are random numbers. The arithmetic is that of `layers/`,
    on the CPU. The kernels that training uses keep other arrays.
    """
    if checkpoint is None:
        if data is not None:
            raise UserError("--data is for a RUN_OR_CHECKPOINT: without one the images are random")
        sizes = {"img_size": img_size, "patch_size": patch_size}
        sizes = {name: size for name, size in sizes.items() if size}
        if variant and variant not in VARIANTS:
            raise UserError(f"trace needs a ConViT or a ViT, not {variant}")
        config = replace(VARIANTS[variant or MODEL], **sizes)
        params, dataset, what = init_params(config), None, variant or MODEL
    elif patch_size is not None:
        raise UserError("--patch-size is for a new model: a checkpoint has its patches")
    else:
        what, model = open_weights(checkpoint, variant, img_size)
        config, params, dataset = model.config, model.params, None
        if (name := data or model.data) in DEFAULT_RECIPE:
            dataset = open_dataset(checkpoint, model, name, data_dir, data is not None, broken)
            dataset, _ = fitted(what, model, dataset)
    dtype = params["head.weight"].dtype
    if dataset is None:
        rng = np.random.default_rng(0)
        shape = batch_size, config.in_chans, *config.image
        images = rng.standard_normal(shape, dtype="float32").astype(dtype)
        labels = rng.integers(config.num_classes, size=batch_size)
    else:
        mean, std = model.mean or dataset.mean, model.std or dataset.std
        images = normalize(dataset.val.images[:batch_size], mean, std, dtype)
        labels = dataset.val.labels[:batch_size]
    with overflow_is_answered():
        found = trace_step(images, labels, params, config)
    if not np.isfinite(found["gradient"]):
        raise UserError(f"{what} gives no finite gradient on these images: use another checkpoint")
    about = {"model": str(what), "images": len(images)}
    about |= {"data": "random numbers" if dataset is None else f"{dataset.name}, val"}
    totals = {
        key: sum(layer[key] for layer in found["layers"])
        for key in ("parameters", "forward", "backward", "cache")
    }
    if as_json:
        print_json(about | found | {"total": totals})
    else:
        click.echo(_text(about, found, totals))


COLUMNS = "layer              kind       output            params   mult.   cache  gradient"
MEANINGS = """\
mult.: multiplications in matrix products, forward, for all images
cache: bytes that are kept for the backward pass, each array at its first layer
gradient: the norm of the gradient of the layer's parameters"""


def _text(about, found, totals):
    lines = [table(about.items()), "", COLUMNS]
    for layer in found["layers"]:
        gradient = "" if layer["gradient"] is None else f"{layer['gradient']:.2e}"
        shape = "x".join(map(str, layer["output"])) or "1"
        lines.append(
            f"{layer['layer']:<19}{layer['kind']:<11}{shape:<14}{_short(layer['parameters']):>10}"
            f"{_short(layer['forward']):>8}{_short(layer['cache']):>8}{gradient:>10}".rstrip()
        )
    forward = totals["forward"]
    rows = [
        ("parameters", f"{totals['parameters']:,}"),
        ("forward", f"{forward:,} multiplications, {forward // about['images']:,} an image"),
        ("backward", f"{totals['backward']:,} multiplications"),
        ("cache", f"{totals['cache']:,} bytes"),
        ("loss", f"{found['loss']:.4f}"),
        ("gradient", f"norm {found['gradient']:.4g}"),
    ]
    return "\n".join([*lines, "", table(rows), "", MEANINGS])


def _short(number):
    """1234567 as 1.23 M, and nothing for 0."""
    if number < 1000:
        return str(number or "")
    exponent = min((len(str(number)) - 1) // 3, 5)
    return f"{number / 1000**exponent:.3g} {' kMGTP'[exponent]}"
