"""Where a checkpoint lies: names, and folders as the hub gives them."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.numpy import save_file
from test_torch_file import GOLDEN, golden
from test_weights import CONFIG, assert_same

from miniconvit import UserError
from miniconvit.checkpoints.checkpoint import save_checkpoint
from miniconvit.checkpoints.weights import open_weights, read_start
from miniconvit.config import IMAGENET_MEAN


@pytest.fixture
def folder(tmp_path):
    """Makes a folder as the hub gives it: the golden model, and what its config.json says."""

    def make(config=None, name="model.safetensors"):
        place = tmp_path / "hub"
        place.mkdir(exist_ok=True)
        for file in place.iterdir():
            file.unlink()
        if name.endswith("bin"):
            (place / name).write_bytes((GOLDEN / "torch_model.pth").read_bytes())
        elif name:
            save_file(golden("model"), place / name)
        if config is not None:
            (place / "config.json").write_text(json.dumps(config))
        return place

    return make


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub whose every file is the golden model; what was asked for, call by call."""
    save_file(golden("model"), tmp_path / "fetched.safetensors")
    asked = []

    def hf_hub_download(*args):
        asked.append(args)
        return str(tmp_path / "fetched.safetensors")

    module = SimpleNamespace(hf_hub_download=hf_hub_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.chdir(tmp_path)
    return asked


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_of_the_hub_is_opened(folder, name):
    place = folder({"architecture": "convit_tiny", "num_classes": 5}, name)
    where, found = open_weights(place)
    assert where == place / name
    assert_same(found.params, golden("model"))
    assert (found.config, found.mean, found.classes) == (CONFIG, list(IMAGENET_MEAN), None)
    assert_same(read_start(place, CONFIG, "abcde").params, golden("model"))


def test_its_config_says_normalisation_size_and_classes(folder, capsys):
    nested = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1], "input_size": [3, 12, 12]}
    names = {"label_names": ["a", "b", "c", "d", "e"]}
    for config in (
        {"architecture": "convit_tiny", "pretrained_cfg": nested, **names},
        {"architecture": "convit_tiny", **nested, **names},
        {"architecture": "x", "mean": [9, 9, 9], "pretrained_cfg": nested, **names},
    ):
        place = folder(config)
        is_convit = config["architecture"] == "convit_tiny"
        for source in (place, place / "model.safetensors")[: 1 + is_convit]:
            _, found = open_weights(source)
            assert (found.mean, found.std) == (nested["mean"], nested["std"])
            assert found.classes == names["label_names"]
            assert capsys.readouterr().err == ""
    _, found = open_weights(place, img_size=24)
    assert (found.config.grid, capsys.readouterr().err) == ((6, 6), "")


def test_the_config_of_another_model_beside_a_file_is_left_alone(folder, capsys):
    other = {"architecture": "vit_base_patch16_224", "mean": [0.5] * 3, "std": [0.5] * 3}
    place = folder(other | {"label_names": list("abcde")})
    _, found = open_weights(place / "model.safetensors", img_size=12)
    assert (found.mean, found.classes) == (list(IMAGENET_MEAN), None)
    assert capsys.readouterr().err == (
        f"{place / 'config.json'} describes vit_base_patch16_224, no ConViT: it is left alone\n"
    )
    assert open_weights(place)[1].mean == [0.5] * 3
    place = folder(other | {"architecture": "convit_small"})
    assert open_weights(place / "model.safetensors")[1].mean == [0.5] * 3


