"""Classes by their names: ImageNet's order, and models on folders with some of their classes."""

import json
import os
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from miniconvit import ConViTConfig, UserError, init_params
from miniconvit.checkpoints.checkpoint import save_checkpoint
from miniconvit.data.classes import IMAGENET, places_of

Image = pytest.importorskip("PIL.Image")
SAMPLE = Path(os.environ.get("MINICONVIT_DATA", "/nowhere"), "imagenet-sample")


def test_imagenets_order():
    """The indices of the ten classes of Imagenette as its authors give them, and the ends."""
    published = {
        "n01440764": 0, "n02102040": 217, "n02979186": 482, "n03000684": 491, "n03028079": 497,
        "n03394916": 566, "n03417042": 569, "n03425413": 571, "n03445777": 574, "n03888257": 701,
        "n15075141": 999,
    }  # fmt: skip
    assert len(set(IMAGENET)) == 1000 and sorted(IMAGENET) == list(IMAGENET)
    assert all(re.fullmatch(r"n\d{8}", name) for name in IMAGENET)
    assert {name: IMAGENET.index(name) for name in published} == published


def test_imagenets_order_is_timms():
    info = pytest.importorskip("timm.data").ImageNetInfo("imagenet-1k")
    assert tuple(info.label_names()) == IMAGENET


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="MINICONVIT_DATA names no imagenet-sample")
def test_the_sample_is_of_these_classes():
    assert {path.name for path in (SAMPLE / "natural").iterdir()} < set(IMAGENET)


def test_places():
    assert places_of(["c", "a"], ["a", "b", "c"]).tolist() == [2, 0]
    with pytest.raises(
        UserError, match=r"2 of 3 are not among the 2 .* the first x .*begin with a"
    ):
        places_of(["a", "x", "y"], ["a", "b"])
    with pytest.raises(UserError, match=r"upper and lower case \('A' and 'a'\)"):
        places_of(["A"], ["a", "b"])


# eval


def photos(root, *names):
    for number, name in enumerate(names):
        for split, count in (("train", 2), ("val", 3)):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for image in range(count):
                colour = (80 * number % 256, 40 * image, 99)
                Image.new("RGB", (9, 9), colour).save(root / split / name / f"{image}.png")
    return root


def model(path, num_classes, answer=None, **described):
    """A checkpoint that always answers with this class."""
    config = ConViTConfig(
        img_size=8, patch_size=4, embed_dim=8, num_heads=1, depth=2, local_up_to_layer=1,
        num_classes=num_classes,
    )  # fmt: skip
    params = init_params(config, seed=0)
    params["head.weight"][:] = 0
    params["head.bias"][:] = np.arange(num_classes) == answer
    save_checkpoint(path, params, config, mean=[0.5] * 3, std=[0.5] * 3, **described)
    return path


def evaluated(program, file, root, *flags):
    flags = ["--data", "imagefolder", "--data-dir", root, "--device", "cpu", *flags]
    status, out, err = program("eval", file, *flags, "--json")
    assert status == 0, err
    return json.loads(out)


def test_eval_on_some_of_a_models_classes(tmp_path, program):
    """The model always says "heron": right for a third of the images, whatever the folder has."""
    names = ["crow", "eagle", "gull", "heron", "swan"]
    file = model(tmp_path / "m.safetensors", 5, names.index("heron"), classes=names)
    root = photos(tmp_path / "some", "crow", "heron", "swan")
    found = evaluated(program, file, root)
    assert found["classes"] == "3 of the 5 that the model tells apart"
    assert (found["images"], found["top1"]) == (9, pytest.approx(1 / 3))
    loss = np.log(4 + np.e) - 1 / 3
    assert found["loss"] == pytest.approx(loss, rel=1e-6)
    assert evaluated(program, file, root, "--split", "train")["top1"] == pytest.approx(1 / 3)
    one = photos(tmp_path / "one", "gull")
    assert evaluated(program, file, one)["top1"] == 0
    assert "classes" not in evaluated(program, file, photos(tmp_path / "all", *names))


