"""The whole model: variants, initialisation, edge cases of the architecture, randomness."""

import re
from dataclasses import replace
from math import log
from types import SimpleNamespace

import numpy as np
import pytest

import miniconvit as mc
from miniconvit import layers
from miniconvit.arrays import random_bits, uniform
from miniconvit.model import drop_path_masks

SMALL = mc.ConViTConfig(
    img_size=(6, 12),
    patch_size=(2, 3),
    in_chans=2,
    num_classes=5,
    embed_dim=12,
    depth=3,
    num_heads=4,
    local_up_to_layer=2,
)


def random_params(config, seed=0, dtype="float64"):
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(shape) * (0.3 if len(shape) > 1 else 1.0)).astype(dtype)
        for name, shape in mc.param_shapes(config).items()
    }


def images_for(config, B=3, seed=5, dtype="float64"):
    shape = (B, config.in_chans, *config.image)
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def loss_and_grads(params, config, images, labels, **options):
    logits, cache = mc.convit_forward(images, params, config, **options)
    loss, cache_loss = mc.cross_entropy_forward(logits, labels)
    return loss, mc.convit_backward(mc.cross_entropy_backward(1.0, cache_loss), cache)


def count(config):
    return sum(int(np.prod(shape)) for shape in mc.param_shapes(config).values())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("convit_tiny", 5_710_512),
        ("convit_tiny_plus", 9_972_912),
        ("convit_small", 27_777_322),
        ("convit_small_plus", 48_979_882),
        ("convit_base", 86_540_040),
        ("convit_base_plus", 153_134_856),
    ],
)
def test_published_parameter_counts(name, parameters):
    assert count(mc.VARIANTS[name]) == parameters
    assert len(mc.param_shapes(mc.VARIANTS[name])) == 180


def test_mini32_has_about_300_thousand_parameters():
    assert 250_000 < count(mc.VARIANTS["convit_mini32"]) < 350_000


def test_every_convit_has_a_plain_twin():
    convits = [name for name in mc.VARIANTS if name.startswith("convit_")]
    assert len(convits) == 11
    for name in convits:
        twin = mc.VARIANTS[name.replace("convit", "vit")]
        assert twin == replace(mc.VARIANTS[name], local_up_to_layer=0)
        assert not any("gating_param" in key for key in mc.param_shapes(twin))


def test_initial_values():
    config = replace(mc.VARIANTS["convit_tiny32"], depth=3, local_up_to_layer=2)
    params = mc.init_params(replace(config, locality_strength=0.5), seed=3)
    assert list(params) == list(mc.param_shapes(config))
    assert {p.dtype.name for p in params.values()} == {"float32"}
    expected_rows = 0.5 * np.array([(-1, -1, -1), (-1, 1, -1), (1, -1, -1), (1, 1, -1)])
    bound = (3 * 4 * 4) ** -0.5
    for name, p in params.items():
        if name.startswith("patch_embed"):
            assert np.abs(p).max() <= bound
            assert np.abs(p).max() > 0.9 * bound
        elif name.endswith("pos_proj.weight"):
            np.testing.assert_array_equal(p, expected_rows)
        elif name.endswith("attn.v.weight"):
            np.testing.assert_array_equal(p, np.eye(192))
        elif "norm" in name or name.endswith(("gating_param", "bias")):
            np.testing.assert_array_equal(p, 0.0 if name.endswith("bias") else 1.0)
        else:
            assert p.std() == pytest.approx(0.02, rel=6 / np.sqrt(2 * p.size)), name
            assert abs(p.mean()) < 6 * 0.02 / np.sqrt(p.size), name


def test_initial_values_depend_on_the_seed_and_not_on_the_dtype():
    a, b = mc.init_params(SMALL, seed=1), mc.init_params(SMALL, seed=2)
    wide = mc.init_params(SMALL, seed=1, dtype="float64")
    assert not np.array_equal(a["head.weight"], b["head.weight"])
    for name, value in a.items():
        np.testing.assert_array_equal(value, wide[name].astype("float32"))


