"""Images for a step: loaded where it asks for them, or ahead of it."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np

AHEAD = 2  # batches that are loaded or wait while one is in use
PART = 8  # images that one of several workers loads at a time


def feed(view, batches, workers=0):
    """For each of the batches, in order, a function (start, stop) -> view(batch[start:stop]).

    view(indices) -> array (len(indices), ...), whose rows depend on their own index alone. Without
    workers it is called when the function is. Otherwise so many threads call it, in parts, for the
    next AHEAD batches while one is in use: the same rows, in the memory of AHEAD + 2 batches. What
    view raises is raised here; closing the generator ends the threads.
    """
    if not workers:
        for batch in batches:
            yield lambda start, stop, batch=batch: view(batch[start:stop])
        return
    batches, waiting = iter(batches), deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        while True:
            for batch in islice(batches, AHEAD + 1 - len(waiting)):
                size = PART if workers > 1 else len(batch)
                parts = [batch[first : first + size] for first in range(0, len(batch), size)]
                waiting.append([pool.submit(view, part) for part in parts])
            if not waiting:
                return
            rows = np.concatenate([part.result() for part in waiting.popleft()])
            yield lambda start, stop, rows=rows: rows[start:stop]
    finally:
        pool.shutdown(cancel_futures=True)
