"""Every layer's gradients against central differences, as `miniconvit gradcheck` has them."""

import pytest

from miniconvit.gradcheck.cases import ALL_CASES, check_layer

WHOLE = {"convit", "block", "last_block", "isotropic", "cmt", "cmt_block", "mobile", "critic",
         "generator"}  # fmt: skip
LONG = {"conv", "depthwise", "irffn", "branch", "spectral_norms", "diffaugment"}
"""Whose every entry takes 6 to 20 seconds."""


@pytest.mark.parametrize(
    "layer",
    [
        # Twenty seconds; neighbours/test_cmt.py compares its gradients with autograd's.
        pytest.param(layer, marks=pytest.mark.full) if layer == "cmt" else layer
        for layer in ALL_CASES
    ],
)
def test_every_layer_is_right(layer):
    for report in check_layer(layer, seed=1):
        assert report.ok, report


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(layer, marks=pytest.mark.full) if layer in LONG else layer
        for layer in ALL_CASES
        if layer not in WHOLE
    ],
)
def test_every_layer_is_right_along_every_entry(layer):
    """Whole blocks and networks are left to test_gradcheck."""
    for report in check_layer(layer, seed=1, every_entry=True):
        assert report.ok, report
