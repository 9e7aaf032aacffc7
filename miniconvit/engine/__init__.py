"""Engines: what runs a training step over a batch, on threads, processes or a GPU."""

import numpy as np

from ..system import available_threads
from .gpu import DeviceEngine
from .processes import ProcessEngine, can_fork
from .threads import Engine


def make_engine(config, xp, workers=None):
    """The engine for arrays of the module xp. workers, by default all cores, are for the CPU alone:
    processes where these can be forked."""
    if xp is not np:
        return DeviceEngine(config, xp)
    workers = workers or available_threads()
    return ProcessEngine(config, workers) if workers > 1 and can_fork() else Engine(config, workers)
