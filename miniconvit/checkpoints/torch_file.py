"""Tensors out of a PyTorch file, without PyTorch and without executing anything.

Such a file holds a pickle: the program of a stack machine that may call any function of Python.
Here nothing is called. `pickletools` parses the program, and the instructions that build dicts,
lists, tuples, numbers and strings are followed; of functions, a few are known by name, and what
they would give is made here. Whatever else a program makes is a mark that bears its name, so that
anything may stand beside the tensors.
"""

import pickletools
import zipfile
from collections.abc import Callable
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
MOST_REPEATED = 2**27  # elements of a tensor that repeats those of its storage

STORAGES = {
    "torch.DoubleStorage": "f8",
    "torch.FloatStorage": "f4",
    "torch.HalfStorage": "f2",
    "torch.BFloat16Storage": "bf2",
    "torch.LongStorage": "i8",
    "torch.IntStorage": "i4",
    "torch.ShortStorage": "i2",
    "torch.CharStorage": "i1",
    "torch.ByteStorage": "u1",
    "torch.BoolStorage": "b1",
}
"""PyTorch's class to NumPy's type, which ends in the bytes of an element; NumPy has no bfloat16,
the upper half of a float32."""
OTHER_STORAGES = {
    "torch.ComplexFloatStorage": 8,
    "torch.ComplexDoubleStorage": 16,
    "torch.QInt8Storage": 1,
    "torch.QUInt8Storage": 1,
    "torch.QInt32Storage": 4,
    "torch.QUInt4x2Storage": 1,
    "torch.QUInt2x4Storage": 1,
    "torch.UntypedStorage": 1,
    "torch.storage.UntypedStorage": 1,
}
"""Those that are not read, and the bytes of an element: the older format says of none where it
ends."""
ITEMSIZES = {name: int(kind[-1]) for name, kind in STORAGES.items()} | OTHER_STORAGES
ORDERS = {b"little": "<", b"big": ">"}

