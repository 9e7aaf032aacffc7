"""Submissions as people hand them in: what is used, what is named, and what is said of it."""

import io
import json
import zipfile

import pytest

from miniconvit.coursework import create, exercises, read_submission, read_work
from miniconvit.coursework.cases import VISIBLE
from miniconvit.coursework.grading import Assignment, grade_submission, submissions_in
from miniconvit.coursework.skeleton import skeleton, solution
from miniconvit.coursework.source import decode, describe_source

CHOSEN = exercises(["cross_entropy", "mlp", "adamw"])
(MLP_ALONE,) = exercises(["mlp"])
RIGHT = {e.file: solution(e) for e in CHOSEN}
BLANK = {e.file: skeleton(e) for e in CHOSEN}
MLP, ADAMW, LOSS = RIGHT["mlp.py"], RIGHT["adamw.py"], RIGHT["cross_entropy.py"]


def put(folder, files):
    """Writes {path: text or bytes} below a folder, and returns it."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def zipped(files, method=zipfile.ZIP_DEFLATED):
    """The bytes of a zip file of {path: text or bytes}."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return target.getvalue()


def below(folder, files):
    return {f"{folder}/{name}": content for name, content in files.items()}


@pytest.fixture(params=["folder", "zip"])
def hand_in(request, tmp_path):
    """A function {path: content} -> (texts, problems, remark), by a folder and by a zip file."""

    def read(files):
        if request.param == "folder":
            path = put(tmp_path / "anna", files)
        else:
            path = tmp_path / "anna.zip"
            path.write_bytes(zipped(files))
        return read_submission(path, CHOSEN)

    return read


# Copies


@pytest.mark.parametrize(
    ("work", "blank"),
    [("zz", "aa"), ("aa", "zz"), ("deep/er/still", "aa"), ("aa", "deep/er/still")],
)
def test_a_blank_never_beats_work(hand_in, work, blank):
    texts, problems, remark = hand_in(below(work, RIGHT) | below(blank, BLANK))
    assert texts == {e.name: RIGHT[e.file] for e in CHOSEN}
    assert not problems
    assert remark == (
        f"cross_entropy.py, mlp.py, adamw.py: the one in {work} was graded, "
        f"not the one in {blank} (blank)"
    )


def test_blanks_of_other_kinds_are_blanks(hand_in):
    """An empty file, a body that is only `pass`, and a blank at the top beside work elsewhere."""
    hollow = "def mlp_forward(x, params):\n    '''Later.'''\n    pass\n"
    hollow += "def mlp_backward(dy, cache): ...\n"
    files = {"mlp.py": hollow, "adamw.py": "", "cross_entropy.py": "# to do\n"}
    texts, _, remark = hand_in(files | below("monday/evening", RIGHT))
    assert texts == {e.name: RIGHT[e.file] for e in CHOSEN}
    assert "in monday/evening was graded, not the one in the top folder (blank)" in remark


def test_more_work_beats_less_and_what_runs_beats_what_does_not(hand_in):
    half = MLP[: MLP.index("def mlp_backward")]
    broken = ADAMW.replace("class AdamW:", "class AdamW")
    texts, problems, _ = hand_in(
        {"mlp.py": half, "b/mlp.py": MLP, "adamw.py": broken, "b/adamw.py": ADAMW}
        | {"cross_entropy.py": BLANK["cross_entropy.py"], "c/cross_entropy.py": "def x(:\n"}
    )
    assert texts == {"mlp": MLP, "adamw": ADAMW}
    assert "c/cross_entropy.py is no valid Python" in problems["cross_entropy"]


def test_the_choice_between_works_is_the_same_everywhere(hand_in):
    """Two works that differ: the least deep, then the first by name."""
    first, second, third = (f"# {n}\n{MLP}" for n in "123")
    texts, _, remark = hand_in({"v2/mlp.py": second, "v1/mlp.py": first, "a/b/mlp.py": third})
    assert texts["mlp"] == first
    assert "mlp.py: the one in v1 was graded, not the one in v2, the one in a/b" in remark


