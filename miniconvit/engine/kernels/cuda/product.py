"""Matrix products by cuBLAS, called directly.

CuPy's own product knows TF32 and bfloat16 for plain matrices alone, copies transposed factors of
batched ones, and refuses to be captured in a graph.
"""

import ctypes
from functools import lru_cache
from math import prod

FLOAT32, FLOAT64, BFLOAT16 = 0, 1, 14  # cudaDataType_t
COMPUTE_FLOAT32, COMPUTE_TF32, COMPUTE_FLOAT64 = 68, 77, 70  # cublasComputeType_t
AUTOMATIC = -1  # cublasGemmAlgo_t
WORKSPACE = 32 * 2**20  # bytes: what cuBLAS recommends for the largest GPUs


@lru_cache(maxsize=1)
def load_cublas():
    """The library cuBLAS, which CuPy has found already."""
    from cuda.pathfinder import load_nvidia_dynamic_lib  # which comes with CuPy

    return ctypes.CDLL(load_nvidia_dynamic_lib("cublas").abs_path)


class Products:
    """Products of arrays of one module in one precision, on its current stream.

    Factors are float32, float64, or bfloat16 as uint16; sums and results are float32 or float64.
    """

    def __init__(self, xp, precision):
        self.xp, self.precision = xp, precision
        self._library, self._handle, self._stream = load_cublas(), ctypes.c_void_p(), None
        self._product, self._plans = self._library.cublasGemmStridedBatchedEx, {}
        self._call("cublasCreate_v2", ctypes.byref(self._handle))
        self._workspace = xp.empty((WORKSPACE,), xp.uint8)

    def _call(self, name, *args):
        if status := getattr(self._library, name)(*args):
            self._fail(name, status)

    def _fail(self, name, status):
        status = {3: "CUBLAS_STATUS_ALLOC_FAILED"}.get(status, f"status {status}")
        raise RuntimeError(f"{name} of cuBLAS: {status}")

    def _follow(self):
        """Makes cuBLAS work on the current stream, with memory of its own for it."""
        stream = self.xp.cuda.get_current_stream().ptr
        if stream != self._stream:
            self._call("cublasSetStream_v2", self._handle, ctypes.c_void_p(stream))
            workspace = ctypes.c_void_p(self._workspace.data.ptr)
            size = ctypes.c_size_t(WORKSPACE)
            self._call("cublasSetWorkspace_v2", self._handle, workspace, size)
            self._stream = stream

    def __call__(self, a, b, out=None, alpha=1.0, add=False):
        """alpha a @ b for a (..., m, k) and b (..., k, n), in `out`, or added to it.

        One of the last two axes of each lies element by element; the axes before them are one or
        two with a common stride. out has the last axis so. Nothing is copied.
        """
        if out is None:
            kind = self.xp.float64 if a.dtype == self.xp.float64 else self.xp.float32
            out = self.xp.empty((*a.shape[:-1], b.shape[-1]), kind)
        key = a.shape, a.strides, b.shape, b.strides, out.strides, a.dtype
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._plan(a, b, out)
        number, sizes, of_b, of_a, of_out = plan
        self._follow()
        status = self._product(
            self._handle, *sizes, ctypes.byref(number(alpha)), ctypes.c_void_p(b.data.ptr), *of_b,
            ctypes.c_void_p(a.data.ptr), *of_a, ctypes.byref(number(add)),
            ctypes.c_void_p(out.data.ptr), *of_out, AUTOMATIC,
        )  # fmt: skip
        if status:
            self._fail("cublasGemmStridedBatchedEx", status)
        return out

    def _plan(self, a, b, out):
        """What a product of these forms tells cuBLAS beside its addresses. cuBLAS counts down
        columns, so it is asked for the transpose, b^T a^T."""
        (m, k), n, float64 = a.shape[-2:], b.shape[-1], self.xp.float64
        (turn_a, *of_a), (turn_b, *of_b), (turn_out, *of_out) = map(_layout, (a, b, out))
        if turn_out or a.shape[:-2] != b.shape[:-2] or b.shape[-2] != k:
            raise ValueError(f"no product of {a.shape} and {b.shape} into strides {out.strides}")
        kind = BFLOAT16 if a.dtype == self.xp.uint16 else FLOAT32
        kind, kind_out = (FLOAT64, FLOAT64) if a.dtype == float64 else (kind, FLOAT32)
        compute = COMPUTE_FLOAT64 if a.dtype == float64 else COMPUTE_FLOAT32
        if self.precision == "tf32" and kind == FLOAT32:
            compute = COMPUTE_TF32
        number = ctypes.c_double if a.dtype == float64 else ctypes.c_float
        of_out += prod(a.shape[:-2]), compute
        return number, (turn_b, turn_a, n, m, k), (kind, *of_b), (kind, *of_a), (kind_out, *of_out)


def _layout(x):
    """(1 where the matrices of x lie transposed, elements from row to row, from one matrix to the
    next), the last as cuBLAS takes it."""
    size = x.dtype.itemsize
    *batch, row, column = (step // size for step in x.strides)
    *counts, rows, columns = x.shape
    is_turned = column != 1 and columns > 1
    lead = column if is_turned else row
    if is_turned and (row != 1 and rows > 1):
        raise ValueError(f"no axis of strides {x.strides} lies element by element")
    length = rows if is_turned else columns
    if (columns if is_turned else rows) == 1:
        lead = max(lead, length)
    stride = batch[-1] if batch else 0
    if len(batch) == 2 and counts[0] > 1 and batch[0] != batch[1] * counts[1]:
        raise ValueError(f"the batches of strides {x.strides} have no common stride")
    return int(is_turned), lead, ctypes.c_longlong(stride)
