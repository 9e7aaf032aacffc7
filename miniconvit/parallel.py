"""Data parallelism over threads: split the batch, same functions on each piece, add in order.

The pieces' size and the order of the sum depend on the model and the batch alone, never on the
number of threads, so any number of threads gives the same bits.
"""

import ctypes
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from math import ceil
from threading import Lock
from types import SimpleNamespace

import numpy as np
from threadpoolctl import threadpool_limits

from .layers import REFERENCE, cross_entropy_backward, cross_entropy_forward
from .model import convit_backward, convit_forward
from .system import available_threads

try:
    from .kernels import CPU, INFERENCE
except ModuleNotFoundError:  # the folder was deleted: everything works, only slower
    CPU, INFERENCE = REFERENCE, {}

PIECE_ROWS = 1024  # tokens in a piece: large matrix products, and a layer that stays in the cache


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
                self._limits = threadpool_limits(limits=1, user_api="blas")
            self._wanted += 1

    def release(self):
        with self._lock:
            self._wanted -= 1
            if self._wanted == 0:
                self._limits.restore_original_limits()


ONE_BLAS_THREAD = _OneBlasThread()


def cut(n, rows_per_image):
    """n images as pieces [(start, stop)] of nearly equal size, of at most PIECE_ROWS tokens.

    A multiple of four pieces, or of two, so that threads have equal shares, as long as the pieces
    do not fall below half of PIECE_ROWS for it.
    """
    most = max(1, PIECE_ROWS // rows_per_image)
    count = ceil(n / most)
    for multiple in (4, 2):
        rounded = ceil(count / multiple) * multiple
        if n >= rounded * max(1, most // 2):
            count = rounded
            break
    return [(n * i // count, n * (i + 1) // count) for i in range(count)]


def train_piece(config, ops, load, start, stop, n, params, label_smoothing, seed, step):
    """Mean loss, number of right answers, and gradients of this piece's share in a batch of n; of
    targets that are mixed, the class with the largest share is the right one.

    load(start, stop) -> that piece's images and targets; its place in the batch decides the drop
    path. The two numbers are scalar arrays.
    """
    images, targets = load(start, stop)
    logits, cache = convit_forward(images, params, config, True, seed, step, start, ops)
    loss, cache_loss = cross_entropy_forward(logits, targets, label_smoothing)
    dlogits = cross_entropy_backward((stop - start) / n, cache_loss)
    labels = targets if targets.ndim == 1 else targets.argmax(axis=1)
    correct = (logits.argmax(axis=1) == labels).sum()
    return loss, correct, convit_backward(dlogits, cache)


def for_inference(ops):
    """The same functions, but nothing is kept for a backward pass."""
    names = ("block_forward", "last_block_forward")
    changed = {name: _without_cache(getattr(ops, name)) for name in names}
    if ops is CPU:
        changed |= INFERENCE
    return SimpleNamespace(**vars(ops) | changed)


def _without_cache(forward):
    return lambda *args, **kwargs: (forward(*args, **kwargs)[0], None)


class Engine:
    """Runs training steps and inference of one model over pieces of a batch.

    threads: workers, by default all available cores; BLAS runs at one thread inside each.
    ops: the namespace of functions to run, by default the fast ones for the CPU.
    Use as a context manager, or close() it.
    """

    xp = np
    steps_between_reads = 1

    def __init__(self, config, threads=None, ops=CPU):
        self.config, self.ops = config, ops
        self.threads = threads or available_threads()
        self._inference_ops = for_inference(ops)
        keep_freed_memory()
        ONE_BLAS_THREAD.want()
        self._closed = False
        self._pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None

    def close(self):
        """Ends the workers and gives BLAS its threads back. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._pool:
            self._pool.shutdown()
        ONE_BLAS_THREAD.release()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _map(self, function, n):
        """function(start, stop) of every piece of n images, in order.

        Only `threads` + 1 results wait at a time, so that memory does not grow with the batch.
        """
        pieces = cut(n, self.config.num_patches)
        if self._pool is None:
            for piece in pieces:
                yield function(*piece)
            return
        waiting = deque()
        try:
            for piece in pieces:
                waiting.append(self._pool.submit(function, *piece))
                if len(waiting) > self.threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def loss_and_grads(self, load, n, params, label_smoothing=0.0, seed=0, step=0):
        """One training step's mean loss, number of right answers, and gradients.

        load(start, stop) -> (images (b, in_chans, height, width) float, targets (b,) or (b, C)):
        that part of the batch of n images, called in the workers. Drop path is active, drawn from
        (seed, step). Returns (loss, correct, grads) with loss a float and correct an int; the next
        call may write into these gradients.
        """

        def run(start, stop):
            loss, correct, grads = train_piece(
                self.config, self.ops, load, start, stop, n, params, label_smoothing, seed, step
            )
            return float(loss) * ((stop - start) / n), int(correct), grads

        return self._summed(self._map(run, n))

    def _summed(self, answers):
        """The pieces' losses, right answers and gradients, added in their order."""
        loss, correct, total = 0.0, 0, None
        for piece_loss, piece_correct, grads in answers:
            loss += piece_loss
            correct += piece_correct
            if total is None:
                total = grads
            else:
                self._add(total, grads)
            del grads  # before the next piece is waited for
        return loss, correct, total

    def _add(self, total, grads):
        for name, grad in grads.items():
            total[name] += grad

    def hold(self, params, optimizer):
        """Lays a training's state where update is fastest: the dictionaries are given new arrays of
        the same numbers, or keep theirs."""

    def update(self, optimizer, params, grads, lr=None):
        """optimizer.step."""
        optimizer.step(params, grads, lr)

    def logits(self, load, n, params):
        """The model's answers in evaluation mode: (n, num_classes).

        load(start, stop) -> images, or (images, targets) of which only the images are used.
        """

        def run(start, stop):
            loaded = load(start, stop)
            images = loaded[0] if isinstance(loaded, tuple) else loaded
            return convit_forward(images, params, self.config, ops=self._inference_ops)[0]

        return np.concatenate(list(self._map(run, n)))

    def memory_mb(self):
        """What other processes hold for this engine, in MB: there are none."""
        return 0.0

    def wait(self):
        """Until everything is computed: it is already."""

    def read(self, rows):
        """Rows of numbers as floats: they are here already."""
        return rows
