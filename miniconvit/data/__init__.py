"""Data sets, augmentation and normalisation: uint8 images (n, 3, H, W), or files that
are decoded into them, and int64 labels (n,)."""

from .augment import PRESETS, augment, epoch_order, erase, normalize
from .dataset import Dataset, Split, load_dataset
from .feed import feed, training_images
from .imagefolder import ImageFiles
from .mixing import draw_mix, mix_images, mix_targets

__all__ = [
    "PRESETS",
    "Dataset",
    "ImageFiles",
    "Split",
    "augment",
    "draw_mix",
    "epoch_order",
    "erase",
    "feed",
    "load_dataset",
    "mix_images",
    "mix_targets",
    "normalize",
    "training_images",
]
