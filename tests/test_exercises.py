"""Three exercises a page: every check accepts the solution and refuses a wrong answer."""

import re
from contextlib import redirect_stdout, suppress
from functools import cache
from io import StringIO

import pytest
from test_tutorials import FOLDER, NUMBERED, ROOT, statements

from miniconvit.coursework.create import create
from miniconvit.coursework.exercises import EXERCISES, PAGES
from miniconvit.coursework.notebooks import split_page
from miniconvit.data import load_dataset

LEVELS = ["easy", "medium", "hard"]

WRONG = {
    "0.1": ("(np.cos(x) - np.sin(x))", "np.cos(x)"),
    "0.2": ("f(x + 1j * h).imag / h", "(f(x + 1e-5) - f(x - 1e-5)) / 2e-5"),
    "0.3": ("(4 * near - far) / 3", "(3 * near - far) / 2"),
    "1.1": (".sum(axis=0)", ".mean(axis=0)"),
    "1.2": (" + dhidden.T @ rows", ""),
    "1.3": ('"ro,ri,rj->oij", dy, x, z', '"ro,ri,rj->oij", dy, x, abs(z)'),
    "2.1": ("dy * y * (1 - y)", "dy * (1 - y)"),
    "2.2": ("dy - np.exp(y) * dy.sum(axis=-1, keepdims=True)", "dy - np.exp(y) * dy"),
    "2.3": ("return dz / t, ", "return dz, "),
    "3.1": ("np.log((1 - s + s / C) / (s / C))", "np.log((1 - s) / (s / C))"),
    "3.2": ("(p - t) / p.size", "(p - t) / len(p)"),
    "3.3": ("2 * p * (1 - p) * log_true - ", "-"),
    "4.1": ("dy - dy.mean(axis=-1, keepdims=True)", "dy"),
    "4.2": ("(dxhat * xhat).mean", "(dy * xhat).mean"),
    "4.3": ("rstd**3", "rstd**2"),
    "5.1": ("0.5 * (1 + np.tanh(x / 2))", "(x > 0)"),
    "5.2": ("x * s * (1 - s)", "s * (1 - s)"),
    "5.3": ("[da, dy * gate]", "[dy * gate, da]"),
    "6.1": ("transpose(0, 3, 1, 4, 2, 5)", "transpose(0, 3, 1, 5, 2, 4)"),
    "6.2": ("0.25 * dy", "dy"),
    "6.3": ("c : c + PW] += ", "c : c + PW] = "),
    "7.1": ('silent = "k"', 'silent = "q"'),
    "7.2": ("np.triu(np.ones(S.shape[-2:], bool), 1)", "np.triu(np.ones(S.shape[-2:], bool), 2)"),
    "7.3": ("(q, k, v, log_sum)", "(q, k, v, np.exp(S - log_sum))"),
    "8.1": ("[0.0, 4.0, -1.0]", "[4.0, 0.0, -1.0]"),
    "8.2": ("return -(dz", "return (dz"),
    "8.3": ("transpose(0, 2, 1, 3)", "transpose(0, 1, 2, 3)"),
    "9.1": ("sharp = 6.0", "sharp = 6.2"),
    "9.2": ("(0, 0)))  # zeros", '(0, 0)), "edge")'),
    "9.3": ("np.full(9, 40.0)", "np.ones(9)"),
    "10.1": ("-np.log(9)", "np.log(9)"),
    "10.2": ("layers.softmax_backward(ds, cache_softmax)\n", "ds\n"),
    "10.3": ("dscores * scale", "dscores"),
    "11.1": ("return dy, gamma * dy", "return dy, dy"),
    "11.2": ('{"norm1.weight", "norm1.bias", ', "{"),
    "11.3": ("return y, (x, params, H, grid)", "return y, _"),
    "12.1": ("dy[:, None] / N", "dy[:, None]"),
    "12.2": ('{"pos_embed", "cls_token"}', '{"pos_embed", "cls_token", "norm.bias"}'),
    "12.3": ("dlogits[0, label] = 1", "dlogits[0] = 1"),
    "13.1": ("0.9 * m[name] + grads[name]", "0.9 * m[name] + 0.1 * grads[name]"),
    "13.2": ("lr * decay_apart * p", "decay_apart * p * 0"),
    "13.3": ("[0.0] * 5000", "[0.0] * 500"),
    "14.1": ("np.rint(255 * (x * std + mean))", "(255 * (x * std + mean))"),
    "14.2": ("name.replace(old, new)", "name"),
    "14.3": ("n / sum(sizes) * g", "g / len(sizes)"),
    "15.1": ("attention / (linear + attention)", "attention / linear"),
    "15.2": ("0.5**0.5", "np.sqrt(0.5)"),
    "15.3": ("6 * D + 1", "6 * D"),
    "16.1": ("np.log(np.where(A > 0, A, 1))", "np.log2(np.where(A > 0, A, 1))"),
    "16.2": ("A @ total", "total @ A"),
    "16.3": ("[-1.0, 1.0, 1.0]", "[1.0, -1.0, 1.0]"),
    "17.1": ("dy.sum(axis=0, keepdims=True)", "dy[:1]"),
    "17.2": ("(dy + 1 - ((dy + 1) * y)", "(dy - (dy * y)"),
    "17.3": ("1e-7 * np", "1e-1 * np"),
    "18.1": ("np.sqrt(2.0)", "np.sqrt(1.0)"),
    "18.2": ("return 1 + phi, phi", "return phi, phi"),
    "18.3": ("1 / np.sqrt(x.var() + eps)", "1 / np.sqrt(x.var(ddof=1) + eps)"),
    "19.1": ("np.ceil(", "np.floor("),
    "19.2": (" * gain + norm", " + norm"),
    "19.3": ("xhat * (dxhat * xhat).mean(**over)", "xhat * (dxhat * xhat).mean()"),
    "20.1": ("return u @ vt", "return u @ abs(vt)"),
    "20.2": ("1.5 * s - 0.5 * s**3", "1.5 * s + 0.5 * s**3"),
    "20.3": (".sum(axis=(1, 2), keepdims=True)", ".sum()"),
}  # fmt: skip
"""Exercise to a piece of its solution, and what a mistaken reader has there."""


