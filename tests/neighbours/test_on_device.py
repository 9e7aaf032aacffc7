"""The papers beside ConViT on the stand-in for CuPy: the same numbers, on the device."""

import fakecuda
import fakecupy
import numpy as np
import pytest

import miniconvit as mc
from miniconvit import layers, neighbours
from miniconvit.arrays import to_cpu, to_device
from miniconvit.engine import Classification, classification, make_engine
from miniconvit.engine.gpu import DeviceEngine
from miniconvit.experiments import lipschitz
from miniconvit.neighbours.cmt import CMTConfig
from miniconvit.neighbours.gan import GANConfig, augmentation, latents, spectral_names
from miniconvit.neighbours.isotropic import MIXERS, IsotropicConfig, hidden_patches
from miniconvit.neighbours.mobile import READOUTS, MobileConfig, init_mobile
from miniconvit.neighbours.models import MODELS
from miniconvit.optim import AdamW, is_running
from miniconvit.training.objectives import Adversarial, Diversified, Masked


def both(cupy, function, *arrays):
    """What a function of arrays gives on the device, and on the CPU."""
    there = function(*to_device(arrays, cupy))
    return to_cpu(there), function(*arrays)


def assert_alike(ours, theirs):
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        ours, theirs = tuple(ours.values()), tuple(theirs.values())
    if isinstance(ours, tuple | list):
        for a, b in zip(ours, theirs, strict=True):
            assert_alike(a, b)
    else:
        largest = np.abs(theirs).max(initial=0.0)  # sums that cancel have the error of their terms
        np.testing.assert_allclose(ours, theirs, rtol=0.0, atol=1e-7 + 1e-5 * largest)


def objectives():
    model = {"img_size": 8, "embed_dim": 16, "depth": 2, "local_up_to_layer": 1}
    yield Diversified(neighbours.diversity.PatchHeadConfig(**model), 0.1, 1.0, 1.0, 1.0)
    for mixer in MIXERS:
        yield Masked(IsotropicConfig(mixer, img_size=8, embed_dim=16, depth=2))
    stages = {"embed_dims": (6, 8), "depths": (1, 2), "num_heads": (1, 2), "sr_ratios": (2, 1)}
    yield classification(CMTConfig(8, **stages), 0.1)


@pytest.mark.parametrize(
    "objective", [*objectives()], ids=lambda o: getattr(o.config, "mixer", type(o).__name__)
)
def test_a_step_is_the_same_on_the_device(cupy, objective):
    rng = np.random.default_rng(0)
    params = MODELS[type(objective.config)].init(objective.config, 0)
    images = rng.standard_normal((3, 3, 8, 8), dtype="float32")
    batch = images, np.array([1, 0, 2]), np.array([[1, 0, 2, 2]] * 3)
    batch = batch[: len(objective.inputs)]
    if isinstance(objective, Masked):
        batch = images, hidden_patches(0, 0, np.arange(3), 4)
        mask, expected = both(cupy, lambda x: hidden_patches(0, 0, x, 4), np.arange(3))
        assert np.array_equal(mask, expected)

    def step(batch, params):
        return objective.step(batch, params, 0.5, 0, 0, 0, layers)

    assert_alike(*both(cupy, step, batch, params))
    if isinstance(objective, Classification):
        assert_alike(*both(cupy, lambda b, p: objective.answer(b, p, layers), batch, params))


@pytest.mark.parametrize("attention", ["dot", "l2"])
def test_a_step_of_both_networks_is_the_same_on_the_device(cupy, attention):
    config = GANConfig(attention, img_size=(8, 16), embed_dim=16, depth=2)
    params, rng = MODELS[GANConfig].init(config, 0), np.random.default_rng(0)
    images = rng.uniform(-1, 1, (3, 8, 16, 3)).astype("float32")
    norms = dict.fromkeys(spectral_names(config), 1.5)

    def step(images, places, params):
        replaced, caches = neighbours.spectral_norms_forward(params, norms)
        z = latents(0, 1, places, config)
        losses, grads = Adversarial(config).step((images, z), replaced, 0.5, 4, 0, 1, layers)
        drawn = Adversarial(config).answer((z,), params, layers)
        numbers = augmentation(0, 1, places, config.image)
        return losses, neighbours.spectral_norms_backward(grads, caches), drawn, z, numbers

    assert_alike(*both(cupy, step, images, np.arange(3), params))


@pytest.mark.parametrize("name", ["tied", "kim"])
def test_attention_by_distance_is_the_same_on_the_device(cupy, name):
    params, rays = lipschitz.draw(0)
    forward, backward = (
        getattr(neighbours, f"{name}_attention_{w}") for w in ("forward", "backward")
    )

    def run(x, params):
        y, cache = forward(x, params, lipschitz.HEADS)
        return y, backward(y, cache)

    assert_alike(*both(cupy, run, rays["null"][1], params["tied"]))


