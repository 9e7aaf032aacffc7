"""The presets: what is drawn how often, by what alone, and random erasing by its definition."""

import numpy as np
import pytest
from scipy.stats import kstest, norm

from miniconvit.data import PRESETS, augment, epoch_order, erase
from miniconvit.data import randaugment as ra

N = 4000
INDICES = np.arange(N)


@pytest.fixture
def recorded(monkeypatch):
    """The name and the arguments of every operation that is called; images stay as they are."""
    calls = []

    def recorder(name):
        def operation(images, *arguments):
            ids = images[:, 0, 0, 0].astype(int) * 256 + images[:, 1, 0, 0]  # written there below
            given = arguments[0] if arguments else np.zeros(len(images))
            calls.extend(zip([name] * len(ids), ids.tolist(), given.tolist(), strict=True))
            return images

        return operation

    operations = {name: (recorder(name), argument) for name, (_, argument) in ra.OPERATIONS.items()}
    monkeypatch.setattr(ra, "OPERATIONS", operations)
    return calls


def drawn(calls, count, magnitude):
    images = np.zeros((N, 3, 1, 1), np.uint8)
    images[:, 0, 0, 0], images[:, 1, 0, 0] = divmod(INDICES, 256)
    ra.randaugment(images, INDICES, 5, 3, 0, count, magnitude)
    return calls


def test_operations_are_drawn_alike_and_half_of_the_time(recorded):
    calls = drawn(recorded, 2, 9.0)
    names, ids, _ = zip(*calls, strict=True)
    shares = {name: names.count(name) / (2 * N) for name in ra.OPERATIONS}
    # five standard deviations of a share of 1/30 in 8,000 draws are 0.010
    assert len(shares) == 15 and all(abs(share - 1 / 30) < 0.010 for share in shares.values())
    applied = np.bincount(np.bincount(ids, minlength=N), minlength=3) / N
    # two coins for every image, independent of each other: five standard deviations are 0.04
    np.testing.assert_allclose(applied, [1 / 4, 1 / 2, 1 / 4], atol=0.04)


@pytest.mark.parametrize("magnitude", [5.0, 9.0])
def test_the_level_is_normal_and_its_sign_a_coin(recorded, magnitude):
    calls = drawn(recorded, 2, magnitude)
    signed = {"ShearX": 0.03, "ShearY": 0.03, "Rotate": 3.0, "TranslateXRel": 0.045,
              "TranslateYRel": 0.045}  # fmt: skip
    levels = np.array([value / signed[name] for name, _, value in calls if name in signed])
    assert len(levels) > 1100 and abs(levels).max() <= 10 + 1e-6
    assert abs((levels > 0).mean() - 0.5) < 2.5 / len(levels) ** 0.5
    below = abs(levels)[abs(levels) < 10 - 1e-6]
    cut = norm(magnitude, 0.5).cdf(10)
    statistic = kstest(below, lambda x: norm(magnitude, 0.5).cdf(x) / cut).statistic
    assert statistic < 0.004 + 2.2 / len(below) ** 0.5  # the bound is passed once in 30,000 times
    at_most = (abs(levels) > 10 - 1e-6).mean()
    assert abs(at_most - (1 - cut)) < 5 * (0.023 / len(levels)) ** 0.5


def test_one_operation_follows_the_other(monkeypatch):
    """Each adds 3 to what it is given, so that the sum tells how many there were."""
    more = {name: (lambda x: x + np.uint8(3), lambda level, sign: ()) for name in ra.OPERATIONS}
    monkeypatch.setattr(ra, "OPERATIONS", more)
    images = np.zeros((N, 3, 2, 2), np.uint8)
    ra.randaugment(images, INDICES, 1, 0, 0, 2, 9.0)
    assert (images == images[:, :1, :1, :1]).all()
    shares = np.bincount(images[:, 0, 0, 0], minlength=7)[[0, 3, 6]] / N
    np.testing.assert_allclose(shares, [1 / 4, 1 / 2, 1 / 4], atol=0.04)


def pixels(n, seed=2):
    return np.random.default_rng(seed).integers(0, 256, (n, 3, 9, 14), dtype=np.uint8)


def changed(images, indices, seed, epoch, preset, repeat=0):
    """Everything that a preset does, erasing too."""
    result = augment(images, indices, seed, epoch, preset, repeat)
    assert result.shape == images.shape and result.dtype == np.uint8
    return erase(result.astype("float32"), indices, seed, epoch, preset, repeat)


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "none"])
def test_an_image_is_changed_alike_in_any_batch(preset):
    images = pixels(300)
    before = images.copy()
    copies = np.arange(300) % 3
    whole = changed(images, np.arange(300), 7, 2, preset, copies)
    assert (images == before).all()
    for part in (np.array([211, 5, 5, 128]), np.array([17]), np.arange(299, -1, -1)):
        found = changed(images[part], part, 7, 2, preset, copies[part])
        np.testing.assert_array_equal(found, whole[part])
    alone = changed(images[44:45], np.array([44]), 7, 2, preset, 2)  # the copy as a number
    np.testing.assert_array_equal(alone, whole[44:45])


