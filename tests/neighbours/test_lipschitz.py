"""Attention by distance, spectral norms and their experiment, against torch and a theorem."""

import numpy as np
import pytest
from golden_cases import GOLDEN, assert_equal, load_case

import miniconvit as mc
from miniconvit.experiments import lipschitz
from miniconvit.layers import mhsa_forward
from miniconvit.neighbours import (
    kim_attention_backward,
    kim_attention_forward,
    l2_attention_backward,
    l2_attention_forward,
    spectral_backward,
    spectral_forward,
    tied_attention_backward,
    tied_attention_forward,
)
from miniconvit.neighbours.lipschitz import jacobian_norm, kim_bound

HEADS = 3  # of the golden script


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        ("tied_attention", tied_attention_forward, tied_attention_backward),
        ("kim_attention", kim_attention_forward, kim_attention_backward),
    ],
)
def test_whole_layers_equal_autograd(name, forward, backward):
    case = load_case(name)
    x = case.inputs.pop("x")
    y, cache = forward(x, case.inputs, HEADS)
    dx, grads = backward(case.dy, cache)
    assert_equal(y, case.y)
    assert grads.keys() == case.inputs.keys()
    for key, grad in ({"x": dx} | grads).items():
        assert_equal(grad, case.grad[key])


def test_l2_attention_and_spectral_norm_equal_autograd():
    case = load_case("l2_attention")
    y, cache = l2_attention_forward(**case.inputs)
    assert_equal(y, case.y)
    for ours, name in zip(l2_attention_backward(case.dy, cache), ("q", "v"), strict=True):
        assert_equal(ours, case.grad[name])
    case = load_case("spectral")
    y, cache = spectral_forward(**case.inputs)
    assert_equal(y, case.y)
    assert_equal(spectral_backward(case.dy, cache), case.grad["weight"])


@pytest.fixture(scope="module")
def found():
    return [lipschitz.measure(0)]


def test_every_jacobian_of_the_experiment_equals_autograds(found):
    _every_norm_is_autograds(found[0][0], 0)


@pytest.mark.full
@pytest.mark.parametrize("seed", [1, 2])
def test_so_do_those_of_the_other_seeds(seed):
    norms, _ = lipschitz.measure(seed)
    _every_norm_is_autograds(norms, seed)


def _every_norm_is_autograds(norms, seed):
    with np.load(GOLDEN) as file:
        theirs = file[f"lipschitz/{seed}"]
    for i, layer in enumerate(lipschitz.LAYERS):
        for j, ray in enumerate(lipschitz.RAYS):
            np.testing.assert_allclose(norms[layer, ray], theirs[i, j], rtol=1e-10)


def test_the_verdicts_are_yes_and_can_be_no(found):
    sentences = list(lipschitz.verdicts(found))
    assert len(sentences) == 6 and all(": yes, at most" in s for s in sentences)
    norms, bound = found[0]
    swapped = dict(zip(norms, reversed(norms.values()), strict=True))
    wrong = list(lipschitz.verdicts([(swapped, 0.5)]))
    assert sum(": NO, at most" in s for s in wrong) >= 4 and ": NO" in wrong[-1]
    assert norms["tied", "null"][-1] > bound  # the theorem is not about ViTGAN's layer


def test_the_bound_grows_with_the_weights_as_the_layer_does():
    """At x = 0 a head is the mean of its values: its Jacobian is known, and quadratic in W_q."""
    params, _ = lipschitz.draw(5)
    for factor in (1.0, 30.0):
        p = params["kim"] | {"qv.weight": params["kim"]["qv.weight"].copy()}
        p["qv.weight"][: lipschitz.WIDTH] *= factor
        x = np.zeros((1, lipschitz.TOKENS, lipschitz.WIDTH))
        norm = jacobian_norm(
            lambda x, p=p: kim_attention_forward(x, p, lipschitz.HEADS),
            lambda dy, cache: kim_attention_backward(dy, cache)[0],
            x,
        )
        heads = p["qv.weight"].reshape(2, lipschitz.HEADS, -1, lipschitz.WIDTH)
        by_head = [q.T @ q @ v.T / 2.0 for q, v in zip(*heads, strict=True)]  # d = 4
        exact = np.linalg.norm(np.concatenate(by_head, axis=1) @ p["proj.weight"].T, 2)
        assert norm == pytest.approx(exact, rel=1e-12)
        assert norm <= kim_bound(p, lipschitz.HEADS, lipschitz.TOKENS)


