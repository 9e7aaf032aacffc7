"""What a training step asks of a GPU: kernels, products, bytes and Python's time, without one.

    python benchmarks/cuda_counts.py

Forward, backward, clipping and AdamW run on the tests' stand-in for CuPy, which counts what CuPy
would launch and what these kernels read and write. For the layers as they are it counts what CuPy
14.2 was seen to do, see tests/engine/test_launches.py. Bytes grow by the image, so those of a large
batch follow from batches of 1, 2 and 3, which must lie on a line. Products and their bytes are
cuBLAS's and stand apart.

Python's time is that of one core for a step whose device does nothing: kernels and cuBLAS are
functions that return at once. What CuPy and the driver take for a launch is not in it, and what the
stand-in takes for an array is. No time of a GPU is here.
"""

import ctypes
import sys
import time
from pathlib import Path
from statistics import median
from unittest.mock import patch

import click
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import fakecuda  # noqa: E402
import fakecupy  # noqa: E402

import miniconvit as mc  # noqa: E402
from miniconvit.arrays import to_device  # noqa: E402
from miniconvit.engine import gpu  # noqa: E402
from miniconvit.engine.objective import Classification  # noqa: E402

SHAPES = {"convit_tiny32": 512, "convit_tiny": 128, "convit_small": 128}
HOWS = ("layers", "kernels", "graph")
STEPS = 30


def steps(xp, name, batch, how):
    """Makes training steps, one each time it is asked for the next."""
    config = mc.VARIANTS[name]
    images = np.zeros((batch, 3, *config.image), "float32")
    given = to_device((images, np.zeros(batch, "int64"), mc.init_params(config)), xp)
    images, labels, params = given
    optimizer = mc.AdamW(params)
    with patch.object(gpu, "kernels", None if how == "layers" else gpu.kernels):
        engine = gpu.DeviceEngine(Classification(config), xp)
        engine.records = how == "graph"
        engine.hold(params, optimizer, max_norm=1.0)
        for number in range(2 * STEPS):
            if engine.takes_whole_steps:
                engine.step(lambda *_: (images, labels), batch, 1e-3, 0, number)
            else:
                *_, grads = engine.loss_and_grads(lambda *_: (images, labels), batch, params)
                engine.clip(grads, 1.0)
                engine.update(optimizer, params, grads)
            yield


def counts(xp, name, how):
    """(launches, products, gigabytes at the batch of SHAPES) of a step."""
    found = []
    for batch in (1, 2, 3):
        made = steps(xp, name, batch, how)
        for _ in range(2 if how == "graph" else 1):
            next(made)
        fakecupy.reset()
        next(made)
        found.append(fakecupy.STATE.bytes)
        launches, products = fakecupy.STATE.launches, fakecupy.STATE.products
    one, two, three = found
    assert abs((three - two) - (two - one)) <= 1e-3 * (two - one), found
    return launches, products, (one + (SHAPES[name] - 1) * (two - one)) / 1e9


NOTHING = 'extern "C" int nothing(...) { return 0; }'


def python_ms(xp, name, how):
    """The median of a step's milliseconds of one core where the device does nothing."""
    file = Path(fakecuda.FOLDER.name) / "nothing.cpp"
    file.write_text(NOTHING)
    library = file.with_suffix(".so")
    fakecuda.subprocess.run(
        [fakecuda.COMPILER, "-shared", "-fPIC", "-o", library, file], check=True
    )
    nothing = ctypes.CDLL(str(library)).nothing

    def get_function(self, name):
        return lambda grid, block, args, shared_mem=0: None

    gpu.kernels.kernels_for.cache_clear()
    with (
        patch.object(fakecupy.RawModule, "get_function", get_function),
        patch.object(fakecuda.Cublas, "cublasGemmStridedBatchedEx", staticmethod(nothing)),
        patch.object(xp, "empty", lambda shape, dtype: fakecupy.new(np.empty(shape, dtype))),
    ):
        made, taken = steps(xp, name, 1, how), []
        for _ in range(STEPS):
            began = time.process_time()
            next(made)
            taken.append(1000 * (time.process_time() - began))
    gpu.kernels.kernels_for.cache_clear()  # those that do nothing
    return median(taken[STEPS // 3 :])


@click.command()
def main():
    """Prints a table."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        xp = fakecupy.install(monkeypatch)
        click.echo("| a step of | by | kernels | products | bytes of kernels | Python |")
        click.echo("| --- | --- | --- | --- | --- | --- |")
        for name, batch in SHAPES.items():
            for how in HOWS:
                launches, products, gigabytes = counts(xp, name, how)
                of_graph = how == "graph"
                in_graph = ", 1 of them the graph" if of_graph else ""
                cells = f"{launches:,}{in_graph} | {'in it' if of_graph else products}"
                cells += f" | {'as without' if of_graph else f'{gigabytes:.1f} GB'}"
                is_timed = how == "kernels"
                cells += f" | {f'{python_ms(xp, name, how):.1f} ms' if is_timed else ''}"
                click.echo(f"| {name}, {batch} | {how} | {cells} |")


if __name__ == "__main__":
    main()