def test_a_config_that_does_not_fit_is_a_sentence(folder):
    for change, words in (
        ({"mean": [0.5]}, r"config\.json does not fit: its mean is \[0\.5\] where 3"),
        ({"std": "large"}, r"config\.json does not fit: its std is large where 3"),
        ({"std": [1, 1, 0]}, r"config\.json does not fit: its std"),
    ):
        with pytest.raises(UserError, match=words):
            open_weights(folder({"architecture": "convit_tiny", "pretrained_cfg": change}))
    place = folder()
    (place / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be read \(.*\): repair it"):
        open_weights(place)


@pytest.mark.parametrize(
    "config",
    [
        [1],
        {"mean": [9, 9, 9]},
        {"architecture": "x", "pretrained_cfg": 5, "input_size": [3, "a", 2], "label_names": ["a"]},
        {"architecture": "x", "input_size": [3, 99, 99]},
    ],
    ids=str,
)
def test_a_config_that_says_nothing_of_the_weights_changes_nothing(folder, config):
    _, found = open_weights(folder(config))
    assert (found.config, found.mean, found.classes) == (CONFIG, list(IMAGENET_MEAN), None)


def test_a_run_goes_before_and_an_empty_folder_is_a_sentence(folder):
    place = folder()
    save_checkpoint(place / "best.safetensors", golden("model"), CONFIG, data="shapes")
    (place / "config.json").write_text("{")  # of a run nothing is asked there
    assert open_weights(place)[1].data == "shapes"
    with pytest.raises(UserError, match="hub holds no checkpoint: give the folder of a run"):
        open_weights(folder({}, name=""))


@pytest.mark.parametrize(
    "name",
    [
        "convit_small.fb_in1k",
        "timm/convit_small.fb_in1k",
        "hf-hub:timm/convit_small.fb_in1k",
        "hf_hub:timm/convit_small.fb_in1k",
        "hf-hub:convit_small.fb_in1k",
    ],
)
def test_every_form_of_a_published_name_is_fetched(hub, capsys, name):
    for source in (name, Path(name)):
        assert_same(open_weights(source)[1].params, golden("model"))
    assert hub == [("timm/convit_small.fb_in1k", "model.safetensors")] * 2
    assert "Fetching timm/convit_small.fb_in1k (111 MB)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("convit_tiny", r"give a run folder, .* or one of convit_tiny\.fb_in1k, "),
        ("timm/convit_tiny", r"give a run folder, .* or one of convit_tiny\.fb_in1k, "),
        ("hf-hub:me/mine", "are fetched; download it, and give its folder or file"),
        ("hf_hub:timm/vit_tiny.x", "are fetched; download it, and give its folder or file"),
        ("https://example.org/a.pth", "are fetched; download it, and give its folder or file"),
        ("convit_tiny.fb_in1k.pth", "give a run folder"),
    ],
)
def test_another_name_is_not_fetched_and_is_a_sentence(hub, name, words):
    with pytest.raises(UserError, match=rf"there is no checkpoint {name}: .*{words}"):
        open_weights(name)
    assert hub == []


def test_what_a_folder_holds_goes_before_a_name(hub, tmp_path):
    (tmp_path / "timm").mkdir()
    save_file(golden("model"), tmp_path / "timm" / "convit_tiny.fb_in1k")
    open_weights("timm/convit_tiny.fb_in1k")
    assert hub == []


def test_what_the_hub_answers(monkeypatch, capsys, tmp_path):
    path, asked = tmp_path / "bare.safetensors", []
    save_file(golden("model"), path)

    def hf_hub_download(*args):
        asked.append(args)
        if len(asked) == 3:
            raise ConnectionError("no route\nto the hub")
        return str(path)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(
        sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=hf_hub_download)
    )
    assert_same(open_weights("convit_tiny.fb_in1k")[1].params, golden("model"))
    assert "timm/convit_tiny.fb_in1k (23 MB)" in capsys.readouterr().err
    with pytest.raises(UserError, match="is not convit_base: its patch_size is 4"):
        open_weights(Path("convit_base.fb_in1k"), model="convit_base")
    with pytest.raises(UserError, match=r"could not be fetched .*no route to the hub.* network"):
        open_weights("convit_small.fb_in1k")
    names = "timm/convit_tiny.fb_in1k", "timm/convit_base.fb_in1k", "timm/convit_small.fb_in1k"
    assert asked == [(name, "model.safetensors") for name in names]
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install huggingface_hub$"):
        open_weights("convit_tiny.fb_in1k")