def test_of_equal_names_in_a_zip_file_the_last_counts(tmp_path):
    """As where it is unpacked."""
    with zipfile.ZipFile(tmp_path / "anna.zip", "w") as archive:
        archive.writestr("mlp.py", BLANK["mlp.py"])
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("mlp.py", MLP)
    texts, _, remark = read_submission(tmp_path / "anna.zip", [MLP_ALONE])
    assert (texts, remark) == ({"mlp": MLP}, "")


@pytest.mark.parametrize(
    "folder", ["__MACOSX", ".git", ".trash/old", "node_modules", "env/lib/site-packages/torch"]
)
def test_what_is_no_work_is_not_looked_into(hand_in, folder):
    texts, problems, remark = hand_in(below(folder, RIGHT) | {"adamw.py": ADAMW})
    assert texts == {"adamw": ADAMW}
    top = folder.partition("/")[0]
    if top != "__MACOSX":
        assert problems["mlp"] == f"mlp.py is missing: {top} was not looked into"
        assert f"{top} was not looked into" in remark


# Names


@pytest.mark.parametrize(
    "name",
    [
        *("adamw(2).py", "AdamW.py", "ADAMW.PY", "adamw - Copy.py", "adamw_final.py", "2-adamw.py"),
        *("adamw.py.txt", "Kopie von adamw.py", "mueller_adamw_v3.py", "adamw.pyw", "adamw .py"),
        *("hw/AdamW (1).py", "optimizer.py"),
    ],
)
def test_renamed_files_are_used_and_it_is_said(hand_in, name):
    texts, problems, remark = hand_in({name: ADAMW, "mlp.py": MLP, "cross_entropy.py": LOSS})
    assert texts["adamw"] == ADAMW
    assert not problems
    assert remark == f"{name} was taken for adamw.py"


@pytest.mark.parametrize("name", ["CrossEntropy.py", "cross-entropy.py", "crossentropy2.py"])
def test_names_of_two_words(hand_in, name):
    texts, _, remark = hand_in({name: LOSS})
    assert texts == {"cross_entropy": LOSS}
    assert f"{name} was taken for cross_entropy.py" in remark


def test_one_file_with_everything(hand_in):
    whole = "\n".join((MLP, ADAMW, LOSS))
    texts, problems, remark = hand_in({"homework.py": whole})
    assert texts == {e.name: whole for e in CHOSEN}
    assert not problems
    assert "homework.py was taken for mlp.py" in remark


def test_work_under_another_name_beats_a_blank_under_the_right_one(hand_in):
    texts, _, remark = hand_in({"mlp.py": BLANK["mlp.py"], "mlp (1).py": MLP})
    assert texts["mlp"] == MLP
    assert "mlp.py: mlp (1).py was graded, not mlp.py (blank)" in remark


def test_what_is_no_work_on_it_is_not_taken(hand_in):
    """Tests, notes, and another exercise that brings a copy of a function along."""
    files = {"test_mlp.py": "import pytest\ndef test_mlp(): pass\n", "mlp notes.txt": "hard"}
    files |= {"adamw.py": ADAMW + MLP, "mlp.pdf": b"%PDF", "plan.txt": "def mlp_forward"}
    texts, problems, remark = hand_in(files)
    assert texts == {"adamw": ADAMW + MLP}
    assert problems["mlp"].startswith("mlp.py is missing: ")
    assert problems["mlp"].endswith(" is no Python file with mlp_forward in it")
    assert not remark


@pytest.mark.parametrize("name", ["mlp.ipynb", "Mlp (2).ipynb", "hw/Homework 3.ipynb"])
def test_notebooks_are_named(hand_in, name):
    texts, problems, _ = hand_in({name: '{"cells": []}', "adamw.py": ADAMW})
    assert texts == {"adamw": ADAMW}
    assert problems["mlp"] == (
        f"mlp.py is missing: {name} is a notebook, which is not graded; "
        "export it as a Python script and hand that in as mlp.py"
    )


MISNAMED = ["mlp", "mlp.py.bak", "mlp.pyi", "MLP.py~"]


