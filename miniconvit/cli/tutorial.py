"""`miniconvit tutorial`."""

from pathlib import Path

import click

from ..coursework.notebooks import find_page, write_all_notebooks, write_notebook
from .options import Command


@click.command("tutorial", cls=Command)
@click.argument("page")
@click.argument("target", metavar="FILE.ipynb|FOLDER", type=click.Path(path_type=Path))
def command(page, target):
    """Turn a tutorial page into a notebook.

    PAGE is the number of a page, in a checkout of the source, or the path of its Markdown file.
    With `all` as the page, every page becomes a notebook in FOLDER.
    """
    if page == "all":
        count = write_all_notebooks(target)
        click.echo(f"wrote {count} notebooks to {target}: open README.ipynb with Jupyter")
    else:
        write_notebook(find_page(page), target)
        click.echo(f"wrote {target}: open it with Jupyter")
