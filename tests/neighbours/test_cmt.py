"""CMT: autograd's and the authors' numbers, and runs that train, stop, go on and answer by it."""

import json
from dataclasses import asdict, replace
from math import prod

import numpy as np
import pytest
from golden_cases import GOLDEN, assert_equal, read_parts
from small_run import stop_after
from with_numba import needs_numba

from miniconvit import layers
from miniconvit.checkpoints import weights
from miniconvit.checkpoints.checkpoint import load_checkpoint
from miniconvit.engine import classification, make_engine
from miniconvit.engine.cpu import cpu_blocks, of_one_call
from miniconvit.engine.pieces import cut
from miniconvit.errors import UserError
from miniconvit.gradcheck.neighbours import DEAD
from miniconvit.neighbours import cmt_backward, cmt_forward
from miniconvit.neighbours.cmt import CMT_VARIANTS, CMTConfig, cmt_shapes, init_cmt, recognise_cmt
from miniconvit.neighbours.models import (
    ALL_VARIANTS,
    config_from_dict,
    config_to_dict,
    count_parameters,
)
from miniconvit.optim import AdamW, is_running
from miniconvit.training.settings import make_settings

SMALL = CMTConfig(8, 3, 3, 4, (6, 8), (1, 2), (1, 2), (2, 1), 1.5, 10)


def cmt_case(name):
    parts = read_parts(GOLDEN, name, "in", "grad", "after")
    return CMTConfig.from_dict(json.loads(parts["config"].item())), parts.pop("in"), parts


@pytest.mark.parametrize("name", ["cmt", "cmt_plain"])
def test_whole_networks_equal_autograd(name):
    config, params, case = cmt_case(name)
    logits, cache = cmt_forward(case["images"], params, config, True)
    assert_equal(logits, case["y"])
    grads = cmt_backward(case["dy"], cache)
    again = cmt_backward(case["dy"], cache)  # no cache is used up
    assert all(np.array_equal(again[name], grad) for name, grad in grads.items())
    trained = [name for name in grads if not is_running(name)]
    assert list(grads) == list(cmt_shapes(config)) and trained == sorted(
        case["grad"], key=trained.index
    )
    dead = (*sum(DEAD.values(), ())[:5], "blocks_d.0.mlp.conv2.1.bias")
    for key in trained:
        if key.endswith(dead):  # 0, where autograd has round-off
            assert max(np.abs(grads[key]).max(), np.abs(case["grad"][key]).max()) < 1e-10
        else:
            assert_equal(grads[key], case["grad"][key])
    evaluated, _ = cmt_forward(case["images"], params, config, False)
    assert_equal(evaluated, case["evaluated"])
    AdamW(params, 1e-3).step(params, grads)
    for key, expected in case["after"].items():
        assert_equal(params[key], expected)


@needs_numba
def test_a_faster_gelu_is_as_near_to_autograd():
    """In float32, where the engines give it. By default the reference's runs."""
    config, params, case = cmt_case("cmt")
    params = {name: p.astype("float32") for name, p in params.items()}
    images, dy = (case[name].astype("float32") for name in ("images", "dy"))
    errors, found = [], []
    for fast in (False, True):
        blocks, for_inference = (
            of_one_call(cpu_blocks(), keep) if fast else None for keep in (True, False)
        )
        logits, cache = cmt_forward(images, params, config, True, blocks)
        grads = cmt_backward(dy, cache)
        evaluated, _ = cmt_forward(images, params, config, False, for_inference)
        assert logits.dtype == evaluated.dtype == np.float32
        gaps = [grads[name] - true for name, true in case["grad"].items()]
        of_grads = sum((gap * gap).sum() for gap in gaps) ** 0.5
        errors.append([abs(logits - case["y"]).max(), abs(evaluated - case["evaluated"]).max()])
        errors[-1].append(of_grads / sum((g * g).sum() for g in case["grad"].values()) ** 0.5)
        found.append(logits)
    assert not np.array_equal(*found)
    assert np.all(np.array(errors[1]) <= 2 * np.array(errors[0])), errors


