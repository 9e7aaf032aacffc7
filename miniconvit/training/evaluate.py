"""How good a model is on a split of a data set."""

from collections.abc import Callable, Sequence
from contextlib import closing
from math import nan
from typing import Any

import numpy as np

from ..arrays import Array, Params, to_device
from ..data import Split, feed, normalize
from ..layers import cross_entropy_forward


def evaluate(
    engine: Any,
    split: Split,
    mean: Array | Sequence[float],
    std: Array | Sequence[float],
    params: Params,
    between_chunks: Callable[[], None] = lambda: None,
    note: Callable[[Array], None] = lambda logits: None,
) -> tuple[float, float, float]:
    """(loss, top-1, top-5) over a split: mean cross-entropy, and shares between 0 and 1; NaNs where
    the model's answers are not finite.

    between_chunks is called now and then, and may raise to end it; note gets the logits (n, C),
    float64, of all images in order, a chunk at a time.
    """
    loss, top1, top5 = 0.0, 0, 0
    dtype = next(iter(params.values())).dtype
    n, images = len(split.labels), split.images
    chunks = [range(n)[first : first + images.CHUNK] for first in range(0, n, images.CHUNK)]
    workers = images.loaders(engine.workers)
    fed = feed(
        lambda part: images[part.start : part.stop], chunks, workers, lambda n: [engine.span(n)]
    )
    with closing(fed):
        for chunk, pixels in zip(chunks, fed, strict=True):
            between_chunks()
            labels = split.labels[chunk.start : chunk.stop]

            def load(start, stop, pixels=pixels):
                return normalize(to_device(pixels(start, stop), engine.xp), mean, std, dtype)

            logits = engine.logits(load, len(labels), params).astype(np.float64)  # (n, C)
            if not np.isfinite(logits).all():
                return nan, nan, nan
            note(logits)
            loss += float(cross_entropy_forward(logits, labels)[0]) * len(labels)
            right = logits[np.arange(len(labels)), labels]
            rank = (logits > right[:, None]).sum(axis=1)  # (n,), 0 for the best
            top1 += int((logits.argmax(axis=1) == labels).sum())
            top5 += int((rank < 5).sum())
    return loss / n, top1 / n, top5 / n
