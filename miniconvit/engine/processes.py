"""Data parallelism over processes: the pieces of threads.Engine, each computed by a forked worker.

Threads of one interpreter wait for its lock between NumPy's calls, and the narrower the layers, the
more. Processes do not. The pieces, the functions and the order of the sum are Engine's, and so are
the bits.
"""

import gc
import mmap
import os
import signal
import sys
import warnings
import weakref
from contextlib import closing, contextmanager, suppress
from copy import copy
from itertools import accumulate
from math import inf, prod
from multiprocessing import Pipe
from multiprocessing.connection import wait

import numpy as np

from ..arguments import check_params
from ..errors import UserError
from .cpu import of_one_call
from .pieces import PIECE_ROWS
from .threads import Engine

TASKS = 2  # of a worker at a time: the next piece is loaded while it computes
SPARE_PIECES = 2  # beside one for each worker: pieces that are loaded, or have been computed
DEPTH = 16  # places for sums that wait for their neighbours: up to 2**16 pieces
NO_RESERVE = 0x4000  # from Linux's mman.h: pages that nobody touches are not set aside
ALIGNMENT = 64  # bytes, a cache line
MOST_FILES = 2**31 - 1  # no descriptor is greater
NUMBER = 8  # bytes, at most

GIVEN, PARAMS, EXP_AVG, EXP_AVG_SQ, GRADS, SLOTS = range(6)
"""Places in the shared memory, each for one array of every parameter's shape: what came with a
call, what `hold` was given, a call's gradients, and from SLOTS on those of single pieces and of
several."""


class LostWorker(UserError):
    """A worker process was killed by someone else."""


class LostUpdate(UserError):
    """The same in the middle of an update: no one knows which parameters are new."""

    everywhere = False  # other ranks know nothing of it


def can_fork():
    """Whether workers can be processes here. macOS has fork, but not beside its own libraries."""
    return sys.platform == "linux"