@pytest.mark.parametrize("tokens", [2, 16, 1000])
def test_no_distances_beat_the_lemma_of_the_bound(tokens):
    """max over c of sum c exp(-c) / (1 + sum exp(-c)) is phi with phi exp(phi + 1) = N - 1."""
    params = {"qv.weight": np.ones((2, 1)), "proj.weight": np.eye(1)}
    phi = (kim_bound(params, 1, tokens) / tokens**0.5 - 1) / 4
    assert phi * np.exp(phi + 1) == pytest.approx(tokens - 1, rel=1e-12)
    c = np.random.default_rng(tokens).uniform(0, 2 + 2 * phi, (1000, tokens - 1))
    c[0] = 1 + phi  # where the maximum is
    shares = np.exp(-c)
    reached = (c * shares).sum(axis=1) / (1 + shares.sum(axis=1))
    assert reached[0] == pytest.approx(phi, rel=1e-12) and reached.max() <= phi * (1 + 1e-12)


def test_head_1_sees_no_part_of_the_null_ray():
    params, rays = lipschitz.draw(0)
    _, z = rays["null"]
    Wq = params["tied"]["qv.weight"][: lipschitz.WIDTH].reshape(lipschitz.HEADS, -1, 16)
    seen = np.abs(z @ Wq.swapaxes(-1, -2)).max(axis=(1, 2))
    assert seen[0] < 1e-12 and seen[1:].min() > 0.1


def test_layernorm_makes_dot_products_bounded():
    """Why such attention trains all the same: behind a LayerNorm the scale of x has no effect."""
    params, _ = lipschitz.draw(0)
    x = np.random.default_rng(1).standard_normal((1, 16, 16))
    ones, zeros = np.ones(16), np.zeros(16)
    small, large = (
        mhsa_forward(mc.layers.layernorm_forward(t * x, ones, zeros, 0.0)[0], params["dot"], 4)[0]
        for t in (1.0, 256.0)
    )
    np.testing.assert_allclose(small, large, rtol=1e-12)


def test_the_command_writes_its_tables_and_a_picture(tmp_path, monkeypatch, found, program):
    monkeypatch.setattr(lipschitz, "measure", lambda seed: found[0])
    status, out, _ = program("experiment", "lipschitz", "--seeds", "1", "--out", tmp_path / "x")
    assert status == 0
    text = (tmp_path / "x/table.md").read_text()
    assert text in out and "slopes of 1 seed:" in text
    lines = (tmp_path / "x/table.csv").read_text().splitlines()
    assert len(lines) == 1 + 3 * 2 * len(lipschitz.SCALES)
    assert float(lines[1].split(",")[4]) == found[0][0]["dot", "generic"][0]
    assert (tmp_path / "x/lipschitz.png").stat().st_size > 10000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--budget", "3"), "lipschitz trains nothing: leave out --budget"),
        (("--plan", "plan.json"), "leave out --plan"),
        (("--device", "cuda"), "leave out --device"),
        (("--workers", "2"), "leave out --workers"),
        (("--data-dir", "photos"), "leave out --data-dir"),
        (("--seeds", "0"), "--seeds must be from 1"),
        (("--out", "."), "holds the plan of another experiment"),
    ],
)
def test_what_is_not_lipschitzs_is_refused(tmp_path, monkeypatch, program, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.json").write_text("{}")
    status, _, error = program("experiment", "lipschitz", *arguments)
    assert status == 2 and words in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
