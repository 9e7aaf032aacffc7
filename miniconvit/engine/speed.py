"""How fast a model trains or answers on this machine, on random images."""

import sys
import time
from contextlib import contextmanager, suppress
from itertools import count
from statistics import median

import numpy as np

from ..arrays import to_device
from ..neighbours.models import MODELS
from ..optim import AdamW
from . import classification, make_engine
from .cuda import resolve_device, without_reason

WARM_UP = 2  # steps not counted: the first ones ask the system for memory


@contextmanager
def stepper(config, batch_size, inference=False, workers=None, device="cpu", precision="float32"):
    """Gives (step, facts): step() makes a training step (forward, backward, AdamW), or with
    inference=True a forward, and returns its seconds; facts() is what measure says beside them."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((batch_size, config.in_chans, *config.image), dtype="float32")
    labels = rng.integers(config.num_classes, size=batch_size)
    xp, place = resolve_device(device)
    place = without_reason(place)
    params = MODELS[type(config)].init(config, 0)
    images, labels, params = to_device((images, labels, params), xp)
    optimizer = None if inference else AdamW(params, lr=1e-3)
    with make_engine(classification(config), xp, workers, precision) as engine:
        if optimizer:
            engine.hold(params, optimizer)
        numbers = count()

        def step():
            began = time.perf_counter()
            if inference:
                engine.logits(lambda start, stop: images[start:stop], batch_size, params)
            else:
                _, _, grads = engine.loss_and_grads(
                    lambda start, stop: (images[start:stop], labels[start:stop]),
                    batch_size,
                    params,
                    step=next(numbers),
                )
                engine.update(optimizer, params, grads)
            engine.wait()
            return time.perf_counter() - began

        def facts():
            if xp is np:
                peak = peak_memory_mb()
                peak = peak and peak + engine.memory_mb()
            else:
                peak = engine.memory_mb()
            return {
                "peak_memory_mb": peak,
                "workers": engine.workers,
                "computed": without_reason(place),
            }

        yield step, facts


def measure(
    config, batch_size, steps, inference=False, workers=None, device="cpu", precision="float32"
):
    """Times `steps` training steps (forward, backward, AdamW), or with inference=True forwards.

    Returns a dict: images_per_second and step_ms_median from the median step, peak_memory_mb of
    all processes or, on a GPU, of the arrays there, step_ms of every counted step, workers, and
    where that was.
    """
    with stepper(config, batch_size, inference, workers, device, precision) as (step, facts):
        seconds = [step() for _ in range(WARM_UP + steps)][WARM_UP:]
        return {
            "images_per_second": batch_size / median(seconds),
            "step_ms_median": 1000 * median(seconds),
            "step_ms": [1000 * s for s in seconds],
        } | facts()


def peak_memory_mb():
    """The most memory (resident, in MB) that this process has held; None where no one knows."""
    # on Linux getrusage counts what the process that started this one held, too
    with suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
