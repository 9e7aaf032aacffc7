"""benchmarks/checkers.py: the pairs reach other checkers unchanged, and are counted rightly."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from miniconvit.gradcheck.cases import CASES

ROOT = Path(__file__).parents[2]
NEEDS = {"torch": "torch", "JAX": "jax", "autograd": "autograd", "SciPy": "scipy", "mini": "numpy"}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("checkers", ROOT / "benchmarks/checkers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("layer", CASES)
def test_a_case_as_one_function_has_the_same_gradients(script, layer):
    for case in script.cases_of(layer, 0):
        flat = script.Flat(case)
        vector, _ = flat.forward(*flat.inputs)
        dvector = np.random.default_rng(1).standard_normal(len(vector))
        y, cache = case.forward(**{name: x.copy() for name, x in case.inputs.items()})
        if isinstance(y, tuple):
            sizes = np.cumsum([part.size for part in y])[:-1]
            dy = tuple(d.reshape(p.shape) for d, p in zip(np.split(dvector, sizes), y, strict=True))
        else:
            dy = dvector.reshape(np.shape(y)) if np.ndim(y) else float(dvector[0])
        grads = case.backward(dy, cache)
        if not isinstance(grads, dict):
            grads = grads if isinstance(grads, tuple) else (grads,)
            grads = dict(zip(case.inputs, grads, strict=False))
        found = flat.gradients(dvector, *flat.inputs)
        for name, grad in zip(case.inputs, found, strict=True):
            np.testing.assert_array_equal(grad, grads[name])


def test_bugs_are_counted_where_right_cases_pass(script, monkeypatch):
    gullible, stubborn = lambda flat, seed: True, lambda flat, seed: 1 / 0
    monkeypatch.setattr(script, "CHECKERS", {"gullible": gullible, "stubborn": stubborn})
    missed, planted, refused, right = script.examine("gullible", ["drop_path"], 0)
    assert (len(missed), planted, refused, right) == (8, 8, [], 3)
    missed, planted, refused, right = script.examine("stubborn", ["drop_path"], 0)
    assert (len(missed), planted, len(refused), right) == (8, 8, 3, 3)


@pytest.mark.parametrize(
    ("checker", "missed"),
    [
        ("miniconvit", 0),
        ("torch gradcheck", 0),
        ("JAX check_grads, float64", 1),
        ("autograd check_grads, float64", 1),
        ("SciPy check_grad, up to 1e-4", 1),
    ],
)
def test_softmax_under_each_checker(script, checker, missed):
    """Its overwritten cache shows only where backward is called again on the same one."""
    pytest.importorskip(next(package for word, package in NEEDS.items() if word in checker))
    arguments = ["--checker", checker, "--layer", "softmax"]
    result = CliRunner().invoke(script.main, arguments, catch_exceptions=False)
    assert f"| {checker} | {missed} of 11 | 0 of 3 |" in result.stdout
    assert ("softmax-cache-overwritten" in result.stdout) == bool(missed)
