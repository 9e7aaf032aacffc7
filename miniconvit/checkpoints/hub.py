"""Where a checkpoint lies: a file, a folder of a run or as the hub gives it, a published name."""

import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from ..config import VARIANTS
from ..errors import UserError
from ..system import read_json
from .checkpoint import BEST, LAST, checkpoint_of_run

PUBLISHED = {"convit_tiny.fb_in1k": 23, "convit_small.fb_in1k": 111, "convit_base.fb_in1k": 346}
"""Name on the hub to size in MB."""
HUB_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Source:
    """A file, and what is known of the model from elsewhere than the file: img_size (pixels of its
    own positional embedding), mean, std and classes, None where nothing says them. is_folder:
    whether its folder was given, so that a config.json there is about it."""

    path: Path
    is_folder: bool = False
    img_size: tuple[int, int] | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    classes: list[str] | None = None


def locate(source: str | Path) -> Source:
    """The Source that a path, a folder or a name means. Raises UserError where there is none."""
    path = Path(source)
    is_folder = path.is_dir()
    if is_folder:
        path = _in_folder(path)
    if path.exists():
        if not path.is_file():  # a pipe would be waited for
            raise UserError(f"{path} is no file: give a checkpoint")
        return Source(path, is_folder)
    name = re.sub(r"^(hf[-_]hub:)?(timm/)?", "", str(source))
    if name in PUBLISHED:
        return Source(_fetch(name), img_size=VARIANTS[name.partition(".")[0]].image)
    advice = f"give a run folder, the path of a .safetensors or .pth file, or one of {_names()}"
    if re.match(r"hf[-_]hub:|https?:", str(source)):
        advice = f"only {_names()} are fetched; download it, and give its folder or file"
    raise UserError(f"there is no checkpoint {source}: {advice}")


def _names():
    return ", ".join(PUBLISHED)


def _in_folder(folder):
    """The best checkpoint of a run, or the file of the hub's folders."""
    if not any((folder / name).exists() for name in (BEST, LAST)):
        for name in HUB_FILES:
            if (folder / name).exists():
                return folder / name
    return checkpoint_of_run(folder)


def _fetch(name):
    """The path of a published checkpoint, from the hub or the hub's cache on this machine."""
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise UserError(
            f"{name} is fetched with huggingface_hub, which is missing: pip install huggingface_hub"
        ) from None
    size = PUBLISHED[name]
    print(f"Fetching timm/{name} ({size} MB) from the hub, or its cache", file=sys.stderr)
    try:
        return Path(hf_hub_download(f"timm/{name}", "model.safetensors"))
    except Exception as error:  # whatever the network and the client's layers raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{name} could not be fetched from the hub ({reason}): look at the network, or give "
            "the path of the file"
        ) from error


def with_config(source: Source) -> Source:
    """The Source with what a config.json of timm beside its file says.

    Beside a file that was given itself it is used where it describes a ConViT; else stderr says
    that it is not. Raises UserError where it cannot be read.
    """
    path = source.path.with_name("config.json")
    values = _timm_config(path)
    name = str(values.get("architecture", ""))
    if values and not source.is_folder and not name.startswith("convit_"):
        print(f"{path} describes {name[:80]}, no ConViT: it is left alone", file=sys.stderr)
        return source
    size = values.get("input_size")
    if isinstance(size, list) and len(size) == 3 and all(type(side) is int for side in size):
        source = replace(source, img_size=(size[1], size[2]))
    mean, std, classes = (values.get(key) for key in ("mean", "std", "label_names"))
    return replace(source, mean=mean, std=std, classes=classes)


def _timm_config(path):
    """The entries about the weights, which older versions of timm did not nest; {} where the file
    is missing or no description of a model."""
    values = read_json(path, "repair it, or move the weights out of its folder", object)
    if not isinstance(values, dict) or "architecture" not in values:
        return {}
    nested = values.get("pretrained_cfg")
    return values | (nested if isinstance(nested, dict) else {})
