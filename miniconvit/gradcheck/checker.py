"""Gradient checks: a hand-written backward pass against central differences.

The rule. Weight the output by a random dy, so that L = sum(y * dy) is one number and backward(dy)
claims to be its gradient. For each named tensor compare that claim with (L(x + h u) - L(x - h u))
/ 2h, either for u along every entry or for two random unit directions. It passes where

    |analytic - numeric| <= 1e-7 * |gradient| + floor,    floor = 4 eps sum|y * dy| / h:

the floor is the round-off of the difference itself. Where the numeric gradient drowns in it, the
verdict is `zero`, which passes only where it was expected: nothing passes by showing nothing.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from math import inf, sqrt

import numpy as np

from ..errors import UserError

STEP = 1e-5  # balances truncation (h^2) and round-off (1 / h) in float64
TOLERANCE = 1e-7  # relative; correct code stays near 1e-9


@dataclass(frozen=True)
class Row:
    """One named tensor. Norms are L2; error = |analytic - numeric| / |gradient|; note says what is
    wrong where the numbers do not. With two directions numeric_norm is an estimate from them."""

    name: str
    shape: tuple[int, ...]
    analytic_norm: float
    numeric_norm: float
    error: float
    verdict: str  # "ok", "WRONG" or "zero"
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What check_gradients found. str(report) is a table."""

    rows: tuple[Row, ...]
    seed: int
    every_entry: bool
    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """True where every row is right, every zero was expected, and nothing else was wrong."""
        return not self.problems and all(row.verdict != "WRONG" for row in self.rows)

    def __str__(self) -> str:
        width = max([len("tensor"), *(len(row.name) for row in self.rows)])
        lines = [f"{'tensor':{width}}  {'shape':14} {'|analytic|':>10} {'|numeric|':>10}  error"]
        about = "" if self.every_entry else "~"
        for row in self.rows:
            shape = "x".join(map(str, row.shape)) or "scalar"
            norms = f"{row.analytic_norm:10.3e} {about + format(row.numeric_norm, '.3e'):>10}"
            error = "-" if row.verdict == "zero" else f"{row.error:.1e}"
            line = f"{row.name:{width}}  {shape:14} {norms}  {error:>7}  {row.verdict}"
            lines.append(f"{line}  {row.note}".rstrip())
        return "\n".join([*lines, *self.problems])


def check_gradients(
    forward: Callable[..., tuple],
    backward: Callable[..., dict[str, np.ndarray] | tuple | np.ndarray],
    inputs: dict[str, np.ndarray],
    seed: int = 0,
    every_entry: bool = False,
    expect_zero: Collection[str] = (),
) -> Report:
    """Compares backward's gradients with central differences of forward, tensor by tensor.

    forward(**inputs) -> (y, cache), with y an array, a number, or a tuple of arrays;
    backward(dy, cache) -> {name: gradient} or a tuple in the order of inputs.
    inputs: name to float64 array, all drawn at random (at their initial values wrong gradients
    pass); what is not differentiated, such as labels or masks, belongs inside forward.
    every_entry: differences along each entry instead of two random directions a tensor.
    expect_zero: names whose gradient is exactly zero, and no others may be.
    Returns a Report. Raises UserError for inputs that are not float64, and where forward changes
    its inputs, gives different results for the same ones, or is not finite.
    """
    _require_float64(inputs, expect_zero)
    rng = np.random.default_rng(seed)
    inputs = {name: x.copy() for name, x in inputs.items()}
    before = {name: x.copy() for name, x in inputs.items()}
    y, cache = forward(**inputs)
    changed = [name for name in inputs if not np.array_equal(inputs[name], before[name])]
    if changed:
        raise UserError(f"forward changes {changed[0]} in place: let it work on a copy")
    if not all(np.isfinite(part).all() for part in _as_tuple(y)):
        raise UserError("forward's output is not finite: choose inputs where it is")
    dys = [rng.standard_normal(np.shape(part)) for part in _as_tuple(y)]
    magnitude = sum(float(np.abs(part * dy).sum()) for part, dy in _pairs(y, dys))
    floor = 4 * np.finfo(np.float64).eps * magnitude / STEP
    value = _weighted(y, dys)

    def loss(name, x):
        copies = {key: value.copy() for key, value in (before | {name: x}).items()}
        return _weighted(forward(**copies)[0], dys)

    if loss(first := next(iter(before)), before[first]) != value:
        raise UserError(
            "forward gives different results for the same inputs: draw masks outside and pass them"
        )
    directions = {name: _directions(x, rng, every_entry) for name, x in before.items()}
    numeric = {
        name: np.array([_difference(loss, name, x, u) for u in directions[name]()])
        for name, x in before.items()
    }
    kept = [(array, array.copy()) for array in _arrays(cache)]
    # backward runs last, on the first cache, so that one which leans on hidden state is found out.
    given = [dy.copy() if dy.ndim else float(dy) for dy in map(np.asarray, dys)]
    grads = _by_name(backward(tuple(given) if isinstance(y, tuple) else given[0], cache), inputs)
    rows = tuple(
        _judge(name, x, grads.get(name), directions[name](), numeric[name], floor, every_entry)
        for name, x in before.items()
    )
    changed = [name for name in inputs if not np.array_equal(inputs[name], before[name])]
    changed += ["dy"] * any(not np.array_equal(a, b) for a, b in zip(given, dys, strict=True))
    if not changed and any(not np.array_equal(a, b, equal_nan=True) for a, b in kept):
        changed.append("the cache")  # a second backward would go wrong
    problems = [f"{name} was changed in place" for name in changed]
    for row in rows:
        if row.verdict != "WRONG" and (row.verdict == "zero") != (row.name in expect_zero):
            found = "zero, so nothing was checked" if row.verdict == "zero" else "not zero"
            problems.append(f"the gradient of {row.name} is {found}: expect_zero says otherwise")
    return Report(rows, seed, every_entry, tuple(problems))


