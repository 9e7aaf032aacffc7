"""What `eval` says of classes and mistakes: by hand, and counted again by other code."""

import csv
import json
from collections import Counter

import numpy as np
import pytest
from small_run import small_dataset

import miniconvit as mc
import miniconvit.cli.eval as eval_command
from miniconvit.analysis.confusion import FILES, Answers, refuse_old_files, write_answers
from miniconvit.checkpoints.checkpoint import save_checkpoint
from miniconvit.data import ImageArray
from miniconvit.data.preview import CELL, GAP, LINE

STRANGE = ("a, b", "line\nbreak \x1b[31mred", "$x_1$ {", "caf\udce9", "漢字", "=1+1", "x" * 300)


def answers(pairs, classes, probability=None):
    labels, predicted = np.array(pairs).T
    probability = np.linspace(0.9, 0.5, len(pairs)) if probability is None else probability
    return Answers(tuple(classes), labels, predicted, np.array(probability))


def images(count):
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, 8, 8)).astype(np.uint8)
    return ImageArray(pixels)


def read(path):
    with open(path, newline="", errors="surrogateescape") as file:
        return list(csv.reader(file))


def test_a_small_set_by_hand():
    pairs = [(0, 0), (0, 1), (0, 1), (0, 2), (1, 1), (1, 1), (3, 0), (3, 2)]
    said = answers(pairs, "abcd", [0.9, 0.4, 0.8, 0.5, 0.9, 0.9, 0.8, 0.6])
    keys = ("class", "images", "right", "accuracy", "taken_for", "taken")
    assert said.by_class() == [
        dict(zip(keys, row, strict=True))
        for row in (
            ("a", 4, 1, 0.25, "b", 2),
            ("b", 2, 2, 1.0, None, 0),
            ("c", 0, 0, None, None, 0),
            ("d", 2, 0, 0.0, "a", 1),
        )
    ]
    assert said.confusions() == [
        {"class": "a", "taken_for": "b", "images": 2},
        {"class": "a", "taken_for": "c", "images": 1},
        {"class": "d", "taken_for": "a", "images": 1},
        {"class": "d", "taken_for": "c", "images": 1},
    ]
    assert said.matrix().tolist() == [[1, 2, 1, 0], [0, 2, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0]]
    assert said.mistakes().tolist() == [2, 6, 7, 3, 1]


def test_a_thousand_classes_counted_again():
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 500, 4000) * 2  # every other class has no image
    predicted = np.where(rng.random(4000) < 0.6, labels, rng.integers(0, 1000, 4000))
    names = [f"n{i:04d}" for i in range(1000)]
    said = Answers(tuple(names), labels, predicted, rng.random(4000))
    pairs = Counter(zip(labels.tolist(), predicted.tolist(), strict=True))
    for label, row in enumerate(said.by_class()):
        of_class = {p: n for (t, p), n in pairs.items() if t == label}
        count = sum(of_class.values())
        right = of_class.pop(label, 0)
        assert (row["images"], row["right"]) == (count, right)
        assert row["accuracy"] == (right / count if count else None)
        most = max(of_class.values(), default=0)
        assert row["taken"] == most
        first = min((p for p, n in of_class.items() if n == most), default=None)
        assert row["taken_for"] == (None if first is None else names[first])
    wrong = sorted((n for (t, p), n in pairs.items() if t != p), reverse=True)
    assert [pair["images"] for pair in said.confusions()] == wrong[:20]
    matrix = said.matrix()
    assert matrix.sum() == 4000
    assert all(matrix[pair] == n for pair, n in pairs.items())


@pytest.mark.filterwarnings("error")
def test_the_files_hold_any_names(tmp_path):
    pytest.importorskip("PIL")
    pytest.importorskip("matplotlib")
    said = answers([(0, 1), (1, 0), (2, 2), (3, 6), (6, 5)], STRANGE)
    assert write_answers(said, images(5), tmp_path / "new" / "out") == (list(FILES), [])
    out = tmp_path / "new" / "out"
    rows = read(out / "confusion.csv")
    assert rows[0] == ["class", *STRANGE]
    assert [row[0] for row in rows[1:]] == list(STRANGE)
    assert np.array_equal(np.array([row[1:] for row in rows[1:]], int), said.matrix())
    rows = read(out / "classes.csv")
    assert rows[0] == ["class", "images", "right", "accuracy", "taken_for", "taken"]
    assert rows[1] == [STRANGE[0], "1", "0", "0.0", STRANGE[1], "1"]
    assert rows[5] == [STRANGE[4], "0", "0", "", "", "0"]
    assert read(out / "mistakes.csv")[:2] == [
        ["index", "class", "taken_for", "probability"],
        ["0", STRANGE[0], STRANGE[1], "0.900000"],
    ]
    for name in FILES[3:]:
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_the_picture_shows_shares_of_each_class_and_leaves_empty_ones_grey(tmp_path):
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    pairs = [(i, i) for i in range(60) if i != 30] + [(10, 50)] * 3
    write_answers(answers(pairs, [f"{i}" for i in range(60)]), images(62), tmp_path)
    with image.open(tmp_path / "confusion.png") as file:
        pixels = np.asarray(file.convert("RGB")).astype(int)
    dark = np.argwhere((pixels == (0, 0x2B, 0x44)).all(axis=2))
    first, last = dark.min(axis=0), dark[-1]  # the scale, to the right, is dark at its top alone

    def cell(row, col):
        y, x = (first + (last - first) * (np.array([row, col]) + 0.5) / 60).round().astype(int)
        return pixels[y, x].tolist()

    assert cell(5, 5) == cell(59, 59) == [0, 0x2B, 0x44]
    assert cell(5, 6) == cell(6, 5) == cell(50, 10) == [255, 255, 255]
    assert cell(30, 30) == cell(30, 5) == [230] * 3
    assert sum(cell(5, 5)) < sum(cell(10, 50)) < sum(cell(10, 10)) < sum(cell(10, 11))


