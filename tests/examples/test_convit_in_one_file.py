"""The one-file ConViT says the same as the library: logits, loss, every gradient, every step."""

from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
from example_file import EXAMPLES, load_example
from threadpoolctl import threadpool_limits

import miniconvit as mc
from miniconvit.data import load_dataset, normalize

FILE = EXAMPLES / "convit_in_one_file.py"
LONGEST = 450

# Odd batch, oblong grid, oblong patches, more than one head and GPSA block; then a plain ViT, and
# the nine heads of convit_mini32.
SHAPES = [
    {"depth": 4, "local_up_to_layer": 2, "num_heads": 4, "embed_dim": 12},
    {"depth": 2, "local_up_to_layer": 0, "num_heads": 2, "embed_dim": 6},
    {"depth": 2, "local_up_to_layer": 1, "num_heads": 9, "embed_dim": 18},
]


one = load_example("convit_in_one_file")


@pytest.fixture(params=SHAPES, ids=["4-heads", "vit", "9-heads"])
def case(request):
    """A model with random parameters of order one, five images, and the file's plain sizes."""
    config = mc.ConViTConfig(
        img_size=(8, 9),
        patch_size=(4, 3),
        in_chans=2,
        num_classes=5,
        mlp_ratio=3.0,
        **request.param,
    )
    rng = np.random.default_rng(7)
    params = {name: rng.normal(0, 0.5, shape) for name, shape in mc.param_shapes(config).items()}
    for name, p in params.items():
        if "norm" in name and name.endswith("weight"):
            p += 1
    return SimpleNamespace(
        config=config,
        params=params,
        images=rng.standard_normal((5, 2, 8, 9)),
        labels=np.array([4, 0, 3, 3, 1]),
        dlogits=rng.standard_normal((5, 5)),
        sizes=(config.depth, config.local_up_to_layer, config.num_heads),
    )


def shapes_of(config):
    """The file's param_shapes, told what the configuration says."""
    return one.param_shapes(
        (config.embed_dim, config.in_chans, *config.patch),
        config.num_patches,
        config.hidden_dim,
        config.num_heads,
        config.depth,
        config.local_up_to_layer,
        config.num_classes,
    )


def assert_equal(ours, theirs, name):
    """To 1e-12 of the tensor's largest entry."""
    assert ours.shape == theirs.shape, name
    assert np.abs(ours - theirs).max() <= 1e-12 * np.abs(theirs).max(), name


def test_the_file_is_short():
    assert len(FILE.read_text().splitlines()) <= LONGEST


def test_it_takes_only_the_data_from_the_library():
    lines = [line for line in FILE.read_text().splitlines() if "miniconvit" in line]
    lines = [line for line in lines if line.startswith(("import", "from"))]
    assert lines == ["from miniconvit.data import load_dataset"]


def test_logits_and_every_gradient_equal_the_librarys(case):
    ours, cache = one.convit_forward(case.images, case.params, *case.sizes)
    theirs, lib_cache = mc.convit_forward(case.images, case.params, case.config)
    assert_equal(ours, theirs, "logits")
    grads = one.convit_backward(case.dlogits, cache)
    lib_grads = mc.convit_backward(case.dlogits, lib_cache)
    assert grads.keys() == lib_grads.keys()
    for name, theirs in lib_grads.items():
        if name.endswith("pos_proj.bias"):
            assert not theirs.any() and not grads[name].any()
        else:
            assert np.abs(theirs).max() > 0.1, f"{name} shows too little"
        assert_equal(grads[name], theirs, name)


def test_the_loss_and_its_gradients_equal_the_librarys(case):
    logits, cache = one.convit_forward(case.images, case.params, *case.sizes)
    loss, cache_loss = one.cross_entropy_forward(logits, case.labels)
    grads = one.convit_backward(one.cross_entropy_backward(0.7, cache_loss), cache)
    logits, cache = mc.convit_forward(case.images, case.params, case.config)
    lib_loss, cache_loss = mc.cross_entropy_forward(logits, case.labels)
    lib_grads = mc.convit_backward(mc.cross_entropy_backward(0.7, cache_loss), cache)
    assert loss == pytest.approx(float(lib_loss), rel=1e-12)
    for name, theirs in lib_grads.items():
        assert_equal(grads[name], theirs, name)


