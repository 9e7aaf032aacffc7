"""Muon against PyTorch's own, against the singular values, and which parameters it is for.

golden/make_muon_golden.py writes PyTorch's values and says what they are.
"""

import json
import re
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest

import miniconvit as mc
from miniconvit.muon import is_hidden, orthogonal
from miniconvit.neighbours.diversity import PatchHeadConfig
from miniconvit.neighbours.models import ALL_VARIANTS, shapes_of

GOLDEN = Path(__file__).parent / "golden" / "muon.npz"


def golden():
    with np.load(GOLDEN) as file:
        return {name: file[name] for name in file}


@pytest.mark.parametrize("as_filters", [False, True])
@pytest.mark.parametrize("i", range(7))
def test_every_step_is_pytorchs(i, as_filters):
    """A matrix and the same numbers as 1x1 filters, beside a bias that AdamW moves."""
    file = golden()
    settings = json.loads(file["settings"].item())
    values, grads = file[f"{i}/params"], file[f"{i}/grads"]
    shape = (*values.shape[1:], 1, 1) if as_filters else values.shape[1:]
    name = "blocks.1.mlp.fc1.weight"
    params = {name: values[0].reshape(shape).copy(), "norm.bias": np.ones(3)}
    bias = {"norm.bias": np.ones(3)}
    muon = mc.Muon(params, weight_decay=0.3, momentum=settings["momentum"])
    adamw = mc.AdamW(bias, weight_decay=0.3)
    rng = np.random.default_rng(i)
    for lr, g, after in zip(settings["lrs"], grads, values[1:], strict=True):
        others = {"norm.bias": rng.standard_normal(3)}
        muon.step(params, {name: g.reshape(shape)} | others, lr)
        adamw.step(bias, others, lr)
        np.testing.assert_allclose(params[name].reshape(after.shape), after, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(params["norm.bias"], bias["norm.bias"])
    momentum = muon.exp_avg[name].reshape(values.shape[1:])
    np.testing.assert_allclose(momentum, file[f"{i}/momentum"], rtol=1e-12)
    assert muon.step_count == len(grads) and not muon.exp_avg_sq[name].any()


@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (6, 6), (5, 40), (40, 5), (192, 48)])
def test_each_singular_value_goes_through_the_polynomial_and_the_vectors_stay(shape):
    rng = np.random.default_rng(sum(shape))
    matrix = rng.standard_normal(shape) * np.geomspace(1, 0.1, shape[1])
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    s = s / np.sqrt((s**2).sum())
    assert min(s) >= 0.002
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    assert min(s) > 0.68 and max(s) < 1.21
    np.testing.assert_allclose(orthogonal(matrix), (u * s) @ vt, rtol=0, atol=1e-9)
    found = orthogonal(matrix.astype("float32"))
    assert found.dtype == np.float32
    rounding = 6e-8 * 3.4445**5  # what the five rounds can make of float32's
    np.testing.assert_allclose(found, (u * s) @ vt, rtol=0, atol=rounding)
    np.testing.assert_allclose(orthogonal(1e9 * matrix), orthogonal(matrix), atol=1e-12)
    np.testing.assert_allclose(orthogonal(1e-5 * matrix), orthogonal(matrix), atol=1e-12)
    assert not orthogonal(np.zeros(shape)).any()


def test_a_step_has_about_the_length_of_adamws():
    """The root mean square of a step, in units of the rate: AdamW's is 0.2 to 0.4 in trainings (Liu
    et al. 2025). Ours is 0.2 where all singular values are 1."""
    rng = np.random.default_rng(0)
    for shape in ((64, 64), (256, 64), (64, 256)):
        params = {"blocks.0.mlp.fc1.weight": np.zeros(shape)}
        optimizer = mc.Muon(params, lr=1.0, weight_decay=0.0)
        optimizer.step(params, {"blocks.0.mlp.fc1.weight": rng.standard_normal(shape)})
        rms = np.sqrt((params["blocks.0.mlp.fc1.weight"] ** 2).mean())
        assert 0.2 * 0.68 < rms < 0.2 * 1.21


