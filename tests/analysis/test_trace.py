"""One step, layer by layer: counted by NumPy, by the allocator and by hand."""

import json
import tracemalloc
from dataclasses import replace
from math import prod

import numpy as np
import pytest
from small_run import small_dataset

import miniconvit as mc
import miniconvit.cli.eval as eval_command
from miniconvit.analysis.trace import trace_step
from miniconvit.checkpoints.checkpoint import save_checkpoint
from miniconvit.layers import cross_entropy_backward, cross_entropy_forward

OBLONG = mc.ConViTConfig((8, 12), 4, 2, 3, embed_dim=8, depth=3, num_heads=4, local_up_to_layer=2)
MODELS = {
    "gpsa": OBLONG,
    "psa": replace(OBLONG, attention="psa", qkv_bias=True),
    "vit": replace(OBLONG, local_up_to_layer=0, use_pos_embed=False),
    "no class token": replace(OBLONG, local_up_to_layer=3, drop_path_rate=0.3),
}


def batch(config, B=5, dtype="float32"):
    rng = np.random.default_rng(1)
    images = rng.standard_normal((B, config.in_chans, *config.image)).astype(dtype)
    return images, rng.integers(config.num_classes, size=B), mc.init_params(config, dtype=dtype)


def total(found, key):
    return sum(layer[key] for layer in found["layers"])


class Counting(np.ndarray):
    """An array that counts the multiplications of every matrix product that it takes part in."""

    __module__ = "numpy"  # by which the layers find their array module
    count = 0

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **options):
        plain = [np.asarray(x) if isinstance(x, np.ndarray) else x for x in inputs]
        if out is not None:
            options["out"] = tuple(np.asarray(x) for x in out)
        result = getattr(ufunc, method)(*plain, **options)
        if ufunc is np.matmul:
            Counting.count += result.size * plain[0].shape[-1]
        return result.view(Counting) if isinstance(result, np.ndarray) else result


@pytest.mark.parametrize("name", MODELS)
def test_multiplications_are_those_that_numpy_is_asked_for(name):
    config = MODELS[name]
    images, labels, params = batch(config)
    counting = {name: value.view(Counting) for name, value in params.items()}
    Counting.count = 0
    logits, cache = mc.convit_forward(images.view(Counting), counting, config, train=True)
    forward, Counting.count = Counting.count, 0
    _, cache_loss = cross_entropy_forward(logits, labels)
    mc.convit_backward(cross_entropy_backward(1.0, cache_loss), cache)
    found = trace_step(images, labels, params, config)
    assert forward > 1e4
    assert (total(found, "forward"), total(found, "backward")) == (forward, Counting.count)


def test_the_published_size():
    """Of one image in millions, counted by hand from the paper's widths; timm reports 1.26 G."""
    config = mc.VARIANTS["convit_tiny"]
    found = trace_step(*batch(config, 1), config)
    millions = 1247.8 + 10 * 1.054  # the dense form, and P v by its two factors
    assert total(found, "forward") / 1e6 == pytest.approx(millions, abs=0.055)  # as rounded above
    assert total(found, "parameters") == 5_710_512
    rows = {layer["layer"]: layer for layer in found["layers"]}
    attention = 14.451 + 7.225 + 7.376 + 7.376 + 7.225 + 1.054
    assert rows["blocks.0.attn"]["forward"] / 1e6 == pytest.approx(attention, abs=2e-3)
    assert rows["blocks.11.mlp"]["forward"] / 1e6 == pytest.approx(58.098, abs=1e-3)
    shapes = [rows[name]["output"] for name in ("patch_embed", "blocks.9.mlp", "blocks.10.attn")]
    assert shapes == [[1, 196, 192], [1, 196, 192], [1, 197, 192]]


@pytest.mark.parametrize("name", MODELS)
def test_the_cache_has_the_bytes_that_the_allocator_gave(name):
    """Every array that lives after the forward pass is in the cache, but for the logits."""
    config = MODELS[name]
    images, labels, params = batch(config, 64)
    of_numpy = [tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)]
    tracemalloc.start()
    try:
        logits, cache = mc.convit_forward(images, params, config, train=True)
        _, cache_loss = cross_entropy_forward(logits, labels)
        traces = tracemalloc.take_snapshot().filter_traces(of_numpy).traces
    finally:
        tracemalloc.stop()
    assert len(cache[1]) == len(cache_loss) + 1 == 3
    kept = sum(trace.size for trace in traces) - logits.nbytes
    found = trace_step(images, labels, params, config)
    assert kept - 256 <= total(found, "cache") <= kept  # shapes and scalars are no arrays
    assert kept > 1e5


