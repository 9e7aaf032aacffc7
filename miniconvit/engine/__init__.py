"""Engines: what runs a training step over a batch, on threads, processes or a GPU."""

import numpy as np

from .cuda import check_precision
from .gpu import DeviceEngine
from .nccl import SharingEngine, connect
from .objective import Classification, classification
from .processes import ProcessEngine, can_fork
from .ranks import Ranks
from .threads import Engine


def make_engine(objective, xp, workers=None, precision="float32", ranks=None):
    """The engine of an Objective for arrays of the module xp, of one of several Ranks or alone.

    workers, by default all cores, by the ranks on them, are for the CPU alone: processes where
    these can be forked. precision: of a GPU's products, a name of PRECISIONS. Raises UserError
    where it has none such.
    """
    check_precision(precision, xp)
    ranks = ranks or Ranks()
    if xp is not np:
        if ranks.size > 1:
            return SharingEngine(objective, xp, precision, ranks)
        return DeviceEngine(objective, xp, precision)
    workers = workers or ranks.workers()
    kind = ProcessEngine if workers > 1 and can_fork() else Engine
    return kind(objective, workers, ranks=ranks)
