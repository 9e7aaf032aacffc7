"""What `inspect` and the metrics say about the attention: against definitions and golden values."""

import io
import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
from small_run import FLAGS, small_dataset

import miniconvit.analysis.maps as attention
import miniconvit.cli.eval as eval_command
from miniconvit import ConViTConfig, UserError, cli, init_params, layers, param_shapes
from miniconvit.analysis.inspection import inspect
from miniconvit.analysis.maps import (
    attention_maps,
    measure_nonlocality,
    nonlocality,
    query_maps,
    uniform_nonlocality,
)
from miniconvit.analysis.readings import decode_positions, describe, gates, readings
from miniconvit.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from miniconvit.data import normalize
from miniconvit.layers.names import part
from miniconvit.training.history import run_history
from miniconvit.training.settings import stored_settings

CONFIG = ConViTConfig(
    img_size=(6, 10), patch_size=2, num_classes=5, embed_dim=12, depth=4, num_heads=4,
    mlp_ratio=1.5, local_up_to_layer=3,
)  # fmt: skip
KINDS = {
    "gpsa": CONFIG,
    "psa": replace(CONFIG, attention="psa"),
    "twin": replace(CONFIG, local_up_to_layer=0),
    "all gpsa": replace(CONFIG, local_up_to_layer=4),
}


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 1)
        for name, shape in param_shapes(config).items()
    }


def random_images(config, n=3, seed=1):
    return np.random.default_rng(seed).standard_normal((n, config.in_chans, *config.image))


def true_maps(images, params, config):
    """The maps of each block from its own scores, the blocks' inputs from the layers."""
    B, (rows, cols), H = len(images), config.grid, config.num_heads
    x, _ = layers.patch_embed_forward(
        images, params["patch_embed.proj.weight"], params["patch_embed.proj.bias"], config.patch
    )
    x = x + params["pos_embed"]
    row, col = np.divmod(np.arange(rows * cols), cols)
    dx, dy = col[None] - col[:, None], row[None] - row[:, None]
    found = []
    for i in range(config.depth):
        if i == config.local_up_to_layer:
            x = np.concatenate([np.tile(params["cls_token"], (B, 1, 1)), x], axis=1)
        block = part(params, f"blocks.{i}.")
        attn = part(block, "attn.")
        normed, _ = layers.layernorm_forward(x, block["norm1.weight"], block["norm1.bias"])
        qk = normed @ (attn["qk.weight"] if "qk.weight" in attn else attn["qkv.weight"][:24]).T
        q, k = qk.reshape(B, -1, 2, H, 3).transpose(2, 0, 3, 1, 4)
        scores, w = q @ k.swapaxes(-1, -2) / 3**0.5, attn.get("pos_proj.weight")
        if w is not None:
            position = np.exp(np.einsum("hc,cqk->hqk", w, np.stack([dx, dy, dx**2 + dy**2])))
        if config.attention == "psa" and w is not None:
            scores = scores + np.log(position)
        A = np.exp(scores)
        A = A / A.sum(axis=-1, keepdims=True)
        if "gating_param" in attn:
            g = 1 / (1 + np.exp(-attn["gating_param"]))[:, None, None]
            A = (1 - g) * A + g * position / position.sum(axis=-1, keepdims=True)
        found.append(A)
        x, _ = layers.block_forward(x, block, H, config.grid)
    return found


def mean_distance(A, grid):
    row, col = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    distance = np.hypot(row[:, None] - row, col[:, None] - col)
    if A.shape[-1] > len(row):
        A = A[..., 1:, 1:] / A[..., 1:, 1:].sum(axis=-1, keepdims=True)
    return (A * distance).sum(axis=(-1, -2)) / len(row)


