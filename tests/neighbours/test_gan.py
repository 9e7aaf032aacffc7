"""ViTGAN: its pairs and both networks against autograd, its augmentation, and its experiment."""

import json

import numpy as np
import pytest
from golden_cases import assert_equal, load_case

from miniconvit import layers
from miniconvit.errors import UserError
from miniconvit.neighbours import (
    critic_backward,
    critic_forward,
    diffaugment_backward,
    diffaugment_forward,
    modulated_linear_backward,
    modulated_linear_forward,
    modulated_norm_backward,
    modulated_norm_forward,
    spectral_norms_backward,
    spectral_norms_forward,
)
from miniconvit.neighbours.gan import (
    ATTENTIONS,
    GANConfig,
    augmentation,
    gan_shapes,
    init_gan,
    latents,
    spectral_names,
)
from miniconvit.training.objectives import Adversarial


def config_of(case):
    return GANConfig.from_dict(json.loads(case.config.item()))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_critic_equals_autograd(attention):
    case = load_case(f"critic_{attention}")
    images = case.inputs.pop("images")
    y, cache = critic_forward(images, case.inputs, config_of(case))
    assert_equal(y, case.y)
    dimages, grads = critic_backward(case.dy, cache)
    assert grads.keys() == case.inputs.keys()
    for name, grad in (grads | {"images": dimages}).items():
        assert_equal(grad, case.grad[name])


def test_a_step_of_both_networks_equals_autograd():
    """The generator's gradient goes through critic and augmentation; each loss is its own."""
    case = load_case("adversarial")
    objective = Adversarial(config_of(case))
    batch = case.images, case.z
    losses, grads = objective.step(batch, case.inputs, 1.0, 0, 0, int(case.step), layers)
    assert_equal(np.array(losses), case.losses)
    assert grads.keys() == case.inputs.keys() == gan_shapes(objective.config).keys()
    for name, grad in grads.items():
        assert_equal(grad, case.grad[name])


def test_what_modulates_equals_autograd():
    case = load_case("modulated_norm")
    x, w = (case.inputs.pop(name) for name in ("x", "w"))
    y, cache = modulated_norm_forward(x, w, case.inputs)
    assert_equal(y, case.y)
    dx, dw, grads = modulated_norm_backward(case.dy, cache)
    for name, grad in (grads | {"x": dx, "w": dw}).items():
        assert_equal(grad, case.grad[name])
    case = load_case("modulated_linear")
    y, cache = modulated_linear_forward(**case.inputs)
    assert_equal(y, case.y)
    for name, grad in zip(
        ("x", "a", "weight"), modulated_linear_backward(case.dy, cache), strict=True
    ):
        assert_equal(grad, case.grad[name])


SIZE = 16, 24


def drawn(n=64, dtype="float64"):
    numbers = augmentation(5, 2, np.arange(n), SIZE)
    return numbers[0], *(x.astype(dtype) for x in numbers[1:])


def test_the_augmentations_backward_is_its_adjoint():
    """<A x, y> = <x, A^T y>, where A is what is left without the brightness."""
    rng = np.random.default_rng(0)
    numbers = drawn()
    linear = numbers[0], 0.0 * numbers[1], numbers[2]
    x, y = rng.standard_normal((2, 64, *SIZE, 3))
    ahead, cache = diffaugment_forward(x, linear)
    back = diffaugment_backward(y, cache)
    assert (ahead * y).sum() == pytest.approx((x * back).sum(), rel=1e-12)
    bright, cache = diffaugment_forward(x, numbers)
    assert np.array_equal(diffaugment_backward(y, cache), back)
    assert not np.allclose(bright, ahead)


def test_what_the_augmentation_draws():
    shift, brightness, kept = drawn(4000)
    moved, lit, cut = (shift != 0).any(axis=1), brightness != 0, (kept == 0).any(axis=(1, 2))
    assert pytest.approx(moved.mean(), abs=0.04) == 0.8 * (1 - 1 / 35)  # or moved by nothing
    assert lit.mean() == pytest.approx(0.8, abs=0.04) == pytest.approx(cut.mean(), abs=0.04)
    assert np.abs(shift).max(axis=0).tolist() == [2, 3]
    assert -0.5 <= brightness.min() < -0.49 and 0.49 < brightness.max() < 0.5
    boxes = (kept == 0)[..., 0]
    assert boxes.any(axis=2).sum(axis=1).max() == 4 and boxes.any(axis=1).sum(axis=1).max() == 6
    assert boxes.any(axis=0).all()  # there is no pixel that is never cut out
    again = augmentation(5, 2, np.arange(10, 20), SIZE)
    assert all(np.array_equal(a, b[10:20]) for a, b in zip(again, drawn(64, "f"), strict=True))
    assert not np.array_equal(augmentation(5, 3, np.arange(10), SIZE)[0], shift[:10])


def test_an_image_is_moved_and_cut_as_the_numbers_say():
    image = np.random.default_rng(1).standard_normal((1, *SIZE, 3))
    shift, kept = np.array([[2, -1]]), np.ones((1, *SIZE, 1))
    kept[0, 4:8, 5:9] = 0.0
    y, _ = diffaugment_forward(image, (shift, np.zeros((1, 1, 1, 1)), kept))
    expected = np.zeros_like(image)
    expected[:, 2:, :-1] = image[:, :-2, 1:]
    np.testing.assert_allclose(y, expected * kept, atol=1e-15)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weights_get_the_norm_that_they_are_told(dtype):
    config = GANConfig(img_size=8, embed_dim=8, depth=1)
    params = {name: 3 * p.astype(dtype) for name, p in init_gan(config, 0).items()}
    norms = {name: 0.5 + i for i, name in enumerate(spectral_names(config))}
    assert len(norms) == 2 + 4  # patches, head, and four in the block
    replaced, caches = spectral_norms_forward(params, norms)
    grads = spectral_norms_backward(replaced, caches)
    for name, value in replaced.items():
        assert value.dtype == grads[name].dtype == dtype
        if name in norms:
            sigma = np.linalg.norm(value.reshape(len(value), -1), 2)
            assert sigma == pytest.approx(norms[name], rel=1e-5)
            along = (grads[name] * params[name]).sum()  # no length of a weight has any effect
            assert abs(along) < 1e-5 * (params[name] ** 2).sum()
        else:
            assert value is params[name]


def test_a_step_in_float32_stays_there():
    objective = Adversarial(GANConfig(img_size=8, embed_dim=8, depth=1))
    params = init_gan(objective.config, 0)
    z = latents(0, 0, np.arange(3), objective.config)
    images = np.random.default_rng(0).uniform(-1, 1, (3, 8, 8, 3)).astype("float32")
    losses, grads = objective.step((images, z), params, 0.5, 0, 0, 0, layers)
    found = {name: value.dtype.name for name, value in grads.items()}
    assert set(found.values()) == {"float32"} and losses[0].dtype == losses[1].dtype == "float32"
    assert objective.answer((z,), params, layers).dtype == "float32"


def test_a_configuration_from_a_file_is_checked():
    good = GANConfig(img_size=(8, 12))
    assert GANConfig.from_dict(json.loads(json.dumps(vars(good)))) == good
    for wrong in ({"attention": "kim"}, {"depth": 0}, {"patch_size": 3}, {"x": 1},
                  {"img_size": 10}, {"embed_dim": 10}):  # fmt: skip
        with pytest.raises(UserError):
            GANConfig.from_dict(vars(GANConfig()) | wrong)
