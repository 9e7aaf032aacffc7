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
from math import isqrt, nextafter, prod
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from ..arrays import Params
from ..config import IMAGENET_MEAN, IMAGENET_STD, VARIANTS, ConViTConfig, as_pair
from ..errors import UserError, unknown_name
from ..neighbours.cmt import is_cmt, recognise_cmt
from ..neighbours.diversity import without_patch_head
from ..neighbours.models import MODELS, is_convit
from .checkpoint import (
    METADATA_KEY,
    OPENING,
    Checkpoint,
    find_problem,
    load_checkpoint,
    not_finite,
    problem_of_metadata,
    read_safetensors,
    shapes_to_fill,
)
from .hub import locate, with_config
from .resolution import at_resolution
from .state_dict import find_state_dict, is_counter
from .torch_file import Opaque, read_torch_file

HEAD = ("head.weight", "head.bias")
MOST_REPEATED_BYTES = 2**26  # of a model in a small file: views make any number of any storage

NOT_OF_THE_ARCHITECTURE = {
    "img_size",
    "num_classes",
    "drop_path_rate",
    "locality_strength",
    "use_local_init",
}
"""Fields of a configuration in which two models may differ and share all but pos_embed and head."""


def open_weights(
    source: str | Path,
    model: str | None = None,
    img_size: int | tuple[int, int] | None = None,
    any_kind: bool = False,
) -> tuple[Path, Checkpoint]:
    """(path, Checkpoint) of a checkpoint file, the best one of a run folder, a .safetensors or .pth
    file with the official names, a folder with one as the hub gives it, or a name of PUBLISHED,
    which is fetched from the hub.

    model: a name of VARIANTS, needed for a file of others without GPSA, whose number of heads no
    shape tells. img_size: pixels at which the model shall work; its positional embedding is
    interpolated where it is of other patches. any_kind: whether another classifier than a ConViT or
    a ViT will do, too. What was left out or assumed of a file of others is
    said on stderr. Raises UserError where the source is missing, damaged or does not fit.
    """
    if model is not None and model not in VARIANTS:
        raise UserError(unknown_name("model", model, VARIANTS))
    place = locate(source)
    path = place.path
    if _is_ours(path):
        found = _load_ours(path, any_kind)
    else:
        heads = VARIANTS[model].num_heads if model else None
        found = _open_bare(place, heads, img_size, any_kind=any_kind)
    if not is_convit(found.config):
        return path, _as_it_is(path, found, model, img_size)
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
    place = locate(source)
    path = place.path
    found_sha256 = _sha256(path)
    if sha256 not in (None, found_sha256):
        raise UserError(
            f"{path} has changed since this run began: put the old file back, or begin "
            "another run with another --out"
        )
    ours = _is_ours(path)
    heads, size, classes_ = config.num_heads, config.img_size, config.num_classes
    found = _load_ours(path) if ours else _open_bare(place, heads, size, classes_)
    if field := _difference(found.config, config):
        name, flag = variant_name(found.config), "--" + field.replace("_", "-")
        advice = f"add --model {name}" if name else "choose the --model that it was made with"
        if not name and field in ("patch_size", "local_up_to_layer", "attention"):
            value = getattr(found.config, field)
            value = "x".join(map(str, value)) if isinstance(value, tuple) else value
            advice = f"add {flag} {value}"
        if field == "in_chans":
            advice = f"give weights for images of {config.in_chans} channels, as these data have"
        raise UserError(
            f"--init-from {source} does not fit: {_told(found.config, config, field)}; {advice}"
        )
    grids = [f"{c.grid[0]}x{c.grid[1]}" for c in (found.config, config)]
    params = dict(at_resolution(found, config.img_size).params)
    text = f"begins with the parameters of {source}"
    if grids[0] != grids[1] and config.use_pos_embed:
        text += f", pos_embed interpolated from {grids[0]} to {grids[1]} patches"
    if HEAD[0] not in params or _are_other_classes(found, config, classes):
        params = {name: value for name, value in params.items() if name not in HEAD}
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


def _is_ours(path):
    """Whether miniconvit wrote this file. What cannot be opened is left to the other reader."""
    try:
        with safe_open(path, framework="numpy") as file:
            entries = file.metadata() or {}
            return METADATA_KEY in entries or any(v.startswith(OPENING) for v in entries.values())
    except (SafetensorError, OSError, TypeError, ValueError):
        return False


def _as_it_is(path, found, model, img_size):
    """The Checkpoint of another model than a ConViT, which knows one size and no variants."""
    if model or img_size not in (None, found.config.img_size, found.config.image):
        said = "--model" if model else "--img-size"
        raise UserError(f"{path} holds a {_kind(found)}, which stays as it is: leave out {said}")
    return found


def _kind(found):
    return MODELS[type(found.config)].kind


