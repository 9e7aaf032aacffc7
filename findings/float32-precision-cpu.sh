#!/usr/bin/env bash
# torch 2.13.0's set_float32_matmul_precision also sets the products of the CPU, to bf16 or TF32.
#
# What one would guess: nothing changes on a CPU. Its docstring says "This flag currently only
# affects one native device type: CUDA", and that "high" and "medium" mean TF32 there. Yet the same
# call sets oneDNN's torch.backends.mkldnn.matmul.fp32_precision, to "tf32" or to "bf16". Convolutions
# keep theirs. Whether numbers change depends on the CPU: the error of a product is printed, not
# judged. This installs torch in a temporary folder, and fails if the settings or the docstring have
# changed.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

cat > "$work/look.py" <<'P'
import sys

import torch

oneDNN = torch.backends.mkldnn
torch.manual_seed(0)
a = torch.randn(512, 512)
exact = a.double() @ a.double()

found = {}
for name in ("as it comes", "highest", "high", "medium"):
    if name != "as it comes":
        torch.set_float32_matmul_precision(name)
    found[name] = oneDNN.matmul.fp32_precision, oneDNN.conv.fp32_precision
    error = ((a @ a).double() - exact).norm() / exact.norm()
    print(f"{name}: products {found[name][0]}, convolutions {found[name][1]}, error {error:.0e}")

words = " ".join(torch.set_float32_matmul_precision.__doc__.split())
says_cuda = "only affects one native device type: CUDA" in words
print(f"the docstring says that this affects CUDA alone: {says_cuda}")
expected = {"as it comes": "none", "highest": "ieee", "high": "tf32", "medium": "bf16"}
sys.exit(not says_cuda or found != {name: (value, "none") for name, value in expected.items()})
P

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6"
"$work/venv/bin/python" "$work/look.py"
echo "as described"
