"""Where the kernels for the CPU are tested: beside the version of Numba that they were made for."""

import pytest

from miniconvit.engine.cpu import INSTALL
from miniconvit.system import NUMBA, numba_version

REASON = f"the kernels for the CPU need Numba {NUMBA}: {INSTALL}"
needs_numba = pytest.mark.skipif(numba_version() is None, reason=REASON)


def skip_without_numba():
    """Skips the rest of a file, before it imports the kernels."""
    if numba_version() is None:
        pytest.skip(REASON, allow_module_level=True)
