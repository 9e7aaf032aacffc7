"""CIFAR-10 from its official binary files (A. Krizhevsky, "Learning Multiple Layers of Features
from Tiny Images", 2009).

A record is one label byte and 3,072 pixel bytes: red, green, blue, each row by row.
"""

import hashlib
import os
import sys
import tarfile
import tempfile

import numpy as np
import pooch

from ..errors import UserError

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
ARCHIVE_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
ARCHIVE_SIZE = "about 170 MB"
FOLDER = "cifar-10-batches-bin"
FILES = {  # name: (bytes, MD5)
    "data_batch_1.bin": (30_730_000, "5dd7e06a14cb22eb9f671a540d1b7c25"),
    "data_batch_2.bin": (30_730_000, "5ea93a67294ea407fff1d09f752e9692"),
    "data_batch_3.bin": (30_730_000, "942cd6a4bcdd0dd3c604fbe906cb4421"),
    "data_batch_4.bin": (30_730_000, "ae636b3ba5c66a11e91e8cb52e771fcb"),
    "data_batch_5.bin": (30_730_000, "53f37980c15c3d472c316c40844f3f0d"),
    "test_batch.bin": (30_730_000, "803d5f7f4d78ea53de84dbe85f74fb6d"),
    "batches.meta.txt": (61, "728051cd483f366e254dddb25bead8b3"),
}
HELD_OUT = 500
"""Images of each class that leave the official training set for val."""

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
AUGMENTATION = "crop-flip"


def read(folders, download):
    """(class names, {"train", "val", "test": (images, labels)}) of the first folder that has it.

    folders: Path or None each; a folder may be the files' own or the one above it. val is the last
    HELD_OUT images of each class of the official training set, train the others, all in the order
    of the files. Raises UserError on missing or damaged files and a failed download.
    """
    folder = _find(folders)
    if folder is None:
        target = folders[0] or folders[-1]
        if not download:
            raise UserError(
                f"CIFAR-10 was not found: expected the folder {FOLDER} in --data-dir, in the "
                "folder that MINICONVIT_DATA names or in the user's cache; put it there or allow "
                "the download"
            )
        folder = _download(target)
    content = {name: _checked(folder / name) for name in FILES}
    classes = tuple(line for line in content["batches.meta.txt"].decode().splitlines() if line)
    batches = [
        _records(content[name], folder / name, len(classes))
        for name in FILES
        if name.startswith("data_batch")
    ]
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    held_out = np.zeros(len(labels), dtype=bool)
    for label in range(len(classes)):
        held_out[np.flatnonzero(labels == label)[-HELD_OUT:]] = True
    return classes, {
        "train": (images[~held_out], labels[~held_out]),
        "val": (images[held_out], labels[held_out]),
        "test": _records(content["test_batch.bin"], folder / "test_batch.bin", len(classes)),
    }


def _find(folders):
    for folder in filter(None, folders):
        for candidate in (folder / FOLDER, folder):
            if any(os.path.exists(candidate / name) for name in FILES):
                return candidate
    return None


def _checked(path):
    size, md5 = FILES[path.name]
    remedy = f"delete the folder {path.parent} and let it be downloaded again"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"CIFAR-10 file {path} cannot be read ({error.strerror}): {remedy}"
        ) from error
    if len(content) != size:
        raise UserError(
            f"CIFAR-10 file {path} is damaged: expected {size:,} bytes, found {len(content):,}; "
            f"{remedy}"
        )
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise UserError(
            f"CIFAR-10 file {path} is damaged: expected MD5 {md5}, found {found}; {remedy}"
        )
    return content


def _records(content, path, num_classes):
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, 1 + 3 * 32 * 32)
    labels = records[:, 0].astype(np.int64)
    if labels.max() >= num_classes:
        raise UserError(
            f"CIFAR-10 file {path} is damaged: expected labels below {num_classes}, found "
            f"{labels.max()}; delete the file and download it again"
        )
    return records[:, 1:].reshape(-1, 3, 32, 32).copy(), labels


def _download(target):
    """Download and unpack the archive; the folder appears under its name only when complete."""
    print(f"Downloading CIFAR-10 from {URL} ({ARCHIVE_SIZE}) to {target}", file=sys.stderr)
    pooch.get_logger().setLevel("WARNING")  # the line above says it already
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target) as work:
            archive = pooch.retrieve(
                URL, f"md5:{ARCHIVE_MD5}", path=work, fname="archive.tar.gz", progressbar=True
            )
            with tarfile.open(archive) as tar:
                members = [tar.getmember(f"{FOLDER}/{name}") for name in FILES]
                tar.extractall(work, members=members, filter="data")
            os.replace(os.path.join(work, FOLDER), target / FOLDER)
    except (OSError, ValueError, KeyError, tarfile.TarError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"CIFAR-10 could not be downloaded from {URL} to {target}: {reason}; check the network "
            f"and the disk, or put the folder {FOLDER} there yourself"
        ) from error
    return target / FOLDER
