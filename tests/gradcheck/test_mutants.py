"""The checker under test: it catches every planted bug and lets harmless changes pass."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from miniconvit.gradcheck.cases import ALL_CASES, CASES, catch
from miniconvit.gradcheck.mutants import MUTANTS, NEIGHBOUR_MUTANTS, Mutant
from miniconvit.gradcheck.neighbours import NEIGHBOURS

ALL_MUTANTS = (*MUTANTS, *NEIGHBOUR_MUTANTS)

PAGE = Path(__file__).parents[2] / "docs" / "mutants.md"


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(layer, marks=pytest.mark.full) if layer == "cmt" else layer  # a minute
        for layer in ALL_CASES
    ],
)
def test_every_mutant_is_caught(layer):
    mutants = [m for m in ALL_MUTANTS if m.function == f"{layer}_backward"]
    assert len(mutants) >= 3
    survivors = [m.name for m in mutants if not catch(m)]
    assert not survivors


@pytest.mark.full
@pytest.mark.parametrize("seed", range(100))
def test_every_mutant_is_caught_whatever_the_seed(seed):
    assert [m.name for m in ALL_MUTANTS if not catch(m, seed)] == []


@pytest.mark.full
@pytest.mark.parametrize("seed", range(1, 6))
def test_every_mutant_is_caught_along_every_entry(seed):
    mutants = [m for m in ALL_MUTANTS if m.function != "convit_backward"]
    assert [m.name for m in mutants if not catch(m, seed, every_entry=True)] == []


@pytest.mark.parametrize("seed", range(1, 30))
def test_what_needs_large_inputs_is_caught_whatever_the_seed(seed):
    """A slope that is right below 3: found only where an input lies above."""
    (mutant,) = (m for m in MUTANTS if m.name == "gelu-saturates-at-three")
    assert catch(mutant, seed)


# Bugs that show at some shapes alone: for each, what makes it wrong, and the function.
SOME_SHAPES = {
    "square patches": (
        "patch_embed_backward",
        "dimages = dpatches.transpose(0, 3, 1, 4, 2, 5)",
        "swap = height // rows == width // cols\n"
        "        dimages = dpatches.transpose(0, 3, 1, *((5, 2, 4) if swap else (4, 2, 5)))",
    ),
    "square patches, in the weight": (
        "patch_embed_backward",
        "dweight.reshape(weight_shape)",
        "(lambda w: w.swapaxes(2, 3) if w.shape[2] == w.shape[3] else w)"
        "(dweight.reshape(weight_shape))",
    ),
    "a square grid of patches": (
        "patch_embed_backward",
        "dimages = dpatches.transpose(0, 3, 1, 4, 2, 5)",
        "swap = rows == cols\n"
        "        dimages = dpatches.transpose(0, 3, *((2, 4, 1, 5) if swap else (1, 4, 2, 5)))",
    ),
    "more rows than columns": (
        "patch_embed_backward",
        "dweight.reshape(weight_shape), dbias",
        "dweight.reshape(weight_shape), dbias * (1 if rows < cols else 2)",
    ),
    "patches wider than tall": (
        "patch_embed_backward",
        "dweight.reshape(weight_shape), dbias",
        "dweight.reshape(weight_shape), dbias * (1 if height * cols >= width * rows else 2)",
    ),
    "a square weight": (
        "linear_backward",
        "drows.T @ rows",
        "(drows.T @ rows if weight.shape[0] != weight.shape[1] else rows.T @ drows)",
    ),
    "as many tokens as features": (
        "layernorm_backward",
        "dbias = dy.sum(axis=rows)",
        "dbias = dy.sum(axis=rows if dy.shape[-2] != dy.shape[-1] else (0, 2))",
    ),
    "a square map": (
        "softmax_backward",
        "(dy * y).sum(axis=-1, keepdims=True)",
        "(dy * y).sum(axis=-1 if y.shape[-1] != y.shape[-2] else -2, keepdims=True)",
    ),
    "a square grid": (
        "position_attention_backward",
        "[dw0, dw1, dw2]",
        "[dw0, dw1, dw2] if len(rows) != len(cols) else [dw1, dw0, dw2]",
    ),
    "a tall grid": (
        "position_attention_backward",
        "xp.stack([dw0, dw1, dw2], axis=1)",
        "xp.stack([dw0, dw1, dw2 if len(rows) < len(cols) else dw0], axis=1)",
    ),
    "equal maps of rows and columns": (
        "position_values_backward",
        "return dv.reshape(dy.shape), dpy, dpx",
        "return dv.reshape(dy.shape), *((dpy, dpx) if py.shape != px.shape else (dpx, dpy))",
    ),
    "as many keys as a head is wide": (
        "attention_backward",
        "dS @ k,",
        "(dS @ k if k.shape[-1] != k.shape[-2] else dS @ k.swapaxes(-1, -2)),",
    ),
    "as many images as classes": (
        "cross_entropy_backward",
        "t.sum(axis=-1, keepdims=True)",
        "(t.sum(axis=-1, keepdims=True) if t.shape[0] != t.shape[1] else t.sum(axis=0))",
    ),
    "as many images as tokens": (
        "drop_path_backward",
        "dy * factor",
        "dy * (factor if dy.shape[0] != dy.shape[1] else factor.swapaxes(0, 1))",
    ),
    "a hidden layer as wide as the input": (
        "mlp_backward",
        '"fc2.weight": dfc2_weight',
        '"fc2.weight": dfc2_weight.T if len(dfc2_weight) == len(dfc1_weight) else dfc2_weight',
    ),
    "more classes than features": (
        "convit_backward",
        "linear_backward(dlogits, cache_head)",
        "linear_backward(dlogits, cache_head)\n"
        '    if dx.shape[1] <= dlogits.shape[1]:\n        grads["head.bias"] = dlogits.sum(axis=1)',
    ),
}


@pytest.mark.parametrize("shape", SOME_SHAPES)
def test_a_bug_that_shows_at_some_shapes_alone_is_caught(shape):
    function, before, after = SOME_SHAPES[shape]
    assert catch(Mutant("somewhere", function, before, after, shape))


@pytest.mark.parametrize(
    ("function", "before", "after"),
    [
        ("linear_backward", "drows.T @ rows", "(rows.T @ drows).T"),
        (
            "layernorm_backward",
            "dbias = dy.sum(axis=rows)",
            "dbias = 0.5 * (dy + dy).sum(axis=rows)",
        ),
        ("softmax_backward", "y * (dy - ", "y * (dy + 3.0 - 3.0 - "),
        ("gelu_backward", "-0.5 * x * x", "-(x * x) / 2.0"),
        ("cross_entropy_backward", "(dloss / len(t))", "dloss * (1.0 / t.shape[0])"),
        ("gate_backward", "(1.0 - g) * dy", "dy - g * dy"),
        ("mhsa_backward", "merge_heads(dq, dk, dv)", "merge_heads(*(dq, dk, dv))"),
        ("convit_backward", "dx[:, 1:]", "dx[:, -dx.shape[1] + 1 :]"),
    ],
)
def test_a_harmless_change_is_not_called_wrong(function, before, after):
    assert not catch(Mutant("harmless", function, before, after, "the same thing said otherwise"))


def test_the_catalogue_is_large_and_covers_every_layer():
    planted = Counter(m.function for m in MUTANTS)
    assert len(MUTANTS) >= 60
    assert set(planted) == {f"{layer}_backward" for layer in CASES}
    assert min(planted.values()) >= 3
    beside = {m.function for m in NEIGHBOUR_MUTANTS}
    assert beside == {f"{layer}_backward" for layer in NEIGHBOURS}


def test_the_documented_catalogue_is_current():
    """`python -m miniconvit.gradcheck.mutants > docs/mutants.md`, run as a reader would."""
    command = [sys.executable, "-m", "miniconvit.gradcheck.mutants"]
    printed = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    assert PAGE.read_text(encoding="utf-8") == printed
    assert printed.count("\n- `") == len(ALL_MUTANTS)
