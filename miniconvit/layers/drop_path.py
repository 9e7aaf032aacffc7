"""Drop path, or stochastic depth (Huang et al. 2016): a branch is left out for some images."""


def drop_path_forward(x, keep, keep_prob):
    """y = x * keep / keep_prob, so that the mean over the masks is x.

    x (B, ...), keep (B,) of 0 and 1: one draw per image, given by the caller.
    """
    factor = keep.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1)) / keep_prob  # (B, 1, 1)
    return x * factor, factor


def drop_path_backward(dy, cache):
    """dx = dy * keep / keep_prob: the same factor."""
    factor = cache
    return dy * factor
