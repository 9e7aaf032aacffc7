"""A layer's two functions, called on copies and watched: what they must not do is said."""

from dataclasses import dataclass, replace

import numpy as np

from ..errors import UserError
from .forms import arrays_in, gradients_by_name, misfit, outputs_and_cache
from .slopes import norm

ROUND_OFF = 1e3 * np.finfo(np.float64).eps  # of a backward pass, relative
FACTOR = 4 / 3  # every digit of dy becomes another one, which float32 would round elsewhere


@dataclass(frozen=True)
class Run:
    """One call of forward: its own copies of the inputs, copies of the outputs, and the cache.

    kept: the arrays in the cache, each with a copy, where it matters that they stay."""

    inputs: dict
    ys: tuple
    cache: object
    is_tuple: bool
    kept: tuple = ()


class Pair:
    """forward and backward at these inputs."""

    def __init__(self, forward, backward, inputs):
        self._forward, self._backward = forward, backward
        self.inputs = {name: x.copy() for name, x in inputs.items()}
        self._shapes = None  # of the outputs

    def run(self, changed=()):
        """Calls forward on copies. changed: name to another value of that input."""
        inputs = {name: x.copy() for name, x in (self.inputs | dict(changed)).items()}
        result = self._forward(**inputs)
        ys, cache = outputs_and_cache(result)
        shapes = [np.shape(y) for y in ys]
        self._shapes = self._shapes or shapes
        if shapes != self._shapes:
            raise UserError(
                f"forward's output has shape {shapes} beside the inputs, where it has "
                f"{self._shapes}: nothing can be compared"
            )
        ys = tuple(np.array(y) for y in ys)  # the next call may write into the same ones
        return Run(inputs, ys, cache, isinstance(result[0], tuple))

    def first_runs(self):
        """Two Runs. Raises UserError where they differ, change their inputs or are not finite."""
        first = self.run()
        first = replace(first, kept=tuple((a, a.copy()) for a in arrays_in(first.cache)))
        changed = self._changed_inputs(first)
        if changed:
            raise UserError(f"forward changes {changed[0]} in place: let it work on a copy")
        if not all(np.isfinite(y).all() for y in first.ys):
            raise UserError("forward's output is not finite: choose inputs where it is")
        second = self.run()
        if not all(np.array_equal(a, b) for a, b in zip(first.ys, second.ys, strict=True)):
            raise UserError(
                "forward gives different results for the same inputs: draw masks outside and pass "
                "them"
            )
        return first, second

    def _changed_inputs(self, run):
        return [n for n, x in self.inputs.items() if not np.array_equal(run.inputs[n], x)]

    def gradients(self, first, second, dys, vanishing):
        """({name: gradient}, problems): what backward returns, and what it should not have done.

        first, second: two Runs; dys: the gradients of the outputs; vanishing: name to the norm that
        round-off alone may give a gradient.
        """
        stale = any(not np.array_equal(a, b, equal_nan=True) for a, b in first.kept)
        returned, problems = self._call(first, dys)
        problems += ["a later call of forward writes over the cache of an earlier one"] * stale
        grads = _copies(returned)
        problems += self._repeated(second, dys, grads, vanishing)
        for name, grad in grads.items():
            if isinstance(grad, np.ndarray) and not np.array_equal(
                grad, returned[name], equal_nan=True
            ):
                problems.append(f"the gradient of {name} is written over by the next call")
        return grads, problems

    def _call(self, run, dys):
        """One call of backward: ({name: gradient}, problems)."""
        kept = [(array, array.copy()) for array in arrays_in(run.cache)]
        short = {a.dtype.name for a, _ in kept if a.dtype.kind == "f" and a.dtype.itemsize < 8}
        # Masks and other whole numbers lose nothing in float32.
        if all((a == a.round()).all() for a, _ in kept if a.dtype.name in short):
            short = ()
        given = [dy.copy() if dy.ndim else float(dy) for dy in map(np.asarray, dys)]
        returned = self._backward(tuple(given) if run.is_tuple else given[0], run.cache)
        grads, problems = gradients_by_name(returned, self.inputs)
        changed = self._changed_inputs(run)
        changed += ["dy"] * any(not np.array_equal(a, b) for a, b in zip(given, dys, strict=True))
        if not changed and any(not np.array_equal(a, b, equal_nan=True) for a, b in kept):
            changed.append("the cache")  # a second backward would go wrong
        problems += [f"{name} was changed in place" for name in changed]
        problems += [
            f"the cache holds {kind}: something in forward casts" for kind in sorted(short)
        ]
        return grads, problems

    def _repeated(self, run, dys, grads, vanishing):
        """What further calls of backward bring to light: it keeps nothing and is linear in dy."""
        try:
            again = _copies(self._call(run, dys)[0])
            scaled, _ = self._call(self.run(), [FACTOR * dy for dy in dys])
        except Exception as error:
            return [f"backward works once and then raises {type(error).__name__}: {error}"]
        problems = []
        for name, x in self.inputs.items():
            g = grads.get(name)
            if misfit(x, g):
                continue
            allowed = 1e-9 * norm(g) + vanishing[name]
            if not _close(g, again.get(name), allowed):
                problems.append(
                    f"the gradient of {name} is another one on a second call of backward"
                )
            elif not _close(FACTOR * g, scaled.get(name), allowed):
                problems.append(f"the gradient of {name} is not linear in dy: does backward cast?")
        return problems


def _copies(grads):
    return {n: g.copy() if isinstance(g, np.ndarray) else g for n, g in grads.items()}


def _close(a, b, allowed):
    """Whether b is a gradient like a, up to a norm of `allowed`."""
    with np.errstate(all="ignore"):
        return not misfit(a, b) and norm(np.asarray(a - b)) <= allowed