@pytest.mark.parametrize("kind", KINDS)
def test_maps_and_nonlocality_are_those_of_the_true_inputs(kind):
    config = KINDS[kind]
    params, images = random_params(config), random_images(config)
    expected = true_maps(images, params, config)
    maps = attention_maps(images, params, config)
    distances = measure_nonlocality(images, params, config)
    for A, block, distance in zip(expected, maps, distances, strict=True):
        np.testing.assert_allclose(block.mixture, A, rtol=1e-9, atol=1e-14)
        mean = mean_distance(A, config.grid).mean(axis=0)
        np.testing.assert_allclose(distance["mixture"], mean, rtol=1e-9)
        assert ("content" in distance) == (block.gate is not None)
        if block.gate is not None:
            mixed = (1 - block.gate) * distance["content"] + block.gate * distance["position"]
            np.testing.assert_allclose(distance["mixture"], mixed, rtol=1e-12)


@pytest.mark.parametrize("numbers", [1, 4 * 15 * 15 * 2, 10**9])
def test_nonlocality_does_not_depend_on_how_many_images_go_at_a_time(monkeypatch, numbers):
    params, images = random_params(CONFIG), random_images(CONFIG, 5)
    expected = [
        nonlocality(block.mixture, CONFIG.grid).mean(axis=0)
        for block in attention_maps(images, params, CONFIG)
    ]
    monkeypatch.setattr(attention, "MAP_NUMBERS", numbers)
    found = measure_nonlocality(images, params, CONFIG)
    np.testing.assert_allclose([block["mixture"] for block in found], expected, rtol=1e-12)


@pytest.mark.parametrize("heads, gated", [(4, 2.67890029), (9, 2.88088633), (16, 3.09970674)])
def test_nonlocality_at_the_paper_s_size_before_training(heads, gated):
    """Golden values of 14 x 14 patches, content even: GPSA, and MHSA beside its class token."""
    config = ConViTConfig(
        img_size=14, patch_size=1, embed_dim=144, depth=2, num_heads=heads, local_up_to_layer=1
    )
    params = init_params(config, dtype="float64")
    params["blocks.0.attn.qk.weight"][...] = 0.0
    params["blocks.1.attn.qkv.weight"][...] = 0.0
    gpsa, mhsa = measure_nonlocality(random_images(config, 2), params, config)
    assert gpsa["mixture"].mean() == pytest.approx(gated, abs=5e-9)
    np.testing.assert_allclose(gpsa["content"], 7.2807641932, atol=5e-11)
    np.testing.assert_allclose(mhsa["mixture"], 7.2807641932, atol=5e-11)
    assert uniform_nonlocality((14, 14)) == pytest.approx(7.2807641932, abs=5e-11)


@pytest.mark.parametrize("strength", [0.3, 1.0, 4.0])
def test_centres_and_strengths_are_decoded(strength):
    """From the tables of the official initialisation, and after weight decay, which leaves the
    centres where they are."""
    config = ConViTConfig(
        embed_dim=36, depth=3, num_heads=9, local_up_to_layer=2, locality_strength=strength
    )
    params = init_params(config, dtype="float64")
    expected = [(right, down) for right in (-1, 0, 1) for down in (-1, 0, 1)]
    for factor in (1.0, 0.25):
        scaled = {name: factor * value for name, value in params.items()}
        decoded = decode_positions(scaled, config)
        assert list(decoded) == [0, 1]
        for found, centre in decoded.values():
            np.testing.assert_allclose(found, factor * strength, rtol=1e-12)
            np.testing.assert_allclose(centre, expected, rtol=1e-12)


@pytest.mark.parametrize("w2", [0.0, 0.5])
def test_a_head_that_is_pushed_away_has_no_centre(w2):
    params = random_params(CONFIG)
    params["blocks.1.attn.pos_proj.weight"][2] = 0.3, -0.2, w2
    params["blocks.1.attn.pos_proj.weight"][1] = 0.3, -0.2, -0.1
    strength, centre = decode_positions(params, CONFIG)[1]
    assert strength[2] == -w2 and np.isnan(centre[2]).all()
    np.testing.assert_allclose(centre[1], (1.5, -1.0), rtol=1e-12)
    heads = describe(params, CONFIG)[1]["heads"]
    assert (heads[2]["centre"], heads[1]["centre"]) == (None, [1.5, -1.0])
    assert readings(random_images(CONFIG), params, CONFIG)["centre_norms"][1][2] is None


