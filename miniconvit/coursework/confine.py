"""What a process does to itself before it reads a student's text: limits that nothing lifts.

This file is copied beside the student's, and needs Python alone. Run by itself, it prints which of
the walls stand here.
"""

import json
import os
import signal
import sys
from contextlib import suppress

NOBODY = 65534
DESCRIPTORS = 32
NEEDED = (
    *("read", "readv", "pread64", "write", "writev", "lseek", "close", "dup", "fcntl", "ioctl"),
    *("stat", "fstat", "lstat", "newfstatat", "statx", "access", "faccessat", "faccessat2"),
    *("readlink", "readlinkat", "getcwd", "getdents64", "poll", "ppoll", "select", "pselect6"),
    *("brk", "mmap", "munmap", "mremap", "mprotect", "madvise", "futex", "membarrier", "rseq"),
    *("rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "restart_syscall"),
    *("clock_gettime", "clock_getres", "clock_nanosleep", "nanosleep", "gettimeofday", "time"),
    *("getpid", "gettid", "getppid", "getuid", "geteuid", "getgid", "getegid", "getgroups"),
    *("getrandom", "getrusage", "times", "uname", "sysinfo", "sched_yield", "sched_getaffinity"),
    *("arch_prctl", "set_robust_list", "exit", "exit_group"),
)
"""The system calls that Python and NumPy make to compute; every other one fails."""


def confine(parent, seconds, memory, output):
    """No more time, memory, output, processes or descriptors than this; no system calls but the
    needed ones; death with the parent; where root starts it, as nobody.

    Returns which of these walls stand: {"nobody": ..., "filter": ...}.
    """
    try:
        import ctypes
        import resource  # before we are nobody, who may not read the standard library
    except ImportError:  # Windows: the parent's clock remains
        return {"nobody": False, "filter": False}
    library = None
    with suppress(OSError):
        library = ctypes.CDLL("libseccomp.so.2")
    is_root = os.getuid() == 0
    if is_root:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died before we asked
            sys.exit(1)
    limits = {"CPU": seconds, "AS": memory, "FSIZE": output, "NOFILE": DESCRIPTORS}
    limits |= dict.fromkeys(("NPROC", "CORE", "MEMLOCK", "MSGQUEUE", "NICE", "RTPRIO"), 0)
    for name, value in limits.items():
        with suppress(ValueError, OSError, AttributeError):  # not every system has every limit
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    return {"nobody": is_root, "filter": library is not None and _filter(ctypes, library)}


def _filter(ctypes, library):
    """Lets libseccomp refuse all system calls but the needed ones; whether it does."""

    class Comparison(ctypes.Structure):
        _fields_ = (
            *(("argument", ctypes.c_uint), ("operator", ctypes.c_int)),
            *(("a", ctypes.c_uint64), ("b", ctypes.c_uint64)),
        )

    library.seccomp_init.restype = ctypes.c_void_p
    allowed, refused = 0x7FFF0000, 0x00050001  # SCMP_ACT_ALLOW, SCMP_ACT_ERRNO(EPERM)
    equal, masked_equal = 4, 7  # SCMP_CMP_EQ, SCMP_CMP_MASKED_EQ
    rules = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(refused)))
    # Files are opened for reading alone, and abort() may signal itself
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    conditions = {
        "open": (1, masked_equal, writing, 0),
        "openat": (2, masked_equal, writing, 0),
        "tgkill": (0, equal, os.getpid(), 0),
    }
    for name in (*NEEDED, *conditions):
        number = library.seccomp_syscall_resolve_name(name.encode())
        comparisons = [Comparison(*conditions[name])] if name in conditions else []
        array = (Comparison * len(comparisons))(*comparisons)
        if number >= 0:  # not every machine has every call
            library.seccomp_rule_add_array(
                rules, ctypes.c_uint32(allowed), number, ctypes.c_uint(len(comparisons)), array
            )
    is_loaded = library.seccomp_load(rules) == 0
    library.seccomp_release(rules)
    return is_loaded


if __name__ == "__main__":
    print(json.dumps(confine(*map(int, sys.argv[1:5]))))
