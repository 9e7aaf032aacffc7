"""Parameters from elsewhere: published ConViTs by name, timm's files, official .pth files; at
another resolution, or as the start of a training.

Files of others hold tensors under the official names and nothing else: the model is recognised by
their shapes.
"""

import hashlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isqrt, nextafter
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from ..arrays import Params
from ..config import IMAGENET_MEAN, IMAGENET_STD, VARIANTS, ConViTConfig
from ..errors import UserError
from ..model import param_shapes
from .checkpoint import (
    METADATA_KEY,
    Checkpoint,
    checkpoint_of_run,
    find_problem,
    load_checkpoint,
    not_finite,
    read_safetensors,
)
from .resolution import at_resolution
from .torch_file import read_torch_file

PUBLISHED = {"convit_tiny.fb_in1k": 23, "convit_small.fb_in1k": 111, "convit_base.fb_in1k": 346}
"""Name on the hub to size in MB."""

WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Under one of these a training script keeps the state dict; averages go first, as in timm."""

NOT_OF_THE_ARCHITECTURE = {
    "img_size",
    "num_classes",
    "drop_path_rate",
    "locality_strength",
    "use_local_init",
}
"""Fields of a configuration in which two models may differ and share all but pos_embed and head."""


def open_weights(
    source: str | Path, model: str | None = None, img_size: int | tuple[int, int] | None = None
) -> tuple[Path, Checkpoint]:
    """(path, Checkpoint) of a checkpoint file, the best one of a run folder, a .safetensors or .pth
    file with the official names, or a name of PUBLISHED, which is fetched from the hub.

    model: a name of VARIANTS, needed for a file of others without GPSA, whose number of heads no
    shape tells. img_size: pixels at which the model shall work; its positional embedding is
    interpolated. Raises UserError where the source is missing, damaged or does not fit.
    """
    path = _locate(source)
    if _is_ours(path):
        found = _load_ours(path)
    else:
        found = _open_bare(path, VARIANTS[model].num_heads if model else None, img_size)
    if model and (field := _difference(found.config, VARIANTS[model])):
        raise UserError(f"{path} is not {model}: {_told(found.config, VARIANTS[model], field)}")
    return path, found if img_size is None else at_resolution(found, img_size)


@dataclass(frozen=True)
class Start:
    """What a training takes from elsewhere. params: by name, without what begins fresh; sha256: of
    the file; text: one line for the user."""

    params: Params
    sha256: str
    text: str


def read_start(
    source: str | Path, config: ConViTConfig, classes: Sequence[str], sha256: str | None = None
) -> Start:
    """The Start of a training of the model `config` on `classes` from any source of open_weights.

    pos_embed is interpolated to config's grid. The head begins fresh where the classes are others.
    Raises UserError where the architecture is another or where the file is not the one with this
    sha256.
    """
    path = _locate(source)
    found_sha256 = _sha256(path)
    if sha256 not in (None, found_sha256):
        raise UserError(
            f"{path} has changed since this run began: put the old file back, or begin "
            "another run with another --out"
        )
    ours = _is_ours(path)
    found = _load_ours(path) if ours else _open_bare(path, config.num_heads, config.img_size)
    if field := _difference(found.config, config):
        name, flag = variant_name(found.config), "--" + field.replace("_", "-")
        advice = f"add --model {name}" if name else "choose the --model that it was made with"
        if not name and field in ("patch_size", "local_up_to_layer", "attention"):
            value = getattr(found.config, field)
            value = "x".join(map(str, value)) if isinstance(value, tuple) else value
            advice = f"add {flag} {value}"
        raise UserError(
            f"--init-from {source} does not fit: {_told(found.config, config, field)}; {advice}"
        )
    grids = [f"{c.grid[0]}x{c.grid[1]}" for c in (found.config, config)]
    params = dict(at_resolution(found, config.img_size).params)
    text = f"begins with the parameters of {source}"
    if grids[0] != grids[1] and config.use_pos_embed:
        text += f", pos_embed interpolated from {grids[0]} to {grids[1]} patches"
    if _are_other_classes(found, config, classes):
        del params["head.weight"], params["head.bias"]
        text += f"; head.weight and head.bias begin fresh, for {config.num_classes} classes"
    return Start(params, found_sha256, text)


def variant_name(config: ConViTConfig) -> str | None:
    """The name in VARIANTS of this architecture, with img_size and patch_size as given there or
    not; None where it has none."""
    names = [name for name, variant in VARIANTS.items() if not _difference(config, variant)]
    same = [name for name in names if VARIANTS[name].img_size == config.img_size]
    return next(iter(same or names), None)


def timm_call(config: ConViTConfig) -> str:
    """The call that makes this model in timm, as text, with what differs from timm's own values.

    Raises UserError for models that timm does not have.
    """
    rows, cols = config.grid
    if config.attention != "gpsa" or (config.local_up_to_layer and rows != cols):
        what = "plain PSA" if config.attention != "gpsa" else f"a grid of {rows}x{cols} patches"
        raise UserError(f"timm's ConViT has no {what}: this model cannot be loaded there")
    names = {4: "convit_tiny", 9: "convit_small", 16: "convit_base"}
    name = names.get(config.num_heads, "convit_tiny")
    usual, given = VARIANTS[name].to_dict(), config.to_dict()
    for values in (usual, given):  # timm takes the width of a head
        values["embed_dim"] //= values["num_heads"]
        for field in ("drop_path_rate", "locality_strength", "use_local_init", "attention"):
            del values[field]
    changes = [f"{key}={value}" for key, value in given.items() if value != usual[key]]
    return f"timm.create_model({', '.join([repr(name), *changes])})"


def _locate(source):
    """The path of the file that a source means."""
    path = Path(source)
    if path.is_dir():
        return checkpoint_of_run(path)
    if path.exists():
        return path
    if str(source) in PUBLISHED:
        return _fetch(str(source))
    raise UserError(
        f"there is no checkpoint {source}: give a run folder, the path of a .safetensors or .pth "
        f"file, or one of {', '.join(PUBLISHED)}"
    )


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


def _is_ours(path):
    """Whether miniconvit wrote this file. What cannot be opened is left to the other reader."""
    try:
        with safe_open(path, framework="numpy") as file:
            return METADATA_KEY in (file.metadata() or {})
    except (SafetensorError, OSError, TypeError, ValueError):
        return False


def _load_ours(path):
    """The Checkpoint, without what only training needs; its parameters are the moving average where
    there is one, as in best.safetensors."""
    found = load_checkpoint(path)
    return replace(found, params=found.ema or found.params, ema=None, moments=None)


def _open_bare(path, num_heads=None, img_size=None):
    """The Checkpoint in a file of others, all but tensors guessed: normalised as for ImageNet."""
    tensors = _state_dict(path)
    try:
        config = recognise(tensors, num_heads, img_size)
        problem = find_problem(tensors, param_shapes(config)) or not_finite(tensors)
        if problem:
            raise UserError(f"{problem}; use another file")
    except UserError as error:
        raise UserError(f"{path} holds no ConViT that is known here: {error}") from None
    params = {name: tensors[name] for name in param_shapes(config)}
    statistics = (IMAGENET_MEAN, IMAGENET_STD) if config.in_chans == 3 else (None, None)
    mean, std = (numbers and list(numbers) for numbers in statistics)
    return Checkpoint(params, config, mean=mean, std=std)


def _state_dict(path):
    """The named arrays of a file of others, all float32 or all float64, fresh and writable."""
    with open(path, "rb") as file:
        begin = file.read(9)
    if begin[8:] == b"{" and not begin.startswith(b"PK"):
        tensors, _ = read_safetensors(path)
    elif begin.startswith((b"PK", b"\x80")):
        tensors = _unwrapped(read_torch_file(path), path)
    else:
        raise UserError(
            f"{path} is damaged, or neither a .safetensors nor a .pth file: use another file"
        )
    floats = [value for value in tensors.values() if value.dtype.kind == "f"]
    if not floats or len(floats) < len(tensors):
        wrong = next((n for n, value in tensors.items() if value.dtype.kind != "f"), "no tensor")
        raise UserError(f"{path} holds {wrong} where tensors of floats were expected")
    dtype = "float64" if all(value.dtype == "float64" for value in floats) else "float32"
    with np.errstate(over="ignore"):  # an infinity is answered later
        return {name: np.require(value, dtype, "CW") for name, value in tensors.items()}


def _unwrapped(value, path):
    """The state dict in what a training script saved, without what other versions add to it."""
    for key in WRAPPERS:
        if isinstance(value, dict) and isinstance(value.get(key), dict):
            value = value[key]
            break
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no state dict: a dict of named tensors was expected")
    if value and all(str(name).startswith("module.") for name in value):  # DistributedDataParallel
        value = {str(name).removeprefix("module."): entry for name, entry in value.items()}
    tensors = {n: v for n, v in value.items() if not str(n).endswith("rel_indices")}
    for name, entry in tensors.items():
        if not (isinstance(name, str) and isinstance(entry, np.ndarray)):
            raise UserError(
                f"{path} holds no state dict: under {str(name)[:80]!r} it has no tensor"
            )
    return tensors


def recognise(
    tensors: Params,
    num_heads: int | None = None,
    img_size: int | tuple[int, int] | None = None,
) -> ConViTConfig:
    """The ConViTConfig that the shapes of official tensors (a dict by name) tell.

    num_heads is asked for where no block is GPSA; img_size where the patches do not lie on a square
    or have no positional embedding. Raises UserError where shapes tell no ConViT.
    """
    width = _shape(tensors, "norm.weight", 1)[0]
    _, in_chans, *patch = _shape(tensors, "patch_embed.proj.weight", 4)
    hidden, _ = _shape(tensors, "blocks.0.mlp.fc1.weight", 2)
    num_classes, _ = _shape(tensors, "head.weight", 2)
    numbers = {m[1] for m in (re.match(r"blocks\.(\d+)\.", name) for name in tensors) if m}
    depth = len(numbers)
    local = sum(f"blocks.{i}.attn.qk.weight" in tensors for i in range(depth))
    if local:
        num_heads = _shape(tensors, "blocks.0.attn.pos_proj.weight", 2)[0]
    if num_heads is None:
        raise UserError("without GPSA no shape tells the number of heads; add --model vit_...")
    gated = any(name.endswith("gating_param") for name in tensors)
    return ConViTConfig(
        img_size=_image(tensors, patch, img_size),
        patch_size=tuple(patch),
        in_chans=in_chans,
        num_classes=num_classes,
        embed_dim=width,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=_ratio(hidden, width),
        qkv_bias=any(name.endswith(("qk.bias", "qkv.bias")) for name in tensors),
        local_up_to_layer=local,
        use_pos_embed="pos_embed" in tensors,
        attention="gpsa" if gated or not local else "psa",
    )


def _shape(tensors, name, axes):
    if name not in tensors:
        raise UserError(f"the tensor {name} is missing")
    shape = tensors[name].shape
    if len(shape) != axes or 0 in shape:
        raise UserError(f"{name} has the shape {shape} where {axes} axes were expected")
    return shape


def _image(tensors, patch, img_size):
    """(height, width) in pixels that the positional embedding covers: a square of patches, or
    img_size where they are no square and it has as many."""
    if "pos_embed" not in tensors:
        if img_size is None:
            raise UserError("without pos_embed no shape tells the size of images; add --img-size")
        return img_size
    count = _shape(tensors, "pos_embed", 3)[1]
    side = isqrt(count)
    if side * side != count:
        if img_size is not None:
            asked = ConViTConfig(img_size, tuple(patch))
            if asked.num_patches == count:
                return asked.image
        raise UserError(
            f"its pos_embed has {count} patches, which are no square; add --img-size HEIGHTxWIDTH"
        )
    return side * patch[0], side * patch[1]


def _ratio(hidden, width):
    """The mlp_ratio with int(width * ratio) == hidden, in spite of rounding."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else nextafter(ratio, hidden)


def _difference(found, expected):
    """The first field in which two configurations are of other architectures, or None."""
    ours, theirs = found.to_dict(), expected.to_dict()
    fields = [field for field in ours if field not in NOT_OF_THE_ARCHITECTURE]
    return next((field for field in fields if ours[field] != theirs[field]), None)


def _told(found, expected, field):
    return f"its {field} is {getattr(found, field)} where {getattr(expected, field)} was expected"


def _are_other_classes(found, config, classes):
    named = found.classes is not None and found.classes != list(classes)
    return found.config.num_classes != config.num_classes or named


def _sha256(path):
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
