"""Patch Diversification: its losses, how they enter a model, and runs that train by them."""

import json
from pathlib import Path

import numpy as np
import pytest
from golden_cases import assert_equal, load_case
from small_run import FLAGS, small_dataset, stop_after
from with_numba import needs_numba

import miniconvit as mc
from miniconvit import layers, neighbours
from miniconvit.checkpoints.checkpoint import load_checkpoint
from miniconvit.data import draw_patch_mix, mix_images, mix_patch_labels
from miniconvit.engine import Classification, make_engine
from miniconvit.engine.cpu import cpu_blocks
from miniconvit.neighbours.diversity import PatchHeadConfig, Taps, without_patch_head
from miniconvit.training import run as run_module
from miniconvit.training.objectives import Diversified

FIRST = np.sin(np.arange(72.0)).reshape(3, 6, 4)
LABELS = np.arange(18).reshape(3, 6) % 5
BOTH = [
    pytest.param(layers, id="layers"),
    pytest.param(cpu_blocks(), id="kernels", marks=needs_numba),
]


@pytest.mark.parametrize(
    ("name", "more"), [("cosine", ()), ("contrastive", (FIRST,)), ("patch_mixing", (LABELS,))]
)
def test_losses_equal_autograd(name, more):
    case = load_case(name)
    forward, backward = (getattr(neighbours, f"{name}_{way}") for way in ("forward", "backward"))
    y, cache = forward(*case.inputs.values(), *more)
    assert_equal(y, case.y)
    grads = backward(float(case.dy), cache)
    for grad, expected in zip(np.atleast_1d([grads]) if name != "patch_mixing" else grads,
                              case.grad.values(), strict=True):  # fmt: skip
        assert_equal(grad, expected)


@pytest.mark.parametrize("blocks", BOTH)
@pytest.mark.parametrize("local", [0, 2, 3])
def test_whole_models_with_all_losses_equal_timm_and_autograd(local, blocks):
    case = load_case(f"diversified_{local}")
    config = PatchHeadConfig(**json.loads(case.config.item()))
    objective = Diversified(config, 0.0, *json.loads(case.weights.item()))
    batch = case.images, case.targets, case.patch_labels
    (loss, _), grads = objective.step(batch, case.inputs, 1.0, 0, 0, 0, blocks)
    assert_equal(loss, case.loss)
    assert grads.keys() == objective.shapes.keys() == case.grad.keys()
    for name, grad in grads.items():
        if name.endswith("pos_proj.bias"):  # 0, where autograd has round-off
            assert np.abs(grad).max() < 1e-12
        else:
            assert_equal(grad, case.grad[name])
    taps = Taps(blocks, config.num_patches)
    mc.convit_forward(case.images, case.inputs, config, blocks=taps)
    found = [neighbours.cosine_forward(h)[0] for h in taps.tokens]
    np.testing.assert_allclose(found, case.similarities, rtol=1e-10)


@needs_numba
def test_float32_kernels_give_the_same_up_to_rounding():
    """The last block runs for all tokens there, which plain training never asks of it."""
    case = load_case("diversified_2")
    objective = Diversified(PatchHeadConfig(**json.loads(case.config.item())), 0.0, 1.0, 1.0, 1.0)
    batch = case.images.astype("float32"), case.targets, case.patch_labels
    params = {name: value.astype("float32") for name, value in case.inputs.items()}
    (ours, _), grads = objective.step(batch, params, 1.0, 0, 0, 0, cpu_blocks())
    (loss, _), expected = objective.step(batch, params, 1.0, 0, 0, 0, layers)
    assert grads["head.bias"].dtype == np.float32 and ours == pytest.approx(loss, rel=1e-5)
    for name, grad in grads.items():
        size = np.linalg.norm(expected[name]) + 1e-4
        assert np.linalg.norm(grad - expected[name]) < 1e-4 * size, name


def test_without_weights_it_is_classification_to_the_bit():
    config = mc.VARIANTS["convit_micro32"]
    rng = np.random.default_rng(0)
    images = rng.standard_normal((4, 3, 32, 32), dtype="float32")
    batch, params = (images, np.array([1, 2, 3, 3])), mc.init_params(config)
    ours, theirs = (
        objective.step(batch, params, 0.5, 0, 0, 0, layers)
        for objective in (Diversified(config), Classification(config))
    )
    assert ours[0] == theirs[0]
    assert all(np.array_equal(ours[1][name], theirs[1][name]) for name in params)


