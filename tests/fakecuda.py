"""CUDA without a GPU: kernels executed by the C++ compiler's version of them, cuBLAS by NumPy.

The source that a GPU would run is compiled as it is, behind a few definitions. With 32 lanes every
thread of a block is a fiber, shuffles and barriers wait for each other, and a barrier that not all
reach is an error. With one lane, which is what whole trainings run on, a block is one thread.
"""

import ctypes
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

COMPILER = shutil.which("g++")
REASON = "there is no g++ to execute kernels with"
FOLDER = tempfile.TemporaryDirectory(prefix="fakecuda-")
SHIM = r"""
#include <cmath>
#include <cstring>
#include <cstdlib>
#include <csetjmp>
#include <functional>
#include <vector>
#include <ucontext.h>
using namespace std;
struct Index { int x, y; };
static Index threadIdx, blockIdx, blockDim, gridDim;
static double shared[6144];
#define __device__ static
#define __global__
static unsigned __float_as_uint(float x) { unsigned u; memcpy(&u, &x, 4); return u; }
static float __uint_as_float(unsigned u) { float x; memcpy(&x, &u, 4); return x; }

struct Meeting { int here = 0; long round = 0; };
static Meeting all_threads;
static vector<Meeting> warps;
static vector<double> slots[2];
enum State { NEW, STARTED, DONE };
struct Fiber { ucontext_t start; jmp_buf here; State state = NEW; };
static vector<Fiber> fibers;
static vector<char> stacks;
static jmp_buf scheduler;
static int running;
const int STACK = 32768;
static long progress;
static const function<void()>* kernel;

static void meet(Meeting& m, int count) {
    long round = m.round;
    progress++;
    if (++m.here == count) { m.here = 0; m.round++; return; }
    while (m.round == round)
        if (!_setjmp(fibers[running].here)) _longjmp(scheduler, 1);
}
static void __syncthreads() { if (fibers.size() > 1) meet(all_threads, fibers.size()); }
template <class V> static V __shfl_xor_sync(unsigned, V x, int offset, int) {
    int warp = threadIdx.y, lane = threadIdx.x;
    vector<double>& slot = slots[warps[warp].round & 1];
    slot[warp * LANES + lane] = x;
    meet(warps[warp], LANES);
    return (V)slot[warp * LANES + (lane ^ offset)];
}
static void fiber() {
    (*kernel)();
    fibers[running].state = DONE;
    progress++;
    _longjmp(scheduler, 1);
}
static void proceed(Fiber& f) {
    if (_setjmp(scheduler)) return;
    if (f.state == STARTED) _longjmp(f.here, 1);
    f.state = STARTED;
    setcontext(&f.start);
}

static int run(int grid, int lanes, int count, const function<void()>& f) {
    kernel = &f;
    gridDim = {grid, 1};
    blockDim = {lanes, count};
    int threads = lanes * count;
    if (threads > 1) stacks.resize(max(stacks.size(), (size_t)threads * STACK));
    for (int b = 0; b < grid; b++) {
        blockIdx = {b, 0};
        memset(shared, 0xff, sizeof shared);  // NaN
        if (threads == 1) { fibers.resize(1); threadIdx = {0, 0}; f(); continue; }
        all_threads = Meeting();
        warps.assign(count, Meeting());
        for (auto& slot : slots) slot.assign(threads, NAN);
        fibers.assign(threads, Fiber());
        for (int t = 0; t < threads; t++) {
            ucontext_t& start = fibers[t].start;
            getcontext(&start);
            start.uc_stack.ss_sp = &stacks[(size_t)t * STACK];
            start.uc_stack.ss_size = STACK;
            makecontext(&start, fiber, 0);
        }
        for (int left = threads; left;) {
            long before = progress;
            left = 0;
            for (running = 0; running < threads; running++) {
                if (fibers[running].state == DONE) continue;
                threadIdx = {running % lanes, running / lanes};
                proceed(fibers[running]);
                left += fibers[running].state != DONE;
            }
            if (left && progress == before) return 1;
        }
    }
    return 0;
}
"""