def test_gates_are_the_sigmoid():
    params = random_params(CONFIG)
    found = gates(params, CONFIG)
    assert list(found) == [0, 1, 2]
    for i, gate in found.items():
        expected = 1 / (1 + np.exp(-params[f"blocks.{i}.attn.gating_param"]))
        np.testing.assert_allclose(gate, expected, rtol=1e-12)
    assert gates(random_params(KINDS["twin"]), KINDS["twin"]) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_query_maps_are_a_row_of_the_maps(kind):
    config = KINDS[kind]
    params, images = random_params(config), random_images(config)
    found = query_maps(images[1], params, config, (1, 3))
    for A, parts in zip(true_maps(images, params, config), found, strict=True):
        A = A[1, :, 1 + 8, 1:] if A.shape[-1] == 16 else A[1, :, 8]
        expected = (A / A.sum(axis=-1, keepdims=True)).reshape(4, 3, 5)
        np.testing.assert_allclose(parts["mixture"], expected, rtol=1e-9, atol=1e-14)
    for i, gate in gates(params, config).items():
        g, parts = gate[:, None, None], found[i]
        np.testing.assert_allclose(parts["content"].sum(axis=(1, 2)), 1.0, rtol=1e-12)
        mixed = (1 - g) * parts["content"] + g * parts["position"]
        np.testing.assert_allclose(parts["mixture"], mixed, rtol=1e-12)


def test_a_query_outside_the_grid_is_refused():
    params = init_params(CONFIG)
    checkpoint = Namespace(params, CONFIG)
    assert inspect(checkpoint).query == (1, 2)
    for query in ((3, 0), (0, 5), (-1, 0)):
        with pytest.raises(UserError, match="3 rows and 5 columns"):
            inspect(checkpoint, query=query)


class Namespace:
    mean, std = [0.5] * 3, [0.2] * 3

    def __init__(self, params, config):
        self.params, self.config = params, config


# Training records it.


@pytest.fixture(autouse=True)
def small_data(monkeypatch):
    monkeypatch.setattr("miniconvit.training.run.load_dataset", small_dataset)
    monkeypatch.setattr(eval_command, "load_dataset", small_dataset)


def trained(folder, *flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("miniconvit.training.run.load_dataset", small_dataset)
        patch.setattr(sys, "stdout", io.StringIO())
        with pytest.raises(SystemExit) as end:
            cli.main(["train", *FLAGS, "--epochs", "3", *flags, "--out", str(folder)])
    assert end.value.code == 0
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("inspect") / "run", "--device", "cpu")


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect") / "twin"
    return trained(folder, "--model", "vit_micro32", "--device", "cpu")


@pytest.mark.parametrize("name", ["run", "twin"])
def test_metrics_hold_the_readings_of_each_epoch(name, request):
    folder, data = request.getfixturevalue(name), small_dataset()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = load_checkpoint(folder / "last.safetensors")
    config, params = last.config, last.params
    images = normalize(data.val.images, data.mean, data.std)
    row = rows[-1]
    found = np.array(row["nonlocality"])
    assert found.shape == (config.depth, config.num_heads)
    maps = attention_maps(images.astype("float64"), wide(params), config)
    expected = [mean_distance(block.mixture, config.grid).mean(axis=0) for block in maps]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert len(row["gates"]) == len(row["strengths"]) == config.local_up_to_layer
    for i in range(config.local_up_to_layer):
        attn = part(wide(params), f"blocks.{i}.attn.")
        w = attn["pos_proj.weight"]
        np.testing.assert_allclose(row["gates"][i], 1 / (1 + np.exp(-attn["gating_param"])), 1e-5)
        np.testing.assert_allclose(row["strengths"][i], -w[:, 2], 1e-5)
        norms = np.hypot(w[:, 0], w[:, 1]) / (2 * -w[:, 2])
        np.testing.assert_allclose(row["centre_norms"][i], norms, 1e-5)
    assert rows[0]["nonlocality"] != row["nonlocality"]


def wide(params):
    return {name: value.astype("float64") for name, value in params.items()}


