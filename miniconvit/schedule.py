"""The learning rate over time."""

from math import cos, pi


def warmup_cosine(t, total, peak, warmup, start=1e-6, minimum=1e-5):
    """Linear warm-up from `start` to `peak` over `warmup`, then a cosine down to `minimum`.

    t, total and warmup in one unit (epochs or steps; fractions are fine). The cosine is a function
    of t / total and is not shifted by the warm-up, as in the official script, so at t = warmup it
    begins a little below the peak.
    """
    if t < warmup:
        return start + (peak - start) * t / warmup
    return minimum + 0.5 * (peak - minimum) * (1.0 + cos(pi * min(t / total, 1.0)))
