"""The gradient checker: what it accepts, what it catches, and what it says."""

import json
import re
from collections import deque
from functools import partial
from itertools import cycle
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from random_layers import plant, right_layer

import miniconvit as mc
from miniconvit.cli import program
from miniconvit.gradcheck import cases
from miniconvit.gradcheck.cases import ALL_CASES, check_layer
from miniconvit.gradcheck.mutants import MUTANTS, Mutant


def square_forward(x, weight):
    return x * x @ weight.T, (x, weight)


def square_backward(dy, cache):
    x, weight = cache
    return {"x": 2 * x * (dy @ weight), "weight": dy.T @ (x * x)}


@pytest.fixture
def inputs():
    rng = np.random.default_rng(0)
    return {"x": rng.standard_normal((3, 4)), "weight": rng.standard_normal((5, 4))}


@pytest.mark.parametrize("every_entry", [False, True])
def test_a_right_gradient_passes(inputs, every_entry):
    report = mc.check_gradients(square_forward, square_backward, inputs, every_entry=every_entry)
    assert report.ok
    assert [(row.name, row.shape, row.verdict) for row in report.rows] == [
        ("x", (3, 4), "ok"),
        ("weight", (5, 4), "ok"),
    ]
    x = inputs["x"]
    true_norm = report.rows[0].analytic_norm
    assert max(row.error for row in report.rows) < 1e-8
    if every_entry:
        assert report.rows[0].numeric_norm == pytest.approx(true_norm, rel=1e-8)
    assert np.array_equal(x, inputs["x"])


@pytest.mark.parametrize("every_entry", [False, True])
@pytest.mark.parametrize("factor", [1 + 1e-5, 2.0, -1.0, 0.0])
def test_a_wrong_factor_is_found_and_the_tensor_named(inputs, every_entry, factor):
    def wrong(dy, cache):
        grads = square_backward(dy, cache)
        return grads | {"weight": factor * grads["weight"]}

    report = mc.check_gradients(square_forward, wrong, inputs, every_entry=every_entry)
    assert not report.ok
    assert [row.verdict for row in report.rows] == ["ok", "WRONG"]


@pytest.mark.parametrize("every_entry", [False, True])
def test_a_single_wrong_entry_is_found(inputs, every_entry):
    def wrong(dy, cache):
        grads = square_backward(dy, cache)
        grads["x"][2, 3] *= 1.001
        return grads

    assert not mc.check_gradients(square_forward, wrong, inputs, every_entry=every_entry).ok


def test_gradients_may_come_as_a_tuple_in_the_order_of_the_inputs(inputs):
    def as_tuple(dy, cache):
        return tuple(square_backward(dy, cache).values())

    assert mc.check_gradients(square_forward, as_tuple, inputs).ok
    assert not mc.check_gradients(square_forward, lambda *a: as_tuple(*a)[::-1], inputs).ok


@pytest.mark.parametrize(
    ("broken", "note"),
    [
        (lambda grads: {"x": grads["x"]}, "no gradient was returned"),
        (lambda grads: grads | {"weight": grads["weight"].T}, r"has shape \(4, 5\)"),
        (lambda grads: grads | {"weight": grads["weight"] * np.nan}, "not finite"),
        (lambda grads: grads | {"weight": None}, "no gradient was returned"),
    ],
)
def test_what_cannot_be_a_gradient_is_said(inputs, broken, note):
    report = mc.check_gradients(
        square_forward, lambda dy, cache: broken(square_backward(dy, cache)), inputs
    )
    assert not report.ok
    assert report.rows[1].verdict == "WRONG"
    with pytest.raises(AssertionError, match=note):
        assert report.ok, report


def test_float32_is_refused(inputs):
    with pytest.raises(mc.UserError, match=r"needs float64 .* weight is float32"):
        mc.check_gradients(
            square_forward, square_backward, inputs | {"weight": inputs["weight"].astype("f4")}
        )


def test_an_unknown_name_in_expect_zero_is_refused(inputs):
    with pytest.raises(mc.UserError, match="bias"):
        mc.check_gradients(square_forward, square_backward, inputs, expect_zero=("bias",))


def test_a_random_forward_is_refused(inputs):
    rng = np.random.default_rng(0)

    def noisy(x, weight):
        keep = rng.uniform(size=x.shape) < 0.5
        return square_forward(x * keep, weight)

    with pytest.raises(mc.UserError, match="different results for the same inputs"):
        mc.check_gradients(noisy, square_backward, inputs)


