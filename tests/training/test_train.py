"""The training loop: against a plain loop written out here, and what it does at its limits."""

import errno
import json
import os
import signal
from dataclasses import asdict, replace
from math import cos, pi
from types import SimpleNamespace

import numpy as np
import pytest
from small_run import small_dataset, stop_after

import miniconvit.training.loop as training
from miniconvit import (
    AdamW,
    ConViTConfig,
    UserError,
    convit_backward,
    convit_forward,
    cross_entropy_backward,
    cross_entropy_forward,
    init_params,
)
from miniconvit.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from miniconvit.data import ImageArray, augment, epoch_order, normalize
from miniconvit.engine.objective import Classification
from miniconvit.engine.threads import Engine
from miniconvit.training.evaluate import evaluate
from miniconvit.training.interrupt import Diverged, Interrupted, note_signals
from miniconvit.training.loop import train
from miniconvit.training.report import Report
from miniconvit.training.run_folder import RunFolder, default_out
from miniconvit.training.settings import RECIPES, Settings, make_settings, stored_settings


@pytest.fixture(autouse=True)
def small_data(monkeypatch):
    monkeypatch.setattr("miniconvit.training.run.load_dataset", small_dataset)


def settings(**given):
    small = {"img_size": 8, "epochs": 3, "batch_size": 16, "lr": 3e-3, "seed": 3}
    return make_settings(**small | given)


def run(folder, resume=False, **given):
    return train(settings(**given), folder, resume=resume, quiet=True, workers=2)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def plain_training(s):
    """The same training, one whole batch at a time and without any of train.py: parameters, the
    epochs' mean losses, and the last step's learning rate."""
    data = small_dataset()
    config = s.model_config(data)
    params = init_params(config, s.seed)
    optimizer = AdamW(params, weight_decay=s.weight_decay)
    per_epoch = 100 // s.batch_size
    total, losses, step = s.epochs * per_epoch, [], 0
    for epoch in range(s.epochs):
        order, loss_sum = epoch_order(100, s.seed, epoch), 0.0
        for first in range(0, per_epoch * s.batch_size, s.batch_size):
            chosen = order[first : first + s.batch_size]
            images = augment(data.train.images[chosen], chosen, s.seed, epoch, s.augment)
            images = normalize(images, data.mean, data.std)
            logits, cache = convit_forward(images, params, config, True, s.seed, step)
            loss, cache_loss = cross_entropy_forward(
                logits, data.train.labels[chosen], s.label_smoothing
            )
            grads = convit_backward(cross_entropy_backward(1.0, cache_loss), cache)
            norm = float(
                np.sqrt(sum(float((g.astype("float64") ** 2).sum()) for g in grads.values()))
            )
            if s.clip_grad and norm > s.clip_grad:
                grads = {name: g * (s.clip_grad / norm) for name, g in grads.items()}
            warm, low = s.warmup_epochs * per_epoch, s.lr / 100
            if step < warm:
                lr = low + (s.lr - low) * step / warm
            else:
                lr = low + (s.lr - low) * (1 + cos(pi * step / total)) / 2
            optimizer.step(params, grads, lr)
            step += 1
            loss_sum += float(loss)
        losses.append(loss_sum / per_epoch)
    return params, losses, lr


@pytest.mark.parametrize(
    "given",
    [
        {"augment": "none"},
        {
            "augment": "crop-flip",
            "drop_path": 0.3,
            "label_smoothing": 0.2,
            "clip_grad": 0.5,
            "weight_decay": 0.4,
            "warmup_epochs": 0.5,
        },
    ],
)
def test_equals_a_plain_loop(tmp_path, given):
    result = run(tmp_path / "run", **given)
    params, losses, lr = plain_training(settings(**given))
    found = load_checkpoint(tmp_path / "run" / "last.safetensors")
    for name, value in params.items():
        if not name.endswith("pos_proj.bias"):  # inert: its gradient is rounding noise
            np.testing.assert_allclose(
                found.params[name], value, rtol=1e-3, atol=2e-4, err_msg=name
            )
    np.testing.assert_allclose([row["train_loss"] for row in result.rows], losses, rtol=1e-4)
    np.testing.assert_allclose(result.rows[-1]["lr"], lr, rtol=1e-12)


