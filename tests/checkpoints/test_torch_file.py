"""The reader of PyTorch files: what torch.save wrote is found again, and nothing is executed.

The files under golden/ were written by PyTorch (`golden/make_torch_golden.py` and
`make_beside_golden.py`); the hostile ones are made here, by the definition of pickle's
instructions.
"""

import copy
import io
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from miniconvit import UserError
from miniconvit.checkpoints import torch_file
from miniconvit.checkpoints.torch_file import Opaque, read_torch_file
from miniconvit.checkpoints.weights import open_weights

GOLDEN = Path(__file__).parents[1] / "golden"
LEGACY_BEGIN = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
LEGACY_BEGIN += pickle.dumps({"protocol_version": 1001, "little_endian": True}, 2)


def golden(folder):
    """The arrays of torch_files.npz under this name."""
    with np.load(GOLDEN / "torch_files.npz") as file:
        return {k.partition("/")[2]: file[k] for k in file.files if k.startswith(folder + "/")}


@pytest.mark.parametrize("name", ["torch_tensors.pth", "torch_tensors_legacy.pth"])
def test_every_kind_of_tensor_that_pytorch_wrote(name):
    found, expected = read_torch_file(GOLDEN / name), golden("tensors")
    assert list(found) == list(expected)
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value, strict=True)
        assert not found[key].flags.writeable


@pytest.mark.parametrize("name", ["torch_model.pth", "torch_model_legacy.pth"])
def test_a_state_dict_that_pytorch_wrote(name):
    found, expected = read_torch_file(GOLDEN / name), golden("model")
    if "legacy" not in name:
        assert found["epoch"] == 7
        found = found["model"]
    assert list(found) == list(expected)
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value, strict=True)


MARKS = {
    "whole optimizer": "torch.optim.sgd.SGD",
    "whole model": "torch.nn.modules.linear.Linear",
    "namespace": "types.SimpleNamespace",
    "thing": "__main__.Thing",
    "set": "set",
    "frozenset": "frozenset",
    "counter": "collections.Counter",
    "deque": "collections.deque",
    "size": "torch.Size",
    "dtype": "torch.bfloat16",
    "device": "torch.device",
    "path": "pathlib.PurePosixPath",
    "date": "datetime.datetime",
    "enum": "http.HTTPStatus",
    "partial": "functools.partial",
    "function": ".len",
    "class": "",
    "numpy number": "multiarray.scalar",
    "numpy array": "multiarray._reconstruct",
    "numpy dtype": "numpy.dtype",
    "complex": ".complex",
    "decimal": "decimal.Decimal",
    "fraction": "fractions.Fraction",
    "range": "range",
    "slice": ".slice",
    "bytearray": ".bytearray",
    "pattern": "re._compile",
    "uuid": "uuid.UUID",
    "complex tensor": "ComplexFloatStorage",
    "float8 tensor": "torch.float8_e5m2",
    "uint16 tensor": "torch.uint16",
    "sparse tensor": "_rebuild_sparse_tensor",
    "meta tensor": "_rebuild_meta_tensor_no_storage",
    "storage": "UntypedStorage",
}
"""What an entry of beside.pth would be made by; of the others the value itself is read."""


@pytest.mark.parametrize("name", ["beside.pth", "beside_legacy.pth"])
def test_anything_may_stand_beside_the_tensors(name):
    found = read_torch_file(GOLDEN / name)
    np.testing.assert_array_equal(found["model"]["a"], np.arange(3, dtype="f4"), strict=True)
    np.testing.assert_array_equal(found["model"]["b"], np.ones(2, "f4"), strict=True)
    for key, words in MARKS.items():
        assert isinstance(found[key], Opaque), key
        assert words in found[key].name, key
    momentum = [state["momentum_buffer"] for state in found["optimizer"]["state"].values()]
    np.testing.assert_array_equal(momentum[0], [[1.0, 1.0]])
    assert list(found["optimizer"]["state"]) == [0, 1]
    assert found["scheduler"]["base_lrs"] == [0.1]
    assert found["defaultdict"] == {"loss": [0.5]}
    assert found["large"] == 2**3000
    assert found["looped"][0][0] is found["looped"]
    assert found["odd keys"].pop(7) == 5
    assert [key.name for key in found["odd keys"]] == ["NoneType", "tuple", "bool", "float"]
    rest = ["model", "optimizer", "scheduler", "defaultdict", "generator", "large", "looped"]
    rest += ["bytes", "odd keys", "numpy random", "numpy generator", "random"]
    assert set(found) == {*MARKS, *rest}


