"""Saliency: the gradient with respect to the image, against central differences; its picture."""

from dataclasses import replace

import numpy as np
import pytest

import miniconvit as mc
from miniconvit.analysis.saliency import draw_saliency, logit_gradient
from miniconvit.checkpoints.checkpoint import save_checkpoint

OBLONG = mc.ConViTConfig(
    (6, 8), (3, 4), 2, 5, embed_dim=8, depth=2, num_heads=4, local_up_to_layer=1
)
MODELS = {
    "gpsa": OBLONG,
    "psa": replace(OBLONG, attention="psa", use_pos_embed=False),
    "vit": replace(OBLONG, local_up_to_layer=0),
    "one block": replace(OBLONG, depth=1, local_up_to_layer=0),
    "no class token": replace(OBLONG, local_up_to_layer=2),
}


def random_params(config):
    rng = np.random.default_rng(0)
    return {name: 0.4 * rng.standard_normal(s) for name, s in mc.param_shapes(config).items()}


@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_the_slope_of_the_logit(name):
    config, labels, h = MODELS[name], [4, 0], 1e-5
    params = random_params(config)
    images = np.random.default_rng(1).standard_normal((2, 2, 6, 8))
    found = logit_gradient(images, labels, params, config)
    slopes = np.empty_like(images)
    for place in np.ndindex(images.shape[1:]):
        ends = []
        for step in (h, -h):
            moved = images.copy()
            moved[(slice(None), *place)] += step
            logits, _ = mc.convit_forward(moved, params, config)
            ends.append(logits[[0, 1], labels])
        slopes[(slice(None), *place)] = (ends[0] - ends[1]) / (2 * h)
    assert abs(slopes).max(axis=(1, 2, 3)).min() > 0.01
    np.testing.assert_allclose(found, slopes, rtol=1e-6, atol=1e-8)


def test_on_a_device_the_gradient_is_the_same(cupy):
    config = MODELS["gpsa"]
    params, images = random_params(config), np.random.default_rng(1).standard_normal((1, 2, 6, 8))
    expected = logit_gradient(images, [3], params, config)
    there = {name: cupy.asarray(value) for name, value in params.items()}
    found = logit_gradient(cupy.asarray(images), [3], there, config)
    np.testing.assert_allclose(found.get(), expected, rtol=1e-12, atol=1e-14)


def test_the_picture_shows_the_greatest_channel_over_the_image(tmp_path):
    """One pixel with a gradient: dark in the middle and on the right, and nothing else."""
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    gradient = np.zeros((3, 4, 4))
    gradient[:, 1, 2] = 0.1, -5.0, 0.2
    draw_saliency([("$x_", np.full((4, 4, 3), 0.5), gradient)], tmp_path / "a.png")
    with image.open(tmp_path / "a.png") as file:
        pixels = np.asarray(file.convert("RGB")).astype(int)
    dark = np.argwhere(abs(pixels - (0x3D, 0x12, 0x36)).max(axis=2) < 4)
    width = pixels.shape[1]
    columns = np.unique(dark[:, 1])
    parts = np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1)
    assert len(parts) == 2
    for part, middle in zip(parts, (3 / 6, 5 / 6), strict=True):
        assert abs(part.mean() / width - middle - 1 / 3 / 8) < 0.02  # the third of four columns
        assert abs(len(part) / width - 1 / 3 / 4) < 0.01


def test_predict_draws_it(program, tmp_path):
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    config = mc.ConViTConfig(8, 4, 3, 3, embed_dim=8, depth=2, local_up_to_layer=1)
    about = {"mean": [0.5] * 3, "std": [0.25] * 3, "classes": ["a", "b", "c"]}
    save_checkpoint(tmp_path / "m.safetensors", mc.init_params(config), config, **about)
    for number in range(10):
        image.new("RGB", (9, 9), (20 * number, 90, 200)).save(tmp_path / f"{number}.png")
    (tmp_path / "5.png").write_bytes(b"no image")
    picture = tmp_path / "saliency"
    call = ["predict", tmp_path / "m.safetensors", tmp_path, "--saliency", picture]
    status, out, err = program(*call)
    assert status == 1 and "5.png" in err
    assert out.splitlines()[-1] == f"saliency of the first 8 images in {picture}"
    first = picture.read_bytes()
    assert first.startswith(b"\x89PNG")
    status, out, err = program(*call)
    assert (status, out) == (2, "")
    assert err == f"Error: {picture} exists: choose another name, or remove it first\n"
    assert picture.read_bytes() == first
    lost = program(*call[:-1], tmp_path / "nowhere" / "s.png")
    assert lost[0] == 2 and "9.png" in lost[1]  # answers are printed before anything is drawn
    assert "cannot write" in lost[2]


def test_predict_needs_matplotlib_for_it(program, tmp_path, monkeypatch):
    pytest.importorskip("PIL.Image")
    monkeypatch.setattr("miniconvit.analysis.style.find_spec", lambda name: None)
    status, out, err = program("predict", tmp_path / "m", tmp_path, "--saliency", tmp_path / "s")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "pip install matplotlib" in err
