"""The settings of a training run: named recipes, and the values that flags change."""

from dataclasses import dataclass, replace
from pathlib import Path

from ..config import VARIANTS, is_count, is_number
from ..data.augment import PRESETS
from ..data.dataset import SOURCES
from ..data.imagefolder import BROKEN
from ..errors import UserError
from .freeze import FREEZE
from .run_folder import RunFolder

BASE = {
    "subset": 1.0,
    "steps": None,
    "weight_decay": 0.05,
    "clip_grad": None,
    "label_smoothing": 0.0,
    "drop_path": 0.0,
    "seed": 0,
}

RECIPES = {
    "shapes-minute": BASE
    | {
        "data": "shapes",
        "model": "convit_micro32",
        "epochs": 6,
        "batch_size": 64,
        "lr": 2e-3,
        "warmup_epochs": 1.0,
    },
    "cifar10-10min": BASE
    | {
        "data": "cifar10",
        "model": "convit_micro32",
        "epochs": 9,
        "batch_size": 64,
        "lr": 3e-3,
        "warmup_epochs": 1.0,
    },
    "cifar10-hour": BASE
    | {
        "data": "cifar10",
        "model": "convit_mini32",
        "epochs": 22,
        "batch_size": 32,
        "lr": 1e-3,
        "warmup_epochs": 1.0,
    },
    "imagefolder-small": BASE
    | {
        "data": "imagefolder",
        "model": "convit_micro64",
        "epochs": 30,
        "batch_size": 64,
        "lr": 2e-3,
        "warmup_epochs": 2.0,
    },
    # The paper's, with the sizes scaled: 32 pixels for 224, where the official script itself crops
    # out of a margin of 4 instead of resizing; batches of 128 for 1,024, and by the script's rule,
    # 5e-4 for 512 images, the peak of the rate. Its rate begins at 1e-6 and ends at 1e-5, ours at
    # a hundredth of the peak. Clipping and an average of the parameters are off, as there.
    "paper32": BASE
    | {
        "data": "cifar10",
        "model": "convit_tiny32",
        "epochs": 300,
        "batch_size": 128,
        "lr": 5e-4 * 128 / 512,
        "warmup_epochs": 5.0,
        "label_smoothing": 0.1,
        "drop_path": 0.1,
        "augment": "paper",
        "repeats": 3,
        "mixup": 0.8,
        "cutmix": 1.0,
    },
}

DEFAULT_RECIPE = {
    "shapes": "shapes-minute",
    "cifar10": "cifar10-10min",
    "cifar100": "cifar10-10min",
    "imagefolder": "imagefolder-small",
}
"""Data set to recipe."""


def _one_of(names):
    return f"one of {', '.join(names)}", lambda x: isinstance(x, str) and x in names


def _is_size(value):
    sides = value if isinstance(value, tuple) else (value, value)
    return len(sides) == 2 and all(is_count(side, 1) for side in sides)


_COUNT = "an integer of at least 1", lambda x: is_count(x, 1)
_SIZE = "one or two positive integers", _is_size
_POSITIVE = "a positive number", lambda x: is_number(x) and x > 0
_NOT_NEGATIVE = "0 or a positive number", lambda x: is_number(x) and x >= 0
_SHARE = "at least 0 and below 1", lambda x: is_number(x) and 0 <= x < 1

