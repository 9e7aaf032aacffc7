"""The namespace of functions that the composites and the model call."""

from types import SimpleNamespace

REFERENCE = SimpleNamespace()
"""Every function of this folder by name, filled in `layers/__init__.py`. A faster namespace is this
one with some names replaced by functions of the same signature."""


def part(params, prefix):
    """The entries of `params` below `prefix`, under their short names."""
    return {key[len(prefix) :]: value for key, value in params.items() if key.startswith(prefix)}


def prefixed(grads, prefix):
    """The inverse of `part`: full names again."""
    return {prefix + key: value for key, value in grads.items()}
