"""Every relative link of every Markdown file leads to a file, and its anchor to a heading."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = [path for path in ROOT.iterdir() if path.is_dir() and path.name not in {"runs", "build"}]
PAGES = sorted(
    [*ROOT.glob("*.md")]
    + [page for folder in FOLDERS if folder.name[0] != "." for page in folder.rglob("*.md")]
)
NOT_PROSE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s#:]*)(?:#([^)\s]*))?\)|\b(?:src|href)=\"([^\"#:]+)\"")


def anchors(text):
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page):
    """The links of a page that lead nowhere."""
    broken = []
    for target, anchor, source in LINK.findall(NOT_PROSE.sub("", page.read_text("utf-8"))):
        file = page.parent / (target or source) if target or source else page
        if not file.exists():
            broken.append(target or source)
        elif anchor and anchor not in anchors(file.read_text("utf-8")):
            broken.append(f"{target}#{anchor}")
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert not broken_links(page)


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    (tmp_path / "other.md").write_text("# Its `heading`, here\n\n```sh\n# no heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# A page\n\n[right](other.md) [`too`](other.md#its-heading-here) [up](#a-page) "
        "[out](https://example.org/gone.md#x) `[code](gone.md)`\n\n"
        "```sh\n[fence](gone.md)\n```\n\n"
        '[1](gone.md) ![2](gone.png) [3](other.md#no-heading) [4](#gone) <img src="gone.svg">\n'
    )
    assert broken_links(page) == [
        "gone.md", "gone.png", "other.md#no-heading", "#gone", "gone.svg",
    ]  # fmt: skip