VIEWS = {
    "base": [[1, 2, 3], [4, 5, 6]],
    "negative": [-1, -3, -5],
    "negated part": [[-2, -3], [-5, -6]],
    "expanded": [[1, 1, 1, 1], [4, 4, 4, 4]],
    "scalar expanded": [[2.5, 2.5]] * 3,
    "parameter with attributes": [3, 6, 9],
    "tensor with attributes": [20, 25, 30],
}


@pytest.mark.parametrize("name", ["views.pth", "views_legacy.pth"])
def test_a_tensor_is_what_it_is_and_not_how_it_lies(name):
    found = read_torch_file(GOLDEN / name)
    for key, values in VIEWS.items():
        np.testing.assert_array_equal(found[key], np.array(values, "f4"), strict=True)
        assert not found[key].flags.writeable
    whole, ((row,),) = found["tuple"][0], found["tuple"][1]
    np.testing.assert_array_equal(whole, np.array(VIEWS["base"], "f4").T, strict=True)
    np.testing.assert_array_equal(row, np.array(VIEWS["base"][0], "f4"), strict=True)
    assert set(found) == {*VIEWS, "tuple"}
    np.testing.assert_array_equal(read_torch_file(GOLDEN / "lone.pth"), np.array([[1, 2]], "f4"))


def archive(path, program, storages=None, order=None):
    """A file as torch.save lays it out: a pickle program, and the bytes of storages by key."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", program)
        for key, content in (storages or {}).items():
            file.writestr(f"a/data/{key}", content)
        if order:
            file.writestr("a/byteorder", order)
    return path


def legacy(path, program, keys=(), storages=b""):
    """The same before PyTorch 1.6."""
    path.write_bytes(LEGACY_BEGIN + program + pickle.dumps(list(keys), 2) + storages)
    return path


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value):
    """LONG1."""
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def several(*parts):
    """A tuple."""
    return b"(" + b"".join(parts) + b"t"


def storage(kind="FloatStorage", key="0", count=6):
    name = f"ctorch\n{kind}\n".encode()
    return several(text("storage"), name, text(key), text("cpu"), number(count)) + b"Q"


def tensor(offset=0, size=(2, 3), stride=(3, 1), function="_rebuild_tensor_v2", stored=None):
    axes = [several(*map(number, values)) for values in (size, stride)]
    call = f"ctorch._utils\n{function}\n".encode()
    return call + several(stored or storage(), number(offset), *axes, b"\x89", b"}") + b"R"


def program(*items):
    """{"0": first item, "1": ...} as a whole pickle."""
    pairs = b"".join(text(str(i)) + item for i, item in enumerate(items))
    return b"\x80\x02}(" + pairs + b"u."


SIX = np.arange(6, dtype="<f4") / 3


def test_the_programs_made_here_are_understood(tmp_path):
    """Otherwise those that are refused below would be refused for another reason."""
    parts = tensor(), tensor(offset=1, size=(2, 2), stride=(3, 1)), tensor(0, (), ())
    found = read_torch_file(archive(tmp_path / "a.pth", program(*parts), {"0": SIX.tobytes()}))
    np.testing.assert_array_equal(found["0"], SIX.reshape(2, 3), strict=True)
    np.testing.assert_array_equal(found["1"], SIX.reshape(2, 3)[:, 1:], strict=True)
    np.testing.assert_array_equal(found["2"], SIX[:1].reshape(()), strict=True)
    swapped = {"0": SIX.astype(">f4").tobytes()}
    found = read_torch_file(archive(tmp_path / "b.pth", program(tensor()), swapped, "big"))
    np.testing.assert_array_equal(found["0"], SIX.reshape(2, 3), strict=True)
    old = several(
        text("storage"), b"ctorch\nFloatStorage\n", text("k"), text("cpu"), number(6), b"N"
    )
    body = program(tensor(stored=old + b"Q"))
    content = struct.pack("<q", 6) + SIX.tobytes()
    found = read_torch_file(legacy(tmp_path / "c.pth", body, ["k"], content))
    np.testing.assert_array_equal(found["0"], SIX.reshape(2, 3), strict=True)


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Stated:
    """Pickles with a state, which the default unpickler hands to __setstate__."""

    def __init__(self, code):
        self.code = code

    def __setstate__(self, state):
        eval(state["code"])


def attacks(marker):
    """Name to (pickle, what its mark names): each would write the file `marker`."""
    import os

    command, code = f"touch {marker}", f"open({str(marker)!r}, 'w')"
    calls = {
        "system": (Call(os.system, command), f"{os.system.__module__}.system"),
        "eval": (Call(eval, code), ".eval"),
        "exec": (Call(exec, code), ".exec"),
        "open": (Call(open, str(marker), "w"), ".open"),
    }
    found = {}
    for name, (value, words) in calls.items():
        for protocol in (2, 3, 4, 5):
            found[f"{name} {protocol}"] = pickle.dumps({"model": value}, protocol), words
    system = f"cos\nsystem\n({text(command).decode('latin1')}tR.".encode("latin1")
    found["bare"] = b"\x80\x02" + system, "os.system"
    inst = b"(" + text(command) + b"ios\nsystem\n."
    found["INST"] = b"\x80\x02" + inst, "os.system"
    found["OBJ"] = b"\x80\x02(cos\nsystem\n" + text(command) + b"o.", "os.system"
    found["NEWOBJ"] = b"\x80\x02cos\nsystem\n" + text(command) + b"\x85\x81.", "os.system"
    found["OBJ of what is known"] = b"\x80\x02(ccollections\nOrderedDict\no.", "OrderedDict"
    found["NEWOBJ of what is known"] = b"\x80\x02ccollections\nOrderedDict\n)\x81.", "OrderedDict"
    found["EXT1"] = b"\x80\x02\x82\x01.", "extension 1"
    found["NEWOBJ_EX"] = (
        b"\x80\x04cos\nsystem\n" + text(command) + b"\x85}\x92.",
        "os.system",
    )
    found["BUILD"] = pickle.dumps({"model": Stated(code)}, 2), "Stated"
    found["called twice"] = b"\x80\x02cbuiltins\neval\n)R" + text(code) + b"\x85R.", ".eval"
    found["as a type"] = (
        b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n("
        b"cos\nsystem\nctorch\nTensor\n" + text(command) + b"\x85}tR.",
        "os.system",
    )
    found["as an item"] = b"\x80\x02]cos\nsystem\n" + text(command) + b"\x85Ra.", "os.system"
    found["as a key"] = b"\x80\x02}cos\nsystem\n" + text(command) + b"\x85RK\x01s.", "os.system"
    found["attribute"] = b"\x80\x02cbuiltins\ngetattr\n.", "builtins.getattr"
    found["dotted"] = (
        b"\x80\x04" + text("collections") + text("OrderedDict.fromkeys") + b"\x93.",
        ("OrderedDict.fromkeys"),
    )
    found["numpy"] = pickle.dumps({"model": np.ones(3)}, 2), "numpy"
    found["PyTorch's own code"] = b"\x80\x02ctorch.hub\nload\n.", "torch.hub.load"
    return found


ATTACKS = list(attacks("x"))


def marks(value):
    """The names of every Opaque in nested values."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list | tuple):
        return [name for item in value for name in marks(item)]
    return [value.name] if isinstance(value, Opaque) else []


