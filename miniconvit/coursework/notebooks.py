"""Tutorial pages: Markdown whose Python fences are run by the tests and make up a notebook.

A fence ```python is code; a fence ```text directly below it shows what that code prints. Code that
is not meant to run, because it needs minutes, a download or a GPU, stands under an HTML comment
`<!-- no-run: reason -->` and stays part of the prose. Code under `<!-- check -->` runs once the
reader has written an answer to the exercise above it.
"""

import json
import os
import re
from base64 import b64encode
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

from ..errors import UserError

FOLDER = Path("tutorials")
"""The pages of the checkout in which one stands; an installed package has none."""

ANSWER = "# Write your answer here, and run the check below."
"""What stands in a notebook where a reader answers an exercise."""

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NO_RUN = re.compile(r"<!-- no-run: .+ -->\s*$")
_CHECK = re.compile(r"<!-- check -->\s*$")
_IMAGE = re.compile(r"!\[([^\]]*)\]\(([^):]+\.(?:png|svg))\)")
_LINK = re.compile(r"\]\(([^):#]+)(#[^)]*)?\)")


@dataclass(frozen=True)
class Cell:
    """Prose, or a piece of code with the output that the page shows below it, if it shows any.

    is_check: the code checks a reader's answer, and fails where there is none.
    line and output_line: the number of lines of the page above source and output.
    """

    source: str
    line: int
    is_code: bool = False
    is_check: bool = False
    output: str | None = None
    output_line: int = 0


def split_page(markdown):
    """The cells of a page, in order; blank prose is left out."""
    cells, start = [], 0

    def line(position):
        return markdown.count("\n", 0, position)

    def add_prose(end):
        if markdown[start:end].strip():
            cells.append(Cell(markdown[start:end], line(start)))

    for fence in _FENCE.finditer(markdown):
        language, body = fence.groups()
        before = markdown[start : fence.start()]
        if language == "python" and not _NO_RUN.search(before):
            add_prose(fence.start())
            is_check = bool(_CHECK.search(before))
            cells.append(Cell(body, line(fence.start(2)), is_code=True, is_check=is_check))
            start = fence.end()
        elif language == "text" and cells and cells[-1].is_code and not before.strip():
            cells[-1] = replace(cells[-1], output=body, output_line=line(fence.start(2)))
            start = fence.end()
    add_prose(len(markdown))
    return cells


def find_page(name):
    """The file of a page, given by its path or number. Raises UserError where there is none."""
    path = Path(name)
    if path.is_file():
        return path
    found = sorted(FOLDER.glob(f"{int(name):02}-*.md")) if name.isdecimal() else []
    if not found:
        raise UserError(
            f"no tutorial page {name!r}: give the path of a page, or, in the folder of a checkout "
            f"of the source, the number of one in {FOLDER}"
        )
    return found[0]


def write_notebook(page, path, all_pages=False):
    """Writes the page (a Path) as a notebook, with its pictures inside and the outputs it shows.

    all_pages: the other pages become notebooks in the same folder, so links lead to those.
    Raises UserError where the file exists: a notebook holds its reader's work.
    """
    _require_free(path)
    book = notebook(page, path.parent, all_pages)
    path.write_text(json.dumps(book, indent=1) + "\n", encoding="utf-8")


def write_all_notebooks(folder):
    """Writes every page of the checkout as a notebook into the folder, and returns how many.

    Raises UserError, and writes nothing, where there are no pages or one of the files exists.
    """
    notebooks = {page: folder / f"{page.stem}.ipynb" for page in sorted(FOLDER.glob("*.md"))}
    if not notebooks:
        raise UserError(f"no tutorial pages here: go to a checkout of the source, above {FOLDER}")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: name a folder for the notebooks")
    for path in notebooks.values():
        _require_free(path)
    folder.mkdir(parents=True, exist_ok=True)
    for page, path in notebooks.items():
        write_notebook(page, path, all_pages=True)
    return len(notebooks)


def _require_free(path):
    if path.exists():
        raise UserError(f"{path} exists already: remove it, or choose another name")


def notebook(page, folder, all_pages=False):
    """The page as a notebook of format 4.5, with links that are right in the folder: a dict for
    JSON."""
    cells = split_page(page.read_text(encoding="utf-8"))
    contents = []
    for cell in cells:
        if cell.is_check:
            contents.append(_code_cell(Cell(ANSWER, cell.line, is_code=True)))
        contents.append(
            _code_cell(cell) if cell.is_code else _prose_cell(cell, page, folder, all_pages)
        )
    return {
        "cells": [{"id": f"cell-{i}"} | content for i, content in enumerate(contents)],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def _lines(text):
    return text.strip("\n").splitlines(keepends=True)


def _code_cell(cell):
    outputs = []
    if cell.output is not None:
        outputs = [{"output_type": "stream", "name": "stdout", "text": _lines(cell.output)}]
    metadata = {"tags": ["raises-exception"]} if cell.is_check else {}  # the cells below still run
    source = _lines(cell.source)
    code = {"cell_type": "code", "execution_count": None, "source": source, "outputs": outputs}
    return code | {"metadata": metadata}


def _prose_cell(cell, page, folder, all_pages):
    """Mathematics in Jupyter's notation instead of GitHub's, and the pictures inside."""
    text = re.sub(r"\$`(.+?)`\$", r"$\1$", cell.source)
    text = re.sub(r"^```math\n(.*?)^```$", r"$$\n\1$$", text, flags=re.MULTILINE | re.DOTALL)
    attachments = {}

    def embedded(picture):
        alt, file = picture[1], page.parent / picture[2]
        data = b64encode(file.read_bytes()).decode()
        if file.suffix == ".svg":  # JupyterLab shows no SVG that is an attachment
            return f'<img alt="{escape(alt)}" src="data:image/svg+xml;base64,{data}">'
        attachments[file.name] = {"image/png": data}
        return f"![{alt}](attachment:{file.name})"

    text = _IMAGE.sub(embedded, text)
    text = _LINK.sub(lambda link: _moved(link, page, folder, all_pages), text)
    prose = {"cell_type": "markdown", "metadata": {}, "source": _lines(text)}
    return prose | ({"attachments": attachments} if attachments else {})


def _moved(link, page, folder, all_pages):
    """A link of the page, made right for a notebook in the folder. What leads to no file stays."""
    name, anchor = link[1], link[2] or ""
    target = page.parent / name
    if not target.exists():
        return link[0]
    if all_pages and target.parent == page.parent and target.suffix == ".md":
        return f"]({target.stem}.ipynb{_heading_id(target, anchor)})"
    return f"]({os.path.relpath(target, folder)}{anchor})"


def _heading_id(page, anchor):
    """Jupyter's anchor of the heading for which GitHub has this one."""
    for heading in re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        if "#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") == anchor:
            return "#" + heading.replace(" ", "-")
    return anchor
