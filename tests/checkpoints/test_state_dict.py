"""State dicts as people save them: found whatever stands around, and what is left out is said."""

import numpy as np
import pytest
from test_torch_file import GOLDEN, golden
from test_weights import CONFIG, assert_same

import miniconvit as mc
from miniconvit import UserError
from miniconvit.checkpoints import weights
from miniconvit.checkpoints.torch_file import Opaque
from miniconvit.checkpoints.weights import open_weights, read_start

F = np.float32


@pytest.fixture
def opened(tmp_path, monkeypatch, capsys):
    """Opens a .pth file as if it held this value: (parameters, what was said)."""

    def open_value(value, **options):
        path = tmp_path / "a.pth"
        path.write_bytes(b"PK" + bytes(50))
        monkeypatch.setattr(weights, "read_torch_file", lambda path: value)
        capsys.readouterr()
        params = open_weights(path, img_size=12, **options)[1].params
        return params, capsys.readouterr().err.replace(str(path), "FILE")

    return open_value


def with_prefix(prefix, tensors=None):
    return {prefix + k: v for k, v in (tensors or golden("model")).items()}


def moved(amount):
    """Another model of the same shapes."""
    return {name: value + F(amount) for name, value in golden("model").items()}


PREFIXES = ["_orig_mod.model.", "module.module.", "backbone._orig_mod.module.", "net.encoder.vit."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_any_prefix_that_all_share_is_taken_off(opened, tmp_path, prefix, capsys):
    from safetensors.numpy import save_file

    params, said = opened({"weights": with_prefix(prefix)})
    assert_same(params, golden("model"))
    assert said == ""
    save_file(with_prefix(prefix), tmp_path / "a.safetensors")
    assert_same(open_weights(tmp_path / "a.safetensors", img_size=12)[1].params, golden("model"))
    assert capsys.readouterr().err == ""


def test_a_prefix_that_not_all_share_is_refused_by_the_first_that_does_not(opened):
    value = with_prefix("model.") | {"criterion.weight": np.ones(5, F)}
    with pytest.raises(UserError, match=r"criterion\.weight is none of the model's"):
        opened({"state_dict": value})
    with pytest.raises(UserError, match=r"head\.bias is missing"):
        value = with_prefix("model.")
        value["head.bias"] = value.pop("model.head.bias")
        opened(value)


COUNTERS = {
    "num_updates": np.array(7),
    "initialised": np.array(True),
    "decay": np.array(0.99, F),
    "module.step": np.zeros(1, np.int64),
    "module.blocks.1.total_params": np.zeros(1),
    "module.blocks.0.attn.rel_indices": np.zeros((1, 9, 9, 3), F),
    "module.relative_position_index": np.zeros((9, 9), np.int64),
    "epoch": 3,
}


def test_counters_are_left_out_and_named(opened):
    for name, value in COUNTERS.items():
        params, said = opened(with_prefix("module.") | {name: value})
        assert_same(params, golden("model"))
        assert said == f"FILE: left out {name.removeprefix('module.')}\n"
    params, said = opened(with_prefix("module.") | COUNTERS)
    assert_same(params, golden("model"))
    assert said.count("\n") == 1
    assert all(name.removeprefix("module.") in said for name in COUNTERS)
    many = with_prefix("") | {f"blocks.{i % 3}.x{i}.total_ops": np.zeros(1) for i in range(40)}
    assert opened(many)[1].endswith("x7.total_ops and 32 more\n")


def test_what_counts_nothing_is_not_left_out(opened):
    for name, value, words in (
        ("tail", np.ones(3, F), "the tensor tail is none of the model's"),
        ("blocks.0.alpha", np.array(0.3, F), "the tensor blocks.0.alpha is none of the model's"),
        ("head.temperature", np.ones(1, F), "head.temperature is none of the model's"),
        ("blocks.0.step", np.ones(3, F), "blocks.0.step is none of the model's"),
        ("blocks.0.ring", np.ones((9, 9), bool), "blocks.0.ring is none of the model's"),
        ("head.weight_mask", np.ones((5, 8), bool), "head.weight_mask .* masks are not applied"),
        ("head.weight_mask", np.ones((5, 8), np.uint8), "masks are not applied"),
        ("blocks.0.attn.mask", np.ones((9, 9), F), "mask is none of the model's"),
        ("head.bias", 3, "head.bias is missing"),
        ("head.bias", np.ones(5, np.int64), "head.bias is int64 where float32"),
        ("_extra_state", Opaque("_io.BytesIO"), "'_extra_state' it has no tensor .* _io.BytesIO"),
        ("optimizer", {}, "under 'optimizer' it has no tensor of floats but dict"),
        ("note", "text", "under 'note' it has no tensor of floats but str"),
        (Opaque("tuple"), 1.5, None),
        (Opaque("tuple"), [], "under 'tuple' it has no tensor"),
        ("norm.bias", Opaque("torch.float8_e5m2"), "'norm.bias' .* torch.float8_e5m2; save"),
    ):
        if words is None:
            opened(golden("model") | {name: value})
            continue
        with pytest.raises(UserError, match=rf"a\.pth .*{words}"):
            opened(golden("model") | {name: value})


FOUND = {
    "model_state": {"epoch": 3, "model_state": golden("model")},
    "generator": {"a": {"b": {"weights": golden("model")}}},
    "second of a tuple": ({"lr": 0.1}, golden("model")),
    "list": {"models": [golden("model")]},
    "beside marks": {"args": Opaque("x.Y"), "network": golden("model"), "best": Opaque("z")},
    "beside another network": {"critic": {"fc.weight": np.ones((900, 9), F)}, "g": golden("model")},
    "under an odd key": {Opaque("NoneType"): golden("model")},
    "under a number": {0: golden("model")},
    "twice the same": dict.fromkeys(["model", "net"], golden("model")),
}


@pytest.mark.parametrize("name", FOUND)
def test_a_state_dict_is_found_by_what_it_holds(opened, name):
    params, said = opened(FOUND[name])
    assert_same(params, golden("model"))
    assert said == ""


SEVERAL = {
    "ema in front": ({"ema": golden("model"), "model": moved(1)}, "ema"),
    "ema behind": ({"model": moved(1), "model_ema": golden("model")}, "model_ema"),
    "inside": (
        {"state_dict": moved(1), "ema": {"shadow": golden("model"), "decay": 0.9}},
        "ema.shadow",
    ),
    "by prefix": (
        {"state_dict": with_prefix("model.", moved(1)) | with_prefix("ema_model.module.")},
        "state_dict.ema_model.module",
    ),
    "camel": ({"net": moved(1), "netEMA": golden("model")}, "netEMA"),
    "swa": ({"state_dict": moved(1), "swa_state": golden("model")}, "swa_state"),
    "timm's key": ({"teacher": moved(1), "state_dict": golden("model")}, "state_dict"),
    "timm's first key": ({"model": moved(1), "state_dict": golden("model")}, "state_dict"),
    "outer": ({"a": {"old": moved(1)}, "new": golden("model")}, "new"),
    "moments": (
        {"optimizer": {"ema": moved(1), "exp_avg": moved(2)}, "params": golden("model")},
        "params",
    ),
    "moments by prefix": (
        with_prefix("optimizer.exp_avg.", moved(1)) | golden("model"),
        "the outermost",
    ),
    "gradients": ({"gradients": moved(1), "weights": golden("model")}, "weights"),
    "gradients before timm's key": ({"model": {"grad_ema": moved(1)}, "z": golden("model")}, "z"),
    "fisher": ({"fisher": moved(1), "params": golden("model")}, "params"),
    "one letter": ({"m": moved(1), "p": golden("model")}, "p"),
    "optax": ({"nu": moved(1), "params": golden("model")}, "params"),
    "optimizerState": ({"optimizerState": moved(1), "params": golden("model")}, "params"),
    "schema is no average": ({"schema": moved(1), "model": golden("model")}, "model"),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_of_several_the_average_is_read_and_that_is_said(opened, name):
    value, place = SEVERAL[name]
    params, said = opened(value)
    assert_same(params, golden("model"))
    count = 3 if name == "moments" else 2
    assert said == f"FILE holds {count} state dicts: {place} is read\n"


def test_where_no_name_decides_the_others_are_named(opened):
    value = {"last": golden("model"), "best": moved(1), "m": moved(2), "v": moved(3)}
    params, said = opened(value)
    assert_same(params, golden("model"))
    assert said == ("FILE holds 4 state dicts: last is read, but no name tells it from best\n")
    _, said = opened({"init_state": golden("model"), "final_state": moved(1)})
    assert said.endswith("init_state is read, but no name tells it from final_state\n")


def test_other_networks_are_told_by_what_they_lack(opened):
    with pytest.raises(UserError, match=r"holds no state dict but one tensor without a name"):
        open_weights(GOLDEN / "lone.pth")
    other = {"conv1.weight": np.ones((2, 3, 7, 7), F), "fc.weight": np.ones((5, 2), F)}
    with pytest.raises(UserError, match=r"no ConViT that is known .* norm\.weight is missing"):
        opened({"epoch": 3, "net": other})
    moments = {"state": {0: {"exp_avg": np.ones(3, F)}}}
    for value in ([[Opaque("a.B")]], {"model": Opaque("a.B"), "optimizer": moments}):
        with pytest.raises(UserError, match=r"holds no state dict but an object of a\.B"):
            opened(value)


def test_values_that_hold_themselves_or_are_deep_end(opened):
    looped = {"model": golden("model")}
    looped["self"] = [looped, (looped,)]
    assert_same(opened(looped)[0], golden("model"))
    deep = golden("model")
    for _ in range(5000):
        deep = {"x": deep}
    with pytest.raises(UserError, match="holds no state dict"):
        opened(deep)
    wide = []
    for _ in range(60):  # 2**60 paths lead to the innermost
        wide = [wide, wide]
    assert_same(opened({"a": wide, "model": golden("model")})[0], golden("model"))


def test_what_repeats_itself_makes_no_large_model(opened, monkeypatch):
    """Expanded tensors cost nothing in a file: a limit holds before they are copied."""
    expanded = golden("model")
    expanded["norm.bias"] = np.broadcast_to(F(0.5), (8,))
    params, _ = opened(expanded)
    np.testing.assert_array_equal(params["norm.bias"], np.full(8, 0.5, F), strict=True)
    assert params["norm.bias"].flags.writeable
    expanded["norm.bias"] = np.broadcast_to(F(0.5), (2**24 + 8,))[:8]
    assert opened(expanded)
    expanded["head.weight"] = np.broadcast_to(F(0.5), (2**21 + 1, 8))
    expanded["head.bias"] = np.broadcast_to(F(0.5), (2**21 + 1,))
    with monkeypatch.context() as patch, pytest.raises(UserError, match="far larger than the file"):
        patch.setattr(weights, "_floats", None)
        opened(expanded)


# Without a head


def headless(**more):
    return {k: v for k, v in golden("model").items() if not k.startswith("head.")} | more


HEADLESS = {
    "stripped": (headless(), ""),
    "another head": (
        headless(**{"classifier.weight": np.ones((9, 8), F), "classifier.bias": np.ones(9, F)}),
        "FILE: left out classifier.weight, classifier.bias\n",
    ),
    "a head of layers": (
        headless(**{"head.mlp.0.weight": np.ones((3, 8), F)}),
        "FILE: left out head.mlp.0.weight\n",
    ),
    "a head beside the prefix": (
        with_prefix("backbone.", headless()) | {"head.layers.bias": np.ones(9, F)},
        "FILE: left out head.layers.bias\n",
    ),
}


@pytest.mark.parametrize("name", HEADLESS)
def test_a_training_begins_from_a_file_without_a_head(opened, tmp_path, capsys, name):
    value, said = HEADLESS[name]
    with pytest.raises(UserError, match=r"head\.weight is missing; --init-from takes a file with"):
        opened(value)
    start = read_start(tmp_path / "a.pth", CONFIG, tuple("abcde"))
    assert_same(start.params, headless())
    assert start.text.endswith("head.weight and head.bias begin fresh, for 5 classes")
    assert capsys.readouterr().err.replace(str(tmp_path / "a.pth"), "FILE") == said


def test_what_else_is_missing_or_strange_is_refused_without_a_head_too(opened, tmp_path):
    for change, words in (
        ({"norm.bias": None}, r"norm\.bias is missing"),
        ({"blocks.0.extra": np.ones(4, F)}, r"blocks\.0\.extra is none of the model's"),
        ({"head": Opaque("a.B")}, r"under 'head' it has no tensor"),
    ):
        value = {k: v for k, v in (headless() | change).items() if v is not None}
        with pytest.raises(UserError, match=r"a\.pth"):
            opened(value)
        with pytest.raises(UserError, match=words):
            read_start(tmp_path / "a.pth", CONFIG, tuple("abcde"))


def test_grey_weights_say_what_to_give_instead(opened, tmp_path, program):
    grey = golden("model")
    grey["patch_embed.proj.weight"] = grey["patch_embed.proj.weight"][:, :1]
    opened(grey)
    with pytest.raises(UserError, match=r"in_chans is 1 .* give weights for images of 3 channels"):
        read_start(tmp_path / "a.pth", CONFIG, tuple("abcde"))
    Image = pytest.importorskip("PIL.Image")
    picture = tmp_path / "x.png"
    Image.fromarray(np.full((12, 12), 51, np.uint8)).save(picture)
    status, _, err = program("predict", tmp_path / "a.pth", picture, "--device", "cpu")
    assert (status, "mc.save_checkpoint(FILE, params, config, mean=" in err) == (2, True)
    _, found = open_weights(tmp_path / "a.pth", img_size=12)
    mean, std = [0.5], [0.25]
    mc.save_checkpoint(tmp_path / "b.safetensors", found.params, found.config, mean=mean, std=std)
    status, out, _ = program("predict", tmp_path / "b.safetensors", picture, "--device", "cpu")
    assert (status, "class 0" in out) == (0, True)