@pytest.mark.parametrize("name", ATTACKS)
def test_a_program_that_calls_is_not_run_and_leaves_a_mark(tmp_path, name):
    marker = tmp_path / "executed"
    body, words = attacks(marker)[name]
    for path in archive(tmp_path / "new.pth", body), legacy(tmp_path / "old.pth", body):
        found = marks(read_torch_file(path))
        assert any(words in mark for mark in found)
        with pytest.raises(UserError, match=rf"{path.name} holds no") as error:
            open_weights(path)
        assert any(mark in str(error.value) for mark in found)
    first = tmp_path / "first.pth"  # in the place of the older format's magic number
    first.write_bytes(body + bytes(100))
    with pytest.raises(UserError, match=r"first\.pth is a pickle"):
        read_torch_file(first)
    assert not marker.exists()


def test_the_attacks_are_attacks(tmp_path):
    """The default unpickler would run them."""
    for name in ("system 2", "eval 4", "bare", "INST", "OBJ", "BUILD", "as an item", "as a key"):
        marker = tmp_path / name.replace(" ", "-")
        pickle.loads(attacks(marker)[name][0])
        assert marker.exists(), name


ODD = {
    "call of a dict": b"}(tR",
    "tensor of no storage": b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00))tR",
    "tensor of nothing": b"ctorch._utils\n_rebuild_tensor_v2\n(tR",
    "state of a list": b"]}b",
    "state of nothing": b"b",
    "items of a list": b"]K\x01K\x02s",
    "appended to a dict": b"}K\x01a",
    "half a pair": b"}(K\x01u",
    "nothing in the memo": b"h\x07",
    "no mark": b"t",
    "POP": b"N0",
    "storage of a negative length": storage(count=-1),
    "huge storage": tensor(size=(2**60,), stride=(1,), stored=storage(count=2**60)),
    "another storage's type": tensor(stored=storage("DoubleStorage")),
    "storage that is missing": tensor(stored=storage(key="1")),
    "storage outside": tensor(stored=storage(key="../../../etc/passwd")),
    "version 3": tensor(function="_rebuild_tensor_v3"),
}


