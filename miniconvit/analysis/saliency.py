"""Where a small change of a pixel moves a logit: the gradient with respect to the image."""

from types import SimpleNamespace

import numpy as np

from .. import layers
from ..arrays import array_module
from ..errors import shortened
from ..layers.patch_embed import patch_embed_backward
from ..model import convit_backward, convit_forward
from . import style

MOST = 8  # images in a picture
MEANING = (
    "Dark: where a small change of a pixel moves the logit of this class most, up or down. It is "
    "the slope\nat this very image. It does not show what the model would say without a part of it."
)


def logit_gradient(images, labels, params, config):
    """d logits[b, labels[b]] / d images, exactly, with the shape of images.

    images (B, in_chans, height, width) as in convit_forward; labels (B,).
    """
    seen = []

    def recording(backward):
        def record(dy, cache):
            dx, grads = backward(dy, cache)
            seen.append(dx)
            return dx, grads

        return record

    blocks = SimpleNamespace(
        block_forward=layers.block_forward,
        last_block_forward=layers.last_block_forward,
        block_backward=recording(layers.block_backward),
        last_block_backward=recording(layers.last_block_backward),
    )
    logits, cache = convit_forward(images, params, config, blocks=blocks)
    xp = array_module(logits)
    one_hot = xp.arange(config.num_classes) == xp.asarray(labels)[:, None]  # (B, C)
    convit_backward(one_hot.astype(logits.dtype), cache)
    dx = seen[-1][:, -config.num_patches :]  # (B, N, D): of the first block, without a class token
    dimages, _, _ = patch_embed_backward(dx, cache[0])
    return dimages


@style.look()
def draw_saliency(rows, path):
    """A picture of a row an image: the image, the size of its gradient, and both together.

    rows: a list of (title, picture (height, width, 1 or 3) from 0 to 1, gradient (channels, height,
    width)). Of the channels the greatest counts (Simonyan, Vedaldi, Zisserman 2014), and of each
    image the greatest pixel is the darkest.
    """
    from matplotlib.colors import LinearSegmentedColormap

    colors = LinearSegmentedColormap.from_list("saliency", (style.GATE, "#3D1236"))
    grid = rows[0][1].shape[:2]
    tall = style.WIDTH / 3 * grid[0] / grid[1] + 0.25
    figure, axes = style.new_figure(len(rows), 3, tall * len(rows) + 0.6)
    for row, (title, picture, gradient) in zip(axes, rows, strict=True):
        size = np.abs(gradient).max(axis=0)  # (height, width)
        size = size / (size.max() or 1.0)
        grey = 0.4 + 0.6 * picture.mean(axis=2, keepdims=True)
        for axis, below in zip(row, (picture, np.ones_like(grey), grey), strict=True):
            style.draw_picture(axis, below, grid)
        for axis in row[1:]:
            axis.imshow(size, cmap=colors, vmin=0, vmax=1, alpha=size)
        row[0].set_title(shortened(title, 100), loc="left", parse_math=False)
    for axis, name in zip(axes[-1], ("image", "size of the gradient", "both"), strict=True):
        axis.set_xlabel(name)
    figure.supxlabel(MEANING, fontsize=7)
    style.save(figure, path, style.SCREEN)
