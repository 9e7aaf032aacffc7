"""Reads the arrays in golden/, which the scripts beside them wrote."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np

GOLDEN = Path(__file__).parent / "golden" / "neighbours.npz"


def read_parts(path, name, *folders):
    """The arrays of one case by name; those in the folders are dicts."""
    parts = {folder: {} for folder in folders}
    with np.load(path) as file:
        for key in file.files:
            case, _, rest = key.partition("/")
            folder, _, leaf = rest.partition("/")
            if case == name:
                inside, field = (parts[folder], leaf) if leaf else (parts, folder)
                inside[field] = file[key]
    return parts


def load_case(name):
    """One pair of neighbours: inputs and grads by name, y, dy."""
    parts = read_parts(GOLDEN, name, "in", "grad")
    inputs = parts.pop("in")
    return SimpleNamespace(inputs=inputs, **parts)


def assert_equal(ours, theirs, tolerance=1e-10):
    """To 1e-10 of the size of the whole array."""
    assert np.shape(ours) == np.shape(theirs)
    assert np.linalg.norm(ours - theirs) <= tolerance * max(np.linalg.norm(theirs), 1e-300)
