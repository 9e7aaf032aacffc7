"""CIFAR-10 and CIFAR-100 from their official binary files (A. Krizhevsky, "Learning Multiple Layers
of Features from Tiny Images", 2009).

A record is one label byte (CIFAR-100: the coarse label of twenty, then the fine one of a hundred,
which is the class here) and 3,072 pixel bytes: red, green, blue, each row by row.

Of CIFAR-10 every file's MD5 is known. Of CIFAR-100 it is the archive's alone: a downloaded copy is
checked whole, while files that lay there already are checked by size and by their labels. The
download of neither has been tried against the official server.
"""

import hashlib
import os
import sys
import tarfile
import tempfile
import warnings
from dataclasses import dataclass

import numpy as np

from ..errors import UserError
from .image_sets import ImageArray

with warnings.catch_warnings():  # pooch's bar warns in a notebook that has no widgets
    warnings.simplefilter("ignore")
    import pooch

AUGMENTATION = "crop-flip"


def cache_folder():
    """Where downloads go if nobody names a folder."""
    return pooch.os_cache("miniconvit")


@dataclass
class Cifar:
    """One of the two data sets: what its files are, and how they are read.

    FILES maps a name to (bytes, MD5), None where it is not known; NAMES is the file of class names,
    one a line. LABELS counts a record's label bytes, of which the last is the class; HELD_OUT
    images of each class leave the training set for val.
    """

    TITLE: str
    URL: str
    ARCHIVE_MD5: str
    ARCHIVE_SIZE: str
    FOLDER: str
    FILES: dict
    NAMES: str
    LABELS: int
    CLASSES: int
    HELD_OUT: int
    MEAN: tuple[float, ...]
    STD: tuple[float, ...]
    AUGMENTATION: str = AUGMENTATION

    def read(self, folders, download):
        """(class names, {"train", "val", "test": (ImageArray, labels)}) of the first folder with
        files.

        folders: Path or None each; a folder may be the files' own or the one above it. val is the
        last HELD_OUT images of each class of the official training set, train the others, all in
        the order of the files. Raises UserError on missing or damaged files and a failed download.
        """
        folder = self._find(folders)
        if folder is None:
            target = folders[0] or folders[-1]
            if not download:
                raise UserError(
                    f"{self.TITLE} was not found: expected the folder {self.FOLDER} in --data-dir, "
                    "in the folder that MINICONVIT_DATA names or in the user's cache; put it there "
                    "or allow the download"
                )
            if folders[0] and not folders[0].is_dir():  # a typing error is no place to fill
                raise UserError(
                    f"there is no folder {folders[0]}, and {self.TITLE} was found nowhere else: "
                    "check the name, or make that folder to download into it"
                )
            folder = self._download(target)
        elif folders[0] and folder not in (folders[0] / self.FOLDER, folders[0]):
            print(f"{folders[0]} holds no {self.TITLE}: it is read from {folder}", file=sys.stderr)
        records = {
            name: self._records(folder / name) for name in self.FILES if name.endswith(".bin")
        }
        classes = self._classes(folder / self.NAMES)
        test = records.pop(next(name for name in records if name.startswith("test")))
        images, labels = (np.concatenate(parts) for parts in zip(*records.values(), strict=True))
        held_out = np.zeros(len(labels), dtype=bool)
        for label in range(len(classes)):
            held_out[np.flatnonzero(labels == label)[-self.HELD_OUT :]] = True
        return classes, {
            "train": (ImageArray(images[~held_out]), labels[~held_out]),
            "val": (ImageArray(images[held_out]), labels[held_out]),
            "test": (ImageArray(test[0]), test[1]),
        }

    def _find(self, folders):
        for folder in filter(None, folders):
            for candidate in (folder / self.FOLDER, folder):
                if any(os.path.exists(candidate / name) for name in self.FILES):
                    return candidate
        return None

    def _checked(self, path):
        size, md5 = self.FILES[path.name]
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"{self.TITLE} file {path} cannot be read ({error.strerror}): {_remedy(path)}"
            ) from error
        if size is not None and len(content) != size:
            raise self._damaged(path, f"{size:,} bytes, found {len(content):,}")
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if md5 is not None and found != md5:
            raise self._damaged(path, f"MD5 {md5}, found {found}")
        return content

    def _damaged(self, path, expected):
        return UserError(
            f"{self.TITLE} file {path} is damaged: expected {expected}; {_remedy(path)}"
        )

    def _classes(self, path):
        names = self._checked(path).decode(errors="replace").splitlines()
        classes = tuple(name for name in names if name)
        if len(set(classes)) != self.CLASSES:
            raise self._damaged(path, f"{self.CLASSES} names, found {len(set(classes))}")
        return classes

    def _records(self, path):
        content = np.frombuffer(self._checked(path), dtype=np.uint8)
        records = content.reshape(-1, self.LABELS + 3 * 32 * 32)
        labels = records[:, self.LABELS - 1].astype(np.int64)
        if labels.max() >= self.CLASSES:
            raise self._damaged(path, f"labels below {self.CLASSES}, found {labels.max()}")
        return records[:, self.LABELS :].reshape(-1, 3, 32, 32).copy(), labels

    def _download(self, target):
        """Download and unpack the archive; the folder appears under its name only when complete."""
        print(
            f"Downloading {self.TITLE} from {self.URL} ({self.ARCHIVE_SIZE}) to {target}",
            file=sys.stderr,
        )
        pooch.get_logger().setLevel("WARNING")  # the line above says it already
        try:
            target.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target) as work:
                archive = pooch.retrieve(
                    self.URL,
                    f"md5:{self.ARCHIVE_MD5}",
                    path=work,
                    fname="archive.tar.gz",
                    progressbar=True,
                )
                with tarfile.open(archive) as tar:
                    members = [tar.getmember(f"{self.FOLDER}/{name}") for name in self.FILES]
                    tar.extractall(work, members=members, filter="data")
                os.replace(os.path.join(work, self.FOLDER), target / self.FOLDER)
        except (OSError, ValueError, KeyError, tarfile.TarError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{self.TITLE} could not be downloaded from {self.URL} to {target}: {reason}; "
                f"check the network and the disk, or put the folder {self.FOLDER} there yourself"
            ) from error
        return target / self.FOLDER


