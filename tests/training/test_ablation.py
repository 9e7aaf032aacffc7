"""The switches of the paper's ablations: tables 3, 5 and 6, figures 8 and 9."""

from dataclasses import replace

import numpy as np
import pytest
from small_run import small_dataset

import miniconvit.training.loop as training
from miniconvit import (
    VARIANTS,
    ConViTConfig,
    UserError,
    check_gradients,
    convit_backward,
    convit_forward,
    cross_entropy_backward,
    cross_entropy_forward,
    init_params,
    layers,
    param_shapes,
)
from miniconvit.analysis.masks import without_branch, without_pos_embed
from miniconvit.checkpoints.checkpoint import load_checkpoint
from miniconvit.engine.objective import Classification
from miniconvit.engine.threads import Engine
from miniconvit.gradcheck.mutants import planted
from miniconvit.layers.names import part
from miniconvit.training.freeze import frozen_names, initial_params
from miniconvit.training.loop import train
from miniconvit.training.settings import make_settings

CONFIG = ConViTConfig(
    img_size=(6, 10), patch_size=2, in_chans=2, num_classes=5, embed_dim=12, depth=4, num_heads=4,
    mlp_ratio=1.5, local_up_to_layer=3,
)  # fmt: skip
PSA = replace(CONFIG, attention="psa")


def random_params(config, seed=0, dtype="float64"):
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 1)).astype(
            dtype
        )
        for name, shape in param_shapes(config).items()
    }


def random_images(config, n=3, seed=1, dtype="float64"):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, config.in_chans, *config.image)).astype(dtype)


# Plain PSA.