def multiplications(config):
    """Of one image, in filters, linear layers and products of attention."""
    shapes, total = cmt_shapes(config), 0
    places = {f"stem_conv{i}": (config.img_size // 2) ** 2 for i in (1, 2, 3)}
    for stage, (rows, cols), k in zip("abcd", config.grids, config.sr_ratios, strict=True):
        N, coarse = rows * cols, rows * cols // k**2
        names = {name.rpartition(".")[0] for name in shapes if f"_{stage}." in name}
        places |= dict.fromkeys(names, N)
        places |= {n: coarse for n in names if n.endswith(("attn.k", "attn.v", "attn.sr.0"))}
        places["_fc"] = N
    for name, n in places.items():
        shape = shapes[f"{name}.weight"]
        total += n * prod(shape) if len(shape) > 1 else 0
    for depth, D, (rows, cols), k in zip(
        config.depths, config.embed_dims, config.grids, config.sr_ratios, strict=True
    ):
        total += depth * 2 * D * (rows * cols) ** 2 // k**2
    return total + prod(shapes["head.weight"])


@pytest.mark.parametrize(
    ("name", "millions", "billions"),
    [
        ("cmt_ti", 9.49, 0.64),
        ("cmt_xs", 15.25, 1.55),
        ("cmt_s", 26.26, 4.03),
        ("cmt_b", 45.72, 9.32),
    ],
)
def test_the_authors_sizes_have_their_parameters_and_the_published_cost(name, millions, billions):
    """Parameters as counted in the authors' code, multiplications as the paper has them."""
    config = CMT_VARIANTS[name]
    assert count_parameters(config) / 1e6 == pytest.approx(millions, abs=0.01)
    assert multiplications(config) / 1e9 == pytest.approx(billions, abs=0.005)


def test_micro_has_as_many_parameters_as_its_rivals():
    assert count_parameters(CMT_VARIANTS["cmt_micro32"]) == 126_838
    assert count_parameters(ALL_VARIANTS["convit_micro32"]) == 118_630


def draw_batch(n, size, classes):
    rng = np.random.default_rng(0)
    return rng.standard_normal((n, 3, size, size), dtype="float32"), rng.integers(classes, size=n)


def test_pieces_have_32_images_or_more_and_any_number_of_workers_gives_the_same_bits():
    config = CMTConfig(32)
    objective, params, batch = classification(config), init_cmt(config), draw_batch(70, 32, 10)
    for n in (32, 64, 70, 128, 200, 1000):
        assert min(stop - start for start, stop in cut(n, objective.rows)) >= 32
    found = []
    for count in (1, 3):
        with make_engine(objective, np, count) as engine:
            *numbers, grads = engine.loss_and_grads(
                lambda start, stop: tuple(x[start:stop] for x in batch), 70, params
            )
            found.append((numbers, {name: grad.copy() for name, grad in grads.items()}))
            logits = engine.logits(lambda start, stop: batch[0][start:stop], 70, params)
            assert logits.shape == (70, 10)
    assert found[0][0] == found[1][0]
    assert all(np.array_equal(found[0][1][name], found[1][1][name]) for name in params)
    assert all(grad.dtype == np.float32 for grad in found[0][1].values())


def test_running_statistics_follow_the_mean_over_the_pieces():
    objective, params = classification(SMALL), init_cmt(SMALL)
    images, labels = draw_batch(128, 8, 3)
    parts = [
        objective.step((images[i : i + 64], labels[i : i + 64]), params, 0.5, i, 0, 0, layers)[1]
        for i in (0, 64)
    ]
    whole = classification(SMALL).step((images, labels), params, 1.0, 0, 0, 0, layers)[1]
    for name in ("stem_norm1.running_mean", "stem_norm1.running_var"):
        np.testing.assert_allclose(parts[0][name] + parts[1][name], whole[name], rtol=1e-2)


def test_evaluation_does_not_see_the_other_images():
    """And keeps nothing for a backward pass."""
    params, (images, _) = init_cmt(SMALL), draw_batch(4, 8, 3)
    logits, (caches, *_) = cmt_forward(images, params, SMALL, False)
    alone, _ = cmt_forward(images[1:2], params, SMALL, False)
    np.testing.assert_allclose(alone, logits[1:2], rtol=1e-5, atol=1e-6)
    assert not any(caches)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("img_size", 12, "multiple of 8"),
        ("img_size", (8, 16), "img_size must be an integer"),
        ("embed_dims", (6, 0), "embed_dims must be integers"),
        ("embed_dims", "ab", "embed_dims must be integers"),
        ("depths", (1,), "1 to 4 stages"),
        ("num_heads", (4, 2), "multiples of"),
        ("sr_ratios", (1, 3), "multiples of sr_ratios"),
        ("mlp_ratio", 0.0, "hidden unit"),
        ("local", 1, "true or false"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(field, value, told):
    with pytest.raises(UserError, match=told):
        CMTConfig.from_dict(asdict(SMALL) | {field: value})


def test_a_configuration_comes_back_from_json_and_tells_its_kind():
    stored = json.loads(json.dumps(config_to_dict(SMALL)))
    assert stored["kind"] == "cmt" and config_from_dict(stored) == SMALL


@pytest.mark.parametrize("name", CMT_VARIANTS)
def test_shapes_tell_a_configuration(name):
    config = replace(CMT_VARIANTS[name], local=name != "cmt_s")
    tensors = {n: np.empty(shape, "float32") for n, shape in cmt_shapes(config).items()}
    assert cmt_shapes(recognise_cmt(tensors)) == cmt_shapes(config)
    del tensors["relative_pos_d"]
    with pytest.raises(UserError):
        recognise_cmt({"stem_conv1.weight": tensors["stem_conv1.weight"]})


def official(seed=0, prefix=""):
    return {prefix + name: value for name, value in init_cmt(SMALL, seed).items()}


def opened(value, tmp_path, monkeypatch):
    """What open_weights makes of a .pth file that holds this."""
    path = tmp_path / "a.pth"
    path.write_bytes(b"PK" + bytes(50))
    monkeypatch.setattr(weights, "read_torch_file", lambda path: value)
    return weights.open_weights(path, any_kind=True)[1].params


@pytest.mark.parametrize(
    "others",
    [
        {"model": official(1)},  # of the average, as the official script evaluates it
        {"exp_avg": official(1)},
        {"optimizer": {"exp_avg": official(1)}},
    ],
)
def test_of_several_state_dicts_the_one_is_read_that_a_convit_would_be(
    others, tmp_path, monkeypatch
):
    value = others | {"model_ema": official(prefix="module.")}
    params = opened(value, tmp_path, monkeypatch)
    assert params.keys() == official().keys()
    assert all(np.array_equal(params[name], p) for name, p in official().items())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({0: np.zeros(3)}, "holds no CMT that is known here: the tensor 0 is none"),
        ({"relative_pos_a": np.zeros((7, 4, 1))}, r"tell no CMT: embed_dims .* multiples of"),
        ({"head.weight": None}, "the tensor head.weight is missing"),
    ],
)
def test_what_is_no_state_of_a_cmt_is_refused_by_a_sentence(changes, told, tmp_path, monkeypatch):
    value = {name: v for name, v in (official() | changes).items() if v is not None}
    with pytest.raises(UserError, match=told):
        opened(value, tmp_path, monkeypatch)


# Runs.


@pytest.fixture
def small(monkeypatch, small_data):
    """`cmt_micro32` is SMALL."""
    monkeypatch.setitem(CMT_VARIANTS, "cmt_micro32", SMALL)


RUN = ["--data", "shapes", "--model", "cmt_micro32", "--epochs", "4", "--batch-size", "64"]
RUN += ["--lr", "3e-3", "--device", "cpu"]
MIXED = ["--mixup", "0.5", "--label-smoothing", "0.1", "--ema", "0.5", "--clip-grad", "1"]


def test_a_stopped_run_goes_on_to_the_bit(small, program, monkeypatch, tmp_path):
    def run(out, *more):
        return program("train", *RUN, *MIXED, "--out", out, *more)

    assert run("whole", "--workers", 1)[0] == 0
    assert run("two", "--workers", 2)[0] == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert run("cut", "--workers", 1)[0] == 130
    code, out, _ = run("cut", "--workers", 2, "--resume")
    assert code == 0 and "resumed after step 3" in out
    whole = load_checkpoint("whole/last.safetensors")
    for other in (load_checkpoint("cut/last.safetensors"), load_checkpoint("two/last.safetensors")):
        assert all(np.array_equal(whole.params[n], other.params[n]) for n in whole.params)
        assert all(np.array_equal(whole.ema[n], other.ema[n]) for n in whole.params)
    fresh = init_cmt(SMALL)
    moved = [n for n in whole.params if is_running(n)]
    assert all(not np.array_equal(whole.params[n], fresh[n]) for n in moved)
    *_, last = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(last)["nonlocality"] == []


def test_every_command_answers_or_refuses_by_one_sentence(small, program, tmp_path):
    from PIL import Image

    assert program("train", *RUN, "--out", "run")[0] == 0
    Image.new("RGB", (8, 8)).save("a.png")
    code, out, _ = program("eval", "run", "--device", "cpu", "--workers", 1)
    assert code == 0 and "top1" in out
    code, out, _ = program("predict", "run", "a.png", "--device", "cpu")
    assert code == 0 and "reddish" in out
    bench = "bench", "--model", "cmt_micro32", "--steps", 1, "--device", "cpu", "--workers", 1
    assert program(*bench)[0] == 0
    refused = {
        ("inspect", "run"): "kind cmt: this needs a ConViT or a ViT",
        ("trace", "run"): "kind cmt: this needs a ConViT or a ViT",
        ("export", "run", "x.safetensors"): "kind cmt: this needs a ConViT or a ViT",
        ("trace", "--model", "cmt_micro32"): "trace needs a ConViT or a ViT",
        ("eval", "run", "--mask-pos-embed"): "leave out --mask and --mask-pos-embed",
        ("eval", "run", "--img-size", "16"): "leave out --img-size",
        ("eval", "run", "--model", "vit_micro32"): "leave out --model",
        ("predict", "run", "a.png", "--saliency", "s.png"): "leave out --saliency",
        (*bench, "--patch-size", 2): "leave out --patch-size",
        (
            "train",
            "--init-from",
            "run",
            "--img-size",
            8,
            "--out",
            "y",
        ): "kind cmt: this needs a ConViT or a ViT",
        ("experiment", "ablation", "--model", "cmt_micro32"): "--model must be a ConViT",
    }
    for argv, told in refused.items():
        code, _, err = program(*argv)
        assert code != 0 and told in err and "Traceback" not in err, (argv, err)
    assert program("eval", "run", "--mask-pos-embed", "--out", "m")[0] == 2
    assert not (tmp_path / "m").exists()  # nothing is made before it is refused


@pytest.mark.parametrize(
    "option",
    [
        ["--patch-size", 2],
        ["--local-up-to-layer", 1],
        ["--locality-strength", 0.5],
        ["--attention", "psa"],
        ["--no-local-init"],
        ["--freeze", "gates"],
        ["--drop-path", 0.1],
        ["--init-from", "convit_tiny.fb_in1k"],
        ["--cosine", 1],
        ["--contrastive", 1],
        ["--patch-mixing", 1],
    ],
    ids=lambda option: option[0],
)
def test_what_is_for_convits_alone_is_refused(small, program, option):
    code, _, err = program("train", *RUN, *option, "--out", "x")
    assert code != 0 and f"no ConViT or ViT, and {option[0]} is for these alone: leave" in err


def test_what_a_recipe_says_of_convits_can_be_taken_back():
    with pytest.raises(UserError, match="add --drop-path 0"):
        make_settings("paper32", model="cmt_micro32")
    assert make_settings("paper32", model="cmt_micro32", drop_path=0.0).mixup == 0.8


def test_a_size_that_does_not_fit_is_refused(small, program):
    code, _, err = program("train", *RUN, "--img-size", 20, "--out", "x")
    assert code != 0 and "multiple of 8" in err
    code, _, err = program("train", *RUN, "--img-size", 16, "--out", "x")
    assert code != 0 and "those of shapes are 8x8: add --img-size 8x8, or choose" in err


def test_the_authors_state_dict_answers_as_it_lies(small, program, tmp_path):
    """Its counters are left out, and said."""
    from safetensors.numpy import save_file

    params = init_cmt(SMALL)
    counters = {
        n.replace("running_mean", "num_batches_tracked"): np.array(7)
        for n in params
        if n.endswith("running_mean")
    }
    save_file(params | counters, "official.safetensors")
    code, _, err = program("eval", "official.safetensors", "--data", "shapes", "--device", "cpu")
    assert code == 0 and "num_batches_tracked" in err
