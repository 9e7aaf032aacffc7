"""AdamW against its formula, clipping, and the published learning rates."""

from copy import deepcopy

import numpy as np
import pytest

import miniconvit as mc

# AdamW's ten losses on a whole model are compared with another implementation in
# test_timm_golden.py; here the parts that a model's losses hardly show.


def test_one_tensor_by_hand():
    lr, decay, (b1, b2), eps = 0.1, 0.3, (0.8, 0.95), 0.01
    params = {"w": np.array([[2.0, -1.0]])}
    optimizer = mc.AdamW(params, lr, decay, (b1, b2), eps)
    value, m, v = params["w"].copy(), 0.0, 0.0
    for t, g in enumerate([np.array([[0.5, -3.0]]), np.array([[-1.0, 2.0]]), np.zeros((1, 2))], 1):
        optimizer.step(params, {"w": g})
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        update = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        value = value - lr * decay * value - lr * update
        np.testing.assert_allclose(params["w"], value, rtol=1e-14)


def test_what_is_decayed():
    config = mc.ConViTConfig(img_size=8, embed_dim=8, depth=2, local_up_to_layer=1, qkv_bias=True)
    params = {name: np.ones(shape) for name, shape in mc.param_shapes(config).items()}
    zeros = {name: np.zeros_like(p) for name, p in params.items()}
    mc.AdamW(params, weight_decay=0.5).step(params, zeros, lr=0.1)
    decayed = {name for name, p in params.items() if p.flat[0] != 1}
    assert {params[name].flat[0] for name in decayed} == {0.95}
    weights = ("qk", "v", "proj", "pos_proj", "qkv", "fc1", "fc2", "head", "patch_embed.proj")
    assert decayed == {
        name
        for name in params
        if name.endswith(".weight") and name.rsplit(".", 1)[0].endswith(weights)
    }
    assert len(decayed) == 1 + 4 + 2 + 2 + 2 + 1


def test_a_rate_for_one_step_replaces_the_usual_one():
    a, b = {"w": np.ones(3)}, {"w": np.ones(3)}
    mc.AdamW(a, lr=0.5).step(a, {"w": np.ones(3)})
    mc.AdamW(b, lr=99.0).step(b, {"w": np.ones(3)}, lr=0.5)
    np.testing.assert_array_equal(a["w"], b["w"])


def test_float32_stays_float32():
    params = {"w": np.ones((2, 2), "f4")}
    optimizer = mc.AdamW(params)
    optimizer.step(params, {"w": np.ones((2, 2), "f4")})
    for array in (params["w"], optimizer.exp_avg["w"], optimizer.exp_avg_sq["w"]):
        assert array.dtype == np.float32


WRONG_GRADIENTS = {
    "missing": lambda g: {"w": g["w"]},
    "None": lambda g: g | {"b": None},
    "a number": lambda g: g | {"b": 0.5},
    "a list": lambda g: g | {"b": g["b"].tolist()},
    "one for all": lambda g: g | {"b": g["b"][:1]},
    "a scalar array": lambda g: g | {"b": g["b"].sum()},
    "a row for each": lambda g: g | {"w": g["w"][0]},
    "transposed": lambda g: g | {"w": g["w"].T},
    "one for each image": lambda g: g | {"b": np.stack([g["b"]] * 2)},
    "integers": lambda g: g | {"b": np.ones(3, int)},
    "complex": lambda g: g | {"b": g["b"] + 0j},
    "objects": lambda g: g | {"b": g["b"].astype(object)},
    "misspelt": lambda g: {"w": g["w"], "b": g["b"], "bais": g["b"]},
}


@pytest.mark.parametrize("wrong", WRONG_GRADIENTS.values(), ids=WRONG_GRADIENTS)
def test_a_gradient_that_does_not_fit_is_refused_before_anything_changes(wrong):
    rng = np.random.default_rng(0)
    params = {"w": rng.standard_normal((2, 3)), "b": rng.standard_normal(3)}
    grads = {name: rng.standard_normal(p.shape) for name, p in params.items()}
    optimizer = mc.AdamW(params)
    optimizer.step(params, grads)
    before = deepcopy((params, vars(optimizer)))
    with pytest.raises(mc.UserError, match=r"gradient of '?(w|b)"):
        optimizer.step(params, wrong(grads))
    np.testing.assert_equal((params, vars(optimizer)), before)
    optimizer.step(params, grads)


