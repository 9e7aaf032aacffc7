"""Folders of images: both views against Pillow by the published definitions, every kind of file,
broken ones, and training that is fed by threads."""

import io
import json
import os
import threading
import time
import warnings
from contextlib import closing
from math import log
from pathlib import Path

import numpy as np
import pytest
from small_run import stop_after

import miniconvit.data.images as views
import miniconvit.training.loop as training
from miniconvit import UserError, convit_forward
from miniconvit.checkpoints.checkpoint import load_checkpoint
from miniconvit.data import BrokenImage, ImageFiles, feed, image_sets, load_dataset
from miniconvit.data.feed import AHEAD
from miniconvit.data.images import random_box, read_image
from miniconvit.training.interrupt import Interrupted
from miniconvit.training.settings import make_settings

Image = pytest.importorskip("PIL.Image")
SAMPLE = Path(os.environ.get("MINICONVIT_DATA", "/nowhere"), "imagenet-sample")
real = pytest.mark.skipif(
    not SAMPLE.is_dir(), reason="MINICONVIT_DATA names no folder that holds imagenet-sample"
)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return str(path)


def ramp(height, width):
    """Red rises from left to right, green from top to bottom: a part of it tells where it was."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, :, 0] = np.round(np.linspace(0, 255, width))
    pixels[:, :, 1] = np.round(np.linspace(0, 255, height))[:, None]
    return pixels


@pytest.fixture
def folder(tmp_path):
    """train and val of three classes, 12 + 11 + 10 and 4 + 4 + 4 images of different sizes in the
    colour of their class."""
    root = tmp_path / "data"
    for split, counts in {"train": (12, 11, 10), "val": (4, 4, 4)}.items():
        for label, (name, count) in enumerate(zip("ABc", counts, strict=True)):
            for number in range(count):
                pixels = noise(20 + number, 31 - number, 100 * label + number) // 2
                pixels[:, :, label] += 100
                save(root / split / name / f"{number:02d}.png", pixels)
    return root


def load(root, size=16, **options):
    return load_dataset("imagefolder", root, img_size=size, **options)


def assert_sentence(answer, *words):
    status, out, err = answer
    assert (status, out) == (2, "")
    lines = err.splitlines()
    assert len([line for line in lines if line.startswith("Error: ")]) == 1, err
    for word in words:
        assert str(word) in lines[-1]


# the evaluation view


def official_view(file, size):
    """Resize(256 / 224 of the side) and CenterCrop, as torchvision documents them."""
    image = Image.open(file).convert("RGB")
    side = int((256 / 224) * size)
    width, height = image.size
    if width <= height:
        resized = side, int(side * height / width)
    else:
        resized = int(side * width / height), side
    image = image.resize(resized, Image.Resampling.BICUBIC)
    top, left = round((image.height - size) / 2.0), round((image.width - size) / 2.0)
    return np.asarray(image)[top : top + size, left : left + size].transpose(2, 0, 1)


@pytest.mark.parametrize(
    ("height", "width"), [(300, 500), (501, 333), (40, 390), (391, 41), (64, 64), (77, 78)]
)
@pytest.mark.parametrize("size", [33, 64, 224])
def test_the_evaluation_view_is_the_official_one(tmp_path, height, width, size):
    file = save(tmp_path / "x.png", noise(height, width))
    found = read_image(file, (size, size))
    assert found.shape == (3, size, size) and found.dtype == np.uint8 and found.flags.c_contiguous
    np.testing.assert_array_equal(found, official_view(file, size))


@real
def test_the_evaluation_view_of_real_images():
    files = sorted(map(str, SAMPLE.glob("natural/*/*")))
    files += sorted(map(str, SAMPLE.glob("val/*/*")))[::37]
    assert len(files) > 50
    ratios = [max(i.size) / min(i.size) for i in map(Image.open, files)]
    assert max(ratios) > 3 and {"L", "RGB"} <= {i.mode for i in map(Image.open, files)}
    for size in (64, 224):
        found = ImageFiles(tuple(files), (size, size))[:]
        for pixels, file in zip(found, files, strict=True):
            np.testing.assert_array_equal(pixels, official_view(file, size), err_msg=file)


def test_a_view_that_is_no_square_and_one_of_few_pixels(tmp_path):
    for height, width in ((500, 480), (420, 640)):
        file = save(tmp_path / "ramp.png", ramp(height, width))
        found = read_image(file, (64, 48)).astype(int)
        # 73 rows for 64: the scale is height / 73, and from the middle 48 columns are shown
        assert found.shape == (3, 64, 48)
        columns = 255 * 43 * height / 73 / width
        np.testing.assert_allclose(np.diff(found[0, 30, [2, 45]]), columns, atol=2.5)
        np.testing.assert_allclose(np.diff(found[1, [2, 61], 20]), 255 * 59 / 73, atol=2.5)
        np.testing.assert_allclose(found.mean(axis=(1, 2))[:2], 127.5, atol=2)
    # a model of 32 pixels sees the whole height
    found = read_image(file, (32, 32)).astype(int)
    assert found[1, 0].max() <= 8 and found[1, -1].min() >= 247
    small = noise(32, 32)
    exact = read_image(save(tmp_path / "small.png", small), (32, 32))
    np.testing.assert_array_equal(exact, small.transpose(2, 0, 1))


# every kind of file


def test_orientation_by_exif(tmp_path):
    """The eight tags by their definition: where row 0 and column 0 of what is stored belong."""
    shown = noise(24, 24)
    stored = {
        1: shown,
        2: shown[:, ::-1],
        3: shown[::-1, ::-1],
        4: shown[::-1],
        5: shown.transpose(1, 0, 2),
        6: np.rot90(shown),
        7: shown[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(shown, -1),
    }
    for tag, pixels in stored.items():
        exif = Image.Exif()
        exif[0x0112] = tag
        file = save(tmp_path / f"{tag}.png", np.ascontiguousarray(pixels), exif=exif)
        found = read_image(file, (24, 24)).transpose(1, 2, 0)
        np.testing.assert_array_equal(found, shown, err_msg=str(tag))


def test_an_orientation_that_cannot_be_read_is_none(tmp_path):
    """Rubbish in the place of a JPEG's EXIF data, whose pixels are good."""
    plain, broken = tmp_path / "plain.jpg", tmp_path / "broken.jpg"
    Image.fromarray(noise(24, 24)).save(plain, dpi=(72, 72))
    content, rubbish = plain.read_bytes(), b"Exif\0\0" + b"rubbish" * 3
    app1 = b"\xff\xe1" + (len(rubbish) + 2).to_bytes(2, "big") + rubbish
    broken.write_bytes(content[:2] + app1 + content[2:])
    with Image.open(broken) as image, pytest.raises(SyntaxError):
        image.getexif()
    np.testing.assert_array_equal(read_image(broken, (24, 24)), read_image(plain, (24, 24)))


