"""Tiles on the emulator of AMX: against NumPy and the Intel SDM, and what has to be refused."""

import ctypes
import faulthandler
import mmap
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path

import amx
import numpy as np
import pytest

numba = pytest.importorskip("numba")
extending = pytest.importorskip("numba.extending")
binding = pytest.importorskip("llvmlite.binding")
ir = pytest.importorskip("llvmlite.ir")

I8, I64, VOID = ir.IntType(8), ir.IntType(64), ir.VoidType()
PRODUCT = (
    "ldtilecfg config",
    "tileloadd64 0 c ldc",
    "tileloadd64 1 a lda",
    "tileloadd64 2 b ldb",
    "tdpbf16ps 0 1 2",
    "tilestored64 0 c ldc",
    "tilerelease",
)
TINY = np.float32(2.0**-126)  # the smallest number that is not denormal


@pytest.fixture(autouse=True, scope="module")
def tiles():
    return amx.emulate()


@pytest.fixture
def emulated(tiles):
    if not tiles.emulated:
        pytest.skip("silicon is less strict")
    return tiles


@cache
def program(*steps):
    """Compiles LLVM's intrinsics, one a step: `name tiles address stride`. Call it with the words.

    A step that begins with a percent sign or a dot is assembly without operands.
    """
    words = [word for step in steps if step[0] not in "%." for word in step.split()[1:]]
    names = sorted({word for word in words if not word.isdigit()})

    def codegen(context, builder, signature, args):
        table = builder.inttoptr(args[0], I64.as_pointer())
        values = {n: builder.load(builder.gep(table, [I64(i)])) for i, n in enumerate(names)}
        for step in steps:
            if step[0] in "%.":
                assembly(builder, step.lstrip("%"))
                continue
            name, *words = step.split()
            operands = [I8(int(word)) for word in words if word.isdigit()]
            for i, word in enumerate(word for word in words if not word.isdigit()):
                value = values[word]
                operands.append(value if i else builder.inttoptr(value, I8.as_pointer()))
            kind = ir.FunctionType(VOID, [operand.type for operand in operands])
            builder.call(builder.module.declare_intrinsic(f"llvm.x86.{name}", fnty=kind), operands)
        return context.get_dummy_value()

    return compiled(codegen, names)


def compiled(codegen, names):
    """A function of keywords, each an integer, which LLVM code finds in a table."""
    binding.initialize_native_asmparser()

    @extending.intrinsic
    def emit(typing, table):
        return numba.types.void(numba.types.int64), codegen

    @numba.njit(nogil=True)
    def run(table):
        emit(table)

    def call(**values):
        table = np.array([values[name] for name in names], np.int64)
        run(table.ctypes.data)

    return call


def assembly(builder, text, constraints="", operands=()):
    kind = ir.FunctionType(VOID, [operand.type for operand in operands])
    clobbers = f"{constraints},~{{memory}}".lstrip(",")
    builder.asm(kind, text, clobbers, list(operands), side_effect=True)


def config(*shapes):
    """The 64 bytes of a configuration: (rows, bytes a row) of each tile."""
    data = np.zeros(64, np.uint8)
    data[0] = 1
    for t, (rows, bytes_a_row) in enumerate(shapes):
        data[48 + t] = rows
        data[16 + 2 * t : 18 + 2 * t] = bytes_a_row & 255, bytes_a_row >> 8
    return data


def shapes_of(m, n, pairs):
    return config((m, 4 * n), (m, 4 * pairs), (pairs, 4 * n))


