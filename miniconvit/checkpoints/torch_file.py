"""Tensors out of a PyTorch file, without PyTorch and without executing anything.

Such a file holds a pickle: the program of a stack machine that may call any function of Python.
Here nothing is called. `pickletools` parses the program, and the few instructions that build dicts,
lists, tuples, numbers and strings are followed; of functions, four are known by name, and what they
would give is written down as a description of a tensor. All else is refused by name.
"""

import pickletools
import zipfile
from dataclasses import dataclass
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError

LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
MOST_INSTRUCTIONS = 1_000_000  # a state dict of 200 tensors has about 10,000
MOST_PICKLE_BYTES = 2**25
MOST_AXES = 64  # NumPy's limit

STORAGES = {
    "DoubleStorage": "f8",
    "FloatStorage": "f4",
    "HalfStorage": "f2",
    "BFloat16Storage": "bf2",
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ShortStorage": "i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "b1",
}
"""PyTorch's class to NumPy's type, which ends in the bytes of an element; NumPy has no bfloat16,
the upper half of a float32."""
ORDERS = {b"little": "<", b"big": ">"}

ORDERED_DICT = "collections.OrderedDict"
REBUILD_TENSOR = "torch._utils._rebuild_tensor_v2"
REBUILD_PARAMETER = "torch._utils._rebuild_parameter"
KNOWN = {ORDERED_DICT, REBUILD_TENSOR, REBUILD_PARAMETER} | {f"torch.{name}" for name in STORAGES}

PUSHED = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
PUSHED_ARGUMENTS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
PUSHED_ARGUMENTS |= {"BINUNICODE", "SHORT_BINUNICODE"}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Refused(ValueError):
    """What a file asks for is not known here. The text follows the file's name in a sentence."""


@dataclass(frozen=True)
class _Global:
    name: str  # with its module, of KNOWN


@dataclass(frozen=True)
class _Storage:
    kind: str  # of STORAGES
    key: str
    count: int  # elements

    @property
    def itemsize(self):
        """Bytes of an element."""
        return int(STORAGES[self.kind][-1])


@dataclass(frozen=True)
class Tensor:
    """What a file says of a tensor: a storage, and offset, sizes and strides in its elements."""

    storage: _Storage
    offset: int
    size: tuple
    stride: tuple