def test_a_head_count_without_a_square_root_is_refused_only_where_it_matters():
    odd = replace(SMALL, num_heads=3)
    with pytest.raises(mc.UserError, match="square number of heads"):
        mc.init_params(odd)
    mc.init_params(replace(odd, local_up_to_layer=0))
    logits, _ = mc.convit_forward(images_for(odd), random_params(odd), odd)
    assert logits.shape == (3, 5)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"img_size": 7}, "cannot be cut into patches"),
        ({"embed_dim": 13}, "cannot be split over 4 heads"),
        ({"depth": 0}, "depth must be"),
        ({"num_classes": 2.5}, "num_classes must be"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
        ({"mlp_ratio": 0.0}, "mlp_ratio"),
        ({"locality_strength": float("nan")}, "locality_strength"),
        ({"patch_size": (2, 3, 4)}, "patch_size must be"),
        ({"local_up_to_layer": -1}, "local_up_to_layer"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(change, sentence):
    with pytest.raises(mc.UserError, match=sentence):
        replace(SMALL, **change)


def test_configuration_survives_json():
    assert mc.ConViTConfig.from_dict(SMALL.to_dict()) == SMALL
    with pytest.raises(mc.UserError, match="unknown model setting 'widht'"):
        mc.ConViTConfig.from_dict({"widht": 3})


@pytest.mark.parametrize(
    ("change", "shape"),
    [({}, (3, 1, 6, 12)), ({}, (3, 2, 12, 6)), ({}, (2, 6, 12))],
)
def test_images_of_another_shape_are_refused(change, shape):
    with pytest.raises(mc.UserError, match="expects images of shape"):
        mc.convit_forward(np.zeros(shape), random_params(SMALL), SMALL)


def test_images_of_another_dtype_are_refused():
    images = images_for(SMALL).astype("uint8")
    with pytest.raises(mc.UserError, match="images are uint8"):
        mc.convit_forward(images, random_params(SMALL), SMALL)


def test_without_a_plain_block_the_head_reads_patch_0_and_the_class_token_nothing():
    config = replace(SMALL, local_up_to_layer=3)
    params, images = random_params(config), images_for(config)
    _, grads = loss_and_grads(params, config, images, np.array([0, 1, 4]))
    np.testing.assert_array_equal(grads["cls_token"], 0.0)
    changed = params | {"cls_token": params["cls_token"] + 1}
    np.testing.assert_array_equal(
        mc.convit_forward(images, params, config)[0], mc.convit_forward(images, changed, config)[0]
    )


def test_a_plain_vit_ignores_how_its_patches_are_arranged():
    """Without GPSA and without a position embedding a transformer sees a set of patches."""
    config = replace(SMALL, local_up_to_layer=0, use_pos_embed=False)
    params, images = random_params(config), images_for(config)
    turned = images.reshape(3, 2, 3, 2, 4, 3)[:, :, ::-1, :, ::-1].reshape(images.shape)
    a, b = (mc.convit_forward(x, params, config)[0] for x in (images, turned))
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
    local = replace(config, local_up_to_layer=2)
    a, b = (mc.convit_forward(x, random_params(local), local)[0] for x in (images, turned))
    assert np.abs(a - b).max() > 1e-3


def test_gradients_that_must_sum_to_zero():
    """Whatever joins the residual stream is read through a LayerNorm, blind to a common shift."""
    params, labels = random_params(SMALL), np.array([0, 1, 4])
    _, grads = loss_and_grads(params, SMALL, images_for(SMALL), labels)
    over_features = {"cls_token": -1, "pos_embed": -1, "patch_embed.proj.weight": 0}
    weights = ("attn.proj.weight", "fc2.weight", "head.weight")
    biases = ("attn.proj.bias", "embed.proj.bias", "fc2.bias", "head.bias")
    over_features |= {name: 0 for name in grads if name.endswith(weights + biases)}
    assert len(over_features) == 3 + 1 + 4 * 3 + 2
    for name, axis in over_features.items():
        norm = np.linalg.norm(grads[name])
        assert norm > 1e-6, name
        assert np.abs(grads[name].sum(axis=axis)).max() < 1e-12 * max(norm, 1), name


def test_the_mean_first_loss_is_that_of_nearly_uniform_guesses():
    """Logits start as N(0, 0.02^2 D): the expected loss is ln C plus half their variance about
    their mean. Averaged over every label, which takes out the noise of which one is drawn."""
    config = replace(mc.VARIANTS["convit_micro32"], depth=2, local_up_to_layer=1)
    every_label = np.full((8, 10), 0.1)
    losses = []
    for seed in range(20):
        images = images_for(config, 8, seed, "float32")
        logits, _ = mc.convit_forward(images, mc.init_params(config, seed), config)
        losses.append(float(mc.cross_entropy_forward(logits.astype("float64"), every_label)[0]))
    expected = 0.02**2 * config.embed_dim * (1 - 1 / 10) / 2
    excess, error = np.mean(losses) - log(10), np.std(losses, ddof=1) / np.sqrt(20)
    assert error < expected / 8
    assert abs(excess - expected) < 3 * error


# Randomness: a pure function of seed and counters.


def test_random_bits_follow_their_formula_in_python_integers():
    mask = 2**64 - 1

    def mix(bits):
        bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 & mask
        bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB & mask
        return bits ^ (bits >> 31)

    def expected(seed, *counters):
        for counter in counters:
            seed = mix(((seed ^ mix(counter + 1)) + 0x9E3779B97F4A7C15) & mask)
        return seed

    bits = random_bits(11, 2, np.arange(3), [[7], [2**40]])
    assert bits.dtype == np.uint64
    assert bits.tolist() == [[expected(11, 2, j, k) for j in range(3)] for k in (7, 2**40)]


def test_uniform_is_uniform_in_every_counter():
    u = uniform(5, np.arange(300)[:, None], np.arange(400))
    assert u.dtype == np.float32
    assert 0 <= u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    assert abs(u.mean() - 0.5) < 5 / np.sqrt(12 * u.size)
    histogram, _ = np.histogram(u, 64)
    chi2 = ((histogram - u.size / 64) ** 2 / (u.size / 64)).sum()
    assert chi2 < 63 + 5 * np.sqrt(2 * 63)
    for neighbour in (u[1:] * u[:-1], u[:, 1:] * u[:, :-1]):
        assert abs(neighbour.mean() - 0.25) < 5 * 0.22 / np.sqrt(neighbour.size)
    assert len(np.unique(random_bits(5, np.arange(300)[:, None], np.arange(400)))) == u.size


def test_drop_path_masks_do_not_depend_on_how_the_batch_is_cut():
    config = replace(SMALL, drop_path_rate=0.5)
    images = images_for(config, 64)
    for i in (1, 2):
        whole, keep_prob = drop_path_masks(i, images, config, seed=4, step=9)
        assert keep_prob == 1 - 0.5 * i / 2
        first, second = (
            drop_path_masks(i, images[part], config, 4, 9, part.start)[0]
            for part in (slice(0, 24), slice(24, 64))
        )
        for branch in range(2):
            np.testing.assert_array_equal(
                whole[branch], np.concatenate([first[branch], second[branch]])
            )
        assert not np.array_equal(whole[0], whole[1])
        other, _ = drop_path_masks(i, images, config, seed=4, step=10)
        assert not np.array_equal(whole[0], other[0])
    assert drop_path_masks(0, images, config)[0] == (None, None)


def test_drop_path_acts_in_training_only():
    config = replace(SMALL, drop_path_rate=0.5)
    params, images = random_params(config), images_for(config, 16)
    plain = mc.convit_forward(images, params, config)[0]
    same = mc.convit_forward(images, params, SMALL, train=True)[0]
    dropped = mc.convit_forward(images, params, config, train=True, seed=1, step=2)[0]
    again = mc.convit_forward(images, params, config, train=True, seed=1, step=2)[0]
    np.testing.assert_array_equal(plain, same)
    np.testing.assert_array_equal(dropped, again)
    assert np.abs(dropped - plain).max() > 0.01


def test_a_cache_serves_one_backward():
    params, images = random_params(SMALL), images_for(SMALL)
    logits, cache = mc.convit_forward(images, params, SMALL)
    mc.convit_backward(np.ones_like(logits), cache)
    with pytest.raises(mc.UserError, match="run convit_forward again"):
        mc.convit_backward(np.ones_like(logits), cache)


def test_the_blocks_that_ran_forward_run_backward():
    """Four functions are all that takes the place of the blocks; each block calls its own pair."""
    calls = []

    def noted(name):
        return lambda *args: calls.append(name) or getattr(layers, name)(*args)

    names = ("block_forward", "last_block_forward", "last_block_backward", "block_backward")
    blocks = SimpleNamespace(**{name: noted(name) for name in names})
    params, images, labels = random_params(SMALL), images_for(SMALL), np.array([0, 3, 1])
    loss, grads = loss_and_grads(params, SMALL, images, labels, blocks=blocks)
    assert calls == [n for name in names for n in [name] * (1 if "last" in name else 2)]
    true_loss, true_grads = loss_and_grads(params, SMALL, images, labels)
    assert loss == true_loss
    assert all(np.array_equal(grads[name], true_grads[name]) for name in true_grads)


def test_without_caches_the_logits_are_the_same_and_there_is_no_backward():
    params, images = random_params(SMALL), images_for(SMALL)
    logits, cache = mc.convit_forward(images, params, SMALL, keep_caches=False)
    np.testing.assert_array_equal(logits, mc.convit_forward(images, params, SMALL)[0])
    with pytest.raises(mc.UserError, match="keep_caches was False"):
        mc.convit_backward(np.ones_like(logits), cache)


@pytest.mark.parametrize(
    ("name", "value"),
    [("head.bias", np.zeros(1)), ("norm.weight", np.float64(1.0)), ("pos_embed", None)],
)
def test_parameters_that_would_broadcast_or_are_missing_are_refused(name, value):
    config = mc.VARIANTS["convit_micro32"]
    params = mc.init_params(config, dtype="float64")
    params |= {name: value} if value is not None else {}
    if value is None:
        del params[name]
    with pytest.raises(mc.UserError, match=re.escape(name)):
        mc.convit_forward(np.zeros((1, 3, 32, 32)), params, config)
