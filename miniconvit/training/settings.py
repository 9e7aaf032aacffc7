"""The settings of a training run: each is declared once, and named recipes give their values.

The checks, the command's options and config.json all follow the fields of `Settings`.
"""

import tomllib
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

from ..config import VARIANTS, ConViTConfig, is_count, is_number
from ..data.augment import PRESETS
from ..data.dataset import SOURCES, Dataset
from ..data.imagefolder import BROKEN
from ..engine.cuda import PRECISIONS
from ..errors import UserError, did_you_mean, unknown_name
from ..muon import Muon
from ..neighbours.diversity import PatchHeadConfig
from ..neighbours.models import ALL_VARIANTS, is_convit, shapes_of
from ..optim import AdamW, is_running
from .freeze import FREEZE
from .run_folder import RunFolder

DATA, MODEL, TRAINING = "Data", "Model", "Training"
AUGMENTATION = "Augmentation and regularisation"


@dataclass(frozen=True)
class Limits:
    """What a value must be: in words, as a function, and as the names to choose from, if any."""

    words: str
    hold: Callable
    names: tuple[str, ...] = ()


def _one_of(names):
    words = f"one of {', '.join(names)}"
    return Limits(words, lambda x: isinstance(x, str) and x in names, tuple(names))


def _is_size(value):
    sides = value if isinstance(value, tuple) else (value, value)
    return len(sides) == 2 and all(is_count(side, 1) for side in sides)


COUNT = Limits("an integer of at least 1", lambda x: is_count(x, 1))
INDEX = Limits("an integer of at least 0", is_count)
SIZE = Limits("one or two positive integers", _is_size)
NUMBER = Limits("a finite number", is_number)
POSITIVE = Limits("a positive number", lambda x: is_number(x) and x > 0)
NOT_NEGATIVE = Limits("0 or a positive number", lambda x: is_number(x) and x >= 0)
SHARE = Limits("at least 0 and below 1", lambda x: is_number(x) and 0 <= x < 1)
FRACTION = Limits("above 0 and at most 1", lambda x: is_number(x) and 0 < x <= 1)
SEED = Limits("an integer of at least 0 and below 2^63", lambda x: is_count(x) and x < 2**63)
TRUTH = Limits("true or false", lambda x: isinstance(x, bool))
TEXT = Limits("a path or a name", lambda x: isinstance(x, str) and x != "")

_TABLES = tomllib.loads(files(__package__).joinpath("recipes.toml").read_text(encoding="utf-8"))
RECIPES = _TABLES["recipes"]
"""Name to the settings that it gives."""
DEFAULT_RECIPE = _TABLES["default"]
"""Data set to recipe."""

OPTIMIZERS = {"adamw": AdamW, "muon": Muon}
"""Name to class."""

_SIZES = ", ".join(name.removeprefix("convit_") for name in VARIANTS if name[0] == "c")
_OTHERS = ", ".join(name for name in ALL_VARIANTS if name not in VARIANTS)


