"""The engine of threads: the pieces of a batch, computed by threads of this process."""

import ctypes
import weakref
from collections import ChainMap, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import reduce
from math import inf
from operator import add, itemgetter
from threading import Lock
from time import process_time

import numpy as np
from threadpoolctl import OpenBLASController, threadpool_limits

from ..errors import UserError
from ..optim import clip_grad_norm, update_average
from ..system import available_threads
from .cpu import cpu_blocks, of_one_call
from .pieces import Layout, Tree, cut
from .ranks import Ranks


def keep_freed_memory():
    """Lets glibc's malloc keep what is freed, in one heap for all threads, for the next step.

    By default a large array's pages go back to the system when it is freed, and come back one page
    fault at a time. Does nothing where the C library is another one.
    """
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # from malloc.h
    with suppress(OSError, TypeError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(arena_max, 1)
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)


class _OneBlasThread:
    """BLAS at one thread as long as anyone wants that; its own number again after the last."""

    def __init__(self):
        self._lock, self._wanted, self._limits = Lock(), 0, None

    def want(self):
        with self._lock:
            if self._wanted == 0:
                _let_any_thread_limit()
                self._limits = threadpool_limits(limits=1, user_api="blas")
            self._wanted += 1

    def release(self):
        with self._lock:
            self._wanted -= 1
            if self._wanted == 0:
                _let_any_thread_limit()
                self._limits.restore_original_limits()
                _let_any_thread_limit()


def _let_any_thread_limit():
    """Since threadpoolctl 3.8 OpenBLAS's number is the first thread's that has set it, and others
    are ignored in silence."""
    if hasattr(OpenBLASController, "clear_controlling_thread"):
        OpenBLASController.clear_controlling_thread(force=True)


ONE_BLAS_THREAD = _OneBlasThread()


