"""The state dict in what people save: found by the names it holds, whatever stands around it."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .torch_file import Opaque

ANCHORS = "patch_embed.proj.weight", "stem_conv1.weight"
"""Every ConViT, or CMT, has a tensor of this name: what stands before it is the prefix of all."""
MOST_DEEP, MOST_MODELS = 8, 16
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Keys under which timm looks, in its order."""
AVERAGES = {"ema", "swa"}
NO_MODELS = ("optim", "grad", "moment", "fisher")
MOMENTS = {"exp", "m", "v", "mu", "nu"}
"""Words in a place, of NO_MODELS their beginnings: averages go first, as in timm, and what only has
the shapes of a model last."""

COUNTERS = {
    "decay",
    "n_averaged",
    "num_batches_tracked",
    "num_updates",
    "step",
    "steps",
    "total_ops",
    "total_params",
}
"""Last names under which one float is a count, or a constant of an average."""


@dataclass(frozen=True)
class StateDict:
    """entries: under the official names, and what else has their prefix; beside: what stands in the
    same dict and has another; where: keys and words of the prefix; count: how many were found;
    equals: the places of others between which no name decides."""

    entries: dict[str, Any]
    beside: dict[Any, Any]
    where: tuple[str, ...]
    count: int
    equals: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """Where it stands, for a sentence."""
        return _place(self.where)


def find_state_dict(value: Any, path: Path) -> StateDict:
    """The StateDict in what a file holds, the first by rank where there are several.

    Where none has the names of a ConViT or a CMT it is the dict with the most tensors of a network.
    Raises UserError where no dict holds one.
    """
    holders = list(_holders(value))
    dicts = [(where, holder) for where, holder in holders if isinstance(holder, dict)]
    found = [candidate for where, entries in dicts for candidate in _models(where, entries)]
    if found:
        entries, beside, where = min(found, key=lambda candidate: _rank(candidate[2]))
        places = [_place(w) for _, _, w in found if _rank(w) == _rank(where) and w != where]
        return StateDict(entries, beside, where, len(found), tuple(places))
    where, entries = max(dicts, key=lambda item: _count_tensors(item[1]), default=((), {}))
    if not _count_tensors(entries):
        raise UserError(
            f"{path} holds no state dict{_instead(value, holders)}: give a dict of named tensors, "
            "as torch.save(model.state_dict(), FILE) writes it"
        )
    return StateDict(entries, {}, where, 1)


def is_counter(name: Any, entry: Any) -> bool:
    """Whether an entry that is none of the model's only counts or indexes something: integers, a
    flag, or floats under a name that says so. One float of another name may be a parameter."""
    if isinstance(entry, np.ndarray):
        last, kind = str(name).rpartition(".")[2], entry.dtype.kind
        is_one = entry.size <= 1 and (kind == "b" or last in COUNTERS)
        return kind in "iu" or is_one or last == "rel_indices"
    return isinstance(entry, int | float)


def _holders(value):
    """(where, holder) of every dict, list and tuple in the value, the outer ones first."""
    seen, level = set(), [((), value)]
    for _ in range(MOST_DEEP):
        inner = []
        for where, holder in level:
            if id(holder) not in seen and isinstance(holder, dict | list | tuple):
                seen.add(id(holder))
                yield where, holder
                inner += [((*where, _word(key)), item) for key, item in _items(holder)]
        level = inner


def _items(holder):
    return holder.items() if isinstance(holder, dict) else enumerate(holder)


def _word(key):
    return key.name if isinstance(key, Opaque) else str(key)[:80]


def _models(where, entries):
    """(entries without their prefix, others, where) of each prefix that some names share."""
    names = [name for name in entries if isinstance(name, str)]
    prefixes = {n.removesuffix(a) for n in names for a in ANCHORS if f".{n}".endswith(f".{a}")}
    prefixes = sorted(prefixes, key=len, reverse=True)[:MOST_MODELS]
    groups, beside = {prefix: {} for prefix in prefixes[::-1]}, {}
    for name, entry in entries.items() if prefixes else ():
        is_text = isinstance(name, str)
        prefix = next((p for p in prefixes if is_text and name.startswith(p)), None)
        if prefix is None and (is_text or "" not in groups):
            beside[name] = entry
        else:
            groups[prefix or ""][name.removeprefix(prefix) if is_text else name] = entry
    return [(group, beside, (*where, *p.split(".")[:-1])) for p, group in groups.items()]


def _place(where):
    return ".".join(where) or "the outermost"


def _rank(where):
    """Sorts places: averages first, then timm's keys in its order, then the outer ones."""
    words = {word.lower() for name in where for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", name)}
    wrapper = min((WRAPPERS.index(name) for name in where if name in WRAPPERS), default=9)
    is_none = bool(words & MOMENTS) or any(word.startswith(NO_MODELS) for word in words)
    return is_none, not words & AVERAGES, wrapper, len(where)


def _count_tensors(entries):
    """Of those whose name says a part of a network, as fc.weight does and exp_avg does not."""
    return sum(isinstance(v, np.ndarray) and "." in str(name) for name, v in entries.items())


def _instead(value, holders):
    """What the file holds in its place, where that can be named."""
    if isinstance(value, np.ndarray):
        return " but one tensor without a name"
    inside = [value, *(part for _, holder in holders for item in _items(holder) for part in item)]
    name = next((part.name for part in inside if isinstance(part, Opaque)), None)
    return f" but an object of {name[:80]}" if name else ""