class ProcessEngine(Engine):
    """Runs training steps and inference of one Objective, as Engine, on `workers` processes.

    The workers are forked at once, before this process has much to share with them, and live until
    close() or its end. Images, parameters and gradients lie in memory that all of them share;
    `load` is called here. One call at a time. Raises UserError where no worker can be started, and
    LostWorker or LostUpdate where one is killed; the next call starts others.
    """

    def __init__(self, objective, workers, blocks=None, ranks=None):
        super().__init__(objective, 1, blocks, ranks)
        self.workers = workers
        self._shapes = objective.shapes
        images = max(1, PIECE_ROWS // objective.rows)
        self._in_size = _space([(images, *shape) for shape in objective.inputs])
        self._out_size = max(NUMBER * self._layout.size, _space([(images, *objective.output)]))
        self._most_slots = workers + SPARE_PIECES + DEPTH
        self._memory, self._shared = None, {}  # _shared: {place: {name: array}}, given out
        self._workers = {}  # our end of a pipe to the process's id
        weakref.finalize(self, _end, self._workers, os.getpid())  # also when it is dropped
        self._slots = []  # where nothing lies that is still needed
        self._put_off = None  # additions that wait for the last piece, once it is the last's turn
        self._calls, self._called = 0, (0, None)  # _called: a worker's last call and its blocks
        try:
            self._start()
        except UserError:
            self.close()
            raise

    def close(self):
        """Ends the workers and gives BLAS its threads back. A second call does nothing."""
        self._stop()
        self._memory, self._shared = None, {}
        super().close()

    def memory_mb(self):
        """What the workers hold now, in MB, without what they share; they give nothing back."""
        found = 0
        for pid in self._workers.values():
            with suppress(OSError), open(f"/proc/{pid}/smaps_rollup") as file:  # it may have ended
                found += sum(int(line.split()[1]) for line in file if line.startswith("Private"))
        return found / 2**10

    def cpu_seconds(self):
        """As Engine's; time of a worker that has ended is not counted."""
        ticks = 0
        for pid in self._workers.values():
            with suppress(OSError), open(f"/proc/{pid}/stat") as file:
                ticks += sum(map(int, file.read().rpartition(")")[2].split()[11:13]))
        return super().cpu_seconds() + ticks / os.sysconf("SC_CLK_TCK")

    def loss_and_grads(self, load, n, params, seed=0, step=0):
        """As Engine's."""
        if len(self.pieces(n)) <= 1:
            return super().loss_and_grads(load, n, params, seed, step)
        options = n, seed, step
        with closing(self._answers(self._train, options, load, n, params)) as answers:
            *numbers, grads = self._summed(answers, n)
        self._shared[GRADS] = grads
        return *numbers, grads

    def hold(self, params, optimizer, average=None, trained=None, max_norm=inf, decay=None):
        """As Engine's: they are laid into the shared memory. There is room for the first ones."""
        self._require_open()
        state = {PARAMS: params, EXP_AVG: optimizer.exp_avg, EXP_AVG_SQ: optimizer.exp_avg_sq}
        if PARAMS in self._shared or any(
            arrays.keys() != self._shapes.keys() for arrays in state.values()
        ):
            return
        dtype = next(iter(params.values())).dtype
        for place, arrays in state.items():
            self._shared[place] = self._tensors(place, dtype)
            for name, shared in self._shared[place].items():
                shared[...] = arrays[name]
            arrays.update(self._shared[place])

    def update(self, optimizer, params, grads, lr=None):
        """As Engine's. What lies in the shared memory is updated by the workers, each its share."""
        state = {PARAMS: params, EXP_AVG: optimizer.exp_avg, EXP_AVG_SQ: optimizer.exp_avg_sq}
        lie_here = all(self._lie_at(*pair) for pair in [*state.items(), (GRADS, grads)])
        dtypes = {array.dtype.str for array in [*params.values(), *grads.values()]}
        if not (lie_here and len(dtypes) == 1 and grads.keys() >= params.keys()):
            super().update(optimizer, params, grads, lr)
            return
        if not self._workers:
            self._start()
        bare = copy(optimizer)
        bare.exp_avg = bare.exp_avg_sq = None  # the workers have them
        optimizer.step_count += 1
        (dtype,) = dtypes
        try:
            self._share_out(self._update_share, params, bare, lr, dtype)
        except LostWorker:
            raise LostUpdate(
                "a worker process was killed in the middle of an update, and the parameters are "
                "lost with it: a run goes on from its last save by --resume"
            ) from None

    def logits(self, load, n, params):
        """As Engine's."""
        if len(self.pieces(n)) <= 1:
            return super().logits(load, n, params)
        with closing(self._answers(self._infer, (), load, n, params)) as answers:
            return self._together(answers)

    def _grow(self, tree, answers):
        """As Engine's. What was put off, alone the rest of the sum, is done by the workers."""
        found = super()._grow(tree, answers)
        grads = next(iter(tree.nodes.values()), None)
        if isinstance(grads, _Gradients):
            if self.ranks.size == 1:
                tree.nodes[0, 0] = tree.root()
            dtype = next(iter(grads.values())).dtype.str
            self._share_out(self._add_shares, grads, self._put_off, dtype)
        return found

    def _add(self, left, right):
        """As Engine's. What the last piece completes is put off for the workers, each its share:
        they have nothing else."""
        if self._put_off is not None:
            self._put_off.append((left.place, right.place))
        else:
            super()._add(left, right)
            self._slots.append(right.place - SLOTS)

    def _vector(self, node):
        """As Engine's; what lies in the shared memory is one already."""
        if not isinstance(node, _Gradients):
            return super()._vector(node)
        return self._vector_at(node.place, next(iter(node.values())).dtype)

    def _share_out(self, work, params, *arguments):
        """Has each worker do this work for its share of the parameters."""
        try:
            for connection, names in zip(self._workers, _shares(params, self.workers), strict=True):
                self._ask(connection, work, names, *arguments)
            for connection in self._workers:
                self._received(connection)
        except BaseException:
            self._stop()
            raise

    def _answers(self, work, options, load, n, params):
        """(index, what the workers have found) for each of this rank's pieces, as they come:
        numbers and gradients, until their slot is given back, or an answer, until the next one."""
        if not self._workers:
            self._start()
        dtype = next(iter(params.values())).dtype
        whole = params.keys() == self._shapes.keys()
        given = PARAMS if whole and self._lie_at(PARAMS, params) else GIVEN
        if given == GIVEN:
            check_params(params, self._shapes)
            for name, shared in self._tensors(GIVEN, dtype).items():
                shared[...] = params[name]
        indices, pieces = zip(*self.pieces(n).items(), strict=True)
        tasks = list(self._workers) * TASKS  # connections that may be given a piece
        self._slots, self._put_off = list(range(self._most_slots)), None
        self._calls += 1
        sent, found, running = 0, 0, {}  # running: connection to [(index, slot, place)]
        try:
            while found < len(pieces):
                ahead = min(len(pieces), found + self.workers + SPARE_PIECES)
                while tasks and self._slots and sent < ahead:
                    connection, slot = tasks.pop(0), self._slots.pop()
                    loaded = load(*pieces[sent])
                    arrays = self._put(slot, loaded if isinstance(loaded, tuple) else (loaded,))
                    place = GRADS if work == self._train and sent == 0 else SLOTS + slot
                    running.setdefault(connection, []).append((indices[sent], slot, place))
                    where = given, slot, arrays, place, dtype.str
                    self._ask(connection, work, self._calls, options, pieces[sent], *where)
                    sent += 1
                for connection in wait([c for c in running if running[c]]):
                    index, slot, place = running[connection].pop(0)
                    answer = self._received(connection)
                    tasks.append(connection)
                    found += 1
                    if found == len(pieces):
                        self._put_off = []
                    yield index, self._taken(answer, place, dtype)
                    if work == self._infer or place == GRADS:
                        self._slots.append(slot)
        except BaseException:
            self._stop()  # what they are at is wanted no more
            raise

    def _ask(self, connection, work, *arguments):
        """Sends a worker one of its methods' names, with arguments."""
        with _answered():
            connection.send((work.__name__, *arguments))

    def _received(self, connection):
        with _answered():
            answer = connection.recv()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    # what both sides know: where things lie

    def _put(self, slot, arrays):
        """Copies arrays into a slot's place for what goes in; returns their shapes and dtypes."""
        described = [(x.shape, x.dtype.str) for x in arrays]
        if sum(_aligned(x.nbytes) for x in arrays) > self._in_size:
            size, shape = self.objective.inputs[0], described[0][0]
            raise UserError(f"the model expects images (B, C, H, W) of {size}, not {shape}")
        for shared, x in zip(self._views(self._in_place(slot), described), arrays, strict=True):
            shared[...] = x
        return described

    def _in_place(self, slot):
        return (SLOTS + self._most_slots) * self._out_size + slot * self._in_size

    def _views(self, begin, described):
        """Arrays of these shapes and dtypes, one after the other from a byte of the memory on."""
        for shape, dtype in described:
            yield np.frombuffer(self._memory, dtype, prod(shape), begin).reshape(shape)
            begin += _aligned(np.dtype(dtype).itemsize * prod(shape))

    def _tensors(self, place, dtype):
        return self._layout.views(self._vector_at(place, dtype))

    def _vector_at(self, place, dtype):
        return np.frombuffer(self._memory, dtype, self._layout.size, place * self._out_size)

    def _lie_at(self, place, arrays):
        """Whether these are the arrays of that place that were given out."""
        given_out = self._shared.get(place, {})
        return all(value is given_out.get(name) for name, value in arrays.items())

    def _taken(self, answer, place, dtype):
        """The answer with the arrays that belong to it."""
        if len(answer) == 1:  # the logits' shape
            return next(self._views(place * self._out_size, [(answer[0], dtype)]))
        numbers, names = answer
        tensors = self._tensors(place, dtype)
        return numbers, _Gradients(place, {name: tensors[name] for name in names})

    # the workers

    def _start(self):
        self._require_open()
        size = self._in_place(self._most_slots)
        flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | NO_RESERVE
        signals = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
        old = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        try:
            self._memory = self._memory or mmap.mmap(-1, size, flags=flags)
            for _ in range(self.workers):
                ours, theirs = Pipe()
                with warnings.catch_warnings():
                    # of locks that other threads hold: a worker touches NumPy alone
                    warnings.simplefilter("ignore", DeprecationWarning)
                    pid = os.fork()
                if pid == 0:
                    self._work(theirs, signals)
                theirs.close()
                self._workers[ours] = pid
        except OSError as error:
            self._stop()
            raise UserError(
                f"no worker process can be started ({error.strerror}): add --workers 1"
            ) from error
        except BaseException:  # an interruption that another thread has let through
            self._stop()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old)

    def _stop(self):
        """Ends the workers, which keep nothing, whatever they are at."""
        _end(self._workers, os.getpid())

    def _work(self, connection, signals):
        """A worker's life: it ends with the process that asks, and never returns."""
        try:
            for signum in signals:  # the one who asks answers them
                signal.signal(signum, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
            gc.freeze()  # nothing that was alive there is ended here
            for fds in ((3, connection.fileno()), (connection.fileno() + 1, MOST_FILES)):
                os.closerange(*fds)  # others' pipes, and a run's lock, which ends with its process
            np.seterr(all="ignore")  # the one who asks looks for what is not finite
            while True:
                work, *arguments = connection.recv()
                try:
                    answer = getattr(self, work)(*arguments)
                except Exception as error:
                    answer = error
                connection.send(answer)
        except BaseException:
            os._exit(0)

    def _blocks(self, call, keep):
        """The blocks of a call, which are those of all its pieces."""
        if self._called[0] != call:
            self._called = call, of_one_call(self.blocks, keep)
        return self._called[1]

    def _train(self, call, options, piece, given, slot, arrays, place, dtype):
        """A piece's numbers and its gradients' names; the gradients are left at their place."""
        blocks = self._blocks(call, keep=True)
        batch = tuple(self._views(self._in_place(slot), arrays))
        n, *drawn = options
        numbers, grads = self._step(batch, *piece, n, self._tensors(given, dtype), *drawn, blocks)
        tensors = self._tensors(place, dtype)
        for name, grad in grads.items():
            tensors[name][...] = grad
        return numbers, tuple(grads)

    def _infer(self, call, options, piece, given, slot, arrays, place, dtype):
        """The shape of a piece's logits, which are left at their place."""
        batch = tuple(self._views(self._in_place(slot), arrays))
        blocks = self._blocks(call, keep=False)
        y = self.objective.answer(batch, self._tensors(given, dtype), blocks)
        next(self._views(place * self._out_size, [(y.shape, dtype)]))[...] = y
        return (y.shape,)

    def _add_shares(self, names, pairs, dtype):
        """Adds these gradients of each pair of places, in turn."""
        for pair in pairs:
            left, right = (self._tensors(place, dtype) for place in pair)
            super()._add(left, {name: right[name] for name in names})

    def _update_share(self, names, optimizer, lr, dtype):
        """The optimizer's step for these parameters."""
        optimizer.exp_avg = self._tensors(EXP_AVG, dtype)
        optimizer.exp_avg_sq = self._tensors(EXP_AVG_SQ, dtype)
        params, grads = self._tensors(PARAMS, dtype), self._tensors(GRADS, dtype)
        self._optimize(optimizer, {name: params[name] for name in names}, grads, lr)


class _Gradients(dict):
    """Gradients by name that lie at a place in the shared memory."""

    def __init__(self, place, arrays):
        super().__init__(arrays)
        self.place = place


def _end(workers, owner):
    """Ends the workers, which keep nothing, whatever they are at, and empties the dict.

    owner: the process that has started them; in one that was forked from it they are left alone.
    """
    ours = dict(workers) if os.getpid() == owner else {}
    workers.clear()  # none of them is asked again
    for connection, pid in ours.items():
        connection.close()
        with suppress(ProcessLookupError):  # ended and waited for elsewhere
            os.kill(pid, signal.SIGKILL)
    for pid in ours.values():
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)


def _shares(params, count):
    """The names of the parameters in so many groups of nearly equal size."""
    shares = [[] for _ in range(count)]
    ends = list(accumulate(p.size for p in params.values()))
    for name, end in zip(params, ends, strict=True):
        shares[(end - 1) * count // ends[-1]].append(name)
    return shares


@contextmanager
def _answered():
    """Says what it means that nobody is at the other end of a pipe."""
    try:
        yield
    except (EOFError, ConnectionError):
        raise LostWorker(
            "a worker process was killed, perhaps for want of memory: a smaller --workers or "
            "--model may help"
        ) from None


def _space(shapes):
    """Bytes for arrays of these shapes."""
    return sum(_aligned(NUMBER * prod(shape)) for shape in shapes)


def _aligned(size):
    return -(-size // ALIGNMENT) * ALIGNMENT