class Engine:
    """Runs training steps and inference of one Objective over pieces of a batch.

    workers: threads, by default on all available cores; BLAS runs at one thread inside each.
    blocks: what the model's blocks run on, by default the fastest there are for float32.
    ranks: with whom this engine shares each batch, by default nobody. They call it alike.
    Use as a context manager, or close() it; after that every use raises UserError.
    """

    xp = np
    steps_between_reads = 1
    takes_whole_steps = False

    def __init__(self, objective, workers=None, blocks=None, ranks=None):
        self.objective, self.ranks = objective, ranks or Ranks()
        self.blocks = blocks or cpu_blocks()
        self._layout = Layout(objective.shapes)
        self.workers = workers or available_threads()
        keep_freed_memory()
        ONE_BLAS_THREAD.want()
        self._release = weakref.finalize(self, ONE_BLAS_THREAD.release)  # also when it is dropped
        self._pool = ThreadPoolExecutor(self.workers) if self.workers > 1 else None

    def close(self):
        """Ends the workers and gives BLAS its threads back. A second call does nothing."""
        if self._pool:
            self._pool.shutdown()
        self._release()

    def _require_open(self):
        if not self._release.alive:
            raise UserError("this engine is closed: make another one")

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def pieces(self, n):
        """{index: (start, stop)} of those pieces of n images that this rank computes."""
        pieces = cut(n, self.objective.rows)
        return {index: pieces[index] for index in self.ranks.share(len(pieces))}

    def span(self, n):
        """(start, stop) of all of them."""
        pieces = list(self.pieces(n).values())
        return (pieces[0][0], pieces[-1][1]) if pieces else (0, 0)

    def _map(self, function, n):
        """function(start, stop) of each of this rank's pieces of n images, in order.

        Only `workers` + 1 results wait at a time, so that memory does not grow with the batch.
        """
        self._require_open()
        pieces = self.pieces(n).values()
        if self._pool is None:
            for piece in pieces:
                yield function(*piece)
            return
        waiting = deque()
        try:
            for piece in pieces:
                waiting.append(self._pool.submit(function, *piece))
                if len(waiting) > self.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def loss_and_grads(self, load, n, params, seed=0, step=0):
        """One training step's numbers and gradients: (loss, correct, grads) of a Classification.

        load(start, stop) -> that part of the batch of n images, a tuple of arrays: images
        (b, in_chans, height, width) float, and targets (b,) or (b, C). It is called in the workers.
        Chance, as of drop path, is drawn from (seed, step). Numbers are floats or ints; the next
        call may write into the gradients.
        """

        blocks = of_one_call(self.blocks)

        def run(start, stop):
            return self._step(load(start, stop), start, stop, n, params, seed, step, blocks)

        return self._summed(zip(self.pieces(n), self._map(run, n), strict=True), n)

    def _step(self, batch, start, stop, n, params, seed, step, blocks):
        """A piece's numbers and gradients."""
        share = (stop - start) / n
        numbers, grads = self.objective.step(batch, params, share, start, seed, step, blocks)
        return [number.item() for number in numbers], grads

    def _summed(self, answers, n):
        """The sums of all pieces' numbers, in their order, and of their gradients, up the tree.

        answers: (index, (numbers, gradients)) of each of this rank's pieces of n images.
        """
        tree = Tree(self._add)
        found = self.ranks.each(self._grow, tree, answers, patience=None)
        numbers = dict(ChainMap(*found))
        columns = zip(*(numbers[index][0] for index in sorted(numbers)), strict=True)
        grads = tree.root() if self.ranks.size == 1 else self._joined(tree, n, *numbers[0][1:])
        return *(reduce(add, column) for column in columns), grads

    def _grow(self, tree, answers):
        """Puts the gradients of this rank's pieces into a tree. Returns {index: (numbers, names of
        the gradients, their dtype)}."""
        numbers = {}
        for index, (found, grads) in answers:
            numbers[index] = found, tuple(grads), next(iter(grads.values())).dtype.str
            tree.put(0, index, grads)
            del grads  # before the next piece is waited for
        return numbers

    def _joined(self, tree, n, names, dtype):
        """The root of the tree that all ranks' trees make."""
        nodes = {node: self._vector(grads) for node, grads in tree.ordered().items()}
        out = next(iter(nodes.values())) if nodes else np.empty(self._layout.size, dtype)
        self.ranks.sum(nodes, len(cut(n, self.objective.rows)), out)
        views = self._layout.views(out)
        return {name: views[name] for name in names}

    def _vector(self, node):
        """A node's gradients as one vector."""
        return self._layout.packed(node)

    def _add(self, left, right):
        """Adds gradients to those of the pieces before."""
        for name, grad in right.items():
            left[name] += grad

    def hold(self, params, optimizer, average=None, trained=None, max_norm=inf, decay=None):
        """Lays a training's state where update is fastest: the dictionaries are given new arrays of
        the same numbers, or keep theirs. average: update_average's, or None; trained: the names of
        the parameters that will be, by default all; max_norm, decay: what clip and average will be
        told."""
        self._require_open()

    def clip(self, grads, max_norm):
        """clip_grad_norm."""
        return clip_grad_norm(grads, max_norm)

    def average(self, average, params, decay):
        """update_average."""
        update_average(average, params, decay)

    def update(self, optimizer, params, grads, lr=None):
        """optimizer.step."""
        self._require_open()
        self._optimize(optimizer, params, grads, lr)

    def _optimize(self, optimizer, params, grads, lr):
        """optimizer.step, or what the kernels have in its place."""
        step = getattr(self.blocks, "adamw_step", type(optimizer).step)
        step(optimizer, params, grads, lr)

    def logits(self, load, n, params):
        """The model's answers in evaluation mode: (n, num_classes) of a Classification.

        load(start, stop) -> images, or as for a step, of which the targets are not used.
        """

        blocks = of_one_call(self.blocks, keep=False)

        def run(start, stop):
            loaded = load(start, stop)
            batch = loaded if isinstance(loaded, tuple) else (loaded,)
            return self.objective.answer(batch, params, blocks)

        return self._together(zip(self.pieces(n), self._map(run, n), strict=True))

    def _together(self, answers):
        """All ranks' answers, in their order. answers: (index, answer) of this rank's pieces."""

        def kept():
            return sorted(((index, y.copy()) for index, y in answers), key=itemgetter(0))

        found = self.ranks.each(kept, patience=None)
        return np.concatenate([y for part in found for _, y in part])

    def memory_mb(self):
        """What other processes hold for this engine, in MB: there are none."""
        return 0.0

    def cpu_seconds(self):
        """Processor time that this process and its workers have used so far."""
        return process_time()

    def wait(self):
        """Until everything is computed: it is already."""

    def read(self, rows):
        """Rows of numbers as floats: they are here already."""
        return rows
