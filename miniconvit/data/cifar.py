"""CIFAR-10 (Krizhevsky 2009) from the official binary files, found or downloaded."""

import hashlib
import sys
import tarfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pooch

from ..errors import UserError
from .dataset import Dataset, Split, data_folders

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
ARCHIVE_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
FOLDER = "cifar-10-batches-bin"
NAMES = "batches.meta.txt"
TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST = "test_batch.bin"
MD5 = {
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
    "batches.meta.txt": "728051cd483f366e254dddb25bead8b3",
}
RECORD = 1 + 3 * 32 * 32  # bytes: a label, then the red, green and blue planes, row by row
HELD_OUT = 500  # of each class: the last ones in the order of the files
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def load_cifar10(data_dir=None, download=True):
    """50,000 training images, of which the last 500 of each class are val, and 10,000 of test.

    Raises UserError where the files are not found and not to be had, or damaged.
    """
    folder = _find(data_dir) or _download(data_dir, download)
    contents = {name: _checked(folder / name) for name in MD5}
    classes = tuple(contents[NAMES].decode().split())
    whole = _split(b"".join(contents[name] for name in TRAIN))
    held_out = np.zeros(len(whole.labels), dtype=bool)
    for label in range(len(classes)):
        held_out[np.flatnonzero(whole.labels == label)[-HELD_OUT:]] = True
    train, val = (Split(whole.images[m], whole.labels[m]) for m in (~held_out, held_out))
    test = _split(contents[TEST])
    return Dataset("cifar10", classes, MEAN, STD, "crop-flip", train, val, test)


def _find(data_dir):
    """The folder with the files, or None. A data_dir may be that folder itself."""
    for folder in data_folders(data_dir):
        for candidate in (folder, folder / FOLDER):
            if (candidate / TRAIN[0]).exists():
                return candidate
    return None


def _checked(path):
    """The bytes of one of the files. Raises UserError where they are not the official ones."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror or error}; delete the folder {path.parent} "
            "and run again to download it"
        ) from error
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != MD5[path.name]:
        raise UserError(
            f"{path} is damaged ({len(content):,} bytes, wrong MD5): delete the folder "
            f"{path.parent} and run again to download it"
        )
    return content


def _split(content):
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, RECORD)
    images = np.ascontiguousarray(records[:, 1:]).reshape(-1, 3, 32, 32)
    return Split(images, records[:, 0].astype(np.int64))


def _download(data_dir, allowed):
    """Fetches, verifies and unpacks the archive; the folder with the files."""
    places = data_folders(data_dir)
    looked = ", ".join(str(place) for place in places)
    if not allowed:
        raise UserError(
            f"CIFAR-10 ({FOLDER}) was not found in {looked}: give --data-dir, or allow the download"
        )
    target = Path(data_dir) if data_dir else places[-1]
    print(f"downloading CIFAR-10 from {URL} (170 MB) to {target}", file=sys.stderr, flush=True)
    try:
        archive = pooch.retrieve(
            URL, f"md5:{ARCHIVE_MD5}", path=target, fname=Path(URL).name, progressbar=True
        )
        with tarfile.open(archive) as tar:
            wanted = [tar.getmember(f"{FOLDER}/{name}") for name in MD5]
            tar.extractall(target, wanted, filter="data")
    except Exception as error:  # of requests, pooch, tarfile or the disk: one answer to all
        raise UserError(
            f"could not download CIFAR-10 from {URL} ({_cause(error)}): download and unpack it "
            "yourself and give its folder as --data-dir"
        ) from error
    with suppress(OSError):
        Path(archive).unlink()
    return target / FOLDER


def _cause(error):
    """The innermost reason, in a few words."""
    while (error.__cause__ or error.__context__) is not None:
        error = error.__cause__ or error.__context__
    return " ".join(str(error).split())[:150] or type(error).__name__
