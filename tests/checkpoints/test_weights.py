"""Parameters from elsewhere: recognised, checked, interpolated, exported, and trained on."""

import json
import os
import pickle
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_run import FLAGS, small_dataset
from test_torch_file import GOLDEN, archive, golden, legacy

import miniconvit as mc
import miniconvit.cli.eval as eval_command
import miniconvit.training.loop as training
from miniconvit import UserError
from miniconvit.checkpoints.checkpoint import load_checkpoint, read_safetensors, save_checkpoint
from miniconvit.checkpoints.resolution import at_resolution, resample_pos_embed
from miniconvit.checkpoints.weights import (
    open_weights,
    read_start,
    recognise,
    timm_call,
    variant_name,
)
from miniconvit.config import IMAGENET_MEAN, VARIANTS, ConViTConfig
from miniconvit.model import param_shapes
from miniconvit.training.history import run_history
from miniconvit.training.settings import Settings, make_settings

CONFIG = ConViTConfig(12, 4, 3, 5, 8, 3, 4, 2.0, local_up_to_layer=2)
"""Of the model in golden/torch_model.pth."""


@pytest.fixture
def bare(tmp_path):
    """Writes the golden model, changed by keywords (None: left out), as a .safetensors file with
    the official names and nothing else."""

    def write(name="bare.safetensors", **changes):
        tensors = golden("model") | {k.replace("__", "."): v for k, v in changes.items()}
        save_file({k: v for k, v in tensors.items() if v is not None}, tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def program(program, monkeypatch):
    """The command line on the small data set."""
    monkeypatch.setattr("miniconvit.training.run.load_dataset", small_dataset)
    monkeypatch.setattr(eval_command, "load_dataset", small_dataset)
    return program


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, strict=True)


# What is found in a file