def test_without_mistakes_there_is_no_sheet(tmp_path):
    written, notes = write_answers(answers([(0, 0), (1, 1)], "ab"), images(2), tmp_path)
    assert "mistakes.png" not in written and notes == []
    assert read(tmp_path / "mistakes.csv") == [["index", "class", "taken_for", "probability"]]


@pytest.mark.parametrize(
    ("missing", "place"),
    [
        ("confusion.png", "miniconvit.analysis.style.find_spec"),
        ("mistakes.png", "miniconvit.data.images.find_spec"),
    ],
)
def test_a_picture_that_cannot_be_drawn_is_left_out_and_said(tmp_path, monkeypatch, missing, place):
    pytest.importorskip("PIL")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(place, lambda name: None)
    written, notes = write_answers(answers([(0, 1), (1, 1)], "ab"), images(2), tmp_path)
    assert sorted([*written, missing]) == sorted(FILES) == sorted([*written, missing])
    assert len(notes) == 1 and notes[0].startswith(f"no {missing}: ")
    assert "pip install" in notes[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(written)


@pytest.fixture
def model(tmp_path, monkeypatch):
    """(a checkpoint file, its parameters and configuration)"""
    monkeypatch.setattr(eval_command, "load_dataset", small_dataset)
    data = small_dataset()
    config = mc.ConViTConfig(8, 4, 3, 3, embed_dim=8, depth=2, local_up_to_layer=1)
    params = mc.init_params(config, seed=4)
    about = {"mean": data.mean, "std": data.std, "classes": data.classes, "data": "shapes"}
    save_checkpoint(tmp_path / "model.safetensors", params, config, **about)
    return tmp_path / "model.safetensors", params, config


def test_eval_lists_what_the_model_takes_for_what(model, program, tmp_path):
    image = pytest.importorskip("PIL.Image")
    file, params, config = model
    out = tmp_path / "out"
    status, text, err = program("eval", file, "--split", "train", "--out", out, "--json")
    assert (status, err) == (0, "")
    found, data = json.loads(text), small_dataset()
    mean, std = (np.array(x, "float32")[:, None, None] for x in (data.mean, data.std))
    pixels = np.asarray(data.train.images)
    logits, _ = mc.convit_forward((pixels / np.float32(255) - mean) / std, params, config)
    p = np.exp(logits.astype("float64"))
    p /= p.sum(axis=1, keepdims=True)
    wrong = {i for i in range(100) if p[i].argmax() != data.train.labels[i]}
    assert 20 < len(wrong) < 90
    head, *rows = read(out / "mistakes.csv")
    assert head == ["index", "class", "taken_for", "probability"]
    assert {int(row[0]) for row in rows} == wrong
    for index, name, taken_for, probability in rows:
        assert name == data.classes[data.train.labels[int(index)]]
        assert taken_for == data.classes[p[int(index)].argmax()]
        assert float(probability) == pytest.approx(p[int(index)].max(), abs=1e-5)
    assert [row[3] for row in rows] == sorted((row[3] for row in rows), reverse=True)
    assert 1 - len(wrong) / 100 == pytest.approx(found["top1"])
    assert sum(row["right"] for row in found["by_class"]) == 100 - len(wrong)
    worst = Counter((row[1], row[2]) for row in rows).most_common(1)[0]
    first = found["confusions"][0]
    assert first["images"] == worst[1]
    assert (
        len([row for row in rows if row[1:3] == [first["class"], first["taken_for"]]]) == worst[1]
    )
    with image.open(out / "mistakes.png") as sheet:  # the surest mistake is the first on the sheet
        cell = np.asarray(sheet)[2 * LINE + GAP :, GAP:][: CELL : CELL // 8, : CELL : CELL // 8]
    np.testing.assert_array_equal(cell.transpose(2, 0, 1), pixels[int(rows[0][0])])


def test_eval_overwrites_nothing(model, program, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert program("eval", model[0], "--out", out)[0] == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    for name in FILES[1:]:
        (out / name).unlink(missing_ok=True)
    status, text, err = program("eval", model[0], "--out", out)
    assert (status, text) == (2, "")
    assert err == f"Error: {out}/classes.csv exists: choose another --out, or remove it first\n"
    assert {path: path.read_bytes() for path in out.iterdir()}.items() <= before.items()
    status, _, err = program("eval", model[0], "--out", out / "notes.txt")
    assert status == 2 and err.count("\n") == 1 and "notes.txt" in err
    status, text, err = program("eval", model[0], "--out", out / "notes.txt" / "below")
    assert (status, text) == (2, "") and "below" in err  # before the work, not after it
    refuse_old_files(tmp_path / "new")


def test_the_list_fits_on_a_screen_and_obeys_no_name(model, program):
    said = eval_command._class_lines(answers([(0, 1), (1, 0), (6, 6)], STRANGE).by_class())
    text = "\n".join(said)
    assert "\x1b" not in text and "line?break ?[31mred" in text and "caf" not in text
    assert text.splitlines()[-1] == "and 4 without an image"
    pairs = [(i, (i + 1) % 1000) for i in range(1000)]
    long = eval_command._class_lines(answers(pairs, ["y" * 60] * 1000).by_class())
    lines = [*text.splitlines(), *long]
    assert lines[-1] == "and 990 more classes"
    assert len(lines) == 5 + 12
    assert max(map(len, lines)) <= 80
    status, out, _ = program("eval", model[0])
    assert status == 0 and len(out.splitlines()) <= 24