def test_psa_is_attention_with_three_more_features():
    """|k - q|^2 = |k|^2 - 2 q k + |q|^2: the position score is an inner product of something of the
    query and something of the key, and of something of the query alone, which the softmax ignores.
    """
    params = part(random_params(PSA), "blocks.0.attn.")
    x = np.random.default_rng(2).standard_normal((3, 15, 12))
    rows, cols, H, d = *PSA.grid, 4, 3
    w0, w1, w2 = params["pos_proj.weight"].T[:, :, None]  # (H, 1) each
    row, col = np.divmod(np.arange(rows * cols), cols)
    of_query = np.stack([w0 - 2 * w2 * col, w1 - 2 * w2 * row, w2 + 0 * col], axis=-1)  # (H, N, 3)
    of_key = np.stack([col, row, col**2 + row**2], axis=-1)  # (N, 3)

    def heads(weight):
        return (x @ weight.T).reshape(3, -1, H, d).transpose(0, 2, 1, 3)

    q, k = heads(params["qk.weight"][:12]), heads(params["qk.weight"][12:])
    scale = ((d + 3) / d) ** 0.5  # attention_forward divides by the root of the longer width
    q = np.concatenate(
        [q * scale, np.broadcast_to(of_query * (d + 3) ** 0.5, (3, H, 15, 3))], axis=-1
    )
    k = np.concatenate([k, np.broadcast_to(of_key, (3, H, 15, 3))], axis=-1)
    y, _ = layers.attention_forward(q, k, heads(params["v.weight"]))
    y = y.transpose(0, 2, 1, 3).reshape(3, 15, 12)
    expected = y @ params["proj.weight"].T + params["proj.bias"]
    found, _ = layers.psa_forward(x, params, H, PSA.grid)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_psa_without_position_is_mhsa():
    params = part(random_params(PSA), "blocks.0.attn.")
    params["pos_proj.weight"][...] = 0.0
    x = np.random.default_rng(2).standard_normal((3, 15, 12))
    qkv = {"qkv.weight": np.concatenate([params["qk.weight"], params["v.weight"]])}
    expected, cache = layers.mhsa_forward(x, params | qkv, 4)
    found, cache_psa = layers.psa_forward(x, params, 4, PSA.grid)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)
    dy = np.random.default_rng(3).standard_normal(x.shape)
    dx, grads = layers.psa_backward(dy, cache_psa)
    dx_mhsa, grads_mhsa = layers.mhsa_backward(dy, cache)
    np.testing.assert_allclose(dx, dx_mhsa, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(grads["v.weight"], grads_mhsa["qkv.weight"][24:], rtol=1e-11)


def test_gradients_of_a_whole_psa_model():
    images = random_images(PSA)
    zero = [name for name in param_shapes(PSA) if name.endswith("pos_proj.bias")]
    report = check_gradients(
        lambda **params: convit_forward(images.astype(params["head.bias"].dtype), params, PSA),
        convit_backward,
        random_params(PSA),
        expect_zero=zero,
    )
    assert report.ok, str(report)


def test_psa_has_no_gates_and_is_otherwise_the_same_model():
    gated, plain = param_shapes(CONFIG), param_shapes(PSA)
    assert plain == {name: s for name, s in gated.items() if not name.endswith("gating_param")}
    assert len(gated) - len(plain) == 3
    assert ConViTConfig.from_dict(PSA.to_dict()) == PSA
    with pytest.raises(UserError, match="gpsa or psa"):
        replace(CONFIG, attention="conv")


@pytest.mark.parametrize("local_up_to_layer", [3, 4])
def test_the_engine_trains_psa(local_up_to_layer):
    """The fast path in float32, whose last block is a function of its own, against the reference in
    float64."""
    config = replace(PSA, local_up_to_layer=local_up_to_layer)
    params, images = random_params(config, dtype="float32"), random_images(config, 6)
    labels = np.array([0, 1, 2, 3, 4, 0])
    with Engine(Classification(config), 2) as engine:
        loss, _, grads = engine.loss_and_grads(
            lambda start, stop: (images[start:stop].astype("float32"), labels[start:stop]),
            6,
            params,
        )
    wide = {name: value.astype("float64") for name, value in params.items()}
    logits, cache = convit_forward(images, wide, config)
    expected, cache_loss = cross_entropy_forward(logits, labels)
    assert loss == pytest.approx(float(expected), rel=1e-5)
    for name, grad in convit_backward(cross_entropy_backward(1.0, cache_loss), cache).items():
        error = np.linalg.norm(grads[name] - grad)
        assert error <= 1e-4 * np.linalg.norm(grad) + 1e-6, name


# No convolutional initialisation.


def test_random_init_differs_in_values_and_position_alone():
    config = replace(VARIANTS["convit_mini32"], embed_dim=144)
    local, drawn = init_params(config, 5), init_params(replace(config, use_local_init=False), 5)
    assert list(local) == list(drawn)
    for i in range(config.local_up_to_layer):
        block = f"blocks.{i}.attn."
        v, position = drawn[block + "v.weight"], drawn[block + "pos_proj.weight"]
        assert v.std() == pytest.approx(0.02, rel=0.03) and abs(v.mean()) < 1e-3
        assert 0.01 < position.std() < 0.03
        assert (local[block + "v.weight"] == np.eye(144)).all()
        assert (drawn[block + "gating_param"] == 1).all()
    assert drawn["blocks.0.attn.qk.weight"].std() == pytest.approx(0.02, rel=0.03)


def test_random_init_needs_no_square_number_of_heads():
    config = replace(CONFIG, num_heads=3)
    with pytest.raises(UserError, match="square number of heads"):
        init_params(config)
    init_params(replace(config, use_local_init=False))


# What is not trained.


def test_frozen_names():
    gates = {f"blocks.{i}.attn.gating_param" for i in range(3)}
    assert frozen_names(CONFIG, None) == set()
    assert frozen_names(CONFIG, "gates") == gates
    attention = frozen_names(CONFIG, "attention")
    assert attention == {
        name for name in param_shapes(CONFIG) if ".attn." in name and "blocks.3" not in name
    }
    assert frozen_names(PSA, "attention") == attention - gates
    for config, freeze in (
        (PSA, "gates"),
        (replace(CONFIG, local_up_to_layer=0), "gates"),
        (replace(CONFIG, local_up_to_layer=0), "attention"),
    ):
        with pytest.raises(UserError, match=f"no {freeze} of GPSA to freeze"):
            frozen_names(config, freeze)


@pytest.mark.parametrize("freeze", ["gates", "attention"])
def test_frozen_gates_give_content_and_position_equal_shares(freeze):
    params = initial_params(CONFIG, 3, freeze)
    x = np.random.default_rng(4).standard_normal((2, 15, 12)).astype("float32")
    attn = part(params, "blocks.1.attn.")
    found, _ = layers.gpsa_forward(x, attn, 4, CONFIG.grid)
    q, k = (x @ attn["qk.weight"].T).reshape(2, 15, 2, 4, 3).transpose(2, 0, 3, 1, 4)
    v = (x @ attn["v.weight"].T).reshape(2, 15, 4, 3).transpose(0, 2, 1, 3)
    C = np.exp(q @ k.swapaxes(-1, -2) / 3**0.5)
    C /= C.sum(axis=-1, keepdims=True)
    P, _ = layers.position_attention_dense_forward(
        attn["pos_proj.weight"], attn["pos_proj.bias"], CONFIG.grid
    )
    y = ((C + P) @ v / 2).transpose(0, 2, 1, 3).reshape(2, 15, 12)
    expected = y @ attn["proj.weight"].T + attn["proj.bias"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


@pytest.fixture
def small_data(monkeypatch):
    monkeypatch.setattr("miniconvit.training.run.load_dataset", small_dataset)


def settings(**given):
    return make_settings(**{"img_size": 8, "batch_size": 16, "epochs": 2, "lr": 3e-3} | given)


def run(folder, resume=False, **given):
    return train(settings(**given), folder, resume=resume, quiet=True, workers=1)


def saved(folder):
    return load_checkpoint(folder / "last.safetensors")


TABLE_3 = {
    "a": {},
    "b": {"freeze": "gates"},
    "c": {"local_init": False},
    "d": {"freeze": "gates", "local_init": False},
    "e": {"model": "vit_micro32"},
    "f": {"freeze": "attention"},
    "g": {"freeze": "attention", "local_init": False},
    "PSA+conv": {"attention": "psa"},
    "PSA": {"attention": "psa", "local_init": False},
    "frozen PSA": {"attention": "psa", "freeze": "attention"},
}


@pytest.mark.parametrize("row", TABLE_3)
def test_every_row_trains_what_it_should_and_nothing_else(tmp_path, small_data, row):
    given = TABLE_3[row]
    run(tmp_path / "run", clip_grad=0.05, weight_decay=0.3, **given)
    found = saved(tmp_path / "run")
    frozen = frozen_names(found.config, given.get("freeze"))
    start = init_params(found.config, settings(**given).seed)
    inert = [name for name in start if name.endswith("pos_proj.bias")]
    for name, value in found.params.items():
        if name not in frozen:
            assert name in inert or (value != start[name]).any(), name
        elif name.endswith("gating_param"):
            assert (value == 0).all(), name
        else:
            np.testing.assert_array_equal(value, start[name], name)
        assert name not in frozen or not found.moments["exp_avg"][name].any()
    gated = "attention" not in given and row != "e"
    assert any(name.endswith("gating_param") for name in start) == gated
    locals_ = [name for name in start if name.endswith("attn.v.weight")]
    assert all((start[n] == np.eye(48)).all() == given.get("local_init", True) for n in locals_)


def test_the_gradient_is_clipped_without_what_is_frozen(tmp_path, small_data):
    """After one step AdamW's first moment is a tenth of the clipped gradient."""
    run(tmp_path / "run", epochs=None, steps=1, clip_grad=0.01, freeze="attention")
    moments = saved(tmp_path / "run").moments["exp_avg"]
    norm = sum(float((m.astype("float64") ** 2).sum()) for m in moments.values()) ** 0.5
    assert norm == pytest.approx(0.1 * 0.01, rel=1e-4)


@pytest.mark.parametrize("row", ["f", "PSA"])
def test_an_ablation_resumes_to_the_bit(tmp_path, small_data, monkeypatch, row):
    run(tmp_path / "whole", **TABLE_3[row])
    train_step = training.train_step

    def stop_after_eight(run, state, load):
        if state.step == 8:
            raise KeyboardInterrupt
        train_step(run, state, load)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train_step", stop_after_eight)
        patch.setattr(training, "SAVE_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", **TABLE_3[row])
    assert saved(tmp_path / "run").state["step"] == 8
    run(tmp_path / "run", resume=True, **TABLE_3[row])
    for name in ("last.safetensors", "best.safetensors"):
        whole = (tmp_path / "whole" / name).read_bytes()
        assert (tmp_path / "run" / name).read_bytes() == whole


def test_nothing_to_freeze_is_refused_before_a_folder_is_made(tmp_path, small_data):
    with pytest.raises(UserError, match="no gates of GPSA to freeze"):
        run(tmp_path / "run", model="vit_micro32", freeze="gates")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("strength", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_figure_8_locality_strength_and_number_of_gpsa_layers(strength, blocks):
    s = settings(locality_strength=strength, local_up_to_layer=blocks)
    params = init_params(s.model_config(small_dataset()), 0)
    weights = [value for name, value in params.items() if name.endswith("pos_proj.weight")]
    assert len(weights) == blocks
    for weight in weights:
        np.testing.assert_allclose(weight[:, 2], -strength, rtol=1e-6)
        np.testing.assert_allclose(abs(weight[:, :2]), strength, rtol=1e-6)


# Masks at test time.


def test_masking_the_positional_embedding_is_a_model_without_one():
    params, images = random_params(CONFIG), random_images(CONFIG)
    before = params["pos_embed"].copy()
    masked, _ = convit_forward(images, without_pos_embed(params), CONFIG)
    rest = {name: value for name, value in params.items() if name != "pos_embed"}
    without, _ = convit_forward(images, rest, replace(CONFIG, use_pos_embed=False))
    np.testing.assert_array_equal(masked, without)
    assert (masked != convit_forward(images, params, CONFIG)[0]).any()
    np.testing.assert_array_equal(params["pos_embed"], before)
    with pytest.raises(UserError, match="no positional embedding to mask"):
        without_pos_embed(rest)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("branch", ["content", "position"])
def test_masking_a_branch_is_a_gate_that_leaves_it_out(branch, blocks, dtype):
    params, images = random_params(CONFIG, dtype=dtype), random_images(CONFIG, dtype=dtype)
    calls, right = [], layers.gate_forward

    def gate_forward(content, position, gating_param):
        calls.append(1)
        if len(calls) > blocks:
            return right(content, position, gating_param)
        return position if branch == "content" else content, None

    with planted(gate_forward=gate_forward):
        expected, _ = convit_forward(images, params, CONFIG)
    found, cache = convit_forward(images, without_branch(params, branch, blocks), CONFIG)
    np.testing.assert_array_equal(found, expected)
    grads = convit_backward(np.ones_like(found), cache)
    silent = "qk.weight" if branch == "content" else "pos_proj.weight"
    for i in range(3):
        assert (not grads[f"blocks.{i}.attn.{silent}"].any()) == (i < blocks)
        assert (not grads[f"blocks.{i}.attn.gating_param"].any()) == (i < blocks)


def test_masking_what_is_not_there_is_refused():
    twin = random_params(replace(CONFIG, local_up_to_layer=0))
    for params in (twin, random_params(PSA)):
        with pytest.raises(UserError, match="no GPSA block whose content branch"):
            without_branch(params, "content", 1)
    for blocks in (0, 4):
        with pytest.raises(UserError, match=f"in the first 1 to 3 blocks, not {blocks}"):
            without_branch(random_params(CONFIG), "position", blocks)