def setting(group, limits, help, default=MISSING, shown=None):
    """A field of Settings.

    help: whole sentences for whoever reads `--help`; default: the value where neither the recipe,
    the model nor the data set says one; shown: the default in words, where the value says too
    little.
    """
    about = {"group": group, "limits": limits, "help": help, "shown": shown}
    return field(default=default, metadata=about)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides the bits of a run. make_settings fills it from a recipe.

    Either epochs or steps is None. Raises UserError where a value is out of range.
    """

    data: str = setting(
        DATA,
        _one_of(SOURCES),
        "Images to train on. The program draws shapes itself. imagefolder means your own files.",
        shown="shapes",
    )
    subset: float = setting(
        DATA, FRACTION, "Train on this share of the images, the first ones of each class.", 1.0
    )
    recipe: str = setting(
        TRAINING,
        _one_of(RECIPES),
        "Named settings to begin with. Any other option that you give wins over them. "
        f"The names are {', '.join(RECIPES)}.",
        shown="the one for --data",
    )
    model: str = setting(
        MODEL,
        _one_of(ALL_VARIANTS),
        "Network to train. The name is convit_SIZE for a ConViT, or vit_SIZE for the plain ViT of "
        f"the same size. SIZE is one of {_SIZES}. Beside these there are {_OTHERS}.",
    )
    img_size: int | tuple[int, int] = setting(
        MODEL,
        SIZE,
        "Size of the images in pixels, as N or HEIGHTxWIDTH. Image files are cut to it.",
        shown="the model's",
    )
    patch_size: int | tuple[int, int] | None = setting(
        MODEL,
        SIZE,
        "Size of a patch in pixels, as N or HEIGHTxWIDTH. It must divide the images.",
        None,
        shown="the model's",
    )
    local_up_to_layer: int | None = setting(
        MODEL,
        INDEX,
        "How many blocks, from the first one on, use GPSA. With 0 the model is a plain ViT.",
        None,
        shown="the model's",
    )
    locality_strength: float | None = setting(
        MODEL,
        NUMBER,
        "How sharply each GPSA head looks at one place at first.",
        None,
        shown="the model's",
    )
    epochs: int | None = setting(
        TRAINING, COUNT, "Length of the run in epochs. Each ends with a validation.", None
    )
    steps: int | None = setting(
        TRAINING, COUNT, "Length of the run in steps. Give it in place of --epochs.", None
    )
    batch_size: int = setting(TRAINING, COUNT, "Number of images in a step.")
    lr: float = setting(TRAINING, POSITIVE, "Learning rate at its peak.")
    weight_decay: float = setting(TRAINING, NOT_NEGATIVE, "Weight decay.", 0.05)
    warmup_epochs: float = setting(
        TRAINING, NOT_NEGATIVE, "Number of epochs in which the learning rate rises to its peak."
    )
    clip_grad: float | None = setting(
        TRAINING,
        POSITIVE,
        "Greatest norm of the gradient. A longer gradient is scaled down to it.",
        None,
        shown="no limit",
    )
    label_smoothing: float = setting(
        AUGMENTATION, SHARE, "Share of each target that is spread over all classes.", 0.0
    )
    drop_path: float = setting(
        AUGMENTATION,
        SHARE,
        "How often the last block's branches are dropped. Earlier blocks drop theirs less often.",
        0.0,
    )
    augment: str = setting(
        AUGMENTATION,
        _one_of(PRESETS),
        "How training images are changed. "
        + " ".join(f"{name} {preset.summary}." for name, preset in PRESETS.items()),
        shown="what suits the data",
    )
    seed: int = setting(TRAINING, SEED, "Random seed.", 0)
    attention: str = setting(
        MODEL,
        _one_of(("gpsa", "psa")),
        "Attention of the first blocks. gpsa blends what content and position say by a gate. psa "
        "adds both scores in one softmax and has no gate.",
        "gpsa",
    )
    local_init: bool = setting(
        MODEL,
        TRUTH,
        "Begin the first blocks as a soft convolution, or at random.",
        True,
        shown="--local-init",
    )
    freeze: str | None = setting(
        MODEL,
        _one_of(FREEZE),
        "Leave the gates, or all attention, of the first blocks as they begin. Gates begin at one "
        "half then, or as --init-from says.",
        None,
        shown="nothing",
    )
    broken: str = setting(
        DATA,
        _one_of(BROKEN),
        "What to do about image files that cannot be read. refuse ends the program. skip leaves "
        "them out and names them.",
        "refuse",
    )
    repeats: int = setting(
        AUGMENTATION, COUNT, "Number of copies of an image in a batch, each changed in its way.", 1
    )
    mixup: float = setting(
        AUGMENTATION,
        NOT_NEGATIVE,
        "Blend images in pairs, with shares drawn from Beta(X, X). The training accuracy then "
        "counts the class with the larger share. With 0 it is off.",
        0.0,
    )
    cutmix: float = setting(
        AUGMENTATION,
        NOT_NEGATIVE,
        "Paste boxes between images in pairs, with areas drawn from Beta(X, X). Together with "
        "--mixup, a coin decides in each step. With 0 it is off.",
        0.0,
    )
    ema: float | None = setting(
        TRAINING,
        SHARE,
        "Keep a moving average of the parameters with this decay, such as 0.999. The average is "
        "validated and saved as best.",
        None,
        shown="no average",
    )
    passes: int = setting(
        TRAINING,
        COUNT,
        "How many times an epoch goes through the images. More makes short epochs longer.",
        1,
    )
    init_from: str | None = setting(
        MODEL,
        TEXT,
        "Begin with the parameters of a run or of a checkpoint. It may be a .safetensors or .pth "
        "file with timm's or the official names. It may be a published name such as "
        "convit_tiny.fb_in1k.",
        None,
        shown="random parameters",
    )
    cosine: float = setting(
        AUGMENTATION,
        NOT_NEGATIVE,
        "Weight of a loss that keeps the last patch tokens of an image apart, by their cosines.",
        0.0,
    )
    contrastive: float = setting(
        AUGMENTATION,
        NOT_NEGATIVE,
        "Weight of a loss by which each last patch token must tell its own beginning from others'.",
        0.0,
    )
    patch_mixing: float = setting(
        AUGMENTATION,
        NOT_NEGATIVE,
        "Weight of a loss on each patch. Images are pasted into each other along patches, and each "
        "patch must tell its image's class.",
        0.0,
    )
    precision: str = setting(
        TRAINING,
        _one_of(PRECISIONS),
        "Precision of matrix products. tf32 keeps 10 bits after the point and bf16 keeps 7. Sums, "
        "parameters and all else stay float32. On a CPU there is no tf32, and bf16 needs AMX.",
        "float32",
    )
    optimizer: str = setting(
        TRAINING,
        _one_of(OPTIMIZERS),
        "How parameters move. adamw scales every number of the gradient. muon makes the step of a "
        "matrix between features equally long in all directions. It moves the rest as adamw.",
        "adamw",
    )

    def __post_init__(self):
        for name in FIELDS:
            if isinstance(getattr(self, name), list):  # a size that was stored as JSON
                object.__setattr__(self, name, tuple(getattr(self, name)))
            check_setting(name, getattr(self, name))
        if (self.epochs is None) == (self.steps is None):
            raise UserError("give the length of the run by --epochs or by --steps, not by both")
        if self.patch_mixing and (self.mixup or self.cutmix):
            raise UserError("--patch-mixing mixes the images itself: add --mixup 0 --cutmix 0")
        self._refuse_what_the_model_has_not()

    def _refuse_what_the_model_has_not(self):
        """Raises UserError for a setting of ConViT's beside another model, or one that it lacks."""
        for name in OF_CONVIT:
            value, nothing = getattr(self, name), FIELDS[name].default
            if self.model in VARIANTS:
                if value is None and name in OF_THE_MODEL:
                    raise UserError(f"{flag(name)} must be {FIELDS[name].metadata['limits'].words}")
            elif value != nothing:
                said = flag(f"no_{name}" if value is False else name)
                is_recipe = name in RECIPES[self.recipe]
                advice = f"add {flag(name)} {nothing:g}" if is_recipe else "leave it out"
                raise UserError(
                    f"{self.model} is no ConViT or ViT, and {said} is for these alone: {advice}"
                )

    def model_config(self, dataset: Dataset) -> Any:
        """The configuration of the model for this data set. Raises UserError where they do not
        fit."""
        config = ALL_VARIANTS[self.model]
        fitting = {"img_size": self.img_size, "in_chans": dataset.train.images.shape[1]}
        fitting |= {"num_classes": len(dataset.classes)}
        if is_convit(config):
            fitting |= {name: getattr(self, name) for name in OF_THE_MODEL}
            fitting |= {"drop_path_rate": self.drop_path, "use_local_init": self.local_init}
        config = replace(config, **fitting)
        if self.patch_mixing:
            config = PatchHeadConfig(**config.to_dict())
        if self.batch_size == 1 and any(map(is_running, shapes_of(config))):
            raise UserError(
                f"{self.model} normalises an image by the others of its batch: give --batch-size 2 "
                "or more"
            )
        image = dataset.train.images.shape[2:]
        if config.image != image:
            expected, found = (
                "x".join(str(side) for side in size) for size in (config.image, image)
            )
            patches = " with a --patch-size that divides it" * is_convit(config)
            raise UserError(
                f"{self.model} expects images of {expected} pixels and those of {self.data} are "
                f"{found}: add --img-size {found}{patches}, or choose a model for that size"
            )
        return config