def test_the_history_begins_with_the_initial_parameters(run):
    config = load_checkpoint(run / "last.safetensors").config
    history = run_history(run, config, small_dataset())
    assert [epoch for epoch, _ in history] == [0, 1, 2, 3]
    first = history[0][1]
    np.testing.assert_allclose(first["gates"], 1 / (1 + np.exp(-1.0)), 1e-5)
    np.testing.assert_allclose(first["centre_norms"], 0.5**0.5, 1e-5)
    data, seed = small_dataset(), stored_settings(run).seed
    images = normalize(data.val.images, data.mean, data.std)
    expected = readings(images, init_params(config, seed), config)
    np.testing.assert_array_equal(first["nonlocality"], expected["nonlocality"])


# The command.


def test_json_and_the_files(run, tmp_path, program):
    pytest.importorskip("matplotlib")
    status, out, err = program("inspect", run, "--json", "--query", "1,0", "--out", tmp_path / "x")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["checkpoint"].endswith("best.safetensors")
    assert (found["data"], found["images"], found["query"]) == ("shapes", 30, [1, 0])
    assert [layer["attention"] for layer in found["layers"]] == ["gpsa"] * 3 + ["mhsa"]
    assert [len(layer["heads"]) for layer in found["layers"]] == [4] * 4
    assert set(found["layers"][0]["maps"]) == {"content", "position", "mixture"}
    assert np.shape(found["layers"][3]["maps"]["mixture"]) == (4, 2, 2)
    assert [row["epoch"] for row in found["history"]] == [0, 1, 2, 3]
    assert "class token" in found["class_token"]
    written = json.loads((tmp_path / "x" / "inspect.json").read_text())
    assert written == {key: found[key] for key in written}
    pictures = {file.name for file in (tmp_path / "x").iterdir()} - {"inspect.json"}
    layer_pictures = {f"maps-layer0{i}.png" for i in (1, 2, 3)}
    assert pictures == {"nonlocality.png", "gates.png", "maps.png"} | layer_pictures
    image = pytest.importorskip("PIL.Image")
    for name in pictures:
        with image.open(tmp_path / "x" / name) as picture:
            colors = picture.convert("RGB").getcolors(picture.width * picture.height)
            assert picture.width >= 1300 and round(picture.info["dpi"][0]) == 300
            assert len(colors) > 50


def test_text(run, tmp_path, program):
    pytest.importorskip("matplotlib")
    status, out, err = program("inspect", run, "--images", "7")
    assert (status, err) == (0, "")
    assert re.search(r"^images +7$", out, re.MULTILINE)
    assert len(re.findall(r"^ +\d  (?:gpsa|mhsa) ", out, re.MULTILINE)) == 4
    assert "without the class token's row and column, rows rescaled to sum one" in out
    assert (run / "inspect" / "inspect.json").exists()
    assert program("train", "--resume", "--out", run)[0] == 0  # the run is still one


def test_numbers_come_without_matplotlib(run, tmp_path, program, monkeypatch):
    monkeypatch.setattr("miniconvit.analysis.style.find_spec", lambda name: None)
    assert program("inspect", run, "--json")[0] == 0
    status, out, err = program("inspect", run, "--out", tmp_path / "x")
    assert status == 0
    assert "gpsa" in out and out.endswith(f"\nin {tmp_path / 'x'}: inspect.json\n")
    assert re.fullmatch(r"no picture will be drawn: [^\n]*pip install matplotlib\n", err)
    assert [file.name for file in (tmp_path / "x").iterdir()] == ["inspect.json"]


def test_twin(twin, tmp_path, program):
    pytest.importorskip("matplotlib")
    status, out, _ = program("inspect", twin, "--json", "--out", tmp_path / "x")
    found = json.loads(out)
    assert status == 0
    assert {layer["attention"] for layer in found["layers"]} == {"mhsa"}
    assert all(list(head) == ["nonlocality"] for head in found["layers"][0]["heads"])
    names = {file.name for file in (tmp_path / "x").iterdir()}
    assert names == {"inspect.json", "nonlocality.png", "maps.png"}


