"""Four ways of mixing tokens: the networks, what they reconstruct, and the experiment's plan."""

import csv
import json

import numpy as np
import pytest
from golden_cases import assert_equal, load_case
from small_run import small_dataset

import miniconvit as mc
from miniconvit.checkpoints.checkpoint import load_checkpoint
from miniconvit.data import normalize
from miniconvit.engine import make_engine
from miniconvit.experiments import biases
from miniconvit.layers import gpsa_forward, mhsa_forward
from miniconvit.neighbours import isotropic_backward, isotropic_forward
from miniconvit.neighbours.isotropic import (
    GATES,
    IsotropicConfig,
    hidden_patches,
    init_isotropic,
    isotropic_shapes,
    masked_loss_forward,
    patches_of,
)
from miniconvit.training.interrupt import Interrupted
from miniconvit.training.objectives import Masked


@pytest.mark.parametrize("mixer", ["attention", "mlp", "conv", "gpsa"])
def test_whole_networks_equal_autograd(mixer):
    case = load_case(f"isotropic_{mixer}")
    config = IsotropicConfig(**json.loads(case.config.item()))
    y, cache = isotropic_forward(case.images, case.inputs, config, case.mask)
    assert_equal(y, case.y)
    grads = isotropic_backward(case.dy, cache)
    assert grads.keys() == isotropic_shapes(config).keys() == case.grad.keys()
    for name, grad in grads.items():
        if name.endswith(("pos_proj.bias", "mix.fc2.bias")):  # 0, where autograd has round-off
            assert np.abs(grad).max() < 1e-10 and np.abs(case.grad[name]).max() < 1e-10
        else:
            assert_equal(grad, case.grad[name])


def test_the_loss_is_the_mean_over_hidden_numbers_alone():
    rng = np.random.default_rng(0)
    images = rng.standard_normal((3, 2, 8, 8))
    patches = patches_of(images, 4)
    mask = hidden_patches(0, 0, np.arange(3), 4)
    predicted = rng.standard_normal(patches.shape)
    loss, _ = masked_loss_forward(predicted, patches, mask)
    assert loss == pytest.approx(((predicted - patches)[mask] ** 2).mean(), rel=1e-12)
    assert np.array_equal(patches[1, 2], images[1, :, 4:, :4].reshape(-1))


def test_half_of_the_patches_are_hidden_by_place_and_step_alone():
    mask = hidden_patches(3, 5, np.arange(40), 64)
    assert set(mask.sum(axis=1)) == {32}
    assert np.array_equal(hidden_patches(3, 5, np.arange(10, 20), 64), mask[10:20])
    assert len({row.tobytes() for row in mask}) == 40
    assert not np.array_equal(hidden_patches(3, 6, np.arange(40), 64), mask)
    shares = hidden_patches(3, 5, np.arange(4000), 64).mean(axis=0)
    assert np.abs(shares - 0.5).max() < 5 * 0.5 / 4000**0.5  # five deviations


@pytest.mark.parametrize("gate", GATES)
def test_the_gate_stands_where_the_dial_says_to_the_last_bit(gate):
    """At 0 GPSA is plain attention, at 1 it does not see the tokens' content."""
    rng = np.random.default_rng(1)
    params = init_isotropic(IsotropicConfig("gpsa", gate), 0)
    mix = {n.removeprefix("blocks.0.mix."): v for n, v in params.items() if "blocks.0.mix." in n}
    x = rng.standard_normal((2, 64, 64), dtype="float32")
    y, _ = gpsa_forward(x, mix, 4, (8, 8))
    qkv = {"qkv.weight": np.concatenate([mix["qk.weight"], mix["v.weight"]])}
    content, _ = mhsa_forward(x, qkv | {n: mix[n] for n in ("proj.weight", "proj.bias")}, 4)
    other, _ = gpsa_forward(x, mix | {"qk.weight": 3 * mix["qk.weight"]}, 4, (8, 8))
    assert np.allclose(y, content, rtol=0, atol=1e-6) == (gate == 0.0)
    assert np.array_equal(y, other) == (gate == 1.0)


def test_all_arms_have_the_same_number_of_parameters_up_to_half_a_per_cent():
    counts = [biases.parameters(biases.config_of(arm, 32)) for arm in biases.ARMS]
    assert max(counts) < 1.005 * min(counts)


def test_the_probe_is_ridge_regression():
    """Against the normal equations of stacked least squares."""
    rng = np.random.default_rng(0)
    x, val_x = 5 + 3 * rng.standard_normal((50, 7)), 5 + 3 * rng.standard_normal((30, 7))
    labels, val_labels = rng.integers(3, size=50), rng.integers(3, size=30)
    z, val_z = ((a - x.mean(axis=0)) / x.std(axis=0) for a in (x, val_x))
    stacked = np.concatenate([z, np.sqrt(biases.RIDGE * 50) * np.eye(7)])
    targets = np.eye(3)[labels]
    right = np.concatenate([targets - targets.mean(axis=0), np.zeros((7, 3))])
    weight = np.linalg.lstsq(stacked, right)[0]
    answers = (val_z @ weight + targets.mean(axis=0)).argmax(axis=1)
    assert biases.probe(x, labels, val_x, val_labels) == (answers == val_labels).mean()
    assert biases.probe(np.eye(3)[labels], labels, np.eye(3)[val_labels], val_labels) == 1.0


