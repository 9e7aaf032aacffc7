"""The index of docs/ has every page, and the pages of the API every public name."""

import itertools
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

import pytest

import miniconvit as mc
from miniconvit.training.run_folder import default_out
from miniconvit.training.settings import make_settings

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def test_every_page_of_docs_is_in_the_index():
    index = DOCS / "README.md"
    listed = {DOCS / target for target in re.findall(r"\]\(([^)#]+)\)", index.read_text())}
    pages = {page for kind in ("md", "html") for page in DOCS.rglob(f"*.{kind}")}
    assert pages - listed == {index}


class Page(HTMLParser):
    """The anchors of a page, and where its links lead."""

    def __init__(self, path):
        super().__init__()
        self.anchors, self.links = set(), []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors |= {given["id"]} if given.get("id") else set()
        self.links += [given[name] for name in ("href", "src") if given.get(name)]


def leads_nowhere(path, link, pages):
    target, _, anchor = unquote(link).partition("#")
    if re.match(r"\w+:", target):
        return False
    page = (path.parent / target).resolve() if target else path
    if page not in pages:
        return not page.is_file()
    return bool(anchor) and anchor not in pages[page].anchors


@pytest.mark.skipif(find_spec("pdoc") is None, reason="pdoc is not installed: .[docs]")
def test_every_public_name_has_its_place_and_no_link_is_broken(tmp_path):
    command = [sys.executable, "-W", "error", DOCS / "api" / "build.py", tmp_path]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    pages = {path: Page(path) for path in tmp_path.resolve().rglob("*.html")}
    top = pages[tmp_path.resolve() / "miniconvit.html"]
    assert set(mc.__all__) - top.anchors == {"layers"}  # a page of its own
    for name in (name for name in vars(mc.layers) if name.endswith(("_forward", "_backward"))):
        module = getattr(mc.layers, name).__module__.replace(".", "/")
        assert name in pages[tmp_path.resolve() / f"{module}.html"].anchors, name
    broken = [
        (path.name, link)
        for path, page in pages.items()
        for link in page.links
        if leads_nowhere(path, link, pages)
    ]
    assert len(pages) > 20 and not broken


@pytest.mark.skipif(find_spec("pdoc") is not None, reason="pdoc is installed")
def test_a_missing_pdoc_is_one_sentence(tmp_path):
    command = [sys.executable, DOCS / "api" / "build.py", tmp_path]
    done = subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "pip install -e '.[docs]'" in done.stderr


def commands():
    """Every command line of ours in a shell's block of a page: (page, words)."""
    for page in (ROOT / "README.md", *DOCS.rglob("*.md"), *(ROOT / "tutorials").glob("*.md")):
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                yield page, shlex.split(line, comments=True)


def test_what_a_page_reads_of_a_run_lies_where_a_training_of_the_pages_puts_it(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # without a folder of runs
    folders = set()
    for _, words in commands():
        for start in (i for i, word in enumerate(words) if word == "train"):
            given = dict(itertools.pairwise(words[start:]))
            names = ("data", "model", "recipe")
            known = {name: given[f"--{name}"] for name in names if f"--{name}" in given}
            settings = make_settings(seed=int(given.get("--seed", 0)), **known)
            folders.add(given.get("--out") or str(default_out(settings)))
    read = {
        (page.name, re.match(r"runs/[\w-]+", word)[0])
        for page, words in commands()
        if "train" not in words or "--init-from" in words
        for word in words
        if word.startswith("runs/")
    }
    assert len(read) >= 8
    assert [where for where in read if where[1] not in folders] == []
