"""The twelve exercises: which functions of the library a student writes, and what for."""

import ast
import inspect
import sys
from functools import cache

from .. import layers
from ..errors import UserError, unknown_name
from .task import Exercise, Unit

WEIGHTED = ("dx", "dweight", "dbias")
COMPOSITE = ("dx", "grads")

EXERCISES = (
    Exercise(
        "linear", "linear", (Unit("linear", WEIGHTED),), 6, 20,
        "The gradient of a matrix product, with the leading axes folded into rows.",
        "Write the shape of each factor down: only one order of the product fits.",
    ),
    Exercise(
        "softmax", "softmax", (Unit("softmax", ("dx",)),), 6, 25,
        "A Jacobian that is not diagonal, applied without ever being formed.",
        "Every output depends on every input of its row. What does a constant dy give?",
    ),
    Exercise(
        "layernorm", "layernorm", (Unit("layernorm", WEIGHTED),), 9, 40,
        "Three paths from the input to the output: directly, through the mean, the variance.",
        "First take the weight into dy; only then form the two means.",
    ),
    Exercise(
        "gelu", "gelu", (Unit("gelu", ("dx",)),), 5, 15,
        "The product rule elementwise, and the derivative of the error function.",
        "The derivative of a distribution function is its density.",
    ),
    Exercise(
        "cross_entropy", "loss", (Unit("cross_entropy", ("dlogits",), ("loss",)),), 7, 30,
        "Softmax and logarithm cancel; a stable logarithm; smoothed and soft targets.",
        "Work with log p throughout. Soft targets are taken as they are: rows need not sum to 1.",
    ),
    Exercise(
        "patch_embed", "patch_embed",
        (Unit("patch_embed", ("dimages", "dweight", "dbias")),), 8, 30,
        "A strided convolution as one matrix product; reshape and transpose, and their inverses.",
        "Name the six axes. Backward applies the inverse permutation before it reshapes.",
    ),
    Exercise(
        "mhsa", "attention",
        (Unit("attention", ("dq", "dk", "dv")), Unit("mhsa", COMPOSITE)), 12, 60,
        "Content attention: two products and a softmax backwards; heads as axes.",
        "dv needs the transposed map. The scale 1 / sqrt(d) appears once, in the scores' gradient.",
    ),
    Exercise(
        "position_attention", "position",
        (
            Unit("position_attention_dense", ("dweight", "dbias"), ("P",)),
            Unit("position_attention", ("dweight", "dbias"), ("py", "px")),
            Unit("position_values", ("dv", "dpy", "dpx")),
        ), 12, 60,
        "Attention that sees positions only, its two forms, and a gradient that is exactly zero.",
        "The maps are shared by all images. The softmax ignores whatever moves a whole row alike.",
    ),
    Exercise(
        "gpsa", "gpsa",
        (
            Unit("gate", ("dcontent", "dposition", "dgating_param")),
            Unit("gpsa_dense", COMPOSITE),
            Unit("gpsa", COMPOSITE),
        ), 15, 75,
        "ConViT's own layer: a gate per head mixes where to look with what to look for.",
        "The values hear from both branches, and the input from qk and v.",
    ),
    Exercise(
        "mlp", "mlp", (Unit("mlp", COMPOSITE),), 6, 15,
        "Chaining finished layers: caches are taken in reverse.",
        "Each backward needs the cache of its own forward.",
    ),
    Exercise(
        "block", "block", (Unit("block", COMPOSITE),), 8, 30,
        "Residual branches: where a value is used twice, two gradients are added.",
        "dy goes along the shortcut untouched, and through the branch with the mask.",
    ),
    Exercise(
        "adamw", "optim", (Unit("adamw_steps", ()),), 6, 30,
        "Two moments, their bias correction, and a weight decay that stays out of them.",
        "The decay touches only tensors of two or more axes. The step count starts at 1.",
        mistakes=(
            "The step count never advances, so every step is corrected like the first.",
            "The decay is added to the gradient and enters the moments: Adam with L2, not AdamW.",
            "Biases and position embeddings are decayed too.",
            "eps stands under the root.",
            "The rate given to this step is ignored.",
        ),
    ),
)  # fmt: skip

