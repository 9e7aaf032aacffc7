"""Checkpoints: what is read is what was written, and every kind of damage is a sentence."""

import errno
import hashlib
import json
import os
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from miniconvit import AdamW, ConViTConfig, UserError, init_params
from miniconvit.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from miniconvit.checkpoints.weights import open_weights
from miniconvit.system import write_file

CONFIG = ConViTConfig(
    (12, 8), (4, 2), 1, 3, embed_dim=8, depth=2, num_heads=4, qkv_bias=True, local_up_to_layer=1
)


@pytest.fixture
def params():
    return init_params(CONFIG, seed=7)


@pytest.fixture
def optimizer(params):
    rng = np.random.default_rng(8)
    optimizer = AdamW(params)
    for moments in (optimizer.exp_avg, optimizer.exp_avg_sq):
        for value in moments.values():
            value[...] = rng.random(value.shape)
    return optimizer


def assert_same(left, right):
    assert list(left) == list(right)
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], strict=True)


def test_round_trip(tmp_path, params, optimizer):
    path = tmp_path / "a.safetensors"
    about = {"mean": [0.1 + 0.2], "std": [0.3], "classes": ["a", "b", "ü"], "data": "letters"}
    save_checkpoint(
        path, params, CONFIG, optimizer=optimizer, state={"loss": 1 / 3, "step": 5}, **about
    )
    found = load_checkpoint(path)
    assert found.config == CONFIG
    assert_same(found.params, params)
    assert_same(found.moments["exp_avg"], optimizer.exp_avg)
    assert_same(found.moments["exp_avg_sq"], optimizer.exp_avg_sq)
    assert {name: getattr(found, name) for name in about} == about
    assert found.state == {"loss": 1 / 3, "step": 5}
    assert all(value.flags.writeable for value in found.params.values())
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_parameters_are_the_only_tensors_without_an_optimizer(tmp_path, params):
    save_checkpoint(tmp_path / "a.safetensors", params, CONFIG)
    assert set(load_file(tmp_path / "a.safetensors")) == set(params)
    found = load_checkpoint(tmp_path / "a.safetensors")
    assert (found.moments, found.state, found.mean, found.classes) == (None, None, None, None)


def test_equal_arguments_give_equal_bytes(tmp_path, params, optimizer):
    for name in ("a", "b"):
        save_checkpoint(tmp_path / name, params, CONFIG, optimizer=optimizer, state={"step": 5})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def scrambled(value):
    """Same values, another layout: each axis backwards, as an array in Fortran's order."""
    return np.asfortranarray(value[(slice(None, None, -1),) * value.ndim])[
        (slice(None, None, -1),) * value.ndim
    ]


def every_other(value):
    """A view of every other element of a larger array, along all axes."""
    large = np.full([2 * n + 1 for n in value.shape], np.float32(99))
    view = large[tuple(slice(1, None, 2) for _ in value.shape)]
    view[...] = value
    return view


def part(value):
    """A view of the middle of a larger array."""
    large = np.pad(value, 2, constant_values=99)
    return large[tuple(slice(2, -2) for _ in value.shape)]


VIEWS = {
    "transposed": lambda value: np.ascontiguousarray(value.T).T,
    "Fortran": np.asfortranarray,
    "backwards": lambda value: np.ascontiguousarray(value[::-1])[::-1],
    "scrambled": scrambled,
    "every other": every_other,
    "part": part,
    "axes swapped": lambda value: np.moveaxis(np.moveaxis(value, 0, -1).copy(), -1, 0),
    "read-only": lambda value: np.frombuffer(value.tobytes(), "f4").reshape(value.shape),
    "subclass": lambda value: np.ma.array(value),
}


@pytest.mark.parametrize("kind", VIEWS)
def test_views_of_every_kind_are_saved_as_what_they_show(tmp_path, params, optimizer, kind):
    """safetensors 0.8 writes the memory's order, 0.7 the values' order."""
    view = VIEWS[kind]
    seen = {name: view(value) for name, value in params.items()}
    for moments in (optimizer.exp_avg, optimizer.exp_avg_sq):
        moments.update({name: view(value.copy()) for name, value in moments.items()})
    expected = {k: {n: np.array(v) for n, v in getattr(optimizer, k).items()} for k in KINDS}
    ema = {name: view(value + np.float32(1)) for name, value in params.items()}
    for name, value in params.items():
        np.testing.assert_array_equal(seen[name], value)
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, seen, CONFIG, optimizer=optimizer, ema=ema)
    found = load_checkpoint(path)
    assert_same(found.params, params)
    for name in KINDS:
        assert_same(found.moments[name], expected[name])
    assert_same(found.ema, {name: value + np.float32(1) for name, value in params.items()})
    save_checkpoint(tmp_path / "b.safetensors", params, CONFIG)
    save_checkpoint(tmp_path / "c.safetensors", seen, CONFIG)
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()


KINDS = ("exp_avg", "exp_avg_sq")


