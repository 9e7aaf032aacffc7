"""Gradient checks: a hand-written backward pass against central differences.

The rule. Weight the output by a random dy, so that L = sum(y * dy) is one number and backward(dy)
claims to be its gradient. For each named tensor compare that claim with (L(x + h u) - L(x - h u))
/ 2h, either for u along every entry or for two random unit directions. It passes where

    |analytic - numeric| <= 1e-7 * |gradient| + bound,

with |gradient| that of the entry, or of a typical entry, and the bound what the difference itself
can be wrong by. h is 1e-5 times the size of the tensor, and others are tried where that does not
settle it. Where the bound is above the tolerance the verdict is `unsure`. Where the numeric
gradient drowns in it, the verdict is `zero`, which passes only where it was expected: nothing
passes by showing nothing. Since backward is linear in dy and keeps nothing, it is called again.
"""

import os
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from math import inf, sqrt

import numpy as np

from .forms import check_arguments, misfit
from .pair import ROUND_OFF, Pair
from .slopes import KINK, STEPS, Differences, Slope, norm

STEP = 1e-5  # balances truncation (h^2) and round-off (1 / h) in float64
TOLERANCE = 1e-7  # relative; correct code stays near 1e-9
BEND = 1e-3  # relative; a smooth curve bends less over a step, a kink more


@dataclass(frozen=True)
class Row:
    """One named tensor. Norms are L2; error = |analytic - numeric| / |gradient|; note says what is
    wrong where the numbers do not. With two directions the numeric norm and the error are estimates
    from them."""

    name: str
    shape: tuple[int, ...]
    analytic_norm: float
    numeric_norm: float
    error: float
    verdict: str  # "ok", "WRONG", "zero" or "unsure"
    note: str = ""


@dataclass(frozen=True)
class Report:
    """What check_gradients found. str(report) is a table, at Python's prompt with what is wrong
    in red."""

    rows: tuple[Row, ...]
    seed: int
    every_entry: bool
    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """True where every row is right, every zero was expected, and nothing else was wrong."""
        return not self.problems and all(row.verdict in ("ok", "zero") for row in self.rows)

    def lines(self) -> list[tuple[str, bool]]:
        """The table line by line, each with whether it says that something is wrong."""
        shapes = ["x".join(map(str, row.shape)) or "scalar" for row in self.rows]
        width = max([len("tensor"), *(len(row.name) for row in self.rows)])
        room = min(14, 37 - width)  # of shapes, for lines of 78 columns
        wide = max([room, len("shape"), *map(len, shapes)]) if room < 14 else 14
        head = f"{'tensor':{width}}  {'shape':{wide}} {'|analytic|':>10} {'|numeric|':>10}  error"
        lines = [(head, False)]
        about = "" if self.every_entry else "~"
        for row, shape in zip(self.rows, shapes, strict=True):
            norms = f"{row.analytic_norm:10.3e} {about + format(row.numeric_norm, '.3e'):>10}"
            error = "-" if row.verdict == "zero" else f"{row.error:.1e}"
            line = f"{row.name:{width}}  {shape:{wide}} {norms}  {error:>7}  {row.verdict}"
            lines.append((f"{line}  {row.note}".rstrip(), row.verdict in ("WRONG", "unsure")))
        return [*lines, *((problem, True) for problem in self.problems)]

    def __str__(self) -> str:
        red = "\033[31m{}\033[0m" if _is_at_a_prompt() else "{}"
        return "\n".join(red.format(line) if bad else line for line, bad in self.lines())


def _is_at_a_prompt():
    """Whether what is printed goes to somebody who types Python on a terminal, with colours."""
    return hasattr(sys, "ps1") and sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def check_gradients(
    forward: Callable[..., tuple],
    backward: Callable[..., dict[str, np.ndarray] | tuple | np.ndarray],
    inputs: dict[str, np.ndarray],
    seed: int = 0,
    every_entry: bool = False,
    expect_zero: Collection[str] = (),
    step: float = STEP,
    scale: float | dict[str, float] | None = None,
) -> Report:
    """Compares backward's gradients with central differences of forward, tensor by tensor.

    forward(**inputs) -> (y, cache), with y an array, a number, or a tuple of arrays;
    backward(dy, cache) -> {name: gradient} or a tuple in the order of inputs.
    inputs: name to float64 array, all drawn at random (at their initial values wrong gradients
    pass); what is not differentiated, such as labels or masks, belongs inside forward.
    every_entry: differences along each entry instead of two random directions a tensor.
    expect_zero: names whose gradient is exactly zero, and no others may be.
    step: the first step tried, relative to scale. scale: the size of the inputs, or a dict with
    that of some; the root mean square of each where it is not given.
    Returns a Report. Raises UserError for what is of another form, and where forward changes its
    inputs, gives different results for the same ones, or is not finite.
    """
    check_arguments(forward, backward, inputs, seed, expect_zero, step, scale)
    rng = np.random.default_rng(seed)
    pair = Pair(forward, backward, inputs)
    first, second = pair.first_runs()
    dys = [rng.standard_normal(np.shape(y)) for y in first.ys]
    differences = Differences(lambda changed: pair.run(changed).ys, pair.inputs, second.ys, dys)
    sizes = _sizes(inputs, scale)
    directions = {name: _directions(x, rng, every_entry) for name, x in inputs.items()}
    quick = {
        name: [differences.measure(name, u, step * sizes[name]) for u in directions[name]()]
        for name in inputs
    }
    # backward runs late, on the first cache, so that one which leans on hidden state is found out.
    vanishing = {name: ROUND_OFF * differences.magnitude / sizes[name] for name in inputs}
    grads, problems = pair.gradients(first, second, dys, vanishing)
    rows = []
    for name, x in inputs.items():
        grad, note = grads.get(name), misfit(x, grads.get(name))
        if note:
            values = [value for value, *_ in quick[name]]
            row = Row(name, x.shape, inf, _whole(x, values, every_entry), inf, "WRONG", note)
        else:
            along = differences, name, directions[name], step * sizes[name]
            row = _judge(np.asarray(grad), along, quick[name], vanishing[name], every_entry)
        rows.append(row)
        if row.verdict in ("ok", "zero") and (row.verdict == "zero") != (name in expect_zero):
            found = "zero, so nothing was checked" if row.verdict == "zero" else "not zero"
            problems.append(f"the gradient of {name} is {found}: expect_zero says otherwise")
    return Report(tuple(rows), seed, every_entry, tuple(problems))


