"""`miniconvit bench`."""

from dataclasses import replace

import click

from ..engine.speed import measure
from ..errors import UserError
from ..neighbours.models import ALL_VARIANTS, is_convit
from ..training.report import table
from .options import (
    Command,
    device_option,
    json_option,
    option,
    precision_option,
    print_json,
    setting_option,
    workers_option,
)


@click.command("bench", cls=Command)
@setting_option(
    "model",
    "Network to measure. `train --help` lists the names.",
    default="convit_tiny32",
)
@setting_option("img_size", "Size of the images in pixels, as N or HEIGHTxWIDTH.")
@setting_option("patch_size")
@setting_option("batch_size", default=64)
@precision_option
@setting_option("steps", "Number of steps to measure.", default=10)
@option("--inference", is_flag=True, help="Measure forward passes only.")
@device_option
@workers_option
@json_option
def command(model, img_size, patch_size, batch_size, precision, steps, inference, device, workers,
            as_json):  # fmt: skip
    """Measure how fast a model trains here.

    It prints images per second and the peak memory of a training step. The images are random.
    """
    sizes = {"img_size": img_size, "patch_size": patch_size}
    sizes = {name: size for name, size in sizes.items() if size}
    config = ALL_VARIANTS[model]
    if not is_convit(config) and patch_size is not None:
        raise UserError(f"{model} is no ConViT or ViT: leave out --patch-size")
    config = replace(config, **sizes)
    found = measure(config, batch_size, steps, inference, workers, device, precision)
    if as_json:
        asked = {"model": model, "batch_size": batch_size, "inference": inference}
        print_json(asked | {"precision": precision} | found)
        return 0
    memory = found["peak_memory_mb"]
    rows = [
        ("model", f"{model}, {'x'.join(map(str, config.image))} pixels, batch {batch_size}"),
        ("what", "inference" if inference else "training step"),
        ("computed", f"{found['computed']}, {precision}"),
        *([("workers", found["workers"])] if found["workers"] else []),
        ("images per second", f"{found['images_per_second']:.1f}"),
        ("median step", f"{found['step_ms_median']:.1f} ms"),
        ("peak memory", "unknown" if memory is None else f"{memory:.0f} MB"),
    ]
    click.echo(table(rows))
    return 0