def _remedy(path):
    return f"delete the folder {path.parent} and let it be downloaded again"


CIFAR10 = Cifar(
    TITLE="CIFAR-10",
    URL="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    ARCHIVE_MD5="c32a1d4ab5d03f1284b67883e8d87530",
    ARCHIVE_SIZE="about 170 MB",
    FOLDER="cifar-10-batches-bin",
    FILES={
        "data_batch_1.bin": (30_730_000, "5dd7e06a14cb22eb9f671a540d1b7c25"),
        "data_batch_2.bin": (30_730_000, "5ea93a67294ea407fff1d09f752e9692"),
        "data_batch_3.bin": (30_730_000, "942cd6a4bcdd0dd3c604fbe906cb4421"),
        "data_batch_4.bin": (30_730_000, "ae636b3ba5c66a11e91e8cb52e771fcb"),
        "data_batch_5.bin": (30_730_000, "53f37980c15c3d472c316c40844f3f0d"),
        "test_batch.bin": (30_730_000, "803d5f7f4d78ea53de84dbe85f74fb6d"),
        "batches.meta.txt": (61, "728051cd483f366e254dddb25bead8b3"),
    },
    NAMES="batches.meta.txt",
    LABELS=1,
    CLASSES=10,
    HELD_OUT=500,
    MEAN=(0.4914, 0.4822, 0.4465),
    STD=(0.2470, 0.2435, 0.2616),
)

CIFAR100 = Cifar(
    TITLE="CIFAR-100",
    URL="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    ARCHIVE_MD5="03b5dce01913d631647c71ecec9e9cb8",
    ARCHIVE_SIZE="about 169 MB",
    FOLDER="cifar-100-binary",
    FILES={
        "train.bin": (153_700_000, None),
        "test.bin": (30_740_000, None),
        "fine_label_names.txt": (None, None),
    },
    NAMES="fine_label_names.txt",
    LABELS=2,
    CLASSES=100,
    HELD_OUT=50,
    MEAN=(0.5071, 0.4865, 0.4409),
    STD=(0.2673, 0.2564, 0.2762),
)