def _sizes(inputs, scale):
    """Name to the size of that input, which its steps are measured by."""
    given = scale if isinstance(scale, dict) else dict.fromkeys(inputs, scale)
    usual = {name: norm(x) / sqrt(max(x.size, 1)) or 1.0 for name, x in inputs.items()}
    return {name: float(given.get(name) or usual[name]) for name in inputs}


def _directions(x, rng, every_entry):
    """A function that yields, each time anew, the directions u: of norm 1 and the shape of x."""
    if not every_entry:
        pair = rng.standard_normal((2, *x.shape))[: 2 * x.size]  # none where x has no entries
        return lambda: (u / sqrt((u * u).sum()) for u in pair)

    def entries():
        for i in range(x.size):
            u = np.zeros(x.size)
            u[i] = 1.0
            yield u.reshape(x.shape)

    return entries


def _whole(x, along, every_entry):
    """The norm of a tensor like x from its values along the directions: exact, or an estimate."""
    return norm(np.array(along)) * (1.0 if every_entry else sqrt(x.size / max(len(along), 1)))


def _judge(grad, along, quick, vanishing, every_entry):
    """The row of one tensor: numeric slopes against the gradient's projections on the same u."""
    differences, name, directions, h = along
    analytic_norm = norm(grad)
    slopes = [
        Slope(value, differences.claim(name, u, h, grad) - value, bound)
        for u, (value, bound, _) in zip(directions(), quick, strict=True)
    ]
    typical = _typical(grad, slopes)
    settled = analytic_norm <= vanishing and all(map(_drowns, slopes))
    if not settled:
        allowed = TOLERANCE * typical
        slopes = [
            s
            if max(s.bound, bend * TOLERANCE / BEND) <= allowed
            and not _is_wrong(s, typical, every_entry)
            else differences.careful(name, u, h, grad, allowed)
            for u, s, (*_, bend) in zip(directions(), slopes, quick, strict=True)
        ]
        typical = _typical(grad, slopes)
    verdict, note = _verdict(grad, slopes, typical, vanishing, every_entry)
    numeric_norm = _whole(grad, [s.value for s in slopes], every_entry)
    difference = _whole(grad, [s.residual for s in slopes], every_entry)
    error = difference / (max(analytic_norm, numeric_norm) or 1.0)
    return Row(name, grad.shape, analytic_norm, numeric_norm, error, verdict, note)


def _typical(grad, slopes):
    """The size of the gradient's typical entry, as claimed or as found, whichever is larger."""
    found = norm(np.array([s.value for s in slopes])) / sqrt(max(len(slopes), 1))
    return max(norm(grad) / sqrt(max(grad.size, 1)), found)


def _drowns(s):
    return abs(s.value) <= 2 * s.bound < inf


def _is_wrong(s, typical, every_entry):
    """Whether the claim differs from this slope by more than the rule allows."""
    own = max(abs(s.value), abs(s.value + s.residual)) if every_entry else typical
    return not abs(s.residual) <= TOLERANCE * own + ROUND_OFF * typical + s.bound


def _verdict(grad, slopes, typical, vanishing, every_entry):
    """The verdict and its note."""
    if norm(grad) <= vanishing and all(map(_drowns, slopes)):
        return "zero", "" if grad.size else "it has no entries"
    unclear = [s for s in slopes if s.note in (KINK, STEPS) or not s.bound < inf]
    wrong = [s for s in slopes if s not in unclear and _is_wrong(s, typical, every_entry)]
    if wrong:
        return "WRONG", next((s.note for s in wrong if s.note), "") or _lonely(grad, slopes, wrong)
    unclear += [s for s in slopes if s.bound > TOLERANCE * typical]
    if unclear:
        good = f"differences are good to {unclear[0].bound / typical:.0e} only"
        return "unsure", unclear[0].note or good
    return "ok", ""


def _lonely(grad, slopes, wrong):
    """Which entry is wrong, where only one of many is: the error of the tensor hardly shows it."""
    if len(wrong) > 1 or len(slopes) != grad.size:
        return ""
    place = [int(i) for i in np.unravel_index(slopes.index(wrong[0]), grad.shape)]
    claim = wrong[0].value + wrong[0].residual
    return f"only at {place}: {claim:.3e}, where it is {wrong[0].value:.3e}"
