"""A student's file, and its solution, cut out of the library's own source by function name."""

import ast
import hashlib
import inspect
import re
import sys
from functools import cache
from textwrap import fill

from .. import arrays as backend
from .. import config, layers, optim
from ..errors import UserError
from ..layers import attention, drop_path, names
from .exercises import EXERCISES, NO_FORMULA

GIVEN = (
    (backend, "array_module"),
    (config, "as_pair"),
    (names, "part"),
    (names, "prefixed"),
    (attention, "split_heads"),
    (attention, "merge_heads"),
    (drop_path, "drop_path_forward"),
    (drop_path, "drop_path_backward"),
)
"""What every exercise may use as it is, by module and name: the functions of kit.py."""

KIT = '''"""What the exercises have in common: import from here, and change nothing.

The functions of the other exercises can be imported from here too: yours, from the files in this
folder. While your work is checked they are right ones instead, and so are the other pairs of the
same file: every pair counts by itself.
"""

import math
import sys
from importlib import import_module

import numpy as np

FILES = {files}
Params = dict[str, np.ndarray]  # arrays by name


def erf(x):
    """The error function, elementwise, in the dtype of x."""
    return np.vectorize(math.erf, otypes=[x.dtype])(x)


psa_forward = psa_backward = None  # positional attention without gates is no exercise


def checked_targets(xp, logits, targets, label_smoothing):
    """The library refuses wrong targets here. You are only given right ones."""
    return targets


def check_step(params, grads, moments):
    """The library refuses gradients that do not fit here. You are only given right ones."""


def check_rates(lr, weight_decay, betas, eps):
    """The library refuses rates that cannot train here. You are only given right ones."""


check_max_norm = None  # clipping is no exercise


def __getattr__(name):
    if name not in FILES:
        raise AttributeError(name)
    try:
        return getattr(import_module(FILES[name]), name)
    except ModuleNotFoundError as error:
        if error.name != FILES[name]:
            raise
        text = f"{error.name}.py is missing in this folder: put your own there, or a given one"
        raise ImportError(text) from None
'''


@cache
def kit_source():
    """The text of kit.py."""
    files = {name: e.name for e in EXERCISES if e.name != "adamw" for name in e.functions}
    listing = "".join(f"    {name!r}: {file!r},\n" for name, file in files.items())
    parts = [KIT.replace("{files}", "{\n" + listing.replace("'", '"') + "}")]
    parts += [inspect.getsource(getattr(module, name)) for module, name in GIVEN]
    return "\n\n".join(part.strip("\n") + "\n" for part in parts)


def source_module(exercise):
    """The library's module that an exercise is cut from."""
    if exercise.module == "optim":
        return optim
    return sys.modules[f"{layers.__name__}.{exercise.module}"]


def solution(exercise):
    """The library's own text of the exercise, importing from kit."""
    return _cut(exercise)


@cache
def skeleton(exercise, formulas=True):
    """The same with the bodies of the exercise's functions replaced; signatures and docstrings
    stay. Where there are to be no formulas, those of backward passes go, and what explains them.

    Raises UserError where the library has no such function.
    """
    text = _cut(exercise, exercise.functions)
    return text if formulas else _without_formulas(text, exercise)


def _cut(exercise, blanks=()):
    source = inspect.getsource(source_module(exercise))
    lines, tree = source.splitlines(), ast.parse(source)
    units = {unit.name for unit in exercise.units}
    found = set()
    # From the end, so that the line numbers above stay right.
    for node in reversed(tree.body):
        first, last = node.lineno - 1, node.end_lineno
        if isinstance(node, ast.ImportFrom) and node.level:
            imported = ", ".join(alias.name for alias in node.names)
            lines[first:last] = [f"from kit import {imported}"]
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            if _is_foreign(node.name, units, exercise):
                del lines[first:last]
                continue
            for function in reversed(_functions(node)):
                if function[0] in blanks:
                    found.add(function[0])
                    _blank(lines, *function)
    missing = sorted(set(blanks) - found)
    if missing:
        raise UserError(f"the library has no function {', '.join(missing)} to make an exercise of")
    return _tidy(lines)


def _tidy(lines):
    return re.sub("\n{4,}", "\n\n\n", "\n".join(lines)).rstrip("\n") + "\n"


OF_BACKWARD = (
    "\n    Keeps xhat and rstd: everything else in backward follows from them.",
    " Its gradient is a constant per row of dA, which both softmaxes and the gate ignore.",
)
"""What forward passes and modules say on the way back."""


def _without_formulas(text, exercise):
    """A blank whose docstrings say nothing on the way back but shapes; its own helpers for that
    way, which would, are left out."""
    units = {unit.backward: NO_FORMULA[unit.name] for unit in exercise.units if unit.gradients}
    lines = text.splitlines()
    for node in reversed(ast.parse(text).body):
        if isinstance(node, ast.FunctionDef) and node.name in units:
            docstring = fill(f'    """{units[node.name]}"""', 100, subsequent_indent="    ")
            lines[node.body[0].lineno - 1 : node.body[0].end_lineno] = [docstring]
        elif isinstance(node, ast.FunctionDef) and re.fullmatch("_.*_backward", node.name):
            del lines[node.lineno - 1 : node.end_lineno]
    text = _tidy(lines)
    for sentence in OF_BACKWARD:
        text = text.replace(sentence, "")
    return text


def _is_foreign(name, units, exercise):
    """A pair, or another public function of the module, that is not this exercise's."""
    if exercise.name == "adamw":
        return name not in ("AdamW", "_zeros_like", "is_running")
    pair, _, way = name.rpartition("_")
    return way in ("forward", "backward") and not name.startswith("_") and pair not in units


def _functions(node):
    """[(qualified name, its node), ...] of a function or of a class's methods."""
    if isinstance(node, ast.FunctionDef):
        return [(node.name, node)]
    methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
    return [(f"{node.name}.{method.name}", method) for method in methods]


def _blank(lines, name, node):
    docstring, *body = node.body
    indent = " " * node.body[0].col_offset
    last = docstring.end_lineno if ast.get_docstring(node) else docstring.lineno - 1
    lines[last : body[-1].end_lineno if body else node.end_lineno] = [
        f'{indent}raise NotImplementedError("{name}")'
    ]


def skeleton_hash(exercises, formulas=True):
    """A short hash of the blanks, by which a submission says which edition it was made from."""
    text = kit_source() + "".join(skeleton(exercise, formulas) for exercise in exercises)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