FIELDS = {field.name: field for field in fields(Settings)}
OF_THE_MODEL = tuple(field.name for field in fields(ConViTConfig) if field.name in FIELDS)
"""The settings that a variant brings itself, under the same names."""
OF_CONVIT = (
    *(name for name in OF_THE_MODEL if name != "img_size"),
    *("drop_path", "local_init", "freeze", "init_from", "cosine", "contrastive", "patch_mixing"),
)
"""The settings that speak of ConViTs and ViTs alone."""


def check_setting(name, value):
    """Raises UserError where `value` is out of the setting's limits."""
    limits, kinds = FIELDS[name].metadata["limits"], get_args(FIELDS[name].type)
    if value is None and type(None) in kinds:
        return
    if not limits.hold(value):
        hint = did_you_mean(value, limits.names)
        raise UserError(f"{flag(name)} must be {limits.words}, not {str(value)[:80]}{hint}")


def flag(name: str) -> str:
    """The command line's name of a setting."""
    return "--" + name.replace("_", "-")


def make_settings(recipe: str | None = None, **given: Any) -> Settings:
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
    variant = _known("model", values["model"], ALL_VARIANTS)
    for name in OF_THE_MODEL:
        if is_convit(variant) or name not in OF_CONVIT:
            values.setdefault(name, getattr(variant, name))
    return Settings(**values)


