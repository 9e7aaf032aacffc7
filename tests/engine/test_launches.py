"""The stand-in counts the kernels that CuPy 14.2 launches.

Every number here was counted on CuPy 14.2.0's own binaries, with the driver's calls recorded.
"""

from dataclasses import replace

import fakecuda
import fakecupy
import numpy as np
import pytest

import miniconvit as mc
from miniconvit import layers
from miniconvit.arrays import to_device
from miniconvit.engine.gpu import DeviceEngine
from miniconvit.engine.objective import Classification
from miniconvit.layers.names import part
from miniconvit.optim import clip_grad_norm

B, N, D, H, GRID = 2, 12, 8, 4, (3, 4)
CONFIG = mc.ConViTConfig((6, 8), 2, 3, 5, D, 2, H, local_up_to_layer=1)


def launches(function, *args):
    """(the function's result, the kernels that it has launched)."""
    before = fakecupy.STATE.launches
    return function(*args), fakecupy.STATE.launches - before


@pytest.fixture
def given(cupy):
    """Arrays by name, and the parameters of both kinds of blocks."""
    rng = np.random.default_rng(0)
    shapes = {"x": (B, N, D), "row": (D,), "v": (B, H, N, D // H)}
    arrays = {name: rng.standard_normal(shape, dtype="float32") for name, shape in shapes.items()}
    params = mc.init_params(CONFIG)
    for i, kind in enumerate(("gpsa", "mhsa")):
        arrays[kind] = part(params, f"blocks.{i}.")
    factors, _ = layers.position_attention_forward(
        arrays["gpsa"]["attn.pos_proj.weight"], arrays["gpsa"]["attn.pos_proj.bias"], GRID
    )
    return to_device(arrays | {"py": factors[0], "px": factors[1]}, cupy)


def attn(params):
    return part(params, "attn.")


COUNTED = {  # pair: (arguments of forward, launches of forward, of backward)
    "layernorm": (lambda g: (g["x"], g["row"], g["row"]), 12, 13),
    "gelu": (lambda g: (g["x"],), 5, 7),
    "softmax": (lambda g: (g["x"],), 5, 4),
    "mhsa": (lambda g: (g["x"], attn(g["mhsa"]), H), 12, 17),
    "gpsa": (lambda g: (g["x"], attn(g["gpsa"]), H, GRID), 60, 70),
    "position_values": (lambda g: (g["v"], g["py"], g["px"]), 15, 21),
    "block": (lambda g: (g["x"], g["gpsa"], H, GRID), 93, 107),
    "block of MHSA": (lambda g: (g["x"], g["mhsa"], H, GRID), 45, 54),
}


@pytest.mark.parametrize("pair", COUNTED)
def test_layers_launch_what_they_launch_on_cupy(given, pair):
    arguments, forward, backward = COUNTED[pair]
    name = pair.partition(" ")[0]
    (y, cache), found = launches(getattr(layers, f"{name}_forward"), *arguments(given))
    assert found == forward
    assert launches(getattr(layers, f"{name}_backward"), y, cache)[1] == backward


@pytest.mark.parametrize(("variant", "step"), [("tiny32", 2258), ("tiny", 4765)])
def test_a_step_of_the_reference_launches_what_it_launches_on_cupy(cupy, variant, step):
    config = mc.VARIANTS[f"convit_{variant}"]
    config = replace(config, embed_dim=8, img_size=4 * config.patch_size)  # launches no less
    images = np.zeros((2, 3, *config.image), "float32")
    given = to_device((images, np.zeros(2, "int64"), mc.init_params(config)), cupy)
    images, labels, params = given
    step_of = Classification(config).step
    (_, grads), found = launches(step_of, (images, labels), params, 1.0, 0, 0, 3, layers)
    assert found == step + 1  # the share of the loss, which was not there when that was counted
    assert fakecupy.STATE.products == 311
    assert launches(clip_grad_norm, grads, 1.0)[1] == 723
    assert launches(mc.AdamW(params).step, params, grads)[1] == 2410


@pytest.mark.skipif(not fakecuda.COMPILER, reason=fakecuda.REASON)
@pytest.mark.parametrize(("kind", "kernels", "products"), [(mc.AdamW, 0, 0), (mc.Muon, 28, 60)])
@pytest.mark.parametrize(("variant", "most"), [("tiny32", 200), ("tiny", 220)])
def test_a_step_by_kernels_launches_few(cupy, variant, most, kind, kernels, products):
    """Fewer than what one layer of the reference does, whatever its widths and the batch are. Muon
    adds 7 kernels and 15 products for each of four shapes of matrix."""
    config = mc.VARIANTS[f"convit_{variant}"]
    config = replace(config, embed_dim=8, img_size=4 * config.patch_size)
    images = np.zeros((2, 3, *config.image), "float32")
    given = to_device((images, np.zeros(2, "int64"), mc.init_params(config)), cupy)
    images, labels, params = given
    engine = DeviceEngine(Classification(config), cupy)
    engine.records = False
    engine.hold(params, kind(params), max_norm=1.0)
    _, first = launches(engine.step, lambda *_: (images, labels), 2, 1e-3, 0, 0)
    fakecupy.STATE.products = 0
    _, found = launches(engine.step, lambda *_: (images, labels), 2, 1e-3, 0, 1)
    assert found <= first and found <= most + kernels
    assert fakecupy.STATE.products <= 350 + products


def test_bytes_of_kernels(cupy):
    x, row = cupy.zeros((6, 10), "float32"), cupy.zeros((10,), "float32")
    for function, expected in (
        (lambda: x * row, 240 + 40 + 240),
        (lambda: x.sum(axis=0), 240 + 40),
        (lambda: x.T.reshape(-1), 240 + 240),
        (lambda: cupy.broadcast_to(row, (6, 10)) + x, 40 + 240 + 240),
        (lambda: x @ x.T, 0),
        (lambda: x.T, 0),
    ):
        before = fakecupy.STATE.bytes
        function()
        assert fakecupy.STATE.bytes - before == expected


def test_results_are_in_c_order_whatever_their_operands_are(cupy):
    x = cupy.asarray(np.ones((3, 4), "float32")).T
    for result in (x + 1.0, -x, x.astype("float64"), x.copy(), cupy.where(x > 0, x, x)):
        assert result._host.flags.c_contiguous


def test_integers_out_of_range_are_refused_as_cupy_does(cupy):
    x = cupy.asarray(np.zeros(3, "uint8"))
    for wrong in (
        lambda: x + 300,
        lambda: cupy.where(x > 0, x, 300),
        lambda: cupy.clip(x, 2, 300),
        lambda: cupy.where(x > 0, x.astype("uint64"), -1),
    ):
        with pytest.raises(OverflowError):
            wrong()
    assert cupy.clip(x, 2, 255).get().tolist() == [2, 2, 2]
