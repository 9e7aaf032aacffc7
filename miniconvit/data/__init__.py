"""Data sets, augmentation and normalisation: uint8 images (n, 3, H, W) in memory or in files, and
int64 labels (n,)."""

from .augment import PRESETS, augment, epoch_order, erase, normalize
from .dataset import Dataset, Split, fingerprint, load_dataset, on_device
from .feed import feed
from .image_sets import ImageArray, ImageFiles
from .images import BrokenImage
from .mixing import draw_mix, draw_patch_mix, mix_images, mix_patch_labels, mix_targets

__all__ = [
    "PRESETS",
    "BrokenImage",
    "Dataset",
    "ImageArray",
    "ImageFiles",
    "Split",
    "augment",
    "draw_mix",
    "draw_patch_mix",
    "epoch_order",
    "erase",
    "feed",
    "fingerprint",
    "load_dataset",
    "mix_images",
    "mix_patch_labels",
    "mix_targets",
    "normalize",
    "on_device",
]
