"""The paper's recipe in training: against a plain loop, on threads, resumed, and on a device."""

import json

import fakecupy
import numpy as np
import pytest
from small_run import small_dataset, stop_after

import miniconvit.engine.pieces as engine_pieces
import miniconvit.training.loop as training
from miniconvit import (
    AdamW,
    Muon,
    UserError,
    convit_backward,
    convit_forward,
    cross_entropy_backward,
    cross_entropy_forward,
    init_params,
)
from miniconvit.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from miniconvit.data import ImageArray, augment, draw_mix, epoch_order, erase, normalize
from miniconvit.optim import update_average
from miniconvit.training.freeze import initial_params
from miniconvit.training.interrupt import Interrupted
from miniconvit.training.loop import train
from miniconvit.training.settings import RECIPES, Settings, make_settings

ALL = {"augment": "paper", "repeats": 3, "mixup": 0.8, "cutmix": 1.0, "ema": 0.8,
       "label_smoothing": 0.2, "drop_path": 0.2, "batch_size": 17, "lr": 3e-3,
       "epochs": 2}  # fmt: skip
BOTH = pytest.mark.parametrize("given", [ALL, ALL | {"optimizer": "muon"}], ids=["adamw", "muon"])


@pytest.fixture(autouse=True)
def small_data_in_small_pieces(monkeypatch):
    """Four pieces of four or five images in a batch of 17."""
    monkeypatch.setattr("miniconvit.training.run.load_dataset", small_dataset)
    monkeypatch.setattr(engine_pieces, "PIECE_ROWS", 21)


def settings(**given):
    return make_settings(**{"img_size": 8, "epochs": 3, "batch_size": 16, "seed": 3} | given)


def run(folder, resume=False, workers=2, device="cpu", **given):
    return train(
        settings(**given), folder, resume=resume, quiet=True, workers=workers, device=device
    )


def stored(folder, name="last"):
    """(tensors by kind and name, the file's bytes)."""
    path = folder / f"{name}.safetensors"
    found = load_checkpoint(path)
    kinds = {"": found.params, "ema": found.ema or {}, **(found.moments or {})}
    return {(k, n): v for k, values in kinds.items() for n, v in values.items()}, path.read_bytes()


def batch_of(s, data, draws, epoch, step):
    """A whole batch, mixed as timm's collation does: with the batch in reversed order."""
    indices, copies = draws // s.repeats, draws % s.repeats
    which = indices, s.seed, epoch, s.augment, copies
    images = augment(data.train.images[indices], *which)
    images = erase(normalize(images, data.mean, data.std), *which)
    one_hot = np.eye(3)[data.train.labels[indices]]
    one_hot = one_hot * (1 - s.label_smoothing) + s.label_smoothing / 3
    mix = draw_mix(s.mixup, s.cutmix, s.seed, step, (8, 8))
    if mix is None:
        return images, one_hot
    mixed = mix.share * images + (1 - mix.share) * images[::-1]
    if mix.box:
        top, bottom, left, right = mix.box
        mixed = images.copy()
        mixed[:, :, top:bottom, left:right] = images[::-1, :, top:bottom, left:right]
    return mixed.astype("float32"), mix.share * one_hot + (1 - mix.share) * one_hot[::-1]


def plain_training(s):
    """Parameters, their average, and the epochs' mean losses, without any of train.py."""
    data = small_dataset()
    config = s.model_config(data)
    params = init_params(config, s.seed)
    averages = {name: value.astype("float64") for name, value in params.items()}
    optimizer = {"adamw": AdamW, "muon": Muon}[s.optimizer](params, weight_decay=s.weight_decay)
    per_epoch, losses, step = 100 // s.batch_size, [], 0
    rates = rates_of(s, s.epochs * per_epoch)
    for epoch in range(s.epochs):
        draws, loss_sum = epoch_order(100, s.seed, epoch, s.repeats), 0.0
        for first in range(0, per_epoch * s.batch_size, s.batch_size):
            images, targets = batch_of(s, data, draws[first : first + s.batch_size], epoch, step)
            logits, cache = convit_forward(images, params, config, True, s.seed, step)
            loss, cache_loss = cross_entropy_forward(logits, targets)
            grads = convit_backward(cross_entropy_backward(1.0, cache_loss), cache)
            optimizer.step(params, grads, rates[step])
            for name, value in params.items():
                averages[name] = s.ema * averages[name] + (1 - s.ema) * value
            step += 1
            loss_sum += float(loss)
        losses.append(loss_sum / per_epoch)
    return params, averages, losses


def rates_of(s, total):
    """The run's own: a warm-up of one epoch, then a cosine, from and to a hundredth of the peak."""
    warm, low = s.warmup_epochs * total / s.epochs, s.lr / 100
    t = np.arange(total)
    cosine = low + (s.lr - low) * (1 + np.cos(np.pi * t / total)) / 2
    return [float(x) for x in np.where(t < warm, low + (s.lr - low) * t / max(warm, 1), cosine)]