NO_FORMULA = {
    "linear": "dy (..., out). Returns dx (..., in), or None with need_dx=False, dweight (out, in) "
    "and dbias (out,), or None without a bias.",
    "softmax": "dy (..., K). Returns dx (..., K).",
    "layernorm": "dy (..., D). Returns dx (..., D), dweight (D,) and dbias (D,).",
    "gelu": "dy has the shape of x. Returns dx, of the same shape.",
    "cross_entropy": "Returns dlogits (B, C). dloss: a number, the gradient of whatever is made of "
    "the loss (1.0 for the loss itself).",
    "patch_embed": "dy (B, N, D). Returns dimages (B, C, height, width), or None with "
    "need_dimages=False, dweight (D, C, ph, pw) and dbias (D,).",
    "attention": "dy (B, H, N, d). Returns dq, dk and dv, (B, H, N, d) each.",
    "mhsa": "dout (B, N, D). Returns dx (B, N, D) and grads with params' keys.",
    "position_attention_dense": "dP (H, N, N). Returns dweight (H, 3) and dbias (H,).",
    "position_attention": "dfactors: dpy (H, rows, rows) and dpx (H, cols, cols). Returns dweight "
    "(H, 3) and dbias (H,).",
    "position_values": "dy (B, H, N, d). Returns dv (B, H, N, d), dpy (H, rows, rows) and dpx "
    "(H, cols, cols).",
    "gate": "dy (B, H, N, K). Returns dcontent and dposition (B, H, N, K), and dgating_param (H,).",
    "gpsa_dense": "dout (B, N, D). Returns dx (B, N, D) and grads with params' keys.",
    "gpsa": "dout (B, N, D). Returns dx (B, N, D) and grads with params' keys.",
    "mlp": "dy (B, N, D). Returns dx (B, N, D) and grads with params' keys.",
    "block": "dy (B, N, D). Returns dx (B, N, D) and grads with params' keys.",
}
"""The docstring of each pair's backward pass where its formula is the exercise."""

PAGES = {
    "linear": "01-linear.md",
    "softmax": "02-softmax.md",
    "layernorm": "04-layernorm.md",
    "gelu": "05-gelu.md",
    "cross_entropy": "03-cross-entropy.md",
    "patch_embed": "06-patches.md",
    "mhsa": "07-attention.md",
    "position_attention": "08-positions.md",
    "gpsa": "10-gpsa.md",
    "mlp": "05-gelu.md",
    "block": "11-block.md",
    "adamw": "13-adamw.md",
}
"""Exercise to the page of the tutorials that derives its layer."""


def exercises(names=None):
    """The exercises of these names, or all. Raises UserError for an unknown name."""
    by_name = {exercise.name: exercise for exercise in EXERCISES}
    unknown = sorted(set(names or ()) - set(by_name))
    if unknown:
        raise UserError(unknown_name("exercise", unknown[0], by_name))
    return tuple(by_name[name] for name in by_name if not names or name in names)


@cache
def allowed_functions(unit_name):
    """The right functions that a student's unit may call: those that the library's own uses, and
    whatever these are made of, but never the unit itself."""
    own = {f"{unit_name}_forward", f"{unit_name}_backward"}
    found, queue = set(), sorted(own & set(vars(layers)))
    while queue:
        for name in _names_called(getattr(layers, queue.pop())):
            pair = {name, name.replace("_forward", "_backward")} - found - own
            found |= pair
            queue += pair
    return frozenset(found)


def _names_called(function):
    """Names of the layers' functions in the body of `function` and of its module's helpers."""
    module = sys.modules[function.__module__]
    tree = ast.parse(inspect.getsource(function))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for helper in [name for name in names if name.startswith("_") and hasattr(module, name)]:
        if callable(getattr(module, helper)):
            names |= _names_called(getattr(module, helper))
    return {n for n in names if n in vars(layers) and n.endswith(("_forward", "_backward"))}