def test_a_forward_that_changes_its_input_is_refused(inputs):
    def greedy(x, weight):
        np.abs(x, out=x)
        return square_forward(x, weight)

    with pytest.raises(mc.UserError, match="forward changes x in place"):
        mc.check_gradients(greedy, square_backward, inputs)


def test_an_output_that_is_not_finite_is_refused(inputs):
    with pytest.raises(mc.UserError, match="not finite"):
        mc.check_gradients(
            lambda x, weight: square_forward(x * np.nan, weight), square_backward, inputs
        )


def shifted_softmax_forward(x, bias):
    y, cache = mc.layers.softmax_forward(x + bias)
    return y, cache


def shifted_softmax_backward(dy, cache):
    dx = mc.layers.softmax_backward(dy, cache)
    return {"x": dx, "bias": dx.sum(axis=-1, keepdims=True)}


@pytest.mark.parametrize("every_entry", [False, True])
def test_zero_is_a_verdict_of_its_own(every_entry):
    rng = np.random.default_rng(4)
    inputs = {"x": rng.standard_normal((3, 5)), "bias": rng.standard_normal((3, 1))}
    pair = shifted_softmax_forward, shifted_softmax_backward
    expected = mc.check_gradients(*pair, inputs, every_entry=every_entry, expect_zero=("bias",))
    assert expected.ok
    assert [row.verdict for row in expected.rows] == ["ok", "zero"]
    surprised = mc.check_gradients(*pair, inputs, every_entry=every_entry)
    assert not surprised.ok
    assert "the gradient of bias is zero, so nothing was checked" in str(surprised)
    wrong_claim = mc.check_gradients(
        *pair, inputs, every_entry=every_entry, expect_zero=("bias", "x")
    )
    assert not wrong_claim.ok
    assert "the gradient of x is not zero" in str(wrong_claim)


@pytest.mark.parametrize("every_entry", [False, True])
@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_a_gradient_where_there_is_none_is_wrong(every_entry, size):
    rng = np.random.default_rng(4)
    inputs = {"x": rng.standard_normal((3, 5)), "bias": rng.standard_normal((3, 1))}

    def wrong(dy, cache):
        grads = shifted_softmax_backward(dy, cache)
        return grads | {"bias": np.full((3, 1), size)}

    report = mc.check_gradients(
        shifted_softmax_forward, wrong, inputs, every_entry=every_entry, expect_zero=("bias",)
    )
    assert report.rows[1].verdict == "WRONG"


def test_changing_an_argument_in_place_is_said(inputs):
    def greedy(dy, cache):
        grads = square_backward(dy, cache)
        dy *= 2
        cache[0][:] = 0
        return grads

    report = mc.check_gradients(square_forward, greedy, inputs)
    assert not report.ok
    assert report.problems == ("x was changed in place", "dy was changed in place")
    assert mc.check_gradients(square_forward, square_backward, inputs).ok


def test_overwriting_the_cache_is_said():
    def greedy(dy, y):
        dx = mc.layers.softmax_backward(dy, y)
        y *= dy
        return dx

    x = np.random.default_rng(2).standard_normal((3, 5))
    report = mc.check_gradients(mc.layers.softmax_forward, greedy, {"x": x})
    assert not report.ok
    assert report.problems == ("the cache was changed in place",)


def test_hidden_state_is_found_out(inputs):
    memory = {}

    def forward(x, weight):
        memory["cache"] = (x, weight)
        return square_forward(x, weight)

    report = mc.check_gradients(
        forward, lambda dy, cache: square_backward(dy, memory["cache"]), inputs
    )
    assert not report.ok


def test_a_check_weighted_by_ones_would_have_passed_what_this_one_catches():
    """softmax's rows sum to one, so the sum of its outputs has gradient zero."""
    x = np.random.default_rng(2).standard_normal((3, 5))
    report = mc.check_gradients(mc.layers.softmax_forward, lambda dy, y: np.zeros_like(y), {"x": x})
    assert not report.ok


def test_scalar_and_several_outputs():
    x = np.random.default_rng(2).standard_normal((3, 5))
    assert mc.check_gradients(lambda x: ((x**2).sum(), x), lambda dy, x: 2 * dy * x, {"x": x}).ok
    assert mc.check_gradients(
        lambda x: ((x**2, x.T.copy()), x), lambda dy, x: 2 * dy[0] * x + dy[1].T, {"x": x}
    ).ok