def test_broadcast_values_are_saved_whole(tmp_path, params):
    seen = {name: np.broadcast_to(value.flat[0], value.shape) for name, value in params.items()}
    assert all(not any(value.strides) for value in seen.values())
    save_checkpoint(tmp_path / "a.safetensors", seen, CONFIG)
    found = load_checkpoint(tmp_path / "a.safetensors").params
    assert_same(found, {name: np.array(value) for name, value in seen.items()})


def parts(path):
    """(header, tensors' bytes) of a safetensors file, by the format's definition."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(path, header, data):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def with_tensors(path, change):
    """Writes the file again with other tensors and the metadata of before."""
    header, _ = parts(path)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, header["__metadata__"])


def with_metadata(path, change):
    header, data = parts(path)
    about = json.loads(header["__metadata__"]["miniconvit"])
    change(about)
    header["__metadata__"]["miniconvit"] = json.dumps(about)
    with_header(path, header, data)


def truncate(path, length):
    path.write_bytes(path.read_bytes()[:length])


def drop_metadata(path):
    header, data = parts(path)
    del header["__metadata__"]
    with_header(path, header, data)


def spoil_metadata(path):
    header, data = parts(path)
    header["__metadata__"]["miniconvit"] = "{"
    with_header(path, header, data)


def metadata_list(path):
    header, data = parts(path)
    header["__metadata__"]["miniconvit"] = "[1]"
    with_header(path, header, data)


def put(name, value):
    return lambda tensors: tensors.update({name: value})


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "cut in the header": lambda path: truncate(path, 50),
    "cut in the last tensor": lambda path: truncate(path, -1),
    "text": lambda path: path.write_text("not a checkpoint\n" * 100),
    "pickle": lambda path: path.write_bytes(b"\x80\x04\x95" + bytes(200)),
    "no metadata": drop_metadata,
    "metadata not JSON": spoil_metadata,
    "metadata not an object": metadata_list,
    "no config": lambda path: with_metadata(path, lambda about: about.pop("config")),
    "unknown setting": lambda path: with_metadata(
        path, lambda about: about["config"].update(colour="red")
    ),
    "setting of the wrong type": lambda path: with_metadata(
        path, lambda about: about["config"].update(mlp_ratio="wide")
    ),
    "another depth": lambda path: with_metadata(
        path, lambda about: about["config"].update(depth=3)
    ),
    "more blocks than tensors": lambda path: with_metadata(
        path, lambda about: about["config"].update(depth=10**12)
    ),
    "unknown entry": lambda path: with_metadata(path, lambda about: about.update(colour="red")),
    **{
        f"{name} {value}": lambda path, name=name, value=value: with_metadata(
            path, lambda about: about.update({name: value})
        )
        for name, value in [
            ("mean", 0.5),
            ("mean", ["a"]),
            ("mean", [0.5, 0.5]),
            ("mean", [True]),
            ("mean", [float("nan")]),
            ("std", [0]),
            ("std", [10**400]),
            ("classes", 5),
            ("classes", ["a"]),
            ("classes", ["a", "b", 3]),
            ("data", ["letters"]),
            ("state", [1]),
        ]
    },
    "two types": lambda path: with_tensors(path, put("head.bias", np.ones(3))),
    "moments of another type": lambda path: with_tensors(
        path, lambda t: t.update({k: v * np.float64(1) for k, v in t.items() if "exp_avg" in k})
    ),
    "tensor missing": lambda path: with_tensors(path, lambda t: t.pop("head.bias")),
    "moment missing": lambda path: with_tensors(
        path, lambda t: t.pop("optimizer.exp_avg_sq.head.bias")
    ),
    "tensor unknown": lambda path: with_tensors(path, put("tail.bias", np.ones(3, np.float32))),
    "wrong shape": lambda path: with_tensors(path, put("head.bias", np.ones(4, np.float32))),
    "wrong type": lambda path: with_tensors(path, put("head.bias", np.ones(3, np.int32))),
    "not a number": lambda path: with_tensors(
        path, put("head.bias", np.array([0, np.nan, 0], np.float32))
    ),
    "infinite moment": lambda path: with_tensors(
        path, put("optimizer.exp_avg.head.bias", np.array([0, np.inf, 0], np.float32))
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_a_sentence_that_names_the_file(tmp_path, params, optimizer, damage):
    """Also in a file from before there was a SHA-256, which would notice it all."""
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, params, CONFIG, optimizer=optimizer)
    with_metadata(path, lambda about: about.pop("sha256"))
    assert_same(load_checkpoint(path).params, params)
    DAMAGE[damage](path)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_checkpoint(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="not a safetensors file"):
        load_checkpoint(tmp_path)


def test_every_flipped_bit_is_noticed(tmp_path, params):
    """In the header and the first tensors, by either way of opening a checkpoint."""
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, params, CONFIG, mean=[1e-05], std=[1.0], classes=["a", "b", "ü"])
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    header = 8 + struct.unpack("<Q", whole[:8].tobytes())[0]
    for place in np.arange(8 * (header + 64))[::61]:
        damaged = whole.copy()
        damaged[place // 8] ^= np.uint8(1 << place % 8)
        path.write_bytes(damaged.tobytes())
        for read in (load_checkpoint, open_weights):
            with pytest.raises(UserError, match=r"model\.safetensors"):
                read(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.update({"head.bias": tensors["head.bias"] + np.float32(1e-6)}),
        lambda tensors: tensors.update({"head.bias": -tensors["head.bias"]}),
        lambda tensors: tensors.update(
            {"norm.weight": tensors["norm.bias"], "norm.bias": tensors["norm.weight"]}
        ),
    ],
)
def test_other_tensors_are_not_those_of_the_sha256(tmp_path, params, change):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, params, CONFIG)
    with_tensors(path, lambda tensors: None)
    assert_same(load_checkpoint(path).params, params)
    with_tensors(path, change)
    with pytest.raises(UserError, match="not what its SHA-256 was taken of"):
        load_checkpoint(path)


def test_the_sha256_is_of_the_content_by_its_definition(tmp_path, params):
    """SHA-256 of the JSON without it, then of name, type, shape and bytes of each tensor."""
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, params, CONFIG, data="letters")
    header, _ = parts(path)
    about = json.loads(header["__metadata__"]["miniconvit"])
    stated = about.pop("sha256")
    content = json.dumps(about).encode()
    for name in sorted(params):
        content += f"{name} float32 {params[name].shape}".encode() + params[name].tobytes()
    assert stated == hashlib.sha256(content).hexdigest()


def test_what_is_not_finite_or_does_not_fit_is_not_written(tmp_path, params):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, params, CONFIG)
    before = path.read_bytes()
    broken = params | {"norm.weight": params["norm.weight"] * np.float32(np.inf)}
    with pytest.raises(UserError, match=r"norm\.weight holds values that are not finite"):
        save_checkpoint(path, broken, CONFIG)
    with pytest.raises(UserError, match=r"head\.bias is missing"):
        save_checkpoint(path, {k: v for k, v in params.items() if k != "head.bias"}, CONFIG)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"loss": float("nan")}, "NaN is not finite"),
        ({"step": 2**63}, "no integer of 64 bits"),
        ({1: "a", "1": "b"}, "a key comes twice"),
        ({"log": ["x" * 2**21] * 3}, "more than 4,194,304 bytes"),
        ({"log": ['"' * 2**20]}, "more than 4,194,304 bytes"),
    ],
)
def test_metadata_that_could_not_be_read_are_not_written(tmp_path, params, state, words):
    with pytest.raises(
        UserError, match=rf"a\.safetensors is not written: of its metadata.*{words}"
    ):
        save_checkpoint(tmp_path / "a.safetensors", params, CONFIG, state=state)
    assert not list(tmp_path.iterdir())


def test_arguments_that_do_not_fit_are_told_before_anything_is_written(tmp_path, params):
    for about, words in (
        ({"mean": [0.5, 0.5]}, r"mean is \[0\.5, 0\.5\] where 1 numbers were expected"),
        ({"mean": np.ones((1, 1))}, "mean is .* where 1 numbers"),
        ({"mean": np.array(0.5)}, "mean is 0.5 where 1 numbers"),
        ({"std": [0.0]}, "std is .* where positive numbers"),
        ({"classes": ["a"]}, "3 names of classes were expected"),
        ({"classes": "abc"}, "3 names of classes were expected"),
        ({"data": 5}, "data is 5 where the name"),
        ({"state": [1]}, "state is "),
    ):
        with pytest.raises(UserError, match=rf"a\.safetensors is not written: {words}"):
            save_checkpoint(tmp_path / "a.safetensors", params, CONFIG, **about)
    assert not list(tmp_path.iterdir())


def test_arrays_of_statistics_and_classes_are_taken(tmp_path, params):
    about = {"mean": np.array([0.5], "float32"), "std": (np.float64(0.25),)}
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, params, CONFIG, classes=np.array(["a", "b", "c"]), **about)
    found = load_checkpoint(path)
    assert (found.mean, found.std, found.classes) == ([0.5], [0.25], ["a", "b", "c"])


@pytest.mark.parametrize("state", [{1: [None, True], "a": (0.1, {"b": -0.0})}, {"ü": "\udcff"}])
def test_any_other_metadata_are_written_and_read(tmp_path, params, state):
    save_checkpoint(tmp_path / "a.safetensors", params, CONFIG, state=state)
    found = load_checkpoint(tmp_path / "a.safetensors").state
    assert found == json.loads(json.dumps(state))


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_refusing_disk_leaves_the_old_file_alone(tmp_path, params, monkeypatch, failing):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, params, CONFIG)
    before = path.read_bytes()

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, failing, refuse)
    with pytest.raises(UserError, match=r"model\.safetensors: No space left on device"):
        save_checkpoint(path, init_params(CONFIG, seed=8), CONFIG)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_the_file_is_flushed_before_and_the_folder_after_the_rename(tmp_path, monkeypatch):
    """Else a power failure could leave the new name with the content of neither file."""
    calls = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor):
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    def note_replace(source, target):
        assert os.path.dirname(source) == os.path.dirname(target)
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    write_file(tmp_path / "a", b"new")
    assert calls == ["file", "rename", "folder"]
    assert (tmp_path / "a").read_bytes() == b"new"
