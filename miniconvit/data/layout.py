"""How people lay out folders of images: which folder is which split, what is a class, what is an
image, and what archives and systems leave behind."""

import os
import re
import unicodedata
from collections import Counter
from contextlib import suppress
from pathlib import Path

from ..errors import UserError

ENDINGS = frozenset(
    """.jpg .jpeg .jpe .jfif .mpo .png .apng .webp .avif .avifs .gif .bmp .dib .tif .tiff
    .jp2 .j2k .jpf .jpx .ppm .pgm .pbm .pnm .tga .pcx .qoi""".split()  # noqa: SIM905
)
"""Of files that are looked at, where the Pillow here can read them."""

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {
    "train": re.compile(r"train(ing)?"),
    "val": re.compile(r"val(id|idation)?"),
    "test": re.compile(r"test(ing)?"),
}
"""What the folder of a split is called, in any case, with or without a SUFFIX."""
SUFFIX = re.compile(r"[-_ .]?(set|data|images|imgs|split)$")
LIKE_VAL = {"val", "valid", "validate", "validation", "dev", "eval", "evaluation", "holdout"}
"""Words in the name of a folder that is not passed over where there is no val."""

LEFTOVERS = {
    "__macosx",
    "__pycache__",
    "lost+found",
    "$recycle.bin",
    "#recycle",
    "@recycle",
    "recycler",
    "system volume information",
}
"""Folders that archives and systems leave behind, beside those that begin with a dot or @ea."""
NAMED = 10  # folders that are not used


def split_folders(root, to_train):
    """({split: its folder}, notes for the user), in the order of SPLITS.

    root: Path or None. Where it holds no splits, but class folders, it is train itself. Raises
    UserError where a split is missing, there twice, or may be meant by a folder of another name.
    """
    folders = _folders(root) if root and root.is_dir() else []
    places, notes = {}, []
    for split in SPLITS:
        named = [folder for folder in folders if _split_of(folder.name) == split]
        if len({os.path.realpath(folder) for folder in named}) > 1:
            names = " and ".join(folder.name for folder in named)
            raise UserError(f"{root} holds {names}, both to be {split}: keep one of them there")
        if named:
            places[split] = next((folder for folder in named if folder.name == split), named[0])
    if places:
        problem = f"; beside {next(iter(places.values()))} the classes must lie in train"
    else:
        problem = _problem_of_classes(root, folders)
    if problem is None:
        notes.append(f"{root} has no folder train: its {len(folders)} folders are the classes")
        return {"train": root}, notes
    needed = ("train",) if to_train else ("train", "val")
    if not any(split in places for split in needed):
        missing = f"there is no folder {' or '.join(needed)} in {root}"
        missing = missing if root else "--data-dir is missing"
        raise UserError(
            "imagefolder reads train/CLASS/NAME.jpg (or png, webp ...) and val/CLASS/NAME.jpg, or "
            f"CLASS/NAME.jpg, but {missing}: name the folder above train, or above the classes, "
            f"with --data-dir{_elsewhere(root, folders)}{problem}"
        )
    notes += [
        f"{place} is used as {split}" for split, place in places.items() if place.name != split
    ]
    others = [folder for folder in folders if _split_of(folder.name) is None]
    if "val" not in places:
        _refuse_like_val(others, places["train"])
    if others:
        more = f" and {len(others) - NAMED:,} more" * (len(others) > NAMED)
        names = ", ".join(folder.name for folder in others[:NAMED])
        notes.append(f"not used in {root}: the folders {names}{more}")
    return places, notes


def list_splits(root, places):
    """(classes, {split: (paths, labels)}, Counter of what is passed over, notes), all sorted.

    places: as split_folders gives them. Raises UserError where classes differ or lie deeper.
    """
    classes, splits, ignored, notes = None, {}, Counter(), []
    if root not in places.values():
        _count_beside(root, ignored)
    for split, place in places.items():
        names = _class_names(place, ignored)
        if split == "test" and not names:
            notes.append(f"{place} holds no class folders: it is not used")
            continue
        if split == "test" and not _forms(names) & _forms(classes):
            notes.append(f"{place} holds none of the classes: it is not used")
            continue
        if not names:
            raise UserError(f"{place} holds no class folders: expected {place}/CLASS/NAME.jpg")
        is_first = classes is None
        if is_first and all(map(_split_of, names)) and nested_hint(place / names[0]):
            raise UserError(
                f"the folders in {place} are called {', '.join(names)}, as splits are: did you "
                f"mean --data-dir {place}?"
            )
        classes = tuple(names) if is_first else classes
        _refuse_other_classes(place, names, places[next(iter(splits), split)], classes)
        seen = {os.path.realpath(folder) for folder in (root, *places.values())}
        seen |= {os.path.realpath(place / name) for name in names}
        paths, labels = [], []
        for label, name in enumerate(names):
            images = _images(place / name, seen, ignored)
            paths += images
            labels += [label] * len(images)
        splits[split] = paths, labels
    notes += _alike(classes) + _like_parts(next(iter(places.values())), classes)
    return classes, splits, ignored, notes + _trained_on(splits)