def test_eval_of_a_published_model_on_some_of_imagenets_classes(tmp_path, program):
    chosen = [IMAGENET[index] for index in (7, 340, 888)]
    file = model(tmp_path / "m.safetensors", 1000, 340)
    found = evaluated(program, file, photos(tmp_path / "some", *chosen))
    assert found["classes"] == "3 of the 1,000 that the model tells apart"
    assert found["top1"] == pytest.approx(1 / 3)


def refused(program, file, root, *words):
    status, out, err = program("eval", file, "--data", "imagefolder", "--data-dir", root)
    assert (status, out) == (2, "")
    for word in ("was trained for other classes", *words):
        assert word in err


def test_eval_says_the_first_name_that_differs(tmp_path, program):
    file = model(tmp_path / "m.safetensors", 1000)
    root = photos(tmp_path / "words", IMAGENET[5], "zebra", "zoo")
    refused(program, file, root, "2 of 3 are not among the 1,000", "the first zebra", "n01440764")
    file = model(tmp_path / "five.safetensors", 2, classes=["pâté", "quiche"])
    root = photos(tmp_path / "nfd", unicodedata.normalize("NFD", "pâté"), "quiche")
    refused(program, file, root, "form of their Unicode characters")
    file = model(tmp_path / "bare.safetensors", 4)
    refused(program, file, root, "tells 4 apart and names none, and here are 2")


def test_a_model_without_names_takes_the_order_of_the_folders_and_says_so(tmp_path, program):
    file = model(tmp_path / "bare.safetensors", 3, 1)
    found = evaluated(program, file, photos(tmp_path / "three", "a", "b", "c"))
    assert found["classes"] == "by the order of the folders: the model names none"
    assert found["top1"] == pytest.approx(1 / 3)


def test_a_model_of_one_class_is_not_evaluated(tmp_path, program):
    file = model(tmp_path / "one.safetensors", 1, classes=["a"])
    root = photos(tmp_path / "a", "a")
    status, out, err = program("eval", file, "--data", "imagefolder", "--data-dir", root)
    assert (status, out) == (2, "") and "every answer would be right" in err


# predict


def test_predict_prints_what_it_can_and_names_what_it_cannot(tmp_path, program):
    file = model(tmp_path / "m.safetensors", 2, 0, classes=["a", "b"])
    root = photos(tmp_path / "photos", "a", "b")
    bad = root / "val" / "a" / "1.png"
    bad.write_bytes(b"no image")
    (root / "val" / "notes.txt").write_text("x")
    gone, empty, glob = tmp_path / "gone.jpg", tmp_path / "empty", tmp_path / "*" / "[ab].png"
    empty.mkdir()
    flags = [root / "val", gone, root / "train" / "b" / "0.png", empty, glob, "--device", "cpu"]
    status, out, err = program("predict", file, *flags)
    good = [f"val/{place}.png" for place in ("a/0", "a/2", "b/0", "b/1", "b/2")] + ["train/b/0.png"]
    assert status == 1
    assert re.findall(r"^/.*$", out, re.MULTILINE) == [str(root / name) for name in good]
    lines = err.splitlines()
    assert lines[0] == f"ignored in {root / 'val'}: .txt (1)"
    words = [f"{bad} is not an image", f"no image {gone}", f"{empty} holds no", f"matches {glob}"]
    assert len(lines) == 5
    for line, word in zip(lines[1:], words, strict=True):
        assert line.startswith("Error: ") and word in line
    status, out, _ = program("predict", file, *flags, "--json")
    found = json.loads(out)
    assert status == 1 and len(found["images"]) == 6
    assert [failure["file"] for failure in found["failed"]] == [
        str(path) for path in (bad, gone, empty, glob)
    ]


def test_a_file_may_be_called_as_a_pattern(tmp_path, program):
    file = model(tmp_path / "m.safetensors", 2, 0, classes=["a", "b"])
    Image.new("RGB", (9, 9)).save(tmp_path / "photo [1].png")
    status, _, err = program("predict", file, tmp_path / "photo [1].png", "--device", "cpu")
    assert (status, err) == (0, "")
