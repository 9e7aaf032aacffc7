"""AMX in tests: real where the machine has it, otherwise executed by amx_emulator.c.

Call emulate() before the first kernel with tiles is compiled. Without the feature in its target,
LLVM cannot select the instructions, and ends the process.

What the emulator refuses ends in abort() with a sentence on standard error. `pytest -s` shows it.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("amx_emulator.c")
FLAGS = ["-O3", "-mfma", "-mavx2", "-shared", "-fPIC", "-pthread"]
FEATURES = "+amx-tile,+amx-bf16"
NAMES = ["ldtilecfg", "tilerelease", "tilezero", "tileloadd", "tilestored", "tdpbf16ps"]
ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA = 158, 0x1023, 18


class Amx:
    """What executes tiles here: silicon where `emulator` is None, otherwise the emulator."""

    def __init__(self, emulator=None):
        self.emulator = emulator
        self.emulated = emulator is not None

    def __repr__(self):
        return "AMX emulated after SIGILL" if self.emulated else "AMX of this machine, not emulated"

    def counts(self):
        """How often this process executed each instruction, or None where nobody counts."""
        if not self.emulated:
            return None
        numbers = (ctypes.c_uint64 * len(NAMES))()
        self.emulator.amx_counts(numbers)
        return dict(zip(NAMES, numbers, strict=True))

    def reset(self):
        """Counts from zero again."""
        if self.emulated:
            self.emulator.amx_reset()


@cache
def emulate():
    """Makes AMX work in this process, its threads and its forks. Skips the test where it cannot."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("AMX is emulated on x86-64 Linux alone")
    pytest.importorskip("numba")
    flags = cpu_flags()
    if "amx_bf16" in flags:
        request = ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA)
        if request != 0:
            pytest.skip("the kernel of this machine refuses its AMX")
        return Amx()
    if not {"avx2", "fma"} <= flags:
        pytest.skip("the emulator of AMX needs AVX2 and FMA")
    emulator = ctypes.CDLL(str(compiled()))
    emulator.amx_counts.restype = emulator.amx_reset.restype = None
    select_tiles()
    return Amx(emulator)


def emulate_for_a_file():
    """The same before a file imports kernels with tiles. Where it cannot, the file is skipped."""
    try:
        return emulate()
    except pytest.skip.Exception as reason:
        pytest.skip(str(reason), allow_module_level=True)


def cpu_flags():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def compiled():
    """The emulator's emulator, in a folder of this user's own, compiled once for each content."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler for the emulator of AMX")
    folder = Path(tempfile.gettempdir()) / f"miniconvit-amx-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    assert folder.stat().st_uid == os.getuid(), f"{folder} belongs to somebody else"
    content = SOURCE.read_bytes() + repr([compiler, *FLAGS]).encode()
    target = folder / f"{hashlib.sha256(content).hexdigest()[:16]}.so"
    if not target.exists():
        half_done = target.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler, *FLAGS, "-o", half_done, SOURCE], check=True)
        half_done.replace(target)
    return target


def select_tiles():
    """Adds AMX to the features that Numba compiles for.

    The first @njit of a process settles them, so its code generator is replaced by a new one.
    What it has compiled stays valid: callers take its code in as bitcode.
    """
    from llvmlite import binding
    from numba import config
    from numba.core.codegen import JITCPUCodegen
    from numba.core.registry import cpu_target

    features = config.CPU_FEATURES or binding.get_host_cpu_features().flatten()
    config.CPU_FEATURES = f"{features},{FEATURES}"
    context = cpu_target.target_context
    if not context.codegen().magic_tuple()[2].endswith(FEATURES):
        context._internal_codegen = JITCPUCodegen("numba.exec")
    assert context.codegen().magic_tuple()[2].endswith(FEATURES), "too late: Numba has no AMX"