@pytest.mark.parametrize(
    "given",
    [
        ALL,
        ALL | {"cutmix": 0.0, "repeats": 1},
        ALL | {"mixup": 0.0, "augment": "none"},
        ALL | {"optimizer": "muon", "weight_decay": 2.0},
    ],
)
def test_equals_a_plain_loop(tmp_path, given):
    result = run(tmp_path / "run", **given)
    params, averages, losses = plain_training(settings(**given))
    found = load_checkpoint(tmp_path / "run" / "last.safetensors")
    for name in params:
        if not name.endswith("pos_proj.bias"):  # inert: its gradient is rounding noise
            for a, b in ((found.params[name], params[name]), (found.ema[name], averages[name])):
                np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4, err_msg=name)
    np.testing.assert_allclose([row["train_loss"] for row in result.rows], losses, rtol=1e-4)


@BOTH
def test_any_number_of_threads_gives_the_same_bits(tmp_path, given):
    for workers in (1, 2, 3):
        run(tmp_path / str(workers), workers=workers, **given)
    for name in ("last", "best"):
        contents = [stored(tmp_path / str(workers), name)[1] for workers in (1, 2, 3)]
        assert contents[0] == contents[1] == contents[2]


@BOTH
@pytest.mark.parametrize("step", [3, 8])
def test_resumed_to_the_bit(tmp_path, monkeypatch, given, step):
    run(tmp_path / "whole", **given)
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(Interrupted):
            run(tmp_path / "parts", **given)
    run(tmp_path / "parts", resume=True, **given)
    for name in ("last", "best"):
        assert stored(tmp_path / "parts", name)[1] == stored(tmp_path / "whole", name)[1]


def test_copies_of_an_image_differ_and_meet_in_a_batch(tmp_path, monkeypatch):
    """Three of an image in a row, and seldom two of them alike."""
    batches = []
    whole = ImageArray.training_view

    def noted(images, indices, *which):
        found = whole(images, indices, *which)
        batches.append((indices, found))
        return found

    monkeypatch.setattr(engine_pieces, "PIECE_ROWS", 10_000)
    monkeypatch.setattr(ImageArray, "training_view", noted)
    run(tmp_path / "run", augment="crop-flip", repeats=3, batch_size=30, epochs=2)
    pairs = alike = 0
    for indices, images in batches:
        for first in range(0, 30, 3):
            assert len(set(indices[first : first + 3])) == 1
        assert len(set(indices)) == 10
        for i in range(29):
            if indices[i] == indices[i + 1]:
                pairs += 1
                alike += np.array_equal(images[i], images[i + 1])
    assert pairs == 6 * 20 and alike < 6  # one in 162 is expected to be


def test_the_average_is_what_is_evaluated_and_kept_as_best(tmp_path, monkeypatch):
    seen = []
    evaluate = training.evaluate

    def noted(engine, split, mean, std, params, *rest):
        seen.append({name: value.copy() for name, value in params.items()})
        return evaluate(engine, split, mean, std, params, *rest)

    monkeypatch.setattr(training, "evaluate", noted)
    result = run(tmp_path / "run", **ALL)
    last = load_checkpoint(tmp_path / "run" / "last.safetensors")
    best = load_checkpoint(tmp_path / "run" / "best.safetensors")
    assert best.ema is None and best.moments is None
    for name, value in last.ema.items():
        np.testing.assert_array_equal(seen[-1][name], value)
        np.testing.assert_array_equal(best.params[name], seen[result.best["epoch"] - 1][name])
    assert (last.ema["head.weight"] != last.params["head.weight"]).any()
    gates = 1 / (1 + np.exp(-last.ema["blocks.0.attn.gating_param"]))
    np.testing.assert_allclose(result.rows[-1]["gates"][0], gates, rtol=1e-5)


def test_the_average_by_hand():
    value, average = np.array([3.0, -1.0]), np.array([1.0, -1.0])
    update_average({"w": average}, {"w": value}, 0.75)
    assert average.tolist() == [1.5, -1.0]
    fixed = {"w": np.random.default_rng(1).random(999, "float32")}
    same = {"w": fixed["w"].copy()}
    for _ in range(9):
        update_average(same, fixed, 0.9)
    np.testing.assert_array_equal(same["w"], fixed["w"])


def test_the_average_of_frozen_parameters_is_themselves(tmp_path):
    run(tmp_path / "run", **ALL | {"freeze": "attention"})
    last = load_checkpoint(tmp_path / "run" / "last.safetensors")
    first = initial_params(last.config, 3, "attention")
    frozen = [name for name in first if name.startswith("blocks.0.attn.")]
    assert len(frozen) > 5
    for name in frozen:
        np.testing.assert_array_equal(last.ema[name], first[name])


