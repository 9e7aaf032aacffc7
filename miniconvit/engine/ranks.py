"""Ranks: processes, on one machine or several, that run the same program and train one model.

A launcher starts them (`mpirun -n 4 ...`, `srun -n 4 ...`). Each computes its share of a batch's
pieces, and they exchange what they have over MPI. The order of the sum is that of the pieces' tree,
so the bits do not depend on how many ranks there are.
"""

import os
import pickle
import signal
import socket
import sys
import time
import traceback
from contextlib import contextmanager, suppress
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np

from ..arrays import array_module
from ..errors import UserError
from ..system import LAUNCHERS, available_cores, launched, limited
from .pieces import Tree

PATIENCE = 45.0  # seconds in which a rank answers, or SLOW times the longest share of a step
SLOW = 20
GRACE = 5  # seconds for the end
LONG = 600.0  # around what takes one rank long: to load, to save, to validate
MOST = 2**28  # numbers in a message


class LostRank(UserError):
    """A rank has ended, or its machine cannot be reached."""

    everywhere = False  # see guard


class Ranks:
    """One process alone; Mpi is several. All ranks call the same methods in the same order."""

    rank, size, line = 0, 1, None
    patience = PATIENCE
    place = 0  # the number of ranks before this one on its machine

    def all(self, thing, patience=None):
        """What each rank has given, in order. Nobody goes on before all have come here."""
        return [thing]

    def weigh(self, workers):
        """Takes note of this rank's workers, None on a GPU: its share goes by their number."""

    def share(self, count):
        """The numbers of those of `count` pieces that this rank computes."""
        return range(count)

    def workers(self):
        """How many workers each rank has by default."""
        return limited(len(available_cores()))

    def each(self, function, *arguments, patience=LONG):
        """What function gives on each rank, in order. A UserError on one is raised on all.

        patience: how long the others may take, or None for a share of a step.
        """
        found, error, began = None, None, time.monotonic()
        try:
            found = function(*arguments)
        except UserError as reason:
            error = reason
        if patience is None:
            self.patience = max(self.patience, SLOW * (time.monotonic() - began))
        answers = self.all((found, error), patience)
        for rank, (_, other) in enumerate(answers):
            if other is not None:
                raise error if rank == self.rank else other
        return [answer for answer, _ in answers]

    def agree(self, function, *arguments):
        """What function gives here, once it has given something on all ranks."""
        kept = []
        self.each(lambda: kept.append(function(*arguments)))
        return kept[0]

    def first(self, function, *arguments):
        """What function gives on rank 0, which alone calls it."""
        return self.each(function if self.rank == 0 else lambda *_: None, *arguments)[0]

    def same(self, thing, sentence):
        """Raises UserError, on all, where a rank has another thing than rank 0. sentence: with the
        names of both in {0} and {1}."""

    @contextmanager
    def guard(self):
        """While it lasts, what ends one rank ends all of them. An exception that is raised on all
        of them alike passes: a UserError, or one that says so by `everywhere`."""
        yield


