"""The reader of PyTorch files: what torch.save wrote is found again, and nothing is executed.

The files under golden/ were written by PyTorch (`golden/make_torch_golden.py`); the hostile ones
are made here, by the definition of pickle's instructions.
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
from miniconvit.checkpoints.torch_file import read_torch_file

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


def attacks(marker):
    """Name to (pickle, what the refusal names): each would write the file `marker`."""
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
    found["INST"] = b"\x80\x02" + inst, "INST"
    found["OBJ"] = b"\x80\x02(cos\nsystem\n" + text(command) + b"o.", "os.system"
    found["NEWOBJ"] = b"\x80\x02cos\nsystem\n" + text(command) + b"\x85\x81.", "os.system"
    found["OBJ of what is known"] = b"\x80\x02(ccollections\nOrderedDict\no.", "OBJ"
    found["NEWOBJ of what is known"] = b"\x80\x02ccollections\nOrderedDict\n)\x81.", "NEWOBJ"
    found["EXT1"] = b"\x80\x02\x82\x01.", "EXT1"
    found["attribute"] = b"\x80\x02cbuiltins\ngetattr\n.", "builtins.getattr"
    found["dotted"] = (
        b"\x80\x04" + text("collections") + text("OrderedDict.fromkeys") + b"\x93.",
        ("OrderedDict.fromkeys"),
    )
    found["numpy"] = pickle.dumps({"model": np.ones(3)}, 2), "numpy"
    found["PyTorch's own code"] = b"\x80\x02ctorch.hub\nload\n.", "torch.hub.load"
    return found


ATTACKS = list(attacks("x"))


@pytest.mark.parametrize("name", ATTACKS)
def test_a_program_that_calls_is_refused_by_name_and_not_run(tmp_path, name):
    marker = tmp_path / "executed"
    body, words = attacks(marker)[name]
    first = tmp_path / "first.pth"  # in the place of the older format's magic number
    first.write_bytes(body + bytes(100))
    for path in (
        archive(tmp_path / "new.pth", body),
        legacy(tmp_path / "old.pth", body),
        first,
    ):
        with pytest.raises(UserError, match=rf"{path.name} (holds|uses)") as error:
            read_torch_file(path)
        assert words in str(error.value)
        assert not marker.exists()


def test_the_attacks_are_attacks(tmp_path):
    """The default unpickler would run them."""
    for name in ("system 2", "eval 4", "bare", "INST", "OBJ"):
        marker = tmp_path / name.replace(" ", "-")
        pickle.loads(attacks(marker)[name][0])
        assert marker.exists(), name


ODD = {
    "OrderedDict of pairs": b"ccollections\nOrderedDict\n(]tR",
    "call of a storage": b"ctorch\nFloatStorage\n(tR",
    "call of a dict": b"}(tR",
    "parameter of no tensor": b"ctorch._utils\n_rebuild_parameter\n(K\x01tR",
    "tensor of no storage": b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00))tR",
    "tensor of nothing": b"ctorch._utils\n_rebuild_tensor_v2\n(tR",
    "state of a list": b"]}b",
    "state of nothing": b"b",
    "tuple as a key": b"}(K\x01\x85K\x02u",
    "None as a key": b"}NK\x02s",
    "items of a list": b"]K\x01K\x02s",
    "appended to a dict": b"}K\x01a",
    "half a pair": b"}(K\x01u",
    "nothing in the memo": b"h\x07",
    "no mark": b"t",
    "POP": b"N0",
    "unknown storage": storage("QuantizedStorage"),
    "persistent number": b"K\x05Q",
    "storage of another word": several(*[text("module")] * 5) + b"Q",
    "storage that is a view": several(
        text("storage"), b"ctorch\nFloatStorage\n", text("0"), text("cpu"), number(6), text("v")
    )
    + b"Q",
    "storage of a negative length": storage(count=-1),
    "huge storage": tensor(size=(2**60,), stride=(1,), stored=storage(count=2**60)),
    "another storage's type": tensor(stored=storage("DoubleStorage")),
    "storage that is missing": tensor(stored=storage(key="1")),
    "storage outside": tensor(stored=storage(key="../../../etc/passwd")),
    "sparse": tensor(function="_rebuild_sparse_tensor"),
    "version 3": tensor(function="_rebuild_tensor_v3"),
}


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
def test_what_is_not_known_is_a_sentence(tmp_path, name):
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
    assert [torch_file._run(stream), torch_file._run(stream)] == [5, 6]