@pytest.mark.parametrize("stage", ["crop", "randaugment", "erase"])
def test_seed_epoch_index_and_copy_each_change_each_stage(stage):
    same = np.broadcast_to(pixels(1), (400, 3, 9, 14))
    index = np.arange(400)

    def draw(seed, epoch, index, repeat):
        if stage == "crop":
            return augment(same, index, seed, epoch, "crop-flip", repeat)
        images = same.copy()
        if stage == "erase":
            return erase(images.astype("float32"), index, seed, epoch, "paper", repeat)
        ra.randaugment(images, index, seed, epoch, repeat, 2, 9.0)
        return images

    base = draw(7, 2, index, 0)
    # two draws agree where neither does anything: once in 162, 1/16 and 9/16
    least = {"crop": 0.95, "randaugment": 0.8, "erase": 0.3}[stage]
    others = [(8, 2, index, 0), (7, 3, index, 0), (7, 2, index + 400, 0), (7, 2, index, 1)]
    for other in others:
        assert (base != draw(*other)).any(axis=(1, 2, 3)).mean() > least
    np.testing.assert_array_equal(base, draw(7, 2, index, np.zeros(400, np.int64)))


def test_a_preset_is_its_stages_one_after_the_other():
    images, index = pixels(200), np.arange(200)
    for preset, count, magnitude in (("light", 1, 5.0), ("paper", 2, 9.0)):
        expected = augment(images, index, 7, 2, "crop-flip", 1)
        ra.randaugment(expected, index, 7, 2, 1, count, magnitude)
        np.testing.assert_array_equal(augment(images, index, 7, 2, preset, 1), expected)
    floats = images.astype("float32")
    assert erase(floats, index, 7, 2, "light") is floats and (floats == images).all()


@pytest.mark.parametrize(("height", "width"), [(40, 40), (24, 60)])
def test_erasing_by_its_definition(height, width):
    images = np.full((N, 3, height, width), np.nan, "float32")
    result = erase(images, INDICES, 3, 1, "paper")
    assert result is images and result.dtype == np.float32
    box = np.isfinite(result)
    assert (box == box[:, :1]).all()
    box = box[:, 0]
    erased = box.any(axis=(1, 2))
    assert abs(erased.mean() - 0.25) < 5 * (0.25 * 0.75 / N) ** 0.5
    rows, cols = box.any(axis=2)[erased], box.any(axis=1)[erased]
    assert (box[erased] == (rows[:, :, None] & cols[:, None, :])).all()  # a product of intervals:
    for line in (rows, cols):
        assert (np.diff(line.astype(int), prepend=0, append=0, axis=1) == 1).sum() == len(line)
    tall, wide = rows.sum(axis=1), cols.sum(axis=1)
    inside = (tall < height) & (wide < width)  # the others are cut off, or may be
    assert inside.mean() > 0.75
    area, aspect = (tall * wide / (height * width))[inside], (tall / wide)[inside]
    assert area.min() + 0.01 > 0.02 and area.max() < 1 / 3 + 0.02
    assert aspect.min() > 0.3 - 0.1 and aspect.max() < 1 / 0.3 + 1.1
    if height == width:
        assert abs(area.mean() - (0.02 + 1 / 3) / 2) < 0.02
        assert abs(np.log(aspect).mean()) < 5 * 0.7 / len(aspect) ** 0.5
        # uniform on [-l, l]: l / sqrt(3)
        assert abs(np.log(aspect).std() - np.log(1 / 0.3) / 3**0.5) < 0.06
    for line, side, length in ((rows, height, tall), (cols, width, wide)):
        place = line.argmax(axis=1)[length < side]
        share = place / (side - length[length < side])
        assert place.min() == 0 and share.max() == 1
        assert abs(share.mean() - 0.5) < 5 * 0.33 / len(share) ** 0.5
    noise = result[erased][np.isfinite(result[erased])]
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01 and len(set(noise[:99])) > 90
    reds = result[erased][:, 0][box[erased]]
    greens = result[erased][:, 1][box[erased]]
    assert abs(np.corrcoef(reds, greens)[0, 1]) < 0.01


def test_copies_follow_each_other():
    order = epoch_order(100, 4, 2)
    for repeats in (1, 2, 3, 7, 200):
        draws = epoch_order(100, 4, 2, repeats)
        assert draws.dtype == np.int64
        expected = [(order[k // repeats], k % repeats) for k in range(100)]
        assert list(zip(*divmod(draws, repeats), strict=True)) == expected
