"""Cross-entropy, with label smoothing or soft targets."""

from ..arrays import array_module
from ..errors import UserError


def cross_entropy_forward(logits, targets, label_smoothing=0.0):
    """loss = - mean over images of sum_c t_c log p_c,  p = softmax(logits).

    logits (B, C). targets (B,) integers in 0..C-1: t is one-hot, then smoothed as
    (1 - s) t + s / C; or (B, C) probabilities, taken as they are. Returns a scalar array in the
    dtype of the logits. Raises UserError for targets that are neither.
    """
    targets = _checked(logits, targets, label_smoothing)
    xp = array_module(logits)
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


def _checked(logits, targets, label_smoothing):
    """The targets as an array. On a GPU their values are not looked at: that would wait for it."""
    if getattr(logits, "ndim", 0) != 2 or logits.dtype.kind != "f" or logits.size == 0:
        raise UserError(f"logits must be floats (B, C), of at least one image, not {_form(logits)}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise UserError(f"label_smoothing must lie in 0..1, not {label_smoothing}")
    xp, (B, C) = array_module(logits), logits.shape
    try:
        targets = xp.asarray(targets)
    except (TypeError, ValueError) as error:  # a ragged list, or an array that lies elsewhere
        raise UserError(f"targets cannot be made an array of {xp.__name__}: {error}") from error
    if targets.dtype.kind not in "biuf" or targets.shape not in ((B,), (B, C)):
        raise UserError(
            f"targets must be labels ({B},) or probabilities ({B}, {C}) for logits ({B}, {C}), "
            f"not {_form(targets)}"
        )
    if xp.__name__ == "numpy":
        _check_values(targets, C)
    return targets


def _check_values(targets, C):
    low, high = targets.min(), targets.max()
    if targets.ndim == 2:
        if not (low >= 0 and high <= 1 + 1e-3):  # as mixing rounds; NaN is neither
            raise UserError(f"probabilities lie in 0..1, but the targets go from {low} to {high}")
    elif not (low >= 0 and high < C):
        hint = ": classes count from 0, so subtract 1" if low > 0 and high == C else ""
        hint = ": leave out the images that have no label" if low < 0 else hint
        raise UserError(f"labels must lie in 0..{C - 1}, but these go from {low} to {high}{hint}")
    elif targets.dtype.kind == "f" and (targets % 1).any():
        raise UserError("labels must be whole numbers: probabilities have shape (B, C)")


def _form(x):
    return f"{x.dtype} of shape {x.shape}" if hasattr(x, "dtype") else type(x).__name__