def test_every_kind_of_image(tmp_path):
    pixels = noise(24, 24, 3)
    grey = pixels[:, :, 0]
    alpha = np.where(np.arange(24 * 24).reshape(24, 24) % 3 == 0, 0, 255).astype(np.uint8)
    on_white = np.where(alpha[:, :, None] == 0, 255, pixels)
    as_rgb = np.stack([grey] * 3, axis=2)
    exact = {
        "grey.png": (grey, as_rgb),
        "deep.png": (grey.astype(np.uint16) * 256 + 201, as_rgb),
        "alpha.png": (np.dstack([pixels, alpha]), on_white),
        "grey-alpha.png": (np.dstack([grey, alpha]), np.where(alpha[:, :, None], as_rgb, 255)),
        "lossless.webp": (pixels, pixels),
    }
    for name, (stored, shown) in exact.items():
        options = {"lossless": True} if name.endswith("webp") else {}
        found = read_image(save(tmp_path / name, stored, **options), (24, 24))
        np.testing.assert_array_equal(found.transpose(1, 2, 0), shown, err_msg=name)

    colours = np.array([[9, 8, 7], [200, 100, 50], [0, 255, 30]], np.uint8)
    chosen = np.arange(24 * 24).reshape(24, 24) % 3
    palette = Image.fromarray(chosen.astype(np.uint8), "P")
    palette.putpalette(colours.tobytes())
    palette.save(tmp_path / "palette.png", transparency=1)
    shown = np.where(chosen[:, :, None] == 1, 255, colours[chosen])
    found = read_image(tmp_path / "palette.png", (24, 24)).transpose(1, 2, 0)
    np.testing.assert_array_equal(found, shown)
    palette.convert("1", dither=Image.Dither.NONE).save(tmp_path / "black.png")
    assert set(np.unique(read_image(tmp_path / "black.png", (24, 24)))) == {0, 255}


def test_cmyk(tmp_path):
    """A JPEG of four inks, as a press prints them: red is what cyan and black leave of white."""
    flat = np.zeros((48, 48, 4), np.uint8)
    flat[:24] = (0, 200, 100, 20)
    flat[24:] = (150, 10, 0, 90)
    Image.fromarray(flat, "CMYK").save(tmp_path / "inks.jpg", quality=100, subsampling=0)
    found = read_image(tmp_path / "inks.jpg", (32, 32)).astype(int)
    for row, inks in ((4, (0, 200, 100, 20)), (27, (150, 10, 0, 90))):
        expected = [(255 - ink) * (255 - inks[3]) / 255 for ink in inks[:3]]
        np.testing.assert_allclose(found[:, row, 7], expected, atol=4)


