"""Checkpoints: parameters, and where wanted the optimizer's moments, in one safetensors file.

Beside the tensors a file holds one metadata entry, a JSON text: the configuration, what is known of
normalisation, classes, data set and the state of the training, and the SHA-256 of all that.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..arrays import Params, to_cpu
from ..config import ConViTConfig, is_number
from ..errors import UserError
from ..neighbours.models import config_from_dict, config_to_dict, shapes_of
from ..optim import AdamW
from ..system import MOST_TEXT_BYTES, parse_json, write_file
from .torch_file import widened

LAST, BEST = "last.safetensors", "best.safetensors"
"""What the folder of a run has: where it stands, and its best epoch."""
METADATA_KEY = "miniconvit"
OPENING = '{"config": {'
"""How the text of our entry begins: it tells our file where a bit of METADATA_KEY has flipped."""
MOMENTS = {"optimizer.exp_avg.": "exp_avg", "optimizer.exp_avg_sq.": "exp_avg_sq"}
EMA = "ema."
"""Prefixes of the tensors that have the parameters' names and shapes."""
DTYPES = ("float32", "float64")
NUMPY_HAS = {"F64", "F32", "F16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}
BFLOAT16 = "BF16"
"""Types in a safetensors file. Others are float8 and smaller ones, and complex numbers."""
LEAST_OF_A_BLOCK = 10  # tensors


@dataclass(frozen=True)
class Checkpoint:
    """What load_checkpoint found. moments: {"exp_avg": {name: array}, "exp_avg_sq": {...}} or None;
    ema: the parameters' moving average, or None; mean, std (per channel), classes (names), data
    (name of the data set) and state: None where the file says nothing of them."""

    params: Params
    config: ConViTConfig
    moments: dict[str, Params] | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    classes: list[str] | None = None
    data: str | None = None
    state: dict[str, Any] | None = None
    ema: Params | None = None


def save_checkpoint(
    path: str | Path,
    params: Params,
    config: ConViTConfig,
    *,
    optimizer: AdamW | None = None,
    ema: Params | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    classes: Sequence[str] | None = None,
    data: str | None = None,
    state: dict[str, Any] | None = None,
) -> None:
    """Writes params under their official names, the moments of `optimizer` under
    `optimizer.exp_avg.` and `optimizer.exp_avg_sq.`, their average `ema` under `ema.`, and the rest
    as metadata (JSON types), with a SHA-256 by which load_checkpoint notices any flipped bit.

    Equal arguments give equal bytes. A kill or a full disk at any moment leaves the old file or the
    new one, whole. Raises UserError where params do not fit config, where a value is not finite or
    the metadata are what load_checkpoint would not read, and where the file cannot be written.
    """
    more = {prefix: getattr(optimizer, kind) for prefix, kind in MOMENTS.items() if optimizer}
    more |= {EMA: ema} if ema is not None else {}
    # safetensors 0.8 writes the memory's order of what is not contiguous.
    tensors = {k: np.asarray(v, order="C") for k, v in to_cpu(_flat(params, more)).items()}
    problem = find_problem(tensors, shapes_of(config), more) or not_finite(tensors)
    if problem:
        raise UserError(f"{path} is not written: {problem}")
    about = {"mean": _as_list(mean), "std": _as_list(std), "classes": _as_list(classes)}
    about |= {"data": data, "state": state}
    if problem := problem_of_metadata(config, **about):
        raise UserError(f"{path} is not written: {problem}")
    about = {"config": config_to_dict(config)} | about
    about = {key: value for key, value in about.items() if value is not None}
    content = save(tensors, {METADATA_KEY: _sealed(about, tensors)})
    try:
        _parse_header(content)
        parse_json(json.dumps(about))
    except ValueError as error:
        raise UserError(f"{path} is not written: of its metadata {error}") from error
    write_file(path, content)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """The Checkpoint in the file at path, on the CPU, arrays fresh and writable.

    Raises UserError, naming the file, where it is missing, damaged, not a checkpoint of miniconvit,
    or where its tensors or its metadata do not fit its configuration or are not finite. Files from
    before there was a SHA-256 are read without it.
    """
    tensors, text = read_safetensors(path)
    if text is None:
        raise UserError(
            f"{path} has no '{METADATA_KEY}' metadata, which tell the model's configuration: "
            "use a checkpoint that miniconvit wrote"
        )
    try:
        about = parse_json(text)
        if not isinstance(about.get("config"), dict):
            raise UserError("its metadata tell no configuration")
        is_whole = "sha256" not in about or text == _sealed(about, tensors)
        about.pop("sha256", None)
        config = config_from_dict(about.pop("config"))
        shapes = shapes_to_fill(config, tensors)
        groups = [group for group in (MOMENTS, {EMA: "ema"}) if _any_begins(tensors, group)]
        more = {prefix: name for group in groups for prefix, name in group.items()}
        problem = find_problem(tensors, shapes, more) or not_finite(tensors)
        problem = problem or problem_of_metadata(config, **about)
        if problem or not is_whole:
            raise UserError(problem or "its content is not what its SHA-256 was taken of")
        params = {name: tensors[name] for name in shapes}
        found = {more[p]: {name: tensors[p + name] for name in shapes} for p in more}
        ema = found.pop("ema", None)
        return Checkpoint(params, config, found or None, ema=ema, **about)
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise UserError(
            f"{path} is damaged, or was not written by miniconvit: {error}; use another checkpoint"
        ) from error


def checkpoint_of_run(folder: Path) -> Path:
    """The path of a run's best checkpoint, or before the first epoch's end of its last one.

    Raises UserError where there is neither.
    """
    for name in (BEST, LAST):
        if (folder / name).exists():
            return folder / name
    raise UserError(f"{folder} holds no checkpoint: give the folder of a run")


def not_finite(tensors: Params) -> str | None:
    """What is wrong, naming the first tensor with an infinity or a NaN; None where all is well."""
    for name, value in tensors.items():
        if not np.isfinite(value).all():
            return f"{name} holds values that are not finite"
    return None


def _as_list(values):
    """A list of Python's own numbers or texts from a tuple, a list or an array; others as they
    are."""
    if isinstance(values, np.ndarray):
        return values.tolist()
    if not isinstance(values, list | tuple):
        return values
    return [value.item() if isinstance(value, np.generic) else value for value in values]


def _sealed(about, tensors):
    """The text of the metadata entry: `about` as JSON, with the SHA-256 of itself and of the names,
    types, shapes and bytes of the tensors."""
    about = {key: value for key, value in about.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(about).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {value.shape}".encode())
        digest.update(value.ravel())
    return json.dumps(about | {"sha256": digest.hexdigest()})


def shapes_to_fill(config: ConViTConfig, names: Collection[str]) -> dict[str, tuple[int, ...]]:
    """The shapes for a configuration from a file whose tensors have these names.

    Raises UserError, before it builds anything, where they are too few for the depth.
    """
    if config.depth * LEAST_OF_A_BLOCK > len(names):
        raise UserError(f"it has {len(names)} tensors, too few for {config.depth} blocks")
    return shapes_of(config)


def _any_begins(names, prefixes):
    return any(name.startswith(tuple(prefixes)) for name in names)


def _flat(params, more):
    """Parameters, and what more has them ({prefix: values}), as one dict."""
    tensors = dict(params)
    for prefix, values in more.items():
        tensors |= {prefix + name: value for name, value in values.items()}
    return tensors


def find_problem(tensors: Params, shapes: dict[str, tuple], more: Iterable[str] = ()) -> str | None:
    """What is wrong with names, shapes (a dict) or dtypes: the first finding, or None.

    more: prefixes under which all names and shapes are expected again.
    """
    expected = _flat(shapes, dict.fromkeys(more, shapes))
    dtype = next((tensors[name].dtype for name in expected if name in tensors), None)
    for name, shape in expected.items():
        if name not in tensors:
            return f"the tensor {name} is missing"
        if tensors[name].shape != shape:
            return f"{name} has the shape {tensors[name].shape} where {shape} was expected"
        if tensors[name].dtype not in DTYPES:
            return f"{name} is {tensors[name].dtype} where float32 or float64 was expected"
        if tensors[name].dtype != dtype:
            return f"{name} is {tensors[name].dtype} where others are {dtype}"
    unknown = sorted(set(tensors) - set(expected))
    return f"the tensor {unknown[0]} is none of the model's" if unknown else None


def problem_of_metadata(config, mean=None, std=None, classes=None, data=None, state=None):
    """What is wrong with the entries beside the configuration: the first finding, or None."""
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and not _is_list(values, config.in_chans, is_number):
            return f"{name} is {str(values)[:80]} where {config.in_chans} numbers were expected"
    if std is not None and min(std) <= 0:
        return f"std is {std} where positive numbers were expected"
    if classes is not None and not _is_list(
        classes, config.num_classes, lambda name: isinstance(name, str)
    ):
        return f"{config.num_classes} names of classes were expected and other classes found"
    if not isinstance(data, str | None):
        return f"data is {str(data)[:80]} where the name of a data set was expected"
    return None if isinstance(state, dict | None) else f"state is {str(state)[:80]}"


def _is_list(values, length, holds):
    return isinstance(values, list) and len(values) == length and all(map(holds, values))


def read_safetensors(path: str | Path) -> tuple[Params, str | None]:
    """({name: array}, the text of our metadata entry or None) of any .safetensors file.

    bfloat16 becomes float32. Raises UserError, naming the file, where it is missing or damaged, or
    holds numbers of a type that NumPy does not have.
    """
    try:
        entries, begin = _header(path)
        for name, (kind, _, _) in entries.items():
            if kind not in NUMPY_HAS and kind != BFLOAT16:
                raise UserError(
                    f"{path} holds {name[:80]} as {kind[:80]}, which is not read here: "
                    "save its tensors as float32 or bfloat16"
                )
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
            tensors = {}
            for name in file.keys():  # noqa: SIM118
                kind, shape, offset = entries[name]
                if kind == BFLOAT16:
                    bits = np.fromfile(path, "<u2", prod(shape), offset=begin + offset)
                    tensors[name] = widened(bits).reshape(shape)
                else:
                    tensors[name] = file.get_tensor(name)
            return tensors, text
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(
            f"there is no checkpoint {path}: give the path of a .safetensors file"
        ) from None
    except (SafetensorError, OSError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged, or not a safetensors file: {error}; use another checkpoint"
        ) from error


def _header(path):
    """({name: (type, shape, offset)}, where offsets begin): eight bytes tell the length of a JSON
    text that describes the tensors."""
    with open(path, "rb") as file:
        length, described = _parse_header(file.read(8 + MOST_TEXT_BYTES + 1))
    described.pop("__metadata__", None)
    entries = {
        name: (str(entry["dtype"]), entry["shape"], entry["data_offsets"][0])
        for name, entry in described.items()
    }
    return entries, 8 + length


def _parse_header(content):
    """(length, object) of the JSON text at the beginning of a file's content."""
    length = int.from_bytes(content[:8], "little")
    return length, parse_json(content[8 : 8 + min(length, MOST_TEXT_BYTES + 1)])
