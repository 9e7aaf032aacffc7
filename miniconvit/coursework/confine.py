"""What a process does to itself before it reads a student's text: limits that nothing lifts.

This file is copied beside the student's, and needs Python alone.
"""

import os
from contextlib import suppress

NOBODY = 65534


def limit_resources(seconds, memory, output):
    """No more time, memory, output or processes than this; where root starts it, as nobody."""
    try:
        import resource  # before we are nobody, who may not read the standard library
    except ImportError:  # Windows: the parent's clock remains
        return
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    limits = {"CPU": seconds, "AS": memory, "FSIZE": output, "NPROC": 0, "CORE": 0}
    for name, value in limits.items():
        with suppress(ValueError, OSError, AttributeError):  # not every system has every limit
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
