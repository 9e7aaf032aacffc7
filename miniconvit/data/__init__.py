"""Images to train on, by name."""

from ..errors import UserError
from .augment import augment, normalize
from .cifar import load_cifar10
from .dataset import Dataset, Split, epoch_order, take_subset
from .shapes import load_shapes


def load_dataset(name, data_dir=None, download=True, subset=1.0):
    """The Dataset of that name: "shapes" (built in) or "cifar10".

    data_dir: where to look first; download: whether it may be fetched where it is found nowhere;
    subset: the fraction of each class of train to keep, the first images. Raises UserError.
    """
    if name == "shapes":
        dataset = load_shapes()
    elif name == "cifar10":
        dataset = load_cifar10(data_dir, download)
    else:
        raise UserError(f"unknown data set {name!r}: choose shapes or cifar10")
    return take_subset(dataset, subset)