# the training view


def test_the_random_box_by_hand():
    """200 wide, 100 high: an area of 0.5, a ratio of 1, and the box's place."""

    def draw(area, ratio, right, down):
        return [(area - 0.08) / 0.92, log(ratio / 0.75) / log(16 / 9), right, down]

    never = draw(1.0, 1.0, 0.5, 0.5)  # 141 x 141
    fits = draw(0.5, 1.0, 0.25, 0.999)  # 100 x 100
    assert random_box(200, 100, fits) == (25, 0, 100, 100)
    small = draw(0.18, 4 / 3, 0.5, 0.75)  # 69.3 x 52.0: one of 132 and one of 49 places
    assert random_box(200, 100, never * 3 + small + fits * 6) == (66, 36, 69, 52)
    # none fits: the largest allowed part, in the middle
    assert random_box(1000, 60, never * 10) == (460, 0, 80, 60)
    assert random_box(60, 1000, never * 10) == (0, 460, 60, 80)
    assert random_box(90, 100, [0.9999, 0.9999, 0, 0] * 10) == (0, 0, 90, 100)


def test_the_training_view_is_a_part_of_the_image_resized(tmp_path, monkeypatch):
    pixels = noise(60, 90)
    files = ImageFiles((save(tmp_path / "x.png", pixels),), (40, 24))
    monkeypatch.setattr(views, "random_box", lambda width, height, draws: (11, 7, 51, 33))
    part = Image.fromarray(pixels[7:40, 11:62]).resize((24, 40), Image.Resampling.BICUBIC)
    plain = np.asarray(part).transpose(2, 0, 1)
    seen = set()
    for epoch in range(12):
        found = files.training_view([0], 3, epoch, "crop-flip")[0]
        mirrored = np.array_equal(found, plain[:, :, ::-1])
        assert mirrored or np.array_equal(found, plain)
        seen.add(mirrored)
    assert seen == {True, False}


def test_the_training_views_are_distributed_as_published():
    """Of a ramp, the colours at the ends of a part tell where it was cut out."""
    height, width, n = 300, 400, 600
    image = Image.fromarray(ramp(height, width))
    found = np.array([views.training_view(image, (25, 25), 5, 1, index) for index in range(n)])
    red, green = found[:, 12, :, 0] / 255 * width, found[:, :, 12, 1] / 255 * height  # (n, 25)
    widths, heights = abs(red[:, 20] - red[:, 4]) * 25 / 16, (green[:, 20] - green[:, 4]) * 25 / 16
    areas, ratios = widths * heights / (width * height), widths / heights
    assert areas.min() > 0.07 and areas.max() < 1.02
    assert ratios.min() > 0.73 and ratios.max() < 1.37
    mirrored = red[:, 20] < red[:, 4]
    assert abs(mirrored.sum() - n / 2) < 4.5 * (n / 4) ** 0.5
    # Areas are uniform up to 0.5, where all fit. Beyond, a draw of ratio r fits up to 3 r / 4, so
    # the mean of 3 r / 4 over log r, less 0.08, of 0.92 are taken.
    small = areas[areas < 0.5]
    taken = 0.75 * (4 / 3 - 3 / 4) / log(16 / 9) - 0.08
    assert abs(len(small) / n - 0.42 / taken) < 4.5 * (0.25 / n) ** 0.5
    assert abs(small.mean() - 0.29) < 4.5 * 0.42 / 12**0.5 / len(small) ** 0.5 + 0.005
    few = np.log(ratios[areas < 0.5])
    assert abs(few.mean()) < 4.5 * log(16 / 9) / 12**0.5 / len(few) ** 0.5 + 0.005
    places = (red[:, 12] - widths / 2)[areas < 0.5] / (width - widths[areas < 0.5])
    assert abs(places.mean() - 0.5) < 0.06 and places.min() < 0.05 and places.max() > 0.95
    assert abs(np.corrcoef(small, few)[0, 1]) < 0.2


