"""`miniconvit compare`: what runs have reached, by hand, and what must not be compared."""

import json
from dataclasses import asdict

import pytest

from miniconvit.analysis import style
from miniconvit.config import VARIANTS
from miniconvit.training.run_folder import RunFolder
from miniconvit.training.settings import make_settings

CURVES = {"convit": [0.5, 0.9, 0.8], "vit": [0.4, 0.625, 0.625]}


def run(path, accuracies, sha=None, workers=2, versions=None, classes=10, **given):
    """A run folder, as training writes it, of as many finished epochs as there are accuracies."""
    settings = make_settings(**({"epochs": 3, "batch_size": 10} | given))
    folder = RunFolder(path)
    path.mkdir(parents=True)
    config = VARIANTS[settings.model].to_dict() | {"num_classes": classes}
    about = {"settings": asdict(settings), "model": config, "workers": workers}
    about |= {"place": "on the CPU", "versions": versions or {"numpy": "2"}}
    folder.write_config(about | ({"data_sha256": sha} if sha else {}))
    for epoch, accuracy in enumerate(accuracies, 1):
        row = {"epoch": epoch, "step": 7 * epoch, "train_loss": 1.0, "train_top1": 0.5}
        row |= {"val_loss": 2 - accuracy, "val_top1": accuracy, "lr": 1e-3}
        folder.append_metrics(row | {"images_per_second": 100.0 * epoch, "seconds": 2.5})
    return path


@pytest.fixture
def three(tmp_path):
    """A ViT, another seed of its twin, and its twin."""
    vit = run(tmp_path / "vit", CURVES["vit"], model="vit_micro32")
    other = run(tmp_path / "other", [0.7] * 3, seed=1)
    return vit, other, run(tmp_path / "convit", CURVES["convit"])


def compared(program, *words):
    status, out, err = program("compare", *words, "--json")
    assert (status, err) == (0, "")
    return json.loads(out)


def test_what_runs_have_reached_twins_first(program, three):
    found = compared(program, *three)
    vit, other, convit = map(str, three)
    assert [entry["run"] for entry in found["runs"]] == [convit, vit, other]
    first, second, _ = found["runs"]
    assert first.pop("settings")["model"] == "convit_micro32"
    del first["run"]
    assert first == {
        "parameters": 118_630,
        "epochs": 3,
        "finished": True,
        "training": False,
        "best_val_top1": 0.9,
        "best_val_loss": 2 - 0.9,
        "best_epoch": 2,
        "last_val_top1": 0.8,
        "last_val_loss": 2 - 0.8,
        "images_per_second": 200.0,
        "seconds": 7.5,
    }
    assert (second["parameters"], second["best_epoch"]) == (118_570, 2)
    assert found["differences"] == {
        "model": ["convit_micro32", "vit_micro32", "convit_micro32"],
        "local_up_to_layer": [3, 0, 3],
        "seed": [0, 0, 1],
    }
    assert found["notes"] == [
        "1 and 2 are a ConViT and its ViT twin: +27.5 points of best accuracy for the ConViT"
    ]


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"data": "cifar10"}, {"lr": 0.5}, {"sha": "b"}, {"classes": 9}]
)
def test_what_differs_in_more_is_no_twin(program, tmp_path, change):
    convit = run(tmp_path / "convit", CURVES["convit"], sha="a")
    vit = run(tmp_path / "vit", CURVES["vit"], model="vit_micro32", **({"sha": "a"} | change))
    assert not any("twin" in note for note in compared(program, vit, convit)["notes"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({}, []),
        ({"data": "cifar10", "sha": None}, ["1 and 2 are of different data, shapes and cifar10"]),
        ({"sha": "b"}, ["1 and 2 are of different data, other image files"]),
        ({"classes": 9}, ["1 and 2 are of different data, other image files"]),
        ({"workers": 4}, ["machines, workers or libraries differ"]),
        ({"versions": {"cpu": "another"}}, ["machines, workers or libraries differ"]),
        ({"accuracies": [0.1]}, ["2 is not finished: 1 of 3 epochs"]),
        ({"accuracies": []}, ["2 is not finished: 0 of 3 epochs"]),
        ({"accuracies": [0.1], "steps": 8, "epochs": None}, ["2 is not finished: 7 of 8 steps"]),
        ({"accuracies": [0.1], "steps": 7, "epochs": None}, []),
    ],
)
def test_what_cannot_be_compared_is_said(program, tmp_path, change, sentence):
    one = run(tmp_path / "one", [0.5, 0.6, 0.7], sha="a")
    two = run(tmp_path / "two", **({"accuracies": [0.5, 0.6, 0.8], "sha": "a", "seed": 1} | change))
    notes = compared(program, one, two)["notes"]
    assert len(notes) == len(sentence)
    for note, begins in zip(notes, sentence, strict=True):
        assert note.startswith(begins)