def test_the_report_is_a_table_and_the_same_for_the_same_seed(inputs):
    a, b, c = (
        str(mc.check_gradients(square_forward, square_backward, inputs, seed)) for seed in (0, 0, 1)
    )
    assert a == b != c
    assert [line.split()[0] for line in a.splitlines()] == ["tensor", "x", "weight"]
    assert a.count("ok") == 2


# What people bring: other forms, and layers that are hard to difference.


def tanh_forward(x):
    return np.tanh(x), np.tanh(x)


def tanh_backward(dy, y):
    return {"x": dy * (1 - y * y)}


@pytest.fixture
def x():
    return np.random.default_rng(8).standard_normal((3, 4))


WRONG_FORMS = {
    "inputs None": (None, {}, "dict of name to array"),
    "inputs a list": ([np.ones(3)], {}, "dict of name to array"),
    "inputs empty": ({}, {}, "dict of name to array"),
    "a name that is no string": ({0: np.ones(3)}, {}, "dict of name to array"),
    "a name that forward lacks": ({"z": np.ones(3)}, {}, "cannot be called: missing .* 'x'"),
    "an input of None": ({"x": None}, {}, "x is of type NoneType"),
    "an input tuple": ({"x": (1.0, 2.0)}, {}, "x is of type tuple: pass np.array"),
    "a number": ({"x": np.float64(2)}, {}, "x is of type float64"),
    "a matrix": ({"x": np.ones((2, 2)).view(np.matrix)}, {}, "x is of type matrix"),
    "a masked array": ({"x": np.ma.ones(3)}, {}, "x is of type MaskedArray"),
    "booleans": ({"x": np.ones(3, bool)}, {}, "x is bool; pass"),
    "objects": ({"x": np.ones(3, object)}, {}, "x is object; pass"),
    "half precision": ({"x": np.ones(3, "f2")}, {}, "x is float16: float32 cannot tell"),
    "a complex number": ({"x": np.array(1j)}, {}, "real and its imaginary part"),
    "an infinite input": ({"x": np.array([1.0, np.inf])}, {}, "x is not finite"),
    "expect_zero one name": ({"x": np.ones(3)}, {"expect_zero": "x"}, r"write \['x'\]"),
    "expect_zero a number": ({"x": np.ones(3)}, {"expect_zero": 0}, "a collection of names"),
    "expect_zero misspelt": ({"xs": np.ones(3)}, {"expect_zero": ["sx"]}, "names 'sx'"),
    "no step": ({"x": np.ones(3)}, {"step": 0.0}, "step is a share"),
    "a step as text": ({"x": np.ones(3)}, {"step": "1e-5"}, "step is a share"),
    "a scale of nothing": ({"x": np.ones(3)}, {"scale": {"x": 0}}, "scale is the inputs' size"),
    "a scale of another": ({"x": np.ones(3)}, {"scale": {"y": 1}}, "scale names 'y'"),
}


@pytest.mark.parametrize(("inputs", "options", "sentence"), WRONG_FORMS.values(), ids=WRONG_FORMS)
def test_inputs_of_another_form_are_refused_by_a_sentence(inputs, options, sentence):
    names = {"xs": lambda xs: tanh_forward(xs)}
    forward = names.get(next(iter(inputs or [])) if isinstance(inputs, dict) and inputs else "x",
                        tanh_forward)  # fmt: skip
    with pytest.raises(mc.UserError, match=sentence):
        mc.check_gradients(forward, tanh_backward, inputs, **options)