@pytest.mark.parametrize("kind", KINDS)
def test_any_checkpoint_without_data(kind, tmp_path, program):
    """Gates and positions come from the parameters alone; image files serve where there is no data
    set."""
    image = pytest.importorskip("PIL.Image")
    config, path = KINDS[kind], tmp_path / "model.safetensors"
    params = {name: value.astype("float32") for name, value in random_params(config).items()}
    save_checkpoint(path, params, config, mean=[0.4] * 3, std=[0.3] * 3)
    status, out, _ = program("inspect", path)
    assert status == 0
    assert "none: add --data or image files" in out
    assert ("no centre" in out) == (kind != "twin")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 10, 3)).astype("uint8")
    image.fromarray(pixels).save(tmp_path / "a.png")
    status, out, err = program("inspect", path, tmp_path / "a.png", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    images = normalize(pixels.transpose(2, 0, 1)[None], [0.4] * 3, [0.3] * 3).astype("float64")
    for layer, A in zip(found["layers"], true_maps(images, wide(params), config), strict=True):
        expected = mean_distance(A, config.grid)[0]
        np.testing.assert_allclose([h["nonlocality"] for h in layer["heads"]], expected, 1e-4)


def test_mistakes(run, tmp_path, program):
    for argv, words in (
        ((run, "--query", "9,9"), "2 rows and 2 columns"),
        ((run, "--query", "middle"), "ROW,COL"),
        ((run, "--images", "0"), "--images"),
        ((tmp_path / "nothing.safetensors",), "there is no checkpoint"),
    ):
        status, out, err = program("inspect", *argv)
        assert (status, out) == (2, "")
        assert re.fullmatch(r"Error: [^\n]+\n", err) and words in err


def test_a_page_of_a_run(run, tmp_path, program, browser):
    """It needs no matplotlib, and shows an image of each class and what training recorded."""
    page = tmp_path / "page.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("miniconvit.analysis.style.find_spec", lambda name: None)
        status, out, err = program("inspect", run, "--page", page)
    assert (status, err) == (0, "")
    assert out.endswith(f"to open in a browser: {page}\n")
    browser.open(page)
    data = browser.execute_script("return data")
    assert data["classes"] == ["reddish", "greenish", "bluish"]
    assert [(image["name"], image["truth"]) for image in data["images"]] == [
        ("image 1", 0), ("image 2", 1), ("image 3", 2),
    ]  # fmt: skip
    assert "run/best.safetensors: 4 heads" in browser.find_element("id", "model").text
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert data["history"]["epochs"] == [0, 1, 2, 3]
    assert data["history"]["gates"][3] == rows[-1]["gates"]
    link = browser.execute_script("return document.querySelector('#knobs a').href")
    assert link.endswith("/tutorials/10-gpsa.md")
    assert browser.get_log("browser") == []


def test_a_page_beside_json(run, tmp_path, program):
    page = tmp_path / "page.html"
    status, out, err = program("inspect", run, "--json", "--images", "2", "--page", page)
    assert (status, err) == (0, "")
    assert json.loads(out)["images"] == 2
    assert page.exists()


def test_a_page_needs_images_and_a_folder(run, tmp_path, program):
    params = init_params(CONFIG)
    save_checkpoint(tmp_path / "bare.safetensors", params, CONFIG, mean=[0.5] * 3, std=[0.2] * 3)
    status, _, err = program(
        "inspect", tmp_path / "bare.safetensors", "--page", tmp_path / "p.html"
    )
    assert status == 2
    assert err == "Error: a page needs images: add --data, or image files\n"
    status, _, err = program("inspect", run, "--page", tmp_path / "none" / "p.html")
    assert status == 2
    assert re.match(r"Error: cannot write .*p.html: No such file or directory", err)


def test_a_page_of_files(run, tmp_path, program, browser):
    image = pytest.importorskip("PIL.Image")
    file, page = tmp_path / "<a>.png", tmp_path / "page.html"
    image.fromarray(np.full((9, 8, 3), 200, "uint8")).save(file)
    assert program("inspect", run, file, "--page", page)[0] == 0
    browser.open(page)
    labels = [
        label.get_attribute("title")
        for label in browser.find_elements("css selector", "#images label")
    ]
    assert labels == ["<a>.png"]
    assert "no time line" in browser.find_element("id", "no-history").text
    assert browser.get_log("browser") == []