def test_a_training_view_is_a_function_of_seed_epoch_index_and_repeat(folder):
    images = load(folder).train.images
    crops = "crop-flip"
    whole = images.training_view(np.arange(33), 7, 2, crops)
    chosen = np.array([30, 4, 4, 11])
    np.testing.assert_array_equal(images.training_view(chosen, 7, 2, crops), whole[chosen])
    np.testing.assert_array_equal(images.training_view(chosen, 7, 2, "none"), images[chosen])
    same = ImageFiles((images.paths[5],) * 33, images.size)
    base = same.training_view(np.arange(33), 7, 2, crops)
    assert len({view.tobytes() for view in base}) == 33  # the index
    for other in ((8, 2, 0), (7, 3, 0), (7, 2, 1)):
        seed, epoch, repeat = other
        changed = same.training_view(np.arange(33), seed, epoch, crops, repeat)
        assert (changed != base).any(axis=(1, 2, 3)).all(), other
    copies = np.arange(33) % 2
    found = same.training_view(np.arange(33), 7, 2, crops, copies)
    np.testing.assert_array_equal(found[::2], base[::2])
    np.testing.assert_array_equal(found[1::2], changed[1::2])  # the last of the others: copy 1


# the folder


def test_splits_and_classes(folder, capsys):
    (folder / "train" / "B" / "deeper").mkdir()
    save(folder / "train" / "B" / "deeper" / "x.JpEg", noise(20, 20))
    (folder / "train" / "B" / "notes.txt").write_text("no image")
    (folder / "train" / "B" / ".hidden.png").write_text("no image")
    (folder / "train" / "README").write_text("no image")
    (folder / "train" / ".cache").mkdir()
    (folder / "train" / ".cache" / "y.png").write_text("no image")
    data = load(folder, (16, 18))
    assert data.classes == ("A", "B", "c")
    assert data.test is None
    assert np.bincount(data.train.labels).tolist() == [12, 12, 10]
    assert np.bincount(data.val.labels).tolist() == [4, 4, 4]
    assert data.train.labels.dtype == np.int64
    assert data.train.images.shape == (34, 3, 16, 18) and len(data.train.images) == 34
    assert list(data.train.images.paths) == sorted(data.train.images.paths)
    for split in (data.train, data.val):
        for path, label in zip(split.images.paths, split.labels, strict=True):
            assert f"/{data.classes[label]}/" in path
    ignored = ".cache (1), without an ending (1), hidden (1), .txt (1)"
    assert f"ignored in {folder}: {ignored}\n" in capsys.readouterr().err
    assert data.augmentation == "crop-flip"
    assert data.mean == (0.485, 0.456, 0.406) and data.std == (0.229, 0.224, 0.225)


def test_indexing_decodes_what_is_asked_for_and_nothing_else(folder, monkeypatch):
    opened = []
    true_open = views.open_image
    monkeypatch.setattr(
        image_sets, "open_image", lambda path: (opened.append(path), true_open(path))[1]
    )
    data = load(folder, subset=0.5)
    images = data.train.images
    assert np.bincount(data.train.labels).tolist() == [6, 6, 5]
    assert not opened
    part = images[2:5]
    assert part.shape == (3, 3, 16, 16) and part.dtype == np.uint8
    assert opened == list(images.paths[2:5])
    picked = images[np.array([4, 2])]
    np.testing.assert_array_equal(picked, part[[2, 0]])
    assert images[3:3].shape == (0, 3, 16, 16)
    np.testing.assert_array_equal(np.asarray(images), images[:])
    assert images.select([4, 2])[:].tobytes() == picked.tobytes()


def test_without_val_a_tenth_of_each_class_is_held_out(tmp_path, capsys):
    sizes = (30, 12, 2)
    for name, count in zip("abc", sizes, strict=True):
        for number in range(count):
            save(tmp_path / "train" / name / f"{number}.png", noise(9, 9, number))
    data = load(tmp_path)
    assert np.bincount(data.val.labels).tolist() == [3, 1, 1]
    assert np.bincount(data.train.labels).tolist() == [27, 11, 1]
    files = data.train.images.paths + data.val.images.paths
    assert len(set(files)) == sum(sizes)
    assert load(tmp_path).val.images.paths == data.val.images.paths
    numbers = [int(Path(path).stem) for path in data.val.images.paths[:3]]
    names = sorted(os.listdir(tmp_path / "train" / "a"))
    places = [names.index(f"{n}.png") for n in numbers]
    assert places not in ([0, 1, 2], [27, 28, 29])  # drawn
    assert "5 of the 44 training images, 10% of each class, are held out" in capsys.readouterr().err
    for path in (tmp_path / "train" / "c").glob("1.png"):
        path.unlink()
    with pytest.raises(UserError, match="no folder val, and the class c has 1 images"):
        load(tmp_path)