@pytest.mark.parametrize(
    ("result", "sentence"),
    [
        (lambda x: x, r"must return \(y, cache\), not ndarray"),
        (lambda x: [x, None], r"must return \(y, cache\), not list"),
        (lambda x: (x, x, x), "not a tuple of 3"),
        (lambda x: None, "not NoneType"),
        (lambda x: {"y": x}, "not dict"),
        (lambda x: ([x], None), "y must be an array.*not list"),
        (lambda x: (None, x), "y must be an array.*not NoneType"),
        (lambda x: (((x, x), x), None), "y must be an array.*not tuple"),
        (lambda x: (3, x), "y must be an array.*not int"),
        (lambda x: ((), x), "empty tuple"),
        (lambda x: (x > 0, x), "forward returns bool, which has no gradient"),
        (lambda x: (x.argsort(), x), "forward returns int64, which has no gradient"),
        (lambda x: (x * 1j, x), "complex128: return its real and imaginary part"),
        (lambda x: (x.astype("f4"), x), "forward returns float32 .* casts"),
        (lambda x: ((x, x.mean().astype("f2")), x), "forward returns float16 .* casts"),
    ],
)
def test_a_forward_of_another_form_is_refused_by_a_sentence(x, result, sentence):
    with pytest.raises(mc.UserError, match=sentence):
        mc.check_gradients(result, tanh_backward, {"x": x})


@pytest.mark.parametrize(
    ("backward", "sentence"),
    [
        (lambda dy, y: None, "not NoneType"),
        (lambda dy, y: [dy * (1 - y * y)], "not list"),
        (lambda dy: dy, "cannot be called"),
        ("tanh", "must be a function"),
    ],
)
def test_a_backward_of_another_form_is_refused_by_a_sentence(x, backward, sentence):
    with pytest.raises(mc.UserError, match=sentence):
        mc.check_gradients(tanh_forward, backward, {"x": x})


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda g: g.astype("f4"), "float32, not float64"),
        (lambda g: g.astype(np.longdouble), "not float64"),
        (lambda g: g + 0j, "complex128"),
        (lambda g: g.tolist(), "list, not an array"),
        (lambda g: g[:1], r"shape \(1, 4\)"),
        (lambda g: np.full_like(g, np.inf), "not finite"),
    ],
)
def test_a_gradient_of_another_form_is_wrong(x, change, note):
    report = mc.check_gradients(
        tanh_forward, lambda dy, y: {"x": change(tanh_backward(dy, y)["x"])}, {"x": x}
    )
    assert [row.verdict for row in report.rows] == ["WRONG"]
    assert re.search(note, report.rows[0].note)


def problems_of(backward, forward=tanh_forward, **more):
    inputs = {"x": np.random.default_rng(8).standard_normal((3, 4))}
    report = mc.check_gradients(forward, backward, inputs, **more)
    assert not report.ok
    return str(report)


def test_gradients_that_nobody_asked_for_are_said():
    def misspelt(dy, y):
        return tanh_backward(dy, y) | {"xx": dy}

    def too_many(dy, y):
        return dy * (1 - y * y), dy

    assert "a gradient of 'xx', which is no input" in problems_of(misspelt)
    assert "backward returns 2 gradients, but inputs: 1" in problems_of(too_many)
    x = np.random.default_rng(8).standard_normal((3, 4))
    none_beyond = mc.check_gradients(tanh_forward, lambda dy, y: (dy * (1 - y * y), None), {"x": x})
    assert none_beyond.ok  # as linear_backward without a bias


def test_state_that_backward_keeps_is_said():
    total, buffer, calls = np.zeros((3, 4)), np.zeros((3, 4)), []

    def accumulates(dy, y):
        total[...] += dy * (1 - y * y)
        return {"x": total.copy()}

    def reuses(dy, y):
        np.multiply(dy, 1 - y * y, out=buffer)
        return {"x": buffer}

    def forgets(dy, y):
        calls.append(1)
        return {"x": dy * (1 - y * y) * (len(calls) == 1)}

    def spends(dy, y):
        calls.pop()
        return tanh_backward(dy, y)

    assert "another one on a second call" in problems_of(accumulates)
    assert "written over by the next call" in problems_of(reuses)
    assert "another one on a second call" in problems_of(forgets)
    calls[:] = [1]
    assert "works once and then raises IndexError" in problems_of(spends)


def test_a_cache_inside_an_object_is_watched_too():
    def forward(x):
        return np.tanh(x), SimpleNamespace(y=np.tanh(x))

    def greedy(dy, cache):
        cache.y *= cache.y
        return {"x": dy * (1 - cache.y)}

    assert "the cache was changed in place" in problems_of(greedy, forward)


