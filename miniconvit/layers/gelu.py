"""Gaussian error linear unit, exact (Hendrycks, Gimpel 2016)."""

from math import pi, sqrt

from ..arrays import array_module, erf


def gelu_forward(x):
    """y = x * Phi(x),  Phi(x) = (1 + erf(x / sqrt 2)) / 2, the normal distribution function."""
    cdf = 0.5 * (1.0 + erf(x * sqrt(0.5)))
    return x * cdf, (x, cdf)


def gelu_backward(dy, cache):
    """dx = dy * (Phi(x) + x * phi(x)),  phi(x) = exp(-x^2 / 2) / sqrt(2 pi), its density."""
    x, cdf = cache
    pdf = array_module(x).exp(-0.5 * x * x) * (1.0 / sqrt(2.0 * pi))
    return dy * (cdf + x * pdf)
