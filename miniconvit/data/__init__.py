"""Data sets, augmentation and normalisation: uint8 images (n, 3, H, W) and int64 labels (n,)."""

from .augment import augment, epoch_order, normalize
from .dataset import Dataset, Split, load_dataset

__all__ = ["Dataset", "Split", "augment", "epoch_order", "load_dataset", "normalize"]
