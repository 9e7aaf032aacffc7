"""Data parallelism: split the batch, same function on each piece, add in order.

The pieces' size and the order of the sum depend on the model and the batch alone, never on the
number of workers, so any number of workers gives the same bits.
"""

from math import ceil

from .. import layers
from ..errors import UserError

try:
    from . import kernels
    from .kernels import inference
except ImportError:  # the folder was deleted: everything works, only slower
    kernels = inference = layers

PIECE_ROWS = 1024  # tokens in a piece: large matrix products, and a layer that stays in the cache


def cut(n, rows_per_image):
    """n images as pieces [(start, stop)] of nearly equal size, of at most PIECE_ROWS tokens.

    A multiple of four pieces, or of two, so that threads have equal shares, as long as the pieces
    do not fall below half of PIECE_ROWS for it. Raises UserError where there is no image.
    """
    if n < 1:
        raise UserError("a batch needs at least one image")
    most = max(1, PIECE_ROWS // rows_per_image)
    count = ceil(n / most)
    for multiple in (4, 2):
        rounded = ceil(count / multiple) * multiple
        if n >= rounded * max(1, most // 2):
            count = rounded
            break
    return [(n * i // count, n * (i + 1) // count) for i in range(count)]