def test_run_folder(tmp_path):
    result = run(tmp_path / "run")
    folder = tmp_path / "run"
    assert {file.name for file in folder.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "last.safetensors",
        "best.safetensors",
        "log.txt",
    }
    keys = "epoch step train_loss train_top1 val_loss val_top1 lr nonlocality gates strengths "
    keys += "centre_norms images_per_second seconds crc32"
    assert [list(row) for row in rows(folder)] == [keys.split()] * 3
    assert [(row["epoch"], row["step"]) for row in rows(folder)] == [(1, 6), (2, 12), (3, 18)]
    sums = [{"crc32": row["crc32"]} for row in rows(folder)]
    assert rows(folder) == [row | crc for row, crc in zip(result.rows, sums, strict=True)]
    assert result.best == max(result.rows, key=lambda row: (row["val_top1"], -row["epoch"]))

    best = load_checkpoint(folder / "best.safetensors")
    assert best.moments is None
    assert (best.data, best.classes) == ("shapes", ["reddish", "greenish", "bluish"])
    assert (best.mean, best.std) == ([0.36, 0.37, 0.38], [0.19, 0.20, 0.21])
    data = small_dataset()
    logits, _ = convit_forward(
        normalize(data.val.images, best.mean, best.std), best.params, best.config
    )
    assert (logits.argmax(axis=1) == data.val.labels).mean() == result.best["val_top1"]


def test_the_first_of_equally_good_epochs_is_the_best(tmp_path, monkeypatch):
    accuracies = iter([0.5, 0.7, 0.7])
    monkeypatch.setattr(training, "evaluate", lambda *_: (1.0, next(accuracies), 1.0))
    result = run(tmp_path / "run")
    assert result.best["epoch"] == 2
    last = load_checkpoint(tmp_path / "run" / "last.safetensors")
    best = load_checkpoint(tmp_path / "run" / "best.safetensors")
    assert last.state["best"] == {"epoch": 2, "val_top1": 0.7}
    assert (best.params["head.weight"] != last.params["head.weight"]).any()