def bf16(x):
    """The nearest bf16 below in size, as uint16: exact for what is one already."""
    return (np.asarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def wide(x):
    return (x.astype(np.uint32) << 16).view(np.float32)


def paired(b):
    """(K, N) to (K/2, 2 N): rows k and k + 1 side by side, which is how tiles hold B."""
    pairs, n = b.shape[0] // 2, b.shape[1]
    return b.reshape(pairs, 2, n).swapaxes(1, 2).reshape(pairs, 2 * n)


def product(a, b, c=None, room=0):
    """C + A B by one instruction. a (m, K) and b (K, n) are bf16; rows lie `room` numbers apart."""
    (m, depth), n = a.shape, b.shape[1]
    c = np.zeros((m, n), np.float32) if c is None else c
    a, b, c = (padded(x, room) for x in (a, paired(b), c))
    before = c.copy()
    shapes = shapes_of(m, n, depth // 2)
    places = {"a": a.ctypes.data, "b": b.ctypes.data, "c": c.ctypes.data}
    strides = {"lda": a.strides[0], "ldb": b.strides[0], "ldc": c.strides[0]}
    program(*PRODUCT)(config=shapes.ctypes.data, **places, **strides)
    np.testing.assert_array_equal(c[:, n:], before[:, n:])
    return c[:, :n]


def padded(x, room):
    return np.pad(x, ((0, 0), (0, 2 * room)), constant_values=7)


def by_the_manual(a, b, c):
    """The SDM's order in float32: even and odd members apart, each other, then C.

    A product of two bf16 has 16 bits, so a multiplication and an addition are as good as fused.
    """
    a, b = wide(a), wide(b)
    even, odd = np.zeros_like(c), np.zeros_like(c)
    for k in range(0, a.shape[1], 2):
        even = even + a[:, k, None] * b[k]
        odd = odd + a[:, k + 1, None] * b[k + 1]
    return c + (even + odd)


def one_number(*pairs, c=0.0):
    """C + the products of pairs (a, b), by tiles of one row and one column."""
    a, b = np.array(pairs, np.float32).T
    return product(bf16(a[None]), bf16(b[:, None]), np.full((1, 1), c, np.float32))[0, 0]


def death(task):
    """The signal that ends a forked child which runs `task`, or 0, and its standard error."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with suppress(BaseException), open(os.devnull, "w") as nothing:
            os.dup2(writer, 2)
            if faulthandler.is_enabled():  # disabling it would take the emulator's handler away
                faulthandler.enable(nothing)
            task()
            os._exit(0)
        os._exit(1)
    os.close(writer)
    with open(reader) as errors:
        text = errors.read()
    status = os.waitpid(child, 0)[1]
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0, "the child raised an exception"
    return (os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0), text


SHAPES = [(16, 16, 32), (1, 1, 2), (3, 5, 14), (16, 1, 32), (1, 16, 2), (7, 16, 30), (16, 9, 4)]


@pytest.mark.parametrize("room", [0, 3])
@pytest.mark.parametrize(("m", "n", "depth"), SHAPES)
def test_products_are_those_of_numpy_and_bit_for_bit_those_of_the_manual(m, n, depth, room):
    rng = np.random.default_rng(m * n + depth)
    a, b = bf16(rng.standard_normal((m, depth))), bf16(rng.standard_normal((depth, n)))
    c = rng.standard_normal((m, n)).astype(np.float32)
    got = product(a, b, c, room)
    np.testing.assert_array_equal(got, by_the_manual(a, b, c))
    # A number passes through at most depth / 2 + 2 roundings, each of at most 2^-24 of what it is.
    exact = wide(a).astype(float) @ wide(b) + c
    sizes = abs(wide(a)).astype(float) @ abs(wide(b)) + abs(c)
    assert (abs(got - exact) <= (depth / 2 + 3) * 2.0**-24 * sizes).all()


def test_small_integers_are_exact():
    rng = np.random.default_rng(0)
    a, b, c = (
        rng.integers(-128, 129, s).astype(np.float32) for s in ((16, 32), (32, 16), (16, 16))
    )
    np.testing.assert_array_equal(product(bf16(a), bf16(b), c), a @ b + c)


def test_denormals_count_as_zero_and_become_zero():
    denormal = TINY / 2
    assert one_number((denormal, 2.0**100), (1, 1)) == 1
    assert one_number((2.0**100, denormal), (0, 0)) == 0
    assert one_number((0, 0), (0, 0), c=denormal) == 0
    assert one_number((2.0**-70, 2.0**-70), (0, 0)) == 0
    assert one_number((TINY, 1), (0, 0)) == TINY
    assert one_number((-TINY, 1), (0, 0), c=1.5 * TINY) == 0


def test_products_are_fused_to_their_sum():
    # A product alone would be flushed to zero, or infinite.
    assert one_number((TINY, 1), (0, 0), (2.0**-70, 2.0**-70), (0, 0)) == TINY + 2.0**-140
    assert one_number((-(2.0**100), 2.0**27), (0, 0), (2.0**64, 2.0**64), (0, 0)) == 2.0**127


def test_ties_go_to_the_even_neighbour():
    assert one_number((1, 1), (0, 0), (2.0**-24, 1), (0, 0)) == 1
    assert one_number((1, 1), (0, 0), (2.0**-24, 3), (0, 0)) == 1 + 2.0**-22


def test_even_and_odd_members_meet_at_the_end():
    # One chain over all members would lose the two halves of the last bit, one after the other.
    half = 2.0**-24
    assert one_number((half, 1), (1, 1), (half, 1), (0, 0)) == 1 + 2 * half
    assert one_number((half, 1), (0, 0), (half, 1), (0, 0), c=1) == 1 + 2 * half


def test_nan_and_infinity_are_carried_and_stay_in_their_column():
    a, b = np.ones((3, 8), np.float32), np.ones((8, 5), np.float32)
    a[0, 2], a[1, 5], b[1, 4] = np.inf, np.nan, -np.inf
    b[2, 1] = 0
    got = product(bf16(a), bf16(b))
    inf, nan = np.inf, np.nan
    expected = [[inf, nan, inf, inf, nan], [nan] * 5, [8, 7, 8, 8, -inf]]
    np.testing.assert_array_equal(got, np.array(expected, np.float32))


@pytest.mark.parametrize("step", ["tilezero 0", "ldtilecfg config"])
def test_tiles_become_zero(step):
    data, shapes = np.arange(1, 17, dtype=np.float32), config((4, 16))
    out = np.ones_like(data)
    places = {"config": shapes.ctypes.data, "a": data.ctypes.data, "out": out.ctypes.data}
    steps = ("ldtilecfg config", "tileloadd64 0 a ld", step, "tilestored64 0 out ld", "tilerelease")
    program(*steps)(**places, ld=16)
    assert (out == 0).all()


def test_the_program_keeps_its_own_way_of_rounding():
    @numba.njit
    def halves(x):
        return x * np.float32(0.5)

    one_number((1, 1), (1, 1))
    assert halves(TINY) == TINY / 2


REGISTERS = ["rax", "rcx", "rdx", "rbx", "rsi", "rdi", *(f"r{i}" for i in range(8, 16)), "rbp"]
PLACES = [
    (base, REGISTERS[(i + j) % len(REGISTERS)], (1, 2, 4, 8)[(i + j) % 4], displacement)
    for i, base in enumerate(REGISTERS)
    for j, displacement in ((1, 0), (2, 8), (4, -128), (7, 4096))
]


def test_every_form_of_an_address_is_understood():
    """LLVM's assembler writes the addresses; NumPy knows what lies there."""

    def codegen(context, builder, signature, args):
        table = builder.inttoptr(args[0], I64.as_pointer())
        source, out, shapes = (builder.load(builder.gep(table, [I64(i)])) for i in range(3))
        assembly(builder, "ldtilecfg 16($0,$1,4)", "r,r", [builder.sub(shapes, I64(56)), I64(10)])
        for i, (base, index, scale, displacement) in enumerate(PLACES):
            load = f"tileloadd {displacement}(%{base},%{index},{scale}), %tmm{i % 8}"
            if i % 3 == 0:
                load = load.replace("tileloadd", "tileloaddt1")
            start = builder.sub(source, I64(displacement))
            assembly(builder, load, f"{{{base}}},{{{index}}}", [start, I64(64 // scale)])
            at = builder.add(out, I64(64 * i))
            assembly(builder, f"tilestored %tmm{i % 8}, ($0,$1)", "r,r", [at, I64(32)])
        # No index, then an address on the stack.
        assembly(builder, "tileloadd ($0), %tmm5", "r", [source])
        at = builder.add(out, I64(64 * len(PLACES)))
        through = (
            "subq $$4096, %rsp; movl $$32, %eax; tilestored %tmm5, 64(%rsp,%rax,1); "
            "tileloadd 64(%rsp,%rax,1), %tmm6; addq $$4096, %rsp; tilestored %tmm6, ($0,%rax)"
        )
        assembly(builder, through, "r,~{rax}", [at])
        # A configuration that lies in the code, which checks itself: palette 1, two rows of 32.
        fills = "1: .byte 1; .fill 15; .fill 8,2,32; .fill 16; .fill 8,1,2; .fill 8"
        assembly(builder, f"jmp 2f; {fills}; 2: ldtilecfg 1b(%rip)")
        assembly(builder, "tilerelease")
        return context.get_dummy_value()

    source = np.random.default_rng(0).integers(0, 256, (2, 64)).astype(np.uint8)
    out = np.zeros((len(PLACES) + 1, 2, 32), np.uint8)
    shapes = config(*[(2, 32)] * 8)
    places = {"source": source.ctypes.data, "out": out.ctypes.data, "shapes": shapes.ctypes.data}
    compiled(codegen, list(places))(**places)
    for place, got in zip(PLACES, out, strict=False):
        np.testing.assert_array_equal(got, source[:, :32], str(place))
    np.testing.assert_array_equal(out[-1], source[[0, 0], :32])


def test_other_illegal_instructions_stay_illegal(emulated):
    for bytes_ in (".byte 0x0f, 0x0b", ".byte 0xc4, 0xe2, 0x6b, 0x5e, 0xc1"):  # ud2, tdpbssd
        assert death(lambda code=bytes_: program(code)())[0] == signal.SIGILL


@pytest.mark.parametrize("name", ["tileloadd64", "tilestored64"])
def test_a_row_too_many_meets_the_guard_page(name):
    libc = ctypes.CDLL(None)
    pages = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    guard = start + mmap.PAGESIZE
    assert libc.mprotect(ctypes.c_void_p(guard), mmap.PAGESIZE, 0) == 0
    shapes = config((5, 24))
    run = program("ldtilecfg config", "tilezero 0", f"{name} 0 a lda", "tilerelease")
    ends_there = guard - 4 * 100 - 24
    values = {"config": shapes.ctypes.data, "lda": 100}
    assert death(lambda: run(a=ends_there, **values))[0] == 0
    assert death(lambda: run(a=ends_there + 4, **values))[0] == signal.SIGSEGV
    assert death(lambda: run(a=ends_there + 100, **values))[0] == signal.SIGSEGV


FULL = [(16, 64)] * 8
ZERO, DOT = ("ldtilecfg config", "tilezero 3"), ("ldtilecfg config", "tdpbf16ps 0 1 2")
LOAD, STORE = "tileloadd64 3 config stride", "tilestored64 3 config stride"


def changed(place, value):
    data = config(*FULL)
    data[place] = value
    return data


REFUSED = {
    "palette 0": (changed(0, 0), ZERO, "palette 0"),
    "palette 2": (changed(0, 2), ZERO, "palette 2"),
    "start row": (changed(1, 1), ZERO, "begins at row 1"),
    "reserved at 2": (changed(2, 1), ZERO, "reserved byte 2"),
    "reserved at 15": (changed(15, 9), ZERO, "reserved byte 15"),
    "reserved at 32": (changed(32, 64), ZERO, "reserved byte 32"),
    "reserved at 47": (changed(47, 64), ZERO, "reserved byte 47"),
    "reserved at 56": (changed(56, 16), ZERO, "reserved byte 56"),
    "reserved at 63": (changed(63, 16), ZERO, "reserved byte 63"),
    "rows": (config((17, 64)), ZERO, "tile 0 17 rows, more than 16"),
    "bytes": (config((16, 64), (16, 68)), ZERO, "tile 1 68 bytes a row, more than 64"),
    "many bytes": (config((16, 256)), ZERO, "tile 0 256 bytes a row, more than 64"),
    "no multiple": (config((16, 62)), ZERO, "tile 0 62 bytes a row, no multiple of 4"),
    "half empty": (config((16, 0)), ZERO, "tile 0 16 rows of 0 bytes"),
    "zero an empty tile": (config((16, 64)), ZERO, "tilezero uses tile 3"),
    "load an empty tile": (config((1, 4)), ("ldtilecfg config", LOAD), "tileloadd uses tile 3"),
    "store an empty tile": (config((1, 4)), ("ldtilecfg config", STORE), "tilestored uses tile 3"),
    "multiply an empty tile": (config((1, 4), (1, 4)), DOT, "tdpbf16ps uses tile 2"),
    "rows of C": (config((8, 64), *FULL[1:]), DOT, "8x64 += 16x64 times 16x64"),
    "columns of C": (config((16, 32), *FULL[1:]), DOT, "16x32 += 16x64 times 16x64"),
    "pairs": (config(*FULL[:2], (8, 64)), DOT, "16x64 += 16x64 times 8x64"),
    "C is A": (config(*FULL), (ZERO[0], "tdpbf16ps 1 1 2"), "twice: 1 += 1 times 2"),
    "C is B": (config(*FULL), (ZERO[0], "tdpbf16ps 2 1 2"), "twice: 2 += 1 times 2"),
    "A is B": (config(*FULL), (ZERO[0], "tdpbf16ps 0 2 2"), "twice: 0 += 2 times 2"),
    "zero without": (None, ("tilezero 3",), "tilezero came without a configuration"),
    "load without": (None, (LOAD,), "tileloadd came without a configuration"),
    "store without": (None, (STORE,), "tilestored came without a configuration"),
    "multiply without": (None, DOT[1:], "tdpbf16ps came without a configuration"),
    "after release": (config(*FULL), (ZERO[0], "tilerelease", ZERO[1]), "without a configuration"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_silicon_might_forgive_is_refused_with_a_sentence(emulated, case):
    data, steps, sentence = REFUSED[case]
    words = {word: 64 for step in steps for word in step.split() if word == "stride"}
    if any("config" in step for step in steps):
        room = np.zeros(1024, np.uint8)
        room[:64] = config(*FULL) if data is None else data
        words["config"] = room.ctypes.data
    ended_by, text = death(lambda: program(*steps)(**words))
    assert (ended_by, text.count("\n")) == (signal.SIGABRT, 1), text
    assert text.startswith("AMX emulator: ") and sentence in text and text.endswith(".\n")


def test_a_forked_child_has_tiles_but_not_those_of_its_parent(emulated):
    def right():
        assert one_number((2, 3), (4, 5)) == 26

    assert death(right)[0] == 0
    shapes = config(*FULL)
    program("ldtilecfg config")(config=shapes.ctypes.data)
    ended_by, text = death(program("tilezero 3"))
    program("tilerelease")()
    assert ended_by == signal.SIGABRT and "without a configuration" in text


def test_each_thread_has_tiles_of_its_own():
    configure = program("ldtilecfg config")
    rest = program(*PRODUCT[1:])
    everybody = threading.Barrier(3, timeout=60)
    outcomes = {}

    def work(m):
        rng = np.random.default_rng(m)
        a, b = bf16(rng.standard_normal((m, 2 * m))), bf16(rng.standard_normal((2 * m, m)))
        shapes, pairs, c = shapes_of(m, m, m), paired(b), np.zeros((m, m), np.float32)
        places = {"a": a.ctypes.data, "b": pairs.ctypes.data, "c": c.ctypes.data}
        strides = {"lda": 4 * m, "ldb": 4 * m, "ldc": 4 * m}
        everybody.wait()
        configure(config=shapes.ctypes.data)
        everybody.wait()
        rest(**places, **strides)
        outcomes[m] = np.array_equal(c, by_the_manual(a, b, np.zeros_like(c)))
        for _ in range(100):
            outcomes[m] &= np.array_equal(product(a, b), c)

    threads = [threading.Thread(target=work, args=[m]) for m in (5, 11, 16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == {5: True, 11: True, 16: True}


def test_instructions_are_counted(emulated):
    one_number((1, 1), (1, 1))
    emulated.reset()
    assert set(emulated.counts().values()) == {0}
    for _ in range(3):
        one_number((1, 1), (1, 1))
    expected = dict.fromkeys(amx.NAMES, 3) | {"tilezero": 0, "tileloadd": 9}
    assert emulated.counts() == expected


def test_a_process_that_has_compiled_before_gets_tiles_too():
    program = """
import numba, numpy as np
early = numba.njit(lambda x: x.sum() * 2)
assert early(np.arange(4.0)) == 12
import test_amx_emulator as tests
print(tests.amx.emulate(), tests.one_number((2, 3), (4, 5)))
assert numba.njit(lambda x: early(x) + 1)(np.arange(4.0)) == 13
assert early(np.arange(4)) == 12
"""
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split()[-1] == "26.0"
