"""Folders of images as people have them: read rightly, or refused by a sentence that helps."""

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from miniconvit import UserError
from miniconvit.data import BrokenImage, load_dataset
from miniconvit.data.images import finding, open_image
from miniconvit.data.layout import counted, difference_in_form, images_below

Image = pytest.importorskip("PIL.Image")


def fill(folder, count=2, ending="png"):
    """A class folder with so many images."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", (9, 9), (number, 90, 200)).save(folder / f"{number}.{ending}")


def splits(root, **counts):
    """ROOT/SPLIT/owl and ROOT/SPLIT/newt, with so many images each."""
    for split, count in counts.items():
        for name in ("owl", "newt"):
            fill(root / split / name, count)
    return root


def load(root, **options):
    return load_dataset("imagefolder", root, img_size=8, **options)


def sizes(root):
    data = load(root)
    return [
        part and np.bincount(part.labels).tolist() for part in (data.train, data.val, data.test)
    ]


def refused(root, *words, **options):
    with pytest.raises(UserError) as caught:
        load(root, **options)
    assert "\n" not in str(caught.value)
    for word in words:
        assert str(word) in str(caught.value)


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("training", "VALID", "Testing"),
        ("Train", "Validation Set", "TEST"),
        ("train_images", "val-data", "test_set"),
        ("trainset", "valset", "testset"),
        ("TRAIN", "validation", "test.split"),
    ],
)
def test_splits_by_the_names_that_people_give_them(tmp_path, capsys, train, val, test):
    splits(tmp_path, **{train: 4, val: 2, test: 1})
    assert sizes(tmp_path) == [[4, 4], [2, 2], [1, 1]]
    err = capsys.readouterr().err
    assert f"{tmp_path / val} is used as val\n" in err
    assert f"{tmp_path / train} is used as train\n" in err


def test_the_usual_names_go_without_saying(tmp_path, capsys):
    assert sizes(splits(tmp_path, train=4, val=2, test=1)) == [[4, 4], [2, 2], [1, 1]]
    assert capsys.readouterr().err == ""


def test_a_split_that_is_there_twice_is_refused(tmp_path):
    splits(tmp_path, train=4, val=2, Validation=3)
    refused(tmp_path, "holds Validation and val, both to be val")
    splits(tmp_path / "b", train=4, Training=2)
    refused(tmp_path / "b", "holds Training and train, both to be train")


def test_a_link_to_a_split_is_no_second_one(tmp_path):
    splits(tmp_path, train=4, val=2)
    (tmp_path / "valid").symlink_to("val")
    assert sizes(tmp_path) == [[4, 4], [2, 2], None]


@pytest.mark.parametrize(
    "name", ["dev", "val2017", "my_val", "Eval", "hold-out", "ILSVRC2012_img_val"]
)
def test_a_folder_that_may_be_val_is_never_passed_over(tmp_path, name, capsys):
    splits(tmp_path, train=4, **{name: 2})
    refused(tmp_path, f"{tmp_path / name} looks like a split", "rename it to val")
    splits(tmp_path, val=1)
    assert sizes(tmp_path) == [[4, 4], [1, 1], None]
    assert f"not used in {tmp_path}: the folders {name}\n" in capsys.readouterr().err


def test_a_folder_with_the_same_classes_may_be_val_whatever_its_name(tmp_path):
    splits(tmp_path, train=4, second=2)
    refused(tmp_path, f"{tmp_path / 'second'} looks like a split")


def test_other_folders_beside_train_are_named(tmp_path, capsys):
    splits(tmp_path, train=20)
    (tmp_path / "annotations" / "xml").mkdir(parents=True)
    (tmp_path / "val_labels").mkdir()
    (tmp_path / "val_labels" / "owl.txt").write_text("0 0 1 1")
    splits(tmp_path, test2=1)
    assert sizes(tmp_path) == [[18, 18], [2, 2], None]
    err = capsys.readouterr().err
    assert f"not used in {tmp_path}: the folders annotations, test2, val_labels\n" in err


@pytest.mark.parametrize("outer", ["train", "Training"])
def test_train_in_train(tmp_path, outer):
    splits(tmp_path / outer, train=4)
    refused(tmp_path, f"did you mean --data-dir {tmp_path / outer}?")
    assert sizes(tmp_path / outer) == [[3, 3], [1, 1], None]
    splits(tmp_path / outer, valid=2)  # all splits in train
    refused(tmp_path, "train, valid", f"did you mean --data-dir {tmp_path / outer}?")
    assert sizes(tmp_path / outer) == [[4, 4], [2, 2], None]


def test_classes_one_folder_deeper(tmp_path):
    splits(tmp_path / "train", images=4)
    inner = tmp_path / "train" / "images"
    refused(tmp_path, "one class folder only, images", f"are the folders in {inner} the classes?")
    splits(tmp_path / "b", train=4)
    splits(tmp_path / "b" / "val", val=2)
    refused(tmp_path / "b", f"are the folders in {tmp_path / 'b' / 'val' / 'val'} the classes?")


def test_one_class_alone_is_refused(tmp_path):
    fill(tmp_path / "train" / "owl", 5)
    fill(tmp_path / "val" / "owl", 5)
    refused(tmp_path, "one class folder only, owl, and a model needs two")
    assert load(tmp_path, to_train=False).classes == ("owl",)  # some of the classes of a model


def test_a_class_may_be_called_as_a_split_is(tmp_path):
    for name in ("train", "bus", "plane"):
        fill(tmp_path / "train" / name, 3)
    assert load(tmp_path).classes == ("bus", "plane", "train")


@pytest.mark.parametrize("name", ["photos", "train"])
def test_class_folders_without_train(tmp_path, capsys, name):
    for number, animal in enumerate(("owl", "newt", "bat")):
        fill(tmp_path / name / animal, 10 + number)
    assert sizes(tmp_path / name) == [[11, 10, 9], [1, 1, 1], None]  # bat, newt, owl
    err = capsys.readouterr().err
    assert f"{tmp_path / name} has no folder train: its 3 folders are the classes" in err
    assert "10% of each class, are held out" in err


def test_a_folder_that_holds_no_bare_classes_is_not_taken_for_one(tmp_path):
    splits(tmp_path / "all", train=4, val=2)
    refused(tmp_path, "no folder train in", f"did you mean --data-dir {tmp_path / 'all'}?")
    for part in ("train", "val"):
        refused(tmp_path / "all" / part, f"did you mean --data-dir {tmp_path / 'all'}?")
    splits(tmp_path / "b", one=2, two=2)  # two data sets
    refused(tmp_path / "b", "no folder train in")


def test_what_is_nearly_a_folder_of_classes_is_told_why_it_is_none(tmp_path):
    root = tmp_path / "photos"
    fill(root / "owl", 4)
    refused(root, "not taken for the classes, because owl is alone", "CLASS/NAME.jpg")
    (root / "newt").mkdir()
    refused(root, "because newt holds no image")
    fill(root / "newt", 4)
    refused(tmp_path, f"did you mean --data-dir {root}?")
    assert sizes(root) == [[3, 3], [1, 1], None]
    fill(root / "newt" / "young", 2)
    refused(root, "because newt holds folders too")
    fill(root / "val", 2)
    refused(root, f"beside {root / 'val'} the classes must lie in train")
    (tmp_path / "train").mkdir()
    for name in ("owl", "newt"):
        (root / name).rename(tmp_path / "train" / name)
    assert sizes(tmp_path) == [[5, 3], [1, 1], None]  # newt, and its young; owl


def test_classes_with_the_same_folders_may_be_parts(tmp_path, capsys):
    """They may be classes too, as day and night are of an owl and a newt: so it is said."""
    splits(tmp_path / "train", part1=4, part2=4)
    assert load(tmp_path).classes == ("part1", "part2")
    sentence = f"the class folders part1 and part2 in {tmp_path / 'train'} hold the same folders: "
    sentence += f"if newt and owl are the classes, move them up into {tmp_path / 'train'}\n"
    assert sentence in capsys.readouterr().err
    (tmp_path / "train" / "part2" / "owl").rename(tmp_path / "train" / "part2" / "bat")
    assert load(tmp_path).classes == ("part1", "part2")
    assert "hold the same folders" not in capsys.readouterr().err


# what is passed over


def test_what_archives_and_systems_leave_behind_is_named_and_counted(tmp_path, capsys):
    splits(tmp_path, train=4, val=2)
    for place, name in {
        "": "__MACOSX", "train": "lost+found", "val": "$RECYCLE.BIN", "train/owl": "@eaDir",
        "val/newt": ".thumbnails",
    }.items():  # fmt: skip
        fill(tmp_path / place / name / "owl", 3)
    (tmp_path / "train" / "newt" / "desktop.ini").write_text("x")
    (tmp_path / "train" / "newt" / "._0.png").write_text("x")
    (tmp_path / "train" / "Thumbs.db").write_text("x")
    fill(tmp_path / "train", 1)
    fill(tmp_path, 2)
    assert sizes(tmp_path) == [[4, 4], [2, 2], None]
    err = capsys.readouterr().err
    assert err.startswith(f"ignored in {tmp_path}: ")
    said = dict(part.rsplit(" ", 1) for part in err.strip().split(": ", 1)[1].split(", "))
    assert said == {
        "images in no class folder": "(3)", "__MACOSX": "(3)", "lost+found": "(3)",
        "$RECYCLE.BIN": "(3)", "@eaDir": "(3)", ".thumbnails": "(3)", ".ini": "(1)",
        "hidden": "(1)", ".db": "(1)",
    }  # fmt: skip


@pytest.mark.parametrize("ending", ["tiff", "BMP", "jpe", "JFIF", "gif", "ppm", "tga", "webp"])
def test_other_endings_are_read(tmp_path, ending):
    splits(tmp_path, train=1, val=1)
    fill(tmp_path / "train" / "owl", 5, ending)
    assert sizes(tmp_path)[0] == [1, 6]
    load(tmp_path).train.images[:]


def test_what_pillow_cannot_read_is_counted_by_its_ending(tmp_path, capsys, monkeypatch):
    splits(tmp_path, train=2, val=1)
    for name in ("a.heic", "b.HEIC", "c.svg", "d.avif"):
        (tmp_path / "train" / "owl" / name).write_bytes(b"x")
    known = {"." + ending: "" for ending in ("png", "jpg")}
    monkeypatch.setattr("PIL.Image.registered_extensions", lambda: known)
    assert sizes(tmp_path) == [[2, 2], [1, 1], None]
    assert capsys.readouterr().err.count(".avif (1)") == 1


def test_an_unlabelled_test_is_not_used_and_said_so(tmp_path, capsys):
    splits(tmp_path, train=4, val=2)
    fill(tmp_path / "test" / "all", 5)
    assert sizes(tmp_path)[2] is None
    assert (
        f"{tmp_path / 'test'} holds none of the classes: it is not used" in capsys.readouterr().err
    )
    fill(tmp_path / "test" / "owl", 1)
    refused(tmp_path, "must have the same class folders")


# links


def test_links_to_folders_are_followed_and_end(tmp_path, capsys):
    root, store = splits(tmp_path / "data", train=4, val=2), tmp_path / "store"
    fill(store / "deep" / "deeper", 5)
    (store / "deep" / "deeper" / "up").symlink_to(store)  # back to what is read
    owl = root / "train" / "owl"
    (owl / "more").symlink_to(store)
    (owl / "itself").symlink_to(owl)
    (owl / "all").symlink_to(root)
    (owl / "other").symlink_to(root / "train" / "newt")  # never owls
    assert sizes(root) == [[4, 9], [2, 2], None]
    err = capsys.readouterr().err
    assert "links to folders that are read already (4)" in err
    (root / "train" / "bat").symlink_to(tmp_path / "nowhere")
    assert sizes(root)[0] == [4, 9]
    assert "links that lead nowhere (1)" in capsys.readouterr().err


def test_many_links_do_not_multiply(tmp_path):
    """Two ways from each of thirty folders to the next would be a thousand million paths."""
    root = splits(tmp_path / "data", train=1, val=1)
    for number in range(30):
        folder = tmp_path / "chain" / str(number)
        folder.mkdir(parents=True)
        for way in "ab":
            (folder / way).symlink_to(tmp_path / "chain" / str(number + 1))
    fill(tmp_path / "chain" / "30", 3)
    (root / "train" / "newt" / "chain").symlink_to(tmp_path / "chain" / "0")
    assert sizes(root)[0] == [4, 1]


def test_images_below_a_folder(tmp_path):
    fill(tmp_path / "b" / "c", 1)
    fill(tmp_path / ".hidden", 2)
    fill(tmp_path, 1, "JPG")
    (tmp_path / "notes.md").write_text("x")
    paths, ignored = images_below(tmp_path)
    assert [os.path.relpath(path, tmp_path) for path in paths] == ["0.JPG", "b/c/0.png"]
    assert counted(ignored) == ".hidden (2), .md (1)"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_a_folder_that_may_not_be_read_is_no_empty_one(tmp_path):
    splits(tmp_path, train=2, val=1)
    fill(tmp_path / "train" / "owl" / "more")
    (tmp_path / "train" / "owl" / "more").chmod(0)
    with pytest.raises(PermissionError):
        load(tmp_path)


# names


FORMS = {
    "Unicode": ("Bär", unicodedata.normalize("NFD", "Bär"), "form of their Unicode characters"),
    "case": ("Polar bear", "polar Bear", "upper and lower case"),
    "blanks": ("owl", "owl ", "blanks at their ends"),
}


@pytest.mark.parametrize("one, other, words", FORMS.values(), ids=FORMS)
def test_names_that_differ_in_their_form_only(tmp_path, capsys, one, other, words):
    assert words in difference_in_form(one, other)
    assert difference_in_form(one, one) is None and difference_in_form(one, "newt") is None
    for split, name in (("train", one), ("val", other)):
        fill(tmp_path / split / name)
        fill(tmp_path / split / "zebra")
    refused(tmp_path, words, tmp_path / "val" / other, "give both the same name")
    Path(tmp_path / "val" / other).rename(tmp_path / "val" / one)
    assert sizes(tmp_path)[0] == [2, 2]
    fill(tmp_path / "train" / other)
    fill(tmp_path / "val" / other)
    capsys.readouterr()
    assert sizes(tmp_path)[0] == [2, 2, 2]
    assert "two classes have names that differ only in" in capsys.readouterr().err


# pipes and doubles


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_a_pipe_is_no_image(tmp_path, program):
    """Whoever opens one waits until somebody writes into it."""
    splits(tmp_path, train=4, val=2)
    os.mkfifo(tmp_path / "train" / "owl" / "pipe.jpg")
    (tmp_path / "val" / "owl" / "link.png").symlink_to("/dev/zero")
    (tmp_path / "train" / "newt" / "link.png").symlink_to("0.png")
    status, out, err = program("data", "imagefolder", "--data-dir", tmp_path)
    assert status == 0 and "train          9 images" in out
    assert f"ignored in {tmp_path}: pipes, sockets and devices (2)\n" in err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
@pytest.mark.parametrize("thorough", [False, True])
def test_a_pipe_by_name_is_answered_by_a_sentence(tmp_path, thorough):
    os.mkfifo(tmp_path / "pipe.jpg")
    assert finding(tmp_path / "pipe.jpg", thorough).startswith("it is no file, but a pipe")
    with pytest.raises(BrokenImage, match=r"pipe\.jpg cannot be read .* no file, but a pipe"):
        open_image(tmp_path / "pipe.jpg")


TRAINED_ON = "are files of train too, by links: accuracy in val is also of images that were trained"


def test_val_that_is_a_link_to_train_is_said(tmp_path, capsys):
    splits(tmp_path, train=4)
    (tmp_path / "val").symlink_to("train")
    assert sizes(tmp_path) == [[4, 4], [4, 4], None]
    err = capsys.readouterr().err
    assert f"8 image files of val {TRAINED_ON}" in err and err.count("\n") == 1


@pytest.mark.parametrize("link", ["folder", "file", "hard"])
def test_a_class_or_file_of_val_that_is_one_of_train_is_said(tmp_path, capsys, link):
    splits(tmp_path, train=4, val=2)
    owl, trained = tmp_path / "val" / "owl", tmp_path / "train" / "owl"
    for file in owl.iterdir():
        file.unlink()
    if link == "folder":
        owl.rmdir()
        owl.symlink_to(trained)
    elif link == "file":
        (owl / "x.png").symlink_to(trained / "0.png")
    else:
        (owl / "x.png").hardlink_to(trained / "0.png")
    load(tmp_path)
    err = capsys.readouterr().err
    assert f"{4 if link == 'folder' else 1} image files of val {TRAINED_ON}" in err
    assert err.count("\n") == 1