def _load_ours(path, any_kind=False):
    """The Checkpoint, without what only training needs; its parameters are the moving average where
    there is one, as in best.safetensors."""
    found = load_checkpoint(path)
    if not (is_convit(found.config) or (any_kind and MODELS[type(found.config)].forward)):
        needed = "a classifier" if any_kind else "a ConViT or a ViT"
        raise UserError(f"{path} holds a model of the kind {_kind(found)}: this needs {needed}")
    params, config = without_patch_head(found.ema or found.params, found.config)
    return replace(found, params=params, config=config, ema=None, moments=None)


def _open_bare(place, num_heads=None, img_size=None, num_classes=None, any_kind=False):
    """The Checkpoint in a file of others, what nothing says guessed: normalised as for ImageNet.
    With any_kind it may be of the authors' CMT.

    num_classes: of the head that a file without one shall get; then its params have none.
    """
    path, place = place.path, with_config(place)
    found = find_state_dict(_content(path), path)
    named = {name: v for name, v in found.entries.items() if isinstance(name, str)}
    tensors = {name: v for name, v in named.items() if isinstance(v, np.ndarray)}
    kind = "CMT" if any_kind and is_cmt(tensors) else "ConViT"
    try:
        _refuse_objects(found)
        if kind == "CMT":
            config = recognise_cmt(tensors)
        else:
            config = recognise(tensors, num_heads, img_size, place.img_size, num_classes)
        shapes = shapes_to_fill(config, tensors)
        if HEAD[0] not in tensors:
            shapes = {name: shape for name, shape in shapes.items() if name not in HEAD}
        most = max(2 * path.stat().st_size, MOST_REPEATED_BYTES)  # twice: float16 is widened
        if sum(value.nbytes for name, value in tensors.items() if name in shapes) > most:
            raise UserError("its tensors repeat their storages and are far larger than the file")
        params = _floats({name: tensors[name] for name in shapes if name in tensors})
        problem = find_problem(params, shapes) or not_finite(params)
        if problem:
            raise UserError(f"{problem}; use another file")
        left_out = _left_out(found, shapes)
    except UserError as error:
        raise UserError(f"{path} holds no {kind} that is known here: {error}") from None
    if found.count > 1:
        others = ", ".join(found.equals[:8])
        doubt = f", but no name tells it from {others}" if others else ""
        _say(f"{path} holds {found.count} state dicts: {found.place} is read{doubt}")
    if left_out:
        more = f" and {len(left_out) - 8} more" if len(left_out) > 8 else ""
        _say(f"{path}: left out {', '.join(left_out[:8])}{more}")
    if (
        is_convit(config)
        and config.use_pos_embed
        and config.image not in _sizes(place.img_size, img_size)
    ):
        rows, cols = config.grid
        _say(
            f"{path} does not say its grid: {rows * cols} patches are taken as {rows}x{cols}"
            + ("" if img_size else "; add --img-size HEIGHTxWIDTH if it is another")
        )
    return Checkpoint({name: params[name] for name in shapes}, config, **_about(place, config))


def _say(text):
    print(text, file=sys.stderr)


def _sizes(*sizes):
    return [as_pair(size) for size in sizes if size is not None]


def _about(place, config):
    """Normalisation and classes: as the Source says, else as for ImageNet, else None."""
    statistics = (IMAGENET_MEAN, IMAGENET_STD) if config.in_chans == 3 else (None, None)
    mean, std = (numbers and list(numbers) for numbers in statistics)
    about = {"mean": place.mean or mean, "std": place.std or std}
    if problem := problem_of_metadata(config, **about):
        raise UserError(f"{place.path.with_name('config.json')} does not fit: its {problem}")
    is_named = problem_of_metadata(config, classes=place.classes) is None
    return about | {"classes": place.classes if is_named else None}


def _refuse_objects(found):
    """Raises UserError where anything but tensors and numbers stands in a StateDict."""
    for name, entry in (found.entries | found.beside).items():
        if not isinstance(entry, np.ndarray) and not is_counter(name, entry):
            name = name.name if isinstance(name, Opaque) else str(name)
            kind = entry.name if isinstance(entry, Opaque) else type(entry).__name__
            raise UserError(
                f"under {name[:80]!r} it has no tensor of floats but {kind[:80]}; save the state "
                "dict alone, as torch.save(model.float().state_dict(), FILE) does"
            )


def _left_out(found, shapes):
    """The names of what is none of the model's. Raises UserError where it is no counter, but for
    another head where the model's own is missing."""
    others = {name: entry for name, entry in found.entries.items() if name not in shapes}
    others |= found.beside
    for name, entry in others.items():
        masked = found.entries.get(str(name)[: -len("_mask")])
        is_mask = str(name).endswith("_mask") and isinstance(masked, np.ndarray)
        if is_mask and masked.shape == np.shape(entry):
            raise UserError(
                f"{name[:80]} is a mask of a tensor, and masks are not applied here: save the "
                "masked weights alone"
            )
        is_head = HEAD[0] not in shapes and not str(name).startswith(("blocks.", "patch_embed."))
        if not (is_counter(name, entry) or is_head):
            raise UserError(f"the tensor {str(name)[:80]} is none of the model's; use another file")
    return [str(name)[:80] for name in others]


