"""Data: pinned bytes, damaged files, randomness that does not depend on the batch."""

import functools
import hashlib
import http.server
import io
import os
import tarfile
import threading

import numpy as np
import pytest

from miniconvit.data import (
    ImageArray,
    ImageFiles,
    augment,
    epoch_order,
    load_dataset,
    normalize,
    shapes,
)
from miniconvit.data.cifar import CIFAR10 as cifar
from miniconvit.data.cifar import CIFAR100
from miniconvit.errors import UserError


@pytest.fixture(scope="module")
def dataset():
    return load_dataset("shapes")


def splits(dataset):
    return {name: getattr(dataset, name) for name in ("train", "val", "test")}


# shapes


def test_shapes_has_the_pinned_bytes(dataset):
    arrays = {name: (split.images[:], split.labels) for name, split in splits(dataset).items()}
    assert shapes.digest(arrays) == shapes.SHA256
    arrays["test"][0][5, 1, 7, 9] ^= 1
    changed = shapes.digest(arrays)
    arrays["test"][0][5, 1, 7, 9] ^= 1
    assert changed != shapes.SHA256


def test_shapes_is_balanced_and_its_splits_share_no_image(dataset):
    for name, n in {"train": 10_000, "val": 2_000, "test": 2_000}.items():
        split = splits(dataset)[name]
        assert split.images.shape == (n, 3, 32, 32) and split.images.dtype == np.uint8
        assert split.labels.dtype == np.int64
        assert np.bincount(split.labels).tolist() == [n // 10] * 10
    images = [image.tobytes() for split in splits(dataset).values() for image in split.images]
    assert len(set(images)) == 14_000
    assert len(set(dataset.classes)) == 10
    assert dataset.augmentation == "none"


def moments(images):
    """Mean and standard deviation of each channel where white is 1, from its histogram."""
    for channel in range(3):
        counts = np.bincount(images[:, channel].ravel(), minlength=256)
        mean = counts @ np.arange(256) / counts.sum()
        std = (counts @ np.arange(256) ** 2 / counts.sum() - mean**2) ** 0.5
        yield mean / 255, std / 255


def test_shapes_normalisation_constants_are_those_of_its_training_images(dataset):
    constants = list(zip(dataset.mean, dataset.std, strict=True))
    np.testing.assert_allclose(constants, list(moments(dataset.train.images[:])), atol=5e-4)


def test_the_class_says_which_texture_is_where(dataset):
    """Stripes are constant along one axis, checks along none, a plain object along both."""
    gray = dataset.test.images[:].astype(np.float64).mean(axis=1)
    quarters = ("top left", "top right", "bottom left", "bottom right")
    textures = {(True, False): "vertical stripes", (False, True): "horizontal stripes"}
    textures[True, True] = "checks"
    for image, label in zip(gray, dataset.test.labels, strict=True):
        found = []
        for place in range(4):
            row, col = divmod(place, 2)
            # pixels 6 to 9 of a quarter lie within the object, wherever it stands
            inner = image[16 * row + 6 : 16 * row + 10, 16 * col + 6 : 16 * col + 10]
            # noise differs by 15 at most; one step in three between colours 79 apart gives over 20
            changes = tuple(bool(abs(np.diff(inner, axis=axis)).mean() > 15) for axis in (1, 0))
            if any(changes):
                found.append(f"{textures[changes]}, {quarters[place]}")
        assert found == [dataset.classes[label]]


def linear_accuracy(train, train_labels, val, val_labels):
    """Of the better of two ridge regressions from pixels to classes."""
    x, x_val = (normalize(images, (0.5,) * 3, (0.25,) * 3) for images in (train, val))
    x, x_val = x.reshape(len(x), -1), x_val.reshape(len(x_val), -1)
    gram, target = x.T @ x, x.T @ np.eye(10, dtype=np.float32)[train_labels]
    accuracies = []
    for strength in (1e3, 1e5):
        weight = np.linalg.solve(gram + strength * np.eye(len(gram), dtype=np.float32), target)
        accuracies.append(float(((x_val @ weight).argmax(1) == val_labels).mean()))
    return max(accuracies)


def test_shapes_is_out_of_reach_of_a_linear_classifier(dataset):
    train, val = dataset.train.images[:4000], dataset.val.images[:1000]
    labels, val_labels = dataset.train.labels[:4000], dataset.val.labels[:1000]
    assert linear_accuracy(train, labels, val, val_labels) < 0.6

    def brightened(images, labels):
        """The same task, told by the brightness of two quarters instead."""
        texture, quarter = np.array(shapes.PAIRS)[labels].T
        light = 60 * np.eye(4, dtype=np.uint8)[quarter]  # the texture by which part of it is lit
        light = light.reshape(-1, 1, 2, 2).repeat(16, axis=2).repeat(16, axis=3)
        light &= (np.arange(32) // 5 % 3 == texture[:, None])[:, None, None, :] * np.uint8(255)
        return images // 2 + light

    train, val = brightened(train, labels), brightened(val, val_labels)
    assert linear_accuracy(train, labels, val, val_labels) > 0.6


def test_flattened_scenes_keep_layout_and_lose_texture(dataset):
    flat = shapes.flatten_textures("val")
    images = dataset.val.images[:]
    assert flat.shape == images.shape and flat.dtype == np.uint8
    same = (flat == images).all(axis=1)  # all but one object of four, which fills half a quarter
    assert 0.8 < same.mean() < 0.95
    inner = flat[:, :, 6:10, 6:10].astype(int)  # within the top left object
    assert np.ptp(inner, axis=(2, 3)).max() <= 15  # 16 levels of noise, no texture
    in_place = np.array(shapes.PAIRS)[dataset.val.labels, 1] == 0
    textured = images[in_place][:, :, 6:10, 6:10].astype(int)
    assert np.ptp(textured, axis=(2, 3)).max(axis=1).min() > 30
    mean_change = flat.mean(axis=(2, 3)) - images.mean(axis=(2, 3))
    assert abs(mean_change.mean()) < 0.5


def test_a_class_shows_only_in_the_texture_of_its_own_quarter():
    """The same scenes drawn with every label: the bounds in the docstring of shapes rest on it."""
    scenes = np.arange(40, 97)
    flat, textured = (
        [shapes._render_scenes(scenes, np.full(57, label), flat) for label in range(10)]
        for flat in (True, False)
    )
    for label in range(1, 10):
        np.testing.assert_array_equal(flat[label], flat[0])
        changed = (textured[label] != textured[0]).any(axis=1)
        quarters = changed.reshape(57, 2, 16, 2, 16).any(axis=(2, 4)).reshape(57, 4)
        expected = {shapes.PAIRS[label][1], shapes.PAIRS[0][1]}  # where either has its texture
        assert {tuple(np.flatnonzero(row)) for row in quarters} == {tuple(sorted(expected))}


def test_shuffled_patches_are_the_same_patches_elsewhere(dataset):
    images = dataset.val.images[:30, :, :24, :]  # not square
    shuffled = shapes.shuffle_patches(images, seed=3)

    def patches(image):
        return [
            image[:, row : row + 4, col : col + 4].tobytes()
            for row in range(0, 24, 4)
            for col in range(0, 32, 4)
        ]

    orders = []
    for before, after in zip(images, shuffled, strict=True):
        assert sorted(patches(before)) == sorted(patches(after))
        orders.append(tuple(patches(before).index(patch) for patch in patches(after)))
    assert len(set(orders)) == 30
    assert (shapes.shuffle_patches(images, 3) == shuffled).all()
    assert (shapes.shuffle_patches(images, 4) != shuffled).any()
    with pytest.raises(UserError, match="patches of 5"):
        shapes.shuffle_patches(images, 3, patch_size=5)


# load_dataset


def test_subset_keeps_the_first_of_each_class_in_order(dataset):
    part = load_dataset("shapes", subset=0.0137)
    kept = np.sort(
        np.concatenate([np.flatnonzero(dataset.train.labels == c)[:14] for c in range(10)])
    )
    np.testing.assert_array_equal(part.train.images, dataset.train.images[kept])
    np.testing.assert_array_equal(part.train.labels, dataset.train.labels[kept])
    np.testing.assert_array_equal(part.val.images, dataset.val.images)
    assert np.bincount(load_dataset("shapes", subset=1e-9).train.labels).tolist() == [1] * 10


@pytest.mark.parametrize("subset", [0, -0.5, 1.01, float("nan")])
def test_subset_outside_its_range_is_refused(subset):
    with pytest.raises(UserError, match="subset"):
        load_dataset("shapes", subset=subset)


def test_unknown_name_is_refused():
    with pytest.raises(UserError, match=r"'mnist'.*shapes, cifar10"):
        load_dataset("mnist")


# images in memory


def test_images_in_memory_are_as_good_as_an_array():
    pixels = np.random.default_rng(3).integers(0, 256, (9, 3, 8, 10), dtype=np.uint8)
    images, chosen = ImageArray(pixels), np.array([7, 2, 2])
    assert len(images) == 9 and images.shape == pixels.shape and images.dtype == np.uint8
    for which in (slice(2, 5), chosen, 4, (slice(3), 0)):
        np.testing.assert_array_equal(images[which], pixels[which])
    np.testing.assert_array_equal(np.asarray(images), pixels)
    np.testing.assert_array_equal(list(images), pixels)
    np.testing.assert_array_equal(images.select(chosen)[:], pixels[chosen])
    constants = (0.4, 0.5, 0.6), (0.2, 0.2, 0.3)
    np.testing.assert_array_equal(normalize(images, *constants), normalize(pixels, *constants))
    for preset in ("none", "crop-flip", "paper"):
        found = images.training_view(chosen, 5, 1, preset, 2)
        np.testing.assert_array_equal(found, augment(pixels[chosen], chosen, 5, 1, preset, 2))


def test_images_in_memory_and_in_files_are_asked_the_same():
    in_memory, in_files = (
        {name for name in dir(kind) if not name.startswith("_")}
        for kind in (ImageArray, ImageFiles)
    )
    assert in_memory == in_files == {
        "CHUNK", "dtype", "loaders", "names", "on", "select", "shape", "training_view", "xp"
    }  # fmt: skip


# cifar10, on small files of the same layout

NAMES = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def md5(content):
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def small_cifar(tmp_path, monkeypatch):
    """The folder of 5 x 20 + 30 random records, and the records; nothing else can be found."""
    folder = tmp_path / "data" / cifar.FOLDER
    folder.mkdir(parents=True)
    rng = np.random.default_rng(5)
    records, table = {}, {}
    for name in cifar.FILES:
        if name.endswith(".txt"):
            content = "".join(f"{line}\n" for line in [*NAMES, ""]).encode()
        else:
            n = 30 if name.startswith("test") else 20
            records[name] = rng.integers(0, 256, (n, 3073), dtype=np.uint8)
            records[name][:, 0] = rng.permutation(np.arange(n) % 10)
            content = records[name].tobytes()
        (folder / name).write_bytes(content)
        table[name] = (len(content), md5(content))
    monkeypatch.setattr(cifar, "FILES", table)
    monkeypatch.setattr(cifar, "HELD_OUT", 3)
    monkeypatch.delenv("MINICONVIT_DATA", raising=False)
    monkeypatch.setattr("pooch.os_cache", lambda name: tmp_path / "cache")
    return folder, records


def rewrite(folder, name, content):
    """Replace a file and its entry in the table."""
    (folder / name).write_bytes(content)
    cifar.FILES[name] = (len(content), md5(content))


def check_records(split, records):
    """Pixel by pixel, by the layout's definition: label, then red, green, blue row by row."""
    assert len(split.labels) == len(records)
    for image, label, record in zip(split.images, split.labels, records, strict=True):
        assert label == record[0]
        for channel, row, col in [(0, 0, 0), (1, 2, 3), (2, 31, 30), (0, 17, 4)]:
            assert image[channel, row, col] == record[1 + 1024 * channel + 32 * row + col]


def test_cifar_splits_and_layout(small_cifar):
    folder, records = small_cifar
    data = load_dataset("cifar10", folder, download=False)
    official = np.concatenate([records[f"data_batch_{i}.bin"] for i in range(1, 6)])
    seen, held_out = {}, []
    for i in range(len(official) - 1, -1, -1):  # from the end: the last three of each class
        label = int(official[i, 0])
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= 3:
            held_out.append(i)
    held_out.reverse()
    check_records(data.val, official[held_out])
    check_records(data.train, np.delete(official, held_out, axis=0))
    check_records(data.test, records["test_batch.bin"])
    assert data.train.images.dtype == np.uint8 and data.train.labels.dtype == np.int64
    flags = data.train.images[:].flags
    assert flags.c_contiguous and flags.writeable
    assert data.classes == tuple(NAMES)
    assert data.augmentation == "crop-flip"


def test_cifar_is_found_in_each_place_in_order(small_cifar, tmp_path, monkeypatch, capsys):
    folder, _ = small_cifar
    for place in (folder, folder.parent, str(folder.parent)):
        assert len(load_dataset("cifar10", place, download=False).train.labels) == 70
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("MINICONVIT_DATA", str(folder.parent))
    absent = tmp_path / "absent"  # a typing error must not go unsaid
    assert len(load_dataset("cifar10", absent, download=False).train.labels) == 70
    said = f"{absent} holds no CIFAR-10: it is read from {folder}\n"
    assert capsys.readouterr().err == said
    monkeypatch.delenv("MINICONVIT_DATA")
    with pytest.raises(UserError, match="MINICONVIT_DATA"):
        load_dataset("cifar10", download=False)
    (tmp_path / "cache").mkdir()
    folder.rename(tmp_path / "cache" / cifar.FOLDER)
    assert len(load_dataset("cifar10", download=False).train.labels) == 70


@pytest.mark.parametrize("name", ["data_batch_3.bin", "test_batch.bin", "batches.meta.txt"])
def test_damaged_cifar_files_are_named(small_cifar, name):
    folder, _ = small_cifar
    whole = (folder / name).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged, found in ((whole[:-1], "bytes"), (bytes(flipped), "MD5"), (b"", "bytes")):
        (folder / name).write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{name}.*{found}.*delete"):
            load_dataset("cifar10", folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"{name} cannot be read.*delete"):
        load_dataset("cifar10", folder)


def test_cifar_label_out_of_range_is_refused(small_cifar):
    folder, records = small_cifar
    for name in ("data_batch_4.bin", "test_batch.bin"):
        bad = records[name].copy()
        bad[6, 0] = 10
        rewrite(folder, name, bad.tobytes())
        with pytest.raises(UserError, match=f"{name}.*labels below 10, found 10"):
            load_dataset("cifar10", folder)
        rewrite(folder, name, records[name].tobytes())


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    """A folder and the address on the loopback interface that serves it."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as http_server:
        thread = threading.Thread(target=http_server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{http_server.server_address[1]}"
        http_server.shutdown()
        thread.join()


def pack(folder, names, extra=()):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in names:
            tar.add(folder / name, f"{cifar.FOLDER}/{name}")
        for name in extra:
            tar.add(folder / "batches.meta.txt", name)
    return buffer.getvalue()


def test_cifar_download(small_cifar, server, tmp_path, monkeypatch, capfd):
    folder, records = small_cifar
    archive = pack(folder, cifar.FILES, extra=["../outside.txt", f"{cifar.FOLDER}/more.txt"])
    served, address = server
    (served / "archive.tar.gz").write_bytes(archive)
    monkeypatch.setattr(cifar, "URL", f"{address}/archive.tar.gz")
    monkeypatch.setattr(cifar, "ARCHIVE_MD5", md5(archive))
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"there is no folder .*/new/one, .* check the name"):
        load_dataset("cifar10", tmp_path / "new" / "one")
    assert not (tmp_path / "new").exists()
    (tmp_path / "new" / "one").mkdir(parents=True)
    for place, target in ((tmp_path / "new" / "one",) * 2, (None, tmp_path / "cache")):
        data = load_dataset("cifar10", place)
        check_records(data.test, records["test_batch.bin"])
        first_line = capfd.readouterr().err.splitlines()[0]
        for part in ("CIFAR-10", cifar.URL, "about 170 MB", str(target)):
            assert part in first_line
        assert [path.name for path in target.iterdir()] == [cifar.FOLDER]
        assert sorted(path.name for path in (target / cifar.FOLDER).iterdir()) == sorted(
            cifar.FILES
        )
    assert not list(tmp_path.rglob("outside.txt"))
    monkeypatch.setattr(cifar, "URL", "http://127.0.0.1:9/gone")
    assert len(load_dataset("cifar10").train.labels) == 70  # the second time from the cache


@pytest.mark.parametrize("case", ["refused", "not found", "wrong MD5", "not a tar", "incomplete"])
def test_a_failed_download_is_one_sentence_and_leaves_nothing(
    small_cifar, server, tmp_path, monkeypatch, case
):
    folder, _ = small_cifar
    served, address = server
    archive = pack(folder, list(cifar.FILES)[:-1]) if case == "incomplete" else b"no tar" * 99
    (served / "archive.tar.gz").write_bytes(archive)
    name = "other.tar.gz" if case == "not found" else "archive.tar.gz"
    # port 9 is reserved for a service that nobody runs
    monkeypatch.setattr(
        cifar, "URL", "http://127.0.0.1:9/x" if case == "refused" else f"{address}/{name}"
    )
    if case != "wrong MD5":
        monkeypatch.setattr(cifar, "ARCHIVE_MD5", md5(archive))
    with pytest.raises(UserError, match="could not be downloaded from http") as caught:
        load_dataset("cifar10")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.skipif(
    not os.path.isdir(os.path.join(os.environ.get("MINICONVIT_DATA", ""), cifar.FOLDER)),
    reason=f"MINICONVIT_DATA names no folder that holds {cifar.FOLDER}",
)
def test_the_real_cifar10():
    data = load_dataset("cifar10", download=False)
    for split, n in ((data.train, 45_000), (data.val, 5_000), (data.test, 10_000)):
        assert split.images.shape == (n, 3, 32, 32)
        assert np.bincount(split.labels).tolist() == [n // 10] * 10
    assert data.classes[0] == "airplane" and data.classes[9] == "truck" and len(data.classes) == 10
    pixels = np.concatenate([data.train.images, data.val.images])
    constants = list(zip(data.mean, data.std, strict=True))
    np.testing.assert_allclose(constants, list(moments(pixels)), atol=1e-4)


# cifar100, on files of the official layout: a coarse label, a fine one, the pixels


@pytest.fixture
def small_cifar100(tmp_path, monkeypatch):
    """A folder of 400 + 200 random records of a hundred classes, and the records."""
    folder = tmp_path / "data" / "cifar-100-binary"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(6)
    records = {}
    for name, n in {"train.bin": 400, "test.bin": 200}.items():
        records[name] = rng.integers(0, 256, (n, 3074), dtype=np.uint8)
        records[name][:, 1] = rng.permutation(np.arange(n) % 100)
        records[name][:, 0] = records[name][:, 1] // 5
        (folder / name).write_bytes(records[name].tobytes())
    (folder / "fine_label_names.txt").write_text("".join(f"fine {i}\n" for i in range(100)) + "\n")
    (folder / "coarse_label_names.txt").write_text("".join(f"coarse {i}\n" for i in range(20)))
    sizes = {"train.bin": (400 * 3074, None), "test.bin": (200 * 3074, None)}
    monkeypatch.setattr(CIFAR100, "FILES", CIFAR100.FILES | sizes)
    monkeypatch.setattr(CIFAR100, "HELD_OUT", 1)
    monkeypatch.delenv("MINICONVIT_DATA", raising=False)
    monkeypatch.setattr("pooch.os_cache", lambda name: tmp_path / "cache")
    return folder, records


def test_cifar100_has_the_official_sizes():
    """50,000 and 10,000 records of 2 + 3,072 bytes; 5,000 of the former are held out."""
    sizes = {name: size for name, (size, _) in CIFAR100.FILES.items()}
    assert sizes["train.bin"] == 50_000 * 3074 and sizes["test.bin"] == 10_000 * 3074
    assert 100 * CIFAR100.HELD_OUT == 5_000


def test_cifar100_takes_the_fine_labels(small_cifar100):
    folder, records = small_cifar100
    for place in (folder, folder.parent):
        data = load_dataset("cifar100", place, download=False)
    assert data.classes == tuple(f"fine {i}" for i in range(100))
    train = records["train.bin"]
    last = [max(np.flatnonzero(train[:, 1] == label)) for label in range(100)]
    check_records(data.val, train[sorted(last)][:, 1:])
    check_records(data.train, np.delete(train, last, axis=0)[:, 1:])
    check_records(data.test, records["test.bin"][:, 1:])
    assert data.name == "cifar100" and data.augmentation == "crop-flip"


def test_damaged_cifar100_files_are_named(small_cifar100):
    folder, records = small_cifar100

    def refused(name, content, pattern):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"CIFAR-100 file .*{name} is damaged: {pattern}"):
            load_dataset("cifar100", folder)
        (folder / name).write_bytes(whole)

    whole = records["train.bin"].tobytes()
    refused("train.bin", whole[:-1], r"expected 1,229,600 bytes, found 1,229,599")
    refused("train.bin", whole + b"0", "expected 1,229,600 bytes")
    changed = records["test.bin"].copy()
    changed[77, 1] = 100
    refused("test.bin", changed.tobytes(), "expected labels below 100, found 100")
    refused("fine_label_names.txt", b"apple\nbee\n", "expected 100 names, found 2")
    (folder / "test.bin").unlink()
    with pytest.raises(UserError, match=r"test\.bin cannot be read"):
        load_dataset("cifar100", folder)
    for path in list(folder.iterdir()):
        path.unlink()
    with pytest.raises(UserError, match="CIFAR-100 was not found: expected the folder cifar-100-b"):
        load_dataset("cifar100", folder, download=False)


def test_cifar100_download(small_cifar100, server, tmp_path, monkeypatch, capfd):
    folder, records = small_cifar100
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(folder, "cifar-100-binary")
    served, address = server
    (served / "archive.tar.gz").write_bytes(buffer.getvalue())
    monkeypatch.setattr(CIFAR100, "URL", f"{address}/archive.tar.gz")
    (tmp_path / "new").mkdir()
    with pytest.raises(UserError, match="CIFAR-100 could not be downloaded"):  # another MD5
        load_dataset("cifar100", tmp_path / "new")
    monkeypatch.setattr(CIFAR100, "ARCHIVE_MD5", md5(buffer.getvalue()))
    data = load_dataset("cifar100", tmp_path / "new")
    check_records(data.test, records["test.bin"][:, 1:])
    assert "Downloading CIFAR-100 from http" in capfd.readouterr().err


# augment, normalize, epoch_order


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(2).integers(1, 256, (400, 3, 9, 14), dtype=np.uint8)


def every_crop(image):
    """All 162 results that crop-flip may have, by their definition, with (top, left, mirrored)."""
    _, height, width = image.shape
    padded = np.zeros((3, height + 8, width + 8), dtype=np.uint8)
    padded[:, 4:-4, 4:-4] = image
    for top in range(9):
        for left in range(9):
            crop = padded[:, top : top + height, left : left + width]
            yield (top, left, 0), crop
            yield (top, left, 1), crop[:, :, ::-1]


def test_crop_flip_is_a_crop_of_the_padded_image_perhaps_mirrored(images):
    result = augment(images, np.arange(400), 7, 2, "crop-flip")
    assert result.shape == images.shape and result.dtype == np.uint8
    draws = []
    for before, after in zip(images, result, strict=True):
        matches = [draw for draw, crop in every_crop(before) if np.array_equal(crop, after)]
        assert len(matches) == 1
        draws += matches
    tops, lefts, flips = np.array(draws).T
    # 400 draws: five standard deviations are 50 for the flips and 31 for one of nine offsets
    assert abs(flips.sum() - 200) < 50
    for offsets in (tops, lefts):
        counts = np.bincount(offsets, minlength=9)
        assert len(counts) == 9 and abs(counts - 400 / 9).max() < 31
    for a, b in ((tops, lefts), (tops, flips), (lefts, flips)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.25


def test_an_image_is_augmented_alike_in_any_batch(images):
    whole = augment(images, np.arange(400), 7, 2, "crop-flip")
    chosen = np.array([311, 5, 5, 128])
    np.testing.assert_array_equal(augment(images[chosen], chosen, 7, 2, "crop-flip"), whole[chosen])


def test_seed_epoch_index_and_repeat_each_change_the_draw(images):
    same = np.broadcast_to(images[0], (400, 3, 9, 14))
    index = np.arange(400)
    base = augment(same, index, 7, 2, "crop-flip")
    for other in (
        augment(same, index, 8, 2, "crop-flip"),
        augment(same, index, 7, 3, "crop-flip"),
        augment(same, index + 400, 7, 2, "crop-flip"),
        augment(same, index, 7, 2, "crop-flip", repeat=1),
    ):
        # independent draws agree once in 162
        assert (base != other).any(axis=(1, 2, 3)).mean() > 0.95


def test_presets(images):
    assert augment(images, np.arange(400), 7, 2, "none") is images
    with pytest.raises(UserError, match="'cutout'"):
        augment(images, np.arange(400), 7, 2, "cutout")


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 3e-7), ("float64", 1e-15)])
def test_normalize(images, dtype, tolerance):
    mean, std = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
    y = normalize(images, mean, std, dtype)
    assert y.dtype == dtype and y.shape == images.shape
    for channel in range(3):
        expected = (images[:, channel].astype(np.longdouble) / 255 - mean[channel]) / std[channel]
        assert abs(y[:, channel] - expected).max() < 4 * tolerance


def test_epoch_order_is_a_permutation_of_its_own_in_each_epoch():
    orders = [epoch_order(997, seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    for order in orders:
        assert order.dtype == np.int64
        np.testing.assert_array_equal(np.sort(order), np.arange(997))
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).sum() < 12  # one agreement is expected
    np.testing.assert_array_equal(epoch_order(997, 1, 2), orders[5])
