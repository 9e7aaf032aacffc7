"""Where a run computes: on the CPU through NumPy, or on an NVIDIA GPU through CuPy."""

import ctypes
import os
import re
import tempfile
import time
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from ..errors import UserError, unknown_name
from .cpu import check_cpu_precision

DEVICES = ("auto", "cpu", "cuda")
WHEELS = ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x")
OLDEST_DRIVER = {12: 525, 13: 580}
"""The first driver that serves a major version of CUDA."""
OLDEST_CUPY = 14, 1
"""Older ones add float32 and large integers in float64, or sort and compare wrongly."""
PRECISIONS = ("float32", "tf32", "bf16")
"""Of matrix products: float32 in all bits, or its operands rounded to TF32 or bfloat16."""
OF_TENSOR_CORES = 80
"""The least compute capability, times ten, with products in TF32 and bfloat16."""
OF_CUDA_13 = 75
"""The least compute capability, times ten, that CUDA 13 compiles for."""
_MEMORY = ("OUT_OF_MEMORY", "ALLOC_FAILED", "cudaErrorMemoryAllocation")
_CACHE = []  # a temporary folder for kernels, which goes with the process
_COMPILING = ", which compiles its kernels in the first step, once"


class _Unusable(Exception):
    """What is missing for CUDA, and the exact next step."""

    def __init__(self, finding, remedy):
        super().__init__(finding, remedy)
        self.finding, self.remedy = finding, remedy


def resolve_device(name="auto"):
    """(array module, sentence) for "cpu", for "cuda", or for "auto": CUDA where it works, else the
    CPU. The sentence says what was chosen and why.

    Raises UserError for another name and, with "cuda", where a kernel cannot be compiled and run.
    """
    if name not in DEVICES:
        raise UserError(unknown_name("device", name, DEVICES))
    if name == "cpu":
        return np, "on the CPU, as asked for"
    found, problem = _examine()
    if problem is None:
        place = f"on the GPU: {found['gpu']}, {found['cupy']}"
        return import_module("cupy"), place + _COMPILING * found["compiles_kernels"]
    if name == "auto":
        return np, f"on the CPU: {problem.finding}"
    raise UserError(f"--device cuda cannot be used: {problem.finding}; {problem.remedy}")


def check_precision(precision, xp):
    """Raises UserError where there are no products of this precision for arrays of the module xp,
    or where it has another name."""
    if precision not in PRECISIONS:
        raise UserError(unknown_name("precision", precision, PRECISIONS))
    if precision == "float32":
        return
    if xp is np:
        check_cpu_precision(precision)
        return
    capability = _compute_capability() or OF_TENSOR_CORES
    if capability < OF_TENSOR_CORES:
        raise UserError(
            f"--precision {precision} needs a GPU of compute capability {OF_TENSOR_CORES / 10} or "
            f"newer, and this one has {capability / 10}: leave it at float32"
        )


def without_reason(place):
    """What resolve_device says of the place alone: for tables and JSON."""
    return "on the CPU" if place.startswith("on the CPU") else place.removesuffix(_COMPILING)


def examine_cuda():
    """What there is for CUDA: versions, device, memory, the time of a first kernel (with its
    compilation where it was not cached), and a verdict. A dict of JSON types, None for what was not
    reached."""
    found, problem = _examine()
    verdict = "ready" if problem is None else f"{problem.finding}; {problem.remedy}"
    return found | {"cuda": verdict}


@contextmanager
def out_of_memory():
    """While it lasts, memory that is exhausted outside of CuPy's pool is a MemoryError too: where a
    kernel is loaded or cuBLAS works."""
    try:
        yield
    except RuntimeError as error:
        if any(word in str(error) for word in _MEMORY):
            raise MemoryError(_short(error)) from error
        raise


def _examine():
    """(what was found, _Unusable or None)."""
    names = ("cupy", "cuda_driver", "cuda_runtime", "gpu", "compute_capability", "gpu_memory_gb")
    names += ("gpu_free_gb", "first_kernel_ms", "compiles_kernels")
    found = dict.fromkeys(names)
    try:
        _find(found)
    except _Unusable as problem:
        return found, problem
    return found, None


