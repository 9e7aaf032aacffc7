"""`miniconvit bench`."""

from dataclasses import replace

import click

from ..config import VARIANTS
from ..engine.speed import measure
from ..training.report import table
from .options import SIZE, device_option, json_option, print_json, workers_option


@click.command("bench")
@click.option(
    "--model",
    type=click.Choice(list(VARIANTS)),
    metavar="NAME",
    default="convit_tiny32",
    show_default=True,
    help="A variant's name, as in `miniconvit train`.",
)
@click.option("--img-size", type=SIZE, help="Pixels: N, or HEIGHTxWIDTH.")
@click.option("--patch-size", type=SIZE, help="Pixels: N, or HEIGHTxWIDTH.")
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True)
@click.option("--steps", type=click.IntRange(1), default=10, show_default=True, help="Counted.")
@click.option("--inference", is_flag=True, help="Forward passes only.")
@device_option
@workers_option
@json_option
def command(model, img_size, patch_size, batch_size, steps, inference, device, workers, as_json):
    """Images per second and peak memory of a training step, on random images in float32."""
    sizes = {"img_size": img_size, "patch_size": patch_size}
    config = replace(VARIANTS[model], **{name: size for name, size in sizes.items() if size})
    found = measure(config, batch_size, steps, inference, workers, device)
    if as_json:
        print_json({"model": model, "batch_size": batch_size, "inference": inference} | found)
        return 0
    memory = found["peak_memory_mb"]
    rows = [
        ("model", f"{model}, {'x'.join(map(str, config.image))} pixels, batch {batch_size}"),
        ("what", "inference" if inference else "training step"),
        ("computed", found["computed"]),
        *([("workers", found["workers"])] if found["workers"] else []),
        ("images per second", f"{found['images_per_second']:.1f}"),
        ("median step", f"{found['step_ms_median']:.1f} ms"),
        ("peak memory", "unknown" if memory is None else f"{memory:.0f} MB"),
    ]
    click.echo(table(rows))
    return 0
