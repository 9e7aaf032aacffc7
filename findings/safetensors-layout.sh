#!/usr/bin/env bash
# safetensors 0.8.0 saves a NumPy view in the order of its memory, under the shape of the view.
#
# What one would guess: load(save({"x": view}))["x"] equals view. So it is in 0.7.0, for every
# layout. In 0.8.0 arrays that are not C-contiguous come back with their elements in other places,
# and nothing warns. This installs both in a temporary folder, and fails if that has changed.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

cat > "$work/look.py" <<'P'
import sys

import numpy as np
import safetensors
from safetensors.numpy import load, save

a = np.arange(6, dtype="float32").reshape(2, 3)
views = {
    "contiguous": a,
    "transposed": a.T,
    "part": a[:, 1:],
    "every other": a[:, ::2],
    "backwards": a[::-1],
    "broadcast": np.broadcast_to(a[0], (4, 3)),
    "Fortran": np.asfortranarray(a),
}
wrong = [name for name, x in views.items() if not np.array_equal(load(save({"x": x}))["x"], x)]
print(f"safetensors {safetensors.__version__}, NumPy {np.__version__}: other values for {wrong}")
expected = [] if sys.argv[1] == "right" else [name for name in views if name != "contiguous"]
sys.exit(wrong != expected)
P

for pair in 0.7.0:right 0.8.0:wrong; do
    python3 -m venv "$work/${pair%:*}"
    "$work/${pair%:*}/bin/pip" install -q "safetensors==${pair%:*}" "numpy==2.4.6"
    "$work/${pair%:*}/bin/python" "$work/look.py" "${pair#*:}"
done
echo "as described"