def _content(path):
    """What a file of others holds: a dict of arrays, or whatever torch.save was given."""
    with open(path, "rb") as file:
        begin = file.read(9)
    if begin[8:] == b"{" and not begin.startswith(b"PK"):
        return read_safetensors(path)[0]
    if begin.startswith((b"PK", b"\x80")):
        return read_torch_file(path)
    raise UserError(
        f"{path} is damaged, or neither a .safetensors nor a .pth file: use another file"
    )


def _floats(tensors):
    """The arrays all float32 or all float64, fresh and writable; integers stay what they are."""
    floats = [value.dtype for value in tensors.values() if value.dtype.kind == "f"]
    dtype = "float64" if set(floats) == {np.dtype("float64")} else "float32"
    with np.errstate(over="ignore"):  # an infinity is answered later
        return {
            name: np.require(value, dtype if value.dtype.kind == "f" else None, "CW")
            for name, value in tensors.items()
        }


def recognise(
    tensors: Params,
    num_heads: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    own_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
) -> ConViTConfig:
    """The ConViTConfig that the shapes of official tensors (a dict by name) tell.

    num_heads is asked for where no block is GPSA; img_size, at which the model shall work, where
    the patches do not lie on a square or have no positional embedding; own_size where it is known
    at which it was made; num_classes where there is no head. Raises UserError where shapes tell no
    ConViT.
    """
    width = _shape(tensors, "norm.weight", 1)[0]
    _, in_chans, *patch = _shape(tensors, "patch_embed.proj.weight", 4)
    hidden, _ = _shape(tensors, "blocks.0.mlp.fc1.weight", 2)
    if HEAD[0] in tensors or num_classes is None:
        num_classes, _ = _shape(tensors, HEAD[0], 2)
    numbers = {m[1] for m in (re.match(r"blocks\.(\d+)\.", name) for name in tensors) if m}
    depth = len(numbers)
    local = sum(f"blocks.{i}.attn.qk.weight" in tensors for i in range(depth))
    if local:
        num_heads = _shape(tensors, "blocks.0.attn.pos_proj.weight", 2)[0]
    if num_heads is None:
        raise UserError("without GPSA no shape tells the number of heads; add --model vit_...")
    gated = any(name.endswith("gating_param") for name in tensors)
    return ConViTConfig(
        img_size=_image(tensors, tuple(patch), img_size, own_size),
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
        without = "; --init-from takes a file without a head" if name in HEAD else ""
        raise UserError(f"the tensor {name} is missing{without}")
    shape = tensors[name].shape
    if len(shape) != axes or 0 in shape:
        raise UserError(f"{name} has the shape {shape} where {axes} axes were expected")
    return shape


def _image(tensors, patch, img_size, own_size):
    """(height, width) in pixels that the positional embedding covers: the first of own_size and
    img_size that has as many patches, else what _guess finds."""
    if "pos_embed" not in tensors:
        if img_size is None and own_size is None:
            raise UserError("without pos_embed no shape tells the size of images; add --img-size")
        return img_size or own_size
    count = _shape(tensors, "pos_embed", 3)[1]
    own = [(height // patch[0], width // patch[1]) for height, width in _sizes(own_size)]
    asked = [ConViTConfig(size, patch).grid for size in _sizes(img_size)]
    fitting = [grid for grid in own + asked if prod(grid) == count]
    has_gpsa = any(name.endswith("attn.qk.weight") for name in tensors)
    if not (fitting or has_gpsa) and count - 1 in map(prod, own + asked):
        raise UserError(
            f"its pos_embed has {count} places for {count - 1} patches: a plain ViT of timm's "
            "gives its class token a position, and this is no ConViT"
        )
    rows, cols = fitting[0] if fitting else _guess(count, *asked)
    return rows * patch[0], cols * patch[1]


def _guess(count, asked=None):
    """The grid of so many patches: a square, or of the same proportions as the grid asked for.
    Raises UserError where there is none, or both and they differ."""
    side = isqrt(count)
    grids = {(side, side)} if side * side == count else set()
    if asked:
        rows, cols = asked
        rows_ = isqrt(count * rows // cols)
        if rows_ and count % rows_ == 0 and rows_ * cols == count // rows_ * rows:
            grids.add((rows_, count // rows_))
    if len(grids) == 1:
        return grids.pop()
    what = " or ".join(f"{rows}x{cols}" for rows, cols in sorted(grids))
    if grids:
        raise UserError(
            f"its {count} patches may be {what}; give a file that says it, as miniconvit export "
            "writes it"
        )
    where = " of its own patches" if asked else ""
    raise UserError(
        f"its pos_embed has {count} patches, which are no square; add --img-size "
        f"HEIGHTxWIDTH{where}"
    )


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
