"""Data parallelism over threads: split the batch, same functions on each piece, add in order.

The pieces' size and the order of the sum depend on the model and the batch alone, never on the
number of threads, so any number of threads gives the same bits.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from threadpoolctl import threadpool_limits

from .layers import cross_entropy_backward, cross_entropy_forward
from .layers.ops import REFERENCE
from .model import convit_backward, convit_forward


def available_threads():
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class Engine:
    """Runs training steps and inference of one model over pieces of a batch.

    threads: workers, by default all available cores; BLAS runs at one thread inside each.
    Use as a context manager, or close() it.
    """

    def __init__(self, config, threads=None, ops=REFERENCE):
        self.config, self.ops = config, ops
        self.threads = threads or available_threads()
        self.piece = max(1, 1024 // (config.num_patches + 1))  # images: about 1024 rows
        self._blas = threadpool_limits(limits=1, user_api="blas")
        self._pool = ThreadPoolExecutor(self.threads)

    def close(self):
        """Ends the workers and gives BLAS its threads back."""
        self._pool.shutdown()
        self._blas.restore_original_limits()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _pieces(self, n):
        return [(start, min(start + self.piece, n)) for start in range(0, n, self.piece)]

    def loss_and_grads(self, load, n, params, label_smoothing=0.0, seed=0, step=0):
        """One training step's mean loss, number of right answers, and gradients.

        load(start, stop) -> (images (b, in_chans, height, width) float, targets (b,) or (b, C)):
        that part of the batch of n images, called in the workers. Drop path is active, drawn from
        (seed, step). Returns (loss, correct, grads) with loss a float and correct an int.
        """

        def run(piece):
            start, stop = piece
            images, targets = load(start, stop)
            logits, cache = convit_forward(
                images, params, self.config, True, seed, step, start, self.ops
            )
            loss, cache_loss = cross_entropy_forward(logits, targets, label_smoothing)
            share = (stop - start) / n
            grads = convit_backward(cross_entropy_backward(share, cache_loss), cache)
            labels = targets if targets.ndim == 1 else targets.argmax(axis=1)
            correct = int((logits.argmax(axis=1) == labels).sum())
            return float(loss) * share, correct, grads

        loss, correct, total = 0.0, 0, None
        for piece_loss, piece_correct, grads in self._pool.map(run, self._pieces(n)):
            loss += piece_loss
            correct += piece_correct
            if total is None:
                total = grads
            else:
                for name, grad in grads.items():
                    total[name] += grad
        return loss, correct, total

    def logits(self, load, n, params):
        """The model's answers in evaluation mode: (n, num_classes).

        load(start, stop) -> images, or (images, targets) of which only the images are used.
        """

        def run(piece):
            loaded = load(*piece)
            images = loaded[0] if isinstance(loaded, tuple) else loaded
            return convit_forward(images, params, self.config, ops=self.ops)[0]

        return np.concatenate(list(self._pool.map(run, self._pieces(n))))