@pytest.fixture
def small(monkeypatch, tmp_path):
    """8x8 images, four patches, one block, a reading of 30 images."""
    monkeypatch.setattr(biases, "load_dataset", small_dataset)
    for name, value in {"BATCH": 16, "VALIDATED": 20, "PROBED": 30, "SHOWN": 2}.items():
        monkeypatch.setattr(biases, name, value)
    real = biases.IsotropicConfig
    tiny = {"embed_dim": 8, "depth": 2, "hidden_dim": 40, "token_dim": 5}
    monkeypatch.setattr(biases, "IsotropicConfig", lambda **given: real(**tiny | given))
    monkeypatch.chdir(tmp_path)
    return monkeypatch


def run(program, *argv):
    return program("experiment", "biases", *argv, "--device", "cpu", "--workers", "1")


def test_a_plan_is_trained_drawn_and_not_trained_again(small, tmp_path, program):
    argv = "--data", "shapes", "--steps", "8", "--seeds", "2", "--out", "x"
    status, out, err = run(program, *argv)
    assert status == 0, err
    lines = list(csv.DictReader((tmp_path / "x/table.csv").open()))
    assert [line["step"] for line in lines[:3]] == ["2", "4", "8"]
    assert len(lines) == 2 * len(biases.ARMS) * 3
    assert (tmp_path / "x/table.md").read_text() in out
    assert out.count("attention has the largest error in") == 1
    for name in ("biases.png", "biases-images.png"):
        assert (tmp_path / "x" / name).stat().st_size > 5000
    found = load_checkpoint(tmp_path / "x/gpsa-half/seed1/last.safetensors")
    assert found.config.gate == 0.5 and not found.params["blocks.0.mix.gating_param"].any()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    table = (tmp_path / "x/table.md").read_bytes()
    assert run(program, "--out", "x")[0] == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == before
    assert (tmp_path / "x/table.md").read_bytes() == table
    status, _, err = run(program, "--out", "x", "--steps", "9")
    assert status == 2 and "was made with --steps 8" in err
    status, _, err = program("eval", "x/conv/seed0/last.safetensors", "--data", "shapes")
    assert status == 2 and "holds a model of the kind isotropic" in err and err.count("\n") == 1


def test_a_run_that_is_stopped_goes_on_to_the_bit(small, tmp_path, program):
    data = small_dataset()
    config = biases.config_of("gpsa-half", 8)
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    with make_engine(Masked(config), np, 1) as engine:
        biases.train(engine, data, whole, 8, 0)
    saved = []

    def stop(path, *args, **kwargs):
        save(path, *args, **kwargs)
        saved.append(path)
        if len(saved) == 2:
            raise Interrupted(2, 0)

    save = biases.save_checkpoint
    with make_engine(Masked(config), np, 2) as engine:
        with small.context() as patch, pytest.raises(Interrupted):
            patch.setattr(biases, "save_checkpoint", stop)
            biases.train(engine, data, cut, 8, 0)
        assert whole.read_bytes() != cut.read_bytes()
        biases.train(engine, data, cut, 8, 0)
    assert whole.read_bytes() == cut.read_bytes()


def test_the_error_of_a_reading_is_that_of_the_loss(small):
    data = small_dataset()
    config = biases.config_of("conv", 8)
    params = init_isotropic(config, 0)
    with make_engine(Masked(config), np, 1) as engine:
        found = biases.read(engine, data, params)
    images = normalize(data.val.images[:20], data.mean, data.std)
    mask = hidden_patches(0, 0, np.arange(20), config.num_patches)
    predicted, _ = isotropic_forward(images, params, config, mask)
    loss, _ = masked_loss_forward(predicted, patches_of(images, 4), mask)
    assert found["error"] == pytest.approx(loss, rel=1e-5) and 0 <= found["probe"] <= 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--budget", "3"), "biases has one plan: leave out --budget"),
        (("--plan", "plan.json"), "leave out --plan"),
        (("--seeds", "0"), "--seeds must be from 1"),
        (("--data", "imagefolder"), "choose --data from shapes, cifar10, cifar100"),
        (("--out", "other"), "holds the plan of another experiment"),
        (("--out", "full"), "is not empty and holds no plan"),
        (("--out", "damaged"), "plan.json is damaged"),
    ],
)
def test_what_does_not_fit_is_refused(small, folders_of_others, program, arguments, words):
    folders_of_others("biases")
    status, _, err = run(program, *arguments)
    assert status == 2 and words in err and err.count("\n") == 1


def test_the_rules_can_fail():
    def found(**errors):
        rows = dict.fromkeys(biases.ARMS, (0.5, 0.5)) | errors
        return {
            (arm, seed): [{"error": value, "probe": 0.3}]
            for arm, values in rows.items()
            for seed, value in enumerate(values)
        }

    said = list(biases.verdicts(found(**{
        "conv": (0.3, 0.3), "attention": (0.7, 0.4), "gpsa-0": (0.8, 0.8),
        "gpsa-half": (0.5, 0.6), "gpsa-1": (0.3, 0.8),
    })))  # fmt: skip
    assert "largest error in 1 of 2 seeds" in said[0]
    assert "in 1 of 2 seeds: 60 %, 40 %" in said[1] and "in 1 of 2 seeds: 100 %, 0 %" in said[2]


def test_a_configuration_from_a_file_is_checked():
    good = IsotropicConfig()
    assert IsotropicConfig.from_dict(vars(good)) == good
    for wrong in ({"mixer": "fft"}, {"gate": 0.3}, {"depth": 0}, {"patch_size": 5}, {"x": 1}):
        with pytest.raises(mc.UserError):
            IsotropicConfig.from_dict(vars(good) | wrong)