OF_A_BLOCK = ["attn.qkv", "attn.proj", "mlp.fc#"]
OF_GPSA = ["attn.qk", "attn.v", *OF_A_BLOCK]
OF_CMT = ["attn.q", "attn.k", "attn.v", "attn.proj", "mlp.conv#.#"]
OF_A_STEM = ["stem.project", "branches.#.expand", "branches.#.project", "branches.#.se.fc#"]
HIDDEN = {
    "convit_micro32": [f"blocks.#.{end}" for end in OF_GPSA],
    "vit_micro32": [f"blocks.#.{end}" for end in OF_A_BLOCK],
    "cmt_micro32": ["_fc", *(f"blocks_{stage}.#.{end}" for stage in "abcd" for end in OF_CMT)],
    "mobile_micro32": [*OF_A_STEM, *(f"blocks.#.{end}" for end in OF_A_BLOCK), "fusion.fc#"],
}


@pytest.mark.parametrize("name", HIDDEN)
def test_which_parameters_are_matrices_between_features(name):
    """Not what sees pixels or positions, nor what names the classes."""
    shapes = shapes_of(ALL_VARIANTS[name])
    hidden = {re.sub(r"\d+", "#", key) for key, shape in shapes.items() if is_hidden(key, shape)}
    assert hidden == {f"{end}.weight" for end in HIDDEN[name]}


def test_a_head_on_each_patch_names_classes_too():
    config = PatchHeadConfig(img_size=8, embed_dim=8, depth=2, local_up_to_layer=1)
    both = shapes_of(config), shapes_of(ALL_VARIANTS["convit_micro32"])
    assert "patch_head.weight" in both[0]
    ends = [{re.sub(r"\d+", "#", k) for k, v in s.items() if is_hidden(k, v)} for s in both]
    assert ends[0] == ends[1]


def test_patches_of_one_pixel_are_pixels():
    assert not is_hidden("patch_embed.proj.weight", (48, 3, 1, 1))
    assert not is_hidden("patch_embed_b.proj.weight", (32, 24, 1, 1))


def test_every_variant_has_such_matrices():
    for name, config in ALL_VARIANTS.items():
        assert any(is_hidden(*item) for item in shapes_of(config).items()), name


def test_float32_stays_float32_in_place():
    params = {"blocks.0.attn.v.weight": np.ones((2, 3), "f4"), "head.weight": np.ones((2, 2), "f4")}
    kept, optimizer = dict(params), mc.Muon(params)
    optimizer.step(params, {name: p.copy() for name, p in params.items()})
    for name, p in params.items():
        assert p is kept[name] and (p != 1).any()
        assert {p.dtype, optimizer.exp_avg[name].dtype} == {np.dtype("f4")}


def test_a_gradient_that_does_not_fit_is_refused_before_anything_changes():
    rng = np.random.default_rng(0)
    params = {"blocks.0.attn.v.weight": rng.standard_normal((2, 3)), "norm.bias": np.ones(3)}
    grads = {name: rng.standard_normal(p.shape) for name, p in params.items()}
    optimizer = mc.Muon(params)
    before = deepcopy((params, vars(optimizer)))
    wrong = [
        grads | {"norm.bias": np.ones(2)},
        grads | {"norm.bais": np.ones(3)},
        {"blocks.0.attn.v.weight": grads["blocks.0.attn.v.weight"]},
        grads | {"blocks.0.attn.v.weight": grads["blocks.0.attn.v.weight"].T},
    ]
    for one in wrong:
        with pytest.raises(mc.UserError):
            optimizer.step(params, one)
        np.testing.assert_equal((params, vars(optimizer)), before)


def test_the_momentum_is_pytorchs():
    assert mc.Muon({}).momentum == 0.95


@pytest.mark.parametrize("momentum", [1.0, -0.1, float("nan")])
def test_a_momentum_that_cannot_be_is_refused(momentum):
    with pytest.raises(mc.UserError, match="momentum must be at least 0 and below 1"):
        mc.Muon({}, momentum=momentum)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_is_not_swallowed(value):
    params = {"blocks.0.attn.v.weight": np.ones((3, 4))}
    grads = {"blocks.0.attn.v.weight": np.ones((3, 4))}
    grads["blocks.0.attn.v.weight"][1, 2] = value
    with np.errstate(invalid="ignore"):
        mc.Muon(params).step(params, grads)
    assert not np.isfinite(params["blocks.0.attn.v.weight"]).all()
