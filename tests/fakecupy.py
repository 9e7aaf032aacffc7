"""A strict stand-in for CuPy: "device" arrays that no NumPy function may touch.

It computes with NumPy, but refuses whatever CuPy refuses or makes slow. Stricter than CuPy:
NumPy's functions are refused and not forwarded, NumPy scalars are no operands, an index out of
range raises (CuPy wraps it), and only the names that the product uses exist. It counts waits for
the device, uploads and allocations, knows a memory limit, and can forbid waits (as the capture of
a graph does), uploads and float64.

It also counts what CuPy 14.2 gives the device to do: kernels launched, the bytes that they read and
write, and products, which are cuBLAS's and have bytes of their own.
"""

import ctypes
import re
import sys
from contextlib import contextmanager
from math import prod
from types import ModuleType, SimpleNamespace

import fakecuda
import numpy as np
from scipy.special import erf as host_erf

STATE = SimpleNamespace()
NUMBERS = (bool, int, float)


def reset():
    """Counters to zero; nothing forbidden, no limit. What lives on is another count's."""
    vars(STATE).update(waits=0, uploads=0, allocations=0, copies=0, used=0, reserved=0)
    vars(STATE).update(count=object())
    vars(STATE).update(launches=0, bytes=0, products=0)
    vars(STATE).update(limit=None, forbidden=set(), recorded=None, graphs=0)


reset()


class Refused(TypeError):
    """What CuPy does not do, or should not do here."""


class OutOfMemoryError(MemoryError):
    """As cupy.cuda.memory.OutOfMemoryError."""


@contextmanager
def forbid(*things):
    """No "wait", no "upload", no "float64" while it lasts."""
    before, STATE.forbidden = STATE.forbidden, STATE.forbidden | set(things)
    try:
        yield
    finally:
        STATE.forbidden = before


@contextmanager
def memory_limit(more):
    """So many more bytes may be allocated while it lasts."""
    STATE.limit = STATE.used + more
    try:
        yield
    finally:
        STATE.limit = None


def wait(what):
    """Called wherever the host needs a value of the device."""
    if "wait" in STATE.forbidden:
        raise Refused(f"{what} waits for the device")
    STATE.waits += 1


class Memory:
    """A piece of device memory, counted while it lives."""

    def __init__(self, size):
        self.size, self.count = 0, STATE.count
        if STATE.limit is not None and STATE.used + size > STATE.limit:
            raise OutOfMemoryError(f"out of memory allocating {size:,} bytes")
        self.size = size
        STATE.used += size
        STATE.allocations += 1
        STATE.reserved = max(STATE.reserved, STATE.used)

    def __del__(self):
        if STATE is not None and self.count is STATE.count:  # None as Python ends
            STATE.used -= self.size


