#!/usr/bin/env bash
# autograd 1.9.1's check_grads looks at the first argument alone, unless it is told which.
#
# What one would guess: check_grads(f)(x, w) fails where the gradient of w is wrong. It passes,
# without a word, because `argnum` is 0 by default, as for grad. check_grads(f, (0, 1))(x, w) fails
# as it should. This installs it in a temporary folder, and fails if that has changed.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

cat > "$work/look.py" <<'P'
import sys

import numpy as np
from autograd.extend import defvjp, primitive
from autograd.test_util import check_grads

product = primitive(lambda x, w: x * w)
right, wrong = lambda y, x, w: lambda g: g * w, lambda y, x, w: lambda g: 99 * g * x
defvjp(product, right, wrong)


def passes(*argnum):
    try:
        check_grads(product, *argnum, modes=["rev"], order=1)(np.ones(3), np.ones(3))
    except AssertionError:
        return False
    return True


np.random.seed(0)
found = passes(), passes((0, 1))
print(f"the gradient of w is 99 times too large: passes by default {found[0]}, told of w {found[1]}")
sys.exit(found != (True, False))
P

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "autograd==1.9.1" "numpy==2.4.6"
"$work/venv/bin/python" "$work/look.py"
echo "as described"
