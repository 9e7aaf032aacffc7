"""Settings: each is declared in one place, and what is stored of them keeps its form."""

import json
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from miniconvit import VARIANTS, UserError
from miniconvit.data.dataset import SOURCES
from miniconvit.training import settings as module
from miniconvit.training.settings import DEFAULT_RECIPE, RECIPES, Settings, make_settings

ROOT = Path(__file__).parents[2]

STORED = {
    "data": "cifar10", "subset": 1.0, "recipe": "paper32", "model": "convit_tiny32",
    "img_size": 32, "patch_size": 4, "local_up_to_layer": 10, "locality_strength": 1.0,
    "epochs": 300, "steps": None, "batch_size": 128, "lr": 0.000125, "weight_decay": 0.05,
    "warmup_epochs": 5.0, "clip_grad": None, "label_smoothing": 0.1, "drop_path": 0.1,
    "augment": "paper", "seed": 0, "attention": "gpsa", "local_init": True, "freeze": None,
    "broken": "refuse", "repeats": 3, "mixup": 0.8, "cutmix": 1.0, "ema": None, "passes": 1,
    "init_from": None,
}  # fmt: skip
"""The paper's recipe as the checkpoints of earlier runs hold it."""
SINCE = {"cosine": 0.0, "contrastive": 0.0, "patch_mixing": 0.0, "precision": "float32"}
SINCE |= {"optimizer": "adamw"}
"""What was added behind it."""


def test_what_is_stored_keeps_its_keys_their_order_and_their_types():
    now = asdict(make_settings("paper32"))
    assert json.dumps(now) == json.dumps(STORED | SINCE)
    expected = (STORED | SINCE).values()
    assert [type(value) for value in now.values()] == [type(value) for value in expected]
    assert Settings(**STORED) == make_settings("paper32")


def test_the_file_of_recipes_is_whole():
    """Every data set has a recipe, every recipe makes settings and speaks of nothing else."""
    assert set(DEFAULT_RECIPE) == set(SOURCES)
    assert set(DEFAULT_RECIPE.values()) <= set(RECIPES)
    for data, name in DEFAULT_RECIPE.items():
        assert make_settings(data=data) == make_settings(name, data=data)
    for name, recipe in RECIPES.items():
        assert asdict(make_settings(name)).items() >= recipe.items()
        assert {type(value) for value in recipe.values()} <= {str, int, float}
    floats = {field.name for field in fields(Settings) if field.type in (float, float | None)}
    for recipe in RECIPES.values():
        assert all(isinstance(recipe[name], float) for name in floats & set(recipe))


def test_a_variant_brings_its_own_shape():
    shape = VARIANTS["vit_micro64"]
    s = make_settings(data="imagefolder", model="vit_micro64")
    assert (s.img_size, s.patch_size, s.local_up_to_layer) == (64, 8, 0)
    assert (s.locality_strength, s.attention) == (shape.locality_strength, "gpsa")


OUT_OF_LIMITS = {
    "data": 3, "subset": 1.01, "recipe": None, "model": None, "img_size": (8, 8, 8),
    "patch_size": 0, "local_up_to_layer": -1, "locality_strength": float("nan"), "epochs": 1.0,
    "steps": True, "batch_size": None, "lr": 0.0, "weight_decay": -0.1, "warmup_epochs": -1,
    "clip_grad": 0, "label_smoothing": 1.0, "drop_path": -0.1, "augment": "blur", "seed": 2**63,
    "attention": "soft", "local_init": 1, "freeze": "head", "broken": "mend", "repeats": 0,
    "mixup": -1.0, "cutmix": float("inf"), "ema": 1.0, "passes": 0, "init_from": "",
    "precision": "fp16", "optimizer": "sgd",
    "cosine": -0.1, "contrastive": float("nan"), "patch_mixing": -1.0,
}  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in fields(Settings)])
def test_every_setting_has_limits(name):
    with pytest.raises(UserError, match=f"^--{name.replace('_', '-')} must be .*, not "):
        replace(make_settings(), **{name: OUT_OF_LIMITS[name]})


def test_a_name_out_of_limits_is_answered_with_the_closest():
    with pytest.raises(UserError, match=r"not gate \(did you mean gates\?\)$"):
        replace(make_settings(), freeze="gate")


PLANTED = """    patience: int | None = setting(
        TRAINING, COUNT, "Number of epochs to wait for a better one.", 3
    )

"""
WITH_A_NEW_SETTING = f"""
import sys, types
import miniconvit.training
name, path = "miniconvit.training.settings", {module.__file__!r}
source, mark = open(path).read(), "    def __post_init__"
assert source.count(mark) == 1
new = sys.modules[name] = miniconvit.training.settings = types.ModuleType(name)
new.__package__ = "miniconvit.training"
exec(compile(source.replace(mark, {PLANTED!r} + mark), path, "exec"), new.__dict__)
"""


def with_a_new_setting(code, *argv):
    """Standard output and error of a process in which PLANTED stands among the settings."""
    command = [sys.executable, "-c", WITH_A_NEW_SETTING + code, *map(str, argv)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    return ended.stdout, ended.stderr


def test_a_new_setting_needs_one_place(tmp_path):
    """One declaration, and train has its option, its help, its check and its place in the files."""
    small = "import runpy; runpy.run_path('tests/small_run.py', run_name='__main__')"
    out, err = with_a_new_setting(small, "train", "--help")
    assert err == ""
    wait = "Number of epochs to wait for a better one. [default: 3]"
    assert f"--patience N {wait}" in " ".join(out.split())
    _, err = with_a_new_setting(small, "train", "--patience", 0)
    assert err == "Error: --patience must be an integer of at least 1, not 0\n"
    flags = ["--img-size", 8, "--epochs", 1, "--patience", 7, "--out", tmp_path / "run"]
    out, err = with_a_new_setting(small, "train", *flags)
    assert (err, "best checkpoint" in out) == ("", True)
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert stored.pop("patience") == 7
    assert list(stored) == [*STORED, *SINCE]
    resumed = with_a_new_setting(small, "train", "--resume", "--out", tmp_path / "run")
    assert "is finished" in resumed[0]
    _, err = with_a_new_setting(
        small, "train", "--resume", "--out", tmp_path / "run", "--patience", 8
    )
    assert "began with --patience 7 and cannot go on with --patience 8" in err
