#!/usr/bin/env bash
# threadpoolctl 3.8.0: a limit that one thread has set and restored keeps all other threads from
# setting one, in silence.
#
# What one would guess: after restore_original_limits() all is as it was, so that a thread that asks
# for one BLAS thread gets it, as with 3.6.0. With 3.8.0 NumPy's OpenBLAS stays at two threads there.
# The thread that came first keeps control as long as it lives. Leaving a `with` block gives it up.
# The docstring of OpenBLASController tells of the control, that of threadpool_limits does not. This
# installs both versions beside NumPy in a temporary folder, and fails if they change.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

cat > "$work/look.py" <<'P'
import sys
from threading import Thread

import numpy
import threadpoolctl
from threadpoolctl import threadpool_info, threadpool_limits


def threads():
    return [lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"]


def in_a_thread():
    limits = threadpool_limits(limits=1, user_api="blas")
    seen.append(threads())
    limits.restore_original_limits()


seen = []
threadpool_limits(limits=1, user_api="blas").restore_original_limits()
other = Thread(target=in_a_thread)
other.start()
other.join()
with threadpool_limits(limits=1, user_api="blas"):
    pass
other = Thread(target=in_a_thread)
other.start()
other.join()
print(f"threadpoolctl {threadpoolctl.__version__}, NumPy {numpy.__version__}: asked for 1 in a "
      f"thread, {seen[0]} after restore_original_limits(), {seen[1]} after a with block")
expected = {"3.6.0": [[1], [1]], "3.8.0": [[2], [1]]}
sys.exit(seen != expected[threadpoolctl.__version__])
P

for version in 3.6.0 3.8.0; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "numpy==2.4.6" "threadpoolctl==$version"
    OPENBLAS_NUM_THREADS=2 "$work/$version/bin/python" "$work/look.py"
done
echo "as described"