def _require_float64(inputs, expect_zero):
    for name, x in inputs.items():
        if not isinstance(x, np.ndarray) or x.dtype != np.float64:
            kind = getattr(x, "dtype", type(x).__name__)
            raise UserError(
                f"check_gradients needs float64 NumPy arrays, but {name} is {kind}: float32 cannot "
                f"tell a wrong gradient from round-off; pass {name}.astype('float64')"
            )
    unknown = sorted(set(expect_zero) - set(inputs))
    if unknown:
        raise UserError(f"expect_zero names {unknown}, which are not among the inputs")


def _pairs(y, dys):
    return zip(_as_tuple(y), dys, strict=True)


def _weighted(y, dys):
    """L = sum(y * dy), over all outputs."""
    return sum(float((part * dy).sum()) for part, dy in _pairs(y, dys))


def _as_tuple(y):
    return y if isinstance(y, tuple) else (y,)


def _arrays(cache):
    """Every array in a cache of nested tuples, lists and dicts."""
    if isinstance(cache, np.ndarray):
        yield cache
    elif isinstance(cache, tuple | list | dict):
        for item in cache.values() if isinstance(cache, dict) else cache:
            yield from _arrays(item)


def _by_name(grads, inputs):
    """The gradients as a dict, whichever way backward returned them."""
    if isinstance(grads, dict):
        return grads
    return dict(zip(inputs, _as_tuple(grads), strict=False))


def _directions(x, rng, every_entry):
    """A function that yields, each time anew, the directions u: of norm 1 and the shape of x."""
    if not every_entry:
        pair = rng.standard_normal((2, *x.shape))
        return lambda: (u / sqrt((u * u).sum()) for u in pair)

    def entries():
        for i in range(x.size):
            u = np.zeros(x.size)
            u[i] = 1.0
            yield u.reshape(x.shape)

    return entries


def _difference(loss, name, x, u):
    """The central difference of the loss along u: the slope of L at x, to about h^2."""
    return (loss(name, x + STEP * u) - loss(name, x - STEP * u)) / (2 * STEP)


def _judge(name, x, grad, directions, numeric, floor, every_entry):
    """The row of one tensor: numeric slopes against the gradient's projections on the same u."""
    spread = sqrt(x.size) if every_entry else sqrt(len(numeric))
    norm = float(np.linalg.norm(numeric))
    numeric_norm = norm if every_entry else norm * sqrt(x.size / len(numeric))
    note = _misfit(x, grad)
    if note:
        return Row(name, x.shape, inf, numeric_norm, inf, "WRONG", note)
    analytic = np.array([float((grad * u).sum()) for u in directions])
    analytic_norm = float(np.linalg.norm(grad))
    difference = float(np.linalg.norm(analytic - numeric))
    error = difference / max(analytic_norm, norm, floor)
    is_zero = norm <= 2 * spread * floor
    allowed = TOLERANCE * (0.0 if is_zero else max(analytic_norm, norm)) + spread * floor
    if is_zero:
        # The gradient itself must vanish, not only its share along two directions.
        difference = max(difference, analytic_norm)
        allowed += spread * floor
    verdict = "WRONG" if not difference <= allowed else "zero" if is_zero else "ok"
    return Row(name, x.shape, analytic_norm, numeric_norm, error, verdict)


def _misfit(x, grad):
    """Why grad cannot be the gradient of x, or an empty string."""
    if grad is None:
        return "no gradient was returned"
    if np.shape(grad) != x.shape:
        return f"its gradient has shape {np.shape(grad)}"
    if not np.all(np.isfinite(grad)):
        return "its gradient is not finite"
    return ""
