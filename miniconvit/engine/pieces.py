"""Data parallelism: split the batch, same function on each piece, add in order.

The pieces' size and the order of the sum depend on the model and the batch alone, never on the
number of workers, so any number of workers gives the same bits.
"""

from math import ceil

from .. import layers
from ..layers import cross_entropy_backward, cross_entropy_forward
from ..model import convit_backward, convit_forward

try:
    from . import kernels
    from .kernels import inference
except ImportError:  # the folder was deleted: everything works, only slower
    kernels = inference = layers

PIECE_ROWS = 1024  # tokens in a piece: large matrix products, and a layer that stays in the cache


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


def answer_piece(config, blocks, images, params):
    """The logits of this piece in evaluation mode; nothing is kept for a backward pass."""
    if blocks is kernels:
        blocks = inference
    return convit_forward(images, params, config, blocks=blocks, keep_caches=False)[0]


def train_piece(config, blocks, load, start, stop, n, params, label_smoothing, seed, step):
    """Mean loss, number of right answers, and gradients of this piece's share in a batch of n; of
    targets that are mixed, the class with the largest share is the right one.

    load(start, stop) -> that piece's images and targets; its place in the batch decides the drop
    path. The two numbers are scalar arrays.
    """
    images, targets = load(start, stop)
    logits, cache = convit_forward(images, params, config, True, seed, step, start, blocks)
    loss, cache_loss = cross_entropy_forward(logits, targets, label_smoothing)
    dlogits = cross_entropy_backward((stop - start) / n, cache_loss)
    labels = targets if targets.ndim == 1 else targets.argmax(axis=1)
    correct = (logits.argmax(axis=1) == labels).sum()
    return loss, correct, convit_backward(dlogits, cache)
