"""`miniconvit tutorial`."""

from pathlib import Path

import click

from ..coursework.notebooks import find_page, write_notebook


@click.command("tutorial")
@click.argument("page")
@click.argument("file", metavar="FILE.ipynb", type=click.Path(path_type=Path, dir_okay=False))
def command(page, file):
    """Write a tutorial page as a notebook.

    PAGE is the page's number in a checkout of the source, or the path of its Markdown file.
    """
    write_notebook(find_page(page), file)
    click.echo(f"wrote {file}: open it with Jupyter")