UNKNOWN = {
    "OrderedDict of pairs": b"ccollections\nOrderedDict\n(]tR",
    "call of a storage": b"ctorch\nFloatStorage\n(tR",
    "parameter of no tensor": b"ctorch._utils\n_rebuild_parameter\n(K\x01tR",
    "unknown storage": storage("QuantizedStorage"),
    "tensor in it": tensor(stored=storage("QuantizedStorage")),
    "persistent number": b"K\x05Q",
    "storage of another word": several(text("else"), *[text("module")] * 4) + b"Q",
    "storage that is a view": tensor(
        stored=several(
            *(text("storage"), b"ctorch\nFloatStorage\n", text("0"), text("cpu")),
            *(number(6), text("v")),
        )
        + b"Q"
    ),
    "sparse": tensor(function="_rebuild_sparse_tensor"),
    "unknown metadata": b"ctorch._utils\n_rebuild_tensor_v2\n"
    + several(
        *(storage(), number(0), several(number(1)), several(number(1)), b"\x89", b"}"),
        b"}" + text("folded") + b"\x88s",
    )
    + b"R",
    "set": b"\x8f(K\x01\x90",
    "frozenset": b"(K\x01\x91",
    "object with items": b"ca\nB\n)\x81(K\x01K\x02uK\x03K\x04s",
    "object with elements": b"ca\nB\n)\x81(K\x01eK\x02a",
    "object with a state": b"ca\nB\n)\x81}b",
    "text of a persistent id": b"Pabc\n",
    "buffer": b"\x97\x98",
}
"""What is valid and not known."""


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_is_a_mark(tmp_path, name):
    path = archive(tmp_path / "a.pth", program(tensor(), UNKNOWN[name]), {"0": SIX.tobytes()})
    found = read_torch_file(path)
    assert isinstance(found["1"], Opaque)
    np.testing.assert_array_equal(found["0"], SIX.reshape(2, 3), strict=True)


