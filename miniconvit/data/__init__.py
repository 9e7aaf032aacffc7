"""Data sets, augmentation and normalisation: uint8 images (n, 3, H, W), or files that
are decoded into them, and int64 labels (n,)."""

from .augment import augment, epoch_order, normalize
from .dataset import Dataset, Split, load_dataset
from .feed import feed, training_images
from .imagefolder import ImageFiles

__all__ = [
    "Dataset",
    "ImageFiles",
    "Split",
    "augment",
    "epoch_order",
    "feed",
    "load_dataset",
    "normalize",
    "training_images",
]
