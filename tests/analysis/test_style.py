"""The style that all pictures share, and the drawing of the architecture."""

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from miniconvit.analysis import pictures, style
from miniconvit.analysis.inspection import inspect, write_inspection
from miniconvit.cli.inspect import _text
from miniconvit.config import VARIANTS
from miniconvit.data import load_dataset
from miniconvit.model import init_params
from miniconvit.training.report import draw_curves

matplotlib = pytest.importorskip("matplotlib")


class Checkpoint:
    mean, std = [0.5] * 3, [0.2] * 3
    config = VARIANTS["convit_micro32"]  # three layers of GPSA and one of MHSA, four heads
    params = init_params(config)


@pytest.fixture
def inspection():
    return inspect(Checkpoint, load_dataset("shapes").val.images[:1], (5, 6))


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, instead of files."""
    drawn = []
    monkeypatch.setattr(style, "save", lambda figure, *_: drawn.append(figure))
    return drawn


def texts(figure):
    """All words on a figure."""
    found = figure.findobj(matplotlib.text.Text)
    return "\n".join(text.get_text() for text in found)


def test_the_users_settings_stay_theirs():
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 31}), pytest.raises(ZeroDivisionError):
        with style.look():
            assert matplotlib.rcParams["font.size"] == 8
            raise ZeroDivisionError
        assert matplotlib.rcParams["font.size"] == 31
    assert dict(matplotlib.rcParams) == before


def test_pictures_count_layers_and_heads_from_one(inspection, figures):
    picture, layers, query = inspection.picture, inspection.layers, inspection.query
    pictures.draw_maps(picture, layers, query, "", "maps.png")
    pictures.draw_parts(picture, layers[1], query, 0.5, "parts.png")
    gates = np.full((1, 3, 3, 4), 0.7)  # seeds, epochs, layers, heads
    pictures.draw_gates([0, 1, 2], gates, "gates.png")
    run = ("", Checkpoint.config, [0, 1, 2], np.ones((1, 3, 4)))
    pictures.draw_nonlocality([run], "", "nonlocality.png")
    maps, parts, gates, nonlocality = map(texts, figures)
    assert set(re.findall(r"layer (\d)", maps)) == {"1", "2", "3", "4"}
    assert set(re.findall(r"head (\d)", maps)) == {"1", "2", "3", "4"}
    assert re.findall(r"layer (\d)", parts) == ["2"]
    assert set(re.findall(r"head (\d)", parts)) == {"1", "2", "3", "4"}
    assert set(re.findall(r"layer (\d)", gates)) == {"1", "2", "3"}
    assert re.findall(r"^(\d)$", gates, re.MULTILINE)[-4:] == ["1", "2", "3", "4"]
    assert re.findall(r"(\d) [GM][PH]SA", nonlocality) == ["1", "2", "3", "4"]


def test_text_is_at_most_80_columns_wide_and_explains_its_columns(inspection):
    text = _text("x", inspection)
    assert max(map(len, text.splitlines())) <= 80
    table, _, meanings = text.partition("\n\n")[2].partition("\n\n")
    for name in ("strength", "centre", "nonlocality", "content", "position"):
        assert name in table.splitlines()[0] and name in meanings.lower()
    assert "even attention" in meanings.lower()


def test_text_counts_layers_and_heads_from_one(inspection):
    rows = re.findall(r"^ *(?:(\d)  ([gm][ph]sa))? +(\d) ", _text("x", inspection), re.MULTILINE)
    assert [row[0] for row in rows if row[0]] == ["1", "2", "3", "4"]
    assert [row[2] for row in rows] == ["1", "2", "3", "4"] * 4


def test_every_map_has_the_query_and_a_scale(inspection, figures):
    rectangle = matplotlib.patches.Rectangle
    pictures.draw_parts(inspection.picture, inspection.layers[0], (5, 6), 0.5, "parts.png")
    (figure,) = figures
    bars = [axis for axis in figure.axes if axis.get_label() == "<colorbar>"]
    maps = [axis for axis in figure.axes if axis.images and axis not in bars]
    assert (len(maps), len(bars)) == (1 + 3 * 4, 3)  # the image is shown once
    for axis in maps:
        frames = [patch for patch in axis.patches if isinstance(patch, rectangle)]
        assert frames and all(frame.get_xy() == (5.5, 4.5) for frame in frames)
        assert all((frame.get_width(), frame.get_height()) == (1, 1) for frame in frames)
    norms = {(axis.images[0].norm.vmin, axis.images[0].norm.vmax) for axis in maps if
             axis.images[0].cmap.name in style.MAPS}  # fmt: skip
    assert len(norms) == 1, "the maps of one picture are on one scale"


def test_the_parts_of_all_layers_are_on_one_scale(inspection, figures, tmp_path):
    inspection.layers[1]["maps"]["position"] = np.full((4, 8, 8), 0.75)  # more than in the others
    write_inspection(inspection, tmp_path)
    maps, *parts = figures
    assert len(parts) == 3
    for figure in (maps, *parts):
        shown = [axis.images[0].norm.vmax for axis in figure.axes if axis.images]
        assert shown.count(1) == 1, "the image is shown once"
    tops = {axis.images[0].norm.vmax for figure in parts for axis in figure.axes if axis.images}
    assert tops == {1, 0.75}


@pytest.mark.parametrize("epochs", [1, 2, 7])
def test_ticks_of_epochs_are_whole_numbers(epochs, figures):
    numbers = {"train_loss": 2.0, "val_loss": 1.9, "train_top1": 0.3, "val_top1": 0.4}
    draw_curves([{"epoch": 1 + i, **numbers} for i in range(epochs)], "curves.png")
    for axis in figures[0].axes:
        low, high = axis.get_xlim()
        ticks = [tick for tick in axis.get_xticks() if low <= tick <= high]
        assert ticks and all(tick == round(tick) for tick in ticks)


@pytest.mark.parametrize("kind", style.MAPS)
def test_more_attention_is_darker(kind):
    _, ((axis,),) = style.new_figure(1, 1, 1)
    shown = style.draw_map(axis, np.linspace(0, 0.5, 64).reshape(8, 8), kind, 0.5)
    colors = shown.cmap(shown.norm(np.linspace(0, 0.5, 64)))[:, :3]
    lightness = colors @ [0.2126, 0.7152, 0.0722]
    assert lightness[0] == pytest.approx(1) and (np.diff(lightness) < 0).all()


def test_the_drawing_of_the_architecture_holds_by_itself():
    path = Path(__file__).parents[2] / "docs" / "architecture.svg"
    root = ElementTree.parse(path).getroot()
    names = [element.tag.rpartition("}")[2] for element in root.iter()]
    assert {"title", "desc"} <= set(names) and not {"image", "script", "style"} & set(names)
    width, height = (float(size) for size in root.get("viewBox").split()[2:])
    first = root.find("{*}rect")  # a background of its own, for light pages and dark ones
    assert first.get("fill") == "#ffffff" and width <= 900
    assert float(first.get("width")) > width - 5 and float(first.get("height")) > height - 5
    words = " ".join("".join(text.itertext()) for text in root.findall(".//{*}text"))
    for name in ("pos_embed", "gating_param", "pos_proj", "class token", "C + g P"):
        assert name in words