LIMITS = {
    "data": _one_of(SOURCES),
    "subset": ("above 0 and at most 1", lambda x: is_number(x) and 0 < x <= 1),
    "recipe": _one_of(RECIPES),
    "model": _one_of(VARIANTS),
    "img_size": _SIZE,
    "patch_size": _SIZE,
    "local_up_to_layer": ("an integer of at least 0", is_count),
    "locality_strength": ("a finite number", is_number),
    "passes": _COUNT,
    "epochs": _COUNT,
    "steps": _COUNT,
    "batch_size": _COUNT,
    "lr": _POSITIVE,
    "weight_decay": _NOT_NEGATIVE,
    "warmup_epochs": _NOT_NEGATIVE,
    "clip_grad": _POSITIVE,
    "label_smoothing": _SHARE,
    "drop_path": _SHARE,
    "augment": _one_of(PRESETS),
    "repeats": _COUNT,
    "mixup": _NOT_NEGATIVE,
    "cutmix": _NOT_NEGATIVE,
    "ema": _SHARE,
    "seed": ("an integer of at least 0 and below 2^63", lambda x: is_count(x) and x < 2**63),
    "attention": _one_of(("gpsa", "psa")),
    "local_init": ("true or false", lambda x: isinstance(x, bool)),
    "freeze": _one_of(FREEZE),
    "broken": _one_of(BROKEN),
    "init_from": ("a path or a name", lambda x: isinstance(x, str) and x),
}
"""Setting to what its value must be, in words and as a function."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides the bits of a run. make_settings fills it from a recipe.

    passes: over the training images in an epoch, at whose end is the validation. Either epochs or
    steps is None. clip_grad None: no clipping; ema None: no average. Raises UserError where a value
    is out of range.
    """

    data: str
    subset: float
    recipe: str
    model: str
    img_size: int | tuple[int, int]
    patch_size: int | tuple[int, int]
    local_up_to_layer: int
    locality_strength: float
    epochs: int | None
    steps: int | None
    batch_size: int
    lr: float
    weight_decay: float
    warmup_epochs: float
    clip_grad: float | None
    label_smoothing: float
    drop_path: float
    augment: str
    seed: int
    attention: str = "gpsa"
    local_init: bool = True
    freeze: str | None = None
    broken: str = "refuse"
    repeats: int = 1
    mixup: float = 0.0
    cutmix: float = 0.0
    ema: float | None = None
    passes: int = 1
    init_from: str | None = None

    def __post_init__(self):
        for name in ("img_size", "patch_size"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, (words, holds) in LIMITS.items():
            value = getattr(self, name)
            optional = ("epochs", "steps", "clip_grad", "freeze", "ema", "init_from")
            if value is None and name in optional:
                continue
            if not holds(value):
                raise UserError(f"{flag(name)} must be {words}, not {value}")
        if (self.epochs is None) == (self.steps is None):
            raise UserError("give the length of the run by --epochs or by --steps, not by both")

    def model_config(self, dataset):
        """The ConViTConfig for this data set. Raises UserError where they do not fit."""
        config = replace(
            VARIANTS[self.model],
            img_size=self.img_size,
            patch_size=self.patch_size,
            local_up_to_layer=self.local_up_to_layer,
            locality_strength=self.locality_strength,
            drop_path_rate=self.drop_path,
            attention=self.attention,
            use_local_init=self.local_init,
            in_chans=dataset.train.images.shape[1],
            num_classes=len(dataset.classes),
        )
        image = dataset.train.images.shape[2:]
        if config.image != image:
            expected, found = (
                "x".join(str(side) for side in size) for size in (config.image, image)
            )
            raise UserError(
                f"{self.model} expects images of {expected} pixels and those of {self.data} are "
                f"{found}: add --img-size {found} with a --patch-size that divides it, or choose "
                "a model for that size"
            )
        return config


def flag(name):
    """The command line's name of a setting."""
    return "--" + name.replace("_", "-")


def make_settings(recipe=None, **given):
    """Settings from a recipe, and from `given` where it says otherwise.

    recipe: a name of RECIPES; by default the one of given["data"], or of shapes. Neither need speak
    of what the model and the data set bring themselves. Raises UserError for an unknown name.
    """
    recipe = recipe or _known("data", given.get("data", "shapes"), DEFAULT_RECIPE)
    values = {"recipe": recipe} | _known("recipe", recipe, RECIPES) | given
    if "steps" in given and "epochs" not in given:
        values["epochs"] = None
    _known("data", values["data"], DEFAULT_RECIPE)
    suits = SOURCES[values["data"]].AUGMENTATION
    if suits == "none" and "augment" not in given:  # whatever the recipe says: it changes classes
        values["augment"] = "none"
    values.setdefault("augment", suits)
    variant = _known("model", values["model"], VARIANTS)
    for name in ("img_size", "patch_size", "local_up_to_layer", "locality_strength"):
        values.setdefault(name, getattr(variant, name))
    return Settings(**values)


def _known(kind, name, table):
    if name not in table:
        raise UserError(f"unknown {kind} {name!r}: choose one of {', '.join(table)}")
    return table[name]


def stored_settings(out):
    """The Settings of the run in the folder `out`, or None where no run has begun there."""
    config = RunFolder(out).config()
    if config is None:
        return None
    try:
        return Settings(**config["settings"])
    except (TypeError, KeyError, UserError) as error:
        raise UserError(
            f"the settings in {out}/config.json are damaged: {error}; choose another --out"
        ) from error


def stored_data_dir(out):
    """Where the data of the run in the folder `out` lie: a Path, or None where it does not say."""
    found = (RunFolder(out).config() or {}).get("data_dir")
    if not isinstance(found, str | None):
        raise UserError(f"the data_dir in {out}/config.json is no path but {found}: add --data-dir")
    return Path(found) if found else None


def stored_sha256(out, name):
    """What the config.json of the run in the folder `out` has under this name, or None."""
    return (RunFolder(out).config() or {}).get(name)


def refuse_difference(stored, given, folder):
    """Raises UserError, naming the first of the settings `given` (a dict) that is not what the run
    in `folder` began with."""
    for name, value in given.items():
        if (old := getattr(stored, name)) != value:
            raise UserError(
                f"the run in {folder} began {_with(name, old)} and cannot go on "
                f"{_with(name, value)}: resume it as it began, or begin another with another --out"
            )


def _with(name, value):
    if value is None:
        return f"without {flag(name)}"
    if isinstance(value, bool):
        return f"with {flag(name if value else 'no_' + name)}"
    return f"with {flag(name)} {value}"