def test_float32_inside_is_named_wherever_it_is():
    def hidden(x):
        return np.tanh(x.astype("f4")).astype("f8"), np.tanh(x)

    def half(x):
        return np.tanh(x.astype("f2").astype("f8")), np.tanh(x)

    def short_cache(x):
        return np.tanh(x), np.tanh(x).astype("f4")

    def short_dy(dy, y):
        return {"x": dy.astype("f4") * (1 - y * y)}

    def short_result(dy, y):
        return {"x": tanh_backward(dy, y)["x"].astype("f4").astype("f8")}

    assert re.search(
        "unsure  forward (loses digits|moves in steps)", problems_of(tanh_backward, hidden)
    )
    assert "does it round or cast?" in problems_of(tanh_backward, half)
    assert "the cache holds float32" in problems_of(tanh_backward, short_cache)
    assert "not linear in dy: does backward cast?" in problems_of(short_dy)
    assert "not linear in dy: does backward cast?" in problems_of(short_result)


def test_a_mask_in_float32_is_no_cast(x):
    keep = np.ones((3, 1), "f4")
    assert mc.check_gradients(lambda x: (x * keep, keep), lambda dy, k: dy * k, {"x": x}).ok


def zero_layers():
    """Right layers whose output, or a gradient, is zero: name to (pair, inputs, zeros)."""
    rng = np.random.default_rng(3)
    x, w = rng.standard_normal((4, 3)), rng.standard_normal((3, 2))
    relu = lambda x: (np.maximum(x, 0), x > 0), lambda dy, c: {"x": dy * c}
    return {
        "zero-initialised head": (
            lambda x, w: (np.sin(x) @ w, (x, w)),
            lambda dy, c: {"x": dy @ c[1].T * np.cos(c[0]), "w": np.sin(c[0]).T @ dy},
            {"x": x, "w": 0 * w},
            ["x"],
        ),
        "dead unit": (*relu, {"x": -np.abs(x) - 0.5}, ["x"]),
        "zero inputs": (
            lambda x, w: (x @ w, (x, w)),
            lambda dy, c: {"x": dy @ c[1].T, "w": c[0].T @ dy},
            {"x": 0 * x, "w": w},
            ["w"],
        ),
        "no rows": (
            lambda x, w: (np.tanh(x) @ w, (x, w)),
            lambda dy, c: {"x": (dy @ c[1].T) / np.cosh(c[0]) ** 2, "w": np.tanh(c[0]).T @ dy},
            {"x": x[:0], "w": w},
            ["x", "w"],
        ),
        "no columns": (
            lambda x, b: (x.sum(1) + b, x.shape),
            lambda dy, shape: {"x": np.broadcast_to(dy[:, None], shape), "b": dy},
            {"x": x[:, :0], "b": x[:, 0]},
            ["x"],
        ),
        "constant": (lambda x: (0.0 * x.sum(), x), lambda dy, x: 0.0 * dy * x, {"x": x}, ["x"]),
    }


@pytest.mark.parametrize("every_entry", [False, True])
@pytest.mark.parametrize("name", zero_layers())
def test_zero_outputs_and_empty_inputs_have_a_verdict(name, every_entry):
    forward, backward, inputs, zeros = zero_layers()[name]
    report = mc.check_gradients(forward, backward, inputs, every_entry=every_entry)
    assert not report.ok
    assert [row.name for row in report.rows if row.verdict == "zero"] == zeros
    assert mc.check_gradients(
        forward, backward, inputs, every_entry=every_entry, expect_zero=zeros
    ).ok


@pytest.mark.parametrize("every_entry", [False, True])
@pytest.mark.parametrize("size", [1e-300, 1e-200, 1e160, 1e250, 1e303])
def test_outputs_at_the_ends_of_float64(x, every_entry, size):
    def forward(x):
        return size * np.tanh(x), np.tanh(x)

    for factor, right in ((1.0, True), (-1.0, False), (1.01, False), (0.0, False)):
        report = mc.check_gradients(
            forward, lambda dy, y, f=factor: f * size * dy * (1 - y * y), {"x": x}, 0, every_entry
        )
        assert report.ok == right, report


def test_an_output_that_overflows_beside_the_inputs_is_not_ok(x):
    report = mc.check_gradients(
        lambda x: (1.79769e308 * np.exp(x), None), lambda dy, c: dy, {"x": x - x.max()}
    )
    assert not report.ok


