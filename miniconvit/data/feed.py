"""Images for a step: loaded where it asks for them, or ahead of it."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice

import numpy as np

AHEAD = 2  # batches that are loaded or wait while one is in use
PART = 8  # images that one of several workers loads at a time


def feed(view, batches, workers=0, spans=None):
    """For each of the batches, in order, a function (start, stop) -> view(batch[start:stop]).

    view(indices) -> array (len(indices), ...), whose rows depend on their own index alone. Without
    workers it is called when the function is. Otherwise so many threads call it, in parts, for the
    next AHEAD batches while one is in use: the same rows, in the memory of AHEAD + 2 batches. What
    view raises is raised by the function; closing the generator ends the threads. spans(n): the
    parts [(start, stop)] of a batch of n that will be asked for, by default all of it.
    """
    if not workers:
        for batch in batches:
            yield lambda start, stop, batch=batch: view(batch[start:stop])
        return
    spans = spans or whole
    batches, waiting = iter(batches), deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        while True:
            for batch in islice(batches, AHEAD + 1 - len(waiting)):
                size = PART if workers > 1 else len(batch)
                loading = {
                    (start, stop): [
                        pool.submit(view, batch[first : min(first + size, stop)])
                        for first in range(start, stop, size)
                    ]
                    for start, stop in spans(len(batch))
                    if start < stop
                }
                waiting.append(loading)
            if not waiting:
                return
            yield _loaded(waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def whole(n):
    """A batch of n as one part."""
    return [(0, n)]


def _loaded(loading):
    """The function (start, stop) of one batch, once its parts are there; or one that raises what
    one of them has raised."""
    try:
        rows = {
            span: np.concatenate([part.result() for part in parts])
            for span, parts in loading.items()
        }
    except Exception as error:
        return partial(_fail, error)

    def view(start, stop):
        there = next(span for span in rows if span[0] <= start and stop <= span[1])
        return rows[there][start - there[0] : stop - there[0]]

    return view


def _fail(error, start, stop):
    raise error