def test_a_run_in_training_and_a_twin_that_is_not_at_its_end(program, tmp_path):
    convit = run(tmp_path / "convit", [0.5])
    vit = run(tmp_path / "vit", CURVES["vit"], model="vit_micro32")
    folder = RunFolder(convit)
    folder.open(resume=True)
    try:
        found = compared(program, convit, vit)
    finally:
        folder.close()
    assert [entry["training"] for entry in found["runs"]] == [True, False]
    assert found["notes"] == [
        "1 and 2 are a ConViT and its ViT twin, not both at their end",
        "1 is in training now: 1 of 3 epochs",
    ]
    assert compared(program, convit, vit)["runs"][0]["training"] is False


def test_the_table_fits_and_obeys_no_name(program, three, tmp_path):
    strange = run(tmp_path / "a\x1b[31m", [], model="vit_base", img_size=32, patch_size=4)
    status, out, err = program("compare", *three, strange)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert max(len(line) for line in lines[4:]) <= 80
    assert "\x1b" not in out
    row = "  1   90.0 %   1.1000      2   80.0 %       3/3     118,630       200      7.5 s"
    assert row in lines
    assert "--seed                1, 2, 4: 0   3: 1" in lines


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["vit"], "give the folders of two runs or more"),
        (["vit", "vit/../vit"], "is given twice"),
        (["vit", "nowhere"], "nowhere holds no run"),
        (["vit", "damaged"], "the model in damaged/config.json is damaged"),
        (["vit", "cut"], "cut/metrics.jsonl is damaged"),
        (["vit", "other", "--curves", "there.png"], "there.png exists: choose another name"),
    ],
)
def test_what_cannot_be_read_is_a_sentence(program, three, tmp_path, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.png").write_text("mine")
    damaged = run(tmp_path / "damaged", [0.5]) / "config.json"
    damaged.write_text(damaged.read_text().replace('"depth": 4', '"depth": "four"'))
    (run(tmp_path / "cut", [0.5]) / "metrics.jsonl").write_text('{"epoch": 1}\n')
    status, out, err = program("compare", *words)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert sentence in err
    assert (tmp_path / "there.png").read_text() == "mine"


def drawn(program, monkeypatch, *words):
    """The figure that compare draws."""
    figures = []
    monkeypatch.setattr(style, "save", lambda figure, *rest: figures.append(figure))
    assert program("compare", *words, "--curves", "c.png")[0] == 0
    return figures[0]


def test_the_curves(program, three, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    assert program("compare", *three, "--curves", tmp_path / "c.png")[0] == 0
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    left, right = drawn(program, monkeypatch, *three).axes
    shown = [[line.get_ydata().tolist() for line in axis.lines] for axis in (left, right)]
    expected = [CURVES["convit"], CURVES["vit"], [0.7] * 3]
    assert shown == [
        [[2 - value for value in curve] for curve in expected],
        [[100 * value for value in curve] for curve in expected],
    ]
    assert [line.get_linestyle() for line in right.lines] == ["-", "--", "-"]
    assert right.get_xlabel() == "epoch"
    large = run(tmp_path / "large", [0.5], batch_size=20)
    figure = drawn(program, monkeypatch, three[0], large)
    assert figure.axes[0].get_xlabel() == "images seen"
    assert [line.get_xdata().tolist() for line in figure.axes[0].lines] == [[70, 140, 210], [140]]
    cifar = run(tmp_path / "cifar", [0.5], data="cifar10")
    assert "different data" in drawn(program, monkeypatch, three[0], cifar).get_supxlabel()


def test_without_matplotlib_there_is_the_table_alone(program, three, tmp_path, monkeypatch):
    monkeypatch.setattr("miniconvit.analysis.style.find_spec", lambda name: None)
    status, out, err = program("compare", *three, "--curves", tmp_path / "c.png")
    assert status == 0 and "118,630" in out
    assert err.count("\n") == 1 and "pip install" in err
    assert not (tmp_path / "c.png").exists()
