"""The mobile transformer: whole networks against torch's modules, and what its parts promise."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from golden_cases import GOLDEN, assert_equal, read_parts
from small_run import stop_after
from with_numba import needs_numba

from miniconvit import layers
from miniconvit.checkpoints.checkpoint import load_checkpoint
from miniconvit.engine import classification, make_engine
from miniconvit.engine.cpu import cpu_blocks
from miniconvit.engine.pieces import cut
from miniconvit.errors import UserError
from miniconvit.layers import cross_entropy_backward, cross_entropy_forward
from miniconvit.neighbours import (
    branch_forward,
    fusion_forward,
    mobile,
    mobile_backward,
    mobile_forward,
)
from miniconvit.neighbours.mobile import (
    MOBILES,
    READOUTS,
    MobileConfig,
    branch_shapes,
    init_mobile,
    mobile_shapes,
    multiplications,
)
from miniconvit.neighbours.models import config_from_dict, config_to_dict, count_parameters
from miniconvit.optim import AdamW, is_running

SMALL = MobileConfig(
    "conv", "fusion", (2, 4), 8, num_classes=3, embed_dim=8, depth=2, num_heads=2, hidden_dim=10
)
WHOLE = ("conv_fusion", "conv_mean", "patches_class_token")
BOTH = [
    pytest.param(layers, id="layers"),
    pytest.param(cpu_blocks(), id="kernels", marks=needs_numba),
]


def load(name):
    parts = read_parts(GOLDEN, f"mobile_{name}", "in", "grad", "after")
    return MobileConfig.from_dict(json.loads(parts["config"].item())), parts


@pytest.mark.parametrize("blocks", BOTH)
@pytest.mark.parametrize("name", WHOLE)
def test_whole_networks_equal_torch_in_training(name, blocks):
    config, parts = load(name)
    logits, cache = mobile_forward(parts["images"], parts["in"], config, True, blocks)
    assert_equal(logits, parts["logits"])
    loss, cache_loss = cross_entropy_forward(logits, parts["targets"])
    assert_equal(loss, parts["loss"])
    grads = mobile_backward(cross_entropy_backward(1.0, cache_loss), cache)
    assert grads.keys() == mobile_shapes(config).keys() == parts["in"].keys()
    assert grads.keys() - parts["grad"].keys() == parts["after"].keys()
    for key, expected in parts["grad"].items():
        assert_equal(grads[key], expected)
    AdamW(parts["in"]).step(parts["in"], grads, lr=1e-3)
    for key, expected in parts["after"].items():
        assert_equal(parts["in"][key], expected)


@pytest.mark.parametrize("name", WHOLE)
def test_whole_networks_equal_torch_in_evaluation(name):
    config, parts = load(name)
    logits, _ = mobile_forward(parts["images"], parts["in"], config)
    assert_equal(logits, parts["evaluated"])
    assert_equal(cross_entropy_forward(logits, parts["targets"])[0], parts["evaluated_loss"])


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("stem", ["patches", "conv"])
def test_float32_stays_float32_and_kernels_give_the_same(stem, readout):
    config = MobileConfig(stem, readout)
    params = init_mobile(config, 3)
    images = np.random.default_rng(0).standard_normal((4, 3, 32, 32), dtype="float32")
    found = []
    for blocks in (layers, cpu_blocks()):
        logits, cache = mobile_forward(images, params, config, True, blocks)
        found.append({"logits": logits} | mobile_backward(np.ones_like(logits), cache))
    for name, ours in found[1].items():
        theirs = found[0][name]
        assert ours.dtype == theirs.dtype == np.float32, name
        assert np.linalg.norm(ours - theirs) < 1e-4 * np.linalg.norm(theirs) + 1e-4, name
    evaluated, _ = mobile_forward(images, params, config)
    assert evaluated.dtype == np.float32


@pytest.mark.parametrize("stride", [2, 4, 16])
def test_every_token_sees_all_of_its_cell_and_no_cell_after_it(stride):
    """Whatever the stride: a larger token must not be blind for most of its cell."""
    config = MobileConfig(strides=(stride,))
    rng = np.random.default_rng(stride)
    shapes = branch_shapes(config, stride)
    params = {name: np.abs(rng.standard_normal(shape)) for name, shape in shapes.items()}
    params |= {name: 0 * params[name] for name in params if name.startswith("se.")}  # e is 1/2
    x = rng.standard_normal((1, 16, 16, 24))
    y, _ = branch_forward(x, params, stride, False)
    cells = 16 // stride
    seen = np.zeros((cells, cells, 16, 16), bool)  # token, place
    for place in np.ndindex(16, 16):
        other = x.copy()
        other[0][place] += 1.0
        changed = np.abs(branch_forward(other, params, stride, False)[0] - y).max(axis=(0, 2))
        seen[:, :, *place] = changed.reshape(cells, cells) > 0
    for row, col in np.ndindex(cells, cells):
        top, left = max(row * stride - 1, 0), max(col * stride - 1, 0)
        expected = np.zeros((16, 16), bool)
        expected[top : (row + 1) * stride, left : (col + 1) * stride] = True
        assert np.array_equal(seen[row, col], expected)


def test_the_fusion_begins_as_the_mean_of_tokens():
    config = MobileConfig()
    params = init_mobile(config)
    x = np.random.default_rng(0).standard_normal((2, config.num_tokens, config.embed_dim))
    own = {name.removeprefix("fusion."): params[name] for name in params if "fusion." in name}
    own |= {name: 0.0 * value for name, value in own.items() if name.startswith("fc2.")}
    np.testing.assert_allclose(fusion_forward(x, own)[0], x.mean(axis=1), atol=1e-6)


def test_the_grids_are_those_of_the_experiment():
    assert MobileConfig("patches").grids == [(8, 8)]
    assert MobileConfig(strides=(2,)).grids == [(8, 8)]
    assert MobileConfig().grids == [(8, 8), (4, 4), (1, 1)] and MobileConfig().num_tokens == 81
    assert MobileConfig(img_size=(64, 32)).grids == [(16, 8), (8, 4), (2, 1)]


class Counted(np.ndarray):
    """Counts the multiplications of all matrix products, and of `*` too while `filters` says so."""

    __module__ = "numpy"
    count, filters = 0, False

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        plain = [np.asarray(x) for x in inputs]
        if "out" in options:
            options["out"] = tuple(np.asarray(x) for x in options["out"])
        y = getattr(ufunc, method)(*plain, **options)
        if ufunc is np.matmul:
            Counted.count += y.size * plain[0].shape[-1]
        if ufunc is np.multiply and Counted.filters:
            Counted.count += y.size
        return y.view(Counted) if isinstance(y, np.ndarray) else y


@pytest.mark.parametrize("strides", [(2,), (2, 4, 16), (4, 2)])
@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("stem", ["patches", "conv"])
def test_multiplications_are_those_that_a_forward_pass_makes(monkeypatch, stem, readout, strides):
    config = MobileConfig(stem, readout, strides, (64, 32), in_chans=2, num_classes=7)
    filtered = mobile.depthwise_forward

    def counted(*args):
        Counted.filters = True
        found = filtered(*args)
        Counted.filters = False
        return found

    monkeypatch.setattr(mobile, "depthwise_forward", counted)
    monkeypatch.setattr(Counted, "count", 0)
    params = {name: value.view(Counted) for name, value in init_mobile(config).items()}
    images = np.zeros((3, 2, 64, 32), "float32").view(Counted)
    mobile_forward(images, params, config)
    assert Counted.count == 3 * multiplications(config)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"stem": "cnn"}, "no stem 'cnn'"),
        ({"readout": "max"}, "with a read-out 'max'"),
        ({"depth": 0}, "depth must be an integer of at least 1"),
        ({"num_heads": 5}, "as many equal parts as heads"),
        ({"strides": ()}, "strides must be"),
        ({"strides": (1,)}, "at least 2"),
        ({"stem_dims": (12,)}, "stem_dims must be two"),
        ({"img_size": 0}, "img_size must be"),
        ({"img_size": [32]}, "img_size must be"),
        ({"img_size": 40}, "40x40 pixels cannot be cut into cells of 4, 8, 32 pixels"),
        ({"stem": "patches", "img_size": 30}, "cells of 4 pixels"),
        ({"width": 3}, "unknown model setting 'width'"),
    ],
)
def test_what_is_no_network_is_refused(values, words):
    with pytest.raises(UserError, match=words):
        MobileConfig.from_dict(values)


def test_a_configuration_comes_back_from_json_and_tells_its_kind():
    stored = json.loads(json.dumps(config_to_dict(SMALL)))
    assert stored["kind"] == "mobile" and config_from_dict(stored) == SMALL
    assert MobileConfig(**asdict(SMALL)) == SMALL


def test_the_whole_has_as_many_parameters_as_the_smallest_convit():
    assert count_parameters(MOBILES["mobile_micro32"]) == 112_208  # convit_micro32: 118,630


def test_pieces_have_32_images_or_more_and_any_number_of_workers_gives_the_same_bits():
    config = MOBILES["mobile_micro32"]
    objective, params = classification(config, 0.1), init_mobile(config)
    for n in (32, 64, 70, 128, 200):
        assert min(stop - start for start, stop in cut(n, objective.rows)) >= 32
    rng = np.random.default_rng(0)
    batch = rng.standard_normal((70, 3, 32, 32), dtype="float32"), rng.integers(10, size=70)
    found = []
    for count in (1, 2):
        with make_engine(objective, np, count) as engine:
            *numbers, grads = engine.loss_and_grads(
                lambda start, stop: tuple(x[start:stop] for x in batch), 70, params
            )
            grads = {name: grad.copy() for name, grad in grads.items()}
            logits = engine.logits(lambda start, stop: batch[0][start:stop], 70, params)
            found.append((numbers, grads, logits.copy()))
    (numbers, grads, logits), (others, other_grads, other_logits) = found
    assert numbers == others and np.array_equal(logits, other_logits)
    assert all(np.array_equal(grads[name], other_grads[name]) for name in params)
    assert all(grad.dtype == np.float32 for grad in grads.values())


# Runs.


@pytest.fixture
def small(monkeypatch, small_data):
    """`mobile_micro32` is SMALL."""
    monkeypatch.setitem(MOBILES, "mobile_micro32", SMALL)


RUN = ["--model", "mobile_micro32", "--epochs", 4, "--batch-size", 64, "--device", "cpu"]
MIXED = ["--mixup", 0.5, "--label-smoothing", 0.1, "--ema", 0.5, "--clip-grad", 1]


def test_a_stopped_run_goes_on_to_the_bit_with_its_batch_statistics(small, program, monkeypatch):
    def run(out, *more):
        return program("train", *RUN, *MIXED, "--out", out, *more)[0]

    assert run("whole", "--workers", 1) == 0 and run("two", "--workers", 2) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert run("cut", "--workers", 1) == 130
    assert run("cut", "--workers", 2, "--resume") == 0
    whole, two, cut = (load_checkpoint(f"{name}/last.safetensors") for name in
                       ("whole", "two", "cut"))  # fmt: skip
    fresh = init_mobile(SMALL)
    for name, value in whole.params.items():
        assert all(np.array_equal(other.params[name], value) for other in (two, cut))
        assert all(np.array_equal(other.ema[name], whole.ema[name]) for other in (two, cut))
        assert not (is_running(name) and np.array_equal(value, fresh[name]))


def test_commands_answer_by_it_or_refuse_it_by_one_sentence(small, program):
    from PIL import Image

    assert program("train", *RUN, "--out", "run")[0] == 0
    Image.new("RGB", (8, 8)).save("a.png")
    code, out, _ = program("eval", "run", "--device", "cpu", "--workers", 1)
    assert code == 0 and "top1" in out
    code, out, _ = program("predict", "run", "a.png", "--device", "cpu")
    assert code == 0 and "reddish" in out
    bench = "bench", "--model", "mobile_micro32", "--steps", 1, "--device", "cpu", "--workers", 1
    assert program(*bench)[0] == 0 and program(*bench, "--inference")[0] == 0
    for argv, told in {
        ("inspect", "run"): "kind mobile: this needs a ConViT or a ViT",
        ("train", *RUN, "--patch-size", 2): "--patch-size is for these alone: leave it out",
        ("train", *RUN, "--img-size", 12): "multiples of them",
        ("train", *RUN, "--batch-size", 1): "give --batch-size 2 or more",
        ("experiment", "mobile", "--model", "convit_mini32"): "leave out --model",
    }.items():
        code, _, err = program(*argv)
        assert code == 2 and told in err and err.count("\n") == 1, err