def _find(found):
    """Fills in `found`, step by step. Raises _Unusable at the first step that fails."""
    driver = _driver_version()
    found["cuda_driver"] = _dotted(driver)
    wheels = _wheels()
    found["cupy"] = ", ".join(f"{name} {number}" for name, number in wheels.items()) or None
    capability = _compute_capability()
    found["compute_capability"] = capability and capability / 10
    fitting = _fitting_wheel(driver, capability)
    install = f"pip install -U '{fitting}'"
    cupy = _import_cupy(wheels, driver, install)
    runtime = cupy.cuda.runtime
    needed = runtime.runtimeGetVersion()
    found["cuda_runtime"] = _dotted(needed)
    if driver == 0:
        raise _Unusable(
            "no NVIDIA driver was found",
            "install one (nvidia-smi must list a GPU; in a container, pass the GPU on), or use "
            "--device cpu",
        )
    if driver // 1000 < needed // 1000:
        name, oldest = next(iter(wheels), "cupy"), OLDEST_DRIVER.get(needed // 1000, "a newer one")
        other = f", or pip uninstall -y {name} and {install}" if driver >= 12000 else ""
        raise _Unusable(
            f"the driver serves CUDA {_dotted(driver)}, and {name} needs CUDA {needed // 1000}",
            f"update the driver to {oldest} or newer{other}",
        )
    if needed >= 13000 and (capability or OF_CUDA_13) < OF_CUDA_13:
        name = next(iter(wheels), "cupy")
        raise _Unusable(
            f"this GPU (compute capability {capability / 10}) is served by CUDA 12 only, and "
            f"{name} needs CUDA {needed // 1000}",
            f"pip uninstall -y {name}, then {install}",
        )
    _find_gpu(runtime, found)
    wheel = next((name for name in wheels if name != "cupy"), fitting.removesuffix("[ctk]"))
    cached = _cached_kernels()
    found["first_kernel_ms"] = _run_kernel(cupy, f"pip install -U '{wheel}[ctk]'")
    found["compiles_kernels"] = _cached_kernels() != cached


def _driver():
    """The driver's library, or None."""
    for library in ("libcuda.so.1", "nvcuda.dll"):
        with suppress(OSError):
            return ctypes.CDLL(library)
    return None


def _driver_version():
    """The newest CUDA that the driver serves, as 1000 * major + 10 * minor; 0 without a driver."""
    number = ctypes.c_int(0)
    if driver := _driver():
        driver.cuDriverGetVersion(ctypes.byref(number))
    return number.value


def _compute_capability():
    """Ten times the compute capability of the first GPU, such as 90; None where there is none."""
    driver, device, number = _driver(), ctypes.c_int(0), ctypes.c_int(0)
    if not driver or driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    parts = []
    for attribute in (75, 76):  # major and minor
        driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        parts.append(number.value)
    return 10 * parts[0] + parts[1]


def _dotted(number):
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def _fitting_wheel(driver, capability):
    """The CuPy package, with CUDA's own libraries, for a driver and a GPU."""
    is_old = 0 < driver < 13000 or (capability or OF_CUDA_13) < OF_CUDA_13
    return f"cupy-cuda{12 if is_old else 13}x[ctk]"


def _wheels():
    """Installed CuPy packages: {name: version}."""
    wheels = {}
    for name in WHEELS:
        with suppress(PackageNotFoundError):
            wheels[name] = version(name)
    return wheels


def _import_cupy(wheels, driver, install):
    """The module cupy, of one package. Raises _Unusable."""
    if len(wheels) > 1:
        raise _Unusable(
            f"{len(wheels)} CuPy packages are installed over each other ({', '.join(wheels)})",
            f"pip uninstall -y {' '.join(wheels)}, then {install}",
        )
    for name, number in wheels.items():
        _refuse_old(name, number, install)
    if wheels:
        _find_cache()
    try:
        cupy = import_module("cupy")
    except ModuleNotFoundError as error:
        if error.name != "cupy":
            raise _broken(wheels, error, install) from error
        if wheels:
            raise _Unusable(
                f"the files of {next(iter(wheels))} are missing, though it counts as installed",
                f"pip uninstall -y {' '.join(wheels)}, then {install}",
            ) from error
        if driver:
            raise _Unusable("CuPy is not installed", install) from error
        raise _Unusable(
            "CuPy is not installed and there is no NVIDIA driver",
            f"on a machine with an NVIDIA GPU, {install}; here, use --device cpu",
        ) from error
    except Exception as error:  # whatever a broken installation raises is the finding
        raise _broken(wheels, error, install) from error
    _refuse_old("CuPy", cupy.__version__, install)
    return cupy


def _refuse_old(name, number, install):
    """Raises _Unusable for a version that computes wrongly here."""
    if tuple(int(part) for part in re.findall(r"\d+", number)[:2]) < OLDEST_CUPY:
        remove = f"pip uninstall -y {name}, then {install}"
        is_fitting = f"{name}[ctk]" in install
        raise _Unusable(
            f"{name} {number} is too old: it must be {'.'.join(map(str, OLDEST_CUPY))} or newer",
            install if is_fitting else remove.replace("CuPy", "cupy"),
        )


def _cache():
    """The folder in which CuPy keeps compiled kernels."""
    return Path(os.environ.get("CUPY_CACHE_DIR") or Path("~/.cupy/kernel_cache").expanduser())


def _find_cache():
    """Makes sure of that folder, which CuPy needs to be imported: a temporary one where the home
    folder cannot be written. Raises _Unusable where CUPY_CACHE_DIR cannot."""
    try:
        folder = _cache()
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        if "CUPY_CACHE_DIR" in os.environ:
            raise _Unusable(
                f"CuPy cannot keep compiled kernels in CUPY_CACHE_DIR ({_short(error)})",
                "set CUPY_CACHE_DIR to a folder that can be written",
            ) from error
        _CACHE.append(tempfile.TemporaryDirectory(prefix="cupy-"))
        os.environ["CUPY_CACHE_DIR"] = _CACHE[-1].name


def _cached_kernels():
    """How many files are in that folder."""
    with suppress(OSError, RuntimeError):
        return len(os.listdir(_cache()))
    return 0


def _broken(wheels, error, install):
    remove = f"pip uninstall -y {' '.join(wheels) or 'cupy'}, then {install}"
    cause = error.__cause__ or error  # CuPy wraps it into a page of advice
    return _Unusable(f"CuPy cannot be imported ({_short(cause)})", remove)


def _find_gpu(runtime, found):
    """Name and memory of the device. Raises _Unusable where there is none."""
    try:
        count = runtime.getDeviceCount()
        if count == 0:
            raise RuntimeError("0 devices")
        properties = runtime.getDeviceProperties(0)
        free, total = runtime.memGetInfo()
    except RuntimeError as error:
        raise _Unusable(
            f"the driver is there, but no GPU can be used ({_short(error)})",
            "check that nvidia-smi lists one and that CUDA_VISIBLE_DEVICES does not hide it, or "
            "use --device cpu",
        ) from error
    found["gpu"] = properties["name"].decode()
    found["gpu_memory_gb"], found["gpu_free_gb"] = round(total / 1e9, 1), round(free / 1e9, 1)


def _run_kernel(cupy, install):
    """Milliseconds of two compiled kernels, a function of cupyx and a product by cuBLAS, all with
    known results. Raises _Unusable."""
    began = time.perf_counter()
    try:
        x = cupy.arange(8, dtype=cupy.float32)
        erf = import_module("cupyx.scipy.special").erf
        product = x.reshape(2, 4) @ x.reshape(4, 2)
        sums = float((x * x).sum()), float(product.sum()), float(erf(x).max())
    except MemoryError as error:
        raise _Unusable(
            f"the GPU's memory is full ({_short(error)})",
            "stop the programs that nvidia-smi lists on it, or use --device cpu",
        ) from error
    except Exception as error:  # every missing part has an exception of its own
        raise _Unusable(_missing_part(error), install) from error
    if sums != (140.0, 236.0, 1.0):
        raise _Unusable(
            f"the GPU computes wrongly: {sums} instead of (140.0, 236.0, 1.0)",
            "update the driver, or use --device cpu",
        )
    return round(1000 * (time.perf_counter() - began), 1)


def _missing_part(error):
    """What a failed first kernel says of the installation."""
    text = f"{type(error).__name__} {error}".lower()
    for word, part in (
        ("nvrtc.so", "CUDA's compiler NVRTC was not found"),
        ("nvrtc6", "CUDA's compiler NVRTC was not found"),
        ("cublas", "cuBLAS was not found"),
        ("could not open source file", "CUDA's headers were not found"),
        ("cannot open source file", "CUDA's headers were not found"),
    ):
        if word in text:
            return f"{part} ({_short(error)})"
    return f"CuPy cannot compile and run a kernel ({_short(error)})"


def _short(error):
    """The first words of an exception, on one line."""
    return " ".join(str(error).split())[:120].rstrip(" .") or type(error).__name__