def _known(kind, name, table):
    if name not in table:
        raise UserError(unknown_name(kind, name, table))
    return table[name]


def stored_settings(out: str | Path) -> Settings | None:
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


def stored_data_dir(out: str | Path) -> Path | None:
    """Where the data of the run in the folder `out` lie: a Path, or None where it does not say."""
    found = (RunFolder(out).config() or {}).get("data_dir")
    if not isinstance(found, str | None):
        raise UserError(f"the data_dir in {out}/config.json is no path: add --data-dir")
    return Path(found) if found else None


def stored_sha256(out: str | Path, name: str) -> str | None:
    """What the config.json of the run in the folder `out` has under this name, or None."""
    return (RunFolder(out).config() or {}).get(name)


def refuse_difference(stored, given, folder):
    """Raises UserError, naming the first of the settings `given` (a dict) that is not what the run
    in `folder` began with."""
    for name, value in given.items():
        if (old := getattr(stored, name)) != value:
            advice = "resume it as it began, or begin another with another --out"
            if name in ("epochs", "steps"):
                advice = (
                    f"resume it as it began, or train its best parameters on in a new run with "
                    f"--init-from {folder} and another --out"
                )
            raise UserError(
                f"the run in {folder} began {_with(name, old)} and cannot go on "
                f"{_with(name, value)}: {advice}"
            )


def _with(name, value):
    if value is None:
        return f"without {flag(name)}"
    if isinstance(value, bool):
        return f"with {flag(name if value else 'no_' + name)}"
    return f"with {flag(name)} {value}"
