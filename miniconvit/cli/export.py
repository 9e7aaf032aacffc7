"""`miniconvit export`."""

from pathlib import Path
from textwrap import fill, indent

import click

from ..checkpoints.checkpoint import save_checkpoint
from ..checkpoints.weights import open_weights, timm_call
from ..errors import UserError
from ..training.report import table
from .options import PATH, Command, checkpoint_options


@click.command("export", cls=Command)
@click.argument("checkpoint", metavar="RUN_OR_CHECKPOINT", type=PATH)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@checkpoint_options
def command(checkpoint, file, variant, img_size):
    """Write a file that timm can load.

    FILE must end in .safetensors. RUN_OR_CHECKPOINT is the folder of a run or a checkpoint file. A
    .pth file will do too.
    """
    if file.suffix != ".safetensors":
        raise UserError(f"{file} must end in .safetensors, by which timm knows the format")
    if file.exists():
        raise UserError(f"{file} exists: choose another name, or remove it first")
    path, found = open_weights(checkpoint, variant, img_size)
    name, _, arguments = timm_call(found.config).removesuffix(")").partition("(")
    call = f"{name}(\n{indent(fill(arguments, 74), ' ' * 4)}\n)"
    about = {"mean": found.mean, "std": found.std, "classes": found.classes, "data": found.data}
    save_checkpoint(file, found.params, found.config, **about)
    click.echo(table([("from", path), ("tensors", len(found.params)), ("file", file)]))
    click.echo(
        f"\nimport safetensors.torch\nimport timm\n\nmodel = {call}\n"
        f'model.load_state_dict(safetensors.torch.load_file("{file}"))'
    )