def root(array):
    """The array that owns the memory of a view."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def host(x):
    """The NumPy array behind an operand; Python numbers pass."""
    if isinstance(x, DArray):
        return x._host
    if type(x) in NUMBERS:
        return x
    raise Refused(f"unsupported type {type(x)} beside a device array")


def given(work):
    """Does what the device is given to do, or notes it where a graph is being recorded."""
    if STATE.recorded is None:
        return work()
    STATE.recorded.append(work)
    return 0


def launch(*arrays, kernels=1):
    """Counts kernels, each of which reads or writes these NumPy arrays. What has no `work` to give
    is computed at once, and so cannot be recorded."""
    if STATE.recorded is not None:
        raise NotImplementedError("the stand-in cannot record this")
    STATE.launches += kernels
    STATE.bytes += kernels * sum(unrepeated(x) for x in arrays if isinstance(x, np.ndarray))


def write(target, value):
    """One kernel that writes a value or an array to a NumPy array."""
    STATE.launches += 1
    STATE.bytes += unrepeated(target) + (value.nbytes if isinstance(value, np.ndarray) else 0)
    given(lambda: target.__setitem__(..., value))


def unrepeated(x):
    """The bytes of an array in memory, where an axis of stride 0 has one element."""
    return x.itemsize * prod(n for n, step in zip(x.shape, x.strides, strict=True) if step or not n)


def computed(*operands, result, kernels=1):
    """What a kernel makes of NumPy operands: in C order, whatever theirs is."""
    result = np.asarray(result, order="C")
    launch(*operands, result, kernels=kernels)
    return new(result)


def in_range(*operands):
    """Raises OverflowError, as CuPy does, for a Python integer that the arrays beside it cannot
    hold."""
    dtypes = [x.dtype for x in operands if isinstance(x, np.ndarray)]
    if dtypes and (dtype := np.result_type(*dtypes)).kind in "iu":
        for x in operands:
            if type(x) is int:
                dtype.type(x)


def new(result, *sources):
    """A device array of a NumPy result: a view of one of the sources, or with memory of its own."""
    result = np.asarray(result)
    if result.dtype == np.float64 and "float64" in STATE.forbidden:
        raise Refused("a float64 array in a float32 computation")
    array = DArray.__new__(DArray)
    if STATE.recorded is not None:
        STATE.kept.append(array)  # the graph goes on using it
    for source in sources:
        if root(result) is root(source._host):
            array._host, array._memory = result, source._memory
            return array
    array._memory = Memory(result.nbytes)
    array._host = result.copy() if result.base is not None else result
    return array


def binary(function, swapped=False):
    def method(self, other):
        x, y = host(self), host(other)
        with np.errstate(all="ignore"):
            return computed(x, y, result=function(y, x) if swapped else function(x, y))

    return method


def in_place(function):
    def method(self, other):
        with np.errstate(all="ignore"):
            function(self._host, host(other), out=self._host)
        launch(self._host, host(other), self._host)
        return self

    return method


def operand(x):
    """A factor of a product, copied where cuBLAS is not given it as it is."""
    if not isinstance(x, DArray) or x.ndim < 2:
        raise Refused("a product takes device arrays of two or more axes")
    flags = x._host.flags
    if flags.c_contiguous or (x.ndim == 2 and flags.f_contiguous):
        return x
    STATE.copies += 1
    return x.copy()


def matmul(x, y):
    """As CuPy's: one product, or where a factor serves several others pointers to each, which three
    kernels for each axis make."""
    if isinstance(x, DArray) and isinstance(y, DArray) and x.dtype != y.dtype:
        raise Refused(f"a product of {x.dtype} and {y.dtype}")
    x, y = operand(x), operand(y)
    if x.dtype not in (np.float32, np.float64):
        raise Refused(f"no cuBLAS product of {x.dtype}")
    if STATE.recorded is not None:
        raise NotImplementedError(
            "calling cuBLAS API during stream capture is currently unsupported"
        )
    STATE.products += 1
    if x.shape[:-2] != y.shape[:-2]:
        launch(kernels=3 * (max(x.ndim, y.ndim) - 2))
    with np.errstate(all="ignore"):
        return new(x._host @ y._host)


def reduction(name, kernels=1):
    """kernels: of a mean two, a sum and a division."""

    def method(self, axis=None, keepdims=False):
        with np.errstate(all="ignore"):
            result = getattr(np, name)(self._host, axis=axis, keepdims=keepdims)
        launch(self._host, np.asarray(result))
        return computed(result, result=result, kernels=kernels - 1)

    return method


def viewing(name):
    def method(self, *args):
        seen = new(getattr(self._host, name)(*args), self)
        if seen._memory is not self._memory:  # another order of the elements is a copy
            launch(self._host, seen._host)
        return seen

    return method


def refuse(what):
    def method(self, *args, **kwargs):
        raise Refused(f"{what}: a device array is not converted to a NumPy array by itself")

    return method


def index(key):
    """An index for the NumPy array, of what CuPy takes without waiting."""
    if isinstance(key, tuple):
        return tuple(index(part) for part in key)
    if isinstance(key, DArray):
        if key.dtype == bool:
            wait("an index of booleans")
        return key._host
    if key is None or key is Ellipsis or type(key) is int:
        return key
    if isinstance(key, slice):
        key = index(key.start), index(key.stop), index(key.step)
        if not any(isinstance(end, np.ndarray) for end in key):
            return slice(*key)
    raise Refused(f"an index of type {type(key)}")


class DArray:
    """As cupy.ndarray, as far as the product uses it."""

    __slots__ = ("_host", "_memory")
    __hash__ = None

    shape = property(lambda self: self._host.shape)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    dtype = property(lambda self: self._host.dtype)
    strides = property(lambda self: self._host.strides)
    flags = property(lambda self: self._host.flags)
    data = property(lambda self: SimpleNamespace(ptr=self._host.ctypes.data))
    T = property(lambda self: new(self._host.T, self))

    reshape, transpose, swapaxes = viewing("reshape"), viewing("transpose"), viewing("swapaxes")
    sum, mean, max, all = reduction("sum"), reduction("mean", 2), reduction("max"), reduction("all")
    min = reduction("min")

    __array__ = refuse("numpy.asarray")
    __array_ufunc__ = refuse("a NumPy ufunc, or arithmetic with a NumPy array")
    __array_function__ = refuse("a NumPy function")
    __matmul__ = matmul

    def argmax(self, axis=None):
        return computed(self._host, result=self._host.argmax(axis=axis))

    def astype(self, dtype, copy=True):
        if not copy and self.dtype == dtype:
            return self
        with np.errstate(all="ignore"):
            return computed(self._host, result=self._host.astype(dtype, order="C"))

    def copy(self):
        copied = new(np.empty(self.shape, self.dtype))
        write(copied._host, self._host)
        return copied

    def get(self):
        wait("get")
        return self._host.copy()

    def item(self):
        wait("item")
        return self._host.item()

    def __len__(self):
        return len(self._host)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __getitem__(self, key):
        part = new(self._host[index(key)], self)
        if part._memory is not self._memory:  # places, not a slice
            launch(part._host, part._host)
        return part

    def __setitem__(self, key, value):
        key, value = index(key), host(value)
        if isinstance(part := self._host[key], np.ndarray) and root(part) is root(self._host):
            return write(part, value)
        self._host[key] = value  # to places, or to one element
        launch(value, self._host[key])

    def __neg__(self):
        return computed(self._host, result=-self._host)

    def __abs__(self):
        return computed(self._host, result=abs(self._host))

    def __divmod__(self, other):
        return self // other, self % other


for name in ("float", "int", "bool"):

    def convert(self, name=f"__{name}__"):
        wait(name)
        return getattr(self._host.item(), name)()

    setattr(DArray, f"__{name}__", convert)

OPERATORS = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "truediv": np.true_divide,
    "floordiv": np.floor_divide,
    "mod": np.remainder,
    "xor": np.bitwise_xor,
    "rshift": np.right_shift,
    "lshift": np.left_shift,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
}
for name, function in OPERATORS.items():
    setattr(DArray, f"__{name}__", binary(function))
    setattr(DArray, f"__r{name}__", binary(function, swapped=True))
    setattr(DArray, f"__i{name}__", in_place(function))
for name in ("eq", "ne", "lt", "le", "gt", "ge"):
    names = {"eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal"}
    names |= {"gt": "greater", "ge": "greater_equal"}
    setattr(DArray, f"__{name}__", binary(getattr(np, names[name])))


def elementwise(function):
    def on_device(*args):
        args = [host(x) for x in args]
        in_range(*args)
        with np.errstate(all="ignore"):
            return computed(*args, result=function(*args))

    return on_device


def asarray(x, dtype=None):
    if isinstance(x, DArray):
        return x if dtype in (None, x.dtype) else x.astype(dtype)
    if "upload" in STATE.forbidden:
        raise Refused(f"{x!r} is sent to the device")
    STATE.uploads += 1
    return new(np.array(x, dtype=dtype))


def joining(function):
    def on_device(arrays, axis=0):
        if any(type(x) is not DArray for x in arrays):
            raise Refused("only device arrays can be joined")
        for x in arrays:  # a kernel for each
            launch(x._host, x._host)
        return new(function([x._host for x in arrays], axis=axis))

    return on_device


def where(condition, x, y):
    condition, x, y = host(condition), host(x), host(y)
    in_range(x, y)
    return computed(condition, x, y, result=np.where(condition, x, y))


def pad(array, pad_width):
    return computed(host(array), result=np.pad(host(array), pad_width))


def full(shape, value, dtype):
    return computed(result=np.full(shape, host(value), dtype))


def empty(shape, dtype):
    """Memory as it happens to be: what is not a number."""
    host = np.empty(shape, dtype)
    host.reshape(-1)[: 2**18].view(np.uint8)[...] = 0xFF
    return new(host)


def zeros(shape, dtype):
    array = new(np.zeros(shape, dtype))
    given(lambda: array._host.__setitem__(..., 0))
    return array


def ascontiguousarray(x):
    return x if x.flags.c_contiguous else x.copy()


def broadcast_to(array, shape):
    return new(np.broadcast_to(host(array), shape), array)


def atleast_1d(array):
    return new(np.atleast_1d(host(array)), array)


def free_all_blocks():
    STATE.reserved = STATE.used


FUNCTIONS = {
    "ndarray": DArray,
    "exp": elementwise(np.exp),
    "log": elementwise(np.log),
    "sqrt": elementwise(np.sqrt),
    "tanh": elementwise(np.tanh),
    "sin": elementwise(np.sin),
    "abs": elementwise(np.abs),
    "sign": elementwise(np.sign),
    "logaddexp": elementwise(np.logaddexp),
    "cos": elementwise(np.cos),
    "floor": elementwise(np.floor),
    "rint": elementwise(np.rint),
    "clip": elementwise(np.clip),
    "minimum": elementwise(np.minimum),
    "maximum": elementwise(np.maximum),
    "sort": elementwise(np.sort),
    "searchsorted": elementwise(np.searchsorted),
    "take": elementwise(np.take),
    "isfinite": elementwise(np.isfinite),
    "where": where,
    "pad": pad,
    "full": full,
    "empty": empty,
    "eye": lambda n, dtype: computed(result=np.eye(n, dtype=dtype)),
    "ascontiguousarray": ascontiguousarray,
    "asarray": asarray,
    "atleast_1d": atleast_1d,
    "broadcast_to": broadcast_to,
    "stack": joining(np.stack),
    "concatenate": joining(np.concatenate),
    "arange": lambda *ends, dtype=None: computed(result=np.arange(*ends, dtype=dtype)),
    "full_like": lambda x, value: computed(result=np.full_like(host(x), host(value))),
    "zeros": zeros,
    "zeros_like": lambda x: new(np.zeros_like(host(x))),
    "float32": np.float32,
    "float64": np.float64,
    "uint8": np.uint8,
    "uint16": np.uint16,
    "int64": np.int64,
    "uint64": np.uint64,
    "get_default_memory_pool": lambda: SimpleNamespace(
        free_all_blocks=free_all_blocks, total_bytes=lambda: STATE.reserved
    ),
}


class RawModule:
    """As cupy.RawModule; kernels run on lanes that are `LANES`, and every argument is held to the
    type that the kernel declares."""

    LANES = 1

    def __init__(self, code, options=()):
        self._code, self._lanes = code, RawModule.LANES
        self._signatures = fakecuda.signatures(code)
        typed = {b: a for a, b in re.findall(r"^typedef (\w+) (T|S);$", code, re.M)}
        T = {"float": np.float32, "double": np.float64}[typed["T"]]
        S = np.uint16 if typed["S"] == "bf16" else T
        self._types = {"T": T, "S": S, "i64": np.int64, "u8": np.uint8, "double": np.float64}

    def get_function(self, name):
        declared, kernel = self._signatures[name], None

        def call(grid, block, args, shared_mem=0):
            nonlocal kernel
            kernel = kernel or getattr(fakecuda.compiled(self._code, self._lanes), f"launch_{name}")
            if len(args) != len(declared) or shared_mem > 48 * 1024 or grid[0] < 1:
                raise Refused(f"{name}{grid} of {len(args)} arguments, {shared_mem} bytes")
            sent = [self._sent(name, *pair) for pair in zip(declared, args, strict=True)]
            pointers = (ctypes.c_void_p * len(sent))(*map(ctypes.addressof, sent))
            block = (1, 1) if self._lanes == 1 else block
            STATE.launches += 1
            if given(lambda keep=(sent, args): kernel(grid[0], *block, pointers)):
                raise Refused(f"{name}: threads wait for others that never come")

        return call

    def _sent(self, name, declaration, arg):
        """An argument as C takes it, where it is what is declared; its bytes are counted."""
        kind, called = declaration
        if not kind.endswith("*"):
            if type(arg) is not {"i64": int, "double": float}[kind]:
                raise Refused(f"{name}: {called} is {kind}, not {arg!r}")
            return {"i64": ctypes.c_longlong, "double": ctypes.c_double}[kind](arg)
        if type(arg) is int and arg == 0:
            return ctypes.c_void_p(0)
        dtype = self._types[kind.strip("* ").split()[-1]]
        if not isinstance(arg, DArray) or arg.dtype != dtype or not arg.flags.c_contiguous:
            raise Refused(f"{name}: {called} is {kind}, not {getattr(arg, 'dtype', arg)}")
        STATE.bytes += arg._host.nbytes * (2 if "BOTH" in kind else 1)
        return ctypes.c_void_p(arg.data.ptr)


def product(work):
    STATE.products += 1
    given(work)


class Stream:
    """As cupy.cuda.Stream; it records a graph by noting what it is given."""

    current = SimpleNamespace(ptr=0, synchronize=lambda: wait("synchronize"))

    def __init__(self, non_blocking=False):
        self.ptr, self._forbidden = 1, None

    def __enter__(self):
        self._before, Stream.current = Stream.current, self
        return self

    def __exit__(self, *exception):
        Stream.current = self._before

    def synchronize(self):
        wait("synchronize")

    def begin_capture(self):
        self._forbidden = forbid("wait", "upload")
        self._forbidden.__enter__()
        STATE.recorded, STATE.kept = [], []

    def end_capture(self):
        recorded, STATE.recorded = STATE.recorded, None
        self._forbidden.__exit__(None, None, None)
        return Graph(recorded, STATE.kept)


class Graph:
    """As cupy.cuda.Graph: one launch, whatever is in it."""

    def __init__(self, recorded, kept):
        self._recorded, self._kept = recorded, kept

    def launch(self, stream):
        STATE.graphs += 1
        STATE.launches += 1
        for work in self._recorded:
            work()


@contextmanager
def using_allocator(allocator):
    yield


RUNTIME = {
    "getDeviceCount": lambda: 1,
    "getDeviceProperties": lambda device: {"name": b"Stand-in"},
    "memGetInfo": lambda: (6_000_000_000, 8_000_000_000),
    "runtimeGetVersion": lambda: 13020,
}


def modules():
    """Name to module of a fresh stand-in for cupy and the part of cupyx that is used."""
    cupy = ModuleType("cupy")
    vars(cupy).update(FUNCTIONS, __version__="14.2.0", RawModule=RawModule)
    cupy.cuda = SimpleNamespace(
        runtime=SimpleNamespace(**RUNTIME),
        get_current_stream=lambda: Stream.current,
        Stream=Stream,
        MemoryPool=lambda: SimpleNamespace(malloc=None, total_bytes=lambda: 0),
        using_allocator=using_allocator,
    )
    special = ModuleType("cupyx.scipy.special")
    special.erf = elementwise(host_erf)
    return {"cupy": cupy, "cupyx.scipy.special": special}


def install(monkeypatch):
    """Puts the stand-in in CuPy's place for one test, on a machine that seems to have a driver for
    it. Returns the module."""
    reset()
    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("miniconvit.engine.cuda._driver_version", lambda: 13000)
    monkeypatch.setattr("miniconvit.engine.cuda._compute_capability", lambda: 90)
    monkeypatch.setattr("miniconvit.engine.cuda._find_cache", lambda: None)
    cublas = fakecuda.Cublas(product)
    monkeypatch.setattr("miniconvit.engine.kernels.cuda.product.load_cublas", lambda: cublas)
    if not fakecuda.COMPILER:  # whole trainings run on the layers then
        monkeypatch.setattr("miniconvit.engine.gpu.kernels", None)
    monkeypatch.setattr("miniconvit.engine.cuda._wheels", lambda: {"cupy-cuda13x": "14.2.0"})
    return sys.modules["cupy"]


DArray.__module__ = "cupy"
DArray.__name__ = DArray.__qualname__ = "ndarray"