def signatures(code):
    """Kernel to its arguments, (declared type, name) each."""
    found = {}
    for name, args in re.findall(r"^KERNEL (\w+)\(([^)]*)\) \{", code, re.MULTILINE):
        parts = [re.fullmatch(r"(.*?[ *])(\w+)", " ".join(arg.split())) for arg in args.split(",")]
        found[name] = [(part[1].strip(), part[2]) for part in parts]
    return found


@cache
def compiled(code, lanes):
    """The kernels as a library with a function launch_NAME(grid, lanes, warps, arguments)."""
    code = code.replace("extern __shared__ double shared[];", "")
    launchers = "".join(
        f'extern "C" int launch_{name}(int grid, int lanes, int warps, void** a) {{ '
        f"return run(grid, lanes, warps, [=] {{ {name}("
        + ", ".join(f"*({kind.replace('BOTH', '')}*)a[{i}]" for i, (kind, _) in enumerate(args))
        + "); }); }\n"
        for name, args in signatures(code).items()
    )
    stem = Path(FOLDER.name) / f"{abs(hash((code, lanes)))}"
    stem.with_suffix(".cpp").write_text(f"#define LANES {lanes}\n{SHIM}\n{code}\n{launchers}")
    command = [COMPILER, "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-ffp-contract=off"]
    command += ["-o", stem.with_suffix(".so"), stem.with_suffix(".cpp")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    return ctypes.CDLL(str(stem.with_suffix(".so")))


def rounded_to_tf32(x):
    """float32 with ten bits after the point, to nearest even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    bits = (bits + 0xFFF + (bits >> 13 & 1)) & np.uint32(0xFFFFE000)
    return bits.view(np.float32)


class Cublas:
    """What `product.py` calls of cuBLAS, on memory of this process, column by column as there."""

    TYPES = {0: np.float32, 1: np.float64, 14: np.uint16}  # noqa: RUF012

    def __init__(self, given):
        """given: is called with the work of a product, and does it, now or later."""
        self._given = given

    def cublasCreate_v2(self, handle):
        return 0

    def cublasSetStream_v2(self, handle, stream):
        return 0

    def cublasSetWorkspace_v2(self, handle, workspace, size):
        return 0

    def cublasGemmStridedBatchedEx(self, handle, turn_a, turn_b, m, n, k, alpha, a, kind_a, lda,
                                   stride_a, b, kind_b, ldb, stride_b, beta, c, kind_c, ldc,
                                   stride_c, count, compute, algorithm):  # fmt: skip
        rows_a, columns_a = (k, m) if turn_a else (m, k)
        rows_b, columns_b = (n, k) if turn_b else (k, n)
        if lda < rows_a or ldb < rows_b or ldc < m or kind_a != kind_b:
            return 7  # CUBLAS_STATUS_INVALID_VALUE
        a = self._matrices(a, kind_a, rows_a, columns_a, lda, stride_a, count)
        b = self._matrices(b, kind_b, rows_b, columns_b, ldb, stride_b, count)
        a, b = (x.swapaxes(1, 2) if turn else x for x, turn in ((a, turn_a), (b, turn_b)))
        c = self._matrices(c, kind_c, m, n, ldc, stride_c, count)

        def work():
            with np.errstate(all="ignore"):
                result = alpha._obj.value * (self._rounded(a, compute) @ self._rounded(b, compute))
                c[...] = result + c if beta._obj.value else result

        self._given(work)
        return 0

    def _rounded(self, x, compute):
        if x.dtype == np.uint16:  # bfloat16
            return (x.astype(np.uint32) << 16).view(np.float32)
        return rounded_to_tf32(x) if compute == 77 else x

    def _matrices(self, pointer, kind, rows, columns, lead, stride, count):
        dtype = np.dtype(self.TYPES[kind])
        stride, size = stride.value, dtype.itemsize
        assert pointer.value % size == 0
        whole = (count - 1) * stride + (columns - 1) * lead + rows
        memory = (ctypes.c_char * (whole * size)).from_address(pointer.value)
        strides = (stride * size, size, lead * size)
        return np.ndarray((count, rows, columns), dtype, memory, strides=strides)
