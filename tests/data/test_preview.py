"""`miniconvit data`: the splits, and a contact sheet that holds what it says."""

from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from small_run import small_dataset

import miniconvit.cli.data as data_command
from miniconvit import UserError
from miniconvit.cli import program
from miniconvit.data import augment, draw_mix
from miniconvit.data.preview import CELL, COPIES, GAP, LINE, _fitting, draw_preview

Image = pytest.importorskip("PIL.Image")
SCALE = CELL // 8  # of the small data set's images
ROWS = 8


def cells(path):
    """uint8 (rows, columns, 3, 8, 8): the images of a sheet, by its layout."""
    sheet = np.asarray(Image.open(path))
    wide, tall = CELL + GAP, CELL + GAP + LINE
    found = []
    for row in range(ROWS):
        y = 2 * LINE + GAP + row * tall
        line = []
        for column in range((sheet.shape[1] - GAP) // wide):
            x = GAP + column * wide
            cell = sheet[y : y + CELL, x : x + CELL].reshape(8, SCALE, 8, SCALE, 3)
            assert (cell == cell[:, :1, :, :1]).all()  # each pixel is a square
            line.append(cell[:, 0, :, 0].transpose(2, 0, 1))
        found.append(line)
    return np.array(found)


@pytest.mark.parametrize("preset", ["none", "crop-flip", "paper"])
def test_a_sheet_holds_originals_copies_and_mixtures(tmp_path, preset):
    data = small_dataset()
    draw_preview(data, preset, tmp_path / "sheet.png", seed=3)
    found = cells(tmp_path / "sheet.png")
    assert found.shape == (ROWS, 1 + COPIES + 2, 3, 8, 8)
    places = np.arange(ROWS)  # the first three are one of each class
    np.testing.assert_array_equal(found[:, 0], data.train.images[:ROWS])
    for copy in range(COPIES):
        expected = augment(data.train.images[:ROWS], places, 3, 0, preset, copy)
        differs = (found[:, 1 + copy] != expected).any(axis=1)  # (rows, 8, 8)
        if preset == "paper":
            # a third of an image is erased at most, and not in every image
            assert differs.mean(axis=(1, 2)).max() < 0.5
        else:
            assert not differs.any()
    if preset == "none":
        for row in range(ROWS):
            ours, others = data.train.images[[row, ROWS - 1 - row]].astype(float)
            mix = draw_mix(0.8, 0.0, 3, row, (8, 8))
            expected = mix.share * ours + (1 - mix.share) * others
            assert abs(found[row, -2] - expected).max() < 1
            top, bottom, left, right = draw_mix(0.0, 1.0, 3, row, (8, 8)).box
            ours[:, top:bottom, left:right] = others[:, top:bottom, left:right]
            np.testing.assert_array_equal(found[row, -1], ours)


def test_a_long_caption_keeps_both_ends():
    font = SimpleNamespace(getlength=len)
    assert _fitting("checks, top right", font, 17) == "checks, top right"
    assert _fitting("vertical stripes, top left", font, 17) == "vertica...op left"
    assert _fitting("vertical stripes, top left", font, 14) == "verti...p left"
    assert _fitting("abc def", font, 6) == "a...ef"


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(data_command, "load_dataset", small_dataset)
    path = tmp_path / "sheet.png"
    result = CliRunner().invoke(
        program, ["data", "shapes", "--preview", str(path), "--augment", "light"]
    )
    assert result.exit_code == 0, result.output
    for words in ("train          100 images", "val            30 images", "8x8 pixels, 3 channels",
                  "3: reddish; greenish; bluish", f"contact sheet in {path}"):  # fmt: skip
        assert words in result.output
    assert cells(path).shape[1] == 1 + COPIES + 2
    plain = CliRunner().invoke(program, ["data", "shapes"])
    assert plain.exit_code == 0 and "sheet" not in plain.output


def test_a_sheet_without_pillow_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("miniconvit.data.images.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install Pillow"):
        draw_preview(small_dataset(), "none", tmp_path / "sheet.png")


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        draw_preview(small_dataset(), "none", tmp_path / "absent" / "sheet.png")
