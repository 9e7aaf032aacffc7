"""Data sets, augmentation and normalisation: uint8 images (n, 3, H, W) and int64 labels (n,)."""

from .augment import PRESETS, augment, epoch_order, erase, normalize
from .dataset import Dataset, Split, load_dataset
from .mixing import draw_mix, mix_images, mix_targets

__all__ = [
    "PRESETS",
    "Dataset",
    "Split",
    "augment",
    "draw_mix",
    "epoch_order",
    "erase",
    "load_dataset",
    "mix_images",
    "mix_targets",
    "normalize",
]
