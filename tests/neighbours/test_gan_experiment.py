"""The experiment of ViTGAN: its plan, its ruler, its rule, and a run that is stopped."""

import csv

import numpy as np
import pytest
from small_run import small_dataset

from miniconvit.checkpoints.checkpoint import load_checkpoint
from miniconvit.engine import make_engine
from miniconvit.errors import UserError
from miniconvit.experiments import gan
from miniconvit.neighbours.gan import GANConfig, init_gan, latents
from miniconvit.training.interrupt import Interrupted
from miniconvit.training.objectives import Adversarial


def test_any_number_of_workers_gives_the_same_bits():
    config = GANConfig(embed_dim=8, depth=1)
    params = init_gan(config, 0)
    images = np.random.default_rng(0).uniform(-1, 1, (32, 16, 16, 3)).astype("float32")

    def load(start, stop):
        return images[start:stop], latents(0, 0, np.arange(start, stop), config)

    found = []
    for workers in (1, 2):
        with make_engine(Adversarial(config), np, workers) as engine:
            assert len(engine.pieces(32)) > 1
            *losses, grads = engine.loss_and_grads(load, 32, params, 3, 5)
            found.append((losses, {name: grad.copy() for name, grad in grads.items()}))
            drawn = engine.logits(load, 32, params)
            assert engine.cpu_seconds() > 0
            found[-1] += (drawn,)
    (losses, grads, drawn), (other_losses, other_grads, other_drawn) = found
    assert losses == other_losses and np.array_equal(drawn, other_drawn)
    assert all(np.array_equal(grads[name], other_grads[name]) for name in params)


def test_the_workers_time_is_counted():
    def load(start, stop):
        return images[start:stop], latents(0, 0, np.arange(start, stop), config)

    config = GANConfig()
    images = np.zeros((64, 16, 16, 3), "float32")
    with make_engine(Adversarial(config), np, 2) as engine:
        before, params = engine.cpu_seconds(), init_gan(config, 0)
        for step in range(3):
            engine.loss_and_grads(load, 64, params, 0, step)
        assert engine.cpu_seconds() - before > 0.02


def test_the_ruler_measures_a_shift_by_what_it_is_along_each_direction():
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (50, 4, 4, 3)).astype("float32")
    ruler, moved = gan.Ruler(images), rng.standard_normal((4, 4, 3)).astype("float32")
    expected = abs(moved.reshape(-1) @ ruler._directions).mean()
    assert ruler.distance(images[::-1] + moved) == pytest.approx(expected, rel=1e-5)
    assert ruler.distance(images[::-1]) <= 1e-6 * expected  # a product rounds as its rows lie
    np.testing.assert_allclose(np.linalg.norm(ruler._directions, axis=0), 1.0, rtol=1e-6)


def test_a_quarter_is_a_quarter_of_an_image():
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 6), dtype=np.uint8)
    cut = gan.quarters(images)
    assert cut.shape == (8, 4, 3, 3)
    assert np.array_equal(cut[5], images[1, :, :4, 3:].transpose(1, 2, 0))
    assert np.array_equal(cut[2], images[0, :, 4:, :3].transpose(1, 2, 0))
    assert gan.as_pixels(np.array([0, 255], np.uint8)).tolist() == [-1.0, 1.0]


@pytest.fixture
def small(monkeypatch, tmp_path):
    """4x4 images, one patch, one block."""
    monkeypatch.setattr(gan, "load_dataset", small_dataset)
    for name, value in {"BATCH": 16, "JUDGED": 20, "SHOWN": 10}.items():
        monkeypatch.setattr(gan, name, value)
    real = gan.GANConfig
    tiny = {"embed_dim": 8, "depth": 1, "hidden_dim": 6, "latent_dim": 5}
    monkeypatch.setattr(gan, "GANConfig", lambda *args, **given: real(*args, **tiny | given))
    monkeypatch.chdir(tmp_path)
    return monkeypatch


def run(program, *argv):
    return program("experiment", "gan", *argv, "--device", "cpu", "--workers", "1")


def test_a_plan_is_trained_drawn_and_not_trained_again(small, tmp_path, program):
    status, out, err = run(program, "--steps", "16", "--seeds", "2", "--out", "x")
    assert status == 0, err
    lines = list(csv.DictReader((tmp_path / "x/table.csv").open()))
    steps = [str(step) for step in gan.readings_of(16)]
    assert [line["step"] for line in lines[: len(steps)]] == steps and steps[-1] == "16"
    assert len(lines) == 2 * 6 * len(steps)
    assert lines[0]["critic_loss"] == "" and float(lines[1]["critic_loss"]) > 0
    assert (tmp_path / "x/table.md").read_text() in out
    assert out.count("ends below a quarter of its start in") == 6 and "CPU minutes" in out
    for name in ("gan.png", "gan-images.png"):
        assert (tmp_path / "x" / name).stat().st_size > 5000
    found = load_checkpoint(tmp_path / "x/dot-sn/seed1/last.safetensors")
    assert found.config.attention == "dot" and found.ema.keys() == found.params.keys()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    table = (tmp_path / "x/table.md").read_bytes()
    assert run(program, "--out", "x")[0] == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == before
    assert (tmp_path / "x/table.md").read_bytes() == table
    status, _, err = run(program, "--out", "x", "--steps", "9")
    assert status == 2 and "was made with --steps 16" in err
    status, _, err = program("eval", "x/l2-isn/seed0/last.safetensors", "--data", "shapes")
    assert status == 2 and "holds a model of the kind vitgan" in err and err.count("\n") == 1