@pytest.mark.parametrize("ratio", [1e3, 1e6, 1e9])
def test_one_wrong_entry_among_larger_ones_is_found_entry_by_entry(ratio):
    sizes = np.array([[ratio, ratio], [1.0, ratio]])

    def backward(dy, y, error=0.0):
        grad = dy * sizes * (1 - y * y)
        grad[1, 0] *= 1 + error
        return {"x": grad}

    inputs = {"x": np.random.default_rng(8).standard_normal((2, 2))}
    pair = lambda x: (sizes * np.tanh(x), np.tanh(x)), partial(backward, error=1e-3)
    assert mc.check_gradients(pair[0], backward, inputs, every_entry=True).ok
    report = mc.check_gradients(*pair, inputs, every_entry=True)
    assert report.rows[0].verdict == "WRONG"
    assert ratio < 1e4 or "only at [1, 0]" in report.rows[0].note


KINKS = {
    "abs at 0": (np.abs, np.sign, [0.0, 1.0, -2.0]),
    "hinge at its corner": (lambda x: np.maximum(1 - x, 0), lambda x: -1.0 * (x < 1), [1.0, 0.3]),
    "clip at its end": (lambda x: np.clip(x, 0, 1), lambda x: 1.0 * (x >= 0), [0.0, 0.5]),
    "a tie": (lambda x: x.max(), lambda x: (x == x.max()) / (x == x.max()).sum(), [2.0, 2.0, 1.0]),
}


@pytest.mark.parametrize("every_entry", [False, True])
@pytest.mark.parametrize("name", KINKS)
def test_kinks_and_ties_get_a_hint(name, every_entry):
    f, df, x = KINKS[name]
    for delta, verdict in ((0.0, "unsure"), (0.1, "ok")):
        inputs = {"x": np.array(x) + delta * np.arange(1, len(x) + 1)}
        report = mc.check_gradients(
            lambda x: (f(x), x), lambda dy, x: dy * df(x), inputs, every_entry=every_entry
        )
        assert report.rows[0].verdict == verdict, report
        assert ("a kink or a tie" in str(report)) == (verdict == "unsure")


def test_a_kink_near_the_inputs_is_no_kink():
    """With 20,000 entries some lie within the usual step of their kink."""
    inputs = {"x": np.random.default_rng(0).standard_normal((100, 200))}
    pair = lambda x: (np.maximum(x, 0.3 * x), x > 0), lambda dy, c: dy * np.where(c, 1, 0.3)
    assert mc.check_gradients(*pair, inputs).ok


@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.01, 1e4, 1e6])
def test_the_step_follows_the_inputs(size):
    rng = np.random.default_rng(2)
    inputs = {"x": size * rng.standard_normal((3, 7))}
    inputs |= {"weight": rng.standard_normal(7), "bias": rng.standard_normal(7)}

    def wrong(dy, cache):
        dx, dweight, dbias = mc.layers.layernorm_backward(dy, cache)
        return 1.0001 * dx, dweight, dbias

    for every_entry in (False, True):
        options = {"every_entry": every_entry}
        assert mc.check_gradients(
            mc.layers.layernorm_forward, mc.layers.layernorm_backward, inputs, **options
        ).ok
        report = mc.check_gradients(mc.layers.layernorm_forward, wrong, inputs, **options)
        assert [row.verdict for row in report.rows] == ["WRONG", "ok", "ok"]


def test_differences_that_cannot_tell_are_a_verdict_of_their_own():
    x = np.random.default_rng(2).standard_normal(5)
    pair = lambda x: ((x + 1e12) - 1e12, None), lambda dy, c: 1.0 * dy
    report = mc.check_gradients(*pair, {"x": x})
    assert report.rows[0].verdict == "unsure" and report.rows[0].note and not report.ok
    far = {"x": 1e6 + np.random.default_rng(2).standard_normal((3, 7)), "weight": np.ones(7)}
    report = mc.check_gradients(
        lambda x, weight: mc.layers.layernorm_forward(x, weight, 0.0),
        lambda dy, c: mc.layers.layernorm_backward(dy, c)[:2],
        far,
    )
    assert [row.verdict for row in report.rows] == ["unsure", "ok"]
    assert "differences are good to" in report.rows[0].note


def test_step_and_scale_can_be_given():
    """A tensor of zeros does not say its size, nor does one entry say the others'."""
    pair = lambda x, b: (np.sin((x + b) * 1e6), np.cos((x + b) * 1e6)), None
    backward = lambda dy, c: (1e6 * dy * c, 1e6 * (dy * c).sum(0))  # noqa: E731
    inputs = {"x": 1e-6 * np.random.default_rng(2).standard_normal((4, 3)), "b": np.zeros(3)}
    for options in ({"scale": 1e-6}, {"scale": {"b": 1e-6}}, {"step": 1e-6, "scale": {"b": 1e-5}}):
        report = mc.check_gradients(pair[0], backward, inputs, **options)
        assert report.ok, report
        assert max(row.error for row in report.rows) < 1e-8