def _like_parts(place, names):
    """A note on class folders that hold the same two folders or more, as parts of a set would."""
    holders = {}
    for name in names:
        inner = tuple(folder.name for folder in _folders(place / name))
        holders.setdefault(inner, []).append(name)
    return [
        f"the class folders {alike[0]} and {alike[1]} in {place} hold the same folders: if "
        f"{inner[0]} and {inner[1]} are the classes, move them up into {place}"
        for inner, alike in holders.items()
        if len(inner) > 1 and len(alike) > 1
    ][:1]


def _trained_on(splits):
    """Notes on splits of which images are, by links, files of train too."""
    trained, notes = splits.get("train", ((), ()))[0], []
    for split, (paths, _) in splits.items():
        if split != "train":
            files = set(map(_identity, paths)) - {None}
            if files and (count := len(files.intersection(map(_identity, trained)))):
                notes.append(
                    f"{count:,} image files of {split} are files of train too, by links: accuracy "
                    f"in {split} is also of images that were trained on"
                )
    return notes


def _identity(path):
    """What a file is known by whatever its names, or None where it is missing."""
    with suppress(OSError):
        status = os.stat(path)
        return status.st_dev, status.st_ino


def images_below(folder):
    """(sorted paths of the images in a folder and below, Counter of what else is there)."""
    ignored = Counter()
    return _images(folder, {os.path.realpath(folder)}, ignored), ignored


def counted(ignored):
    """A Counter of what is passed over, in words."""
    return ", ".join(f"{what} ({count:,})" for what, count in ignored.items())


def difference_in_form(one, other):
    """In what two names differ that are the same to a reader, in words; else None."""
    if one == other or _form(one) != _form(other):
        return None
    if unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other):
        return f"the form of their Unicode characters ({one!a} and {other!a})"
    if one.strip() == other.strip():
        return f"blanks at their ends ({one!r} and {other!r})"
    return f"upper and lower case ({one!r} and {other!r})"


def nested_hint(folder, classes=()):
    """The end of a sentence where classes seem to lie in this class folder; else nothing.

    classes: which, or any two.
    """
    inner = {path.name for path in _folders(folder)}
    if len(inner & set(classes) if classes else inner) < 2:
        return ""
    if _split_of(folder.name) == "train":
        return f": did you mean --data-dir {folder.parent}?"
    return f": are the folders in {folder} the classes? Then move them up into {folder.parent}"


# folders


def _folders(place):
    """Paths of the folders in a place, sorted, without those that are no class."""
    with suppress(PermissionError), os.scandir(place) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir())
        return [Path(place, name) for name in names if not _is_leftover(name)]
    return []


def _split_of(name):
    """The split that a folder of this name is, or None."""
    name = SUFFIX.sub("", name.strip().lower())
    return next((split for split, names in SPLIT_NAMES.items() if names.fullmatch(name)), None)


def _is_leftover(name):
    lowered = name.lower()
    return name[0] == "." or lowered.startswith("@ea") or lowered in LEFTOVERS


def _count_leftover(path, ignored):
    """Counts the files in a folder that is no class, under its name."""
    ignored[os.path.basename(path)] += sum(len(files) for _, _, files in os.walk(path))


def _problem_of_classes(root, folders):
    """None where these folders in root are its classes: two or more that hold images and no
    folders, and root is no split beside others. Else the end of a sentence that says why not, or
    nothing where none of them looks like a class."""
    empty = [folder for folder in folders if not any(map(_is_image, os.listdir(folder)))]
    if len(empty) == len(folders) or _splits_beside(root):
        return ""
    nested = [folder for folder in folders if _folders(folder)]
    if empty:
        why = f"{empty[0].name} holds no image"
    elif nested:
        why = f"{nested[0].name} holds folders too"
    elif len(folders) == 1:
        why = f"{folders[0].name} is alone"
    else:
        return None
    return f"; the folders in {root} are not taken for the classes, because {why}"


def _splits_beside(root):
    """The other splits beside a folder that is called as one."""
    root = root.resolve()
    if _split_of(root.name) is None:
        return []
    return [path for path in _folders(root.parent) if path != root and _split_of(path.name)]