@pytest.mark.parametrize("name", ["torch_model.pth", "torch_model_legacy.pth", None])
def test_a_file_of_others_is_recognised_and_gives_timm_s_logits(name, bare):
    path = GOLDEN / name if name else bare()
    where, found = open_weights(path)
    assert (where, found.config) == (path, CONFIG)
    assert_same(found.params, golden("model"))
    assert (found.mean, found.std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert (found.data, found.classes, found.moments) == (None, None, None)
    assert all(value.flags.writeable for value in found.params.values())
    params = {k: v.astype("float64") for k, v in found.params.items()}
    with np.load(GOLDEN / "torch_files.npz") as file:
        logits, _ = mc.convit_forward(file["images"], params, found.config)
        np.testing.assert_allclose(logits, file["logits"], rtol=1e-10, atol=1e-12)


def shapes_alone(config):
    """Tensors that have the shapes of a model, and no memory."""
    return {k: np.broadcast_to(np.float32(0), s) for k, s in param_shapes(config).items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_recognised_by_its_shapes(name):
    config, tensors = VARIANTS[name], shapes_alone(VARIANTS[name])
    if name.startswith("vit_"):
        with pytest.raises(UserError, match="add --model"):
            recognise(tensors)
    found = recognise(tensors, config.num_heads if name.startswith("vit_") else None)
    assert found == replace(config, drop_path_rate=0.0)
    assert variant_name(found) == name


@pytest.mark.parametrize(
    "change",
    [
        {"qkv_bias": True},
        {"in_chans": 1},
        {"num_heads": 2, "use_local_init": True},
        {"mlp_ratio": 2.75},
        {"local_up_to_layer": 3},
        {"attention": "psa"},
        {"patch_size": (4, 2), "img_size": (12, 6)},
        {"num_classes": 1},
    ],
    ids=str,
)
def test_every_setting_that_shapes_tell(change):
    config = replace(CONFIG, **change)
    assert recognise(shapes_alone(config)) == config


def test_what_shapes_do_not_tell_is_asked_for():
    wide = replace(CONFIG, img_size=(12, 20))
    with pytest.raises(UserError, match=r"15 patches, which are no square; add --img-size"):
        recognise(shapes_alone(wide))
    assert recognise(shapes_alone(wide), img_size=(12, 20)) == wide
    square = replace(CONFIG, img_size=16)  # as many patches as in 8 x 32 pixels
    assert recognise(shapes_alone(square)) == square
    oblong = replace(square, img_size=(8, 32))
    assert recognise(shapes_alone(square), img_size=(8, 32)) == oblong
    assert recognise(shapes_alone(square), img_size=(8, 32), own_size=16) == square
    assert recognise(shapes_alone(square), img_size=24, own_size=(8, 32)) == oblong
    assert recognise(shapes_alone(square), own_size=24) == square  # says nothing of this file
    plain = replace(CONFIG, use_pos_embed=False, img_size=20)
    with pytest.raises(UserError, match=r"without pos_embed .* add --img-size"):
        recognise(shapes_alone(plain))
    assert recognise(shapes_alone(plain), img_size=20) == plain


def test_a_far_number_of_a_block_makes_no_deep_model():
    far = {"blocks.99999999999.norm1.weight": np.zeros(8)}
    assert recognise(shapes_alone(CONFIG) | far).depth == CONFIG.depth + 1


def test_the_mlp_s_width_survives_rounding():
    shapes = shapes_alone(CONFIG)
    for width in range(1, 200, 9):
        for hidden in range(1, 400, 13):
            tensors = shapes | {
                "norm.weight": np.zeros(4 * width),
                "blocks.0.mlp.fc1.weight": np.zeros((hidden, 4 * width)),
            }
            assert recognise(tensors).hidden_dim == hidden


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_ema", "state_dict_ema"])
def test_what_training_scripts_wrap_around_a_state_dict(tmp_path, monkeypatch, wrapper):
    state = {f"module.{name}": value for name, value in golden("model").items()}
    state["module.blocks.0.attn.rel_indices"] = np.zeros((1, 9, 9, 3), np.float32)
    others = {"model": {}} if wrapper.endswith("ema") else {}
    saved = others | {wrapper: state, "epoch": 3}
    monkeypatch.setattr("miniconvit.checkpoints.weights.read_torch_file", lambda path: saved)
    (tmp_path / "a.pth").write_bytes(b"PK" + bytes(50))
    assert_same(open_weights(tmp_path / "a.pth")[1].params, golden("model"))


def test_types(tmp_path, bare):
    """Half precision is widened; float64 stays where all is float64."""
    expected = golden("model")
    half = {k: v.astype("float16") for k, v in expected.items()}
    save_file(half, tmp_path / "half.safetensors")
    found = open_weights(tmp_path / "half.safetensors")[1].params
    assert_same(found, {k: v.astype("float32") for k, v in half.items()})
    double = {k: v.astype("float64") for k, v in expected.items()}
    save_file(double, tmp_path / "double.safetensors")
    assert_same(open_weights(tmp_path / "double.safetensors")[1].params, double)
    mixed = bare(norm__bias=expected["norm.bias"].astype("float64"))
    assert_same(open_weights(mixed)[1].params, expected)


def test_a_renamed_file_is_what_it_is(tmp_path, bare):
    for content, name in (
        (GOLDEN / "torch_model.pth", "a.safetensors"),
        (GOLDEN / "torch_model_legacy.pth", "b.safetensors"),
        (bare(), "c.pth"),
    ):
        (tmp_path / name).write_bytes(content.read_bytes())
        assert_same(open_weights(tmp_path / name)[1].params, golden("model"))


F = np.float32
MISFITS = {
    "missing": ({"blocks__1__norm2__bias": None}, "the tensor blocks.1.norm2.bias is missing"),
    "gate missing": ({"blocks__1__attn__gating_param": None}, "gating_param is missing"),
    "first missing": ({"patch_embed__proj__weight": None}, "patch_embed.proj.weight is missing"),
    "head missing": ({"head__weight": None}, "head.weight is missing"),
    "extra": ({"tail": np.ones(3, F)}, "the tensor tail is none of the model's"),
    "gap in the blocks": (
        {"blocks__5__norm1__weight": np.ones(8, F)},
        "blocks.3.norm1.weight is missing",
    ),
    "misshapen": ({"head__bias": np.ones(4, F)}, "head.bias has the shape (4,) where (5,)"),
    "flat": ({"patch_embed__proj__weight": np.ones((8, 48), F)}, "where 4 axes were expected"),
    "empty": ({"norm__weight": np.ones(0, F)}, "norm.weight has the shape (0,)"),
    "not a number": ({"norm__bias": np.full(8, np.nan, F)}, "norm.bias holds values that are not"),
    "too large": ({"norm__bias": np.full(8, 1e300)}, "norm.bias holds values that are not finite"),
    "integers": ({"norm__bias": np.ones(8, np.int32)}, "norm.bias is int32 where float32 or"),
    "heads": ({"blocks__0__attn__pos_proj__weight": np.ones((3, 3), F)}, "over 3 heads"),
    "token in pos_embed": (
        {"pos_embed": np.ones((1, 10, 8), F)},
        "10 patches, which are no",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_a_sentence_that_names_it(bare, name):
    changes, words = MISFITS[name]
    with pytest.raises(UserError, match=rf"bare\.safetensors .*{re.escape(words)}"):
        open_weights(bare(**changes))


def test_files_that_are_none(tmp_path, bare):
    path = tmp_path / "a.pth"
    whole = (bare()).read_bytes()
    for content, words in (
        (b"", "neither a .safetensors nor a .pth"),
        (b"version https://git-lfs.github.com/spec/v1\n", "neither a .safetensors nor a .pth"),
        (whole[:-1], "damaged"),
        (whole[:60], "damaged"),
        ((GOLDEN / "torch_model.pth").read_bytes()[:-30], "cannot be read as a PyTorch file"),
        (pickle.dumps([1, 2], 2), "is a pickle"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"a\.pth .*{re.escape(words)}"):
            open_weights(path)
    for body, words in (
        (b"\x80\x02]K\x01a.", "holds no state dict"),
        (b"\x80\x02}X\x05\x00\x00\x00modelK\x01s.", "holds no state dict"),
        (b"\x80\x02}.", "holds no state dict"),
        (b"\x80\x02cos\nsystem\n.", "no state dict but an object of os.system"),
    ):
        for write in (archive, legacy):
            with pytest.raises(UserError, match=rf"a\.pth .*{re.escape(words)}"):
                open_weights(write(path, body))


def write_safetensors(path, tensors):
    """A file by the format's definition. tensors: {name: (type, shape, bytes)}."""
    header, data = {}, b""
    for name, (kind, shape, content) in tensors.items():
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": offsets}
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_bfloat16_in_a_safetensors_file_is_read_exactly(tmp_path):
    """Its bits are the upper half of a float32's. Here every third tensor is float32."""
    tensors, expected = {}, {}
    for number, (name, value) in enumerate(golden("model").items()):
        bits = value.view("u4") >> 16
        tensors[name] = "BF16", value.shape, bits.astype("<u2").tobytes()
        expected[name] = (bits << 16).view("f4")
        if number % 3 == 0:
            tensors[name], expected[name] = ("F32", value.shape, value.tobytes()), value
    found = open_weights(write_safetensors(tmp_path / "a.safetensors", tensors))[1].params
    assert_same(found, expected)
    assert (found["pos_embed"] != golden("model")["pos_embed"]).any()
    known = {0x3F80: 1.0, 0xC000: -2.0, 0x0001: 2.0**-133, 0x7F7F: 3.3895313892515355e38, 0x8000: 0}
    content = np.array(list(known), "<u2").tobytes()
    file = write_safetensors(tmp_path / "b.safetensors", {"x": ("BF16", [5, 1], content)})
    found = read_safetensors(file)[0]["x"]
    np.testing.assert_array_equal(found, np.array([[v] for v in known.values()], "f4"), strict=True)


@pytest.mark.parametrize(
    "kind", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "C64", "F1_NEW"]
)
def test_a_type_that_is_not_read_is_named_and_nothing_is_called_damaged(tmp_path, kind):
    """Whether or not the installed safetensors knows it."""
    size = {"F4": 1, "C64": 16}.get(kind, 2)
    path = write_safetensors(tmp_path / "a.safetensors", {"head.bias": (kind, [2], bytes(size))})
    with pytest.raises(UserError, match=rf"a\.safetensors holds head\.bias as {kind}") as error:
        open_weights(path)
    assert "damaged" not in str(error.value)


# Names, variants, resolutions


def test_model_gives_the_heads_that_no_shape_tells(tmp_path):
    config = replace(VARIANTS["vit_micro32"], num_classes=3)
    params = mc.init_params(config, seed=2)
    save_file(params, tmp_path / "vit.safetensors")
    with pytest.raises(UserError, match=r"vit\.safetensors .* add --model vit_"):
        open_weights(tmp_path / "vit.safetensors")
    _, found = open_weights(tmp_path / "vit.safetensors", "vit_micro32")
    assert found.config == config
    with pytest.raises(UserError, match="is not convit_micro32: its local_up_to_layer is 0 where"):
        open_weights(tmp_path / "vit.safetensors", "convit_micro32")


@pytest.mark.parametrize("grid", [(5, 7), (7, 5), (14, 14), (3, 4), (2, 15), (1, 1), (10, 14)])
def test_pos_embed_is_interpolated_as_timm_does(grid):
    with np.load(GOLDEN / "torch_files.npz") as file:
        expected = file[f"resampled/{grid[0]}x{grid[1]}"]
        found = resample_pos_embed(file["pos_embed"], (5, 7), grid)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)
    assert resample_pos_embed(expected.astype("float32"), grid, (4, 4)).dtype == "float32"


def test_another_resolution_changes_pos_embed_alone(tmp_path, bare):
    _, found = open_weights(bare(), img_size=(24, 16))
    assert found.config == replace(CONFIG, img_size=(24, 16))
    expected = golden("model")
    expected["pos_embed"] = resample_pos_embed(expected["pos_embed"], (3, 3), (6, 4))
    assert_same(found.params, expected)
    mc.convit_forward(np.zeros((1, 3, 24, 16), F), found.params, found.config)
    with pytest.raises(UserError, match="25x25 pixels cannot be cut"):
        open_weights(bare(), img_size=25)
    ours = tmp_path / "ours.safetensors"
    save_checkpoint(ours, golden("model"), CONFIG, data="shapes", mean=[0.1, 0.2, 0.3])
    _, found = open_weights(ours, img_size=(24, 16))
    assert_same(found.params, expected)
    assert (found.data, found.mean) == ("shapes", [0.1, 0.2, 0.3])
    same = at_resolution(load_checkpoint(ours), 12)
    assert_same(same.params, golden("model"))


# Grids


def plain_model(tmp_path, img_size):
    """(our checkpoint, the bare tensors of it) of a plain ViT with a positional embedding."""
    config = replace(VARIANTS["vit_micro64"], img_size=img_size, num_classes=3)
    rng = np.random.default_rng(14)
    params = {k: rng.normal(0, 0.3, s).astype(F) for k, s in param_shapes(config).items()}
    about = {"mean": list(IMAGENET_MEAN), "std": [0.229, 0.224, 0.225]}
    save_checkpoint(tmp_path / "ours.safetensors", params, config, **about)
    save_file(params, tmp_path / "bare.safetensors")
    return tmp_path / "ours.safetensors", tmp_path / "bare.safetensors"


def logits_at(path, img_size, model="vit_micro64"):
    _, found = open_weights(path, model, img_size)
    image = np.random.default_rng(15).standard_normal((1, 3, *found.config.image)).astype(F)
    return mc.convit_forward(image, found.params, found.config)[0]


@pytest.mark.parametrize(
    ("made", "asked"),
    [
        ((32, 72), (32, 72)),  # 4 x 9 = 6 * 6
        ((72, 32), (72, 32)),
        ((16, 64), (16, 64)),  # 2 x 8 = 4 * 4
        ((8, 40), (8, 40)),  # no square
        ((8, 40), (16, 80)),
        ((24, 40), (72, 120)),
        ((48, 80), (24, 40)),
        (48, (24, 40)),
        (48, 64),
    ],
)
def test_a_bare_file_answers_as_the_run_does_where_img_size_is_given(tmp_path, capsys, made, asked):
    ours, bare = plain_model(tmp_path, made)
    expected = logits_at(ours, asked)
    assert capsys.readouterr().err == ""
    np.testing.assert_array_equal(logits_at(bare, asked), expected)
    said = capsys.readouterr().err
    assert ("does not say its grid" in said) is (made != asked)


def test_what_is_assumed_of_a_grid_is_said(tmp_path, capsys):
    _, bare = plain_model(tmp_path, (32, 72))
    assert open_weights(bare, "vit_micro64")[1].config.grid == (6, 6)
    assert capsys.readouterr().err == (
        f"{bare} does not say its grid: 36 patches are taken as 6x6; add --img-size HEIGHTxWIDTH "
        "if it is another\n"
    )
    open_weights(bare, "vit_micro64", 64)
    assert capsys.readouterr().err == (
        f"{bare} does not say its grid: 36 patches are taken as 6x6\n"
    )


def test_a_grid_that_may_be_either_is_not_guessed(tmp_path):
    """The square of timm, or the proportions that are asked for: their answers differ."""
    _, bare = plain_model(tmp_path, (32, 72))
    with pytest.raises(UserError, match=r"36 patches may be 4x9 or 6x6; .* miniconvit export"):
        open_weights(bare, "vit_micro64", (64, 144))
    _, bare = plain_model(tmp_path, (8, 40))
    for asked in (64, (16, 72)):
        with pytest.raises(UserError, match=r"5 patches, which are no square; add --img-size"):
            open_weights(bare, "vit_micro64", asked)


@pytest.mark.parametrize("asked", [(24, 40), (24, 24)])
def test_a_class_token_with_a_position_is_no_convit_s(tmp_path, asked):
    """Of 3x5 patches and a token there are as many places as in a square of 4x4."""
    count = asked[0] * asked[1] // 64 + 1
    _, bare = plain_model(tmp_path, (8, 8 * count))
    with pytest.raises(UserError, match=rf"{count} places for {count - 1} patches: .* no ConViT"):
        open_weights(bare, "vit_micro64", asked)
    found = open_weights(bare, "vit_micro64", (8, 8 * count))[1]
    assert found.config.grid == (1, count)


def test_an_unknown_model_is_a_sentence(bare):
    with pytest.raises(UserError, match=r"unknown model 'convit_tny' \(did you mean convit_tiny"):
        open_weights(bare(), model="convit_tny")
    with pytest.raises(UserError, match=r"unknown model ''"):
        open_weights(bare(), model="")


def test_a_training_begins_at_the_grid_of_its_images(tmp_path, capsys):
    ours, bare = plain_model(tmp_path, (32, 72))
    config = open_weights(ours)[1].config
    assert_same(read_start(bare, config, "abc").params, read_start(ours, config, "abc").params)
    assert capsys.readouterr().err == ""
    larger = replace(config, img_size=64)
    assert "from 6x6 to 8x8 patches" in read_start(bare, larger, "abc").text
    assert "36 patches are taken as 6x6" in capsys.readouterr().err


# Training from elsewhere

RUN = [*FLAGS, "--epochs", "2"]


def start_of(tmp_path, name="start.safetensors", img_size=8, num_classes=3, **about):
    """A checkpoint that fits RUN, but for what the arguments say."""
    config = replace(VARIANTS["convit_micro32"], img_size=img_size, num_classes=num_classes)
    params = mc.init_params(config, seed=40)
    rng = np.random.default_rng(41)
    params = {k: v + rng.normal(0, 0.1, v.shape).astype(F) for k, v in params.items()}
    save_checkpoint(tmp_path / name, params, config, **about)
    return tmp_path / name, params


def settings_of(**given):
    """A run of one step on the small data set."""
    usual = {"model": "convit_micro32", "img_size": 8, "steps": 1, "batch_size": 16, "seed": 3}
    return make_settings(**usual | given)


@pytest.fixture
def one_still_step(tmp_path, monkeypatch, capsys):
    """What a run begins from: the parameters after a step that moves nothing, and its lines."""
    monkeypatch.setattr("miniconvit.training.run.load_dataset", small_dataset)

    def begin(device="cpu", **given):
        still = {"lr": 1e-30, "weight_decay": 0.0, "drop_path": 0.2}
        capsys.readouterr()
        training.train(settings_of(**still, **given), tmp_path / "run", workers=1, device=device)
        params = load_checkpoint(tmp_path / "run" / "last.safetensors").params
        return params, capsys.readouterr().out

    return begin


def test_a_training_begins_where_the_file_says(tmp_path, one_still_step):
    path, params = start_of(tmp_path)
    found, out = one_still_step(init_from=str(path))
    for name, value in params.items():
        np.testing.assert_allclose(found[name], value, atol=1e-20, err_msg=name)
    assert f"begins with the parameters of {path}\n" in out
    assert str(path) in (tmp_path / "run" / "log.txt").read_text()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["settings"]["init_from"] == str(path)
    digest = os.popen(f"sha256sum {path}").read().split()[0]
    assert config["init_sha256"] == digest


def test_a_history_does_not_claim_another_beginning(tmp_path, one_still_step):
    """A run that took its parameters from elsewhere has no reading from before its first epoch."""
    path, _ = start_of(tmp_path)
    one_still_step(init_from=str(path))
    config = load_checkpoint(tmp_path / "run" / "last.safetensors").config
    history = run_history(tmp_path / "run", config, small_dataset())
    assert [epoch for epoch, _ in history] == [1]


def test_the_average_begins_there_too(tmp_path, one_still_step):
    path, params = start_of(tmp_path)
    one_still_step(init_from=str(path), ema=0.5)
    average = load_checkpoint(tmp_path / "run" / "last.safetensors").ema
    for name, value in params.items():
        np.testing.assert_allclose(average[name], value, atol=1e-7, err_msg=name)


def test_a_checkpoint_with_an_average_is_opened_as_its_average(tmp_path, one_still_step):
    """As best.safetensors of the same run, at another resolution too."""
    one_still_step(ema=0.5, mixup=0.5)
    last, best = (tmp_path / "run" / f"{name}.safetensors" for name in ("last", "best"))
    stored = load_checkpoint(last)
    stored.params["head.bias"][...] += 1.0
    optimizer = SimpleNamespace(**stored.moments)
    more = {"mean": stored.mean, "std": stored.std, "classes": stored.classes}
    save_checkpoint(last, stored.params, stored.config, ema=stored.ema, optimizer=optimizer, **more)
    for img_size in (None, 16):
        (_, found), (_, expected) = (open_weights(path, None, img_size) for path in (last, best))
        assert (found.ema, found.moments) == (None, None)
        for name, value in expected.params.items():
            np.testing.assert_array_equal(found.params[name], value, err_msg=name)


def test_the_head_begins_fresh_for_other_classes_and_pos_embed_is_interpolated(
    tmp_path, one_still_step
):
    path, params = start_of(tmp_path, img_size=32, num_classes=7)
    found, out = one_still_step(init_from=str(path))
    config = replace(VARIANTS["convit_micro32"], img_size=8, num_classes=3, drop_path_rate=0.2)
    expected = params | {"pos_embed": resample_pos_embed(params["pos_embed"], (8, 8), (2, 2))}
    fresh = mc.init_params(config, seed=3)
    expected |= {name: fresh[name] for name in ("head.weight", "head.bias")}
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-20, err_msg=name)
    assert "pos_embed interpolated from 8x8 to 2x2 patches" in out
    assert "head.weight and head.bias begin fresh, for 3 classes" in out


@pytest.mark.parametrize(
    ("classes", "fresh"),
    [(["reddish", "greenish", "bluish"], False), (["a", "b", "c"], True), (None, False)],
)
def test_as_many_classes_of_other_names_begin_fresh_too(tmp_path, classes, fresh):
    path, params = start_of(tmp_path, classes=classes)
    config = replace(VARIANTS["convit_micro32"], img_size=8, num_classes=3)
    start = read_start(path, config, small_dataset().classes)
    assert ("head.weight" not in start.params) is fresh
    assert set(params) - set(start.params) == ({"head.weight", "head.bias"} if fresh else set())


def test_a_run_folder_and_a_file_of_others_serve_too(tmp_path, one_still_step):
    first = tmp_path / "first"
    training.train(settings_of(lr=0.1), first, workers=1, quiet=True)
    best = load_checkpoint(first / "best.safetensors")
    found, _ = one_still_step(init_from=str(first))
    for name, value in best.params.items():
        np.testing.assert_allclose(found[name], value, atol=1e-20, err_msg=name)
    save_file(best.params, tmp_path / "bare.safetensors")
    start = read_start(tmp_path / "bare.safetensors", best.config, small_dataset().classes)
    assert_same(start.params, best.params)


def test_frozen_gates_stand_where_the_file_has_them(tmp_path, one_still_step):
    path, params = start_of(tmp_path)
    found, _ = one_still_step(init_from=str(path), freeze="gates")
    for name in (name for name in params if name.endswith("gating_param")):
        np.testing.assert_array_equal(found[name], params[name])


def test_a_file_in_float64_is_trained_in_float32(tmp_path, one_still_step):
    _, params = start_of(tmp_path)
    wide = {name: value.astype("float64") for name, value in params.items()}
    save_checkpoint(tmp_path / "wide.safetensors", wide, CONFIG_8)
    found, _ = one_still_step(init_from=str(tmp_path / "wide.safetensors"))
    for name, value in params.items():
        np.testing.assert_allclose(found[name], value, atol=1e-20, err_msg=name)
        assert found[name].dtype == "float32"


def test_the_parameters_are_put_on_the_device(tmp_path, one_still_step, cupy):
    path, params = start_of(tmp_path)
    found, _ = one_still_step(init_from=str(path), device="cuda")
    for name, value in params.items():
        np.testing.assert_allclose(found[name], value, atol=1e-20, err_msg=name)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "convit_mini32"], "its embed_dim is 48 where 72 .*add --model convit_micro32"),
        (["--patch-size", "2"], "its patch_size is 4 where 2 was expected; add --model convit_m"),
        (["--local-up-to-layer", "1"], "its local_up_to_layer is 3 where 1"),
        (["--attention", "psa"], "its attention is gpsa where psa"),
    ],
    ids=str,
)
def test_another_architecture_is_refused_before_anything_is_written(
    tmp_path, program, flags, words
):
    path, _ = start_of(tmp_path)
    status, out, err = program("train", *RUN, *flags, "--init-from", path, "--out", tmp_path / "r")
    assert (status, out) == (2, "")
    assert re.fullmatch(rf"Error: --init-from {path} does not fit: .*{words}.*\n", err)
    assert not (tmp_path / "r" / "config.json").exists()
    status, _, err = program("train", *RUN, "--init-from", "nothing", "--out", tmp_path / "r")
    assert (status, err.count("\n")) == (2, 1)
    assert "there is no checkpoint nothing" in err


