"""The gradient checker: what it accepts, what it catches, and what it says."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

import miniconvit as mc
from miniconvit.cli import program
from miniconvit.gradcheck import cases
from miniconvit.gradcheck.cases import CASES, check_layer
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


@pytest.mark.parametrize("every_entry", [False, True])
@pytest.mark.parametrize("layer", CASES)
def test_every_layer_is_right(layer, every_entry):
    if layer in ("convit", "block", "last_block") and every_entry:
        pytest.skip("every entry of a whole block is left to the full suite")
    for report in check_layer(layer, seed=1, every_entry=every_entry):
        assert report.ok, report


@pytest.mark.full
@pytest.mark.parametrize("layer", CASES)
def test_no_false_alarm_over_200_seeds(layer):
    for seed in range(200):
        for report in check_layer(layer, seed):
            assert report.ok, f"seed {seed}\n{report}"


@pytest.mark.full
@pytest.mark.parametrize("layer", CASES)
def test_no_false_alarm_along_every_entry(layer):
    """200 seeds of the leaves, ten of what is made of them, one of three whole models: they have
    thousands of entries."""
    composites = ("gpsa", "gpsa_dense", "psa", "mhsa", "block", "last_block")
    for seed in range(1 if layer == "convit" else 10 if layer in composites else 200):
        for report in check_layer(layer, seed, every_entry=True):
            assert report.ok, f"seed {seed}\n{report}"


@pytest.mark.parametrize("seed", [6, 8, 15, 19, 77])
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
    with pytest.raises(mc.UserError, match="unknown layer 'conv'"):
        check_layer("conv")