def trained(path, workers=1, norm="isn"):
    data = small_dataset()
    images, held_out = (gan.quarters(split.images[:]) for split in (data.train, data.val))
    config = gan.GANConfig("l2", img_size=4)
    with make_engine(Adversarial(config), np, workers) as engine:
        ruler = gan.Ruler(gan.as_pixels(held_out[:20]))
        return gan.Run(engine, images, ruler, path, norm, 0).train(32)


def content(path):
    """Of a checkpoint, all but the processor's time."""
    found = load_checkpoint(path)
    rows = [{name: row[name] for name in gan.COLUMNS[:-1]} for row in found.state["rows"]]
    return rows, {**found.params, **{f"ema {n}": x for n, x in found.ema.items()}} | {
        f"{kind} {n}": x for kind, moments in found.moments.items() for n, x in moments.items()
    }


def test_a_run_that_is_stopped_goes_on_to_the_bit(small, tmp_path):
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    trained(whole)
    saved, save = [], gan.save_checkpoint

    def stop(path, *args, **kwargs):
        save(path, *args, **kwargs)
        saved.append(path)
        if len(saved) == 5:
            raise Interrupted(2, 0)

    with small.context() as patch, pytest.raises(Interrupted):
        patch.setattr(gan, "save_checkpoint", stop)
        trained(cut)
    assert len(content(cut)[0]) == 5
    rows = trained(cut, workers=2)
    (ours, arrays), (theirs, expected) = content(cut), content(whole)
    assert ours == theirs and ours[-1]["step"] == 32
    assert all(np.array_equal(arrays[name], expected[name]) for name in expected)
    times = [row["cpu_seconds"] for row in rows]
    assert times == sorted(times)
    with pytest.raises(UserError, match="is no run of this plan"):
        trained(cut, norm="sn")  # a folder that was moved to another arm


def test_a_run_whose_gradient_is_not_finite_breaks_off(small, tmp_path):
    """It stays where it was, is not begun again, and fails the rule."""
    path, real, steps = tmp_path / "last.safetensors", gan.critic_norm, []

    def norm(grads):
        steps.append(real(grads))
        return float("inf") if len(steps) == 6 else steps[-1]

    small.setattr(gan, "critic_norm", norm)
    rows = trained(path, norm="none")
    assert rows[-1]["step"] == 5 and rows[-1]["broken"] and len(steps) == 6
    assert trained(path, norm="none") == rows and len(steps) == 6
    said = list(gan.verdicts({(("l2", "none"), 0): rows}))
    assert "in 0 of 1 seed; 1 broke off" in said[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--data", "cifar10"), "gan has one plan: leave out --data"),
        (("--data-dir", "photos"), "gan has one plan: leave out --data-dir"),
        (("--budget", "3"), "gan has one plan: leave out --budget"),
        (("--plan", "plan.json"), "gan has one plan: leave out --plan"),
        (("--seeds", "0"), "--seeds must be from 1"),
        (("--steps", "0"), "--steps must be an integer of at least 1"),
        (("--out", "other"), "holds the plan of another experiment"),
        (("--out", "full"), "is not empty and holds no plan"),
        (("--out", "damaged"), "plan.json is damaged"),
    ],
)
def test_what_does_not_fit_is_refused(small, folders_of_others, program, arguments, words):
    folders_of_others("gan")
    status, _, err = run(program, *arguments)
    assert status == 2 and words in err and err.count("\n") == 1


def test_the_rule_can_fail():
    def rows(start, end):
        about = {"critic_gradient": 1.0, "cpu_seconds": 90.0}
        return [{"distance": value} | about for value in (start, end)]

    found = {(("l2", "isn"), 0): rows(0.4, 0.09), (("l2", "isn"), 1): rows(0.4, 0.11)}
    found |= {(("dot", "sn"), seed): rows(0.4, 0.2) for seed in range(2)}
    said = list(gan.verdicts(found))
    assert "Dot product, norms 1: " in said[0] and "in 0 of 2 seeds" in said[0]
    assert "in 1 of 2 seeds" in said[1] and "1.5 CPU minutes" in said[2]
