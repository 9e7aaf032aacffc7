"""What a CPU computes blocks with: the kernels where Numba is installed, else the lesson's layers."""

from importlib.metadata import PackageNotFoundError, version

from .. import layers

NUMBA = (0, 68)
"""The version whose compiled loops are tested. Another one may compute otherwise."""
PLAIN = ": pip install 'miniconvit[fast]' makes it faster"


def numba_version():
    """The version of Numba that the kernels would be compiled by, or None."""
    try:
        found = version("numba")
    except PackageNotFoundError:
        return None
    return found if tuple(map(int, found.split(".")[:2])) == NUMBA else None


def cpu_blocks():
    """The blocks for float32, in the form that convit_forward takes."""
    if numba_version() is None:
        return layers
    try:
        from .kernels.block import Blocks
        from .kernels.float32 import Float32
    except ImportError:  # the folder was deleted
        return layers
    return Blocks(Float32)


def of_one_call(blocks, keep=True):
    """These blocks for a call, in which the parameters stay what they are. keep: whether a backward
    pass may follow."""
    return blocks.fresh(keep) if hasattr(blocks, "fresh") else blocks
