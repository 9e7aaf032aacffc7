"""AdamW for the CPU, with each parameter in one pass over memory."""

from math import sqrt

import numpy as np

from ...arguments import check_step
from ...optim import MOMENTUM, NEVER_DECAYED, AdamW, is_running
from .compiled import is_float32, plain
from .float32 import passes


def adamw_step(optimizer, params, grads, lr=None):
    """As optimizer.step, which it calls for other optimizers and for anything but float32 arrays of
    NumPy. A parameter's bits do not depend on which others come with it: workers have shares."""
    state = params, grads, optimizer.exp_avg, optimizer.exp_avg_sq
    if type(optimizer) is not AdamW or not all(
        is_float32(arrays.get(name)) for arrays in state for name in params
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
        g, m, v = (arrays[name] for arrays in state[1:])
        if is_running(name):
            p -= MOMENTUM * g
            continue
        decays = p.ndim >= 2 and name not in NEVER_DECAYED
        kept = 1.0 - lr * optimizer.weight_decay if decays else 1.0
        numbers = kept, rate, beta1, 1.0 - beta1, beta2, 1.0 - beta2, scale, optimizer.eps
        flat = [plain(x).reshape(-1) for x in (p, g, m, v)]
        passes.adamw(*flat, *map(np.float32, numbers))
        for x, vector in ((p, flat[0]), (m, flat[2]), (v, flat[3])):
            if not np.may_share_memory(x, vector):
                x[...] = vector.reshape(x.shape)