@pytest.mark.parametrize("name", MISNAMED)
def test_a_file_of_another_ending_is_to_be_renamed(hand_in, name):
    texts, problems, _ = hand_in({name: MLP, "adamw.py": ADAMW})
    assert texts == {"adamw": ADAMW}
    assert problems["mlp"] == f"mlp.py is missing: {name} is there, rename it to mlp.py"


@pytest.mark.parametrize("name", [*MISNAMED, "mlp.py.txt"])
def test_check_says_so_too(tmp_path, name):
    put(tmp_path, {name: MLP, "mlp2.py": MLP, "mlp.pdf": "", "mlp.d/mlp": MLP})
    copy = read_work(tmp_path, exercises(["mlp"]))["mlp"]
    assert copy.problem == f"is missing: {name} is there, rename it to mlp.py"


def test_a_misspelt_function_is_still_work(hand_in):
    """Its sentence then names the function; a blank elsewhere is not taken."""
    misspelt = MLP.replace("mlp_", "MLP_")
    texts, _, remark = hand_in({"z/mlp.py": misspelt, "a/mlp.py": BLANK["mlp.py"]})
    assert texts["mlp"] == misspelt
    assert "the one in a (blank)" in remark


# Archives


@pytest.mark.parametrize(
    "files",
    [
        {"abgabe.zip": zipped(RIGHT), "note.txt": "sorry"},
        {"hw/Work.ZIP": zipped(below("src", RIGHT)), "hw/report.pdf": b"%PDF-1.7"},
        {"a.zip": zipped({"b.zip": zipped({"c.zip": zipped(RIGHT)})})},
        {"1.zip": zipped({"mlp.py": MLP}), "2.zip": zipped({"adamw.py": ADAMW}), **RIGHT},
        {"part1.zip": zipped({"mlp.py": MLP, "adamw.py": ADAMW}), "cross_entropy.py": LOSS},
    ],
)
def test_zip_files_in_a_submission_are_opened(hand_in, files):
    texts, problems, _ = hand_in(files)
    assert texts == {e.name: RIGHT[e.file] for e in CHOSEN}
    assert not problems


def test_of_two_zip_files_the_work_is_taken(hand_in):
    texts, _, remark = hand_in({"a.zip": zipped(BLANK), "b.zip": zipped(RIGHT)})
    assert texts == {e.name: RIGHT[e.file] for e in CHOSEN}
    assert "the one in b.zip was graded, not the one in a.zip (blank)" in remark


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("work.rar", b"Rar!\x1a\x07", "work.rar cannot be opened here; hand in a zip file"),
        ("work.tar.gz", b"\x1f\x8b", "work.tar.gz cannot be opened here; hand in a zip file"),
        ("work.zip", b"7z\xbc\xaf\x27\x1c", "work.zip is a 7z archive: hand in a zip file"),
        ("work.zip", zipped(RIGHT)[:200], "work.zip is no readable zip file"),
        ("work.zip", zipped(RIGHT, zipfile.ZIP_BZIP2), "is packed by another method than deflate"),
        ("work.zip", zipped({"z.zip": zipped({"z.zip": zipped({"z.zip": b""})})}), "too deep"),
    ],
)
def test_archives_that_cannot_be_opened_are_named(hand_in, name, content, sentence):
    texts, problems, _ = hand_in({name: content})
    assert not texts
    assert sentence in problems["mlp"]


def test_an_encrypted_zip_file_is_named(tmp_path):
    data = bytearray(zipped({"mlp.py": MLP}))
    for header, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(header) + flags] |= 1
    (tmp_path / "anna.zip").write_bytes(data)
    problems = read_submission(tmp_path / "anna.zip", CHOSEN)[1]
    assert problems["mlp"] == "mlp.py is encrypted: zip it without a password"


# Texts


