"""Image files that are too long, too large, too dark, or not at fault: what is cut before it is
resized, limits, memory, and whose error it is."""

import errno
import os
import subprocess
import sys
import zlib
from itertools import count
from pathlib import Path

import numpy as np
import pytest

import miniconvit.data.images as views
from miniconvit import UserError
from miniconvit.data import BrokenImage
from miniconvit.data.images import evaluation_view, finding, open_image, read_image

Image = pytest.importorskip("PIL.Image")


def noise(height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def whole_then_cut(image, size):
    """The definition: the whole image is resized, and the centre is cut out."""
    height, width = size
    rows, cols = (side * 8 // 7 if min(size) > 32 else side for side in size)
    if image.height * cols <= image.width * rows:
        resized = rows * image.width // image.height, rows
    else:
        resized = cols, cols * image.height // image.width
    image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return np.asarray(image.crop((left, top, left + width, top + height)))


def test_the_view_has_the_bits_of_the_whole_image_resized():
    """Of every shape up to 40 : 1."""
    rng = np.random.default_rng(3)
    for number in range(300):
        short, ratio = int(rng.integers(1, 60)), rng.uniform(1, 40)
        sides = (short, int(short * ratio))[:: 1 if number % 2 else -1]
        image = noise(*sides, number)
        size = [int(side) for side in rng.integers(20, 70, 2)] if number % 3 else [48, 48]
        size = size if max(size) < 1.5 * min(size) else [size[0], size[0]]
        found = np.asarray(evaluation_view(image, size))
        np.testing.assert_array_equal(found, whole_then_cut(image, size), err_msg=f"{sides} {size}")


def test_what_is_cut_before_it_is_resized_is_the_same_part():
    rng = np.random.default_rng(4)
    for number in range(40):
        short, ratio = int(rng.integers(1, 9)), rng.uniform(70, 95)
        sides = (short, int(short * ratio))[:: 1 if number % 2 else -1]
        image, size = noise(*sides, number), (48, 48)
        found = np.asarray(evaluation_view(image, size)).astype(int)
        difference = abs(found - whole_then_cut(image, size))
        assert difference.max() <= 2 and (difference > 0).mean() < 0.02, sides


def growth(code, tmp_path):
    """MB by which the most memory that a process has ever used grows in running the code."""
    begin = (
        "import sys; from miniconvit.data.images import *; from PIL import Image; Image.init()\n"
    )
    peak = "int(next(line for line in open('/proc/self/status') if 'VmHWM' in line).split()[1])"
    code = f"{begin}before = {peak}\n{code}\nprint(({peak} - before) / 1024)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    return float(run.stdout.split()[-1])


linux = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc")


@linux
@pytest.mark.parametrize("size", [(45_000, 2), (1, 30_000), (64_000, 50)])
def test_a_line_costs_little_memory(tmp_path, monkeypatch, size):
    """Whole, the first would be resized to 256 x 5,760,000 pixels: 5.9 GB."""
    Image.new("RGB", size, (200, 100, 50)).save(tmp_path / "line.png")
    shown = "assert (read_image('line.png', (224, 224)) == [[[200]], [[100]], [[50]]]).all()"
    assert growth(f"allow_any_size()\n{shown}", tmp_path) < 40


@linux
@pytest.mark.parametrize("mode, copies", [("RGB", 1), ("RGBA", 2), ("L", 1)])
def test_an_image_is_not_copied_again_and_again(tmp_path, mode, copies):
    Image.new(mode, (5000, 4000)).save(tmp_path / "large.png")  # 80 MB at four bytes a pixel
    assert growth("read_image('large.png', (64, 64))", tmp_path) < copies * 80 + 45


@pytest.mark.parametrize("size", [(1001, 1), (2, 2500), (9000, 8)])
def test_a_line_is_no_picture(tmp_path, monkeypatch, size):
    file = tmp_path / "line.png"
    Image.new("RGB", size).save(file)
    with pytest.raises(BrokenImage, match=rf"{file} cannot be .* a line and no .* --any-size"):
        open_image(file)
    assert "a line and no picture" in finding(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert finding(file) is None and open_image(file).size == size


def png_of(width, height):
    """A black PNG of so many grey pixels, as few bytes as it takes."""

    def chunk(kind, data):
        check = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + check

    packer, data = zlib.compressobj(9), b""
    for _ in range(height):
        data += packer.compress(bytes(width + 1))
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\0\0\0\0"
    body = chunk(b"IHDR", head) + chunk(b"IDAT", data + packer.flush()) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_a_small_file_of_many_pixels_is_refused_unread(tmp_path, monkeypatch):
    file = tmp_path / "bomb.png"
    file.write_bytes(png_of(7000, 6500))
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("it was read"))
    with pytest.raises(BrokenImage, match=rf"{file} .*7,000 x 6,500 pixels in .* --any-size"):
        open_image(file)
    assert "7,000 x 6,500 pixels" in finding(file)
    monkeypatch.undo()
    file.write_bytes(file.read_bytes() + bytes(5_000_000))  # as large as a photograph
    assert finding(file) is None


@pytest.mark.filterwarnings("error")
def test_pillows_own_limit(tmp_path, monkeypatch):
    file = tmp_path / "large.png"
    file.write_bytes(png_of(600, 500))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    with pytest.raises(BrokenImage, match=rf"{file} .*more than 200,000 pixels.* --any-size"):
        open_image(file)


def test_the_flag_lifts_the_limits(tmp_path, program, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    for split in ("train", "val"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (3000, 2)).save(tmp_path / split / name / "0.png")
    flags = ["data", "imagefolder", "--data-dir", tmp_path, "--img-size", 16]
    status, _, err = program(*flags)
    assert status == 2 and "3,000 x 2 pixels are a line" in err and "--broken skip" in err
    status, out, _ = program(*flags, "--any-size")
    assert status == 0 and "train          2 images" in out


# whose error it is


@pytest.mark.parametrize("kind", [MemoryError, OverflowError])
@pytest.mark.parametrize("place", ["PngImagePlugin.PngImageFile.load", "Image.Image.convert"])
def test_what_does_not_fit_names_its_file(tmp_path, monkeypatch, place, kind):
    file = tmp_path / "x.png"
    Image.new("P", (9, 7)).save(file)

    def fail(*_, **__):
        raise kind("too much")

    monkeypatch.setattr(f"PIL.{place}", fail)
    with pytest.raises(BrokenImage, match=str(file)):
        open_image(file)
    assert finding(file, thorough=True)


def test_our_own_errors_are_not_blamed_on_the_file(tmp_path, monkeypatch):
    file = tmp_path / "x.png"
    noise(9, 9).save(file)
    for error in (AttributeError("has_transparency_data"), TypeError("ours"), NameError("ours")):

        def fail(image, error=error):
            raise error

        monkeypatch.setattr(views, "_to_rgb", fail)
        for look in (open_image, lambda file: finding(file, thorough=True)):
            with pytest.raises(type(error)):
                look(file)


def test_the_systems_errors_are_not_blamed_on_the_file(tmp_path, monkeypatch):
    file = tmp_path / "x.png"
    noise(9, 9).save(file)
    full = OSError(errno.EMFILE, "Too many open files", str(file))

    def fail(*_, **__):
        raise full

    monkeypatch.setattr(Image, "open", fail)
    for look in (open_image, finding):
        with pytest.raises(OSError, match="Too many open files"):
            look(file)
    full = OSError("decoder jpeg2k not available")
    for look in (open_image, finding):
        with pytest.raises(UserError, match=r"without what .* needs .decoder jpeg2k") as caught:
            look(file)
        assert not isinstance(caught.value, BrokenImage)


@pytest.mark.parametrize("version", ["9.4.0", "10.0.1", "8.2"])
def test_an_old_pillow_is_named_at_once(tmp_path, program, monkeypatch, version):
    noise(9, 9).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "__version__", version)
    data = ["data", "imagefolder", "--data-dir", tmp_path]
    for command in (data, [*data, "--broken", "skip"], ["predict", tmp_path, "x.png"]):
        status, out, err = program(*command)
        assert (status, out) == (2, "")
        assert f"needs Pillow 10.1 or newer, and here is {version}: pip install" in err
        assert "x.png" not in err and err.count("\n") == 1


def test_setup_asks_for_the_pillow_that_is_needed():
    text = (Path(__file__).parents[2] / "setup.cfg").read_text()
    wanted = ".".join(map(str, views.PILLOW))
    assert text.count("Pillow>=") == text.count(f"Pillow>={wanted}\n") == 3


def test_a_pillow_that_cannot_be_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    monkeypatch.delattr("PIL.Image")
    with pytest.raises(UserError, match="inspect needs Pillow, which cannot be loaded here"):
        views.require_pillow("inspect")


# dark data


@pytest.mark.parametrize("bits", [8, 10, 12])
@pytest.mark.parametrize("kind", ["png", "tif"])
def test_data_of_fewer_bits_in_16_are_said_once(tmp_path, capsys, monkeypatch, bits, kind):
    monkeypatch.setattr(views, "_dark_images", count())
    values = np.linspace(0, 2**bits - 1, 400).astype(np.uint16).reshape(20, 20)
    for number in range(3):
        Image.fromarray(values).save(tmp_path / f"{number}.{kind}")
        open_image(tmp_path / f"{number}.{kind}")
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"{tmp_path / f'0.{kind}'} is nearly black" in err
    assert f"at most {(2**bits - 1) >> 8} of 255" in err


def test_floats_of_zero_to_one_are_said_too(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(views, "_dark_images", count())
    Image.fromarray(np.linspace(0, 1, 99, dtype=np.float32).reshape(9, 11)).save(tmp_path / "f.tif")
    open_image(tmp_path / "f.tif")
    assert "f.tif is nearly black" in capsys.readouterr().err


def test_nothing_is_said_of_other_images(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(views, "_dark_images", count())
    Image.fromarray(np.full((9, 9), 2**15, np.uint16)).save(tmp_path / "deep.png")
    Image.new("L", (9, 9), 3).save(tmp_path / "night.png")  # 8 bits may be dark
    for name in ("deep.png", "night.png"):
        open_image(tmp_path / name)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "values, kind, sentence",
    [
        ([0, 2**16], np.int32, "it has values of more than 16 bits"),
        ([-1, 5], np.int32, "it has negative values, down to -1"),
        ([-0.5, 1], np.float32, r"its floats reach from -0\.5 to 1, not within 0 to 255"),
        ([0, 4095], np.float32, "its floats reach from 0 to 4095, not within 0 to 255"),
        ([0, np.nan], np.float32, "its floats reach from nan to nan, not within 0 to 255"),
    ],
)
def test_values_that_would_be_clipped_are_refused(tmp_path, values, kind, sentence):
    Image.fromarray(np.array([values], kind)).save(tmp_path / "x.tif")
    with pytest.raises(BrokenImage, match=rf"x\.tif cannot be read as an image: {sentence}"):
        read_image(tmp_path / "x.tif", (8, 8))


WHITE_IS_ZERO = {262: 0}


@pytest.mark.parametrize("channels", [1, 3])
def test_a_deep_tiff_whose_zero_is_white_looks_as_its_shallow_one(tmp_path, channels):
    """Pillow writes and reads 8 bits rightly, so both files are of the same picture."""
    shades = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(shades).save(tmp_path / "8.tif", tiffinfo=WHITE_IS_ZERO)
    stored = (65535 - 257 * shades.astype(np.int64)).astype(np.uint16)
    Image.fromarray(stored).save(tmp_path / "16.tif", tiffinfo=WHITE_IS_ZERO)
    shallow, deep = (np.asarray(open_image(tmp_path / f"{n}.tif", channels)) for n in (8, 16))
    np.testing.assert_array_equal(shallow.reshape(16, 16, -1)[..., 0], shades)
    np.testing.assert_array_equal(deep, shallow)


def test_floats_whose_zero_is_white_are_refused(tmp_path):
    Image.fromarray(np.full((9, 9), 200, np.float32)).save(
        tmp_path / "f.tif", tiffinfo=WHITE_IS_ZERO
    )
    with pytest.raises(BrokenImage, match=r"f\.tif .*floats are white at 0"):
        open_image(tmp_path / "f.tif")