def exercises(page):
    """(name, level, check) of each exercise on a page."""
    level, found = None, []
    for cell in split_page(page.read_text(encoding="utf-8")):
        if cell.is_check:
            found.append((*level, cell))
        elif not cell.is_code:
            level = (re.findall(r"^\*\*(\d+\.\d), (\w+)\.\*\*", cell.source, re.M) or [None])[-1]
    return found


def solutions():
    """Exercise to the code of its solution."""
    found, name = {}, None
    for cell in split_page((FOLDER / "solutions.md").read_text(encoding="utf-8")):
        if cell.is_code and name:
            found[name] = found.get(name, "") + cell.source + "\n"
        elif not cell.is_code:
            name = (re.findall(r"^### (\d+\.\d) ", cell.source, re.M) or [name])[-1]
    return found


IMPORTS = """import numpy as np
import miniconvit as mc
from miniconvit import layers, neighbours
from miniconvit.data import normalize
from miniconvit.gradcheck.mutants import planted
from miniconvit.layers import attention_forward, linear_forward
from miniconvit.neighbours import conv_forward
from miniconvit.muon import NEWTON_SCHULZ as MUON, orthogonal
rng = np.random.default_rng(0)
"""
"""What a reader has at the prompt by the end of a page."""


@cache
def shapes(name):
    assert name == "shapes"
    return load_dataset(name)


def answer(page, code, check):
    """What the check prints below an answer. Raises what it raises."""
    namespace, printed = {"__name__": "tutorial"}, StringIO()
    with redirect_stdout(printed):
        exec(IMPORTS, namespace)
        namespace["data"] = shapes("shapes") if "data." in check.source else None
        exec(code, namespace)
        for statement in statements(check.source, page, check.line):
            exec(statement, namespace)
    return printed.getvalue().splitlines()[-1]


def printed_at_the_prompt(page, code, check):
    """What the check prints at the plain prompt, where a failing statement stops no other."""
    namespace, printed = {"__name__": "tutorial"}, StringIO()
    with redirect_stdout(printed):
        exec(IMPORTS + code, namespace)
        for statement in statements(check.source, page, check.line):
            with suppress(Exception):
                exec(statement, namespace)
    return printed.getvalue()


@pytest.mark.parametrize("page", NUMBERED, ids=lambda page: page.name)
def test_checks_accept_the_solution_and_refuse_a_wrong_answer(page, monkeypatch):
    monkeypatch.setattr("miniconvit.data.load_dataset", shapes)
    solved = solutions()
    assert [(name, level) for name, level, _ in exercises(page)] == [
        (f"{int(page.name[:2])}.{i}", level) for i, level in enumerate(LEVELS, 1)
    ]
    for name, _, check in exercises(page):
        code, (right, wrong) = solved[name], WRONG[name]
        assert answer(page, code, check) == f"{name} is right"
        assert code.count(right) == 1, f"{name}: {right!r} is {code.count(right)} times there"
        with pytest.raises(AssertionError):
            answer(page, code.replace(right, wrong), check)
        with pytest.raises(NameError):
            answer(page, "", check)
        assert "is right" not in printed_at_the_prompt(page, "", check)


def test_pages_and_homework_lead_to_each_other(tmp_path):
    homework = re.compile(r"^Homework with a grader: (.+) of the \[coursework\]", re.M)
    linked = {
        name: page.name
        for page in NUMBERED
        for names in homework.findall(page.read_text(encoding="utf-8"))
        for name in re.findall(r"`(\w+)`", names)
    }
    assert linked == PAGES and set(PAGES) == {exercise.name for exercise in EXERCISES}
    table = (ROOT / "docs" / "coursework.md").read_text(encoding="utf-8")
    create(tmp_path / "made", tmp_path / "secret")
    readme, notes = (
        (tmp_path / "made" / file).read_text(encoding="utf-8")
        for file in ("student/README.md", "instructor/notes.md")
    )
    for name, page in PAGES.items():
        assert re.search(rf"^\| {name} \| \[\d+\]\(\.\./tutorials/{page}\)", table, re.M)
        assert re.search(rf"^- `{name}\.py` .* Page: `{page}`$", readme, re.M)
        assert re.search(rf"^## {name}:[^#]*`tutorials/{page}`$", notes, re.M)