def test_codings(hand_in):
    """Each as an editor or a shell writes it, graded as the text that it is."""
    note = "# größer, Übung\n"
    codings = {
        "mlp.py": ("# vim: set fileencoding=cp1252 :\n" + note + MLP).encode("cp1252"),
        "adamw.py": (note + ADAMW).replace("\n", "\r\n").encode("utf-16-be"),
        "cross_entropy.py": (note + LOSS).encode("utf-32"),
    }
    codings["adamw.py"] = b"\xfe\xff" + codings["adamw.py"]
    texts, problems, _ = hand_in(codings)
    assert not problems
    assert texts["mlp"] == "# vim: set fileencoding=utf-8 :\n" + note + MLP
    assert texts["adamw"].replace("\r\n", "\n") == note + ADAMW
    assert texts["cross_entropy"] == note + LOSS


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"# f\xfcr\n", "is no UTF-8 text"),
        ("x = 1\n".encode("utf-16-le"), "holds zero bytes, as UTF-16 without its mark does"),
        (b"# coding: klingon\n", "unknown encoding: klingon"),
        (b"# coding: rot13\n", "is not a text encoding"),
        (b"\xef\xbb\xbf# coding: latin-1\n", "encoding problem: utf-8"),
    ],
)
def test_what_is_no_text_is_named(data, sentence):
    assert sentence in describe_source(data)["problem"]


def test_coding_lines_stay_in_their_line():
    assert decode(b"#!/usr/bin/python\n#-*- coding: iso-8859-15 -*-\nx = '\xa4'\n") == (
        "#!/usr/bin/python\n#-*- coding: utf-8 -*-\nx = '\u20ac'\n"
    )
    assert decode(b"x = 1\ny = 2\n# coding: latin-1\n").endswith("# coding: latin-1\n")


HONEST = {
    "an argument": "def f(open): return open + 1",
    "a variable": "def f(x):\n    compile = x\n    return compile",
    "a loop": "for input in range(3): print(input)",
    "a function": "def exec(x): return x\ny = exec(2)",
    "a comprehension": "y = [eval for eval in range(3)]",
    "a lambda": "f = lambda open, input: open * input",
    "an outer function's": "def f(input):\n    def g(): return input\n    return g",
    "a module's": "open = 3\ndef f(): return open",
    "an attribute": "import numpy as np\nx = np.compile if 0 else 1",
    "a keyword": "f = dict\nf(input=1, open=2)",
    "a private attribute": "class A:\n    def f(self): self.__open = 1; return self.__open",
    "a plot of one's own": "if __name__ == '__main__':\n    import pandas\n    open('x')\n",
}


@pytest.mark.parametrize("name", HONEST)
def test_names_of_builtins_cost_nothing(name):
    assert describe_source(HONEST[name].encode())["problem"] == ""


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("def f(input): return input\ndef g(): return input()", "uses input in line 2"),
        ("def g():\n    x = 1\n    return open('x')", "uses open in line 3"),
        ("class A:\n    y = eval('1')", "uses eval in line 2"),
        ("y = [compile(s, s, s) for s in '1']", "uses compile in line 1"),
        ("if __name__ == '__main__':\n    pass\nimport pandas\npandas", "imports pandas in line 3"),
        ("if __name__ != '__main__':\n    import pandas\n    pandas.x", "imports pandas in line 2"),
        (
            "if __name__ == '__main__':\n    pass\nelse:\n    import pandas\n    pandas.x",
            "imports pandas in line",
        ),
    ],
)
def test_builtins_themselves_are_named(text, sentence):
    assert sentence in describe_source(text.encode())["problem"]


IDLE = {
    "a module": ("import time\nx = 1\n", "pass\nx = 1\n", "time in line 1"),
    "one of two": ("import os, numpy as np\n", "import numpy as np\n", "os in line 1"),
    "in a function": ("def f():\n    import torch\n", "def f():\n    pass\n", "torch in line 2"),
    "under another name": ("x = 1; import os.path as p; y = 2", "x = 1; pass; y = 2", "os.path"),
    "of many lines": (
        "from turtle import (\n    a,\n    b,\n)\nx = 1",
        "pass\n\n\n\nx = 1",
        "turtle",
    ),
    "after letters": ("é = 'ü'; import time; x = é", "é = 'ü'; pass; x = é", "time in line 1"),
}