def test_any_number_of_workers_gives_the_same_bits():
    config = PatchHeadConfig(**mc.VARIANTS["convit_micro32"].to_dict())
    objective = Diversified(config, 0.1, 1.0, 1.0, 1.0)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((70, 3, 32, 32), dtype="float32")
    batch = images, rng.integers(10, size=70), rng.integers(10, size=(70, 64))
    params = neighbours.models.MODELS[PatchHeadConfig].init(config, 0)

    def load(start, stop):
        return tuple(x[start:stop] for x in batch)

    found = []
    for count in (1, 3):
        with make_engine(objective, np, count) as engine:
            *numbers, grads = engine.loss_and_grads(load, 70, params, 0, 3)
            found.append((numbers, {name: grad.copy() for name, grad in grads.items()}))
    assert found[0][0] == found[1][0]
    assert all(np.array_equal(found[0][1][name], found[1][1][name]) for name in params)


def test_boxes_fall_on_the_borders_of_patches_and_labels_follow_the_pixels():
    grid, patch = (4, 3), (2, 5)
    for step in range(40):
        mix = draw_patch_mix(7, step, grid, patch)
        images = mix_images(np.zeros((2, 1, 8, 15)), np.ones((2, 1, 8, 15)), mix)
        labels = mix_patch_labels(np.array([0, 0]), np.array([1, 1]), mix, grid, patch)
        pixels = images[:, 0].reshape(2, 4, 2, 3, 5).swapaxes(2, 3)
        assert np.array_equal(pixels.min(axis=(3, 4)), pixels.max(axis=(3, 4)))
        assert np.array_equal(pixels[..., 0, 0].reshape(2, 12), labels)
        assert mix.share == pytest.approx(1 - labels.mean())
    assert len({draw_patch_mix(7, step, grid, patch) for step in range(40)}) > 5


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(run_module, "load_dataset", small_dataset)
    monkeypatch.chdir(tmp_path)
    return monkeypatch


LOSSES = ["--cosine", "0.5", "--contrastive", "1", "--patch-mixing", "1", "--epochs", "1"]


@pytest.mark.parametrize("model", ["convit_micro32", "vit_micro32"])
def test_a_run_is_recorded_and_resumes_to_the_bit(small, program, model):
    flags = [*FLAGS, *LOSSES, "--model", model, "--ema", "0.9"]
    assert program("train", *flags, "--workers", 1, "--out", "whole")[0] == 0
    with small.context() as patch:
        stop_after(patch, 4)
        assert program("train", *flags, "--workers", 2, "--out", "cut")[0] == 130
    assert program("train", "--resume", "--out", "cut")[0] == 0
    for name in ("last.safetensors", "best.safetensors"):
        with open(f"whole/{name}", "rb") as whole, open(f"cut/{name}", "rb") as cut:
            assert whole.read() == cut.read()
    stored = json.loads(Path("cut/config.json").read_text())
    assert stored["settings"]["patch_mixing"] == 1.0
    assert stored["model"]["kind"] == "convit_patch_head"
    found = load_checkpoint("cut/last.safetensors")
    assert found.config == PatchHeadConfig(**found.config.to_dict())
    head = found.params["patch_head.weight"]
    assert np.abs(head - neighbours.models.MODELS[PatchHeadConfig].init(found.config, 3)[
        "patch_head.weight"]).max() > 1e-4  # fmt: skip
    params, config = without_patch_head(found.params, found.config)
    assert config == mc.ConViTConfig(**found.config.to_dict())
    assert params.keys() == mc.param_shapes(config).keys()
    status, _, err = program("train", "--resume", "--cosine", "1", "--out", "cut")
    assert status == 2 and "began with --cosine 0.5 and cannot go on with --cosine 1" in err


def test_commands_for_convit_take_the_convit_out(small, program, tmp_path):
    assert program("train", *FLAGS, "--patch-mixing", "1", "--epochs", "1", "--out", "a")[0] == 0
    status, _, err = program("export", "a", tmp_path / "timm.safetensors")
    assert status == 0, err
    flags = [*FLAGS, "--epochs", "1", "--init-from", "a", "--out", "b"]
    assert program("train", *flags)[0] == 0
    assert type(load_checkpoint("b/last.safetensors").config) is mc.ConViTConfig


def test_two_ways_of_mixing_are_refused(small, program):
    status, _, err = program("train", *FLAGS, "--patch-mixing", "1", "--cutmix", "1")
    assert status == 2 and "add --mixup 0 --cutmix 0" in err and err.count("\n") == 1
