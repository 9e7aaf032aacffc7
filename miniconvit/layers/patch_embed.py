"""Patch embedding: a convolution whose stride is its kernel, which is one matrix product."""

from ..config import as_pair
from .linear import linear_backward, linear_forward


def patch_embed_forward(images, weight, bias, patch_size):
    """Token n = row * cols + col is the patch at (row, col), flattened as (channel, y, x), times
    the weight flattened alike.

    images (B, C, height, width), weight (D, C, ph, pw), bias (D,), patch_size int or (ph, pw).
    Returns (B, N, D).
    """
    B, C, height, width = images.shape
    ph, pw = as_pair(patch_size)
    rows, cols = height // ph, width // pw
    patches = images.reshape(B, C, rows, ph, cols, pw)
    patches = patches.transpose(0, 2, 4, 1, 3, 5)  # (B, rows, cols, C, ph, pw)
    patches = patches.reshape(B, rows * cols, C * ph * pw)
    y, cache = linear_forward(patches, weight.reshape(weight.shape[0], -1), bias)
    return y, (cache, images.shape, weight.shape, (rows, cols))


def patch_embed_backward(dy, cache, need_dimages=True):
    """The linear layer's gradients, folded back: dimages puts every patch where it was cut.

    dy (B, N, D). Returns dimages (None with need_dimages=False), dweight, dbias.
    """
    cache_linear, image_shape, weight_shape, (rows, cols) = cache
    B, C, height, width = image_shape
    dpatches, dweight, dbias = linear_backward(dy, cache_linear, need_dx=need_dimages)
    dimages = None
    if need_dimages:
        dpatches = dpatches.reshape(B, rows, cols, C, height // rows, width // cols)
        dimages = dpatches.transpose(0, 3, 1, 4, 2, 5).reshape(image_shape)
    return dimages, dweight.reshape(weight_shape), dbias
