"""AdamW for the CPU, with each parameter in one pass over memory."""

from math import sqrt

import numpy as np

from ...arguments import check_step
from ...optim import NEVER_DECAYED, AdamW, is_running
from .compiled import cached

with cached("passes"):
    from . import passes


def adamw_step(optimizer, params, grads, lr=None):
    """As optimizer.step, which it calls for anything but float32 NumPy arrays, running statistics
    and other optimizers."""
    state = params, grads, optimizer.exp_avg, optimizer.exp_avg_sq
    if (
        type(optimizer) is not AdamW
        or any(map(is_running, params))
        or not all(_is_plain(arrays.get(name)) for arrays in state for name in params)
    ):
        optimizer.step(params, grads, lr)
        return
    check_step(params, grads, optimizer.exp_avg)
    lr = optimizer.lr if lr is None else lr
    optimizer.step_count += 1
    beta1, beta2 = optimizer.betas
    rate = lr / (1.0 - beta1**optimizer.step_count)
    scale = 1.0 / sqrt(1.0 - beta2**optimizer.step_count)
    for name, p in params.items():
        decays = p.ndim >= 2 and name not in NEVER_DECAYED
        kept = 1.0 - lr * optimizer.weight_decay if decays else 1.0
        numbers = kept, rate, beta1, 1.0 - beta1, beta2, 1.0 - beta2, scale, optimizer.eps
        vectors = (arrays[name].reshape(-1) for arrays in state)
        passes.adamw(*vectors, *map(np.float32, numbers))


def _is_plain(x):
    return isinstance(x, np.ndarray) and x.dtype == np.float32 and x.flags.carray