def test_folders_that_do_not_fit(folder, tmp_path, monkeypatch):
    def refused(pattern, root=folder):
        with pytest.raises(UserError, match=pattern) as caught:
            load(root)
        assert "\n" not in str(caught.value)

    monkeypatch.delenv("MINICONVIT_DATA", raising=False)
    refused("but --data-dir is missing: name the folder above train", None)
    refused(f"no folder train in {tmp_path / 'none'}", tmp_path / "none")
    monkeypatch.setenv("MINICONVIT_DATA", str(folder))
    assert len(load(None).train.labels) == 33
    refused(f"no folder train in {tmp_path / 'none'}", tmp_path / "none")  # not other data
    (folder / "val" / "d").mkdir()
    save(folder / "val" / "d" / "x.png", noise(9, 9))
    refused("must have the same class folders, and 1 only in val, the first d")
    (folder / "val" / "c").rename(folder / "elsewhere")
    refused("1 only in val, the first d; 1 only in train, the first c")
    (folder / "elsewhere").rename(folder / "val" / "c")
    (folder / "val" / "d" / "x.png").unlink()
    (folder / "val" / "d").rmdir()
    (folder / "train" / "d").mkdir()
    (folder / "val" / "d").mkdir()
    refused(f"the class folder {folder}/train/d holds no usable image")
    (tmp_path / "bare" / "train").mkdir(parents=True)
    refused("holds no class folders", tmp_path / "bare")
    monkeypatch.setattr(views, "find_spec", lambda name: None)
    refused("pip install Pillow")


# broken files


