"""A checkpoint at another resolution: its positional embedding is interpolated."""

from dataclasses import replace

import numpy as np

from .checkpoint import Checkpoint


def at_resolution(checkpoint: Checkpoint, img_size: int | tuple[int, int]) -> Checkpoint:
    """The Checkpoint for images of another size: pos_embed interpolated, the rest as it is, since
    positions count in patches. Raises UserError where the patches do not cut that size."""
    old, config = checkpoint.config, replace(checkpoint.config, img_size=img_size)
    if config.grid == old.grid or not config.use_pos_embed:
        return replace(checkpoint, config=config)
    pos_embed = resample_pos_embed(checkpoint.params["pos_embed"], old.grid, config.grid)
    params = checkpoint.params | {"pos_embed": pos_embed}
    return replace(checkpoint, params=params, config=config)


def resample_pos_embed(
    pos_embed: np.ndarray, old_grid: tuple[int, int], new_grid: tuple[int, int]
) -> np.ndarray:
    """Bicubic interpolation with antialiasing of (1, N, D) from one grid (rows, cols) to another:
    what timm's resample_abs_pos_embed computes."""
    rows, cols = (_bicubic(old, new) for old, new in zip(old_grid, new_grid, strict=True))
    grid = pos_embed.reshape(*old_grid, -1).astype("float64")  # (rows, cols, D)
    grid = np.einsum("ri,cj,ijd->rcd", rows, cols, grid, optimize=True)
    return grid.reshape(1, -1, grid.shape[2]).astype(pos_embed.dtype)


def _bicubic(old, new):
    """Weights (new, old) of the samples of a line: Keys' kernel with a = -1/2 around each new
    sample's place, as wide as a new sample where these are coarser, rescaled to sum one."""
    stretch = max(old / new, 1.0)
    centre = (np.arange(new) + 0.5) * old / new
    x = np.abs((np.arange(old) + 0.5 - centre[:, None]) / stretch)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    weights = np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
    return weights / weights.sum(axis=1, keepdims=True)
