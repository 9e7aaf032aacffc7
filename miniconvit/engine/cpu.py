"""What a CPU computes blocks with: kernels where Numba is installed, else the lesson's layers."""

from .. import layers
from ..errors import UserError
from ..system import NUMBA, numba_version

PRECISIONS = ("float32", "bf16")
"""Of matrix products on a CPU."""
INSTALL = "pip install 'miniconvit[fast]'"


def check_cpu_precision(precision):
    """Raises UserError where this CPU has no products of this precision."""
    if precision == "float32":
        return
    if precision not in PRECISIONS:
        raise UserError(
            f"--precision {precision} is for --device cuda: a CPU takes {' or '.join(PRECISIONS)}"
        )
    if numba_version() is None:
        raise UserError(f"--precision bf16 on a CPU needs Numba {NUMBA}: {INSTALL}")
    try:
        from .kernels import tiles
    except ImportError:  # the folder was deleted
        raise UserError(
            "--precision bf16 on a CPU needs the folder miniconvit/engine/kernels, which is not "
            "here: put it back, or leave it at float32"
        ) from None
    if not tiles.has_tiles():
        raise UserError(
            "--precision bf16 needs AMX, which Intel's Xeons have since 2023, and Linux. This CPU "
            "or system has none: leave it at float32"
        )


def cpu_blocks(precision="float32"):
    """The blocks of a precision, in the form that convit_forward takes. Raises UserError as
    check_cpu_precision."""
    check_cpu_precision(precision)
    if numba_version() is None:
        return layers
    try:
        from .kernels.block import Blocks
    except ImportError:  # the folder was deleted
        return layers
    if precision == "float32":
        from .kernels.float32 import Float32

        return Blocks(Float32)
    from .kernels.bf16 import Bf16, is_exact

    if not is_exact():
        raise UserError("the bf16 products of this CPU are wrong: leave --precision at float32")
    return Blocks(Bf16)


def of_one_call(blocks, keep=True):
    """These blocks for a call, in which the parameters stay what they are. keep: whether a backward
    pass may follow."""
    return blocks.fresh(keep) if hasattr(blocks, "fresh") else blocks
