"""The tutorial pages do what they say: every Python fence, pasted into Python's plain prompt, runs
and prints what the page shows."""

import difflib
import importlib
import io
import json
import re
from codeop import CommandCompiler
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from click.testing import CliRunner

from miniconvit.cli.tutorial import command
from miniconvit.coursework.notebooks import (
    ANSWER,
    find_page,
    notebook,
    split_page,
    write_all_notebooks,
)
from miniconvit.errors import UserError
from miniconvit.gradcheck.mutants import MUTANTS, NEIGHBOUR_MUTANTS

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tutorials"
PAGES = sorted(FOLDER.glob("*.md"))
NUMBERED = [page for page in PAGES if page.name[0].isdigit()]
# Round-off differs between machines: numbers below 1e-8, and the error of a gradient that is zero.
ROUND_OFF = re.compile(r"\b\d(\.\d+)?e-(0[89]|[1-9]\d)\b|\b0\.0+e\+00\b|\S+(?=  zero$)")
MATH = re.compile(r"^```math\n(.*?)^```$|\$`(.+?)`\$", re.MULTILINE | re.DOTALL)


def statements(source, path, line):
    """The code objects that Python's plain prompt makes of the source, pasted there with Enter.

    It reads line by line: a blank line ends a block, and nothing else does. Raises SyntaxError.
    """
    compiler, entered = CommandCompiler(), []
    for number, text in enumerate([*source.splitlines(), ""], line + 1):
        entered.append(text)
        # The leading lines make a traceback point at the line of the page.
        code = compiler("\n" * (number - len(entered)) + "\n".join(entered), str(path), "single")
        if code is not None:
            yield code
            entered = []
    if entered:
        raise SyntaxError("the prompt waits for more", (str(path), number, 0, entered[0]))


def run_page(path):
    """Runs the page's code in one namespace, comparing what it prints with what the page shows."""
    namespace = {"__name__": "tutorial"}
    for cell in split_page(path.read_text(encoding="utf-8")):
        if not cell.is_code or cell.is_check:  # test_exercises.py runs the checks
            continue
        printed = io.StringIO()
        with redirect_stdout(printed):
            for code in statements(cell.source, path, cell.line):
                exec(code, namespace)
        if cell.output is not None:
            shown, got = (
                [ROUND_OFF.sub("round-off", line.rstrip()) for line in text.strip().splitlines()]
                for text in (cell.output, printed.getvalue())
            )
            if shown != got:
                difference = "\n".join(
                    difflib.unified_diff(shown, got, "shown", "printed", lineterm="")
                )
                pytest.fail(f"{path}:{cell.output_line + 1}: {difference}", pytrace=False)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_runs_and_prints_what_it_shows(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(page)


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_code_that_is_not_run_can_be_pasted_too(page):
    text = page.read_text(encoding="utf-8")
    for fence in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        assert list(statements(fence[1], page, text.count("\n", 0, fence.start(1))))


# The runner itself.

SAMPLE = """# A page

```python
x = 2
print(f"{x / 3:.3f}")
```

```text
0.667
```

<!-- no-run: needs a GPU -->
```python
raise SystemExit
```

```python
print(1e-9, x)
assert x == {x}
```

```text
4e-10 2
```
"""


def write_page(folder, text):
    (folder / "page.md").write_text(text)
    return folder / "page.md"


def test_runner_accepts_a_right_page(tmp_path):
    run_page(write_page(tmp_path, SAMPLE.replace("{x}", "2")))


def test_a_failure_points_at_the_line_of_the_page(tmp_path):
    page = write_page(tmp_path, SAMPLE.replace("{x}", "3"))
    with pytest.raises(AssertionError) as failure:
        run_page(page)
    last = failure.traceback[-1]
    assert (str(last.path), last.lineno + 1) == (str(page), 19)


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("for i in (1, 2):\n    x = i\nprint(x)", 3),  # the block has not ended yet
        ("def f():\n    x = 1\n\n    return x", 4),  # it has ended too early
        ("x = (1,\n", 2),
    ],
)
def test_what_the_plain_prompt_refuses_is_found(source, line):
    with pytest.raises(SyntaxError) as failure:
        list(statements(source, "page.md", 0))
    assert failure.value.lineno == line


