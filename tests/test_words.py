"""What people read stays short: words a sentence, cells of tables, and the README's length."""

import re
from pathlib import Path
from statistics import mean

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
GENERATED = {"mutants.md", "table.md"}  # printed by commands, line by line
MOST_WORDS, MOST_WORDS_A_SENTENCE, LONGEST_SENTENCE, LONGEST_CELL = 800, 17, 30, 60


def without_code(text):
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    return re.sub(r"\]\([^)]*\)", "]", text)  # a link is read as its text


def cells(text):
    rows = [line.strip() for line in without_code(text).splitlines() if line.lstrip()[:1] == "|"]
    return [cell.strip() for row in rows for cell in row.strip("|").split("|")]


def sentences(text):
    """Sentences of paragraphs and lists, as lists of words."""
    blocks, block = [], []
    for line in [*without_code(text).splitlines(), ""]:
        is_item = re.match(r"\s*([-*]|\d+\.)\s", line)
        is_prose = line.strip() and line.lstrip()[0] not in "#|!"
        if not is_prose or is_item:
            blocks.append(" ".join(block))
            block = []
        if is_prose:
            block.append(re.sub(r"^\s*([-*]|\d+\.)\s", "", line).strip())
    found = [part for b in blocks for part in re.split(r"(?<=[.!?:])[*)\"]*\s+(?=\W*[A-Z0-9])", b)]
    return [words for part in found if (words := re.findall(r"\S*\w\S*", part))]


def test_the_counting_counts():
    text = "# Title\n\nOne two three. Four [five six](a/b.md): seven.\n\n- Eight nine\n  ten.\n"
    text += "\n| a | [b c](d) |\n| --- | --- |\n\n```sh\nnot this; one\n```\n"
    counts = [len(words) for words in sentences(text)]
    assert counts == [3, 4, 3]
    assert cells(text) == ["a", "[b c]", "---", "---"]


def test_the_readme_is_one_screen_and_a_half():
    text = without_code((ROOT / "README.md").read_text())
    assert len(text.split()) <= MOST_WORDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_are_easy_to_read(page):
    text = page.read_text()
    assert max(map(len, cells(text)), default=0) <= LONGEST_CELL
    if page.name not in GENERATED:
        found = sentences(text)
        assert mean(map(len, found)) <= MOST_WORDS_A_SENTENCE
        assert max(map(len, found)) <= LONGEST_SENTENCE, max(found, key=len)
        prose = [line for line in without_code(text).splitlines() if line.lstrip()[:1] != "|"]
        assert ";" not in "\n".join(prose)