DICTS = {"collections.OrderedDict": 0, "collections.defaultdict": 1}
"""The most arguments with which a call gives an empty one."""
REBUILD_TENSORS = {"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"}
REBUILD_PARAMETERS = {
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
}
REBUILD_TYPED = "torch._utils._rebuild_tensor_v3"
REBUILD_FROM_TYPE = "torch._tensor._rebuild_from_type_v2"
PLAIN_TENSORS = {"torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}

VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
ARGUMENTS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
ARGUMENTS |= {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "BINUNICODE8"}
ARGUMENTS |= {"SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
UNSEEN = {"EMPTY_SET": "set", "NEXT_BUFFER": "buffer", "PERSID": "persistent id"}
"""Instructions that push what is not looked into."""
NOTHING = {"PROTO", "FRAME", "STOP", "READONLY_BUFFER"}


class Refused(ValueError):
    """What a file asks for is not known here. The text follows the file's name in a sentence."""


@dataclass(frozen=True, eq=False)
class Opaque:
    """The mark of an object that was not made: the name of what would have made it."""

    name: str


class _Global(Opaque):
    """A class or function itself."""


@dataclass(frozen=True, eq=False)
class _Storage(Opaque):
    """name: of ITEMSIZES; key: of its bytes; count: of its elements."""

    key: str
    count: int


def read_torch_file(path: str | Path) -> Any:
    """The object in a .pth, .pt or .bin file: dicts, with NumPy arrays for the tensors in them.

    Both of PyTorch's formats are read, the zip archive and the older one. Half precision becomes
    float32; the arrays are read-only views. What is no dict, list, tuple, number, string or dense
    real tensor is an Opaque. Raises UserError, naming the file, where it is damaged or none that
    torch.save wrote.
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
        if any(name.endswith("/constants.pkl") for name in entries):
            raise Refused("is a TorchScript program")
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
        arrays = _Arrays(lambda key: archive.read(f"{folder}data/{key}"), ORDERS[order])
        return _run(BytesIO(archive.read(programs[0])), arrays)[0]


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
    order of the fifth, each after its number of elements. The fourth is followed twice: first it
    tells the sizes of the storages, so that then their places are known."""
    with open(path, "rb") as file:
        stream = BytesIO(file.read())
    begin, _ = _run(stream)
    if begin != LEGACY_MAGIC or _run(stream)[0] != LEGACY_PROTOCOL:
        raise Refused("is a pickle, not a file that torch.save wrote")
    system, _ = _run(stream)
    order = "<" if system["little_endian"] else ">"
    program = stream.tell()
    _, itemsizes = _run(stream)
    keys, _ = _run(stream)
    content, begin, places = stream.getbuffer(), stream.tell(), {}
    for key in keys:
        if type(key) is not str:  # of tuples within tuples no hash is taken
            raise ValueError("the key of a storage is none")
        count = int(np.frombuffer(content, order + "i8", 1, begin)[0])
        places[key] = slice(begin + 8, begin + 8 + count * itemsizes[key])
        begin = places[key].stop
    stream.seek(program)
    return _run(stream, _Arrays(lambda key: content[places[key]], order))[0]


def _run(stream, arrays=None):
    """(object, {key: bytes of an element}) that the pickle program at the stream's position builds,
    and of the storages that it names. Without arrays a tensor is an Opaque."""
    machine = _Machine(arrays)
    for number, (instruction, argument, _) in enumerate(pickletools.genops(stream)):
        if number > MOST_INSTRUCTIONS:
            raise Refused("describes its tensors in more steps than any state dict needs")
        machine.follow(instruction.name, argument)
    (value,) = machine.stack
    return value, machine.itemsizes


class _Machine:
    """Stack and memo of a pickle program. A mark opens a stack of its own, `outer` holds the
    others: nothing below a mark can be reached."""

    def __init__(self, arrays):
        self.arrays = arrays
        self.stack, self.outer, self.memo, self.itemsizes = [], [], {}, {}

    def follow(self, name, argument):
        """One instruction: values, containers, the stack and the memo."""
        push = self.stack.append
        if name in VALUES:
            push(VALUES[name])
        elif name in ARGUMENTS:
            push(argument)
        elif name in UNSEEN:
            push(Opaque(UNSEEN[name]))
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            push({} if name == "EMPTY_DICT" else [])
        elif name in TUPLES:
            push(self._pop(TUPLES[name]))
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            push(self.memo[argument])
        elif name == "DUP":
            push(self.stack[-1])
        elif name == "MARK":
            self.outer.append(self.stack)
            self.stack = []
        elif name == "POP_MARK" or (name == "POP" and not self.stack):
            self._pop_mark()
        elif name in ("POP", "APPEND", "SETITEM"):
            self._fill(name + "S", self._pop(2 if name == "SETITEM" else 1))
        elif name in ("TUPLE", "LIST", "DICT", "FROZENSET", "APPENDS", "SETITEMS", "ADDITEMS"):
            self._fill(name, self._pop_mark())
        elif name == "BUILD":
            self._drop_state()
        elif name not in NOTHING:
            self._make(name, argument)

    def _pop(self, count):
        """The last `count` values, a tuple."""
        if len(self.stack) < count:
            raise ValueError("its pickle takes more values than it has")
        values = tuple(self.stack[-count:])
        del self.stack[-count:]
        return values

    def _pop_mark(self):
        values, self.stack = tuple(self.stack), self.outer.pop()
        return values

    def _fill(self, name, values):
        """Puts values into what is new, or into what stands last."""
        if name in ("TUPLE", "LIST"):
            self.stack.append(values if name == "TUPLE" else list(values))
        elif name == "FROZENSET":
            self.stack.append(Opaque("frozenset"))
        elif name == "DICT":
            self.stack.append({})
            self._set_items(values)
        elif name == "SETITEMS":
            self._set_items(values)
        elif name == "APPENDS" and type(self.stack[-1]) is list:
            self.stack[-1].extend(values)
        elif name != "POPS" and not isinstance(self.stack[-1], Opaque):
            raise ValueError("its pickle adds values to what holds none")

    def _set_items(self, values):
        holder = self.stack[-1]
        if len(values) % 2 or not isinstance(holder, dict | Opaque):
            raise ValueError("its pickle sets items of what is no dict")
        if isinstance(holder, dict):
            for key, value in zip(values[::2], values[1::2], strict=True):
                holder[_as_key(key)] = value

    def _make(self, name, argument):
        """One instruction that would import or call something."""
        if name in ("GLOBAL", "STACK_GLOBAL"):
            words = argument.split(" ") if name == "GLOBAL" else self._pop(2)
            made = _Global(".".join(words))
        elif name == "BINPERSID":
            made = self._storage(*self._pop(1))
        elif name == "REDUCE":
            made = self._call(*self._pop(2))
        elif name == "INST":
            self._pop_mark()
            made = Opaque(argument.replace(" ", "."))
        elif name == "OBJ":
            made = Opaque(self._pop_mark()[0].name)
        elif name in ("NEWOBJ", "NEWOBJ_EX"):
            made = Opaque(self._pop(2 if name == "NEWOBJ" else 3)[0].name)
        else:  # EXT1, EXT2, EXT4: a number in a table of the process
            made = Opaque(f"extension {argument}")
        self.stack.append(made)

    def _drop_state(self):
        """PyTorch hangs a table of versions, of no use here, on the dict of a state."""
        self._pop(1)
        if not isinstance(self.stack[-1], dict | Opaque):
            raise ValueError("its pickle sets the state of what has none")

    def _storage(self, identity):
        """What a persistent id says: ("storage", class, key, device, elements), in the older format
        followed by what makes it a view of another storage, or None."""
        if type(identity) is not tuple or identity[:1] != ("storage",):
            is_class = type(identity) is tuple and identity[:1] == ("module",)
            return Opaque(identity[1].name if is_class else "persistent id")
        _, kind, key, _, count, *view = identity
        if type(key) is not str or type(count) is not int or count < 0:
            raise ValueError("the key or the length of a storage is none")
        if kind.name in ITEMSIZES:
            self.itemsizes.setdefault(key, ITEMSIZES[kind.name])
        if any(part is not None for part in view):
            return Opaque("a storage that is a part of another")
        if kind.name not in STORAGES:
            return Opaque(kind.name)
        return _Storage(kind.name, key, count)

    def _call(self, function, arguments):
        """What the function would give."""
        name = function.name
        if type(arguments) is not tuple:
            raise ValueError("its pickle calls a function with what are no arguments")
        if type(function) is not _Global:
            return Opaque(name)
        if name in DICTS and len(arguments) <= DICTS[name]:
            return {}
        if name in REBUILD_PARAMETERS and isinstance(arguments[0], np.ndarray | Opaque):
            return arguments[0]
        if name in REBUILD_TENSORS:
            return self._tensor(*arguments)
        if name == REBUILD_TYPED:  # its dtype stands after the hooks
            return Opaque(arguments[6].name)
        if name == REBUILD_FROM_TYPE:
            is_plain = arguments[1].name in PLAIN_TENSORS
            return self._call(arguments[0], arguments[2]) if is_plain else arguments[1]
        return Opaque(name)

    def _tensor(self, storage, offset, size, stride, needs_grad=None, hooks=None, metadata=None):
        """The array that a tensor is of its storage; its metadata tell lazy operations."""
        if type(storage) is not _Storage:
            return Opaque(f"a tensor in {storage.name}")
        _check(storage.count, offset, size, stride)
        if not isinstance(metadata, dict | None):
            raise ValueError("the metadata of a tensor are none")
        unknown = set(metadata or {}) - {"neg", "conj"}  # of real numbers the conjugate is itself
        if unknown or self.arrays is None:
            return Opaque(f"a tensor with {', '.join(map(str, unknown))}")
        array = self.arrays.of(storage, bool(metadata and metadata.get("neg")))
        strides = [step * array.itemsize for step in stride]
        return np.ndarray(size, array.dtype, array, offset * array.itemsize, strides)


def _as_key(key):
    """The key itself for names, and the numbers of an optimizer. Others name no tensor: as marks
    all are distinct, and none is ever hashed or compared."""
    if type(key) is str or (type(key) is int and abs(key) < 2**63):
        return key
    return key if isinstance(key, Opaque) else Opaque(type(key).__name__)


def _check(count, offset, size, stride):
    """Raises ValueError where a tensor reaches out of its storage, or is far larger."""
    numbers = (offset, *size, *stride)
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError("the offset, a size or a stride of a tensor is no count")
    if len(size) != len(stride) or len(size) > MOST_AXES:
        raise ValueError(f"a tensor of {len(size)} axes has {len(stride)} strides")
    reach = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    end = offset + (reach + 1 if 0 not in size else 0)
    if max(numbers) >= 2**63 or end > count or prod(size) > max(count, MOST_REPEATED):
        raise ValueError(f"a tensor of size {size} does not fit into its storage of {count}")


class _Arrays:
    """The storages of a file as arrays (n,), each made once, read-only, in the machine's byte
    order. content: from a key to bytes; order: of the bytes of a number, < or >."""

    def __init__(self, content: Callable[[str], bytes], order: str):
        self.content, self.order, self.made = content, order, {}

    def of(self, storage, negative):
        """All elements, or all with the other sign: a tensor may be stored as minus itself."""
        place = storage.name, storage.key, negative
        if place not in self.made:
            array = -self.of(storage, False) if negative else self._read(storage)
            array.flags.writeable = False
            self.made[place] = array
        if self.made[place].size != storage.count:
            raise ValueError("a storage has two lengths")
        return self.made[place]

    def _read(self, storage):
        content, kind = self.content(storage.key), STORAGES[storage.name]
        itemsize = ITEMSIZES[storage.name]
        if len(content) != storage.count * itemsize:
            raise ValueError(
                f"a storage has {len(content)} bytes where {storage.count} elements of "
                f"{itemsize} were expected"
            )
        if kind == "bf2":
            return widened(np.frombuffer(content, self.order + "u2"))
        wide = "f4" if kind == "f2" else kind
        return np.frombuffer(content, self.order + kind).astype(wide, copy=False)


def widened(bits: np.ndarray) -> np.ndarray:
    """float32 of bfloat16's bits, an array of uint16: exact, they are the upper half of it."""
    return (bits.astype("u4") << 16).view("f4")