def test_a_step_that_is_lost_in_the_inputs_passes_nothing():
    inputs = {"x": 1e6 + np.random.default_rng(2).standard_normal(4)}
    report = mc.check_gradients(
        lambda x: (2 * x, x), lambda dy, x: 3 * dy, inputs, step=1e-10, scale=1e-12
    )
    assert not report.ok


# Right layers of every kind and scale, and errors planted in them.


def alarms_and_misses(seeds, every_entry=False):
    alarms, misses = [], []
    for seed in seeds:
        forward, backward, inputs = right_layer(seed)
        report = mc.check_gradients(forward, backward, inputs, seed, every_entry)
        if not report.ok:
            alarms.append((seed, str(report)))
        wrong, what = plant(seed, backward, inputs)
        if mc.check_gradients(forward, wrong, inputs, seed, every_entry).ok:
            misses.append((seed, what))
    return alarms, misses


@pytest.mark.parametrize("every_entry", [False, True])
def test_right_layers_of_all_scales_pass_and_planted_errors_do_not(every_entry):
    assert alarms_and_misses(range(200), every_entry) == ([], [])


@pytest.mark.full
def test_no_false_alarm_in_10_000_right_layers_and_no_planted_error_missed():
    assert alarms_and_misses(range(10_000)) == ([], [])


@pytest.mark.full
@pytest.mark.parametrize("layer", ALL_CASES)
def test_no_false_alarm_over_200_seeds(layer):
    for seed in range(200):
        for report in check_layer(layer, seed):
            assert report.ok, f"seed {seed}\n{report}"


@pytest.mark.full
@pytest.mark.parametrize("layer", ALL_CASES)
def test_no_false_alarm_along_every_entry(layer):
    """200 seeds of the leaves, ten of what is made of them, one of whole models: they have
    thousands of entries."""
    composites = ("gpsa", "gpsa_dense", "psa", "mhsa", "block", "last_block", "tied_attention",
                  "kim_attention", "cmt_attention", "irffn", "cmt_block", "branch")  # fmt: skip
    whole = ("convit", "isotropic", "cmt", "mobile", "critic", "generator")
    for seed in range(1 if layer in whole else 10 if layer in composites else 200):
        for report in check_layer(layer, seed, every_entry=True):
            assert report.ok, f"seed {seed}\n{report}"


@pytest.mark.parametrize(
    "seed", [6, 8, *(pytest.param(seed, marks=pytest.mark.full) for seed in (15, 19, 77))]
)
def test_a_whole_model_is_right_whatever_drop_path_leaves_out(seed):
    assert all(report.ok for report in check_layer("convit", seed))


def command(*arguments):
    return CliRunner().invoke(program, ["gradcheck", *arguments], standalone_mode=False)


def test_the_command_exits_with_1_where_a_layer_is_wrong(monkeypatch):
    right = command("--layer", "gelu")
    assert right.return_value == 0
    assert "all right" in right.stdout
    half = cases.FUNCTIONS.gelu_backward
    monkeypatch.setattr(cases.FUNCTIONS, "gelu_backward", lambda dy, c: 0.5 * half(dy, c))
    wrong = command("--layer", "gelu")
    assert wrong.return_value == 1
    assert "WRONG" in wrong.stdout
    found = json.loads(command("--layer", "gelu", "--json").stdout)
    assert not found["ok"]
    assert found["cases"][0]["rows"][0]["verdict"] == "WRONG"


def test_the_command_passes_its_seed_and_form_on():
    tables = {
        command("--layer", "gelu", *more).stdout
        for more in ([], ["--seed", "1"], ["--every-entry"], ["--seed", "1", "--every-entry"])
    }
    assert len(tables) == 4
    with pytest.raises(mc.UserError, match="--seed must be an integer of at least 0"):
        raise command("--seed", "-1").exception