class Mpi(Ranks):
    """The ranks of an MPI communicator. Blocking calls, which would wait for ever for a machine
    that is gone, are not used."""

    def __init__(self, MPI):
        self._comm, self._error = MPI.COMM_WORLD.Dup(), MPI.Exception
        self.rank, self.size = self._comm.rank, self._comm.size
        self._others = [rank for rank in range(self.size) if rank != self.rank]
        self._machines = [("", "")] * self.size  # names, and numbers of their own
        self._machines = self.all((socket.gethostname(), _boot()), LONG)
        self.machine = self._machines[self.rank]
        self.place = self._machines[: self.rank].count(self.machine)
        self._weights = [1] * self.size

    def workers(self):
        """The cores of the machine by the ranks on it. Open MPI ties a rank to some of them: for
        its workers this is undone."""
        cores = available_cores(untie=LAUNCHERS[0][0] in os.environ)
        here = [
            theirs
            for theirs, machine in zip(self.all(cores, LONG), self._machines, strict=True)
            if machine == self.machine
        ]
        return max(1, limited(len(set.union(*here))) // len(here))

    def weigh(self, workers):
        """As that of one. Then `line` says who works together."""
        self._weights = self.all(workers or 1, LONG)
        hosts = [name for name, _ in dict.fromkeys(self._machines)]
        counts = " and ".join(str(count) for count in dict.fromkeys(self._weights))
        on = f"{len(hosts)} machines ({', '.join(hosts)})" if len(hosts) > 1 else hosts[0]
        self.line = f"{self.size} ranks on {on}"
        if workers:
            self.line += f", {counts} worker{'s' * (counts != '1')} each"

    def share(self, count):
        return self._shares(count)[self.rank]

    def _shares(self, count):
        """The numbers of each rank's pieces: runs, whose lengths go by the weights."""
        total = sum(self._weights)
        ends = [count * weight // total for weight in accumulate(self._weights, initial=0)]
        return [range(*pair) for pair in pairwise(ends)]

    def same(self, thing, sentence):
        things = self.all(thing, LONG)
        for rank, other in enumerate(things):
            if other != things[0]:
                raise UserError(sentence.format(self.name(0), self.name(rank)))

    def name(self, rank):
        """What a rank is called in a sentence."""
        return f"rank {rank} on {self._machines[rank][0]}"

    def all(self, thing, patience=None):
        mine = np.frombuffer(pickle.dumps(thing), np.uint8)
        sizes = {rank: np.empty(1, np.int64) for rank in self._others}
        size = np.array([mine.size])
        self._move(sizes.items(), [(rank, size) for rank in self._others], patience)
        found = {rank: np.empty(size[0], np.uint8) for rank, size in sizes.items()}
        self._move(found.items(), [(rank, mine) for rank in self._others], patience)
        found[self.rank] = mine
        return [pickle.loads(found[rank]) for rank in range(self.size)]

    def sum(self, nodes, count, out):
        """Fills the vector `out`, on every rank, with the sum of a batch of `count` pieces.

        nodes: {(height, index): vector}, what a Tree has made of this rank's share, and is used up.
        Each rank owns a part of all vectors, in which it goes on by the same rule.
        """
        ends = [out.size * rank // self.size for rank in range(self.size + 1)]
        parts = [slice(*pair) for pair in pairwise(ends)]
        mine = parts[self.rank]
        keys = [complete(share) for share in self._shares(count)]
        got = {
            rank: [array_module(out).empty_like(out[mine]) for _ in keys[rank]]
            for rank in self._others
        }
        self.exchange(
            [(rank, x) for rank in self._others for x in got[rank]],
            [(rank, nodes[key][parts[rank]]) for rank in self._others for key in keys[self.rank]],
        )
        got[self.rank] = [nodes[key][mine] for key in keys[self.rank]]
        tree = Tree(_add)
        for rank in range(self.size):
            for key, x in zip(keys[rank], got[rank], strict=True):
                tree.put(*key, x)
        out[mine] = tree.root()
        self.exchange(
            [(rank, out[parts[rank]]) for rank in self._others],
            [(rank, out[mine]) for rank in self._others],
        )

    def exchange(self, wanted, given):
        """Fills the vectors of `wanted` and sends those of `given`, pairs (rank, vector): between
        two ranks in the order of both lists."""
        self._move(wanted, given)

    def _move(self, wanted, given, patience=None):
        """exchange, of NumPy's arrays."""
        try:
            waiting = [
                (rank, start(part, rank))
                for start, pairs in ((self._comm.Irecv, wanted), (self._comm.Isend, given))
                for rank, x in pairs
                for part in _parts(x)
            ]
            self._wait(waiting, patience or self.patience)
        except self._error as error:
            raise LostRank(f"another rank has ended, or cannot be reached ({error})") from error

    def _wait(self, waiting, patience):
        """Until all is there, asleep between looks: other ranks may need this core."""
        looks, end = 0, time.monotonic() + patience
        while waiting := [pair for pair in waiting if not pair[1].Test()]:
            looks += 1
            if looks > 50:
                time.sleep(min(2e-5 * looks, 2e-3))
            if time.monotonic() > end:
                raise LostRank(
                    f"{self.name(waiting[0][0])} has not answered for {patience:.0f} s: is its "
                    "machine up and reachable? The run goes on from its last save by --resume, on "
                    "any number of ranks"
                )

    @contextmanager
    def guard(self):
        """As that of one; this rank says why, and ends the others, whatever they are at."""
        try:
            yield
        except BaseException as error:
            if getattr(error, "everywhere", isinstance(error, UserError)):
                raise
            if isinstance(error, UserError | OSError | MemoryError):
                text = f"Error: {self.name(self.rank)}: {error}\n"
            elif isinstance(error, KeyboardInterrupt):
                text = "stopped\n"
            else:
                text = traceback.format_exc()
            os.write(2, text.encode())
            status = 130 if isinstance(error, KeyboardInterrupt) else 2
            self.abort(status, is_lost=isinstance(error, LostRank))

    def abort(self, status, is_lost):
        """Ends all ranks and never returns. A launcher would wait long for a machine that is gone:
        where one is, is_lost, it is ended too."""
        signal.alarm(GRACE)  # to reach that machine may take for ever
        if is_lost and (launcher := _launcher()) and os.fork() == 0:
            os.setsid()
            time.sleep(GRACE)
            with suppress(ProcessLookupError):
                os.kill(launcher, signal.SIGTERM)
            os._exit(0)
        self._comm.Abort(status)
        os._exit(status)


def _add(left, right):
    left += right


def complete(indices):
    """The nodes (height, index) of a Tree of these pieces."""
    tree = Tree(lambda left, right: None)
    for index in indices:
        tree.put(0, index, True)
    return list(tree.nodes)


def _launcher():
    """The id of the launcher that is this process's parent, or its parent's, ..., or None."""
    pid = os.getpid()
    with suppress(OSError):
        while pid > 1:
            name, fields = Path(f"/proc/{pid}/stat").read_text().split("(", 1)[1].rsplit(")", 1)
            if name.startswith(("mpirun", "mpiexec", "prterun")):
                return pid
            pid = int(fields.split()[1])
    return None


def _boot():
    """What tells this machine, since it was started, from all others, where Linux says it."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    return ""


def _parts(x):
    """A vector in messages that are not too long."""
    return [x[start : start + MOST] for start in range(0, max(1, x.size), MOST)]


@cache
def find_ranks():
    """The Ranks that a launcher has started, or this process alone, which never imports MPI.

    Raises UserError where they cannot find each other.
    """
    size, _, launcher = launched()
    if size == 1:
        return Ranks()
    started = f"started {size} times by {launcher}"
    MPI = import_mpi(started)
    vendor, _ = MPI.get_vendor()
    foreign = (
        f"{started}, but this {launcher} is of another MPI than mpi4py's ({vendor}): use the "
        f"one in {os.path.dirname(sys.executable)}, or install mpi4py for yours"
    )
    by_open_mpi, by_slurm = (name in os.environ for name in (LAUNCHERS[0][0], LAUNCHERS[-1][0]))
    if by_open_mpi != (vendor == "Open MPI") and not by_slurm:
        raise UserError(foreign)  # MPI_Init would complain at length, or end the program
    if not MPI.Is_initialized():
        MPI.Init_thread()
    if MPI.COMM_WORLD.size != size:
        if launcher == "srun":
            foreign = (
                f"{started}, but mpi4py's {vendor} finds itself alone: srun --mpi=list shows what "
                "Slurm can offer it, most often --mpi=pmix or --mpi=pmi2"
            )
        raise UserError(foreign)
    return Mpi(MPI)


def import_mpi(started):
    """The module MPI, not initialised. Raises UserError."""
    try:
        import mpi4py

        mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
        from mpi4py import MPI
    except ImportError:
        raise UserError(f"{started}, but mpi4py is not installed: pip install mpi4py") from None
    except RuntimeError as error:
        raise UserError(
            f"{started}, but mpi4py finds no MPI library ({str(error).splitlines()[0]}): load your "
            "cluster's, or pip install mpich"
        ) from None
    return MPI