def test_a_pass_changes_nothing_and_can_be_repeated(case):
    before = {name: p.copy() for name, p in case.params.items()}
    images = case.images.copy()
    _, cache = one.convit_forward(case.images, case.params, *case.sizes)
    grads = one.convit_backward(case.dlogits, cache)
    again = one.convit_backward(case.dlogits, cache)
    np.testing.assert_array_equal(case.images, images)
    for name, p in case.params.items():
        np.testing.assert_array_equal(p, before[name])
        np.testing.assert_array_equal(grads[name], again[name])


def test_the_parameters_have_the_official_names_order_and_first_values(case):
    shapes = shapes_of(case.config)
    assert list(shapes.items()) == list(mc.param_shapes(case.config).items())
    params = one.init_params(shapes, seed=3)
    for name, theirs in mc.init_params(case.config, seed=3).items():
        np.testing.assert_array_equal(params[name], theirs)
        assert params[name].dtype == theirs.dtype


def test_three_steps_of_adamw_equal_the_librarys(case):
    rng = np.random.default_rng(1)
    params = {name: p.copy() for name, p in case.params.items()}
    m, v = ({name: np.zeros_like(p) for name, p in params.items()} for _ in range(2))
    optimizer = mc.AdamW(case.params, weight_decay=0.3)
    for t, lr in enumerate((0.1, 0.02, 0.3), start=1):
        grads = {name: rng.normal(0, 10 ** (t - 2), p.shape) for name, p in params.items()}
        one.adamw_step(params, grads, m, v, t, lr, 0.3)
        optimizer.step(case.params, grads, lr)
        for name, theirs in case.params.items():
            assert_equal(params[name], theirs, name)


@pytest.mark.parametrize("t", [0, 0.3, 1, 1.7, 4.2, 5])
def test_the_rate_equals_the_librarys(t):
    theirs = mc.warmup_cosine(t, 5, 2e-3, 1, start=2e-5, minimum=2e-5)
    assert one.warmup_cosine(t, 5, 2e-3, 1) == pytest.approx(theirs, rel=1e-12)


def floats(values):
    """The types of all floating-point arrays and scalars in nested tuples, lists and dicts."""
    if isinstance(values, dict | list | tuple):
        values = values.values() if isinstance(values, dict) else values
        return set(chain.from_iterable(map(floats, values)))
    return {values.dtype} if getattr(values, "dtype", np.dtype(int)).kind == "f" else set()


def test_nothing_is_widened_to_float64(case):
    params = {name: p.astype("float32") for name, p in case.params.items()}
    logits, cache = one.convit_forward(case.images.astype("float32"), params, *case.sizes)
    loss, cache_loss = one.cross_entropy_forward(logits, case.labels)
    dlogits = one.cross_entropy_backward(1, cache_loss)
    grads = one.convit_backward(dlogits, cache)
    m, v = ({name: np.zeros_like(p) for name, p in params.items()} for _ in range(2))
    one.adamw_step(params, grads, m, v, 1, one.warmup_cosine(3, 5, 1e-3, 1), 0.05)
    everything = (logits, cache, loss, cache_loss, dlogits, grads, params, m, v)
    assert floats(everything) == {np.dtype("float32")}
    assert type(one.warmup_cosine(3, 5, 1e-3, 1)) is float  # np.float64 would widen the step


def test_images_are_normalised_as_the_library_does():
    images = np.random.default_rng(0).integers(256, size=(4, 3, 6, 5), dtype=np.uint8)
    data = SimpleNamespace(mean=(0.2, 0.5, 0.7), std=(0.1, 0.3, 0.2))
    ours = one.normalize(images, data)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, normalize(images, data.mean, data.std), rtol=1e-5, atol=1e-6)


def test_a_short_training_prints_and_learns_by_heart(capsys, monkeypatch):
    monkeypatch.setattr(one, "BATCH", 4)
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(8, 3, 16, 16), dtype=np.uint8)
    split = SimpleNamespace(images=images, labels=np.array([0, 1, 2, 0, 1, 2, 0, 1]))
    data = SimpleNamespace(train=split, val=split, classes="abc", mean=(0.5,) * 3, std=(0.3,) * 3)
    _, right = one.train(data, epochs=25)
    printed = capsys.readouterr().out.splitlines()
    assert right == 1
    assert printed[-1] == "epoch 25: 100.0% of the validation images right"
    assert [line[:9] for line in printed if line.startswith("step")] == ["step   50"]


@pytest.mark.full
def test_the_training_reaches_95_per_cent():
    with threadpool_limits(1):  # other processes on the cores would hold up each of its products
        _, right = one.train(load_dataset("shapes"))
    assert right >= 0.95