def test_similarities_and_the_names_of_gpus_are_there(cupy):
    config = mc.ConViTConfig(img_size=8, embed_dim=16, depth=2, local_up_to_layer=1)
    images = np.random.default_rng(0).standard_normal((3, 3, 8, 8), dtype="float32")
    run = neighbours.diversity.similarities
    ours, theirs = both(cupy, lambda x, p: run(x, p, config), images, mc.init_params(config))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.skipif(not fakecuda.COMPILER, reason=fakecuda.REASON)
def test_a_gpu_trains_running_statistics_and_takes_a_batch_as_one_piece(cupy):
    config = CMTConfig(8, embed_dims=(6, 8), depths=(1, 1), num_heads=(1, 2), sr_ratios=(2, 1))
    objective, rng = classification(config, 0.1), np.random.default_rng(0)
    batch = rng.standard_normal((70, 3, 8, 8), dtype="float32"), np.arange(70) % 10
    params = MODELS[CMTConfig].init(config, 0)
    here, there = (to_device(params, xp) for xp in (np, cupy))
    here = {name: value.copy() for name, value in here.items()}
    images, labels = to_device(batch, cupy)
    optimizers = [mc.AdamW(tensors, 1e-2) for tensors in (here, there)]
    _, grads = objective.step(batch, here, 1.0, 0, 0, 0, layers)
    with make_engine(objective, cupy) as engine:
        engine.hold(there, optimizers[1])
        *_, found = engine.loss_and_grads(lambda *_: (images, labels), 70, there)
        norm = engine.clip(found, 0.1)
        engine.update(optimizers[1], there, found)
        logits = engine.logits(lambda start, stop: images[start:stop], 70, there)
    assert norm.item() == pytest.approx(mc.clip_grad_norm(grads, 0.1), rel=1e-4)
    optimizers[0].step(here, grads)
    for name, grad in found.items():
        np.testing.assert_allclose(to_cpu(grad), grads[name], rtol=1e-3, atol=1e-5, err_msg=name)
        if is_running(name):
            np.testing.assert_allclose(to_cpu(there[name]), here[name], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logits, objective.answer(batch, to_cpu(there), layers), atol=1e-4)


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("stem", ["patches", "conv"])
def test_a_mobile_transformer_is_the_same_on_the_device(cupy, stem, readout):
    config = MobileConfig(stem, readout, (2, 4), 16, embed_dim=16, depth=2)
    images = np.random.default_rng(0).standard_normal((3, 3, 16, 16), dtype="float32")

    def run(images, params):
        evaluated, _ = neighbours.mobile_forward(images, params, config)
        logits, cache = neighbours.mobile_forward(images, params, config, True)
        return evaluated, logits, neighbours.mobile_backward(logits, cache)

    assert_alike(*both(cupy, run, images, init_mobile(config)))


@pytest.mark.skipif(not fakecuda.COMPILER, reason=fakecuda.REASON)
@pytest.mark.parametrize("readout", READOUTS)
def test_the_engine_for_a_gpu_trains_a_mobile_transformer_by_its_kernels(
    cupy, monkeypatch, readout
):
    monkeypatch.setattr(fakecupy.RawModule, "LANES", 32)
    config = MobileConfig("conv", readout, (2, 4), 16, embed_dim=16, depth=2)
    objective, params = classification(config, 0.1), init_mobile(config)
    rng = np.random.default_rng(0)
    batch = rng.standard_normal((6, 3, 16, 16), dtype="float32"), np.arange(6)

    def steps(engine, xp):
        mine, load = to_device((params, batch), xp)
        mine = {name: value.copy() for name, value in mine.items()}
        optimizer = AdamW(mine, lr=1e-2)
        engine.hold(mine, optimizer)
        for step in range(3):
            *numbers, grads = engine.loss_and_grads(
                lambda a, b: tuple(x[a:b] for x in load), 6, mine, 0, step
            )
            engine.update(optimizer, mine, grads)
        return to_cpu((numbers, mine, engine.logits(lambda a, b: load[0][a:b], 6, mine)))

    with DeviceEngine(objective, cupy) as there, make_engine(objective, np, 1) as here:
        ours, theirs = steps(there, cupy), steps(here, np)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-4)
    np.testing.assert_allclose(ours[2], theirs[2], rtol=1e-2, atol=1e-3)
    for name in filter(is_running, params):
        np.testing.assert_allclose(ours[1][name], theirs[1][name], rtol=1e-2, atol=1e-4)