@pytest.mark.parametrize("name", IDLE)
def test_an_import_that_nothing_uses_is_left_out_and_said(name):
    """What runs is the text without it, so it can do nothing; what is packed is the text."""
    text, runs, said = IDLE[name]
    described = describe_source(text.encode())
    assert (described["text"], described["runs"], described["problem"]) == (text, runs, "")
    assert described["remark"].startswith(said)
    assert described["remark"].endswith("is imported but not used, and left out")


@pytest.mark.parametrize(
    "text",
    [
        "import time\ndef f(): time.sleep(1)",
        "from os import *",
        "import os.path\nos",
        "import time\ndel time",
        "import time\ndef f():\n    global time\n    time = 3",
    ],
)
def test_an_import_that_may_be_used_is_refused(text):
    assert "allowed are numpy, " in describe_source(text.encode())["problem"]


def test_an_idle_import_costs_no_points(tmp_path):
    (tmp_path / "anna").mkdir()
    (tmp_path / "anna" / "mlp.py").write_text(f"import time\n{MLP}")
    graded = grade_submission(tmp_path / "anna", Assignment((MLP_ALONE,), "secret", VISIBLE[:1]))
    assert graded.score == MLP_ALONE.points
    assert graded.remark == "mlp.py: time in line 1 is imported but not used, and left out"


# What is printed


@pytest.mark.parametrize(
    "text",
    [
        "for i in range(300_000): print(i)\n" + MLP,
        "def mlp_forward(x, params):\n    print('#' * 3_000_000)\n",
        "import kit\nwhile True: kit.sys.stderr.write('a' * 1000)\n",
    ],
    ids=["on import", "in one line", "as errors"],
)
def test_too_much_printing_is_said_to_be_that(tmp_path, text):
    put(tmp_path / "anna", {"mlp.py": text})
    graded = grade_submission(tmp_path / "anna", Assignment((MLP_ALONE,), "secret", VISIBLE[:1]))
    sentence = "it prints too much, and was stopped there: take the printing out (mlp.py, line"
    assert sentence in graded.results[0].text
    assert graded.score == 0


def test_some_printing_costs_nothing(tmp_path):
    put(tmp_path / "anna", {"mlp.py": "print('hello\\x1b[2J' * 100)\n" + MLP})
    graded = grade_submission(tmp_path / "anna", Assignment((MLP_ALONE,), "secret", VISIBLE[:1]))
    assert graded.score == MLP_ALONE.points


# A folder of submissions


def test_strangers_stop_nothing_and_are_named(tmp_path, program):
    (mlp,) = exercises(["mlp"])
    create(tmp_path / "kit", tmp_path / "secret", ["mlp"])
    inbox = put(
        tmp_path / "inbox",
        {"Desktop.INI": "", ".DS_Store": "", "ehthumbs.txt": "", "list\x1b[31m.xlsx": ""}
        | {"anna/mlp.py": MLP, "ben.rar": b"Rar!\x1a\x07", "cem.tar.gz": b"\x1f\x8b\x08"}
        | {"dora/mlp.py": BLANK["mlp.py"], "dora.zip": zipped({"mlp.py": MLP})},
    )
    found, strangers = submissions_in(inbox)
    assert found.keys() == {"anna", "ben", "cem", "dora", "dora.zip"}
    assert [path.name for path in strangers] == ["ehthumbs.txt", "list\x1b[31m.xlsx"]
    where = ("--instructor", tmp_path / "kit" / "instructor", "--out", tmp_path / "out")
    status, output, _ = program("coursework", "grade", inbox, *where, "--jobs", "2")
    assert status == 0
    line = "not graded, being no folder or archive: ehthumbs.txt, list?[31m.xlsx"
    assert output.splitlines().count(line) == 1
    assert "\x1b" not in output
    scores = {
        path.parent.name: json.loads(path.read_text())["score"]
        for path in (tmp_path / "out").glob("*/results.json")
    }
    assert scores == {"anna": mlp.points, "ben": 0, "cem": 0, "dora": 0, "dora.zip": mlp.points}
    assert "the submission is a RAR archive: hand in a zip file" in output
    assert "the submission is a gzip archive: hand in a zip file" in output