def _elsewhere(root, folders):
    """The end of a sentence, where the folder above train seems to be another."""
    for folder in folders:
        if "train" in {_split_of(inner.name) for inner in _folders(folder)}:
            return f"; did you mean --data-dir {folder}?"
    if folders and _split_of(root.resolve().name):
        return f"; did you mean --data-dir {root.resolve().parent}?"
    if len(folders) == 1 and _problem_of_classes(folders[0], _folders(folders[0])) is None:
        return f"; did you mean --data-dir {folders[0]}?"
    return ""


def _refuse_like_val(folders, train):
    """Raises UserError where a folder beside train may be meant as val: by its name or classes."""
    classes = _forms(path.name for path in _folders(train))
    for folder in folders:
        name = folder.name.lower()
        words = {*re.split(r"[^a-z]+", name), re.sub(r"[^a-z]", "", name)}
        inner = _folders(folder)
        is_called_so = words & LIKE_VAL and (inner or images_below(folder)[0])
        has_classes = classes & _forms(path.name for path in inner)
        if is_called_so or (has_classes and "test" not in words):
            raise UserError(
                f"{folder} looks like a split, and there is no val: rename it to val, or move it "
                f"out of {folder.parent}"
            )


def _class_names(place, ignored):
    """The names of the class folders in a split, sorted; what else is there is counted."""
    names = []
    with os.scandir(place) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if not entry.is_dir():
                is_lost = entry.is_symlink() and not entry.is_file()
                what = "images in no class folder" if _is_image(entry.name) else _kind(entry.name)
                ignored["links that lead nowhere" if is_lost else what] += 1
            elif _is_leftover(entry.name):
                _count_leftover(entry.path, ignored)
            else:
                names.append(entry.name)
    return names


def _count_beside(root, ignored):
    """Counts the images beside the splits, and what is left over there."""
    with os.scandir(root) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir() and _is_leftover(entry.name):
                _count_leftover(entry.path, ignored)
            elif not entry.is_dir() and _is_image(entry.name):
                ignored["images in no class folder"] += 1


def _refuse_other_classes(folder, names, first, classes):
    """first: the folder of the split in which the classes were found."""
    if set(names) == set(classes):
        return
    only = [sorted(set(one) - set(other)) for one, other in ((names, classes), (classes, names))]
    for here in only[0]:
        for there in only[1]:
            if difference := difference_in_form(here, there):
                raise UserError(
                    f"the class folders {folder / here} and {first / there} differ only in "
                    f"{difference}: give both the same name"
                )
    parts = [
        f"{len(here)} only in {split.name}, the first {here[0]}"
        for here, split in zip(only, (folder, first), strict=True)
        if here
    ]
    raise UserError(
        f"{folder} and {first} must have the same class folders, and {'; '.join(parts)}: add what "
        f"is missing or delete what is not meant{nested_hint(folder / names[0], classes)}"
    )


def _form(name):
    """What a reader sees of a name."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()).strip()


def _forms(names):
    return {_form(name) for name in names}


def _alike(classes):
    """Notes on classes whose names a reader cannot well tell apart."""
    by_form, notes = {}, []
    for name in classes:
        difference = difference_in_form(by_form.setdefault(_form(name), name), name)
        if difference:
            notes.append(f"two classes have names that differ only in {difference}")
    return notes


# files


def _images(folder, seen, ignored):
    """Sorted paths of the images in a folder and below; other files are counted in ignored.

    seen: real paths of folders that are read elsewhere. Those that are entered here join them, so
    that links make no circle.
    """
    paths = []
    for place, below, names in os.walk(folder, onerror=_raise, followlinks=True):
        entered = []
        for name in sorted(below):
            path = os.path.join(place, name)
            real = os.path.realpath(path)
            if _is_leftover(name):
                _count_leftover(path, ignored)
            elif real in seen:
                ignored["links to folders that are read already"] += 1
            else:
                seen.add(real)
                entered.append(name)
        below[:] = entered
        for name in names:
            path = os.path.join(place, name)
            if not _is_image(name):
                ignored[_kind(name)] += 1
            elif os.path.exists(path) and not os.path.isfile(path):
                ignored["pipes, sockets and devices"] += 1  # to open one may wait for ever
            else:
                paths.append(path)
    return sorted(paths)


def _raise(error):
    raise error


def _is_image(name):
    """Whether a file of this name is looked at: not hidden, with an ending that Pillow reads."""
    from PIL import Image

    ending = os.path.splitext(name)[1].lower()
    return name[0] != "." and ending in ENDINGS and ending in Image.registered_extensions()


def _kind(name):
    """What a file is counted as that is no image."""
    return "hidden" if name[0] == "." else os.path.splitext(name)[1].lower() or "without an ending"
