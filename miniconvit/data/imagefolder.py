"""imagefolder: images of any size in `train/CLASS/`, `val/CLASS/` and perhaps `test/CLASS/`, which
are decoded when they are needed.

The classes are the folders of train in alphabetical order; val and test have the same ones. Where
there is no val, a share HELD_OUT of each class of train, drawn at random but always the same, takes
its place. Where there is no test, or one without class folders, the data set has none.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from tqdm import tqdm

from ..arrays import HOLD_OUT, random_bits
from ..config import IMAGENET_MEAN, IMAGENET_STD, as_pair
from ..errors import UserError
from ..system import available_threads
from .image_sets import ImageFiles
from .images import finding, require_pillow

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
SPLITS = ("train", "val", "test")
HELD_OUT = 0.1
NAMED = 10  # broken files that are named, of those left out

MEAN, STD = IMAGENET_MEAN, IMAGENET_STD
AUGMENTATION = "crop-flip"
BROKEN = ("refuse", "skip")


def read(folders, download, img_size=224, broken="refuse", to_train=True):
    """(class names, {"train", "val", "test": (ImageFiles, labels), test perhaps None}).

    folders: Path or None each; the first that is one holds train/, the others are not looked at,
    and nothing is ever downloaded. With to_train=False val/ alone will do, and train may be None.
    Every file's header and end are looked at: broken="refuse" raises UserError where a file is
    broken; "skip" decodes every file once, and leaves out and names those that fail. Raises
    UserError where Pillow or a folder is missing, a class is empty or the splits' classes differ.
    """
    require_pillow("imagefolder")
    root = next(filter(None, folders[:2]), None)
    needed = ("train",) if to_train else ("train", "val")
    if root is None or not any((root / split).is_dir() for split in needed):
        missing = f"there is no folder {' or '.join(needed)} in {root}"
        found = missing if root else "--data-dir is missing"
        raise UserError(
            f"imagefolder reads train/CLASS/NAME.jpg (or png, webp) and val/CLASS/NAME.jpg, but "
            f"{found}: name the folder above train with --data-dir"
        )
    classes, splits, ignored = _listed(root)
    splits = _whole(splits, root, broken)
    if ignored:
        _say(f"ignored in {root}: {ignored:,} files that are no {', '.join(ENDINGS)} in a class")
    if "val" not in splits:
        splits["train"], splits["val"] = _held_out(splits["train"], classes, root)
    found = {}
    for split, (paths, labels) in splits.items():
        counts = np.bincount(labels, minlength=len(classes))
        if not counts.all():
            empty = root / split / classes[int(counts.argmin())]
            raise UserError(f"the class folder {empty} holds no usable image: fill or delete it")
        found[split] = ImageFiles(tuple(paths), as_pair(img_size)), np.array(labels, np.int64)
    return classes, {split: found.get(split) for split in SPLITS}


def _listed(root):
    """(classes, {split: (paths, labels)}, number of files passed over), everything sorted."""
    classes, splits, ignored = None, {}, 0
    for split in SPLITS:
        if not (root / split).is_dir():
            continue
        with os.scandir(root / split) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
        names = [entry.name for entry in entries if entry.is_dir() and entry.name[0] != "."]
        if split == "test" and not names:
            _say(f"{root / split} holds no class folders: it is not used")
            continue
        ignored += sum(entry.is_file() for entry in entries)
        classes = classes or tuple(names)
        _refuse_other_classes(root / split, names, next(iter(splits), split), classes)
        paths, labels = [], []
        for label, name in enumerate(names):
            images, others = _images(root / split / name)
            paths += images
            labels += [label] * len(images)
            ignored += others
        splits[split] = paths, labels
    return classes, splits, ignored


def _refuse_other_classes(folder, names, first, classes):
    """first: the split in which the classes were found."""
    if not names:
        raise UserError(f"{folder} holds no class folders: expected {folder}/CLASS/NAME.jpg")
    if set(names) != set(classes):
        only = [
            sorted(set(one) - set(other)) for one, other in ((names, classes), (classes, names))
        ]
        parts = [
            f"{len(here)} only in {split}, the first {here[0]}"
            for here, split in zip(only, (folder.name, first), strict=True)
            if here
        ]
        raise UserError(
            f"{folder} and {folder.parent / first} must have the same class folders, and "
            f"{'; '.join(parts)}: add what is missing or delete what is not meant"
        )


def _images(folder):
    """(sorted paths of the images in a folder and below, number of other files)."""
    paths, others = [], 0
    for place, below, names in os.walk(folder):
        below[:] = [name for name in below if name[0] != "."]
        images = [name for name in names if name[0] != "." and name.lower().endswith(ENDINGS)]
        paths += [os.path.join(place, name) for name in images]
        others += len(names) - len(images)
    return sorted(paths), others


def _whole(splits, root, broken):
    """The splits without broken files; where these are not to be skipped, a UserError."""
    paths = [path for listed, _ in splits.values() for path in listed]
    look = partial(finding, thorough=broken == "skip")
    with ThreadPoolExecutor(available_threads()) as pool:
        problems = pool.map(look, paths)
        progress = tqdm(problems, "checking", len(paths), leave=False, delay=3, disable=None)
        problems = {path: why for path, why in zip(paths, progress, strict=True) if why}
    if not problems:
        return splits
    count = f"{len(problems):,} of {len(paths):,} image files in {root}"
    if broken == "refuse":
        first, why = next(iter(problems.items()))
        raise UserError(
            f"{count} cannot be read, the first is {first} ({why}): repair or delete, or leave "
            "them out with --broken skip"
        )
    _say(f"left out, because broken: {count}")
    for path, why in list(problems.items())[:NAMED]:
        _say(f"  {path} ({why})")
    if len(problems) > NAMED:
        _say(f"  and {len(problems) - NAMED:,} more")
    return {
        split: tuple(
            zip(*[pair for pair in zip(*both, strict=True) if pair[0] not in problems], strict=True)
        )
        or ((), ())
        for split, both in splits.items()
    }


def _held_out(train, classes, root):
    """(train, val): the same HELD_OUT of each class every time, at least one image."""
    paths, labels = (np.array(part) for part in train)
    held_out = np.zeros(len(labels), bool)
    for label, name in enumerate(classes):
        of_class = np.flatnonzero(labels == label)
        if len(of_class) < 2:
            raise UserError(
                f"{root} has no folder val, and the class {name} has {len(of_class)} images, of "
                "which none can be held out for it: add val, or at least two images a class"
            )
        order = random_bits(0, HOLD_OUT, label, np.arange(len(of_class))).argsort()
        held_out[of_class[order[: max(1, round(HELD_OUT * len(of_class)))]]] = True
    _say(
        f"{root} has no folder val: {held_out.sum():,} of the {len(labels):,} training images, "
        f"{HELD_OUT:.0%} of each class, are held out"
    )
    return [(paths[part].tolist(), labels[part].tolist()) for part in (~held_out, held_out)]


def _say(text):
    print(text, file=sys.stderr)