PLAIN = {
    "list": (b"(K\x01K\x02l", [1, 2]),
    "dict": (b"(" + text("a") + b"K\x02d", {"a": 2}),
    "defaultdict": (b"ccollections\ndefaultdict\n(cbuiltins\nlist\ntR", {}),
    "numbers in text": (b"(I7\nI01\nL-3L\nF0.5\nt", (7, True, -3, 0.5)),
    "strings of before": (b"(S'a'\nU\x01bT\x01\x00\x00\x00cVd\nt", ("a", "b", "c", "d")),
    "strings and bytes": (b"(\x8c\x01a\x8e\x01" + bytes(7) + b"bC\x01ct", ("a", b"b", b"c")),
    "bytes by array": (b"\x96\x01" + bytes(7) + b"b", bytearray(b"b")),
    "taken back": (b"K\x01K\x020", 1),
    "taken back to a mark": (b"K\x01(K\x02K\x031", 1),
    "a mark taken back": (b"K\x01(0", 1),
    "twice": (b"K\x012\x86", (1, 1)),
    "memo in text": (b"K\x05p300\n0g300\n", 5),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_values_are_what_python_s_own_unpickler_gives(tmp_path, name):
    body, expected = PLAIN[name]
    found = read_torch_file(archive(tmp_path / "a.pth", program(body)))["0"]
    assert (type(found), found) == (type(expected), expected)
    assert pickle.loads(program(body))["0"] == expected


BOUNDS = {
    "offset beyond": (tensor(offset=1), "does not fit into its storage of 6"),
    "size beyond": (tensor(size=(3, 3)), "does not fit"),
    "stride beyond": (tensor(stride=(4, 1)), "does not fit"),
    "negative offset": (tensor(offset=-1), "is no count"),
    "negative size": (tensor(size=(-2, -3)), "is no count"),
    "negative stride": (tensor(offset=5, stride=(-3, -1)), "is no count"),
    "strides of other axes": (tensor(stride=(1,)), "2 axes has 1 strides"),
    "expanded": (tensor(size=(2**40, 2**20), stride=(0, 0)), "does not fit"),
    "beyond 64 bits": (tensor(size=(2**64, 1), stride=(1, 1)), "does not fit"),
    "65 axes": (tensor(size=(1,) * 65, stride=(1,) * 65), "65 axes has"),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_what_reaches_out_of_its_storage_is_refused_before_it_is_built(tmp_path, name):
    body, words = BOUNDS[name]
    path = archive(tmp_path / "a.pth", program(tensor(), body), {"0": SIX.tobytes()})
    with pytest.raises(UserError, match=rf"a\.pth .*{words}"):
        read_torch_file(path)


@pytest.mark.parametrize("name", ODD)
def test_what_cannot_be_is_a_sentence(tmp_path, name):
    path = archive(tmp_path / "a.pth", program(tensor(), ODD[name]), {"0": SIX.tobytes()})
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"a\.pth") as error:
            read_torch_file(path)
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()
    assert len(str(error.value)) < 500


def test_a_huge_place_in_the_memo_costs_nothing(tmp_path):
    """CPython's own unpickler makes room for all the places below."""
    body = b"\x80\x02}r\xff\xff\xff\x7f" + text("0") + b"K\x01s."
    tracemalloc.start()
    try:
        assert read_torch_file(archive(tmp_path / "a.pth", body)) == {"0": 1}
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()


def test_values_that_hold_themselves_end(tmp_path):
    body = b"\x80\x02}q\x00" + text("0") + b"h\x00s" + text("1") + b"]q\x01h\x01as."
    found = read_torch_file(archive(tmp_path / "a.pth", body))
    assert found["0"] is found


def test_long_programs_are_refused(tmp_path, monkeypatch):
    path = archive(tmp_path / "a.pth", program(*[b"N"] * 200))
    assert len(read_torch_file(path)) == 200
    monkeypatch.setattr(torch_file, "MOST_INSTRUCTIONS", 300)
    with pytest.raises(UserError, match="more steps"):
        read_torch_file(path)
    monkeypatch.setattr(torch_file, "MOST_PICKLE_BYTES", 100)
    with pytest.raises(UserError, match="more bytes"):
        read_torch_file(path)


def test_archives_that_are_not_pytorch_s(tmp_path):
    path, body = tmp_path / "a.pth", program(tensor())

    def refused(words):
        with pytest.raises(UserError, match=words):
            read_torch_file(path)

    def write(entries, compression=zipfile.ZIP_STORED):
        with zipfile.ZipFile(path, "w", compression) as file:
            for name, content in entries.items():
                file.writestr(name, content)

    good = {"a/data.pkl": body, "a/data/0": SIX.tobytes()}
    write(good)
    read_torch_file(path)
    write(good, zipfile.ZIP_DEFLATED)
    refused("compressed")
    for name in ("../up", "/root", "a/../../up", "..\\up", "C:/up"):
        write(good | {name: b"x"})
        refused("leads out of the archive")
    write({"a/data/0": b""})
    refused("0 entries are called data.pkl")
    write(good | {"b/data.pkl": body})
    refused("2 entries are called data.pkl")
    write(good | {"a/byteorder": b"middle"})
    refused("middle")
    write(good | {"a/data/0": SIX.tobytes() + b"x"})
    refused("25 bytes where 6 elements")
    with zipfile.ZipFile(path, "w") as file:
        for name, content in (good | {"a/data/1": bytes(9999)}).items():
            file.writestr(name, content)
        for key in range(2, 9):
            entry = copy.copy(file.filelist[-1])
            entry.filename = f"a/data/{key}"
            file.filelist.append(entry)
    refused("on top of each other")


def test_plain_pickles_are_refused(tmp_path):
    for value in ({"a": 1}, [1], "text", 3):
        (tmp_path / "a.pth").write_bytes(pickle.dumps(value, 2) + bytes(50))
        with pytest.raises(UserError, match="is a pickle, not a file that"):
            read_torch_file(tmp_path / "a.pth")


@pytest.mark.parametrize("name", ["torch_tensors.pth", "torch_tensors_legacy.pth"])
def test_damage_anywhere_is_a_sentence_or_harmless(tmp_path, name):
    path, rng = tmp_path / "a.pth", np.random.default_rng(12)
    whole = np.frombuffer((GOLDEN / name).read_bytes(), np.uint8)
    for length in [*range(0, 60, 3), *rng.integers(60, len(whole), 20)]:
        path.write_bytes(whole[:length].tobytes())
        with pytest.raises(UserError, match=r"a\.pth"):
            read_torch_file(path)
    refused = 0
    for _ in range(150):
        damaged = whole.copy()
        damaged[rng.integers(len(whole))] ^= np.uint8(1 << rng.integers(8))
        path.write_bytes(damaged.tobytes())
        try:
            read_torch_file(path)
        except UserError:
            refused += 1
    assert refused > 40


def test_a_stream_is_read_to_its_stop_alone():
    stream = io.BytesIO(pickle.dumps(5, 2) + pickle.dumps(6, 2))
    assert [torch_file._run(stream)[0], torch_file._run(stream)[0]] == [5, 6]
