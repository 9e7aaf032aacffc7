"""Ranks with a GPU each: gradients go from one to another through NCCL, by its send and receive
alone, so that the order of the sum is the tree's. Not yet run on two GPUs."""

from importlib import import_module

import numpy as np

from ..arrays import to_cpu
from ..errors import UserError
from .cuda import out_of_memory
from .gpu import DeviceEngine
from .pieces import Layout
from .ranks import Mpi

MOST_NUMBERS = 16  # that an objective's step gives


class Nccl(Mpi):
    """The ranks of an Mpi, which add up vectors on their GPUs."""

    def __init__(self, mpi, nccl, xp):
        self.__dict__.update(vars(mpi))
        self._nccl, self._xp = nccl, xp
        self._types = {"float32": nccl.NCCL_FLOAT32, "float64": nccl.NCCL_FLOAT64}
        ident = self.first(nccl.get_unique_id)
        self._gpus = nccl.NcclCommunicator(self.size, ident, self.rank)

    def exchange(self, wanted, given):
        """As Mpi's, in the order of the current stream. Nobody waits for it here."""
        stream = self._xp.cuda.get_current_stream().ptr
        self._nccl.groupStart()
        for call, pairs in ((self._gpus.send, given), (self._gpus.recv, wanted)):
            for rank, x in pairs:
                call(x.data.ptr, x.size, self._types[str(x.dtype)], rank, stream)
        self._nccl.groupEnd()


def connect(ranks, xp):
    """The same ranks for arrays of the module xp: on GPUs each takes that of its number on its
    machine. Raises UserError where two have the same one, and where NCCL is missing."""
    if ranks.size == 1 or xp is np:
        return ranks
    nccl, gpu = ranks.agree(_prepared, ranks, xp)
    gpus = ranks.all((ranks.machine, gpu))
    if len(set(gpus)) < len(gpus):
        raise UserError(
            f"two ranks have the same GPU ({gpu}): start as many on each machine as it has GPUs"
        )
    return Nccl(ranks, nccl, xp)


def _prepared(ranks, xp):
    """(the module nccl, the number of this rank's GPU on the bus)."""
    try:
        nccl = import_module("cupy.cuda.nccl")
        nccl.get_version()
    except (ImportError, AttributeError) as error:
        raise UserError(
            "several GPUs need NCCL, which CuPy does not find: pip install nvidia-nccl-cu13, or "
            "nvidia-nccl-cu12 for CUDA 12"
        ) from error
    runtime = xp.cuda.runtime
    runtime.setDevice(ranks.place % runtime.getDeviceCount())  # Slurm may show each its own alone
    return nccl, runtime.deviceGetPCIBusId(runtime.getDevice())


class SharingEngine(DeviceEngine):
    """As DeviceEngine, on one of several ranks: each computes one piece of the batch."""

    def __init__(self, objective, xp, precision, ranks):
        super().__init__(objective, xp, precision)
        self.ranks = ranks
        self._layout = Layout(objective.shapes | {"": (MOST_NUMBERS,)})

    def _ready(self, params):
        """None: the kernels of whole models know whole batches alone."""

    def span(self, n):
        """(start, stop) of what this rank computes of n images."""
        share = self.ranks.share(n)
        return share.start, share.stop

    def loss_and_grads(self, load, n, params, seed=0, step=0):
        """As DeviceEngine's; load is called once, for this rank's part."""
        kept = []
        self.ranks.each(
            lambda: kept.append(self._piece(load, n, params, seed, step)), patience=None
        )
        ((count, names, vector),) = kept
        self.ranks.sum({(0, self.ranks.rank): vector}, self.ranks.size, vector)
        views = self._layout.views(vector)
        return *(views[""][i] for i in range(count)), {name: views[name] for name in names}

    def _piece(self, load, n, params, seed, step):
        """(how many numbers, the gradients' names, a vector of both) of this rank's part."""
        start, stop = self.span(n)
        if start == stop:
            raise UserError(f"{n} images are fewer than {self.ranks.size} ranks: start fewer")
        share = (stop - start) / n
        try:
            with out_of_memory():
                numbers, grads = self.objective.step(
                    load(start, stop), params, share, start, seed, step, self._blocks(params)
                )
                vector = self._layout.packed(grads, self.xp)
                for i, number in enumerate(numbers):
                    self._layout.views(vector)[""][i] = number
        except MemoryError:
            raise UserError(
                f"a piece of {stop - start} images does not fit into the GPU: a smaller "
                "--batch-size or more ranks may help"
            ) from None
        return len(numbers), tuple(grads), vector

    def logits(self, load, n, params):
        """As DeviceEngine's, of all ranks' parts."""
        start, stop = self.span(n)
        whole = super().logits

        def mine():
            if start == stop:
                return None
            return to_cpu(whole(lambda a, b: load(start + a, start + b), stop - start, params))

        found = self.ranks.each(mine, patience=None)
        return np.concatenate([part for part in found if part is not None])
