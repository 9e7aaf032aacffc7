"""AMX from Numba: tile registers of 16 rows of 64 bytes, and the product of two of them in bf16.

Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18. LLVM's
instructions take addresses, so whoever calls them sees to it that each byte belongs to an array.
"""

import ctypes
import platform
import sys
from pathlib import Path

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA = 158, 0x1023, 18  # Linux: a process asks for tiles
I8, I32, I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
ROW = ir.VectorType(I32, 16)

CONFIG = np.zeros(64, np.uint8)  # palette 1, eight tiles of 16 rows of 64 bytes
CONFIG[0] = 1
CONFIG[16:32].view(np.uint16)[:] = 64
CONFIG[48:56] = 16


def has_tiles():
    """Whether this processor has AMX for bf16, and the system lets this process use it."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    words = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    if not {"amx_tile", "amx_bf16"} <= set(words):
        return False
    return ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0


def _call(builder, name, *arguments):
    kinds = [argument.type for argument in arguments]
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), kinds), f"llvm.x86.{name}"
    )
    builder.call(function, arguments)


def _at(builder, address):
    return builder.inttoptr(address, I8.as_pointer())


@intrinsic
def begin_tiles(typingctx, config):
    """Gives the tile registers their shapes, from the 64 bytes at an address."""

    def generate(context, builder, signature, arguments):
        _call(builder, "ldtilecfg", _at(builder, arguments[0]))
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def end_tiles(typingctx):
    """Gives the tile registers up."""

    def generate(context, builder, signature, arguments):
        _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def zero_tiles(typingctx):
    """The block of four accumulators, 32 x 32, becomes 0."""

    def generate(context, builder, signature, arguments):
        for tile in range(4):
            _call(builder, "tilezero", I8(tile))
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def multiply_tiles(typingctx, a, lda, b, ldb):
    """Adds a product to the block: a, the address of 32 rows of 32 bf16, lda bytes apart, times b,
    of 16 rows of 32 pairs of bf16."""

    def generate(context, builder, signature, arguments):
        a, lda, b, ldb = arguments
        below = builder.add(a, builder.mul(lda, I64(16)))
        addresses = [(4, a, lda), (6, b, ldb), (7, builder.add(b, I64(64)), ldb), (5, below, lda)]
        for tile, address, step in addresses:
            _call(builder, "tileloadd64", I8(tile), _at(builder, address), step)
        for tile, left, right in ((0, 4, 6), (1, 4, 7), (2, 5, 6), (3, 5, 7)):
            _call(builder, "tdpbf16ps", I8(tile), I8(left), I8(right))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic
def store_tiles(typingctx, c, ldc):
    """Writes the block, 32 rows of 32 float32, ldc bytes apart, to an address."""

    def generate(context, builder, signature, arguments):
        c, ldc = arguments
        below = builder.add(c, builder.mul(ldc, I64(16)))
        for tile, address in ((0, c), (1, builder.add(c, I64(64)))):
            _call(builder, "tilestored64", I8(tile), _at(builder, address), ldc)
        for tile, address in ((2, below), (3, builder.add(below, I64(64)))):
            _call(builder, "tilestored64", I8(tile), _at(builder, address), ldc)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def transpose_square(typingctx, x, ldx, out, ldo):
    """The transpose of 16 rows of 16 words of four bytes, from address to address."""

    def generate(context, builder, signature, arguments):
        x, ldx, out, ldo = arguments
        rows = []
        for i in range(16):
            address = builder.add(x, builder.mul(ldx, I64(i)))
            rows.append(builder.load(builder.inttoptr(address, ROW.as_pointer())))
            rows[-1].align = 2
        for step in (1, 2, 4, 8):  # swaps the squares of this size beside the diagonal
            for i in (i for i in range(16) if not i & step):
                rows[i], rows[i | step] = _exchanged(builder, rows[i], rows[i | step], step)
        for i, row in enumerate(rows):
            address = builder.add(out, builder.mul(ldo, I64(i)))
            builder.store(row, builder.inttoptr(address, ROW.as_pointer())).align = 4
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


def _exchanged(builder, upper, lower, step):
    """Two rows, after the upper one's words of odd multiples of step have changed places with the
    lower one's of even ones."""
    columns = range(16)
    to_upper = [16 + (c ^ step) if c & step else c for c in columns]
    to_lower = [16 + c if c & step else c ^ step for c in columns]
    index = ir.VectorType(I32, 16)
    return [
        builder.shuffle_vector(upper, lower, ir.Constant(index, order))
        for order in (to_upper, to_lower)
    ]
