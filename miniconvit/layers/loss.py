"""Cross-entropy, with label smoothing or soft targets."""

from ..arguments import checked_targets
from ..arrays import array_module


def cross_entropy_forward(logits, targets, label_smoothing=0.0):
    """loss = - mean over images of sum_c t_c log p_c,  p = softmax(logits).

    logits (B, C). targets (B,) integers in 0..C-1: t is one-hot, then smoothed as
    (1 - s) t + s / C; or (B, C) probabilities, taken as they are. Returns a scalar array in the
    dtype of the logits. Raises UserError for targets that are neither.
    """
    xp = array_module(logits)
    targets = checked_targets(xp, logits, targets, label_smoothing)
    B, C = logits.shape
    if targets.ndim == 1:
        one_hot = xp.arange(C) == targets[:, None]  # (B, C)
        t = (1.0 - label_smoothing) * one_hot.astype(logits.dtype) + label_smoothing / C
    else:
        t = targets.astype(logits.dtype)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_p = shifted - xp.log(xp.exp(shifted).sum(axis=-1, keepdims=True))
    return -(t * log_p).sum() / B, (log_p, t)


def cross_entropy_backward(dloss, cache):
    """dlogits = dloss (p sum_c t_c - t) / B: the softmax's Jacobian and the logarithm cancel.

    dloss: a number, the gradient of whatever is made of the loss (1.0 for the loss itself).
    """
    log_p, t = cache
    p = array_module(log_p).exp(log_p)
    return (p * t.sum(axis=-1, keepdims=True) - t) * (dloss / len(t))
