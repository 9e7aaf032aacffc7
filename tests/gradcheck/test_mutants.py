"""The checker under test: it catches every planted bug and lets harmless changes pass."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from miniconvit.gradcheck.cases import CASES, catch
from miniconvit.gradcheck.mutants import MUTANTS, Mutant

PAGE = Path(__file__).parents[2] / "docs" / "mutants.md"


@pytest.mark.parametrize("layer", CASES)
def test_every_mutant_is_caught(layer):
    mutants = [m for m in MUTANTS if m.function == f"{layer}_backward"]
    assert len(mutants) >= 3
    survivors = [m.name for m in mutants if not catch(m)]
    assert not survivors


@pytest.mark.full
@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("every_entry", [False, True])
def test_every_mutant_is_caught_on_other_seeds(seed, every_entry):
    mutants = [m for m in MUTANTS if not (every_entry and m.function == "convit_backward")]
    survivors = [m.name for m in mutants if not catch(m, seed, every_entry)]
    assert not survivors


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


def test_the_documented_catalogue_is_current():
    """`python -m miniconvit.gradcheck.mutants > docs/mutants.md`, run as a reader would."""
    command = [sys.executable, "-m", "miniconvit.gradcheck.mutants"]
    printed = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    assert PAGE.read_text(encoding="utf-8") == printed
    assert printed.count("\n- `") == len(MUTANTS)