@pytest.fixture
def broken(folder):
    """The folder with five broken files, and what is wrong with each, the first in order first."""
    rng = np.random.default_rng(1)
    whole = io.BytesIO()
    Image.fromarray(noise(60, 60)).save(whole, "JPEG")
    photo = whole.getvalue()
    whole = io.BytesIO()
    Image.fromarray(noise(60, 60)).save(whole, "PNG")
    picture = whole.getvalue()
    files = {
        "train/A/13.jpg": b"",
        "train/B/13.jpg": b"no image, but text" * 9,
        "train/B/14.jpg": photo[: len(photo) // 2],
        "train/c/13.png": picture[: len(picture) // 2],
        "val/A/13.jpg": rng.bytes(500),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder, files


def test_broken_files_are_refused_or_skipped(broken, capsys):
    root, files = broken
    with pytest.raises(UserError) as caught:
        load(root)
    text = str(caught.value)
    assert "\n" not in text and "--broken skip" in text
    assert f"5 of 50 image files in {root}" in text
    assert f"the first is {root}/train/A/13.jpg (empty)" in text
    capsys.readouterr()
    data = load(root, broken="skip")
    err = capsys.readouterr().err
    for name in files:
        assert f"{root}/{name} (" in err
    kept = data.train.images.paths + data.val.images.paths
    assert len(kept) == 45 and not {str(root / name) for name in files} & set(kept)
    assert np.bincount(data.train.labels).tolist() == [12, 11, 10]
    data.train.images[:], data.val.images[:]
    for path in (root / "val" / "A").glob("0*"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="val/A holds no usable image"):
        load(root, broken="skip")


def damage_inside(path):
    """A byte in the middle, which neither the header nor the end shows."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def test_what_only_decoding_shows_is_skipped_too_and_else_named_when_it_happens(folder, capsys):
    victim = folder / "train" / "B" / "07.png"
    damage_inside(victim)
    images = load(folder).train.images
    place = images.paths.index(str(victim))
    for use in (lambda: images[:], lambda: images.training_view([3, place], 0, 0, "crop-flip")):
        with pytest.raises(UserError, match=rf"{victim} cannot be read as an image"):
            use()
    images[:place]
    assert len(load(folder, broken="skip").train.images) == 32
    assert f"{victim} (" in capsys.readouterr().err


def test_skipping_tries_all_that_reading_does(folder, monkeypatch):
    """A file whose pixels load and cannot be turned into RGB is left out, and not met later."""
    to_rgb, victim = views._to_rgb, Image.open(folder / "train" / "B" / "07.png")

    def fail(image):
        if image.size == victim.size:
            raise ValueError("no such mode")
        return to_rgb(image)

    monkeypatch.setattr(views, "_to_rgb", fail)
    data = load(folder, broken="skip")
    assert victim.filename not in data.train.images.paths
    data.train.images[:], data.val.images[:]


def test_a_jpeg_without_its_last_bytes_is_judged_by_decoding_it(folder):
    """A file with something behind its end is whole, though the mark is not where it is sought."""
    path = folder / "train" / "A" / "trailing.jpg"
    save(path, noise(60, 60))
    content = path.read_bytes()
    path.write_bytes(content + bytes(5000))
    assert str(path) in load(folder).train.images.paths


# the feed


def rows_of(indices):
    return np.asarray(indices)[:, None] * np.array([[1, 10]])


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_feed_gives_every_batch_in_order(workers):
    order = np.random.default_rng(0).permutation(500)
    batches = [order[i : i + 37] for i in range(0, 500, 37)]

    def slow_at_first(indices):
        time.sleep(0.01 if 250 in indices else 0)
        return rows_of(indices)

    found = []
    with closing(feed(slow_at_first, batches, workers)) as fed:
        for batch, rows in zip(batches, fed, strict=True):
            np.testing.assert_array_equal(rows(5, 19), rows_of(batch[5:19]))
            found.append(rows(0, len(batch)))
    np.testing.assert_array_equal(np.concatenate(found), rows_of(order))
    assert list(feed(rows_of, [], workers)) == []


def decoders():
    return [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_the_feed_decodes_ahead_but_not_far():
    decoded, lock = set(), threading.Lock()

    def note(indices):
        with lock:
            decoded.update(np.asarray(indices).tolist())
        return rows_of(indices)

    batches = [np.arange(i, i + 20) for i in range(0, 400, 20)]
    with closing(feed(note, batches, 4)) as fed:
        for used in range(1, 4):
            next(fed)
            deadline = time.monotonic() + 20
            while len(decoded) < 20 * (used + AHEAD) and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(0.05)  # whoever wants to go further now can
            assert decoded == set(range(20 * (used + AHEAD)))
        assert decoders()
    assert not decoders()


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_worker_raises_reaches_the_step(workers):
    def fail(indices):
        if 55 in indices:
            raise UserError("image 55 is broken")
        return rows_of(indices)

    seen = []
    fed = feed(fail, [range(i, i + 20) for i in range(0, 100, 20)], workers)
    with pytest.raises(UserError, match="image 55"), closing(fed):
        for rows in fed:
            seen.append(rows(0, 20)[0, 0])
    assert seen == [0, 20]
    assert not decoders()


# training


def run(root, out, device="cpu", workers=2, resume=False, **given):
    small = {"data": "imagefolder", "model": "convit_micro32", "img_size": 16, "epochs": 2,
             "batch_size": 8, "seed": 3, "drop_path": 0.1}  # fmt: skip
    settings = make_settings(**small | given)
    return training.train(
        settings, out, resume=resume, data_dir=root, workers=workers, device=device, quiet=True
    )


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows
    ]


def same_run(a, b):
    for name in ("last.safetensors", "best.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    assert metrics(a) == metrics(b)


def test_a_run_has_the_same_bits_for_any_number_of_threads_and_goes_on_to_the_bit(
    folder, tmp_path, monkeypatch
):
    result = run(folder, tmp_path / "one", workers=1)
    assert not result.has_test and result.step == 8
    run(folder, tmp_path / "three", workers=3)
    same_run(tmp_path / "one", tmp_path / "three")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted):
            run(folder, tmp_path / "parts")
    run(folder, tmp_path / "parts", resume=True)
    same_run(tmp_path / "one", tmp_path / "parts")
    run(folder, tmp_path / "other", augment="none")
    assert metrics(tmp_path / "other") != metrics(tmp_path / "one")


def test_on_a_device_threads_decode_ahead_and_change_no_bit(cupy, folder, tmp_path, monkeypatch):
    names = set()
    true_open = image_sets.open_image

    def note(path):
        names.add(threading.current_thread().name.partition("_")[0])
        return true_open(path)

    monkeypatch.setattr(image_sets, "open_image", note)
    run(folder, tmp_path / "ahead", "cuda")
    assert "decode" in names
    assert not decoders()
    with monkeypatch.context() as patch:
        patch.setattr(ImageFiles, "loaders", lambda *_: 0)
        names.clear()
        run(folder, tmp_path / "plain", "cuda")
        assert "decode" not in names
    same_run(tmp_path / "ahead", tmp_path / "plain")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted):
            run(folder, tmp_path / "parts", "cuda")
    assert not decoders()
    run(folder, tmp_path / "parts", "cuda", resume=True)
    same_run(tmp_path / "ahead", tmp_path / "parts")
    run(folder, tmp_path / "cpu")
    for found, true in zip(metrics(tmp_path / "ahead"), metrics(tmp_path / "cpu"), strict=True):
        assert found["train_loss"] == pytest.approx(true["train_loss"], rel=1e-4)
        assert found["val_loss"] == pytest.approx(true["val_loss"], rel=1e-4)


def test_mixed_images_are_decoded_once(folder, tmp_path, monkeypatch):
    """Decoding ahead, which mixing asks for, and decoding twice give the same bits."""
    opened, true_open = [], image_sets.open_image

    def note(path):
        opened.append(path)
        return true_open(path)

    monkeypatch.setattr(image_sets, "open_image", note)
    given = {"mixup": 0.8, "augment": "paper"}
    run(folder, tmp_path / "once", **given)
    once = len(opened)
    opened.clear()
    with monkeypatch.context() as patch:
        patch.setattr(ImageFiles, "loaders", lambda *_: 0)
        run(folder, tmp_path / "twice", **given)
    assert len(opened) > once + 20
    same_run(tmp_path / "once", tmp_path / "twice")
    run(folder, tmp_path / "plain", mixup=0.8)
    assert metrics(tmp_path / "plain") != metrics(tmp_path / "once")


@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_a_file_that_breaks_a_run_is_named(cupy, folder, tmp_path, program, place):
    victim = folder / "train" / "c" / "03.png"
    damage_inside(victim)
    flags = ["--data", "imagefolder", "--data-dir", folder, "--img-size", 16, "--device", place]
    flags += ["--model", "convit_micro32", "--epochs", 1, "--batch-size", 11, "--quiet"]
    answer = program("train", *flags, "--out", tmp_path / "run")
    assert_sentence(answer, f"{victim} cannot be read as an image")
    assert not decoders()
    (folder / "val" / "A" / "99.png").write_bytes(b"")
    answer = program("train", *flags, "--broken", "skip", "--out", tmp_path / "skipped")
    assert answer[0] == 0 and str(victim) in answer[2]
    assert program("eval", tmp_path / "skipped")[0] == 0  # as the run did
    assert_sentence(program("eval", tmp_path / "skipped", "--broken", "refuse"), "99.png (empty)")
    assert "--split test" not in answer[1]
    settings = json.loads((tmp_path / "skipped" / "config.json").read_text())["settings"]
    assert settings["broken"] == "skip"
    assert_sentence(
        program("train", "--resume", "--out", tmp_path / "skipped", "--broken", "refuse"),
        "began with --broken skip and cannot go on with --broken refuse",
    )


@pytest.mark.parametrize("place", ["cpu", "cuda"])
@pytest.mark.parametrize("victim", ["train/c/03.png", "val/c/02.png"])
def test_a_run_that_a_file_has_ended_goes_on_to_the_bit_when_it_is_repaired(
    cupy, folder, tmp_path, victim, place
):
    run(folder, tmp_path / "whole", place)
    path = folder / victim
    content = path.read_bytes()
    damage_inside(path)
    with pytest.raises(UserError) as caught:
        run(folder, tmp_path / "parts", place)
    text = str(caught.value)
    saved = load_checkpoint(tmp_path / "parts" / "last.safetensors").state
    assert f"{path} cannot be read as an image" in text and "\n" not in text
    assert f"saved after step {saved['step']}: " in text and "--resume" in text
    assert saved["epoch"] == 0 and (saved["step"] == 4 or victim.startswith("train"))
    with pytest.raises(UserError, match="cannot be read"):
        run(folder, tmp_path / "parts", place, resume=True)
    path.write_bytes(content)
    run(folder, tmp_path / "parts", place, resume=True)
    same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_run_goes_on_with_the_files_it_began_with_and_no_others(folder, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Interrupted):
            run(folder, out)

    def refused():
        with pytest.raises(UserError, match="not those with which the run in"):
            run(folder, out, resume=True)

    train, val = folder / "train", folder / "val"
    save(train / "A" / "055.png", noise(20, 20))
    refused()
    (train / "A" / "055.png").unlink()
    (train / "A" / "03.png").rename(train / "A" / "99.png")
    refused()
    (train / "A" / "99.png").rename(train / "B" / "99.png")
    refused()
    (train / "B" / "99.png").rename(train / "A" / "03.png")
    (val / "c" / "03.png").unlink()
    refused()
    save(val / "c" / "03.png", noise(23, 28))  # another picture under the same name
    for name in "ABc":
        save(folder / "test" / name / "0.png", noise(20, 20))
    folder.rename(tmp_path / "moved")
    run(tmp_path / "moved", out, resume=True)


def test_a_test_folder_without_classes_is_not_used(folder, capsys):
    save(folder / "test" / "1.png", noise(20, 20))
    assert load(folder).test is None
    assert f"{folder / 'test'} holds no class folders" in capsys.readouterr().err


def test_validation_images_alone_are_enough_to_evaluate(folder, tmp_path, program):
    run(folder, tmp_path / "run")
    true = program("eval", tmp_path / "run", "--json")
    (folder / "train").rename(tmp_path / "elsewhere")
    found = program("eval", tmp_path / "run", "--json")
    assert found[0] == 0 and json.loads(found[1]) == json.loads(true[1])
    assert_sentence(program("eval", tmp_path / "run", "--split", "train"), "no split train here")
    assert_sentence(
        program("train", "--data", "imagefolder", "--data-dir", folder), "no folder train in"
    )
    with pytest.raises(UserError, match="no folder train in"):
        load(folder)
    (folder / "val").rename(tmp_path / "there")
    assert_sentence(program("eval", tmp_path / "run"), "no folder train or val in")


def test_inspect_draws_the_course_of_a_run_as_it_was_trained_and_no_other(
    folder, tmp_path, program
):
    pytest.importorskip("matplotlib")
    run(folder, tmp_path / "run")
    for flags, has_course in (([], True), (["--img-size", 20], False)):
        out = tmp_path / f"out{len(flags)}"
        assert program("inspect", tmp_path / "run", *flags, "--out", out)[0] == 0
        assert (out / "nonlocality.png").exists() == has_course
        assert (out / "maps.png").exists()


def test_reading_changes_no_filter_of_warnings(folder):
    before = list(warnings.filters)
    load(folder).val.images[:]
    assert list(warnings.filters) == before


def test_the_data_command_shows_images_at_the_size_of_the_default_model(folder, program):
    status, text, _ = program("data", "imagefolder", "--data-dir", folder)
    assert status == 0 and "64x64 pixels" in text and "crops image files at random" in text


def test_eval_predict_and_inspect_see_what_training_saw(folder, tmp_path, program):
    out = tmp_path / "run"
    run(folder, out)
    best = max(metrics(out), key=lambda row: row["val_top1"])
    status, text, _ = program("eval", out, "--json")
    found = json.loads(text)
    assert (status, found["images"]) == (0, 12)
    assert (found["loss"], found["top1"]) == (best["val_loss"], best["val_top1"])
    assert_sentence(program("eval", out, "--split", "test"), "no split test here", "add a folder")
    val = load(folder).val
    files = val.images.paths[::5]
    status, text, _ = program("predict", out, *files, "--json")
    answers = json.loads(text)["images"]
    model = load_checkpoint(out / "best.safetensors")
    right = [
        answer["top"][0]["index"] == label
        for answer, label in zip(answers, val.labels[::5], strict=True)
    ]
    logits = logits_of(model, val.images[::5])
    assert [answer["top"][0]["index"] for answer in answers] == logits.argmax(axis=1).tolist()
    assert len(right) == 3
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(
        [answer["top"][0]["probability"] for answer in answers], p.max(axis=1), rtol=1e-4
    )
    status, text, err = program("inspect", out, "--json", "--images", 5)
    assert (status, json.loads(text)["images"]) == (0, 5), err
    (folder / "test").mkdir()
    for name in "ABc":
        save(folder / "test" / name / "0.png", noise(20, 20))
    status, text, _ = program("eval", out, "--split", "test", "--json")
    assert json.loads(text)["images"] == 3


def logits_of(model, images):
    """By the normalisation that ImageNet's models use, written out."""
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    x = (images / 255 - mean[:, None, None]) / std[:, None, None]
    return convit_forward(x.astype("float32"), model.params, model.config)[0]


@real
def test_a_model_learns_from_real_images(tmp_path):
    """A few epochs of the recipe for folders on a part of the ImageNet subset, linked to."""
    for split, count in {"train": 20, "val": 6}.items():
        for name in sorted(os.listdir(SAMPLE / split))[:4]:
            (tmp_path / split / name).mkdir(parents=True)
            for file in sorted((SAMPLE / split / name).iterdir())[:count]:
                (tmp_path / split / name / file.name).symlink_to(file)
    settings = make_settings(data="imagefolder", epochs=5, batch_size=40, lr=3e-3)
    assert settings.recipe == "imagefolder-small" and settings.img_size == 64
    result = training.train(settings, tmp_path / "run", data_dir=tmp_path, quiet=True)
    first, last = result.rows[0], result.rows[-1]
    assert abs(first["train_loss"] - log(4)) < 0.1
    assert last["train_loss"] < first["train_loss"] - 0.02


def test_short_memory_is_no_damaged_exif(tmp_path, monkeypatch):
    """An image that is left unturned because memory was short would be another one on a resume."""
    file = save(tmp_path / "a.png", noise(7, 5))

    def short(image, in_place):
        raise MemoryError

    monkeypatch.setattr("PIL.ImageOps.exif_transpose", short)
    with pytest.raises(BrokenImage, match=f"{file} cannot be .*: not enough memory"):
        views.open_image(file)
