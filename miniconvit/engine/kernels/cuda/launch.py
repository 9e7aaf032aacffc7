"""The kernels of `kernels.cu`, compiled for a type and a precision, and how they are launched."""

from functools import lru_cache
from importlib.resources import files

from .product import Products

LANES, WARPS = 32, 8  # threads of a row, rows of a block
BLOCKS = 1024  # that go over a flat buffer
SHARED = 48 * 1024  # bytes that a block has on every GPU


def source(dtype, precision):
    """The CUDA C++ of all kernels for arithmetic in dtype and products in a precision."""
    T = {"float32": "float", "float64": "double"}[dtype]
    S = "bf16" if precision == "bf16" else "T"
    head = f"struct bf16 {{ unsigned short bits; }};\ntypedef {T} T;\ntypedef {S} S;\n"
    return head + files(__package__).joinpath("kernels.cu").read_text(encoding="utf-8")


@lru_cache(maxsize=8)
def kernels_for(xp, dtype="float32", precision="float32"):
    """The Kernels of the array module xp, made once."""
    return Kernels(xp, dtype, precision)


class Kernels:
    """Compiled kernels, cuBLAS, and empty arrays for both.

    dtype: of all arrays but those that products read; operand: of these, bfloat16 as uint16.
    """

    def __init__(self, xp, dtype, precision):
        self.xp, self.precision, self._array = xp, precision, xp.ndarray
        self.dtype = xp.float32 if dtype == "float32" else xp.float64
        self.operand = xp.uint16 if precision == "bf16" else self.dtype
        self._module = xp.RawModule(code=source(dtype, precision), options=("-std=c++17",))
        self._functions, self._ones = {}, {}
        self.product = Products(xp, precision)

    def launch(self, name, blocks, *args, warps=WARPS, shared=0):
        """A kernel on so many blocks. args: arrays, in C order; None, a pointer to nothing; ints
        and floats. shared: bytes for each block."""
        function = self._functions.get(name)
        if function is None:
            function = self._functions[name] = self._module.get_function(name)
        args = tuple([0 if arg is None else arg for arg in args])
        for arg in args:
            if type(arg) is self._array and not arg.flags.c_contiguous:
                raise ValueError(f"{name} is given an array of strides {arg.strides}")
        function((blocks,), (LANES, warps), args, shared_mem=shared)

    def rows(self, name, count, *args):
        """A kernel that gives each of `count` rows to a warp."""
        self.launch(name, min(-(-count // WARPS), 65535), *args)

    def flat(self, name, n, *args, shared=0):
        """A kernel that gives each of n elements to a thread."""
        self.launch(name, self.blocks(n), *args, shared=shared)

    def blocks(self, n):
        """Blocks that share n elements of a flat buffer."""
        return min(-(-n // (LANES * WARPS)), BLOCKS)

    def warps(self, numbers):
        """(warps, bytes) of a block whose warps share memory of so many numbers each."""
        size = numbers * self.dtype(0).itemsize
        count = max(1, min(WARPS, SHARED // size))
        return count, count * size

    def empty(self, *shape):
        """An array of the arithmetic's type."""
        return self.xp.empty(shape, self.dtype)

    def empty_operand(self, *shape):
        """An array of the type that products read."""
        return self.xp.empty(shape, self.operand)

    def sum_rows(self, rows, out):
        """out (D,) = the sum of rows (R, D), as a product: one kernel that fills the device, where
        a sum over the first axis would run on a few of its processors."""
        R, key = len(rows), (len(rows), rows.dtype)
        ones = self._ones.get(key)
        if ones is None:
            one = 0x3F80 if rows.dtype == self.xp.uint16 else 1  # bfloat16's bits of 1
            ones = self._ones[key] = self.xp.full((1, R), one, rows.dtype)
        self.product(ones, rows, out=out.reshape(1, -1))