def read_torch_file(path: str | Path) -> Any:
    """The object in a .pth, .pt or .bin file: dicts, with NumPy arrays for the tensors in them.

    Both of PyTorch's formats are read, the zip archive and the older one. Half precision becomes
    float32; the arrays are read-only views. Raises UserError, naming the file, where it is damaged
    or holds anything else than dicts, lists, tuples, numbers, strings and dense tensors.
    """
    try:
        with open(path, "rb") as file:
            is_archive = file.read(2) == b"PK"
        return _read_archive(path) if is_archive else _read_legacy(path)
    except Refused as reason:
        raise UserError(
            f"{path} {reason}: of a PyTorch file only tensors in dicts are read, and nothing is "
            "executed; save the state dict alone, as torch.save(model.state_dict(), FILE) does"
        ) from None
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise _unreadable(path, str(error)[:200]) from error
    except (LookupError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
        raise _unreadable(path, "its pickle or its storages are damaged") from error


def _unreadable(path, reason):
    return UserError(f"{path} cannot be read as a PyTorch file: {reason}; use another file")


def _read_archive(path):
    """The object in a zip archive: FOLDER/data.pkl, and a storage in each FOLDER/data/KEY."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        _check_entries(archive.infolist(), path)
        programs = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(programs) != 1:
            raise ValueError(f"{len(programs)} entries are called data.pkl where 1 was expected")
        folder = programs[0].removesuffix("data.pkl")
        if entries[programs[0]].file_size > MOST_PICKLE_BYTES:
            raise Refused("describes its tensors in more bytes than any state dict needs")
        order = archive.read(f"{folder}byteorder") if f"{folder}byteorder" in entries else b"little"
        if order not in ORDERS:
            raise ValueError(f"its byte order is {order[:20]!r}")
        value = _run(BytesIO(archive.read(programs[0])))
        return _with_arrays(
            value, lambda storage: archive.read(f"{folder}data/{storage.key}"), ORDERS[order]
        )


def _check_entries(entries, path):
    """PyTorch never compresses, so that no entry can be larger than the file is."""
    for entry in entries:
        parts = entry.filename.replace("\\", "/").split("/")
        if ".." in parts or parts[0] == "" or ":" in parts[0]:
            raise Refused(f"has an entry {entry.filename[:80]!r} that leads out of the archive")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise Refused(f"has a compressed entry {entry.filename[:80]!r}")
    with open(path, "rb") as file:
        size = file.seek(0, 2)
    if sum(entry.file_size for entry in entries) > size:
        raise Refused("has entries that lie on top of each other")


def _read_legacy(path):
    """The object in a file of the format before PyTorch 1.6: five pickles, then the storages in the
    order of the fifth, each after its number of elements."""
    with open(path, "rb") as file:
        stream = BytesIO(file.read())
    if _run(stream) != LEGACY_MAGIC or _run(stream) != LEGACY_PROTOCOL:
        raise Refused("is a pickle, not a file that torch.save wrote")
    system, value, keys = _run(stream), _run(stream), _run(stream)
    order = "<" if system["little_endian"] else ">"
    itemsizes = {storage.key: storage.itemsize for storage in _storages(value)}
    content, begin, places = stream.getbuffer(), stream.tell(), {}
    for key in keys:
        count = int(np.frombuffer(content, order + "i8", 1, begin)[0])
        places[key] = slice(begin + 8, begin + 8 + count * itemsizes[key])
        begin = places[key].stop
    return _with_arrays(value, lambda storage: content[places[storage.key]], order)


def _run(stream):
    """The object that the pickle program at the stream's position builds."""
    machine = _Machine()
    for number, (instruction, argument, _) in enumerate(pickletools.genops(stream)):
        if number > MOST_INSTRUCTIONS:
            raise Refused("describes its tensors in more steps than any state dict needs")
        machine.follow(instruction.name, argument)
    (value,) = machine.stack
    return value


class _Machine:
    """Stack and memo of a pickle program. A mark opens a stack of its own, `outer` holds the
    others: nothing below a mark can be reached."""

    def __init__(self):
        self.stack, self.outer, self.memo = [], [], {}

    def follow(self, name, argument):
        """One instruction. Raises Refused for those that this reader does not know."""
        stack = self.stack
        if name in PUSHED:
            stack.append(PUSHED[name])
        elif name in PUSHED_ARGUMENTS:
            stack.append(argument)
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "MARK":
            self.outer.append(stack)
            self.stack = []
        elif name in ("TUPLE", "APPENDS", "SETITEMS"):
            self._close_mark(name)
        elif name in TUPLES:
            stack.append(self._pop(TUPLES[name]))
        elif name == "APPEND":
            self._extend(self._pop(1))
        elif name == "SETITEM":
            self._set_items(self._pop(2))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            words = argument.split(" ") if name == "GLOBAL" else self._pop(2)
            stack.append(_find(".".join(words)))
        elif name == "BINPERSID":
            stack.append(_storage(*self._pop(1)))
        elif name == "REDUCE":
            stack.append(_describe(*self._pop(2)))
        elif name == "BUILD":
            self._drop_state()
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise Refused(f"uses the pickle instruction {name}")

    def _pop(self, count):
        """The last `count` values, a tuple."""
        if len(self.stack) < count:
            raise ValueError("its pickle takes more values than it has")
        values = tuple(self.stack[-count:])
        del self.stack[-count:]
        return values

    def _close_mark(self, name):
        values, self.stack = tuple(self.stack), self.outer.pop()
        if name == "TUPLE":
            self.stack.append(values)
        elif name == "APPENDS":
            self._extend(values)
        else:
            self._set_items(values)

    def _extend(self, values):
        if type(self.stack[-1]) is not list:
            raise ValueError("its pickle appends to what is no list")
        self.stack[-1].extend(values)

    def _set_items(self, values):
        if type(self.stack[-1]) is not dict or len(values) % 2:
            raise ValueError("its pickle sets items of what is no dict")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) not in (str, int):
                raise Refused(f"has a {type(key).__name__} as the key of a dict")
            self.stack[-1][key] = value

    def _drop_state(self):
        """PyTorch hangs a table of versions, of no use here, on the dict of a state."""
        self._pop(1)
        if type(self.stack[-1]) is not dict:
            raise Refused("sets the state of an object")


