"""What the checker takes, and the sentence about anything else."""

from collections import deque
from collections.abc import Collection
from inspect import signature

import numpy as np

from ..errors import UserError, did_you_mean


def check_arguments(forward, backward, inputs, seed, expect_zero, step, scale):
    """Raises UserError for inputs and options that no check can be made of."""
    if not isinstance(inputs, dict) or not inputs or not all(isinstance(n, str) for n in inputs):
        raise UserError("inputs must be a dict of name to array, with at least one")
    for name, x in inputs.items():
        _check_input(name, x)
    _check_call(forward, "forward(**inputs)", inputs)
    _check_call(backward, "backward(dy, cache)", {}, None, None)
    if isinstance(expect_zero, str) or not isinstance(expect_zero, Collection):
        raise UserError(f"expect_zero is a collection of names: write [{expect_zero!r}]")
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise UserError(f"seed must be an integer of at least 0, not {seed!r}")
    scales = scale if isinstance(scale, dict) else {}
    for what, names in (("expect_zero", expect_zero), ("scale", scales)):
        for name in names:
            if name not in inputs:
                hint = did_you_mean(name, inputs)
                raise UserError(f"{what} names {name!r}, which is not among the inputs{hint}")
    if not _is_number(step) or not 1e-10 <= step <= 0.1:
        raise UserError(f"step is a share of the inputs' size, in 1e-10..0.1, not {step!r}")
    for size in scales.values() if isinstance(scale, dict) else [] if scale is None else [scale]:
        if not _is_number(size) or not 0 < size < np.inf:
            raise UserError(f"scale is the inputs' size, a number above 0 or a dict, not {scale!r}")


def _is_number(x):
    return isinstance(x, int | float | np.number) and not isinstance(x, bool)


def _check_input(name, x):
    if type(x) is not np.ndarray:
        raise UserError(
            f"check_gradients needs float64 NumPy arrays, but {name} is of type "
            f"{type(x).__name__}: pass np.array({name}, dtype='float64')"
        )
    if x.dtype.kind == "c":
        raise UserError(
            f"check_gradients needs float64 NumPy arrays, but {name} is {x.dtype}: pass its real "
            "and its imaginary part as two inputs"
        )
    if x.dtype != np.float64:
        why = ": float32 cannot tell a wrong gradient from round-off" if x.dtype.kind == "f" else ""
        raise UserError(
            f"check_gradients needs float64 NumPy arrays, but {name} is {x.dtype}{why}; pass "
            f"{name}.astype('float64')"
        )
    if not np.isfinite(x).all():
        raise UserError(f"{name} is not finite: check gradients where it is")


def _check_call(function, call, kwargs, *args):
    if not callable(function):
        raise UserError(f"{call} must be a function, not {type(function).__name__}")
    try:
        accepts = signature(function)
    except ValueError:  # a built-in one that does not say
        return
    try:
        accepts.bind(*args, **kwargs)
    except TypeError as error:
        raise UserError(f"{call} cannot be called: {error}") from None


def outputs_and_cache(result):
    """((y, ...), cache) of what forward returned; y alone becomes a tuple of one."""
    if not isinstance(result, tuple) or len(result) != 2:
        is_tuple = isinstance(result, tuple)
        found = f"a tuple of {len(result)}" if is_tuple else type(result).__name__
        raise UserError(f"forward must return (y, cache), not {found}; cache may be None")
    y, cache = result
    parts = y if isinstance(y, tuple) else (y,)
    for part in parts:
        _check_output(part)
    if not parts:
        raise UserError("forward returns no output: y is an empty tuple")
    return parts, cache


def _check_output(y):
    kind = getattr(y, "dtype", type(y).__name__)
    if not isinstance(y, float | np.floating | np.ndarray) or np.ma.isMaskedArray(y):
        raise UserError(f"y must be an array, a number or a tuple of these, not {type(y).__name__}")
    if np.asarray(y).dtype.kind == "c":
        raise UserError(f"forward returns {kind}: return its real and imaginary part as a tuple")
    if np.asarray(y).dtype.kind != "f":
        raise UserError(f"forward returns {kind}, which has no gradient")
    if np.asarray(y).dtype != np.float64:
        raise UserError(f"forward returns {kind} for float64 inputs: something in it casts")


def gradients_by_name(grads, inputs):
    """({name: gradient}, problems): the gradients whichever way backward returned them."""
    if isinstance(grads, dict):
        extra = [f"{n!r}{did_you_mean(n, inputs)}" for n in grads if n not in inputs]
        problems = [f"backward returns a gradient of {n}, which is no input" for n in extra]
        return grads, problems
    if not isinstance(grads, tuple | np.ndarray | float):
        raise UserError(
            "backward must return {name: gradient}, or a tuple of gradients in the order of the "
            f"inputs, not {type(grads).__name__}"
        )
    if not isinstance(grads, tuple):
        grads = (grads,)
    problems = []
    if any(grad is not None for grad in grads[len(inputs) :]):
        problems = [f"backward returns {len(grads)} gradients, but inputs: {len(inputs)}"]
    return dict(zip(inputs, grads, strict=False)), problems


def misfit(x, grad):
    """Why grad cannot be the gradient of x, or an empty string."""
    if grad is None:
        return "no gradient was returned"
    if not isinstance(grad, np.ndarray | float):
        return f"its gradient is {type(grad).__name__}, not an array"
    if np.shape(grad) != x.shape:
        return f"its gradient has shape {np.shape(grad)}"
    if np.asarray(grad).dtype != np.float64:
        return f"its gradient is {grad.dtype}, not float64"
    if not np.isfinite(grad).all():
        return "its gradient is not finite"
    return ""


def arrays_in(item):
    """Every array in a cache of nested containers and objects."""
    seen, waiting = set(), [item]
    while waiting:  # without recursion: a tape may be long
        item = waiting.pop()
        if isinstance(item, np.ndarray):
            yield item
        elif id(item) not in seen:
            seen.add(id(item))
            waiting += reversed(_parts(item))


def _parts(item):
    """What a container or an object holds, as a list."""
    if isinstance(item, tuple | list | deque):
        return list(item)
    if isinstance(item, dict):
        return list(item.values())
    slots = (getattr(item, name, None) for name in getattr(type(item), "__slots__", ()))
    return [*slots, *getattr(item, "__dict__", {}).values()]