def test_the_command_exits_with_1_where_a_planted_bug_gets_away(monkeypatch):
    from miniconvit.cli import gradcheck

    caught = [m for m in MUTANTS if m.function == "gelu_backward"][:2]
    monkeypatch.setattr(gradcheck, "MUTANTS", caught)
    assert command("--layer", "gelu", "--mutants").return_value == 0
    harmless = Mutant("harmless", "gelu_backward", "-0.5 * x * x", "-(x * x) / 2.0", "the same")
    monkeypatch.setattr(gradcheck, "MUTANTS", [*caught, harmless])
    result = command("--layer", "gelu", "--mutants")
    assert result.return_value == 1
    assert "NOBODY" in result.stdout
    assert json.loads(command("--mutants", "--json", "--layer", "gelu").stdout)["caught"] == 2


def test_mutants_of_a_layer_that_fails_itself_cannot_be_judged(monkeypatch):
    cases._is_right.cache_clear()
    half = cases.FUNCTIONS.gate_backward
    monkeypatch.setattr(cases.FUNCTIONS, "gate_backward", lambda dy, c: half(2 * dy, c))
    with pytest.raises(RuntimeError, match="no mutant of it can be judged"):
        cases.catch(next(m for m in MUTANTS if m.function == "gate_backward"), seed=3)
    cases._is_right.cache_clear()


def test_unknown_layer():
    with pytest.raises(mc.UserError, match="unknown layer 'convolution'"):
        check_layer("convolution")


def test_an_output_that_every_call_writes_into_is_seen_as_it_was():
    """Else every slope would be zero: a wrong gradient passed, and a right one did not."""
    out = np.empty((3, 4))
    x = np.random.default_rng(0).standard_normal((3, 4))

    def forward(x):
        np.tanh(x, out=out)
        return out, x

    nothing = mc.check_gradients(forward, lambda dy, x: {"x": 0 * dy}, {"x": x}, expect_zero=["x"])
    assert [row.verdict for row in nothing.rows] == ["WRONG"]
    right = mc.check_gradients(forward, lambda dy, x: {"x": dy * (1 - np.tanh(x) ** 2)}, {"x": x})
    assert right.ok, right


@pytest.mark.parametrize("buffers", [1, 2, 3])
def test_a_cache_that_a_later_call_writes_over_is_named(buffers):
    outs = cycle([np.empty((3, 4)) for _ in range(buffers)])
    x = np.random.default_rng(0).standard_normal((3, 4))

    def forward(x):
        out = next(outs)
        np.tanh(x, out=out)
        return out, out

    report = mc.check_gradients(forward, lambda dy, y: {"x": dy * (1 - y * y)}, {"x": x})
    assert not report.ok
    assert "a later call of forward writes over the cache of an earlier one" in report.problems


def test_a_cache_may_be_a_long_chain_a_deque_or_an_object_with_slots():
    class Slots:
        __slots__ = ("x",)

    x = np.random.default_rng(0).standard_normal((3, 4))

    def chain(x):
        cache = (x,)
        for _ in range(5000):
            cache = (cache,)
        return x * x, cache

    def backward(dy, cache):
        while isinstance(cache, tuple):
            (cache,) = cache
        return {"x": 2 * cache * dy}

    assert mc.check_gradients(chain, backward, {"x": x}).ok

    def in_slots(x):
        cache = Slots()
        cache.x = x
        return x * x, cache

    def in_deque(x):
        return x * x, deque([x])

    def ruin(dy, cache):
        array = cache.x if isinstance(cache, Slots) else cache[0]
        kept = array.copy()
        array *= 3.0
        return {"x": 2 * kept * dy}

    for forward in (in_slots, in_deque):
        assert not mc.check_gradients(forward, ruin, {"x": x}).ok


def test_an_output_whose_shape_hangs_on_the_inputs_is_refused():
    def forward(x):
        return x[x > x.mean() + 1e-7], x

    x = np.array([1.0, 2.0, 3.0, 2.0 + 2e-7])
    with pytest.raises(mc.UserError, match="shape"):
        mc.check_gradients(forward, lambda dy, x: {"x": np.zeros(4)}, {"x": x})


@pytest.mark.parametrize("seed", [-1, 1.5])
def test_a_seed_that_is_none_is_refused(seed):
    same = (lambda x: (x, None)), (lambda dy, cache: {"x": dy})
    with pytest.raises(mc.UserError, match="seed"):
        mc.check_gradients(*same, {"x": np.ones(3)}, seed=seed)
