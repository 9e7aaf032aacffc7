#!/usr/bin/env bash
# torch 2.13.0's gradcheck changes a batch normalisation in training mode while it checks it.
#
# What one would guess: a check looks, and leaves a module as it was. It calls the module 32 times
# here, and each call moves the running statistics by a tenth. So after a check that passes, the
# model evaluates otherwise than before it. With fast_mode=True there are four calls. This installs
# torch in a temporary folder, and fails if that has changed.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

cat > "$work/look.py" <<'P'
import sys

import torch
from torch.autograd import gradcheck

x = torch.arange(15.0, dtype=torch.float64).reshape(5, 3).square().requires_grad_()


def look(**how):
    """(passes, forward passes counted, how much of the running mean's way to the batch's is gone)."""
    norm = torch.nn.BatchNorm1d(3).double()
    passes = gradcheck(norm, (x,), **how)
    gone = norm.running_mean / x.detach().mean(dim=0)
    return passes, norm.num_batches_tracked.item(), round(gone.min().item(), 2)


found = look(), look(fast_mode=True)
for name, (passes, calls, gone) in zip(("gradcheck", "with fast_mode"), found):
    print(f"{name}: passes {passes}, {calls} calls, the running mean went {gone:.0%} of its way")
sys.exit(found != ((True, 32, 0.97), (True, 4, 0.34)))
P

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6"
"$work/venv/bin/python" "$work/look.py"
echo "as described"