@pytest.mark.parametrize(
    ("right", "wrong", "line"), [("0.667", "0.666", 9), ("4e-10 2", "4e-10 3", 23),
                                 ("4e-10", "4e-07", 23)],
)  # fmt: skip
def test_a_wrong_output_points_at_the_line_of_the_page(tmp_path, right, wrong, line):
    page = write_page(tmp_path, SAMPLE.replace("{x}", "2").replace(right, wrong))
    with pytest.raises(pytest.fail.Exception, match=rf"page\.md:{line}:"):
        run_page(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_fence_escapes_the_runner(page):
    text = page.read_text(encoding="utf-8")
    fences = re.findall(r"^.*?`{3,}[ \t]*[pP]y.*$", text, re.MULTILINE)
    code = sum(cell.is_code for cell in split_page(text))
    assert set(fences) <= {"```python"}
    assert code + len(re.findall(r"<!-- no-run: .+ -->\s*```python\n", text)) == len(fences)
    assert text.count("```") % 2 == 0


# Neighbours, pictures and formulas.


@pytest.mark.parametrize("page", NUMBERED, ids=lambda page: page.name)
def test_page_is_in_the_index_and_linked_to_its_neighbours(page):
    assert f"]({page.name})" in (FOLDER / "README.md").read_text(encoding="utf-8")
    i = NUMBERED.index(page)
    text = page.read_text(encoding="utf-8")
    for neighbour in NUMBERED[max(i - 1, 0) : i] + NUMBERED[i + 1 : i + 2]:
        assert f"]({neighbour.name})" in text


def test_pictures_are_small_described_drawn_by_the_script_and_used():
    used = {}
    for page in PAGES:
        pictures = re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
        used |= {link: alt for alt, link in pictures}
    assert all(len(alt) > 30 for alt in used.values())
    files = {f"figures/{file.name}" for file in (FOLDER / "figures").glob("*.[ps][nv]g")}
    shared = {"architecture.svg", "backward.svg", "heads.png"}
    assert files | {f"../docs/{name}" for name in shared} == set(used)
    script = (FOLDER / "figures" / "draw.py").read_text(encoding="utf-8")
    for link in used:
        assert (FOLDER / link).stat().st_size < 60_000
        assert link.endswith(".svg") or f"\ndef {Path(link).stem}(" in script


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_formulas_render_on_github(page):
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```$|(?<!\$)`[^`\n]+`", "", text, flags=re.MULTILINE | re.DOTALL)
    assert "$" not in prose.replace("$`", "").replace("`$", "") or not re.search(r"\$[^`]", prose)
    for formula in ("".join(match) for match in MATH.findall(text)):
        assert not re.search(r"\\operatorname|<\w|\w<|\\tag|\\label", formula), formula
        assert formula.count("{") == formula.count("}"), formula


NAMED_FILE = re.compile(r"\b(?:miniconvit|tests|benchmarks|examples)/[\w/.-]*[\w/]")
NAMED_OBJECT = re.compile(r"(?<![\w/.])miniconvit(?:\.\w+)+")


def resolve(name):
    """The object of a dotted name, or an ImportError or AttributeError."""
    found = importlib.import_module("miniconvit")
    for part in name.split(".")[1:]:
        if not hasattr(found, part):
            importlib.import_module(f"{found.__name__}.{part}")
        found = getattr(found, part)
    return found


DOCUMENTS = [ROOT / "README.md", *PAGES, *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_modules_that_pages_name_exist(page):
    text = page.read_text(encoding="utf-8")
    for file in NAMED_FILE.findall(text):
        assert (ROOT / file).exists(), file
    for name in NAMED_OBJECT.findall(text):
        resolve(name)


def test_wrong_names_are_found():
    assert NAMED_FILE.findall("in `miniconvit/nosuch.py`.") == ["miniconvit/nosuch.py"]
    assert NAMED_OBJECT.findall("`miniconvit.a_b.c` or miniconvit.d.") == [
        "miniconvit.a_b.c", "miniconvit.d"
    ]  # fmt: skip
    with pytest.raises(ImportError):
        resolve("miniconvit.parallel")
    with pytest.raises(ImportError):
        resolve("miniconvit.layers.linear.linear_sideways")


def test_index_tells_the_minutes_of_each_page_and_the_short_path_fits_three_hours():
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[(\d+)\..*\| (\d+) \|.*\|(.*)\|$", index, re.MULTILINE)
    assert [int(number) for number, _, _ in rows] == list(range(len(NUMBERED)))
    for page, (_, minutes, _) in zip(NUMBERED, rows, strict=True):
        assert f"\n*{minutes} minutes" in page.read_text(encoding="utf-8"), page.name
    short = {int(number): int(minutes) for number, minutes, mark in rows if mark.strip()}
    assert set(short) == {0, 1, 2, 7, 8, 10, 12}
    assert f"about {sum(short.values())} minutes" in index and sum(short.values()) <= 180


def test_bugs_that_pages_name_are_in_the_catalogue():
    names = {mutant.name for mutant in (*MUTANTS, *NEIGHBOUR_MUTANTS)}
    for page in PAGES:
        for name in re.findall(r"mutant\s+`([\w-]+)`", page.read_text(encoding="utf-8")):
            assert name in names, f"{page.name} names {name}"


# Notebooks.


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_notebook_follows_format_4_5(page):
    book = json.loads(json.dumps(notebook(page, page.parent)))
    assert set(book) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in book["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[\w-]{1,64}", i) for i in ids)
    for cell in book["cells"]:
        assert cell["metadata"] in ({}, {"tags": ["raises-exception"]})
        assert all(isinstance(line, str) for line in cell["source"])
        keys = set(cell) - {"id", "cell_type", "metadata", "source"}
        if cell["cell_type"] == "code":
            assert keys == {"execution_count", "outputs"} and cell["execution_count"] is None
            for output in cell["outputs"]:
                assert set(output) == {"output_type", "name", "text"}
                assert (output["output_type"], output["name"]) == ("stream", "stdout")
        else:
            assert cell["cell_type"] == "markdown" and keys <= {"attachments"}
            text = "".join(cell["source"])
            assert "```math" not in text and "$`" not in text
            pictures = re.findall(r"\]\(attachment:([^)]+)\)", text)
            assert set(cell.get("attachments", {})) == set(pictures) and "](figures" not in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_notebook_is_valid_to_jupyter(page):
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbformat.validate(notebook(page, page.parent))


def test_notebook_keeps_code_output_formula_and_picture(tmp_path):
    (tmp_path / "dot.png").write_bytes(b"PNG")
    (tmp_path / "line.svg").write_bytes(b"SVG")
    more = '\nSee $`x^2`$.\n\n```math\ny = x\n```\n\n![A dot](dot.png) ![A "line"](line.svg)\n'
    page = write_page(tmp_path, SAMPLE.replace("{x}", "2") + more)
    assert CliRunner().invoke(command, [str(page), str(tmp_path / "a.ipynb")]).exit_code == 0
    cells = json.loads((tmp_path / "a.ipynb").read_text())["cells"]
    kinds = [cell["cell_type"] for cell in cells]
    assert kinds == ["markdown", "code", "markdown", "code", "markdown"]
    assert "".join(cells[1]["source"]) == 'x = 2\nprint(f"{x / 3:.3f}")'
    assert cells[1]["outputs"][0]["text"] == ["0.667"]
    assert "raise SystemExit" in "".join(cells[2]["source"])
    assert "".join(cells[4]["source"]) == (
        "See $x^2$.\n\n$$\ny = x\n$$\n\n![A dot](attachment:dot.png) "
        '<img alt="A &quot;line&quot;" src="data:image/svg+xml;base64,U1ZH">'
    )
    assert cells[4]["attachments"] == {"dot.png": {"image/png": "UE5H"}}


def test_notebook_is_not_overwritten(tmp_path):
    page = write_page(tmp_path, SAMPLE)
    result = CliRunner().invoke(command, [str(page), str(page)])
    assert isinstance(result.exception, UserError) and "exists already" in str(result.exception)
    assert page.read_text() == SAMPLE


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_notebook_has_the_code_that_was_run_and_a_cell_for_each_answer(page):
    """test_page_runs_and_prints_what_it_shows ran these cells, in this order."""
    cells = notebook(page, page.parent)["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    answers = [i for i, cell in enumerate(code) if "".join(cell["source"]) == ANSWER]
    assert answers == [i - 1 for i, cell in enumerate(code) if cell["metadata"]]
    assert len(answers) == (3 if page in NUMBERED else 0)
    found = [
        ("".join(cell["source"]), "".join(o for output in cell["outputs"] for o in output["text"]))
        for i, cell in enumerate(code)
        if i not in answers
    ]
    ran = [cell for cell in split_page(page.read_text(encoding="utf-8")) if cell.is_code]
    assert found == [(cell.source.strip("\n"), (cell.output or "").strip("\n")) for cell in ran]


@pytest.mark.full
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_notebook_runs_in_a_kernel_and_prints_nothing_else(page, tmp_path):
    """Jupyter's own kernel: no warnings, no values that nobody printed, the outputs of the page.

    Only the checks fail, because nobody has answered them.
    """
    client = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    book = nbformat.reads(json.dumps(notebook(page, page.parent)), as_version=4)
    nbformat.validate(book)
    shown = {cell["id"]: cell["outputs"] for cell in book["cells"] if "outputs" in cell}
    here = {"metadata": {"path": str(tmp_path)}}
    client.NotebookClient(book, timeout=300, kernel_name="python3", resources=here).execute()
    for cell in book["cells"]:
        if cell["cell_type"] != "code":
            continue
        if "tags" in cell["metadata"]:
            (failure,) = cell["outputs"]
            assert failure["ename"] == "NameError", failure
            continue
        assert {output["output_type"] for output in cell["outputs"]} <= {"stream"}, cell["outputs"]
        assert {output["name"] for output in cell["outputs"]} <= {"stdout"}, cell["outputs"]
        if shown[cell["id"]]:
            got, expected = (
                [
                    ROUND_OFF.sub("round-off", line.rstrip())
                    for line in "".join(o["text"] for o in outputs).strip().splitlines()
                ]
                for outputs in (cell["outputs"], shown[cell["id"]])
            )
            assert got == expected


def links_of(path):
    """The links between files in a notebook: pairs of a file and an anchor."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    prose = "".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return re.findall(r"\]\(([^):#]+)(?:#([^)]*))?\)", re.sub("```.*?```", "", prose, flags=re.S))


def test_all_pages_become_notebooks_that_link_to_each_other(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "new" / "notebooks"
    result = CliRunner().invoke(command, ["all", str(folder)])
    assert result.exit_code == 0 and f"wrote {len(PAGES)} notebooks" in result.output
    assert {path.stem for path in folder.iterdir()} == {page.stem for page in PAGES}
    for path in folder.glob("*.ipynb"):
        for target, anchor in links_of(path):
            file = folder / target
            assert file.exists(), f"{path.name} links to {target}"
            assert not (file.suffix == ".md" and file.resolve().parent == FOLDER), target
            if anchor:  # Jupyter: the heading with dashes for blanks
                headings = "".join(
                    "".join(cell["source"]) + "\n" for cell in json.loads(file.read_text())["cells"]
                )
                assert f"# {anchor.replace('-', ' ')}" in headings.replace("-", " "), anchor
    links = dict(links_of(folder / "05-gelu.ipynb"))
    assert links["solutions.ipynb"] == "5.-GELU" and "04-layernorm.ipynb" in links


def test_links_of_a_single_notebook_lead_back_to_the_pages(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(command, ["5", str(tmp_path / "gelu.ipynb")])
    assert result.exit_code == 0
    links = links_of(tmp_path / "gelu.ipynb")
    files = [(tmp_path / target).resolve() for target, _ in links]
    assert FOLDER / "04-layernorm.md" in files and ROOT / "miniconvit/layers/gelu.py" in files
    assert all(file.exists() for file in files)
    assert "5-gelu" in dict(links).values()


def test_all_notebooks_overwrite_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "solutions.ipynb").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        write_all_notebooks(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["solutions.ipynb"]
    with pytest.raises(UserError, match="is a file"):
        write_all_notebooks(tmp_path / "solutions.ipynb")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no tutorial pages here"):
        write_all_notebooks(tmp_path / "notebooks")
    assert not (tmp_path / "notebooks").exists()


def test_page_is_found_by_its_number(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert find_page("4") == find_page("04")
    assert find_page("4").resolve() == FOLDER / "04-layernorm.md"
    with pytest.raises(UserError, match="no tutorial page '99'"):
        find_page("99")
