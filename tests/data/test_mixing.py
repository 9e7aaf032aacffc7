"""Mixup and CutMix: shares, boxes and targets by their definitions."""

from functools import cache

import numpy as np
import pytest
from scipy.stats import beta, kstest

from miniconvit.data import draw_mix, mix_images, mix_targets

STEPS = 1200


@cache
def drawn(mixup, cutmix, size=(32, 32), seed=4):
    return [draw_mix(mixup, cutmix, seed, step, size) for step in range(STEPS)]


def test_nothing_is_mixed_without_either():
    assert draw_mix(0, 0.0, 1, 2, (5, 6)) is None


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 4.0])
def test_the_share_of_mixup_has_a_beta_distribution(alpha):
    mixes = drawn(alpha, 0.0)
    assert all(mix.box is None for mix in mixes)
    shares = [mix.share for mix in mixes]
    assert kstest(shares, beta(alpha, alpha).cdf).pvalue > 1e-4  # once in 10,000 seeds
    assert all(type(share) is float for share in shares)


def test_one_of_the_two_is_chosen_by_a_coin():
    both = drawn(0.8, 1.0)
    by_box = np.array([mix.box is not None for mix in both])
    assert abs(by_box.mean() - 0.5) < 2.5 / STEPS**0.5
    for mix, mixup, cutmix in zip(both, drawn(0.8, 0), drawn(0, 1.0), strict=True):
        assert mix in (mixup, cutmix)
    assert abs(np.corrcoef(by_box[1:], by_box[:-1])[0, 1]) < 5 / STEPS**0.5


def test_a_mix_is_a_function_of_seed_and_step():
    assert drawn(0.8, 1.0) == drawn(0.8, 1.0)
    for other in (drawn(0.8, 1.0, seed=5), drawn(0.8, 1.0)[1:]):
        assert sum(a == b for a, b in zip(drawn(0.8, 1.0), other, strict=False)) < 12


@pytest.mark.parametrize("size", [(32, 32), (23, 50), (7, 8)], ids=str)
def test_the_share_of_cutmix_is_that_of_its_box(size):
    """Counted in a mixed image; and boxes whole within the image have the area that was drawn."""
    height, width = size
    uncut = []
    for mix in drawn(0, 1.0, size):
        ours, others = np.zeros((1, 3, *size), "f4"), np.ones((1, 3, *size), "f4")
        mixed = mix_images(ours, others, mix)
        assert mixed is ours and set(np.unique(mixed)) <= {0, 1}
        assert mix.share == pytest.approx(1 - mixed[0, 1].mean(dtype="f8"), abs=1e-12)
        assert (mixed[0] == mixed[0, :1]).all()
        top, bottom, left, right = mix.box
        assert mixed.sum() == 3 * (bottom - top) * (right - left)
        if top > 0 and bottom < height and left > 0 and right < width:
            uncut.append(mix)
    sides = np.array([(m.box[1] - m.box[0], m.box[3] - m.box[2]) for m in uncut])
    assert (sides % 2 == 0).all()  # as wide on each side of the centre
    assert (abs(sides[:, 0] / height - sides[:, 1] / width) < 2 / min(size)).all()
    assert len(uncut) > 120


def test_the_box_of_cutmix_lies_anywhere_and_has_the_drawn_area():
    mixes = drawn(0, 1.0, (1000, 1400))
    top, bottom, left, right = np.array([mix.box for mix in mixes]).T
    middle = [(top + bottom) / 2000, (left + right) / 2800]
    for centre, low, high, side in ((middle[0], top, bottom, 1000), (middle[1], left, right, 1400)):
        whole = (low > 0) & (high < side)
        assert whole.mean() > 0.3
        assert abs(centre.mean() - 0.5) < 5 * 0.29 / STEPS**0.5
    for k in (0, 1):
        assert middle[k].min() < 0.1 and middle[k].max() > 0.9
    assert abs(np.corrcoef(*middle)[0, 1]) < 5 / STEPS**0.5
    # Of a side s the edges leave s - s^2 / 4 on average, and s^2 is uniform where alpha is 1:
    # E (s - s^2 / 4)^2 = E s^2 - E s^3 / 2 + E s^4 / 16.
    area, expected = 1 - np.array([mix.share for mix in mixes]), 1 / 2 - (2 / 5) / 2 + (1 / 3) / 16
    assert abs(area.mean() - expected) < 5 * area.std() / STEPS**0.5 + 0.002


def test_mixup_of_images_and_targets_by_hand():
    rng = np.random.default_rng(3)
    ours, others = rng.normal(size=(2, 5, 3, 4, 6)).astype("f4")
    mix = draw_mix(0.8, 0, 1, 7, (4, 6))
    expected = mix.share * ours.astype("f8") + (1 - mix.share) * others.astype("f8")
    mixed = mix_images(ours.copy(), others, mix)
    assert mixed.dtype == np.float32
    np.testing.assert_allclose(mixed, expected, rtol=1e-5, atol=1e-6)

    labels, partners = np.array([0, 6, 3, 3, 1]), np.array([5, 0, 3, 2, 4])
    targets = mix_targets(labels, partners, mix, 7, 0.1)
    assert targets.dtype == np.float32 and targets.shape == (5, 7)
    off, on = 0.1 / 7, 0.9 + 0.1 / 7  # the values that spec and timm name
    for row, a, b in zip(targets, labels, partners, strict=True):
        for c in range(7):
            value = mix.share * (on if c == a else off) + (1 - mix.share) * (on if c == b else off)
            assert row[c] == pytest.approx(value, rel=1e-6)
    np.testing.assert_allclose(targets.sum(axis=1), 1.0, rtol=1e-6)
