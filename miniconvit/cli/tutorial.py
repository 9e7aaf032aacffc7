"""`miniconvit tutorial`."""

from pathlib import Path

import click

from ..coursework.notebooks import find_page, write_notebook
from .options import Command


@click.command("tutorial", cls=Command)
@click.argument("page")
@click.argument("file", metavar="FILE.ipynb", type=click.Path(path_type=Path, dir_okay=False))
def command(page, file):
    """Turn a tutorial page into a notebook.

    PAGE is the number of a page, in a checkout of the source, or the path of its Markdown file.
    """
    write_notebook(find_page(page), file)
    click.echo(f"wrote {file}: open it with Jupyter")
