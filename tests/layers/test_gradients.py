"""Every layer's gradients against central differences, as `miniconvit gradcheck` has them."""

import pytest

from miniconvit.gradcheck.cases import ALL_CASES, check_layer

WHOLE = {"convit", "block", "last_block", "isotropic", "cmt", "cmt_block", "mobile", "critic",
         "generator"}  # fmt: skip


@pytest.mark.parametrize("every_entry", [False, True])
@pytest.mark.parametrize("layer", ALL_CASES)
def test_every_layer_is_right(layer, every_entry):
    if layer in WHOLE and every_entry:
        pytest.skip("every entry of a whole block is left to the full suite")
    for report in check_layer(layer, seed=1, every_entry=every_entry):
        assert report.ok, report
