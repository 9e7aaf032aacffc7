"""Engines: what runs a training step over a batch, on threads, processes or a GPU."""

import numpy as np

from ..errors import UserError
from ..neighbours.models import is_convit
from .cpu import cpu_blocks
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
    these can be forked. precision: of matrix products, a name of PRECISIONS. Raises UserError where
    the device or, on a CPU, the model has none such.
    """
    check_precision(precision, xp)
    ranks = ranks or Ranks()
    if xp is not np:
        if ranks.size > 1:
            return SharingEngine(objective, xp, precision, ranks)
        return DeviceEngine(objective, xp, precision)
    workers = workers or ranks.workers()
    _check_model(objective, precision)
    kind = ProcessEngine if workers > 1 and can_fork() else Engine
    return kind(objective, workers, cpu_blocks(precision), ranks)


def _check_model(objective, precision):
    config = getattr(objective, "config", None)
    if precision == "bf16" and not (is_convit(config) and config.attention == "gpsa"):
        raise UserError(
            "--precision bf16 on a CPU is for ConViT and ViT, and not for --attention psa: leave "
            "it at float32"
        )
