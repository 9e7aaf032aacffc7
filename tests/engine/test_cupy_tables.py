"""The stand-in's answers beside those of an installed CuPy, without a GPU.

CuPy's arrays lie over memory that is never touched, its ufuncs resolve their types by their own
tables, and its views are real.
"""

import itertools
import operator

import fakecupy
import numpy as np
import pytest

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
scalars = pytest.importorskip("cupy._core._scalar")

DTYPES = ("float32", "float64", "int64", "uint64", "uint8", "bool")
NUMBERS = (2, 3.5, True, -1, 300)
OPERATORS = {
    "add": "add", "sub": "subtract", "mul": "multiply", "truediv": "true_divide",
    "floordiv": "floor_divide", "mod": "remainder", "xor": "bitwise_xor",
    "rshift": "right_shift", "lshift": "left_shift", "and_": "bitwise_and",
    "or_": "bitwise_or", "eq": "equal", "lt": "less", "ge": "greater_equal",
}  # fmt: skip
UNARY = ("exp", "log", "sqrt", "tanh", "sin", "cos", "floor", "rint", "isfinite")
BINARY = ("minimum", "maximum")


def nowhere(shape, dtype, strides=None):
    """A CuPy array whose memory does not exist."""
    memory = cupy.cuda.UnownedMemory(4096, 2**40, None, 0)
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0), strides)


def real_dtype(ufunc, *operands):
    """The type that a ufunc of CuPy gives; or TypeError, or OverflowError of a number too large."""
    arguments = [x if isinstance(x, cupy.ndarray) else scalars.CScalar(x) for x in operands]
    op = ufunc._ops.guess_routine(ufunc.name, {}, arguments, None, None)
    for x, dtype in zip(arguments, op.in_types, strict=True):
        if isinstance(x, scalars.CScalar):
            x.apply_dtype(dtype)
    return np.dtype(op.out_types[0])


def outcome(function, *args):
    """The type of what a function gives, or that of the error that it raises."""
    try:
        return np.dtype(function(*args))
    except (TypeError, OverflowError) as error:
        return type(error)


def agree(fake, real):
    """The stand-in may refuse more, never less, and never with another type."""
    is_refusal = isinstance(fake, type)
    return fake == real or (is_refusal and (issubclass(fake, fakecupy.Refused) or real is fake))


def differences(of_fake, ufunc, cases):
    """Where the stand-in's function and CuPy's ufunc do not agree: operands are names of types, of
    which arrays are made, and numbers."""
    found = {}
    for case in cases:
        hosts = [np.ones(3, x) if isinstance(x, str) else x for x in case]
        fakes = [fakecupy.asarray(x) if isinstance(x, np.ndarray) else x for x in hosts]
        reals = [nowhere(3, x.dtype) if isinstance(x, np.ndarray) else x for x in hosts]
        fake = outcome(lambda fakes: of_fake(*fakes).dtype, fakes)
        real = outcome(real_dtype, ufunc, *reals)
        if not agree(fake, real):
            found[case] = fake, real
    return found


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name):
    pairs = [pair for pair in itertools.product((*DTYPES, *NUMBERS), repeat=2)
             if any(isinstance(x, str) for x in pair)]  # fmt: skip
    assert differences(getattr(operator, name), getattr(cupy, OPERATORS[name]), pairs) == {}


@pytest.mark.parametrize("name", (*UNARY, *BINARY))
def test_functions(name):
    cases = itertools.product(DTYPES, *[(*DTYPES, *NUMBERS)] * (name in BINARY))
    assert differences(fakecupy.FUNCTIONS[name], getattr(cupy, name), cases) == {}


VIEWS = {
    "T": lambda x: x.T,
    "swapaxes": lambda x: x.swapaxes(-1, -2),
    "transpose": lambda x: x.transpose(2, 0, 1),
    "slice": lambda x: x[:, 1:],
    "negative step": lambda x: x[::-1],
    "None": lambda x: x[:, :, None],
    "Ellipsis": lambda x: x[..., 0],
    "integer": lambda x: x[1],
    "reshape": lambda x: x.reshape(-1, 4),
    "reshape of a slice": lambda x: x[:, :2].reshape(2, 2, 2, 2),
    "heads": lambda x: x.reshape(2, 3, 2, 2).transpose(2, 0, 1, 3),
    "iteration": lambda x: list(x)[1],
}


@pytest.mark.parametrize("view", VIEWS)
def test_views(view):
    x = fakecupy.asarray(np.zeros((2, 3, 4), "float32"))
    before = fakecupy.STATE.allocations
    fake, real = VIEWS[view](x), VIEWS[view](nowhere((2, 3, 4), "float32"))
    assert fakecupy.STATE.allocations == before, "the stand-in copies where CuPy has a view"
    assert fake.shape == real.shape and fake._host.strides == real.strides
    assert fake._host.flags.c_contiguous == real.flags.c_contiguous


def test_refusals():
    x = nowhere((2, 3), "float32")
    for wrong in (
        lambda: np.asarray(x),
        lambda: x @ np.ones((3, 2), "float32"),
        lambda: cupy.stack([x, np.ones((2, 3))]),
        lambda: cupy.sum(x, where=True),
    ):
        with pytest.raises(TypeError):
            wrong()