def test_a_variant_with_other_patches_is_told_by_its_flag(tmp_path):
    config = replace(VARIANTS["convit_micro32"], img_size=(8, 12), patch_size=(2, 4))
    save_checkpoint(tmp_path / "x.safetensors", mc.init_params(config), config)
    with pytest.raises(UserError, match=r"its patch_size is .*; add --patch-size 2x4$"):
        read_start(tmp_path / "x.safetensors", replace(config, patch_size=4), ("a",) * 10)
    config = replace(VARIANTS["convit_micro32"], local_up_to_layer=1)
    save_checkpoint(tmp_path / "y.safetensors", mc.init_params(config), config)
    with pytest.raises(UserError, match=r"; add --local-up-to-layer 1$"):
        read_start(tmp_path / "y.safetensors", VARIANTS["convit_micro32"], ("a",) * 10)


def test_the_start_is_kept_as_a_path_that_every_folder_finds(tmp_path, program, monkeypatch):
    path, _ = start_of(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert program("train", *RUN, "--init-from", path.name, "--out", "run")[0] == 0
    assert json.loads(Path("run/config.json").read_text())["settings"]["init_from"] == str(path)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    start = ["--init-from", "../" + path.name]
    assert program("train", *RUN, *start, "--resume", "--out", "../run")[0] == 0
    assert program("train", "--resume", "--out", "../run")[0] == 0


def test_resume_needs_the_file_until_the_first_checkpoint_and_no_longer(tmp_path, monkeypatch):
    monkeypatch.setattr("miniconvit.training.run.load_dataset", small_dataset)
    path, params = start_of(tmp_path)
    run, whole = tmp_path / "run", tmp_path / "whole"
    settings = settings_of(init_from=str(path), lr=0.01, steps=8)

    def go_on(out, settings=settings):
        training.train(settings, out, resume=True, workers=1, quiet=True)

    go_on(whole)
    go_on(run)
    (run / "last.safetensors").unlink()  # as after a kill before the first checkpoint
    content = path.read_bytes()
    save_checkpoint(path, params | {"norm.bias": params["norm.bias"] + F(1)}, CONFIG_8)
    with pytest.raises(UserError, match=rf"{path} has changed since this run began"):
        go_on(run)
    assert not (run / "last.safetensors").exists()
    path.write_bytes(content)
    go_on(run)
    for name in ("last.safetensors", "best.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    path.unlink()
    go_on(run)
    with pytest.raises(UserError, match=rf"began with --init-from {path} and cannot go on with"):
        go_on(run, replace(settings, init_from="other"))
    with pytest.raises(UserError, match="there is no checkpoint"):
        go_on(tmp_path / "another")


CONFIG_8 = replace(VARIANTS["convit_micro32"], img_size=8, num_classes=3)


def test_settings_of_before_begin_from_nothing():
    settings = make_settings()
    assert settings.init_from is None
    old = {k: v for k, v in vars(settings).items() if k != "init_from"}
    assert Settings(**old) == settings
    with pytest.raises(UserError, match="--init-from must be a path or a name, not 5"):
        make_settings(init_from=5)


# The commands


def test_eval_takes_any_file(tmp_path, bare, program):
    path, params = start_of(tmp_path, mean=list(IMAGENET_MEAN), std=[0.229, 0.224, 0.225])
    save_file(params, tmp_path / "bare.safetensors")
    flags = ["--data", "shapes", "--device", "cpu", "--json"]
    status, out, _ = program("eval", path, *flags)
    assert status == 0
    expected = json.loads(out) | {"checkpoint": str(tmp_path / "bare.safetensors")}
    status, out, _ = program("eval", tmp_path / "bare.safetensors", *flags)
    assert (status, json.loads(out)) == (0, expected)
    status, _, err = program("eval", tmp_path / "bare.safetensors")
    assert (status, "add --data" in err) == (2, True)
    status, _, err = program("eval", bare(), *flags, "--img-size", "8")
    assert (status, "trained for other classes" in err) == (2, True)
    start_of(tmp_path, "large.safetensors", img_size=16, std=[0.2] * 3, mean=[0.4] * 3)
    assert program("eval", tmp_path / "large.safetensors", *flags)[0] == 2
    assert program("eval", tmp_path / "large.safetensors", *flags, "--img-size", "8")[0] == 0


def test_predict_and_inspect_take_any_file(tmp_path, bare, program):
    Image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(6).integers(0, 256, (12, 12, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    flags = ["--device", "cpu", "--json"]
    answers = []
    for path in (bare(), GOLDEN / "torch_model.pth", GOLDEN / "torch_model_legacy.pth"):
        status, out, _ = program("predict", path, tmp_path / "a.png", *flags)
        assert status == 0
        answers.append(json.loads(out)["images"])
    assert answers[0] == answers[1] == answers[2]
    top = answers[0][0]["top"]
    assert [entry["class"] for entry in top] == [f"class {entry['index']}" for entry in top]
    image = (pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    params = {k: v.astype("float64") for k, v in golden("model").items()}
    logits, _ = mc.convit_forward(image.transpose(2, 0, 1)[None], params, CONFIG)
    probabilities = np.exp(logits[0]) / np.exp(logits[0]).sum()
    for entry in top:
        assert entry["probability"] == pytest.approx(probabilities[entry["index"]], rel=1e-4)
    status, out, _ = program("inspect", GOLDEN / "torch_model.pth", tmp_path / "a.png", "--json")
    assert (status, len(json.loads(out)["layers"])) == (0, 3)


def test_export_writes_what_timm_loads_and_what_we_read_again(tmp_path, program):
    out = tmp_path / "model.safetensors"
    status, text, _ = program("export", GOLDEN / "torch_model.pth", out)
    assert status == 0
    assert_same_set(load_file(out), golden("model"))
    assert timm_call(CONFIG) in " ".join(text.split()).replace("( ", "(").replace(" )", ")")
    assert f'load_state_dict(safetensors.torch.load_file("{out}"))' in text
    found = load_checkpoint(out)
    assert (found.config, found.mean) == (CONFIG, list(IMAGENET_MEAN))
    before = out.read_bytes()
    for argv, words in (
        (["export", GOLDEN / "torch_model.pth", out], "exists"),
        (["export", GOLDEN / "torch_model.pth", tmp_path / "a.pth"], "must end in .safetensors"),
        (["export", out, tmp_path / "b.safetensors", "--img-size", "8x12"], "grid of 2x3"),
    ):
        status, text, err = program(*argv)
        assert (status, text, err.count("\n"), words in err) == (2, "", 1, True)
    assert out.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors"]
    assert program("export", out, tmp_path / "c.safetensors", "--img-size", "8")[0] == 0
    assert load_file(tmp_path / "c.safetensors")["pos_embed"].shape == (1, 4, 8)


def assert_same_set(found, expected):
    assert_same({name: found[name] for name in sorted(found)}, dict(sorted(expected.items())))


def test_export_of_a_run_leaves_the_moments_out(tmp_path, program):
    path, params = start_of(tmp_path, classes=["a", "b", "c"], data="shapes")
    optimizer = mc.AdamW(params)
    save_checkpoint(path, params, CONFIG_8, optimizer=optimizer, classes=["a", "b", "c"])
    assert program("export", path, tmp_path / "out.safetensors")[0] == 0
    assert_same_set(load_file(tmp_path / "out.safetensors"), params)
    assert load_checkpoint(tmp_path / "out.safetensors").classes == ["a", "b", "c"]


def test_timm_s_calls():
    assert timm_call(VARIANTS["convit_tiny"]) == "timm.create_model('convit_tiny')"
    assert timm_call(replace(VARIANTS["convit_small"], num_classes=7, img_size=160)) == (
        "timm.create_model('convit_small', img_size=160, num_classes=7)"
    )
    assert timm_call(VARIANTS["convit_base_plus"]) == (
        "timm.create_model('convit_base', embed_dim=64)"
    )
    assert timm_call(VARIANTS["convit_micro32"]) == (
        "timm.create_model('convit_tiny', img_size=32, patch_size=4, num_classes=10, embed_dim=12, "
        "depth=4, local_up_to_layer=3)"
    )
    for change in ({"attention": "psa"}, {"img_size": (32, 48)}):
        with pytest.raises(UserError, match="timm's ConViT has no"):
            timm_call(replace(VARIANTS["convit_micro32"], **change))


# timm itself, where it is installed


@pytest.fixture(scope="module")
def timm():
    pytest.importorskip("torch", reason="needs the extra `parity`")
    return pytest.importorskip("timm", reason="needs the extra `parity`")


def randomise(model, seed):
    """Random values of a size at which all parts of the model matter, in float64."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim > 1 and name not in ("cls_token", "pos_embed"):
            noise *= value[0].numel() ** -0.5
        elif name.endswith("bias"):
            noise *= 0.3
        elif value.ndim == 1 and not name.endswith("gating_param"):
            noise = 1 + 0.3 * noise
        value.copy_(noise)
    return model


@pytest.mark.parametrize(
    "name",
    [
        "convit_tiny",
        pytest.param("convit_small", marks=pytest.mark.full),
        pytest.param("convit_base", marks=pytest.mark.full),
    ],
)
def test_logits_and_every_gradient_of_the_published_models_are_timm_s(timm, tmp_path, name):
    """timm's random model, saved by torch and read here; float64, one backward pass."""
    import torch
    from torch.nn.functional import cross_entropy

    with torch.no_grad():
        model = randomise(timm.create_model(name), 5).eval()
    torch.save(model.state_dict(), tmp_path / "model.pth")
    config, params = (x := open_weights(tmp_path / "model.pth")[1]).config, x.params
    assert variant_name(config) == name
    assert [(k, v.shape) for k, v in params.items()] == [
        (k, tuple(v.shape)) for k, v in model.state_dict().items()
    ]
    params = {k: v.astype("float64") for k, v in params.items()}
    images = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    labels = torch.tensor([17, 905])
    theirs = model.double()(images)
    loss = cross_entropy(theirs, labels)
    loss.backward()
    logits, cache = mc.convit_forward(images.numpy(), params, config)
    np.testing.assert_allclose(logits, theirs.detach().numpy(), rtol=1e-9, atol=1e-11)
    ours, cache_loss = mc.cross_entropy_forward(logits, labels.numpy())
    assert float(ours) == pytest.approx(loss.item(), rel=1e-11)
    grads = mc.convit_backward(mc.cross_entropy_backward(1.0, cache_loss), cache)
    expected = {k: p.grad.numpy() for k, p in model.named_parameters()}
    assert list(grads) == list(expected)
    largest = max(np.linalg.norm(value) for value in expected.values())
    for key, value in expected.items():
        if key.endswith("pos_proj.bias"):  # exactly 0; autograd finds rounding noise
            assert not grads[key].any()
            assert np.linalg.norm(value) < 1e-12 * largest
        else:
            error = np.linalg.norm(grads[key] - value) / np.linalg.norm(value)
            assert error < 1e-9, key


def saved_as_people_do(timm, torch, model):
    """Name to what a script saves of this model; each holds its weights once, or as an average."""
    optimizer = torch.optim.AdamW(model.parameters())
    with torch.enable_grad():
        model(torch.randn(2, 3, 12, 12)).sum().backward()
    optimizer.step()
    halved = {k: v * 0.5 for k, v in model.state_dict().items()}
    averaged = torch.optim.swa_utils.AveragedModel(model)
    return {
        "Lightning": {
            "state_dict": {f"net.{k}": v for k, v in model.state_dict().items()},
            "optimizer_states": [optimizer.state_dict()],
            "hparams": SimpleNamespace(size=torch.Size([1]), dtype=torch.half, path=Path("a")),
        },
        "swa": {"swa": averaged.state_dict(), "last": halved, "rng": torch.get_rng_state()},
        "ema": {"model": halved, "model_ema": timm.utils.ModelEmaV3(model).state_dict()},
        "data parallel": torch.nn.DataParallel(model).state_dict(),
        "parameters": dict(model.named_parameters()),
        "compiled": {f"_orig_mod.module.{k}": v for k, v in model.state_dict().items()},
        "tuple": (model.state_dict(), optimizer.state_dict(), np.float64(3)),
        "transposed": {
            k: v.t().contiguous().t() if v.ndim == 2 else v for k, v in model.state_dict().items()
        },
        "negated": {k: torch._neg_view(-v) for k, v in model.state_dict().items()},
        "random": {"net": dict(model.state_dict()), "numpy": np.random.get_state()},
    }


@pytest.mark.full
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("as_zip", [True, False])
def test_what_scripts_save_gives_timm_s_logits(timm, tmp_path, protocol, as_zip):
    import torch
    from timm.models.convit import ConVit

    shape = {"img_size": 12, "patch_size": 4, "num_classes": 5, "embed_dim": 2, "depth": 3}
    model = ConVit(num_heads=4, mlp_ratio=2.0, local_up_to_layer=2, **shape).eval()
    with torch.no_grad():
        randomise(model, 6)
        images = torch.randn(2, 3, 12, 12)
        for name, value in saved_as_people_do(timm, torch, model).items():
            path = tmp_path / f"{name}.pth"
            torch.save(value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=as_zip)
            found = open_weights(path)[1]
            logits, _ = mc.convit_forward(images.numpy(), found.params, found.config)
            expected = model(images).numpy()
            np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.full
def test_a_plain_vit_on_an_oblong_grid_of_as_many_patches_as_a_square_gives_timm_s_logits(
    timm, tmp_path
):
    """3x12 patches; timm's ConViT without GPSA, loaded strictly, saved in bfloat16 too."""
    import safetensors.torch
    import torch
    from timm.models.convit import ConVit

    shape = {"img_size": (24, 96), "patch_size": 8, "num_classes": 5, "embed_dim": 12, "depth": 4}
    model = ConVit(num_heads=4, local_up_to_layer=0, **shape).eval()
    with torch.no_grad():
        randomise(model, 7)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            model = model.to(dtype).float()
            images = torch.randn(2, 3, 24, 96)
            path = tmp_path / "a.safetensors"
            safetensors.torch.save_file(
                {k: v.to(dtype) for k, v in model.state_dict().items()}, path
            )
            _, found = open_weights(path, "vit_micro64", (24, 96))
            logits, _ = mc.convit_forward(images.numpy(), found.params, found.config)
            np.testing.assert_allclose(logits, model(images).numpy(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"qkv_bias": True, "mlp_ratio": 2.75},
        {"use_pos_embed": False, "in_chans": 1},
        {"img_size": (24, 12), "patch_size": (8, 4)},
        {"local_up_to_layer": 0, "img_size": (8, 12)},
        {"local_up_to_layer": 3},
        {"num_heads": 1},
    ],
    ids=str,
)
def test_an_exported_file_loads_strictly_into_the_model_that_the_printed_call_makes(
    timm, tmp_path, program, change
):
    import safetensors.torch
    import torch

    config = replace(CONFIG, **change)
    rng = np.random.default_rng(9)
    params = {k: rng.normal(0, 0.5, s) for k, s in param_shapes(config).items()}
    save_checkpoint(tmp_path / "ours.safetensors", params, config)
    file = tmp_path / "out.safetensors"
    status, out, _ = program("export", tmp_path / "ours.safetensors", file)
    assert status == 0
    scope = {"timm": timm, "safetensors": safetensors}
    exec(re.search(r"^model = .*\Z", out, re.DOTALL | re.MULTILINE)[0], scope)
    images = rng.standard_normal((2, config.in_chans, *config.image))
    with torch.no_grad():
        model = scope["model"].double().eval()
        model.load_state_dict(safetensors.torch.load_file(file), strict=True)
        theirs = model(torch.from_numpy(images)).numpy()
    logits, _ = mc.convit_forward(images, params, config)
    np.testing.assert_allclose(logits, theirs, rtol=1e-10, atol=1e-12)


def test_the_best_checkpoint_of_a_run_loads_into_timm_as_it_is(timm, tmp_path, monkeypatch):
    import safetensors.torch
    import torch

    monkeypatch.setattr("miniconvit.training.run.load_dataset", small_dataset)
    training.train(settings_of(lr=0.1), tmp_path / "run", workers=1, quiet=True)
    best = tmp_path / "run" / "best.safetensors"
    model = eval(timm_call(load_checkpoint(best).config), {"timm": timm}).eval()
    model.load_state_dict(safetensors.torch.load_file(best), strict=True)
    images = np.random.default_rng(3).standard_normal((4, 3, 8, 8)).astype(F)
    found = load_checkpoint(best)
    logits, _ = mc.convit_forward(images, found.params, found.config)
    with torch.no_grad():
        theirs = model(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(logits, theirs, rtol=1e-4, atol=1e-5)


def test_interpolation_is_timm_s(timm):
    """timm computes in float32, weights too: torch in float64 tells which of the two is exact."""
    import torch
    from timm.layers import resample_abs_pos_embed

    pos_embed = torch.from_numpy(np.random.default_rng(8).standard_normal((1, 196, 6)))
    image = pos_embed.reshape(1, 14, 14, 6).permute(0, 3, 1, 2)
    for grid in ((16, 16), (7, 7), (24, 10), (14, 14), (1, 30)):
        theirs = resample_abs_pos_embed(pos_embed, grid, (14, 14), num_prefix_tokens=0).numpy()
        exact = torch.nn.functional.interpolate(image, grid, mode="bicubic", antialias=True)
        exact = exact.permute(0, 2, 3, 1).reshape(1, -1, 6).numpy()
        found = resample_pos_embed(pos_embed.numpy(), (14, 14), grid)
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-12)
        np.testing.assert_allclose(found, theirs, rtol=0, atol=2e-5)
