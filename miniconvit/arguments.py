"""What would train wrongly without an error, refused by a sentence before anything has changed."""

from math import inf

import numpy as np

from .errors import UserError, did_you_mean


def checked_targets(xp, logits, targets, label_smoothing):
    """The targets as an array. On a GPU their values are not looked at: that would wait for it."""
    if getattr(logits, "ndim", 0) != 2 or logits.dtype.kind != "f" or logits.size == 0:
        raise UserError(f"logits must be floats (B, C), of at least one image, not {_form(logits)}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise UserError(f"label_smoothing must lie in 0..1, not {label_smoothing}")
    B, C = logits.shape
    try:
        targets = xp.asarray(targets)
    except (TypeError, ValueError) as error:  # a ragged list, or an array that lies elsewhere
        raise UserError(f"targets cannot be made an array of {xp.__name__}: {error}") from error
    if targets.dtype.kind not in "biuf" or targets.shape not in ((B,), (B, C)):
        raise UserError(
            f"targets must be labels ({B},) or probabilities ({B}, {C}) for logits ({B}, {C}), "
            f"not {_form(targets)}"
        )
    if xp is np:
        _check_values(targets, C)
    return targets


def _check_values(targets, C):
    low, high = targets.min(), targets.max()
    if targets.ndim == 2:
        if not (low >= 0 and high < inf):  # NaN is neither
            raise UserError(f"probabilities cannot go from {low} to {high}, as these targets do")
    elif not (low >= 0 and high < C):
        hint = ": classes count from 0, so subtract 1" if low > 0 and high == C else ""
        hint = ": leave out the images that have no label" if low < 0 else hint
        raise UserError(f"labels must lie in 0..{C - 1}, but these go from {low} to {high}{hint}")
    elif targets.dtype.kind == "f" and (targets % 1).any():
        raise UserError("labels must be whole numbers: probabilities have shape (B, C)")


def _form(x):
    return f"{x.dtype} of shape {x.shape}" if hasattr(x, "dtype") else type(x).__name__


def check_params(params, shapes):
    """Raises UserError where a parameter is missing or has another shape, which may broadcast.

    shapes: name to shape.
    """
    for name, shape in shapes.items():
        if name not in params:
            raise UserError(f"the parameter {name} is missing")
        if params[name].shape != shape:
            raise UserError(f"{name} has shape {params[name].shape}, but this model's is {shape}")


def check_rates(lr, weight_decay, betas, eps):
    """Raises UserError where an optimizer could not train with these numbers."""
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("eps", eps)):
        if not 0.0 <= value < inf:
            raise UserError(f"{name} must be 0 or a positive number, not {value}")
    if not (len(betas) == 2 and all(0.0 <= beta < 1.0 for beta in betas)):
        raise UserError(f"betas must be two numbers of at least 0 and below 1, not {betas}")


def check_momentum(momentum):
    """Raises UserError where an average of gradients would forget nothing, or turn round."""
    if not 0.0 <= momentum < 1.0:
        raise UserError(f"momentum must be at least 0 and below 1, not {momentum}")


def check_max_norm(max_norm):
    """Raises UserError for a limit that would turn all gradients round, or be none."""
    if not max_norm > 0.0:  # NaN is not
        raise UserError(f"max_norm must be above 0, not {max_norm}")


def check_step(params, grads, moments):
    """Raises UserError where a gradient does not fit: one that broadcasts would train, and wrongly.

    moments: the optimizer's, under the names of all parameters; params may be some of them.
    """
    for name in grads:
        if name not in moments:
            hint = did_you_mean(name, moments)
            raise UserError(f"there is a gradient of {name!r}, but no such parameter{hint}")
    for name, p in params.items():
        if name not in moments:
            raise UserError(f"this optimizer was made for other parameters, without {name}")
        _check_form(name, p, moments[name])
        if isinstance(p, np.ndarray) and not p.flags.writeable:
            raise UserError(f"{name} cannot be written to: pass a copy of it")
        if name not in grads:
            raise UserError(f"there is no gradient of {name}")
        _check_form(f"the gradient of {name}", grads[name], p)


def _check_form(what, x, like):
    """Raises UserError where x is not an array of floats of the same shape and kind as `like`."""
    if not (isinstance(x, type(like)) or isinstance(like, type(x))):  # lists, or of another device
        raise UserError(f"{what} is {type(x).__name__}, not {type(like).__name__}")
    if x.dtype.kind != "f" or x.shape != like.shape:
        raise UserError(f"{what} is {x.dtype} {x.shape}, but must be {like.dtype} {like.shape}")
