"""AdamW, gradient clipping, an average of the parameters, and the learning rate over time."""

from math import cos, inf, pi, sqrt

import numpy as np

from .arguments import check_max_norm, check_rates, check_step
from .arrays import Params, array_module

NEVER_DECAYED = ("pos_embed", "cls_token")
MOMENTUM = 0.1


def is_running(name):
    """Whether a parameter is a running statistic, whose gradient is what it is off by."""
    return name.endswith(("running_mean", "running_var"))


class AdamW:
    """Adam with decoupled weight decay (Loshchilov, Hutter 2019), in place.

    Tensors of two or more axes are decayed, except pos_embed and cls_token: the official groups.
    Running statistics follow what they are off by, a tenth of it a step, at any rate.
    State: the two moments of each parameter, `exp_avg` and `exp_avg_sq`, and the step count.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        check_rates(lr, weight_decay, betas, eps)
        self.lr, self.weight_decay, self.eps = float(lr), float(weight_decay), float(eps)
        self.betas = tuple(map(float, betas))
        self.step_count = 0
        self.exp_avg = {name: _zeros_like(p) for name, p in params.items()}
        self.exp_avg_sq = {name: _zeros_like(p) for name, p in params.items()}

    def step(self, params: Params, grads: Params, lr: float | None = None) -> None:
        """p -= lr * decay * p;  p -= lr * mhat / (sqrt(vhat) + eps), for every parameter.

        mhat and vhat are the moments divided by 1 - beta^t, which undoes their start at zero.
        lr: this step's rate, the constructor's where None. Raises UserError, before anything has
        changed, where a gradient is missing or has another form than its parameter.
        """
        check_step(params, grads, self.exp_avg)
        lr = self.lr if lr is None else lr
        beta1, beta2 = self.betas
        self.step_count += 1
        correction1 = 1.0 - beta1**self.step_count
        correction2 = 1.0 - beta2**self.step_count
        for name, p in params.items():
            g, m, v = grads[name], self.exp_avg[name], self.exp_avg_sq[name]
            if is_running(name):
                p -= MOMENTUM * g
                continue
            if p.ndim >= 2 and name not in NEVER_DECAYED:
                p *= 1.0 - lr * self.weight_decay
            m *= beta1
            m += (1.0 - beta1) * g
            v *= beta2
            v += (1.0 - beta2) * g * g
            denominator = array_module(p).sqrt(v)
            denominator *= 1.0 / sqrt(correction2)
            denominator += self.eps
            p -= (lr / correction1) * m / denominator


def update_average(average: Params, params: Params, decay: float) -> None:
    """average = decay average + (1 - decay) params, in place: the exponential moving average.

    Written as a difference, so that what does not change stays what it is.
    """
    for name, value in average.items():
        value += (1.0 - decay) * (params[name] - value)


def clip_grad_norm(grads: Params, max_norm: float) -> float:
    """Scales all gradients in place so that their joint L2 norm is at most max_norm.

    Returns the norm before: a float, or a scalar on the device, for which nobody has waited.
    Running statistics are left out. Raises UserError where max_norm is not above 0.
    """
    check_max_norm(max_norm)
    grads = {name: g for name, g in grads.items() if not is_running(name)}
    if not grads:
        return 0.0
    square = sum((g * g).sum() for g in grads.values())
    xp = array_module(square)
    if xp is not np:
        norm = xp.sqrt(square)
        if max_norm < inf:
            factor = xp.minimum(max_norm / norm, 1.0)
            for g in grads.values():
                g *= factor
        return norm
    norm = sqrt(float(square))
    if norm > max_norm:
        for g in grads.values():
            g *= max_norm / norm
    return norm


def _zeros_like(p):
    return array_module(p).zeros_like(p)


def warmup_cosine(
    t: float,
    total: float,
    peak: float,
    warmup: float,
    start: float = 1e-6,
    minimum: float = 1e-5,
) -> float:
    """Linear warm-up from `start` to `peak` over `warmup`, then a cosine down to `minimum`.

    t, total and warmup in one unit (epochs or steps; fractions are fine). The cosine is a function
    of t / total and is not shifted by the warm-up, as in the official script, so at t = warmup it
    begins a little below the peak.
    """
    if t < warmup:
        return start + (peak - start) * t / warmup
    return minimum + 0.5 * (peak - minimum) * (1.0 + cos(pi * min(t / total, 1.0)))