def test_config_json_repeats_the_run(tmp_path):
    run(tmp_path / "a", drop_path=0.1)
    about = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (about["workers"], about["data_dir"]) == (2, None)
    assert about["versions"]["numpy"] == np.__version__
    assert ConViTConfig.from_dict(about["model"]) == settings(drop_path=0.1).model_config(
        small_dataset()
    )
    again = stored_settings(tmp_path / "a")
    assert again == settings(drop_path=0.1)
    train(again, tmp_path / "b", quiet=True, workers=1)
    for name in ("last.safetensors", "best.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_steps_instead_of_epochs(tmp_path):
    result = run(tmp_path / "run", epochs=None, steps=8)
    assert [(row["epoch"], row["step"]) for row in result.rows] == [(1, 6), (2, 8)]


def test_two_passes_are_an_epoch(tmp_path, monkeypatch):
    """The same training as twice as many epochs of one pass, to the bit, validated half as often,
    and resumed from the middle of the second pass."""
    given = {"augment": "crop-flip", "drop_path": 0.3}
    expected = run(tmp_path / "one", epochs=4, warmup_epochs=1.0, **given)
    given |= {"epochs": 2, "warmup_epochs": 0.5, "passes": 2}
    with monkeypatch.context() as patch:
        stop_after(patch, 9, signal.SIGTERM)
        with pytest.raises(Interrupted):
            train(settings(**given), tmp_path / "two", quiet=True, workers=1)
    found = run(tmp_path / "two", resume=True, **given)
    assert [row["step"] for row in found.rows] == [12, 24]
    for ours, pair in zip(found.rows, (expected.rows[:2], expected.rows[2:]), strict=True):
        assert ours["val_loss"] == pair[1]["val_loss"]
        assert ours["train_loss"] == pytest.approx(sum(row["train_loss"] for row in pair) / 2)
    ends = [load_checkpoint(tmp_path / name / "last.safetensors").params for name in ("one", "two")]
    for name, value in ends[0].items():
        np.testing.assert_array_equal(ends[1][name], value, err_msg=name)


def test_a_batch_larger_than_the_data_is_all_of_it(tmp_path):
    result = run(tmp_path / "run", batch_size=1000, epochs=2)
    assert [row["step"] for row in result.rows] == [1, 2]


def test_evaluate_counts_over_chunks(monkeypatch):
    """Against a count image by image, of a split that the chunks do not divide."""
    monkeypatch.setattr(ImageArray, "CHUNK", 7)
    rng = np.random.default_rng(2)
    data = small_dataset()
    config = replace(settings().model_config(data), num_classes=9)
    params = {
        name: value + rng.normal(0, 0.3, value.shape).astype("float32")
        for name, value in init_params(config, 1).items()
    }
    data.val.labels[:] = rng.integers(0, 9, 30)
    pauses = []
    with Engine(Classification(config), 2) as engine:
        found = evaluate(engine, data.val, data.mean, data.std, params, lambda: pauses.append(None))
    assert len(pauses) == 5
    losses, firsts, fives = [], [], []
    for image, label in zip(data.val.images, data.val.labels, strict=True):
        logits, _ = convit_forward(normalize(image[None], data.mean, data.std), params, config)
        p = np.exp(logits[0].astype("float64"))
        losses.append(-np.log(p[label] / p.sum()))
        ranking = sorted(range(9), key=lambda c: -p[c])
        firsts.append(ranking[0] == label)
        fives.append(label in ranking[:5])
    assert 0 < np.mean(firsts) < np.mean(fives) < 1
    np.testing.assert_allclose(found[0], np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(found[1:], [np.mean(firsts), np.mean(fives)], rtol=1e-12)


def test_evaluate_says_that_an_answer_is_not_finite():
    """Though the loss is: an infinitely improbable class costs nothing where it is never right."""
    data = small_dataset()
    config = settings().model_config(data)
    params = init_params(config, 1)
    data.val.labels[:] = 0
    with Engine(Classification(config), 1) as engine:
        params["head.bias"][2] = -np.inf
        assert np.isnan(evaluate(engine, data.val, data.mean, data.std, params)).all()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    """NaN pixels from epoch 2 on: the last good checkpoint is that of epoch 1."""
    folder = tmp_path / "run"

    def poison(images, indices, seed, epoch, preset, repeat):
        return images[indices].astype("float32") * (np.nan if epoch >= 1 else 1)

    monkeypatch.setattr(ImageArray, "training_view", poison)
    with pytest.raises(Diverged, match=r"step 7 \(epoch 2\).*last\.safetensors is the last good"):
        run(folder)
    assert load_checkpoint(folder / "last.safetensors").state["step"] == 6
    assert len(rows(folder)) == 1
    assert "step 7" in (folder / "log.txt").read_text()


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    """With a loss that is: parameters are spoilt at that step, and may not be saved later."""
    norms = iter([1.0] * 7 + [np.inf] + [1.0] * 99)
    monkeypatch.setattr(Engine, "clip", lambda engine, grads, limit: next(norms))
    with pytest.raises(Diverged, match=r"step 8 \(epoch 2\): the loss is \d.* norm inf"):
        run(tmp_path / "run")
    assert load_checkpoint(tmp_path / "run" / "last.safetensors").state["step"] == 6


def test_a_signal_during_the_evaluation_is_answered_before_its_end(tmp_path, monkeypatch):
    folder = tmp_path / "run"

    def interrupted_evaluate(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "evaluate", interrupted_evaluate)
        with pytest.raises(Interrupted) as stop:
            run(folder)
    assert (stop.value.signal, stop.value.step) == (signal.SIGTERM, 6)
    state = load_checkpoint(folder / "last.safetensors").state
    assert (state["step"], state["epoch"]) == (6, 0)
    assert not (folder / "metrics.jsonl").exists()
    run(folder, resume=True)
    run(tmp_path / "whole")
    for name in ("last.safetensors", "best.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_second_signal_has_its_usual_effect():
    requests, usual = [], signal.getsignal(signal.SIGTERM)
    with note_signals(requests):
        assert signal.getsignal(signal.SIGTERM) != usual
        signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == usual
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert requests == [signal.SIGTERM]


@pytest.mark.parametrize("asked, answer", [(True, Interrupted), (False, BrokenPipeError)])
def test_an_epoch_line_that_nobody_reads(tmp_path, monkeypatch, asked, answer):
    """Without a signal it is the usual end of a program whose reader has gone."""

    def broken(report, *texts):
        if texts[0].startswith("    1 "):
            if asked:
                signal.raise_signal(signal.SIGINT)
            raise BrokenPipeError

    monkeypatch.setattr(Report, "lines", broken)
    with pytest.raises(answer):
        run(tmp_path / "run")
    assert load_checkpoint(tmp_path / "run" / "last.safetensors").state["epoch"] == 1


def test_an_absurd_rate_diverges_without_a_broken_checkpoint(tmp_path):
    with pytest.raises(Diverged, match="stopped at step"):
        run(tmp_path / "run", lr=1e37)
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_parameters_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    """An update that overflows is noticed at the next save."""
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)

    def overflow(engine, optimizer, params, grads, lr):
        params["head.bias"][0] = np.inf

    monkeypatch.setattr(Engine, "_optimize", overflow)
    with pytest.raises(Diverged, match=r"head\.bias"):
        run(tmp_path / "run")
    assert not (tmp_path / "run" / "last.safetensors").exists()


def test_a_validation_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "evaluate", lambda *_: (float("inf"), 0.5, 1.0))
    with pytest.raises(Diverged, match="validation loss is inf; nothing was saved yet"):
        run(tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


OTHER = {
    "data": "cifar10",
    "subset": 0.5,
    "recipe": "cifar10-10min",
    "model": "vit_micro32",
    "img_size": 16,
    "patch_size": 2,
    "local_up_to_layer": 2,
    "locality_strength": 2.0,
    "epochs": 4,
    "batch_size": 32,
    "lr": 1e-3,
    "optimizer": "muon",
    "weight_decay": 0.1,
    "warmup_epochs": 2,
    "clip_grad": 1.0,
    "label_smoothing": 0.1,
    "drop_path": 0.1,
    "augment": "crop-flip",
    "seed": 4,
    "attention": "psa",
    "local_init": False,
    "freeze": "gates",
    "broken": "skip",
    "repeats": 2,
    "mixup": 0.8,
    "cutmix": 1.0,
    "ema": 0.9,
    "passes": 2,
    "init_from": "elsewhere",
    "precision": "tf32",
    "cosine": 1.0,
    "contrastive": 1.0,
    "patch_mixing": 1.0,
}


def test_a_different_setting_is_refused_by_name(tmp_path):
    folder = tmp_path / "run"
    run(folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert {*OTHER, "steps"} == set(asdict(settings()))
    cases = [(name, {name: value}) for name, value in OTHER.items()]
    for name, change in [*cases, ("epochs", {"epochs": None, "steps": 5})]:
        changed = replace(settings(), **change)
        with pytest.raises(UserError, match=f"--(no-)?{name.replace('_', '-')}[ :]"):
            train(changed, folder, resume=True, quiet=True)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_different_setting_is_refused_before_the_first_save_too(tmp_path):
    folder = tmp_path / "run"
    run(folder)
    (folder / "last.safetensors").unlink()
    with pytest.raises(UserError, match=r"began with --lr 0\.003 and cannot go on with --lr 0\.1"):
        run(folder, resume=True, lr=0.1)


def test_a_run_is_never_overwritten(tmp_path):
    folder = tmp_path / "run"
    run(folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(UserError, match="holds a run already: continue it with --resume"):
        run(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("dear")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        run(tmp_path / "letters", resume=True)
    assert os.listdir(tmp_path / "letters") == ["a.txt"]


def test_a_damaged_last_checkpoint_is_not_overwritten(tmp_path):
    folder = tmp_path / "run"
    run(folder)
    last = folder / "last.safetensors"
    last.write_bytes(last.read_bytes()[:-9])
    damaged = last.read_bytes()
    with pytest.raises(UserError, match=r"last\.safetensors is damaged"):
        run(folder, resume=True)
    assert last.read_bytes() == damaged
    last.write_bytes((folder / "best.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"last\.safetensors is damaged, or is no checkpoint to"):
        run(folder, resume=True)


WRONG_SETTINGS = {
    "model": ("foo", ["convit_micro32"], None),
    "data": ("mnist", 3),
    "recipe": (None,),
    "augment": ("blur",),
    "attention": (1,),
    "local_init": ("no",),
    "img_size": (None, "8", [8], [8, 8.5], 0),
    "patch_size": (True,),
    "local_up_to_layer": (1.5, -1),
    "locality_strength": ("1", float("inf")),
    "seed": (1.5, None, True),
    "epochs": ("3",),
    "batch_size": (16.0,),
    "lr": ("fast", None, 10**400),
    "subset": ([1],),
}


def test_damaged_settings_are_a_sentence(tmp_path):
    folder = tmp_path / "run"
    run(folder)
    about = json.loads((folder / "config.json").read_text())
    damaged = [
        about | {"settings": about["settings"] | {name: value}}
        for name, values in WRONG_SETTINGS.items()
        for value in values
    ]
    for wrong in [*damaged, {}, [1], about | {"settings": [1]}, about | {"data_dir": 5}]:
        (folder / "config.json").write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=r"config\.json"):
            run(folder, resume=True)


# Of a run that stands after step 9, in its second epoch, with batches of 16.
SUMS = {"loss": 3.3, "correct": 20, "images": 48}
BEST = {"epoch": 1, "val_top1": 0.5}
WRONG_STATES = {
    "step": ("x", -3, 9.0, None, 5, 13, 10),
    "epoch": (1.5, 0, 2, -1, True),
    "sums": ({}, None, SUMS | {"images": 32}, SUMS | {"correct": 49}, SUMS | {"loss": None}),
    "best": (None, 5, {}, BEST | {"epoch": 2}, BEST | {"epoch": 0}, BEST | {"val_top1": "x"}),
    "settings": (None, {}),
}


def test_a_damaged_state_is_a_sentence(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 9, signal.SIGTERM)
        with pytest.raises(Interrupted):
            train(settings(), folder, quiet=True, workers=1)
    last = folder / "last.safetensors"
    whole = load_checkpoint(last)
    assert (whole.state["step"], whole.state["epoch"]) == (9, 1)
    good = whole.state | {"sums": SUMS, "best": BEST}
    write_last(last, whole, good)

    changes = [{name: value} for name, values in WRONG_STATES.items() for value in values]
    changes.append({"step": 13, "sums": SUMS | {"images": 112}})
    for change in changes:
        write_last(last, whole, good | change)
        before = last.read_bytes()
        with pytest.raises(UserError, match=r"last\.safetensors is damaged"):
            run(folder, resume=True)
        assert last.read_bytes() == before
    write_last(last, whole, good, "float64")
    with pytest.raises(UserError, match="its tensors are float64, not float32"):
        run(folder, resume=True)
    write_last(last, whole, good)
    assert run(folder, resume=True).step == 18


def write_last(path, checkpoint, state, dtype="float32"):
    params, *moments = (
        {name: value.astype(dtype) for name, value in values.items()}
        for values in (checkpoint.params, *checkpoint.moments.values())
    )
    optimizer = SimpleNamespace(exp_avg=moments[0], exp_avg_sq=moments[1])
    save_checkpoint(path, params, checkpoint.config, optimizer=optimizer, state=state)


def test_what_a_kill_left_half_written_is_cleared_away(tmp_path):
    run(tmp_path / "run")
    (tmp_path / "run" / "best.safetensors.partial").write_bytes(b"half")
    run(tmp_path / "run", resume=True)
    assert not list((tmp_path / "run").glob("*.partial"))


def test_missing_metrics_are_noticed(tmp_path):
    folder = tmp_path / "run"
    run(folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:2]))
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged: 3 whole lines"):
        run(folder, resume=True)


@pytest.mark.parametrize("writes", [3, 9, 30])
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, writes):
    """The disk is full from some flush on; when there is room again the run goes on to the end that
    it has without the accident."""
    run(tmp_path / "whole")
    folder, left, fsync = tmp_path / "run", [writes], os.fsync

    def fsync_until_full(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync_until_full)
        with pytest.raises(UserError, match=r"cannot write .*: No space left on device"):
            run(folder)
    assert not list(folder.glob("*.partial"))
    run(folder, resume=True)
    for name in ("last.safetensors", "best.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_folder_that_cannot_be_made(tmp_path):
    with pytest.raises(UserError, match=r"cannot write /proc/run: "):
        run("/proc/run")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not a folder"):
        run(tmp_path / "file")


def test_locked_folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.open(resume=False)
    with pytest.raises(UserError, match="another process is training"):
        run(tmp_path / "run")
    folder.close()
    run(tmp_path / "run", epochs=1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"subset": 0.0},
        {"epochs": 0},
        {"epochs": None},
        {"steps": 4, "epochs": 4},
        {"batch_size": 0},
        {"lr": float("nan")},
        {"weight_decay": -1.0},
        {"warmup_epochs": float("inf")},
        {"clip_grad": 0.0},
        {"label_smoothing": 1.0},
        {"drop_path": 1.0},
        {"seed": -1},
        {"freeze": "head"},
        {"model": "convit_huge"},
        {"recipe": "risotto"},
        {"data": "mnist"},
    ],
)
def test_settings_out_of_range(wrong):
    with pytest.raises(UserError, match=next(iter(wrong)).replace("_", "[- ]")[:4]):
        settings(**wrong)


def test_explicit_settings_win_over_the_recipe():
    plain = make_settings(data="cifar10")
    assert asdict(plain).items() >= RECIPES["cifar10-10min"].items()
    assert make_settings(recipe="cifar10-10min").data == "cifar10"
    assert make_settings(data="cifar10", lr=0.5) == replace(plain, lr=0.5)
    assert make_settings(data="cifar10", steps=7) == replace(plain, steps=7, epochs=None)
    assert make_settings().recipe == "shapes-minute"
    augmentations = {data: make_settings(data=data).augment for data in ("shapes", "cifar10")}
    assert augmentations == {"shapes": "none", "cifar10": "crop-flip"}  # a flip changes a shape
    assert make_settings(recipe="cifar10-10min", data="shapes").augment == "none"
    assert Settings(**json.loads(json.dumps(asdict(settings(img_size=(8, 16)))))) == settings(
        img_size=(8, 16)
    )


def test_default_folders_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):
        out = default_out(settings())
        out.mkdir(parents=True)
        names.append(out.name)
    stem = "shapes-convit_micro32-seed3"
    assert names == [stem, f"{stem}-2", f"{stem}-3"]
    assert default_out(settings(), resume=True).name == f"{stem}-3"
    assert default_out(settings(seed=4), resume=True).name == "shapes-convit_micro32-seed4"


@pytest.mark.parametrize("name", ["numpy", "scipy", "blas", "cpu"])
def test_resuming_with_other_arithmetic_says_that_digits_may_differ(tmp_path, name):
    folder = tmp_path / "run"
    run(folder)
    again = "from here on the last digits may differ"
    run(folder, resume=True)
    assert again not in (folder / "log.txt").read_text()
    config = json.loads((folder / "config.json").read_text())
    now = config["versions"][name]
    config["versions"][name] = "of yore"
    (folder / "config.json").write_text(json.dumps(config))
    run(folder, resume=True)
    assert f"{again}: {name} {now} in place of of yore\n" in (folder / "log.txt").read_text()


def test_a_hangup_is_noted_but_one_that_is_ignored_stays_so():
    """As nohup asks."""
    usual = signal.getsignal(signal.SIGHUP)
    try:
        for begin, expected in ((signal.SIG_DFL, [signal.SIGHUP]), (signal.SIG_IGN, [])):
            signal.signal(signal.SIGHUP, begin)
            requests = []
            with note_signals(requests):
                signal.raise_signal(signal.SIGHUP)
            assert requests == expected
            assert signal.getsignal(signal.SIGHUP) == begin
    finally:
        signal.signal(signal.SIGHUP, usual)
