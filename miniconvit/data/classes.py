"""Classes by their names: ImageNet's order, and the labels of some classes among others."""

from pathlib import Path

import numpy as np

from ..errors import UserError
from .layout import difference_in_form

IMAGENET = tuple(Path(__file__).with_name("imagenet_synsets.txt").read_text().split())
"""The WordNet names of ImageNet's 1,000 classes (Russakovsky et al. 2015), in their order."""


def places_of(names, known):
    """Where names stand among the known ones: int64 (len(names),).

    Raises UserError that says the first which is not there, and what it may be.
    """
    places = {name: place for place, name in enumerate(known)}
    missing = [name for name in names if name not in places]
    if not missing:
        return np.array([places[name] for name in names], np.int64)
    for other in known:
        if difference := difference_in_form(missing[0], other):
            raise UserError(f"names differ in {difference}")
    raise UserError(
        f"{len(missing):,} of {len(names):,} are not among the {len(known):,} that it tells apart, "
        f"the first {missing[0]} (its own begin with {', '.join(known[:3])})"
    )
