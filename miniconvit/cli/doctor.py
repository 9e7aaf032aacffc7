"""`miniconvit doctor`."""

import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click
import numpy as np

from .. import __version__
from ..engine.cpu import check_cpu_precision
from ..engine.cuda import examine_cuda
from ..engine.ranks import import_mpi
from ..errors import UserError
from ..system import available_threads, numba_version, numpy_blas
from ..training.report import table
from .options import Command, json_option, print_json

MATMUL = 1024


@click.command("doctor", cls=Command)
@json_option
def command(as_json):
    """Show what this machine can do.

    It looks for the libraries, the memory and the GPU, and says whether miniconvit can use them.
    """
    found = examine()
    if as_json:
        print_json(found)
    else:
        shown = {key: "-" if value is None else value for key, value in found.items()}
        click.echo(table(shown.items()))


def examine():
    """What `doctor` prints: a dict of JSON types. matmul_gflops is measured, on all threads."""
    blas = numpy_blas()
    milliseconds = _matmul_ms()
    found = {
        "miniconvit": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{platform.system()} {platform.machine()}",
        "numpy": np.__version__,
        "scipy": version("scipy"),
        "blas": f"{blas['internal_api']} {blas['version']}" if blas else None,
        "blas_threads": blas.get("num_threads"),
        "threads": available_threads(),
        "memory_gb": _memory_gb(),
        "matmul_ms": round(milliseconds, 2),
        "matmul_gflops": round(2 * MATMUL**3 / milliseconds / 1e6, 1),
        "mpi": _mpi(),
        "kernels": f"Numba {numba_version()}" if numba_version() else None,
        "cpu_bf16": _cpu_bf16(),
    }
    found |= examine_cuda()
    return found | {"verdict": _verdict(found)}


def _matmul_ms():
    """The best of five products of two float32 matrices, in milliseconds."""
    a = np.random.default_rng(0).standard_normal((MATMUL, MATMUL), dtype=np.float32)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - began)
    return 1000 * min(times)


def _mpi():
    """The MPI that ranks would use, or None. It is not initialised: that may leave files behind."""
    try:
        MPI = import_mpi("doctor needs none")
        number = version("mpi4py")
    except (UserError, PackageNotFoundError):
        return None
    vendor, numbers = MPI.get_vendor()
    return f"{vendor} {'.'.join(map(str, numbers))} (mpi4py {number})"


def _cpu_bf16():
    """Whether products in bf16 can be had on this CPU, and else why not."""
    try:
        check_cpu_precision("bf16")
    except UserError as error:
        return str(error)
    return "ready"


def _memory_gb():
    """Memory that this process may use, in GB: the machine's, or the container's limit."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return round((memory if text == "max" else min(memory, int(text))) / 1e9, 1)


def _verdict(found):
    if found["blas"] is None:
        return "usable, but no BLAS library was recognised under NumPy: training may be slow"
    return "ready: miniconvit train"
