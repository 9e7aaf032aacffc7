"""Central differences of a weighted output, and how far each of them can be trusted.

A difference over a step h is wrong in two ways. The curve bends, which costs about h^2, and
round-off of the outputs is divided by h. Where one step does not settle the matter, eleven do, each
eight times the one before. Of two neighbours 64 / 63 and -1 / 63 are taken, which leaves h^4. The
error is at most what changed since the step before, or a 64th of the change to the next one, plus
the round-off that the smallest steps show. The smallest step that is good enough counts: over large
ones a curve that levels off would look flat.
"""

from dataclasses import dataclass

import numpy as np

LADDER = range(-6, 5)  # steps 8^k times the usual one
EPS = 4 * np.finfo(np.float64).eps
KINK = "forward has a kink or a tie here: move the inputs away from it"
STEPS = "forward moves in steps here: does it round or cast?"
SMALLEST = 4 * np.finfo(np.float64).smallest_subnormal


@dataclass(frozen=True)
class Slope:
    """The slope along one direction. residual: the gradient's claim minus the slope; bound: the
    most that the slope can be wrong by; note: what stands in the way, or an empty string."""

    value: float
    residual: float
    bound: float
    note: str = ""


class Differences:
    """Slopes of L = sum(y * dy) along directions of one input, all others held."""

    def __init__(self, outputs, inputs, ys, dys):
        """outputs(inputs) -> (y, ...); ys = outputs(inputs); dys are their weights."""
        self._outputs, self._inputs, self._dys = outputs, inputs, dys
        self._ys = [np.asarray(y) for y in ys]
        with np.errstate(all="ignore"):
            self._weighted = [y * dy for y, dy in zip(self._ys, dys, strict=True)]
        self.magnitude = norm(np.concatenate([w.ravel() for w in self._weighted]))

    def measure(self, name, u, h):
        """The slope over a step h, its round-off, and how far the slopes on either side differ."""
        x = self._inputs[name]
        slope = bend = 0.0
        noises = [SMALLEST]
        with np.errstate(all="ignore"):
            plus = self._outputs(self._inputs | {name: x + h * u})
            minus = self._outputs(self._inputs | {name: x - h * u})
            for y, weighted, dy, p, m in zip(
                self._ys, self._weighted, self._dys, plus, minus, strict=True
            ):
                change = np.asarray(p - m)
                slope += float((change * dy).sum())
                bend += float((((p - y) + (m - y)) * dy).sum())
                noises.append(EPS * norm(weighted[change != 0]))
            if norm(((x + h * u) - (x - h * u)) / (2 * h) - u) > 0.01:
                noises = [np.inf]  # the step itself is lost in x
            return slope / (2 * h), norm(np.array(noises)) / (2 * h), abs(bend) / h

    def claim(self, name, u, h, grad):
        """What the gradient says of that difference: round-off makes the step not quite h u."""
        x = self._inputs[name]
        with np.errstate(all="ignore"):
            return float((grad * ((x + h * u) - (x - h * u))).sum()) / (2 * h)

    def careful(self, name, u, h, grad, allowed):
        """The Slope that the best of eleven steps gives. allowed: a tolerance of the residual."""
        taken = {}

        def take(k):
            if k not in taken:
                step = h * 8.0**k
                slope, noise, bend = self.measure(name, u, step)
                residual = self.claim(name, u, step, grad) - slope
                taken[k] = slope, residual, noise * step, bend
            return taken[k]

        if self._is_glaring(take(0), take(-1)):
            return Slope(take(-1)[0], take(-1)[1], abs(take(0)[1] - take(-1)[1]))
        slopes, residuals, noises, bends = map(np.array, zip(*map(take, LADDER), strict=True))
        steps = h * 8.0 ** np.array(LADDER)
        with np.errstate(all="ignore"):
            shown = 4 * np.abs(np.diff(residuals))[:2] * steps[:2]  # the same at every step
            noise = float(np.nanmax([*shown, noises[LADDER.index(0)]]))
            residuals, finest = ((64 * a[:-1] - a[1:]) / 63 for a in (residuals, slopes))
            changes = np.abs(np.diff(residuals))
            bent = np.minimum(changes, np.append(changes[1:], np.inf) / 64)
            bounds = bent + noise / steps[1:-1]
        if not np.isfinite(bounds).any():
            return Slope(np.nan, np.nan, np.inf, "forward is not finite beside the inputs")
        good = np.flatnonzero(bounds <= allowed)
        possible = np.flatnonzero(np.abs(residuals[1:]) <= allowed + bounds)
        best = min(possible, key=bounds.__getitem__, default=np.nanargmin(bounds))
        best = good[0] if good.size else best
        bound, slope, residual = (float(a[best]) for a in (bounds, finest[1:], residuals[1:]))
        note = self._note(slopes, bends, noise, noise / steps[1])
        fits = bound <= allowed and abs(residual) <= allowed + bound
        return Slope(slope, residual, bound, "" if fits and note != KINK else note)

    def _is_glaring(self, at_step, below):
        """Whether the gradient is so wrong, at two steps alike, that no more are needed."""
        (slope, residual, _, bend), (_, other, _, other_bend) = at_step, below
        size = abs(slope) + abs(residual)
        return (
            abs(slope) > 0
            and abs(residual) > 1e-3 * size
            and abs(residual - other) < 1e-5 * size
            and other_bend <= bend / 4 + 1e-5 * size
        )

    def _note(self, slopes, bends, noise, smallest_bend):
        """What keeps the differences from being exact."""
        if bends[1] > bends[2] / 2 and bends[1] > 10 * smallest_bend:
            return KINK
        if not slopes[:3].any() and slopes[-1]:
            return STEPS
        if noise > 1e-9 * self.magnitude:
            return "forward loses digits here: does it cast to float32?"
        return ""


def norm(x):
    """The L2 norm, which neither overflows nor underflows before its result does."""
    x = np.abs(x)
    largest = float(x.max()) if x.size else 0.0
    if largest in (0.0, np.inf) or largest != largest:
        return largest
    return largest * float(np.sqrt(((x / largest) ** 2).sum()))