def _find(name):
    if name not in KNOWN:
        raise Refused(f"holds objects of {name[:80]!r}")
    return _Global(name)


def _storage(identity):
    """What a persistent id says: ("storage", class, key, device, elements), in the older format
    followed by what makes it a view of another storage, or None."""
    word, kind, key, _, count, *view = identity
    if word != "storage" or type(kind) is not _Global or any(part is not None for part in view):
        raise Refused("holds a storage of an unknown kind")
    if type(key) is not str or type(count) is not int or count < 0:
        raise ValueError("the key or the length of a storage is none")
    return _Storage(kind.name.removeprefix("torch."), key, count)


def _describe(function, arguments):
    """What the function would give."""
    name = function.name
    if name == ORDERED_DICT and arguments == ():
        return {}
    if name == REBUILD_PARAMETER and type(arguments[0]) is Tensor:
        return arguments[0]
    if name == REBUILD_TENSOR and type(arguments[0]) is _Storage:
        return _checked(Tensor(*arguments[:4]))
    raise Refused(f"calls {name} in a way that is not known")


def _checked(tensor):
    """The tensor itself. Raises ValueError where it reaches out of its storage, or repeats it."""
    size, stride, count = tensor.size, tensor.stride, tensor.storage.count
    numbers = (tensor.offset, *size, *stride)
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError("the offset, a size or a stride of a tensor is no count")
    if len(size) != len(stride) or len(size) > MOST_AXES:
        raise ValueError(f"a tensor of {len(size)} axes has {len(stride)} strides")
    reach = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    end = tensor.offset + (reach + 1 if prod(size) else 0)
    if end > count or prod(size) > count:
        raise ValueError(f"a tensor of size {size} does not fit into its storage of {count}")
    return tensor


def _storages(value):
    """Every storage of the tensors in nested dicts, lists and tuples."""
    return (tensor.storage for _, _, tensor in _places(value))


def _with_arrays(value, content, order):
    """value with an array in the place of each Tensor. content: from a storage to its bytes;
    order: of the bytes of a number, < or >."""
    arrays = {}
    for holder, key, tensor in list(_places(value)):
        storage = tensor.storage
        if storage not in arrays:
            arrays[storage] = _array(storage, content(storage), order)
        if isinstance(holder, dict | list):
            array = arrays[storage]
            strides = [step * array.itemsize for step in tensor.stride]
            offset = tensor.offset * array.itemsize
            holder[key] = np.ndarray(tensor.size, array.dtype, array, offset, strides)
    return value


def _places(value):
    """(holder, key or index, Tensor) of every tensor in nested dicts, lists and tuples."""
    seen, waiting = set(), [value]
    while waiting:
        holder = waiting.pop()
        if id(holder) in seen or not isinstance(holder, dict | list | tuple):
            continue
        seen.add(id(holder))
        for key, item in holder.items() if isinstance(holder, dict) else enumerate(holder):
            if isinstance(item, Tensor):
                yield holder, key, item
            else:
                waiting.append(item)


def _array(storage, content, order):
    """All elements of a storage (n,), read-only, in the machine's byte order."""
    if len(content) != storage.count * storage.itemsize:
        raise ValueError(
            f"a storage has {len(content)} bytes where {storage.count} elements of "
            f"{storage.itemsize} were expected"
        )
    kind = STORAGES[storage.kind]
    if kind == "bf2":
        array = (np.frombuffer(content, order + "u2").astype("u4") << 16).view("f4")
    else:
        array = np.frombuffer(content, order + kind).astype(
            "f4" if kind == "f2" else kind, copy=False
        )
    array.flags.writeable = False
    return array