def test_gradients_and_parameters_are_those_of_the_backward_pass():
    config = MODELS["gpsa"]
    images, labels, params = batch(config, dtype="float64")
    found = trace_step(images, labels, params, config)
    logits, cache = mc.convit_forward(images, params, config)
    loss, cache_loss = cross_entropy_forward(logits, labels)
    grads = mc.convit_backward(cross_entropy_backward(1.0, cache_loss), cache)
    assert found["loss"] == float(loss)
    shapes = {name: value.shape for name, value in params.items()}
    names = set()
    for layer in found["layers"]:
        if layer["gradient"] is None:
            assert layer["layer"] == "loss"
            continue
        own = [name for name in grads if name.startswith(layer["layer"])]
        names |= set(own)
        flat = np.concatenate([grads[name].ravel() for name in own])
        assert layer["gradient"] == pytest.approx(np.linalg.norm(flat), rel=1e-12)
        assert layer["parameters"] == sum(prod(shapes[name]) for name in own)
    assert names == set(params)
    everything = np.concatenate([grad.ravel() for grad in grads.values()])
    assert found["gradient"] == pytest.approx(np.linalg.norm(everything), rel=1e-12)


def test_the_command(program, monkeypatch, tmp_path):
    status, out, err = program("trace", "--batch-size", "2")
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    assert "118,630" in out and "8,986,176 an image" in out
    found = json.loads(program("trace", "--batch-size", "2", "--json")[1])
    assert found["images"] == 2
    assert found["total"]["parameters"] == 118_630
    assert len(found["layers"]) == 2 + 4 * 4 + 1 + 3
    oblong = program("trace", "--img-size", "16x24", "--patch-size", "8", "--json")
    assert json.loads(oblong[1])["layers"][0]["output"] == [8, 6, 48]


def test_the_command_on_a_checkpoint(program, monkeypatch, tmp_path):
    """Its own validation images; random ones where the file names no data."""
    monkeypatch.setattr(eval_command, "load_dataset", small_dataset)
    data, file = small_dataset(), tmp_path / "a.safetensors"
    config = mc.ConViTConfig(8, 4, 3, 3, embed_dim=8, depth=2, local_up_to_layer=1)
    params = mc.init_params(config)
    about = {"mean": data.mean, "std": data.std, "classes": data.classes}
    save_checkpoint(file, params, config, **about, data="shapes")
    found = json.loads(program("trace", file, "--batch-size", "6", "--json")[1])
    assert (found["images"], found["data"]) == (6, "shapes, val")
    mean, std = (np.array(x, "float32")[:, None, None] for x in (data.mean, data.std))
    pixels = (data.val.images[:6] / np.float32(255) - mean) / std
    logits, _ = mc.convit_forward(pixels, params, config)
    loss, _ = cross_entropy_forward(logits, data.val.labels[:6])
    assert found["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert json.loads(program("trace", file, "--batch-size", "99", "--json")[1])["images"] == 30
    save_checkpoint(file, params, config, **about)
    assert json.loads(program("trace", file, "--json")[1])["data"] == "random numbers"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data", "shapes"], "without one the images are random"),
        (["--img-size", "30"], "cannot be cut into patches"),
        (["--batch-size", "0"], "--batch-size must be an integer of at least 1"),
        (["--model", "convit_micro23"], "did you mean convit_micro32?"),
        (["no/such/run"], "no/such/run"),
    ],
)
def test_what_cannot_be_traced_is_a_sentence(program, options, words):
    status, out, err = program("trace", *options)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert words in err


def test_what_is_not_finite_is_a_sentence(program, tmp_path):
    config = mc.ConViTConfig(8, 4, 3, 3, embed_dim=8, depth=2, local_up_to_layer=1)
    params = {name: value * 1e30 for name, value in mc.init_params(config).items()}
    save_checkpoint(tmp_path / "huge.safetensors", params, config)
    status, out, err = program("trace", tmp_path / "huge.safetensors")
    assert (status, out) == (2, "")
    assert "gives no finite gradient" in err