def test_a_checkpoint_without_its_average_is_refused(tmp_path):
    run(tmp_path / "with", **ALL)
    found = load_checkpoint(tmp_path / "with" / "last.safetensors")
    optimizer = AdamW(found.params)
    optimizer.exp_avg, optimizer.exp_avg_sq = (found.moments[k] for k in ("exp_avg", "exp_avg_sq"))
    path = tmp_path / "with" / "last.safetensors"
    more = {"mean": found.mean, "std": found.std, "classes": found.classes, "data": found.data}
    kept = {"optimizer": optimizer, "state": found.state, **more}
    save_checkpoint(path, found.params, found.config, ema=found.ema, **kept)
    assert stored(tmp_path / "with")[0].keys() == {
        (kind, name) for kind in ("", "ema", "exp_avg", "exp_avg_sq") for name in found.params
    }
    run(tmp_path / "with", resume=True, **ALL)  # what was written again is whole
    save_checkpoint(path, found.params, found.config, **kept)
    with pytest.raises(UserError, match="is no checkpoint to resume from"):
        run(tmp_path / "with", resume=True, **ALL)
    part = dict(list(found.ema.items())[1:])
    with pytest.raises(UserError, match=r"tensor ema\.\S+ is missing"):
        save_checkpoint(path, found.params, found.config, ema=part, **kept)


# ---------------------------------------------------------------- settings


def test_settings_stored_before_these_existed_are_read(tmp_path):
    run(tmp_path / "run")
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    names = "repeats", "mixup", "cutmix", "ema", "optimizer"
    more = tuple(about["settings"].pop(name) for name in names)
    assert more == (1, 0.0, 0.0, None, "adamw")
    assert Settings(**about["settings"]) == settings()


@pytest.mark.parametrize(
    "given",
    [{"mixup": -0.1}, {"cutmix": float("inf")}, {"ema": 1.0}, {"repeats": 0}, {"augment": "x"}],
)
def test_values_out_of_range_are_refused(given):
    with pytest.raises(UserError, match=f"--{next(iter(given))} must be"):
        settings(**given)


def test_the_papers_recipe_is_that_of_the_paper():
    """spec 5.1, but for what is scaled."""
    s = make_settings("paper32")
    assert (s.epochs, s.warmup_epochs, s.weight_decay, s.clip_grad) == (300, 5, 0.05, None)
    assert (s.label_smoothing, s.drop_path, s.mixup, s.cutmix) == (0.1, 0.1, 0.8, 1.0)
    assert (s.repeats, s.ema, s.augment, s.local_up_to_layer) == (3, None, "paper", 10)
    assert s.lr == pytest.approx(5e-4 * s.batch_size / 512)
    assert set(RECIPES) >= {"paper32"}


# ---------------------------------------------------------------- on a device


@pytest.mark.parametrize("preset", ["light", "paper"])
def test_a_device_sees_the_same_images_and_nobody_waits(cupy, preset):
    images = np.random.default_rng(1).integers(0, 256, (70, 3, 9, 14), dtype=np.uint8)
    index, copies = np.arange(70) + 5, np.arange(70) % 3
    here = [cupy.asarray(x) for x in (images, index, copies)]
    with fakecupy.forbid("wait", "upload"):
        found = augment(*here[:2], 4, 2, preset, here[2])
        floats = erase(found.astype("float32"), here[1], 4, 2, preset, here[2])
    true = augment(images, index, 4, 2, preset, copies)
    np.testing.assert_array_equal(found.get(), true)
    true = erase(true.astype("float32"), index, 4, 2, preset, copies)
    np.testing.assert_array_equal(floats.get(), true)
    assert floats.dtype == np.float32


@BOTH
def test_a_run_on_a_device_is_the_cpus(cupy, tmp_path, monkeypatch, given):
    whole_step = training.train_step

    def strict_step(run, state, load):
        is_recorded = state.step == 1  # as a graph, once it has given the same bits: that waits
        with fakecupy.forbid(*["wait"] * (not is_recorded), "upload"):
            whole_step(run, state, load)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train_step", strict_step)
        on_device = run(tmp_path / "device", device="cuda", **given)
        stop_after(patch, 8)
        with pytest.raises(Interrupted):
            run(tmp_path / "parts", device="cuda", **given)
    on_cpu = run(tmp_path / "cpu", **given)
    run(tmp_path / "parts", device="cuda", resume=True, **given)
    assert stored(tmp_path / "parts")[1] == stored(tmp_path / "device")[1]
    found, true = stored(tmp_path / "device")[0], stored(tmp_path / "cpu")[0]
    for key, value in true.items():
        if np.linalg.norm(value) > 0 and not key[1].endswith("pos_proj.bias"):
            assert np.linalg.norm(found[key] - value) < 1e-3 * np.linalg.norm(value), key
    for row, expected in zip(on_device.rows, on_cpu.rows, strict=True):
        assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)


def test_a_recipe_leaves_images_alone_whose_class_a_flip_would_change():
    assert make_settings("paper32", data="shapes").augment == "none"
    assert make_settings("paper32").augment == "paper"
    assert make_settings("paper32", data="shapes", augment="light").augment == "light"
