#!/usr/bin/env bash
# PyTorch 2.13.0's Muon moves a float64 matrix by a step that is exact to about two digits.
#
# What one would guess: an optimizer computes in the type of its parameters, as AdamW does there. But
# Muon rounds the gradient to bfloat16 before it makes it orthogonal, whatever its type, and five
# Newton-Schulz steps go on in bfloat16. The parameter stays float64, so nothing shows it. Whoever
# compares an implementation with PyTorch in float64 finds a difference of two hundredths. This installs
# torch in a temporary folder, compares both optimizers with their formulas in float64, and fails if
# that has changed.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

cat > "$work/look.py" <<'P'
import sys

import numpy as np
import torch

rng = np.random.default_rng(0)
before, gradient = rng.standard_normal((2, 24, 32))


def step_of(kind, **settings):
    """What one step takes off the parameter, with a rate of 1 and without decay."""
    p = torch.nn.Parameter(torch.from_numpy(before.copy()))
    p.grad = torch.from_numpy(gradient.copy())
    kind([p], lr=1.0, weight_decay=0.0, **settings).step()
    return before - p.detach().numpy(), p.dtype


def difference(found, true):
    return np.linalg.norm(found - true) / np.linalg.norm(true)


x = gradient / np.linalg.norm(gradient)
for _ in range(5):
    gram = x @ x.T
    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
muon, dtype = step_of(torch.optim.Muon)
adamw, _ = step_of(torch.optim.AdamW, eps=1e-8)
errors = difference(muon, x), difference(adamw, gradient / (abs(gradient) + 1e-8))
print(f"torch {torch.__version__}, parameter {dtype}")
print(f"relative error of a step: Muon {errors[0]:.0e}, AdamW {errors[1]:.0e}")
sys.exit(not (dtype == torch.float64 and errors[0] > 1e-3 and errors[1] < 1e-12))
P

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6"
"$work/venv/bin/python" "$work/look.py"
echo "as described"