def test_parameters_that_are_not_the_optimizers_own_are_refused():
    params = {"w": np.ones((2, 3)), "b": np.ones(3)}
    grads = {name: np.ones_like(p) for name, p in params.items()}
    read_only = np.broadcast_to(np.ones(3), (2, 3))
    for other in ({"v": np.ones(3)}, {"w": np.ones((3, 3))}, {"w": np.ones((2, 3), int)},
                  {"w": read_only}):  # fmt: skip
        optimizer = mc.AdamW(params)
        with pytest.raises(mc.UserError, match=r"^(this optimizer.* v|w )"):
            optimizer.step(other, grads)
        assert optimizer.step_count == 0


def test_a_part_of_the_parameters_may_be_updated_alone():
    """So a frozen model trains, and so processes share an update."""
    params = {"w": np.ones((2, 3)), "b": np.ones(3)}
    grads = {name: np.ones_like(p) for name, p in params.items()}
    mc.AdamW(params).step({"b": params["b"]}, grads)
    assert (params["w"] == 1).all() and (params["b"] < 1).all()


def test_float64_gradients_of_float32_parameters_are_right():
    a, b = ({"w": np.ones(3, "f4")} for _ in range(2))
    mc.AdamW(a).step(a, {"w": np.full(3, 0.5)})
    mc.AdamW(b).step(b, {"w": np.full(3, 0.5, "f4")})
    np.testing.assert_allclose(a["w"], b["w"], rtol=1e-7)


@pytest.mark.parametrize(("max_norm", "scale"), [(13.0, 1.0), (20.0, 1.0), (6.5, 0.5)])
def test_clipping_scales_all_gradients_alike(max_norm, scale):
    grads = {"a": np.array([3.0, 4.0]), "b": np.array([[12.0]])}
    assert mc.clip_grad_norm(grads, max_norm) == pytest.approx(13.0)
    np.testing.assert_allclose(grads["a"], scale * np.array([3.0, 4.0]))
    np.testing.assert_allclose(grads["b"], scale * 12)


def test_the_official_learning_rates():
    """As the official script steps them: epoch e trains at f(e - 1), and epoch 0 at f(0)."""
    published = [1e-6, 1e-6, 2.008e-4, 4.006e-4, 6.004e-4, 8.002e-4, 9.993216e-4, 9.990232e-4]
    published = dict(enumerate(published)) | {
        50: 9.362508e-4,
        100: 7.569755e-4,
        150: 5.101835e-4,
        200: 2.620026e-4,
        250: 7.893270e-5,
        299: 1.010856e-5,
    }
    for epoch, rate in published.items():
        stepped = mc.warmup_cosine(max(epoch - 1, 0), total=300, peak=1e-3, warmup=5)
        assert stepped == pytest.approx(rate, rel=5e-7)


def test_after_the_end_the_rate_stays_at_its_minimum():
    assert mc.warmup_cosine(11.0, 10, 1.0, 2, minimum=0.25) == pytest.approx(0.25)


def test_without_warmup_the_rate_starts_at_the_peak():
    assert mc.warmup_cosine(0, 10, 0.3, 0) == pytest.approx(0.3)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan")])
def test_a_limit_that_would_turn_gradients_round_is_refused(max_norm):
    grads = {"a": np.ones(3)}
    with pytest.raises(mc.UserError, match="max_norm must be above 0"):
        mc.clip_grad_norm(grads, max_norm)
    np.testing.assert_array_equal(grads["a"], 1.0)


def test_no_gradients_have_norm_zero():
    assert mc.clip_grad_norm({}, 1.0) == 0.0


@pytest.mark.parametrize(
    "rates",
    [{"lr": -1.0}, {"lr": np.nan}, {"weight_decay": -0.1}, {"eps": -1.0}, {"betas": (0.9, 1.0)},
     {"betas": (1.5, 0.9)}, {"betas": (0.9,)}],
)  # fmt: skip
def test_rates_that_cannot_train_are_refused(rates):
    with pytest.raises(mc.UserError, match=next(iter(rates))):
        mc.AdamW({"a": np.ones(3)}, **rates)
