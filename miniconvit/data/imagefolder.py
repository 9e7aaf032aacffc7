"""imagefolder: images of any size in `train/CLASS/`, `val/CLASS/` and perhaps `test/CLASS/`, which
are decoded when they are needed.

The classes are the folders of train in alphabetical order; val and test have the same ones. Where
there is no val, a share HELD_OUT of each class of train, drawn at random but always the same, takes
its place. Where there is no test, or one without the classes, the data set has none.
"""

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
from .layout import SPLITS, counted, list_splits, nested_hint, split_folders

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
    UserError where Pillow or a folder is missing, a class is empty or the only one, the splits'
    classes differ, or a folder may be meant otherwise. What is passed over is counted.
    """
    require_pillow("imagefolder")
    root = next(filter(None, folders[:2]), None)
    places, notes = split_folders(root, to_train)
    classes, splits, ignored, more_notes = list_splits(root, places)
    if to_train and len(classes) == 1:
        raise UserError(
            f"{places['train']} holds one class folder only, {classes[0]}, and a model needs two "
            f"to tell apart{nested_hint(places['train'] / classes[0])}"
        )
    splits = _whole(splits, root, broken)
    for note in notes + more_notes:
        _say(note)
    if ignored:
        _say(f"ignored in {root}: {counted(ignored)}")
    if "val" not in splits:
        splits["train"], splits["val"] = _held_out(splits["train"], classes, root)
        places["val"] = places["train"]
    found = {}
    for split, (paths, labels) in splits.items():
        counts = np.bincount(labels, minlength=len(classes))
        if not counts.all():
            empty = places[split] / classes[int(counts.argmin())]
            raise UserError(f"the class folder {empty} holds no usable image: fill or delete it")
        found[split] = ImageFiles(tuple(paths), as_pair(img_size)), np.array(labels, np.int64)
    return classes, {split: found.get(split) for split in SPLITS}


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
